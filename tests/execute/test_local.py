"""The local executor: the same bytes however they are cut, torch's casts, failures that leave nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_tool import api
from ckpt_tool.canonical import DType, Region, Tensor
from ckpt_tool.containers.torch_zip import torch_file
from ckpt_tool.errors import CkptToolError, ExecutionError, UnreadableError, UsageError
from ckpt_tool.execute.budget import KIB, Budget
from ckpt_tool.execute.local import execute
from ckpt_tool.execute.meter import Silent
from ckpt_tool.execute.threads import in_parallel
from ckpt_tool.execute.writing import EXTENT_BYTES
from ckpt_tool.geometry import Axis, take
from ckpt_tool.layout import Layout, whole
from ckpt_tool.plan import make_plan
from ckpt_tool.storage import LocalReader, LocalWriter
from ckpt_tool.written import WrittenFile
from tests.conftest import (
    DTYPES,
    carry_out,
    checkpoint_of,
    config_of,
    nothing_stored,
    raw,
    some_of,
    stored,
    tree,
)

FLOATS = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
CASTS = [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]


# ---- the same bytes, however the work is cut


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What one worker with a large budget writes."""
    out = tmp_path_factory.mktemp("once")
    convert(out / "universal", "universal", api.Execution(workers=1, fsync=False))
    convert(out / "hf", "hf", api.Execution(workers=1, fsync=False))
    return {to: tree(out / to) for to in ("universal", "hf")}


def convert(target: Path, to: str, how: api.Execution) -> None:
    name = "mixtral_odd_w4e2"
    config = config_of(name) if to == "hf" else None
    dtype = "bf16" if to == "hf" else None
    api.convert(checkpoint_of(name), target, to=to, config=config, dtype=dtype, how=how)


