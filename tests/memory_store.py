"""A whole store in one file: files in memory, under ``mem://bucket/...``.

It is like an object store: no directories but names with slashes in them, no rename, no byte written at any
other place than the end. ``ckpt_tool.stores.known.register("mem", MemoryStore())`` makes it known.
"""

from __future__ import annotations

import itertools
import posixpath
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from ckpt_tool.errors import ExecutionError, UnreadableError, UsageError
from ckpt_tool.manifest import MANIFEST
from ckpt_tool.storage import Location, Order, Patch, Token, too_large
from ckpt_tool.stores.base import Publishing

SCHEME = "mem"


class Blob(NamedTuple):
    """A file: its bytes, and a number that no other version of it had."""

    data: bytes
    version: int


@dataclass
class MemoryStore:
    """All files by their keys. ``most`` is how many bytes all of them may have together."""

    order: Order = Order.FRONT_TO_BACK
    most: int = 1 << 30
    blobs: dict[str, Blob] = field(default_factory=dict)
    journals: dict[str, bytes] = field(default_factory=dict)
    in_use: set[str] = field(default_factory=set)
    versions: itertools.count[int] = field(default_factory=itertools.count)
    replaces: bool = False

    def put(self, key: str, data: bytes) -> None:
        self.blobs[key] = Blob(data, next(self.versions))

    def below(self, key: str) -> list[str]:
        return sorted(other for other in self.blobs if other.startswith(f"{key}/"))

    def location(self, url: str) -> MemoryLocation:
        key = url.partition("://")[2].strip("/")
        if not key:
            raise UsageError(f"{url} names no bucket.")
        return MemoryLocation(self, key)

    def absolute(self, location: Location) -> MemoryLocation:
        return self._own(location)

    def parts(self, location: Location) -> tuple[str, ...]:
        return tuple(self._own(location).key.split("/"))

    def is_taken(self, location: Location) -> bool:
        key = self._own(location).key
        return key in self.blobs or bool(self.below(key))

    def free(self, location: Location) -> int:
        return self.most - sum(len(blob.data) for blob in self.blobs.values())

    def area(self, location: Location, how: Publishing) -> MemoryArea:
        return MemoryArea(self, self._own(location), how)

    def is_untidy(self, location: Location) -> bool:
        return False

    def tidy(self, location: Location, how: Publishing) -> None:
        pass

    def _own(self, location: Location) -> MemoryLocation:
        assert isinstance(location, MemoryLocation)
        return location


@dataclass(frozen=True)
class MemoryLocation:
    store: MemoryStore = field(compare=False, repr=False)
    key: str
    scheme: ClassVar[str] = SCHEME

    def __str__(self) -> str:
        return f"{SCHEME}://{self.key}"

    @property
    def name(self) -> str:
        return posixpath.basename(self.key)

    @property
    def parent(self) -> MemoryLocation:
        return MemoryLocation(self.store, posixpath.dirname(self.key))

    def __truediv__(self, name: str) -> MemoryLocation:
        return MemoryLocation(self.store, posixpath.normpath(posixpath.join(self.key, name)))

    def is_file(self) -> bool:
        return self.key in self.store.blobs

    def is_directory(self) -> bool:
        return bool(self.store.below(self.key))

    def read_small(self, most: int) -> bytes:
        if self.key not in self.store.blobs:
            raise IsADirectoryError(str(self)) if self.is_directory() else FileNotFoundError(str(self))
        data = self.store.blobs[self.key].data
        if len(data) > most:
            raise too_large(str(self), len(data), most)
        return data

    def reader(self) -> MemoryReader:
        return MemoryReader(self)


