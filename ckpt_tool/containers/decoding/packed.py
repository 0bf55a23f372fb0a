"""Integers of 4 or 8 bits in 32-bit words along the rows, times the scale of their group.

``packed``: parts are the words int32 [..., R, ceil(C * bits / 32)], the scales [..., R, groups], then, as
the numbers say, zero points int32 [..., ceil(R * bits / 32), groups] packed down the columns. Numbers are
bits, columns of a group, and whether there are zero points. The lowest bits of a word come first; an
integer is stored plus 2 ** (bits - 1), and so is a zero point. The last group and the last word of a row
may be ragged.

Values have the scales' dtype, in which compressed-tensors computes (0.12.2 and 0.20,
compressors/*/pack_quantized, ``decompress``). An integer less its zero point is exact in any of them, so
the product is rounded once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from ckpt_tool.containers.decoding.stored import Rows, Stored, put, rows_of, scaled, shifted
from ckpt_tool.containers.decoding.virtual import Virtual

_WORDS, _SCALES, _ZEROS = 0, 1, 2


def decode(said: Virtual, stored: Stored, start: int, numel: int, out: memoryview) -> None:
    *_, height, columns = said.shape
    bits, group, has_zeros = said.numbers
    itemsize = said.itemsize
    for rows in rows_of(start, numel, columns, lambda row: height - row % height):
        values = _integers(stored, rows, columns, bits, bool(has_zeros))
        first, last = rows.column // group, -(-(rows.column + rows.width) // group)
        across = -(-columns // group)
        if has_zeros:
            zeros = _zeros(stored, rows, height, across, bits)[:, first:last]
            shifted(values, zeros, group, rows.column)
        count = (rows.height - 1) * across + last - first
        scales = stored.floats(_SCALES, rows.row * across + first, count).reshape(rows.height, -1)
        scaled(values, scales, group, rows.column)
        at = rows.at * itemsize
        put(values, out[at : at + values.size * itemsize], said.dtype)


def _integers(stored: Stored, rows: Rows, columns: int, bits: int, unsigned: bool) -> Any:
    """A rectangle of integers as float32 [rows, width]."""
    import numpy as np

    in_word = 32 // bits
    words = -(-columns // in_word)
    first, last = rows.column // in_word, -(-(rows.column + rows.width) // in_word)
    length = ((rows.height - 1) * words + last - first) * 4
    raw = stored.bytes(_WORDS, (rows.row * words + first) * 4, length)
    table = _table(bits, 0 if unsigned else 1 << (bits - 1))
    values = np.take(table, raw, mode="wrap").view(np.float32).reshape(rows.height, -1)
    skip = rows.column - first * in_word
    return np.ascontiguousarray(values[:, skip : skip + rows.width])


def _zeros(stored: Stored, rows: Rows, height: int, across: int, bits: int) -> Any:
    """The stored zero points of the rows of a rectangle, all groups: float32 [rows, groups]."""
    import numpy as np

    in_word = 32 // bits
    matrix, row = divmod(rows.row, height)
    low, high = row // in_word, -(-(row + rows.height) // in_word)
    first = (matrix * -(-height // in_word) + low) * across
    words = stored.elements(_ZEROS, first, (high - low) * across).view(np.uint32).reshape(-1, 1, across)
    shifts = np.arange(0, 32, bits, dtype=np.uint32).reshape(1, -1, 1)
    each = ((words >> shifts) & np.uint32((1 << bits) - 1)).reshape(-1, across)
    skip = row - low * in_word
    return each[skip : skip + rows.height].astype(np.float32)


@lru_cache(maxsize=4)
def _table(bits: int, offset: int) -> Any:
    """The float32 values of a byte: two as one 64-bit number, or one."""
    import numpy as np

    byte = np.arange(256)
    if bits == 8:
        return (byte - offset).astype(np.float32)
    pairs = np.stack([byte & 15, byte >> 4], axis=-1) - offset
    return pairs.astype(np.float32).view(np.uint64).reshape(-1)