@pytest.mark.parametrize("to", ["universal", "hf"])
@pytest.mark.parametrize("workers", [2, 7])
@pytest.mark.parametrize("memory", [128 * KIB, 1 << 30], ids=["smallest", "large"])
def test_bytes_do_not_depend_on_workers_and_memory(
    memory: int, workers: int, to: str, once: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    convert(tmp_path / "out", to, api.Execution(memory, workers, fsync=False))
    assert tree(tmp_path / "out") == once[to]


@pytest.mark.parametrize("tile", [64, 192, 4096, 1 << 20])
@pytest.mark.parametrize("largest", [0, 1 << 20])
@pytest.mark.parametrize("workers", [1, 3])
def test_bytes_do_not_depend_on_tiles(tile: int, largest: int, workers: int, tmp_path: Path) -> None:
    values = {
        "a": some_of(torch.float32, 5000).reshape(50, 100),
        "b": some_of(torch.int8, 999),
        "c": some_of(torch.float64, 333),
    }
    described = stored(tmp_path, values)
    described |= stored(tmp_path, {"d": torch.linspace(-9, 9, 4001)}, file="second.bin")
    turned = take(described["a"], [Axis(1, 0, 100), Axis(0, 0, 50)])
    value = {**described, "t": turned, "half": whole(described["d"], DType.float16)}
    layout = Layout((torch_file("f.pt", value),))
    carry_out(layout, tmp_path, tmp_path / "out", budget=Budget(workers, tile, largest))
    found = torch.load(tmp_path / "out" / "f.pt", weights_only=True)
    values["d"] = torch.linspace(-9, 9, 4001)
    expected = {**values, "t": values["a"].t().contiguous(), "half": values["d"].half()}
    assert {name: raw(t) for name, t in found.items()} == {name: raw(t) for name, t in expected.items()}


class Counted(LocalReader):
    """Counts what is read."""

    reads = 0
    nbytes = 0

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        self.reads += 1
        self.nbytes += len(buffer)
        super().read_into(path, offset, buffer)


@pytest.mark.parametrize("dtype", [DType.float32, DType.bfloat16])
def test_matrices_to_be_transposed_are_read_whole_and_once(dtype: DType, tmp_path: Path) -> None:
    """And not a few bytes of every row for each tile."""
    values = torch.randn(4, 300, 200)
    described = stored(tmp_path, {"a": values})["a"]
    turned = take(described, [Axis(0, 0, 4), Axis(2, 0, 200), Axis(1, 0, 300)])
    layout = Layout((torch_file("f.pt", [whole(turned, dtype)]),))
    reader = Counted(tmp_path)
    budget = Budget(2, 4096, 1 << 20)
    carry_out(layout, tmp_path, tmp_path / "out", budget=budget, reader=reader)
    (found,) = torch.load(tmp_path / "out" / "f.pt", weights_only=True)
    assert torch.equal(found, values.transpose(1, 2).to(found.dtype))
    assert (reader.reads, reader.nbytes) == (4, values.nbytes)
    assert make_plan(layout, nothing_stored()).largest_block == 300 * 200 * 4


def test_a_file_larger_than_one_extent_is_whole(tmp_path: Path) -> None:
    """Several workers write one file; the CRC in its headers is combined from theirs."""
    count = EXTENT_BYTES + EXTENT_BYTES // 3
    (tmp_path / "big").write_bytes(os.urandom(1024) * (count // 1024))
    numel = (tmp_path / "big").stat().st_size
    source = Tensor("t", "weight", (numel,), DType.uint8, (Region(0, numel, "big", 0),))
    layout = Layout((torch_file("f.pt", {"t": source}),))
    written = carry_out(layout, tmp_path, tmp_path / "out", budget=Budget(2, 1 << 20))
    with zipfile.ZipFile(tmp_path / "out" / "f.pt") as archive:
        assert archive.testzip() is None
    extents = written[0].extents
    assert len(extents) > 3
    assert sum(extent.length for extent in extents) == written[0].size


# ---- casts

SPECIAL = [
    *(0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan")),
    *(1e-45, -1e-45, 1e-40, 1.1754942e-38, 1.1754944e-38),  # float32 subnormals and the least normal
    *(6e-8, 5.9604645e-08, 2.98e-8, 2.9802322e-08, 6.1035156e-05),  # float16 subnormals and their ties
    *(65504.0, 65519.0, 65520.0, 65536.0, 3.3895314e38, 3.4028235e38),  # the largest, and beyond
    *(1.00390625, 1.01171875, 1.0009765625, 1.0029296875, 2049.0, 2051.0),  # ties to even
    *(448.0, 464.0, 465.0, 57344.0, 61440.0, 0.001953125, 0.0009765625, 240.5),  # float8's ends and ties
]


def same_but_for_nans(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit for bit; a NaN is a NaN, because torch makes different ones on different processors."""
    broken = expected.isnan()
    return torch.equal(found.isnan(), broken) and raw(found[~broken]) == raw(expected[~broken])


def without_overflow(values: torch.Tensor, target: torch.dtype) -> torch.Tensor:
    """Without the finite numbers that float16 would make infinite, which are refused."""
    if target is not torch.float16:
        return values
    return values[values.to(target).isfinite() | ~values.double().isfinite()]


@pytest.mark.parametrize("tile", [64, 4096])
@pytest.mark.parametrize(("source", "target"), CASTS, ids=str)
def test_casts_are_torchs(source: torch.dtype, target: torch.dtype, tile: int, tmp_path: Path) -> None:
    values = torch.cat([torch.tensor(SPECIAL, dtype=torch.float64).to(source), some_of(source, 2000)])
    values = without_overflow(values, target)
    described = stored(tmp_path, {"t": values})["t"]
    layout = Layout((torch_file("f.pt", [whole(described, DTYPES[target])]),))
    carry_out(layout, tmp_path, tmp_path / "out", budget=Budget(2, tile))
    (found,) = torch.load(tmp_path / "out" / "f.pt", weights_only=True)
    assert same_but_for_nans(found, values.to(target))


@pytest.mark.parametrize("target", FLOATS, ids=str)
@pytest.mark.parametrize("source", FLOATS, ids=str)
def test_every_other_cast_is_right_or_refused_with_nothing_written(
    source: torch.dtype, target: torch.dtype, tmp_path: Path
) -> None:
    values = without_overflow(torch.tensor(SPECIAL, dtype=torch.float64).to(source), target)
    described = stored(tmp_path, {"t": values})["t"]
    layout = Layout((torch_file("f.pt", [whole(described, DTYPES[target])]),))
    try:
        carry_out(layout, tmp_path, tmp_path / "out")
    except CkptToolError as error:
        assert (source, target) not in CASTS
        assert source is not target
        assert str(described.dtype) in str(error)  # noqa: PT017
        assert tree(tmp_path / "out") == {}
        return
    (found,) = torch.load(tmp_path / "out" / "f.pt", weights_only=True)
    assert same_but_for_nans(found.double(), values.to(target).double())


def test_integers_are_not_cast(tmp_path: Path) -> None:
    described = stored(tmp_path, {"t": torch.arange(4)})["t"]
    layout = Layout((torch_file("f.pt", [whole(described, DType.float32)]),))
    with pytest.raises(UsageError, match="int64"):
        carry_out(layout, tmp_path, tmp_path / "out")
    assert tree(tmp_path / "out") == {}


def test_casting_leaves_the_callers_torch_threads_alone(tmp_path: Path) -> None:
    """ckpt_tool is a library, too: a global of torch's is not its to change."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        described = stored(tmp_path, {"t": torch.ones(9)})["t"]
        layout = Layout((torch_file("f.pt", [whole(described, DType.float16)]),))
        carry_out(layout, tmp_path, tmp_path / "out")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ---- failures


class Faulty:
    """Calls through, and fails at the nth call."""

    def __init__(self, at: int, fail: Callable[[], Any]) -> None:
        self._left, self._fail, self._lock = at, fail, threading.Lock()

    def __call__(self) -> bool:
        with self._lock:
            self._left -= 1
            failing = self._left == 0
        if failing:
            self._fail()
        return failing


class FaultyReader(LocalReader):
    def __init__(self, root: Path, fault: Faulty) -> None:
        super().__init__(root)
        self._fault = fault

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        self._fault()
        super().read_into(path, offset, buffer)


class FaultyWriter(LocalWriter):
    def __init__(self, root: Path, fault: Faulty) -> None:
        super().__init__(root, fsync=False)
        self._fault = fault

    def write(self, path: str, offset: int, data: memoryview | bytes) -> None:
        self._fault()
        super().write(path, offset, data)


def several_files(directory: Path) -> tuple[Layout, dict[str, torch.Tensor]]:
    values = {f"t{n}": some_of(torch.float32, 3000, n) for n in range(6)}
    described = stored(directory, values)
    files = tuple(torch_file(f"{name}.pt", {name: t}) for name, t in described.items())
    return Layout(files), values


def raising(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def only_whole_files(out: Path, layout: Layout, values: dict[str, torch.Tensor], told: list[str]) -> None:
    """What is left are complete files, and exactly those ``on_file`` was told of."""
    left = sorted(path.name for path in out.iterdir()) if out.exists() else []
    assert left == sorted(told)
    for name in left:
        found = torch.load(out / name, weights_only=True)
        assert {key: raw(t) for key, t in found.items()} == {
            name.removesuffix(".pt"): raw(values[name.removesuffix(".pt")])
        }


def run_faulty(
    tmp_path: Path,
    *,
    reader: LocalReader | None = None,
    writer: LocalWriter | None = None,
    workers: int = 3,
    on_file: Callable[[WrittenFile], None] | None = None,
) -> tuple[BaseException, list[str], Layout, dict[str, torch.Tensor]]:
    layout, values = several_files(tmp_path)
    told: list[str] = []

    def note(file: WrittenFile) -> None:
        if on_file:
            on_file(file)
        told.append(file.path)

    before = threading.active_count()
    writing = writer or LocalWriter(tmp_path / "out", fsync=False)
    late: list[str] = []
    real = writing.write

    def write(path: str, offset: int, data: memoryview | bytes) -> None:
        real(path, offset, data)
        if returned.is_set():
            late.append(path)

    returned = threading.Event()
    writing.write = write  # type: ignore[method-assign]
    with pytest.raises(BaseException) as raised:  # noqa: PT011
        execute(
            make_plan(layout, nothing_stored()),
            reader or LocalReader(tmp_path),
            writing,
            Budget(workers, 1024),
            meter=Silent(),
            skip=lambda file: False,
            on_file=note,
        )
    returned.set()
    for _ in range(200):  # a thread that is done takes a moment to be gone
        if threading.active_count() == before:
            break
        time.sleep(0.01)
    assert threading.active_count() == before, "a thread is left running"
    assert late == [], "a worker went on writing after the run had ended"
    return raised.value, told, layout, values


WRITES = [1, 2, 5, 20, 60]


@pytest.mark.parametrize("at", WRITES)
def test_a_failing_write_leaves_only_whole_files(at: int, tmp_path: Path) -> None:
    fault = Faulty(at, raising(ExecutionError("no space")))
    error, told, layout, values = run_faulty(tmp_path, writer=FaultyWriter(tmp_path / "out", fault))
    assert type(error) is ExecutionError
    only_whole_files(tmp_path / "out", layout, values, told)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["pwrite", "ftruncate", "fsync", "open"])
def test_a_failing_system_call_is_an_execution_error_that_names_the_file(
    call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, values = several_files(tmp_path)
    real = getattr(os, call)
    left = [4 if call == "pwrite" else 2]

    def failing(*args: Any, **kwargs: Any) -> Any:
        if call == "open" and not str(args[0]).startswith(str(tmp_path / "out")):
            return real(*args, **kwargs)
        left[0] -= 1
        if left[0] == 0:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(ExecutionError, match=r"out/t\d\.pt") as raised:
        carry_out(layout, tmp_path, tmp_path / "out", fsync=True)
    monkeypatch.undo()
    if code != errno.EIO:
        assert "full" in str(raised.value)
    for path in (tmp_path / "out").iterdir():
        if call != "fsync":  # a file whose fsync failed may be there, but nobody was told of it
            only_whole_files(
                tmp_path / "out", layout, values, [p.name for p in (tmp_path / "out").iterdir()]
            )
        assert path.name.endswith(".pt")


def test_a_short_write_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, values = several_files(tmp_path)
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, bytes(data)[:7], offset))
    carry_out(layout, tmp_path, tmp_path / "out")
    monkeypatch.undo()
    only_whole_files(tmp_path / "out", layout, values, [f"{name}.pt" for name in values])


def test_a_short_read_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, values = several_files(tmp_path)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: real(fd, [views[0][:7]], offset))
    carry_out(layout, tmp_path, tmp_path / "out")
    monkeypatch.undo()
    only_whole_files(tmp_path / "out", layout, values, [f"{name}.pt" for name in values])


@pytest.mark.parametrize("at", [1, 7, 40])
def test_a_failing_read_leaves_only_whole_files(at: int, tmp_path: Path) -> None:
    fault = Faulty(at, raising(ExecutionError("reading failed")))
    error, told, layout, values = run_faulty(tmp_path, reader=FaultyReader(tmp_path, fault))
    assert type(error) is ExecutionError
    only_whole_files(tmp_path / "out", layout, values, told)


def test_a_read_error_is_an_execution_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, _ = several_files(tmp_path)

    def failing(*args: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(ExecutionError, match=r"source\.bin"):
        carry_out(layout, tmp_path, tmp_path / "out")


def test_a_file_that_shrinks_while_it_is_read_is_unreadable(tmp_path: Path) -> None:
    """Every extent after the shrink reads beyond the end."""
    fault = Faulty(5, lambda: os.truncate(tmp_path / "source.bin", 100))
    error, told, layout, values = run_faulty(tmp_path, reader=FaultyReader(tmp_path, fault))
    assert type(error) is UnreadableError
    assert "source.bin" in str(error)
    only_whole_files(tmp_path / "out", layout, values, told)


def test_a_file_that_vanishes_is_unreadable(tmp_path: Path) -> None:
    layout, _ = several_files(tmp_path)
    plan = make_plan(layout, nothing_stored())
    (tmp_path / "source.bin").unlink()
    with pytest.raises(UnreadableError, match=r"source\.bin"):
        execute(
            plan,
            LocalReader(tmp_path),
            LocalWriter(tmp_path / "out", fsync=False),
            Budget(2, 1024),
            meter=Silent(),
            skip=lambda file: False,
            on_file=lambda file: None,
        )
    assert tree(tmp_path / "out") == {}


def test_a_failing_journal_stops_the_run(tmp_path: Path) -> None:
    fault = Faulty(3, raising(ExecutionError("journal")))
    error, _, _, _ = run_faulty(tmp_path, on_file=lambda file: fault() and None)
    assert type(error) is ExecutionError


@pytest.mark.parametrize("workers", [1, 3])
def test_an_interrupt_leaves_only_whole_files_and_no_thread(workers: int, tmp_path: Path) -> None:
    """Ctrl-C reaches the thread that waits. (Thread.join of Python 3.10 to 3.12 then takes the thread it
    waited for to have ended, bpo-45274: who trusts it goes on while a worker still writes.)"""

    def interrupt() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.5)

    fault = Faulty(20, interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        error, told, layout, values = run_faulty(
            tmp_path, writer=FaultyWriter(tmp_path / "out", fault), workers=workers
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert type(error) is KeyboardInterrupt
    only_whole_files(tmp_path / "out", layout, values, told)
    assert len(told) < 6


def test_a_failing_cast_stops_the_run_cleanly(tmp_path: Path) -> None:
    described = stored(tmp_path, {"t": torch.arange(4)})["t"]
    layout = Layout((torch_file("f.pt", [whole(described, DType.float32)]),))
    with pytest.raises(CkptToolError):
        carry_out(layout, tmp_path, tmp_path / "out")
    assert tree(tmp_path / "out") == {}


# ---- threads


class Met(LocalWriter):
    """The first write of each of two threads waits for the other's."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, fsync=False)
        self.meeting = threading.Barrier(2)
        self.first: dict[int, str] = {}

    def write(self, path: str, offset: int, data: memoryview | bytes) -> None:
        if threading.get_ident() not in self.first:
            self.first[threading.get_ident()] = path
            self.meeting.wait(20)
        super().write(path, offset, data)


@pytest.mark.parametrize("files", [1, 2])
def test_workers_write_files_of_their_own_and_then_help_each_other(files: int, tmp_path: Path) -> None:
    """Two that write one file wait for each other inside the kernel."""
    numel = 2 * EXTENT_BYTES
    with (tmp_path / "source").open("wb") as source:
        source.truncate(numel)
    tensors = [
        Tensor(str(number), "weight", (numel,), DType.uint8, (Region(0, numel, "source", 0),))
        for number in range(files)
    ]
    layout = Layout(tuple(torch_file(f"{t.name}.pt", {"t": t}) for t in tensors))
    sink = Met(tmp_path / "out")
    with contextlib.closing(LocalReader(tmp_path)) as reader:
        execute(
            make_plan(layout, nothing_stored()),
            reader,
            sink,
            Budget(2, 1 << 20),
            meter=Silent(),
            skip=lambda file: False,
            on_file=lambda file: None,
        )
    assert len(sink.first) == 2
    assert set(sink.first.values()) == {f"{number}.pt" for number in range(files)}


def test_all_items_are_done_once() -> None:
    done: list[int] = []
    lock = threading.Lock()

    def one(worker: list[int], item: int) -> None:
        with lock:
            done.append(item)

    in_parallel(iter(range(1, 500)), lambda: [], one, 5)
    assert sorted(done) == list(range(1, 500))


def test_the_first_failure_is_raised_and_no_thread_is_left() -> None:
    before = threading.active_count()

    def one(worker: None, item: int) -> None:
        if item == 7:
            raise ValueError("seven")

    with pytest.raises(ValueError, match="seven"):
        in_parallel(iter(range(1, 500)), lambda: None, one, 4)
    assert threading.active_count() == before


def test_a_failure_to_make_a_worker_is_raised() -> None:
    def make() -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        in_parallel(iter([1, 2, 3]), make, lambda worker, item: None, 2)


def test_a_failure_of_the_items_is_raised() -> None:
    def items() -> Any:
        yield 1
        raise UnreadableError("gone")

    with pytest.raises(UnreadableError, match="gone"):
        in_parallel(items(), lambda: None, lambda worker, item: None, 3)


def test_falsy_items_are_items() -> None:
    done: list[Any] = []
    in_parallel(iter([0, "", (), False]), lambda: None, lambda worker, item: done.append(item), 1)
    assert done == [0, "", (), False]


def test_an_interrupt_that_a_lock_of_the_library_turns_into_an_error_is_an_interrupt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As threading.Condition.wait ends that is interrupted while it takes its lock again."""
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        try:
            raise KeyboardInterrupt
        finally:
            threading.Lock().release()  # "release unlocked lock"

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        in_parallel(iter(range(10**9)), lambda: None, lambda worker, item: None, 2)


@pytest.mark.parametrize("begun", [True, False], ids=["after a thread began", "before a thread began"])
def test_an_interrupt_while_threads_are_started_ends_all(
    monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    start = threading.Thread.start
    workers: list[threading.Thread] = []

    def interrupted(thread: threading.Thread) -> None:
        workers.append(thread)
        if len(workers) < 2 or begun:
            start(thread)
        if len(workers) == 2:
            raise KeyboardInterrupt

    def call() -> None:
        try:
            in_parallel(iter(range(1, 10**9)), lambda: None, lambda worker, item: None, 3)
        except KeyboardInterrupt:
            raised.append(True)

    raised: list[bool] = []
    caller = threading.Thread(target=call, daemon=True)
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    start(caller)
    caller.join(10)
    assert raised == [True]
    monkeypatch.undo()
    for worker in workers:
        if worker.ident is not None:
            worker.join(10)
    assert not any(worker.is_alive() for worker in workers)
