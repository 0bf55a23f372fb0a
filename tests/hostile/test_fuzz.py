"""A few thousand changed inputs for every parser, the same each time; more of them by hand (``fuzz``)."""

from __future__ import annotations

import pytest

from tests.faults.forked import forked
from tests.hostile.fuzz import PARSERS, fuzz

pytestmark = pytest.mark.slow

INPUTS = 2000
# A whole directory of pickles is read for each input: half as many, for the time that CI has.
DIRECTORIES = {
    "zero3 model",
    "zero3 optimizer",
    "zero2",
    "zero0",
    "universal",
    "dcp metadata",
    "dcp archives",
}


@pytest.mark.parametrize("name", PARSERS)
def test_changed_inputs_are_read_or_refused_and_cost_nothing(name: str) -> None:
    inputs = INPUTS // 2 if name in DIRECTORIES else INPUTS

    def call() -> int:
        read, refused = fuzz(name, inputs, seed=0)
        print(read, refused)
        return 0

    done = forked(call)
    assert done.rc == 0, done.stderr[-3000:]
    read, refused = map(int, done.stdout.split())
    assert read + refused == inputs
    # A journal that makes no sense is no error: nothing that was staged is relied upon.
    assert refused > inputs // 10 or name == "journal"
