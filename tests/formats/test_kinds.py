"""Masters, moments and trained weights that are stored as integers of their size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint import load as dcp_load
from torch.distributed.checkpoint import save as dcp_save
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import ckpt_tool
from ckpt_tool.errors import UnreadableError
from tests.conftest import checkpoint_of, copy_fixture
from tests.diagnosis.tools import edit, flats
from tests.formats.dcp_tools import CHECKPOINTS


def refused(path: Path, *words: str) -> None:
    with pytest.raises(UnreadableError) as raised:
        ckpt_tool.open(path)
    for word in words:
        assert word in str(raised.value)


def test_masters_of_zero_3(tmp_path: Path) -> None:
    tag = copy_fixture("mixtral_w2e1", tmp_path)
    for path in tag.glob("*optim_states.pt"):
        flats(path, lambda masters, _: masters.__setitem__(0, masters[0].detach().view(torch.int32)))
    refused(tag, "[master]", "int32")


def test_a_moment_of_zero_3(tmp_path: Path) -> None:
    tag = copy_fixture("mixtral_w2e1", tmp_path)
    for path in tag.glob("*optim_states.pt"):
        flats(
            path, lambda _, states: states[1].update(exp_avg_sq=states[1]["exp_avg_sq"].view(torch.uint32))
        )
    refused(tag, "[exp_avg_sq]", "uint32")


def test_a_moment_of_zero_2(tmp_path: Path) -> None:
    tag = copy_fixture("dense_z2_w3", tmp_path)

    def change(root: Any) -> None:
        state = root["optimizer_state_dict"]["base_optimizer_state"]["state"]
        state[0]["exp_avg"] = state[0]["exp_avg"].view(torch.int32)

    for path in tag.glob("*optim_states.pt"):
        edit(path, change)
    refused(tag, "[exp_avg]", "int32")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published") / "model"
    ckpt_tool.consolidate(
        checkpoint_of("mixtral_w2e1"), root, config=checkpoint_of("mixtral_w2e1").parent / "config.json"
    )
    return root


@pytest.mark.parametrize("part", ["experts.0.w1.weight", "self_attn.q_proj.weight"])
def test_a_published_weight(part: str, published: Path, tmp_path: Path) -> None:
    tensors = load_file(published / "model.safetensors")
    # a stack of experts has one type
    end = ".w1.weight" if "experts" in part else part
    changed = {name: t.view(torch.int32) if name.endswith(end) else t for name, t in tensors.items()}
    assert changed.keys() == tensors.keys()
    save_file(changed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((published / "config.json").read_bytes())
    refused(tmp_path, "[weight]", "int32", "quantised")


def test_a_trained_weight_of_dcp(tmp_path: Path) -> None:
    """One with moments; without them it is a buffer, which may hold integers."""
    source = CHECKPOINTS["titan_w4e2"]
    reader = FileSystemReader(source)
    entries = reader.read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else None
        for key, entry in entries.items()
    }
    dcp_load(state, storage_reader=reader, no_dist=True)
    name = next(key for key in state if key.endswith("attention.wo.weight"))
    state[name] = state[name].view(torch.int32)
    dcp_save(state, storage_writer=FileSystemWriter(tmp_path / "new"), no_dist=True)
    refused(tmp_path / "new", "int32")


def test_buffers_may_hold_integers(tmp_path: Path, published: Path) -> None:
    tensors = load_file(published / "model.safetensors")
    save_file({**tensors, "model.steps": torch.arange(3)}, tmp_path / "model.safetensors")
    assert "model.steps" in ckpt_tool.open(tmp_path)
