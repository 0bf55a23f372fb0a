"""Between engines: DeepSpeed AutoEP's checkpoints as FSDP2 runs save theirs, back, and published.

The truth is DeepSpeed's own gathered state; the renames are spelled out here by hand.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

import ckpt_tool.api
from ckpt_tool.canonical import MASTER
from ckpt_tool.errors import MismatchError, UsageError
from ckpt_tool.families import family_of
from ckpt_tool.families.autoep import to_autoep
from ckpt_tool.formats.dcp.format import Dcp
from ckpt_tool.formats.dcp.writing.target_options import DcpOptions
from ckpt_tool.formats.registry import open_checkpoint

from .dcp_tools import CHECKPOINTS, FIXTURES, convert, read, states, whole

DEEPSPEED = FIXTURES.parent / "deepspeed"
FILES = {"weight": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


def config_of(name: str) -> dict[str, Any]:
    return dict(json.loads((DEEPSPEED / name / "config.json").read_text()))


def transformers_names(autoep: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """AutoEP's modules back to those transformers builds, by hand."""
    found: dict[str, torch.Tensor] = {}
    for name, value in autoep.items():
        if name.endswith(".experts.w1"):
            up = autoep[name.removesuffix("w1") + "w3"]
            found[name.removesuffix("w1") + "gate_up_proj"] = torch.cat([value, up], dim=1)
        elif name.endswith(".experts.w2"):
            found[name.removesuffix("w2") + "down_proj"] = value
        elif not name.endswith(".experts.w3"):
            plain = name.replace(".router.gate.", ".gate.").replace(".router.e_score", ".gate.e_score")
            found[plain] = value
    return found


def titan_names(autoep: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """AutoEP's modules to torchtitan's DeepSeek-V3, by hand."""
    suffix = {"w1": "w1_EFD", "w2": "w2_EDF", "w3": "w3_EFD"}
    swaps = (
        ("model.embed_tokens.", "tok_embeddings."),
        ("model.norm.", "norm."),
        ("model.layers.", "layers."),
        ("self_attn.kv_a_proj_with_mqa", "attention.wkv_a"),
        ("self_attn.kv_a_layernorm", "attention.kv_norm"),
        ("self_attn.kv_b_proj", "attention.wkv_b"),
        ("self_attn.q_a_proj", "attention.wq_a"),
        ("self_attn.q_a_layernorm", "attention.q_norm"),
        ("self_attn.q_b_proj", "attention.wq_b"),
        ("self_attn.q_proj", "attention.wq"),
        ("self_attn.o_proj", "attention.wo"),
        ("mlp.router.gate", "moe.router.gate"),
        ("mlp.router.e_score_correction_bias", "moe.expert_bias_E"),
        ("mlp.shared_experts.gate_proj", "moe.shared_experts.w1"),
        ("mlp.shared_experts.up_proj", "moe.shared_experts.w3"),
        ("mlp.shared_experts.down_proj", "moe.shared_experts.w2"),
        ("mlp.gate_proj", "feed_forward.w1"),
        ("mlp.up_proj", "feed_forward.w3"),
        ("mlp.down_proj", "feed_forward.w2"),
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "ffn_norm"),
    )
    found = {}
    for name, value in autoep.items():
        head, _, last = name.rpartition(".")
        if head.endswith(".mlp.experts"):
            name = f"{head.removesuffix('mlp.experts')}moe.routed_experts.inner_experts.{suffix[last]}"
        for old, new in swaps:
            name = name.replace(old, new)
        found[name] = value
    return found


def truth_of(name: str, kind: str) -> dict[str, torch.Tensor]:
    return load_file(DEEPSPEED / name / "oracle" / f"{kind}.safetensors")


CASES = [
    ("mixtral_w4e2", "accelerate", transformers_names, {"world": 4, "ep": 2}),
    ("mixtral_odd_w4e2", "plain", transformers_names, {"world": 3}),
    ("deepseek_v3_w2e2", "plain", transformers_names, {"world": 2, "ep": 2}),
    ("deepseek_v3_w2e2", "torchtitan", titan_names, {"world": 4, "ep": 2}),
]


@pytest.mark.parametrize(("name", "style", "rename", "topology"), CASES, ids=lambda v: str(v)[:20])
def test_autoep_to_fsdp2(
    name: str, style: str, rename: Any, topology: dict[str, int], tmp_path: Path
) -> None:
    """torch's own loader finds DeepSpeed's gathered masters and moments under the run's names."""
    convert(
        DEEPSPEED / name / "checkpoint", tmp_path / "c", style=style, config=config_of(name), **topology
    )
    dirs = {"accelerate": ("pytorch_model_fsdp_0", "optimizer_0")}.get(style, (".", "."))
    for state, kind in FILES.items():
        truth = rename(truth_of(name, kind))
        if state == "weight":
            keys = {key if style == "torchtitan" else f"model.{key}": key for key in truth}
        else:
            keys = {f"optimizer.state.{key}.{state}": key for key in truth}
        loaded = {saved: torch.zeros_like(truth[key]) for saved, key in keys.items()}
        where = tmp_path / "c" / dirs[state != "weight"]
        dcp.load(loaded, checkpoint_id=where, no_dist=True)
        assert all(torch.equal(loaded[saved], truth[key]) for saved, key in keys.items())


def test_buffers_travel_under_the_targets_name(tmp_path: Path) -> None:
    name = "deepseek_v3_w2e2"
    convert(DEEPSPEED / name / "checkpoint", tmp_path / "c", style="torchtitan", config=config_of(name))
    reader, checkpoint = read(tmp_path / "c")
    bias = next(t for t in checkpoint.tensors if str(t.name).endswith("expert_bias_E"))
    buffers = truth_of(name, "buffers")
    layer = str(bias.name).split(".")[1]
    expected = next(v for key, v in buffers.items() if f".{layer}." in key and "e_score" in key)
    assert torch.equal(whole(reader, bias), expected)


