"""``quant_method: fp8`` and ``mxfp8``: 8-bit floats with a scale per block, channel or tensor, and
DeepSeek-V4's experts of 4-bit floats among them.

``X.weight`` and ``X.weight_scale_inv`` (DeepSeek-V3, Kimi-K2, MiniMax-M2, Qwen), or the scale's other
names; the scale's dtype and shape tell what it is for (transformers 5.20,
integrations/finegrained_fp8.py).
"""

from __future__ import annotations

from ckpt_tool.canonical import DType, Tensor
from ckpt_tool.containers.decoding.fp4 import MXFP4_BLOCK
from ckpt_tool.errors import UnreadableError
from ckpt_tool.formats.hf.quantised.described import NotUnderstoodError, Settings, check_keys
from ckpt_tool.formats.hf.quantised.matching import exactly_or_below, names_of
from ckpt_tool.formats.hf.quantised.values import (
    FLOAT8,
    SCALES,
    Model,
    block_label,
    blocked,
    scaled_block,
    unreadable,
    values_of,
)

_KEYS = (
    "quant_method", "weight_block_size", "fmt", "activation_scheme", "scale_fmt", "modules_to_not_convert",
    "modules_to_convert", "ignored_layers", "ignore", "dequantize",
)  # fmt: skip
# What the scale of a weight is called (transformers 5.20, quantizers/quantizer_finegrained_fp8.py).
_SCALES = ("{name}_scale_inv", "{base}.weight_scale_inv", "{base}.scale", "{base}.qscale_weight")
_ACTIVATIONS = ("{base}.input_scale", "{base}.activation_scale", "{base}.qscale_act")
_FORMATS = (None, "e4m3", "e5m2", "float8_e4m3fn", "float8_e5m2")
_SCALE_FORMATS = (None, "float", "ue8m0")
_IGNORED = ("modules_to_not_convert", "ignored_layers", "ignore")


def decode(model: Model, settings: Settings) -> None:
    check_keys(settings, _KEYS)
    if settings.get("fmt") not in _FORMATS or settings.get("scale_fmt") not in _SCALE_FORMATS:
        raise NotUnderstoodError(
            f"quantization_config in config.json has fmt = {settings.get('fmt')!r} and scale_fmt = "
            f"{settings.get('scale_fmt')!r}, which ckpt-tool does not know."
        )
    mx = settings.get("quant_method") == "mxfp8"
    block = (1, 32) if mx and settings.get("weight_block_size") is None else _block_size(settings)
    ignored = exactly_or_below(name for key in _IGNORED for name in names_of(settings.get(key), key))
    for name, tensor in model:
        if tensor.dtype not in (*FLOAT8, DType.int8) or len(tensor.shape) < 2:
            continue
        base = name.removesuffix(".weight")
        scales, others = (
            model.beside(pattern.format(name=name, base=base) for pattern in patterns)
            for patterns in (_SCALES, _ACTIVATIONS)
        )
        if not scales:
            model.put(name, unreadable(tensor, "fp8 without block scales"), ())
        elif ignored(base):
            reason = f"config.json says that {base} is not quantised; the files have {scales[0].name}."
            model.put(name, unreadable(tensor, "fp8", reason), ())
        elif tensor.dtype is DType.int8:
            model.put(name, _fp4(tensor, scales[0], others), (tensor, scales[0], *others))
        else:
            value = _values(tensor, scales[0], others, block, mx)
            model.put(name, value, (tensor, scales[0], *others))


def _block_size(settings: Settings) -> tuple[int, int] | None:
    match settings.get("weight_block_size"):
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    return None


def _values(
    weight: Tensor, scale: Tensor, more: tuple[Tensor, ...], block: tuple[int, int] | None, mx: bool
) -> Tensor:
    found = scaled_block(weight.shape, scale.shape, block)
    kinds = (DType.uint8, DType.float8_e8m0fnu) if mx else (*SCALES, DType.float8_e8m0fnu)
    if found is None or scale.dtype not in kinds:
        raise UnreadableError(
            f"{weight.name} has shape {list(weight.shape)}, its scale {scale.name} is {scale.dtype} "
            f"{list(scale.shape)}; with weight_block_size {list(block) if block else 'not stated'} in "
            "config.json they do not belong together."
        )
    label = block_label("mxfp8" if mx else "fp8", found, weight.shape)
    return blocked(weight, scale, found, label, more=more)


def _fp4(weight: Tensor, scale: Tensor, more: tuple[Tensor, ...]) -> Tensor:
    """DeepSeek-V4's experts: two 4-bit floats in an int8, a scale of float8_e8m0fnu per 32 of them."""
    columns = weight.shape[-1] * 2
    expected = (*weight.shape[:-1], columns // MXFP4_BLOCK)
    if scale.dtype is not DType.float8_e8m0fnu or scale.shape != expected or columns % MXFP4_BLOCK:
        raise UnreadableError(
            f"{weight.name} is int8 {list(weight.shape)}, its scale {scale.name} is {scale.dtype} "
            f"{list(scale.shape)}; 4-bit floats in pairs have scales of float8_e8m0fnu {list(expected)}."
        )
    shape, scheme = (*weight.shape[:-1], columns), ("mxfp4", "fp4 with e8m0 scales")
    stored = (weight, scale)
    return values_of(weight, str(weight.name), shape, DType.bfloat16, scheme, stored, (), more)
