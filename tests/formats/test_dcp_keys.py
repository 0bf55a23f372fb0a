"""What the keys of a DCP checkpoint mean: one model, one optimizer, all else carried or named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from ckpt_tool import api
from ckpt_tool.canonical import WEIGHT, Role
from ckpt_tool.errors import MismatchError, UnreadableError
from ckpt_tool.formats.dcp.reading.reader import ONLY_HERE

from .dcp_tools import convert, read

NAMES = ("model.embed.weight", "model.norm.weight", "lm_head.weight")


def parameters(offset: float = 0.0) -> dict[str, torch.Tensor]:
    return {name: torch.arange(12.0).reshape(4, 3) + offset + 100 * n for n, name in enumerate(NAMES)}


def optimizer(model: dict[str, torch.Tensor], *, flat: bool = False) -> dict[str, Any]:
    states = {
        name: {"step": torch.tensor(3.0), "exp_avg": value + 0.5, "exp_avg_sq": value + 0.25}
        for name, value in model.items()
    }
    if not flat:
        return {"state": states, "param_groups": [{"lr": 0.1, "params": list(model)}]}
    found = {f"state.{name}.{kind}": v for name, kinds in states.items() for kind, v in kinds.items()}
    return found | {f"param_groups.{name}.lr": 0.1 for name in model}


def save(state: dict[str, Any], path: Path) -> Path:
    dcp.save(state, checkpoint_id=path, no_dist=True)
    return path


def load(path: Path) -> dict[str, Any]:
    """Everything in a directory, by the paths its metadata has."""
    found: dict[str, Any] = {}
    _load_state_dict(
        found,
        storage_reader=dcp.FileSystemReader(str(path)),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    return found


def assert_same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert_same(found[key], value)
    elif isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)
    else:
        assert found == wanted


# ---- several models


@pytest.mark.parametrize("name", ["ema", "ema_model"])
def test_a_second_model_beside_is_carried_and_does_not_replace_it(name: str, tmp_path: Path) -> None:
    model = parameters()
    state = {"model": model, name: parameters(7), "optimizer": optimizer(model)}
    source = save(state, tmp_path / "c")
    _, checkpoint = read(source)
    assert checkpoint.layout_hint.scheme.model_root == ("model",)
    assert any(note.startswith(ONLY_HERE) for note in checkpoint.notes)
    layout = convert(source, tmp_path / "out", world=2)
    assert not any(note.startswith(ONLY_HERE) for note in layout.notes)
    found = load(tmp_path / "out")
    assert_same({key: found[key] for key in ("model", name)}, {"model": model, name: state[name]})


def test_what_another_framework_has_no_place_for_is_named(tmp_path: Path) -> None:
    source = save({"model": parameters(), "ema": parameters(7)}, tmp_path / "c")
    layout = convert(source, tmp_path / "out", style="accelerate")
    assert {f"ema.{name}" for name in NAMES} <= {one.label for one in layout.left_out}
    assert any(note.startswith(ONLY_HERE) for note in layout.notes)


def test_two_models_of_unknown_roots_are_refused(tmp_path: Path) -> None:
    model = parameters()
    save({"student": model, "teacher": parameters(7), "optimizer": optimizer(model)}, tmp_path)
    with pytest.raises(UnreadableError, match=r"more than one model \(`student` and `teacher`\)"):
        read(tmp_path)


def test_a_root_that_lacks_a_parameter_of_the_optimizer_is_no_candidate(tmp_path: Path) -> None:
    model = parameters()
    part = {NAMES[0]: model[NAMES[0]]}
    save({"part": part, "whole": model, "optimizer": optimizer(model)}, tmp_path)
    assert read(tmp_path)[1].layout_hint.scheme.model_root == ("whole",)


def test_the_root_is_found_before_the_first_step(tmp_path: Path) -> None:
    model = parameters()
    groups = {"param_groups": optimizer(model)["param_groups"]}
    save({"net": model, "optimizer": groups}, tmp_path)
    assert read(tmp_path)[1].layout_hint.scheme.model_root == ("net",)


def test_a_missing_parameter_is_named(tmp_path: Path) -> None:
    model = parameters()
    states = optimizer(model)
    del model[NAMES[1]]
    save({"model": model, "optimizer": states}, tmp_path)
    with pytest.raises(MismatchError, match=r"optimizer state of model\.norm\.weight \(1 such\)"):
        read(tmp_path)


# ---- several optimizers, and others than are known


def test_two_optimizers_are_refused(tmp_path: Path) -> None:
    model = parameters()
    save({"model": model, "optimizer": optimizer(model), "optim": optimizer(model)}, tmp_path)
    with pytest.raises(UnreadableError, match="more than one optimizer"):
        read(tmp_path)


@pytest.mark.parametrize("where", ["another name", "a list", "in the model"])
def test_optimizer_state_under_another_name_is_refused(where: str, tmp_path: Path) -> None:
    model = parameters()
    state = {
        "another name": {"model": model, "model_optimizer": optimizer(model)},
        "a list": {"model": model, "optimizers": [optimizer(model)] * 2},
        "in the model": {"model": model | {"optimizer": optimizer(model)}},
    }
    save(state[where], tmp_path)
    checkpoint = read(tmp_path)[1]
    assert {tensor.name for tensor in checkpoint.tensors} == set(model)
    assert "looks like an optimizer's" in checkpoint.unresolved
    with pytest.raises(UnreadableError, match=r"looks like an optimizer's.*Pass --weights-only"):
        api.reshard(tmp_path, tmp_path / "out", world=2)


def test_an_optimizer_without_a_model_is_refused(tmp_path: Path) -> None:
    save({"optimizer": optimizer(parameters())}, tmp_path)
    with pytest.raises(UnreadableError, match="and no model"):
        read(tmp_path)
    save({"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}, tmp_path / "numbered")
    with pytest.raises(UnreadableError, match="and no model"):
        read(tmp_path / "numbered")


def test_a_module_may_be_called_as_an_optimizer_is(tmp_path: Path) -> None:
    state = {"model": {"optim.state.h.weight": torch.ones(2), "w": torch.ones(3)}}
    save(state, tmp_path / "c")
    assert {tensor.name for tensor in read(tmp_path / "c")[1].tensors} == state["model"].keys()


def test_a_number_that_is_not_known_is_refused_as_one(tmp_path: Path) -> None:
    model = parameters()
    states = optimizer(model)
    states["state"][NAMES[0]]["mu_product"] = torch.tensor(0.9)
    save({"model": model, "optimizer": states}, tmp_path)
    with pytest.raises(UnreadableError, match=r"\[mu_product\] is one number, float32 \[\]"):
        read(tmp_path)


def test_a_step_that_is_a_plain_number_stays_one(tmp_path: Path) -> None:
    model = parameters()
    states = optimizer(model)
    for name in NAMES:
        states["state"][name]["step"] = 5
    save({"model": model, "optimizer": states}, tmp_path / "c")
    convert(tmp_path / "c", tmp_path / "out", world=2)
    step = load(tmp_path / "out")["optimizer"]["state"][NAMES[0]]["step"]
    assert (type(step), step) == (int, 5)


def test_only_parameters_of_no_group_are_frozen(tmp_path: Path) -> None:
    model = parameters()
    states = optimizer(model)
    for name in NAMES[1:]:
        del states["state"][name]
    states["param_groups"][0]["params"] = list(NAMES[:2])
    save({"model": model, "optimizer": states}, tmp_path)
    roles = {tensor.name: tensor.role for tensor in read(tmp_path)[1].tensors if tensor.state == WEIGHT}
    assert roles == {NAMES[1]: Role.PARAMETER, NAMES[2]: Role.FROZEN}


# ---- what is neither


def titan(step: int) -> dict[str, Any]:
    model = {"tok_embeddings.weight": torch.ones(8, 4), "layers.0.attention.wq.weight": torch.ones(4, 4)}
    return {
        **model,
        "optimizer": optimizer(model, flat=True),
        "lr_scheduler": {"last_epoch": step},
        "train_state": {
            "step": torch.tensor(step, dtype=torch.int32),
            "ntokens_seen": torch.tensor(100 * step),
        },
        "rng_state": {"cpu": torch.arange(9, dtype=torch.uint8)},
    }


def test_torchtitans_counters_may_be_tensors(tmp_path: Path) -> None:
    state = titan(7)
    source = save(state, tmp_path / "c")
    training = read(source)[1].training
    assert training.step == 7
    assert training.client_state["train_state"] == {"step": 7, "ntokens_seen": 700}
    convert(source, tmp_path / "out", world=2)
    found = load(tmp_path / "out")
    keys = ("train_state", "rng_state", "lr_scheduler")
    assert_same({key: found[key] for key in keys}, {key: state[key] for key in keys})


def test_a_template_gets_the_sources_counters(tmp_path: Path) -> None:
    save(titan(7), tmp_path / "c")
    save(titan(1), tmp_path / "template")
    convert(tmp_path / "c", tmp_path / "out", like=read(tmp_path / "template")[1])
    assert_same(load(tmp_path / "out")["train_state"], titan(7)["train_state"])


def test_modules_of_a_model_without_a_root_may_have_any_name(tmp_path: Path) -> None:
    state = {"scheduler.proj.weight": torch.ones(3, 2), "rng.w": torch.ones(2), "net.w": torch.ones(2)}
    source = save(state, tmp_path / "c")
    assert {tensor.name for tensor in read(source)[1].tensors} == state.keys()


def test_paths_are_kept_where_keys_are(tmp_path: Path) -> None:
    state = {
        "model": {"encoder": {"w": torch.ones(3, 2)}},
        "meta": {"a": {"b": {"c": 5}}, "tensor": torch.arange(4)},
    }
    convert(save(state, tmp_path / "c"), tmp_path / "out", world=2)
    assert_same(load(tmp_path / "out"), state)


@pytest.mark.parametrize("weights_only", [False, True])
def test_objects_of_modules_are_the_models(weights_only: bool, tmp_path: Path) -> None:
    model = parameters() | {"layer._extra_state": {"recipe": 1}}
    save({"model": model}, tmp_path / "c" / "pytorch_model_fsdp_0")
    save({"optimizer": optimizer(parameters())}, tmp_path / "c" / "optimizer_0")
    convert(tmp_path / "c", tmp_path / "out", world=3, weights_only=weights_only)
    assert_same(load(tmp_path / "out" / "pytorch_model_fsdp_0"), {"model": model})
