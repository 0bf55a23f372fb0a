"""Reading small things: whole or not at all; many in their order, and at once where they are waited for."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckpt_tool.errors import ExecutionError, UnreadableError
from ckpt_tool.storage import LocalReader, read_each


@pytest.mark.parametrize("wait", [0.0, 0.005])
@pytest.mark.parametrize("count", [0, 1, 2, 150])
def test_results_come_in_the_order_of_the_items(count: int, wait: float) -> None:
    def one(item: int) -> int:
        time.sleep(wait * (item % 3))
        return -item

    assert read_each(one, iter(range(count))) == [-item for item in range(count)]


def test_what_is_waited_for_is_read_at_once() -> None:
    """As on network storage. Two that meet cannot have been read one after the other."""
    meeting = threading.Barrier(2)

    def one(item: int) -> int:
        if item:
            meeting.wait(20)
        else:
            time.sleep(0.05)
        return item

    assert read_each(one, range(9)) == list(range(9))


@pytest.mark.parametrize("wait", [0.0, 0.005])
def test_the_first_failure_is_raised(wait: float) -> None:
    def one(item: int) -> int:
        time.sleep(wait)
        if item == 40:
            raise UnreadableError("forty")
        return item

    with pytest.raises(UnreadableError, match="forty"):
        read_each(one, range(100))


# ---- one small read


def reads(monkeypatch: pytest.MonkeyPatch, most: int, fails_at: int | None) -> list[int]:
    """What the system gives at once, ``most`` bytes, and the call that fails; the calls so far."""
    calls: list[int] = []

    def limited(original: Callable[..., Any], cut: Callable[[Any], Any]) -> Callable[..., Any]:
        def call(descriptor: int, wanted: Any, offset: int) -> Any:
            calls.append(offset)
            if len(calls) - 1 == fails_at:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return original(descriptor, cut(wanted), offset)

        return call

    monkeypatch.setattr(os, "pread", limited(os.pread, lambda length: min(length, most)))
    monkeypatch.setattr(os, "preadv", limited(os.preadv, lambda buffers: [buffers[0][:most]]))
    return calls


@pytest.mark.parametrize("most", [1, 3, 100])
def test_storage_that_gives_less_at_once(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    calls = reads(monkeypatch, most, None)
    reader = LocalReader(tmp_path)
    assert reader.read("a", 2, 7) == b"2345678"
    assert calls == list(range(2, 9, most))
    with pytest.raises(UnreadableError, match="the file ends at 10"):
        reader.read("a", 5, 6)


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_a_read_that_fails_is_not_tried_again(
    fails_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a disk gives the second time, it may not give the third; and the user has to know of it."""
    (tmp_path / "a").write_bytes(b"0123456789")
    calls = reads(monkeypatch, 3, fails_at)
    with pytest.raises(ExecutionError, match=r"a cannot be read: Input/output error"):
        LocalReader(tmp_path).read("a", 0, 10)
    assert len(calls) == fails_at + 1
