"""The engine's grouping rules: DeepSpeed's own code says who is grouped with whom, and ours must agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from hypothesis import assume, given
from hypothesis import strategies as st

from ckpt_tool.canonical import ExpertName, ParamGroup, TensorName
from ckpt_tool.errors import UsageError
from ckpt_tool.formats.deepspeed.facts import groups
from ckpt_tool.formats.deepspeed.facts.partition import partition_size

EP_SIZES = (1, 2, 3, 4, 6, 12)  # all divide the 12 experts of a layer
EXPERTS = 12

# ---- a model and a run of it


@dataclass(frozen=True)
class Run:
    """Parameters in the order of ``module.parameters()`` with the elements of all experts, and the user's
    parameter groups: (options, parameters)."""

    numel: Mapping[TensorName, int]
    groups: Sequence[tuple[Mapping[str, Any], Sequence[TensorName]]]

    @property
    def order(self) -> dict[TensorName, int]:
        return {name: index for index, name in enumerate(self.numel)}

    def local(self, name: TensorName, ep: int) -> int:
        """Elements one EP rank has of a parameter."""
        return self.numel[name] // ep if isinstance(name, ExpertName) else self.numel[name]

    def partition(self, name: TensorName, world: int, ep: int) -> int:
        count = world // ep if isinstance(name, ExpertName) else world
        return partition_size(self.local(name, ep), count)


def fake_parameter(run: Run, name: TensorName, world: int, ep: int) -> torch.nn.Parameter:
    """As much of a parameter as DeepSpeed's grouping looks at."""
    parameter: Any = torch.nn.Parameter(torch.zeros(1))
    parameter.canonical = name
    parameter.ds_numel = run.local(name, ep)
    parameter.partition_numel = lambda: run.partition(name, world, ep)
    if isinstance(name, ExpertName):
        parameter.allreduce = False
        parameter.group_name = f"ep_size_{ep}"
        parameter.ds_process_group = "experts"
    else:
        parameter.ds_process_group = "all"
    return parameter


def engine_dicts(run: Run, world: int, ep: int, limit: int) -> list[dict[str, Any]]:
    """The optimizer's groups as the engine makes them; empty ones it deletes (engine.py)."""
    given_by_user = [
        {**options, "params": [fake_parameter(run, name, world, ep) for name in names]}
        for options, names in run.groups
    ]
    split = split_params_into_different_moe_groups_for_optimizer(given_by_user, max_group_size=limit)
    return [group for group in split if group["params"]]


def engine_groups(run: Run, ep: int, limit: int) -> list[ParamGroup]:
    return [
        ParamGroup(
            {key: value for key, value in group.items() if key != "params"},
            tuple(parameter.canonical for parameter in group["params"]),
        )
        for group in engine_dicts(run, ep, ep, limit)
    ]


def regrouped(run: Run, source_ep: int, target_ep: int, limit: int) -> list[ParamGroup]:
    """Ours, from what a source at ``source_ep`` has."""
    return groups.regroup(
        engine_groups(run, source_ep, limit),
        run.order,
        lambda name: run.local(name, source_ep),
        lambda name: run.local(name, target_ep),
        f"ep_size_{target_ep}",
        limit,
    )


# ---- runs to try


def expert_names(layers: int) -> list[ExpertName]:
    return [ExpertName(f"m.layers.{i}", part) for i in range(layers) for part in ("gate", "down", "up")]


OPTIONS = (
    {"lr": 0.1, "weight_decay": 0.1},
    {"lr": 0.1, "weight_decay": 0.0},
    {"lr": 0.3, "betas": (0.9, 0.95)},
)


@st.composite
def runs(draw: st.DrawFn, user_groups: int, *, equal_options: bool = False) -> Run:
    """1 to 5 MoE layers of different sizes, dealt to ``user_groups`` groups with a dense parameter each."""
    layers = draw(st.integers(1, 5))
    sizes = [draw(st.integers(1, 9)) * EXPERTS for _ in range(layers)]
    names: dict[TensorName, int] = {f"dense.{i}": draw(st.integers(1, 30)) for i in range(user_groups)}
    names |= {f"more.{i}": draw(st.integers(1, 30)) for i in range(draw(st.integers(0, 6)))}
    for name in expert_names(layers):
        names[name] = sizes[name.layer]
    dealt: list[list[TensorName]] = [[f"dense.{i}"] for i in range(user_groups)]
    for name in list(names)[user_groups:]:
        dealt[draw(st.integers(0, user_groups - 1))].append(name)
    chosen = [OPTIONS[0] if equal_options else OPTIONS[i] for i in range(user_groups)]
    return Run(names, [({"name": f"g{i}", **chosen[i]}, dealt[i]) for i in range(user_groups)])


