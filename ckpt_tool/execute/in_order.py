"""Writing a file front to back, for stores that take no byte at any other place than the end.

The CRC-32 of a record stands in a header before the record, and again in the directory at the archive's
end. The latter is known when it is written. The former is put in at the end where the store takes a few
small ranges once more (``Order.PATCHED``). Where it does not, records are read twice: for the CRC, and to
be written. Either way a file has the bytes that it has anywhere else.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterator

from isal import isal_zlib

from ckpt_tool.containers.decoding.reader import DecodingReader
from ckpt_tool.errors import ExecutionError
from ckpt_tool.execute.budget import Budget
from ckpt_tool.execute.meter import Meter
from ckpt_tool.execute.writing import (
    EXTENT_BYTES,
    Tile,
    Work,
    extent_of,
    filled_in,
    record_crc,
    write_extent,
)
from ckpt_tool.layout import CrcSlot, Literal, TargetFile
from ckpt_tool.plan import fill_extents
from ckpt_tool.storage import Order, Reader, Writer
from ckpt_tool.written import WrittenExtent, WrittenFile


def write_file(file: TargetFile, source: Reader, sink: Writer, budget: Budget, meter: Meter) -> WrittenFile:
    """Write a whole file with one thread, into any writer, and finish it."""
    work = Work(DecodingReader(source), sink, meter, threading.Event())
    sink.create(file.path, file.size)
    written = write_in_order(Tile(budget), file, work)
    if written is None:
        raise RuntimeError("nobody can have stopped it")
    return written


def write_in_order(tile: Tile, file: TargetFile, work: Work) -> WrittenFile | None:
    """Write and finish a file that was created; None where the run was stopped on the way."""
    return _File(tile, file, work).write()


class _File:
    """A file in the making. ``_crcs`` has a number for every fill, and ``_known`` those that are known."""

    def __init__(self, tile: Tile, file: TargetFile, work: Work) -> None:
        self._tile, self._file, self._work = tile, file, work
        self._all_slots = sorted(file.crc_slots, key=lambda slot: slot.offset)
        self._crcs = [0] * len(file.fills)
        self._known = {number for number, fill in enumerate(file.fills) if not fill.numel}
        self._written: list[WrittenExtent] = []
        self._late: list[Literal] = []  # written without a CRC in them

    def write(self) -> WrittenFile | None:
        for part in self._parts():
            if isinstance(part, Literal):
                self._literal(part)
            elif not self._fill(part):
                return None
            if self._work.stop.is_set():
                return None
        self._work.sink.finish(self._file.path, list(self._patches()))
        return WrittenFile(self._file.path, self._file.size, tuple(sorted(self._written)))

    def _parts(self) -> list[Literal | int]:
        """Literals, and fills by number, in the order of the file."""
        parts: list[tuple[int, Literal | int]] = [(part.offset, part) for part in self._file.literals]
        parts += [(fill.offset, n) for n, fill in enumerate(self._file.fills) if fill.numel]
        return [part for _, part in sorted(parts, key=lambda part: part[0])]

    def _slots(self, literal: Literal) -> list[CrcSlot]:
        ends = (literal.offset, literal.offset + len(literal.data))
        first, last = (bisect_left(self._all_slots, end, key=lambda slot: slot.offset) for end in ends)
        return self._all_slots[first:last]

    def _literal(self, literal: Literal) -> None:
        slots = self._slots(literal)
        ahead = [n for slot in slots for n in slot.parts if isinstance(n, int) and n not in self._known]
        if ahead and self._work.sink.order is not Order.FRONT_TO_BACK:
            self._late.append(literal)
            data = literal.data
        else:
            for number in ahead:
                self._crcs[number] = self._crc_ahead(number)
                self._known.add(number)
            data = self._with_crcs(literal, slots)
            self._written.append(extent_of(literal.offset, data))
        self._work.sink.write(self._file.path, literal.offset, data)
        self._work.meter.add(len(data))

    def _with_crcs(self, literal: Literal, slots: list[CrcSlot]) -> bytes:
        found = [(slot.offset, record_crc(slot, self._crcs, self._file)) for slot in slots]
        return filled_in(literal, found)

    def _fill(self, number: int) -> bool:
        crc = 0
        for unit in fill_extents(self._file, number, EXTENT_BYTES):
            extent = write_extent(self._tile, self._file, unit, self._work)
            if extent is None or extent.crc is None:
                return False
            self._written.append(extent)
            crc = isal_zlib.crc32_combine(crc, extent.crc, extent.length)
        if number in self._known and self._crcs[number] != crc:
            label = self._file.fills[number].tensor.label()
            raise ExecutionError(
                f"{label} in {self._work.source.root} was read twice, and was not the same. Nothing was "
                "published; run the command again once nothing writes to the source."
            )
        self._crcs[number] = crc
        self._known.add(number)
        return True

    def _crc_ahead(self, number: int) -> int:
        """The CRC of a fill that is yet to be written."""
        fill, crc = self._file.fills[number], 0
        for unit in fill_extents(self._file, number, EXTENT_BYTES):
            for start, numel in self._tile.steps(fill, unit):
                if self._work.stop.is_set():
                    return 0
                crc = isal_zlib.crc32(
                    self._tile.load(self._work.source, unit.pieces, fill, start, numel), crc
                )
        return crc

    def _patches(self) -> Iterator[tuple[int, bytes]]:
        """What stands otherwise in the literals that were written without a CRC: an offset in the file, and
        bytes."""
        for literal in self._late:
            slots = self._slots(literal)
            data = self._with_crcs(literal, slots)
            self._written.append(extent_of(literal.offset, data))
            for slot in slots:
                at = slot.offset - literal.offset
                yield slot.offset, data[at : at + 4]
