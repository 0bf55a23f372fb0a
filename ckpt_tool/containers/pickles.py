"""Reading pickles that run nothing.

A pickle becomes plain Python containers. Tensors become ``TensorRecord``, a description of where their
bytes are; objects of classes that real checkpoints contain become ``Opaque`` stand-ins, which hold what the
pickle said and can be written back (``pickle_writer``) under their own name. The classes are never
imported. A pickle that names anything else is refused with that name.
"""

from __future__ import annotations

import collections
import hashlib
import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ckpt_tool.containers.pickle_records import (
    DTYPES,
    STORAGES,
    Named,
    StorageRecord,
    TensorRecord,
    TorchSize,
    stand_in,
)
from ckpt_tool.containers.pickle_scan import check_opcodes
from ckpt_tool.containers.pickle_shape import EndlessError, check_shape
from ckpt_tool.errors import UnreadableError, UnsafePickleError
from ckpt_tool.limits import MOST_DIMENSIONS

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
    _refuse_lazy_bits(metadata)
    _refuse_lazy_sizes(size, stride)
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
    _refuse_lazy_bits(metadata)
    _refuse_lazy_sizes(size, stride)
    return _checked(
        TensorRecord(
            StorageRecord(storage.key, None, storage.numel),
            DTYPES[dtype.name],
            offset,
            tuple(size),
            tuple(stride),
            bool(requires_grad),
        )
    )


def _refuse_lazy_bits(metadata: Any) -> None:
    """torch stores a negated or conjugated view as a flag beside the bytes of the original."""
    if metadata:
        raise ValueError(f"a tensor whose stored bytes are not its values: {metadata!r}")


def _refuse_lazy_sizes(*sizes: Any) -> None:
    """A pickle of a few bytes can make a range of any length."""
    for one in sizes:
        if not isinstance(one, tuple | list):
            raise ValueError(f"a tensor with a {type(one).__name__} as its shape or strides")


def _checked(record: TensorRecord) -> TensorRecord:
    """Refuse a view that reaches outside of its storage, so that no later arithmetic has to ask."""
    if max(len(record.shape), len(record.stride)) > MOST_DIMENSIONS:
        raise ValueError(f"a tensor of {len(record.shape)} dimensions")
    numbers = (record.offset, *record.shape, *record.stride)
    if any(type(number) is not int or not 0 <= number < 1 << 63 for number in numbers):
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
    if not isinstance(function, _Function) or not isinstance(args, tuple):
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
        if module == "torch" and (name in STORAGES or name in DTYPES or name == "Tensor"):
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
            return stand_in(module, name)
        raise UnsafePickleError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> StorageRecord:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"):
            raise ValueError(f"persistent id {pid!r}")
        _, kind, key, _, numel = pid
        if not isinstance(kind, Named) or not isinstance(key, str) or type(numel) is not int:
            raise ValueError(f"persistent id {pid!r}")
        return StorageRecord(key, STORAGES.get(kind.name), numel)


def stand_ins(names: Mapping[str, str]) -> dict[tuple[str, str], Any]:
    """Stand-ins for classes of one kind of file: module -> names, with blanks between them."""
    return {
        (module, name): stand_in(module, name) for module, text in names.items() for name in text.split()
    }


# Digests of pickles that were gone through: files are read more than once, and ranks repeat records.
_SOUND: dict[bytes, None] = {}
_MOST_SOUND = 4096


def _refuse_unsound(data: bytes) -> None:
    digest = hashlib.blake2b(data, digest_size=32).digest()
    if digest in _SOUND:
        return
    check_opcodes(data)
    check_shape(data)
    if len(_SOUND) >= _MOST_SOUND:
        _SOUND.clear()
    _SOUND[digest] = None


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
        _refuse_unsound(data)
    except EndlessError as error:
        raise UnreadableError(f"{where} holds an object that cannot be gone through: {error}.") from error
    except ValueError as error:
        raise UnreadableError(f"{where}: its pickled metadata is damaged ({error}).") from error
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


class _Marked(_Restricted):
    """Persistent ids that are numbers stand for the markers of these numbers."""

    def __init__(self, data: bytes, extra: Mapping[tuple[str, str], Any], markers: Sequence[Any]) -> None:
        super().__init__(data, extra)
        self._markers = markers
        self.unused: list[Any] = []

    def persistent_load(self, pid: Any) -> Any:
        if type(pid) is int:
            return self._markers[pid]
        if isinstance(pid, tuple) and len(pid) == 5 and type(pid[3]) is type(self._markers[0]):
            self.unused.append(pid[3])  # the device a storage was on
        return super().persistent_load(pid)


def loads_marked(
    data: bytes, markers: Sequence[Any], extra: Mapping[tuple[str, str], Any] | None
) -> tuple[Any, list[Any]]:
    """The object a pickle describes in which literals were replaced by persistent ids: number n stands for
    ``markers[n]``; and the markers that came where nothing is made of them.

    Raises:
        UnreadableError: a marker came where only a literal of that kind will do.
    """
    unpickler = _Marked(data, extra or {}, markers)
    try:
        return unpickler.load(), unpickler.unused
    except Exception as error:  # whatever was made of a marker
        raise UnreadableError(f"a literal that cannot be replaced ({type(error).__name__}).") from error
