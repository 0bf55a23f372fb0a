"""Reading the stored tensors that values are computed from, and going through values row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ckpt_tool.canonical import DType
from ckpt_tool.containers.decoding.virtual import Part, Virtual
from ckpt_tool.containers.float8 import as_float32
from ckpt_tool.rounding import to_bfloat16
from ckpt_tool.storage import Reader


class Stored:
    """The parts of one virtual file, to be read in slices."""

    def __init__(self, reader: Reader, said: Virtual) -> None:
        self._reader, self._parts = reader, said.parts

    def part(self, index: int) -> Part:
        return self._parts[index]

    def bytes(self, index: int, first: int, length: int) -> Any:
        """``length`` bytes of a part from byte ``first`` on: uint8 [length]."""
        import numpy as np

        part = self._parts[index]
        data = bytearray(length)
        self._reader.read_into(part.file, part.offset + first, memoryview(data))
        return np.frombuffer(data, np.uint8)

    def elements(self, index: int, first: int, numel: int) -> Any:
        """Elements of a part as numpy knows their dtype: [numel]."""
        itemsize = DType[self._parts[index].dtype].itemsize
        return self.bytes(index, first * itemsize, numel * itemsize).view(self._parts[index].dtype)

    def floats(self, index: int, first: int, numel: int) -> Any:
        """Elements of a part, whatever float they are stored as: float32 [numel]."""
        dtype = self._parts[index].dtype
        itemsize = DType[dtype].itemsize
        return as_float32(self.bytes(index, first * itemsize, numel * itemsize), dtype)


class Rows(NamedTuple):
    """``height`` whole rows of a matrix from ``row`` on, or columns ``column .. column + width`` of one.
    ``row`` counts through all matrices of a stack. The values begin at ``at`` of what was asked for."""

    at: int
    row: int
    height: int
    column: int
    width: int


def rows_of(start: int, numel: int, columns: int, together: Callable[[int], int]) -> Iterator[Rows]:
    """Cut values ``start .. start + numel`` of rows of ``columns`` into rectangles.

    Args:
        together: how many rows from a given one on may be in one rectangle; at least 1.
    """
    position = 0
    while position < numel:
        row, column = divmod(start + position, columns)
        left = numel - position
        if column or left < columns:
            width = min(columns - column, left)
            yield Rows(position, row, 1, column, width)
            position += width
        else:
            count = min(left // columns, together(row))
            yield Rows(position, row, count, 0, columns)
            position += count * columns


def any_rows(_: int) -> int:
    """For ``rows_of``: a row and all after it."""
    return 1 << 62


def scaled(values: Any, each: Any, group: int, column: int = 0) -> None:
    """Multiply values float32 [rows, width] that begin at ``column`` by a number per ``group`` columns.

    Args:
        each: float32 [rows, groups], of the groups that the values lie in.
    """
    import numpy as np

    _per_group(np.multiply, values, each, group, column)


def shifted(values: Any, each: Any, group: int, column: int = 0) -> None:
    """The same, subtracting."""
    import numpy as np

    _per_group(np.subtract, values, each, group, column)


def _per_group(operation: Any, values: Any, each: Any, group: int, column: int) -> None:
    import numpy as np

    rows, width = values.shape
    if each.shape[1] == 1:
        operation(values, each, out=values)
    elif column % group == 0 and width == each.shape[1] * group and values.flags.c_contiguous:
        whole = values.reshape(rows, each.shape[1], group)
        operation(whole, each[:, :, None], out=whole)
    else:
        skip = column % group
        operation(values, np.repeat(each, group, axis=1)[:, skip : skip + width], out=values)


def put(values: Any, out: memoryview, dtype: str) -> None:
    """Round float32 values to ``dtype`` (torch's name), to nearest, ties to even, and write their bytes.

    Args:
        values: float32, in any shape.
    """
    import numpy as np

    if dtype == "bfloat16":
        flat: Any = np.ascontiguousarray(values).reshape(-1)
        to_bfloat16(memoryview(flat), out)
        return
    with np.errstate(over="ignore"):
        target = np.frombuffer(out, dtype).reshape(values.shape)
        np.copyto(target, values, casting="same_kind")
