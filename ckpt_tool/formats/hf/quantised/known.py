"""The methods whose tensors are decoded, by ``quant_method``: one line each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ckpt_tool.canonical import Decoded, Tensor
from ckpt_tool.formats.hf.quantised import compressed_tensors, fp8, mxfp4
from ckpt_tool.formats.hf.quantised.described import (
    NotUnderstoodError,
    Settings,
    described,
    method_of,
)
from ckpt_tool.formats.hf.quantised.values import Model, is_float8, unreadable
from ckpt_tool.storage import Reader

# Puts values in the place of the stored tensors of a model, or says that it does not understand.
Method = Callable[[Model, Settings], None]

METHODS: Mapping[str, Method] = {
    "fp8": fp8.decode,
    "mxfp8": fp8.decode,
    "mxfp4": mxfp4.decode,
    "compressed-tensors": compressed_tensors.decode,
}


def decoded(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None, reader: Reader
) -> dict[str, Tensor]:
    """The same tensors with quantised ones as values; each carries what it was decoded from.

    Raises:
        UnreadableError: stored tensors do not fit each other, or the description.
    """
    settings = described(config)
    if settings is None:
        # Raw FP8 is no value without its scales, and only the config says how they are to be applied.
        unknown = "fp8 that config.json does not describe"
        return {key: unreadable(t, unknown) if is_float8(t) else t for key, t in tensors.items()}
    method = method_of(settings)
    decode = METHODS.get(method)
    if decode is None:
        return _all_unreadable(tensors, method, "")
    model = Model(tensors, reader)
    try:
        decode(model, settings)
    except NotUnderstoodError as error:
        return _all_unreadable(tensors, method, str(error))
    return model.result()


def _all_unreadable(tensors: Mapping[str, Tensor], method: str, reason: str) -> dict[str, Tensor]:
    """Tensors that may be quantised are named so: those that are no wide floats, else all."""
    narrow = {key for key, tensor in tensors.items() if not _is_wide(tensor)} or set(tensors)
    return {key: unreadable(t, method, reason) if key in narrow else t for key, t in tensors.items()}


def _is_wide(tensor: Tensor) -> bool:
    return tensor.dtype.is_float and tensor.dtype.itemsize > 1


def files_of_values(tensors: Mapping[str, Tensor]) -> dict[str, Decoded]:
    """The files that quantised tensors are read from as values, by their paths."""
    return {
        region.file: Decoded(tensor.nbytes, tensor.encoding.stored)
        for tensor in tensors.values()
        if tensor.encoding is not None and tensor.encoding.stored
        for region in tensor.regions
    }


def note_of_scheme(config: Mapping[str, Any] | None, values: Iterable[Tensor]) -> tuple[str, ...]:
    """What a report says about how a model is quantised."""
    settings = described(config)
    if settings is None:
        return ()
    encoded = [tensor.encoding for tensor in values if tensor.encoding is not None]
    kinds = Counter(one.scheme for one in encoded if one.stored)
    said = [f"{count} tensors as {kind}" for kind, count in sorted(kinds.items())]
    refused = sum(1 for one in encoded if not one.stored)
    said += [f"{refused} that cannot be read as values"] if refused else []
    beside = sum(len(one.stored) - 1 for one in encoded if one.stored)
    more = f"; {beside} scales and the like belong to them" if beside else ""
    return (f"Quantised as {method_of(settings)}: {', '.join(said) or 'no tensor'}{more}.",)
