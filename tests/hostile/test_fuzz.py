"""A few thousand changed inputs for every parser, the same each time; more of them by hand (``fuzz``)."""

from __future__ import annotations

import pytest

from tests.faults.forked import forked
from tests.hostile.fuzz import PARSERS, fuzz

pytestmark = pytest.mark.slow

INPUTS = 2000


@pytest.mark.parametrize("name", PARSERS)
def test_changed_inputs_are_read_or_refused_and_cost_nothing(name: str) -> None:
    def call() -> int:
        read, refused = fuzz(name, INPUTS, seed=0)
        print(read, refused)
        return 0

    done = forked(call)
    assert done.rc == 0, done.stderr[-3000:]
    read, refused = map(int, done.stdout.split())
    assert read + refused == INPUTS
    # A journal that makes no sense is no error: nothing that was staged is relied upon.
    assert refused > INPUTS // 10 or name == "journal"
