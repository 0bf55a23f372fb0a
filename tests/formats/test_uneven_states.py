"""States that no reader of a Universal checkpoint would take are refused before a byte is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_tool import api
from ckpt_tool.errors import MismatchError, UnreadableError
from tests import synthetic
from tests.formats.test_zero3_rejects import edit, optim_file, refused
from tests.synthetic import Layer, Save, uniform

WORLD = 2


@pytest.fixture
def tag(tmp_path: Path) -> Path:
    """A sound checkpoint of ZeRO-3: dense parameters in one sub-group, experts in another."""
    full = synthetic.model({"model.embed.weight": (7, 3)}, [Layer(0, uniform(4, 2), 3, 2)])
    return synthetic.write(tmp_path / "source", full, Save(world=WORLD))


def change(tag: Path, how: Any) -> None:
    for rank in range(WORLD):
        edit(tag / optim_file(rank), lambda saved: how(saved["optimizer_state_dict"]))


def test_all_states_of_a_sub_group_missing_on_every_rank(tag: Path) -> None:
    change(tag, lambda zero: zero["optimizer_state_dict"]["state"].pop(0))
    message = refused(tag, MismatchError, optim_file(0), "model.embed.weight", opening=False)
    assert "has no exp_avg of model.embed.weight (only master)" in message


def test_one_moment_of_a_sub_group_missing_on_every_rank(tag: Path) -> None:
    change(tag, lambda zero: zero["optimizer_state_dict"]["state"][0].pop("exp_avg_sq"))
    message = refused(tag, MismatchError, optim_file(0), opening=False)
    assert "has no exp_avg_sq of model.embed.weight" in message


def test_step_of_a_sub_group_missing_on_every_rank(tag: Path) -> None:
    change(tag, lambda zero: zero["optimizer_state_dict"]["state"][0].pop("step"))
    assert "has no step of model.embed.weight" in refused(tag, MismatchError, optim_file(0), opening=False)


@pytest.mark.parametrize("which", [slice(0, 1), slice(None)], ids=["one", "all"])
def test_masters_of_16_bits_beside_moments(which: slice, tag: Path, tmp_path: Path) -> None:
    def narrow(zero: dict[str, Any]) -> None:
        flats = zero["fp32_flat_groups"]
        flats[which] = [flat.to(torch.bfloat16) for flat in flats[which]]

    change(tag, narrow)
    message = refused(tag, UnreadableError, optim_file(0), opening=False)
    assert "the master of model.embed.weight is bfloat16" in message
    # the advice
    if "--weights-only" in message:
        api.convert(tag, tmp_path / "weights", to="universal", weights_only=True)
        assert api.catalogue(tmp_path / "weights").tensors
    else:
        with pytest.raises(UnreadableError, match="is bfloat16; in a Universal"):
            api.convert(tag, tmp_path / "weights", to="universal", weights_only=True)
    api.reshard(tag, tmp_path / "ranks", world=1, ep=1, verify=True)


def test_weights_of_a_checkpoint_that_lost_a_moment(tag: Path, tmp_path: Path) -> None:
    change(tag, lambda zero: zero["optimizer_state_dict"]["state"].pop(0))
    api.convert(tag, tmp_path / "weights", to="universal", weights_only=True)
    assert api.catalogue(tmp_path / "weights").tensors


def test_no_optimizer_states_at_all(tag: Path, tmp_path: Path) -> None:
    """As before the first step: all parameters are alike."""
    change(tag, lambda zero: zero["optimizer_state_dict"]["state"].clear())
    api.convert(tag, tmp_path / "out", to="universal")
    assert api.catalogue(tmp_path / "out").tensors
