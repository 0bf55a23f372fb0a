"""Regions of tensors made from other tensors: slicing, transposing, interleaving, stacking. Pure numbers.

Two kinds of region describe where elements lie. A *run* (``Region``) is a contiguous piece of the
flattened tensor; ZeRO's partitions and whole tensors are runs. A *box* (``Box``) is a rectangular lattice
of coordinates with a byte stride per dimension: a DTensor's chunk, a transposed or interleaved matrix.
Operations keep runs as runs where they can, because there may be millions; a run is cut into boxes only
where the other side is not contiguous.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from typing import Any, NamedTuple

from ckpt_tool.canonical import Box, Region, Tensor
from ckpt_tool.errors import CoverageError

Piece = Region | Box

# Bytes. A read and a copy of so much take about as long as what Python does about them.
_WORTH_READING = 32 << 10


class Cut(NamedTuple):
    """Part of a tensor used as part of another: ``numel`` elements of ``tensor`` from ``source`` on
    become the elements from ``start`` on."""

    start: int
    numel: int
    tensor: Tensor
    source: int


class CutRegions:
    """The regions of a tensor that is put together from contiguous cuts of others, computed on demand.

    Splits a fused ``gate_up_proj`` into gate and up, stacks one-expert tensors, and maps the experts
    of an EP rank to their global ids, without one object per expert and rank staying in memory.
    """

    def __init__(self, cuts: Sequence[Cut]) -> None:
        self._cuts = sorted(cuts, key=lambda cut: cut.start)
        # Where cuts overlap, which is an error to be found, all of them are gone through.
        self._disjoint = all(one.start + one.numel <= other.start for one, other in pairwise(self._cuts))

    def __iter__(self) -> Iterator[Piece]:
        for cut in self._cuts:
            yield from self._pieces(cut, 0, cut.numel)

    def overlapping(self, start: int, numel: int) -> Iterator[Piece]:
        first = 0
        if self._disjoint:
            first = max(0, bisect_right(self._cuts, start, key=lambda cut: cut.start) - 1)
        for cut in islice(self._cuts, first, None):
            if cut.start >= start + numel:
                return
            low, high = max(cut.start, start), min(cut.start + cut.numel, start + numel)
            if low < high:
                yield from self._pieces(cut, low - cut.start, high - low)

    def _pieces(self, cut: Cut, skip: int, numel: int) -> Iterator[Piece]:
        for piece in pieces(cut.tensor, cut.source + skip, numel):
            if not isinstance(piece, Region):
                raise CoverageError(f"{cut.tensor.label()} is not stored in contiguous runs.")
            yield piece._replace(start=cut.start + piece.start - cut.source)


class Axis(NamedTuple):
    """One dimension of a view: index k there is index ``start + k * step`` of dimension ``dim`` here."""

    dim: int
    start: int
    length: int
    step: int = 1


class _TakeRegions:
    """The regions of ``take``."""

    def __init__(self, tensor: Tensor, axes: Sequence[Axis]) -> None:
        self._tensor, self._axes = tensor, axes
        self._shape = tuple(axis.length for axis in axes)

    def __iter__(self) -> Iterator[Piece]:
        tensor = self._tensor
        for box in _boxes(tensor):
            found = [_intersect(axis, box, axis.dim) for axis in self._axes]
            if all(found):
                lines = [line for line in found if line is not None]
                offset = box.offset + sum(line.skip for line in lines)
                yield _simplified(
                    Box(
                        tuple(line.origin for line in lines),
                        tuple(line.length for line in lines),
                        tuple(line.step for line in lines),
                        box.file,
                        offset,
                        tuple(line.stride for line in lines),
                    ),
                    self._shape,
                    tensor.dtype.itemsize,
                )


def take(tensor: Tensor, axes: Sequence[Axis]) -> Tensor:
    """A strided slice of a tensor, its dimensions in any order: dimension k of the result is ``axes[k]``.

    Every dimension of ``tensor`` is named once. ``take(t, [Axis(1, 0, H), Axis(0, 0, I)])`` is a
    transposed [I, H]; ``take(t, [Axis(0, 1, I, 2), Axis(1, 0, H)])`` are the odd rows.
    """
    if sorted(axis.dim for axis in axes) != list(range(len(tensor.shape))):
        raise ValueError(f"axes {axes} do not name every dimension of {tensor.shape} once")
    return _with(tensor, tuple(axis.length for axis in axes), _TakeRegions(tensor, axes))


class Placed(NamedTuple):
    """A tensor put into a larger one: its dimension d runs along ``axes[d].dim`` there, from
    ``axes[d].start`` on in steps of ``axes[d].step``; ``fixed`` are coordinates in the other dimensions."""

    tensor: Tensor
    axes: tuple[Axis, ...]
    fixed: tuple[tuple[int, int], ...] = ()


class _AssembledRegions:
    """The regions of ``assemble``."""

    def __init__(self, shape: tuple[int, ...], parts: Sequence[Placed]) -> None:
        self._shape, self._parts = shape, parts
        self._by_row: dict[int, list[Placed]] | None = None  # where each part is in one row: of each

    def __iter__(self) -> Iterator[Piece]:
        return self._of(self._parts)

    def overlapping(self, start: int, numel: int) -> Iterator[Piece]:
        """Those of the rows that elements ``start .. start + numel`` are in, where each part is in one
        row, as an expert is in a stack of them; else all."""
        if self._by_row is None:
            rows = [dict(part.fixed).get(0, -1) for part in self._parts]
            self._by_row = {}
            if -1 not in rows:
                for row, part in zip(rows, self._parts, strict=True):
                    self._by_row.setdefault(row, []).append(part)
        inner = math.prod(self._shape[1:])
        if not self._by_row or not inner:
            return self._of(self._parts)
        rows_there = range(start // inner, -(-(start + numel) // inner))
        return self._of([part for row in rows_there for part in self._by_row.get(row, ())])

    def _of(self, parts: Sequence[Placed]) -> Iterator[Piece]:
        rank = len(self._shape)
        for part in parts:
            for box in _boxes(part.tensor):
                origin, counts, steps, strides = [0] * rank, [1] * rank, [1] * rank, [0] * rank
                for dim, index in part.fixed:
                    origin[dim] = index
                for dim, axis in enumerate(part.axes):
                    origin[axis.dim] = axis.start + axis.step * box.origin[dim]
                    counts[axis.dim] = box.counts[dim]
                    steps[axis.dim] = axis.step * box.steps[dim]
                    strides[axis.dim] = box.strides[dim]
                placed = Box(
                    tuple(origin), tuple(counts), tuple(steps), box.file, box.offset, tuple(strides)
                )
                yield _simplified(placed, self._shape, part.tensor.dtype.itemsize)


def assemble(like: Tensor, shape: tuple[int, ...], parts: Sequence[Placed]) -> Tensor:
    """A tensor of ``shape`` put together from ``parts``, with the state and dtype of ``like``."""
    return _with(like, shape, _AssembledRegions(shape, parts))


def _with(tensor: Tensor, shape: tuple[int, ...], regions: Iterable[Piece]) -> Tensor:
    return Tensor(tensor.name, tensor.state, shape, tensor.dtype, regions, tensor.role)


# ---- pieces of a flat range


def pieces(tensor: Tensor, start: int, numel: int) -> list[Piece]:
    """What holds elements ``start .. start + numel`` of the flattened ``tensor``.

    Runs are in order and cover the range exactly; where boxes are among them, their sizes add up to
    it, and ``check_disjoint`` tells that they do not overlap.

    Raises:
        CoverageError: an element in that range lies nowhere, or in two places.
    """
    regions = _overlapping(tensor.regions, start, numel)
    for region in regions:
        if type(region) is not Region:
            return _merged(tensor, clip(tensor, regions, start, numel))
    if len(regions) > 1:
        regions.sort()
    return _runs(tensor, regions, start, numel)


def _merged(tensor: Tensor, found: Iterable[Piece]) -> list[Piece]:
    """The same with boxes made one that are neighbours both in their file and in the tensor: gate and up
    that were taken out of one matrix and put together again are read as that matrix."""
    boxes = [piece for piece in found if isinstance(piece, Box)]
    result: list[Piece] = [piece for piece in found if isinstance(piece, Region)]
    last: Box | None = None
    for box in sorted(boxes, key=lambda box: (box.file, box.offset)):
        joined = _joined(last, box) if last is not None else None
        if last is not None and joined is None:
            result.append(_simplified(last, tensor.shape, tensor.dtype.itemsize))
        last = joined or box
    if last is not None:
        result.append(_simplified(last, tensor.shape, tensor.dtype.itemsize))
    if all(isinstance(piece, Region) for piece in result):
        result.sort(key=lambda piece: piece.start if isinstance(piece, Region) else 0)
    return result


def _joined(a: Box, b: Box) -> Box | None:
    """Two boxes as one, where ``b`` follows ``a``, or lies in its gaps, along one dimension."""
    if a.file != b.file or a.steps != b.steps or a.strides != b.strides:
        return None
    apart = [dim for dim, (one, other) in enumerate(zip(a.origin, b.origin, strict=True)) if one != other]
    if len(apart) != 1:
        return None
    (dim,) = apart
    if (a.counts[:dim], a.counts[dim + 1 :]) != (b.counts[:dim], b.counts[dim + 1 :]):
        return None
    distance, skip = b.origin[dim] - a.origin[dim], b.offset - a.offset
    count, step, stride = a.counts[dim], a.steps[dim], a.strides[dim]

    def with_dim(counts: int, steps: int, strides: int) -> Box:
        return a._replace(
            counts=(*a.counts[:dim], counts, *a.counts[dim + 1 :]),
            steps=(*a.steps[:dim], steps, *a.steps[dim + 1 :]),
            strides=(*a.strides[:dim], strides, *a.strides[dim + 1 :]),
        )

    if (distance, skip) == (count * step, count * stride):
        return with_dim(count + b.counts[dim], step, stride)
    if count == b.counts[dim] and (2 * distance, 2 * skip) == (step, stride):
        return with_dim(2 * count, distance, skip)
    return None


def block_numel(tensor: Tensor, found: Iterable[Piece]) -> int:
    """How many elements of the flattened ``tensor`` are best loaded together; 1 where it does not matter.

    A piece that runs along another dimension in its file than in the tensor is transposed: a few rows of
    it here are a few bytes of every row there, so that all dimensions from the file's on belong together.
    A piece that is some columns of a matrix, as ranks have it that share its rows, is read many rows at a
    time.
    """
    block = 1
    for piece in found:
        if isinstance(piece, Box):
            along = along_in_file(piece)
            if any(count > 1 for count in piece.counts[along + 1 :]):
                block = max(block, math.prod(tensor.shape[along:]))
            else:
                block = max(block, _rows_numel(tensor, piece))
    return block


def _rows_numel(tensor: Tensor, box: Box) -> int:
    """The elements of as many rows of the tensor as make a read of some columns worth its while."""
    inner = len(box.counts) - 1
    while inner > 0 and box.counts[inner] == tensor.shape[inner]:
        inner -= 1
    run = math.prod(box.counts[inner:]) * tensor.dtype.itemsize
    rows = math.prod(box.counts[:inner])
    if inner == 0 or box.steps[inner] > 1 or not 0 < run < _WORTH_READING:
        return 1
    return min(-(-_WORTH_READING // run), rows) * math.prod(tensor.shape[inner:])


def along_in_file(box: Box) -> int:
    """The dimension in which neighbours are closest in the file; the last, where there are none."""
    dims = [dim for dim, count in enumerate(box.counts) if count > 1]
    return min(dims, key=lambda dim: box.strides[dim], default=len(box.counts) - 1)


def cut(start: int, numel: int, most: int, block: int = 1) -> Iterator[tuple[int, int]]:
    """Cut a flat range into (start, numel) of at most ``most`` elements, between blocks where one fits."""
    if block > most:
        block = 1
    position, end = start, start + numel
    while position < end:
        after = min(end, position // block * block + most // block * block)
        yield position, after - position
        position = after


def _overlapping(regions: Iterable[Piece], start: int, numel: int) -> list[Piece]:
    """At least the regions that hold elements ``start .. start + numel``: those that know their places
    find them without going through all."""
    search = getattr(regions, "overlapping", None)
    return list(regions if search is None else search(start, numel))


def clip(tensor: Tensor, regions: Iterable[Piece], start: int, numel: int) -> list[Piece]:
    """The parts of ``regions`` inside a flat range of ``tensor``, which must add up to it."""
    windows = list(boxes_of_run(start, numel, tensor.shape))
    found: list[Piece] = []
    total = 0
    for region in regions:
        if isinstance(region, Region):
            low, high = max(region.start, start), min(region.start + region.numel, start + numel)
            if low < high:
                skip = (low - region.start) * tensor.dtype.itemsize
                found.append(Region(low, high - low, region.file, region.offset + skip))
                total += high - low
            continue
        for origin, counts in windows:
            part = _window(region, origin, counts)
            if part is not None:
                found.append(part)
                total += math.prod(part.counts)
    if total != numel:
        raise CoverageError(
            f"{tensor.label()}: the files hold {total} of the {numel} elements from {start} on."
        )
    return found


def _runs(tensor: Tensor, regions: list[Any], start: int, numel: int) -> list[Piece]:
    """The parts of sorted runs inside a flat range, which must be there once each."""
    found: list[Piece] = []
    position, end = start, start + numel
    held, itemsize = tensor.numel, tensor.dtype.itemsize
    for region in regions:
        first, count, file, offset = region
        last = first + count
        if first < 0 or last > held:
            raise CoverageError(
                f"{tensor.label()} has {held} elements; {file} claims to hold those from {first} to {last}."
            )
        if last > end:
            last = end
        if first < start:
            offset += (start - first) * itemsize
            first = start
        if first >= last:
            continue
        if first != position:
            raise CoverageError(_gap_or_overlap(tensor, position, region))
        found.append(Region(first, last - first, file, offset))
        position = last
    if position != end:
        raise CoverageError(
            f"{tensor.element(position)}: no file of the checkpoint holds this element "
            f"({end - position} of {numel} are missing from here on). A rank's file is incomplete or "
            "the metadata describes another model."
        )
    return found


def _gap_or_overlap(tensor: Tensor, position: int, region: Region) -> str:
    if region.start > position:
        return (
            f"{tensor.element(position)}: no file of the checkpoint holds this element; the next one "
            f"found is {region.start - position} further on, in {region.file}."
        )
    return (
        f"{tensor.element(region.start)}: two places claim to hold this element, one of them "
        f"{region.file}. ckpt-tool does not choose between them."
    )


def check_disjoint(tensor: Tensor) -> None:
    """Every element of ``tensor`` lies in exactly one of its regions, where boxes are among them.

    Runs are checked where they are used, by ``pieces``. Boxes have to be disjoint, inside the tensor, and
    as many elements as it has. Disjointness is found by a sweep along the dimension with most distinct
    origins, so a grid of n chunks costs about n * sqrt(n).
    """
    regions = list(tensor.regions)
    if not any(isinstance(region, Box) for region in regions):
        return
    boxes = [box for region in regions for box in _lowered(region, tensor.shape, tensor.dtype.itemsize)]
    boxes = [box for box in boxes if math.prod(box.counts)]
    for box in boxes:
        if any(
            origin < 0 or origin + (count - 1) * step >= size
            for origin, count, step, size in zip(
                box.origin, box.counts, box.steps, tensor.shape, strict=True
            )
        ):
            raise CoverageError(
                f"{tensor.label()} has shape {list(tensor.shape)}; {box.file} claims to hold a part of it "
                f"from {list(box.origin)} on that reaches outside."
            )
    if tensor.shape and boxes:
        dim = max(range(len(tensor.shape)), key=lambda d: len({box.origin[d] for box in boxes}))
        active: list[Box] = []
        for box in sorted(boxes, key=lambda box: box.origin[dim]):
            active = [one for one in active if _last(one, dim) >= box.origin[dim]]
            for other in active:
                if _overlap(box, other):
                    raise CoverageError(
                        f"{tensor.label()} at {list(box.origin)}: two places claim to hold this element, "
                        f"{other.file} and {box.file}. ckpt-tool does not choose between them."
                    )
            active.append(box)
    held = sum(math.prod(box.counts) for box in boxes)
    if held != tensor.numel:
        raise CoverageError(
            f"{tensor.label()} of shape {list(tensor.shape)}: the files hold {held} of its {tensor.numel} "
            "elements. A rank's part is missing."
        )


def _last(box: Box, dim: int) -> int:
    return box.origin[dim] + (box.counts[dim] - 1) * box.steps[dim]


def _overlap(a: Box, b: Box) -> bool:
    return all(
        _common((a.origin[dim], a.counts[dim], a.steps[dim]), (b.origin[dim], b.counts[dim], b.steps[dim]))
        is not None
        for dim in range(len(a.origin))
    )


# ---- boxes


def boxes_of_run(
    start: int, numel: int, shape: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut a flat range into boxes (origin, counts) of ``shape``: at most 2 * dimensions - 1 of them."""
    if numel <= 0:
        return
    if len(shape) <= 1:
        yield ((start,), (numel,)) if shape else ((), ())
        return
    inner = math.prod(shape[1:])
    row, within = divmod(start, inner)
    end = start + numel
    if within:
        length = min(numel, inner - within)
        for origin, counts in boxes_of_run(within, length, shape[1:]):
            yield (row, *origin), (1, *counts)
        row += 1
    last = end // inner
    if last > row:
        yield (row, *(0 for _ in shape[1:])), (last - row, *shape[1:])
    if last >= row and end % inner:
        for origin, counts in boxes_of_run(0, end % inner, shape[1:]):
            yield (last, *origin), (1, *counts)


