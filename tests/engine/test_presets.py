"""Every AutoEP preset: the engine's checkpoint published, and back into the engine at another topology."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import ckpt_tool
from tests.engine.deepspeed_run import Load, RunResult, RunSpec, Save, build_config, ds_config, run_each
from tests.engine.deepspeed_tools import same_bits

pytestmark = pytest.mark.engine

PRESETS = ("mixtral", "qwen3_moe", "qwen2_moe", "qwen3_5_moe", "deepseek_v2", "deepseek_v3", "minimax_m3")
SAVED, RESUMED = (2, 2), (4, 4)  # world size and EP size
SPECS = {
    name: RunSpec(
        family=name, world=SAVED[0], ep=SAVED[1], hidden=24, intermediate=13, correction_bias_std=0.1
    )
    for name in PRESETS
}


def succeeded(outcomes: list[RunResult | RuntimeError]) -> list[RunResult]:
    for outcome in outcomes:
        if isinstance(outcome, RuntimeError):
            raise outcome
    return outcomes  # type: ignore[return-value]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of each preset, the model published, and a checkpoint to start from made of that."""
    root = tmp_path_factory.mktemp("presets")
    runs = [
        dataclasses.replace(
            spec,
            save=Save(str(root / name / "checkpoint")),
            gather_oracle=str(root / name / "oracle"),
            gather_logits=str(root / name / "logits.safetensors"),
        )
        for name, spec in SPECS.items()
    ]
    succeeded(run_each(runs, timeout=600))
    world, ep = RESUMED
    for name, spec in SPECS.items():
        home = root / name
        build_config(spec).save_pretrained(home)
        ckpt_tool.consolidate(home / "checkpoint", home / "hub", config=home, verify=True)
        config = home / "ds_config.json"
        config.write_text(json.dumps(ds_config(dataclasses.replace(spec, world=world, ep=ep))))
        ckpt_tool.convert(
            home / "hub", home / "start", to="zero3", world=world, ep=ep, ds_config=config, verify=True
        )
    return root


@pytest.fixture(scope="module")
def resumed(root: Path) -> dict[str, RunResult]:
    """The engine at another topology with those weights, before any step."""
    runs = [
        dataclasses.replace(
            spec,
            world=RESUMED[0],
            ep=RESUMED[1],
            model_seed=99,
            correction_bias_std=0.0,
            steps=0,
            load=Load(str(root / name / "start"), module_only=True, optimizer_states=False),
            gather_oracle=str(root / name / "resumed"),
            gather_logits=str(root / name / "resumed_logits.safetensors"),
        )
        for name, spec in SPECS.items()
    ]
    return dict(zip(SPECS, succeeded(run_each(runs, timeout=600)), strict=True))


def held(folder: Path) -> dict[str, Any]:
    """All values of the model as the engine gathered them."""
    files = [folder / f"{kind}.safetensors" for kind in ("fp32", "frozen", "buffers")]
    return {name: tensor for path in files if path.is_file() for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("name", PRESETS)
def test_order_and_second_names_are_the_engines_own(name: str, root: Path) -> None:
    engine, made = (ckpt_tool.open(root / name / part) for part in ("checkpoint", "start"))
    assert made.module_names == engine.module_names
    assert made.aliases == engine.aliases
    groups = [
        [group.parameters for group in checkpoint.training.param_groups] for checkpoint in (engine, made)
    ]
    assert groups[0] == groups[1]


@pytest.mark.usefixtures("resumed")
@pytest.mark.parametrize("name", PRESETS)
def test_the_engine_at_another_topology_holds_the_published_values(name: str, root: Path) -> None:
    before, after = held(root / name / "oracle"), held(root / name / "resumed")
    assert after.keys() == before.keys()
    assert [key for key in before if not same_bits(before[key], after[key])] == []


@pytest.mark.usefixtures("resumed")
@pytest.mark.parametrize("name", PRESETS)
def test_logits_of_published_model_and_of_both_engines_agree(name: str, root: Path) -> None:
    """The engines' kernels round otherwise than transformers', and at EP 4 otherwise than at EP 2."""
    import torch
    from transformers import AutoModelForCausalLM

    saved = load_file(root / name / "logits.safetensors")
    model, info = AutoModelForCausalLM.from_pretrained(
        root / name / "hub",
        output_loading_info=True,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    assert {key: value for key, value in info.items() if value} == {}
    with torch.no_grad():
        published = model.eval()(input_ids=saved["input_ids"]).logits
    resumed = load_file(root / name / "resumed_logits.safetensors")
    assert torch.equal(saved["input_ids"], resumed["input_ids"])
    scale = float(saved["logits"].abs().max())
    for found in (published, resumed["logits"]):
        assert float((found - saved["logits"]).abs().max()) < 1e-5 * scale
