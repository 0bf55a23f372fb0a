"""Coverage is counted in the source's bytes: whatever a rename, a cut or a table loses is missed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tool import api
from ckpt_tool.accounting import Bytes
from ckpt_tool.canonical import Box, Checkpoint, DType, Region, Tensor
from ckpt_tool.containers.torch_zip import TorchArchive, torch_file
from ckpt_tool.errors import CoverageError, MismatchError
from ckpt_tool.families import naming
from ckpt_tool.families.forms import split
from ckpt_tool.formats.base import Request
from ckpt_tool.formats.hf import writing
from ckpt_tool.formats.known import targets
from ckpt_tool.formats.registry import open_checkpoint
from ckpt_tool.layout import IN_OBJECT, Fill, Layout, Literal, Slot, TargetFile, whole
from ckpt_tool.model_files import read_config
from ckpt_tool.plan import make_plan
from ckpt_tool.storage import LocalReader
from tests.conftest import ROOT, checkpoint_of, config_of, nothing_stored

pytestmark = pytest.mark.slow

# ---- sets of bytes, against sets of numbers


def box_bytes(box: Box, itemsize: int) -> Iterator[int]:
    starts = [box.offset]
    for count, stride in zip(box.counts, box.strides, strict=True):
        starts = [start + i * stride for start in starts for i in range(count)]
    return (start + i for start in starts for i in range(itemsize))


@st.composite
def boxes(draw: Callable[..., object]) -> Box:
    rank = draw(st.integers(1, 3))
    counts = tuple(draw(st.integers(1, 4)) for _ in range(rank))  # type: ignore[call-overload]
    strides = tuple(draw(st.sampled_from([1, 2, 3, 4, 8, 12, 16, 24])) for _ in range(rank))  # type: ignore[call-overload]
    return Box((0,) * rank, counts, (1,) * rank, "f", draw(st.integers(0, 30)), strides)  # type: ignore[arg-type]


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=6),
    st.lists(boxes(), max_size=5),
    st.integers(1, 2),
    st.integers(0, 60),
    st.integers(1, 40),
)
def test_a_set_of_bytes_is_one(
    runs: list[tuple[int, int]], lattices: list[Box], itemsize: int, offset: int, length: int
) -> None:
    found, expected = Bytes(), set[int]()
    for start, numel in runs:
        found.add("f", start, start + numel)
        expected |= set(range(start, start + numel))
    for box in lattices:
        found.add_piece(box, itemsize)
        expected |= set(box_bytes(box, itemsize))
    wanted = range(offset, offset + length)
    missing = [byte for byte in wanted if byte not in expected]
    assert list(found.missing("f", [(offset, length)])) == ([(0, missing[0])] if missing else [])
    gaps = [byte for start, end in found.gaps("f", 200) for byte in range(start, end)]
    assert gaps == [byte for byte in range(200) if byte not in expected]


@pytest.mark.parametrize("order", range(4))
def test_interleaved_and_transposed_parts_complement_each_other(order: int) -> None:
    """A million runs of two bytes each that are one stretch together, in whatever order they come."""
    rows, columns = 2000, 1000
    parts = [
        Box((0, 0), (rows // 2, columns), (1, 1), "f", 2 * half + first * 4 * columns, (4 * columns, 4))
        for half in (0, 1)
        for first in (0, rows // 2)
    ]
    random.Random(order).shuffle(parts)
    found = Bytes()
    found.add_pieces(parts[:-1], 2)
    assert not found.holds("f", 0, rows * columns * 4)
    found.add_pieces(parts[-1:], 2)
    assert found.holds("f", 0, rows * columns * 4)


def test_lattices_that_overlap_without_complementing_are_looked_up() -> None:
    found = Bytes()
    found.add_pieces(
        [Box((0,), (100_000,), (1,), "f", 0, (6,)), Box((0,), (70_001,), (1,), "f", 3, (9,))], 2
    )
    held = {6 * i + b for i in range(100_000) for b in (0, 1)} | {
        3 + 9 * i + b for i in range(70_001) for b in (0, 1)
    }
    first = min(set(range(1000)) - held)
    assert list(found.missing("f", [(0, 1000)])) == [(0, first)]
    assert found.holds("f", 12, 2) == ({12, 13} <= held)


# ---- every source byte of every format


SOURCES = sorted(path.parent for path in (ROOT / "fixtures").glob("*/*/made_with.json"))


def source_of(fixture: Path) -> Path:
    return next(path for path in (fixture / "checkpoint", *fixture.glob("step-*")) if path.exists())


@pytest.mark.parametrize("fixture", SOURCES, ids=[path.name for path in SOURCES])
def test_containers_say_where_all_tensors_lie(fixture: Path) -> None:
    reader, checkpoint = open_checkpoint(source_of(fixture))
    reader.close()
    stored = sum(sum(file.stored[1::2]) for file in checkpoint.files)
    assert stored >= sum(tensor.nbytes for tensor in checkpoint.tensors)


def without(layout: Layout, lost: Callable[[Tensor], bool]) -> Layout:
    """The layout with zeros in the place of some tensors: its files are tiled as before."""

    def emptied(file: TargetFile) -> TargetFile:
        zeros = [Literal(f.offset, bytes(f.nbytes)) for f in file.fills if lost(f.tensor) and f.numel]
        kept = tuple(f for f in file.fills if not (lost(f.tensor) and f.numel))
        return replace(file, literals=(*file.literals, *zeros), fills=kept, crc_slots=())

    return replace(layout, files=[emptied(file) for file in layout.laid_out()])


def laid_out(name: str, to: str, **options: object) -> tuple[Layout, Checkpoint]:
    return laid_out_from(checkpoint_of(name), config_of(name), to, **options)


def laid_out_from(source: Path, config_path: Path, to: str, **options: object) -> tuple[Layout, Checkpoint]:
    config = read_config(config_path)
    reader, checkpoint = open_checkpoint(source)
    reader.close()
    target = targets()[to]
    written = target.load()
    prepared = written.prepare(Request(to, checkpoint, target.values(options), config=config))
    return written.layout(prepared.checkpoint, prepared.options), prepared.checkpoint


STATES = [("dcp", "exp_avg_sq"), ("dcp", "exp_avg"), ("universal", "exp_avg_sq"), ("zero3", "exp_avg")]


@pytest.mark.parametrize(("to", "state"), STATES)
def test_a_target_without_an_optimizer_state_is_refused(to: str, state: str) -> None:
    layout, checkpoint = laid_out("mixtral_w4e2", to)
    make_plan(layout, checkpoint)
    with pytest.raises(CoverageError, match=r"optim_states\.pt: of the tensor stored in bytes"):
        make_plan(without(layout, lambda tensor: tensor.state == state), checkpoint)


@pytest.mark.parametrize("to", ["dcp", "universal", "zero3", "zero2", "hf"])
def test_a_target_without_any_one_tensor_is_refused(to: str) -> None:
    layout, checkpoint = laid_out("mixtral_w4e2", to)
    names = {str(f.tensor.name) for file in layout.laid_out() for f in file.fills if f.numel}
    for name in sorted(names):
        with pytest.raises(CoverageError, match="goes nowhere"):
            make_plan(without(layout, lambda tensor, name=name: str(tensor.name) == name), checkpoint)  # type: ignore[misc]


def test_one_expert_written_twice_in_place_of_another_is_refused() -> None:
    layout, checkpoint = laid_out("mixtral_w4e2", "hf")

    def swapped(file: TargetFile) -> TargetFile:
        fills = [*file.fills]
        experts = [i for i, f in enumerate(fills) if ".experts.3." in str(f.offset) or f.start]
        fills[experts[0]] = replace(fills[experts[0]], start=0)
        return replace(file, fills=tuple(fills))

    with pytest.raises(CoverageError, match="twice"):
        make_plan(
            replace(layout, files=[swapped(file) if file.fills else file for file in layout.laid_out()]),
            checkpoint,
        )


def test_a_stored_tensor_that_no_name_leads_to_is_refused(tmp_path: Path) -> None:
    """A record in an archive that the catalogue does not know, whatever the catalogue says of itself."""
    torch.save({"known": torch.ones(8), "unknown": torch.ones(3)}, tmp_path / "f.pt")
    archive = TorchArchive(LocalReader(tmp_path), "f.pt")
    known = archive.tensor("known", "weight", archive.root["known"])
    checkpoint = replace(nothing_stored(known, root=str(tmp_path)), files=(archive.source,))
    layout = Layout((torch_file("out.pt", {"known": known}),))
    with pytest.raises(CoverageError, match=r"f\.pt: of the tensor stored in bytes"):
        make_plan(layout, checkpoint)


def test_what_no_view_of_a_storage_shows_is_nobodys(tmp_path: Path) -> None:
    whole = torch.arange(10.0)
    torch.save({"a": whole[2:5], "b": whole[6:9]}, tmp_path / "f.pt")
    archive = TorchArchive(LocalReader(tmp_path), "f.pt")
    a, b = (archive.tensor(key, "weight", archive.root[key]) for key in "ab")
    checkpoint = replace(nothing_stored(a, b), files=(archive.source,))
    make_plan(Layout((torch_file("out.pt", {"a": a, "b": b}),)), checkpoint)
    with pytest.raises(CoverageError):
        make_plan(Layout((torch_file("out.pt", {"a": a}),)), checkpoint)


def test_both_halves_of_an_interleaved_matrix_are_needed() -> None:
    gate, up = (
        Tensor(name, "weight", (4, 6), DType.float32, (Box((0, 0), (4, 6), (1, 1), "f", at, (48, 8)),))
        for name, at in (("gate", 0), ("up", 4))
    )
    files = (SOURCE._replace(stored=(0, 4 * 48)),)
    checkpoint = replace(nothing_stored(gate, up), files=files)
    make_plan(Layout((torch_file("out.pt", {"gate": gate, "up": up}),)), checkpoint)
    with pytest.raises(CoverageError, match="byte 4 goes nowhere"):
        make_plan(Layout((torch_file("out.pt", {"gate": gate, "again": gate}),)), checkpoint)


# ---- no source byte is written twice, unless the layout says as which copy


def runs(name: str, *at: int) -> Tensor:
    """A tensor of four elements for each number: where they lie."""
    regions = tuple(Region(4 * i, 4, "f", offset) for i, offset in enumerate(at))
    return Tensor(name, "weight", (4 * len(at),), DType.float32, regions)


def checked(value: object, *tensors: Tensor, stored: tuple[int, ...] = (0, 32)) -> None:
    checkpoint = replace(nothing_stored(*tensors), files=(SOURCE._replace(stored=stored),))
    make_plan(Layout((torch_file("out.pt", value),)), checkpoint)


def test_a_tensor_under_two_names_is_refused() -> None:
    w = runs("w", 0, 16)
    checked({"w": whole(w)}, w)
    with pytest.raises(CoverageError, match="byte 0 twice"):
        checked({"w": whole(w), "again": whole(w)}, w)


def test_a_tensor_under_a_tied_name_is_a_copy() -> None:
    w = runs("w", 0, 16)
    checked({"w": whole(w), "tied": whole(w, copy="tied")}, w)
    with pytest.raises(CoverageError, match=r"byte 0 twice \(tied\)"):
        checked({"w": whole(w), "tied": whole(w, copy="tied"), "again": whole(w, copy="tied")}, w)


def test_a_copy_does_not_stand_for_the_tensor_itself() -> None:
    """The rounded weights of one expert in its file do not hide that its masters are missing."""
    w, other = runs("w", 0), runs("other", 16)
    with pytest.raises(CoverageError, match="byte 16 goes nowhere"):
        checked({"w": whole(w), "copy": whole(other, copy="computed")}, w, other)


def test_a_part_of_a_tensor_is_no_copy_of_it() -> None:
    w = runs("w", 0, 16)
    with pytest.raises(CoverageError, match="a part of it only"):
        checked({"w": whole(w), "copy": Slot(w, (4,), w.dtype, 0, "computed")}, w)


def test_tensors_of_an_object_are_held_as_often_as_it_says() -> None:
    w = runs("w", 0, 16)
    checked({"client": w, "again": [w]}, w)


def test_an_interleaved_matrix_that_is_written_twice_is_refused() -> None:
    gate, up = (
        Tensor(name, "weight", (4, 6), DType.float32, (Box((0, 0), (4, 6), (1, 1), "f", at, (48, 8)),))
        for name, at in (("gate", 0), ("up", 4))
    )
    both = {"gate": whole(gate), "up": whole(up)}
    checked(both, gate, up, stored=(0, 192))
    rows = Slot(gate, (2, 6), gate.dtype, 6)  # other lattices of the same bytes
    for again in (whole(gate), rows):
        with pytest.raises(CoverageError, match="twice"):
            checked({**both, "again": again}, gate, up, stored=(0, 192))


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=6),
    st.lists(boxes(), max_size=3),
)
def test_a_byte_in_a_set_twice_is_found(spans: list[tuple[int, int]], lattices: list[Box]) -> None:
    found, expected = Bytes(), list[int]()
    for start, numel in spans:
        found.add("f", start, start + numel)
        expected += range(start, start + numel)
    for box in lattices:
        found.add_piece(box, 1)
        expected += box_bytes(box, 1)
    assert (found.double() is None) == (len(set(expected)) == len(expected))
    if found.double() is not None and not lattices:
        assert expected.count(found.double()[1]) > 1  # type: ignore[index]


@pytest.mark.parametrize("to", ["zero3", "zero2", "zero1", "universal", "dcp", "hf"])
def test_any_part_of_a_target_that_is_written_twice_is_refused(to: str) -> None:
    """Each fill in turn, once more in a file of its own: as what it is, as a copy, and of the copies."""
    layout, checkpoint = laid_out("mixtral_w4e2", to)
    fills = [f for file in layout.laid_out() for f in file.fills if f.numel and f.copy != IN_OBJECT]
    for again in random.Random(1).sample(fills, min(12, len(fills))):
        more = TargetFile("more", again.nbytes, (), (replace(again, offset=0),))
        with pytest.raises(CoverageError, match="twice"):
            make_plan(replace(layout, files=[*layout.files, more]), checkpoint)


# ---- what renaming may lose or double


Parts = list[Tensor]
LOSSES: dict[str, Callable[[Parts], Parts]] = {
    "one of the parts": lambda parts: parts[:-1],
    "half of a part": lambda parts: [
        replace(parts[0], shape=(parts[0].shape[0] // 2, *parts[0].shape[1:])),
        *parts[1:],
    ],
    "one part in place of another": lambda parts: [
        parts[0],
        *(replace(parts[0], name=part.name) for part in parts[1:]),
    ],
}


@pytest.mark.parametrize("kind", LOSSES)
def test_a_rename_that_loses_elements_is_refused(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """What the family's tables cut or join is counted by nobody but the accounting."""
    monkeypatch.setattr(writing, "check_config", lambda *given: None)  # which would find some of it
    lossy: list[tuple[object, str, Callable[..., object]]] = [
        (naming, "split", lambda *given: LOSSES[kind](split(*given))),
        (writing, "entries", lambda *given: lost_entries(kind, naming.entries(*given))),
    ]
    for module, name, loses in lossy:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, loses)
            with pytest.raises(CoverageError, match=r"goes nowhere|twice|claims to hold"):
                make_plan(*from_fused())
    make_plan(*from_fused())


