"""transformers' own small models, damaged as a broken save damages them, or beside the config.json of
another run: each is refused by name, and the whole one is not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tool import api
from ckpt_tool.errors import CkptToolError, MismatchError
from tests.engine.hf_models import build

pytestmark = pytest.mark.engine

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], Tensors]
FAMILIES = ("gpt_oss", "deepseek_v3", "glm4_moe", "qwen3_next", "qwen2_moe", "qwen3_moe")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each model as transformers saves it."""
    root = tmp_path_factory.mktemp("models")
    for name in FAMILIES:
        build(name).save_pretrained(root / name)
    return root


def without(pattern: str) -> Change:
    def change(held: Tensors) -> Tensors:
        rest = {name: one for name, one in held.items() if not re.search(pattern, name)}
        assert len(rest) < len(held)
        return rest

    return change


def cut(pattern: str, axis: int = 0) -> Change:
    """Matrices with half of their rows or columns."""

    def change(held: Tensors) -> Tensors:
        assert any(re.search(pattern, name) for name in held)
        return {
            name: one.narrow(axis, 0, max(one.shape[axis] // 2, 1)) if re.search(pattern, name) else one
            for name, one in held.items()
        }

    return change


def more(name: str, *shape: int) -> Change:
    return lambda held: {**held, **{name.format(number): torch.zeros(shape) for number in range(3)}}


def same(held: Tensors) -> Tensors:
    return held


def convert(models: Path, name: str, how: Change, said: dict[str, Any], to: Path) -> api.Result:
    """Plan a conversion of the model as changed, with fields of its config changed or (...) left out."""
    source = to / "model"
    source.mkdir()
    held = how(load_file(models / name / "model.safetensors"))
    save_file({key: one.contiguous() for key, one in held.items()}, source / "model.safetensors")
    config = {**json.loads((models / name / "config.json").read_text()), **said}
    kept = {key: value for key, value in config.items() if value is not ...}
    (source / "config.json").write_text(json.dumps(kept))
    return api.convert(source, to / "out", to="hf", dry_run=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_model_has_no_note(name: str, models: Path, tmp_path: Path) -> None:
    assert not any("ompared" in note for note in convert(models, name, same, {}, tmp_path).notes)


MISSING = {
    "an experts' bias that one layer lacks": ("gpt_oss", r"layers\.1\.mlp\.experts\.down_proj_bias"),
    "an experts' bias that all layers lack": ("gpt_oss", r"mlp\.experts\.down_proj_bias"),
    "a gate's and up's bias": ("gpt_oss", r"layers\.2\.mlp\.experts\.gate_up_proj_bias"),
    "the down projections of a layer's experts": ("qwen3_moe", r"layers\.1\.mlp\.experts\.\d+\.down"),
    "all up projections of experts": ("qwen3_moe", r"mlp\.experts\.\d+\.up_proj"),
    "attention of the one dense layer": ("deepseek_v3", r"layers\.0\.self_attn\.q_a_proj"),
    "a norm of the one dense layer": ("deepseek_v3", r"layers\.0\.self_attn\.kv_a_layernorm"),
    "a projection of the one dense layer": ("glm4_moe", r"layers\.0\.self_attn\.v_proj\.weight"),
    "a norm of the one layer of full attention": ("qwen3_next", r"layers\.1\.self_attn\.q_norm"),
    "what all linear attention has": ("qwen3_next", r"linear_attn\.A_log"),
    "a head that is not tied": ("qwen3_moe", r"lm_head"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "pattern"), MISSING.values(), ids=MISSING.keys())
def test_missing(name: str, pattern: str, models: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="has no "):
        convert(models, name, without(pattern), {}, tmp_path)


PROMISED = {
    "biases of attention": ("qwen3_moe", {"attention_bias": True}, "q_proj.bias|k_proj.bias"),
    "biases of query, key and value": ("glm4_moe", {"attention_bias": True}, "k_proj.bias"),
    "norms of query and key": ("glm4_moe", {"use_qk_norm": True}, "k_norm.weight"),
    "a query of low rank": ("deepseek_v3", {"q_lora_rank": 16}, "q_a_", r"self_attn\.q_a_|self_attn\.q_b_"),
    "a layer of linear attention": (
        "qwen3_next", {"layer_types": ["linear_attention"] * 3}, "linear_attn|self_attn",
    ),
    "full attention by its interval": (
        "qwen3_next", {"layer_types": ..., "full_attention_interval": 1}, "self_attn.k_norm|linear_attn",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PROMISED.values(), ids=PROMISED.keys())
def test_promised_and_missing(case: tuple[Any, ...], models: Path, tmp_path: Path) -> None:
    name, said, words, *pattern = case
    with pytest.raises(MismatchError, match=f"has (?:no )?model.*(?:{words}).*by this config.json"):
        convert(models, name, without(pattern[0]) if pattern else same, said, tmp_path)


EXCLUDED = {
    "biases of attention": ("qwen2_moe", same, {"qkv_bias": False}, r"k_proj\.bias.*qkv_bias false"),
    "biases that the config does not speak of": (
        "qwen3_moe", more("model.layers.{}.self_attn.o_proj.bias", 32), {"attention_bias": ...},
        r"o_proj\.bias.*attention_bias false, its default",
    ),
    "a query of low rank": ("deepseek_v3", same, {"q_lora_rank": None}, r"q_a.*q_lora_rank null"),
    "full attention": (
        "qwen3_next", same, {"layer_types": ["linear_attention"] * 3}, r"layers\.1\.(?:linear|self)_attn",
    ),
    "experts in a layer that is dense": (
        "qwen3_moe", same, {"mlp_only_layers": [1]}, r"MoE layers are \[0, 2\]",
    ),
    "experts in every second layer": (
        "qwen3_moe", same, {"decoder_sparse_step": 2}, r"MoE layers are \[1\]",
    ),
    "experts in the first layers": (
        "deepseek_v3", same, {"first_k_dense_replace": 2}, r"MoE layers are \[2\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "how", "said", "words"), EXCLUDED.values(), ids=EXCLUDED.keys())
def test_excluded_and_there(
    name: str, how: Change, said: dict[str, Any], words: str, models: Path, tmp_path: Path
) -> None:
    with pytest.raises(MismatchError, match=words):
        convert(models, name, how, said, tmp_path)


def test_a_head_of_its_own_that_the_config_ties(models: Path, tmp_path: Path) -> None:
    """The values tell, which a plan does not read."""
    convert(models, "qwen3_moe", same, {"tie_word_embeddings": True}, tmp_path)
    with pytest.raises(CkptToolError, match="embed_tokens"):
        api.convert(tmp_path / "model", tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()


SIZES = {
    "outputs of attention": ("qwen3_moe", r"o_proj", 1),
    "keys of fewer heads": ("qwen3_moe", r"k_proj", 0),
    "values of fewer heads": ("gpt_oss", r"v_proj", 0),
    "biases": ("gpt_oss", r"q_proj\.bias", 0),
    "the head": ("qwen3_moe", r"lm_head", 0),
    "the head's columns": ("qwen3_moe", r"lm_head", 1),
    "norms": ("qwen3_moe", r"input_layernorm", 0),
    "norms of keys": ("qwen3_moe", r"k_norm", 0),
    "the last norm": ("qwen3_moe", r"model\.norm", 0),
    "rows of routers": ("qwen3_moe", r"mlp\.gate\.weight", 0),
    "biases of experts": ("gpt_oss", r"experts\.down_proj_bias", 1),
    "shared experts": ("qwen2_moe", r"shared_expert\.", 0),
    "columns of shared experts": ("qwen2_moe", r"shared_expert\.down", 1),
    "shared experts by their number": ("deepseek_v3", r"shared_experts\.(?:gate|up)", 0),
    "dense layers": ("deepseek_v3", r"layers\.0\.mlp\.(?:gate|up)_proj", 0),
    "columns of dense layers": ("deepseek_v3", r"layers\.0\.mlp\.down_proj", 1),
    "latent keys and values": ("deepseek_v3", r"kv_b_proj", 0),
    "convolutions of linear attention": ("qwen3_next", r"conv1d", 0),
}  # fmt: skip


@pytest.mark.parametrize(("name", "pattern", "axis"), SIZES.values(), ids=SIZES.keys())
def test_wrong_in_every_layer(name: str, pattern: str, axis: int, models: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"(?:has shape|the checkpoint has).*config\.json"):
        convert(models, name, cut(pattern, axis), {}, tmp_path)


@pytest.mark.parametrize("field", ["num_attention_heads", "num_key_value_heads", "head_dim"])
def test_a_size_that_the_config_does_not_say_is_named(field: str, models: Path, tmp_path: Path) -> None:
    notes = convert(models, "qwen3_moe", same, {field: ...}, tmp_path).notes
    assert any(f"does not say {field}" in note for note in notes)
