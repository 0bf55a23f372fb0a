"""``quant_method: compressed-tensors``: groups of modules, each with a scheme and a format.

What is stored per format (compressed-tensors 0.12.2, compressors/quantized_compressors; 0.20, compressors):

- ``pack-quantized``: ``weight_packed`` int32, ``weight_scale``, ``weight_shape``, and ``weight_zero_point``
  where a scheme is not symmetric; ``weight_g_idx`` where groups are not in the order of columns, which 0.20
  no longer reads.
- ``float-quantized``, ``int-quantized``, ``naive-quantized``: ``weight`` and ``weight_scale``, zero points.
- ``nvfp4-pack-quantized``: ``weight_packed`` uint8, ``weight_scale`` float8, ``weight_global_scale``, by
which
  scales are divided.
- ``mxfp4-pack-quantized`` and ``mxfp8-quantized``: scales are exponents in uint8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckpt_tool.canonical import DType, Tensor
from ckpt_tool.containers.decoding.fp4 import MXFP4_BLOCK, NVFP4_BLOCK
from ckpt_tool.formats.hf.quantised.described import NotUnderstoodError, Settings, check_keys
from ckpt_tool.formats.hf.quantised.floats import mxfp4_values, mxfp8_values, nvfp4_values
from ckpt_tool.formats.hf.quantised.matching import names_of, names_or_expressions
from ckpt_tool.formats.hf.quantised.values import (
    SCALES,
    Model,
    block_label,
    blocked,
    do_not_fit,
    scaled_block,
    stored_in,
    unreadable,
    values_of,
    with_more,
)

METHOD = "compressed-tensors"
_KEYS = (
    "quant_method", "config_groups", "format", "quantization_status", "ignore", "kv_cache_scheme",
    "global_compression_ratio", "run_compressed", "version", "sparsity_config", "transform_config",
    "dequantize", "use_optimized_inference",
)  # fmt: skip
_GROUP_KEYS = ("targets", "weights", "input_activations", "output_activations", "format")
_SCHEME_KEYS = (
    "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder",
    "scale_dtype", "zp_dtype", "observer", "observer_kwargs",
)  # fmt: skip
_FORMATS = (
    "pack-quantized", "float-quantized", "int-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp8-quantized",
)  # fmt: skip
# Beside a weight, and no part of its values.
_ACTIVATIONS = (
    "input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point",
)  # fmt: skip
_WITHOUT_WEIGHT = ("_packed", "_scale", "_zero_point", "_shape", "_g_idx", "_global_scale")


@dataclass(frozen=True, slots=True)
class _Group:
    """How the weights of some modules are quantised."""

    name: str
    matches: Callable[[str], bool]
    everything: bool  # all modules of the class Linear
    format: str
    bits: int
    kind: str
    symmetric: bool
    strategy: str
    group_size: int
    block: tuple[int, int] | None


def decode(model: Model, settings: Settings) -> None:
    check_keys(settings, _KEYS)
    _check_nothing_else(settings)
    groups = _groups(settings)
    ignored = names_or_expressions(names_of(settings.get("ignore"), "ignore"))
    for name, tensor in model:
        stem = name.removesuffix("_packed")
        if stem == name and not _is_narrow(model, name, tensor):
            continue
        module = stem.rpartition(".")[0] if stem.endswith(".weight") else stem
        if ignored(module):
            reason = f"config.json has {module} among those it ignores, and the files have {name}."
            model.put(name, unreadable(tensor, METHOD, reason), ())
            continue
        try:
            value = _values(model, tensor, stem, _group_of(groups, module))
        except NotUnderstoodError as error:
            model.put(name, unreadable(tensor, METHOD, f"{error}"), ())
        else:
            more = model.beside(f"{module}.{kind}" for kind in _ACTIVATIONS)
            value = with_more(value, more)
            model.put(name, value, stored_in(value))
    model.refuse_rest(METHOD, lambda name: name.endswith(tuple(f"weight{end}" for end in _WITHOUT_WEIGHT)))


def _is_narrow(model: Model, name: str, tensor: Tensor) -> bool:
    """Whether a tensor holds numbers of 8 bits that a scale belongs to, or should."""
    if len(tensor.shape) < 2 or f"{name}_packed" in model.tensors:
        return False
    low = (DType.float8_e4m3fn, DType.float8_e5m2, DType.int8)
    return tensor.dtype in low and not name.endswith(("_scale", "_zero_point"))


def _check_nothing_else(settings: Settings) -> None:
    """Raises NotUnderstoodError where weights are sparse, rotated, or not as the groups say."""
    sparsity = settings.get("sparsity_config") or {}
    if sparsity and sparsity.get("format", "dense") != "dense":
        raise NotUnderstoodError(
            f"sparsity_config in config.json has format = {sparsity.get('format')!r}: weights are sparse. "
            "Decompress the model with compressed-tensors."
        )
    transforms = settings.get("transform_config") or {}
    if transforms and transforms.get("config_groups", True):
        raise NotUnderstoodError(
            "transform_config in config.json says that weights are rotated, which ckpt-tool does not undo."
        )
    if settings.get("quantization_status", "compressed") != "compressed":
        raise NotUnderstoodError(
            f"quantization_config in config.json has quantization_status = "
            f"{settings['quantization_status']!r}; ckpt-tool decodes compressed models."
        )


# ---- groups


def _groups(settings: Settings) -> list[_Group]:
    found = settings.get("config_groups")
    if not isinstance(found, Mapping) or not found:
        raise NotUnderstoodError("quantization_config in config.json has no config_groups.")
    groups = [_group(str(name), group, settings) for name, group in found.items()]
    return [group for group in groups if group is not None]


def _group(name: str, group: Any, settings: Settings) -> _Group | None:
    where = f"config_groups.{name}"
    if not isinstance(group, Mapping):
        raise NotUnderstoodError(
            f"{where} in config.json is {group!r:.80}, and not a group with its targets."
        )
    check_keys(group, _GROUP_KEYS, where)
    scheme = group.get("weights")
    if scheme is None:
        return None
    check_keys(scheme, _SCHEME_KEYS, f"{where}.weights")
    targets = names_of(group.get("targets"), f"{where}.targets")
    kind, bits = scheme.get("type", "int"), scheme.get("num_bits", 8)
    strategy, size = scheme.get("strategy"), scheme.get("group_size")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    form = group.get("format") or settings.get("format")
    if form not in _FORMATS or scheme.get("dynamic") is True:
        raise NotUnderstoodError(
            f"{where} in config.json has format = {form!r}, which ckpt-tool does not decode."
        )
    return _Group(
        name=where,
        matches=names_or_expressions(targets),
        everything="Linear" in targets,
        format=form,
        bits=bits,
        kind=str(kind).lower(),
        symmetric=scheme.get("symmetric", True) is True,
        strategy=str(strategy).lower(),
        group_size=size if type(size) is int and size > 0 else 0,
        block=_pair(scheme.get("block_structure")),
    )


def _pair(value: Any) -> tuple[int, int] | None:
    """A block's rows and columns, also as older configs have them: ``"128x128"``."""
    if isinstance(value, str) and value.replace("x", "", 1).isdecimal():
        value = [int(part) for part in value.split("x") if part]
    match value:
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    return None


