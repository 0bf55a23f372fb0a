"""How the engine groups parameters: parameter groups, expert groups, sub-groups. Pure.

A ZeRO-3 optimizer keeps one flat buffer per sub-group, so who is grouped with whom decides every byte of
a rank's file. The rules (deepspeed 0.19.8, moe/utils.py ``split_params_into_different_moe_groups_for_
optimizer``; runtime/zero/stage3.py ``_create_fp16_sub_groups``):

* the user's groups come first, without their experts; group membership and order never change with the
  topology;
* then, user group by user group, its experts, cut greedily so that one group holds at most
  ``EXPERT_GROUP_LIMIT`` EP-local elements: the number of expert groups depends on the EP size;
* inside a group the dense parameters, then the experts (as they first appear), cut so that a sub-group is
  closed once its partitions reach ``sub_group_size`` elements: this number depends on the world size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ckpt_tool.canonical import ExpertName, ParamGroup, TensorName
from ckpt_tool.errors import UsageError

# deepspeed/moe/utils.py, 0.19.2 to 0.19.8: the default of max_group_size; no config key changes it.
EXPERT_GROUP_LIMIT = 178_956_971
DEFAULT_SUB_GROUP_SIZE = 1_000_000_000

Numel = Callable[[TensorName], int]


@dataclass(frozen=True, slots=True)
class SubGroup:
    """Parameters that share one flat buffer; ``group`` is the index of their parameter group."""

    group: int
    parameters: tuple[TensorName, ...]

    @property
    def is_expert(self) -> bool:
        return isinstance(self.parameters[0], ExpertName)


def regroup(
    groups: Sequence[ParamGroup],
    order: Mapping[TensorName, int],
    source_numel: Numel,
    target_numel: Numel,
    target_name: str,
    limit: int,
) -> list[ParamGroup]:
    """The parameter groups a run at another EP size has.

    Args:
        groups: those of the source, in file order.
        order: position of each parameter in ``module.parameters()``.
        source_numel: EP-local elements of an expert stack at the source.
        target_numel: the same at the target.
        target_name: the new expert groups' name, ``ep_size_4``.
        limit: elements one expert group may hold.

    Raises:
        UsageError: the source does not say for sure which expert groups belong to one user group, and it
            matters.
    """
    dense = [group for group in groups if not _is_expert_group(group)]
    experts = [group for group in groups if _is_expert_group(group)]
    joined, doubtful = _join(experts, dense, order, source_numel, limit)
    result = _split(joined, target_numel, limit)
    if doubtful:
        apart = _split(_cut(joined, doubtful), target_numel, limit)
        if [group.parameters for group in apart] != [group.parameters for group in result]:
            raise UsageError(
                "Two parameter groups of the source have equal options, and its files do not say to which "
                "of them the experts after a full expert group belong; the new groups depend on it. Pass "
                "--like with a checkpoint that the target run saved itself (at step 0, say)."
            )
    return dense + [
        ParamGroup({**group.options, "name": target_name}, group.parameters) for group in result
    ]


def _is_expert_group(group: ParamGroup) -> bool:
    """A client's own optimizer is not split: its group holds dense parameters and experts alike."""
    return bool(group.options.get("moe"))


def _options(group: ParamGroup) -> dict[str, Any]:
    return {key: value for key, value in group.options.items() if key not in ("name", "moe")}


def _join(
    experts: Sequence[ParamGroup],
    dense: Sequence[ParamGroup],
    order: Mapping[TensorName, int],
    numel: Numel,
    limit: int,
) -> tuple[list[ParamGroup], list[tuple[int, int]]]:
    """Put together the expert groups of one user group; name the joins that are not certain.

    Two neighbours are certainly of different user groups if their options differ, or if the second's first
    parameter would still have fitted into the first. Module order that goes back says the same, unless
    two user groups have one name: the engine collects experts by it. A join is certain where only one
    user group has those options. Doubtful joins: (joined group, position in it).
    """
    names = [group.options.get("name") for group in dense]
    same_names = len(set(names)) != len(names)
    joined: list[ParamGroup] = []
    doubtful: list[tuple[int, int]] = []
    held = 0  # elements in the last source group
    for group in experts:
        size = sum(numel(name) for name in group.parameters)
        before = joined[-1] if joined else None
        back = before is not None and order[group.parameters[0]] < order[before.parameters[-1]]
        if (
            before is None
            or _options(before) != _options(group)
            or held + numel(group.parameters[0]) <= limit
            or (back and not same_names)
        ):
            joined.append(group)
        else:
            if back or sum(_options(one) == _options(group) for one in dense) > 1:
                doubtful.append((len(joined) - 1, len(before.parameters)))
            joined[-1] = ParamGroup(before.options, before.parameters + group.parameters)
        held = size
    return joined, doubtful


def _cut(groups: Sequence[ParamGroup], cuts: Sequence[tuple[int, int]]) -> list[ParamGroup]:
    """The other reading: every doubtful join is none."""
    result = []
    for index, group in enumerate(groups):
        positions = [0, *(at for which, at in cuts if which == index), len(group.parameters)]
        for low, high in pairwise(positions):
            result.append(ParamGroup(group.options, group.parameters[low:high]))
    return result


def _split(groups: Sequence[ParamGroup], numel: Numel, limit: int) -> list[ParamGroup]:
    """Cut greedily: a group is closed by the parameter that would take it above the limit."""
    result = []
    for group in groups:
        current: list[TensorName] = []
        held = 0
        for name in group.parameters:
            size = numel(name)
            if current and held + size > limit:
                result.append(ParamGroup(group.options, tuple(current)))
                current, held = [], 0
            current.append(name)
            held += size
        if current:
            result.append(ParamGroup(group.options, tuple(current)))
    return result


def sub_groups(groups: Sequence[ParamGroup], partition_numel: Numel, sub_group_size: int) -> list[SubGroup]:
    """The flat buffers of every rank, in the engine's numbering.

    ``partition_numel`` are the elements one rank reserves for a parameter (its padded partition).
    """
    result = []
    for index, group in enumerate(groups):
        families: dict[bool, list[TensorName]] = {}
        for name in group.parameters:
            families.setdefault(isinstance(name, ExpertName), []).append(name)
        for names in families.values():
            result += [
                SubGroup(index, tuple(part)) for part in _close_at(names, partition_numel, sub_group_size)
            ]
    return result


def _close_at(names: list[TensorName], numel: Numel, size: int) -> list[list[TensorName]]:
    if size >= sum(numel(name) for name in names):
        return [names]
    parts: list[list[TensorName]] = [[]]
    held = 0
    for name in names:
        if parts[-1] and held >= size:
            parts.append([])
            held = 0
        parts[-1].append(name)
        held += numel(name)
    return parts
