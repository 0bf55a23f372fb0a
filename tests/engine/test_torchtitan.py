"""The real torchtitan 0.3.0: what its checkpointer saves is read whole, becomes what its own adapter makes
of it, and what is written its checkpointer loads.

The truth is what each run gathers itself (``full_tensor``), and what ``to_hf`` of the model's
state_dict_adapter makes of that.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tool import api
from ckpt_tool.canonical import WEIGHT
from ckpt_tool.errors import UnreadableError
from tests.engine.titan_run import TitanSpec, run_each
from tests.formats.dcp_tools import read, states

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(sys.version_info < (3, 11), reason="torchtitan 0.3.0 is not made for Python 3.10"),
]

DEEPSEEK = TitanSpec(family="deepseek_v3")
QWEN = TitanSpec(family="qwen3")
SAVED = {
    "mtp": replace(DEEPSEEK, world=4, ep=2, mtp=2),
    "rows": replace(DEEPSEEK, world=4, ep=2, experts=2, q_lora_rank=8, backend="full_dtensor", mtp=1),
    "fused": replace(QWEN, world=2, ep=2),
    "apart": replace(QWEN, world=2, fuse_qkv=False, tied=True),
    "model only": replace(DEEPSEEK, world=2, mtp=1, model_only=True),
}
EP_TOLD = ("mtp", "rows")  # at world 2, EP 1 and 2 give 4 experts the same chunks
TEMPLATE = replace(QWEN, world=3, tied=True, seed=6)
HEADS = 2
OPTIMIZER = ("exp_avg", "exp_avg_sq")


def config_of(spec: TitanSpec) -> dict[str, Any]:
    """The config.json of the model in Hugging Face's words."""
    common = {
        "vocab_size": 33,
        "hidden_size": 24,
        "num_hidden_layers": spec.layers,
        "moe_intermediate_size": 16,
    }
    if spec.family == "qwen3":
        sizes = {"num_attention_heads": 6, "num_key_value_heads": HEADS, "head_dim": 8}
        return {
            "model_type": "qwen3_moe",
            "num_experts": spec.experts,
            "tie_word_embeddings": spec.tied,
            **common,
            **sizes,
        }
    return {
        "model_type": "deepseek_v3",
        "n_routed_experts": spec.experts,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": spec.mtp,
        "tie_word_embeddings": False,
        "q_lora_rank": spec.q_lora_rank or None,
        **common,
    }


