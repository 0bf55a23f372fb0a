"""Carry out a plan on this machine: a few threads, each with its own two buffers.

Each worker has a target file of its own while there is one, and then helps with another's. It takes one
extent, reads it tile by tile from wherever its elements lie, casts if asked, checksums, and writes it in
place. Whoever finishes a file's last extent seals the file: CRCs into their slots, literals written, data
made durable.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ckpt_tool.containers.decoding.reader import DecodingReader
from ckpt_tool.execute.budget import Budget
from ckpt_tool.execute.in_order import write_in_order
from ckpt_tool.execute.meter import Meter
from ckpt_tool.execute.threads import in_parallel
from ckpt_tool.execute.writing import EXTENT_BYTES, Tile, Work, seal, write_extent
from ckpt_tool.layout import TargetFile
from ckpt_tool.plan import Extent, Plan, PlannedFile, extents
from ckpt_tool.storage import Order, Reader, Writer
from ckpt_tool.written import WrittenExtent, WrittenFile


@dataclass
class _OpenFile:
    """A file in the making. ``ahead`` counts the elements not yet handed out, ``writing`` the extents that
    are being written."""

    target: TargetFile
    extents: Iterator[Extent]
    ahead: int
    writing: int = 0
    written: list[WrittenExtent] = field(default_factory=list)

    def next(self) -> Extent | None:
        unit = next(self.extents, None)
        if unit is not None:
            self.ahead -= unit.numel
            self.writing += 1
        return unit


def execute(
    plan: Plan,
    source: Reader,
    sink: Writer,
    budget: Budget,
    *,
    meter: Meter,
    skip: Callable[[PlannedFile], bool],
    on_file: Callable[[WrittenFile], None],
) -> None:
    """Write every file of ``plan`` into ``sink``.

    Args:
        meter: told of every tile written; the caller has started it.
        skip: files that are there already.
        on_file: told of every finished file, one call at a time.

    Raises:
        CkptToolError: the first failure of any worker; files not finished by then are removed.
    """
    files = (file for file in plan.files if not skip(file))
    run = _Run(source, sink, meter, on_file, files)
    workers = iter(range(budget.workers))
    try:
        in_parallel(workers, lambda: Tile(budget), run.work, budget.workers, run.stop)
    finally:
        sink.close()


class _Run:
    """What the workers share."""

    def __init__(
        self,
        source: Reader,
        sink: Writer,
        meter: Meter,
        on_file: Callable[[WrittenFile], None],
        files: Iterator[PlannedFile],
    ) -> None:
        self.stop = threading.Event()
        self._work = Work(DecodingReader(source), sink, meter, self.stop)
        self._on_file, self._files = on_file, files
        self._open: dict[int, _OpenFile] = {}  # by worker
        self._lock = threading.Lock()

    def work(self, tile: Tile, worker: int) -> None:
        """Write extents until none is left; whoever writes a file's last one seals it. A file that is
        written front to back has one worker."""
        if self._work.sink.order is not Order.ANY:
            self._write_whole_files(tile)
            return
        while not self.stop.is_set():
            with self._lock:
                file, unit = self._next(worker)
            if file is None:
                return
            if unit is not None and not self._fill(tile, file, unit):
                return
            with self._lock:
                file.writing -= unit is not None
                last = not file.ahead and not file.writing
            if last:
                self._seal(file)

    def _next(self, worker: int) -> tuple[_OpenFile | None, Extent | None]:
        """An extent of the worker's own file, of the next one, or when there is none of another worker's:
        two that write one file wait for each other inside the kernel. No extent where a file has none, no
        file where there is no more to do."""
        own = self._open.get(worker)
        if own and (unit := own.next()):
            return own, unit
        planned = next(self._files, None)
        if planned is not None:
            target = planned.layout()
            self._work.sink.create(target.path, target.size)
            numel = sum(fill.numel for fill in target.fills)
            own = self._open[worker] = _OpenFile(target, extents(target, EXTENT_BYTES), numel)
            return own, own.next()
        for file in sorted(self._open.values(), key=lambda file: -file.ahead):
            if unit := file.next():
                return file, unit
        return None, None

    def _write_whole_files(self, tile: Tile) -> None:
        while not self.stop.is_set():
            with self._lock:
                planned = next(self._files, None)
                target = planned and planned.layout()
            if target is None:
                return
            self._work.sink.create(target.path, target.size)
            written = write_in_order(tile, target, self._work)
            if written is None:
                return
            with self._lock:
                self._on_file(written)

    def _fill(self, tile: Tile, file: _OpenFile, unit: Extent) -> bool:
        """Write one extent; False where the run was stopped on the way."""
        extent = write_extent(tile, file.target, unit, self._work)
        if extent is None:
            return False
        with self._lock:
            file.written.append(extent)
        return True

    def _seal(self, file: _OpenFile) -> None:
        written = seal(file.target, file.written, self._work.sink, self._work.meter)
        with self._lock:
            self._on_file(written)
