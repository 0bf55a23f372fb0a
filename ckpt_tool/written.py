"""Records of written files: what the executor reports, the journal keeps and the manifest states."""

from __future__ import annotations

from typing import NamedTuple


class WrittenExtent(NamedTuple):
    """A range of a written file, in bytes, with its XXH3-64 in hex."""

    offset: int
    length: int
    xxh3: str


class WrittenFile(NamedTuple):
    """A file that is complete. ``path`` is relative to the target; the extents tile its ``size`` bytes."""

    path: str
    size: int
    extents: tuple[WrittenExtent, ...]
