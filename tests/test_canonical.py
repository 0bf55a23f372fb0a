"""Regions: where elements of slices, stacks, transposes and assemblies lie, against torch's slicing."""

from __future__ import annotations

import itertools
import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tool.canonical import (
    DType,
    ExpertName,
    Region,
    Tensor,
    contiguous,
)
from ckpt_tool.errors import CoverageError
from ckpt_tool.execute.gather import gather
from ckpt_tool.geometry import Axis, Cut, CutRegions, Placed, assemble, boxes_of_run, pieces, take
from ckpt_tool.storage import LocalReader
from tests.conftest import materialise, raw, stored

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


def numbered(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)


def held(tensor: Tensor, directory: Path) -> torch.Tensor:
    return materialise(LocalReader(directory), tensor)


def scattered(tensor: Tensor, cuts: list[int], order: list[int]) -> Tensor:
    """The same elements as several runs in any order."""
    (whole,) = tensor.regions
    edges = [0, *sorted({cut for cut in cuts if 0 < cut < tensor.numel}), tensor.numel]
    runs = [Region(a, b - a, whole.file, whole.offset + a * 4) for a, b in itertools.pairwise(edges)]
    mixed = [runs[index % len(runs)] for index in order]
    regions = tuple(dict.fromkeys([*mixed, *runs]))
    return Tensor(tensor.name, tensor.state, tensor.shape, tensor.dtype, regions)


runs_of = st.tuples(st.lists(st.integers(1, 100), max_size=4), st.lists(st.integers(0, 9), max_size=4))


def gathered(tensor: Tensor, start: int, numel: int, directory: Path, scratch: int = 4096) -> bytes:
    """What the executor and the verifier read."""
    buffer = bytearray(numel * tensor.dtype.itemsize)
    found = pieces(tensor, start, numel)
    reader = LocalReader(directory)
    gather(reader, tensor, found, start, numel, memoryview(buffer), memoryview(bytearray(scratch)))
    reader.close()
    return bytes(buffer)


# ---- names


def test_an_element_is_named_by_its_coordinates() -> None:
    tensor = Tensor("a.weight", "master", (3, 4), DType.float32, ())
    assert tensor.element(7) == "a.weight [master] at [1, 3]"


def test_an_experts_element_is_named_by_its_expert() -> None:
    stack = Tensor(ExpertName("model.layers.3", "up"), "exp_avg", (2, 3, 4), DType.float32, ())
    assert stack.element(12 + 5) == "model.layers.3.experts.1.up.weight [exp_avg] at [1, 1]"
    assert stack.label() == "model.layers.3.experts.*.up.weight [exp_avg]"


def test_the_layer_number_is_the_paths_last_component() -> None:
    assert ExpertName("model.layers.12", "gate").layer == 12


@pytest.mark.parametrize("dtype", list(DType), ids=str)
def test_item_sizes_are_torchs(dtype: DType) -> None:
    assert dtype.itemsize == torch.empty(0, dtype=getattr(torch, dtype.torch_name)).element_size()
    assert dtype.is_float == getattr(torch, dtype.torch_name).is_floating_point


# ---- runs


@given(shapes, runs_of, st.data())
def test_pieces_of_a_range_are_the_flat_slice(
    shape: tuple[int, ...], runs: tuple[list[int], list[int]], data: st.DataObject
) -> None:
    values = numbered(shape)
    start = data.draw(st.integers(0, values.numel()))
    numel = data.draw(st.integers(0, values.numel() - start))
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        tensor = scattered(stored(directory, {"t": values})["t"], *runs)
        assert gathered(tensor, start, numel, directory) == raw(values.reshape(-1)[start : start + numel])


GAPS = {
    "at the start": [(1, 5)],
    "at the end": [(0, 5)],
    "in the middle": [(0, 2), (3, 3)],
    "all": [],
}


@pytest.mark.parametrize("runs", GAPS.values(), ids=GAPS)
def test_a_gap_is_refused(runs: list[tuple[int, int]]) -> None:
    regions = tuple(Region(start, numel, "the-file", 0) for start, numel in runs)
    tensor = Tensor("model.w", "master", (2, 3), DType.float32, regions)
    with pytest.raises(CoverageError, match=r"model\.w \[master\]"):
        pieces(tensor, 0, 6)


