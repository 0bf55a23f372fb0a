"""Laying out a directory of safetensors: tensors in shards, the index, config.json, files carried over."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ckpt_tool.canonical import Checkpoint, DType, Tensor
from ckpt_tool.containers.safetensors import safetensors_file
from ckpt_tool.errors import UsageError
from ckpt_tool.families import FUSED_FORM, HUB_FORM, Family, family_of
from ckpt_tool.families.agreement import check_config
from ckpt_tool.families.forms import compiled
from ckpt_tool.families.naming import Entry, entries, to_hub, unpublishable
from ckpt_tool.formats.hf import own_module
from ckpt_tool.formats.hf.files import INDEX, SINGLE
from ckpt_tool.formats.hf.quantised import QUANTISATION_KEYS, refuse_unreadable
from ckpt_tool.formats.hf.shards import Named, index, shards
from ckpt_tool.formats.hf.target_options import HfOptions
from ckpt_tool.layout import Layout, Literal, Slot, TargetFile, left_out, text_file

_NO_STATE = "a model file holds no optimizer state"


def layout(checkpoint: Checkpoint, options: HfOptions) -> Layout:
    """The model's values (masters where there are any) in the form ``options.hf_layout``: ``hub``, as the
    family is published, or ``fused``, as transformers holds it in memory."""
    config = options.config if options.config is not None else checkpoint.model_config
    if config is None:
        refuse_unreadable(checkpoint.tensors)
        return own_module.layout(checkpoint, options)
    style = options.hf_layout or HUB_FORM
    if style not in (HUB_FORM, FUSED_FORM):
        raise UsageError(f"--hf-layout {style!r} is no form of a Hugging Face model; choose hub or fused.")
    refuse_unreadable(checkpoint.tensors)
    family = family_of(config)
    published = to_hub(checkpoint, family, config)
    check_config(published, family, config)
    values = published.values()
    keep_encoded = options.dtype is None and any(tensor.encoding for tensor in values)
    slots = (
        _encoded_slots(values, family, style) if keep_encoded else _slots(values, family, options, config)
    )
    parts = shards(slots, options.max_shard_bytes)
    files = [safetensors_file(path, part, {"format": "pt"}) for path, part in parts.items()]
    if list(parts) != [SINGLE]:
        files.append(text_file(INDEX, index(parts)))
    written = most_used((slot.dtype, slot.nbytes) for _, slot in slots)
    new_config, notes = _new_config(config, family, None if keep_encoded else written)
    files.append(text_file("config.json", json.dumps(new_config, indent=2) + "\n"))
    for name, data in options.extra_files.items():
        files.append(TargetFile(name, len(data), (Literal(0, data),) if data else ()))
    notes += _kept_precision(slots, family, options.dtype)
    used = {id(tensor) for tensor in values}
    states = [tensor for tensor in published.tensors if id(tensor) not in used]
    left = (*left_out(states, _NO_STATE), *unpublishable(checkpoint, family))
    return Layout(tuple(files), left, (*published.notes, *notes), loading=_loading(config))


def _loading(config: Mapping[str, Any]) -> str:
    """The line that loads the model; one with code of its own is left to its name in ``auto_map``."""
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    known = isinstance(first, str) and first.isidentifier() and "auto_map" not in config
    return f'transformers.{first if known else "AutoModelForCausalLM"}.from_pretrained("{{target}}")'


# ---- tensors


def _slots(
    values: Sequence[Tensor], family: Family, options: HfOptions, config: Mapping[str, Any]
) -> list[Named]:
    """(name, slot) of every tensor in the order of the model."""
    style = options.hf_layout or HUB_FORM
    return [
        (entry.name, Slot(entry.tensor, entry.shape, _dtype(entry, family, options.dtype), entry.start))
        for entry in entries(values, family, style, config)
    ]


def _dtype(entry: Entry, family: Family, dtype: DType | None) -> DType:
    tensor = entry.tensor
    if dtype is None or not tensor.dtype.is_float:
        return tensor.dtype
    return tensor.dtype if family.keeps_fp32(entry.name) else dtype


def _encoded_slots(values: Sequence[Tensor], family: Family, style: str) -> list[Named]:
    """Quantised tensors as they are stored, under the names they have."""
    if style != HUB_FORM:
        raise UsageError(
            "The model is quantised and is to be kept so, which the fused form cannot. Ask for a dtype "
            "(--dtype bf16), or for the hub form."
        )
    fused = sorted(
        str(stored.name)
        for tensor in values
        for stored in (tensor.encoding.stored if tensor.encoding else ())
        if _is_in_memory_form(str(stored.name), family)
    )
    if fused:
        raise UsageError(
            f"The model is quantised and is to be kept so, and its files have transformers' own names "
            f"({fused[0]}), which are not published ones. Ask for a dtype (--dtype bf16)."
        )
    slots: list[Named] = []
    seen: set[int] = set()
    for tensor in values:
        if tensor.encoding is None:
            continue
        for stored in tensor.encoding.stored:
            if id(stored) not in seen:
                seen.add(id(stored))
                slots.append((str(stored.name), Slot(stored, stored.shape, stored.dtype)))
    plain = [tensor for tensor in values if tensor.encoding is None]
    slots += [
        (entry.name, Slot(entry.tensor, entry.shape, entry.tensor.dtype, entry.start))
        for entry in entries(plain, family, style)
    ]
    return slots


def _is_in_memory_form(name: str, family: Family) -> bool:
    """Whether a name is one in transformers' memory, and none in published files."""
    return family.published(name, "transformers") not in (None, name) or any(
        compiled(stored.pattern).match(name)
        and stored.pattern not in {other.pattern for other in (*family.hub, *family.also)}
        for stored in family.fused
    )


