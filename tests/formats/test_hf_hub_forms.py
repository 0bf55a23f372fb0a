"""Published layouts, written by hand: what each says of an expert is computed here, not by ckpt-tool."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ckpt_tool import api
from ckpt_tool.canonical import DType
from ckpt_tool.errors import MismatchError, UnreadableError, UsageError
from tests.formats.hub_files import Tensors, convert, equal, experts, noise, plan_for, read, write

pytestmark = pytest.mark.usefixtures("partial_models")

E, H, I = 4, 32, 12  # noqa: E741
LAYER = "model.layers.0"
INSIDE = "model.language_model.layers.0"


def assert_experts(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for projection, tensor in expected.items():
        assert equal(found[projection], tensor), projection


def outside(values: dict[str, torch.Tensor], dense: Tensors) -> None:
    for name, tensor in dense.items():
        assert equal(values[name], tensor), name


def again(path: Path, tmp_path: Path, style: str, to: str = "") -> Tensors:
    """The tensors of the model written in the form ``style``."""
    target = tmp_path / (to or f"written_{style}")
    convert(path, target, style)
    return load_file(target / "model.safetensors")


# ---- qwen3_5_moe: stacked, nn.Linear orientation, below model.language_model


def qwen3_5_config() -> dict[str, Any]:
    text = {"model_type": "qwen3_5_moe_text", "num_hidden_layers": 1, "num_experts": E, "hidden_size": H}
    return {"model_type": "qwen3_5_moe", "text_config": text | {"moe_intermediate_size": I}}


def test_qwen3_5_moe_is_stacked_and_its_mtp_layer_is_kept(tmp_path: Path) -> None:
    layer = "model.language_model.layers.0"
    fused, down = noise(E, 2 * I, H), noise(E, H, I)
    single = {
        f"mtp.layers.0.mlp.experts.{e}.{name}_proj.weight": noise(*shape, seed=e)
        for e in range(E)
        for name, shape in (("gate", (I, H)), ("up", (I, H)), ("down", (H, I)))
    }
    dense = {
        f"{layer}.mlp.gate.weight": noise(E, H),
        f"{layer}.mlp.shared_expert.gate_proj.weight": noise(20, H),
        f"{layer}.mlp.shared_expert_gate.weight": noise(1, H),
        "mtp.fc.weight": noise(H, 2 * H),
        "model.visual.blocks.7.attn.proj.weight": noise(8, 8),
    }
    stacks = {f"{layer}.mlp.experts.gate_up_proj": fused, f"{layer}.mlp.experts.down_proj": down}
    path = write(tmp_path / "hub", qwen3_5_config(), dense | stacks, single)
    checkpoint, values = read(path)
    assert_experts(experts(values, layer), {"gate": fused[:, :I], "up": fused[:, I:], "down": down})
    for name in ("gate", "up", "down"):
        stack = torch.stack([single[f"mtp.layers.0.mlp.experts.{e}.{name}_proj.weight"] for e in range(E)])
        assert equal(experts(values, "mtp.layers.0")[name], stack)
    outside(values, dense)
    assert [layer.layer_path for layer in checkpoint.moe_layers] == [layer, "mtp.layers.0"]
    written = again(path, tmp_path, "hub")
    assert equal(written[f"{layer}.mlp.experts.gate_up_proj"], fused)
    assert equal(written["mtp.fc.weight"], dense["mtp.fc.weight"])


# ---- qwen3_vl_moe: published transposed, saved by transformers not


@pytest.mark.parametrize("hidden", [H, 2 * I], ids=["", "square"])
@pytest.mark.parametrize("published", [True, False], ids=["hub", "transformers"])
def test_qwen3_vl_moe_is_told_apart_by_config(tmp_path: Path, published: bool, hidden: int) -> None:
    text = {"num_hidden_layers": 1, "num_experts": E, "hidden_size": hidden, "moe_intermediate_size": I}
    config = {"model_type": "qwen3_vl_moe", "text_config": text | {"model_type": "qwen3_vl_moe_text"}}
    layer = "model.language_model.layers.0"
    gate, up, down = noise(E, I, hidden), noise(E, I, hidden, seed=1), noise(E, hidden, I, seed=2)
    fused = torch.cat([gate, up], 1)
    stored = {
        f"{layer}.mlp.experts.gate_up_proj": fused.transpose(1, 2) if published else fused,
        f"{layer}.mlp.experts.down_proj": down.transpose(1, 2) if published else down,
    }
    path = write(tmp_path / "hub", config, stored)
    assert_experts(experts(read(path)[1], layer), {"gate": gate, "up": up, "down": down})
    hub, memory = again(path, tmp_path, "hub"), again(path, tmp_path, "fused")
    assert equal(hub[f"{layer}.mlp.experts.gate_up_proj"], fused.transpose(1, 2))
    assert equal(hub[f"{layer}.mlp.experts.down_proj"], down.transpose(1, 2))
    assert equal(memory[f"{layer}.mlp.experts.gate_up_proj"], fused)
    assert equal(memory[f"{layer}.mlp.experts.down_proj"], down)


def test_experts_of_neither_orientation_are_refused(tmp_path: Path) -> None:
    text = {"num_hidden_layers": 1, "num_experts": E, "hidden_size": H, "moe_intermediate_size": I}
    layer = "model.language_model.layers.0"
    stored = {f"{layer}.mlp.experts.gate_up_proj": noise(E, 2 * I + 2, H)}
    path = write(tmp_path / "hub", {"model_type": "qwen3_vl_moe", "text_config": text}, stored)
    with pytest.raises(UnreadableError, match="neither of the layouts"):
        read(path)


# ---- llama4: transposed


def test_llama4_is_transposed(tmp_path: Path) -> None:
    text = {"model_type": "llama4_text", "num_hidden_layers": 2, "num_local_experts": E, "hidden_size": H}
    text |= {"intermediate_size": I, "interleave_moe_layer_step": 2}
    layer = "language_model.model.layers.1"
    fused, down = noise(E, H, 2 * I), noise(E, I, H)
    dense = {
        "language_model.model.layers.0.feed_forward.gate_proj.weight": noise(20, H),
        f"{layer}.feed_forward.router.weight": noise(E, H),
        f"{layer}.feed_forward.shared_expert.up_proj.weight": noise(I, H),
        "vision_model.model.layers.33.mlp.fc1.weight": noise(8, 8),
    }
    stored = {
        f"{layer}.feed_forward.experts.gate_up_proj": fused,
        f"{layer}.feed_forward.experts.down_proj": down,
    }
    path = write(tmp_path / "hub", {"model_type": "llama4", "text_config": text}, dense | stored)
    _, values = read(path)
    columns = fused.transpose(1, 2)
    expected = {"gate": columns[:, :I], "up": columns[:, I:], "down": down.transpose(1, 2)}
    assert_experts(experts(values, layer), expected)
    outside(values, dense)
    for style in ("hub", "fused"):
        written = again(path, tmp_path, style)
        assert set(written) == set(dense | stored)
        outside(written, dense | stored)


# ---- gpt_oss: transposed, interleaved, biases; MXFP4


def gpt_oss_config(hidden: int = H, inner: int = I) -> dict[str, Any]:
    return {
        "model_type": "gpt_oss",
        "num_hidden_layers": 1,
        "num_local_experts": E,
        "hidden_size": hidden,
        "intermediate_size": inner,
    }


@pytest.mark.parametrize("inner", [I, H], ids=["", "square"])
def test_gpt_oss_interleaves_columns(tmp_path: Path, inner: int) -> None:
    at = f"{LAYER}.mlp.experts"
    stored = {
        f"{at}.gate_up_proj": noise(E, H, 2 * inner),
        f"{at}.gate_up_proj_bias": noise(E, 2 * inner),
        f"{at}.down_proj": noise(E, inner, H),
        f"{at}.down_proj_bias": noise(E, H),
        f"{LAYER}.mlp.router.weight": noise(E, H),
        f"{LAYER}.mlp.router.bias": noise(E),
    }
    path = write(tmp_path / "hub", gpt_oss_config(inner=inner), stored)
    _, values = read(path)
    rows = stored[f"{at}.gate_up_proj"].transpose(1, 2)
    expected = {
        "gate": rows[:, 0::2],
        "up": rows[:, 1::2],
        "down": stored[f"{at}.down_proj"].transpose(1, 2),
    }
    assert_experts(experts(values, LAYER), expected)
    bias = stored[f"{at}.gate_up_proj_bias"]
    expected = {"gate": bias[:, 0::2], "up": bias[:, 1::2], "down": stored[f"{at}.down_proj_bias"]}
    assert_experts(experts(values, LAYER, "bias"), expected)
    written = again(path, tmp_path, "hub")
    assert set(written) == set(stored)
    assert all(equal(written[name], stored[name]) for name in stored)


FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def mxfp4_values(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """One value after the other, as OCP's specification reads."""
    out = []
    for row, exponent in zip(blocks.reshape(-1, 16).tolist(), scales.reshape(-1).tolist(), strict=True):
        for byte in row:
            out += [math.ldexp(FP4[nibble], exponent - 127) for nibble in (byte & 15, byte >> 4)]
    return torch.tensor(out, dtype=torch.float64).to(torch.bfloat16).reshape(*scales.shape[:-1], -1)


