"""The chunks an FSDP2 run of a given topology saves: pure numbers.

``Shard(0)`` over W ranks is torch.chunk: ceil(n / W) rows each, the last ranks fewer or none
(torch/distributed/tensor/placement_types.py, ``Shard.local_shard_size_and_offset``). Experts on a mesh
(efsdp, ep) are cut by ep first and by efsdp within: along the experts too, or, where there are more ranks
than experts, along the second dimension (torchtitan/distributed/fsdp.py). Rank f * ep + e is efsdp rank f,
ep rank e.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class GridChunk(NamedTuple):
    """A box of a tensor and the rank that saves it."""

    rank: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def dense_grid(shape: Sequence[int], world: int, dim: int = 0) -> list[GridChunk]:
    """Chunks over all ranks. Ranks with nothing share one empty chunk, saved by the first of them."""
    if not shape:
        return [GridChunk(0, (), ())]
    chunks: list[GridChunk] = []
    for rank, (first, size) in enumerate(spans(shape[dim], world)):
        chunks.append(_chunk(rank, shape, {dim: (first, size)}))
        if not size:
            break
    return chunks


def expert_grid(shape: Sequence[int], world: int, ep: int, *, rows: bool) -> list[GridChunk] | None:
    """Chunks of a stack [E, ...] over (efsdp, ep); ``rows``: efsdp cuts dimension 1.

    None where FSDP2 refuses: E does not divide by ep, or dimension 1 not by efsdp.
    """
    efsdp = world // ep
    if shape[0] % ep or (rows and shape[1] % efsdp):
        return None
    each = shape[0] // ep
    chunks: dict[tuple[int, ...], GridChunk] = {}
    for f in range(efsdp):
        for e in range(ep):
            first, size = e * each, each
            cut = {}
            if rows:
                height = shape[1] // efsdp
                cut[1] = (f * height, height)
            else:
                within, size = spans(each, efsdp)[f]
                first += within
            chunk = _chunk(f * ep + e, shape, {0: (first, size), **cut})
            known = chunks.get(chunk.offsets)
            # an empty chunk may begin where another rank's begins: that one is saved
            if known is None or not known.sizes[0]:
                chunks[chunk.offsets] = chunk
    return sorted(chunks.values())


def spans(count: int, parts: int) -> list[tuple[int, int]]:
    """(first, size) of each part, as torch.chunk cuts."""
    size = -(-count // parts)
    return [(min(part * size, count), max(0, min(size, count - part * size))) for part in range(parts)]


def _chunk(rank: int, shape: Sequence[int], cut: dict[int, tuple[int, int]]) -> GridChunk:
    offsets = tuple(cut[dim][0] if dim in cut else 0 for dim in range(len(shape)))
    sizes = tuple(cut[dim][1] if dim in cut else size for dim, size in enumerate(shape))
    return GridChunk(rank, offsets, sizes)
