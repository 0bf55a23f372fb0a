"""Families: the tables load, names are transformers' own, and a config that does not fit is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ckpt_tool import api
from ckpt_tool.canonical import PROJECTIONS, ExpertName, Role
from ckpt_tool.errors import CkptToolError, MismatchError, UnreadableError, UsageError
from ckpt_tool.families import families, family_of
from tests import synthetic
from tests.conftest import ZERO3, checkpoint_of, config_of, raw
from tests.synthetic import Layer, Save, uniform

DATA = Path(__file__).parent.parent.parent / "ckpt_tool" / "families"


def config(name: str, **changes: Any) -> dict[str, Any]:
    return {**json.loads(config_of(name).read_text()), **changes}


def consolidate(name: str, tmp_path: Path, changed: dict[str, Any]) -> Path:
    """Publish a fixture with another config; returns the directory."""
    (tmp_path / "config.json").write_text(json.dumps(changed))
    api.consolidate(checkpoint_of(name), tmp_path / "out", config=tmp_path / "config.json")
    return tmp_path / "out"


# ---- the tables


def test_every_file_loads_and_every_table_is_a_family() -> None:
    tables = [
        name
        for path in DATA.glob("*.toml")
        for name in re.findall(r"^\[(\w+)\]", path.read_text(), re.MULTILINE)
        if name != "defaults"
    ]
    assert tables
    assert sorted(tables) == sorted(family.name for family in families())


def test_no_model_type_is_claimed_twice() -> None:
    kinds = [kind for family in families() for kind in family.model_types]
    assert len(kinds) == len(set(kinds))
    assert all(kinds)


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_a_family_is_found_by_each_of_its_model_types(family: Any) -> None:
    for kind in family.model_types:
        own, _, text = kind.partition("/")
        found = {"model_type": own, "text_config": {"model_type": text}} if text else {"model_type": own}
        assert family_of(found) is family


@pytest.mark.parametrize(
    "kind", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "llama"]
)
def test_the_family_of_each_fixture_is_known(kind: str) -> None:
    assert kind in family_of({"model_type": kind}).model_types


@pytest.mark.parametrize("kind", ["unheard_of", None, 3, ["mixtral"]], ids=str)
def test_an_unknown_model_type_is_refused_and_not_guessed(kind: Any) -> None:
    with pytest.raises(UsageError) as raised:
        family_of({"model_type": kind} if kind is not None else {})
    assert "ckpt-tool families" in str(raised.value)


# ---- names, both ways


EXPERTS = {
    "mixtral_w2e1": "model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight",
    "qwen2_moe_w2e2": "model.layers.{layer}.mlp.experts.{expert}.{name}.weight",
    "qwen3_moe_w2e2_tied": "model.layers.{layer}.mlp.experts.{expert}.{name}.weight",
    "deepseek_v2_w2e2": "model.layers.{layer}.mlp.experts.{expert}.{name}.weight",
    "deepseek_v3_w2e2": "model.layers.{layer}.mlp.experts.{expert}.{name}.weight",
}
PROJECTION_NAMES = {
    "mixtral_w2e1": {"w1": "w1", "w2": "w2", "w3": "w3"},
    **{
        name: {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
        for name in EXPERTS
        if "mixtral" not in name
    },
}
ROUTERS = {
    "mixtral_w2e1": (".mlp.router.gate.", ".block_sparse_moe.gate."),
    "qwen2_moe_w2e2": (".mlp.router.gate.", ".mlp.gate."),
    "qwen3_moe_w2e2_tied": (".mlp.router.gate.", ".mlp.gate."),
    "deepseek_v2_w2e2": (".mlp.router.gate.", ".mlp.gate."),
    "deepseek_v3_w2e2": (".mlp.router.gate.", ".mlp.gate."),
}


def expected_names(name: str) -> dict[str, torch.Tensor]:
    """What published files must hold, by rules written out here for each fixture's family."""
    directory = checkpoint_of(name).parent / "oracle"
    found = {}
    for file in ("fp32", "frozen", "buffers"):
        if not (directory / f"{file}.safetensors").exists():
            continue
        for key, tensor in load_file(directory / f"{file}.safetensors").items():
            expert = re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(w[123])", key)
            if expert:
                for number, matrix in enumerate(tensor):
                    pattern = EXPERTS[name]
                    own = PROJECTION_NAMES[name][expert[2]]
                    found[pattern.format(layer=expert[1], expert=number, name=own)] = matrix
                continue
            new = key.replace(*ROUTERS.get(name, ("", "")))
            new = new.replace(".mlp.router.e_score", ".mlp.gate.e_score")
            if name.startswith("qwen2"):
                new = new.replace(".shared_experts_gate.", ".shared_expert_gate.")
                new = new.replace(".shared_experts.", ".shared_expert.")
            found[new] = tensor
    return found