def _boxes(tensor: Tensor) -> Iterator[Box]:
    for region in tensor.regions:
        yield from _lowered(region, tensor.shape, tensor.dtype.itemsize)


def _lowered(region: Piece, shape: Sequence[int], itemsize: int) -> Iterator[Box]:
    if isinstance(region, Box):
        yield region
        return
    strides = row_major(shape, itemsize)
    for origin, counts in boxes_of_run(region.start, region.numel, shape):
        first = sum(o * stride for o, stride in zip(origin, strides, strict=True))
        offset = region.offset + first - region.start * itemsize
        yield Box(origin, counts, (1,) * len(shape), region.file, offset, strides)


def row_major(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Byte strides of a contiguous tensor."""
    strides = [itemsize] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return tuple(strides)


def _simplified(box: Box, shape: Sequence[int], itemsize: int) -> Piece:
    """A box whose elements are a contiguous run on both sides, as that run."""
    flat = row_major(shape, 1)
    expected = 1
    whole = True  # whether all dimensions so far, from the last, are taken whole
    for dim in range(len(shape) - 1, -1, -1):
        count = box.counts[dim]
        if count == 1:
            whole = whole and shape[dim] == 1
            continue
        if not whole or box.steps[dim] != 1 or box.strides[dim] != expected * itemsize:
            return box
        expected *= count
        whole = count == shape[dim]
    start = sum(o * stride for o, stride in zip(box.origin, flat, strict=True))
    return Region(start, expected, box.file, box.offset)


class _Line(NamedTuple):
    """One dimension of an intersection, in the view's indices; ``skip`` in bytes from the box's start."""

    origin: int
    length: int
    step: int
    stride: int
    skip: int


def _intersect(axis: Axis, box: Box, dim: int) -> _Line | None:
    ours = (axis.start, axis.length, axis.step)
    theirs = (box.origin[dim], box.counts[dim], box.steps[dim])
    found = _common(ours, theirs)
    if found is None:
        return None
    first, count, period = found
    return _Line(
        (first - axis.start) // axis.step,
        count,
        period // axis.step,
        box.strides[dim] * (period // box.steps[dim]),
        box.strides[dim] * ((first - box.origin[dim]) // box.steps[dim]),
    )


def _common(a: tuple[int, int, int], b: tuple[int, int, int]) -> tuple[int, int, int] | None:
    """What two arithmetic progressions (first, count, step) share, as another; None if nothing."""
    (a0, an, astep), (b0, bn, bstep) = a, b
    low, high = max(a0, b0), min(a0 + (an - 1) * astep, b0 + (bn - 1) * bstep)
    first = a0 + -(-(low - a0) // astep) * astep
    for _ in range(bstep // math.gcd(astep, bstep)):
        if (first - b0) % bstep == 0:
            break
        first += astep
    if first > high or (first - b0) % bstep:
        return None
    period = math.lcm(astep, bstep)
    return first, (high - first) // period + 1, period


def _window(box: Box, origin: Sequence[int], counts: Sequence[int]) -> Box | None:
    """The part of a box inside a window of coordinates."""
    new_origin, new_counts, skip = [], [], 0
    for dim, (low, count) in enumerate(zip(origin, counts, strict=True)):
        step = box.steps[dim]
        first = max(0, -(-(low - box.origin[dim]) // step))
        last = min(box.counts[dim] - 1, (low + count - 1 - box.origin[dim]) // step)
        if first > last:
            return None
        new_origin.append(box.origin[dim] + first * step)
        new_counts.append(last - first + 1)
        skip += first * box.strides[dim]
    return box._replace(origin=tuple(new_origin), counts=tuple(new_counts), offset=box.offset + skip)
