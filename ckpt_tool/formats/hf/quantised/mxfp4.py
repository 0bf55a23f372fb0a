"""MXFP4 as gpt_oss is published: ``X_blocks`` and ``X_scales``."""

from __future__ import annotations

from ckpt_tool.canonical import DType, Tensor
from ckpt_tool.containers.decoding.fp4 import MXFP4_BLOCK
from ckpt_tool.errors import UnreadableError
from ckpt_tool.formats.hf.quantised.described import Settings, check_keys
from ckpt_tool.formats.hf.quantised.values import Model, values_of

_KEYS = ("quant_method", "modules_to_not_convert", "dequantize")


def decode(model: Model, settings: Settings) -> None:
    check_keys(settings, _KEYS)
    for name, tensor in model:
        scales = model.get(f"{name.removesuffix('_blocks')}_scales")
        if name.endswith("_blocks") and scales is not None:
            model.put(name, _values(tensor, scales), (tensor, scales))


def _values(blocks: Tensor, scales: Tensor) -> Tensor:
    fits = (
        blocks.dtype is DType.uint8
        and scales.dtype is DType.uint8
        and blocks.shape[-1:] == (MXFP4_BLOCK // 2,)
        and blocks.shape[:-1] == scales.shape
        and len(scales.shape) > 1
    )
    if not fits:
        raise UnreadableError(
            f"{blocks.name} is {blocks.dtype} {list(blocks.shape)}, {scales.name} is {scales.dtype} "
            f"{list(scales.shape)}; MXFP4 has uint8 [..., blocks, 16] and [..., blocks]."
        )
    shape = (*blocks.shape[:-2], blocks.shape[-2] * MXFP4_BLOCK)
    stored = (blocks, scales)
    return values_of(blocks, str(blocks.name), shape, DType.bfloat16, ("mxfp4", "mxfp4"), stored, ())
