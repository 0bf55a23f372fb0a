"""Written DCP checkpoints: values, grids and files, against torch's own loader and real saves."""

from __future__ import annotations

import hashlib
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from ckpt_tool import api
from ckpt_tool.canonical import DType
from ckpt_tool.errors import MismatchError, UnreadableError
from ckpt_tool.families import family_of
from ckpt_tool.families.naming import to_hub
from ckpt_tool.formats.dcp.grammar.grid import GridChunk, dense_grid, expert_grid, spans

from .dcp_tools import CHECKPOINTS, FIXTURES, assert_equal_to_oracle, convert, oracle, read, write
from .hub_files import write as write_hub

TARGETS: list[tuple[str, dict[str, Any]]] = [
    ("titan_w4e2", {"world": 1, "ep": 1}),
    ("titan_w4e2", {"world": 3, "ep": 1}),
    ("titan_w4e2", {"world": 4, "ep": 4}),
    ("titan_w4e2", {"world": 8, "ep": 2}),
    ("titan_w4e2", {"style": "plain"}),
    ("titan_old_w2", {"world": 4, "ep": 2}),
    ("mixtral_accelerate_w2", {"world": 3}),
    ("mixtral_accelerate_w2", {"world": 4, "ep": 2, "style": "transformers"}),
    ("mixtral_accelerate_w2", {"world": 2, "style": "plain"}),
    ("qwen3_moe_transformers_w2e2", {"world": 4, "ep": 4}),
    ("qwen3_moe_transformers_w2e2", {"world": 3, "ep": 1, "style": "accelerate"}),
    ("dense_tied_w3", {"world": 2, "style": "accelerate"}),
    ("dense_tied_w3", {"world": 50}),
]


@pytest.mark.parametrize(("name", "options"), TARGETS, ids=lambda value: str(value))
def test_values_and_states_survive(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    convert(CHECKPOINTS[name], tmp_path / "out", **options)
    reader, checkpoint = read(tmp_path / "out")
    assert_equal_to_oracle(reader, checkpoint, FIXTURES / name / "oracle")
    if "world" in options:
        assert checkpoint.topology.world_size == options["world"]
    assert checkpoint.training.step == 2


def _template(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(value) for name, value in values.items()}


@pytest.mark.parametrize("world", [1, 3, 4])
def test_torchs_own_loader_reads_it(world: int, tmp_path: Path) -> None:
    convert(CHECKPOINTS["titan_w4e2"], tmp_path / "out", world=world, ep=1)
    truth = oracle(FIXTURES / "titan_w4e2" / "oracle")
    weights = {name: value for (name, state), value in truth.items() if state == "weight"}
    moments = {f"state.{name}.{state}": v for (name, state), v in truth.items() if state != "weight"}
    state: dict[str, Any] = {**_template(weights), "optimizer": _template(moments)}
    state["optimizer"]["param_groups.norm.weight.lr"] = 0.0
    state["train_state"] = {"step": 0}
    dcp.load(state, checkpoint_id=tmp_path / "out", no_dist=True)
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    assert all(torch.equal(state["optimizer"][name], value) for name, value in moments.items())
    assert state["optimizer"]["param_groups.norm.weight.lr"] == 0.01
    assert state["train_state"] == {"step": 2}


def test_torchs_hugging_face_reader_reads_shards(tmp_path: Path) -> None:
    convert(CHECKPOINTS["mixtral_accelerate_w2"], tmp_path / "out", world=3, ep=1, style="transformers")
    truth = oracle(FIXTURES / "mixtral_accelerate_w2" / "oracle")
    weights = {name: value for (name, state), value in truth.items() if state == "weight"}
    state = _template(weights)
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(tmp_path / "out")), no_dist=True)
    assert all(torch.equal(state[name], value) for name, value in weights.items())


