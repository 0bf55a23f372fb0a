"""The verbs as functions: open, convert, consolidate, verify. The command line is a thin shell over them.

    import ckpt_tool
    checkpoint = ckpt_tool.open("run/checkpoints")
    ckpt_tool.convert("run/checkpoints", "universal", to="universal", verify=True)

All raise ``ckpt_tool.CkptToolError`` with a message a user can act on.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ckpt_tool.canonical import Checkpoint, DType, Topology
from ckpt_tool.comparison import Verdict, compare
from ckpt_tool.conversion import Execution as Execution
from ckpt_tool.conversion import (
    Outcome,
    Wanted,
    carry_out,
    lacking_room,
    refuse_own_source,
    refuse_strangers,
)
from ckpt_tool.diagnosis import Diagnosis as Diagnosis
from ckpt_tool.diagnosis import Severity, examine, examine_files, tag_file, unusable_config
from ckpt_tool.duplicates import Copies, find_copies
from ckpt_tool.errors import CkptToolError, MismatchError, UnreadableError, UsageError
from ckpt_tool.execute.budget import Budget
from ckpt_tool.families import family_of, is_expert
from ckpt_tool.families.agreement import check_config
from ckpt_tool.families.naming import to_hub
from ckpt_tool.families.roots import misfit
from ckpt_tool.formats.base import Request
from ckpt_tool.formats.declaration import Target
from ckpt_tool.formats.known import all_options, meant_target, own_target, published_target, targets
from ckpt_tool.formats.options import DTYPES, EP, WORLD, recorded, refuse_unknown
from ckpt_tool.formats.registry import locate, open_checkpoint
from ckpt_tool.integrity import check, check_files
from ckpt_tool.layout import LeftOut
from ckpt_tool.manifest import read_manifest
from ckpt_tool.model_files import (
    Found,
    check_same_family,
    find_config,
    left_behind,
    naming,
)
from ckpt_tool.opened import Opened as Opened
from ckpt_tool.page import refuse_other_files, rendered, write_page
from ckpt_tool.page.data import page_data
from ckpt_tool.plan import make_plan
from ckpt_tool.storage import Location
from ckpt_tool.stores.known import Place, local_path, open_destination, open_location, store_of
from ckpt_tool.sums import own_manifest
from ckpt_tool.system_errors import told
from ckpt_tool.values import Difference, check_replicas

PathLike = str | os.PathLike[str]  # URLs among the former


@dataclass(frozen=True, slots=True)
class Result:
    """What a conversion did, or with ``dry_run`` would do. Sizes in bytes.

    ``checked_bytes`` of the source were compared with its own checksums; ``unchecked_bytes`` were read and
    were not, by the reason. ``was`` and ``becomes`` are the ranks of source and target (None: any load it).
    ``kept`` counts the elements that are carried over, by state. ``loading`` is the line that loads the
    result. ``resumed`` files were written by an earlier run and kept: neither read nor written now.
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
    was: Topology = field(default_factory=Topology)
    becomes: Topology | None = None
    kept: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    resumed: int = 0
    loading: str = ""

    @property
    def disk_bytes(self) -> int:
        return self.bytes_written


@told()
def open(path: PathLike, *, config: PathLike | None = None) -> Opened:
    """Open a checkpoint of any format to read from: ``opened.Opened`` has what can be asked for.

    Args:
        config: the model's ``config.json``, or a directory with it; by default one near the checkpoint
            (``model_files.find_config``). It tells published names.

    Raises:
        CkptToolError: it is not read, or the config does not fit.
    """
    reader, checkpoint = open_checkpoint(path)
    found = _config_near(path, config)
    return Opened(reader, _with_experts(checkpoint, found, experts_only=True), found.config)


