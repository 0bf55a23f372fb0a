"""Hub directories that are damaged, incomplete or of another model: refused with a sentence, whatever the
target, and what looks like damage and is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_tool import api
from ckpt_tool.canonical import DType
from ckpt_tool.errors import CkptToolError, ExecutionError, MismatchError, UnreadableError, UsageError
from ckpt_tool.families import family_of
from ckpt_tool.families.autoep import to_autoep
from ckpt_tool.families.naming import to_hub
from ckpt_tool.formats.deepspeed.writing import module_order
from tests.formats.hub_files import Tensors, convert, equal, experts, noise, plan_for, read, write

pytestmark = pytest.mark.usefixtures("partial_models")

E, H, INNER, LAYERS = 4, 32, 16, 3
AT = "model.layers.1"
CONFIG = {
    "model_type": "deepseek_v3", "num_hidden_layers": LAYERS, "n_routed_experts": E, "hidden_size": H,
    "moe_intermediate_size": INNER, "vocab_size": 24, "first_k_dense_replace": 1,
    "tie_word_embeddings": False,
}  # fmt: skip


def deepseek() -> Tensors:
    tensors = {f"{name}.weight": noise(24, H) for name in ("model.embed_tokens", "lm_head")}
    for number in range(LAYERS):
        layer = f"model.layers.{number}"
        tensors[f"{layer}.input_layernorm.weight"] = noise(H)
        if number == 0:
            continue
        tensors[f"{layer}.mlp.gate.weight"] = noise(E, H)
        tensors[f"{layer}.mlp.gate.e_score_correction_bias"] = noise(E, dtype=torch.float32)
        for block in ("shared_experts", *(f"experts.{expert}" for expert in range(E))):
            for name, shape in (("gate", (INNER, H)), ("up", (INNER, H)), ("down", (H, INNER))):
                tensors[f"{layer}.mlp.{block}.{name}_proj.weight"] = noise(*shape)
    return tensors


def in_memory() -> list[str]:
    """The names transformers' model has."""
    names = [name for name in deepseek() if ".experts." not in name]
    stacks = ("experts.gate_up_proj", "experts.down_proj")
    return names + [f"model.layers.{layer}.mlp.{stack}" for layer in (1, 2) for stack in stacks]


# ---- what is not whole, or of another model


@pytest.mark.parametrize(
    "target",
    [{"to": "hf"}, {"to": "universal"}, {"to": "dcp", "style": "transformers"}],
    ids=lambda t: t["to"],
)
@pytest.mark.parametrize(
    ("lost", "words"),
    [
        (f"{AT}.mlp.gate.weight", f"no {AT}.mlp.gate.weight"),
        (f"{AT}.mlp.gate.e_score", f"no {AT}.mlp.gate.e_score_correction_bias"),
        (f"{AT}.mlp.shared_experts.up", f"no {AT}.mlp.shared_experts.up_proj.weight"),
        (".mlp.gate.weight", "mlp.gate.weight"),
        (".mlp.experts.3.", "n_routed_experts 4"),
        (f"{AT}.mlp.experts.", "MoE layers are"),
        ("model.layers.0.", r"no tensor of layers \[0\]"),
        ("model.layers.2.", "num_hidden_layers 3"),
    ],
)
def test_a_model_that_lacks_something_is_refused(
    lost: str, words: str, target: dict[str, str], tmp_path: Path
) -> None:
    path = write(tmp_path / "hub", CONFIG, {n: t for n, t in deepseek().items() if lost not in n})
    with pytest.raises(MismatchError, match=words):
        api.convert(path, tmp_path / "out", dry_run=True, **target)


def test_a_whole_model_is_not_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "hub", CONFIG, deepseek())
    for target in ("hf", "universal"):
        api.convert(path, tmp_path / "out", to=target, dry_run=True)


