"""The traps of Universal checkpoints, made by the real engine and its own converter: doctor names them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import ckpt_tool
from ckpt_tool import api
from tests.engine.deepspeed_run import Load, Save, run
from tests.engine.deepspeed_tools import FIXTURES, ds_to_universal, fixture_spec

pytestmark = pytest.mark.engine

SOURCES = {
    "mixtral_w4e2": [],
    "deepseek_v3_w2e2": [],
    "mixtral_frozen_w2e1": [],
    "mixtral_z2_w4e2": [],
    # groups decay and no_decay: a ZeRO-3 load makes all of them the first
    "mixtral_odd_w4e2": ["universal_groups"],
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("theirs")
    jobs = [
        (FIXTURES / name / "checkpoint" / "global_step2", root / name / "global_step2_universal")
        for name in SOURCES
    ]
    ds_to_universal(jobs)
    return root


@pytest.mark.parametrize("name", SOURCES)
def test_what_ds_to_universal_writes(name: str, theirs: Path) -> None:
    diagnosis = api.doctor(theirs / name / "global_step2_universal")
    assert [finding.check for finding in diagnosis.findings] == SOURCES[name]
    assert diagnosis.format == "deepspeed-universal"


@pytest.mark.parametrize("clone_step", [False, True], ids=["as the engine loads it", "step cloned"])
def test_the_step_after_a_universal_load(clone_step: bool, tmp_path: Path) -> None:
    """Two further steps in ZeRO-3 with two sub-groups: the shared step counts four of them."""
    universal = tmp_path / "universal"
    ckpt_tool.convert(FIXTURES / "mixtral_w4e2" / "checkpoint", universal, to="universal")
    saved = tmp_path / "saved"
    run(
        dataclasses.replace(
            fixture_spec("mixtral_w4e2"),
            world=2,
            ep=2,
            steps=2,
            start_step=2,
            clone_step=clone_step,
            load=Load(str(universal), universal=True),
            save=Save(str(saved)),
        )
    )
    findings = api.doctor(saved).findings
    if clone_step:
        assert findings == ()
    else:
        (found,) = findings
        assert found.check == "step_ahead"
        assert "at step 6, and the run has made 4" in found.message