@pytest.mark.parametrize("name", EXPERTS)
def test_published_names_and_values_are_the_familys(name: str, tmp_path: Path) -> None:
    out = consolidate(name, tmp_path, config(name))
    found = load_file(out / "model.safetensors")
    expected = expected_names(name)
    assert sorted(found) == sorted(expected)
    assert {key: raw(tensor) for key, tensor in found.items()} == {
        key: raw(tensor) for key, tensor in expected.items()
    }


@pytest.mark.parametrize("name", ZERO3)
def test_published_files_are_read_back_as_the_same_stacks(name: str, tmp_path: Path) -> None:
    source = api.catalogue(checkpoint_of(name))
    back = api.catalogue(consolidate(name, tmp_path, config(name)))
    stacks = {
        t.name: t.shape for t in source.tensors if isinstance(t.name, ExpertName) and t.state == "master"
    }
    assert {t.name: t.shape for t in back.tensors if isinstance(t.name, ExpertName)} == stacks
    assert {layer.num_experts for layer in back.moe_layers} == {
        layer.num_experts for layer in source.moe_layers
    }
    assert back.topology.world_size is None


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_every_name_of_an_expert_tensor_is_found_again(family: Any) -> None:
    """Key and match are inverse, for each layout of each form, at any depth of the module path."""
    for stored in (*family.hub, *family.fused, *family.also):
        for path in ("model.layers.0", "model.language_model.layers.12"):
            for expert in (0, 7, 123) if stored.per_expert else (None,):
                number = None if expert is None else expert + 1000 * stored.after
                match = family.match(stored.key(path, number), {"E": 1000})
                assert match is not None, stored
                assert (match.layer_path, match.expert) == (path, expert)
                assert stored in match.layouts
                assert all(name.layer_path == path for name in stored.names(path))


@pytest.mark.parametrize("family", [f for f in families() if f.hub], ids=lambda family: family.name)
def test_every_family_holds_all_projections_once(family: Any) -> None:
    for form in (family.hub, family.fused):
        weights = [p for stored in form if stored.part == "weight" for p in stored.projections]
        assert not form or set(weights) in (set(PROJECTIONS), {"up", "down"}), weights


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_dense_names_are_no_experts(family: Any) -> None:
    for name in ("model.layers.0.mlp.gate.weight", "model.embed_tokens.weight", "lm_head.weight", ""):
        assert family.match(name, {}) is None


def test_two_kinds_of_experts_in_one_list_need_their_number() -> None:
    family = family_of({"model_type": "ernie4_5_vl_moe"})
    with pytest.raises(UnreadableError, match="how many there are of each"):
        family.match("model.layers.0.mlp.experts.3.up_proj.weight", {})


def test_the_router_stays_fp32_in_a_bf16_export(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config("deepseek_v3_w2e2")))
    result = api.consolidate(
        checkpoint_of("deepseek_v3_w2e2"), tmp_path / "out", config=tmp_path, dtype="bf16", verify=True
    )
    found = load_file(tmp_path / "out" / "model.safetensors")
    kept = {name for name, tensor in found.items() if tensor.dtype is torch.float32}
    gate = "model.layers.1.mlp.gate"
    assert kept == {f"{gate}.weight", f"{gate}.e_score_correction_bias"}
    assert any("e_score_correction_bias" in note for note in result.notes)


def test_tied_weights_are_published_once(tmp_path: Path) -> None:
    out = consolidate("qwen3_moe_w2e2_tied", tmp_path, config("qwen3_moe_w2e2_tied"))
    found = load_file(out / "model.safetensors")
    assert "lm_head.weight" not in found
    assert "model.embed_tokens.weight" in found


# ---- a config.json that does not describe the checkpoint


def refuses(name: str, tmp_path: Path, changed: dict[str, Any], *words: str) -> None:
    with pytest.raises(MismatchError) as raised:
        consolidate(name, tmp_path, changed)
    for word in words:
        assert word in str(raised.value), str(raised.value)
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]