@told()
def catalogue(path: PathLike, *, config: PathLike | None = None) -> Checkpoint:
    """Read the catalogue of a checkpoint: metadata only, whatever its size.

    Args:
        config: a ``config.json``, which tells the experts where names and shapes do not; by default one
            near the checkpoint (``model_files.find_config``).
    """
    reader, checkpoint = open_checkpoint(path)
    reader.close()
    return _with_experts(checkpoint, _config_near(path, config), experts_only=True)


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
    max_shard_bytes: int | str | None = None,
    keep_groups: bool = False,
    verify: bool = False,
    dry_run: bool = False,
    max_memory: int | str | None = None,
    how: Execution | None = None,
    **more: Any,
) -> Result:
    """Write the checkpoint at ``source`` in another format into the new directory ``target``.

    Args:
        to: a target of ``formats.known``: ``universal``, ``zero3``, ``hf``, ...; None: the source's.
        ep, world: the target's expert-parallel size and number of ranks; by default the source's.
        like: a checkpoint that the target run saved itself; its layout is filled with the source's values.
        style: a dialect of DCP: torchtitan, accelerate, plain or transformers.
        hf_layout: safetensors in the published form (``hub``) or transformers' own in memory (``fused``).
        dtype: cast floats to ``fp32``, ``bf16`` or ``fp16``; None keeps what is stored.
        weights_only: leave optimizer state out.
        config: a model's ``config.json``, or a directory with one.
        ds_config: a DeepSpeed config (JSON) that supplies what the source does not say.
        max_shard_bytes: largest safetensors file, a number or text like "2GB"; None: 5 GB.
        keep_groups: write the source's optimizer group settings into a Universal checkpoint.
        verify: check the source's own checksums first, and compare the result with it, bit for bit, before
            it is published.
        dry_run: plan and check everything, write nothing.
        max_memory: bytes all buffers may hold together, a number or text like "512MiB"; in place of that
            of ``how``.
        how: threads, durability, progress: see ``Execution``.
        more: options of formats that are not part of the package (``formats.known.register``).

    Raises:
        CkptToolError: see the message; nothing is left under the target's name.
    """
    began = time.monotonic()
    how = _how(how, max_memory)
    given = {
        "ep": ep, "world": world, "like": like, "style": style, "hf_layout": hf_layout,
        "weights_only": weights_only, "ds_config": ds_config, "keep_groups": keep_groups,
        "max_shard_bytes": max_shard_bytes, **more,
    }  # fmt: skip
    _refuse_unknown(more)
    given |= {option.name: option.checked(given.get(option.name)) for option in all_options()}
    known = None if to is None else _target(to)
    if known is not None:
        _refuse_useless(known, given)
    cast = parse_dtype(dtype)
    budget = how.budget()
    reader, checkpoint = open_checkpoint(source)
    try:
        if known is None:
            known = _own_target(checkpoint)
            _refuse_useless(known, given)
        found = find_config(source, config)
        model_config, beside = found.config, found.beside
        if config is not None and model_config is not None:
            check_same_family(checkpoint.model_config, model_config)
        written = known.load()
        original, was = checkpoint, checkpoint.topology
        republished = known.published and checkpoint.format == written.name
        files_left = left_behind(source, beside) if republished else ()
        values = known.values(given)
        with naming(found):
            prepared = written.prepare(
                Request(known.to, checkpoint, values, cast, model_config, config is not None, beside)
            )
            checkpoint = prepared.checkpoint
            layout = written.layout(checkpoint, prepared.options)
        layout = replace(layout, left_out=(*layout.left_out, *prepared.left_out))
        plan = make_plan(layout, checkpoint)
        parameters = {"to": known.to, "dtype": str(cast or "keep")}
        parameters |= recorded(known.options, all_options(), values)
        wanted = Wanted(parameters, prepared.config, cast)
        destination = open_destination(target)
        outcome = Outcome(None)
        refuse_own_source(open_location(reader.root), destination)
        if how.overwrite:
            refuse_strangers(destination, plan)
        if dry_run and not how.overwrite and store_of(destination).is_taken(destination):
            raise UsageError(f"{destination} exists. Choose another destination, or pass --overwrite.")
        lacking = lacking_room(destination, plan.bytes_written) if dry_run else ""
        unchanged = (
            known.resharded
            and written.name == checkpoint.format
            and (was.world_size, was.ep_size) == _sizes(layout.topology)
            and not any(
                option.is_given(values[option.name])
                for option in known.options
                if option not in (EP, WORLD)
            )
        )
        if not dry_run:
            check_replicas(checkpoint, reader, budget)
            outcome = carry_out(plan, reader, checkpoint, destination, wanted, how, budget, verify)
    finally:
        reader.close()
    return Result(
        source=checkpoint.root,
        source_format=checkpoint.format,
        target=str(open_location(target)),
        bytes_read=plan.bytes_read if dry_run else outcome.read,
        bytes_written=plan.bytes_written if dry_run else outcome.written,
        files=len(plan.files),
        peak_memory_bytes=budget.nbytes(plan.largest_block),
        left_out={one.label: one.reason for one in plan.left_out},
        casts=tuple((cast.label, cast.source, cast.target) for cast in plan.casts),
        notes=(
            *([_UNCHANGED] if unchanged else []),
            *layout.notes,
            *files_left,
            *outcome.notes,
            *([lacking] if lacking else []),
        ),
        verdict=outcome.verdict,
        checked_bytes=outcome.checked.right if outcome.checked else 0,
        unchecked_bytes=outcome.checked.others if outcome.checked else {},
        was=was,
        becomes=layout.topology,
        kept=_kept(original, plan.left_out),
        seconds=time.monotonic() - began,
        resumed=outcome.resumed,
        loading=layout.loading.replace("{target}", str(open_location(target))),
    )


