"""What ``verify`` says of two DCP checkpoints beside their tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from ckpt_tool import api
from ckpt_tool.errors import MismatchError

W = torch.arange(32.0).reshape(8, 4)
TIED = {"model.embed_tokens.weight": W, "lm_head.weight": W.clone(), "model.norm.weight": torch.ones(4)}


def save(path: Path, model: dict[str, torch.Tensor], options: dict[str, Any] | None, **beside: Any) -> Path:
    names = [name for name in model if name != "lm_head.weight"]
    optimizer: dict[str, Any] = {"state": {name: {"exp_avg": model[name] + 1} for name in names}}
    if options is not None:
        optimizer["param_groups"] = [{**options, "params": names}]
    dcp.save({"model": model, "optimizer": optimizer, **beside}, checkpoint_id=path, no_dist=True)
    return path


@pytest.mark.parametrize("option", ["maximize", "amsgrad", "name"])
def test_any_option_that_differs_is_a_difference(option: str, tmp_path: Path) -> None:
    paths = [
        save(tmp_path / str(value), {"w": W}, {"lr": 0.1, "fused": value, option: value})
        for value in (False, True)
    ]
    (difference,) = api.verify(*paths).differences
    assert (difference.kind, difference.name) == ("scalar", option)


def test_choices_of_an_implementation_are_no_difference(tmp_path: Path) -> None:
    paths = [
        save(tmp_path / str(value), {"w": W}, {"lr": 0.1, "fused": value, "foreach": not value})
        for value in (False, True)
    ]
    assert api.verify(*paths).passed


def test_what_one_side_has_alone_is_said(tmp_path: Path) -> None:
    one = save(tmp_path / "a", {"w": W}, {"lr": 0.1}, lr_scheduler={"last_epoch": 3})
    other = save(tmp_path / "b", {"w": W}, None)
    assert {
        "Only the first has parameter groups: not compared.",
        "Only the first has a scheduler's state: not compared.",
    } <= set(api.verify(one, other).notes)
    assert "Only the second has parameter groups: not compared." in api.verify(other, one).notes


def test_further_name_of_a_tied_tensor_that_one_side_lacks_is_said(tmp_path: Path) -> None:
    one = save(tmp_path / "a", TIED, None)
    other = save(
        tmp_path / "b", {name: value for name, value in TIED.items() if name != "lm_head.weight"}, None
    )
    assert any("Only the first has lm_head.weight" in note for note in api.verify(one, other).notes)


@pytest.mark.parametrize("kind", ["dcp", "hub"])
def test_tied_tensors_that_differ_are_called_so(kind: str, tmp_path: Path) -> None:
    model = {**TIED, "lm_head.weight": W + 1}
    path = tmp_path / "c"
    if kind == "dcp":
        save(path, model, None)
    else:
        path.mkdir()
        save_file(model, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": True}))
    with pytest.raises(MismatchError, match=r"lm_head\.weight, which are tied, differ"):
        api.verify(path, path)