ep_sizes = st.sampled_from(EP_SIZES)
limits = st.integers(1, 600)


# ---- expert groups


@given(st.integers(1, 3).flatmap(runs), ep_sizes, ep_sizes, limits)
def test_regrouping_gives_the_engines_own_groups_at_the_other_ep_size(
    run: Run, source_ep: int, target_ep: int, limit: int
) -> None:
    assert regrouped(run, source_ep, target_ep, limit) == engine_groups(run, target_ep, limit)


@given(runs(2, equal_options=True), ep_sizes, ep_sizes, limits)
def test_user_groups_of_equal_options_are_right_or_refused(
    run: Run, source_ep: int, target_ep: int, limit: int
) -> None:
    try:
        found = regrouped(run, source_ep, target_ep, limit)
    except UsageError:
        return
    assert found == engine_groups(run, target_ep, limit)


@given(runs(2, equal_options=True), ep_sizes, ep_sizes)
def test_user_groups_of_equal_options_are_told_apart_while_no_expert_group_is_full(
    run: Run, source_ep: int, target_ep: int
) -> None:
    """So it is in every run whose experts stay below the limit: nothing to doubt, nothing refused."""
    limit = sum(run.numel.values())
    assert regrouped(run, source_ep, target_ep, limit) == engine_groups(run, target_ep, limit)


def two_groups(
    first: Sequence[TensorName], second: Sequence[TensorName], *, size: int = 12, **other: Any
) -> Run:
    names: dict[TensorName, int] = {"a": 5, "b": 7} | dict.fromkeys(expert_names(2), size)
    return Run(
        names,
        [
            ({"name": "one", "lr": 0.1}, ["a", *first]),
            ({"name": "two", "lr": 0.1, **other}, ["b", *second]),
        ],
    )


def test_border_of_two_equal_user_groups_on_a_full_group_is_refused_where_it_matters() -> None:
    """At ep 1 each group of the engine holds two matrices, at ep 2 four: one reading gives 4 + 2, the
    other 2 + 4."""
    names = expert_names(2)
    run = two_groups(names[:2], names[2:])
    with pytest.raises(UsageError, match=r"equal options.*--like"):
        regrouped(run, 1, 2, 24)


def test_border_of_two_equal_user_groups_on_a_full_group_is_accepted_where_it_does_not_matter() -> None:
    names = expert_names(2)
    run = two_groups(names[:4], names[4:])
    assert regrouped(run, 2, 1, 24) == engine_groups(run, 1, 24)


def test_border_of_two_user_groups_of_different_options_is_certain() -> None:
    names = expert_names(2)
    run = two_groups(names[:2], names[2:], weight_decay=0.0)
    assert regrouped(run, 1, 2, 24) == engine_groups(run, 2, 24)


def test_a_group_that_is_exactly_full_is_not_closed_early() -> None:
    names = expert_names(1)
    run = Run({"a": 1} | dict.fromkeys(names, 12), [({"name": "g"}, ["a", *names])])
    counts = {
        limit: [len(group.parameters) for group in regrouped(run, 12, 1, limit)] for limit in (23, 24, 36)
    }
    assert counts == {23: [1, 1, 1, 1], 24: [1, 2, 1], 36: [1, 3]}


def test_a_parameter_above_the_limit_leaves_no_empty_group() -> None:
    names = expert_names(1)
    run = Run({"a": 1} | dict.fromkeys(names, 120), [({"name": "g"}, ["a", *names])])
    assert [len(group.parameters) for group in regrouped(run, 12, 1, 50)] == [1, 1, 1, 1]
    assert regrouped(run, 12, 1, 50) == engine_groups(run, 1, 50)


