"""Converting floats between dtypes without allocating, rounded as torch does: to nearest, ties to even.

numpy does it because importing torch would cost more time and memory than most conversions take. bfloat16,
which numpy does not know, is the upper half of a float32. NaNs become the quiet NaN 0x7fc0, as in torch's
scalar code (c10/util/BFloat16.h); what torch's vector code makes of them differs between processors.
"""

from __future__ import annotations

from typing import Any

from ckpt_tool.canonical import DType
from ckpt_tool.errors import ExecutionError

_BF16_NAN = 0x7FC0


def cast(data: memoryview, source: DType, out: memoryview, target: DType) -> None:
    """Fill ``out`` with the elements of ``data`` in another float dtype. ``data`` is used up.

    Raises:
        ExecutionError: not both dtypes are floats of 16 or 32 bits.
    """
    import numpy as np

    if source is DType.float32 and target is DType.bfloat16:
        _to_bfloat16(data, out)
    elif source is DType.bfloat16 and target is DType.float32:
        wide = np.frombuffer(out, np.uint32)
        np.copyto(wide, np.frombuffer(data, np.uint16))
        wide <<= 16
    elif {source, target} == {DType.float32, DType.float16}:
        kinds = {DType.float32: np.float32, DType.float16: np.float16}
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            values: Any = np.frombuffer(data, kinds[source])
            np.copyto(np.frombuffer(out, kinds[target]), values, casting="same_kind")
    else:
        raise ExecutionError(f"A cast from {source} to {target} is not supported.")


def _to_bfloat16(data: memoryview, out: memoryview) -> None:
    """Add half a unit in the last place, less one where the upper half is even, and take the upper half."""
    import numpy as np

    bits, result = np.frombuffer(data, np.uint32), np.frombuffer(out, np.uint16)
    upper = bits.view(np.uint16)[1::2]
    floats = bits.view(np.float32)
    broken = np.isnan(floats) if bits.size and np.isnan(np.max(floats)) else None
    np.copyto(result, upper)
    result &= 1
    bits += result
    bits += 0x7FFF
    np.copyto(result, upper)
    if broken is not None:
        result[broken] = _BF16_NAN
