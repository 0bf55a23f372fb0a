"""4-bit floats (E2M1), two to a byte, the low nibble first.

``mxfp4``: parts are the bytes [..., C / 2] and scales of 2 ** (byte - 127), one per 32 values (OCP
Microscaling Formats 1.0). Values are bfloat16, exact. As gpt_oss stores it (uint8; transformers 5.20,
integrations/mxfp4.py), DeepSeek-V4 (int8 and float8_e8m0fnu; transformers 5.20,
integrations/finegrained_fp8.py, ``Fp8Dequantize``) and compressed-tensors (0.20, compressors/mxfp4). A
scale of 255 is NaN where the file calls it float8_e8m0fnu, and 2 ** 128 where it calls it uint8, as there.

``nvfp4``: parts are the bytes [..., C / 2], scales in float8_e4m3fn, one per 16 values, and a float32 for
all of a matrix, or one for every matrix of a stack; numbers are 16 and whether the scales are divided by
the latter (compressed-tensors' ``weight_global_scale``) or multiplied (modelopt's ``weight_scale_2``).
Scales are combined first, rounded to float32, then multiplied with the values; values are float32
(compressed-tensors 0.12.2, quantization/lifecycle/forward.py, ``_dequantize``; modelopt 0.47,
torch/quantization/qtensor/nvfp4_tensor.py).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from ckpt_tool.containers.decoding.stored import Stored, put, rows_of, scaled
from ckpt_tool.containers.decoding.virtual import Virtual

MXFP4_BLOCK = 32
NVFP4_BLOCK = 16
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_PACKED, _SCALES, _WHOLE = 0, 1, 2


def decode_mxfp4(_: Virtual, stored: Stored, start: int, numel: int, out: memoryview) -> None:
    import numpy as np

    low, high = start // MXFP4_BLOCK, -(-(start + numel) // MXFP4_BLOCK)
    packed = stored.bytes(_PACKED, low * 16, (high - low) * 16)
    scales = stored.bytes(_SCALES, low, high - low)
    index = (scales.astype(np.uint16) << 8)[:, None] | packed.reshape(-1, MXFP4_BLOCK // 2)
    table = _scaled_pairs(stored.part(_SCALES).dtype == "float8_e8m0fnu")
    values = np.take(table, index, mode="wrap").reshape(-1).view(np.uint16)
    skip = start - low * MXFP4_BLOCK
    np.frombuffer(out, np.uint16)[...] = values[skip : skip + numel]


def decode_nvfp4(said: Virtual, stored: Stored, start: int, numel: int, out: memoryview) -> None:
    import numpy as np

    *_, height, columns = said.shape
    group, divides = said.numbers
    across = columns // group
    whole = stored.floats(_WHOLE, 0, 1)
    several = stored.part(_WHOLE).numel > 1
    low = start // 2
    raw = stored.bytes(_PACKED, low, -(-(start + numel) // 2) - low)
    values = np.take(_pairs(), raw, mode="wrap").view(np.float32)[start % 2 :][:numel]
    for rows in rows_of(start, numel, columns, lambda row: height - row % height):
        if several:
            whole = stored.floats(_WHOLE, rows.row // height, 1)
        first, last = rows.column // group, -(-(rows.column + rows.width) // group)
        count = (rows.height - 1) * across + last - first
        scales = stored.floats(_SCALES, rows.row * across + first, count).reshape(rows.height, -1)
        each = scales / whole if divides else scales * whole
        part = values[rows.at : rows.at + rows.height * rows.width].reshape(rows.height, rows.width)
        scaled(part, each, group, rows.column)
    put(values, out, said.dtype)


def _signed() -> Any:
    import numpy as np

    return np.array([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], np.float64)


@lru_cache(maxsize=1)
def _pairs() -> Any:
    """The two float32 values of a byte, as one 64-bit number."""
    import numpy as np

    byte = np.arange(256)
    pairs = np.stack([_signed()[byte & 15], _signed()[byte >> 4]], axis=-1)
    return pairs.astype(np.float32).view(np.uint64).reshape(-1)


@lru_cache(maxsize=2)
def _scaled_pairs(has_nan: bool) -> Any:
    """The two bfloat16 values of a byte under a scale, as one 32-bit number, at ``scale * 256 + byte``."""
    import numpy as np

    byte = np.arange(256)
    pairs = np.stack([_signed()[byte & 15], _signed()[byte >> 4]], axis=-1)
    values = np.ldexp(1.0, byte - 127)[:, None, None] * pairs
    with np.errstate(over="ignore"):
        bits = values.astype(np.float32).view(np.uint32) >> 16  # exact: three bits at most
    if has_nan:
        bits[255] = 0x7FC0
    return bits.astype(np.uint16).reshape(-1).view(np.uint32)
