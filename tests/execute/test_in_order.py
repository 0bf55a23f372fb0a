"""Files written front to back have the bytes that they have when they are written at any position."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from ckpt_tool import api
from ckpt_tool.containers.distcp import concatenated
from ckpt_tool.containers.torch_zip import torch_file
from ckpt_tool.errors import ExecutionError
from ckpt_tool.execute.budget import Budget
from ckpt_tool.execute.in_order import write_file
from ckpt_tool.execute.local import execute
from ckpt_tool.execute.meter import Silent
from ckpt_tool.layout import Layout, TargetFile, text_file, whole
from ckpt_tool.plan import make_plan
from ckpt_tool.storage import LocalReader, LocalWriter, Order, Patch
from ckpt_tool.written import WrittenFile
from tests.conftest import nothing_stored, stored, tree

IN_ORDER = (Order.PATCHED, Order.FRONT_TO_BACK)


class InOrder:
    """A writer that keeps files in memory, and takes nothing but what its order allows."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.files: dict[str, bytes] = {}
        self.patched = 0
        self._open: dict[str, tuple[int, bytearray]] = {}
        self._lock = threading.Lock()

    def create(self, path: str, size: int) -> None:
        with self._lock:
            assert path not in self._open
            self._open[path] = (size, bytearray())

    def join(self, path: str) -> None:
        raise AssertionError("a file in order has one writer")

    def write(self, path: str, offset: int, data: memoryview | bytes) -> None:
        _, held = self._open[path]
        assert offset == len(held)
        held += data

    def finish(self, path: str, patches: Sequence[Patch] = ()) -> None:
        assert self.order is Order.PATCHED or not patches
        size, held = self._open.pop(path)
        for offset, data in patches:
            assert offset + len(data) <= size
            held[offset : offset + len(data)] = data
            self.patched += len(data)
        assert len(held) == size
        self.files[path] = bytes(held)

    def close(self) -> None:
        self._open.clear()


def layout_of(tmp_path: Path) -> Layout:
    """Archives, several in one file, with empty tensors, and a file of one literal."""
    tensors = {
        f"t{n}": torch.rand(1000 * n + 7, generator=torch.Generator().manual_seed(n)) for n in range(9)
    }
    found = stored(tmp_path, {**tensors, "none": torch.empty(0, 3)})
    parts = [whole(tensor) for tensor in found.values()]
    files: list[TargetFile] = [torch_file(f"{n}.pt", parts[n : n + 4]) for n in range(0, 8, 4)]
    files.append(concatenated("__0_0.distcp", [torch_file("", part) for part in parts[8:]])[0])
    return Layout((*files, torch_file("empty.pt", {}), text_file("latest", "step"), text_file("none", "")))


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("order", IN_ORDER)
def test_a_file_in_order_has_the_same_bytes(order: Order, workers: int, tmp_path: Path) -> None:
    plan = make_plan(layout_of(tmp_path), nothing_stored())
    records: dict[str, list[WrittenFile]] = {"any": [], "in order": []}
    here, there = LocalWriter(tmp_path / "out", fsync=False), InOrder(order)
    for sink, written in zip((here, there), records.values(), strict=True):
        execute(
            plan,
            LocalReader(tmp_path),
            sink,
            Budget(workers, 4096),
            meter=Silent(),
            skip=lambda _: False,
            on_file=written.append,
        )
    assert there.files == tree(tmp_path / "out")
    assert sorted(records["in order"]) == sorted(records["any"])
    assert (there.patched > 0) is (order is Order.PATCHED)


class Changing(LocalReader):
    """Every second read of a place gives other bytes."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.seen: set[tuple[str, int]] = set()

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        super().read_into(path, offset, buffer)
        if (path, offset) in self.seen:
            buffer[0] ^= 1
        self.seen.add((path, offset))


def test_a_source_that_changes_between_its_two_readings_is_refused(tmp_path: Path) -> None:
    (tensor,) = stored(tmp_path, {"t": torch.rand(5000)}).values()
    sink = InOrder(Order.FRONT_TO_BACK)
    with pytest.raises(ExecutionError, match=r"t \[weight\] in .* was read twice, and was not the same"):
        write_file(torch_file("t.pt", tensor), Changing(tmp_path), sink, Budget(1, 4096), Silent())
    assert sink.files == {}


@pytest.mark.parametrize("order", IN_ORDER)
def test_a_file_in_order_is_written_by_one_worker_that_stops_with_the_others(
    order: Order, tmp_path: Path
) -> None:
    class Failing(InOrder):
        def finish(self, path: str, patches: Sequence[Patch] = ()) -> None:
            super().finish(path, patches)
            if len(self.files) == 2:
                raise ExecutionError("full")

    sink = Failing(order)
    with pytest.raises(ExecutionError, match="full"):
        execute(
            make_plan(layout_of(tmp_path), nothing_stored()),
            LocalReader(tmp_path),
            sink,
            Budget(2, 4096),
            meter=Silent(),
            skip=lambda _: False,
            on_file=lambda _: None,
        )
    assert len(sink.files) in (2, 3)
    assert api.Execution().executor is execute
