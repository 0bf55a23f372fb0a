"""A run started from a published model with layers for multi-token prediction, which no run of it trains.

The judge is the start from the same model without them, which test_from_hub holds against the engine's own
order and loss.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ckpt_tool

pytestmark = pytest.mark.engine

SOURCE = Path(__file__).resolve().parents[2] / "fixtures" / "deepspeed" / "deepseek_v3_w2e2"
LAST, BEYOND = "model.layers.1.", "model.layers.2."  # the model has two layers


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plain")
    ckpt_tool.consolidate(SOURCE / "checkpoint", root / "model", config=SOURCE / "config.json")
    start(root)
    return root


def start(root: Path) -> Any:
    return ckpt_tool.convert(root / "model", root / "start", to="zero3", world=2, ep=2, verify=True)


def with_mtp(plain: Path, root: Path, **config: Any) -> Mapping[str, Any]:
    """The model with one more layer after its last, as DeepSeek publishes it; the tensors it has more."""
    (root / "model").mkdir()
    shutil.copy(plain / "model" / "config.json", root / "model")
    tensors = load_file(plain / "model" / "model.safetensors")
    more: dict[str, Any] = {
        name.replace(LAST, BEYOND): value + 1 for name, value in tensors.items() if name.startswith(LAST)
    }
    hidden = tensors["model.norm.weight"]
    more |= {f"{BEYOND}{part}.weight": hidden + 2 for part in ("enorm", "hnorm", "shared_head.norm")}
    more[f"{BEYOND}eh_proj.weight"] = np.ones((len(hidden), 2 * len(hidden)), hidden.dtype)
    more[f"{BEYOND}embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    more[f"{BEYOND}shared_head.head.weight"] = tensors["lm_head.weight"] + 3
    save_file({**tensors, **more}, root / "model" / "model.safetensors")
    path = root / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_nextn_predict_layers": 1, **config}))
    return more


def files(directory: Path) -> dict[str, bytes]:
    """What the engine loads."""
    found = [path for path in directory.rglob("*") if path.suffix == ".pt" or path.name == "latest"]
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


def test_start_of_a_model_with_mtp_layers_is_that_of_the_model_without(plain: Path, tmp_path: Path) -> None:
    more = with_mtp(plain, tmp_path)
    report = start(tmp_path)
    assert len(files(plain / "start")) == 5
    assert files(tmp_path / "start") == files(plain / "start")
    assert any("multi-token prediction are left out" in note for note in report.notes)
    experts = 4 * 3  # listed as one stack for each of the three projections
    assert len(report.left_out) == len(more) - experts + 3


def test_kimi_k2_is_started_as_the_model_that_runs_it(plain: Path, tmp_path: Path) -> None:
    with_mtp(plain, tmp_path, model_type="kimi_k2")
    report = start(tmp_path)
    assert files(tmp_path / "start") == files(plain / "start")
    assert any('model_type "deepseek_v3"' in note for note in report.notes)


def test_other_formats_keep_the_mtp_layers(plain: Path, tmp_path: Path) -> None:
    more = with_mtp(plain, tmp_path)
    ckpt_tool.convert(tmp_path / "model", tmp_path / "dcp", to="dcp", verify=True)
    ckpt_tool.convert(tmp_path / "dcp", tmp_path / "again", to="hf", config=tmp_path / "model")
    again = load_file(tmp_path / "again" / "model.safetensors")
    for name, value in more.items():
        assert again[name].tobytes() == value.tobytes(), name