def _group_of(groups: Sequence[_Group], module: str) -> _Group:
    """The group that a module belongs to: by its name or a pattern, else by its class.

    Raises:
        NotUnderstoodError: none, or more than one.
    """
    by_name = [group for group in groups if group.matches(module)]
    found = by_name or [group for group in groups if group.everything]
    if len({_alike(group) for group in found}) != 1:
        count = "no group" if not found else f"{len(found)} groups"
        raise NotUnderstoodError(f"{count} of config_groups in config.json stand for {module}.")
    return found[0]


def _alike(group: _Group) -> tuple[Any, ...]:
    return (
        group.format, group.bits, group.kind, group.symmetric, group.strategy, group.group_size,
        group.block,
    )  # fmt: skip


# ---- tensors


def _values(model: Model, weight: Tensor, stem: str, group: _Group) -> Tensor:
    """The tensor of values."""
    scale = model.get(f"{stem}_scale")
    if scale is None:
        raise NotUnderstoodError(f"{stem}_scale, which belongs to {weight.name}, is not there.")
    match group.format:
        case "pack-quantized":
            value = _packed(model, weight, scale, stem, group)
        case "nvfp4-pack-quantized":
            whole = model.get(f"{stem}_global_scale")
            _check_scheme(group, 4, "float", ("tensor_group", "group"), NVFP4_BLOCK)
            if whole is None:
                raise NotUnderstoodError(f"{stem}_global_scale, which belongs to it, is not there.")
            value = nvfp4_values(weight, scale, whole, stem, divides=True)
        case "mxfp4-pack-quantized":
            _check_scheme(group, 4, "float", ("group",), MXFP4_BLOCK)
            value = mxfp4_values(weight, scale, stem)
        case "mxfp8-quantized":
            _check_scheme(group, 8, "float", ("group",), 32)
            value = mxfp8_values(weight, scale)
        case _:
            value = _plain(model, weight, scale, group)
    return value


def _check_scheme(group: _Group, bits: int, kind: str, strategies: Sequence[str], size: int) -> None:
    said = (group.bits, group.kind, group.group_size, group.symmetric)
    if said != (bits, kind, size, True) or group.strategy not in strategies:
        raise NotUnderstoodError(
            f"{group.name} has format {group.format} with {group.bits} bits of {group.kind}s, "
            f"strategy {group.strategy} and groups of {group.group_size}; it has symmetric {kind}s of "
            f"{bits} bits in groups of {size}."
        )