_UNCHANGED = (
    "Nothing changes: the ranks stay as they are, and so do all values. Pass --ep or --world for others."
)


def _sizes(topology: Topology | None) -> tuple[int | None, int | None] | None:
    return None if topology is None else (topology.world_size, topology.ep_size)


def _kept(source: Checkpoint, left_out: Iterable[LeftOut]) -> dict[str, int]:
    """How many elements of each state are carried over: names and stacks differ at the target, their
    elements do not."""
    held = Counter[str]()
    for tensor in source.tensors:
        held[tensor.state] += tensor.numel
    for one in left_out:
        if one.tensor is not None:
            held[one.tensor.state] -= one.tensor.numel
    return {state: count for state, count in held.items() if count > 0}


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
    max_memory: int | str | None = None,
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
        max_memory=max_memory,
        how=how,
    )


def consolidate(
    source: PathLike,
    target: PathLike,
    *,
    dtype: str | None = "fp32",
    hf_layout: str | None = None,
    config: PathLike | None = None,
    max_shard_bytes: int | str | None = None,
    verify: bool = False,
    dry_run: bool = False,
    max_memory: int | str | None = None,
    how: Execution | None = None,
) -> Result:
    """Write Hugging Face safetensors ready for ``from_pretrained``: fp32 from the masters by default."""
    return convert(
        source,
        target,
        to=published_target().to,
        dtype=dtype,
        hf_layout=hf_layout,
        config=config,
        max_shard_bytes=max_shard_bytes,
        verify=verify,
        dry_run=dry_run,
        max_memory=max_memory,
        how=how,
    )


def _how(how: Execution | None, max_memory: int | str | None) -> Execution:
    how = how or Execution()
    return how if max_memory is None else replace(how, max_memory=max_memory)


def _target(to: str) -> Target:
    if not isinstance(to, str):
        raise UsageError(f"to={to!r} is {type(to).__name__}; to takes one of {', '.join(targets())}.")
    refuse_unknown("--to", to, targets(), meant_target(to))
    return targets()[to]


def _own_target(checkpoint: Checkpoint) -> Target:
    known = own_target(checkpoint.format)
    if known is None or not known.resharded:
        others = sorted(to for to, target in targets().items() if target.resharded)
        raise UsageError(
            f"{checkpoint.root} is {checkpoint.format}, which has no ranks or is not written; `ckpt-tool "
            f"convert --to` writes another format: {', '.join(others)}."
        )
    return known


def _refuse_unknown(given: Mapping[str, Any]) -> None:
    known = sorted(option.name for option in all_options())
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise UsageError(
            f"{', '.join(unknown)}: no format has an option of this name. There are {', '.join(known)}."
        )


def _refuse_useless(target: Target, given: Mapping[str, Any]) -> None:
    useless = sorted(
        option.flag
        for option in all_options()
        if option not in target.options and option.is_given(given.get(option.name))
    )
    if useless:
        raise UsageError(f"{', '.join(useless)}: --to {target.to} has no use for it. Leave it out.")


@told()
def find_copied_experts(
    source: PathLike,
    *,
    config: PathLike | None = None,
    max_memory: int | str | None = None,
    how: Execution | None = None,
) -> list[Copies]:
    """Experts of a layer that are bit for bit equal: the mark of ranks that overwrote each other's.

    Raises:
        UsageError: no experts are recognised, so nothing could be checked.
    """
    how = _how(how, max_memory)
    reader, checkpoint = open_checkpoint(source)
    try:
        found = _config_near(source, config)
        checkpoint = _with_experts(checkpoint, found)
        if not checkpoint.moe_layers:
            with naming(found):
                raise UsageError(
                    f"No routed experts are recognised in {checkpoint.root}, so nothing was checked. If "
                    "the model has some, pass its config.json with --config, which tells their names."
                )
        return find_copies(checkpoint, reader, how.budget(), how.meter)
    finally:
        reader.close()


