"""Client state is a dictionary of the user's, and its keys are what the user chose: not only text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_tool import api, inspection
from tests.conftest import checkpoint_of, config_of, copy_fixture, run_cli

ODD: dict[Any, Any] = {
    1: "one",
    (2, "b"): [2],
    None: {3: 4, None: 5},
    2.5: "float",
    b"x": "bytes",
    frozenset({1, 2}): "set",
    "text": {7: {8: 9}},
}


def model_files(directory: Path) -> list[Path]:
    """Not those of experts, which have the same ending."""
    found = directory.rglob("*mp_rank_00_model_states.pt")
    return sorted(path for path in found if not path.name.startswith("layer_"))


def with_client_state(name: str, tmp_path: Path, *states: Mapping[Any, Any]) -> Path:
    """A copy of a fixture; each rank in turn saved the next of ``states``, the others the last."""
    tag = copy_fixture(name, tmp_path)
    for number, path in enumerate(model_files(tag)):
        saved = torch.load(path, weights_only=False)
        torch.save(saved | dict(states[min(number, len(states) - 1)]), path)
    return tag.parent


@pytest.mark.parametrize("name", ["mixtral_w2e1", "mixtral_z2_w4e2"])
@pytest.mark.parametrize("to", ["universal", "zero3", "zero1"])
def test_keys_that_are_no_text_are_carried_over(name: str, to: str, tmp_path: Path) -> None:
    source = with_client_state(name, tmp_path, ODD)
    api.convert(source, tmp_path / "out", to=to, verify=True)
    saved = torch.load(model_files(tmp_path / "out")[0], weights_only=False)
    assert {key: saved[key] for key in ODD} == ODD
    carried = api.catalogue(tmp_path / "out").training.client_state
    assert {key: carried[key] for key in ODD} == ODD


@pytest.mark.parametrize("name", ["mixtral_w2e1", "mixtral_z2_w4e2"])
def test_inspect_names_them(name: str, tmp_path: Path) -> None:
    source = with_client_state(name, tmp_path, ODD)
    found = inspection.overview(api.catalogue(source))
    named = dict(inspection.overview_lines(found))["client state"].split(", ")
    for key in map(str, ODD):
        assert key in found["client_state"]
        assert set(key.split(", ")) <= set(named)
    assert run_cli("inspect", source, "--json").rc == 0


def test_those_that_differ_between_ranks_are_named(tmp_path: Path) -> None:
    source = with_client_state("mixtral_w2e1", tmp_path, {1: 0, (2,): 0}, {1: 1, (2,): 0, None: 1, 3: 1})
    found = api.catalogue(source).training
    assert (set(found.client_state), set(found.per_rank)) == ({(2,)}, {1, 3, None})
    for to in ("universal", "zero3"):
        notes = api.convert(source, tmp_path / to, to=to).notes
        assert any("1, 3, None" in note for note in notes), notes


def test_a_target_without_a_place_for_client_state_says_what_is_left_out(tmp_path: Path) -> None:
    source = with_client_state("mixtral_w2e1", tmp_path, {"epoch": 3, 4: 5})
    result = api.convert(source, tmp_path / "out", to="dcp", config=config_of("mixtral_w2e1"))
    assert any("Client state is left out: epoch, 4." in note for note in result.notes)
    without = api.convert(
        checkpoint_of("mixtral_w2e1"), tmp_path / "same", to="dcp", config=config_of("mixtral_w2e1")
    )
    assert not any("Client state" in note for note in without.notes)
