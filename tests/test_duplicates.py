"""Experts that are copies of each other are found, and told apart from what is no overwrite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from ckpt_tool.canonical import MoELayer
from ckpt_tool.duplicates import Copies, copies_in, find_copies
from ckpt_tool.execute.budget import KIB, Budget
from ckpt_tool.execute.meter import Silent
from ckpt_tool.formats.registry import open_checkpoint

from .formats.dcp_tools import CHECKPOINTS, convert

BUDGET = Budget.share(256 * KIB, 1)
LAYER = MoELayer("l.0", "l.0.mlp", 4, ((0, 1), (2, 3)))


def _found(path: Path) -> list[Copies]:
    reader, checkpoint = open_checkpoint(path)
    return find_copies(checkpoint, reader, BUDGET, Silent())


@pytest.mark.parametrize("name", ["titan_w4e2", "mixtral_accelerate_w2"])
def test_a_sound_run_has_none(name: str) -> None:
    assert _found(CHECKPOINTS[name]) == []


@pytest.mark.parametrize("prefix", ["layers.0.moe.experts.w", "model.layers.0.mlp.experts.w"])
def test_experts_overwritten_by_rank_0s(prefix: str, tmp_path: Path) -> None:
    """Two EP ranks, and the second holds what the first holds."""
    own = {f"{prefix}{n}": torch.randn(2, 8, 300) for n in (1, 2, 3)}
    dcp.save({key: torch.cat([v, v]) for key, v in own.items()}, checkpoint_id=tmp_path / "c", no_dist=True)
    found = _found(tmp_path / "c")
    assert [(copies.experts, copies.overwritten) for copies in found] == [((0, 2), True), ((1, 3), True)]


def test_ranks_are_named_where_they_are_known(tmp_path: Path) -> None:
    own = {f"layers.0.moe.experts.w{n}": torch.randn(2, 8, 8) for n in (1, 2, 3)}
    dcp.save({key: torch.cat([v, v]) for key, v in own.items()}, checkpoint_id=tmp_path / "c", no_dist=True)
    convert(tmp_path / "c", tmp_path / "d", world=4, ep=2)
    found = _found(tmp_path / "d")
    assert found == [
        Copies("model.layers.0", (0, 2), (0, 1), True),
        Copies("model.layers.0", (1, 3), (0, 1), True),
    ]
    assert "EP ranks 0, 1" in found[0].message()
    assert "overwritten" in found[0].message()


def test_one_equal_matrix_is_not_enough(tmp_path: Path) -> None:
    state = {f"layers.0.moe.experts.w{n}": torch.randn(4, 8, 8) for n in (1, 2, 3)}
    state["layers.0.moe.experts.w1"][:] = 0
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    assert _found(tmp_path) == []


def test_copies_within_one_rank_are_reported_without_the_verdict() -> None:
    digests = {0: ("a",), 1: ("a",), 2: ("b",), 3: ("c",)}
    assert list(copies_in("l.0", digests, LAYER)) == [Copies("l.0", (0, 1), (0, 0), False)]


def test_copies_at_other_places_are_reported_without_the_verdict() -> None:
    digests = {0: ("a",), 1: ("b",), 2: ("c",), 3: ("a",)}
    assert list(copies_in("l.0", digests, LAYER)) == [Copies("l.0", (0, 3), (0, 1), False)]


def test_a_period_tells_where_ranks_are_not_known() -> None:
    digests = {0: ("a",), 1: ("b",), 2: ("a",), 3: ("b",)}
    assert [copies.overwritten for copies in copies_in("l.0", digests, None)] == [True, True]


def test_all_experts_equal_after_upcycling() -> None:
    found = list(copies_in("l.0", dict.fromkeys(range(4), ("a",)), LAYER))
    assert found == [Copies("l.0", (0, 1, 2, 3), (0, 0, 1, 1), False)]
