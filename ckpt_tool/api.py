"""The verbs as functions: open, convert, consolidate, verify. The command line is a thin shell over them.

    import ckpt_tool
    checkpoint = ckpt_tool.open("run/checkpoints")
    ckpt_tool.convert("run/checkpoints", "universal", to="universal", verify=True)

All raise ``ckpt_tool.CkptToolError`` with a message a user can act on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ckpt_tool.canonical import Checkpoint, DType
from ckpt_tool.commit import occupied
from ckpt_tool.comparison import Verdict, compare
from ckpt_tool.conversion import Execution as Execution
from ckpt_tool.conversion import Outcome, carry_out, lacking_room, refuse_own_source, refuse_strangers
from ckpt_tool.diagnosis import Diagnosis as Diagnosis
from ckpt_tool.diagnosis import Severity, examine, examine_files, tag_file, unusable_config
from ckpt_tool.duplicates import Copies, find_copies
from ckpt_tool.errors import MismatchError, UnreadableError, UsageError
from ckpt_tool.execute.budget import Budget
from ckpt_tool.families import family_of
from ckpt_tool.families.adapters import refuse_adapters
from ckpt_tool.families.agreement import check_config
from ckpt_tool.families.autoep import refuse_composite, to_autoep
from ckpt_tool.families.model_in_memory import check_against_model
from ckpt_tool.families.naming import HUB, to_hub
from ckpt_tool.families.roots import check_described, fitted, misfit
from ckpt_tool.formats.base import TargetOptions
from ckpt_tool.formats.deepspeed.writing.module_order import with_module_order
from ckpt_tool.formats.hf.quantised import refuse_unreadable
from ckpt_tool.formats.registry import TARGETS, locate, open_checkpoint
from ckpt_tool.integrity import check, check_files
from ckpt_tool.layout import LeftOut
from ckpt_tool.manifest import read_manifest
from ckpt_tool.model_files import (
    check_same_family,
    find_config,
    left_behind,
    read_config,
    read_ds_config,
)
from ckpt_tool.plan import make_plan
from ckpt_tool.storage import LocalReader
from ckpt_tool.sums import own_manifest
from ckpt_tool.system_errors import told
from ckpt_tool.values import Difference, check_replicas
from ckpt_tool.wrappers import as_saved

PathLike = str | os.PathLike[str]

# Targets with the names of a DeepSpeed run's modules.
_DEEPSPEED = frozenset({"universal", "zero3", "zero2", "zero1"})
# What each target takes beside --dtype, which it refuses itself, and --config, which tells names.
_ZERO = frozenset({"--ep", "--world", "--like", "--weights-only", "--ds-config"})
_TAKES = {
    "universal": frozenset({"--keep-groups", "--weights-only"}),
    "zero3": _ZERO,
    "zero2": _ZERO,
    "zero1": _ZERO,
    "dcp": frozenset({"--ep", "--world", "--like", "--style", "--weights-only"}),
    "hf": frozenset({"--hf-layout", "--max-shard-size"}),
}
# Targets that are the same at any topology.
_WITHOUT_RANKS = frozenset({"universal", "hf"})

DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True)
class Result:
    """What a conversion did, or with ``dry_run`` would do. Sizes in bytes.

    ``checked_bytes`` of the source were compared with its own checksums; ``unchecked_bytes`` were read and
    were not, by the reason.
    """

    source: str
    source_format: str
    target: str
    bytes_read: int
    bytes_written: int
    files: int
    peak_memory_bytes: int
    left_out: Mapping[str, str]
    casts: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...]
    verdict: Verdict | None = None
    checked_bytes: int = 0
    unchecked_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def disk_bytes(self) -> int:
        return self.bytes_written


@told()
def open(path: PathLike, *, config: PathLike | None = None) -> Checkpoint:
    """Read the catalogue of a checkpoint: metadata only, whatever its size.

    Args:
        config: a ``config.json``, which tells the experts where names and shapes do not.
    """
    reader, checkpoint = open_checkpoint(Path(path))
    reader.close()
    return checkpoint if config is None else _with_experts(checkpoint, Path(path), config)


@told()
def convert(
    source: PathLike,
    target: PathLike,
    *,
    to: str | None,
    ep: int | None = None,
    world: int | None = None,
    like: PathLike | None = None,
    style: str | None = None,
    hf_layout: str | None = None,
    dtype: str | None = None,
    weights_only: bool = False,
    config: PathLike | None = None,
    ds_config: PathLike | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    keep_groups: bool = False,
    verify: bool = False,
    dry_run: bool = False,
    how: Execution | None = None,
) -> Result:
    """Write the checkpoint at ``source`` in another format into the new directory ``target``.

    Args:
        to: a target of ``formats.registry``: ``universal``, ``zero3``, ``hf``, ...; None: the source's.
        ep, world: the target's expert-parallel size and number of ranks; by default the source's.
        like: a checkpoint that the target run saved itself; its layout is filled with the source's values.
        style: a dialect of DCP: torchtitan, accelerate, plain or transformers.
        hf_layout: safetensors in the published form (``hub``) or transformers' own in memory (``fused``).
        dtype: cast floats to ``fp32``, ``bf16`` or ``fp16``; None keeps what is stored.
        weights_only: leave optimizer state out.
        config: a model's ``config.json``, or a directory with one.
        ds_config: a DeepSpeed config (JSON) that supplies what the source does not say.
        max_shard_bytes: largest safetensors file.
        keep_groups: write the source's optimizer group settings into a Universal checkpoint.
        verify: check the source's own checksums first, and compare the result with it, bit for bit, before
            it is published.
        dry_run: plan and check everything, write nothing.

    Raises:
        CkptToolError: see the message; nothing is left under the target's name.
    """
    how = how or Execution()
    if to is not None and to not in TARGETS:
        raise UsageError(f"--to {to!r} is not a target; choose from {', '.join(sorted(TARGETS))}.")
    given = {
        "--ep": ep, "--world": world, "--like": like, "--style": style, "--hf-layout": hf_layout,
        "--weights-only": weights_only, "--ds-config": ds_config, "--keep-groups": keep_groups,
        "--max-shard-size": max_shard_bytes != DEFAULT_SHARD_BYTES,
    }  # fmt: skip
    if to is not None:
        _refuse_useless(to, given)
    budget = how.budget()
    reader, checkpoint = open_checkpoint(Path(source))
    try:
        if to is None:
            to = _own_target(checkpoint)
            _refuse_useless(to, given)
        model_config, extra = find_config(Path(source), config)
        if config is not None and model_config is not None:
            check_same_family(checkpoint.model_config, model_config)
        republished = to == "hf" and checkpoint.format == TARGETS["hf"].name
        files_left = left_behind(Path(source), extra) if republished else ()
        template = open(like) if like is not None else None
        refuse_unreadable(checkpoint.tensors)
        if checkpoint.unresolved and to != "hf" and not weights_only:
            raise UnreadableError(
                f"{checkpoint.root}: {checkpoint.unresolved} Pass --weights-only to convert without it."
            )
        if checkpoint.nameless and not (to == "dcp" and style is None):
            raise UnreadableError(f"{checkpoint.root}: {checkpoint.nameless}")
        left_out: tuple[LeftOut, ...] = ()
        if to == "hf" or _engine(checkpoint.format) != _engine(TARGETS[to].name):
            refuse_adapters(checkpoint)
            if model_config is not None:
                checkpoint, model_config, left_out = fitted(checkpoint, model_config)
                not_compared = check_against_model(checkpoint, model_config)
                checkpoint = replace(checkpoint, notes=(*checkpoint.notes, *not_compared))
        run_config = read_ds_config(Path(ds_config), to) if ds_config is not None else None
        if to == "dcp" and model_config is not None and (checkpoint.dialect == HUB or config is not None):
            check_described(checkpoint, model_config)
        if to in _DEEPSPEED:
            checkpoint = _under_module_names(checkpoint, model_config, template)
            if to != "universal" and template is None and not checkpoint.module_names:
                checkpoint = with_module_order(checkpoint, model_config or {}, run_config or {}, ep or 1)
            saved = (template or checkpoint).saved_names
            checkpoint, template = as_saved(checkpoint, saved), template and as_saved(template, saved)
        options = TargetOptions(
            dtype=parse_dtype(dtype),
            config=model_config,
            max_shard_bytes=max_shard_bytes,
            extra_files=extra if to == "hf" else {},
            keep_groups=keep_groups,
            world=world,
            ep=ep,
            like=template,
            style=style,
            hf_layout=hf_layout,
            ds_config=run_config,
            weights_only=weights_only,
        )
        layout = TARGETS[to].layout(checkpoint, options)
        layout = replace(layout, left_out=(*layout.left_out, *left_out))
        plan = make_plan(layout, checkpoint)
        destination = Path(os.path.abspath(target))  # noqa: PTH100 (keep symlinks as the user wrote them)
        outcome = Outcome(None)
        refuse_own_source(Path(reader.root), destination)
        if how.overwrite:
            refuse_strangers(destination, plan)
        if dry_run and not how.overwrite and occupied(destination):
            raise UsageError(f"{destination} exists. Choose another destination, or pass --overwrite.")
        lacking = lacking_room(destination, plan.bytes_written) if dry_run else ""
        if not dry_run:
            check_replicas(checkpoint, reader, budget)
            outcome = carry_out(plan, reader, checkpoint, destination, to, options, how, budget, verify)
    finally:
        reader.close()
    return Result(
        source=checkpoint.root,
        source_format=checkpoint.format,
        target=str(target),
        bytes_read=plan.bytes_read,
        bytes_written=plan.bytes_written,
        files=len(plan.files),
        peak_memory_bytes=budget.nbytes(plan.largest_block),
        left_out={one.label: one.reason for one in plan.left_out},
        casts=tuple((cast.label, cast.source, cast.target) for cast in plan.casts),
        notes=(*layout.notes, *files_left, *outcome.notes, *([lacking] if lacking else [])),
        verdict=outcome.verdict,
        checked_bytes=outcome.checked.right if outcome.checked else 0,
        unchecked_bytes=outcome.checked.others if outcome.checked else {},
    )


def reshard(
    source: PathLike,
    target: PathLike,
    *,
    ep: int | None = None,
    world: int | None = None,
    like: PathLike | None = None,
    weights_only: bool = False,
    verify: bool = False,
    dry_run: bool = False,
    how: Execution | None = None,
) -> Result:
    """Write the checkpoint at ``source`` in its own format at another EP size or number of ranks.

    Raises:
        UsageError: the format has no ranks to re-shard for, or the sizes do not divide.
    """
    return convert(
        source,
        target,
        to=None,
        ep=ep,
        world=world,
        like=like,
        weights_only=weights_only,
        verify=verify,
        dry_run=dry_run,
        how=how,
    )


def consolidate(
    source: PathLike,
    target: PathLike,
    *,
    dtype: str | None = "fp32",
    hf_layout: str | None = None,
    config: PathLike | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    verify: bool = False,
    dry_run: bool = False,
    how: Execution | None = None,
) -> Result:
    """Write Hugging Face safetensors ready for ``from_pretrained``: fp32 from the masters by default."""
    return convert(
        source,
        target,
        to="hf",
        dtype=dtype,
        hf_layout=hf_layout,
        config=config,
        max_shard_bytes=max_shard_bytes,
        verify=verify,
        dry_run=dry_run,
        how=how,
    )


def _own_target(checkpoint: Checkpoint) -> str:
    to = next((name for name, known in TARGETS.items() if known.name == checkpoint.format), None)
    if to is None or to in _WITHOUT_RANKS:
        raise UsageError(
            f"{checkpoint.root} is {checkpoint.format}, which has no ranks or is not written; `ckpt-tool "
            f"convert --to` writes another format: {', '.join(sorted(set(TARGETS) - _WITHOUT_RANKS))}."
        )
    return to


def _engine(name: str) -> str:
    """Whose names a format has: those of one engine's modules, or published ones."""
    return name.partition("-")[0]


