"""A model that is not the one its config.json describes: a tensor missing or too many, layers that differ
from their peers, another root, another family; adapters. Each is refused by name, whatever the target."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from ckpt_tool import api
from ckpt_tool.errors import CkptToolError, MismatchError, UnreadableError
from ckpt_tool.families.expected import expected_of
from tests.conftest import checkpoint_of, config_of
from tests.formats.hub_files import noise, write

Tensors = dict[str, torch.Tensor]
HOW = api.Execution(fsync=False, workers=1)
TARGETS = pytest.mark.parametrize(
    "target",
    [{"to": "hf"}, {"to": "universal"}, {"to": "dcp", "style": "plain", "world": 1}],
    ids=lambda target: target["to"],
)
AT = "model.layers.1"


def published(name: str, tmp_path: Path) -> Path:
    """A whole model as safetensors, from a fixture."""
    api.consolidate(checkpoint_of(name), tmp_path / "model", config=config_of(name), how=HOW)
    return tmp_path / "model"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return published("qwen2_moe_w2e2", tmp_path)


def change(model: Path, how: Callable[[Tensors], Tensors], **config: Any) -> None:
    """Change the tensors of a model, and its config.json."""
    file = model / "model.safetensors"
    save_file({name: one.clone() for name, one in how(load_file(file)).items()}, file, {"format": "pt"})
    described = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**described, **config}))


def refused(
    source: Path, words: str, target: dict[str, Any], error: type[CkptToolError] = MismatchError
) -> None:
    with pytest.raises(error, match=words):
        api.convert(source, source.parent / "out", dry_run=True, **target)


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda held: {name: one for name, one in held.items() if name not in names}


def moved(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda held: {
        new + name.removeprefix(old) if name.startswith(old) else name: one for name, one in held.items()
    }


# ---- a tensor that is missing


@TARGETS
@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
        f"{AT}.self_attn.q_proj.weight",
        f"{AT}.input_layernorm.weight",
        f"{AT}.mlp.shared_expert_gate.weight",
    ],
)
def test_a_missing_tensor(name: str, target: dict[str, Any], model: Path) -> None:
    change(model, without(name))
    refused(model, f"The checkpoint has no {name}", target)


@TARGETS
def test_a_tensor_that_every_layer_lacks(target: dict[str, Any], model: Path) -> None:
    change(model, lambda held: {name: one for name, one in held.items() if "k_proj.weight" not in name})
    refused(model, r"has no model\.layers\.0\.self_attn\.k_proj\.weight", target)


def test_a_missing_tensor_of_a_run(tmp_path: Path) -> None:
    """The same from a framework's checkpoint, whose names are those of modules."""
    held = load_file(published("dense_w3", tmp_path) / "model.safetensors")
    del held["model.norm.weight"]
    dcp.save({"model": held}, checkpoint_id=tmp_path / "run", no_dist=True)
    with pytest.raises(MismatchError, match=r"has no model\.norm\.weight"):
        api.convert(tmp_path / "run", tmp_path / "out", to="hf", config=tmp_path / "model", dry_run=True)


def test_a_whole_model_of_each_fixture_is_not_refused(tmp_path: Path) -> None:
    for name in ("qwen2_moe_w2e2", "qwen3_moe_w2e2_tied", "deepseek_v3_w2e2", "mixtral_w2e1", "dense_w3"):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        model = published(name, tmp_path)
        for target in ("hf", "universal", "dcp"):
            api.convert(model, tmp_path / "out", to=target, dry_run=True)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (without("model.norm.weight"), r"has no model\.norm\.weight"),
        (moved("model.", "base.model."), "has its layers under base.model.layers"),
        (lambda held: {**held, f"{AT}.self_attn.q_proj.lora_A.weight": noise(4, 16)}, "merge_and_unload"),
    ],
    ids=["missing", "root", "adapter"],
)
def test_verify_does_not_call_such_a_model_sound(
    how: Callable[[Tensors], Tensors], words: str, model: Path
) -> None:
    assert api.verify(model).passed
    change(model, how)
    (model / "ckpt_tool_manifest.json").unlink()
    (difference,) = api.verify(model).differences
    assert difference.kind == "names"
    assert re.search(words, difference.message)


# ---- a tensor too many


@TARGETS
@pytest.mark.parametrize(
    "name", [f"{AT}.self_attn.o_proj.bias", "model.stray.weight", "v_head.summary.weight"]
)
def test_a_tensor_that_the_model_does_not_have(name: str, target: dict[str, Any], model: Path) -> None:
    change(model, lambda held: {**held, name: noise(8)})
    refused(model, f"The checkpoint has {name}.*no such tensor", target)


