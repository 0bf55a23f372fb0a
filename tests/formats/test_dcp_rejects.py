"""One test for each input that is refused, named by what is wrong with it."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from ckpt_tool import api
from ckpt_tool.errors import CoverageError, MismatchError, UnreadableError, UnsafePickleError, UsageError
from ckpt_tool.formats.dcp.contents import read_directory
from ckpt_tool.formats.registry import open_checkpoint
from ckpt_tool.storage import LocalReader

from .dcp_tools import CHECKPOINTS, FIXTURES, read, write


@pytest.fixture
def titan(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CHECKPOINTS["titan_w4e2"], tmp_path / "c"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CHECKPOINTS["qwen3_moe_transformers_w2e2"], tmp_path / "c"))


def edit(path: Path, change: Callable[[Any], None]) -> None:
    """Change torch's own metadata objects."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


WO = "layers.0.attention.wo.weight"


class Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self._marker,))


def test_metadata_that_runs_code(titan: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    def change(metadata: Any) -> None:
        metadata.planner_data["evil"] = Attack(marker)

    edit(titan, change)
    with pytest.raises(UnsafePickleError, match="runs no code"):
        open_checkpoint(titan)
    assert not marker.exists()
    pickle.loads((titan / ".metadata").read_bytes())
    assert marker.exists(), "the attack must be a real one"


def test_bytes_entry_that_runs_code(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    dcp.save(
        {"model": {"w": torch.ones(2)}, "extra": Attack(marker)}, checkpoint_id=tmp_path / "c", no_dist=True
    )
    marker.unlink(missing_ok=True)
    with pytest.raises(UnsafePickleError, match="runs no code"):
        open_checkpoint(tmp_path / "c")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "torch.load", "pathlib.Path.touch"])
def test_metadata_that_names_a_function(name: str, titan: Path) -> None:
    module, _, function = name.rpartition(".")
    (titan / ".metadata").write_bytes(f"c{module}\n{function}\n(S'x'\ntR.".encode())
    with pytest.raises(UnsafePickleError, match=function):
        open_checkpoint(titan)


def test_metadata_missing(titan: Path) -> None:
    (titan / ".metadata").unlink()
    with pytest.raises(UnreadableError, match="not finished"):
        open_checkpoint(titan)


def test_metadata_that_is_no_pickle(titan: Path) -> None:
    (titan / ".metadata").write_bytes(b"nonsense")
    with pytest.raises(UnreadableError, match="damaged"):
        open_checkpoint(titan)