@pytest.mark.parametrize("stated", [1, 3, 32])
def test_refuses_another_number_of_layers(stated: int, tmp_path: Path) -> None:
    changed = config("mixtral_w2e1", num_hidden_layers=stated)
    refuses("mixtral_w2e1", tmp_path, changed, "num_hidden_layers", str(stated), "2")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("mixtral_w2e1", "num_local_experts"),
        ("qwen2_moe_w2e2", "num_experts"),
        ("deepseek_v3_w2e2", "n_routed_experts"),
    ],
)
def test_refuses_more_experts_than_the_checkpoint_has(name: str, key: str, tmp_path: Path) -> None:
    """E / EP experts are what an expert-parallel model saves that ZeRO-3 wrapped without AutoEP."""
    changed = config(name)
    changed.pop("num_local_experts", None)
    refuses(name, tmp_path, {**changed, key: 8}, key, "8", "lost")


def test_refuses_fewer_experts_than_the_checkpoint_has(tmp_path: Path) -> None:
    refuses("mixtral_w2e1", tmp_path, config("mixtral_w2e1", num_local_experts=2), "2", "4")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("mixtral_w2e1", "intermediate_size"),
        ("qwen2_moe_w2e2", "moe_intermediate_size"),
        ("deepseek_v2_w2e2", "moe_intermediate_size"),
    ],
)
def test_refuses_another_expert_size(name: str, key: str, tmp_path: Path) -> None:
    refuses(name, tmp_path, config(name, **{key: 99}), key, "99")


@pytest.mark.parametrize("name", ["mixtral_w2e1", "dense_w3"])
def test_refuses_another_hidden_size(name: str, tmp_path: Path) -> None:
    refuses(name, tmp_path, config(name, hidden_size=99), "hidden_size", "99")


@pytest.mark.parametrize("name", ["mixtral_w2e1", "dense_w3"])
def test_refuses_another_vocabulary(name: str, tmp_path: Path) -> None:
    refuses(name, tmp_path, config(name, vocab_size=99), "vocab_size", "99")


def test_refuses_tied_embeddings_where_the_checkpoint_has_two(tmp_path: Path) -> None:
    changed = config("mixtral_w2e1", tie_word_embeddings=True)
    refuses("mixtral_w2e1", tmp_path, changed, "tie_word_embeddings", "lm_head.weight")


@pytest.mark.parametrize("stated", [False, None])
def test_refuses_untied_embeddings_where_the_checkpoint_has_one(stated: Any, tmp_path: Path) -> None:
    changed = config("qwen3_moe_w2e2_tied")
    changed.pop("tie_word_embeddings")
    changed |= {} if stated is None else {"tie_word_embeddings": stated}
    refuses("qwen3_moe_w2e2_tied", tmp_path, changed, "tie_word_embeddings", "tied")


MOE_LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "first layer dense where it is not": ("deepseek_v2_w2e2", {"first_k_dense_replace": 1}),
    "first layer not dense where it is": ("deepseek_v3_w2e2", {"first_k_dense_replace": 0}),
    "every second layer": ("qwen2_moe_w2e2", {"decoder_sparse_step": 2}),
    "a layer named as dense": ("qwen3_moe_w2e2_tied", {"mlp_only_layers": [1]}),
}


@pytest.mark.parametrize("which", MOE_LAYERS)
def test_refuses_other_moe_layers(which: str, tmp_path: Path) -> None:
    name, changes = MOE_LAYERS[which]
    changed = config(name, **changes)
    for kinds in ("mlp_layer_types", "layer_types"):
        if kinds in changed and "first" in which:
            changed.pop(kinds)
    refuses(name, tmp_path, changed, "MoE")


def test_refuses_a_dense_models_config_for_an_moe_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CkptToolError):
        consolidate("mixtral_w2e1", tmp_path, config("dense_w3"))
    assert not (tmp_path / "out").exists()


def test_refuses_an_moe_models_config_for_a_dense_checkpoint(tmp_path: Path) -> None:
    changed = config("mixtral_w2e1", hidden_size=config("dense_w3")["hidden_size"])
    with pytest.raises(CkptToolError):
        consolidate("dense_w3", tmp_path, changed)
    assert not (tmp_path / "out").exists()


