"""Which parameter each of torch's optimizer numbers is, told by shapes and order: pure.

torch numbers parameters as they are in the groups; DeepSpeed fills the groups so (0.19.8,
runtime/engine.py and moe/utils.py ``split_params_into_different_moe_groups_for_optimizer``): the user's
groups in the order of ``module.parameters()``, without the experts, the routers that AutoEP replaced at
the end of their group or (when no parameters were passed to ``initialize``) in their place; then the
experts of each user group, w1, w2, w3 layer by layer, a new group begun where one would exceed a limit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

Shape = tuple[int, ...]
Candidates = Sequence[tuple[str, Shape]]

# moe/utils.py: max_group_size, in elements
_EXPERT_GROUP_LIMIT = 178956971


def assign(
    groups: Sequence[Sequence[Shape | None]],
    options: Sequence[str],
    dense: Candidates,
    experts: Candidates,
    routers: Sequence[str],
) -> list[list[str]] | None:
    """The parameter at each position of each group; None where that is not certain.

    Args:
        groups: the shapes of the states; None where a parameter has none (it is frozen).
        options: the groups' settings, as texts to compare.
        dense: dense parameters in the model's order, with their shapes.
        experts: expert parameters in the model's order, with the shapes of one EP rank.
        routers: module paths of the MoE blocks.
    """
    shapes = {shape for _, shape in experts}
    is_expert = [[shape in shapes for shape in group] for group in groups]
    expert_names = _experts(groups, options, is_expert, experts)
    if expert_names is None:
        return None
    sequences = [
        [shape for shape, expert in zip(group, flags, strict=True) if not expert]
        for group, flags in zip(groups, is_expert, strict=True)
    ]
    last = [item for item in dense if any(item[0].startswith(f"{module}.router.") for module in routers)]
    orders = [list(dense), [item for item in dense if item not in last] + last]
    matches = [_match(sequences, order) for order in orders]
    found = {tuple(map(tuple, match)) for match in matches if match is not None}
    if len(found) != 1:
        return None
    remaining = iter(expert_names)
    merged = []
    for flags, own in zip(is_expert, found.pop(), strict=True):
        names = iter(own)
        merged.append([next(remaining) if expert else next(names) for expert in flags])
    return merged


def _experts(
    groups: Sequence[Sequence[Shape | None]],
    options: Sequence[str],
    is_expert: Sequence[Sequence[bool]],
    experts: Candidates,
) -> list[str] | None:
    """The experts in order of their positions. Several groups of them must be one, cut by the limit."""
    sequences = [
        [shape for shape, expert in zip(group, flags, strict=True) if expert]
        for group, flags in zip(groups, is_expert, strict=True)
    ]
    holding = [index for index, sequence in enumerate(sequences) if sequence]
    for one, other in itertools.pairwise(holding):
        size = sum(math.prod(shape) for shape in sequences[one] if shape)
        following = math.prod(sequences[other][0] or ())
        if options[one] != options[other] or size + following <= _EXPERT_GROUP_LIMIT:
            return None
    return _embed([shape for sequence in sequences for shape in sequence], experts)


def _match(sequences: Sequence[Sequence[Shape | None]], dense: Candidates) -> list[list[str]] | None:
    """Each group's parameters; several groups can be told apart only where they share no shape."""
    filled = [sequence for sequence in sequences if sequence]
    if len(filled) > 1:
        kinds = [set(sequence) for sequence in filled]
        if None in set().union(*kinds) or sum(map(len, kinds)) != len(set().union(*kinds)):
            return None
    found = []
    for sequence in sequences:
        own = dense if len(filled) == 1 else [item for item in dense if item[1] in set(sequence)]
        names = _embed(sequence, own) if sequence else []
        if names is None:
            return None
        found.append(names)
    return found


def _embed(sequence: Sequence[Shape | None], candidates: Candidates) -> list[str] | None:
    """The one way to find ``sequence`` in order among ``candidates``; None if there is none, or more."""
    if len(sequence) == len(candidates):
        fits = all(shape in (None, own) for shape, (_, own) in zip(sequence, candidates, strict=True))
        return [name for name, _ in candidates] if fits else None
    if None in sequence:
        return None
    first = _leftmost(sequence, candidates)
    last = _leftmost(sequence[::-1], candidates[::-1])
    return first if first is not None and last is not None and first == last[::-1] else None


def _leftmost(sequence: Sequence[Shape | None], candidates: Candidates) -> list[str] | None:
    found = []
    remaining = iter(candidates)
    for shape in sequence:
        name = next((name for name, own in remaining if own == shape), None)
        if name is None:
            return None
        found.append(name)
    return found
