"""The ranks behind a DCP checkpoint, as far as chunks and file names tell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ckpt_tool.canonical import ExpertName, MoELayer, Tensor, TensorName, Topology, even_holders
from ckpt_tool.formats.dcp.contents import Held, Part, rank_of
from ckpt_tool.formats.dcp.grammar.experts import titan_expert
from ckpt_tool.formats.dcp.grammar.grid import expert_grid

_BLOCK = re.compile(r".*?\.\d+\.\w+")


def world_size(files: Iterable[str]) -> int | None:
    """One more than the highest rank in the files' names; ranks that hold nothing write a file, too."""
    ranks = [rank_of(file) for file in files]
    known = [rank for rank in ranks if rank is not None]
    return max(known) + 1 if known and len(known) == len(ranks) else None


def unbroken(files: Iterable[str]) -> range:
    """The ranks in files' names from 0 on, up to the first that is missing."""
    ranks = {rank_of(file) for file in files}
    count = 0
    while count in ranks:
        count += 1
    return range(count)


def ep_size(stacks: Iterable[Held], world: int | None) -> int | None:
    """The expert-parallel size that gives the experts the chunks they have, where only one does."""
    if world is None:
        return None
    possible: set[int] | None = None
    for held in stacks:
        actual = {(part.rank, part.offsets, part.sizes) for part in held.parts if 0 not in part.sizes}
        fits = {ep for ep in range(1, world + 1) if world % ep == 0 and _fits(held, actual, world, ep)}
        possible = fits if possible is None else possible & fits
    return next(iter(possible)) if possible and len(possible) == 1 else None


def _fits(
    held: Held, actual: set[tuple[int | None, tuple[int, ...], tuple[int, ...]]], world: int, ep: int
) -> bool:
    shape = held.tensor.shape
    if shape[0] % ep:
        return False
    for rows in (False, True):
        grid = expert_grid(shape, world, ep, rows=rows)
        if grid is not None and actual == {(c.rank, c.offsets, c.sizes) for c in grid if 0 not in c.sizes}:
            return True
    # left to EP alone: each ep rank's experts are whole, and one of the ranks that hold them writes them
    size = shape[0] // ep
    return (
        ep > 1
        and actual
        == {(rank, (rank % ep * size, 0, 0), (size, *shape[1:])) for rank, *_ in actual if rank is not None}
        and len(actual) == ep
    )


def layers_of(
    tensors: Iterable[Tensor],
    names: Mapping[str, tuple[TensorName, ...]],
    held: Mapping[str, Held],
    ep: int | None,
) -> tuple[MoELayer, ...]:
    """The MoE layers, and which experts each EP rank (else: each chunk along the experts) holds."""
    key_of = {name: key for key, given in names.items() for name in given}
    found: dict[str, MoELayer] = {}
    for tensor in tensors:
        if not isinstance(tensor.name, ExpertName) or tensor.name.layer_path in found:
            continue
        key = key_of[tensor.name]
        count = tensor.shape[0]
        holders: tuple[tuple[int, ...], ...] = ()
        if ep:
            holders = even_holders(count // ep, ep)
        elif len(held[key].tensor.shape) == 3:
            holders = _holders(held[key].parts)
        found[tensor.name.layer_path] = MoELayer(tensor.name.layer_path, _module(key), count, holders)
    return tuple(found.values())


def _module(key: str) -> str:
    """The MoE block that a tensor of experts is in: what has ``experts``, else what is right in a layer."""
    if titan_expert(key):
        return key[: key.index(".moe.") + len(".moe")]
    block, experts, _ = key.partition(".experts")
    match = None if experts else _BLOCK.match(key)
    return match[0] if match else block


def _holders(parts: Iterable[Part]) -> tuple[tuple[int, ...], ...]:
    spans = sorted({(part.offsets[0], part.sizes[0]) for part in parts if part.sizes[0]})
    return tuple(tuple(range(first, first + size)) for first, size in spans)


def topology(world: int | None, ep: int | None) -> Topology:
    if world is None or ep is None:
        return Topology(world_size=world)
    ranks = range(world)
    return Topology(
        world_size=world,
        ep_size=ep,
        edp_size=world // ep,
        ep_ranks=tuple(rank % ep for rank in ranks),
        edp_ranks=tuple(rank // ep for rank in ranks),
    )
