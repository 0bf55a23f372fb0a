"""Names with the parts that wrappers of modules add: `module.`, `_orig_mod.` and the like, anywhere in a
path, in every format. They mean nothing, and everything converts as if they were not there."""

from __future__ import annotations

import json
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader

from ckpt_tool import api
from ckpt_tool.errors import UnreadableError
from ckpt_tool.manifest import MANIFEST
from tests.conftest import checkpoint_of, config_of, raw

MOE, DENSE = "qwen2_moe_w2e2", "dense_tied_w3"
DCP = Path(__file__).parent.parent / "fixtures" / "dcp"
HOW = api.Execution(fsync=False, workers=1)


def compiled(name: str) -> str:
    return f"_orig_mod.{name}"


def distributed(name: str) -> str:
    return f"module.{name}"


def everywhere(name: str) -> str:
    """Compiled layers, activation checkpointing within FSDP1, all of it in DDP."""
    layer = r"\1_fsdp_wrapped_module._checkpoint_wrapped_module._orig_mod."
    return f"module.{re.sub(r'^(model[.]layers[.][0-9]+[.])', layer, name)}"


WRAPPED = pytest.mark.parametrize("wrapped", [compiled, distributed, everywhere])


def published(source: Path, tmp_path: Path, **more: Any) -> dict[str, bytes]:
    """The weights that a source is published as, by name."""
    target = tmp_path / "published"
    shutil.rmtree(target, ignore_errors=True)
    result = api.convert(source, target, to="hf", verify=True, how=HOW, **more)
    assert result.verdict is not None
    assert result.verdict.passed
    return {name: raw(tensor) for name, tensor in load_file(target / "model.safetensors").items()}


def said(source: Path) -> str:
    return " ".join(api.catalogue(source).notes)


# ---- safetensors


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Without our manifest: somebody else saved it."""
    api.consolidate(checkpoint_of(MOE), tmp_path / "model", config=config_of(MOE), how=HOW)
    (tmp_path / "model" / MANIFEST).unlink()
    return tmp_path / "model"


@WRAPPED
def test_safetensors_under_wrappers_names(
    wrapped: Callable[[str], str], model: Path, tmp_path: Path
) -> None:
    plain = published(model, tmp_path)
    file = model / "model.safetensors"
    save_file({wrapped(name): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert "wrappers" in said(model)
    assert published(model, tmp_path) == plain


def test_safetensors_with_a_name_twice_with_and_without_a_wrapper(model: Path) -> None:
    file = model / "model.safetensors"
    held = load_file(file)
    held["model._orig_mod.norm.weight"] = held["model.norm.weight"].clone()
    save_file(held, file, {"format": "pt"})
    with pytest.raises(UnreadableError, match="which are one name without"):
        api.catalogue(model)


# ---- DCP


def state_of(path: Path) -> dict[str, Any]:
    """All entries of a DCP checkpoint under their keys, read by torch."""
    metadata = FileSystemReader(path).read_metadata()
    state: dict[str, Any] = {}
    for key, about in metadata.state_dict_metadata.items():
        size = getattr(about, "size", None)
        state[key] = torch.zeros(size, dtype=about.properties.dtype) if size is not None else None
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return state


def wrapped_dcp(source: Path, target: Path, wrapped: Callable[[str], str]) -> None:
    """The same run, its parameters under wrappers' names."""
    names = [key.removeprefix("model.") for key in state_of(source) if key.startswith("model.")]
    nested: dict[str, Any] = {"model": {}, "optimizer": {"state": {}, "param_groups": {}}}
    for key, value in state_of(source).items():
        if key.startswith("model."):
            nested["model"][wrapped(key.removeprefix("model."))] = value
            continue
        match = re.fullmatch(r"optimizer\.(state|param_groups)\.(.*)\.(\w+)", key)
        assert match is not None, key
        name = match[2] if match[2].isdecimal() else wrapped(match[2])
        value = [wrapped(one) for one in value] if match[3] == "params" else value
        nested["optimizer"][match[1]].setdefault(name, {})[match[3]] = value
    assert names
    dcp.save(nested, checkpoint_id=target, no_dist=True)