@pytest.mark.parametrize("to", ["universal", "zero3"])
def test_what_autoep_has_no_place_for_is_refused(to: str, tmp_path: Path) -> None:
    stray = f"{AT}.mlp.experts.0.gate_proj.bias"
    path = write(tmp_path / "hub", CONFIG, deepseek() | {stray: noise(INNER)})
    with pytest.raises(MismatchError, match=f"{stray} lies in a MoE block"):
        api.convert(path, tmp_path / "out", to=to, dry_run=True)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([*in_memory(), f"{AT}.mlp.shared_experts.gate_proj.bias"], "lacks .*gate_proj.bias"),
        ([name for name in in_memory() if name != f"{AT}.mlp.gate.weight"], "has .*router.gate.weight"),
        ([name for name in in_memory() if name != f"{AT}.mlp.experts.down_proj"], "has .*down.weight"),
    ],
)
def test_a_block_of_other_tensors_than_the_models_is_refused(
    names: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "hub", CONFIG, deepseek())
    monkeypatch.setattr(module_order, "state_dict_names", lambda config: (in_memory(), set()))
    api.convert(path, tmp_path / "out", to="zero3", ep=1, world=1, dry_run=True)
    monkeypatch.setattr(module_order, "state_dict_names", lambda config: (names, set()))
    with pytest.raises(MismatchError, match=words):
        api.convert(path, tmp_path / "out", to="zero3", ep=1, world=1, dry_run=True)


def test_a_composite_model_is_refused_with_the_reason(tmp_path: Path) -> None:
    text = {key: value for key, value in CONFIG.items() if key != "model_type"}
    config = {"model_type": "kimi_k25", "text_config": text | {"model_type": "deepseek_v3"}}
    stored = {f"language_model.{name}": tensor for name, tensor in deepseek().items()}
    path = write(tmp_path / "hub", config, stored)
    with pytest.raises(MismatchError, match="AutoEP trains the text model alone"):
        api.convert(path, tmp_path / "out", to="universal", dry_run=True)


@pytest.mark.parametrize("name", ["07", "003", "٣"])
def test_an_expert_with_a_number_written_otherwise_is_refused(name: str, tmp_path: Path) -> None:
    stored = deepseek()
    stored[f"{AT}.mlp.experts.{name}.gate_proj.weight"] = noise(INNER, H)
    path = write(tmp_path / "hub", CONFIG, stored)
    with pytest.raises(CkptToolError, match=r"numbers its expert otherwise|MoE block"):
        api.convert(path, tmp_path / "out", to="universal", dry_run=True)


# ---- other names than transformers' in AutoEP's tree


@pytest.mark.parametrize(
    ("kind", "published", "in_run"),
    [
        ("hy_v3", "mlp.router.gate.weight", "mlp.router.gate.weight"),
        ("hy_v3", "mlp.expert_bias", "mlp.router.e_score_correction_bias"),
        ("hy_v3", "mlp.shared_mlp.up_proj.weight", "mlp.shared_experts.up_proj.weight"),
        ("laguna", "mlp.experts.e_score_correction_bias", "mlp.router.e_score_correction_bias"),
        ("laguna", "mlp.shared_expert.up_proj.weight", "mlp.shared_experts.up_proj.weight"),
        ("bailing_hybrid", "mlp.gate.expert_bias", "mlp.router.e_score_correction_bias"),
        ("bailing_hybrid", "attention.dense.weight", "self_attn.o_proj.weight"),
        ("kolibri1", "moe.router.expert_bias", "mlp.router.e_score_correction_bias"),
        ("kolibri1", "post_ffn_norm.weight", "post_mlp_layernorm.weight"),
        ("axk2", "self_attn.q_b_proj.weight", "self_attn.q_gate_proj.weight"),
        ("kimi_linear", "self_attn.dt_bias", "self_attn.forget_gate.dt_bias"),
    ],
)
def test_names_in_a_deepspeed_run_and_back(kind: str, published: str, in_run: str, tmp_path: Path) -> None:
    family = family_of({"model_type": kind})
    layer = {stored.pattern.format(layer=AT, expert=0): noise(INNER, H) for stored in family.hub}
    config = CONFIG | {"model_type": kind}
    path = write(tmp_path / "hub", config, layer | {f"{AT}.{published}": noise(E)})
    checkpoint, _ = read(path)
    there = to_autoep(checkpoint, family)
    assert f"{AT}.{in_run}" in {tensor.name for tensor in there.tensors}
    assert {t.name for t in to_hub(there, family).tensors} == {t.name for t in checkpoint.tensors}


