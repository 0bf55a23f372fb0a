"""Reading many small things: in order, and at once where they are waited for."""

from __future__ import annotations

import threading
import time

import pytest

from ckpt_tool.errors import UnreadableError
from ckpt_tool.storage import read_each


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
