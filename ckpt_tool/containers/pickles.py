"""Pickles that run nothing: a restricted reader, and a writer for what it read.

The reader turns a pickle into plain Python containers. Tensors become ``TensorRecord``: a
description of where their bytes are. Objects of classes that real checkpoints contain become
``Opaque`` stand-ins, which hold what the pickle said and can be written back under their own name;
the class itself is never imported. A pickle that names anything else is refused with that name.

Stand-ins cannot be changed by a pickle either: its BUILD opcode sets attributes on whatever it has
pushed, so everything ``find_class`` hands out is immutable or made for one load only.
"""

from __future__ import annotations

import collections
import io
import pickle
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ckpt_tool.canonical import DType
from ckpt_tool.errors import UnreadableError, UnsafePickleError

# torch/storage.py and torch/serialization.py of torch 2.13: the class named in a persistent id.
_STORAGES = {
    "DoubleStorage": DType.float64,
    "FloatStorage": DType.float32,
    "HalfStorage": DType.float16,
    "BFloat16Storage": DType.bfloat16,
    "LongStorage": DType.int64,
    "IntStorage": DType.int32,
    "ShortStorage": DType.int16,
    "CharStorage": DType.int8,
    "ByteStorage": DType.uint8,
    "BoolStorage": DType.bool_,
}
_STORAGE_OF = {dtype: name for name, dtype in _STORAGES.items()}
_DTYPES = {dtype.torch_name: dtype for dtype in DType}

# Classes and functions kept as stand-ins, with the reason each occurs in real checkpoints.
_OPAQUE = frozenset(
    {
        # DeepSpeed's own objects in optimizer states (0.19.8)
        ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
        ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
        ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
        ("deepspeed.utils.tensor_fragment", "fragment_address"),
        # what people put into client_state: arguments, paths, times, devices, numpy's RNG state
        ("argparse", "Namespace"),
        ("types", "SimpleNamespace"),
        ("pathlib", "PosixPath"),
        ("pathlib", "PurePosixPath"),
        ("pathlib", "WindowsPath"),
        ("pathlib._local", "PosixPath"),
        ("datetime", "datetime"),
        ("datetime", "date"),
        ("datetime", "timedelta"),
        ("datetime", "timezone"),
        ("torch", "device"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "scalar"),
    }
)

# Builtin types that occur as values (a defaultdict's factory, say); a pickle cannot call them.
_TYPES: Mapping[str, type] = {
    kind.__name__: kind for kind in (list, dict, set, tuple, int, float, str, bool, bytes, complex)
}


def _inert(self: object, state: Any) -> None:
    """A pickle's BUILD opcode calls __setstate__; what is checked once must not change afterwards.

    Assigned in every class body below, because a frozen dataclass with slots gets its own otherwise.
    """
    raise ValueError(f"state set on a {type(self).__name__}")


@dataclass(frozen=True, slots=True)
class Named:
    """A global that is data: a dtype such as ``torch.float16``, a storage class, ``builtins.list``."""

    module: str
    name: str
    __setstate__ = _inert


def has_storage(dtype: DType) -> bool:
    """Whether torch has a storage class for a dtype."""
    return dtype in _STORAGE_OF


@dataclass(frozen=True, slots=True)
class StorageRecord:
    """A storage: the archive record ``data/<key>`` of ``numel`` elements."""

    key: str
    dtype: DType | None  # None: an untyped storage, whose numel counts bytes
    numel: int
    __setstate__ = _inert


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor in a torch archive: a strided view of a storage. Offsets and strides count elements.

    ``attributes`` is the ``__dict__`` of a tensor that had one (DeepSpeed sets ``ds_id``).
    """

    storage: StorageRecord
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool = False
    attributes: Any = None
    __setstate__ = _inert

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def is_contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return self.numel == 0
            expected *= size
        return True


class _Sealed(type):
    """The metaclass of stand-ins: a pickle cannot set attributes on the class."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise AttributeError(name)


class TorchSize(tuple[int, ...], metaclass=_Sealed):
    """``torch.Size``: a tuple that is written back as what it was."""

    __slots__ = ()


class Opaque(metaclass=_Sealed):
    """An object of a class that is not imported: its name, constructor arguments and state."""

    module = ""
    qualname = ""
    args: tuple[Any, ...]
    state: Any
    __slots__ = ("args", "state")

    def __new__(cls, *args: Any) -> Opaque:
        instance = super().__new__(cls)
        instance.args = args
        instance.state = None
        return instance

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Opaque)
            and (self.module, self.qualname) == (other.module, other.qualname)
            and (self.args, self.state) == (other.args, other.state)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{self.module}.{self.qualname}{self.args!r}"


