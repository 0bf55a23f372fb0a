"""Carry out a plan on this machine: a few threads, each with its own two buffers.

Each worker has a target file of its own while there is one, and then helps with another's. It takes one
extent, reads it tile by tile from wherever its elements lie, casts if asked, checksums, and writes it in
place. Whoever finishes a file's last extent seals the file: CRCs into their slots, literals written, data
made durable.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import xxhash
from isal import isal_zlib

from ckpt_tool.canonical import Box, DType
from ckpt_tool.containers.decoded import DecodingReader
from ckpt_tool.errors import ExecutionError
from ckpt_tool.execute.budget import MIB, Budget
from ckpt_tool.execute.casts import cast, refuse_overflow
from ckpt_tool.execute.gather import gather
from ckpt_tool.execute.meter import Meter
from ckpt_tool.execute.threads import in_parallel
from ckpt_tool.geometry import Piece, cut
from ckpt_tool.layout import CrcSlot, Fill, Literal, TargetFile
from ckpt_tool.plan import Extent, Plan, PlannedFile, extents
from ckpt_tool.storage import Reader, Writer
from ckpt_tool.written import WrittenExtent, WrittenFile

EXTENT_BYTES = 32 * MIB


@dataclass
class _OpenFile:
    """A file in the making. ``ahead`` counts the elements not yet handed out, ``writing`` the extents that
    are being written."""

    target: TargetFile
    extents: Iterator[Extent]
    ahead: int
    writing: int = 0
    crcs: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
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
        in_parallel(workers, lambda: _Tile(budget), run.work, budget.workers, run.stop)
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
        self._source: Reader = DecodingReader(source)
        self._sink, self._meter, self._on_file = sink, meter, on_file
        self._files = files
        self._open: dict[int, _OpenFile] = {}  # by worker
        self._lock = threading.Lock()
        self.stop = threading.Event()

    def work(self, tile: _Tile, worker: int) -> None:
        """Write extents until none is left; whoever writes a file's last one seals it."""
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
            self._sink.create(target.path, target.size)
            numel = sum(fill.numel for fill in target.fills)
            own = self._open[worker] = _OpenFile(target, extents(target, EXTENT_BYTES), numel)
            return own, own.next()
        for file in sorted(self._open.values(), key=lambda file: -file.ahead):
            if unit := file.next():
                return file, unit
        return None, None

    def _fill(self, tile: _Tile, file: _OpenFile, unit: Extent) -> bool:
        """Write one extent; False where the run was stopped on the way."""
        fill = file.target.fills[unit.fill]
        itemsize = fill.dtype.itemsize
        crc, digest = 0, xxhash.xxh3_64()
        for start, numel in tile.steps(fill, unit):
            if self.stop.is_set():
                return False
            data = tile.load(self._source, unit.pieces, fill, start, numel)
            crc = isal_zlib.crc32(data, crc)
            digest.update(data)
            self._sink.write(file.target.path, fill.offset + start * itemsize, data)
            self._meter.add(len(data))
        length = unit.numel * itemsize
        with self._lock:
            file.crcs[unit.fill, unit.start] = (crc, length)
            offset = fill.offset + unit.start * itemsize
            file.written.append(WrittenExtent(offset, length, digest.hexdigest(), crc))
        return True

    def _seal(self, file: _OpenFile) -> None:
        target = file.target
        crcs = [0] * len(target.fills)
        for (fill, _), (crc, length) in sorted(file.crcs.items()):
            crcs[fill] = isal_zlib.crc32_combine(crcs[fill], crc, length)
        slots = sorted((slot.offset, _record_crc(slot, crcs, target)) for slot in target.crc_slots)
        for literal in target.literals:
            first = bisect_left(slots, (literal.offset,))
            within = slots[first : bisect_left(slots, (literal.offset + len(literal.data),))]
            data = _filled_in(literal, within)
            self._sink.write(target.path, literal.offset, data)
            self._meter.add(len(data))
            file.written.append(_extent_of(literal.offset, data))
        self._sink.finish(target.path)
        with self._lock:
            self._on_file(WrittenFile(target.path, target.size, tuple(sorted(file.written))))


def _extent_of(offset: int, data: bytes) -> WrittenExtent:
    return WrittenExtent(offset, len(data), xxhash.xxh3_64_hexdigest(data), isal_zlib.crc32(data))


def _filled_in(literal: Literal, crcs: Sequence[tuple[int, int]]) -> bytes:
    """The literal's bytes with each CRC at its offset in the file."""
    if not crcs:
        return literal.data
    data = bytearray(literal.data)
    for offset, crc in crcs:
        at = offset - literal.offset
        data[at : at + 4] = crc.to_bytes(4, "little")
    return bytes(data)


def _record_crc(slot: CrcSlot, crcs: list[int], target: TargetFile) -> int:
    crc = 0
    for part in slot.parts:
        if isinstance(part, bytes):
            crc = isal_zlib.crc32(part, crc)
        else:
            crc = isal_zlib.crc32_combine(crc, crcs[part], target.fills[part].nbytes)
    return crc


class _Tile:
    """One worker's two buffers: what is read, and scratch space or what a cast makes of it. They grow
    where a matrix is to be transposed."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._size = budget.tile
        self._read = memoryview(bytearray(self._size))
        self._second = memoryview(bytearray(0))

    def steps(self, fill: Fill, unit: Extent) -> Iterator[tuple[int, int]]:
        """Cut an extent into (start, numel) that fit the buffers on both sides of a cast."""
        itemsize = max(fill.dtype.itemsize, fill.tensor.dtype.itemsize)
        if unit.block > 1:
            self._grow(self._budget.tile_for(unit.block * itemsize))
        most = self._size // itemsize
        for start, numel in cut(fill.start + unit.start, unit.numel, most, unit.block):
            yield start - fill.start, numel

    def _grow(self, size: int) -> None:
        if size > self._size:
            self._size = size
            self._read = self._second = memoryview(b"")  # never the old ones beside the new
            self._read = memoryview(bytearray(size))

    def load(self, source: Reader, found: list[Piece], fill: Fill, start: int, numel: int) -> memoryview:
        """The bytes of ``numel`` elements of ``fill`` from ``start`` on, as they are to be stored."""
        tensor = fill.tensor
        casting = fill.dtype is not tensor.dtype
        if not self._second and (casting or any(isinstance(piece, Box) for piece in found)):
            self._second = memoryview(bytearray(self._size))
        raw = self._read[: numel * tensor.dtype.itemsize]
        gather(source, tensor, found, fill.start + start, numel, raw, self._second)
        if not casting:
            return raw
        out = self._second[: numel * fill.dtype.itemsize]
        cast(raw, tensor.dtype, out, fill.dtype)
        try:
            if fill.dtype is DType.float16:
                refuse_overflow(raw, tensor.dtype, out)
        except ExecutionError as error:
            raise ExecutionError(f"{tensor.label()}: {error}") from error
        return out
