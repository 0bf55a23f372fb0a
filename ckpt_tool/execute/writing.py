"""Writing one file of a plan, or a part of one: read, cast, checksum, write, seal.

What an executor is made of. Any process that has the plan, the source and the writer can write any part of
any file that the writer takes at any position; whoever has the records of all parts seals the file.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import xxhash
from isal import isal_zlib

from ckpt_tool.canonical import Box, DType
from ckpt_tool.containers.decoding.reader import DecodingReader
from ckpt_tool.errors import CoverageError, ExecutionError
from ckpt_tool.execute.budget import MIB, Budget
from ckpt_tool.execute.casts import cast, refuse_overflow
from ckpt_tool.execute.gather import gather
from ckpt_tool.execute.meter import Meter
from ckpt_tool.geometry import Piece, cut
from ckpt_tool.layout import CrcSlot, Fill, Literal, TargetFile
from ckpt_tool.plan import Extent, extents
from ckpt_tool.storage import Reader, Writer
from ckpt_tool.written import WrittenExtent, WrittenFile

EXTENT_BYTES = 32 * MIB


class Part(NamedTuple):
    """A part of a file, in bytes: the extents that begin in ``low .. high``. Parts that tile a file have
    each of its extents once, wherever the cuts are."""

    low: int
    high: int


class Work(NamedTuple):
    """What a worker writes with. ``source`` has the virtual files of decoded tensors, too
    (``DecodingReader``)."""

    source: Reader
    sink: Writer
    meter: Meter
    stop: threading.Event


def write_part(
    file: TargetFile, part: Part, source: Reader, sink: Writer, budget: Budget, meter: Meter
) -> list[WrittenExtent]:
    """Write a part of a file that exists at its full size, with one thread.

    Returns:
        Records of what was written, for ``seal``.
    """
    work = Work(DecodingReader(source), sink, meter, threading.Event())
    tile = Tile(budget)
    written = []
    for unit in extents(file, EXTENT_BYTES):
        fill = file.fills[unit.fill]
        if part.low <= fill.offset + unit.start * fill.dtype.itemsize < part.high:
            extent = write_extent(tile, file, unit, work)
            if extent is not None:
                written.append(extent)
    return written


def write_extent(tile: Tile, file: TargetFile, unit: Extent, work: Work) -> WrittenExtent | None:
    """Write one extent; None where the run was stopped on the way."""
    fill = file.fills[unit.fill]
    itemsize = fill.dtype.itemsize
    crc, digest = 0, xxhash.xxh3_64()
    for start, numel in tile.steps(fill, unit):
        if work.stop.is_set():
            return None
        data = tile.load(work.source, unit.pieces, fill, start, numel)
        crc = isal_zlib.crc32(data, crc)
        digest.update(data)
        work.sink.write(file.path, fill.offset + start * itemsize, data)
        work.meter.add(len(data))
    offset = fill.offset + unit.start * itemsize
    return WrittenExtent(offset, unit.numel * itemsize, digest.hexdigest(), crc)


def seal(file: TargetFile, written: Iterable[WrittenExtent], sink: Writer, meter: Meter) -> WrittenFile:
    """Write what is not a tensor's, the CRCs of records in it, and finish the file.

    Args:
        written: records of all extents, in any order.

    Raises:
        CoverageError: they are not all extents, each once.
    """
    found = sorted(written)
    slots = _slots(file, found)
    literals = []
    for literal in file.literals:
        data = filled_in(literal, slots)
        sink.write(file.path, literal.offset, data)
        meter.add(len(data))
        literals.append(extent_of(literal.offset, data))
    sink.finish(file.path)
    return WrittenFile(file.path, file.size, tuple(sorted([*found, *literals])))


def _slots(file: TargetFile, written: Sequence[WrittenExtent]) -> list[tuple[int, int]]:
    """The CRC of every record, with the offset where it belongs, in the order of the file."""
    crcs = _fill_crcs(file, written)
    return sorted((slot.offset, record_crc(slot, crcs, file)) for slot in file.crc_slots)


def _fill_crcs(file: TargetFile, written: Sequence[WrittenExtent]) -> list[int]:
    """The CRC of every fill, put together of those of its extents; raises CoverageError where one lacks."""
    crcs = [0] * len(file.fills)
    extents_left = iter(written)
    for number in sorted(range(len(file.fills)), key=lambda number: file.fills[number].offset):
        fill = file.fills[number]
        position, end = fill.offset, fill.offset + fill.nbytes
        while position < end:
            extent = next(extents_left, None)
            if extent is None or extent.offset != position or extent.crc is None:
                raise CoverageError(
                    f"{file.path}: bytes from {position} on were written by nobody, or twice. This is a "
                    "bug in what divides the work; the file is not complete."
                )
            crcs[number] = isal_zlib.crc32_combine(crcs[number], extent.crc, extent.length)
            position += extent.length
    return crcs


def extent_of(offset: int, data: bytes) -> WrittenExtent:
    return WrittenExtent(offset, len(data), xxhash.xxh3_64_hexdigest(data), isal_zlib.crc32(data))


def filled_in(literal: Literal, slots: Sequence[tuple[int, int]]) -> bytes:
    """The literal's bytes with each CRC at its offset in the file; ``slots`` are sorted by offset."""
    first = bisect_left(slots, (literal.offset,))
    within = slots[first : bisect_left(slots, (literal.offset + len(literal.data),))]
    if not within:
        return literal.data
    data = bytearray(literal.data)
    for offset, crc in within:
        at = offset - literal.offset
        data[at : at + 4] = crc.to_bytes(4, "little")
    return bytes(data)


def record_crc(slot: CrcSlot, crcs: Sequence[int], target: TargetFile) -> int:
    crc = 0
    for part in slot.parts:
        if isinstance(part, bytes):
            crc = isal_zlib.crc32(part, crc)
        else:
            crc = isal_zlib.crc32_combine(crc, crcs[part], target.fills[part].nbytes)
    return crc


class Tile:
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
