"""The local file system."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ckpt_tool.errors import UsageError
from ckpt_tool.manifest import JOURNAL
from ckpt_tool.replacing import aside
from ckpt_tool.storage import LocalLocation, Location, is_directory, is_file
from ckpt_tool.stores.base import Publishing
from ckpt_tool.stores.local_area import LocalArea, let_go, lock, occupied, tidy


class LocalStore:
    """Paths, and ``file://`` URLs of this machine."""

    replaces = True

    def location(self, url: str) -> LocalLocation:
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise UsageError(
                f"{url} names no file of this machine: a file URL has three slashes and an absolute path, "
                "file:///data/run."
            )
        return LocalLocation(Path(unquote(parts.path)))

    def absolute(self, location: Location) -> LocalLocation:
        # Not Path.resolve: symlinks stay as the user wrote them.
        return LocalLocation(Path(os.path.abspath(_path(location))))  # noqa: PTH100

    def parts(self, location: Location) -> tuple[str, ...]:
        # Not Path.resolve, which raises RuntimeError for links that lead in a circle (Python < 3.13).
        return Path(os.path.realpath(_path(location))).parts

    def is_taken(self, location: Location) -> bool:
        return occupied(_path(location))

    def free(self, location: Location) -> int:
        path = _path(location)
        existing = next(place for place in (path, *path.parents) if place.exists())
        return shutil.disk_usage(existing).free

    def area(self, location: Location, how: Publishing) -> LocalArea:
        return LocalArea(_path(location), how)

    def is_untidy(self, location: Location) -> bool:
        path = _path(location)
        return is_file(path / JOURNAL) or is_directory(aside(path))

    def tidy(self, location: Location, how: Publishing) -> None:
        target = _path(location)
        try:
            journal = os.open(target / JOURNAL, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            if how.overwrite:
                tidy(target, how.judge)
            return
        try:
            lock(journal, target)
            tidy(target, how.judge)
        finally:
            let_go(journal)


def _path(location: Location) -> Path:
    """The path of a location of this store."""
    if not isinstance(location, LocalLocation):
        raise TypeError(f"{location} is not on the local file system")
    return location.path