def map_containers(value: Any, change: Callable[[Any], Any]) -> Any:
    """``value`` with ``change`` applied to the members of its containers, stand-ins among them.

    Members that ``change`` returns as they are stay the same objects.
    """
    if isinstance(value, dict):
        copy = value.copy()
        copy.update({key: change(item) for key, item in value.items()})
        return copy
    if type(value) in (list, tuple):
        return type(value)(change(item) for item in value)
    if isinstance(value, Opaque):
        args = tuple(change(item) for item in value.args)
        return opaque(value.module, value.qualname, *args, state=change(value.state))
    return value


def opaque(module: str, qualname: str, *args: Any, state: Any = None) -> Opaque:
    """A stand-in to be written under ``module.qualname``, which nothing here imports."""
    instance: Opaque = _stand_in(module, qualname)(*args)
    instance.state = state
    return instance


_stand_ins: dict[tuple[str, str], _Sealed] = {}


def _stand_in(module: str, qualname: str) -> Any:
    key = (module, qualname)
    if key not in _stand_ins:
        _stand_ins[key] = _Sealed(
            qualname, (Opaque,), {"__slots__": (), "module": module, "qualname": qualname}
        )
    return _stand_ins[key]


class _Function:
    """A function for REDUCE that a pickle can call but not change."""

    _call: Callable[..., Any]
    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_call", call)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(name)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)


def _rebuild_tensor(
    storage: StorageRecord,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool = False,
    hooks: Any = None,
    metadata: Any = None,
) -> TensorRecord:
    if not isinstance(storage, StorageRecord) or storage.dtype is None:
        raise ValueError("a tensor without a typed storage")
    return _checked(
        TensorRecord(storage, storage.dtype, offset, tuple(size), tuple(stride), bool(requires_grad))
    )


def _rebuild_tensor_v3(
    storage: StorageRecord,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
    hooks: Any,
    dtype: Named,
    metadata: Any = None,
) -> TensorRecord:
    if not isinstance(storage, StorageRecord):
        raise ValueError("a tensor without a storage")
    return _checked(
        TensorRecord(
            StorageRecord(storage.key, None, storage.numel),
            _DTYPES[dtype.name],
            offset,
            tuple(size),
            tuple(stride),
            bool(requires_grad),
        )
    )


def _checked(record: TensorRecord) -> TensorRecord:
    """Refuse a view that reaches outside of its storage, so that no later arithmetic has to ask."""
    numbers = (record.offset, *record.shape, *record.stride)
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"a tensor with offset, shape or strides {numbers}")
    if len(record.shape) != len(record.stride):
        raise ValueError(f"a tensor with shape {record.shape} and strides {record.stride}")
    storage = record.storage
    held = storage.numel if storage.dtype is not None else storage.numel // record.dtype.itemsize
    last = record.offset + sum(
        (size - 1) * stride for size, stride in zip(record.shape, record.stride, strict=True)
    )
    if record.numel and last >= held:
        raise ValueError(f"a tensor that ends at element {last} of a storage of {held}")
    return record


def _rebuild_parameter(data: TensorRecord, requires_grad: bool, hooks: Any) -> TensorRecord:
    if not isinstance(data, TensorRecord):
        raise ValueError("a parameter without a tensor")
    return data


def _rebuild_from_type(function: Any, kind: Any, args: tuple[Any, ...], state: Any) -> TensorRecord:
    if not isinstance(function, _Function):
        raise ValueError("a tensor subclass rebuilt by something that is no tensor function")
    record = function(*args)
    if not isinstance(record, TensorRecord):
        raise ValueError("a tensor subclass without a tensor")
    return TensorRecord(
        record.storage,
        record.dtype,
        record.offset,
        record.shape,
        record.stride,
        record.requires_grad,
        state,
    )


def _encode(text: str, encoding: str) -> bytes:
    """Protocol 2 has no bytes: pickle spells them ``_codecs.encode(text, 'latin1')``."""
    if encoding != "latin1":
        raise ValueError(f"text encoded as {encoding!r}")
    return text.encode("latin1")


def _defaultdict(factory: Named | None = None) -> Any:
    known = None if factory is None else _TYPES[factory.name]
    return collections.defaultdict(known)


