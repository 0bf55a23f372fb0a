"""Converting floats between dtypes without allocating, rounded as torch does: to nearest, ties to even.

numpy does it because importing torch would cost more time and memory than most conversions take. bfloat16,
which numpy does not know, is the upper half of a float32. NaNs stay NaNs, in bfloat16 the quiet NaN 0x7fc0,
as in torch's scalar code (c10/util/BFloat16.h); what else torch makes of their payload differs between
processors.
"""

from __future__ import annotations

from typing import Any

from ckpt_tool.canonical import CASTABLE, DType
from ckpt_tool.errors import ExecutionError
from ckpt_tool.rounding import to_bfloat16

_BLOCK = 1 << 16  # elements


def cast(data: memoryview, source: DType, out: memoryview, target: DType) -> None:
    """Fill ``out`` with the elements of ``data`` in another float dtype.

    Raises:
        ExecutionError: not both dtypes are ``CASTABLE``, which the planner refuses beforehand.
    """
    import numpy as np

    if source is DType.float32 and target is DType.bfloat16:
        to_bfloat16(data, out)
    elif source is DType.bfloat16 and target is DType.float32:
        wide = np.frombuffer(out, np.uint32)
        np.copyto(wide, np.frombuffer(data, np.uint16))
        wide <<= 16
    elif _is_direct(source, target) and {source, target} <= CASTABLE:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            values: Any = np.frombuffer(data, source.torch_name)
            np.copyto(np.frombuffer(out, target.torch_name), values, casting="same_kind")
    elif {source, target} <= CASTABLE:
        _through_float32(data, source, out, target)
    else:
        raise ExecutionError(f"A cast from {source} to {target} is not supported.")


def _is_direct(source: DType, target: DType) -> bool:
    """Whether numpy knows both dtypes and rounds as torch does, which makes float16 of float64 in two steps
    (c10/util/Half.h: a Half is constructed from a float)."""
    return DType.bfloat16 not in (source, target) and (source, target) != (DType.float64, DType.float16)


def refuse_overflow(data: memoryview, source: DType, out: memoryview) -> None:
    """Raises ExecutionError where a cast to float16 has made finite numbers infinite, as torch does.

    Looked for in the result, a small block at a time: infinity and NaN have float16's largest exponent.
    """
    import numpy as np

    bfloat16 = source is DType.bfloat16
    values: Any = np.frombuffer(data, np.uint16 if bfloat16 else source.torch_name)
    result = np.frombuffer(out, np.uint16)
    lost = 0
    for start in range(0, result.size, _BLOCK):
        suspect = start + np.flatnonzero((result[start : start + _BLOCK] & 0x7C00) == 0x7C00)
        if suspect.size:
            found = values[suspect]
            finite = (found & 0x7F80) != 0x7F80 if bfloat16 else np.isfinite(found)
            lost += int(finite.sum())
    if lost:
        raise ExecutionError(
            f"at least {lost} of its numbers are too large for float16, whose largest is 65504, and would "
            "become infinite. Convert to bf16 or fp32."
        )


def _through_float32(data: memoryview, source: DType, out: memoryview, target: DType) -> None:
    """In two steps, a small block at a time, as torch does it."""
    block = memoryview(bytearray(_BLOCK * DType.float32.itemsize))
    for start in range(0, len(data) // source.itemsize, _BLOCK):
        count = min(_BLOCK, len(data) // source.itemsize - start)
        middle = block[: count * DType.float32.itemsize]
        cast(data[start * source.itemsize :][: count * source.itemsize], source, middle, DType.float32)
        cast(middle, DType.float32, out[start * target.itemsize :][: count * target.itemsize], target)
