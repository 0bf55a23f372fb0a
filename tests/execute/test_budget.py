"""The memory budget: what is admitted, and what is refused with the least that would do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tool import api
from ckpt_tool.errors import UsageError
from ckpt_tool.execute.budget import KIB, MIB, Budget
from tests.conftest import checkpoint_of


@given(st.integers(128 * KIB, 1 << 40), st.integers(1, 200), st.integers(0, 1 << 40))
def test_buffers_never_exceed_the_limit(limit: int, workers: int, block: int) -> None:
    budget = Budget.share(limit, workers)
    assert budget.nbytes() <= budget.nbytes(block) <= limit
    assert budget.tile_for(block) % 64 == 0
    assert 1 <= budget.workers <= workers
    assert budget.tile % 64 == 0
    assert budget.tile >= 64 * KIB


@given(st.integers(0, 128 * KIB - 1), st.integers(1, 8))
def test_too_little_is_refused_with_the_least_that_works(limit: int, workers: int) -> None:
    with pytest.raises(UsageError) as raised:
        Budget.share(limit, workers)
    least = int(re.findall(r"(\d+) bytes \(", str(raised.value))[0])
    assert Budget.share(least, workers).workers == 1
    with pytest.raises(UsageError):
        Budget.share(least - 1, workers)


def test_less_memory_means_fewer_workers_before_smaller_tiles() -> None:
    assert Budget.share(256 * KIB, 8) == Budget(2, 64 * KIB, 64 * KIB)
    assert Budget.share(1024 * MIB, 8).workers == 8


def test_a_conversion_states_the_memory_of_its_buffers(tmp_path: Path) -> None:
    how = api.Execution(max_memory=300 * KIB, workers=2)
    result = api.convert(
        checkpoint_of("mixtral_w2e1"), tmp_path / "out", to="universal", dry_run=True, how=how
    )
    assert 0 < result.peak_memory_bytes <= 300 * KIB


def test_a_conversion_with_too_little_memory_writes_nothing(tmp_path: Path) -> None:
    how = api.Execution(max_memory=1000)
    with pytest.raises(UsageError, match="131072"):
        api.convert(checkpoint_of("mixtral_w2e1"), tmp_path / "out", to="universal", how=how)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [128 * KIB, 1 * MIB])
def test_the_buffers_made_are_within_the_limit(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts every bytearray the executor makes."""
    import builtins

    from ckpt_tool.execute import writing

    made = 0

    def counted(size: object = 0) -> bytearray:
        nonlocal made
        made += size if isinstance(size, int) else 0
        return builtins.bytearray(size)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(writing, "bytearray", counted, raising=False)
    how = api.Execution(max_memory=limit, workers=4, fsync=False)
    api.convert(checkpoint_of("mixtral_w4e2"), tmp_path / "out", to="universal", how=how)
    assert 0 < made <= limit
