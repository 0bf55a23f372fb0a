"""What torchtitan 0.3.0 saves under other names, or in other pieces, than the model has elsewhere.

Multi-token-prediction layers are modules of their own, ``mtp_layers.{k}``; everybody else numbers them
after the last layer (models/deepseek_v3/state_dict_adapter.py, ``_map_to_hf_layer_key``).

Query, key and value may be one parameter (``FusedQKVLinear``, models/common/attention.py). Hooks of the
module save it as the three that others have; the optimizer knows the one, and saves its states so. Its
rows are, for each key-value head, those of the head's queries, its key, its value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ckpt_tool.canonical import WEIGHT, Box, Region, Scalar, Tensor
from ckpt_tool.errors import MismatchError, UnreadableError
from ckpt_tool.families import text_config
from ckpt_tool.formats.dcp.contents import Held
from ckpt_tool.formats.dcp.grammar.keys import Sorted, fused_parts
from ckpt_tool.geometry import Axis, Placed, assemble, take

MTP = "mtp_layers"
_MTP_LAYER = re.compile(rf"{MTP}\.(\d+)\.(.+)")
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


# ---- layers


def main_layers(names: Iterable[str]) -> int:
    """How many layers precede those for multi-token prediction."""
    found = (_LAYER.fullmatch(name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def numbered(name: str, layers: int) -> str:
    """``mtp_layers.{k}`` as ``layers.{layers + k}``, all else as it is."""
    match = _MTP_LAYER.fullmatch(name)
    return f"layers.{layers + int(match[1])}.{match[2]}" if match and layers else name


def unnumbered(name: str, layers: int) -> str:
    """The inverse of ``numbered``."""
    match = _LAYER.fullmatch(name)
    beyond = int(match[1]) - layers if match else -1
    return f"{MTP}.{beyond}.{match[2]}" if match and beyond >= 0 else name


# ---- query, key and value


@dataclass(frozen=True, slots=True)
class Fused:
    """One parameter of a run: the names its module saves it under, and its number of key-value heads."""

    parts: tuple[str, str, str]
    heads: int


class _Part:
    """The rows of one of the three in the fused tensor, which ``fuse`` undoes."""

    def __init__(self, origin: Tensor, part: Tensor) -> None:
        self.origin, self._part = origin, part

    def __iter__(self) -> Iterator[Region | Box]:
        return iter(self._part.regions)


def key_value_heads(
    parts: tuple[str, str, str], shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any] | None
) -> int | None:
    """By a ``config.json``; else by the size of a head, which the norm of the queries may have (qwen3).

    Raises:
        MismatchError: the two contradict each other.
    """
    seen = _heads_by_norm(parts, shapes)
    stated = text_config(config or {}).get("num_key_value_heads")
    if type(stated) is not int or stated < 1:
        return seen
    if seen not in (None, stated):
        raise MismatchError(
            f"config.json has num_key_value_heads {stated}, but by its norms {parts[1]} has {seen} heads. "
            "Give the config.json of the model that was trained."
        )
    return stated


def _heads_by_norm(parts: tuple[str, str, str], shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Norms of single heads divide the rows of queries and keys; a norm of all heads says nothing."""
    attention = parts[0].rsplit(".", 3)[0]
    norms = {shapes.get(f"{attention}.{kind}_norm.weight") for kind in "qk"} - {None}
    queries, keys = shapes[parts[0]][0], shapes[parts[1]][0]
    sizes = [norm[0] for norm in norms if norm is not None and len(norm) == 1 and norm[0]]
    if len(norms) != 1 or len(sizes) != 1 or sizes[0] >= queries:
        return None
    return keys // sizes[0] if queries % sizes[0] == 0 and keys % sizes[0] == 0 else None


def take_apart(
    entries: Sorted, config: Mapping[str, Any] | None, root: str
) -> tuple[Sorted, dict[str, Fused]]:
    """The entries with an optimizer state for each parameter that is saved, and what was fused.

    Raises:
        UnreadableError: nothing says how many heads there are, or the shapes do not fit.
    """
    shapes = {name: held.tensor.shape for name, held in entries.model.items()}
    fused: dict[str, Fused] = {}
    listed = [name for _, names in entries.groups for name in names]
    for name in dict.fromkeys([*(fqn for fqn, _ in [*entries.states, *entries.scalars]), *listed]):
        parts = fused_parts(name, entries.model)
        if parts is None:
            continue
        heads = key_value_heads(parts, shapes, config)
        if heads is None:
            raise UnreadableError(
                f"{root}: the optimizer state of {name} is of queries, keys and values together, and "
                "nothing in the checkpoint says how many heads they have. Put the model's config.json "
                "into its directory."
            )
        fused[name] = Fused(parts, heads)
    if not fused:
        return entries, fused
    states: dict[tuple[str, str], Held] = {}
    for (name, state), held in entries.states.items():
        if name in fused:
            for part in _split(held.tensor, fused[name], shapes, root):
                states[str(part.name), state] = Held(part, held.parts)
        else:
            states[name, state] = held

    def apart(name: str) -> tuple[str, ...]:
        return fused[name].parts if name in fused else (name,)

    scalars = {
        (part, state): scalar for (name, state), scalar in entries.scalars.items() for part in apart(name)
    }
    groups = [
        (options, [part for name in names for part in apart(name)]) for options, names in entries.groups
    ]
    return replace(entries, states=states, scalars=scalars, groups=groups), fused