def test_parts_of_one_tensor_in_memory_are_joined_for_a_deepspeed_run(tmp_path: Path) -> None:
    family = family_of({"model_type": "kimi_linear"})
    stored = {f"{AT}.block_sparse_moe.experts.0.{w}.weight": noise(INNER, H) for w in ("w1", "w2", "w3")}
    for part in "qkv":
        stored[f"{AT}.self_attn.{part}_conv1d.weight"] = noise(8, 1, 4)
    checkpoint, _ = read(write(tmp_path / "hub", CONFIG | {"model_type": "kimi_linear"}, stored))
    there = to_autoep(checkpoint, family)
    (whole,) = [tensor for tensor in there.tensors if "conv1d" in str(tensor.name)]
    assert (whole.name, whole.shape) == (f"{AT}.self_attn.conv1d.weight", (24, 1, 4))


@pytest.mark.parametrize("kind", ["hunyuan_v1_moe", "ernie4_5_moe", "axk1"])
def test_families_autoep_has_no_place_for_are_refused(kind: str, tmp_path: Path) -> None:
    stored = {f"{AT}.mlp.experts.0.{n}_proj.weight": noise(INNER, H) for n in ("gate", "up", "down")}
    checkpoint, _ = read(write(tmp_path / "hub", CONFIG | {"model_type": kind}, stored))
    with pytest.raises(MismatchError, match="no preset"):
        to_autoep(checkpoint, family_of({"model_type": kind}))


# ---- quantised


def fp8(tmp_path: Path, scale: torch.Tensor, block: list[int] | None, **more: torch.Tensor) -> Path:
    described: dict[str, Any] = {"quant_method": "fp8"} | ({"weight_block_size": block} if block else {})
    weight = noise(48, 32).to(torch.float8_e4m3fn)
    name = "model.layers.0.self_attn.q_a_proj.weight"
    stored = deepseek() | {name: weight, f"{name}_scale_inv": scale}
    stored |= {key.replace("__", "."): tensor for key, tensor in more.items()}
    return write(tmp_path / "hub", CONFIG | {"quantization_config": described}, stored)


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((2, 3), [16, 16]),
        ((6,), [16, 16]),
        ((6, 1), [16, 16]),
        ((1, 48), None),
        ((32,), None),
        ((1, 1, 1), None),
    ],
)
def test_a_scale_of_another_shape_is_refused(
    shape: tuple[int, ...], block: list[int] | None, tmp_path: Path
) -> None:
    path = fp8(tmp_path, torch.ones(shape), block)
    with pytest.raises(UnreadableError, match=r"\[48, 32\]"):
        api.catalogue(path)


@pytest.mark.parametrize(
    ("shape", "block"),
    [((3, 2), [16, 16]), ((), [16, 16]), ((1,), None), ((1, 1), None), ((48,), None), ((48, 1), None)],
)
def test_a_scale_of_every_form_is_read(
    shape: tuple[int, ...], block: list[int] | None, tmp_path: Path
) -> None:
    scale = noise(*shape, dtype=torch.float32)
    path = fp8(tmp_path, scale, block)
    weight = noise(48, 32).to(torch.float8_e4m3fn).float()
    each = scale.repeat_interleave(16, 0).repeat_interleave(16, 1) if shape == (3, 2) else scale
    each = scale[:, None] if shape == (48,) else each
    _, values = read(path)
    assert equal(values["model.layers.0.self_attn.q_a_proj.weight"], weight * each)