def _items(kind: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A set is made from a list that the pickle spells out, and from nothing lazy."""

    def make(items: Any = ()) -> Any:
        if not isinstance(items, list | tuple):
            raise ValueError(f"a set made from a {type(items).__name__}")
        return kind(items)

    return make


def _bytearray(data: Any = b"", encoding: str = "latin-1") -> bytearray:
    if isinstance(data, str) and encoding in ("latin-1", "latin1"):
        data = data.encode("latin1")
    if not isinstance(data, bytes):
        raise ValueError(f"a bytearray made from a {type(data).__name__}")
    return bytearray(data)


def _bytes(*nothing: Any) -> bytes:
    """Protocol 2 spells empty bytes ``bytes()``."""
    if nothing:
        raise ValueError("bytes made by a call")
    return b""


def _size(items: Any) -> TorchSize:
    if not isinstance(items, list | tuple):
        raise ValueError(f"a size made from a {type(items).__name__}")
    return TorchSize(items)


# Protocol 2, which torch.save writes, spells some builtins by their names in Python 2.
_PYTHON_2 = {"xrange": "range", "long": "int", "unicode": "str"}

_CALLABLE_BUILTINS: Mapping[str, _Function] = {
    "bytes": _Function(_bytes),
    "set": _Function(_items(set)),
    "frozenset": _Function(_items(frozenset)),
    "bytearray": _Function(_bytearray),
    "complex": _Function(complex),
    "slice": _Function(slice),
    "range": _Function(range),
}

_FUNCTIONS: Mapping[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): _Function(_rebuild_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): _Function(_rebuild_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): _Function(_rebuild_from_type),
    ("_codecs", "encode"): _Function(_encode),
    ("torch", "Size"): _Function(_size),
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): _Function(_defaultdict),
}


class _Restricted(pickle.Unpickler):
    def __init__(self, data: bytes, extra: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(io.BytesIO(data))
        self._extra = extra

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._extra:
            return self._extra[(module, name)]
        if (module, name) in _FUNCTIONS:
            return _FUNCTIONS[(module, name)]
        if module == "torch" and (name in _STORAGES or name in _DTYPES or name == "Tensor"):
            return Named(module, name)
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return Named(module, name)
        if module in ("builtins", "__builtin__"):
            name = _PYTHON_2.get(name, name)
            if name in _CALLABLE_BUILTINS:
                return _CALLABLE_BUILTINS[name]
            if name in _TYPES:
                return Named("builtins", name)
        if (module, name) in _OPAQUE:
            return _stand_in(module, name)
        raise UnsafePickleError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> StorageRecord:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"):
            raise ValueError(f"persistent id {pid!r}")
        _, kind, key, _, numel = pid
        if not isinstance(kind, Named) or not isinstance(key, str) or type(numel) is not int:
            raise ValueError(f"persistent id {pid!r}")
        return StorageRecord(key, _STORAGES.get(kind.name), numel)


def stand_ins(names: Mapping[str, str]) -> dict[tuple[str, str], Any]:
    """Stand-ins for classes of one kind of file: module -> names, with blanks between them."""
    return {
        (module, name): _stand_in(module, name) for module, text in names.items() for name in text.split()
    }


def loads(data: bytes, *, where: str, extra: Mapping[tuple[str, str], Any] | None = None) -> Any:
    """The object a pickle describes, as plain containers, ``TensorRecord`` and ``Opaque``.

    Args:
        data: the pickle.
        where: the file, for messages.
        extra: what this kind of file may name beside the table above: (module, name) -> an immutable
            stand-in.

    Raises:
        UnsafePickleError: it names a class or function outside the table above.
        UnreadableError: it is damaged.
    """
    try:
        return _Restricted(data, extra or {}).load()
    except UnsafePickleError as error:
        raise UnsafePickleError(
            f"{where} names {error}, which is not among the classes a checkpoint needs. ckpt-tool "
            "runs no code from a checkpoint. If the object is yours (in client_state, say), save the "
            "checkpoint without it."
        ) from None
    except Exception as error:  # damaged bytes can make the unpickler raise anything
        raise UnreadableError(
            f"{where}: its pickled metadata is damaged ({type(error).__name__}: {error})."
        ) from error


def dumps(value: Any) -> bytes:
    """A pickle (protocol 2, as ``torch.save`` writes) of what ``loads`` returns.

    Deterministic: no memo, so equal values give equal bytes.

    Raises:
        TypeError: the value holds something that ``loads`` never returns.
    """
    out = bytearray(b"\x80\x02")
    _write(out, value)
    out += b"."
    return bytes(out)


def _write(out: bytearray, value: Any) -> None:
    if value is None:
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
    elif isinstance(value, _Sealed):  # a class as a value: numpy's _reconstruct is given one
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
        _write_global(out, "torch", _STORAGE_OF[storage.dtype])
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
