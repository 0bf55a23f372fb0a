"""What a pickle's values become: descriptions of tensors, and stand-ins for objects nobody imports.

None of them can be changed by a pickle: its BUILD opcode sets attributes on whatever it has pushed, so
everything here is immutable, or made for one load only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from ckpt_tool.canonical import DType, Tensor
from ckpt_tool.errors import UnreadableError

# torch/storage.py and torch/serialization.py of torch 2.13: the class named in a persistent id.
STORAGES = {
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
STORAGE_OF = {dtype: name for name, dtype in STORAGES.items()}
DTYPES = {dtype.torch_name: dtype for dtype in DType}


def _inert(self: object, _state: Any) -> None:
    """A pickle's BUILD opcode calls __setstate__; what is checked once must not change afterwards.

    Assigned in every class body below, because a frozen dataclass with slots gets its own otherwise.
    """
    raise ValueError(f"state set on a {type(self).__name__}")


def _made_again(self: Any) -> tuple[Any, ...]:
    """How a plan of this program is pickled that speaks of such a value: by its constructor."""
    return type(self), tuple(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, slots=True)
class Named:
    """A global that is data: a dtype such as ``torch.float16``, a storage class, ``builtins.list``."""

    module: str
    name: str
    __setstate__ = _inert
    __reduce__ = _made_again


def has_storage(dtype: DType) -> bool:
    """Whether torch has a storage class for a dtype."""
    return dtype in STORAGE_OF


@dataclass(frozen=True, slots=True)
class StorageRecord:
    """A storage: the archive record ``data/<key>`` of ``numel`` elements."""

    key: str
    dtype: DType | None  # None: an untyped storage, whose numel counts bytes
    numel: int
    __setstate__ = _inert
    __reduce__ = _made_again


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
    __reduce__ = _made_again

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


@dataclass(frozen=True, slots=True)
class Unread:
    """An object known by the size of its pickle only: too large to be read, or of a kind that nothing here
    needs to look into. It can be copied as it lies in its file."""

    nbytes: int
    __setstate__ = _inert
    __reduce__ = _made_again


class Sealed(type):
    """The metaclass of stand-ins: a pickle cannot set attributes on the class."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise AttributeError(name)


class TorchSize(tuple[int, ...], metaclass=Sealed):
    """``torch.Size``: a tuple that is written back as what it was."""

    __slots__ = ()


class Opaque(metaclass=Sealed):
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

    def __reduce__(self) -> tuple[Any, ...]:
        return _opaque_again, (self.module, self.qualname, self.args, self.state)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Opaque)
            and (self.module, self.qualname) == (other.module, other.qualname)
            and (self.args, self.state) == (other.args, other.state)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{self.module}.{self.qualname}{self.args!r}"


_DEEPEST = 100
_FEWEST_NODES = 10_000


def check_spelled_out(value: Any, length: int, where: str) -> None:
    """Refuse what a pickle of ``length`` bytes blows up: containers within themselves, or one container
    that stands in very many places. Everything later goes through all places one by one.

    Raises:
        UnreadableError: the value is nested too deeply, or has many more members than its pickle has bytes.
    """
    most = 4 * length + _FEWEST_NODES
    seen = 0
    waiting = [(value, 0)]
    while waiting:
        one, depth = waiting.pop()
        inside = members(one)
        seen += len(inside)
        if depth > _DEEPEST:
            raise UnreadableError(
                f"{where}: an object holds containers nested more than {_DEEPEST} deep, or itself. Save "
                "the checkpoint without it."
            )
        if seen > most:
            raise UnreadableError(
                f"{where}: an object of {length} bytes unfolds to more than {most} members, because "
                "the same containers stand in it over and over. Save the checkpoint without it."
            )
        waiting += [(member, depth + 1) for member in inside if type(member) not in LEAVES]


LEAVES = frozenset({str, int, float, bool, bytes, type(None)})


def members(value: Any) -> list[Any]:
    """What an object holds that a pickle described: members of containers, keys, arguments and state."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if isinstance(value, Opaque):
        return [*value.args, value.state]
    if isinstance(value, slice):
        return [value.start, value.stop, value.step]
    return [value.attributes] if isinstance(value, TensorRecord) else []


def tensor_records(value: Any) -> list[TensorRecord]:
    """All tensors in an object that a pickle described, each once."""
    found: list[TensorRecord] = []
    seen: set[int] = set()
    left = [value]
    while left:
        one = left.pop()
        if type(one) in LEAVES or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, TensorRecord):
            found.append(one)
        left += members(one)
    return found


def map_containers(value: Any, change: Callable[[Any], Any]) -> Any:
    """``value`` with ``change`` applied to the members of its containers, stand-ins among them.

    Members that ``change`` returns as they are stay the same objects.
    """
    if isinstance(value, dict | set | frozenset) and any(map(_holds_tensor, value)):
        raise UnreadableError(
            "a tensor as a key of a dict, or in a set, cannot be carried over. Save the checkpoint without "
            "it."
        )
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


def _holds_tensor(key: Any) -> bool:
    if isinstance(key, tuple | frozenset):
        return any(map(_holds_tensor, key))
    return isinstance(key, TensorRecord | Tensor)


def opaque(module: str, qualname: str, *args: Any, state: Any = None) -> Opaque:
    """A stand-in to be written under ``module.qualname``, which nothing here imports."""
    instance: Opaque = stand_in(module, qualname)(*args)
    instance.state = state
    return instance


def _opaque_again(module: str, qualname: str, args: tuple[Any, ...], state: Any) -> Opaque:
    return opaque(module, qualname, *args, state=state)


_stand_ins: dict[tuple[str, str], Sealed] = {}


def stand_in(module: str, qualname: str) -> Any:
    """The class that stands for ``module.qualname``: a subclass of ``Opaque``."""
    key = (module, qualname)
    if key not in _stand_ins:
        _stand_ins[key] = Sealed(
            qualname, (Opaque,), {"__slots__": (), "module": module, "qualname": qualname}
        )
    return _stand_ins[key]
