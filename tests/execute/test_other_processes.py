"""A plan that is carried out elsewhere: pickled, sent to processes that share nothing, the same bytes."""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from ckpt_tool import api
from ckpt_tool.canonical import DType, Region, Tensor
from ckpt_tool.containers.torch_zip import torch_file
from ckpt_tool.errors import CoverageError, DamagedError
from ckpt_tool.execute.budget import Budget
from ckpt_tool.execute.in_order import write_file
from ckpt_tool.execute.local import execute
from ckpt_tool.execute.meter import Silent
from ckpt_tool.execute.writing import EXTENT_BYTES, Part, seal, write_part
from ckpt_tool.formats import preparing
from ckpt_tool.formats.base import Request
from ckpt_tool.formats.known import targets
from ckpt_tool.formats.registry import open_checkpoint
from ckpt_tool.layout import Layout, TargetFile
from ckpt_tool.model_files import read_config
from ckpt_tool.plan import Plan, make_plan
from ckpt_tool.storage import LocalReader, LocalWriter
from tests.conftest import ROOT, nothing_stored, tree
from tests.toy_executor import OtherProcesses

pytestmark = pytest.mark.slow

FIXTURES = {
    "zero3": "deepspeed/mixtral_w2e1",
    "zero2": "deepspeed/mixtral_z2_w4e2",
    "zero0": "deepspeed/mixtral_z0_w2e2",
    "dcp": "dcp/mixtral_accelerate_w2",
}
SOURCES = (*FIXTURES, "universal", "hf")
TARGETS = ("universal", "zero3", "zero2", "zero1", "dcp", "hf")
BUDGET = Budget(1, 1 << 16, 1 << 20)


