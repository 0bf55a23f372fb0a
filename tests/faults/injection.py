"""The test kit's layer between Python and the system: every call on a test's files is seen, numbered, and
can fail or be the last one.

It lies where Python calls the system (``os``, ``fcntl`` and what ``io.open`` gives), so that nothing above
knows of it. A call is one of the test's if its path, or the file its descriptor was opened from, lies in
the test's directory.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# By path or by descriptor in their first argument.
_CALLS = (
    "open", "stat", "lstat", "listdir", "scandir", "mkdir", "rename", "replace", "unlink", "rmdir",
    "statvfs",    "pread", "preadv", "pwrite", "write", "lseek", "fstat", "ftruncate", "fsync", "close",
)  # fmt: skip
# Those that change something on the disk: between two of them, a kill leaves the same as after the first.
CHANGING = frozenset(
    {
        "open",
        "mkdir",
        "rename",
        "replace",
        "unlink",
        "rmdir",
        "pwrite",
        "write",
        "ftruncate",
        "fsync",
        "file.write",
    }
)


@dataclass
class Layer:
    """What was called, and what is to happen: ``act`` gets each call's kind and its number among its kind,
    before the call; what it raises is the call's failure."""

    home: str
    act: Callable[[str, int], None]
    counts: Counter[str] = field(default_factory=Counter)
    _ours: set[int] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def is_ours(self, args: tuple[Any, ...], named: dict[str, Any]) -> bool:
        if named.get("dir_fd") in self._ours or named.get("src_dir_fd") in self._ours:
            return True
        first = args[0] if args else "."
        if isinstance(first, int):
            return first in self._ours
        return os.fspath(first).startswith(self.home)

    def enter(self, kind: str) -> None:
        with self._lock:
            number = self.counts[kind]
            self.counts[kind] += 1
        self.act(kind, number)

    def opened(self, descriptor: int) -> None:
        self._ours.add(descriptor)

    def closed(self, descriptor: int) -> None:
        self._ours.discard(descriptor)


def _wrapped(layer: Layer, kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **named: Any) -> Any:
        if not layer.is_ours(args, named):
            return original(*args, **named)
        if kind == "close":  # the descriptor is gone, whatever close says
            layer.closed(args[0])
            original(*args)
            layer.enter(kind)
            return None
        try:
            layer.enter(kind)
        except OSError as error:
            if args and not isinstance(args[0], int):
                raise OSError(error.errno, error.strerror, os.fspath(args[0])) from None
            raise
        found = original(*args, **named)
        if kind == "open":
            layer.opened(found)
        return found

    return call


class _File:
    """What ``io.open`` gives, with calls that can fail."""

    def __init__(self, layer: Layer, file: Any) -> None:
        self._layer, self._file = layer, file

    def read(self, *args: Any) -> Any:
        self._layer.enter("file.read")
        return self._file.read(*args)

    def write(self, *args: Any) -> Any:
        self._layer.enter("file.write")
        return self._file.write(*args)

    def fileno(self) -> int:
        number: int = self._file.fileno()
        self._layer.opened(number)
        return number

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *args: object) -> None:
        self._layer.closed(self._file.fileno())
        self._file.close()
        self._layer.enter("file.close")


@contextlib.contextmanager
def system_calls(home: Path, act: Callable[[str, int], None]) -> Iterator[Layer]:
    """The layer, for the files below ``home``."""
    layer = Layer(os.fspath(home), act)
    originals = {name: getattr(os, name) for name in _CALLS}
    file_open, flock = io.open, fcntl.flock

    def opened(path: Any, *args: Any, **named: Any) -> Any:
        if isinstance(path, int) or not layer.is_ours((path,), {}):
            return file_open(path, *args, **named)
        try:
            layer.enter("file.open")
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from None
        return _File(layer, file_open(path, *args, **named))

    for name, original in originals.items():
        setattr(os, name, _wrapped(layer, name, original))
    io.open = opened
    fcntl.flock = _wrapped(layer, "flock", flock)
    try:
        yield layer
    finally:
        for name, original in originals.items():
            setattr(os, name, original)
        io.open, fcntl.flock = file_open, flock


def count(kind: str, number: int) -> None:
    """An ``act`` that lets everything pass."""


def failing(kind: str, number: int, code: int) -> Callable[[str, int], None]:
    """An ``act``: one call fails with an error code, once."""

    def act(called: str, at: int) -> None:
        if (called, at) == (kind, number):
            raise OSError(code, os.strerror(code))

    return act


# What each kind of call fails with in turn.
CODES = {
    "open": (errno.EACCES, errno.EMFILE, errno.EIO, errno.ENOSPC, errno.ESTALE),
    "file.open": (errno.EACCES, errno.EMFILE, errno.EIO, errno.ENOSPC),
    "stat": (errno.EACCES, errno.EIO, errno.ESTALE),
    "lstat": (errno.EACCES, errno.EIO),
    "fstat": (errno.EIO, errno.ESTALE),
    "statvfs": (errno.EIO, errno.EACCES),
    "listdir": (errno.EACCES, errno.EIO, errno.EMFILE),
    "scandir": (errno.EACCES, errno.EIO, errno.EMFILE),
    "mkdir": (errno.EACCES, errno.ENOSPC, errno.EROFS, errno.EIO),
    "rename": (errno.EACCES, errno.EIO, errno.ENOSPC, errno.EBUSY),
    "replace": (errno.EACCES, errno.EIO, errno.ENOSPC),
    "unlink": (errno.EACCES, errno.EIO, errno.EBUSY),
    "rmdir": (errno.EACCES, errno.EIO, errno.EBUSY),
    "pread": (errno.EIO, errno.EINTR, errno.ENOMEM),
    "preadv": (errno.EIO, errno.ESTALE, errno.ENOMEM),
    "pwrite": (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG, errno.EINTR),
    "write": (errno.ENOSPC, errno.EIO, errno.EDQUOT),
    "file.read": (errno.EIO, errno.ESTALE),
    "file.write": (errno.ENOSPC, errno.EIO),
    "file.close": (errno.EIO, errno.ENOSPC, errno.EDQUOT),
    "lseek": (errno.EIO,),
    "ftruncate": (errno.ENOSPC, errno.EIO, errno.EFBIG),
    "fsync": (errno.EIO, errno.ENOSPC, errno.EDQUOT),
    "close": (errno.EIO, errno.ENOSPC, errno.EINTR),
    "flock": (errno.ENOLCK, errno.ENOSYS, errno.EINTR),
}