def _kept_precision(slots: Iterable[Named], family: Family, dtype: DType | None) -> list[str]:
    kept = sorted(
        {name for name, slot in slots if dtype and slot.dtype is not dtype and family.keeps_fp32(name)}
    )
    return [f"Kept in their own precision, which routing needs: {', '.join(kept)}."] if kept else []


# ---- files


def most_used(sizes: Iterable[tuple[DType, int]]) -> DType:
    """The dtype of most bytes."""
    total: dict[DType, int] = {}
    for dtype, nbytes in sizes:
        total[dtype] = total.get(dtype, 0) + nbytes
    return max(total, key=lambda dtype: total[dtype])


def _new_config(
    config: Mapping[str, Any], family: Family, dtype: DType | None
) -> tuple[dict[str, Any], list[str]]:
    """The config as given, but with the dtype that was written, which transformers loads in, and with the
    hub's name of the number of experts. ``dtype`` None leaves everything as it is."""
    if dtype is None:
        return dict(config), []
    new, notes = config_in(config, dtype)
    for part in _with_nested(new):
        _name_experts(part, family)
    return new, notes


def config_in(config: Mapping[str, Any], dtype: DType) -> tuple[dict[str, Any], list[str]]:
    """The config of a model whose weights are ``dtype`` and not quantised, and what is to be said of it."""
    new: dict[str, Any] = json.loads(json.dumps(config))
    notes = []
    parts = _with_nested(new)
    for key in QUANTISATION_KEYS:
        dropped = [part.pop(key, None) for part in parts]
        if any(found is not None for found in dropped):
            notes.append(f"{key} is dropped from config.json: the weights are not quantised.")
    for part in parts:
        for key in ("dtype", "torch_dtype"):
            if key in part or part is new:
                part[key] = dtype.torch_name
    return new, notes


def _with_nested(config: dict[str, Any]) -> list[dict[str, Any]]:
    """A config and the configs of its parts."""
    nested = [value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict)]
    return [config] + [part for value in nested for part in _with_nested(value)]


def _name_experts(part: dict[str, Any], family: Family) -> None:
    """transformers writes num_local_experts for families whose published configs have num_experts."""
    published = next(iter(family.config.get("experts", ())), None)
    if published == "num_experts" and "num_experts" not in part and "num_local_experts" in part:
        part["num_experts"] = part["num_local_experts"]