OVERLAPS = {
    "one element": [(0, 4), (3, 3)],
    "the same twice": [(0, 6), (0, 6)],
    "within": [(0, 6), (2, 1)],
    "beyond the end": [(0, 6), (5, 9)],
}


@pytest.mark.parametrize("runs", OVERLAPS.values(), ids=OVERLAPS)
def test_an_overlap_is_refused(runs: list[tuple[int, int]]) -> None:
    regions = tuple(Region(start, numel, f"file{n}", 0) for n, (start, numel) in enumerate(runs))
    tensor = Tensor("model.w", "master", (2, 3), DType.float32, regions)
    with pytest.raises(CoverageError, match=r"model\.w \[master\].*file"):
        pieces(tensor, 0, 6)


def test_a_run_beyond_the_end_is_refused() -> None:
    tensor = Tensor("model.w", "master", (2, 3), DType.float32, (Region(0, 7, "the-file", 0),))
    with pytest.raises(CoverageError, match=r"model\.w \[master\]"):
        pieces(tensor, 0, 6)


# ---- cuts


@given(shapes, runs_of, st.data())
def test_cuts_are_slices_put_together(
    shape: tuple[int, ...], runs: tuple[list[int], list[int]], data: st.DataObject
) -> None:
    """Any flat slices, in any order, from tensors that themselves lie in several runs."""
    values = numbered(shape)
    count = data.draw(st.integers(1, 5))
    parts = []
    for _ in range(count):
        start = data.draw(st.integers(0, values.numel() - 1))
        parts.append((start, data.draw(st.integers(1, values.numel() - start))))
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        source = scattered(stored(directory, {"t": values})["t"], *runs)
        at, cuts = 0, []
        for start, numel in parts:
            cuts.append(Cut(at, numel, source, start))
            at += numel
        cuts = data.draw(st.permutations(cuts))
        tensor = Tensor("t", "weight", (at,), DType.float32, CutRegions(cuts))
        flat = values.reshape(-1)
        expected = torch.cat([flat[start : start + numel] for start, numel in parts])
        assert raw(held(tensor, directory)) == raw(expected)
        low = data.draw(st.integers(0, at))
        assert gathered(tensor, low, at - low, directory) == raw(expected[low:])


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.data())
def test_cuts_stack_experts_and_split_fused_ones(
    experts: int, half: int, columns: int, data: st.DataObject
) -> None:
    fused = numbered((experts, 2 * half, columns))
    order = data.draw(st.permutations(range(experts)))
    size = half * columns
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        (source,) = stored(directory, {"t": fused}).values()
        gate, up = (
            Tensor(
                "t",
                "weight",
                (experts, half, columns),
                DType.float32,
                CutRegions([Cut(e * size, size, source, e * 2 * size + first) for e in order]),
            )
            for first in (0, size)
        )
        assert torch.equal(held(gate, directory), fused[:, :half])
        assert torch.equal(held(up, directory), fused[:, half:])


def test_cuts_of_cuts() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        values = numbered((10,))
        (source,) = stored(directory, {"t": values}).values()
        turned = Tensor(
            "t", "weight", (10,), DType.float32, CutRegions([Cut(0, 5, source, 5), Cut(5, 5, source, 0)])
        )
        middle = Tensor("t", "weight", (4,), DType.float32, CutRegions([Cut(0, 4, turned, 3)]))
        assert held(middle, directory).tolist() == [8, 9, 0, 1]


def test_a_cut_of_what_is_not_there_is_refused() -> None:
    source = Tensor("t", "weight", (4,), DType.float32, contiguous((4,), "f", 0))
    with pytest.raises(CoverageError):
        list(CutRegions([Cut(0, 5, source, 0)]))


# ---- boxes


