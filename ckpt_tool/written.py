"""Records of written files: what the executor reports, the journal keeps and the manifest states."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple


class WrittenExtent(NamedTuple):
    """A range of a written file, in bytes, with its XXH3-64 in hex and its CRC-32; manifests of before
    version 3 have none (None)."""

    offset: int
    length: int
    xxh3: str
    crc: int | None = None


class WrittenFile(NamedTuple):
    """A file that is complete. ``path`` is relative to the target; the extents tile its ``size`` bytes."""

    path: str
    size: int
    extents: tuple[WrittenExtent, ...]


def as_stored(name: str) -> bytes:
    """A file's name as it is on the disk, whatever the locale makes of it."""
    try:
        return os.fsencode(name)
    except UnicodeEncodeError:
        return name.encode(errors="surrogatepass")


def as_written(entry: Mapping[str, Any], crcs: bool) -> WrittenFile:
    """A file as a journal or a manifest has it in JSON; with the CRC-32s of its extents, or without.

    Raises:
        ValueError, KeyError, TypeError: the entry is no such thing.
    """
    path, size = entry["path"], entry["size"]
    extents = tuple(WrittenExtent(*extent) for extent in entry["extents"])
    numbers = [size, *(number for extent in extents for number in (extent.offset, extent.length))]
    if (
        not all(type(text) is str for text in (path, *(extent.xxh3 for extent in extents)))
        or not all(type(number) is int and number >= 0 for number in numbers)
        or not all(type(extent.crc) is int if crcs else extent.crc is None for extent in extents)
    ):
        raise ValueError(f"what it says of the file {path!r} is no path, size and extents")
    return WrittenFile(path, size, extents)