def _refuse_useless(to: str, given: Mapping[str, object]) -> None:
    useless = sorted(name for name, value in given.items() if value and name not in _TAKES[to])
    if useless:
        raise UsageError(f"{', '.join(useless)}: --to {to} has no use for it. Leave it out.")


@told()
def find_copied_experts(
    source: PathLike, *, config: PathLike | None = None, how: Execution | None = None
) -> list[Copies]:
    """Experts of a layer that are bit for bit equal: the mark of ranks that overwrote each other's.

    Raises:
        UsageError: no experts are recognised, so nothing could be checked.
    """
    how = how or Execution()
    reader, checkpoint = open_checkpoint(Path(source))
    try:
        checkpoint = _with_experts(checkpoint, Path(source), config)
        if not checkpoint.moe_layers:
            raise UsageError(
                f"No routed experts are recognised in {checkpoint.root}, so nothing was checked. If the "
                "model has some, pass its config.json with --config, which tells their names."
            )
        return find_copies(checkpoint, reader, how.budget(), how.meter)
    finally:
        reader.close()


@told()
def doctor(source: PathLike, *, config: PathLike | None = None, how: Execution | None = None) -> Diagnosis:
    """What is wrong with a checkpoint: its files, its metadata, and every value, which are read once.

    Args:
        config: the model's ``config.json``; by default one in the checkpoint's directory or the one above.

    Raises:
        UnreadableError: it is no checkpoint that is read here, and nothing more can be said.
    """
    how = how or Execution()
    path = Path(source)
    tags = tag_file(path)
    if any(finding.severity is Severity.ERROR for finding in tags):
        return Diagnosis(str(path), None, None, 0, 0, tuple(tags), ())
    found: Mapping[str, Any] | None = None
    try:
        found, _ = find_config(path, config)
    except (UnreadableError, UsageError) as error:
        if config is not None:
            raise
        tags.append(unusable_config(error))
    try:
        reader, checkpoint = open_checkpoint(path)
    except UnreadableError as error:
        return examine_files(path, error).with_findings(tags)
    try:
        if found is not None:
            checkpoint = _with_experts(checkpoint, path, config)
        return examine(checkpoint, reader, found, how.budget(), how.meter).with_findings(tags)
    finally:
        reader.close()


