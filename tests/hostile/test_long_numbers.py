"""Numbers in names with more digits than Python turns into an integer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ckpt_tool
from ckpt_tool.errors import CkptToolError

DIGITS = "1" * 4301
NAMES = (
    f"model.layers.{DIGITS}.input_layernorm.weight",
    f"model.layers.{DIGITS}.block_sparse_moe.experts.0.w1.weight",
)


@pytest.mark.parametrize("name", NAMES, ids=["dense", "expert"])
@pytest.mark.parametrize(
    "act", [ckpt_tool.open, ckpt_tool.verify, ckpt_tool.doctor], ids=["open", "verify", "doctor"]
)
def test_a_layer_of_4301_digits(act: object, name: str, tmp_path: Path) -> None:
    save_file({name: torch.ones(2, 2), "model.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral", "num_hidden_layers": 1}))
    with pytest.raises(CkptToolError, match=r"digits|malformed"):
        act(tmp_path)  # type: ignore[operator]
