"""A config.json beside a DCP checkpoint tells of its experts, and changes nothing in a reshard."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt_tool.api
from ckpt_tool.canonical import ExpertName
from ckpt_tool.errors import MismatchError

from .dcp_tools import CHECKPOINTS, FIXTURES, read
from .test_dcp_keys import assert_same, load, optimizer, save

CONFIG = {"model_type": "qwen3_moe", "num_experts": 3, "num_hidden_layers": 1}


@pytest.mark.parametrize("name", ["mixtral_accelerate_w2", "qwen3_moe_transformers_w2e2"])
def test_a_config_beside_changes_no_key_path_or_value(name: str, tmp_path: Path) -> None:
    source = Path(shutil.copytree(CHECKPOINTS[name], tmp_path / "c"))
    shutil.copy(FIXTURES / name / "config.json", source)
    done = ckpt_tool.api.reshard(source, tmp_path / "out", world=4, verify=True)
    assert done.verdict is not None
    assert done.verdict.passed
    for metadata in source.rglob(".metadata"):
        at = metadata.parent.relative_to(source)
        assert_same(load(tmp_path / "out" / at), load(source / at))


def test_dense_tensors_keep_their_names_beside_a_config(tmp_path: Path) -> None:
    source = Path(shutil.copytree(CHECKPOINTS["mixtral_accelerate_w2"], tmp_path / "c"))
    plain = {tensor.name for tensor in read(source)[1].tensors}
    shutil.copy(FIXTURES / "mixtral_accelerate_w2" / "config.json", source)
    dense = {tensor.name for tensor in read(source)[1].tensors if isinstance(tensor.name, str)}
    assert dense == {name for name in plain if ".experts." not in str(name)}


# ---- a tensor per expert


def per_expert() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    sizes = {"gate": (4, 6), "up": (4, 6), "down": (6, 4)}
    found = {
        f"model.layers.0.mlp.experts.{e}.{projection}_proj.weight": torch.randn(size)
        for e in range(3)
        for projection, size in sizes.items()
    }
    return found | {
        "model.layers.0.mlp.gate.weight": torch.randn(3, 6),
        "model.norm.weight": torch.randn(6),
    }


def saved(path: Path, states: dict[str, Any]) -> Path:
    save({"model": per_expert(), "optimizer": states}, path)
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.mark.usefixtures("partial_models")
def test_a_tensor_per_expert_stays_one_in_a_reshard(tmp_path: Path) -> None:
    source = saved(tmp_path / "c", optimizer(per_expert()))
    assert any(isinstance(tensor.name, ExpertName) for tensor in read(source)[1].tensors)
    ckpt_tool.api.reshard(source, tmp_path / "out", world=2, verify=True)
    found, wanted = load(tmp_path / "out"), load(source)
    assert_same(found["model"], wanted["model"])
    assert_same(found["optimizer"]["state"], wanted["optimizer"]["state"])


@pytest.mark.parametrize("expert", [0, 1, 2])
@pytest.mark.parametrize("missing", ["all", "step", "group"])
def test_experts_of_a_layer_that_the_optimizer_keeps_otherwise(
    missing: str, expert: int, tmp_path: Path
) -> None:
    states = optimizer(per_expert())
    name = f"model.layers.0.mlp.experts.{expert}.gate_proj.weight"
    if missing == "all":
        del states["state"][name]
    elif missing == "step":
        del states["state"][name]["step"]
    else:
        first = states["param_groups"][0]
        first["params"].remove(name)
        states["param_groups"].append({**first, "lr": 0.5, "params": [name]})
    with pytest.raises(MismatchError, match="differ in their optimizer states"):
        read(saved(tmp_path, states))


def test_experts_in_a_module_that_is_not_called_so(tmp_path: Path) -> None:
    """jetmoe's are input_linear and output_linear of the layer's mlp."""
    state = {
        "model.layers.0.mlp.input_linear.weight": torch.randn(4, 24, 32),
        "model.layers.0.mlp.output_linear.weight": torch.randn(4, 32, 12),
    }
    save({"model": state}, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "jetmoe", "num_local_experts": 4}))
    assert [layer.module for layer in read(tmp_path)[1].moe_layers] == ["model.layers.0.mlp"]
