"""A model against transformers' own of its config. What it answers is given here, and asked of it in the
tests with the engines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tool import api
from ckpt_tool.errors import MismatchError
from ckpt_tool.families import model_in_memory
from tests.conftest import checkpoint_of, config_of

pytestmark = pytest.mark.slow

HOW = api.Execution(fsync=False, workers=1)
Answer = dict[str, Any]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    api.consolidate(
        checkpoint_of("deepseek_v2_w2e2"), tmp_path / "model", config=config_of("deepseek_v2_w2e2")
    )
    monkeypatch.setattr(model_in_memory, "WORTH", 0)
    return tmp_path / "model"


def answer(tmp_path: Path) -> Answer:
    """What transformers would say of the model's config."""
    fused = tmp_path / "fused"
    api.convert(tmp_path / "model", fused, to="hf", hf_layout="fused", how=HOW)
    names = {name: list(tensor.shape) for name, tensor in load_file(fused / "model.safetensors").items()}
    return {"names": names, "tied": {}, "ignored": [], "class": "DeepseekV2ForCausalLM", "release": "5"}


def told(changed: Callable[[Answer], Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(model_in_memory, "WORTH", 1 << 60)
    found = changed(answer(tmp_path))
    monkeypatch.setattr(model_in_memory, "WORTH", 0)
    monkeypatch.setattr(model_in_memory, "_ask", lambda config: found)
    return api.convert(tmp_path / "model", tmp_path / "out", to="hf", dry_run=True)


def test_a_model_as_transformers_has_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not any("compared" in note for note in told(lambda found: found, tmp_path, monkeypatch).notes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.layers.0.self_attn.sinks": [4]}, r"has no model\.layers\.0\.self_attn\.sinks.*DeepseekV2"),
        ({"model.norm.weight": None}, r"has model\.norm\.weight.*has not"),
        ({"model.norm.weight": [7]}, r"model\.norm\.weight has shape \[\d+\], and .* has \[7\]"),
    ],
    ids=["missing", "extra", "shape"],
)
def test_a_model_that_transformers_has_otherwise(
    change: dict[str, Any], words: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(found: Answer) -> Answer:
        names = {**found["names"], **change}
        return {**found, "names": {name: shape for name, shape in names.items() if shape is not None}}

    with pytest.raises(MismatchError, match=words):
        told(changed, tmp_path, monkeypatch)


def test_a_model_that_transformers_cannot_build(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = told(lambda found: {"error": "ValueError: no"}, tmp_path, monkeypatch)
    assert "The names were not compared with transformers' model (ValueError: no)." in result.notes


@pytest.mark.engine
def test_transformers_own_answer(model: Path, tmp_path: Path) -> None:
    api.convert(model, tmp_path / "out", to="hf", dry_run=True)
    held = load_file(model / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    biases = {
        f"model.layers.{n}.self_attn.o_proj.bias": torch.zeros(config["hidden_size"]) for n in range(2)
    }
    save_file({**held, **biases}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(MismatchError, match=r"o_proj\.bias \(2 such\), which transformers' DeepseekV2"):
        api.convert(model, tmp_path / "out", to="hf", dry_run=True)
    save_file(held, model / "model.safetensors", {"format": "pt"})
    larger = {**config, "qk_nope_head_dim": 2 * config["qk_nope_head_dim"]}
    (model / "config.json").write_text(json.dumps(larger))
    with pytest.raises(MismatchError, match="has shape"):
        api.convert(model, tmp_path / "out", to="hf", dry_run=True)
