"""The harness itself: what it trains, saves and gathers can be used as an oracle."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.engine.deepspeed_run import STATES, Load, RunSpec, Save, run

SPEC = RunSpec(family="mixtral", world=2, ep=2, hidden=19, intermediate=11, param_groups="decay")


@pytest.mark.engine
def test_resumed_run_has_the_losses_of_the_uninterrupted_one(tmp_path: Path) -> None:
    """The resumed model starts from other random weights: all it knows comes from the files."""
    whole = run(dataclasses.replace(SPEC, steps=4))
    save = Save(str(tmp_path / "checkpoint"), client_state={"note": "hello"})
    first = run(dataclasses.replace(SPEC, steps=2, save=save))
    second = run(
        dataclasses.replace(
            SPEC, steps=2, start_step=2, model_seed=99, load=Load(str(tmp_path / "checkpoint"))
        )
    )
    assert first.losses + second.losses == whole.losses
    assert second.client_state["note"] == "hello"
    assert (second.global_step, second.adam_steps) == (4, whole.adam_steps)


@pytest.mark.engine
def test_oracle_does_not_depend_on_the_topology(tmp_path: Path) -> None:
    """Masters and moments gathered at two topologies agree but for the order of summation."""
    from safetensors.torch import load_file

    folders = {"w2e2": tmp_path / "w2e2", "w2e1": tmp_path / "w2e1"}
    two = run(dataclasses.replace(SPEC, gather_oracle=str(folders["w2e2"])))
    one = run(dataclasses.replace(SPEC, ep=1, gather_oracle=str(folders["w2e1"])))
    assert two.losses == one.losses
    for state in STATES:
        left = load_file(folders["w2e2"] / f"{state}.safetensors")
        right = load_file(folders["w2e1"] / f"{state}.safetensors")
        assert left.keys() == right.keys()
        assert left["model.layers.1.mlp.experts.w2"].shape == (4, 19, 11)
        for name in left:
            assert left[name].allclose(right[name], rtol=1e-3, atol=1e-5), name