def _packed(model: Model, weight: Tensor, scale: Tensor, stem: str, group: _Group) -> Tensor:
    if group.kind != "int" or group.bits not in (4, 8) or group.strategy not in ("group", "channel"):
        raise NotUnderstoodError(
            f"{group.name} in config.json packs {group.kind}s of {group.bits} bits with strategy "
            f"{group.strategy}; ckpt-tool decodes ints of 4 and 8 bits in groups or channels."
        )
    shape_of, zero = model.get(f"{stem}_shape"), model.get(f"{stem}_zero_point")
    if model.get(f"{stem}_g_idx") is not None:
        raise NotUnderstoodError(
            f"{stem}_g_idx gives columns another order of groups, which newer releases do not read. "
            "Decompress the model with compressed-tensors 0.12."
        )
    if shape_of is None or shape_of.dtype not in (DType.int32, DType.int64) or shape_of.numel > 8:
        raise NotUnderstoodError(
            f"{stem}_shape, which says how many columns {weight.name} has, is not there."
        )
    if (zero is None) != group.symmetric:
        raise NotUnderstoodError(
            f"{group.name} in config.json is {'' if group.symmetric else 'not '}symmetric, and "
            f"{stem}_zero_point is {'not ' if zero is None else ''}there."
        )
    shape, in_word = model.integers(shape_of), 32 // group.bits
    size = (group.group_size or shape[-1]) if group.strategy == "group" else shape[-1]
    *lead, rows, columns = weight.shape if len(shape) < 2 else (*weight.shape[:-2], *shape[-2:])
    groups = -(-columns // size) if size > 0 else 0
    others = (scale, shape_of) if zero is None else (scale, zero, shape_of)
    fits = (
        weight.dtype is DType.int32
        and weight.shape == (*lead, rows, -(-columns // in_word))
        and shape in ((rows, columns), (*lead, rows, columns))
        and scale.dtype in SCALES
        and scale.shape == (*lead, rows, groups)
        and (zero is None or zero.shape == (*lead, -(-rows // in_word), groups))
        and (zero is None or zero.dtype is DType.int32)
    )
    if not fits:
        raise do_not_fit(weight, others, f"with shape {list(shape)} and groups of {size}")
    label = f"int{group.bits} {'in groups of ' + str(size) if group.strategy == 'group' else 'per channel'}"
    label += "" if zero is None else " with zero points"
    stored = (weight, scale) if zero is None else (weight, scale, zero)
    numbers = (group.bits, size, int(zero is not None))
    return values_of(
        weight, stem, (*lead, rows, columns), scale.dtype, ("packed", label), stored, numbers, (shape_of,)
    )


def _plain(model: Model, weight: Tensor, scale: Tensor, group: _Group) -> Tensor:
    """8-bit numbers one by one; also integers of fewer bits, which are stored in 8."""
    zero = model.get(f"{weight.name}_zero_point")
    expected = DType.int8 if group.kind == "int" else DType.float8_e4m3fn
    if weight.dtype is not expected or group.bits > 8 or (group.kind == "float" and group.bits != 8):
        raise NotUnderstoodError(
            f"{group.name} in config.json has {group.kind}s of {group.bits} bits, and {weight.name} is "
            f"{weight.dtype}."
        )
    if zero is not None and (zero.dtype is not DType.int8 or group.kind != "int"):
        raise NotUnderstoodError(f"{zero.name} is {zero.dtype}, which ckpt-tool does not subtract.")
    if zero is None and not group.symmetric:
        raise NotUnderstoodError(
            f"{group.name} in config.json is not symmetric, and there is no zero point."
        )
    block = _block_of(weight, scale, group)
    if block is None or scale.dtype not in SCALES or (zero is not None and zero.shape != scale.shape):
        others = (scale,) if zero is None else (scale, zero)
        raise do_not_fit(weight, others, f"with strategy {group.strategy}")
    label = block_label("fp8" if group.kind == "float" else "int8", block, weight.shape)
    return blocked(weight, scale, block, label, dtype=scale.dtype, zero=zero)


def _block_of(weight: Tensor, scale: Tensor, group: _Group) -> tuple[int, int] | None:
    """The rows and columns that a scale is for, where its shape is that of the strategy."""
    *lead, rows, columns = weight.shape
    match group.strategy:
        case "tensor":
            wanted = (rows, columns)
            found = scaled_block(weight.shape, scale.shape, None)
            if scale.shape == (1, 1) and rows > 1 and not lead:
                found = wanted
        case "channel":
            wanted, found = (1, columns), scaled_block(weight.shape, scale.shape, (1, columns))
            if scale.shape in ((*lead, rows), (*lead, rows, 1)):
                found = wanted
        case "group" if group.group_size:
            wanted = (1, group.group_size)
            found = scaled_block(weight.shape, scale.shape, wanted)
        case "block" if group.block:
            wanted = group.block
            found = scaled_block(weight.shape, scale.shape, wanted)
        case _:
            raise NotUnderstoodError(
                f"{group.name} in config.json has strategy {group.strategy}, which is not decoded."
            )
    return found if found == wanted else None
