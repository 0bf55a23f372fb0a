"""A template gives the layout, the source every value: what is kept of the template is said."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from ckpt_tool import api
from ckpt_tool.errors import MismatchError

A, B, NORM = "layers.0.a.weight", "layers.0.b.weight", "norm.weight"
DECAYED, PLAIN = {"lr": 1e-3, "weight_decay": 0.1}, {"lr": 5e-4, "weight_decay": 0.0}
Groups = list[tuple[dict[str, Any], list[str]]]
TWO: Groups = [(DECAYED, [A, B]), (PLAIN, [NORM])]


def parameters() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {A: torch.randn(8, 4), B: torch.randn(8, 4), NORM: torch.randn(4)}


def optimizer(groups: Groups, step: float | None = 3.0) -> dict[str, Any]:
    state = {name: {"exp_avg": value + 1, "exp_avg_sq": value**2} for name, value in parameters().items()}
    if step is not None:
        for one in state.values():
            one["step"] = torch.tensor(step)
    return {"state": state, "param_groups": [{**options, "params": names} for options, names in groups]}


def save(path: Path, groups: Groups, step: float | None = 3.0, **beside: Any) -> Path:
    state = {"model": parameters(), "optimizer": optimizer(groups, step), **beside}
    if not groups:
        del state["optimizer"]["param_groups"]
    dcp.save(state, checkpoint_id=path, no_dist=True)
    return path


def loaded(path: Path) -> dict[str, Any]:
    """Everything in a checkpoint, as torch reads it."""
    found: dict[str, Any] = {}
    _load_state_dict(
        found,
        storage_reader=dcp.FileSystemReader(str(path)),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    return found


def groups_of(path: Path) -> dict[str, tuple[Any, Any]]:
    groups = loaded(path)["optimizer"]["param_groups"]
    return {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["params"]}


def test_groups_in_another_order_keep_their_options(tmp_path: Path) -> None:
    source = save(tmp_path / "source", TWO)
    template = save(
        tmp_path / "template", [({**PLAIN, "lr": 9.0}, [NORM]), ({**DECAYED, "lr": 9.0}, [B, A])]
    )
    api.reshard(source, tmp_path / "out", like=template, verify=True)
    assert groups_of(tmp_path / "out") == groups_of(source)
    lists = [group["params"] for group in loaded(tmp_path / "out")["optimizer"]["param_groups"]]
    assert lists == [[NORM], [B, A]]


def test_one_group_for_two_with_other_options_is_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "source", TWO)
    template = save(tmp_path / "template", [(DECAYED, [A, B, NORM])])
    with pytest.raises(MismatchError, match=rf"{A} and {NORM} are in one parameter group"):
        api.reshard(source, tmp_path / "out", like=template)


def test_missing_step_is_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "source", TWO, step=None)
    template = save(tmp_path / "template", TWO, step=77.0)
    with pytest.raises(MismatchError, match=r"\[step\], and the source has not"):
        api.reshard(source, tmp_path / "out", like=template)


def test_the_sources_own_counters_come_first(tmp_path: Path) -> None:
    def beside(step: int) -> dict[str, Any]:
        return {
            "train_state": {"step": torch.tensor(step), "ntokens_seen": torch.tensor(10 * step)},
            "lr_scheduler": {"last_epoch": 2 * step},
        }

    source = save(tmp_path / "source", TWO, **beside(7))
    template = save(tmp_path / "template", TWO, **beside(1))
    api.reshard(source, tmp_path / "out", like=template)
    found = loaded(tmp_path / "out")
    assert found["train_state"] == {"step": torch.tensor(7), "ntokens_seen": torch.tensor(70)}
    assert found["lr_scheduler"] == {"last_epoch": 14}


@pytest.mark.parametrize("world", [1, 2])
def test_the_dataloaders_state_of_another_number_of_ranks_is_not_taken(world: int, tmp_path: Path) -> None:
    """Places in the data are those of as many ranks as saved them: else the template's stay."""

    def beside(place: int) -> dict[str, Any]:
        return {"dataloader": {"place": place, "order": [place]}}

    source = save(tmp_path / "source", TWO, **beside(7))
    template = save(tmp_path / "template", TWO, **beside(1))
    for rank in range(1, world):  # which had nothing to save
        (template / f"__{rank}_0.distcp").touch()
    result = api.reshard(source, tmp_path / "out", like=template)
    place = 7 if world == 1 else 1
    assert loaded(tmp_path / "out")["dataloader"] == {"place": place, "order": [place]}
    kept = [note for note in result.notes if note.startswith("As the template has it")]
    assert bool(kept) == (world == 2)
    assert all("dataloader.place" in note and "dataloader.order" in note for note in kept)


