"""Experts that are copies of each other: the trace of a silent overwrite.

When an expert-parallel model was loaded under FSDP2 by broadcasting rank 0's state dict, every EP rank
trained on from rank 0's experts (huggingface/transformers#45662). Nothing fails; the checkpoints saved
from such a run have experts of different EP ranks that are equal bit for bit. (So has a model right
after upcycling, where every expert is a copy of one MLP: a reader of the report can tell.)
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import xxhash

from ckpt_tool.canonical import Checkpoint, ExpertName, MoELayer, Tensor
from ckpt_tool.execute.budget import Budget
from ckpt_tool.execute.gather import gather
from ckpt_tool.execute.meter import Meter
from ckpt_tool.execute.threads import in_parallel
from ckpt_tool.geometry import block_numel, cut, pieces
from ckpt_tool.storage import Reader

# A fused stack whose family is not known: the experts are its first dimension all the same.
_FUSED = re.compile(r"(?P<layer>(?:.*\.)?\d+)\..*experts\.\w+")


class Copies(NamedTuple):
    """Experts of one layer that are equal bit for bit in every projection.

    ``ranks`` are the EP ranks that hold them, in the order of ``experts``; empty where the checkpoint
    does not tell. ``overwritten`` is whether they lie as one rank's experts lie that took the place of
    all others': each at the same place of another rank, now or (re-sharded since) at an EP size before.
    """

    layer_path: str
    experts: tuple[int, ...]
    ranks: tuple[int, ...]
    overwritten: bool

    def message(self) -> str:
        """A sentence for people."""
        experts = ", ".join(map(str, self.experts))
        where = f" (EP ranks {', '.join(map(str, self.ranks))})" if self.ranks else ""
        verdict = (
            " They lie as they do when one rank's experts have overwritten the other ranks'; the originals "
            "are not in this checkpoint."
            if self.overwritten
            else ""
        )
        return (
            f"{self.layer_path}: experts {experts}{where} are copies of each other, bit for bit.{verdict}"
        )


def find_copies(checkpoint: Checkpoint, reader: Reader, budget: Budget, meter: Meter) -> list[Copies]:
    """Hash every expert's matrices, tile by tile within ``budget``, and say which are equal."""
    stacks = [tensor for tensor in checkpoint.values() if _layer_of(tensor) is not None]
    meter.start(sum(tensor.nbytes for tensor in stacks))
    digests = _digests(stacks, reader, budget, meter)
    layers = {layer.layer_path: layer for layer in checkpoint.moe_layers}
    found: list[Copies] = []
    for path, by_expert in _by_layer(stacks, digests).items():
        found += copies_in(path, by_expert, layers.get(path))
    return found


def copies_in(
    path: str, digests: Mapping[int, tuple[str, ...]], layer: MoELayer | None
) -> Iterator[Copies]:
    """Groups of equal experts of one layer, from the digests of each one's matrices. Pure."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for expert, digest in sorted(digests.items()):
        groups.setdefault(digest, []).append(expert)
    place = {
        expert: (rank, position)
        for rank, held in enumerate(layer.holders if layer else ())
        for position, expert in enumerate(held)
    }
    periodic = _periodic(list(groups.values()), len(digests))
    for experts in groups.values():
        if len(experts) < 2:
            continue
        known = [place[expert] for expert in experts if expert in place]
        ranks = tuple(rank for rank, _ in known) if len(known) == len(experts) else ()
        apart = len(ranks) > 1 and len(set(ranks)) == len(ranks) and len({p for _, p in known}) == 1
        yield Copies(path, tuple(experts), ranks, apart or periodic)


def _periodic(groups: list[list[int]], count: int) -> bool:
    """Whether the experts repeat: 0, 1, 0, 1 for four experts of two ranks. All equal is no period: a
    model just upcycled from a dense one is like that."""
    period = len(groups)
    if period < 2 or period == count or count % period:
        return False
    return all(group == list(range(first, count, period)) for first, group in enumerate(groups))


def _layer_of(tensor: Tensor) -> str | None:
    if isinstance(tensor.name, ExpertName):
        return tensor.name.layer_path
    match = _FUSED.fullmatch(tensor.name) if len(tensor.shape) == 3 else None
    return match["layer"] if match else None


def _by_layer(
    stacks: Iterable[Tensor], digests: Mapping[tuple[int, int], str]
) -> dict[str, dict[int, tuple[str, ...]]]:
    """layer -> expert -> the digests of its matrices, in the order of the catalogue."""
    found: dict[str, dict[int, tuple[str, ...]]] = {}
    for number, tensor in enumerate(stacks):
        layer = found.setdefault(_layer_of(tensor) or "", {})
        for expert in range(tensor.shape[0]):
            layer[expert] = (*layer.get(expert, ()), digests[number, expert])
    return found


def _expert_block(tensor: Tensor) -> int:
    """What is best loaded together, judged by the first expert: the others lie as it does."""
    size = tensor.numel // max(1, tensor.shape[0])
    return block_numel(tensor, pieces(tensor, 0, size))


def _digests(
    stacks: list[Tensor], reader: Reader, budget: Budget, meter: Meter
) -> dict[tuple[int, int], str]:
    """(number of the stack, expert) -> digest of one matrix."""
    found: dict[tuple[int, int], str] = {}
    lock = threading.Lock()

    largest = max((_expert_block(tensor) * tensor.dtype.itemsize for tensor in stacks), default=0)
    tile = budget.tile_for(largest)

    def buffers() -> tuple[memoryview, memoryview]:
        return memoryview(bytearray(tile)), memoryview(bytearray(tile))

    def one(worker: tuple[memoryview, memoryview], item: tuple[int, int]) -> None:
        tensor = stacks[item[0]]
        size = tensor.numel // max(1, tensor.shape[0])
        start = item[1] * size
        parts = pieces(tensor, start, size)
        digest = xxhash.xxh3_128()
        most = tile // tensor.dtype.itemsize
        for low, count in cut(start, size, most, block_numel(tensor, parts)):
            data = worker[0][: count * tensor.dtype.itemsize]
            gather(reader, tensor, parts, low, count, data, worker[1])
            digest.update(data)
            meter.add(len(data))
        with lock:
            found[item] = digest.hexdigest()

    items = ((number, expert) for number, tensor in enumerate(stacks) for expert in range(tensor.shape[0]))
    in_parallel(items, buffers, one, budget.workers)
    return found
