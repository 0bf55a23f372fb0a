"""Views of tensors against numpy: any chain of slices, transpositions, interleavings and stackings."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from ckpt_tool.canonical import Box, DType, Region, Tensor
from ckpt_tool.errors import CoverageError
from ckpt_tool.execute.gather import gather
from ckpt_tool.geometry import (
    Axis,
    Cut,
    CutRegions,
    Placed,
    assemble,
    block_numel,
    boxes_of_run,
    check_disjoint,
    pieces,
    take,
)
from ckpt_tool.storage import LocalReader

Array = np.ndarray


class Maker:
    """Random tensors in random pieces of files, each beside the array it holds."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.rng, self.count = root, random.Random(seed), 0

    def base(self, shape: tuple[int, ...]) -> tuple[Tensor, Array]:
        array = np.array([self.rng.getrandbits(31) for _ in range(int(np.prod(shape)))], np.int32)
        cuts = sorted({0, array.size, *(self.rng.randint(0, array.size) for _ in range(3))})
        regions = []
        for low, high in pairwise(cuts):
            self.count += 1
            padding = self.rng.randint(0, 3)
            np.concatenate([np.full(padding, -1, np.int32), array[low:high]]).tofile(
                self.root / f"{self.count}"
            )
            regions.append(Region(low, high - low, f"{self.count}", 4 * padding))
        self.rng.shuffle(regions)
        return Tensor("x", "weight", shape, DType.int32, tuple(regions)), array.reshape(shape)

    def taken(self, tensor: Tensor, array: Array) -> tuple[Tensor, Array]:
        order = self.rng.sample(range(array.ndim), array.ndim)
        axes, index = [], [slice(None)] * array.ndim
        for dim in order:
            step, start = self.rng.randint(1, 3), self.rng.randint(0, array.shape[dim] - 1)
            length = self.rng.randint(1, (array.shape[dim] - 1 - start) // step + 1)
            axes.append(Axis(dim, start, length, step))
            index[dim] = slice(start, start + (length - 1) * step + 1, step)
        return take(tensor, axes), array[tuple(index)].transpose(order)

    def joined(self, tensor: Tensor, array: Array) -> tuple[Tensor, Array]:
        """Another of the same shape beside it, or interleaved with it, along one dimension."""
        other, values = self.base(array.shape)
        dim, interleave = self.rng.randrange(array.ndim), self.rng.random() < 0.5
        shape = list(array.shape)
        shape[dim] *= 2
        result, placed = np.empty(shape, np.int32), []
        for number, (part, held) in enumerate(((tensor, array), (other, values))):
            first, step = (number, 2) if interleave else (number * array.shape[dim], 1)
            axes = [Axis(d, 0, size) for d, size in enumerate(array.shape)]
            axes[dim] = Axis(dim, first, array.shape[dim], step)
            placed.append(Placed(part, tuple(axes)))
            index = [slice(None)] * array.ndim
            index[dim] = slice(first, first + step * (array.shape[dim] - 1) + 1, step)
            result[tuple(index)] = held
        return assemble(tensor, tuple(shape), placed), result


@pytest.mark.parametrize("seed", range(300))
def test_views_read_what_numpy_reads(seed: int, tmp_path: Path) -> None:
    make = Maker(tmp_path, seed)
    tensor, array = make.base(tuple(make.rng.randint(1, 6) for _ in range(make.rng.randint(1, 4))))
    for _ in range(make.rng.randint(0, 3)):
        tensor, array = make.rng.choice((make.taken, make.joined))(tensor, array)
    assert tensor.shape == array.shape
    check_disjoint(tensor)
    reader, flat = LocalReader(tmp_path), np.ascontiguousarray(array).reshape(-1)
    found, position = pieces(tensor, 0, tensor.numel), 0
    while position < flat.size:
        numel = min(flat.size - position, make.rng.randint(1, 20))
        buffer, scratch = bytearray(4 * numel), bytearray(max(4 * numel, make.rng.choice((8, 64, 4096))))
        gather(reader, tensor, found, position, numel, memoryview(buffer), memoryview(scratch))
        assert bytes(buffer) == flat[position : position + numel].tobytes()
        position += numel
    reader.close()


def _halves(tensor: Tensor, dim: int, *, interleaved: bool) -> list[tuple[Tensor, Axis]]:
    """Gate and up of a fused matrix along a dimension, each with its place there."""
    size = tensor.shape[dim] // 2
    found = []
    for number in range(2):
        axis = Axis(dim, number, size, 2) if interleaved else Axis(dim, number * size, size)
        axes = [axis if d == dim else Axis(d, 0, n) for d, n in enumerate(tensor.shape)]
        found.append((take(tensor, axes), axis))
    return found


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("back", [False, True])
def test_what_is_taken_apart_and_put_together_is_read_as_one(interleaved: bool, back: bool) -> None:
    """[E, H, 2 I] as gate and up, joined again as it was (a run) or transposed (one box)."""
    stored = Tensor("x", "weight", (3, 5, 8), DType.float32, (Region(0, 120, "file", 64),))
    placed = []
    for part, axis in _halves(stored, 2, interleaved=interleaved):
        if back:
            axes = (Axis(0, 0, 3), Axis(1, 0, 5), axis)
        else:
            axes = (Axis(0, 0, 3), Axis(2, 0, 5), axis._replace(dim=1))
        placed.append(Placed(part, axes))
    shape = (3, 5, 8) if back else (3, 8, 5)
    (piece,) = pieces(assemble(stored, shape, placed), 0, 120)
    assert piece == (
        Region(0, 120, "file", 64)
        if back
        else Box((0, 0, 0), (3, 8, 5), (1, 1, 1), "file", 64, (160, 4, 32))
    )


def test_halves_in_the_other_order_are_not_one() -> None:
    stored = Tensor("x", "weight", (3, 5, 8), DType.float32, (Region(0, 120, "file", 64),))
    (gate, first), (up, second) = _halves(stored, 2, interleaved=False)
    rest = (Axis(0, 0, 3), Axis(1, 0, 5))
    swapped = [Placed(gate, (*rest, second)), Placed(up, (*rest, first))]
    assert len(pieces(assemble(stored, (3, 5, 8), swapped), 0, 120)) == 2


@pytest.mark.parametrize("seed", range(40))
def test_a_flat_range_is_cut_into_few_boxes_that_cover_it(seed: int) -> None:
    rng = random.Random(seed)
    shape = tuple(rng.randint(1, 5) for _ in range(rng.randint(1, 4)))
    size = int(np.prod(shape))
    start = rng.randint(0, size)
    numel = rng.randint(0, size - start)
    hit = np.zeros(shape, int)
    boxes = list(boxes_of_run(start, numel, shape))
    for origin, counts in boxes:
        hit[tuple(slice(o, o + c) for o, c in zip(origin, counts, strict=True))] += 1
    assert len(boxes) <= 2 * len(shape) - 1
    assert hit.reshape(-1).tolist() == [int(start <= i < start + numel) for i in range(size)]


def _boxes(*boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> Tensor:
    regions = tuple(
        Box(origin, counts, (1,) * len(origin), f"file{n}", 0, (16, 4))
        for n, (origin, counts) in enumerate(boxes)
    )
    return Tensor("x", "weight", (4, 4), DType.int32, regions)


@pytest.mark.parametrize(("second", "fits"), [(8, True), (0, False), (4, False)])
def test_cuts_are_found_by_place_and_overlaps_where_they_are(second: int, fits: bool) -> None:
    """One of two parts that claim the same elements begins where the other does, or within it."""
    parts = [
        Tensor("x", "weight", (8,), DType.int32, (Region(0, 8, f"file{number}", 0),)) for number in range(2)
    ]
    cuts = [Cut(second, 8, parts[1], 0), Cut(0, 8, parts[0], 0)]
    whole = Tensor("x", "weight", (16 if fits else second + 8,), DType.int32, CutRegions(cuts))
    if fits:
        assert pieces(whole, 6, 4) == [Region(6, 2, "file0", 24), Region(8, 2, "file1", 0)]
        assert pieces(whole, 8, 8) == [Region(8, 8, "file1", 0)]
        return
    with pytest.raises(CoverageError, match="two places"):
        pieces(whole, second, 4)


def test_overlapping_boxes_are_refused_by_file() -> None:
    with pytest.raises(CoverageError, match="file0 and file1"):
        check_disjoint(_boxes(((0, 0), (3, 4)), ((2, 0), (1, 4)), ((3, 0), (1, 4))))


def test_a_missing_box_is_refused_with_the_number_of_elements() -> None:
    with pytest.raises(CoverageError, match="12 of its 16"):
        check_disjoint(_boxes(((0, 0), (2, 4)), ((2, 0), (1, 4))))


def test_a_box_that_reaches_outside_is_refused() -> None:
    with pytest.raises(CoverageError, match="reaches outside"):
        check_disjoint(_boxes(((0, 0), (4, 2)), ((0, 2), (4, 3))))


def test_a_grid_of_boxes_passes() -> None:
    check_disjoint(_boxes(((0, 0), (2, 2)), ((0, 2), (2, 2)), ((2, 0), (2, 2)), ((2, 2), (2, 2))))


@pytest.mark.parametrize(
    ("origin", "counts", "expected"),
    [
        ((0, 0), (4096, 128), 64 * 8192),  # 512 bytes of each row: 64 rows are 32 KiB
        ((0, 0), (16, 128), 16 * 8192),  # no more rows than there are
        ((0, 0), (4096, 8192), 1),  # whole rows lie in one piece
        ((0, 0), (4096, 8191), 2 * 8192),  # nearly
    ],
)
def test_some_columns_of_a_matrix_are_read_many_rows_at_a_time(
    origin: tuple[int, ...], counts: tuple[int, ...], expected: int
) -> None:
    box = Box(origin, counts, (1, 1), "f", 0, (4 * counts[1], 4))
    tensor = Tensor("t", "weight", (4096, 8192), DType.float32, (box,))
    assert block_numel(tensor, [box]) == expected


def test_columns_that_are_worth_a_read_each_are_read_row_by_row() -> None:
    box = Box((0, 0), (64, 8192), (1, 1), "f", 0, (8192 * 4, 4))
    assert block_numel(Tensor("t", "weight", (64, 16384), DType.float32, (box,)), [box]) == 1


def test_matrices_in_a_stack_of_which_columns_are_held_are_read_across_experts() -> None:
    box = Box((0, 0, 8), (4, 32, 8), (1, 1, 1), "f", 0, (32 * 8 * 4, 8 * 4, 4))
    tensor = Tensor("t", "weight", (4, 32, 64), DType.float32, (box,))
    assert block_numel(tensor, [box]) == 4 * 32 * 64
