"""A tensor of a checkpoint, or a slice of one, that is read when its values are asked for."""

from __future__ import annotations

import math
import operator
from types import EllipsisType
from typing import TYPE_CHECKING, Any, NamedTuple

from ckpt_tool.canonical import Box, DType, Tensor
from ckpt_tool.errors import UsageError
from ckpt_tool.execute.gather import gather
from ckpt_tool.families.naming import Entry
from ckpt_tool.geometry import Axis, block_numel, cut, pieces, take
from ckpt_tool.storage import Reader

if TYPE_CHECKING:
    import numpy as np
    import torch

# Bytes read at once, and the most that is held beside a value while it is put in order.
_TILE = 8 << 20
_Index = int | slice | EllipsisType


class View:
    """A tensor in a checkpoint, or a slice of one, that has not been read.

    Attributes:
        name: the name it was asked for under.
        state: ``master``, ``weight``, ``exp_avg``, ...
        shape, dtype: as torch and numpy call them; ``dtype`` is a ``ckpt_tool.canonical.DType``.
    """

    def __init__(self, reader: Reader, place: Place, name: str) -> None:
        self._reader, self._place = reader, place
        self.name, self.shape = name, place.shape
        self.state, self.dtype = place.tensor.state, place.tensor.dtype

    def __repr__(self) -> str:
        return f"<{self.name} [{self.state}] {self.dtype} {list(self.shape)}>"

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("a tensor of no dimensions has no length")
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index: _Index | tuple[_Index, ...]) -> View:
        """A part of it: integers, slices of positive step and ``...``, as in numpy.

        Raises:
            IndexError: an index is out of range, or there are more of them than dimensions.
        """
        taken = _taken(index if isinstance(index, tuple) else (index,), self.shape)
        return View(self._reader, self._place.part(taken), self.name)

    def bytes(self) -> bytearray:
        """Its elements in row-major order, as they are stored.

        Raises:
            UnreadableError: a file cannot be read any more.
        """
        tensor, first, numel = self._place.tensor, self._place.start, math.prod(self.shape)
        itemsize = self.dtype.itemsize
        values = bytearray(numel * itemsize)
        found = pieces(tensor, first, numel)
        block = block_numel(tensor, found)
        most = max(1, _TILE // itemsize)
        direct = not any(isinstance(piece, Box) for piece in found)
        scratch = memoryview(bytearray(0 if direct else min(len(values), max(_TILE, block * itemsize))))
        with memoryview(values) as buffer:
            for start, count in cut(first, numel, most, block):
                at = (start - first) * itemsize
                place = buffer[at : at + count * itemsize]
                gather(self._reader, tensor, found, start, count, place, scratch)
        return values

    def numpy(self) -> np.ndarray[Any, Any]:
        """As a numpy array. numpy has no bfloat16: these values come as float32, which holds them exactly.

        Raises:
            UsageError: the values are float8, of which numpy has nothing either.
        """
        import numpy as np

        if self.dtype is DType.bfloat16:
            halves = np.frombuffer(self.bytes(), np.uint16).reshape(self.shape)
            return (halves.astype(np.uint32) << 16).view(np.float32)
        if "float8" in str(self.dtype):
            raise UsageError(f"{self.name} is {self.dtype}, which numpy does not have. Use torch().")
        return np.frombuffer(self.bytes(), str(self.dtype)).reshape(self.shape)

    def torch(self) -> torch.Tensor:
        """As a torch tensor on the CPU."""
        import torch

        dtype = getattr(torch, self.dtype.torch_name)
        if not self.nbytes:
            return torch.empty(self.shape, dtype=dtype)
        return torch.frombuffer(self.bytes(), dtype=torch.uint8).view(dtype).reshape(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        import numpy as np

        return np.asarray(self.numpy(), dtype)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """torch reads it where a function of its own is given one: ``parameter.copy_(view)``."""
        read = {key: _read(value) for key, value in (kwargs or {}).items()}
        return function(*map(_read, args), **read)


def _read(value: Any) -> Any:
    if isinstance(value, View):
        return value.torch()
    if isinstance(value, list | tuple):
        return type(value)(map(_read, value))
    return value


class _Taken(NamedTuple):
    """What an index takes: an axis for each dimension, and the dimensions that are left."""

    axes: list[Axis]
    left: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.axes[dim].length for dim in self.left)


def _taken(index: tuple[_Index, ...], shape: tuple[int, ...]) -> _Taken:
    given = sum(one is not Ellipsis for one in index)
    if given > len(shape) or len(index) - given > 1:
        raise IndexError(f"{index!r} is no index into {len(shape)} dimensions")
    at = index.index(Ellipsis) if given < len(index) else len(index)
    middle = (slice(None),) * (len(shape) - given)
    full = (*index[:at], *middle, *index[at + 1 :])
    axes, left = [], []
    for dim, (one, size) in enumerate(zip(full, shape, strict=True)):
        if isinstance(one, slice):
            start, stop, step = one.indices(size)
            if step < 1:
                raise IndexError(f"{one!r}: steps are positive; turn the values around once they are read")
            length = max(0, -(-(stop - start) // step))
            axes.append(Axis(dim, start, length, step))
            left.append(dim)
            continue
        if isinstance(one, bool):
            raise IndexError(f"{one!r} is no index: a mask is applied once the values are read")
        number = operator.index(one)  # type: ignore[arg-type]
        if not -size <= number < size:
            raise IndexError(f"index {number} is out of range for dimension {dim} of size {size}")
        axes.append(Axis(dim, number % size, 1))
    return _Taken(axes, tuple(left))


class Place(NamedTuple):
    """Elements of a catalogue's tensor from ``start`` on, in another shape.

    ``dims`` are the tensor's dimensions that the shape has, where all others are of length 1 and ``start``
    is 0; None where the shape is another altogether, as of stacks whose first dimensions files flatten.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    dims: tuple[int, ...] | None
    start: int = 0

    @staticmethod
    def whole(tensor: Tensor) -> Place:
        return Place(tensor, tensor.shape, tuple(range(len(tensor.shape))))

    @staticmethod
    def expert(stack: Tensor, expert: int) -> Place:
        """One expert's matrix."""
        axes = [Axis(0, expert, 1), *(Axis(dim, 0, size) for dim, size in enumerate(stack.shape[1:], 1))]
        return Place(take(stack, axes), stack.shape[1:], tuple(range(1, len(stack.shape))))

    @staticmethod
    def entry(entry: Entry) -> Place:
        """What a file holds under an entry's name."""
        if entry.shape == entry.tensor.shape:
            return Place.whole(entry.tensor)
        if entry.shape == entry.tensor.shape[1:]:
            return Place.expert(entry.tensor, entry.start // math.prod(entry.shape))
        return Place(entry.tensor, entry.shape, None, entry.start)

    def part(self, taken: _Taken) -> Place:
        """What an index takes of it.

        Raises:
            IndexError: the shape is not the tensor's own, and this is more than whole rows of it.
        """
        if self.dims is not None:
            axes = [Axis(dim, 0, size) for dim, size in enumerate(self.tensor.shape)]
            for axis in taken.axes:
                axes[self.dims[axis.dim]] = axis._replace(dim=self.dims[axis.dim])
            dims = tuple(self.dims[dim] for dim in taken.left)
            return Place(take(self.tensor, axes), taken.shape, dims)
        rows, *others = taken.axes
        columns = zip(others, self.shape[1:], strict=True)
        if rows.step != 1 or any((axis.length, axis.step) != (size, 1) for axis, size in columns):
            raise IndexError("files hold it in another shape: take whole rows, and slice the array")
        first = self.start + rows.start * math.prod(self.shape[1:])
        return Place(self.tensor, taken.shape, None, first)
