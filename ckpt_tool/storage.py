"""Opening, ranged reads, positioned writes, fsync: the only module that opens a checkpoint's files.

Explicit reads into the caller's buffers, never ``mmap``: mapped pages count as resident memory, and
page faults on network storage are ruinously slow. A remote store is another class with these methods.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

from ckpt_tool.errors import UnreadableError
from ckpt_tool.system_errors import reading_failed, writing_failed

_MOST_OPEN_FILES = 128  # of one reader
# One write of 8 MiB was measured at several times the kernel time of eight of 1 MiB (Linux 6.18, ext4).
_LARGEST_WRITE = 1 << 20
_READS_AT_ONCE = 8

Item = TypeVar("Item")
Result = TypeVar("Result")


# What tells that a file was replaced or written to: the same for the same contents, in words of its store.
Token = tuple[int | str, ...]


class FileState(NamedTuple):
    """What tells that a file was replaced or written to: its inode, its size in bytes, and when it was last
    written and last changed, in nanoseconds. The time of writing can be set back, that of change cannot."""

    inode: int
    size: int
    modified: int
    changed: int


class Reader(Protocol):
    """A read-only directory of files, addressed by paths relative to it."""

    @property
    def root(self) -> str: ...

    def list(self, directory: str = "") -> list[str]:
        """Names in ``directory``, sorted. A missing directory is an empty one."""
        ...

    def is_directory(self, path: str) -> bool: ...

    def changed(self) -> str | None:
        """A file that is not what it was when it was first read from here, if there is one."""
        ...

    def states(self) -> Mapping[str, Token]:
        """The token of every file that was opened here so far, as it was when it was first opened."""
        ...

    def size(self, path: str) -> int:
        """Size in bytes; raises UnreadableError where there is no such file."""
        ...

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes; raises UnreadableError where the file ends before."""
        ...

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset`` on; raises UnreadableError where the file ends before."""
        ...

    def close(self) -> None: ...


class Location(Protocol):
    """Where something lies in a store: a directory, a file, or nothing. Printed, it is what a user passes
    for it."""

    @property
    def scheme(self) -> str:
        """The store's, as ``stores.known`` lists it."""
        ...

    @property
    def name(self) -> str: ...

    @property
    def parent(self) -> Location: ...

    def __truediv__(self, name: str) -> Location: ...

    def is_file(self) -> bool: ...

    def is_directory(self) -> bool: ...

    def read_small(self, most: int) -> bytes:
        """All bytes of a file of at most ``most``.

        Raises:
            FileNotFoundError, IsADirectoryError: there is no such file.
            UnreadableError: it is larger, or cannot be read.
        """
        ...

    def reader(self) -> Reader:
        """The files below a directory."""
        ...


@dataclass(frozen=True)
class LocalLocation:
    """A local path."""

    path: Path
    scheme: ClassVar[str] = "file"

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def parent(self) -> LocalLocation:
        return LocalLocation(self.path.parent)

    def __truediv__(self, name: str) -> LocalLocation:
        return LocalLocation(self.path / name)

    def is_file(self) -> bool:
        return is_file(self.path)

    def is_directory(self) -> bool:
        return is_directory(self.path)

    def read_small(self, most: int) -> bytes:
        return read_small(self.path, most)

    def reader(self) -> LocalReader:
        return LocalReader(self.path)


def as_location(place: Path | Location) -> Location:
    return LocalLocation(place) if isinstance(place, Path) else place


class Order(Enum):
    """In which order a writer takes the bytes of a file."""

    ANY = "at any position, from several threads and processes at once"
    PATCHED = "front to back, and at the end a few small ranges once more"
    FRONT_TO_BACK = "front to back"


# Bytes that are to stand at an offset of a file.
Patch = tuple[int, bytes]


class Writer(Protocol):
    """A directory being filled. Of each file its size is told first, then its bytes, in an order that the
    writer takes. Where it is pickled, it is opened anew where it arrives."""

    @property
    def order(self) -> Order: ...

    def create(self, path: str, size: int) -> None: ...

    def join(self, path: str) -> None:
        """Take part in writing a file that another process has created and will finish (``Order.ANY``)."""
        ...

    def write(self, path: str, offset: int, data: memoryview | bytes) -> None:
        """Where the order is front to back, ``offset`` is where the file ends so far."""
        ...

    def finish(self, path: str, patches: Sequence[Patch] = ()) -> None:
        """The file is complete, once the ``patches`` are in it, in the place of what was written there
        (``Order.PATCHED`` only): make it durable and let go of it."""
        ...

    def close(self) -> None: ...