def test_refuses_another_familys_config(tmp_path: Path) -> None:
    """deepseek's shared experts have no place in Mixtral."""
    changed = config("deepseek_v2_w2e2", model_type="mixtral", num_local_experts=4)
    with pytest.raises(CkptToolError):
        consolidate("deepseek_v2_w2e2", tmp_path, changed)
    assert not (tmp_path / "out").exists()


def test_refuses_an_unknown_model_type(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unheard_of"):
        consolidate("mixtral_w2e1", tmp_path, config("mixtral_w2e1", model_type="unheard_of"))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"hidden_size": 8}', '{"model_type": null}'])
def test_refuses_a_config_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CkptToolError, match=r"config\.json"):
        api.consolidate(checkpoint_of("mixtral_w2e1"), tmp_path / "out", config=tmp_path)


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_local_experts", "hidden_size", "vocab_size"])
@pytest.mark.parametrize("value", ["2", [2], {}, 2.5], ids=str)
def test_a_config_with_a_size_that_is_none_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(CkptToolError):
        consolidate("mixtral_w2e1", tmp_path, config("mixtral_w2e1", **{key: value}))
    assert not (tmp_path / "out").exists()


def test_experts_without_one_projection_are_refused(tmp_path: Path) -> None:
    """Files of published weights in which layer 0 has no up projections."""
    out = consolidate("mixtral_w2e1", tmp_path, config("mixtral_w2e1"))
    damage(out, lambda name: ".layers.0." in name and name.endswith("w3.weight"))
    with pytest.raises(MismatchError, match="up"):
        api.consolidate(out, tmp_path / "again")


@pytest.mark.parametrize("expert", [0, 2, 3])
def test_a_missing_expert_is_refused(expert: int, tmp_path: Path) -> None:
    out = consolidate("mixtral_w2e1", tmp_path, config("mixtral_w2e1"))
    damage(out, lambda name: f".layers.0.block_sparse_moe.experts.{expert}." in name)
    with pytest.raises(CkptToolError, match=r"expert|experts"):
        api.consolidate(out, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def damage(directory: Path, lost: Callable[[str], bool]) -> None:
    from safetensors.torch import save_file

    tensors = load_file(directory / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if not lost(name)},
        directory / "model.safetensors",
        {"format": "pt"},
    )


def test_a_model_of_hub_files_is_published_again_unchanged(tmp_path: Path) -> None:
    out = consolidate("deepseek_v3_w2e2", tmp_path, config("deepseek_v3_w2e2"))
    api.consolidate(out, tmp_path / "again", dtype="keep")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        out / "model.safetensors"
    ).read_bytes()


@pytest.mark.usefixtures("partial_models")
def test_uneven_placements_are_published_by_global_id(tmp_path: Path) -> None:
    """End to end: experts out of order and replicated on the ranks, in order in the file."""
    layers = [Layer(number, ((3, 1), (0, 2, 1)), 4, 3) for number in (0, 1)]
    full = synthetic.model({"model.embed_tokens.weight": (9, 4), "model.norm.weight": (4,)}, layers)
    synthetic.write(tmp_path / "source", full, Save(world=4))
    stated = {
        **{"model_type": "mixtral", "num_hidden_layers": 2, "num_local_experts": 4, "hidden_size": 4},
        **{"intermediate_size": 3, "vocab_size": 9},
    }
    (tmp_path / "config.json").write_text(json.dumps(stated))
    api.consolidate(tmp_path / "source", tmp_path / "out", config=tmp_path / "config.json", verify=True)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for layer in (0, 1):
        for expert in range(4):
            for weight in ("w1", "w2", "w3"):
                name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{weight}.weight"
                whole = full.parameters[f"model.layers.{layer}.mlp.experts.{weight}"]["fp32"]
                assert raw(found[name]) == raw(whole[expert])


def test_buffers_keep_their_role(tmp_path: Path) -> None:
    checkpoint = api.catalogue(checkpoint_of("deepseek_v3_w2e2"))
    assert {str(t.name) for t in checkpoint.tensors if t.role is Role.BUFFER} == {
        "model.layers.1.mlp.router.e_score_correction_bias"
    }


def test_a_uniform_placement_of_one_expert_per_rank_is_published(tmp_path: Path) -> None:
    assert uniform(4, 4) == ((0,), (1,), (2,), (3,))
    shutil.copy(config_of("mixtral_w4e4"), tmp_path / "config.json")
    api.consolidate(checkpoint_of("mixtral_w4e4"), tmp_path / "out", config=tmp_path, verify=True)