@pytest.mark.parametrize("world", [1, 2])
def test_the_dataloaders_state_is_left_out_at_another_number_of_ranks(world: int, tmp_path: Path) -> None:
    source = save(tmp_path / "source", TWO, dataloader={"place": 7})
    api.convert(source, tmp_path / "out", to="dcp", world=world)
    assert loaded(tmp_path / "out").get("dataloader") == ({"place": 7} if world == 1 else None)


def test_what_is_kept_of_the_template_is_named(tmp_path: Path) -> None:
    source = save(tmp_path / "source", [])
    template = save(tmp_path / "template", TWO, extra={"tokens": 5})
    result = api.reshard(source, tmp_path / "out", like=template)
    (note,) = [note for note in result.notes if note.startswith("As the template has it")]
    assert "optimizer.param_groups.0.lr" in note
    assert "extra.tokens" in note


def test_tensor_beside_the_model_is_the_sources(tmp_path: Path) -> None:
    source = save(tmp_path / "source", TWO, rng_state={"cpu": torch.arange(9)})
    template = save(tmp_path / "template", TWO, rng_state={"cpu": torch.zeros(9, dtype=torch.int64)})
    api.reshard(source, tmp_path / "out", like=template)
    assert torch.equal(loaded(tmp_path / "out")["rng_state"]["cpu"], torch.arange(9))


def test_tensor_beside_the_model_that_the_source_lacks_is_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "source", TWO)
    template = save(tmp_path / "template", TWO, rng_state={"cpu": torch.arange(9)})
    with pytest.raises(MismatchError, match=r"the tensor rng_state\.cpu"):
        api.reshard(source, tmp_path / "out", like=template)


def test_template_in_another_precision_verifies(tmp_path: Path) -> None:
    wide, narrow = tmp_path / "wide", tmp_path / "narrow"
    save(wide, TWO)
    state = {
        "model": {name: value.bfloat16() for name, value in parameters().items()},
        "optimizer": optimizer(TWO),
    }
    dcp.save(state, checkpoint_id=narrow, no_dist=True)
    assert api.reshard(wide, tmp_path / "a", like=narrow, verify=True).verdict is not None
    assert api.reshard(narrow, tmp_path / "b", like=wide, verify=True).verdict is not None


def renamed(path: Path, name: str) -> Path:
    """The same save with its data in a file of another name."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = name
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    (path / name).parent.mkdir(exist_ok=True)
    shutil.move(path / "__0_0.distcp", path / name)
    return path


def test_template_whose_files_lie_further_below(tmp_path: Path) -> None:
    source = save(tmp_path / "source", TWO)
    template = renamed(save(tmp_path / "template", TWO), "sub/x.bin")
    api.reshard(source, tmp_path / "out", like=template)
    assert (tmp_path / "out" / ".metadata").is_file()
    assert torch.equal(loaded(tmp_path / "out")["model"][A], parameters()[A])


def test_template_with_a_file_named_like_the_manifest_is_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "source", TWO)
    template = renamed(save(tmp_path / "template", TWO), "ckpt_tool_manifest.json")
    with pytest.raises(MismatchError, match="a file of its own"):
        api.reshard(source, tmp_path / "out", like=template)