def test_real_sizes_have_the_real_number_of_groups() -> None:
    """Mixtral-8x7B: 32 layers of 8 experts of 4096 x 14336; 32 groups at ep 8 and 96 at ep 4."""
    names = expert_names(32)
    run = Run({"a": 1} | dict.fromkeys(names, 8 * 4096 * 14336), [({"name": "g"}, ["a", *names])])
    for source, target, count in ((8, 4, 96), (4, 8, 32), (1, 8, 32)):
        found = regrouped(run, source, target, groups.EXPERT_GROUP_LIMIT)
        assert len(found) == 1 + count
        assert found == engine_groups(run, target, groups.EXPERT_GROUP_LIMIT)


def test_the_limit_is_deepspeeds_own() -> None:
    assert split_params_into_different_moe_groups_for_optimizer.__defaults__ == (groups.EXPERT_GROUP_LIMIT,)


@given(runs(2), ep_sizes, ep_sizes, limits)
def test_options_and_their_order_are_carried_over(
    run: Run, source_ep: int, target_ep: int, limit: int
) -> None:
    for mine, theirs in zip(
        regrouped(run, source_ep, target_ep, limit), engine_groups(run, target_ep, limit), strict=True
    ):
        assert list(mine.options.items()) == list(theirs.options.items())


@given(st.integers(1, 3).flatmap(runs), ep_sizes, ep_sizes, limits)
def test_regrouping_there_and_back_gives_the_sources_groups(
    run: Run, source_ep: int, target_ep: int, limit: int
) -> None:
    there = regrouped(run, source_ep, target_ep, limit)
    back = groups.regroup(
        there,
        run.order,
        lambda name: run.local(name, target_ep),
        lambda name: run.local(name, source_ep),
        f"ep_size_{source_ep}",
        limit,
    )
    assert back == engine_groups(run, source_ep, limit)


def never_silently_wrong(run: Run, source_ep: int, target_ep: int, limit: int) -> None:
    """Right, or refused here, or refused by the engine: it counts the groups and compares the lengths of
    their flat buffers, and the parameters are in its order, so that a wrong border cannot load."""
    expected = engine_groups(run, target_ep, limit)
    try:
        found = regrouped(run, source_ep, target_ep, limit)
    except UsageError:
        return

    def in_order(params: Sequence[ParamGroup]) -> list[TensorName]:
        return [name for group in params for name in group.parameters]

    def sizes(params: Sequence[ParamGroup]) -> list[int]:
        return [sum(run.local(name, target_ep) for name in group.parameters) for group in params]

    assert in_order(found) == in_order(expected)
    assert found == expected or sizes(found) != sizes(expected)


@given(runs(2, equal_options=True), ep_sizes, ep_sizes, limits)
def test_user_groups_of_one_name_are_never_silently_wrong(
    run: Run, source_ep: int, target_ep: int, limit: int
) -> None:
    """The engine keeps expert groups by the name of the user's group: of two groups with one name it puts
    all experts together, so module order can go back within one greedy run."""
    same = [({**options, "name": "same"}, held) for options, held in run.groups]
    never_silently_wrong(Run(run.numel, same), source_ep, target_ep, limit)


@given(runs(2, equal_options=True), ep_sizes, ep_sizes, limits)
def test_a_user_group_of_experts_alone_is_never_silently_wrong(
    run: Run, source_ep: int, target_ep: int, limit: int
) -> None:
    """The engine deletes such a group once its experts are out, so its files do not show that it was."""
    alone = [name for name in run.groups[1][1] if isinstance(name, ExpertName)]
    assume(alone)
    dense = [name for name in run.groups[1][1] if not isinstance(name, ExpertName)]
    first = (run.groups[0][0], [*run.groups[0][1], *dense])
    split = Run(run.numel, [first, (run.groups[1][0], alone)])
    never_silently_wrong(split, source_ep, target_ep, limit)


# ---- sub-groups