def test_a_bias_that_one_layer_lacks(model: Path) -> None:
    change(model, without(f"{AT}.self_attn.q_proj.bias"))
    refused(model, r"has model.layers.0.self_attn.q_proj.bias, and layer 1", {"to": "hf"})


def test_a_bias_of_one_layer_alone(tmp_path: Path) -> None:
    model = published("deepseek_v2_w2e2", tmp_path)
    change(model, lambda held: {**held, f"{AT}.self_attn.o_proj.bias": noise(16)})
    refused(model, f"has {AT}.self_attn.o_proj.bias, and layer 0", {"to": "hf"})


def test_a_layer_of_another_shape_than_its_peers(model: Path) -> None:
    change(model, lambda held: {**held, f"{AT}.self_attn.k_proj.bias": noise(6)})
    refused(model, r"k_proj\.bias has shape \[.*other layers of the same kind", {"to": "hf"})


# ---- another family, another root


@TARGETS
def test_weights_of_mixtral_with_the_config_of_qwen2_moe(target: dict[str, Any], tmp_path: Path) -> None:
    own = json.loads(config_of("mixtral_w2e1").read_text())
    config = {
        **{key: value for key, value in own.items() if key not in ("architectures", "num_local_experts")},
        "model_type": "qwen2_moe", "num_experts": own["num_local_experts"],
        "moe_intermediate_size": own["intermediate_size"],
    }  # fmt: skip
    held = load_file(published("mixtral_w2e1", tmp_path) / "model.safetensors")
    names = {"block_sparse_moe": "mlp", ".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}
    for old, new in names.items():
        held = {name.replace(old, new): one for name, one in held.items()}
    save_file(held, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    refused(tmp_path / "model", r"no model\.layers\.0\.mlp\.shared_expert", target)


def test_a_run_of_mixtral_with_the_config_of_qwen2_moe(tmp_path: Path) -> None:
    own = json.loads(config_of("mixtral_w2e1").read_text())
    other = {"model_type": "qwen2_moe", "num_experts": own["num_local_experts"]}
    (tmp_path / "config.json").write_text(
        json.dumps({**own, **other, "moe_intermediate_size": own["intermediate_size"]})
    )
    with pytest.raises(MismatchError, match="shared_expert"):
        api.consolidate(checkpoint_of("mixtral_w2e1"), tmp_path / "out", config=tmp_path, dry_run=True)


@TARGETS
@pytest.mark.parametrize(
    "root", ["model.language_model.language_model.", "base.model.", "student.", "model.language_model."]
)
def test_names_under_another_root(root: str, target: dict[str, Any], model: Path) -> None:
    change(model, moved("model.", root))
    refused(model, f"has its layers under {root}layers, and Qwen2MoeForCausalLM", target)


def test_a_model_for_another_task_has_another_head(model: Path) -> None:
    classifier = {"architectures": ["Qwen2MoeForSequenceClassification"]}
    change(model, without("lm_head.weight"), **classifier)
    result = api.convert(model, model.parent / "out", to="hf", dry_run=True)
    assert any("no head for that task" in note for note in result.notes)
    change(model, lambda held: {**held, "score.weight": noise(2, 16)}, **classifier)
    result = api.convert(model, model.parent / "out", to="hf", dry_run=True)
    assert not any("no head for that task" in note for note in result.notes)


@TARGETS
def test_layers_for_multi_token_prediction_that_are_promised_and_absent(
    target: dict[str, Any], tmp_path: Path
) -> None:
    model = published("deepseek_v3_w2e2", tmp_path)
    change(model, without(), num_nextn_predict_layers=1)
    result = api.convert(model, tmp_path / "out", dry_run=True, **target)
    assert any("promises 1 layers for multi-token prediction" in note for note in result.notes)


# ---- text models and composites


E, H, INNER = 4, 8, 6
TEXT_CONFIG = {
    "model_type": "qwen3_5_moe_text", "num_hidden_layers": 1, "num_experts": E, "hidden_size": H,
    "moe_intermediate_size": INNER, "vocab_size": 12, "layer_types": ["full_attention"],
}  # fmt: skip
COMPOSITE_CONFIG = {
    "model_type": "qwen3_5_moe", "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "tie_word_embeddings": False, "text_config": TEXT_CONFIG, "vision_config": {},
}  # fmt: skip


def text_model(path: str = "model.") -> Tensors:
    at = f"{path}layers.0."
    shapes: dict[str, tuple[int, ...]] = {
        f"{path}embed_tokens.weight": (12, H), f"{path}norm.weight": (H,), "lm_head.weight": (12, H),
        f"{at}input_layernorm.weight": (H,), f"{at}post_attention_layernorm.weight": (H,),
        f"{at}self_attn.q_norm.weight": (4,), f"{at}self_attn.k_norm.weight": (4,),
        f"{at}mlp.gate.weight": (E, H), f"{at}mlp.shared_expert_gate.weight": (1, H),
        f"{at}mlp.experts.gate_up_proj": (E, 2 * INNER, H), f"{at}mlp.experts.down_proj": (E, H, INNER),
    }  # fmt: skip
    shapes |= {f"{at}self_attn.{name}_proj.weight": (8, H) for name in "qkvo"}
    shapes |= {f"{at}mlp.shared_expert.{name}_proj.weight": (H, H) for name in ("gate", "up", "down")}
    return {name: noise(*shape) for name, shape in shapes.items()}


TOWER = {"model.visual.patch_embed.proj.weight": noise(3, 3)}


def test_a_text_model_with_the_composites_config_gets_its_own(tmp_path: Path) -> None:
    source = write(tmp_path / "model", COMPOSITE_CONFIG, text_model())
    result = api.convert(source, tmp_path / "out", to="hf", verify=True, how=HOW)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == (
        "qwen3_5_moe_text",
        ["Qwen3_5MoeForCausalLM"],
    )
    assert config["tie_word_embeddings"] is False
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == text_model().keys()
    assert any("text model alone" in note for note in result.notes)


@TARGETS
def test_a_text_model_with_the_composites_config_starts_a_run_of_the_text_model(
    target: dict[str, Any], tmp_path: Path
) -> None:
    source = write(tmp_path / "model", COMPOSITE_CONFIG, text_model())
    result = api.convert(source, tmp_path / "out", dry_run=True, **target)
    assert any("text model alone" in note for note in result.notes)


def test_a_composite_with_its_text_models_config_becomes_the_text_model(tmp_path: Path) -> None:
    source = write(tmp_path / "model", TEXT_CONFIG, text_model("model.language_model.") | TOWER)
    result = api.convert(source, tmp_path / "out", to="hf", verify=True, how=HOW)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == text_model().keys()
    assert any("1 tensors of other parts are left out" in note for note in result.notes)
    assert list(result.left_out) == ["model.visual.patch_embed.proj.weight [weight]"]


def test_a_composite_whose_text_model_has_the_text_models_names(tmp_path: Path) -> None:
    source = write(tmp_path / "model", COMPOSITE_CONFIG, text_model() | TOWER)
    api.convert(source, tmp_path / "out", to="hf", verify=True, how=HOW)
    found = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert found == {*text_model("model.language_model."), *TOWER}


def test_a_composite_without_its_towers(tmp_path: Path) -> None:
    source = write(tmp_path / "model", COMPOSITE_CONFIG, text_model("model.language_model."))
    result = api.convert(source, tmp_path / "out", to="hf", dry_run=True)
    assert any("model.visual. would begin with random values" in note for note in result.notes)


def test_a_composite_under_another_root(tmp_path: Path) -> None:
    source = write(tmp_path / "model", COMPOSITE_CONFIG, text_model("model.language_model.language_model."))
    refused(
        source, "under model.language_model.layers or model.layers: nothing would be loaded", {"to": "hf"}
    )


# ---- adapters


LORA = f"base_model.model.{AT}.self_attn.q_proj.lora_A.default.weight"


@TARGETS
@pytest.mark.parametrize(
    "name",
    [
        LORA,
        f"{AT}.self_attn.q_proj.lora_B.weight",
        f"{AT}.self_attn.q_proj.base_layer.weight",
        f"{AT}.self_attn.q_proj.lora_magnitude_vector",
        "model.norm.modules_to_save.default.weight",
    ],
)
def test_lora_inside_a_state_dict(name: str, target: dict[str, Any], model: Path) -> None:
    change(model, lambda held: {**held, name: noise(4, 16)})
    refused(model, "holds an adapter.*merge_and_unload", target, UnreadableError)


def test_an_adapter_alone(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(b"")
    refused(
        tmp_path / "adapter",
        "holds an adapter and no model.*merge_and_unload",
        {"to": "hf"},
        UnreadableError,
    )
    (tmp_path / "adapter" / "adapter_model.bin").unlink()
    save_file({LORA: noise(4, 16)}, tmp_path / "adapter" / "adapter_model.safetensors")
    refused(tmp_path / "adapter", "holds an adapter.*merge_and_unload", {"to": "hf"}, UnreadableError)


def test_an_adapter_as_model_safetensors_beside_the_bases_config(model: Path) -> None:
    change(model, lambda held: {LORA: noise(4, 16), LORA.replace("lora_A", "lora_B"): noise(16, 4)})
    refused(model, "holds an adapter.*merge_and_unload", {"to": "hf"}, UnreadableError)


def test_an_adapter_beside_shards(model: Path) -> None:
    api.convert(model, model.parent / "shards", to="hf", max_shard_bytes=30_000, how=HOW)
    save_file({LORA: noise(4, 16)}, model.parent / "shards" / "adapter_model.safetensors")
    refused(model.parent / "shards", "holds an adapter", {"to": "hf"}, UnreadableError)


def test_a_run_with_adapters_is_resharded_and_not_published(tmp_path: Path) -> None:
    held = load_file(published("dense_w3", tmp_path) / "model.safetensors")
    held |= {f"{AT}.self_attn.q_proj.lora_{one}.default.weight": noise(4, 4) for one in "AB"}
    dcp.save({"model": held}, checkpoint_id=tmp_path / "run", no_dist=True)
    api.reshard(tmp_path / "run", tmp_path / "out", world=2, verify=True, how=HOW)
    with pytest.raises(UnreadableError, match="merge_and_unload"):
        api.convert(tmp_path / "run", tmp_path / "hf", to="hf", config=tmp_path / "model", dry_run=True)


# ---- two models in one directory


def test_a_model_file_beside_an_index_of_other_files(model: Path) -> None:
    api.convert(model, model.parent / "shards", to="hf", max_shard_bytes=30_000, how=HOW)
    shutil.copy(model / "model.safetensors", model.parent / "shards")
    refused(model.parent / "shards", "an index of other files", {"to": "hf"}, UnreadableError)


def test_another_file_beside_a_model_file_is_not_read(model: Path) -> None:
    """transformers takes model.safetensors alone."""
    save_file({"model.stray.weight": noise(4)}, model / "consolidated.safetensors")
    api.convert(model, model.parent / "out", to="hf", dry_run=True)


# ---- what lies beside a checkpoint


@pytest.mark.parametrize("kind", ["hf", "dcp", "zero3", "universal"])
def test_what_is_not_understood_beside_a_checkpoint_is_named(kind: str, tmp_path: Path) -> None:
    given = {"config": config_of("qwen2_moe_w2e2")} if kind in ("hf", "dcp") else {}
    api.convert(checkpoint_of("qwen2_moe_w2e2"), tmp_path / "source", to=kind, how=HOW, **given)
    assert not any("no part of it" in note for note in api.catalogue(tmp_path / "source").notes)
    root = Path(api.catalogue(tmp_path / "source").root)
    (root / "progress.json").write_text("{}")
    (root / "logs").mkdir()
    for number in range(9):
        (root / f"x{number}.txt").write_text("")
    target = {"to": "hf", "config": config_of("qwen2_moe_w2e2")}
    result = api.convert(tmp_path / "source", tmp_path / "out", dry_run=True, **target)
    (note,) = (note for note in result.notes if "no part of it" in note)
    assert "logs/, progress.json, x0.txt, x1.txt, x2.txt and 6 more" in note


def test_a_trainers_state_beside_the_tags_is_named(tmp_path: Path) -> None:
    shutil.copytree(checkpoint_of("qwen2_moe_w2e2"), tmp_path / "run")
    (tmp_path / "run" / "zero_to_fp32.py").write_text("")
    (tmp_path / "run" / "trainer_state.json").write_text("{}")
    (note,) = (note for note in api.catalogue(tmp_path / "run").notes if "no part of it" in note)
    assert "is known: trainer_state.json. Not read" in note


def test_the_table_has_every_model_type_that_a_family_tells_names_of() -> None:
    for kind in ("qwen3_5_moe", "qwen3_5_moe_text", "llama4", "llama4_text", "mixtral", "llama", "gpt_oss"):
        found = expected_of({"model_type": kind})
        assert found is not None
        assert found.top.required <= found.top.known
        assert bool(found.towers) == (kind in ("qwen3_5_moe", "llama4"))
