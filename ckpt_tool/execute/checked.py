"""Checking the source's own checksums of what is read anyhow, as it passes.

A CRC-32 can be put together of parts that come in any order and from any thread. An XXH3 is computed of a
stream: an extent of a manifest before version 3, which has nothing else, counts as checked where its bytes
came one after the other. What was read but for a little is read to its end. All else is reported as
unchecked, and never taken for checked.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import xxhash
from isal import isal_zlib

from ckpt_tool.errors import DamagedError
from ckpt_tool.execute.base import Passed
from ckpt_tool.storage import Reader, Token
from ckpt_tool.sums import SourceSums, Sum

# Parts of records that wait for their neighbours, all files together: some ten megabytes.
_MOST_PARTS = 1 << 16
# Of a record that was read but for a part this small, the rest is read too: padding, mostly.
_SHARE_LEFT, _BYTES_LEFT = 8, 4096
# What is smaller was read before all else, if at all: scalars in archives, headers by a manifest's extents.
_SMALL_RECORD, _SMALL_EXTENT = 4096, 1 << 20  # bytes

NO_SUM = "the source has no checksum of it"
IN_PART = "only a part of what a checksum covers was read"
EARLIER = "a run before this one read a part of what a checksum covers"
OUT_OF_ORDER = "not read from front to back, as the checksums of a manifest before version 3 want"
TOO_MANY = "read in too many pieces"


class Checked(NamedTuple):
    """Bytes of the source that were read: those whose checksums were ``right``, and others by why not."""

    right: int
    others: dict[str, int]


class CheckingReader:
    """A reader that checks what passes: the read that completes a wrong record raises DamagedError."""

    def __init__(self, inner: Reader, sums: SourceSums) -> None:
        self._inner, self._sums = inner, sums
        self._files: dict[str, _File] = {}
        self._lock = threading.Lock()
        self._parts = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return CheckingReader, (self._inner, self._sums)

    @property
    def root(self) -> str:
        return self._inner.root

    def list(self, directory: str = "") -> list[str]:
        return self._inner.list(directory)

    def is_directory(self, path: str) -> bool:
        return self._inner.is_directory(path)

    def changed(self) -> str | None:
        return self._inner.changed()

    def states(self) -> Mapping[str, Token]:
        return self._inner.states()

    def size(self, path: str) -> int:
        return self._inner.size(path)

    def read(self, path: str, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        self.read_into(path, offset, memoryview(buffer))
        return bytes(buffer)

    def close(self) -> None:
        self._inner.close()

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        self._inner.read_into(path, offset, buffer)
        file = self._files.get(path) or self._opened(path)
        position, end = offset, offset + len(buffer)
        index = bisect_right(file.starts, offset) - 1
        while position < end:
            record = file.records[index]
            stop = min(end, record.end)
            self._add(record, position, buffer[position - offset : stop - offset])
            position, index = stop, index + 1

    def _opened(self, path: str) -> _File:
        file = _File(path, self._sums.of(path), self._inner.size(path))
        with self._lock:
            return self._files.setdefault(path, file)

    def _add(self, record: _Record, at: int, data: memoryview) -> None:
        """Take note of bytes that were read. Checksums are computed outside of the lock."""
        with self._lock:
            if record.closed:
                record.lost += 0 if record.right else len(data)
                return
            missing = record.missing(at, at + len(data))
        record.stream(at, data)
        crc = 0
        for low, high in missing:
            if record.stated.crc is not None:
                crc = isal_zlib.crc32(data[low - at : high - at])
            with self._lock:
                self._parts += record.insert(low, high, crc)
        with self._lock:
            if record.closed:
                return
            if not record.is_whole():
                if self._parts > _MOST_PARTS:
                    self._parts += record.close(TOO_MANY)
                return
            right = record.matches()
            if right is None:
                return
            if right:
                self._parts += record.close("", right=True)
                return
        raise self._damaged(record)

    def _damaged(self, record: _Record) -> DamagedError:
        return DamagedError(
            f"The source in {self.root} is damaged: {record.stated.differs()}. Nothing was published. "
            f"{record.stated.remedy()}",
            {record.stated.path},
        )

    def passed(self) -> Passed:
        """Of every file that was read, each record that something was read of: its number, whether it was
        right, how many bytes are accounted for in no range, and the ranges with their CRC-32s."""
        with self._lock:
            return {
                path: [
                    (number, record.right, record.lost, record.ranges())
                    for number, record in enumerate(file.records)
                    if record.read()
                ]
                for path, file in self._files.items()
            }

    def take_over(self, passed: Passed) -> None:
        """Raises DamagedError where a record, put together of what several have read, is wrong."""
        for path, records in passed.items():
            file = self._files.get(path) or self._opened(path)
            for number, right, lost, ranges in records:
                record = file.records[number]
                with self._lock:
                    self._parts += record.take_over(right, lost, ranges)
                    if not record.closed and record.is_whole() and record.matches() is False:
                        raise self._damaged(record)
                    if not record.closed and record.is_whole() and record.matches():
                        self._parts += record.close("", right=True)

    def finish(self, step: int) -> None:
        """Read the rest of what was read but for a little, and what is small, in all files that were read;
        ``step`` bytes at once.

        Raises:
            DamagedError: something is not what is stated of it.
        """
        buffer = memoryview(bytearray(step))
        for file in list(self._files.values()):
            for record in file.records:
                if record.closed or not record.is_stated:
                    continue
                length = record.stated.length
                left = record.rest()
                size = sum(high - low for low, high in left)
                small = _SMALL_EXTENT if record.stated.of_manifest else _SMALL_RECORD
                untouched = size == length
                if length <= small if untouched else size <= max(_BYTES_LEFT, length // _SHARE_LEFT):
                    for low, high in left:
                        for start in range(low, high, step):
                            part = buffer[: min(step, high - start)]
                            self.read_into(file.path, start, part)

    def result(self, *, resumed: bool, all_else: bool = False) -> Checked:
        """What was checked of all that was read.

        Args:
            resumed: an earlier run has read a part.
            all_else: whatever has a checksum was compared with it after all.
        """
        right, others = 0, dict[str, int]()
        for file in self._files.values():
            for record in file.records:
                if record.right or (all_else and record.is_stated and record.read()):
                    right += record.stated.length
                elif read := record.read():
                    why = record.why or (EARLIER if resumed else IN_PART)
                    others[why] = others.get(why, 0) + read
        return Checked(right, others)

    def is_right(self, path: str, offset: int, length: int) -> bool:
        """Whether a range lies in one record that was compared with its checksum."""
        file = self._files.get(path)
        if file is None:
            return False
        record = file.records[bisect_right(file.starts, offset) - 1]
        return record.right and offset + length <= record.end


class _File:
    """A file cut into records: one for each checksum, and one for what lies between two."""

    def __init__(self, path: str, sums: list[Sum], size: int) -> None:
        self.path = path
        self.records: list[_Record] = []
        position = 0
        for stated in sums:
            if stated.offset > position:
                self.records.append(_between(path, position, stated.offset))
            self.records.append(_Stream(stated) if stated.crc is None else _Record(stated))
            position = stated.end
        if size > position or not self.records:
            self.records.append(_between(path, position, size))
        self.starts = [record.stated.offset for record in self.records]


def _between(path: str, start: int, end: int) -> _Record:
    record = _Record(Sum(path, start, end - start, ""))
    record.why = NO_SUM
    return record


class _Record:
    """Bytes with one checksum, or none: which of them were read, as ranges, each with its CRC-32. Ranges
    that touch become one. ``closed`` once no account of them is kept any more: it was ``right``, or given
    up."""

    def __init__(self, stated: Sum) -> None:
        self.stated = stated
        self.end = stated.end
        self.why = ""  # it will not be checked
        self.right = self.closed = False
        self.lost = 0  # bytes that were read when it was closed, and after
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._crcs: list[int] = []

    @property
    def is_stated(self) -> bool:
        return self.stated.crc is not None or self.stated.xxh3 is not None

    def missing(self, low: int, high: int) -> list[tuple[int, int]]:
        """The parts of a range that were not read before."""
        found = []
        for number in range(max(bisect_right(self._starts, low) - 1, 0), len(self._starts)):
            if self._starts[number] >= high:
                break
            if self._starts[number] > low:
                found.append((low, self._starts[number]))
            low = max(low, self._ends[number])
        return [*found, (low, high)] if low < high else found

    def insert(self, low: int, high: int, crc: int) -> int:
        """Add a range that was missing; where another thread was faster, nothing. Returns by how many the
        ranges have grown."""
        if self.closed or self.missing(low, high) != [(low, high)]:
            return 0
        before = len(self._starts)
        index = bisect_left(self._starts, low)
        self._starts.insert(index, low)
        self._ends.insert(index, high)
        self._crcs.insert(index, crc)
        if index + 1 < len(self._starts) and self._starts[index + 1] == high:
            self._join(index)
        if index and self._ends[index - 1] == low:
            self._join(index - 1)
        return len(self._starts) - before

    def _join(self, index: int) -> None:
        """Make one range of the one at ``index`` and the next."""
        start, end = self._starts.pop(index + 1), self._ends.pop(index + 1)
        crc = self._crcs.pop(index + 1)
        if self.stated.crc is not None:
            self._crcs[index] = isal_zlib.crc32_combine(self._crcs[index], crc, end - start)
        self._ends[index] = end

    def ranges(self) -> list[tuple[int, int, int]]:
        """Those that were read, each with its CRC-32 (0 where that is not looked at)."""
        return list(zip(self._starts, self._ends, self._crcs, strict=True))

    def take_over(self, right: bool, lost: int, ranges: Sequence[tuple[int, int, int]]) -> int:
        """Add what another process has read. Of what was read here, too, but for a part, the CRC of that
        part is not known: it counts as not read. Returns by how many the ranges have grown."""
        if right and not self.right:
            return self.close("", right=True)
        if self.closed:
            self.lost += 0 if self.right else lost + sum(high - low for low, high, _ in ranges)
            return 0
        if lost:
            grown = self.close(TOO_MANY)
            self.lost += lost
            return grown
        return sum(self.insert(low, high, crc) for low, high, crc in ranges)

    def stream(self, at: int, data: memoryview) -> None:
        """For checksums of streams."""

    def is_whole(self) -> bool:
        return self._starts == [self.stated.offset] and self._ends == [self.end]

    def matches(self) -> bool | None:
        """Whether the whole record is what is stated of it; None where that cannot be told."""
        return self._crcs[0] == self.stated.crc if self.stated.crc is not None else None

    def rest(self) -> list[tuple[int, int]]:
        """What is yet to be read for the checksum."""
        return self.missing(self.stated.offset, self.end)

    def read(self) -> int:
        """Bytes that were read of it."""
        return self.lost + sum(end - start for start, end in zip(self._starts, self._ends, strict=True))

    def close(self, why: str, *, right: bool = False) -> int:
        """Keep no account of ranges any more. Returns by how many they have grown: none or fewer."""
        parts = len(self._starts)
        self.lost, self.why, self.right, self.closed = self.read(), self.why or why, right, True
        self._starts, self._ends, self._crcs = [], [], []
        return -parts


class _Stream(_Record):
    """Bytes with an XXH3 alone, which takes them from front to back only."""

    def __init__(self, stated: Sum) -> None:
        super().__init__(stated)
        self._digest = xxhash.xxh3_64()
        self._position = stated.offset
        self._order = threading.Lock()

    def stream(self, at: int, data: memoryview) -> None:
        with self._order:
            if at <= self._position < at + len(data):
                self._digest.update(data[self._position - at :])
                self._position = at + len(data)
            elif at > self._position:
                self.why = OUT_OF_ORDER

    def take_over(self, right: bool, lost: int, ranges: Sequence[tuple[int, int, int]]) -> int:
        if not right and not self.right:
            self.why = OUT_OF_ORDER
        return super().take_over(right, lost, ranges)

    def matches(self) -> bool | None:
        return self._digest.hexdigest() == self.stated.xxh3 if self._position == self.end else None

    def rest(self) -> list[tuple[int, int]]:
        return [] if self.why else [(self._position, self.end)]
