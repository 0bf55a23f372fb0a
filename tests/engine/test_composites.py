"""A text model that was saved with the composite's config.json, and the reverse: what is made of either
loads in the class that its config names, whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_tool import api
from tests.engine.hf_models import build

pytestmark = pytest.mark.engine
HOW = api.Execution(fsync=False, workers=1)
PAIRS = [("qwen3_5_moe", "qwen3_5_moe_text"), ("qwen4_exp", "qwen4_exp_text"), ("llama4", "llama4_text")]


def saved(name: str, path: Path) -> Any:
    model = build(name)
    model.save_pretrained(path)
    return model


def loaded(path: Path) -> Any:
    """The model in the class that its config.json names; nothing missing, nothing unexpected."""
    import transformers

    (architecture,) = json.loads((path / "config.json").read_text())["architectures"]
    model, info = getattr(transformers, architecture).from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert {key: value for key, value in info.items() if value} == {}
    return model


@pytest.mark.parametrize(("whole", "text"), PAIRS)
@pytest.mark.parametrize("layout", ["hub", "fused"])
def test_a_text_model_with_the_composites_config(
    whole: str, text: str, layout: str, tmp_path: Path
) -> None:
    saved(whole, tmp_path / "whole")
    expected = saved(text, tmp_path / "text").state_dict()
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path / "text" / "config.json")
    result = api.convert(
        tmp_path / "text", tmp_path / "out", to="hf", hf_layout=layout, verify=True, how=HOW
    )
    assert any("text model alone" in note for note in result.notes)
    found = loaded(tmp_path / "out").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], one) for name, one in expected.items())


def is_same(whole: str, text: str) -> bool:
    """Whether a composite's parameter is one of its text model's."""
    return "language_model" in whole and whole.partition("language_model.")[2].removeprefix(
        "model."
    ) == text.removeprefix("model.")


@pytest.mark.parametrize(("whole", "text"), PAIRS)
def test_a_composite_with_its_text_models_config(whole: str, text: str, tmp_path: Path) -> None:
    expected = saved(whole, tmp_path / "whole").state_dict()
    saved(text, tmp_path / "text")
    shutil.copy(tmp_path / "text" / "config.json", tmp_path / "whole" / "config.json")
    result = api.convert(tmp_path / "whole", tmp_path / "out", to="hf", verify=True, how=HOW)
    assert any("composite" in note for note in result.notes)
    assert result.left_out
    found = loaded(tmp_path / "out").state_dict()
    for name, one in found.items():
        if name != "lm_head.weight":
            (of_whole,) = (value for key, value in expected.items() if is_same(key, name))
            assert torch.equal(one, of_whole), name


@pytest.mark.parametrize(("whole", "text"), PAIRS[:1])
def test_a_run_of_the_text_model_with_the_composites_config(whole: str, text: str, tmp_path: Path) -> None:
    """To a DCP run and back, and to an AutoEP run."""
    saved(whole, tmp_path / "whole")
    expected = saved(text, tmp_path / "text").state_dict()
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path / "text" / "config.json")
    api.convert(tmp_path / "text", tmp_path / "dcp", to="dcp", world=1, verify=True, how=HOW)
    api.convert(
        tmp_path / "dcp", tmp_path / "out", to="hf", config=tmp_path / "whole", verify=True, how=HOW
    )
    found = loaded(tmp_path / "out").state_dict()
    assert all(torch.equal(found[name], one) for name, one in expected.items())
    api.convert(tmp_path / "text", tmp_path / "zero3", to="zero3", ep=1, world=1, how=HOW)
    api.convert(
        tmp_path / "zero3", tmp_path / "again", to="hf", config=tmp_path / "whole", verify=True, how=HOW
    )
    found = loaded(tmp_path / "again").state_dict()
    assert all(torch.equal(found[name], one) for name, one in expected.items())