@WRAPPED
def test_dcp_under_wrappers_names(wrapped: Callable[[str], str], tmp_path: Path) -> None:
    source = DCP / DENSE
    wrapped_dcp(source / "checkpoint", tmp_path / "saved", wrapped)
    assert "wrappers" in said(tmp_path / "saved")
    given = {"config": source / "config.json"}
    plain = published(source / "checkpoint", tmp_path, **given)
    assert published(tmp_path / "saved", tmp_path, **given) == plain
    assert api.verify(source / "checkpoint", tmp_path / "saved", config=source / "config.json").passed


@WRAPPED
def test_a_dcp_run_with_wrappers_finds_the_names_it_saved(
    wrapped: Callable[[str], str], tmp_path: Path
) -> None:
    wrapped_dcp(DCP / DENSE / "checkpoint", tmp_path / "saved", wrapped)
    api.reshard(tmp_path / "saved", tmp_path / "resharded", world=2, verify=True, how=HOW)
    api.reshard(tmp_path / "resharded", tmp_path / "like", like=tmp_path / "saved", verify=True, how=HOW)
    before = state_of(tmp_path / "saved")
    for found in (state_of(tmp_path / "resharded"), state_of(tmp_path / "like")):
        assert list(map(str, sorted(found))) == sorted(before)
        for key, value in before.items():
            assert (
                torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value
            )


# ---- DeepSpeed


def rewrapped(value: Any, wrapped: Callable[[str], str]) -> Any:
    """Whatever an engine pickled, with all names of parameters changed."""
    if isinstance(value, str) and re.match(r"model\.|lm_head\.", value):
        return wrapped(value)
    if isinstance(value, OrderedDict | dict):
        made = type(value)() if type(value) in (dict, OrderedDict) else None
        if made is not None:
            for key, item in value.items():
                made[rewrapped(key, wrapped)] = rewrapped(item, wrapped)
            return made
    if type(value) in (list, tuple, set):
        return type(value)(rewrapped(item, wrapped) for item in value)
    return value


def wrapped_run(name: str, target: Path, wrapped: Callable[[str], str]) -> Path:
    shutil.copytree(checkpoint_of(name), target)
    for file in target.rglob("*.pt"):
        torch.save(rewrapped(torch.load(file, weights_only=False), wrapped), file)
    return target


@pytest.mark.parametrize("wrapped", [compiled, distributed])
@pytest.mark.parametrize("name", [MOE, "mixtral_w2e1"])
def test_a_deepspeed_run_under_wrappers_names(
    name: str, wrapped: Callable[[str], str], tmp_path: Path
) -> None:
    saved = wrapped_run(name, tmp_path / "saved", wrapped)
    assert "wrappers" in said(saved)
    plain = published(checkpoint_of(name), tmp_path, config=config_of(name))
    assert published(saved, tmp_path, config=config_of(name)) == plain
    assert api.verify(checkpoint_of(name), saved).passed


def module_names(path: Path) -> list[str]:
    tag = path / (path / "latest").read_text().strip()
    return list(torch.load(next(tag.glob("*model_states.pt")), weights_only=False)["module"])


def test_a_deepspeed_run_with_wrappers_finds_the_names_it_saved(tmp_path: Path) -> None:
    saved = wrapped_run(MOE, tmp_path / "saved", compiled)
    api.reshard(saved, tmp_path / "resharded", ep=1, world=2, verify=True, how=HOW)
    assert module_names(tmp_path / "resharded") == module_names(saved)
    api.reshard(checkpoint_of(MOE), tmp_path / "like", like=saved, verify=True, how=HOW)
    assert module_names(tmp_path / "like") == module_names(saved)
    api.convert(saved, tmp_path / "universal", to="universal", verify=True, how=HOW)
    directories = [path.name for path in tmp_path.glob("universal/*/zero/*") if path.is_dir()]
    assert directories
    assert all(directory.startswith("_orig_mod.") for directory in directories)
    plain = published(checkpoint_of(MOE), tmp_path, config=config_of(MOE))
    assert published(tmp_path / "universal", tmp_path, config=config_of(MOE)) == plain
    assert json.loads(config_of(MOE).read_text())
