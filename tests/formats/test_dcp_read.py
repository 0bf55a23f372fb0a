"""Every DCP layout against what the run that saved it gathered, bit for bit."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from ckpt_tool.canonical import MASTER, WEIGHT, DType, ExpertName, Role
from ckpt_tool.containers.dcp_metadata import Chunk, Metadata, Stored, TensorEntry, metadata_bytes
from ckpt_tool.containers.distcp import concatenated
from ckpt_tool.containers.torch_zip import torch_file
from ckpt_tool.formats.dcp.format import Dcp
from ckpt_tool.formats.registry import open_checkpoint
from ckpt_tool.layout import Layout, Literal, TargetFile
from ckpt_tool.layout import whole as whole_slot
from ckpt_tool.storage import LocalReader

from .dcp_tools import CHECKPOINTS, FIXTURES, assert_equal_to_oracle, read, states, whole, write_layout


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_fixture_equals_what_its_run_gathered(name: str) -> None:
    reader, checkpoint = open_checkpoint(CHECKPOINTS[name])
    assert checkpoint.format == "torch-dcp"
    assert checkpoint.training.step == 2
    assert_equal_to_oracle(reader, checkpoint, FIXTURES / name / "oracle")


@pytest.mark.parametrize("name", ["mixtral_accelerate_w2", "qwen3_moe_transformers_w2e2"])
def test_fused_experts_are_taken_apart_where_a_config_lies_beside(name: str, tmp_path: Path) -> None:
    shutil.copytree(CHECKPOINTS[name], tmp_path / "c")
    shutil.copy(FIXTURES / name / "config.json", tmp_path / "c")
    reader, checkpoint = read(tmp_path / "c")
    stacks = {str(t.name) for t in checkpoint.tensors if isinstance(t.name, ExpertName)}
    assert stacks == {f"model.layers.0.experts.*.{p}.weight" for p in ("gate", "up", "down")}
    assert [layer.num_experts for layer in checkpoint.moe_layers] == [4]
    assert_equal_to_oracle(reader, checkpoint, FIXTURES / name / "oracle")


def test_fp32_parameters_with_optimizer_state_are_masters_and_buffers_are_not() -> None:
    _, checkpoint = read(CHECKPOINTS["titan_w4e2"])
    by_key = checkpoint.by_key()
    assert ("norm.weight", MASTER) in by_key
    bias = by_key["layers.0.moe.expert_bias_E", WEIGHT]
    assert bias.role is Role.BUFFER


def test_topology_is_read_off_the_chunks() -> None:
    _, checkpoint = read(CHECKPOINTS["titan_w4e2"])
    topology = checkpoint.topology
    assert (topology.world_size, topology.ep_size, topology.edp_size) == (4, 2, 2)
    assert topology.ep_ranks == (0, 1, 0, 1)
    assert checkpoint.moe_layers[0].holders == ((0, 1), (2, 3))
    assert checkpoint.moe_layers[0].module == "layers.0.moe"


def test_torchtitan_keeps_groups_scheduler_and_counters() -> None:
    _, checkpoint = read(CHECKPOINTS["titan_old_w2"])
    training = checkpoint.training
    assert sorted(group.options["weight_decay"] for group in training.param_groups) == [0.0, 0.1]
    assert training.scheduler == {"last_epoch": 2}
    assert training.client_state["train_state"] == {"step": 2, "ntokens_seen": 384}
    assert "max_exp_avg_sq" in {tensor.state for tensor in checkpoint.tensors}
    assert checkpoint.dialect == "torchtitan"


def test_accelerate_reads_model_and_optimizer_directory_as_one() -> None:
    _, checkpoint = read(CHECKPOINTS["mixtral_accelerate_w2"])
    assert {file.path.split("/")[0] for file in checkpoint.files} == {"pytorch_model_fsdp_0", "optimizer_0"}
    assert len(checkpoint.training.param_groups) == 2
    assert checkpoint.training.scheduler["last_epoch"] == 2


def test_accelerates_model_directory_alone_is_a_model() -> None:
    _, checkpoint = read(CHECKPOINTS["mixtral_accelerate_w2"] / "pytorch_model_fsdp_0")
    assert {tensor.state for tensor in checkpoint.tensors} == {WEIGHT}
    assert "model.norm.weight" in {tensor.name for tensor in checkpoint.tensors}


def test_tied_weights_are_one_tensor() -> None:
    _, checkpoint = read(CHECKPOINTS["dense_tied_w3"])
    assert checkpoint.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    embedding = checkpoint.by_key()["model.embed_tokens.weight", MASTER]
    assert sum(region.numel for region in embedding.replicas) == embedding.numel


# ---- made here: arrangements of files, strides, dtypes, roots


def _state() -> dict[str, Any]:
    torch.manual_seed(0)
    names = ("model.layers.0.a.weight", "model.layers.0.b.bias", "lm_head.weight")
    weights = dict(zip(names, (torch.randn(5, 3), torch.randn(7), torch.randn(4, 3)), strict=True))
    moments = {
        name: {"exp_avg": torch.randn_like(w), "exp_avg_sq": torch.rand_like(w), "step": torch.tensor(3.0)}
        for name, w in weights.items()
    }
    groups = [{"lr": 0.1, "betas": (0.9, 0.99), "params": list(weights)}]
    return {"model": weights, "optimizer": {"state": moments, "param_groups": groups}}


def _check(path: Path, state: dict[str, Any]) -> None:
    reader, checkpoint = read(path)
    found = states(reader, checkpoint)
    for name, value in state["model"].items():
        assert torch.equal(found[name, "weight"], value)
    for name, moments in state["optimizer"]["state"].items():
        assert torch.equal(found[name, "exp_avg"], moments["exp_avg"])
        assert torch.equal(found[name, "exp_avg_sq"], moments["exp_avg_sq"])
        assert checkpoint.scalars[name, "step"].value == 3.0
    assert checkpoint.training.param_groups[0].options == {"lr": 0.1, "betas": (0.9, 0.99)}
    assert checkpoint.training.param_groups[0].parameters == tuple(state["model"])


@pytest.mark.parametrize(
    "options",
    [{}, {"thread_count": 3}, {"single_file_per_rank": False}],
    ids=["one", "threads", "per item"],
)
def test_every_arrangement_of_files(options: dict[str, Any], tmp_path: Path) -> None:
    state = _state()
    writer = dcp.FileSystemWriter(
        tmp_path, single_file_per_rank=options.pop("single_file_per_rank", True), **options
    )
    dcp.save(state, storage_writer=writer, no_dist=True)
    _check(tmp_path, state)


def test_rank_local_metadata(tmp_path: Path) -> None:
    state = _state()
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    (tmp_path / ".metadata").rename(tmp_path / "__0.metadata")
    _check(tmp_path, state)


@pytest.mark.parametrize("root", ["app", "deep"])
def test_roots_of_other_frameworks(root: str, tmp_path: Path) -> None:
    state = _state()
    outer = {root: {"model": state["model"], "optim": state["optimizer"]}}
    dcp.save(outer, checkpoint_id=tmp_path, no_dist=True)
    _check(tmp_path, state)


def test_parameters_without_optimizer_state_are_frozen(tmp_path: Path) -> None:
    state = _state()
    del state["optimizer"]["state"]["lm_head.weight"]
    state["optimizer"]["param_groups"][0]["params"].remove("lm_head.weight")
    state["model"]["lm_head.weight"] = torch.randn(4, 2)
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    _, checkpoint = read(tmp_path)
    assert checkpoint.by_key()["lm_head.weight", WEIGHT].role is Role.FROZEN


def test_state_dict_of_a_bare_model(tmp_path: Path) -> None:
    weights = _state()["model"]
    dcp.save(weights, checkpoint_id=tmp_path, no_dist=True)
    reader, checkpoint = read(tmp_path)
    assert {tensor.name for tensor in checkpoint.tensors} == set(weights)
    assert all(torch.equal(whole(reader, t), weights[t.name]) for t in checkpoint.tensors)


def test_transposed_chunk_is_read_by_its_strides(tmp_path: Path) -> None:
    value = torch.arange(12.0).reshape(3, 4).t()
    dcp.save({"model": {"w": value}}, checkpoint_id=tmp_path, no_dist=True)
    reader, checkpoint = read(tmp_path)
    assert torch.equal(whole(reader, checkpoint.tensors[0]), value)


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", "float64", "int64", "bool", "float8_e4m3fn", "uint8"]
)
def test_dtypes(dtype: str, tmp_path: Path) -> None:
    value = torch.ones(6).to(getattr(torch, dtype))
    dcp.save({"model": {"w": value}}, checkpoint_id=tmp_path, no_dist=True)
    reader, checkpoint = read(tmp_path)
    assert checkpoint.tensors[0].dtype.torch_name == dtype
    found = whole(reader, checkpoint.tensors[0])
    assert torch.equal(found.view(torch.uint8), value.view(torch.uint8))


def test_empty_tensors_and_scalars(tmp_path: Path) -> None:
    dcp.save(
        {"model": {"none": torch.empty(0, 3), "one": torch.tensor(2.5)}},
        checkpoint_id=tmp_path,
        no_dist=True,
    )
    reader, checkpoint = read(tmp_path)
    by_name = {tensor.name: tensor for tensor in checkpoint.tensors}
    assert by_name["none"].shape == (0, 3)
    assert whole(reader, by_name["one"]).item() == 2.5
    assert by_name["one"].dtype is DType.float32


def test_state_dict_that_was_not_flattened(tmp_path: Path) -> None:
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    state = {f"model.{key}": value for key, value in _state()["model"].items()}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True, planner=planner)
    _, checkpoint = read(tmp_path)
    assert {tensor.name for tensor in checkpoint.tensors} == set(_state()["model"])


def test_older_torchtitans_counters_in_bytesio(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(torch.tensor(7, dtype=torch.int64), buffer)
    state = {"tok_embeddings.weight": torch.ones(2, 2), "train_state": {"step": buffer}}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    _, checkpoint = read(tmp_path)
    assert checkpoint.training.step == 7


def test_old_and_new_names_of_torchtitans_experts(tmp_path: Path) -> None:
    stacks = {
        "layers.3.moe.experts.w1": "gate",
        "layers.3.moe.experts.w2_EDF": "down",
        "layers.4.moe.routed_experts.inner_experts.w3_EFD": "up",
    }
    dcp.save({key: torch.ones(2, 3, 4) for key in stacks}, checkpoint_id=tmp_path, no_dist=True)
    _, checkpoint = read(tmp_path)
    found = {
        (t.name.layer, t.name.projection) for t in checkpoint.tensors if isinstance(t.name, ExpertName)
    }
    assert found == {(3, "gate"), (3, "down"), (4, "up")}


def test_trainers_step_is_in_its_json(tmp_path: Path) -> None:
    shutil.copytree(CHECKPOINTS["mixtral_accelerate_w2"], tmp_path / "c")
    (tmp_path / "c" / "trainer_state.json").write_text(json.dumps({"global_step": 50}))
    assert read(tmp_path / "c")[1].training.step == 50


def test_veomni(tmp_path: Path) -> None:
    state = _state()
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    (tmp_path / "extra_state").mkdir()
    torch.save({"global_step": 3}, tmp_path / "extra_state" / "extra_state_rank_0.pt")
    assert Dcp().recognises(LocalReader(tmp_path))
    _check(tmp_path, state)
    assert "Not converted: extra_state" in read(tmp_path)[1].notes[0]


@pytest.mark.parametrize("limit", [0xFFFFFFFF, 0], ids=["as usual", "zip64"])
def test_chunks_of_any_size(limit: int, tmp_path: Path) -> None:
    """Above 4 GiB an archive has 64-bit fields; here they are forced."""
    source = tmp_path / "source"
    state = {"a": torch.randn(5, 7), "b": torch.randn(3)}
    dcp.save(state, checkpoint_id=source, no_dist=True)
    reader, checkpoint = read(source)
    parts = [torch_file("", whole_slot(t), zip64_limit=limit) for t in checkpoint.tensors]
    target, spans = concatenated("__0_0.distcp", parts)
    entries = {
        str(t.name): TensorEntry(
            t.shape, t.dtype, (Chunk((0,) * len(t.shape), t.shape, Stored("__0_0.distcp", *span)),)
        )
        for t, span in zip(checkpoint.tensors, spans, strict=True)
    }
    data = metadata_bytes(Metadata(entries, {key: (key,) for key in entries}))
    files = (target, TargetFile(".metadata", len(data), (Literal(0, data),)))
    write_layout(Layout(files), checkpoint, reader, tmp_path / "out")
    reader, written = read(tmp_path / "out")
    assert all(torch.equal(whole(reader, t), state[str(t.name)]) for t in written.tensors)
    loaded = {key: torch.zeros_like(value) for key, value in state.items()}
    dcp.load(loaded, checkpoint_id=tmp_path / "out", no_dist=True)
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


@pytest.mark.parametrize("sharded", [False, True], ids=["keys", "safetensors"])
def test_one_tensor_per_expert(sharded: bool, tmp_path: Path) -> None:
    """VeOmni's older models, and torchtitan's last_save_in_hf: stacks where a config lies beside."""
    torch.manual_seed(0)
    names = [
        f"model.layers.0.mlp.experts.{e}.{p}_proj.weight" for e in range(3) for p in ("gate", "up", "down")
    ]
    state = {name: torch.randn(4, 6) if "down" not in name else torch.randn(6, 4) for name in names}
    if sharded:
        writer = HuggingFaceStorageWriter(path=str(tmp_path), save_distributed=True)
        dcp.save(state, storage_writer=writer, no_dist=True)
    else:
        dcp.save({"model": state}, checkpoint_id=tmp_path, no_dist=True)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "num_experts": 3}))
    reader, checkpoint = read(tmp_path)
    assert len(checkpoint.tensors) == 3
    for tensor in checkpoint.tensors:
        stack = torch.stack(
            [
                state[f"model.layers.0.mlp.experts.{e}.{tensor.name.projection}_proj.weight"]
                for e in range(3)
            ]
        )
        assert torch.equal(whole(reader, tensor), stack)


def test_the_newest_step_of_a_torchtitan_run(tmp_path: Path) -> None:
    for step in (2, 10):
        shutil.copytree(CHECKPOINTS["titan_w4e2"], tmp_path / f"step-{step}")
    _, checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.root == str(tmp_path / "step-10")


def test_scalar_parameters_of_any_dtype(tmp_path: Path) -> None:
    value = torch.tensor(0.5, dtype=torch.bfloat16)
    dcp.save({"model": {"scale": value, "w": torch.ones(2)}}, checkpoint_id=tmp_path, no_dist=True)
    reader, checkpoint = read(tmp_path)
    scale = next(tensor for tensor in checkpoint.tensors if tensor.name == "scale")
    assert whole(reader, scale).item() == 0.5
