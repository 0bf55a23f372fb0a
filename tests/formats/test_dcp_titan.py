"""torchtitan's fused queries, keys and values: put together and taken apart, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from ckpt_tool.canonical import Scalar
from ckpt_tool.errors import MismatchError, UnreadableError
from ckpt_tool.formats.dcp.grammar.titan import Fused, fuse, numbered, unnumbered
from tests.formats.dcp_tools import read, states

LAYER = "layers.0.attention"
HEADS, HEAD, COLUMNS = 2, 4, 5


def saved(
    directory: Path,
    *,
    norm: int | None = HEAD,
    rows: int = 32,
    config: Any = None,
    beside: dict[str, Any] | None = None,
) -> Path:
    """A layer whose optimizer knows one projection: 4 query heads, 2 of keys and values."""
    size = HEADS * HEAD
    weights = {f"{LAYER}.qkv_linear.{one}.weight": torch.rand(size, COLUMNS) for one in ("wk", "wv")}
    weights[f"{LAYER}.qkv_linear.wq.weight"] = torch.rand(rows - 2 * size, COLUMNS)
    if norm is not None:
        weights[f"{LAYER}.q_norm.weight"] = torch.rand(norm)
    whole = torch.arange(32 * COLUMNS, dtype=torch.float32).reshape(32, COLUMNS)
    state: dict[str, Any] = {f"state.{LAYER}.qkv_linear.wqkv.weight.exp_avg": whole}
    if beside is not None:
        state = beside
    dcp.save({**weights, "optimizer": state}, checkpoint_id=directory, no_dist=True)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


STATED = {"num_key_value_heads": HEADS}


@pytest.mark.parametrize(
    "given",
    [{}, {"norm": None, "config": STATED}, {"norm": 16, "config": STATED}],
    ids=["by the norm", "by the config", "a norm of all heads"],
)
def test_states_are_read_as_those_of_the_three(given: dict[str, Any], tmp_path: Path) -> None:
    reader, checkpoint = read(saved(tmp_path / "step-1", **given))
    found = states(reader, checkpoint)
    heads = torch.arange(32 * COLUMNS, dtype=torch.float32).reshape(HEADS, 4, HEAD, COLUMNS)
    for name, part in (("wq", heads[:, :2]), ("wk", heads[:, 2]), ("wv", heads[:, 3])):
        value = found[f"{LAYER}.qkv_linear.{name}.weight", "exp_avg"]
        assert torch.equal(value, part.reshape(-1, COLUMNS)), name


def test_without_the_number_of_heads_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match=r"how many heads.*config\.json"):
        read(saved(tmp_path / "step-1", norm=None))
    with pytest.raises(UnreadableError, match=r"how many heads.*config\.json"):
        read(saved(tmp_path / "step-2", norm=16))


def test_a_config_that_contradicts_the_norm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"num_key_value_heads 4, but by its norms .* has 2 heads"):
        read(saved(tmp_path / "step-1", config={"num_key_value_heads": 4}))


def test_groups_are_those_of_the_three_before_the_first_step(tmp_path: Path) -> None:
    groups = {f"param_groups.{LAYER}.qkv_linear.wqkv.weight.lr": 0.1}
    (group,) = read(saved(tmp_path / "step-1", beside=groups))[1].training.param_groups
    assert group.parameters == tuple(f"{LAYER}.qkv_linear.{name}.weight" for name in ("wq", "wk", "wv"))


def test_a_state_of_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match=r"\[32, 5\], which is not that of \[24, 8, 8\] rows"):
        read(saved(tmp_path / "step-1", rows=40))


@pytest.mark.parametrize(
    ("steps", "groups"),
    [((1, 1, 2), (["q", "k", "v"],)), ((1, 1, 1), (["q", "k"], ["v"]))],
    ids=["steps", "groups"],
)
def test_three_that_differ_do_not_become_one(steps: tuple[int, ...], groups: tuple[list[str], ...]) -> None:
    scalars = {(name, "step"): Scalar(step, None) for name, step in zip("qkv", steps, strict=True)}
    with pytest.raises(MismatchError, match="q, k, v differ"):
        fuse({}, scalars, [({}, names) for names in groups], {"qkv": Fused(("q", "k", "v"), 1)})


def test_layers_for_multi_token_prediction_follow_the_last() -> None:
    assert numbered("mtp_layers.1.enorm.weight", 61) == "layers.62.enorm.weight"
    assert numbered("layers.1.ffn_norm.weight", 61) == "layers.1.ffn_norm.weight"
    assert unnumbered("layers.62.enorm.weight", 61) == "mtp_layers.1.enorm.weight"
    assert unnumbered("layers.60.ffn_norm.weight", 61) == "layers.60.ffn_norm.weight"
    assert unnumbered("norm.weight", 61) == "norm.weight"
