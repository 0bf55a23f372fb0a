"""ZeRO-3's partition arithmetic and AutoEP's expert placement: pure numbers.

Sources: deepspeed 0.19.8, runtime/zero/partition_parameters.py (one partition per parameter and rank),
checkpoint/ds_to_universal.py (``_zero_partitioned_param_info``), checkpoint/autoep_affine.py (placement).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ckpt_tool.canonical import Apart, Region, Tensor, even_holders
from ckpt_tool.errors import UnreadableError
from ckpt_tool.limits import MOST_EXPERTS, MOST_RANKS


def partition_size(numel: int, count: int) -> int:
    """Elements that each of ``count`` ranks reserves for a parameter of ``numel`` elements.

    Every parameter is padded on its own; the last ranks may hold less, or nothing but padding.
    """
    return -(-numel // count)


class PartitionRegions:
    """Where a parameter's elements lie in the flat buffers of the ranks it is partitioned over.

    Partition rank k holds elements ``k*p .. min((k+1)*p, numel)`` with ``p = ceil(numel / n)``. What
    follows them up to p is padding, uninitialised memory in real files, and never part of a region.

    Args:
        numel: elements of the parameter (of one EP rank's share, for experts).
        files: the file of each partition rank, in order; there are n.
        bases: byte offset in its file of each rank's flat buffer; shared by all parameters in it.
        within: elements before this parameter in each flat buffer.
        itemsize: bytes per element.
    """

    def __init__(
        self, numel: int, files: Sequence[str], bases: array[int], within: int, itemsize: int
    ) -> None:
        self._numel, self._files, self._bases = numel, files, bases
        self._skip, self._itemsize = within * itemsize, itemsize

    def __iter__(self) -> Iterator[Region]:
        return self.overlapping(0, self._numel)

    def padding(self) -> Iterator[Apart]:
        """What the last ranks hold behind their part of the parameter, or instead of one."""
        size = partition_size(self._numel, len(self._files))
        for rank in range(self._numel // max(1, size), len(self._files)):
            held = max(0, min(size, self._numel - rank * size))
            if held < size:
                offset = self._bases[rank] + self._skip + held * self._itemsize
                yield Apart(self._files[rank], offset, (size - held) * self._itemsize, "padding")

    def overlapping(self, start: int, numel: int) -> Iterator[Region]:
        """The partitions that hold elements ``start .. start + numel``."""
        whole, files, bases, skip = self._numel, self._files, self._bases, self._skip
        size = max(1, partition_size(whole, len(files)))
        for rank in range(start // size, -(-min(start + numel, whole) // size)):
            first = rank * size
            yield Region(first, min(size, whole - first), files[rank], bases[rank] + skip)


class Paddings:
    """The padding of many parameters, and copies of tensors, gone through when it is asked for."""

    def __init__(self, partitioned: Sequence[PartitionRegions], copies: Sequence[Tensor] = ()) -> None:
        self._partitioned, self._copies = partitioned, copies

    def __iter__(self) -> Iterator[Apart]:
        for regions in self._partitioned:
            yield from regions.padding()
        for tensor in self._copies:
            for region in tensor.regions:
                if isinstance(region, Region):
                    length = region.numel * tensor.dtype.itemsize
                    yield Apart(region.file, region.offset, length, "a copy with an equal checksum")


def expert_holders(entry: Mapping[str, Any], where: str) -> tuple[tuple[int, ...], ...]:
    """The global expert ids on each EP rank of one layer, in the order they are packed there.

    Read from ``expert_placement`` (deepspeed 0.19.8 on; any order, uneven, empty or replicated), else
    the uniform contiguous placement of earlier releases.

    Raises:
        UnreadableError: the placement is malformed, of another version, or leaves an expert out.
    """
    experts, ep_size = entry["num_experts"], entry["ep_size"]
    layer = entry["expert_key_prefix"]
    for number, most in ((experts, MOST_EXPERTS), (ep_size, MOST_RANKS)):
        if type(number) is not int or not 1 <= number <= most:
            raise UnreadableError(
                f"{where}: {layer} has num_experts={experts!r} on {ep_size!r} EP ranks. The "
                "metadata is damaged."
            )
    placement = entry.get("expert_placement")
    if placement is None:
        local = entry["num_local_experts"]
        if local * ep_size != experts:
            raise UnreadableError(
                f"{where}: {layer} has num_experts={experts}, but {ep_size} EP ranks of {local} "
                "experts each. The metadata contradicts itself."
            )
        return even_holders(local, ep_size)
    try:
        version = placement["version"]
        listed = {item["rank"]: tuple(item["experts"]) for item in placement["ranks"]}
        sizes = (placement["num_experts"], placement["ep_size"], len(placement["ranks"]))
        numbers = [*listed, *(expert for ids in listed.values() for expert in ids)]
        if any(type(number) is not int for number in numbers):
            raise TypeError("ranks and experts are integers")
    except (KeyError, TypeError) as error:
        raise UnreadableError(
            f"{where}: the expert_placement of {layer} is malformed ({error})."
        ) from error
    if version != 1:
        raise UnreadableError(
            f"{where}: the expert_placement of {layer} is of version {version!r}; this release of "
            "ckpt-tool knows version 1."
        )
    if sizes != (experts, ep_size, ep_size) or sorted(listed) != list(range(ep_size)):
        raise UnreadableError(
            f"{where}: the expert_placement of {layer} lists {sizes[2]} ranks and {sizes[0]} experts; "
            f"its layer has {ep_size} EP ranks and {experts} experts."
        )
    for rank, ids in listed.items():
        if len(set(ids)) != len(ids):
            raise UnreadableError(f"{where}: EP rank {rank} holds an expert of {layer} twice: {list(ids)}.")
    present = {expert for ids in listed.values() for expert in ids}
    if present != set(range(experts)):
        wrong = sorted(present ^ set(range(experts)))
        raise UnreadableError(
            f"{where}: the experts of {layer} must be 0 to {experts - 1}, each on some EP rank; "
            f"missing or unknown: {wrong}."
        )
    return tuple(listed[rank] for rank in range(ep_size))


def consecutive(ids: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Cut packed expert ids into runs of consecutive ids: (position in ``ids``, first id, count)."""
    begin = 0
    for position in range(1, len(ids) + 1):
        if position == len(ids) or ids[position] != ids[position - 1] + 1:
            yield begin, ids[begin], position - begin
            begin = position
