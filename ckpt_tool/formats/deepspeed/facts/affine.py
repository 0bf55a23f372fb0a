"""Affine maps of experts: how one parameter of all experts is spread over the EP ranks.

deepspeed 0.19.8, checkpoint/autoep_affine.py: ``autoep_placement_to_affine_map`` makes the map of a
placement, and a map that differs from its placement's is refused (``autoep_metadata_to_affine_map``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from ckpt_tool.geometry import row_major


def expert_map(holders: Sequence[Sequence[int]], shape: Sequence[int]) -> dict[str, Any]:
    """The map, as it is stored, of a parameter of ``shape`` ``[experts, ...]``.

    Args:
        holders: the global expert ids on each EP rank, in the order they are packed there.
    """
    owners: dict[int, list[int]] = {}
    for rank, ids in enumerate(holders):
        for expert in ids:
            owners.setdefault(expert, []).append(rank)
    matrix, size = list(shape[1:]), math.prod(shape[1:])
    strides = list(row_major(shape, 1))
    return {
        "logical_shape": list(shape),
        "ranks": {
            rank: {
                "shard_shape": [len(ids), *matrix],
                "pieces": [
                    {
                        "shape": [count, *matrix],
                        "source": [ids[start] * size, strides],
                        "dest": [start * size, list(row_major([len(ids), *matrix], 1))],
                        "locations": owners[ids[start]],
                    }
                    for start, count in _runs(ids, owners)
                ],
            }
            for rank, ids in enumerate(holders)
        },
    }


def _runs(ids: Sequence[int], owners: dict[int, list[int]]) -> Iterator[tuple[int, int]]:
    """(first place, length) of runs of consecutive experts that one rank holds; others stand alone."""
    start = 0
    for place in range(1, len(ids) + 1):
        if place < len(ids):
            before, own = ids[place - 1], ids[place]
            if own == before + 1 and len(owners[own]) == len(owners[before]) == 1:
                continue
        yield start, place - start
        start = place
