"""The verbs as functions: open, convert, consolidate, verify. The command line is a thin shell over them.

    import ckpt_tool
    checkpoint = ckpt_tool.open("run/checkpoints")
    ckpt_tool.convert("run/checkpoints", "universal", to="universal", verify=True)

All raise ``ckpt_tool.CkptToolError`` with a message a user can act on.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from ckpt_tool import __version__
from ckpt_tool.canonical import Checkpoint, DType
from ckpt_tool.commit import MANIFEST, Staging, occupied, read_manifest
from ckpt_tool.comparison import Verdict, check_replicas, compare
from ckpt_tool.duplicates import Copies, find_copies
from ckpt_tool.errors import ExecutionError, MismatchError, UnreadableError, UsageError
from ckpt_tool.execute.budget import MIB, Budget
from ckpt_tool.execute.local import execute
from ckpt_tool.execute.meter import Meter, Silent
from ckpt_tool.families import family_of
from ckpt_tool.families.autoep import to_autoep
from ckpt_tool.families.naming import to_hub
from ckpt_tool.formats.base import TargetOptions
from ckpt_tool.formats.deepspeed.module_order import with_module_order
from ckpt_tool.formats.hf.quantised import refuse_unreadable
from ckpt_tool.formats.registry import SOURCES, TARGETS, locate, open_checkpoint
from ckpt_tool.integrity import check
from ckpt_tool.plan import Plan, make_plan
from ckpt_tool.storage import LocalReader, LocalWriter, Reader

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
    "hf": frozenset({"--style", "--max-shard-size"}),
}
# Targets that are the same at any topology.
_WITHOUT_RANKS = frozenset({"universal", "hf"})

DEFAULT_SHARD_BYTES = 5_000_000_000
DEFAULT_MAX_MEMORY = 1024 * MIB
# Beside its weights, what a published model directory consists of.
_CARRIED_OVER = re.compile(
    r"(README|LICEN[CS]E|NOTICE|USE_POLICY|tokenizer|vocab|audio|image_processor|chat_template)"
    r"|(configuration|modeling|tokenization)_\w+\.py$|.*\.(tiktoken|model|spm|jinja)$|merges\.txt$"
    r"|(generation_config|special_tokens_map|added_tokens|(pre|video_pre)?processor_config|params)\.json$"
)


@dataclass(frozen=True, slots=True)
class Execution:
    """How to carry out a plan: the memory all buffers may hold together (bytes), threads, durability."""

    max_memory: int = DEFAULT_MAX_MEMORY
    workers: int | None = None
    fsync: bool = True
    overwrite: bool = False
    meter: Meter = field(default_factory=Silent)

    def budget(self) -> Budget:
        return Budget.share(self.max_memory, self.workers or default_workers())


@dataclass(frozen=True, slots=True)
class Result:
    """What a conversion did, or with ``dry_run`` would do. Sizes in bytes."""

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

    @property
    def disk_bytes(self) -> int:
        return self.bytes_written


def default_workers() -> int:
    """Two threads per core hide the latency of storage; more than eight gain nothing on one machine."""
    return min(8, 2 * (os.cpu_count() or 1))


def open(path: PathLike) -> Checkpoint:
    """Read the catalogue of a checkpoint: metadata only, whatever its size."""
    reader, checkpoint = open_checkpoint(Path(path))
    reader.close()
    return checkpoint


def convert(
    source: PathLike,
    target: PathLike,
    *,
    to: str,
    ep: int | None = None,
    world: int | None = None,
    like: PathLike | None = None,
    style: str | None = None,
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
        to: a target of ``formats.registry``: ``universal``, ``zero3``, ``hf``, ...
        ep, world: the target's expert-parallel size and number of ranks; by default the source's.
        like: a checkpoint that the target run saved itself; its layout is filled with the source's values.
        style: a dialect of the target format.
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
    if to not in TARGETS:
        raise UsageError(f"--to {to!r} is not a target; choose from {', '.join(sorted(TARGETS))}.")
    given = {
        "--ep": ep, "--world": world, "--like": like, "--style": style, "--weights-only": weights_only,
        "--ds-config": ds_config, "--keep-groups": keep_groups,
        "--max-shard-size": max_shard_bytes != DEFAULT_SHARD_BYTES,
    }  # fmt: skip
    useless = sorted(name for name, value in given.items() if value and name not in _TAKES[to])
    if useless:
        raise UsageError(f"{', '.join(useless)}: --to {to} has no use for it. Leave it out.")
    budget = how.budget()
    reader, checkpoint = open_checkpoint(Path(source))
    try:
        seen = {file.path: reader.signature(file.path) for file in checkpoint.files}
        model_config, extra = _config(Path(source), config)
        template = open(like) if like is not None else None
        refuse_unreadable(checkpoint.tensors)
        if to in _DEEPSPEED:
            checkpoint = _under_module_names(checkpoint, model_config, template)
            if to != "universal" and template is None and not checkpoint.module_names:
                run_config = _read_json(Path(ds_config)) if ds_config is not None else {}
                checkpoint = with_module_order(checkpoint, model_config or {}, run_config, ep or 1)
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
            ds_config=_read_json(Path(ds_config)) if ds_config is not None else None,
            weights_only=weights_only,
        )
        layout = TARGETS[to].layout(checkpoint, options)
        plan = make_plan(layout)
        destination = Path(os.path.abspath(target))  # noqa: PTH100 (keep symlinks as the user wrote them)
        verdict = None
        _refuse_own_source(Path(reader.root), destination)
        if how.overwrite:
            _refuse_strangers(destination)
        if dry_run and not how.overwrite and occupied(destination):
            raise UsageError(f"{destination} exists. Choose another destination, or pass --overwrite.")
        if not dry_run:
            check_replicas(checkpoint, reader, budget)
            verdict = _carry_out(
                plan, reader, checkpoint, seen, destination, to, options, how, budget, verify
            )
    finally:
        reader.close()
    return Result(
        source=checkpoint.root,
        source_format=checkpoint.format,
        target=str(target),
        bytes_read=plan.bytes_read,
        bytes_written=plan.bytes_written,
        files=len(plan.files),
        peak_memory_bytes=budget.nbytes,
        left_out=layout.left_out,
        casts=tuple((cast.label, cast.source, cast.target) for cast in plan.casts),
        notes=layout.notes,
        verdict=verdict,
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
    found = open(source).format
    to = next((name for name, known in TARGETS.items() if known.name == found), None)
    if to is None or to in _WITHOUT_RANKS:
        raise UsageError(
            f"{source} is {found}, which has no ranks or is not written; `ckpt-tool convert --to` writes "
            f"another format: {', '.join(sorted(set(TARGETS) - _WITHOUT_RANKS))}."
        )
    return convert(
        source,
        target,
        to=to,
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
        config=config,
        max_shard_bytes=max_shard_bytes,
        verify=verify,
        dry_run=dry_run,
        how=how,
    )


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
        found, _ = _config(Path(source), config)
        if found is not None and not checkpoint.moe_layers:
            checkpoint = to_hub(checkpoint, family_of(found))
        if not checkpoint.moe_layers:
            raise UsageError(
                f"No routed experts are recognised in {checkpoint.root}, so nothing was checked. If the "
                "model has some, pass its config.json with --config, which tells their names."
            )
        return find_copies(checkpoint, reader, how.budget(), how.meter)
    finally:
        reader.close()


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
    reader, checkpoint = open_checkpoint(Path(a))
    try:
        if b is None:
            root = LocalReader(_manifest_root(Path(reader.root)))
            try:
                manifest = read_manifest(Path(root.root))
                return check(checkpoint, reader, manifest, root, budget, meter=how.meter)
            finally:
                root.close()
        other_reader, other = open_checkpoint(Path(b))
        try:
            found = _read_config(Path(config)) if config is not None else None
            return compare(checkpoint, other, (reader, other_reader), budget, config=found, meter=how.meter)
        finally:
            other_reader.close()
    finally:
        reader.close()


def parse_dtype(name: str | None) -> DType | None:
    """``fp32``, ``bf16``, ``fp16`` (or torch's names); ``keep`` and None keep what is stored."""
    if name is None or name == "keep":
        return None
    known = {"fp32": DType.float32, "bf16": DType.bfloat16, "fp16": DType.float16}
    known |= {dtype.torch_name: dtype for dtype in list(known.values())}
    if name not in known:
        raise UsageError(f"--dtype {name!r} is not one of keep, fp32, bf16, fp16.")
    return known[name]


# ---- carrying out


def _carry_out(
    plan: Plan,
    reader: Reader,
    checkpoint: Checkpoint,
    seen: Mapping[str, tuple[int, ...]],
    destination: Path,
    to: str,
    options: TargetOptions,
    how: Execution,
    budget: Budget,
    verify_result: bool,
) -> Verdict | None:
    if verify_result:
        _verify_source(reader, checkpoint, budget)
    staging = Staging(
        destination,
        _identity(plan, checkpoint, to, options),
        overwrite=how.overwrite,
        fsync=how.fsync,
    )
    verdict = None
    try:
        left = plan.bytes_written - sum(file.size for file in staging.done.values())
        _check_disk(staging.path, left)
        how.meter.start(left)
        execute(
            plan,
            reader,
            LocalWriter(staging.path, fsync=how.fsync),
            budget,
            meter=how.meter,
            skip=staging.is_done,
            on_file=staging.add,
        )
        if verify_result:
            kept = checkpoint.select(
                tensor for tensor in checkpoint.tensors if tensor.label() not in plan.layout.left_out
            )
            verdict = _verify_result(plan, staging.path, reader, kept, options, budget, how)
        for path, signature in seen.items():
            if reader.signature(path) != signature:
                raise ExecutionError(
                    f"{reader.root}/{path} changed while it was read. Nothing was published; run the "
                    "command again once nothing writes to the source."
                )
        staging.publish()
    finally:
        staging.close()
    return verdict


def _verify_source(reader: Reader, checkpoint: Checkpoint, budget: Budget) -> None:
    """Damage in the source would be copied faithfully; its archives' CRCs tell."""
    verdict = check(checkpoint, reader, None, reader, budget, meter=Silent())
    if not verdict.passed:
        raise UnreadableError(
            f"The source is damaged: {verdict.differences[0].message} ({len(verdict.differences)} in all). "
            "Copy it again from where it was saved."
        )


def _verify_result(
    plan: Plan,
    path: Path,
    reader: Reader,
    checkpoint: Checkpoint,
    options: TargetOptions,
    budget: Budget,
    how: Execution,
) -> Verdict:
    written_reader, written = open_checkpoint(path)
    try:
        verdict = compare(
            checkpoint,
            written,
            (reader, written_reader),
            budget,
            config=options.config,
            rounded=options.dtype is not None or bool(plan.casts),
            meter=how.meter,
        )
    finally:
        written_reader.close()
    if not verdict.passed:
        raise ExecutionError(
            f"The result is not what was converted: {verdict.differences[0].message} "
            f"({len(verdict.differences)} differences). Nothing was published; what was written is in "
            f"{path}. This is a bug in ckpt-tool or failing storage."
        )
    return verdict


def _identity(plan: Plan, checkpoint: Checkpoint, to: str, options: TargetOptions) -> dict[str, Any]:
    """What makes two runs the same conversion; also the head of the manifest. No paths, no times."""
    digest = xxhash.xxh3_128()
    for file in sorted(checkpoint.files):
        digest.update(f"{file.path}\0{file.size}\0{file.fingerprint}\n".encode())
    for target in plan.files:
        digest.update(f"{target.path}\0{target.size}\n".encode())
        for literal in target.literals:
            digest.update(literal.data)
        for fill in target.fills:
            digest.update(f"{fill.offset} {fill.tensor.label()} {fill.start} {fill.dtype}\n".encode())
    return {
        "tool": f"ckpt-tool {__version__}",
        "source": {
            "format": checkpoint.format,
            "name": Path(checkpoint.root).name,
            "step": checkpoint.training.step,
            "bytes": sum(file.size for file in checkpoint.files),
            "files": len(checkpoint.files),
        },
        "parameters": {
            "to": to,
            "dtype": str(options.dtype or "keep"),
            "max_shard_bytes": options.max_shard_bytes,
            "keep_groups": options.keep_groups,
            "ep": options.ep,
            "world": options.world,
            "style": options.style,
            "weights_only": options.weights_only,
        },
        "identity": digest.hexdigest(),
    }


def _check_disk(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path).free
    if needed > free:
        raise ExecutionError(
            f"{path.parent}: the result needs {needed} bytes, the disk has {free} free. Free some space "
            "or choose another destination."
        )


def _refuse_own_source(source: Path, destination: Path) -> None:
    resolved, root = destination.resolve(), source.resolve()
    if resolved == root or resolved in root.parents:
        raise UsageError(f"{destination} contains the source; it would be replaced. Choose another.")
    if root in resolved.parents:
        raise UsageError(f"{destination} is inside the source, which is only read. Choose another.")


def _refuse_strangers(destination: Path) -> None:
    """``--overwrite`` replaces checkpoints, and nothing else that happens to have the name."""
    if not occupied(destination):
        return
    if destination.is_symlink() or not destination.is_dir():
        raise UsageError(f"{destination} is not a directory; --overwrite replaces checkpoints only.")
    if (destination / MANIFEST).is_file():
        return
    try:
        reader = LocalReader(locate(destination))
    except UnreadableError:
        reader = LocalReader(destination)
    if not any(known.recognises(reader) for known in SOURCES):
        raise UsageError(
            f"{destination} is no checkpoint; --overwrite replaces checkpoints only. Remove it yourself, "
            "or choose another destination."
        )


def _manifest_root(directory: Path) -> Path:
    """A Universal checkpoint's manifest lies beside its tag file, one level up."""
    if not (directory / MANIFEST).is_file() and (directory.parent / MANIFEST).is_file():
        return directory.parent
    return directory


# ---- the model's config


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
    return to_autoep(checkpoint, family_of(config))


def _config(source: Path, given: PathLike | None) -> tuple[Mapping[str, Any] | None, dict[str, bytes]]:
    """The config to use, and the small files beside it that are carried over.

    Without ``--config``: a config.json in the checkpoint's directory or the one above, where trainers
    put it.
    """
    if given is not None:
        path = Path(given)
        return _read_config(path), _beside(path) if path.is_dir() else {}
    root = locate(source)
    for directory in (root, root.parent):
        if (directory / "config.json").is_file():
            return _read_config(directory), _beside(directory)
    return None, {}


def _read_config(path: Path) -> Mapping[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    config = _read_json(file)
    if "model_type" not in config:
        raise MismatchError(f"{file} has no model_type, so it does not say which model this is.")
    return config


def _read_json(file: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(file.read_text())
    except FileNotFoundError:
        raise UsageError(f"{file} does not exist.") from None
    except (ValueError, OSError) as error:
        raise UnreadableError(f"{file} is not readable JSON ({error}).") from error
    if not isinstance(value, dict):
        raise UnreadableError(f"{file} holds no JSON object.")
    return value


def _beside(directory: Path) -> dict[str, bytes]:
    return {
        entry.name: entry.read_bytes()
        for entry in sorted(directory.iterdir())
        if entry.is_file() and _CARRIED_OVER.match(entry.name)
    }