def from_fused() -> tuple[Layout, Checkpoint]:
    """A run whose experts transformers holds in one tensor, gate and up as one: taken apart for files."""
    fixture = ROOT / "fixtures" / "dcp" / "mixtral_accelerate_w2"
    return laid_out_from(source_of(fixture), fixture / "config.json", "hf")


def lost_entries(kind: str, found: list[naming.Entry]) -> list[naming.Entry]:
    number = next(i for i, entry in enumerate(found) if ".experts." in entry.name and entry.start)
    entry = found[number]
    if kind == "one of the parts":
        return [*found[:number], *found[number + 1 :]]
    if kind == "half of a part":
        halved = replace(entry, shape=(entry.shape[0] // 2, *entry.shape[1:]))
        return [*found[:number], halved, *found[number + 1 :]]
    return [*found[:number], replace(entry, start=0), *found[number + 1 :]]


def test_a_hundred_thousand_names_are_told_apart_in_one_pass() -> None:
    """Counted, not timed: a name is hashed a few times, whatever there is beside it."""
    hashed = 0

    class Name(str):
        def __hash__(self) -> int:
            nonlocal hashed
            hashed += 1
            return super().__hash__()

        def __eq__(self, other: object) -> bool:
            nonlocal hashed
            hashed += 1
            return super().__eq__(other)

    count = 100_000
    tensors = [Tensor(Name(f"t{i}"), "weight", (0,), DType.float32, ()) for i in range(count)]
    naming.check_names(tensors)
    tensors[-1] = replace(tensors[-1], name=Name("t0"))
    with pytest.raises(MismatchError, match=r"same published name: t0 \[weight\]"):
        naming.check_names(tensors)
    assert hashed < 20 * count


SOURCE = api.catalogue(checkpoint_of("dense_w3")).files[0]._replace(path="f", read=(), archives=())


def test_others_are_left_out_by_name_where_nobody_writes_them(tmp_path: Path) -> None:
    other = Tensor("ema.w", "weight", (4,), DType.float32, (Region(0, 4, "f", 0),))
    checkpoint = replace(nothing_stored(), files=(SOURCE._replace(stored=(0, 16)),), others=(other,))
    plan = make_plan(Layout(()), checkpoint)
    assert [(one.label, one.reason) for one in plan.left_out] == [
        ("ema.w [weight]", "neither the model's nor its optimizer's")
    ]
    target = TargetFile("out", 16, (), (Fill(0, other, 0, 4, DType.float32),))
    assert make_plan(Layout((target,)), checkpoint).left_out == ()
