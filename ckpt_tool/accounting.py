"""Which bytes of files are accounted for: pure numbers, for the planner.

A tensor may be renamed, cut, joined, transposed and interleaved on its way; the bytes of the source that a
copy reads are what they are. Runs become intervals; boxes that do not lie in one piece become lattices of
short runs, which are put together where they complement each other.
"""

from __future__ import annotations

import math
import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ckpt_tool.canonical import Box, Region

_MANY = 1 << 15  # numbers that are merged faster by numpy than it takes to import it
_SOME = 1 << 8  # the same, where it is imported anyhow
_COMPACTED = 1 << 20  # numbers kept of a file before they are merged
_SPELLED_OUT = 1 << 16  # runs of a lattice that are kept one by one
_WINDOW = 1 << 24  # bytes looked at together where lattices do not complement each other


class _Lattice(NamedTuple):
    """Runs of ``run`` bytes from ``offset`` on; ``dims`` are (stride in bytes, count), the widest first."""

    offset: int
    run: int
    dims: tuple[tuple[int, int], ...]

    @property
    def end(self) -> int:
        return self.offset + self.run + sum(stride * (count - 1) for stride, count in self.dims)

    @property
    def size(self) -> int:
        return self.run * math.prod(count for _, count in self.dims)


class Bytes:
    """A set of bytes of several files, each named by its path."""

    def __init__(self) -> None:
        self._bounds: dict[str, array[int]] = {}  # start, end, start, end, ...
        self._lattices: dict[str, dict[_Lattice, None]] = {}
        self._double: tuple[str, int] | None = None  # a byte that was added twice, as far as was looked

    def add(self, file: str, start: int, end: int) -> None:
        """Bytes ``start .. end`` of a file."""
        bounds = self._bounds.get(file)
        if bounds is None:
            bounds = self._bounds[file] = array("q")
        if bounds and bounds[-1] == start:
            bounds[-1] = end  # the next piece of what the last one was of
            return
        bounds.append(start)
        bounds.append(end)
        if len(bounds) >= _COMPACTED and len(bounds) % _COMPACTED < 2:
            self._merge(file)

    def add_piece(self, piece: Region | Box, itemsize: int) -> None:
        """The bytes of a piece of a tensor with elements of ``itemsize`` bytes."""
        if isinstance(piece, Region):
            self.add(piece.file, piece.offset, piece.offset + piece.numel * itemsize)
            return
        lattice = _lattice(piece, itemsize)
        if lattice is None:
            return
        if not lattice.dims:
            self.add(piece.file, lattice.offset, lattice.end)
        else:
            lattices = self._lattices.setdefault(piece.file, {})
            if lattice in lattices:
                self._double = self._double or (piece.file, lattice.offset)
            lattices[lattice] = None

    def add_all(self, other: Bytes) -> None:
        """All bytes of another set."""
        for file in {**other._bounds, **other._lattices}:
            starts, ends = other._of(file)
            for start, end in zip(starts, ends, strict=True):
                self.add(file, start, end)

    def double(self) -> tuple[str, int] | None:
        """The file and position of a byte that was added twice, if one was."""
        if sum(map(len, self._bounds.values())) > _MANY:
            import numpy  # noqa: F401 (which makes ``_merged`` use it)
        for file in {**self._bounds, **self._lattices}:
            self._of(file)
        return self._double

    def add_pieces(self, pieces: Iterable[Region | Box], itemsize: int) -> None:
        """The bytes of pieces of a tensor. Millions of runs of a large run's ranks: spelled out."""
        known = self._bounds
        for piece in pieces:
            if type(piece) is not Region:
                self.add_piece(piece, itemsize)
                continue
            _, numel, file, start = piece
            bounds = known.get(file)
            if not bounds or len(bounds) >= _COMPACTED:
                self.add(file, start, start + numel * itemsize)
            elif bounds[-1] == start:
                bounds[-1] = start + numel * itemsize
            else:
                bounds.append(start)
                bounds.append(start + numel * itemsize)

    def missing(self, file: str, extents: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """Of (offset, length) stretches of a file, those with a byte that is not in the set, as (number of
        the stretch, first such byte)."""
        starts, ends = self._of(file)
        for number, (offset, length) in enumerate(extents):
            index = bisect_right(starts, offset) - 1
            reach = max(offset, ends[index]) if index >= 0 else offset
            if reach < offset + length:
                yield number, reach

    def gaps(self, file: str, length: int) -> Iterator[tuple[int, int]]:
        """The (start, end) of what is not in the set of a file of ``length`` bytes."""
        starts, ends = self._of(file)
        for end, start in zip([0, *ends], [*starts, length], strict=True):
            if end < min(start, length):
                yield end, min(start, length)

    def within(self, other: Bytes) -> bool:
        """Whether all of these bytes are in another set, too."""
        for file in {**self._bounds, **self._lattices}:
            starts, ends = self._of(file)
            extents = ((start, end - start) for start, end in zip(starts, ends, strict=True))
            if next(other.missing(file, extents), None) is not None:
                return False
        return True

    def holds(self, file: str, offset: int, length: int) -> bool:
        return next(self.missing(file, [(offset, length)]), None) is None

    def _of(self, file: str) -> tuple[Sequence[int], Sequence[int]]:
        """Where the disjoint intervals of a file begin and end, in order."""
        bounds = self._bounds.setdefault(file, array("q"))
        lattices = self._lattices.pop(file, None)
        if lattices:
            spelled = array("q")
            for start, end in _spelled_out(list(lattices)):
                spelled.extend((start, end))
            bounds.extend(spelled)
            if _size(_merged(spelled)) != sum(one.size for one in lattices):
                self._double = self._double or (file, min(one.offset for one in lattices))
        merged = self._merge(file)
        return merged[::2], merged[1::2]

    def _merge(self, file: str) -> array[int]:
        """The intervals of a file in order, without any that touch or overlap."""
        bounds = self._bounds[file]
        merged = self._bounds[file] = _merged(bounds)
        if len(merged) != len(bounds) and self._double is None and _size(merged) != _size(bounds):
            self._double = file, _first_double(bounds)
        return merged


def _size(bounds: array[int]) -> int:
    """How many bytes intervals have together."""
    if len(bounds) > _SOME and "numpy" in sys.modules:
        import numpy as np

        pairs = np.frombuffer(bounds, np.int64).reshape(-1, 2)
        return int((pairs[:, 1] - pairs[:, 0]).sum())
    return sum(bounds[1::2]) - sum(bounds[::2])


def _first_double(bounds: array[int]) -> int:
    """Where intervals overlap first."""
    reach = -1
    for start, end in sorted(zip(bounds[::2], bounds[1::2], strict=True)):
        if start < reach:
            break
        reach = max(reach, end)
    return start


def _merged(bounds: array[int]) -> array[int]:
    """Intervals sorted, those that touch or overlap as one."""
    if len(bounds) > (_SOME if "numpy" in sys.modules else _MANY):
        return _merged_many(bounds)
    found = array("q")
    for start, end in sorted(zip(bounds[::2], bounds[1::2], strict=True)):
        if found and start <= found[-1]:
            found[-1] = max(found[-1], end)
        else:
            found.extend((start, end))
    return found


def _merged_many(bounds: array[int]) -> array[int]:
    """The same, in a tenth of the time where there are many."""
    import numpy as np

    pairs = np.frombuffer(bounds, np.int64).reshape(-1, 2)
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    reach = np.maximum.accumulate(pairs[:, 1])
    first = np.concatenate(([True], pairs[1:, 0] > reach[:-1]))
    last = np.concatenate((first[1:], [True]))
    merged = np.stack((pairs[first, 0], reach[last]), axis=1)
    return array("q", merged.tobytes())


def _lattice(box: Box, itemsize: int) -> _Lattice | None:
    if 0 in box.counts:
        return None
    dims = [(stride, count) for stride, count in zip(box.strides, box.counts, strict=True) if stride]
    return _tightened(box.offset, itemsize, sorted(dims, reverse=True))


def _tightened(offset: int, run: int, dims: list[tuple[int, int]]) -> _Lattice:
    """A lattice with the longest runs: dimensions that follow each other without a gap are in the run."""
    left = list(dims)
    while left and (left[-1][0] == run or (left[-1][1] == 1 and len(left) == 1)):
        run *= left[-1][1]
        left.pop()
    return _Lattice(offset, run, tuple(left))


def _spelled_out(lattices: list[_Lattice]) -> Iterator[tuple[int, int]]:
    """The intervals of lattices, which complement each other as a rule."""
    left = _complemented(lattices)
    for lattice in left:
        runs = 1
        for _, count in lattice.dims:
            runs *= count
        if runs > _SPELLED_OUT:
            yield from _looked_up(left)
            return
    for lattice in left:
        for start in _starts(lattice):
            yield start, start + lattice.run


def _complemented(lattices: list[_Lattice]) -> list[_Lattice]:
    """Lattices that follow each other, along one of their dimensions or run by run, as one."""
    found, before = lattices, 0
    while len(found) != before:
        before = len(found)
        found = _joined_runs(found)
        for dim in range(max((len(one.dims) for one in found), default=0)):
            found = _joined_along(found, dim)
    return found


def _joined_runs(lattices: list[_Lattice]) -> list[_Lattice]:
    """Runs right after each other in lattices of the same dimensions."""
    groups: dict[tuple[tuple[int, int], ...], list[_Lattice]] = {}
    for one in lattices:
        groups.setdefault(one.dims, []).append(one)
    found: dict[_Lattice, None] = {}
    for dims, members in groups.items():
        members.sort()
        last = members[0]
        for one in members[1:]:
            if dims and one.offset == last.offset + last.run:
                last = _Lattice(last.offset, last.run + one.run, dims)
            else:
                found[_tightened(last.offset, last.run, list(dims))] = None
                last = one
        found[_tightened(last.offset, last.run, list(dims))] = None
    return list(found)


def _joined_along(lattices: list[_Lattice], dim: int) -> list[_Lattice]:
    """Lattices that differ in where they begin along one dimension, and in how far they go there."""
    groups: dict[Any, list[_Lattice]] = {}
    found: dict[_Lattice, None] = {}
    for one in lattices:
        if dim >= len(one.dims):
            found[one] = None
            continue
        key = (one.run, one.dims[:dim], one.dims[dim][0], one.dims[dim + 1 :])
        groups.setdefault(key, []).append(one)
    for (run, outer, stride, inner), members in groups.items():
        members.sort()
        last = members[0]
        for one in members[1:]:
            count = last.dims[dim][1]
            if one.offset == last.offset + count * stride:
                dims = (*outer, (stride, count + one.dims[dim][1]), *inner)
                last = _Lattice(last.offset, run, dims)
            else:
                found[_tightened(last.offset, last.run, list(last.dims))] = None
                last = one
        found[_tightened(last.offset, last.run, list(last.dims))] = None
    return list(found)


def _starts(lattice: _Lattice) -> Any:
    """Where the runs of a lattice begin."""
    import numpy as np

    starts = np.array([lattice.offset], np.int64)
    for stride, count in lattice.dims:
        starts = (starts[:, None] + np.arange(count, dtype=np.int64) * stride).ravel()
    return starts.tolist()


def _looked_up(lattices: list[_Lattice]) -> Iterator[tuple[int, int]]:
    """Intervals of lattices that do not complement each other, byte by byte in windows."""
    import numpy as np

    low, high = min(one.offset for one in lattices), max(one.end for one in lattices)
    for start in range(low, high, _WINDOW):
        held = np.zeros(min(_WINDOW, high - start), bool)
        for one in lattices:
            if one.offset < start + len(held) and one.end > start:
                _mark(held, start, one)
        edges = np.flatnonzero(np.diff(np.concatenate(([False], held, [False])).astype(np.int8)))
        for first, last in edges.reshape(-1, 2).tolist():
            yield start + first, start + last


def _mark(held: Any, start: int, lattice: _Lattice) -> None:
    """Set the bytes of a lattice in a window that begins at ``start``."""
    if not lattice.dims:
        held[max(0, lattice.offset - start) : max(0, lattice.end - start)] = True
        return
    (stride, count), *inner = lattice.dims
    if not inner and lattice.offset >= start and lattice.end <= start + len(held):
        first = lattice.offset - start
        for byte in range(lattice.run):
            held[first + byte : first + byte + (count - 1) * stride + 1 : stride] = True
        return
    span = _Lattice(lattice.offset, lattice.run, tuple(inner)).end - lattice.offset
    low = max(0, (start - lattice.offset - span) // stride)
    high = min(count, (start + len(held) - lattice.offset) // stride + 1)
    for number in range(low, high):
        _mark(held, start, _Lattice(lattice.offset + number * stride, lattice.run, tuple(inner)))
