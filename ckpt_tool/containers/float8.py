"""Floats that numpy does not know, as float32; without torch, whose import costs more than to decode."""

from __future__ import annotations

from typing import Any, NamedTuple

from ckpt_tool.errors import ExecutionError


class _Small(NamedTuple):
    """An 8-bit float: exponent and mantissa bits, the exponent's bias, and what is not finite.

    ``ieee``: the greatest exponent means infinity and NaN. ``unsigned_zero``: 0x80, negative zero
    elsewhere, is the one NaN. Else all ones after the sign are NaN (OCP 8-bit Floating Point 1.0; the
    *fnuz* kinds as in torch 2.13, c10/util/Float8_e4m3fnuz.h).
    """

    exponent: int
    mantissa: int
    bias: int
    ieee: bool = False
    unsigned_zero: bool = False


_FLOAT8 = {
    "float8_e4m3fn": _Small(4, 3, 7),
    "float8_e5m2": _Small(5, 2, 15, ieee=True),
    "float8_e4m3fnuz": _Small(4, 3, 8, unsigned_zero=True),
    "float8_e5m2fnuz": _Small(5, 2, 16, unsigned_zero=True),
}


def as_float32(raw: Any, dtype: str) -> Any:
    """The values of an array of bytes that holds floats of ``dtype`` (torch's name), exactly.

    Raises:
        ExecutionError: another dtype; sources refuse such tensors beforehand.
    """
    import numpy as np

    if dtype == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if dtype in ("float16", "float32", "float64"):
        return raw.view(dtype).astype(np.float32)
    if dtype == "float8_e8m0fnu":  # an exponent alone
        powers = np.ldexp(np.float32(1), np.minimum(raw, 254).astype(np.int32) - 127)
        return np.where(raw == 255, np.float32(np.nan), powers)
    if dtype in _FLOAT8:
        return _values(_FLOAT8[dtype])[raw]
    raise ExecutionError(f"Values of {dtype} are not decoded.")


def _values(kind: _Small) -> Any:
    """Of each of the 256 bytes."""
    import numpy as np

    byte = np.arange(256)
    sign = np.where(byte & 0x80, -1.0, 1.0)
    exponent = (byte & 0x7F) >> kind.mantissa
    mantissa = byte & ((1 << kind.mantissa) - 1)
    hidden = np.where(exponent > 0, 1 << kind.mantissa, 0)
    power = np.maximum(exponent, 1) - kind.bias - kind.mantissa
    values = np.ldexp(sign * (hidden + mantissa), power)
    if kind.ieee:
        largest = exponent == (1 << kind.exponent) - 1
        values[largest & (mantissa == 0)] = np.inf * sign[largest & (mantissa == 0)]
        values[largest & (mantissa > 0)] = np.nan
    elif kind.unsigned_zero:
        values[0x80] = np.nan
    else:
        values[(byte & 0x7F) == 0x7F] = np.nan
    return values.astype(np.float32)