class MemoryReader:
    """The files below a key."""

    def __init__(self, location: MemoryLocation) -> None:
        self._location = location
        self._first: dict[str, Token] = {}

    @property
    def root(self) -> str:
        return str(self._location)

    def _blob(self, path: str) -> Blob:
        found = self._location.store.blobs.get((self._location / path).key)
        if found is None:
            raise UnreadableError(f"{self.root}/{path} is missing.")
        self._first.setdefault(path, (found.version,))
        return found

    def list(self, directory: str = "") -> list[str]:
        key = (self._location / directory).key
        below = (other.removeprefix(f"{key}/") for other in self._location.store.below(key))
        return sorted({path.partition("/")[0] for path in below})

    def is_directory(self, path: str) -> bool:
        return (self._location / path).is_directory()

    def changed(self) -> str | None:
        blobs = self._location.store.blobs
        for path, token in self._first.items():
            now = blobs.get((self._location / path).key)
            if now is None or (now.version,) != token:
                return path
        return None

    def states(self) -> Mapping[str, Token]:
        return dict(self._first)

    def size(self, path: str) -> int:
        return len(self._blob(path).data)

    def read(self, path: str, offset: int, length: int) -> bytes:
        data = self._blob(path).data[offset : offset + length]
        if len(data) < length:
            raise UnreadableError(f"{self.root}/{path} is truncated.")
        return data

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.read(path, offset, len(buffer))

    def close(self) -> None:
        pass


class MemoryWriter:
    """Files that grow at their end, and are there once they are finished."""

    def __init__(self, store: MemoryStore, prefix: str) -> None:
        self._store, self._prefix = store, prefix
        self._open: dict[str, tuple[int, bytearray]] = {}
        self._lock = threading.Lock()

    @property
    def order(self) -> Order:
        return self._store.order

    def create(self, path: str, size: int) -> None:
        with self._lock:
            self._open[path] = (size, bytearray())

    def join(self, path: str) -> None:
        raise ExecutionError(f"{path} has one writer.")

    def write(self, path: str, offset: int, data: memoryview | bytes) -> None:
        _, held = self._open[path]
        assert offset == len(held), "not front to back"
        held += data

    def finish(self, path: str, patches: Sequence[Patch] = ()) -> None:
        size, held = self._open.pop(path)
        assert len(held) == size
        assert self.order is Order.PATCHED or not patches
        for offset, data in patches:
            held[offset : offset + len(data)] = data
        self._store.put(f"{self._prefix}/{path}", bytes(held))

    def close(self) -> None:
        self._open.clear()


class MemoryArea:
    """Files under a prefix beside the target, and a journal that is no file. Published by writing the
    manifest under the final name after all else."""

    def __init__(self, store: MemoryStore, target: MemoryLocation, how: Publishing) -> None:
        self._store, self._target = store, target
        self._key = posixpath.join(target.parent.key, f".{target.name}.ckpt-tool-staging")
        self._published = False
        if store.is_taken(target):
            raise UsageError(f"{target} exists. Choose another destination.")
        if self._key in store.in_use:
            raise UsageError(f"{target} is being written by another run of ckpt-tool.")
        store.in_use.add(self._key)

    @property
    def location(self) -> MemoryLocation:
        return MemoryLocation(self._store, self._key)

    @property
    def removal(self) -> str:
        return f"remove what begins with {self.location}"

    def journal(self) -> bytes:
        return self._store.journals.get(self._key, b"")

    def cut_journal(self, length: int) -> None:
        self._store.journals[self._key] = self.journal()[:length]

    def record(self, line: bytes, *, durable: bool) -> None:
        self._store.journals[self._key] = self.journal() + line

    def writer(self) -> MemoryWriter:
        return MemoryWriter(self._store, self._key)

    def holds(self, path: str, size: int) -> bool:
        blob = self._store.blobs.get(f"{self._key}/{path}")
        return blob is not None and len(blob.data) == size

    def remove_all_but(self, kept: Collection[str]) -> set[str]:
        there = {key.removeprefix(f"{self._key}/") for key in self._store.below(self._key)}
        for path in there.difference(kept):
            self.remove(path)
        return there.difference(kept)

    def remove(self, path: str) -> None:
        self._store.blobs.pop(f"{self._key}/{path}", None)

    def sync(self, path: str) -> None:
        pass

    def publish(self, manifest: bytes) -> None:
        if self._store.is_taken(self._target):
            raise UsageError(f"{self._target} exists. Choose another destination.")
        for key in self._store.below(self._key):
            path = key.removeprefix(f"{self._key}/")
            self._store.blobs[f"{self._target.key}/{path}"] = self._store.blobs.pop(key)
        self._store.put(f"{self._target.key}/{MANIFEST}", manifest)
        self._published = True
        self._store.journals.pop(self._key, None)

    def published(self) -> bool:
        return self._published

    def discard(self) -> None:
        self.remove_all_but(())
        self._store.journals.pop(self._key, None)

    def close(self) -> None:
        self._store.in_use.discard(self._key)
