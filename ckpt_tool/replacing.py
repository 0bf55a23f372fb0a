"""Taking a directory out of the way of a result, and removing it: only what was proven to belong to it."""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from ckpt_tool.errors import ExecutionError, UsageError
from ckpt_tool.manifest import JOURNAL, MANIFEST, manifest_bytes
from ckpt_tool.written import WrittenFile

_SHOWN = 5


class Owned(NamedTuple):
    """What a result takes the place of: the whole destination, or in a run's directory its one ``tag``.
    ``files`` are all that is removed for it, relative to the destination."""

    tag: str | None
    files: frozenset[str]

    def below(self, tag: str) -> frozenset[str]:
        """Those in the tag's directory, relative to it."""
        return frozenset(path.removeprefix(f"{tag}/") for path in self.files if path.startswith(f"{tag}/"))


Judge = Callable[[Path], Owned]


def nothing_owned(place: Path) -> Owned:
    """The judge of a run that replaces nothing."""
    raise UsageError(f"{place} exists. Choose another destination, or pass --overwrite to replace it.")


def aside(place: Path) -> Path:
    """Where a directory is kept until what replaces it has its name."""
    return place.with_name(f".{place.name}.ckpt-tool-replaced")


def entries(directory: Path, below: str = "") -> Iterator[str]:
    """Everything in a directory, however deep: files, links as such, and with a slash at the end
    directories that are empty."""
    with os.scandir(directory / below) as found:
        inside = sorted(found, key=lambda entry: entry.name)
    for entry in inside:
        path = posixpath.join(below, entry.name)
        if entry.is_dir(follow_symlinks=False):
            yield from entries(directory, path)
        else:
            yield path
    if below and not inside:
        yield f"{below}/"


def named(paths: Collection[str]) -> str:
    """The first few of many paths, for a message."""
    shown = ", ".join(sorted(paths)[:_SHOWN])
    return f"{shown} and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else shown


def set_aside(place: Path, files: Collection[str], judge: Judge) -> Path:
    """Give ``place``, of which ``files`` are all, the name that ``aside`` says, and look at it once more
    there, where nobody else puts anything.

    Raises:
        UsageError: something else is in it, and it has its name back; or what an earlier run left aside is
            not proven to be a checkpoint.
    """
    old = aside(place)
    clear(old, judge)
    place.rename(old)
    strangers = set(entries(old)).difference(files)
    if strangers:
        put_back(place)
        raise UsageError(
            f"{place} was to be replaced, but {named(strangers)} appeared in it meanwhile. Nothing was "
            "published. Move that elsewhere and run the command again."
        )
    return old


def clear(old: Path, judge: Judge) -> None:
    """Remove what an earlier run set aside, if it did; UsageError where something else is there."""
    if not os.path.lexists(old):
        return
    left = judge(old)
    if left.tag is not None:
        raise UsageError(f"{old} is in the way. Move it elsewhere, or choose another destination.")
    remove(old, left.files)


def put_back(place: Path) -> None:
    """Undo ``set_aside``, unless somebody took the name meanwhile: then both stay as they are."""
    if not os.path.lexists(place) and os.path.lexists(aside(place)):
        aside(place).rename(place)


def remove(directory: Path, files: Collection[str]) -> None:
    """Remove ``files`` of a directory, and then it. A manifest that lists them goes last, so that a removal
    that was cut off can be finished: without it, the rest would not be known for a checkpoint's.

    Raises:
        ExecutionError: something else is in it, which stays.
    """
    with contextlib.suppress(OSError):  # the disk may be full, and this make room on it
        _list_what_goes(directory, files)
    for path in sorted(set(files) - {MANIFEST}):
        if not path.endswith("/"):
            (directory / path).unlink(missing_ok=True)
    folders = {parent for path in files for parent in parents(path)}
    for folder in sorted(folders, key=len, reverse=True):
        _remove_empty(directory / folder)
    (directory / MANIFEST).unlink(missing_ok=True)
    if not _remove_empty(directory):
        raise ExecutionError(
            f"{directory} holds something that does not belong to the checkpoint that was replaced: "
            f"{named(list(entries(directory)))}. It was left there."
        )


def _list_what_goes(directory: Path, files: Collection[str]) -> None:
    data = manifest_bytes({}, [WrittenFile(path, 0, ()) for path in sorted(files)])
    made = directory / JOURNAL
    made.unlink(missing_ok=True)
    with os.fdopen(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as out:
        out.write(data)
    made.replace(directory / MANIFEST)


def parents(path: str) -> Iterator[str]:
    """The directories that a path lies in, the nearest first."""
    while path := posixpath.dirname(path):
        yield path


def _remove_empty(directory: Path) -> bool:
    """False where something is in it; what else fails is raised, while the manifest still is there."""
    try:
        directory.rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True
