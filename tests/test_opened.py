"""Reading from Python: any tensor under any name, any slice, and no byte more. Judged by values that the
engines gathered themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import ckpt_tool
from ckpt_tool import opened, views
from ckpt_tool.errors import UsageError
from ckpt_tool.storage import LocalReader
from tests.conftest import ROOT, checkpoint_of, config_of, raw
from tests.formats.dcp_tools import CHECKPOINTS as DCP_CHECKPOINTS
from tests.formats.dcp_tools import oracle as dcp_oracle

NAMES = ["mixtral_w4e2", "mixtral_bf16_w2e2", "mixtral_z2_w4e2", "qwen2_moe_w2e2"]
STATES = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "fp32": "master"}


def gathered(name: str) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Name, state and value of everything that the engine gathered."""
    for file, state in STATES.items():
        found = load_file(ROOT / "fixtures" / "deepspeed" / name / "oracle" / f"{file}.safetensors")
        yield from ((name, state, tensor) for name, tensor in found.items())


@pytest.fixture
def checkpoint() -> Iterator[opened.Opened]:
    with ckpt_tool.open(checkpoint_of("mixtral_w4e2"), config=config_of("mixtral_w4e2")) as found:
        yield found


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_by_the_engines_name(name: str) -> None:
    with ckpt_tool.open(checkpoint_of(name)) as found:
        for key, state, value in gathered(name):
            assert raw(found[key, state].torch()) == raw(value), (key, state)


INDICES = [0, -1, slice(1, 3), slice(None, None, 2), slice(5, 2), ..., slice(-2, None)]


@pytest.mark.parametrize("name", ["mixtral_w4e2", "qwen2_moe_w2e2"])
def test_slices_are_numpys(name: str) -> None:
    with ckpt_tool.open(checkpoint_of(name)) as found:
        for key, state, value in gathered(name):
            view = found[key, state]
            for first in INDICES:
                got, want = view[first], value[first]
                assert got.shape == tuple(want.shape)
                assert raw(got.torch()) == raw(want.contiguous()), (key, first)
            if value.ndim == 3:
                assert raw(view[1][2:5, ::3].torch()) == raw(value[1][2:5, ::3].contiguous())
                assert raw(view[::2, -1].torch()) == raw(value[::2, -1].contiguous())
                assert raw(view[..., 3].torch()) == raw(value[..., 3].contiguous())
            if value.ndim > 1:
                assert raw(view[..., 1:2][0].torch()) == raw(value[..., 1:2][0].contiguous())


@pytest.mark.parametrize("index", [(0, 0, 0, 0), 99, -99, True, slice(None, None, -1), (..., ...)])
def test_what_is_no_index_is_an_index_error(index: object, checkpoint: opened.Opened) -> None:
    with pytest.raises(IndexError):
        checkpoint["model.layers.0.mlp.experts.w1"][index]  # type: ignore[index]


@pytest.mark.parametrize("name", DCP_CHECKPOINTS)
def test_dcp_by_canonical_names(name: str) -> None:
    folder = ROOT / "fixtures" / "dcp" / name
    source = next(path for path in (folder / "checkpoint", *folder.glob("step-*")) if path.exists())
    with ckpt_tool.open(source) as found:
        known = {(str(one.name), one.state) for one in found.catalogue.tensors}
        compared = 0
        for (key, state), value in dcp_oracle(folder / "oracle").items():
            if (key, state) in known:
                assert raw(found[key, state].torch()) == raw(value)
                assert raw(found[key, state][-1:].torch()) == raw(value[-1:].contiguous())
                compared += 1
        assert compared > 10


def test_one_expert_under_each_of_its_names(checkpoint: opened.Opened) -> None:
    values = {(name, state): value for name, state, value in gathered("mixtral_w4e2")}
    for state in ("master", "exp_avg"):
        truth = values["model.layers.1.mlp.experts.w2", state]
        for key in (
            "model.layers.1.experts.3.down.weight",
            "model.layers.1.block_sparse_moe.experts.3.w2.weight",
        ):
            assert raw(checkpoint[key, state].torch()) == raw(truth[3])
        for key in ("model.layers.1.experts.*.down.weight", "model.layers.1.mlp.experts.down_proj"):
            assert raw(checkpoint[key, state].torch()) == raw(truth)
        w1, w3 = (values[f"model.layers.1.mlp.experts.{w}", state] for w in ("w1", "w3"))
        fused = checkpoint["model.layers.1.mlp.experts.gate_up_proj", state]
        assert raw(fused.torch()) == raw(torch.cat([w1, w3], 1))
        assert raw(fused[2, 11:15].torch()) == raw(torch.cat([w1, w3], 1)[2, 11:15])


