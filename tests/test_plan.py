"""The planner: what is not accounted for refuses, and the same inputs give the same plan."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ckpt_tool import api
from ckpt_tool.canonical import Box, DType, Region, Tensor, contiguous
from ckpt_tool.errors import CkptToolError, CoverageError, UsageError
from ckpt_tool.formats.deepspeed.facts.target_options import UniversalOptions
from ckpt_tool.formats.deepspeed.writing.universal import Universal
from ckpt_tool.geometry import Axis, take
from ckpt_tool.layout import Fill, Layout, Literal, TargetFile, left_out, text_file
from ckpt_tool.plan import copies, extents, make_plan
from tests.conftest import ZERO3, checkpoint_of, nothing_stored, stored_whole


def tensor(name: str = "w", shape: tuple[int, ...] = (4,), at: int = 0) -> Tensor:
    return Tensor(name, "weight", shape, DType.float32, contiguous(shape, "source", at))


def file(*fills: Fill, size: int | None = None, literals: tuple[Literal, ...] = ()) -> TargetFile:
    held = sum(fill.nbytes for fill in fills) + sum(len(part.data) for part in literals)
    return TargetFile("target", held if size is None else size, literals, fills)


def fill(of: Tensor, offset: int = 0, start: int = 0, numel: int | None = None) -> Fill:
    return Fill(offset, of, start, of.numel if numel is None else numel, DType.float32)


def test_a_complete_layout_is_planned() -> None:
    w = tensor()
    plan = make_plan(Layout((file(fill(w)), text_file("note", "hi"))), stored_whole(w))
    assert (plan.bytes_read, plan.bytes_written, len(plan.files)) == (16, 18, 2)


TILINGS = {
    "gap at the start": ([4], 20),
    "gap at the end": ([0], 20),
    "file too short": ([0], 12),
}


@pytest.mark.parametrize(("offsets", "size"), TILINGS.values(), ids=TILINGS)
def test_a_target_file_that_is_not_tiled_is_refused(offsets: list[int], size: int) -> None:
    w = tensor()
    layout = Layout((file(*(fill(w, offset) for offset in offsets), size=size),))
    with pytest.raises(CoverageError, match="target"):
        make_plan(layout, stored_whole(w))


def test_a_gap_between_fills_is_refused() -> None:
    w = tensor()
    layout = Layout((file(fill(w, 0, 0, 2), fill(w, 12, 2, 2), size=20),))
    with pytest.raises(CoverageError, match="target"):
        make_plan(layout, stored_whole(w))


def test_overlapping_fills_are_refused() -> None:
    w = tensor()
    layout = Layout((file(fill(w, 0, 0, 3), fill(w, 8, 2, 2), size=16),))
    with pytest.raises(CoverageError, match="target"):
        make_plan(layout, stored_whole(w))


def test_a_literal_over_a_fill_is_refused() -> None:
    w = tensor()
    layout = Layout((file(fill(w), literals=(Literal(8, b"x"),), size=16),))
    with pytest.raises(CoverageError, match="target"):
        make_plan(layout, stored_whole(w))


def test_a_source_tensor_that_is_not_used_is_refused() -> None:
    w, unused = tensor(), tensor("model.unused", at=16)
    with pytest.raises(CoverageError, match=r"bytes 16 to 32, byte 16 goes nowhere"):
        make_plan(Layout((file(fill(w)),)), stored_whole(w, unused))


def test_a_source_tensor_may_be_left_out_by_name() -> None:
    w, unused = tensor(), tensor("model.unused", at=16)
    make_plan(Layout((file(fill(w)),), left_out([unused], "no place for it")), stored_whole(w, unused))


def test_an_empty_source_tensor_has_to_be_used_too() -> None:
    w, empty = tensor(), tensor("model.empty", (0, 3))
    with pytest.raises(CoverageError, match=r"model\.empty"):
        make_plan(Layout((file(fill(w)),)), stored_whole(w, empty))
    make_plan(Layout((file(fill(w), fill(empty, 16)),)), stored_whole(w, empty))


@pytest.mark.parametrize("used", [[(0, 3)], [(1, 3)], [(0, 1), (2, 2)]], ids=str)
def test_a_source_tensor_used_in_part_is_refused(used: list[tuple[int, int]]) -> None:
    w = tensor("model.part")
    position, fills = 0, []
    for start, numel in used:
        fills.append(fill(w, position, start, numel))
        position += numel * 4
    with pytest.raises(CoverageError, match="goes nowhere"):
        make_plan(Layout((file(*fills),)), stored_whole(w))


def test_another_state_of_a_used_tensor_is_not_used() -> None:
    w = tensor()
    with pytest.raises(CoverageError, match="byte 16 goes nowhere"):
        make_plan(Layout((file(fill(w)),)), stored_whole(w, replace(tensor(at=16), state="exp_avg")))


def test_a_source_element_that_lies_nowhere_is_refused() -> None:
    w = replace(tensor(), regions=(Region(0, 3, "source", 0),))
    with pytest.raises(CoverageError, match=r"w \[weight\] at \[3\]"):
        make_plan(Layout((file(fill(w)),)), stored_whole(w))


def test_a_source_element_in_two_places_is_refused() -> None:
    w = replace(tensor(), regions=(Region(0, 3, "one", 0), Region(2, 2, "two", 0)))
    with pytest.raises(CoverageError, match="two"):
        make_plan(Layout((file(fill(w)),)), stored_whole(w))


@pytest.mark.parametrize("second", [1, 3], ids=["overlapping", "outside"])
def test_chunks_that_do_not_tile_their_tensor_are_refused(second: int) -> None:
    """As many elements as it has; but one is in two chunks and another in none, or lies beyond its end."""
    chunks = tuple(Box((first,), (2,), (1,), "source", 4 * first, (4,)) for first in (0, second))
    w = replace(tensor(), regions=chunks)
    with pytest.raises(CoverageError, match=r"two places claim|reaches outside"):
        make_plan(Layout((file(fill(w)),)), nothing_stored(w))


def test_a_fill_beyond_its_tensor_is_refused() -> None:
    w = tensor()
    with pytest.raises(CoverageError):
        make_plan(Layout((file(fill(w, 0, 0, 5)),)), stored_whole(w))


def test_two_files_of_one_name_are_refused() -> None:
    with pytest.raises(CkptToolError, match="latest"):
        make_plan(Layout((text_file("latest", "a"), text_file("latest", "a"))), stored_whole())


@pytest.mark.parametrize("path", ["../evil", "/evil", "a/../../evil"])
def test_a_file_outside_of_the_target_is_refused(path: str) -> None:
    """Names of parameters become directories: a checkpoint must not write elsewhere."""
    with pytest.raises(CkptToolError, match="evil"):
        make_plan(Layout((text_file(path, "x"),)), stored_whole())


def test_casts_are_reported() -> None:
    w = tensor()
    layout = Layout((TargetFile("target", 8, (), (Fill(0, w, 0, 4, DType.bfloat16),)),))
    plan = make_plan(layout, stored_whole(w))
    assert [tuple(cast) for cast in plan.casts] == [("w [weight]", "float32", "bfloat16")]
    assert (plan.bytes_read, plan.bytes_written) == (16, 8)


@pytest.mark.parametrize(
    ("source", "target"),
    [(DType.float32, DType.int32), (DType.int32, DType.float32), (DType.float32, DType.float8_e4m3fn)],
)
def test_casts_from_or_to_what_is_no_float_are_refused(source: DType, target: DType) -> None:
    w = replace(tensor(), dtype=source)
    layout = Layout((TargetFile("target", 4 * target.itemsize, (), (Fill(0, w, 0, 4, target),)),))
    with pytest.raises(UsageError, match=f"w .weight. is {source}; a cast to {target}"):
        make_plan(layout, stored_whole(w))


@pytest.mark.parametrize("limit", [1, 4, 5, 7, 16, 100])
def test_extents_cut_fills_without_gap_or_overlap(limit: int) -> None:
    w = tensor("w", (9,))
    target = file(fill(w, 0, 0, 5), fill(w, 20, 5, 4))
    found = list(extents(target, limit))
    assert [
        (extent.fill, element)
        for extent in found
        for element in range(extent.start, extent.start + extent.numel)
    ] == [(0, e) for e in range(5)] + [(1, e) for e in range(4)]
    assert all(extent.numel * 4 <= max(4, limit) for extent in found)
    assert all(extent.pieces == copies(target.fills[extent.fill]) for extent in found)


def test_extents_keep_blocks_together_where_they_fit() -> None:
    """Blocks are counted from the start of the tensor, a fill may begin within one."""
    turned = take(tensor("w", (5, 3, 2)), [Axis(0, 0, 5), Axis(2, 0, 2), Axis(1, 0, 3)])
    target = file(fill(turned, 0, 4, 22))
    for limit, expected in (
        (14 * 4, [(4, 8), (12, 12), (24, 2)]),  # two blocks of 6 at once
        (6 * 4, [(4, 2), (6, 6), (12, 6), (18, 6), (24, 2)]),
        (5 * 4, [(4, 2), (6, 6), (12, 6), (18, 6), (24, 2)]),  # a block is never cut
    ):
        found = list(extents(target, limit))
        assert [(4 + extent.start, extent.numel) for extent in found] == expected
        assert {extent.block for extent in found} == {6}


@pytest.mark.parametrize("name", ZERO3)
def test_the_same_checkpoint_gives_the_same_plan(name: str) -> None:
    def described() -> list[object]:
        checkpoint = api.catalogue(checkpoint_of(name))
        plan = make_plan(Universal().layout(checkpoint, UniversalOptions()), checkpoint)
        return [
            (
                *(target.path, target.size, target.literals, target.crc_slots),
                [(f.offset, f.start, f.numel, f.dtype, copies(f)) for f in target.fills],
            )
            for target in (planned.layout() for planned in plan.files)
        ]

    assert described() == described()
