"""Quantised models: values against what the libraries that made the fixtures decode, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ckpt_tool import api
from ckpt_tool.canonical import DType
from ckpt_tool.execute.casts import cast
from ckpt_tool.inspection import expert_rows, overview, tensor_rows
from tests.conftest import ROOT
from tests.formats.hub_files import equal, read

FIXTURES = sorted(path.parent for path in (ROOT / "fixtures" / "quantised").glob("*/made.json"))
IDS = [path.name for path in FIXTURES]
PARAMETERS = 22864


def in_dtype(value: torch.Tensor, dtype: str) -> torch.Tensor:
    """A value as a conversion writes it."""
    own = str(value.dtype).removeprefix("torch.")
    if own == dtype:
        return value
    out = torch.empty(value.shape, dtype=getattr(torch, dtype))
    data = memoryview(value.contiguous().view(torch.uint8).numpy()).cast("B")
    cast(data, DType[own], memoryview(out.view(torch.uint8).numpy()).cast("B"), DType[dtype])
    return out


def by_stored_name(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stacks of experts taken apart, under the names of a Qwen3-MoE's files."""
    found = {}
    for name, value in values.items():
        if ".experts.*." not in name:
            found[name] = value
            continue
        for expert, one in enumerate(value):
            stem = name.replace(".experts.*.", f".mlp.experts.{expert}.").removesuffix(".weight")
            found[f"{stem}_proj.weight"] = one
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fixture", FIXTURES, ids=IDS)
def test_values_are_those_of_the_library_that_made_them(fixture: Path, dtype: str) -> None:
    expected = load_file(fixture / "expected.safetensors")
    _, values = read(fixture / "model")
    found = by_stored_name(values)
    wanted = {key.partition("/")[2] for key in expected}
    assert wanted <= set(found)
    assert len(wanted) == 10
    for name in wanted:
        assert equal(in_dtype(found[name], dtype), expected[f"{dtype}/{name}"]), name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("fixture", FIXTURES, ids=IDS)
def test_a_quantised_model_becomes_a_plain_one(fixture: Path, dtype: str, tmp_path: Path) -> None:
    api.convert(fixture / "model", tmp_path / "out", to="hf", dtype=dtype)
    written = load_file(tmp_path / "out" / "model.safetensors")
    expected = load_file(fixture / "expected.safetensors")
    long = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    plain = {
        name: in_dtype(tensor, long)
        for name, tensor in load_file(fixture / "model" / "model.safetensors").items()
        if name.endswith(("norm.weight", "embed_tokens.weight", "lm_head.weight", ".gate.weight"))
    }
    decoded = {
        key.partition("/")[2]: value for key, value in expected.items() if key.startswith(f"{long}/")
    }
    assert set(written) == set(plain) | set(decoded)
    for name, tensor in (plain | decoded).items():
        if not name.endswith(".gate.weight"):  # kept in its own precision
            assert equal(written[name], tensor), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config


@pytest.mark.parametrize("fixture", FIXTURES, ids=IDS)
def test_without_a_dtype_every_stored_tensor_is_kept(fixture: Path, tmp_path: Path) -> None:
    api.convert(fixture / "model", tmp_path / "out", to="hf", dtype=None)
    written = load_file(tmp_path / "out" / "model.safetensors")
    stored = load_file(fixture / "model" / "model.safetensors")
    assert set(written) == set(stored)
    assert all(equal(written[name], stored[name]) for name in stored)


@pytest.mark.parametrize("fixture", FIXTURES, ids=IDS)
def test_inspect_counts_parameters_and_names_the_scheme(fixture: Path) -> None:
    checkpoint, values = read(fixture / "model")
    found = overview(checkpoint)
    assert found["parameters"] == sum(value.numel() for value in values.values()) == PARAMETERS
    assert (found["moe_layers"], found["experts_per_layer"]) == (1, 2)
    assert [row["expert"] for row in expert_rows(checkpoint)] == [0, 1]
    described = json.loads((fixture / "model" / "config.json").read_text())["quantization_config"]
    schemes = {row["scheme"] for row in tensor_rows(checkpoint, "*experts*")}
    (note,) = (note for note in found["notes"] if note.startswith("Quantised as"))
    assert note.startswith(f"Quantised as {described['quant_method']}: 10 tensors as {min(schemes)};")
