"""Experts that are copies of each other: the trace of a silent overwrite.

When an expert-parallel model was loaded under FSDP2 by broadcasting rank 0's state dict, every EP rank
trained on from rank 0's experts (huggingface/transformers#45662). Nothing fails; the checkpoints saved
from such a run have experts of different EP ranks that are equal bit for bit. (So has a model right
after upcycling, where every expert is a copy of one MLP: a reader of the report can tell.)
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import NamedTuple

from ckpt_tool.canonical import Checkpoint, MoELayer
from ckpt_tool.errors import UnreadableError
from ckpt_tool.execute.budget import Budget
from ckpt_tool.execute.meter import Meter
from ckpt_tool.statistics import Statistics, layer_of, measure
from ckpt_tool.storage import Reader


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
    """Hash every expert's matrices, tile by tile within ``budget``, and say which are equal.

    Raises:
        UnreadableError: a file is not as long as it has to be.
    """
    stacks = [tensor for tensor in checkpoint.values() if layer_of(tensor) is not None]
    found = measure(stacks, reader, budget, meter, digests_only=True)
    for message in found.failures.values():
        raise UnreadableError(message)
    return copies_of(checkpoint, found)


def copies_of(checkpoint: Checkpoint, statistics: Statistics) -> list[Copies]:
    """The same of what was hashed before. Pure."""
    layers = {layer.layer_path: layer for layer in checkpoint.moe_layers}
    by_layer: dict[str, dict[int, tuple[bytes, ...]]] = {}
    for tensor in checkpoint.values():
        path, one = layer_of(tensor), statistics.tensors.get((tensor.name, tensor.state))
        if path is None or one is None:
            continue
        digests = by_layer.setdefault(path, {})
        for expert, stats in enumerate(one.parts):
            digests[expert] = (*digests.get(expert, ()), stats.digest)
    return [
        copies
        for path, digests in by_layer.items()
        for copies in copies_in(path, digests, layers.get(path))
    ]


def copies_in(
    path: str, digests: Mapping[int, tuple[Hashable, ...]], layer: MoELayer | None
) -> Iterator[Copies]:
    """Groups of equal experts of one layer, from the digests of each one's matrices. Pure."""
    groups: dict[tuple[Hashable, ...], list[int]] = {}
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
