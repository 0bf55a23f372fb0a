"""Carrying out a plan: stage, execute, compare if asked, publish; and what is never overwritten."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ckpt_tool import __version__
from ckpt_tool.belongings import owned
from ckpt_tool.canonical import Checkpoint, DType
from ckpt_tool.commit import Staging
from ckpt_tool.comparison import Verdict, compare
from ckpt_tool.containers.decoding.virtual import files_behind
from ckpt_tool.errors import CkptToolError, DamagedError, ExecutionError, UsageError
from ckpt_tool.execute.base import Executor
from ckpt_tool.execute.budget import MIB, Budget
from ckpt_tool.execute.checked import Checked, CheckingReader
from ckpt_tool.execute.local import execute
from ckpt_tool.execute.meter import Meter, Silent
from ckpt_tool.formats.registry import open_checkpoint
from ckpt_tool.integrity import changed_since_written, check, none_proven
from ckpt_tool.plan import Plan, PlannedFile, copies
from ckpt_tool.published import is_published, is_what_it_would_be
from ckpt_tool.replacing import Owned
from ckpt_tool.sizes import as_size, human_bytes
from ckpt_tool.storage import Location, Reader
from ckpt_tool.stores.base import Publishing
from ckpt_tool.stores.known import local_path, open_location, store_of
from ckpt_tool.sums import COPY_AGAIN, ON_PURPOSE, SourceSums, listed_below, own_manifest
from ckpt_tool.written import as_stored

# Why bytes of the source do not count as compared with its checksums where the result was there already.
WITH_RESULT = "read to compare them with the result that was there"
BY_VERIFY = "compared by --verify, where there are checksums"

DEFAULT_MAX_MEMORY = 1024 * MIB


@dataclass(frozen=True, slots=True)
class Execution:
    """How to carry out a plan: the memory all buffers may hold together (bytes, or text like ``512MiB``),
    threads, durability, and the ``executor`` that writes the files."""

    max_memory: int | str = DEFAULT_MAX_MEMORY
    workers: int | None = None
    fsync: bool = True
    overwrite: bool = False
    meter: Meter = field(default_factory=Silent)
    on_published: Callable[[Location], None] = lambda _: None  # told even where the run is interrupted then
    executor: Executor = execute

    def budget(self) -> Budget:
        workers: object = self.workers
        if workers is not None and (type(workers) is not int or workers < 1):
            raise UsageError(f"--workers {workers}: it has to be a whole number, 1 or more.")
        return Budget.share(as_size(self.max_memory, "max_memory"), self.workers or default_workers())


def default_workers() -> int:
    """Two threads per core hide the latency of storage; more than eight gain nothing on one machine."""
    return min(8, 2 * (os.cpu_count() or 1))


class Outcome(NamedTuple):
    """What became of a plan: the comparison if one was asked for, and what else to tell. Bytes that were
    ``read`` of the source and ``written``, and how many files of an earlier run were ``resumed`` from."""

    verdict: Verdict | None
    notes: tuple[str, ...] = ()
    checked: Checked | None = None
    read: int = 0
    written: int = 0
    resumed: int = 0


class Wanted(NamedTuple):
    """What was asked for, as far as it matters once the plan is made.

    ``parameters`` go into the manifest, and tell whether an earlier run was the same. ``config`` describes
    the catalogue, for the comparison; ``dtype`` is the cast that was asked for.
    """

    parameters: Mapping[str, Any]
    config: Mapping[str, Any] | None = None
    dtype: DType | None = None


def carry_out(
    plan: Plan,
    reader: Reader,
    checkpoint: Checkpoint,
    destination: Location,
    wanted: Wanted,
    how: Execution,
    budget: Budget,
    verify_result: bool,
) -> Outcome:
    """Write ``plan`` under ``destination``, complete or not at all; a killed run is gone on with, and what
    an earlier run of the same command published is found to be it and not written again.

    Args:
        verify_result: compare all of the source's checksums, and the result, before it is published.

    Raises:
        ExecutionError: disk, storage, or the source changed.
        DamagedError: the source is not what its own checksums say.
    """
    left_out = {one.label for one in plan.left_out}
    kept = checkpoint.select(tensor for tensor in checkpoint.tensors if tensor.label() not in left_out)
    identity = _identity(plan, checkpoint, wanted.parameters)

    def judge(place: Path) -> Owned:
        return owned(place, [file.path for file in plan.files])

    verdict = None
    if is_published(destination, identity, overwrite=how.overwrite) and is_what_it_would_be(
        plan, reader, destination, budget, how.meter
    ):
        if verify_result:
            _verify_source(reader, checkpoint, budget)
            verdict = _verify_result(plan, destination, reader, kept, wanted, budget, how)
        _refuse_changed(reader)
        how.on_published(destination)
        store_of(destination).tidy(destination, Publishing(how.overwrite, how.fsync, judge))
        note = (
            f"{destination} was there already, written by this command, and is what it would be now: the "
            "source was read to compare them, and nothing was written."
        )
        why = BY_VERIFY if verify_result else WITH_RESULT
        return Outcome(verdict, (note,), Checked(0, {why: plan.bytes_read}), read=plan.bytes_read)
    checking = CheckingReader(reader, SourceSums(reader, checkpoint.files))
    staging = Staging(destination, identity, overwrite=how.overwrite, fsync=how.fsync, judge=judge)

    def is_done(file: PlannedFile) -> bool:
        return staging.is_done(file.path, file.size)

    try:
        staging.begin(
            reader.states(),
            lambda: ((file.path, sources_of(file)) for file in plan.files if is_done(file)),
        )
        _discard_changed(staging, plan, budget, how.meter)
        resumed = [file for file in plan.files if is_done(file)]
        left = plan.bytes_written - sum(file.size for file in staging.done.values())
        check_room(destination, left)
        how.meter.start(left)
        try:
            how.executor(
                plan,
                checking,
                staging.writer(),
                budget,
                meter=how.meter,
                skip=is_done,
                on_file=staging.add,
            )
            checking.finish(budget.tile)
            if verify_result:
                _verify_source(reader, checkpoint, budget, checking)
        except DamagedError as error:
            staging.discard(
                file.path
                for file in plan.files
                if is_done(file) and not error.files.isdisjoint(sources_of(file))
            )
            raise
        if verify_result:
            try:
                verdict = _verify_result(plan, staging.location, reader, kept, wanted, budget, how)
            except CkptToolError:
                staging.discard_all()
                raise
        _refuse_changed(reader)
        staging.publish()
    except CkptToolError as error:
        if stays := staging.stays():
            error.add(stays)
        raise
    finally:
        if staging.published():
            how.on_published(destination)
        staging.close()
    return Outcome(
        verdict,
        (),
        checking.result(resumed=bool(resumed), all_else=verify_result),
        read=plan.bytes_read - sum(map(_bytes_read, resumed)),
        written=left,
        resumed=len(resumed),
    )


def _bytes_read(file: PlannedFile) -> int:
    """How many bytes of the source it is made of."""
    return sum(fill.numel * fill.tensor.dtype.itemsize for fill in file.layout().fills)


def _discard_changed(staging: Staging, plan: Plan, budget: Budget, meter: Meter) -> None:
    """Have what an earlier run completed written again where it is not what that run wrote: its size and
    the journal say that it was complete, not that it still is. What the plan does not write is no part of
    the result, whatever the journal says."""
    sizes = {file.path: file.size for file in plan.files}
    staging.discard([path for path, file in staging.done.items() if sizes.get(path) != file.size])
    if not staging.done:
        return
    written = staging.location.reader()
    try:
        staging.discard(changed_since_written(staging.done.values(), written, budget, meter=meter))
    finally:
        written.close()


def _refuse_changed(reader: Reader) -> None:
    changed = reader.changed()
    if changed is not None:
        raise ExecutionError(
            f"{reader.root}/{changed} changed while it was read. Nothing was published; run the "
            "command again once nothing writes to the source."
        )


def _verify_source(
    reader: Reader, checkpoint: Checkpoint, budget: Budget, checking: CheckingReader | None = None
) -> None:
    """Damage in the source would be copied faithfully; its checksums tell, those that were not compared
    while it was copied as well.

    Raises:
        DamagedError: something is not what was saved.
    """
    location = open_location(reader.root)
    own = own_manifest(location)
    manifest = listed_below(*own, location) if own else None
    proven = checking.is_right if checking else none_proven
    verdict = check(checkpoint, reader, manifest, reader, budget, meter=Silent(), proven=proven)
    used = {file.path for file in checkpoint.files}
    wrong = [found for found in verdict.differences if found.kind != "extra" or found.name in used]
    if wrong:
        remedy = f"{COPY_AGAIN} {ON_PURPOSE}" if own else COPY_AGAIN
        raise DamagedError(
            f"The source in {reader.root} is damaged: {wrong[0].message} ({len(wrong)} in all). Nothing "
            f"was published. {remedy}",
            {found.name for found in wrong},
        )


def _verify_result(
    plan: Plan,
    path: Location,
    reader: Reader,
    checkpoint: Checkpoint,
    wanted: Wanted,
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
            config=wanted.config,
            rounded=wanted.dtype is not None or bool(plan.casts),
            meter=how.meter,
        )
    finally:
        written_reader.close()
    if not verdict.passed:
        raise ExecutionError(
            f"The result is not what was converted: {verdict.differences[0].message} "
            f"({len(verdict.differences)} differences). Nothing was published. This is a bug in "
            "ckpt-tool or failing storage."
        )
    return verdict


def sources_of(target: PlannedFile) -> set[str]:
    """The files of the source whose bytes go into a target file, but for those that are metadata alone: of
    these the identity is a hash."""
    return {
        file
        for fill in target.layout().fills
        for piece in copies(fill)
        for file in files_behind(piece.file)
    }


def _identity(plan: Plan, checkpoint: Checkpoint, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two runs the same conversion; also the head of the manifest. No paths, no times."""
    return {
        "tool": f"ckpt-tool {__version__}",
        "source": {
            "format": checkpoint.format,
            "name": as_stored(Path(checkpoint.root).name).decode(errors="surrogateescape"),
            "step": checkpoint.training.step,
            "bytes": sum(file.size for file in checkpoint.files),
            "files": len(checkpoint.files),
        },
        "parameters": dict(parameters),
        "identity": plan.identity,
    }


