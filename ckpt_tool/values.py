"""Comparing values: where the bytes of two tensors differ, however each of them lies; and whether copies of
one tensor inside a checkpoint are the same.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ckpt_tool.canonical import Box, Checkpoint, ExpertName, Region, Tensor
from ckpt_tool.containers.decoding.reader import DecodingReader
from ckpt_tool.containers.decoding.virtual import real_file
from ckpt_tool.errors import CkptToolError, MismatchError
from ckpt_tool.execute.budget import Budget
from ckpt_tool.execute.casts import cast
from ckpt_tool.execute.gather import gather
from ckpt_tool.execute.meter import Meter, Silent
from ckpt_tool.execute.threads import in_parallel
from ckpt_tool.execute.writing import EXTENT_BYTES
from ckpt_tool.geometry import (
    Axis,
    Piece,
    along_in_file,
    block_numel,
    check_disjoint,
    clip,
    cut,
    pieces,
    row_major,
    take,
)
from ckpt_tool.storage import Reader

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Difference(NamedTuple):
    """One thing found wrong. ``kind``: missing, extra, shape, dtype, value, scalar, checksum, coverage,
    names."""

    kind: str
    name: str
    message: str


class Pair(NamedTuple):
    """Two tensors to compare; ``rounded``: where dtypes differ, the wider one after rounding."""

    a: Tensor
    b: Tensor
    rounded: bool = False


def differing(
    pairs: Sequence[Pair],
    readers: tuple[Reader, Reader],
    budget: Budget,
    meter: Meter,
) -> list[Difference]:
    """A differing element of every pair, found by all workers together: the first in the order compared."""
    found: dict[int, tuple[int, Difference]] = {}
    lock = threading.Lock()

    def work() -> Iterator[tuple[int, _Placed, int, int]]:
        for number, pair in enumerate(pairs):
            try:
                for tensor in pair[:2]:
                    check_disjoint(tensor)
                placed = _placed(pair)
            except CkptToolError as error:
                found[number] = (0, Difference("coverage", str(pair.a.name), str(error)))
                continue
            most = EXTENT_BYTES // pair.a.dtype.itemsize
            block = max(block_numel(placed.pair.a, placed.one), block_numel(placed.pair.b, placed.other))
            for start, numel in cut(0, pair.a.numel, most, block):
                yield number, placed, start, numel

    def compare_one(comparer: _Comparer, item: tuple[int, _Placed, int, int]) -> None:
        number, (pair, one, other, order), start, numel = item
        at = comparer.first_difference(pair, one, other, start, numel, meter)
        if at is None:
            return
        files = [
            file_of(t, found_pieces, at) for t, found_pieces in zip(pair[:2], (one, other), strict=True)
        ]
        original = pairs[number].a
        at = _index_before(at, original.shape, order)
        difference = Difference(
            "value",
            str(original.name),
            f"{original.element(at)} differs: the first in {files[0]}, the second in {files[1]} "
            f"(flat index {at})",
        )
        with lock:
            if number not in found or at < found[number][0]:
                found[number] = (at, difference)

    in_parallel(work(), lambda: _Comparer(readers, budget), compare_one, budget.workers)
    return [difference for _, difference in found.values()]


class _Placed(NamedTuple):
    """A pair, where the elements of each side lie, and the order in which ``pair`` has the dimensions of
    the pair it was made of."""

    pair: Pair
    one: list[Piece]
    other: list[Piece]
    order: tuple[int, ...]


def _placed(pair: Pair) -> _Placed:
    """A pair in the order of its files, where both sides have their elements in one order there that is not
    the tensor's: two transposed matrices are compared as they lie."""
    rank = len(pair.a.shape)
    one, other = (pieces(tensor, 0, tensor.numel) for tensor in pair[:2])
    runs_along = {along_in_file(piece) if isinstance(piece, Box) else rank - 1 for piece in (*one, *other)}
    along = runs_along.pop() if len(runs_along) == 1 else rank - 1
    if along == rank - 1:
        return _Placed(pair, one, other, tuple(range(rank)))
    order = (*(dim for dim in range(rank) if dim != along), along)
    a, b = (take(t, [Axis(dim, 0, t.shape[dim]) for dim in order]) for t in pair[:2])
    turned = pair._replace(a=a, b=b)
    return _Placed(turned, pieces(a, 0, a.numel), pieces(b, 0, b.numel), order)


def _index_before(at: int, shape: tuple[int, ...], order: tuple[int, ...]) -> int:
    """The flat index in a tensor of ``shape`` of the element that is at ``at`` once its dimensions are in
    ``order``."""
    found = 0
    flat = row_major(shape, 1)
    for dim in reversed(order):
        at, place = divmod(at, shape[dim])
        found += place * flat[dim]
    return found