def _grid(path: Path) -> dict[str, set[tuple[str, tuple[int, ...], tuple[int, ...]]]]:
    """key -> (file, offsets, sizes) as torch reads them."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    files = {(i.fqn, i.offset): info.relative_path for i, info in metadata.storage_data.items()}
    return {
        key: {(files[key, c.offsets], tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks}
        for key, entry in metadata.state_dict_metadata.items()
        if hasattr(entry, "chunks") and len(entry.size)
    }


def test_grid_is_that_of_a_real_save(tmp_path: Path) -> None:
    """Back to the topology the run had, over another one: chunks and owners as the run wrote them."""
    convert(CHECKPOINTS["titan_w4e2"], tmp_path / "three", world=3, ep=1)
    convert(tmp_path / "three", tmp_path / "four", world=4, ep=2)
    real, ours = _grid(CHECKPOINTS["titan_w4e2"]), _grid(tmp_path / "four")
    assert real.keys() == ours.keys()
    for key, chunks in real.items():
        if "expert_bias" not in key:  # replicated: the run balances who writes it
            assert {c for c in chunks if 0 not in c[2]} == {c for c in ours[key] if 0 not in c[2]}, key


def test_paths_are_those_of_a_real_save(tmp_path: Path) -> None:
    for name in ("titan_w4e2", "dense_tied_w3"):
        convert(CHECKPOINTS[name], tmp_path / name)
        real = pickle.loads((CHECKPOINTS[name] / ".metadata").read_bytes())
        ours = pickle.loads((tmp_path / name / ".metadata").read_bytes())
        missing = {
            key: path for key, path in real.planner_data.items() if ours.planner_data.get(key) != path
        }
        assert missing == {}
        assert all("initial_lr" in key for key in ours.planner_data.keys() - real.planner_data.keys())


def test_template_gives_keys_files_and_chunks(tmp_path: Path) -> None:
    convert(CHECKPOINTS["titan_w4e2"], tmp_path / "three", world=3, ep=1)
    reader, checkpoint = read(tmp_path / "three")
    _, template = read(CHECKPOINTS["titan_w4e2"])
    write(checkpoint, reader, tmp_path / "out", like=template)
    assert _grid(tmp_path / "out") == _grid(CHECKPOINTS["titan_w4e2"])
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        p.name for p in CHECKPOINTS["titan_w4e2"].iterdir()
    }
    reader, written = read(tmp_path / "out")
    assert_equal_to_oracle(reader, written, FIXTURES / "titan_w4e2" / "oracle")
    assert written.training == template.training


def test_template_of_another_framework(tmp_path: Path) -> None:
    convert(
        CHECKPOINTS["mixtral_accelerate_w2"], tmp_path / "template", world=4, ep=2, style="transformers"
    )
    reader, checkpoint = read(CHECKPOINTS["mixtral_accelerate_w2"])
    _, template = read(tmp_path / "template")
    write(checkpoint, reader, tmp_path / "out", like=template)
    reader, written = read(tmp_path / "out")
    assert_equal_to_oracle(reader, written, FIXTURES / "mixtral_accelerate_w2" / "oracle")
    assert written.layout_hint.scheme == template.layout_hint.scheme


def test_metadata_is_the_last_file(tmp_path: Path) -> None:
    layout = convert(CHECKPOINTS["mixtral_accelerate_w2"], tmp_path / "out", world=2)
    names = [file.path for file in layout.laid_out()]
    assert sorted(names[-2:]) == ["optimizer_0/.metadata", "pytorch_model_fsdp_0/.metadata"]
    assert "scheduler.bin" in names


def test_every_rank_has_a_file(tmp_path: Path) -> None:
    convert(CHECKPOINTS["dense_tied_w3"], tmp_path / "out", world=50)
    assert len(list((tmp_path / "out").glob("__*_0.distcp"))) == 50


def test_bytes_are_deterministic(tmp_path: Path) -> None:
    digests = []
    for name in ("a", "b"):
        convert(CHECKPOINTS["titan_w4e2"], tmp_path / name, world=3, ep=1)
        files = sorted((tmp_path / name).iterdir())
        digests.append([(f.name, hashlib.sha256(f.read_bytes()).hexdigest()) for f in files])
    assert digests[0] == digests[1]


def test_weights_only_in_another_precision(tmp_path: Path) -> None:
    convert(CHECKPOINTS["titan_w4e2"], tmp_path / "out", weights_only=True, dtype=DType.bfloat16)
    _, checkpoint = read(tmp_path / "out")
    truth = oracle(FIXTURES / "titan_w4e2" / "oracle")
    assert {tensor.state for tensor in checkpoint.tensors} == {"weight"}
    value = truth["norm.weight", "weight"].bfloat16()
    state = {"norm.weight": torch.zeros_like(value)}
    dcp.load(state, checkpoint_id=tmp_path / "out", no_dist=True)
    assert torch.equal(state["norm.weight"], value)


def test_archives_carry_their_crc(tmp_path: Path) -> None:
    convert(CHECKPOINTS["titan_w4e2"], tmp_path / "out", world=2, ep=1)
    _, checkpoint = read(tmp_path / "out")
    _, source = read(CHECKPOINTS["titan_w4e2"])
    parts = checkpoint.layout_hint.sorted.model["layers.0.moe.expert_bias_E"].parts
    assert parts[0].crc == source.layout_hint.sorted.model["layers.0.moe.expert_bias_E"].parts[0].crc


# ---- grids


def _covers(grid: list[GridChunk], shape: tuple[int, ...]) -> bool:
    seen = torch.zeros(shape, dtype=torch.int32)
    for chunk in grid:
        seen[tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))] += 1
    return bool((seen == 1).all()) and len({chunk.offsets for chunk in grid}) == len(grid)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 12))
def test_dense_grids_tile(shape: list[int], world: int) -> None:
    grid = dense_grid(tuple(shape), world)
    assert _covers(grid, tuple(shape))
    assert all(chunk.rank < world for chunk in grid)


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 6), st.integers(1, 4), st.booleans())
def test_expert_grids_tile(each: int, ep: int, height: int, efsdp: int, rows: bool) -> None:
    shape = (each * ep, height * efsdp if rows else height, 3)
    grid = expert_grid(shape, ep * efsdp, ep, rows=rows)
    assert grid is not None
    assert _covers(grid, shape)


@given(st.integers(0, 40), st.integers(1, 12))
def test_spans_are_torchs_chunks(count: int, parts: int) -> None:
    expected = [len(part) for part in torch.arange(count).chunk(parts)] if count else []
    sizes = [size for _, size in spans(count, parts)]
    assert [size for size in sizes if size] == expected
    assert sum(sizes) == count
    assert len(sizes) == parts
    assert math.prod(sizes) >= 0


# ---- from published files, for a run that has transformers' modules


def _published(family: str, tensors: dict[str, torch.Tensor], path: Path, **config: Any) -> Path:
    return write_hub(path, {"model_type": family, "num_hidden_layers": 1} | config, tensors)


def test_what_is_one_tensor_in_memory_is_one_in_the_checkpoint(tmp_path: Path) -> None:
    at = "model.layers.0"
    parts = {f"{at}.self_attn.{part}_conv1d.weight": torch.randn(8, 1, 4) for part in "qkv"}
    source = _published("kimi_linear", dict(parts), tmp_path / "hub")
    convert(source, tmp_path / "out", world=2, style="plain")
    held = {"model": {f"{at}.self_attn.conv1d.weight": torch.zeros(24, 1, 4)}}
    dcp.load(held, checkpoint_id=tmp_path / "out", no_dist=True)
    assert torch.equal(held["model"][f"{at}.self_attn.conv1d.weight"], torch.cat(list(parts.values())))


def test_experts_that_are_modules_in_memory_are_tensors_of_their_own(tmp_path: Path) -> None:
    at = "encoder.block.1.layer.1.mlp.experts"
    stored = {f"{at}.expert_{e}.{w}.weight": torch.randn(4, 4) for e in range(2) for w in ("wi", "wo")}
    source = _published("switch_transformers", dict(stored), tmp_path / "hub")
    convert(source, tmp_path / "out", world=2, style="plain")
    held = {"model": {name: torch.zeros(4, 4) for name in stored}}
    dcp.load(held, checkpoint_id=tmp_path / "out", no_dist=True)
    assert all(torch.equal(held["model"][name], tensor) for name, tensor in stored.items())


def test_names_in_memory_that_are_not_known_are_refused(tmp_path: Path) -> None:
    stored = {"vision_tower.encoder.blocks.0.wqkv.weight": torch.randn(12, 4)}
    source = _published("kimi_k25", stored, tmp_path / "hub")
    with pytest.raises(MismatchError, match="does not know what transformers calls it in memory"):
        convert(source, tmp_path / "out", world=2, style="plain")


def test_tied_weights_of_a_composite_without_optimizer_are_one_tensor(tmp_path: Path) -> None:
    """Where the config says so: the chunks' checksums tell that they are equal, which an untied head may
    be, too, at the beginning."""
    weight = torch.randn(8, 4)
    names = ("model.language_model.embed_tokens.weight", "lm_head.weight")
    dcp.save({"model": dict.fromkeys(names, weight)}, checkpoint_id=tmp_path, no_dist=True)
    checkpoint = read(tmp_path)[1]
    assert (checkpoint.aliases, checkpoint.equal) == ({}, {names[1]: names[0]})
    family = family_of({"model_type": "qwen3_vl_moe"})
    tied = to_hub(checkpoint, family, {"tie_word_embeddings": True})
    assert tied.aliases == {names[1]: names[0]}
    assert [tensor.name for tensor in tied.tensors] == [names[0]]
    assert len(to_hub(checkpoint, family, {"tie_word_embeddings": False}).tensors) == 2
    different = {names[0]: weight, names[1]: torch.randn(8, 4)}
    dcp.save({"model": different}, checkpoint_id=tmp_path / "different", no_dist=True)
    assert not read(tmp_path / "different")[1].equal


@pytest.mark.parametrize("style", ["plain", "accelerate", "transformers", "veomni"])
def test_stacked_shared_experts_are_not_distributed(style: str, tmp_path: Path) -> None:
    at = "model.layers.0.mlp"
    stored = {
        f"{at}.experts.gate_up_proj": torch.randn(4, 6, 8),
        f"{at}.experts.down_proj": torch.randn(4, 8, 3),
        f"{at}.shared_experts.down_proj": torch.randn(1, 8, 3),
    }
    source = _published("inkling_text", stored, tmp_path / "hub", n_routed_experts=4)
    convert(source, tmp_path / "out", world=4, ep=2, style=style)
    assert read(tmp_path / "out")[1].topology.ep_size == 2


@pytest.mark.parametrize("tied", [False, True])
def test_equal_head_and_embedding_are_one_tensor_only_where_the_config_ties_them(
    tied: bool, tmp_path: Path
) -> None:
    weight = torch.randn(8, 4)
    stored = {"model.embed_tokens.weight": weight, "model.norm.weight": torch.ones(4)}
    stored |= {} if tied else {"lm_head.weight": weight.clone()}
    config = {"num_hidden_layers": 0, "hidden_size": 4, "vocab_size": 8, "tie_word_embeddings": tied}
    source = _published("llama", dict(stored), tmp_path / "hub", **config)
    api.convert(source, tmp_path / "dcp", to="dcp", world=2, verify=True)
    api.consolidate(tmp_path / "dcp", tmp_path / "back", config=source, verify=True)
    assert api.verify(source, tmp_path / "back").passed
    api.convert(tmp_path / "dcp", tmp_path / "shards", to="dcp", style="transformers", verify=True)


@pytest.mark.parametrize("root", [("module",), ("state", "model"), ("ckpt",)], ids=".".join)
def test_a_model_under_any_one_name_is_published_without_it(root: tuple[str, ...], tmp_path: Path) -> None:
    state = {"model.embed_tokens.weight": torch.randn(8, 4), "model.norm.weight": torch.ones(4)}
    nested: dict[str, Any] = dict(state)
    for part in reversed(root):
        nested = {part: nested}
    dcp.save(
        nested | {"opt": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
        checkpoint_id=tmp_path / "c",
        no_dist=True,
    )
    assert {tensor.name for tensor in read(tmp_path / "c")[1].tensors} == set(state)


def test_models_under_several_names_are_not_published(tmp_path: Path) -> None:
    states = {name: {"model.norm.weight": torch.ones(4)} for name in ("student", "teacher")}
    dcp.save(states, checkpoint_id=tmp_path / "c", no_dist=True)
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "llama", "num_hidden_layers": 0}')
    with pytest.raises(UnreadableError, match="under `student` and `teacher`, and nothing says which"):
        api.consolidate(tmp_path / "c", tmp_path / "out", config=config)
    api.reshard(tmp_path / "c", tmp_path / "again", world=2, verify=True)