@given(shapes, st.data())
def test_a_flat_range_is_cut_into_boxes(shape: tuple[int, ...], data: st.DataObject) -> None:
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    count = data.draw(st.integers(0, numel - start))
    marked = torch.zeros(shape, dtype=torch.int32)
    boxes = list(boxes_of_run(start, count, shape))
    for origin, counts in boxes:
        marked[tuple(slice(o, o + c) for o, c in zip(origin, counts, strict=True))] += 1
    assert marked.reshape(-1).tolist() == [int(start <= i < start + count) for i in range(numel)]
    assert len(boxes) <= 2 * len(shape) - 1


@given(shapes, runs_of, st.sampled_from([64, 256, 4096]), st.data())
def test_taking_is_strided_slicing_and_permuting(
    shape: tuple[int, ...], runs: tuple[list[int], list[int]], scratch: int, data: st.DataObject
) -> None:
    values = numbered(shape)
    axes = []
    for dim in data.draw(st.permutations(range(len(shape)))):
        start = data.draw(st.integers(0, shape[dim] - 1))
        step = data.draw(st.integers(1, 3))
        most = (shape[dim] - start + step - 1) // step
        axes.append(Axis(dim, start, data.draw(st.integers(1, most)), step))
    expected = values
    for axis in axes:
        index = torch.arange(axis.length) * axis.step + axis.start
        expected = expected.index_select(axis.dim, index)
    expected = expected.permute([axis.dim for axis in axes]).contiguous()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        source = scattered(stored(directory, {"t": values})["t"], *runs)
        taken = take(source, axes)
        assert taken.shape == tuple(expected.shape)
        assert raw(held(taken, directory)) == raw(expected)
        low = data.draw(st.integers(0, expected.numel()))
        numel = min(expected.numel() - low, scratch // 4)
        found = gathered(taken, low, numel, directory, scratch)
        assert found == raw(expected.reshape(-1)[low : low + numel])


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_assembling_places_matrices_in_a_stack(
    experts: int, rows: int, columns: int, transposed: bool
) -> None:
    """One file tensor per expert, perhaps [in, out], as one stack [E, out, in]."""
    matrices = {f"e{e}": numbered((rows, columns)) + 100 * e for e in range(experts)}
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        source = stored(directory, matrices)
        dims = (2, 1) if transposed else (1, 2)
        parts = [
            Placed(source[f"e{e}"], (Axis(dims[0], 0, rows), Axis(dims[1], 0, columns)), ((0, e),))
            for e in reversed(range(experts))
        ]
        shape = (experts, columns, rows) if transposed else (experts, rows, columns)
        stack = assemble(source["e0"], shape, parts)
        expected = torch.stack([m.t() if transposed else m for m in matrices.values()]).contiguous()
        assert raw(held(stack, directory)) == raw(expected)
        assert gathered(stack, 0, expected.numel(), directory) == raw(expected)


@given(st.integers(1, 4), st.integers(1, 4))
def test_interleaved_rows_are_taken_apart_and_put_together(half: int, columns: int) -> None:
    fused = numbered((2 * half, columns))
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        (source,) = stored(directory, {"t": fused}).values()
        even, odd = (take(source, [Axis(0, first, half, 2), Axis(1, 0, columns)]) for first in (0, 1))
        assert torch.equal(held(even, directory), fused[::2])
        assert torch.equal(held(odd, directory), fused[1::2])
        again = assemble(
            source,
            (2 * half, columns),
            [
                Placed(part, (Axis(0, n, half, 2), Axis(1, 0, columns)))
                for n, part in enumerate((even, odd))
            ],
        )
        assert raw(held(again, directory)) == raw(fused)


@pytest.mark.parametrize(
    ("rows", "what"),
    [([(0, 2), (1, 2)], "two places"), ([(0, 1)], "missing"), ([(0, 2), (2, 2)], "outside")],
)
def test_boxes_that_do_not_tile_are_refused(rows: list[tuple[int, int]], what: str) -> None:
    source = Tensor("part", "weight", (2, 3), DType.float32, contiguous((2, 3), "f", 0))
    parts = [
        Placed(take(source, [Axis(1, 0, 3), Axis(0, 0, count)]), (Axis(1, 0, 3), Axis(0, first, count)))
        for first, count in rows
    ]
    with pytest.raises(CoverageError, match="part"):
        pieces(assemble(source, (3, 3), parts), 0, 9)