def _split(
    whole: Tensor, fused: Fused, shapes: Mapping[str, tuple[int, ...]], root: str
) -> Iterator[Tensor]:
    rows = [shapes[part][0] for part in fused.parts]
    if whole.shape != (sum(rows), *shapes[fused.parts[0]][1:]) or any(
        count % fused.heads for count in rows
    ):
        raise UnreadableError(
            f"{root}: {whole.label()} has shape {list(whole.shape)}, which is not that of {rows} rows of "
            f"queries, keys and values for {fused.heads} heads."
        )
    head, first = sum(rows) // fused.heads, 0
    rest = tuple(Axis(dim, 0, size) for dim, size in enumerate(whole.shape))[1:]
    for name in fused.parts:
        count = shapes[name][0] // fused.heads
        placed = [
            Placed(
                take(whole, [Axis(0, number * head + first, count), *rest]),
                (Axis(0, number * count, count), *rest),
            )
            for number in range(fused.heads)
        ]
        part = assemble(whole, shapes[name], placed)
        yield replace(part, name=name, regions=_Part(whole, part))
        first += count


def fuse(
    tensors: dict[tuple[str, str], Tensor],
    scalars: dict[tuple[str, str], Scalar],
    groups: list[tuple[Mapping[str, Any], list[str]]],
    fused: Mapping[str, Fused],
) -> list[tuple[Mapping[str, Any], list[str]]]:
    """Put the optimizer states together, in place; weights stay apart. Returns the groups.

    Raises:
        MismatchError: the three have states of different kinds, steps or groups.
    """
    kinds: dict[str, set[str]] = {}
    for name, state in tensors:
        if state != WEIGHT:
            kinds.setdefault(name, set()).add(state)
    steps: dict[str, dict[str, Scalar]] = {}
    for (name, state), scalar in scalars.items():
        steps.setdefault(name, {})[state] = scalar
    group_of = {name: number for number, (_, names) in enumerate(groups) for name in names}
    whole: dict[str, str | None] = {}
    for name, one in fused.items():
        first, *others = [(kinds.get(part), steps.get(part), group_of.get(part)) for part in one.parts]
        if any(other != first for other in others):
            raise MismatchError(
                f"{', '.join(one.parts)} differ in their optimizer states or parameter groups; in the "
                f"target run they are one parameter, {name}."
            )
        for state in sorted(kinds.get(one.parts[0], ())):
            tensors[name, state] = _joined(name, [tensors.pop((part, state)) for part in one.parts], one)
        for state, scalar in steps.get(one.parts[0], {}).items():
            for part in one.parts:
                del scalars[part, state]
            scalars[name, state] = scalar
        whole |= dict(zip(one.parts, (name, None, None), strict=True))
    return [
        (options, [new for name in names if (new := whole.get(name, name)) is not None])
        for options, names in groups
    ]


def _joined(name: str, parts: list[Tensor], fused: Fused) -> Tensor:
    origins = [part.regions.origin for part in parts if isinstance(part.regions, _Part)]
    if len(origins) == len(parts) and all(origin is origins[0] for origin in origins):
        return replace(origins[0], name=name)
    heads = fused.heads
    if any(part.shape[0] % heads for part in parts):
        raise MismatchError(f"{name} cannot be put together for {heads} key-value heads.")
    counts = [part.shape[0] // heads for part in parts]
    rest = tuple(Axis(dim, 0, size) for dim, size in enumerate(parts[0].shape))[1:]
    placed = []
    for index, (part, count) in enumerate(zip(parts, counts, strict=True)):
        for number in range(heads):
            rows = take(part, [Axis(0, number * count, count), *rest])
            start = number * sum(counts) + sum(counts[:index])
            placed.append(Placed(rows, (Axis(0, start, count), *rest)))
    shape = (heads * sum(counts), *parts[0].shape[1:])
    return replace(assemble(parts[0], shape, placed), name=name)
