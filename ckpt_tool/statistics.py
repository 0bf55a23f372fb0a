"""Statistics of every tensor, and of every expert in it, in one streaming pass under the budget.

What belongs to one parameter (its stored weight, master and moments) is read together, a tile at a time, so
that states can be compared with each other while each byte is read once. Numbers are computed in small
blocks that stay in the processor's cache. Floats of 16 and 8 bits, and integers, are taken as float32.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import xxhash

from ckpt_tool.canonical import (
    CASTABLE,
    EXP_AVG,
    EXP_AVG_SQ,
    MASTER,
    WEIGHT,
    DType,
    ExpertName,
    Tensor,
    TensorName,
)
from ckpt_tool.containers.decoded import DecodingReader
from ckpt_tool.containers.float8 import as_float32
from ckpt_tool.errors import UnreadableError
from ckpt_tool.execute.budget import MIB, Budget
from ckpt_tool.execute.casts import cast
from ckpt_tool.execute.gather import gather
from ckpt_tool.execute.meter import Meter
from ckpt_tool.execute.threads import in_parallel
from ckpt_tool.geometry import Piece, block_numel, cut, pieces
from ckpt_tool.storage import Reader

# Elements whose numbers are computed at once: 256 KiB of float32, which the second-level cache holds.
_BLOCK = 1 << 16
# Bytes of scratch per element of a block: two float32, what a cast needs, and a flag.
_SCRATCH = 3 * 4 + 4
_ARENA = 8 * MIB  # what a worker takes where the budget allows it: reads of a megabyte and more
# Elements that one worker goes through: larger tensors are shared among workers.
_EXTENT = 1 << 24
# Added to the root of exp_avg_sq, as by Adam's own default: what is divided by it stays finite.
ADAM_EPS = 1e-8
# Where squares of float32 neither overflow nor vanish.
_SAFE = (1e-15, 1e15)

# A fused stack whose family is not known: the experts are its first dimension all the same.
_FUSED = re.compile(r"(?P<layer>(?:.*\.)?\d+)\..*experts\.\w+")

_NUMBERS = (
    ("numel", "i8"),
    ("nan", "i8"),
    ("infinite", "i8"),
    ("zeros", "i8"),
    ("least", "f8"),
    ("most", "f8"),
    ("total", "f8"),
    ("squares", "f8"),
    ("digest", "V16"),
)


def layer_of(tensor: Tensor) -> str | None:
    """The layer whose experts a tensor is a stack of; None where it is no such stack."""
    if isinstance(tensor.name, ExpertName):
        return tensor.name.layer_path
    match = _FUSED.fullmatch(tensor.name) if len(tensor.shape) == 3 else None
    return match["layer"] if match else None


def experts_of(tensor: Tensor) -> int | None:
    """How many experts a tensor is a stack of; None where it is no such stack."""
    return tensor.shape[0] if layer_of(tensor) is not None and tensor.shape[0] else None


class Stats(NamedTuple):
    """Numbers of a tensor, or of one expert of it.

    ``least``, ``most``, ``total`` and ``squares`` (the sum of squares) are of the finite elements; without
    any, ``least`` is inf and ``most`` -inf. ``digest`` is the XXH3-128 of the bytes in row-major order (of
    the digests of its stretches of 2 ** 24 elements, where there are several).
    """

    numel: int
    nan: int
    infinite: int
    zeros: int
    least: float
    most: float
    total: float
    squares: float
    digest: bytes

    @property
    def non_finite(self) -> int:
        return self.nan + self.infinite

    @property
    def absmax(self) -> float:
        return max(-self.least, self.most, 0.0)

    @property
    def mean(self) -> float:
        return self.total / max(1, self.numel - self.non_finite)

    @property
    def l2(self) -> float:
        return math.sqrt(self.squares)

    @property
    def all_zero(self) -> bool:
        return self.zeros == self.numel

    @property
    def constant(self) -> bool:
        """Whether all elements are one finite number. A tensor of no elements is."""
        return not self.non_finite and (self.least == self.most or not self.numel)


class Updates(NamedTuple):
    """``exp_avg / (sqrt(exp_avg_sq) + 1e-8)``, without bias correction, where a block is finite."""

    numel: int
    squares: float
    largest: float

    @property
    def rms(self) -> float:
        return math.sqrt(self.squares / max(1, self.numel))


class Rounding(NamedTuple):
    """How many stored weights are not their master rounded to the weight's dtype, of how many."""

    numel: int
    differing: int