class LocalReader:
    """Files below a local directory. Thread-safe; keeps the most recently used files open."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = Path(root)
        self._open: OrderedDict[str, _Handle] = OrderedDict()
        self._first: dict[str, _Signature] = {}  # of every file, when it was first opened
        self._lock = threading.Lock()
        self._most_open = _most_open_files()

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalReader, (self._root,)  # opened anew where it arrives

    @property
    def root(self) -> str:
        return str(self._root)

    def list(self, directory: str = "") -> list[str]:
        try:
            return sorted(os.listdir(self._root / directory))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise reading_failed(self._root / directory, error) from error

    def is_directory(self, path: str) -> bool:
        return is_directory(self._root / path)

    def changed(self) -> str | None:
        for path, first in self._first.items():
            try:
                now = _signature(os.stat(self._root / path))
            except OSError:
                return path
            if _written(first, now):
                return path
        return None

    def states(self) -> dict[str, FileState]:
        with self._lock:
            return {path: FileState(*found.contents, found.changed) for path, found in self._first.items()}

    def size(self, path: str) -> int:
        with self._handle(path) as fd:
            try:
                return os.fstat(fd).st_size
            except OSError as error:
                raise reading_failed(self._root / path, error) from error

    def read(self, path: str, offset: int, length: int) -> bytes:
        with self._handle(path) as fd:
            try:
                data = os.pread(fd, length, offset)
            except OSError as error:
                raise reading_failed(self._root / path, error) from error
        if len(data) == length:
            return data
        rest = bytearray(length - len(data))  # storage may give less at once, or the file ends
        self.read_into(path, offset + len(data), memoryview(rest))
        return data + rest

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        done = 0
        with self._handle(path) as fd:
            while done < len(buffer):
                try:
                    count = os.preadv(fd, [buffer[done:]], offset + done)
                except OSError as error:
                    raise reading_failed(self._root / path, error) from error
                if count == 0:
                    raise UnreadableError(
                        f"{self._root / path} is truncated: bytes {offset} to {offset + len(buffer)} "
                        f"are needed, the file ends at {offset + done}. Copy it again from where it "
                        "was saved."
                    )
                done += count

    def close(self) -> None:
        with self._lock:
            for handle in self._open.values():
                handle.release()
            self._open.clear()

    def __del__(self) -> None:
        self.close()  # who forgets to does not lose descriptors for good

    @contextlib.contextmanager
    def _handle(self, path: str) -> Iterator[int]:
        with self._lock:
            handle = self._open.pop(path, None)
            if handle is None:
                handle = self._opened(path)
            self._open[path] = handle
            handle.acquire()
            if len(self._open) > self._most_open:
                self._open.popitem(last=False)[1].release()
        try:
            yield handle.fd
        finally:
            with self._lock:
                handle.release()

    def _opened(self, path: str) -> _Handle:
        """Open a file; where the process may open no more, at the cost of those that are not in use."""
        while True:
            try:
                handle = _Handle(os.open(self._root / path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
                break
            except OSError as error:
                idle = next((name for name, other in self._open.items() if other.idle()), None)
                if error.errno != errno.EMFILE or idle is None:
                    raise reading_failed(self._root / path, error) from error
                self._open.pop(idle).release()
        try:
            found = os.fstat(handle.fd)
        except OSError as error:
            handle.release()
            raise reading_failed(self._root / path, error) from error
        if not stat.S_ISREG(found.st_mode):  # whoever reads a pipe waits for somebody who writes
            handle.release()
            raise UnreadableError(
                f"{self._root / path} is no regular file but a directory, pipe or device. Put the "
                "checkpoint's file there."
            )
        self._first.setdefault(path, _signature(found))
        return handle


def read_small(file: Path, most: int) -> bytes:
    """The bytes of a regular file outside of a reader's directory, of at most ``most``.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        UnreadableError: it is larger, or no regular file, or it cannot be read.
    """
    try:
        with open(os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as there:
            found = os.fstat(there.fileno())
            if stat.S_ISDIR(found.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
            if not stat.S_ISREG(found.st_mode):
                raise UnreadableError(
                    f"{file} is a pipe or device and no regular file. Put the file there."
                )
            if found.st_size > most:
                raise too_large(str(file), found.st_size, most)
            return there.read(most + 1)
    except (FileNotFoundError, IsADirectoryError):
        raise
    except OSError as error:
        raise reading_failed(file, error) from error


def too_large(where: str, size: int, most: int) -> UnreadableError:
    return UnreadableError(
        f"{where} has {size} bytes; a file of its kind has at most {most}. It is damaged, or something "
        "else."
    )


def _most_open_files() -> int:
    """An eighth of what the process may have open: there are several readers, writers and the libraries."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY:
        return _MOST_OPEN_FILES
    return max(2, min(_MOST_OPEN_FILES, allowed // 8))


class _Handle:
    """A file descriptor closed when its last user lets go; counted under the reader's lock."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._users = 1

    def acquire(self) -> None:
        self._users += 1

    def idle(self) -> bool:
        """Whether only the cache holds it."""
        return self._users == 1

    def release(self) -> None:
        self._users -= 1
        if self._users == 0:
            with contextlib.suppress(OSError):  # what was read was read
                os.close(self.fd)


class _Signature(NamedTuple):
    """What ``stat`` says of a file: its contents, its last change, and what else may have changed then."""

    contents: tuple[int, int, int]
    changed: int
    beside: tuple[int, ...]


def _signature(found: os.stat_result) -> _Signature:
    contents = (found.st_ino, found.st_size, found.st_mtime_ns)
    beside = (found.st_nlink, found.st_mode, found.st_uid, found.st_gid)
    return _Signature(contents, found.st_ctime_ns, beside)


def _written(before: _Signature, now: _Signature) -> bool:
    """Whether a file was replaced or written to. The time of writing can be set back, the time of change
    cannot; a hard link made of the file, or other rights, change it as well."""
    if now.contents != before.contents:
        return True
    return now.changed != before.changed and now.beside == before.beside


def is_directory(path: Path) -> bool:
    """Whether there is a directory; raises CkptToolError where the system does not tell."""
    return stat.S_ISDIR(_mode(path))


def is_file(path: Path) -> bool:
    """Whether there is a file; raises CkptToolError where the system does not tell."""
    return stat.S_ISREG(_mode(path))


def _mode(path: Path) -> int:
    """What ``stat`` says of a path; 0 where there is nothing."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null byte in the path
        return 0
    except OSError as error:
        raise reading_failed(path, error) from error


class LocalWriter:
    """New files below a local directory. Several threads may write one file at different positions."""

    order = Order.ANY

    def __init__(self, root: str | os.PathLike[str], *, fsync: bool = True) -> None:
        self._root = Path(root)
        self._fsync = fsync
        self._open: dict[str, int] = {}
        self._joined: set[str] = set()  # of those, the files that another process finishes
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(LocalWriter, fsync=self._fsync), (self._root,)

    def join(self, path: str) -> None:
        try:
            fd = os.open(self._root / path, os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            raise writing_failed(self._root / path, error) from error
        with self._lock:
            self._open[path] = fd
            self._joined.add(path)

    def create(self, path: str, size: int) -> None:
        target = self._root / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            with self._lock:
                self._open[path] = fd
            os.ftruncate(fd, size)
        except OSError as error:
            raise writing_failed(target, error) from error

    def write(self, path: str, offset: int, data: memoryview | bytes) -> None:
        fd = self._open[path]
        view = memoryview(data)
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(fd, view[done : done + _LARGEST_WRITE], offset + done)
            except OSError as error:
                raise writing_failed(self._root / path, error) from error

    def finish(self, path: str, patches: Sequence[Patch] = ()) -> None:
        for offset, data in patches:
            self.write(path, offset, data)
        with self._lock:
            fd = self._open.pop(path)
            self._joined.discard(path)
        try:
            try:
                if self._fsync:
                    os.fsync(fd)
            finally:
                os.close(fd)  # network file systems tell of some failed writes only now
        except OSError as error:
            raise writing_failed(self._root / path, error) from error

    def close(self) -> None:
        """Let go of all files; those that were created here and not finished are removed."""
        with self._lock:
            unfinished, self._open = self._open, {}
        for path, fd in unfinished.items():
            # Whatever fails here, the files are listed as complete nowhere.
            with contextlib.suppress(OSError):
                os.close(fd)
            with contextlib.suppress(OSError):
                if path not in self._joined:
                    os.unlink(self._root / path)


def read_each(one: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """``one`` of every item, in their order, where each is a few small reads.

    Several at a time where they are waited for: on network storage each costs a round trip. What comes
    from the page cache is read three times as fast by one thread, which shares the interpreter with none.
    """
    wanted, found, batch = list(items), list[Result](), 1
    while len(found) < len(wanted):
        wall, cpu = time.perf_counter(), time.thread_time()
        found += map(one, wanted[len(found) : len(found) + batch])
        if time.perf_counter() - wall > 2 * (time.thread_time() - cpu):
            break
        batch = min(2 * batch, 64)
    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        return found + list(pool.map(one, wanted[len(found) :]))


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Make the names in a directory durable."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems that cannot sync a directory
            raise writing_failed(path, error) from error