def mxfp4_model(tmp_path: Path) -> tuple[Path, Tensors]:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int, low: int = 0, high: int = 256) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)

    hidden, inner, at = 64, 96, f"{LAYER}.mlp.experts"
    stored = {
        f"{at}.gate_up_proj_blocks": random(E, 2 * inner, hidden // 32, 16),
        f"{at}.gate_up_proj_scales": random(E, 2 * inner, hidden // 32, low=100, high=140),
        f"{at}.gate_up_proj_bias": noise(E, 2 * inner),
        f"{at}.down_proj_blocks": random(E, hidden, inner // 32, 16),
        f"{at}.down_proj_scales": random(E, hidden, inner // 32, low=0, high=250),
        f"{at}.down_proj_bias": noise(E, hidden),
        f"{LAYER}.mlp.router.weight": noise(E, hidden),
    }
    config = gpt_oss_config(hidden, inner) | {"quantization_config": {"quant_method": "mxfp4"}}
    return write(tmp_path / "hub", config, stored), stored


def test_gpt_oss_in_mxfp4_is_read_as_values(tmp_path: Path) -> None:
    path, stored = mxfp4_model(tmp_path)
    at = f"{LAYER}.mlp.experts"
    rows = mxfp4_values(stored[f"{at}.gate_up_proj_blocks"], stored[f"{at}.gate_up_proj_scales"])
    down = mxfp4_values(stored[f"{at}.down_proj_blocks"], stored[f"{at}.down_proj_scales"])
    _, values = read(path)
    assert_experts(experts(values, LAYER), {"gate": rows[:, 0::2], "up": rows[:, 1::2], "down": down})
    layout = convert(path, tmp_path / "bf16", "hub", DType.bfloat16)
    written = load_file(tmp_path / "bf16" / "model.safetensors")
    assert equal(written[f"{at}.gate_up_proj"], rows.transpose(1, 2).contiguous())
    assert equal(written[f"{at}.down_proj"], down.transpose(1, 2).contiguous())
    assert equal(written[f"{at}.down_proj_bias"], stored[f"{at}.down_proj_bias"])
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert "quantization_config" not in config
    assert any("quantization_config is dropped" in note for note in layout.notes)


def test_quantised_model_is_kept_as_stored(tmp_path: Path) -> None:
    path, stored = mxfp4_model(tmp_path)
    written = again(path, tmp_path, "hub")
    assert set(written) == set(stored)
    assert all(equal(written[name], stored[name]) for name in stored)
    config = json.loads((tmp_path / "written_hub" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "mxfp4"}
    with pytest.raises(UsageError, match="fused form cannot"):
        plan_for(path, "fused")


# ---- deepseek_v3: FP8 blocks, a dense layer, a multi-token-prediction layer


def fp8_values(weight: torch.Tensor, scale: torch.Tensor, block: int) -> torch.Tensor:
    """Element by element: the weight times the scale of its block, rounded once to float32."""
    out = torch.empty(weight.shape)
    plain = weight.to(torch.float32)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            out[row, column] = plain[row, column] * scale[row // block, column // block]
    return out


def deepseek_fp8(tmp_path: Path, block: int = 16) -> tuple[Path, Tensors]:
    hidden, inner = 40, 24  # neither a multiple of the block
    stored: Tensors = {}

    def quantised(name: str, rows: int, columns: int) -> None:
        shape = -(-rows // block), -(-columns // block)
        seed = len(stored)
        stored[name] = noise(rows, columns, dtype=torch.float32, seed=seed).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = noise(*shape, dtype=torch.float32, seed=seed).abs() + 0.1

    for layer in (1, 2):  # layer 2 is the multi-token-prediction layer
        for e in range(E):
            for name, shape in (
                ("gate", (inner, hidden)),
                ("up", (inner, hidden)),
                ("down", (hidden, inner)),
            ):
                quantised(f"model.layers.{layer}.mlp.experts.{e}.{name}_proj.weight", *shape)
        stored[f"model.layers.{layer}.mlp.gate.weight"] = noise(E, hidden)
        stored[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] = noise(E, dtype=torch.float32)
    quantised("model.layers.0.mlp.gate_proj.weight", 56, hidden)
    stored["model.layers.2.shared_head.norm.weight"] = noise(hidden)
    stored["model.embed_tokens.weight"] = noise(64, hidden)
    stored["lm_head.weight"] = noise(64, hidden, seed=1)
    config = {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 2,
        "num_nextn_predict_layers": 1,
        "first_k_dense_replace": 1,
        "n_routed_experts": E,
        "moe_intermediate_size": inner,
        "hidden_size": hidden,
        "vocab_size": 64,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [block, block]},
    }
    return write(tmp_path / "hub", config, stored), stored


def test_deepseek_v3_in_fp8_is_read_as_values(tmp_path: Path) -> None:
    path, stored = deepseek_fp8(tmp_path)
    checkpoint, values = read(path)
    for layer in (1, 2):
        for name in ("gate", "up", "down"):
            keys = [f"model.layers.{layer}.mlp.experts.{e}.{name}_proj.weight" for e in range(E)]
            expected = torch.stack([fp8_values(stored[k], stored[f"{k}_scale_inv"], 16) for k in keys])
            assert equal(experts(values, f"model.layers.{layer}")[name], expected)
    dense = "model.layers.0.mlp.gate_proj.weight"
    assert equal(values[dense], fp8_values(stored[dense], stored[f"{dense}_scale_inv"], 16))
    assert not any("scale_inv" in name for name in values)
    assert [layer.layer_path for layer in checkpoint.moe_layers] == ["model.layers.1", "model.layers.2"]


def test_correction_bias_stays_fp32_in_a_bf16_export(tmp_path: Path) -> None:
    path, stored = deepseek_fp8(tmp_path)
    layout = convert(path, tmp_path / "bf16", "hub", DType.bfloat16)
    written = load_file(tmp_path / "bf16" / "model.safetensors")
    key = "model.layers.2.mlp.experts.3.down_proj.weight"
    assert equal(written[key], fp8_values(stored[key], stored[f"{key}_scale_inv"], 16).to(torch.bfloat16))
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert equal(written[bias], stored[bias])
    assert any(bias in note for note in layout.notes)
    assert {tensor.dtype for name, tensor in written.items() if "bias" not in name} == {torch.bfloat16}
    assert not any("scale_inv" in name for name in written)


def test_fp8_scale_of_another_shape_is_refused(tmp_path: Path) -> None:
    path, stored = deepseek_fp8(tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [8, 8]
    with pytest.raises(UnreadableError, match=r"do not belong together"):
        read(write(path, config, stored))


def test_fp8_reads_any_range_of_elements(tmp_path: Path) -> None:
    """Ranges that begin and end inside rows and blocks, small and large."""
    from ckpt_tool.containers.decoding.reader import DecodingReader
    from ckpt_tool.formats.registry import open_checkpoint

    weight = noise(300, 257, dtype=torch.float32).to(torch.float8_e4m3fn)
    scale = noise(3, 3, dtype=torch.float32)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    stored = {"a.weight": weight, "a.weight_scale_inv": scale}
    reader, checkpoint = open_checkpoint(write(tmp_path / "hub", config, stored))
    factor = scale.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :257]
    expected = (weight.to(torch.float32) * factor).reshape(-1).numpy().tobytes()
    region = next(iter(checkpoint.tensors[0].regions))
    decoding = DecodingReader(reader)
    for start, end in ((0, 77100), (5, 6), (256, 258), (1000, 70000), (77099, 77100), (65530, 65540)):
        assert decoding.read(region.file, start * 4, (end - start) * 4) == expected[start * 4 : end * 4]


@pytest.mark.parametrize("method", ["aqlm", "hqq", "quanto", "a method of tomorrow"])
def test_other_schemes_are_named_and_refused(tmp_path: Path, method: str) -> None:
    key = f"{LAYER}.mlp.experts.0.gate_proj.weight_packed"
    config = {"model_type": "deepseek_v3", "quantization_config": {"quant_method": method}}
    path = write(tmp_path / "hub", config, {key: torch.zeros(4, 4, dtype=torch.int32)})
    checkpoint, _ = read(path)
    assert [str(tensor.name) for tensor in checkpoint.tensors] == [key]
    with pytest.raises(UnreadableError, match=f"quantised as {method}"):
        plan_for(path)


def test_fp8_that_the_config_does_not_describe_is_refused(tmp_path: Path) -> None:
    path, stored = deepseek_fp8(tmp_path)
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    with pytest.raises(UnreadableError, match=r"fp8 that config\.json does not describe"):
        plan_for(write(path, config, stored))


# ---- composites with a text model inside


def test_kimi_k25_keeps_its_prefixes_and_transformers_blocks_are_put_right(tmp_path: Path) -> None:
    text = {"model_type": "deepseek_v3", "num_hidden_layers": 1, "n_routed_experts": E, "hidden_size": H}
    text |= {"moe_intermediate_size": I, "first_k_dense_replace": 0, "vocab_size": 64}
    config = {"model_type": "kimi_k25", "text_config": text}
    layer = "language_model.model.layers.0"
    stored = {
        f"{layer}.mlp.experts.{e}.{name}_proj.weight": noise(*shape, seed=e)
        for e in range(E)
        for name, shape in (("gate", (I, H)), ("up", (I, H)), ("down", (H, I)))
    }
    stored |= {
        f"{layer}.mlp.gate.weight": noise(E, H),
        "language_model.lm_head.weight": noise(64, H, seed=1),
        "language_model.model.embed_tokens.weight": noise(64, H),
        "vision_tower.encoder.blocks.3.wqkv.weight": noise(8, 8),
    }
    path = write(tmp_path / "hub", config, stored)
    _, values = read(path)
    for name in ("gate", "up", "down"):
        stack = torch.stack([stored[f"{layer}.mlp.experts.{e}.{name}_proj.weight"] for e in range(E)])
        assert equal(experts(values, layer)[name], stack)
    memory = again(path, tmp_path, "fused")
    at = "model.language_model.layers.0.mlp.experts"
    assert equal(memory[f"{at}.down_proj"], experts(values, layer)["down"])
    assert equal(memory[f"{at}.gate_up_proj"][:, I:], experts(values, layer)["up"])
    assert "lm_head.weight" in memory
    saved = {name.replace("model.layers.0", "model.blocks.0"): tensor for name, tensor in stored.items()}
    written = again(write(tmp_path / "saved", config, saved), tmp_path, "hub", "corrected")
    assert set(written) == set(stored)


def test_kimi_linear_keeps_the_name_of_its_dense_layer(tmp_path: Path) -> None:
    config = {
        "model_type": "kimi_linear", "num_hidden_layers": 2, "first_k_dense_replace": 1, "num_experts": E,
        "hidden_size": H, "moe_intermediate_size": I,
    }  # fmt: skip
    layer = "model.layers.1"
    stored = {
        f"{layer}.block_sparse_moe.experts.{e}.{name}.weight": noise(*shape, seed=e)
        for e in range(E)
        for name, shape in (("w1", (I, H)), ("w3", (I, H)), ("w2", (H, I)))
    }
    stored |= {
        "model.layers.0.mlp.gate_proj.weight": noise(20, H),
        f"{layer}.block_sparse_moe.gate.weight": noise(E, H),
        f"{layer}.block_sparse_moe.gate.e_score_correction_bias": noise(E, dtype=torch.float32),
        f"{layer}.block_sparse_moe.shared_experts.up_proj.weight": noise(I, H),
    }
    stored |= {f"{layer}.self_attn.{x}_conv1d.weight": noise(16, 1, 4, seed=ord(x)) for x in "qkv"}
    path = write(tmp_path / "hub", config, stored)
    _, values = read(path)
    gate = torch.stack([stored[f"{layer}.block_sparse_moe.experts.{e}.w1.weight"] for e in range(E)])
    assert equal(experts(values, layer)["gate"], gate)
    memory = again(path, tmp_path, "fused")
    assert equal(
        memory["model.layers.0.mlp.gate_proj.weight"], stored["model.layers.0.mlp.gate_proj.weight"]
    )
    assert equal(memory[f"{layer}.mlp.experts.gate_up_proj"][:, :I], gate)
    parts = [stored[f"{layer}.self_attn.{x}_conv1d.weight"] for x in "qkv"]
    assert equal(memory[f"{layer}.self_attn.conv1d.weight"], torch.cat(parts))
    written = again(tmp_path / "written_fused", tmp_path, "hub", "again")
    assert all(equal(written[name], tensor) for name, tensor in stored.items())


def test_minimax_m3_composite_splits_what_is_fused_in_memory(tmp_path: Path) -> None:
    text = {
        "model_type": "minimax_m3_vl_text",
        "num_hidden_layers": 2,
        "mlp_layer_types": ["dense", "sparse"],
    }
    text |= {"num_local_experts": E, "hidden_size": H, "intermediate_size": I}
    config = {"model_type": "minimax_m3_vl", "text_config": text}
    layer = "language_model.model.layers.1"
    at = f"{layer}.block_sparse_moe"
    stored = {
        f"{at}.experts.{e}.{name}.weight": noise(*shape, seed=e)
        for e in range(E)
        for name, shape in (("w1", (I, H)), ("w3", (I, H)), ("w2", (H, I)))
    }
    stored |= {
        f"{at}.gate.weight": noise(E, H),
        f"{at}.e_score_correction_bias": noise(E, dtype=torch.float32),
        f"{at}.shared_experts.gate_proj.weight": noise(28, H),
        f"{at}.shared_experts.up_proj.weight": noise(28, H, seed=1),
        f"{at}.shared_experts.down_proj.weight": noise(H, 28),
        "language_model.model.layers.0.mlp.gate_proj.weight": noise(20, H),
        "language_model.model.layers.0.mlp.up_proj.weight": noise(20, H, seed=1),
    }
    path = write(tmp_path / "hub", config, stored)
    _, values = read(path)
    up = torch.stack([stored[f"{at}.experts.{e}.w3.weight"] for e in range(E)])
    assert equal(experts(values, layer)["up"], up)
    memory = again(path, tmp_path, "fused")
    inside = "model.language_model.layers.1.mlp"
    assert equal(memory[f"{inside}.experts.gate_up_proj"][:, I:], up)
    assert equal(memory[f"{inside}.gate.e_score_correction_bias"], stored[f"{at}.e_score_correction_bias"])
    shared = [stored[f"{at}.shared_experts.{name}_proj.weight"] for name in ("gate", "up")]
    assert equal(memory[f"{inside}.shared_experts.gate_up_proj.weight"], torch.cat(shared))
    written = again(tmp_path / "written_fused", tmp_path, "hub", "again")
    assert set(written) == set(stored)
    assert all(equal(written[name], tensor) for name, tensor in stored.items())


def ernie_vl() -> tuple[dict[str, Any], Tensors]:
    """Its config, and a layer as published: text experts first, then those for images."""
    text = {"model_type": "ernie4_5_vl_moe_text", "num_hidden_layers": 1, "mlp_layer_types": ["sparse"]}
    text |= {"moe_num_experts": E, "hidden_size": H, "moe_intermediate_size": [I, 6]}
    stored = {
        f"{LAYER}.mlp.experts.{number}.{name}_proj.weight": noise(*shape, seed=number)
        for first, inner in ((0, I), (E, 6))
        for number in range(first, first + E)
        for name, shape in (("gate", (inner, H)), ("up", (inner, H)), ("down", (H, inner)))
    }
    stored |= {
        f"{LAYER}.mlp.gate.weight": noise(H, E, dtype=torch.float32),
        f"{LAYER}.mlp.gate.weight_1": noise(H, E, dtype=torch.float32, seed=1),
        f"{LAYER}.mlp.moe_statics.e_score_correction_bias": noise(2, E, dtype=torch.float32),
        "model.vision_model.blocks.0.norm1.weight": noise(16),
        "model.resampler_model.spatial_linear.2.weight": noise(16, 16),
    }
    return {"model_type": "ernie4_5_vl_moe", "text_config": text}, stored


def test_ernie4_5_vl_moe_has_two_kinds_of_experts_in_one_list(tmp_path: Path) -> None:
    config, stored = ernie_vl()
    path = write(tmp_path / "hub", config, stored)
    _, values = read(path)
    stacks = {
        (kind, name): torch.stack(
            [stored[f"{LAYER}.mlp.experts.{n}.{name}_proj.weight"] for n in range(first, first + E)]
        )
        for kind, first in (("text", 0), ("vision", E))
        for name in ("gate", "up", "down")
    }
    assert_experts(experts(values, LAYER), {n: t for (kind, n), t in stacks.items() if kind == "text"})
    images = {name: tensor for (kind, name), tensor in stacks.items() if kind == "vision"}
    assert_experts(experts(values, LAYER, "vision"), images)
    memory = again(path, tmp_path, "fused")
    inside = f"{INSIDE}.mlp"
    bias = stored[f"{LAYER}.mlp.moe_statics.e_score_correction_bias"]
    for row, (kind, router) in enumerate((("text", "gate.weight"), ("vision", "gate.weight_1"))):
        at = f"{inside}.{kind}_moe"
        gate_up = torch.cat([stacks[kind, "gate"], stacks[kind, "up"]], 1)
        assert equal(memory[f"{at}.experts.gate_up_proj"], gate_up)
        assert equal(memory[f"{at}.experts.down_proj"], stacks[kind, "down"])
        assert equal(memory[f"{at}.gate.weight"], stored[f"{LAYER}.mlp.{router}"].T)
        assert equal(memory[f"{at}.gate.moe_statics.e_score_correction_bias"], bias[row : row + 1])
    assert "model.vision_tower.blocks.0.norm1.weight" in memory
    assert "model.resampler_model.spatial_linear.fc2.weight" in memory
    written = again(tmp_path / "written_fused", tmp_path, "hub", "again")
    assert set(written) == set(stored)
    outside(written, stored)


@pytest.mark.parametrize("lost", range(2 * E))
def test_a_missing_expert_of_either_kind_is_named(lost: int, tmp_path: Path) -> None:
    config, stored = ernie_vl()
    kept = {name: t for name, t in stored.items() if f".experts.{lost}." not in name}
    last = lost in (E - 1, 2 * E - 1)  # then nothing tells before the numbers of experts are compared
    with pytest.raises((UnreadableError, MismatchError), match="experts" if last else "is missing"):
        plan_for(write(tmp_path / "hub", config, kept))


def test_the_size_of_experts_for_images_is_checked(tmp_path: Path) -> None:
    config, stored = ernie_vl()
    config["text_config"]["moe_intermediate_size"] = [I, 7]
    with pytest.raises(MismatchError, match=r"moe_intermediate_size\.1 7, the checkpoint has 6"):
        plan_for(write(tmp_path / "hub", config, stored))


def test_a_layer_without_experts_for_images_is_refused(tmp_path: Path) -> None:
    config, stored = ernie_vl()
    text = {
        name: t for name, t in stored.items() if not any(f".experts.{n}." in name for n in range(E, 2 * E))
    }
    with pytest.raises(MismatchError, match=r"has no .*gate vision.* of its experts"):
        plan_for(write(tmp_path / "hub", config, text))


def test_half_of_what_is_published_as_one_is_refused(tmp_path: Path) -> None:
    config, stored = ernie_vl()
    memory = again(write(tmp_path / "hub", config, stored), tmp_path, "fused")
    del memory[f"{INSIDE}.mlp.vision_moe.gate.moe_statics.e_score_correction_bias"]
    with pytest.raises(MismatchError, match=r"vision_moe\.gate\.moe_statics.* is missing"):
        plan_for(write(tmp_path / "half", config, memory))


def test_parts_of_different_dtypes_are_not_joined(tmp_path: Path) -> None:
    config, stored = ernie_vl()
    memory = again(write(tmp_path / "hub", config, stored), tmp_path, "fused")
    name = f"{INSIDE}.mlp.text_moe.gate.moe_statics.e_score_correction_bias"
    memory[name] = memory[name].to(torch.bfloat16)
    with pytest.raises(MismatchError, match="holds them as one tensor"):
        plan_for(write(tmp_path / "half", config, memory))


def test_deepseek_v4_gets_its_published_names_back_from_transformers_mixture(tmp_path: Path) -> None:
    config = {"model_type": "deepseek_v4", "num_hidden_layers": 1, "n_routed_experts": E, "hidden_size": H}
    layer = "layers.0"
    stored = {
        f"{layer}.ffn.experts.{e}.{name}.weight": noise(*shape, seed=e)
        for e in range(E)
        for name, shape in (("w1", (I, H)), ("w3", (I, H)), ("w2", (H, I)))
    }
    stored |= {
        f"{layer}.attn.kv_norm.weight": noise(8),
        f"{layer}.attn.compressor.norm.weight": noise(8, seed=1),
        f"{layer}.attn.indexer.compressor.norm.weight": noise(8, seed=2),
        f"{layer}.attn.indexer.weights_proj.weight": noise(2, H),
        f"{layer}.attn_norm.weight": noise(H),
        f"{layer}.hc_attn_fn": noise(24, H),
        f"{layer}.ffn.gate.bias": noise(E, dtype=torch.float32),
        f"{layer}.ffn.shared_experts.w1.weight": noise(I, H),
        "embed.weight": noise(64, H),
        "head.weight": noise(64, H, seed=1),
        "hc_head_fn": noise(4, H),
    }
    path = write(tmp_path / "hub", config | {"moe_intermediate_size": I}, stored)
    _, values = read(path)
    down = torch.stack([stored[f"{layer}.ffn.experts.{e}.w2.weight"] for e in range(E)])
    assert equal(experts(values, layer)["down"], down)
    memory = again(path, tmp_path, "fused")
    named = {
        "self_attn.kv_norm.weight": "attn.kv_norm.weight",
        "self_attn.compressor.kv_norm.weight": "attn.compressor.norm.weight",
        "self_attn.compressor.indexer.kv_norm.weight": "attn.indexer.compressor.norm.weight",
        "self_attn.compressor.indexer.scorer.weights_proj.weight": "attn.indexer.weights_proj.weight",
        "input_layernorm.weight": "attn_norm.weight",
        "attn_hc.fn": "hc_attn_fn",
        "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
        "mlp.shared_experts.gate_proj.weight": "ffn.shared_experts.w1.weight",
    }
    outside(memory, {f"model.{layer}.{own}": stored[f"{layer}.{name}"] for own, name in named.items()})
    assert equal(memory["model.embed_tokens.weight"], stored["embed.weight"])
    assert equal(memory["lm_head.weight"], stored["head.weight"])
    assert equal(memory["model.hc_head.hc_fn"], stored["hc_head_fn"])
    mixture = {
        f"model.{name}".replace("attn.kv_norm", "attn.norm") if name.startswith(layer) else name: tensor
        for name, tensor in stored.items()
    }
    path = write(tmp_path / "saved", config | {"moe_intermediate_size": I}, mixture)
    for source in (path, tmp_path / "written_fused"):
        written = again(source, tmp_path, "hub", f"again_{source.name}")
        assert set(written) == set(stored)
        outside(written, stored)


def test_a_tensor_under_its_published_name_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    stored = {name: noise(8) for name in ("layers.0.attn_norm.weight", "model.layers.0.attn_norm.weight")}
    path = write(tmp_path / "hub", {"model_type": "deepseek_v4", "num_hidden_layers": 1}, stored)
    with pytest.raises(UnreadableError, match=r"layers\.0\.attn_norm\.weight is in the files twice"):
        read(path)


@pytest.mark.parametrize("inside", ["", "language_model."], ids=["as_published", "of_newer_releases"])
def test_qwen3_omni_moe_leaves_its_talker_alone(tmp_path: Path, inside: str) -> None:
    """The talker's experts have a size that the thinker's config does not state."""
    text = {"model_type": "qwen3_omni_moe_text", "num_hidden_layers": 1, "num_experts": E, "hidden_size": H}
    config = {"thinker_config": {"text_config": text | {"moe_intermediate_size": I}}}
    layer = "thinker.model.layers.0"
    stored = {
        f"{at}.mlp.experts.{e}.{name}_proj.weight": noise(*shape, seed=e)
        for at, inner in ((f"thinker.model.{inside}layers.0", I), ("talker.model.layers.0", 6))
        for e in range(E)
        for name, shape in (("gate", (inner, H)), ("up", (inner, H)), ("down", (H, inner)))
    } | {f"thinker.model.{inside}layers.0.mlp.gate.weight": noise(E, H)}
    path = write(tmp_path / "hub", config | {"model_type": "qwen3_omni_moe"}, stored)
    thinker = {name.replace(inside, ""): tensor for name, tensor in stored.items() if "thinker" in name}
    expected = {
        name: torch.stack([thinker[f"{layer}.mlp.experts.{e}.{name}_proj.weight"] for e in range(E)])
        for name in ("gate", "up", "down")
    }
    checkpoint, values = read(path)
    assert_experts(experts(values, layer), expected)
    assert [moe.layer_path for moe in checkpoint.moe_layers] == [layer]
    talker = {name: tensor for name, tensor in stored.items() if "talker" in name}
    assert set(again(path, tmp_path, "hub")) == set(thinker) | set(talker)
    memory = again(path, tmp_path, "fused")
    outside(memory, talker)
    assert equal(memory[f"{layer}.mlp.experts.down_proj"], expected["down"])


@pytest.mark.parametrize("budget", [1 << 17, 1 << 20])
@pytest.mark.parametrize("seed", range(6))
def test_an_element_that_differs_in_transposed_matrices_is_named(
    seed: int, budget: int, tmp_path: Path
) -> None:
    """Both sides are compared as they lie, and the index named is the canonical one."""
    width, inner = 96, 40
    config = {"model_type": "gpt_oss", "num_hidden_layers": 1, "num_local_experts": E, "hidden_size": width}
    at = "model.layers.0.mlp.experts"
    stored = {
        f"{at}.gate_up_proj": noise(E, width, 2 * inner),
        f"{at}.gate_up_proj_bias": noise(E, 2 * inner),
        f"{at}.down_proj": noise(E, inner, width),
        f"{at}.down_proj_bias": noise(E, width),
    }
    a = write(tmp_path / "a", config | {"intermediate_size": inner}, stored)
    how = api.Execution(max_memory=budget, workers=2)
    assert api.verify(a, a, how=how).passed
    generator = torch.Generator().manual_seed(seed)
    changed = stored[f"{at}.gate_up_proj"].clone()
    e, h, c = (int(torch.randint(size, (), generator=generator)) for size in changed.shape)
    changed[e, h, c] += 1
    b = write(
        tmp_path / "b", config | {"intermediate_size": inner}, stored | {f"{at}.gate_up_proj": changed}
    )
    (difference,) = api.verify(a, b, how=how).differences
    flat = (e * inner + c // 2) * width + h
    assert difference.name.endswith(f".{('gate', 'up')[c % 2]}.weight")
    assert f"(flat index {flat})" in difference.message
    api.convert(a, tmp_path / "dcp", to="dcp", world=2, how=how)
    assert api.verify(tmp_path / "dcp", a, config=a, how=how).passed
    (difference,) = api.verify(tmp_path / "dcp", b, config=a, how=how).differences
    assert f"(flat index {flat})" in difference.message


# ---- layouts of one family each


def test_inkling_alternates_rows(tmp_path: Path) -> None:
    text = {"num_hidden_layers": 1, "n_routed_experts": E, "hidden_size": H, "moe_intermediate_size": I}
    at = "model.llm.layers.0.mlp"
    both, down = noise(E, 2 * I, H), noise(E, H, I)
    bias = noise(E, dtype=torch.float32)
    stored = {f"{at}.experts.w13_weight": both, f"{at}.experts.w2_weight": down, f"{at}.gate.bias": bias}
    path = write(tmp_path / "hub", {"model_type": "inkling_mm_model", "text_config": text}, stored)
    expected = {"gate": both[:, 0::2], "up": both[:, 1::2], "down": down}
    assert_experts(experts(read(path)[1], "model.llm.layers.0"), expected)
    memory = again(path, tmp_path, "fused")
    assert equal(
        memory[f"{INSIDE}.mlp.experts.gate_up_proj"], torch.cat([expected["gate"], expected["up"]], 1)
    )
    assert equal(memory[f"{INSIDE}.mlp.gate.e_score_correction_bias"], bias)
    outside(again(tmp_path / "written_fused", tmp_path, "hub", "again"), stored)


def test_mistral_large4_has_mistrals_own_names(tmp_path: Path) -> None:
    text = {
        "model_type": "mistral_large4_text", "num_hidden_layers": 1, "first_k_dense_replace": 0,
        "n_routed_experts": E, "hidden_size": H, "moe_intermediate_size": I,
    }  # fmt: skip
    stored = {
        f"layers.0.experts.{e}.{name}.weight": noise(*shape, seed=e)
        for e in range(E)
        for name, shape in (("w1", (I, H)), ("w3", (I, H)), ("w2", (H, I)))
    }
    dense = {
        "tok_embeddings.weight": ("model.language_model.embed_tokens.weight", noise(64, H)),
        "output.weight": ("lm_head.weight", noise(64, H, seed=1)),
        "layers.0.attention.wo.weight": (f"{INSIDE}.self_attn.o_proj.weight", noise(H, H)),
        "layers.0.attention.indexer.wk.weight": (f"{INSIDE}.self_attn.indexer.wk.weight", noise(16, H)),
        "layers.0.ffn_norm.weight": (f"{INSIDE}.post_attention_layernorm.weight", noise(H)),
        "layers.0.gate.weight": (f"{INSIDE}.mlp.gate.weight", noise(E, H)),
        "layers.0.shared_experts.w3.weight": (f"{INSIDE}.mlp.shared_experts.up_proj.weight", noise(28, H)),
    }
    stored |= {name: tensor for name, (_, tensor) in dense.items()}
    path = write(tmp_path / "hub", {"model_type": "mistral_large4", "text_config": text}, stored)
    expected = {
        projection: torch.stack([stored[f"layers.0.experts.{e}.{name}.weight"] for e in range(E)])
        for projection, name in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    }
    assert_experts(experts(read(path)[1], "layers.0"), expected)
    memory = again(path, tmp_path, "fused")
    fused = torch.cat([expected["gate"], expected["up"]], 1)
    assert equal(memory[f"{INSIDE}.mlp.experts.gate_up_proj"], fused)
    outside(memory, dict(dense.values()))
    written = again(tmp_path / "written_fused", tmp_path, "hub", "again")
    assert set(written) == set(stored)
    outside(written, stored)


def test_experts_narrower_than_the_model_are_checked_by_their_own_size(tmp_path: Path) -> None:
    config = {
        "model_type": "muse_spark_text", "num_hidden_layers": 1, "num_local_experts": E, "hidden_size": H,
        "moe_hidden_size": 24, "moe_intermediate_size": I,
    }  # fmt: skip
    at = f"{LAYER}.mlp.experts"
    fused, down = noise(E, 2 * I, 24), noise(E, 24, I)
    stored = {
        f"{at}.gate_up_proj": fused,
        f"{at}.down_proj": down,
        "model.embed_tokens.weight": noise(64, H),
    }
    path = write(tmp_path / "hub", config, stored)
    expected = {"gate": fused[:, :I], "up": fused[:, I:], "down": down}
    assert_experts(experts(read(path)[1], LAYER), expected)
    outside(again(path, tmp_path, "hub"), stored)
    with pytest.raises(MismatchError, match="moe_hidden_size 20"):
        plan_for(write(path, config | {"moe_hidden_size": 20}, stored))


def test_dbrx_flattens_experts_into_rows(tmp_path: Path) -> None:
    config = {
        "model_type": "dbrx", "n_layers": 1, "d_model": H,
        "ffn_config": {"moe_num_experts": E, "ffn_hidden_size": I},
    }  # fmt: skip
    at = "transformer.blocks.0.ffn"
    stored = {
        f"{at}.experts.mlp.{name}": noise(E * I, H, seed=n) for n, name in enumerate(("w1", "v1", "w2"))
    }
    stored[f"{at}.router.layer.weight"] = noise(E, H)
    path = write(tmp_path / "hub", config, stored)
    apart = {name: tensor.reshape(E, I, H) for name, tensor in stored.items() if "experts" in name}
    expected = {
        "gate": apart[f"{at}.experts.mlp.w1"],
        "up": apart[f"{at}.experts.mlp.v1"],
        "down": apart[f"{at}.experts.mlp.w2"].transpose(1, 2),
    }
    assert_experts(experts(read(path)[1], "transformer.blocks.0"), expected)
    written = again(path, tmp_path, "hub")
    assert all(equal(written[name], tensor) for name, tensor in stored.items())


def test_step3p7_is_stacked_but_not_fused(tmp_path: Path) -> None:
    text = {"num_hidden_layers": 1, "moe_num_experts": E, "hidden_size": H, "moe_intermediate_size": I}
    stored = {
        f"{LAYER}.moe.gate_proj.weight": noise(E, I, H),
        f"{LAYER}.moe.up_proj.weight": noise(E, I, H, seed=1),
        f"{LAYER}.moe.down_proj.weight": noise(E, H, I),
        f"{LAYER}.moe.gate.weight": noise(E, H),
        f"{LAYER}.moe.router_bias": noise(E, dtype=torch.float32),
        f"{LAYER}.share_expert.up_proj.weight": noise(28, H),
    }
    path = write(tmp_path / "hub", {"model_type": "step3p7", "text_config": text}, stored)
    expected = {name: stored[f"{LAYER}.moe.{name}_proj.weight"] for name in ("gate", "up", "down")}
    assert_experts(experts(read(path)[1], LAYER), expected)
    memory = again(path, tmp_path, "fused")
    at = "model.language_model.layers.0.mlp"
    assert equal(memory[f"{at}.experts.gate_up_proj"], torch.cat([expected["gate"], expected["up"]], 1))
    assert f"{at}.gate.e_score_correction_bias" in memory
    assert f"{at}.shared_experts.up_proj.weight" in memory


def test_nemotron_h_has_no_gate(tmp_path: Path) -> None:
    config = {
        "model_type": "nemotron_h", "num_hidden_layers": 1, "hybrid_override_pattern": "E",
        "n_routed_experts": E, "hidden_size": H, "moe_intermediate_size": I,
    }  # fmt: skip
    at = "backbone.layers.0.mixer.experts"
    stored = {f"{at}.{e}.up_proj.weight": noise(I, H, seed=e) for e in range(E)}
    stored |= {f"{at}.{e}.down_proj.weight": noise(H, I, seed=e) for e in range(E)}
    path = write(tmp_path / "hub", config, stored)
    found = experts(read(path)[1], "backbone.layers.0")
    assert set(found) == {"up", "down"}
    assert set(again(path, tmp_path, "hub")) == set(stored)
    assert "model.layers.0.mixer.experts.up_proj" in again(path, tmp_path, "fused")


# ---- what is refused


def mixtral(tmp_path: Path, **changes: Any) -> Path:
    config = {
        "model_type": "mixtral", "num_hidden_layers": 1, "num_local_experts": E, "hidden_size": H,
        "intermediate_size": I,
    } | changes  # fmt: skip
    stored = {
        f"{LAYER}.block_sparse_moe.experts.{e}.{name}.weight": noise(*shape, seed=e)
        for e in range(E)
        for name, shape in (("w1", (I, H)), ("w3", (I, H)), ("w2", (H, I)))
    }
    return write(tmp_path / "hub", config, stored)


@pytest.mark.parametrize("kind", ["llama", "qwen3_next", "gpt_oss", "dbrx"])
def test_experts_that_a_config_does_not_know_are_refused(kind: str, tmp_path: Path) -> None:
    """They would be written under their names as if they were other tensors, and lost on loading."""
    path = mixtral(tmp_path)
    config = json.loads((path / "config.json").read_text()) | {"model_type": kind}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(MismatchError, match="named like the experts of other families"):
        plan_for(path)


def test_a_config_of_another_family_than_the_checkpoints_own_is_refused(tmp_path: Path) -> None:
    path = mixtral(tmp_path)
    other = tmp_path / "config.json"
    other.write_text(json.dumps(json.loads((path / "config.json").read_text()) | {"model_type": "phimoe"}))
    with pytest.raises(MismatchError, match=r"of the family phimoe.*own config.json one of mixtral"):
        api.convert(path, tmp_path / "out", to="hf", hf_layout="fused", config=other)


def test_config_of_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="intermediate_size 13"):
        plan_for(mixtral(tmp_path, intermediate_size=13))


def test_unknown_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="model_type 'of_tomorrow'"):
        plan_for(mixtral(tmp_path, model_type="of_tomorrow"))


def test_unknown_style_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no form of a Hugging Face model"):
        plan_for(mixtral(tmp_path), "megatron")


def test_missing_projection_is_refused(tmp_path: Path) -> None:
    path = mixtral(tmp_path)
    stored = load_file(path / "model.safetensors")
    kept = {name: tensor for name, tensor in stored.items() if ".w3." not in name}
    write(path, json.loads((path / "config.json").read_text()), kept)
    with pytest.raises(MismatchError, match="has no up weight of its experts"):
        plan_for(path)


# ---- config.json and tied weights


def test_number_of_experts_gets_the_published_name(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen3_moe", "num_hidden_layers": 1, "num_local_experts": E, "hidden_size": H,
        "moe_intermediate_size": I, "dtype": "float32",
    }  # fmt: skip
    at = f"{LAYER}.mlp.experts"
    stored = {f"{at}.gate_up_proj": noise(E, 2 * I, H), f"{at}.down_proj": noise(E, H, I)}
    stored[f"{LAYER}.mlp.gate.weight"] = noise(E, H)
    convert(write(tmp_path / "saved", config, stored), tmp_path / "hub")
    written = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert (written["num_experts"], written["num_local_experts"]) == (E, E)
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"


def tied(tmp_path: Path, *, same: bool) -> Path:
    embedding = noise(64, H)
    stored = {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": embedding if same else noise(64, H, seed=9),
    }
    stored["lm_head.weight"] = stored["lm_head.weight"].clone()
    config = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": H, "tie_word_embeddings": True}
    return write(tmp_path / "tied", config, stored)


def test_tied_head_is_stored_once(tmp_path: Path) -> None:
    written = again(tied(tmp_path, same=True), tmp_path, "hub")
    assert set(written) == {"model.embed_tokens.weight"}


def test_tied_head_of_other_values_is_refused(tmp_path: Path) -> None:
    import ckpt_tool

    with pytest.raises(MismatchError, match="differ"):
        ckpt_tool.convert(tied(tmp_path, same=False), tmp_path / "out", to="hf")
