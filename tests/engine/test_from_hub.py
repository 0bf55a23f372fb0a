"""Starting a run from published files: the order of parameters from transformers, and the engine's loss."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import ckpt_tool
from tests.engine.deepspeed_run import Load, RunSpec, run, spec_from_dict

pytestmark = pytest.mark.engine

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "deepspeed"
NAMES = ("mixtral_w4e2", "mixtral_bf16_w2e2", "qwen2_moe_w2e2", "qwen3_moe_w2e2_tied", "deepseek_v2_w2e2")
NAMES = (*NAMES, "deepseek_v3_w2e2", "dense_w3")


def spec_of(name: str) -> RunSpec:
    return spec_from_dict(json.loads((FIXTURES / name / "made_with.json").read_text())["spec"])


def from_hub(name: str, tmp_path: Path, to: str) -> Path:
    """The fixture's model published, and made into a checkpoint to start from."""
    spec, source = spec_of(name), FIXTURES / name
    model, target, ds_config = tmp_path / "model", tmp_path / to, tmp_path / "ds_config.json"
    ckpt_tool.consolidate(source / "checkpoint", model, config=source / "config.json")
    ds_config.write_text(json.dumps(dict(ckpt_tool.open(source / "checkpoint").training.config)))
    if to == "universal":  # for any world size, so it takes none
        ckpt_tool.convert(model, target, to=to, verify=True)
    else:
        ep = spec.ep or None
        ckpt_tool.convert(model, target, to=to, world=spec.world, ep=ep, ds_config=ds_config, verify=True)
    return target


@pytest.mark.parametrize("name", NAMES)
def test_order_from_transformers_is_the_engines_own(name: str, tmp_path: Path) -> None:
    made = ckpt_tool.open(from_hub(name, tmp_path, "zero3"))
    engine = ckpt_tool.open(FIXTURES / name / "checkpoint")
    assert made.module_names == engine.module_names
    assert [g.parameters for g in made.training.param_groups] == [
        g.parameters for g in engine.training.param_groups
    ]
    assert made.aliases == engine.aliases


def test_model_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    """What no file holds would be whatever the run was initialised with."""
    source = FIXTURES / "mixtral_w4e2"
    ckpt_tool.consolidate(source / "checkpoint", tmp_path / "model", config=source / "config.json")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file)
    with pytest.raises(ckpt_tool.CkptToolError, match=r"has no model\.norm\.weight"):
        ckpt_tool.convert(tmp_path / "model", tmp_path / "start", to="zero3", world=2, ep=2)


def test_without_transformers_the_order_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FIXTURES / "mixtral_w4e2"
    ckpt_tool.consolidate(source / "checkpoint", tmp_path / "model", config=source / "config.json")
    (tmp_path / "without" / "transformers").mkdir(parents=True)
    (tmp_path / "without" / "transformers" / "__init__.py").write_text("raise ImportError('not here')")
    monkeypatch.syspath_prepend(tmp_path / "without")
    with pytest.raises(ckpt_tool.CkptToolError, match="Install transformers"):
        ckpt_tool.convert(tmp_path / "model", tmp_path / "start", to="zero3", world=2, ep=2)


def test_groups_of_another_engines_run_are_kept(tmp_path: Path) -> None:
    """Two groups of FSDP2, decayed and not; what DeepSpeed adds are the experts' own."""
    source = FIXTURES.parent / "dcp" / "mixtral_accelerate_w2"
    ds_config = tmp_path / "ds_config.json"
    ds_config.write_text(json.dumps({"optimizer": {"type": "AdamW", "params": {"lr": 5.0}}}))
    ckpt_tool.convert(
        source / "checkpoint", tmp_path / "start", to="zero3", world=2, ep=1, config=source,
        ds_config=ds_config, verify=True,
    )  # fmt: skip
    assert ckpt_tool.verify(source / "checkpoint", tmp_path / "start", config=source).passed
    groups = ckpt_tool.open(tmp_path / "start").training.param_groups
    assert [(g.options["weight_decay"], g.options["lr"], bool(g.options.get("moe"))) for g in groups] == [
        (0.1, 0.01, False),
        (0.0, 0.01, False),
        (0.1, 0.01, True),
    ]


@pytest.mark.parametrize(
    ("name", "to"),
    [("mixtral_w4e2", "zero3"), ("deepseek_v3_w2e2", "zero3"), ("qwen2_moe_w2e2", "universal")],
)
def test_engine_starts_from_published_weights(name: str, to: str, tmp_path: Path) -> None:
    """Weights only: the first loss is that of the run they came from, whatever the model's own seed."""
    target = from_hub(name, tmp_path, to)
    load = Load(str(target), universal=to == "universal", module_only=True, optimizer_states=False)
    seed = spec_of(name).model_seed if to == "universal" else 99
    spec = dataclasses.replace(
        spec_of(name), load=load, start_step=2, steps=1, model_seed=seed,
        save=None, gather_oracle=None, gather_logits=None, result=None,
    )  # fmt: skip
    expected = json.loads((FIXTURES / name / "oracle" / "oracle.json").read_text())["losses_after"][0]
    assert run(spec).losses == [expected]