class TensorStatistics:
    """The numbers of one tensor: ``parts[e]`` of expert e; a tensor without experts has one part."""

    def __init__(self, tensor: Tensor, rows: Any) -> None:
        self.tensor = tensor
        self._rows = rows

    @property
    def parts(self) -> list[Stats]:
        """By expert, or one of the whole tensor."""
        return [_stats(row) for row in self._rows]

    @property
    def by_expert(self) -> bool:
        return experts_of(self.tensor) is not None

    @property
    def whole(self) -> Stats:
        return merged(self.parts)


@dataclass(frozen=True, slots=True)
class Statistics:
    """What the pass found. Parts are experts, where a tensor has some.

    ``updates`` are there where both of Adam's moments are, ``rounding`` where a weight is stored beside its
    master. ``failures`` says of a parameter why it could not be read.
    """

    tensors: Mapping[tuple[TensorName, str], TensorStatistics]
    updates: Mapping[TensorName, Sequence[Updates]] = field(default_factory=dict)
    rounding: Mapping[TensorName, Sequence[Rounding]] = field(default_factory=dict)
    failures: Mapping[TensorName, str] = field(default_factory=dict)

    def of(self, state: str) -> dict[TensorName, TensorStatistics]:
        return {name: found for (name, known), found in self.tensors.items() if known == state}


def merged(parts: Sequence[Stats]) -> Stats:
    """The numbers of several stretches together, in their order."""
    if len(parts) == 1:
        return parts[0]
    return Stats(
        sum(part.numel for part in parts),
        sum(part.nan for part in parts),
        sum(part.infinite for part in parts),
        sum(part.zeros for part in parts),
        min((part.least for part in parts), default=math.inf),
        max((part.most for part in parts), default=-math.inf),
        sum(part.total for part in parts),
        sum(part.squares for part in parts),
        xxhash.xxh3_128(b"".join(part.digest for part in parts)).digest(),
    )