@told()
def verify(
    a: PathLike,
    b: PathLike | None = None,
    *,
    config: PathLike | None = None,
    how: Execution | None = None,
) -> Verdict:
    """One checkpoint: coverage, manifest and archive checksums. Two: equal bit for bit, canonically."""
    how = how or Execution()
    budget = how.budget()
    if b is None:
        return _verify_one(Path(a), budget, how)
    reader, checkpoint = open_checkpoint(Path(a))
    try:
        other_reader, other = open_checkpoint(Path(b))
        try:
            found = read_config(Path(config)) if config is not None else None
            return compare(checkpoint, other, (reader, other_reader), budget, config=found, meter=how.meter)
        finally:
            other_reader.close()
    finally:
        reader.close()


def _with_experts(checkpoint: Checkpoint, source: Path, config: PathLike | None) -> Checkpoint:
    """The catalogue with its experts told apart, where a config at hand does what reading could not."""
    found, _ = find_config(source, config)
    if found is None or checkpoint.moe_layers:
        return checkpoint
    try:
        family = family_of(found)
        published = to_hub(checkpoint, family, found)
    except (UsageError, MismatchError) as error:
        return replace(checkpoint, notes=(*checkpoint.notes, str(error)))
    try:
        check_config(published, family, found)
    except MismatchError as error:
        return replace(published, notes=(*published.notes, str(error)))
    return published


