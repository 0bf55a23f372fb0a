"""Quantised models on the hub: their values, where the scheme is known.

FP8 with block scales (``X.weight`` and ``X.weight_scale_inv``: DeepSeek-V3, Kimi-K2, MiniMax-M2, Qwen) and
MXFP4 (``X_blocks`` and ``X_scales``: gpt_oss) become tensors of values that are decoded as they are read
(containers.decoded). Every other scheme is named, can be inspected, and is refused for conversion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ckpt_tool.canonical import Decoded, DType, Encoding, ExpertName, Region, Tensor
from ckpt_tool.containers.decoded import MXFP4_BLOCK, fp8_path, mxfp4_path
from ckpt_tool.errors import UnreadableError, UsageError
from ckpt_tool.families import text_config

QUANTISATION_KEYS = ("quantization_config", "compression_config")
_SCALE_DTYPES = frozenset({DType.float32, DType.bfloat16, DType.float16, DType.float8_e8m0fnu})
_FLOAT8 = (DType.float8_e4m3fn, DType.float8_e5m2)
# What the scale of a weight is called (transformers 5.20, quantizers/quantizer_finegrained_fp8.py).
_SCALES = ("{name}_scale_inv", "{base}.weight_scale_inv", "{base}.scale", "{base}.qscale_weight")
_ACTIVATIONS = ("{base}.input_scale", "{base}.activation_scale", "{base}.qscale_act")


def scheme_of(config: Mapping[str, Any] | None) -> str | None:
    """The quantisation a config.json names: ``fp8``, ``mxfp4``, another; None where it is not quantised."""
    if config is None:
        return None
    found = _described(config)
    return None if found is None else str(found.get("quant_method", "unknown"))


def _described(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a config says of its quantisation, under either of the names that transformers reads."""
    for part in (config, text_config(config)):
        for key in QUANTISATION_KEYS:
            found = part.get(key)
            if isinstance(found, Mapping) and found:
                return found
    return None


def decoded(tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """The same tensors with quantised ones as values; each carries what it was decoded from.

    Raises:
        UnreadableError: a scale does not fit its weight.
    """
    scheme = scheme_of(config)
    if scheme is None or config is None:
        # Raw FP8 is no value without its scales, and only the config says how they are to be applied.
        unknown = "fp8 that config.json does not describe"
        return {key: _unreadable(t, unknown) if _is_fp8(t) else t for key, t in tensors.items()}
    if scheme == "fp8":
        return _fp8(tensors, _block_size(config))
    if scheme == "mxfp4":
        return _mxfp4(tensors)
    return {name: _unreadable(tensor, scheme) for name, tensor in tensors.items()}


def files_of_values(tensors: Mapping[str, Tensor]) -> dict[str, Decoded]:
    """The files that quantised tensors are read from as values, by their paths."""
    return {
        region.file: Decoded(tensor.nbytes, tensor.encoding.stored)
        for tensor in tensors.values()
        if tensor.encoding is not None and tensor.encoding.stored
        for region in tensor.regions
    }


def refuse_unreadable(tensors: tuple[Tensor, ...]) -> None:
    """Raises UsageError where a tensor's values cannot be read."""
    for tensor in tensors:
        if isinstance(tensor.name, ExpertName) and tensor.encoding is None and not tensor.dtype.is_float:
            raise UsageError(
                f"{tensor.name} is {tensor.dtype}, so it is quantised in a way that config.json does not "
                "describe. Convert a release that is not quantised, or one whose config.json is its own."
            )
        if tensor.encoding is not None and not tensor.encoding.stored:
            raise UsageError(
                f"{tensor.name} is quantised as {tensor.encoding.scheme}, which ckpt-tool does not decode; "
                "it reads FP8 with block scales and MXFP4. Convert a release that is not quantised."
            )


def _unreadable(tensor: Tensor, scheme: str) -> Tensor:
    if tensor.dtype.is_float and tensor.dtype.itemsize > 1:
        return tensor
    return replace(tensor, encoding=Encoding(scheme, ()))


def _block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    match (_described(config) or {}).get("weight_block_size"):
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    return None


# ---- FP8


def _fp8(tensors: Mapping[str, Tensor], block: tuple[int, int] | None) -> dict[str, Tensor]:
    beside: dict[str, tuple[str, list[str]]] = {}  # weight -> (its scale, scales of activations)
    used: set[str] = set()
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOAT8:
            continue
        base = name.removesuffix(".weight")
        scales, others = (
            [key for pattern in patterns if (key := pattern.format(name=name, base=base)) in tensors]
            for patterns in (_SCALES, _ACTIVATIONS)
        )
        if scales:
            beside[name] = scales[0], others
            used |= {scales[0], *others}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in beside:
            scale, others = beside[name]
            more = tuple(tensors[other] for other in others)
            found[name] = _fp8_values(tensor, tensors[scale], more, block)
        elif name not in used:
            found[name] = _unreadable(tensor, "fp8 without block scales") if _is_weight(tensor) else tensor
    return found


def _is_fp8(tensor: Tensor) -> bool:
    return len(tensor.shape) > 1 and tensor.dtype in _FLOAT8


def _is_weight(tensor: Tensor) -> bool:
    return len(tensor.shape) > 1 and (tensor.dtype in _FLOAT8 or tensor.dtype is DType.int8)


def _fp8_values(
    weight: Tensor, scale: Tensor, more: tuple[Tensor, ...], block: tuple[int, int] | None
) -> Tensor:
    found = _scaled_block(weight.shape, scale.shape, block)
    if found is None or scale.dtype not in _SCALE_DTYPES:
        raise UnreadableError(
            f"{weight.name} has shape {list(weight.shape)}, its scale {scale.name} is {scale.dtype} "
            f"{list(scale.shape)}; with weight_block_size {list(block) if block else 'not stated'} in "
            "config.json they do not belong together."
        )
    block = found
    return replace(
        weight,
        dtype=DType.float32,
        regions=(Region(0, weight.numel, fp8_path(weight, scale, block), 0),),
        encoding=Encoding(f"fp8 {block[0]}x{block[1]}", (weight, scale, *more)),
    )


def _scaled_block(
    weight: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int] | None
) -> tuple[int, int] | None:
    """The rows and columns that one element of a scale is for; None where the shapes do not fit."""
    if len(weight) < 2:
        return None
    *lead, rows, columns = weight
    whole = [(*lead,), (*lead, 1, 1)] + [(), (1,)] * (math.prod(lead) == 1)
    if scale in whole:
        return rows, columns
    if block is None:
        return (1, columns) if scale in [(*lead, rows), (*lead, rows, 1)] else None
    fits = scale == (*lead, -(-rows // block[0]), -(-columns // block[1]))
    return block if fits else None


# ---- MXFP4


def _mxfp4(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        scales = tensors.get(f"{name.removesuffix('_blocks')}_scales")
        if name.endswith("_blocks") and scales is not None:
            found[name] = _mxfp4_values(tensor, scales)
        elif not (name.endswith("_scales") and f"{name.removesuffix('_scales')}_blocks" in tensors):
            found[name] = tensor
    return found


def _mxfp4_values(blocks: Tensor, scales: Tensor) -> Tensor:
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
    return replace(
        blocks,
        shape=shape,
        dtype=DType.bfloat16,
        regions=(Region(0, math.prod(shape), mxfp4_path(blocks, scales), 0),),
        encoding=Encoding("mxfp4", (blocks, scales)),
    )