def file_of(tensor: Tensor, found: list[Piece], element: int) -> str:
    """The file that holds an element."""
    return real_file(clip(tensor, found, element, 1)[0].file)


class _Comparer:
    """One worker's two buffers; the second also holds what a cast makes of the first, and scratch. They
    grow where a matrix is to be transposed."""

    def __init__(self, readers: tuple[Reader, Reader], budget: Budget) -> None:
        self._readers: tuple[Reader, Reader] = (DecodingReader(readers[0]), DecodingReader(readers[1]))
        self._budget = budget
        self._one, self._other = (memoryview(bytearray(budget.tile)) for _ in range(2))

    def _grow(self, size: int) -> None:
        if size > len(self._one):
            self._one = self._other = memoryview(b"")  # never the old ones beside the new
            self._one, self._other = (memoryview(bytearray(size)) for _ in range(2))

    def first_difference(
        self,
        pair: Pair,
        one: list[Piece],
        other: list[Piece],
        start: int,
        numel: int,
        meter: Meter,
    ) -> int | None:
        """The first element in ``start .. start + numel`` that differs in any bit; None where none does."""
        # the wider dtype is rounded to the narrower, which is how it was made
        swap = pair.a.dtype.itemsize < pair.b.dtype.itemsize
        wide, narrow = (pair.b, pair.a) if swap else (pair.a, pair.b)
        wide_pieces, narrow_pieces = (other, one) if swap else (one, other)
        wide_reader, narrow_reader = self._readers[::-1] if swap else self._readers
        casting = wide.dtype is not narrow.dtype
        shared = casting or any(isinstance(piece, Box) for piece in (*one, *other))
        itemsize = wide.dtype.itemsize * (2 if shared else 1)
        block = max(block_numel(pair.a, one), block_numel(pair.b, other))
        if block > 1:
            self._grow(self._budget.tile_for(block * itemsize))
        for low, count in cut(start, numel, len(self._one) // itemsize, block):
            left = self._one[: count * wide.dtype.itemsize]
            gather(wide_reader, wide, wide_pieces, low, count, left, self._other)
            size = count * narrow.dtype.itemsize
            right = self._other[:size]
            gather(narrow_reader, narrow, narrow_pieces, low, count, right, self._other[size:])
            if casting:
                rounded = self._other[size : 2 * size]
                cast(left, wide.dtype, rounded, narrow.dtype)
                left = rounded
            at = _first_difference(left, right)
            meter.add(count * pair.a.dtype.itemsize)
            if at is not None:
                return low + at // narrow.dtype.itemsize
        return None


def _first_difference(a: memoryview, b: memoryview) -> int | None:
    """The first differing byte of two buffers of one length."""
    if len(a) == 0 or _equal(a, b):
        return None
    low, high = 0, len(a)
    while high - low > 1:
        middle = (low + high) // 2
        if _equal(a[low:middle], b[low:middle]):
            low = middle
        else:
            high = middle
    return low


def _equal(a: memoryview, b: memoryview) -> bool:
    addresses = [ctypes.addressof(ctypes.c_char.from_buffer(view)) for view in (a, b)]
    return bool(_memcmp(*addresses, len(a)) == 0)


# ---- copies of one tensor inside a checkpoint


def check_replicas(checkpoint: Checkpoint, reader: Reader, budget: Budget) -> None:
    """Compare what is stored more than once before one of the copies is used: experts that several EP ranks
    hold, and tied tensors.

    Raises:
        MismatchError: the copies differ.
    """
    comparer = _Comparer((reader, reader), budget)
    for tensor in checkpoint.tensors:
        for replica in tensor.replicas:
            if not isinstance(replica, Region):
                raise MismatchError(f"{tensor.label()}: copies that are not contiguous are not compared.")
            originals = pieces(tensor, replica.start, replica.numel)
            at = comparer.first_difference(
                Pair(tensor, tensor),
                originals,
                [replica],
                replica.start,
                replica.numel,
                Silent(),
            )
            if at is not None:
                raise MismatchError(
                    f"{tensor.element(at)}: {_copies(checkpoint, tensor)} differ, in "
                    f"{file_of(tensor, originals, at)} and {replica.file}. ckpt-tool does not choose."
                )


def _copies(checkpoint: Checkpoint, tensor: Tensor) -> str:
    tied = [alias for alias, name in checkpoint.aliases.items() if name == tensor.name]
    if tied and not isinstance(tensor.name, ExpertName):
        return f"it and {' and '.join(tied)}, which are tied,"
    return "the copies of this tensor on different ranks"