def test_a_scale_that_is_no_float_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match="int32"):
        api.catalogue(fp8(tmp_path, torch.ones(3, 2, dtype=torch.int32), [16, 16]))


def test_masks_of_an_fp8_model_are_no_weights(tmp_path: Path) -> None:
    masks = {
        "model__mask": torch.ones(4, 4, dtype=torch.bool),
        "model__ids": torch.ones(4, 4).to(torch.uint8),
    }
    path = fp8(tmp_path, torch.ones(3, 2), [16, 16], **masks)
    convert(path, tmp_path / "out", dtype=DType.bfloat16)
    _, values = read(tmp_path / "out")
    assert equal(values["model.mask"], masks["model__mask"])


@pytest.mark.parametrize("described", [True, False])
def test_integer_weights_are_refused_under_either_key(described: bool, tmp_path: Path) -> None:
    stored = {n: t.to(torch.int8) if ".experts." in n else t for n, t in deepseek().items()}
    more = {"compression_config": {"quant_method": "compressed-tensors"}} if described else {}
    path = write(tmp_path / "hub", CONFIG | more, stored)
    with pytest.raises(UnreadableError, match="compressed-tensors" if described else "int8"):
        plan_for(path)


def test_fp8_in_the_fused_form_is_not_kept_under_a_mixture_of_names(tmp_path: Path) -> None:
    config = {
        "model_type": "mixtral", "num_local_experts": E, "num_hidden_layers": 1, "hidden_size": H,
        "intermediate_size": INNER, "quantization_config": {"quant_method": "fp8"},
    }  # fmt: skip
    at = "model.layers.0.mlp"
    stored = {f"{at}.gate.weight": noise(E, H)}
    for name, shape in (("gate_up_proj", (E, 2 * INNER, H)), ("down_proj", (E, H, INNER))):
        stored[f"{at}.experts.{name}"] = noise(*shape).to(torch.float8_e4m3fn)
        stored[f"{at}.experts.{name}_scale_inv"] = torch.ones(E, 1, 1)
    path = write(tmp_path / "hub", config, stored)
    with pytest.raises(UsageError, match="transformers' own names"):
        plan_for(path)
    assert plan_for(path, dtype=DType.bfloat16).files


# ---- precision


