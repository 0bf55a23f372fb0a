"""Reading the elements of a tile from wherever they lie, into row-major order."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from ckpt_tool.canonical import Box, Region, Tensor
from ckpt_tool.geometry import Piece, clip, row_major
from ckpt_tool.storage import Reader

# Of a transposition: elements that are adjacent in the target (a line or less of the processor's cache),
# and in the source. Square blocks lose their lines to each other where rows are a power of two apart.
_ACROSS, _ALONG = 16, 1024


def gather(
    source: Reader,
    tensor: Tensor,
    found: Sequence[Piece],
    start: int,
    numel: int,
    buffer: memoryview,
    scratch: memoryview,
) -> None:
    """Fill ``buffer`` with elements ``start .. start + numel`` of the flattened ``tensor``.

    Args:
        found: where they lie, as ``geometry.pieces`` gives it (for any range that holds this one).
        scratch: as large as ``buffer`` or larger; used where elements do not lie contiguously.
    """
    runs = [piece for piece in found if isinstance(piece, Region)]
    if len(runs) == len(found):
        _gather_runs(source, runs, start, numel, tensor.dtype.itemsize, buffer)
        return
    itemsize = tensor.dtype.itemsize
    for piece in clip(tensor, found, start, numel):
        if isinstance(piece, Region):
            at = (piece.start - start) * itemsize
            source.read_into(piece.file, piece.offset, buffer[at : at + piece.numel * itemsize])
        else:
            _gather_box(source, piece, row_major(tensor.shape, 1), start, itemsize, buffer, scratch)


def _gather_runs(
    source: Reader, runs: Sequence[Region], start: int, numel: int, itemsize: int, buffer: memoryview
) -> None:
    end, position = start + numel, start
    index = bisect_right(runs, start, key=lambda run: run.start) - 1
    while position < end:
        run = runs[index]
        count = min(end, run.start + run.numel) - position
        at = (position - start) * itemsize
        skip = (position - run.start) * itemsize
        source.read_into(run.file, run.offset + skip, buffer[at : at + count * itemsize])
        position += count
        index += 1


def _gather_box(
    source: Reader,
    box: Box,
    flat: Sequence[int],
    start: int,
    itemsize: int,
    buffer: memoryview,
    scratch: memoryview,
) -> None:
    """Read a box in file order into ``scratch``, then move it into place in one strided copy."""
    import numpy as np

    order = sorted(range(len(box.counts)), key=lambda dim: -box.strides[dim])
    split = _dense_from(box, order, itemsize)
    outer, inner = order[:split], order[split:]
    span = itemsize + sum((box.counts[dim] - 1) * box.strides[dim] for dim in inner)
    rows = math.prod(box.counts[dim] for dim in outer)
    if rows * span > len(scratch):
        for half in _halves(box, order):
            _gather_box(source, half, flat, start, itemsize, buffer, scratch)
        return
    _read_rows(source, box, outer, span, scratch)
    # In scratch the inner dimensions keep their strides; each outer step is one row of ``span`` bytes.
    strides = list(box.strides)
    step = span
    for dim in reversed(outer):
        strides[dim] = step
        step *= box.counts[dim]
    first = sum(o * stride for o, stride in zip(box.origin, flat, strict=True)) - start
    unit = np.dtype(f"u{itemsize}")
    moved = np.ndarray(box.counts, unit, scratch, 0, tuple(strides))
    targets = tuple(s * f * itemsize for s, f in zip(box.steps, flat, strict=True))
    _copy(np.ndarray(box.counts, unit, buffer, first * itemsize, targets), moved)


def _copy(target: Any, source: Any) -> None:
    """Strided copy; where the two run along different dimensions, in blocks that stay in the cache."""
    rank = target.ndim
    along = (
        [min(range(rank), key=lambda dim: array.strides[dim]) for array in (target, source)] if rank else []
    )
    if rank < 2 or along[0] == along[1]:
        target[...] = source
        return
    index = [slice(None)] * rank
    for row in range(0, target.shape[along[0]], _ACROSS):
        index[along[0]] = slice(row, row + _ACROSS)
        for column in range(0, target.shape[along[1]], _ALONG):
            index[along[1]] = slice(column, column + _ALONG)
            target[tuple(index)] = source[tuple(index)]


def _dense_from(box: Box, order: Sequence[int], itemsize: int) -> int:
    """How many outer dimensions to step through, so that half of each read, at least, is wanted."""
    split = len(order)
    span, wanted = itemsize, itemsize
    for position in range(len(order) - 1, -1, -1):
        dim = order[position]
        span += (box.counts[dim] - 1) * box.strides[dim]
        wanted *= box.counts[dim]
        if span > 2 * wanted:
            break
        split = position
    return split


def _halves(box: Box, order: Sequence[int]) -> tuple[Box, Box]:
    """Cut a box that is too large in two, along the dimension with the widest stride."""
    dim = next(dim for dim in order if box.counts[dim] > 1)
    count = box.counts[dim] // 2

    def part(first: int, length: int) -> Box:
        origin, counts = list(box.origin), list(box.counts)
        origin[dim] += first * box.steps[dim]
        counts[dim] = length
        offset = box.offset + first * box.strides[dim]
        return box._replace(origin=tuple(origin), counts=tuple(counts), offset=offset)

    return part(0, count), part(count, box.counts[dim] - count)


def _read_rows(source: Reader, box: Box, outer: Sequence[int], span: int, scratch: memoryview) -> None:
    index = [0] * len(outer)
    for row in range(math.prod(box.counts[dim] for dim in outer)):
        offset = box.offset + sum(i * box.strides[dim] for i, dim in zip(index, outer, strict=True))
        source.read_into(box.file, offset, scratch[row * span : (row + 1) * span])
        for position in range(len(outer) - 1, -1, -1):
            index[position] += 1
            if index[position] < box.counts[outer[position]]:
                break
            index[position] = 0