def engine_sub_groups(
    run: Run, world: int, ep: int, limit: int, size: int
) -> list[tuple[int, tuple[TensorName, ...]]]:
    """(index of the parameter group, parameters) of each flat buffer, by the methods of stage3.py."""
    own = SimpleNamespace(
        optimizer=SimpleNamespace(param_groups=engine_dicts(run, world, ep, limit)),
        dp_process_group="all",
        sub_group_size=size,
    )
    found = []
    for group in DeepSpeedZeroOptimizer_Stage3._get_trainable_parameter_groups(own):
        for part in DeepSpeedZeroOptimizer_Stage3._create_fp16_sub_groups(own, group["params"]):
            names = tuple(parameter.canonical for parameter in part)
            found.append((group["_ds_source_param_group_id"], names))
    return found


def our_sub_groups(
    run: Run, params: Sequence[ParamGroup], world: int, ep: int, size: int
) -> list[tuple[int, tuple[TensorName, ...]]]:
    return [
        (one.group, one.parameters)
        for one in groups.sub_groups(params, lambda name: run.partition(name, world, ep), size)
    ]


@given(st.integers(1, 3).flatmap(runs), ep_sizes, ep_sizes, st.integers(1, 4), limits, st.integers(1, 80))
def test_sub_groups_are_the_engines_own_at_the_target(
    run: Run, source_ep: int, target_ep: int, edp: int, limit: int, size: int
) -> None:
    world = target_ep * edp
    mine = our_sub_groups(run, regrouped(run, source_ep, target_ep, limit), world, target_ep, size)
    assert mine == engine_sub_groups(run, world, target_ep, limit, size)


@given(runs(1), ep_sizes, st.integers(1, 4), st.integers(1, 80))
def test_sub_groups_of_a_clients_own_optimizer_are_the_engines_own(
    run: Run, ep: int, edp: int, size: int
) -> None:
    """Such a group is not split and holds experts beside dense parameters: family by family."""
    world = ep * edp
    options, names = run.groups[0]
    own = SimpleNamespace(
        optimizer=SimpleNamespace(
            param_groups=[{**options, "params": [fake_parameter(run, name, world, ep) for name in names]}]
        ),
        dp_process_group="all",
        sub_group_size=size,
    )
    expected = [
        (0, tuple(parameter.canonical for parameter in part))
        for group in DeepSpeedZeroOptimizer_Stage3._get_trainable_parameter_groups(own)
        for part in DeepSpeedZeroOptimizer_Stage3._create_fp16_sub_groups(own, group["params"])
    ]
    assert our_sub_groups(run, [ParamGroup(options, tuple(names))], world, ep, size) == expected


@given(runs(1), st.integers(1, 5))
def test_plain_sub_groups_are_the_engines_own_at_any_world_size(run: Run, world: int) -> None:
    dense = Run(
        {name: numel for name, numel in run.numel.items() if isinstance(name, str)},
        [(options, [n for n in names if isinstance(n, str)]) for options, names in run.groups],
    )
    params = engine_groups(dense, 1, 1)
    for size in (1, 7, 30, 10**9):
        assert our_sub_groups(dense, params, world, 1, size) == engine_sub_groups(dense, world, 1, 1, size)


def test_sub_group_size_of_zero_makes_a_sub_group_of_each_parameter() -> None:
    """The engine accepts 0 in its config; every parameter reaches it."""
    names = expert_names(1)
    run = Run({"a": 5, "b": 7} | dict.fromkeys(names, 12), [({"name": "g"}, ["a", "b", *names])])
    params = engine_groups(run, 1, 100)
    assert our_sub_groups(run, params, 2, 1, 0) == engine_sub_groups(run, 2, 1, 100, 0)


def test_a_group_of_frozen_parameters_alone_has_no_sub_group() -> None:
    params = [ParamGroup({"name": "frozen"}, ()), ParamGroup({"name": "trained"}, ("a",))]
    found = groups.sub_groups(params, lambda name: 3, 10)
    assert [(one.group, one.parameters) for one in found] == [(1, ("a",))]


@given(runs(2), ep_sizes, ep_sizes, limits)
def test_regrouping_loses_and_doubles_no_parameter(
    run: Run, source_ep: int, target_ep: int, limit: int
) -> None:
    assume(source_ep != target_ep)
    found = [name for group in regrouped(run, source_ep, target_ep, limit) for name in group.parameters]
    assert sorted(map(str, found)) == sorted(map(str, run.numel))
