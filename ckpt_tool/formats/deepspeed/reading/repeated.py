"""What the ranks of a run repeat: gone through once, kept once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from ckpt_tool.containers.alike import Alike
from ckpt_tool.containers.pickle_records import LEAVES, TensorRecord, members
from ckpt_tool.containers.torch_zip import TorchArchive

Result = TypeVar("Result")
Value = TypeVar("Value")

_MOST = 4096


class Repeated:
    """Memory shared by the readers of all ranks' files.

    ``models`` and ``optimizers`` read their pickles, so that what two ranks say alike is one object;
    results about such an object are then remembered by its identity.
    """

    def __init__(self) -> None:
        self.models, self.optimizers = Alike(), Alike()
        self._results: dict[tuple[Any, ...], tuple[tuple[Any, ...], Any]] = {}
        self._equal: dict[Any, Any] = {}

    def once(self, what: str, objects: tuple[Any, ...], make: Callable[[], Result]) -> Result:
        """``make()``, which depends on nothing but these objects, none of which changes any more."""
        key = (what, *map(id, objects))
        known = self._results.get(key)
        if known is None:
            if len(self._results) >= _MOST:  # ranks have too little in common for it to be worth its memory
                self._results.clear()
            known = self._results[key] = (objects, make())
        result: Result = known[1]
        return result

    def one(self, key: Hashable, value: Value) -> Value:
        """The first of all values with an equal key."""
        kept: Value = self._equal.setdefault(key, value)
        return kept

    def described(self, archive: TorchArchive, value: Any) -> Any:
        """``TorchArchive.describe``; a value without tensors as it is."""
        return archive.describe(value) if self._has_tensors(value) else value

    def carried(self, archive: TorchArchive, value: Any) -> Any:
        """``TorchArchive.carried``; a value without tensors as it is."""
        return archive.carried(value) if self._has_tensors(value) else value

    def digest(self, archive: TorchArchive, value: Any) -> str:
        """``TorchArchive.digest``."""
        if type(value) in LEAVES or self._has_tensors(value):
            return archive.digest(value)
        return self.once("digest", (value,), lambda: archive.digest(value))

    def _has_tensors(self, value: Any) -> bool:
        if type(value) in LEAVES:
            return False
        return self.once("tensors", (value,), lambda: _holds_tensors(value, set()))


def _holds_tensors(value: Any, seen: set[int]) -> bool:
    if isinstance(value, TensorRecord):
        return True
    if id(value) in seen:
        return False
    seen.add(id(value))
    return any(type(one) not in LEAVES and _holds_tensors(one, seen) for one in members(value))