def _verify_one(path: Path, budget: Budget, how: Execution) -> Verdict:
    """Against its manifest and its own checksums; where it cannot be read any more, the manifest tells
    which files are damaged."""
    directory = locate(path)
    own = own_manifest(path if path.is_dir() and read_manifest(path) is not None else directory)
    manifest = own[1] if own else None
    root = LocalReader(own[0] if own else directory)
    try:
        try:
            reader, checkpoint = open_checkpoint(path)
        except UnreadableError:
            verdict = check_files(manifest, root, budget, meter=how.meter) if manifest else None
            if verdict is None or verdict.passed:
                raise
            return verdict
        try:
            verdict = check(checkpoint, reader, manifest, root, budget, meter=how.meter)
            wrong = misfit(checkpoint) if checkpoint.format == TARGETS["hf"].name else None
            found = () if wrong is None else (Difference("names", checkpoint.root, wrong),)
            return replace(verdict, differences=(*verdict.differences, *found))
        finally:
            reader.close()
    finally:
        root.close()


def parse_dtype(name: str | None) -> DType | None:
    """``fp32``, ``bf16``, ``fp16`` (or torch's names); ``keep`` and None keep what is stored."""
    if name is None or name == "keep":
        return None
    known = {"fp32": DType.float32, "bf16": DType.bfloat16, "fp16": DType.float16}
    known |= {dtype.torch_name: dtype for dtype in list(known.values())}
    if name not in known:
        raise UsageError(f"--dtype {name!r} is not one of keep, fp32, bf16, fp16.")
    return known[name]


def _under_module_names(
    checkpoint: Checkpoint, config: Mapping[str, Any] | None, like: Checkpoint | None
) -> Checkpoint:
    """A source of another engine under the names its parameters have in a DeepSpeed run.

    That is AutoEP's module tree, unless a template shows that the run trains transformers' own.

    Raises:
        UsageError: the source does not say which model it is, and no config was given.
    """
    own = checkpoint.format.startswith("deepspeed")
    if own or (like is not None and like.dialect == checkpoint.dialect):
        return checkpoint
    if config is None:
        raise UsageError(
            f"{checkpoint.root} is {checkpoint.format}, whose tensors have other names than a DeepSpeed "
            "run's. Pass --config with the model's config.json, which tells the family."
        )
    family = family_of(config)
    published = to_hub(checkpoint, family, config)
    check_config(published, family, config)
    refuse_composite(published, config)
    return to_autoep(published, family)
