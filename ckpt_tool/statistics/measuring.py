"""The pass: which bytes are read when, by which worker, and what they all found put together."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ckpt_tool.canonical import Tensor, TensorName
from ckpt_tool.containers.decoding.reader import DecodingReader
from ckpt_tool.errors import UnreadableError
from ckpt_tool.execute.budget import MIB, Budget
from ckpt_tool.execute.meter import Meter
from ckpt_tool.execute.threads import in_parallel
from ckpt_tool.geometry import block_numel, pieces
from ckpt_tool.statistics.results import (
    NUMBERS,
    Rounding,
    Statistics,
    Stats,
    TensorStatistics,
    Updates,
    experts_of,
    merged,
)
from ckpt_tool.statistics.worker import Worker, width
from ckpt_tool.storage import Reader

_ARENA = 8 * MIB  # what a worker takes where the budget allows it: reads of a megabyte and more
# Elements that one worker goes through: larger tensors are shared among workers.
_EXTENT = 1 << 24


def measure(
    tensors: Iterable[Tensor],
    reader: Reader,
    budget: Budget,
    meter: Meter,
    *,
    digests_only: bool = False,
    sums: bool = False,
) -> Statistics:
    """Go through ``tensors`` once, with at most ``budget.nbytes`` in buffers (more only as it allows).

    Args:
        digests_only: no numbers but ``numel`` and ``digest``.
        sums: ``total`` and ``squares`` too, which cost as much time as all else.

    Raises:
        ExecutionError: storage failed. A file that ends early is one of ``failures``.
    """
    groups = list(_groups(tensors, digests_only))
    meter.start(sum(tensor.nbytes for group in groups for tensor in group))
    found = _Found(groups)
    decoding = DecodingReader(reader)
    size = max((_wanted(group) for group in groups), default=0)
    arena = 2 * budget.tile_for(-(-size // 2))

    def one(worker: Worker, item: _Item) -> None:
        group = groups[item.group]
        if found.has_failed(item.group):
            return
        try:
            found.add(item, *worker.measure(group, item.start, item.numel))
        except UnreadableError as error:
            found.fail(item.group, str(error))

    in_parallel(
        _items(groups), lambda: Worker(decoding, arena, meter, digests_only, sums), one, budget.workers
    )
    return found.statistics()


# ---- work


class _Item(NamedTuple):
    """Elements ``start .. start + numel`` of the tensors of a group: an extent of one of its parts."""

    group: int
    part: int
    extent: int
    start: int
    numel: int


def _groups(tensors: Iterable[Tensor], apart: bool) -> Iterator[tuple[Tensor, ...]]:
    """The states of each parameter; what has another shape than the others is by itself."""
    by_name: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        key = (tensor.name, tensor.state) if apart else (tensor.name, tensor.shape)
        by_name.setdefault(key, []).append(tensor)
    yield from map(tuple, by_name.values())


def _parts(group: Sequence[Tensor]) -> tuple[int, int]:
    """How many parts a group's tensors have, and the elements of each."""
    count = experts_of(group[0]) or 1
    return count, group[0].numel // count


def _items(groups: Sequence[Sequence[Tensor]]) -> Iterator[_Item]:
    for number, group in enumerate(groups):
        count, size = _parts(group)
        for part in range(count):
            for extent, low in enumerate(range(0, max(1, size), _EXTENT)):
                yield _Item(number, part, extent, part * size + low, min(_EXTENT, size - low))


def _wanted(group: Sequence[Tensor]) -> int:
    """The bytes that a worker does best to have for a group: a matrix that is to be transposed is best read
    whole. Judged by the first expert: the others lie as it does."""
    _, size = _parts(group)
    block = 1
    for tensor in group:
        try:
            block = max(block, block_numel(tensor, pieces(tensor, 0, size)))
        except UnreadableError:  # is said when it is to be read
            continue
    return max(_ARENA, block * width(group) * 4 // 3 + 64 * len(group) if block > 1 else 0)


class _Found:
    """What the workers have found so far."""

    def __init__(self, groups: Sequence[Sequence[Tensor]]) -> None:
        self._groups = groups
        self._lock = threading.Lock()
        self._stats: dict[tuple[int, int, int, int], Stats] = {}
        self._updates: dict[tuple[int, int, int], Updates] = {}
        self._rounding: dict[tuple[int, int, int], Rounding] = {}
        self._failures: dict[int, str] = {}
        self._rows: dict[tuple[int, int], Any] = {}

    def has_failed(self, group: int) -> bool:
        return group in self._failures

    def fail(self, group: int, message: str) -> None:
        with self._lock:
            self._failures.setdefault(group, message)

    def add(
        self, item: _Item, stats: Sequence[Stats], updates: Updates | None, rounding: Rounding | None
    ) -> None:
        import numpy as np

        count, size = _parts(self._groups[item.group])
        with self._lock:
            for state, found in enumerate(stats):
                if size <= _EXTENT:
                    rows = self._rows.get((item.group, state))
                    if rows is None:
                        rows = self._rows[item.group, state] = np.zeros(count, list(NUMBERS))
                    rows[item.part] = (*found[:-1], np.void(found.digest))
                else:
                    self._stats[item.group, state, item.part, item.extent] = found
            key = (item.group, item.part, item.extent)
            if updates is not None:
                self._updates[key] = updates
            if rounding is not None:
                self._rounding[key] = rounding

    def statistics(self) -> Statistics:
        tensors: dict[tuple[TensorName, str], TensorStatistics] = {}
        updates: dict[TensorName, list[Updates]] = {}
        rounding: dict[TensorName, list[Rounding]] = {}
        for (number, part, _), found in sorted(self._updates.items()):
            name = self._groups[number][0].name
            known = updates.setdefault(name, [])
            if part == len(known):
                known.append(found)
            else:
                last = known[part]
                known[part] = Updates(
                    last.numel + found.numel, last.squares + found.squares, max(last.largest, found.largest)
                )
        for (number, part, _), other in sorted(self._rounding.items()):
            name = self._groups[number][0].name
            seen = rounding.setdefault(name, [])
            if part == len(seen):
                seen.append(other)
            else:
                seen[part] = Rounding(
                    seen[part].numel + other.numel, seen[part].differing + other.differing
                )
        self._join()
        for (number, state), rows in sorted(self._rows.items(), key=lambda entry: entry[0]):
            tensor = self._groups[number][state]
            if number not in self._failures:
                tensors[tensor.name, tensor.state] = TensorStatistics(tensor, rows)
        failed = {self._groups[number][0].name: why for number, why in sorted(self._failures.items())}
        for name in failed:
            updates.pop(name, None)
            rounding.pop(name, None)
        return Statistics(tensors, updates, rounding, failed)

    def _join(self) -> None:
        """Put parts of several extents together."""
        import numpy as np

        parts: dict[tuple[int, int, int], list[Stats]] = {}
        for (number, state, part, _), found in sorted(self._stats.items(), key=lambda entry: entry[0]):
            parts.setdefault((number, state, part), []).append(found)
        self._stats.clear()
        for (number, state, part), several in parts.items():
            rows = self._rows.get((number, state))
            if rows is None:
                count, _ = _parts(self._groups[number])
                rows = self._rows[number, state] = np.zeros(count, list(NUMBERS))
            whole = merged(several)
            rows[part] = (*whole[:-1], np.void(whole.digest))