def test_metadata_cut_short(titan: Path) -> None:
    data = (titan / ".metadata").read_bytes()
    (titan / ".metadata").write_bytes(data[: len(data) // 2])
    with pytest.raises(UnreadableError, match="damaged"):
        open_checkpoint(titan)


def test_metadata_of_another_kind(titan: Path) -> None:
    (titan / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UnreadableError, match="not what torch"):
        open_checkpoint(titan)


def test_file_missing(titan: Path) -> None:
    (titan / "__2_0.distcp").unlink()
    with pytest.raises(UnreadableError, match=r"__2_0\.distcp is missing"):
        open_checkpoint(titan)


def test_file_truncated(titan: Path) -> None:
    data = (titan / "__3_0.distcp").read_bytes()
    (titan / "__3_0.distcp").write_bytes(data[:-100])
    with pytest.raises(UnreadableError, match="truncated"):
        open_checkpoint(titan)


def test_chunk_missing(titan: Path) -> None:
    def change(metadata: Any) -> None:
        chunks = metadata.state_dict_metadata[WO].chunks
        gone = chunks.pop(1)
        del metadata.storage_data[MetadataIndex(WO, gone.offsets)]

    edit(titan, change)
    with pytest.raises(CoverageError, match=WO):
        open_checkpoint(titan)


def test_chunk_listed_but_not_stored(titan: Path) -> None:
    def change(metadata: Any) -> None:
        chunk = metadata.state_dict_metadata[WO].chunks[1]
        del metadata.storage_data[MetadataIndex(WO, chunk.offsets)]

    edit(titan, change)
    with pytest.raises(UnreadableError, match="no file holds the part"):
        open_checkpoint(titan)


def test_chunk_stored_but_not_listed(titan: Path) -> None:
    edit(titan, lambda metadata: metadata.state_dict_metadata[WO].chunks.pop(1))
    with pytest.raises(UnreadableError, match=r"4 parts of .* are stored, 3 are listed"):
        open_checkpoint(titan)


def test_data_of_an_unknown_entry(titan: Path) -> None:
    def change(metadata: Any) -> None:
        del metadata.state_dict_metadata["train_state.step"]

    edit(titan, change)
    with pytest.raises(UnreadableError, match="stored, 0 are listed"):
        open_checkpoint(titan)


def _move(metadata: Any, offsets: tuple[int, ...]) -> None:
    chunks = metadata.state_dict_metadata[WO].chunks
    old = chunks[1]
    chunks[1] = ChunkStorageMetadata(torch.Size(offsets), old.sizes)
    info = metadata.storage_data.pop(MetadataIndex(WO, old.offsets))
    metadata.storage_data[MetadataIndex(WO, offsets)] = info


def test_chunks_that_overlap(titan: Path) -> None:
    edit(titan, lambda metadata: _move(metadata, (2, 0)))
    with pytest.raises(CoverageError, match="two places"):
        open_checkpoint(titan)


def test_chunk_out_of_range(titan: Path) -> None:
    edit(titan, lambda metadata: _move(metadata, (14, 0)))
    with pytest.raises(CoverageError, match="reaches outside"):
        open_checkpoint(titan)


def test_tensor_larger_than_its_chunks(titan: Path) -> None:
    def change(metadata: Any) -> None:
        metadata.state_dict_metadata[WO].size = torch.Size((17, 16))

    edit(titan, change)
    with pytest.raises(CoverageError, match=WO):
        open_checkpoint(titan)


def test_chunk_of_another_shape_than_stated(titan: Path) -> None:
    def change(metadata: Any) -> None:
        entry = metadata.state_dict_metadata["norm.weight"]
        other = metadata.state_dict_metadata[WO]
        for mine, theirs in zip(entry.chunks, other.chunks, strict=True):
            ours = MetadataIndex("norm.weight", mine.offsets), MetadataIndex(WO, theirs.offsets)
            one, other = (metadata.storage_data[index] for index in ours)
            metadata.storage_data[ours[0]], metadata.storage_data[ours[1]] = other, one

    edit(titan, change)
    with pytest.raises(UnreadableError, match=r"the metadata says a part of (norm|layers)"):
        open_checkpoint(titan)


def test_chunk_of_another_dtype_than_stated(titan: Path) -> None:
    def change(metadata: Any) -> None:
        metadata.state_dict_metadata[WO].properties.dtype = torch.bfloat16

    edit(titan, change)
    with pytest.raises(UnreadableError, match="the metadata says"):
        open_checkpoint(titan)


def test_dtype_that_is_not_supported(titan: Path) -> None:
    def change(metadata: Any) -> None:
        metadata.state_dict_metadata[WO].properties.dtype = torch.complex64

    edit(titan, change)
    with pytest.raises(UnreadableError, match="complex64"):
        open_checkpoint(titan)


@pytest.mark.parametrize("path", ["../outside.distcp", "/etc/passwd"])
def test_file_outside_of_the_checkpoint(path: str, titan: Path) -> None:
    def change(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = path

    edit(titan, change)
    with pytest.raises(UnreadableError, match="outside the checkpoint"):
        open_checkpoint(titan)


def test_transformed_stream(titan: Path) -> None:
    def change(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.transform_descriptors = ["stream.zstd/1"]

    edit(titan, change)
    with pytest.raises(UnreadableError, match=r"stream\.zstd/1"):
        open_checkpoint(titan)


def test_storage_range_that_is_no_archive(titan: Path) -> None:
    def change(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.offset += 3

    edit(titan, change)
    with pytest.raises(UnreadableError, match=r"not a complete torch archive|truncated|damaged|not where"):
        open_checkpoint(titan)


def test_entries_on_the_same_bytes(titan: Path) -> None:
    def change(metadata: Any) -> None:
        one, other = (
            MetadataIndex(WO, chunk.offsets) for chunk in metadata.state_dict_metadata[WO].chunks[:2]
        )
        metadata.storage_data[other] = metadata.storage_data[one]

    edit(titan, change)
    with pytest.raises(UnreadableError, match="They overlap"):
        open_checkpoint(titan)


def test_range_of_two_archives(tmp_path: Path) -> None:
    """Python's zip module reads the last archive of several and passes over the others."""
    dcp.save({"model": {"a": torch.ones(2), "b": torch.zeros(2)}}, checkpoint_id=tmp_path, no_dist=True)

    def change(metadata: Any) -> None:
        first, second = sorted(metadata.storage_data.items(), key=lambda item: item[1].offset)
        first[1].length += second[1].length
        del metadata.storage_data[second[0]]
        del metadata.state_dict_metadata[second[0].fqn]

    edit(tmp_path, change)
    with pytest.raises(UnreadableError, match="not exactly one torch archive"):
        open_checkpoint(tmp_path)


def test_optimizer_state_of_no_parameter(tmp_path: Path) -> None:
    state = {"w": {"exp_avg": torch.ones(2)}, "x": {"exp_avg": torch.ones(2)}}
    dcp.save(
        {"model": {"w": torch.ones(2)}, "optimizer": {"state": state}}, checkpoint_id=tmp_path, no_dist=True
    )
    with pytest.raises(MismatchError, match="optimizer state of x"):
        read(tmp_path)


def test_optimizer_state_keyed_by_number(tmp_path: Path) -> None:
    state = {0: {"exp_avg": torch.ones(2)}}
    source = tmp_path / "c"
    dcp.save(
        {"model": {"w": torch.ones(2)}, "optimizer": {"state": state}}, checkpoint_id=source, no_dist=True
    )
    assert "keyed by number" in read(source)[1].unresolved
    with pytest.raises(UnreadableError, match=r"keyed by number.*Pass --weights-only"):
        api.reshard(source, tmp_path / "out", world=2)
    api.reshard(source, tmp_path / "out", world=2, weights_only=True)
    assert [(t.name, t.state) for t in read(tmp_path / "out")[1].tensors] == [("w", "weight")]


def test_optimizer_state_of_another_shape(tmp_path: Path) -> None:
    state = {"w": {"row": torch.ones(2)}}
    model = {"w": torch.ones(2, 3)}
    dcp.save({"model": model, "optimizer": {"state": state}}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(UnreadableError, match="state per element"):
        read(tmp_path)


def test_several_models_in_one_directory(tmp_path: Path) -> None:
    for number in (0, 1):
        shutil.copytree(
            CHECKPOINTS["mixtral_accelerate_w2"] / "pytorch_model_fsdp_0",
            tmp_path / f"pytorch_model_fsdp_{number}",
        )
    with pytest.raises(UnreadableError, match="several models"):
        open_checkpoint(tmp_path)


def test_accelerates_unfinished_model_directory(tmp_path: Path) -> None:
    shutil.copytree(CHECKPOINTS["mixtral_accelerate_w2"], tmp_path / "c")
    (tmp_path / "c" / "pytorch_model_fsdp_0" / ".metadata").unlink()
    with pytest.raises(UnreadableError, match="not finished"):
        open_checkpoint(tmp_path / "c")


def test_empty_directory_has_no_metadata(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match="is missing"):
        read_directory(LocalReader(tmp_path), "")


# ---- sharded safetensors


def test_shard_in_the_middle_missing(sharded: Path) -> None:
    (sharded / "shard-00001-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(UnreadableError, match="shard 1 of at least 2 is missing"):
        open_checkpoint(sharded)


def test_last_shard_missing(sharded: Path) -> None:
    (sharded / "shard-00002-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(UnreadableError, match="The last shards are missing"):
        open_checkpoint(sharded)


def _weights_only(sharded: Path) -> None:
    for path in [sharded / ".metadata", *sharded.glob("*.distcp")]:
        path.unlink()


def test_last_shard_missing_by_the_config(sharded: Path) -> None:
    _weights_only(sharded)
    shutil.copy(FIXTURES / "qwen3_moe_transformers_w2e2" / "config.json", sharded)
    assert not any("last shards" in note for note in open_checkpoint(sharded)[1].notes)
    (sharded / "shard-00002-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(UnreadableError, match="The last shards are missing"):
        open_checkpoint(sharded)


def test_without_a_config_a_note_says_that_last_shards_may_be_missing(sharded: Path) -> None:
    _weights_only(sharded)
    assert any("Whether the last shards are missing" in note for note in open_checkpoint(sharded)[1].notes)


def test_file_of_another_save_is_left_out(titan: Path) -> None:
    shutil.copy(titan / "__0_0.distcp", titan / "__7_0.distcp")
    checkpoint = open_checkpoint(titan)[1]
    assert (checkpoint.topology.world_size, checkpoint.topology.ep_size) == (4, 2)
    assert any("__7_0.distcp belongs to another save" in note for note in checkpoint.notes)


def test_file_of_a_shard_missing(sharded: Path) -> None:
    path = sharded / "shard-00002-model-00001-of-00001.safetensors"
    path.rename(sharded / "shard-00002-model-00001-of-00002.safetensors")
    with pytest.raises(UnreadableError, match="should have 2 files"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("info", [None, "no json", json.dumps({})], ids=["absent", "no json", "incomplete"])
def test_shard_that_does_not_say_where_it_belongs(info: str | None, sharded: Path) -> None:
    path = sharded / "shard-00002-model-00001-of-00001.safetensors"
    metadata = {"format": "pt"} if info is None else {"DCP_SHARDING_INFO": info}
    save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(UnreadableError, match="does not say where"):
        open_checkpoint(sharded)


def test_shards_that_overlap(sharded: Path) -> None:
    first, second = (sharded / f"shard-0000{i}-model-00001-of-00001.safetensors" for i in (1, 2))
    shutil.copy(first, second)
    with pytest.raises(CoverageError, match="two places"):
        open_checkpoint(sharded)


# ---- targets that make no sense


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"style": "megatron"}, "is unknown"),
        ({"world": 4, "ep": 3}, "not a multiple"),
        ({"world": 8, "ep": 8}, "do not divide by 8"),
        ({"world": 6, "ep": 2}, "cuts dimension 1 evenly"),
        ({"style": "accelerate"}, "Pass --config"),
    ],
)
def test_impossible_target(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    reader, checkpoint = read(CHECKPOINTS["titan_w4e2"])
    with pytest.raises(UsageError, match=match):
        write(checkpoint, reader, tmp_path / "out", **options)


def test_cast_of_a_training_checkpoint(tmp_path: Path) -> None:
    reader, checkpoint = read(CHECKPOINTS["titan_w4e2"])
    dtype = next(t.dtype for t in checkpoint.tensors)
    with pytest.raises(UsageError, match="--weights-only"):
        write(checkpoint, reader, tmp_path / "out", dtype=dtype)


def test_expert_parallelism_without_experts(tmp_path: Path) -> None:
    reader, checkpoint = read(CHECKPOINTS["dense_tied_w3"])
    with pytest.raises(UsageError, match="no stacks of experts"):
        write(checkpoint, reader, tmp_path / "out", world=4, ep=2)


def test_template_of_another_model(tmp_path: Path) -> None:
    reader, checkpoint = read(CHECKPOINTS["titan_w4e2"])
    _, template = read(CHECKPOINTS["titan_old_w2"])
    with pytest.raises(MismatchError, match="source has not"):
        write(checkpoint, reader, tmp_path / "out", like=template)


def _rank_local(path: Path, second: dict[str, torch.Tensor]) -> None:
    """Two ranks' saves without collectives, each with a metadata file of its own."""
    dcp.save({"w": torch.ones(2, 3), "step": torch.tensor(1.0)}, checkpoint_id=path / "0", no_dist=True)
    dcp.save(second, checkpoint_id=path / "1", no_dist=True)
    for rank in (0, 1):
        (path / str(rank) / "__0_0.distcp").rename(path / f"__{rank}_0.distcp")
        edit_files(path / str(rank), f"__{rank}_0.distcp")
        (path / str(rank) / ".metadata").rename(path / f"__{rank}.metadata")
        (path / str(rank)).rmdir()


def edit_files(path: Path, name: str) -> None:
    def change(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = name

    edit(path, change)


def test_ranks_that_saved_their_own_tensors_under_one_name(tmp_path: Path) -> None:
    """Old expert parallelism: plain local tensors; a merge would keep one rank's experts only."""
    _rank_local(tmp_path, {"w": torch.zeros(2, 3), "step": torch.tensor(1.0)})
    with pytest.raises(MismatchError, match="w differs between"):
        open_checkpoint(tmp_path)


def test_ranks_that_saved_the_same_are_no_mismatch(tmp_path: Path) -> None:
    _rank_local(tmp_path, {"w": torch.ones(2, 3), "step": torch.tensor(1.0)})
    _, checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.topology.world_size == 2


def test_ranks_that_disagree_on_a_shape(tmp_path: Path) -> None:
    _rank_local(tmp_path, {"w": torch.ones(3, 3), "step": torch.tensor(1.0)})
    with pytest.raises(MismatchError, match="Ranks disagree on w"):
        open_checkpoint(tmp_path)