def check_room(destination: Location, needed: int) -> None:
    """Raises ExecutionError where ``needed`` bytes more do not fit where a result is prepared."""
    lacking = lacking_room(destination, needed)
    if lacking:
        raise ExecutionError(lacking)


def lacking_room(destination: Location, needed: int) -> str:
    """What to tell the user where ``needed`` bytes do not fit; else nothing."""
    free = store_of(destination).free(destination)
    if free is None or needed <= free:
        return ""
    return (
        f"{destination.parent}: the result needs {human_bytes(needed)}, the disk has {human_bytes(free)} "
        "free. Free some space or choose another destination."
    )


def refuse_own_source(source: Location, destination: Location) -> None:
    """Sources are only read; UsageError where the destination is one, contains it or lies in it."""
    if source.scheme != destination.scheme:
        return
    store = store_of(destination)
    root, inside = store.parts(source), store.parts(destination)
    if root[: len(inside)] == inside:
        raise UsageError(f"{destination} contains the source; it would be replaced. Choose another.")
    if inside[: len(root)] == root:
        raise UsageError(f"{destination} is inside the source, which is only read. Choose another.")


def refuse_strangers(destination: Location, plan: Plan) -> None:
    """``--overwrite`` replaces checkpoints, and nothing else that happens to have the name.

    Raises:
        UsageError: something at the destination is not proven to belong to what is replaced; it is named.
    """
    store = store_of(destination)
    if not store.is_taken(destination):
        return
    if not store.replaces:
        raise UsageError(
            f"{destination} exists, and --overwrite replaces nothing in a {destination.scheme}:// store. "
            "Remove it yourself, or choose another destination."
        )
    owned(local_path(destination, "--overwrite"), [file.path for file in plan.files])