def test_a_slice_reads_its_bytes_and_no_more(
    checkpoint: opened.Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    inner = LocalReader.read_into

    def counted(self: LocalReader, path: str, offset: int, buffer: memoryview) -> None:
        read.append(len(buffer))
        inner(self, path, offset, buffer)

    monkeypatch.setattr(LocalReader, "read_into", counted)
    views = checkpoint.state_dict()
    part = checkpoint["model.layers.1.block_sparse_moe.experts.3.w2.weight"][2:4]
    assert not read
    part.numpy()
    assert sum(read) == part.nbytes
    assert len(views) == len(checkpoint.state_dict())


def test_a_model_takes_the_state_dict_and_computes_what_the_engines_did(checkpoint: opened.Opened) -> None:
    config = AutoConfig.from_pretrained(config_of("mixtral_w4e2").parent)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    model.load_state_dict(checkpoint.state_dict())
    truth = load_file(ROOT / "fixtures/deepspeed/mixtral_w4e2/oracle/logits.safetensors")
    with torch.no_grad():
        logits = model(truth["input_ids"]).logits
    assert torch.allclose(logits, truth["logits"], atol=1e-5)
    assert raw(model.lm_head.weight.data) == raw(checkpoint["lm_head.weight"].torch())


def test_keys_and_items_are_the_published_ones_in_the_order_of_the_files(checkpoint: opened.Opened) -> None:
    keys = list(checkpoint)
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in keys
    assert len(keys) == len(checkpoint) == len(set(keys))
    items = dict(checkpoint.items("exp_avg"))
    assert sorted(items) == sorted(keys)
    assert all(view.state == "exp_avg" for view in items.values())
    assert checkpoint.states == ("master", "exp_avg", "exp_avg_sq")
    assert checkpoint.experts(1) == ((0, 1), (2, 3))
    assert (checkpoint.format, checkpoint.topology.world_size) == ("deepspeed-zero3", 4)


def test_without_a_config_names_are_the_checkpoints_own(tmp_path: Path) -> None:
    import shutil

    shutil.copytree(checkpoint_of("mixtral_w4e2"), tmp_path / "run" / "checkpoint")
    with ckpt_tool.open(tmp_path / "run" / "checkpoint") as found:
        assert "model.layers.1.experts.*.down.weight" in list(found)
        assert set(found.state_dict("own")) >= set(found)
        with pytest.raises(UsageError, match="config="):
            found.state_dict()


def test_a_key_of_three_parts_is_no_name(checkpoint: opened.Opened) -> None:
    key: object = ("model.norm.weight", "master", "more")
    assert key not in checkpoint
    with pytest.raises(KeyError, match="a name and a state"):
        checkpoint[key]  # type: ignore[index]


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("model.norm.weigt", "model.norm.weight"),
        (("model.norm.weight", "exp_avgs"), "exp_avg_sq"),
    ],
)
def test_an_unknown_name_is_a_key_error_with_names_like_it(
    key: str | tuple[str, str], words: str, checkpoint: opened.Opened
) -> None:
    assert key not in checkpoint
    with pytest.raises(KeyError, match=words):
        checkpoint[key]
    with pytest.raises(KeyError, match="MoE layers"):
        checkpoint.experts(77)


def test_every_dtype_as_torch_and_what_numpy_has(tmp_path: Path) -> None:
    held = {
        "bf16": torch.arange(-4.0, 4).to(torch.bfloat16).reshape(2, 4),
        "fp16": torch.arange(8.0).half(),
        "fp8": torch.arange(8.0).to(torch.float8_e4m3fn),
        "i64": torch.arange(8),
        "flag": torch.tensor([True, False]),
        "none": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
    }
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    with ckpt_tool.open(tmp_path) as found:
        for name, value in held.items():
            got = found[name].torch()
            assert (got.dtype, got.shape) == (value.dtype, value.shape)
            assert raw(got) == raw(value)
        assert np.array_equal(found["bf16"].numpy(), held["bf16"].float().numpy())
        assert np.array_equal(np.asarray(found["i64"]), held["i64"].numpy())
        assert np.array_equal(found["flag"].numpy(), held["flag"].numpy())
        with pytest.raises(UsageError, match=r"torch\(\)"):
            found["fp8"].numpy()
        with pytest.raises(TypeError):
            len(found["scalar"])


def test_torch_functions_read_a_view(checkpoint: opened.Opened) -> None:
    view = checkpoint["model.norm.weight"]
    assert torch.equal(torch.stack([view, view])[1], view.torch())
    assert isinstance(view, views.View)
    assert torch.overrides.is_tensor_like(view)
