"""``verify`` finds every flipped bit of a result, and what the engines' own checksums cover of a source."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.bit_flips import OUTPUTS, SOURCES, outcomes, unnoticed


@pytest.mark.parametrize("name", OUTPUTS)
def test_flipped_bits_of_a_result_are_found(name: str, tmp_path: Path) -> None:
    assert unnoticed(name, 12, tmp_path) == []


@pytest.mark.scale
@pytest.mark.parametrize("name", OUTPUTS)
def test_many_flipped_bits_of_a_result_are_found(name: str, tmp_path: Path) -> None:
    assert unnoticed(name, 150, tmp_path, seed=1) == []


@pytest.mark.parametrize("name", SOURCES)
def test_a_flipped_bit_of_an_archives_data_is_found(name: str, tmp_path: Path) -> None:
    """Only files without checksums of their own can lose a bit unseen."""
    unseen = {kind for kind, outcome in outcomes(name, 12, tmp_path) if outcome == "unseen"}
    assert unseen <= {"*.safetensors", ".metadata", "config.json", "latest"}