def truth(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """By kind (weight, exp_avg, exp_avg_sq, step, hf) and the run's own name."""
    return {file.stem: load_file(file) for file in sorted(folder.glob("*.safetensors"))}


def apart(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Query, key and value one by one, the way FusedQKVLinear splits its weight."""
    found = {}
    for name, value in values.items():
        path, fused, kind = name.rpartition("wqkv.")
        if not fused:
            found[name] = value
        elif not value.ndim:
            found |= {f"{path}{one}.{kind}": value for one in ("wq", "wk", "wv")}
        else:
            heads = value.reshape(HEADS, 5, 8, -1)
            for one, part in (("wq", heads[:, :3]), ("wk", heads[:, 3]), ("wv", heads[:, 4])):
                found[f"{path}{one}.{kind}"] = part.reshape(-1, value.shape[1])
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


def without_biases(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As a run of qwen3 begins that comes from elsewhere: others have no such biases."""
    zeros = {name: torch.zeros_like(value) for name, value in weights.items() if "expert_bias" in name}
    assert any(weights[name].any() for name in zeros)
    return {**weights, **zeros}


# ---- one child saves, one loads what was made of it


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("titan")
    specs = [
        replace(spec, save=str(root / name / "saved"), oracle=str(root / name / "oracle"))
        for name, spec in SAVED.items()
    ]
    specs += [
        replace(TEMPLATE, save=str(root / "template")),
        replace(DEEPSEEK, backend_save=str(root / "backend" / "step-1")),
    ]
    run_each(specs)
    for name, spec in SAVED.items():
        (root / name / "config.json").write_text(json.dumps(config_of(spec)))
    return root


@pytest.fixture(scope="module")
def published(saved: Path) -> Path:
    """Each as safetensors under published names."""
    for name in SAVED:
        api.consolidate(saved / name / "saved", saved / name / "hf", config=saved / name / "config.json")
    return saved


# (source, what is written of it, what loads it)
LOADED: dict[str, tuple[str, TitanSpec]] = {
    "mtp to world 3": ("mtp", replace(SAVED["mtp"], world=3, ep=1)),
    "rows to one rank": ("rows", replace(SAVED["rows"], world=1, ep=1, backend="partial_dtensor")),
    "fused to world 4 ep 2": ("fused", replace(SAVED["fused"], world=4, ep=2)),
    "apart to world 2 ep 2": ("apart", replace(SAVED["apart"], world=2, ep=2)),
}
OTHER_NAMES: dict[str, tuple[str, TitanSpec]] = {
    "mtp by way of accelerate": ("mtp", replace(SAVED["mtp"], world=2, ep=2)),
    "fused by way of accelerate": ("fused", replace(SAVED["fused"], world=2, ep=1)),
}
PUBLISHED: dict[str, tuple[str, TitanSpec]] = {
    "mtp from safetensors": ("mtp", replace(SAVED["mtp"], world=2, ep=1)),
    "fused from safetensors": ("fused", replace(SAVED["fused"], world=1, ep=1)),
}


@pytest.fixture(scope="module")
def loaded(published: Path) -> Path:
    """All conversions, loaded by torchtitan's CheckpointManager and gathered, under ``loaded``."""
    root, written = published, published / "written"
    for name, (source, spec) in LOADED.items():
        api.convert(
            root / source / "saved", written / name / "step-1", to="dcp", world=spec.world, ep=spec.ep
        )
    for name, (source, spec) in OTHER_NAMES.items():
        config = root / source / "config.json"
        between = written / name / "between"
        api.convert(root / source / "saved", between, to="dcp", style="accelerate", config=config)
        api.convert(
            between,
            written / name / "step-1",
            to="dcp",
            world=spec.world,
            ep=spec.ep,
            style="torchtitan",
            config=config,
        )
    for name, (source, spec) in PUBLISHED.items():
        api.convert(
            root / source / "hf",
            written / name / "step-0",
            to="dcp",
            world=spec.world,
            ep=spec.ep,
            style="torchtitan",
        )
    api.convert(root / "apart" / "saved", written / "like" / "step-1", to="dcp", like=root / "template")
    everything = {**LOADED, **OTHER_NAMES, **PUBLISHED, "like": ("apart", TEMPLATE)}
    run_each(
        [
            replace(spec, steps=0, seed=9, load=str(written / name), oracle=str(root / "loaded" / name))
            for name, (_, spec) in everything.items()
        ]
    )
    return root


# ---- reading


@pytest.mark.parametrize("name", SAVED)
def test_everything_read_equals_what_the_run_gathered(name: str, saved: Path) -> None:
    spec, expected = SAVED[name], truth(saved / name / "oracle")
    reader, checkpoint = read(saved / name / "saved" / "step-1")
    kinds = (WEIGHT,) if spec.model_only else (WEIGHT, *OPTIMIZER)
    want = {(key, kind): value for kind in kinds for key, value in apart(expected[kind]).items()}
    for alias in checkpoint.aliases:
        del want[alias, WEIGHT]
    found = states(reader, checkpoint)
    assert set(found) == set(want)
    for key, value in found.items():
        assert value.dtype == want[key].dtype, key
        assert torch.equal(value, want[key]), key
    if not spec.model_only:
        names = checkpoint.layout_hint.names
        for key, step in apart(expected["step"]).items():
            assert all(checkpoint.scalars[given, "step"].value == float(step) for given in names[key]), key
        assert checkpoint.training.step == 1
    assert checkpoint.topology.world_size == spec.world
    if name in EP_TOLD:
        assert checkpoint.topology.ep_size == spec.ep


def test_mtp_layers_are_numbered_after_the_last(saved: Path) -> None:
    _, checkpoint = read(saved / "mtp" / "saved" / "step-1")
    assert [layer.layer_path for layer in checkpoint.moe_layers] == [f"model.layers.{n}" for n in (1, 2, 3)]
    assert checkpoint.moe_layers[-1].module == "mtp_layers.1.moe"


# ---- publishing


@pytest.mark.parametrize("name", SAVED)
def test_published_files_are_what_to_hf_makes(name: str, published: Path) -> None:
    found: dict[str, torch.Tensor] = {}
    for file in (published / name / "hf").glob("*.safetensors"):
        found |= load_file(file)
    assert_same(found, truth(published / name / "oracle")["hf"])


def test_what_has_no_published_name_is_named(saved: Path, tmp_path: Path) -> None:
    """to_hf leaves it out in silence."""
    source = saved / "fused"
    result = api.consolidate(source / "saved", tmp_path / "hf", config=source / "config.json", dry_run=True)
    (note,) = (note for note in result.notes if "published" in note)
    assert "layers.0.moe.expert_bias_E, layers.1.moe.expert_bias_E" in note


def test_verify_says_what_it_could_not_compare(published: Path) -> None:
    source = published / "fused"
    verdict = api.verify(source / "saved", source / "hf", config=source / "config.json")
    assert verdict.passed
    assert any("layers.0.moe.expert_bias_E" in note for note in verdict.notes)


# ---- writing


@pytest.mark.parametrize("name", [*LOADED, *OTHER_NAMES])
def test_a_run_that_loads_holds_the_same(name: str, loaded: Path) -> None:
    source = ({**LOADED, **OTHER_NAMES})[name][0]
    expected, found = truth(loaded / source / "oracle"), truth(loaded / "loaded" / name)
    if name == "fused by way of accelerate":
        expected["weight"] = without_biases(expected["weight"])
    assert expected.keys() == found.keys()
    for kind in (WEIGHT, *OPTIMIZER, "step"):
        assert_same(found[kind], expected[kind])
    before = json.loads((loaded / source / "oracle" / "oracle.json").read_text())
    after = json.loads((loaded / "loaded" / name / "oracle.json").read_text())
    assert after["lr"] == before["lr"]
    assert after["train_state"]["step"] == 1
    if name in LOADED:
        assert after == before


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_run_begins_from_published_weights(name: str, loaded: Path) -> None:
    source, spec = PUBLISHED[name]
    expected = truth(loaded / source / "oracle")["weight"]
    if spec.family == "qwen3":
        expected = without_biases(expected)
    assert_same(truth(loaded / "loaded" / name)["weight"], expected)


def test_a_template_with_another_projection_is_filled(loaded: Path) -> None:
    """The source's queries, keys and values are parameters of their own, the template's are one."""
    expected, found = truth(loaded / "apart" / "oracle"), truth(loaded / "loaded" / "like")
    assert any("wqkv" in name for name in found["exp_avg"])
    for kind in (WEIGHT, *OPTIMIZER, "step"):
        assert_same(apart(found[kind]), expected[kind])


def test_copies_of_the_models_own_in_published_mtp_layers_are_left_out(
    published: Path, tmp_path: Path
) -> None:
    """DeepSeek's files have the embedding and the head once more in every such layer."""
    source = tmp_path / "hf"
    source.mkdir()
    (source / "config.json").write_text((published / "mtp" / "config.json").read_text())
    tensors = dict(truth(published / "mtp" / "oracle")["hf"])
    copies = {"embed_tokens": "model.embed_tokens.weight", "shared_head.head": "lm_head.weight"}
    for name, original in copies.items():
        tensors[f"model.layers.2.{name}.weight"] = tensors[original].clone()
    save_file(tensors, str(source / "model.safetensors"))
    result = api.convert(source, tmp_path / "step-0", to="dcp", style="torchtitan", dry_run=True)
    assert {label.partition(" ")[0] for label in result.left_out} == {
        f"model.layers.2.{name}.weight" for name in copies
    }


# ---- the other checkpointer


def test_a_torch_checkpointing_directory_is_refused_by_name(saved: Path) -> None:
    with pytest.raises(UnreadableError, match="torch_checkpointing"):
        api.catalogue(saved / "backend" / "step-1")
