"""Writing pickles (protocol 2, as ``torch.save`` does) of what ``pickles.loads`` returns."""

from __future__ import annotations

import collections
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckpt_tool.containers.pickle_records import (
    STORAGE_OF,
    Named,
    Opaque,
    Sealed,
    TensorRecord,
    TorchSize,
)


@dataclass(frozen=True, slots=True)
class Spelled:
    """A part of a pickle, spelled out: without a memo it is the same wherever it stands."""

    data: bytes


def spelled(value: Any) -> Spelled:
    """``value`` as it stands in a pickle. Raises TypeError as ``dumps``."""
    out = bytearray()
    _write(out, value)
    return Spelled(bytes(out))


def dumps(value: Any) -> bytes:
    """A pickle (protocol 2, as ``torch.save`` writes) of what ``loads`` returns, ``Spelled`` parts in it.

    Deterministic: no memo, so equal values give equal bytes.

    Raises:
        TypeError: the value holds something that ``loads`` never returns.
    """
    return b"\x80\x02" + spelled(value).data + b"."


_PLAIN = frozenset({int, float, str, tuple, list, dict, collections.OrderedDict})


def _write(out: bytearray, value: Any) -> None:
    kind = type(value)
    if kind in _PLAIN:
        _write_plain(out, value)
    elif kind is Spelled:
        out += value.data
    elif value is None:
        out += b"N"
    elif value is True:
        out += b"\x88"
    elif value is False:
        out += b"\x89"
    elif isinstance(value, TensorRecord):
        _write_tensor(out, value)
    elif isinstance(value, Opaque):
        _write_opaque(out, value)
    elif isinstance(value, Named):
        _write_global(out, value.module, value.name)
    elif isinstance(value, Sealed):  # a class as a value: numpy's _reconstruct is given one
        _write_global(out, value.__dict__["module"], value.__dict__["qualname"])
    elif isinstance(value, TorchSize):
        _write_call(out, "torch", "Size", (tuple(value),))
    else:
        _write_plain(out, value)


def _write_plain(out: bytearray, value: Any) -> None:
    kind = type(value)
    if kind is int:
        out += _integer(value)
    elif kind is float:
        out += b"G" + struct.pack(">d", value)
    elif kind is str:
        data = value.encode("utf-8", "surrogatepass")
        out += b"X" + struct.pack("<I", len(data)) + data
    elif kind is bytes:
        _write_call(out, "_codecs", "encode", (value.decode("latin1"), "latin1"))
    elif kind is tuple:
        out += b"("
        for item in value:
            _write(out, item)
        out += b"t"
    elif kind is list:
        out += b"]("
        for item in value:
            _write(out, item)
        out += b"e"
    elif kind is dict:
        out += b"}"
        _write_items(out, value)
    elif kind is collections.OrderedDict:
        _write_call(out, "collections", "OrderedDict", ())
        _write_items(out, value)
    elif kind is collections.defaultdict:
        factory = value.default_factory
        named = None if factory is None else Named("builtins", factory.__name__)
        _write_call(out, "collections", "defaultdict", (named,))
        _write_items(out, value)
    elif kind in (set, frozenset):
        _write_call(out, "__builtin__", kind.__name__, (sorted(value, key=repr),))
    elif kind in (complex, bytearray, slice, range):
        _write_call(out, "__builtin__", kind.__name__, _constructor_arguments(value))
    else:
        raise TypeError(f"cannot write a {kind.__name__} into a checkpoint")


def _constructor_arguments(value: Any) -> tuple[Any, ...]:
    if isinstance(value, complex):
        return (value.real, value.imag)
    if isinstance(value, bytearray):
        return (bytes(value),)
    return (value.start, value.stop, value.step)


def _integer(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    if len(data) < 256:
        return b"\x8a" + bytes([len(data)]) + data
    return b"\x8b" + struct.pack("<i", len(data)) + data


def _write_items(out: bytearray, value: Mapping[Any, Any]) -> None:
    out += b"("
    for key, item in value.items():
        _write(out, key)
        _write(out, item)
    out += b"u"


def _write_global(out: bytearray, module: str, name: str) -> None:
    out += f"c{module}\n{name}\n".encode()


def _write_call(out: bytearray, module: str, name: str, args: tuple[Any, ...]) -> None:
    _write_global(out, module, name)
    _write(out, args)
    out += b"R"


def _write_opaque(out: bytearray, value: Opaque) -> None:
    _write_global(out, value.module, value.qualname)
    _write(out, value.args)
    # Enums are called with their value; everything else is made by __new__, as pickle itself does.
    out += b"R" if value.args else b"\x81"
    if value.state is not None:
        _write(out, value.state)
        out += b"b"


def _write_tensor(out: bytearray, value: TensorRecord) -> None:
    storage = value.storage
    untyped = storage.dtype is None
    version = "_rebuild_tensor_v3" if untyped else "_rebuild_tensor_v2"
    if value.attributes is not None:
        _write_global(out, "torch._tensor", "_rebuild_from_type_v2")
        out += b"("
        _write_global(out, "torch._utils", version)
        _write_global(out, "torch", "Tensor")
    else:
        _write_global(out, "torch._utils", version)
    out += b"(("  # the arguments; the persistent id
    _write(out, "storage")
    if storage.dtype is None:
        _write_global(out, "torch.storage", "UntypedStorage")
    else:
        _write_global(out, "torch", STORAGE_OF[storage.dtype])
    _write(out, storage.key)
    _write(out, "cpu")
    _write(out, storage.numel)
    out += b"tQ"
    for item in (value.offset, value.shape, value.stride, value.requires_grad):
        _write(out, item)
    _write_call(out, "collections", "OrderedDict", ())
    if untyped:
        _write_global(out, "torch", value.dtype.torch_name)
    out += b"t"
    if value.attributes is None:
        out += b"R"
    else:
        _write(out, value.attributes)
        out += b"tR"