def test_groups_that_autoep_splits_are_one_again(tmp_path: Path) -> None:
    """AdamW's options as the DeepSpeed run had them, complete, and every parameter in one group."""
    name = "mixtral_w4e2"
    convert(DEEPSPEED / name / "checkpoint", tmp_path / "c", config=config_of(name), world=2)
    _, checkpoint = read(tmp_path / "c")
    (group,) = checkpoint.training.param_groups
    assert (group.options["lr"], group.options["weight_decay"]) == (0.01, 0.01)
    assert group.options["decoupled_weight_decay"] is True
    assert "name" not in group.options
    assert set(group.parameters) == {t.name for t in checkpoint.tensors if t.state == MASTER}


@pytest.mark.parametrize(
    "name", ["mixtral_w4e2", "deepseek_v3_w2e2", "qwen2_moe_w2e2", "qwen3_moe_w2e2_tied"]
)
def test_to_fsdp2_and_back_has_autoeps_names(name: str, tmp_path: Path) -> None:
    config = config_of(name)
    source = DEEPSPEED / name / "checkpoint"
    convert(source, tmp_path / "c", style="transformers", world=3, ep=1, config=config)
    shutil.copy(DEEPSPEED / name / "config.json", tmp_path / "c")  # it says whether weights are tied
    _, original = open_checkpoint(source)
    _, checkpoint = read(tmp_path / "c")
    back = to_autoep(checkpoint, family_of(config))
    assert set(back.by_key()) == set(original.by_key())
    assert {t.label(): t.shape for t in back.tensors} == {t.label(): t.shape for t in original.tensors}
    assert {layer.module for layer in back.moe_layers} == {layer.module for layer in original.moe_layers}
    assert back.scalars.keys() == original.scalars.keys()
    assert back.dialect == original.dialect


def test_names_change_only_with_a_config(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--config"):
        convert(DEEPSPEED / "mixtral_w4e2" / "checkpoint", tmp_path / "c")


def test_torchtitan_has_no_names_for_mixtral(tmp_path: Path) -> None:
    config = config_of("mixtral_w4e2")
    with pytest.raises(UsageError, match="torchtitan's names"):
        convert(
            DEEPSPEED / "mixtral_w4e2" / "checkpoint", tmp_path / "c", style="torchtitan", config=config
        )


def test_a_torchtitan_name_without_a_rule_is_refused(tmp_path: Path) -> None:
    dcp.save(
        {"layers.0.attention.wqkv.weight": torch.ones(3, 2), "tok_embeddings.weight": torch.ones(3, 2)},
        checkpoint_id=tmp_path / "c",
        no_dist=True,
    )
    _, checkpoint = open_checkpoint(tmp_path / "c")
    with pytest.raises(MismatchError, match="wqkv"):
        to_autoep(checkpoint, family_of({"model_type": "qwen3_moe"}))


def test_scheduler_of_another_engine_is_left_out_and_said_so() -> None:
    name = "mixtral_odd_w4e2"
    _, checkpoint = open_checkpoint(DEEPSPEED / name / "checkpoint")
    layout = Dcp().layout(checkpoint, DcpOptions(config=config_of(name)))
    assert any("scheduler's state is left out" in note for note in layout.notes)


# ---- published


@pytest.mark.parametrize("name", ["mixtral_accelerate_w2", "qwen3_moe_transformers_w2e2", "dense_tied_w3"])
def test_consolidated_has_published_names(name: str, tmp_path: Path) -> None:
    shutil.copytree(CHECKPOINTS[name], tmp_path / "c")
    shutil.copy(FIXTURES / name / "config.json", tmp_path / "c")
    ckpt_tool.api.consolidate(tmp_path / "c", tmp_path / "hub")
    found = load_file(tmp_path / "hub" / "model.safetensors")
    truth = load_file(FIXTURES / name / "oracle" / "weight.safetensors")
    block = "block_sparse_moe" if "mixtral" in name else "mlp"
    names = {"gate": "w1", "up": "w3", "down": "w2"} if "mixtral" in name else {}
    expected = {}
    for key, value in truth.items():
        layer = key.rpartition(".mlp.")[0]
        if key.endswith("gate_up_proj"):
            for part, half in zip(("gate", "up"), value.chunk(2, dim=1), strict=True):
                for e, matrix in enumerate(half):
                    expected[f"{layer}.{block}.experts.{e}.{names.get(part, part + '_proj')}.weight"] = (
                        matrix
                    )
        elif key.endswith("experts.down_proj"):
            for e, matrix in enumerate(value):
                expected[f"{layer}.{block}.experts.{e}.{names.get('down', 'down_proj')}.weight"] = matrix
        else:
            expected[key.replace(".mlp.gate.", f".{block}.gate.")] = value
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_published_weights_become_a_run_s(tmp_path: Path) -> None:
    """A model from the hub, as a run of world 4 with EP 2 reads its part of it."""
    name = "mixtral_accelerate_w2"
    shutil.copytree(CHECKPOINTS[name], tmp_path / "c")
    shutil.copy(FIXTURES / name / "config.json", tmp_path / "c")
    ckpt_tool.api.consolidate(tmp_path / "c", tmp_path / "hub")
    convert(tmp_path / "hub", tmp_path / "out", world=4, ep=2, style="transformers")
    reader, checkpoint = read(tmp_path / "out")
    truth = load_file(FIXTURES / name / "oracle" / "weight.safetensors")
    found = {key: value for (key, _), value in states(reader, checkpoint).items()}
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[key], value) for key, value in truth.items())
