"""8-bit floats and integers times the scale of their block.

``blocks``: parts are the weight [..., R, C], the scale [..., ceil(R / r), ceil(C / c)] and, if there are,
zero points of the scale's shape, which are subtracted from the weight; numbers are r and c. The last block
of a row or column may be ragged. The product is computed in float32 and rounded once to the values' dtype.

- float8 with block scales: DeepSeek-V3, README_WEIGHTS.md; transformers 5.20,
  integrations/finegrained_fp8.py, ``Fp8Dequantize``: values are float32.
- float8 and int8 with a scale per channel or tensor: compressed-tensors 0.12.2 and 0.20,
  quantization/lifecycle, ``_dequantize``, which computes in the scale's dtype. That is the same: a
  product of an 8-bit number and a bfloat16 or float16 is exact in float32, and so is a difference of two
  int8.
- MXFP8: float8 with a scale of 2 ** (byte - 127) per 32 values (OCP Microscaling Formats 1.0).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from ckpt_tool.containers.decoding.stored import Rows, Stored, any_rows, put, rows_of, scaled, shifted
from ckpt_tool.containers.decoding.virtual import Virtual
from ckpt_tool.containers.float8 import as_float32

WEIGHT, SCALE, ZERO = 0, 1, 2


def decode(said: Virtual, stored: Stored, start: int, numel: int, out: memoryview) -> None:
    import numpy as np

    *_, height, columns = said.shape
    block_rows, block_columns = said.numbers
    raw = stored.bytes(WEIGHT, start, numel)
    direct = said.dtype == "float32"
    values = np.frombuffer(out, np.float32) if direct else np.empty(numel, np.float32)
    _widen(raw, stored.part(WEIGHT).dtype, values)

    def together(row: int) -> int:
        row %= height
        return min(block_rows - row % block_rows, height - row)

    for rows in rows_of(start, numel, columns, any_rows if block_rows == 1 else together):
        part = values[rows.at : rows.at + rows.height * rows.width].reshape(rows.height, rows.width)
        if len(said.parts) > ZERO:
            shifted(part, _each(said, stored, ZERO, rows), block_columns, rows.column)
        scaled(part, _each(said, stored, SCALE, rows), block_columns, rows.column)
    if not direct:
        put(values, out, said.dtype)


def _widen(raw: Any, dtype: str, values: Any) -> None:
    import numpy as np

    if dtype == "int8":
        np.copyto(values, raw.view(np.int8))
    else:
        np.take(_values(dtype), raw, out=values, mode="wrap")  # 4 times as fast as torch's cast


@lru_cache(maxsize=4)
def _values(dtype: str) -> Any:
    """The float32 value of each of the 256 bytes."""
    import numpy as np

    return as_float32(np.arange(256, dtype=np.uint8), dtype)


def _each(said: Virtual, stored: Stored, part: int, rows: Rows) -> Any:
    """The scales (or zero points) that a rectangle of values lies in: float32 [1 or rows, groups]."""
    *_, height, columns = said.shape
    block_rows, block_columns = said.numbers
    across = -(-columns // block_columns)
    down = -(-height // block_rows)
    matrix, row = divmod(rows.row, height)
    first = (matrix * down + row // block_rows) * across
    count = rows.height if block_rows == 1 else 1
    if rows.width == columns:
        return _numbers(stored, part, first, count * across).reshape(count, across)
    low, high = rows.column // block_columns, -(-(rows.column + rows.width) // block_columns)
    return _numbers(stored, part, first + low, high - low).reshape(1, -1)


def _numbers(stored: Stored, part: int, first: int, numel: int) -> Any:
    import numpy as np

    dtype = stored.part(part).dtype
    if dtype == "int8":
        return stored.elements(part, first, numel).astype(np.float32)
    if dtype == "uint8":  # exponents; 2 ** 128 is infinite
        with np.errstate(over="ignore"):
            return np.ldexp(np.float32(1), stored.elements(part, first, numel).astype(np.int32) - 127)
    return stored.floats(part, first, numel)
