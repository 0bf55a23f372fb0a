"""Small floats that several methods store alike: NVFP4, MXFP4 in pairs, MXFP8."""

from __future__ import annotations

import math

from ckpt_tool.canonical import DType, Tensor
from ckpt_tool.containers.decoding.fp4 import MXFP4_BLOCK, NVFP4_BLOCK
from ckpt_tool.formats.hf.quantised.values import blocked, do_not_fit, values_of

MXFP8_BLOCK = (1, 32)


def nvfp4_values(weight: Tensor, scale: Tensor, whole: Tensor, name: str, *, divides: bool) -> Tensor:
    """Pairs of 4-bit floats uint8 [..., R, C / 2], their scales and the scale of all.

    Args:
        divides: scales are divided by ``whole``, else multiplied.
    """
    *lead, rows, half = weight.shape if len(weight.shape) > 1 else (0, 0)
    columns = half * 2
    fits = (
        weight.dtype is DType.uint8
        and len(weight.shape) > 1
        and columns % NVFP4_BLOCK == 0
        and scale.dtype is DType.float8_e4m3fn
        and scale.shape == (*lead, rows, columns // NVFP4_BLOCK)
        and whole.dtype is DType.float32
        and (whole.numel == 1 or (whole.numel == math.prod(lead) and whole.shape[: len(lead)] == (*lead,)))
    )
    if not fits:
        expected = "of NVFP4 in uint8, float8_e4m3fn per 16 and float32 for all,"
        raise do_not_fit(weight, (scale, whole), expected)
    stored, numbers = (weight, scale, whole), (NVFP4_BLOCK, int(divides))
    return values_of(
        weight, name, (*lead, rows, columns), DType.float32, ("nvfp4", "nvfp4"), stored, numbers
    )


def mxfp4_values(weight: Tensor, scale: Tensor, name: str) -> Tensor:
    """Pairs of 4-bit floats uint8 [..., R, C / 2], with exponents uint8 [..., R, C / 32]."""
    *lead, half = weight.shape
    fits = (
        weight.dtype is DType.uint8
        and len(weight.shape) > 1
        and half % (MXFP4_BLOCK // 2) == 0
        and scale.dtype in (DType.uint8, DType.float8_e8m0fnu)
        and scale.shape == (*lead, half * 2 // MXFP4_BLOCK)
    )
    if not fits:
        raise do_not_fit(weight, (scale,), "of MXFP4 in uint8 and exponents per 32,")
    shape = (*lead, half * 2)
    return values_of(weight, name, shape, DType.bfloat16, ("mxfp4", "mxfp4"), (weight, scale), ())


def mxfp8_values(weight: Tensor, scale: Tensor) -> Tensor:
    """float8_e4m3fn [..., R, C] with exponents uint8 [..., R, C / 32]."""
    *lead, columns = weight.shape
    fits = (
        weight.dtype is DType.float8_e4m3fn
        and len(weight.shape) > 1
        and columns % MXFP8_BLOCK[1] == 0
        and scale.dtype in (DType.uint8, DType.float8_e8m0fnu)
        and scale.shape == (*lead, columns // MXFP8_BLOCK[1])
    )
    if not fits:
        raise do_not_fit(weight, (scale,), "of MXFP8 in float8_e4m3fn and exponents per 32,")
    return blocked(weight, scale, MXFP8_BLOCK, "mxfp8 1x32")