def fixture_of(source: str) -> Path:
    return ROOT / "fixtures" / FIXTURES.get(source, FIXTURES["zero3"])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each format."""
    home = tmp_path_factory.mktemp("sources")
    for source in SOURCES:
        fixture = fixture_of(source)
        if source in FIXTURES:
            shutil.copytree(fixture / "checkpoint", home / source)
        else:
            api.convert(fixture / "checkpoint", home / source, to=source, config=fixture / "config.json")
    return home


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield pool


def planned(source: Path, config: Path, to: str) -> tuple[Plan, LocalReader]:
    reader, checkpoint = open_checkpoint(source)
    reader.close()
    target = targets()[to]
    written = target.load()
    values = target.values({"world": 2, "ep": 1} if to.startswith("zero") else {})
    prepared = written.prepare(Request(to, checkpoint, values, config=read_config(config)))
    layout = written.layout(prepared.checkpoint, prepared.options)
    return make_plan(layout, nothing_stored()), LocalReader(reader.root)


@cache
def _unpickled(sent: bytes) -> tuple[Plan, LocalReader]:
    found: tuple[Plan, LocalReader] = pickle.loads(sent)
    return found


def write_some(sent: bytes, numbers: list[int], directory: Path) -> None:
    """In another process: some files of a plan."""
    plan, reader = _unpickled(sent)
    sink = LocalWriter(directory, fsync=False)
    for number in numbers:
        write_file(plan.files[number].layout(), reader, sink, BUDGET, Silent())
    reader.close()


# Those that ask transformers for the order of a model's modules take some seconds each.
PAIRS = [
    pytest.param(source, to, marks=[pytest.mark.engine] if slow else [])
    for source in SOURCES
    for to in TARGETS
    for slow in (source in ("dcp", "hf") and to.startswith("zero"),)
]


@pytest.mark.parametrize(("source", "to"), PAIRS)
def test_a_plan_is_written_elsewhere_as_it_is_here(
    source: str,
    to: str,
    home: Path,
    elsewhere: ProcessPoolExecutor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preparing, "check_against_model", lambda *_: ())  # seconds, and no plan
    plan, reader = planned(home / source, fixture_of(source) / "config.json", to)
    sent = pickle.dumps((plan, reader))
    numbers = list(range(len(plan.files)))
    shares = [elsewhere.submit(write_some, sent, numbers[n::2], tmp_path / "there") for n in range(2)]
    sink = LocalWriter(tmp_path / "here", fsync=False)
    execute(plan, reader, sink, BUDGET, meter=Silent(), skip=lambda _: False, on_file=lambda _: None)
    for share in shares:
        share.result()
    assert tree(tmp_path / "there") == tree(tmp_path / "here")


# ---- one file


def large_file(tmp_path: Path, nbytes: int) -> tuple[TargetFile, LocalReader]:
    """An archive of one tensor; the bytes of its source come from the number of their page."""
    with (tmp_path / "source").open("wb") as out:
        for page in range(nbytes >> 20):
            out.write(page.to_bytes(4, "little") * (1 << 18))
    tensor = Tensor("t", "weight", (nbytes,), DType.uint8, (Region(0, nbytes, "source", 0),))
    return torch_file("t.pt", {"t": tensor}), LocalReader(tmp_path)


def write_elsewhere(sent: bytes, part: Part, directory: Path) -> bytes:
    file, reader = pickle.loads(sent)
    sink = LocalWriter(directory, fsync=False)
    sink.join(file.path)
    written = write_part(file, part, reader, sink, BUDGET, Silent())
    sink.finish(file.path)
    return pickle.dumps(written)


@pytest.mark.parametrize("cut", [1, EXTENT_BYTES, EXTENT_BYTES + 5000, 2 * EXTENT_BYTES])
def test_a_large_file_is_written_in_parts_by_two_processes(
    cut: int, elsewhere: ProcessPoolExecutor, tmp_path: Path
) -> None:
    file, reader = large_file(tmp_path, 2 * EXTENT_BYTES + (1 << 20))
    sink = LocalWriter(tmp_path / "there", fsync=False)
    sink.create(file.path, file.size)
    sent = pickle.dumps((file, reader))
    parts = [Part(0, cut), Part(cut, file.size)]
    found = [elsewhere.submit(write_elsewhere, sent, part, tmp_path / "there") for part in parts]
    extents = [extent for one in found for extent in pickle.loads(one.result())]
    there = seal(file, extents, sink, Silent())
    here = write_file(file, reader, LocalWriter(tmp_path / "here", fsync=False), BUDGET, Silent())
    assert there == here
    assert tree(tmp_path / "there") == tree(tmp_path / "here")


@pytest.mark.parametrize("wrong", ["missing", "twice"])
def test_a_file_with_a_part_missing_or_written_twice_is_not_sealed(wrong: str, tmp_path: Path) -> None:
    file, reader = large_file(tmp_path, EXTENT_BYTES + (1 << 20))
    sink = LocalWriter(tmp_path / "there", fsync=False)
    sink.create(file.path, file.size)
    written = write_part(file, Part(0, file.size), reader, sink, BUDGET, Silent())
    assert len(written) == 2
    with pytest.raises(CoverageError, match=r"t\.pt: bytes from \d+ on were written by nobody"):
        seal(file, written[:1] if wrong == "missing" else [*written, written[0]], sink, Silent())


# ---- a whole conversion


def convert(source: Path, target: Path, how: api.Execution) -> api.Result:
    config = fixture_of("zero3") / "config.json"
    return api.convert(source, target, to="universal", config=config, how=how)


def test_a_conversion_by_another_executor_is_the_same(home: Path, tmp_path: Path) -> None:
    toy = OtherProcesses(large=20_000)
    here = convert(home / "zero3", tmp_path / "here", api.Execution(fsync=False))
    there = convert(home / "zero3", tmp_path / "there", api.Execution(fsync=False, executor=toy))
    assert toy.sent
    assert max(len(data) for data in tree(tmp_path / "here").values()) > toy.large
    assert tree(tmp_path / "there") == tree(tmp_path / "here")
    assert (there.checked_bytes, there.unchecked_bytes) == (here.checked_bytes, here.unchecked_bytes)
    assert here.checked_bytes


def test_damage_is_told_whoever_has_read_it(home: Path, tmp_path: Path) -> None:
    """A record that two processes have read a part of each: neither can tell."""
    damaged = tmp_path / "damaged"
    shutil.copytree(home / "zero3", damaged)
    file = next(damaged.rglob("bf16_zero_pp_rank_1*optim_states.pt"), None) or next(
        damaged.rglob("zero_pp_rank_1*optim_states.pt")
    )
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    for executor in (execute, OtherProcesses(large=20_000)):
        with pytest.raises(DamagedError, match=r"damaged: .*optim_states") as raised:
            convert(damaged, tmp_path / "out", api.Execution(fsync=False, executor=executor))
        assert [file.name] == [Path(path).name for path in raised.value.files]
    assert not (tmp_path / "out").exists()


def test_what_another_executor_left_is_gone_on_with_here(home: Path, tmp_path: Path) -> None:
    toy = OtherProcesses()

    def failing(*args: object, **kwargs: object) -> None:
        on_file = kwargs["on_file"]
        done: list[object] = []

        def some(file: object) -> None:
            on_file(file)  # type: ignore[operator]
            done.append(file)
            if len(done) == 5:
                raise KeyboardInterrupt

        toy(*args, **{**kwargs, "on_file": some})  # type: ignore[arg-type]

    with pytest.raises(KeyboardInterrupt):
        convert(home / "zero3", tmp_path / "out", api.Execution(fsync=False, executor=failing))  # type: ignore[arg-type]
    left = tmp_path / ".out.ckpt-tool-staging"
    before = {path: path.stat().st_mtime_ns for path in left.rglob("*.pt")}
    assert before
    convert(home / "zero3", tmp_path / "out", api.Execution(fsync=False))
    after = {path: (tmp_path / "out" / path.relative_to(left)).stat().st_mtime_ns for path in before}
    assert sum(after[path] == before[path] for path in before) >= 5
    convert(home / "zero3", tmp_path / "here", api.Execution(fsync=False))
    assert tree(tmp_path / "out") == tree(tmp_path / "here")


def test_the_layout_of_a_plan_is_made_once_for_each_use() -> None:
    """Once to plan, once to write; neither for a path nor for the identity."""

    class Counting:
        made = 0

        def layout(self) -> TargetFile:
            Counting.made += 1
            return torch_file("a.pt", {"n": 1})

    plan = make_plan(Layout((Counting(),)), nothing_stored())
    assert (plan.files[0].path, Counting.made, len(plan.identity)) == ("a.pt", 1, 32)
