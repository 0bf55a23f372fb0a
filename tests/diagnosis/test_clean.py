"""A sound checkpoint has no findings, whatever its format."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt_tool import api
from ckpt_tool.errors import CkptToolError
from tests.diagnosis.tools import fixtures, source_of

pytestmark = pytest.mark.slow

FAST = api.Execution(fsync=False, workers=2)
TARGETS = ("universal", "dcp", "hf", "zero1", "zero2", "zero3")


def _kinds(source: Path, **options: Path) -> list[tuple[str, str]]:
    diagnosis = api.doctor(source, how=FAST, **options)
    assert diagnosis.tensors
    assert diagnosis.healthy
    return [(finding.check, finding.message) for finding in diagnosis.findings]


def _config(fixture: Path) -> dict[str, Path]:
    config = fixture / "config.json"
    return {"config": config} if config.exists() else {}


@pytest.mark.parametrize("fixture", fixtures(), ids=lambda fixture: fixture.name)
def test_fixtures(fixture: Path) -> None:
    assert _kinds(source_of(fixture)) == []
    assert _kinds(source_of(fixture), **_config(fixture)) == []


# frozen parameters and buffers; two groups and a scheduler; another engine, whose names ZeRO does not take
@pytest.mark.parametrize(
    ("name", "to"),
    [(name, to) for name in ("deepseek_v3_z2_w2e1", "mixtral_odd_w4e2") for to in TARGETS]
    + [("mixtral_accelerate_w2", to) for to in ("universal", "dcp", "hf")],
)
def test_results_of_conversions(name: str, to: str, tmp_path: Path) -> None:
    fixture = next(fixture for fixture in fixtures() if fixture.name == name)
    config = _config(fixture)
    api.convert(source_of(fixture), tmp_path / "result", to=to, how=FAST, **config)
    assert _kinds(tmp_path / "result", **config) == []


@pytest.mark.scale
@pytest.mark.parametrize("fixture", fixtures(), ids=lambda fixture: fixture.name)
def test_every_fixture_in_every_format(fixture: Path, tmp_path: Path) -> None:
    """But for the targets that a fixture does not say enough for."""
    config = _config(fixture)
    written = []
    for to in TARGETS:
        try:
            api.convert(source_of(fixture), tmp_path / to, to=to, how=FAST, **config)
        except CkptToolError:
            continue
        written.append(to)
        assert _kinds(tmp_path / to, **config) == [], to
    assert len(written) >= (3 if config else 1)