@told()
def page(
    source: PathLike,
    target: PathLike,
    *,
    stats: bool = False,
    config: PathLike | None = None,
    max_memory: int | str | None = None,
    how: Execution | None = None,
) -> None:
    """Write a self-contained HTML page about a checkpoint: topology, a map of experts, bytes, tensors.

    Args:
        target: the file, which may be an earlier page.
        stats: read all values once, for norms, updates, experts that stand out, and ``doctor``'s findings.
        config: the model's ``config.json``, which tells the experts where names and shapes do not.

    Raises:
        UsageError: ``target`` exists and is no page.
    """
    how = _how(how, max_memory)
    path, file = open_location(source), Path(target)
    refuse_other_files(file)
    reader, checkpoint = open_checkpoint(path)
    try:
        found = _config_near(path, config)
        checkpoint = _with_experts(checkpoint, found)
        diagnosis = (
            examine(checkpoint, reader, found.config, how.budget(), how.meter, sums=True) if stats else None
        )
        write_page(file, rendered(page_data(checkpoint, diagnosis)))
    finally:
        reader.close()


@told()
def doctor(
    source: PathLike,
    *,
    config: PathLike | None = None,
    max_memory: int | str | None = None,
    how: Execution | None = None,
) -> Diagnosis:
    """What is wrong with a checkpoint: its files, its metadata, and every value, which are read once.

    Args:
        config: the model's ``config.json``; by default one in the checkpoint's directory or the one above.

    Raises:
        UnreadableError: it is no checkpoint that is read here, and nothing more can be said.
    """
    how = _how(how, max_memory)
    path = local_path(source, "doctor")
    tags = tag_file(path)
    if any(finding.severity is Severity.ERROR for finding in tags):
        return Diagnosis(str(path), None, None, 0, 0, tuple(tags), ())
    found: Found | None = None
    try:
        found = find_config(path, config)
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
            checkpoint = _with_experts(checkpoint, found)
        near = found.config if found is not None else None
        return examine(checkpoint, reader, near, how.budget(), how.meter).with_findings(tags)
    finally:
        reader.close()


@told()
def verify(
    a: PathLike,
    b: PathLike | None = None,
    *,
    config: PathLike | None = None,
    max_memory: int | str | None = None,
    how: Execution | None = None,
) -> Verdict:
    """One checkpoint: coverage, manifest and archive checksums. Two: equal bit for bit, canonically."""
    how = _how(how, max_memory)
    budget = how.budget()
    if b is None:
        return _verify_one(open_location(a), budget, how)
    reader, checkpoint = open_checkpoint(a)
    try:
        other_reader, other = open_checkpoint(b)
        try:
            found = _config_near(a, config)
            if found.config is None:
                more = _config_near(b, None)
                found = more._replace(looked=(*found.looked, *more.looked))
            with naming(found):
                return compare(
                    checkpoint,
                    other,
                    (reader, other_reader),
                    budget,
                    config=found.config if found.given else None,
                    nearby=found.config,
                    meter=how.meter,
                )
        finally:
            other_reader.close()
    finally:
        reader.close()


def _config_near(source: Place, config: PathLike | None) -> Found:
    """The config to use where a checkpoint is only looked at: one that nobody named and that is no model's
    stops nobody."""
    try:
        return find_config(source, config)
    except CkptToolError:
        if config is not None:
            raise
        return Found(None, {}, None, ())


def _with_experts(checkpoint: Checkpoint, near: Found, *, experts_only: bool = False) -> Checkpoint:
    """The catalogue with its experts told apart, where a config at hand does what reading could not.
    ``experts_only``: a config that nobody named renames nothing where there are none.
    """
    found = near.config
    if checkpoint.moe_layers:
        return checkpoint
    in_sight = any(isinstance(t.name, str) and is_expert(t.name) for t in checkpoint.tensors)
    if found is None:
        if not in_sight or not near.looked:
            return checkpoint
        looked = ", ".join(map(str, near.looked))
        return replace(checkpoint, notes=(*checkpoint.notes, f"There is no config.json in {looked}."))
    if experts_only and not near.given and not in_sight:
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


def _verify_one(path: Location, budget: Budget, how: Execution) -> Verdict:
    """Against its manifest and its own checksums; where it cannot be read any more, the manifest tells
    which files are damaged."""
    directory = locate(path)
    own = own_manifest(path if path.is_directory() and read_manifest(path) is not None else directory)
    manifest = own[1] if own else None
    root = (own[0] if own else directory).reader()
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
            known = own_target(checkpoint.format)
            wrong = misfit(checkpoint) if known is not None and known.published else None
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
    torchs = {dtype.torch_name: dtype for dtype in known.values()}
    if name not in torchs:
        refuse_unknown("--dtype", name, DTYPES)
    return torchs.get(name) or known[name]