def measure(
    tensors: Iterable[Tensor], reader: Reader, budget: Budget, meter: Meter, *, digests_only: bool = False
) -> Statistics:
    """Go through ``tensors`` once, with at most ``budget.nbytes`` in buffers (more only as it allows).

    Args:
        digests_only: no numbers but ``numel`` and ``digest``.

    Raises:
        ExecutionError: storage failed. A file that ends early is one of ``failures``.
    """
    groups = list(_groups(tensors, digests_only))
    meter.start(sum(tensor.nbytes for group in groups for tensor in group))
    found = _Found(groups)
    decoding = DecodingReader(reader)
    size = max((_wanted(group) for group in groups), default=0)
    arena = 2 * budget.tile_for(-(-size // 2))

    def one(worker: _Worker, item: _Item) -> None:
        group = groups[item.group]
        if found.has_failed(item.group):
            return
        try:
            worker.measure(group, item, found)
        except UnreadableError as error:
            found.fail(item.group, str(error))

    in_parallel(_items(groups), lambda: _Worker(decoding, arena, meter, digests_only), one, budget.workers)
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


def _width(group: Sequence[Tensor]) -> int:
    """Bytes of buffers per element: all states, and what is needed to bring one into order."""
    sizes = [tensor.dtype.itemsize for tensor in group]
    return sum(sizes) + max(sizes)


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
    return max(_ARENA, block * _width(group) * 4 // 3 + 64 * len(group) if block > 1 else 0)


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
                        rows = self._rows[item.group, state] = np.zeros(count, list(_NUMBERS))
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
                rows = self._rows[number, state] = np.zeros(count, list(_NUMBERS))
            whole = merged(several)
            rows[part] = (*whole[:-1], np.void(whole.digest))


def _stats(row: Any) -> Stats:
    return Stats._make(row.tolist())


# ---- one worker


class _Worker:
    """Buffers for the states of one parameter, and scratch for the numbers of a block of them."""

    def __init__(self, reader: Reader, arena: int, meter: Meter, digests_only: bool) -> None:
        import numpy as np

        self._reader, self._meter, self._digests_only = reader, meter, digests_only
        self._arena = memoryview(bytearray(arena))
        self._block = max(1, min(_BLOCK, arena // 4 // _SCRATCH) // 16 * 16)
        at = arena - self._block * _SCRATCH
        at = at // 64 * 64
        self._data = self._arena[:at]
        scratch = np.frombuffer(self._arena, np.float32, 3 * self._block, at)
        self._one, self._other, self._third = (
            scratch[index * self._block : (index + 1) * self._block] for index in range(3)
        )
        self._flags = np.frombuffer(self._arena, np.bool_, self._block, at + 3 * 4 * self._block)

    def measure(self, group: Sequence[Tensor], item: _Item, found: _Found) -> None:
        where = [pieces(tensor, item.start, item.numel) for tensor in group]
        digests = [xxhash.xxh3_128() for _ in group]
        sums = [_Sums() for _ in group]
        updates, rounding = _Updating(group), _Comparing(group)
        most = max(1, (len(self._data) - 64 * len(group)) // _width(group))
        block = max(block_numel(tensor, one) for tensor, one in zip(group, where, strict=True))
        for low, count in cut(item.start, item.numel, most, block):
            filled = self._fill(group, where, low, count)
            for digest, data in zip(digests, filled, strict=True):
                digest.update(data)
            for first in range(0, 0 if self._digests_only else count, self._block):
                numel = min(self._block, count - first)
                cells = [
                    data[first * tensor.dtype.itemsize :][: numel * tensor.dtype.itemsize]
                    for tensor, data in zip(group, filled, strict=True)
                ]
                sound = [
                    self._numbers(tensor.dtype, data, sum_)
                    for tensor, data, sum_ in zip(group, cells, sums, strict=True)
                ]
                updates.add(cells, sound, self)
                rounding.add(cells, self)
            self._meter.add(sum(map(len, filled)))
        stats = [
            Stats._make((item.numel, *sum_.values(), digest.digest()))
            for sum_, digest in zip(sums, digests, strict=True)
        ]
        found.add(item, stats, updates.found(), rounding.found())

    def _fill(
        self, group: Sequence[Tensor], where: Sequence[Sequence[Piece]], low: int, count: int
    ) -> list[memoryview]:
        at, filled = 0, []
        for tensor in group:
            size = count * tensor.dtype.itemsize
            filled.append(self._data[at : at + size])
            at += -(-size // 64) * 64
        for tensor, found, data in zip(group, where, filled, strict=True):
            gather(self._reader, tensor, found, low, count, data, self._data[at:])
        return filled

    # ---- numbers of one block

    def floats(self, dtype: DType, data: memoryview, out: Any) -> Any:
        """The elements as float32 (float64 as they are), in ``out`` unless they are that already."""
        import numpy as np

        if dtype in (DType.float32, DType.float64):
            return np.frombuffer(data, dtype.torch_name)
        out = out[: len(data) // dtype.itemsize]
        if dtype in CASTABLE:
            cast(data, dtype, out.data.cast("B"), DType.float32)
        elif dtype.is_float:
            out[...] = as_float32(np.frombuffer(data, np.uint8), dtype.torch_name)
        else:
            kind = "uint8" if dtype is DType.bool_ else dtype.torch_name
            np.copyto(out, np.frombuffer(data, kind), casting="unsafe")
        return out

    def _numbers(self, dtype: DType, data: memoryview, sums: _Sums) -> bool:
        """Add a block to ``sums``; whether all of it is finite."""
        import numpy as np

        values = self.floats(dtype, data, self._one)
        with np.errstate(all="ignore"):
            least, most = float(values.min()), float(values.max())
            sound = math.isfinite(least) and math.isfinite(most)
            if not sound:
                finite = values[np.isfinite(values)]
                nan = int(np.isnan(values).sum())
                sums.nan += nan
                sums.infinite += values.size - finite.size - nan
                if not finite.size:
                    return False
                values, least, most = finite, float(finite.min()), float(finite.max())
            if least <= 0 <= most:
                flags = np.equal(values, 0, out=self._flags[: values.size])
                sums.zeros += int(np.count_nonzero(flags))
            sums.least, sums.most = min(sums.least, least), max(sums.most, most)
            largest = max(-least, most)
            if largest:
                total, squares = self.sums(values, largest)
                sums.total += total
                sums.squares += squares
        return sound

    def sums(self, values: Any, largest: float) -> tuple[float, float]:
        """The sum, and that of squares; in float64 where float32 cannot hold them."""
        import numpy as np

        if values.dtype == np.float32 and _SAFE[0] < largest < _SAFE[1]:
            squares = np.multiply(values, values, out=self._third[: values.size])
            return float(values.sum()), float(squares.sum())
        # squares of what is beyond 1e150 are infinite in float64, too, as is their norm
        total = squared = 0.0
        for low in range(0, values.size, 4096):
            wide = values[low : low + 4096].astype(np.float64)
            total += float(wide.sum())
            squared += float(np.multiply(wide, wide, out=wide).sum())
        return total, squared

    def scratch(self, size: int) -> tuple[Any, Any, Any]:
        return self._one[:size], self._other[:size], self._flags[:size]


class _Sums:
    """Sums over the blocks of a part."""

    __slots__ = ("infinite", "least", "most", "nan", "squares", "total", "zeros")

    def __init__(self) -> None:
        self.nan = self.infinite = self.zeros = 0
        self.least, self.most = math.inf, -math.inf
        self.total = self.squares = 0.0

    def values(self) -> tuple[int, int, int, float, float, float, float]:
        return self.nan, self.infinite, self.zeros, self.least, self.most, self.total, self.squares


def _index(group: Sequence[Tensor], state: str) -> int | None:
    return next((number for number, tensor in enumerate(group) if tensor.state == state), None)


class _Updating:
    """Adds up update sizes, where a group has both moments."""

    def __init__(self, group: Sequence[Tensor]) -> None:
        self._group = group
        self._m, self._v = _index(group, EXP_AVG), _index(group, EXP_AVG_SQ)
        self._numel, self._squares, self._largest = 0, 0.0, 0.0

    def add(self, cells: Sequence[memoryview], sound: Sequence[bool], worker: _Worker) -> None:
        import numpy as np

        if self._m is None or self._v is None or not (sound[self._m] and sound[self._v]):
            return
        m_type, v_type = self._group[self._m].dtype, self._group[self._v].dtype
        numel = len(cells[self._m]) // m_type.itemsize
        one, other, _ = worker.scratch(numel)
        with np.errstate(all="ignore"):
            root = np.sqrt(worker.floats(v_type, cells[self._v], other), dtype=np.float32, out=other)
            np.add(root, np.float32(ADAM_EPS), out=root)
            size = np.divide(worker.floats(m_type, cells[self._m], one), root, dtype=np.float32, out=other)
            largest = max(-float(size.min()), float(size.max()))
            if not math.isfinite(largest):  # roots of negative numbers are no numbers
                return
            self._largest = max(self._largest, largest)
            self._numel += numel
            if largest:
                self._squares += worker.sums(size, largest)[1]

    def found(self) -> Updates | None:
        if self._m is None or self._v is None:
            return None
        return Updates(self._numel, self._squares, self._largest)


class _Comparing:
    """Counts the weights that are not their master rounded, where a group has both."""

    def __init__(self, group: Sequence[Tensor]) -> None:
        self._group = group
        self._master, self._weight = _index(group, MASTER), _index(group, WEIGHT)
        self._numel = self._differing = 0

    @property
    def _applies(self) -> bool:
        return (
            self._master is not None
            and self._weight is not None
            and {self._group[self._master].dtype, self._group[self._weight].dtype} <= CASTABLE
        )

    def add(self, cells: Sequence[memoryview], worker: _Worker) -> None:
        import numpy as np

        if not self._applies or self._master is None or self._weight is None:
            return
        source, target = self._group[self._master].dtype, self._group[self._weight].dtype
        master, weight = cells[self._master], cells[self._weight]
        numel = len(weight) // target.itemsize
        one, other, flags = worker.scratch(numel)
        same = source is target
        if same or target.itemsize > source.itemsize:
            rounded = master
        else:
            rounded = one.data.cast("B")[: len(weight)]
            cast(master, source, rounded, target)
        with np.errstate(invalid="ignore"):
            if same or target.itemsize <= source.itemsize:
                bits = f"u{target.itemsize}"
                unlike = np.not_equal(np.frombuffer(rounded, bits), np.frombuffer(weight, bits), out=flags)
            else:
                unlike = np.not_equal(
                    worker.floats(source, master, one), worker.floats(target, weight, other), out=flags
                )
            self._numel += numel
            if unlike.any():
                # what is no number on both sides is said elsewhere
                nan = np.isnan(worker.floats(source, master, one))
                nan &= np.isnan(worker.floats(target, weight, other))
                self._differing += int(np.count_nonzero(unlike & ~nan))

    def found(self) -> Rounding | None:
        return Rounding(self._numel, self._differing) if self._applies else None