@pytest.mark.parametrize("style", ["hub", "fused"])
def test_what_routes_stays_fp32_in_both_forms(style: str, tmp_path: Path) -> None:
    config = {
        "model_type": "step3p7", "num_hidden_layers": 1, "moe_num_experts": E, "hidden_size": H,
        "moe_intermediate_size": INNER,
    }  # fmt: skip
    moe = "model.layers.0.moe"
    stored = {
        f"{moe}.{n}_proj.weight": noise(E, *s)
        for n, s in (("gate", (INNER, H)), ("up", (INNER, H)), ("down", (H, INNER)))
    }
    stored[f"{moe}.router_bias"] = noise(E, dtype=torch.float32)
    stored[f"{moe}.gate.weight"] = noise(E, H, dtype=torch.float32)
    path = write(tmp_path / "hub", config, stored)
    layout = convert(path, tmp_path / "out", style, DType.bfloat16)
    _, values = read(tmp_path / "out")
    assert equal(values[f"{moe}.router_bias"], stored[f"{moe}.router_bias"])
    assert values[f"{moe}.gate.weight"].dtype is torch.bfloat16
    assert len([note for note in layout.notes if "Kept in their own precision" in note]) == 1


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("hy_v4", f"{AT}.attn_hc.fn"), ("hy_v4", f"{AT}.hc_pre.hc_mlp_layer.hc_base"),
        ("hy_v4", f"{AT}.self_attn.learnable_sink_param"), ("hy_v4", "lm_head.weight"),
        ("hy_v4", f"{AT}.self_attn.indexer.k_norm.bias"),
        ("openai_privacy_filter", f"{AT}.self_attn.sinks"),
        ("deepseek_v32", f"{AT}.self_attn.indexer.weights_proj.weight"),
        ("axk2", f"{AT}.self_attn.indexer.weights_proj.weight"),
        ("deepseek_v4", f"{AT}.attn.compressor.wkv.weight"),
        ("deepseek_v4", f"{AT}.self_attn.compressor.gate_proj.weight"),
        ("glm5_next", f"{AT}.attn_hc.base"), ("glm5_next", f"{AT}.hc_ffn_scale"),
        ("nemo_speechlm", "perception.proj.weight"), ("flint", f"{AT}.self_attn.sinks"),
        ("mistral_large4", "model.language_model.rotary_emb.alpha"),
    ],
)  # fmt: skip
def test_what_transformers_keeps_in_fp32_is_kept(kind: str, name: str) -> None:
    assert family_of({"model_type": kind}).keeps_fp32(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_too_large_for_fp16_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    stored = deepseek()
    norm = torch.ones(H, dtype=dtype)
    norm[:3] = torch.tensor([1e30, float("inf"), float("nan")])
    path = write(tmp_path / "hub", CONFIG, stored | {"model.layers.0.input_layernorm.weight": norm})
    with pytest.raises(ExecutionError, match=r"layers.0.input_layernorm.weight.*at least 1 of its numbers"):
        convert(path, tmp_path / "out", dtype=DType.float16)
    norm[0] = 65504 if dtype is torch.float32 else 32768
    path = write(tmp_path / "hub", CONFIG, stored | {"model.layers.0.input_layernorm.weight": norm})
    convert(path, tmp_path / "again", dtype=DType.float16)


# ---- config.json and names


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"mlp_only_layers": 3}, "mlp_only_layers 3"),
        ({"decoder_sparse_step": "x"}, "decoder_sparse_step 'x'"),
        ({"num_nextn_predict_layers": "a"}, "num_nextn_predict_layers 'a'"),
        ({"num_attention_heads": "a"}, "num_attention_heads 'a'"),
        ({"tie_word_embeddings": "false"}, "neither true nor false"),
        ({"moe_intermediate_size": [INNER, 12]}, "no size"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(
    changed: dict[str, Any], words: str, tmp_path: Path
) -> None:
    config = CONFIG | {"model_type": "qwen3_moe", "num_experts": E, "mlp_only_layers": [0]} | changed
    stored = {name: tensor for name, tensor in deepseek().items() if "shared" not in name}
    path = write(tmp_path / "hub", config, stored)
    with pytest.raises(MismatchError, match=words):
        plan_for(path)


def test_a_size_given_once_per_layer_is_that_size(tmp_path: Path) -> None:
    lists = {"moe_intermediate_size": [INNER] * LAYERS, "n_routed_experts": [E] * LAYERS}
    path = write(tmp_path / "hub", CONFIG | lists, deepseek())
    assert plan_for(path, "fused").files
    _, values = read(path)
    assert set(experts(values, AT)) == {"gate", "up", "down"}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embed_tokens.weight", (24,)),
        (f"{AT}.mlp.shared_experts.gate_proj.weight", ()),
        (f"{AT}.mlp.experts.{{}}.gate_proj.weight", (INNER,)),
    ],
)
def test_a_tensor_of_too_few_dimensions_is_refused(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    changed = {name.format(expert): noise(*shape) for expert in range(E)}
    path = write(tmp_path / "hub", CONFIG | {"n_shared_experts": 1}, deepseek() | changed)
    with pytest.raises(MismatchError, match=r"where the model has a matrix|the checkpoint has 0"):
        plan_for(path)


def test_a_name_that_is_no_unicode_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "hub", CONFIG, deepseek()) / "model.safetensors"
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["lone\ud800"] = header.pop("lm_head.weight")
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    with pytest.raises(UnreadableError, match="no valid Unicode"):
        api.catalogue(path.parent)
