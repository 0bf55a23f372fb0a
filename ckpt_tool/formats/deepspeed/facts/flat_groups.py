"""The flat groups of ZeRO-1 and ZeRO-2: pure numbers.

Every parameter group is flattened parameter after parameter, padded at its end to a multiple of twice its
ranks, and cut into equal parts, one per rank; a parameter may span ranks. Sources: deepspeed 0.19.8,
runtime/zero/stage_1_and_2.py (``__init__``, ``nccl_start_alignment_factor``, ``parameter_alignment``,
``_round_robin_reorder``) and utils/tensor_fragment.py (``get_hp_fragment_mapping``).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence

from ckpt_tool.canonical import Region

_ALIGNMENT = 2  # of each rank's part; nccl_start_alignment_factor

# By parameter, (elements, position in the rank's part): what ``fragment_address`` holds.
Fragments = Mapping[str, tuple[int, int]]


class FlatGroup:
    """One group as it was flattened and cut over ``count`` ranks.

    Args:
        sizes: the parameters with their elements, in the order they were flattened in. Empty ones are
            in no group.
        count: the ranks that share the group.
        gaps: elements of zeros after each parameter (``parameter_alignment``); none by default.

    ``starts`` are the parameters' positions in the group, ``part`` the elements of a rank's part.
    """

    def __init__(
        self, sizes: Sequence[tuple[str, int]], count: int, gaps: Sequence[int] | None = None
    ) -> None:
        self.count = count
        self.sizes = dict(sizes)
        self.starts: dict[str, int] = {}
        position = 0
        for index, (name, numel) in enumerate(sizes):
            self.starts[name] = position
            position += numel + (gaps[index] if gaps else 0)
        self.total = position
        ends = {name: self.starts[name] + numel for name, numel in sizes}
        following = [*list(self.starts.values())[1:], position]
        self._gaps = [
            (end, start) for end, start in zip(ends.values(), following, strict=True) if end < start
        ]
        self.part = -(-self.total // (_ALIGNMENT * count)) * _ALIGNMENT

    def held(self, rank: int) -> int:
        """Elements of a rank's part before its padding."""
        return min(max(self.total - rank * self.part, 0), self.part)

    def gaps(self, rank: int) -> Iterator[tuple[int, int]]:
        """Elements after parameters in a rank's part that are of none: (position in the part, count)."""
        low = rank * self.part
        for start, end in self._gaps:
            first, last = max(start, low), min(end, low + self.part)
            if first < last:
                yield first - low, last - first

    def fragments(self, rank: int) -> Fragments:
        """The parameters that have elements in a rank's part, and where."""
        return _fragments(self.sizes, self.starts, rank * self.part, (rank + 1) * self.part)

    def unordered_fragments(self, rank: int) -> Fragments:
        """What ``param_slice_mappings`` says under ``round_robin_gradients``: positions in the order the
        parameters had before they were dealt out to the ranks in turn, which is not where they lie."""
        starts: dict[str, int] = {}
        position = 0
        for name in undealt(list(self.sizes), self.count):
            starts[name] = position
            position += self.sizes[name]
        return _fragments(self.sizes, starts, rank * self.part, (rank + 1) * self.part)


def _fragments(sizes: Mapping[str, int], starts: Mapping[str, int], low: int, high: int) -> Fragments:
    found = {}
    for name, start in starts.items():
        first, last = max(start, low), min(start + sizes[name], high)
        if first < last:
            found[name] = (last - first, first - low)
    return found


def undealt(names: Sequence[str], count: int) -> list[str]:
    """The order before ``_round_robin_reorder``: it takes every count-th, beginning at 0, then 1, ..."""
    order = [index for first in range(count) for index in range(first, len(names), count)]
    return [name for _, name in sorted(zip(order, names, strict=True))]


class FlatRegions:
    """Where a parameter's elements lie in the flat buffers of the ranks its group is cut over.

    Args:
        start: the parameter's position in the group.
        numel: its elements.
        part: elements of each rank's part of the group.
        files: the file of each rank of the group, in order.
        bases: byte offset in its file of each rank's buffer.
        itemsize: bytes per element.
    """

    def __init__(
        self, start: int, numel: int, part: int, files: Sequence[str], bases: array[int], itemsize: int
    ) -> None:
        self._start, self._numel, self._part = start, numel, part
        self._files, self._bases, self._itemsize = files, bases, itemsize

    def __iter__(self) -> Iterator[Region]:
        end = self._start + self._numel
        position = self._start
        while position < end:
            rank, within = divmod(position, self._part)
            length = min(end - position, self._part - within)
            offset = self._bases[rank] + within * self._itemsize
            yield Region(position - self._start, length, self._files[rank], offset)
            position += length
