"""One worker: buffers for the states of one parameter, and the numbers of a block of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import xxhash

from ckpt_tool.canonical import CASTABLE, EXP_AVG, EXP_AVG_SQ, MASTER, WEIGHT, DType, Tensor
from ckpt_tool.containers.float8 import as_float32
from ckpt_tool.execute.casts import cast
from ckpt_tool.execute.gather import gather
from ckpt_tool.execute.meter import Meter
from ckpt_tool.geometry import Piece, block_numel, cut, pieces
from ckpt_tool.statistics.results import Rounding, Stats, Updates
from ckpt_tool.storage import Reader

# Elements whose numbers are computed at once: 256 KiB of float32, which the second-level cache holds.
_BLOCK = 1 << 16
# Bytes of scratch per element of a block: two float32 and a flag.
_SCRATCH = 2 * 4 + 1
# Adam's own default: what is divided by a root with it stays finite.
ADAM_EPS = 1e-8
# Where squares of float32 neither overflow nor vanish, and their sum over a block does not.
_SAFE = (1e-15, 1e15)
_LARGEST_SQUARED = 1e11  # float32 holds its square divided by that of eps


def width(group: Sequence[Tensor]) -> int:
    """Bytes of buffers per element: all states, and what is needed to bring one into order."""
    sizes = [tensor.dtype.itemsize for tensor in group]
    return sum(sizes) + max(sizes)


class Worker:
    """Buffers for the states of one parameter, and scratch for the numbers of a block of them."""

    def __init__(self, reader: Reader, arena: int, meter: Meter, digests_only: bool, sums: bool) -> None:
        import numpy as np

        self._reader, self._meter, self._digests_only = reader, meter, digests_only
        self._with_sums = sums
        self._arena = memoryview(bytearray(arena))
        self._block = max(1, min(_BLOCK, arena // 4 // _SCRATCH) // 16 * 16)
        at = arena - self._block * _SCRATCH
        at = at // 64 * 64
        self._data = self._arena[:at]
        scratch = np.frombuffer(self._arena, np.float32, 2 * self._block, at)
        self._one, self._other = scratch[: self._block], scratch[self._block :]
        self._flags = np.frombuffer(self._arena, np.bool_, self._block, at + 2 * 4 * self._block)

    def measure(
        self, group: Sequence[Tensor], start: int, numel: int
    ) -> tuple[list[Stats], Updates | None, Rounding | None]:
        """Elements ``start .. start + numel`` of the states of one parameter, which have one shape.

        Raises:
            CkptToolError: a file ends early, or storage failed.
        """
        where = [pieces(tensor, start, numel) for tensor in group]
        digests = [xxhash.xxh3_128() for _ in group]
        sums = [_Sums(self._with_sums) for _ in group]
        updates, rounding = _Updating(group), _Comparing(group)
        most = max(1, (len(self._data) - 64 * len(group)) // width(group))
        block = max(block_numel(tensor, one) for tensor, one in zip(group, where, strict=True))
        for low, count in cut(start, numel, most, block):
            filled = self._fill(group, where, low, count)
            for digest, data in zip(digests, filled, strict=True):
                digest.update(data)
            for first in range(0, 0 if self._digests_only else count, self._block):
                size = min(self._block, count - first)
                cells = [
                    data[first * tensor.dtype.itemsize :][: size * tensor.dtype.itemsize]
                    for tensor, data in zip(group, filled, strict=True)
                ]
                ranges = [
                    self._numbers(tensor.dtype, data, sum_)
                    for tensor, data, sum_ in zip(group, cells, sums, strict=True)
                ]
                updates.add(cells, ranges, self)
                rounding.add(cells, self)
            self._meter.add(sum(map(len, filled)))
        stats = [
            Stats._make((numel, *sum_.values(), digest.digest()))
            for sum_, digest in zip(sums, digests, strict=True)
        ]
        return stats, updates.found(), rounding.found()

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

    def _numbers(self, dtype: DType, data: memoryview, sums: _Sums) -> _Range | None:
        """Add a block to ``sums``; its least and largest element, None where not all of it is finite."""
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
                    return None
                values, least, most = finite, float(finite.min()), float(finite.max())
            if least <= 0 <= most:
                flags = np.equal(values, 0, out=self._flags[: values.size])
                sums.zeros += int(np.count_nonzero(flags))
            sums.least, sums.most = min(sums.least, least), max(sums.most, most)
            if self._with_sums and max(-least, most):
                total, squares = self._sums_of(values, max(-least, most))
                sums.total += total
                sums.squares += squares
        return _Range(least, most) if sound else None

    def _sums_of(self, values: Any, largest: float) -> tuple[float, float]:
        """The sum, and that of squares; in float64 where float32 cannot hold them."""
        import numpy as np

        if values.dtype == np.float32 and _SAFE[0] < largest < _SAFE[1]:
            squares = np.multiply(values, values, out=self._other[: values.size])
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


class _Range(NamedTuple):
    least: float
    most: float


class _Sums:
    """Sums over the blocks of a part."""

    __slots__ = ("infinite", "least", "most", "nan", "squares", "total", "zeros")

    def __init__(self, with_sums: bool) -> None:
        self.nan = self.infinite = self.zeros = 0
        self.least, self.most = math.inf, -math.inf
        self.total = self.squares = 0.0 if with_sums else math.nan

    def values(self) -> tuple[int, int, int, float, float, float, float]:
        return self.nan, self.infinite, self.zeros, self.least, self.most, self.total, self.squares


def _index(group: Sequence[Tensor], state: str) -> int | None:
    return next((number for number, tensor in enumerate(group) if tensor.state == state), None)


class _Updating:
    """The largest update by Adam's moments, where a group has both: without bias correction, and with eps
    under the root, where it costs less. No history of gradients makes more of it than of Adam's own."""

    def __init__(self, group: Sequence[Tensor]) -> None:
        self._group = group
        self._m, self._v = _index(group, EXP_AVG), _index(group, EXP_AVG_SQ)
        self._numel, self._squares, self._largest = 0, 0.0, 0.0

    def add(self, cells: Sequence[memoryview], ranges: Sequence[_Range | None], worker: Worker) -> None:
        import numpy as np

        if self._m is None or self._v is None:
            return
        m_range, v_range = ranges[self._m], ranges[self._v]
        if m_range is None or v_range is None or v_range.least < 0:
            return
        m_type, v_type = self._group[self._m].dtype, self._group[self._v].dtype
        one, other, _ = worker.scratch(len(cells[self._m]) // m_type.itemsize)
        m = worker.floats(m_type, cells[self._m], one)
        v = worker.floats(v_type, cells[self._v], other)
        if max(-m_range.least, m_range.most) < _LARGEST_SQUARED:
            squares = np.multiply(m, m, out=one, dtype=np.float32)
            root = np.add(v, np.float32(ADAM_EPS**2), out=other, dtype=np.float32)
            np.divide(squares, root, out=one)
            total, largest = float(one.sum()), float(one.max())
        else:
            total, largest = _in_float64(m, v)
        self._numel += m.size
        self._squares += total
        self._largest = max(self._largest, largest)

    def found(self) -> Updates | None:
        if self._m is None or self._v is None:
            return None
        return Updates(self._numel, self._squares, math.sqrt(self._largest))


def _in_float64(m: Any, v: Any) -> tuple[float, float]:
    """The sum and the largest of ``m * m / (v + eps * eps)``, a little at a time."""
    import numpy as np

    total = largest = 0.0
    for low in range(0, m.size, 4096):
        wide = m[low : low + 4096].astype(np.float64)
        squares = wide * (wide / (v[low : low + 4096] + ADAM_EPS**2))
        total, largest = total + float(squares.sum()), max(largest, float(squares.max()))
    return total, largest


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

    def add(self, cells: Sequence[memoryview], worker: Worker) -> None:
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
