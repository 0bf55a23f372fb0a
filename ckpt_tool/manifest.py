"""The manifest in every result: where it came from, and checksums of every byte, of itself among them.

JSON. ``checksum`` is the XXH3-128 of the file's own bytes with zeros in the place of its 32 digits.
Versions 1, which had none, and 2, whose extents have no CRC-32, are read as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from ckpt_tool.errors import UnreadableError
from ckpt_tool.json_text import parse_json
from ckpt_tool.limits import LARGEST_RECORD
from ckpt_tool.storage import Location, as_location
from ckpt_tool.system_errors import reading_failed
from ckpt_tool.written import WrittenFile, as_written

MANIFEST = "ckpt_tool_manifest.json"
MANIFEST_VERSION = 3
JOURNAL = ".ckpt_tool_journal"
RESERVED = frozenset({MANIFEST, JOURNAL})  # names that no file of a target may have

_BEFORE_CHECKSUMS, _BEFORE_CRCS = 1, 2
_NO_CHECKSUM = "0" * 32


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a directory written by ckpt-tool says about itself."""

    identity: Mapping[str, Any]
    files: tuple[WrittenFile, ...]


def manifest_bytes(identity: Mapping[str, Any], files: Sequence[WrittenFile]) -> bytes:
    """The contents of a manifest of ``files``."""
    manifest = {
        "manifest_version": MANIFEST_VERSION,
        "checksum": _NO_CHECKSUM,
        **identity,
        "files": [{"path": file.path, "size": file.size, "extents": file.extents} for file in files],
    }
    blank = (json.dumps(manifest, indent=1) + "\n").encode("ascii")
    return blank.replace(_NO_CHECKSUM.encode(), _checksum(blank).encode(), 1)


def _checksum(blank: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(blank)


def manifest_root(directory: Location) -> Location:
    """A Universal checkpoint's manifest lies beside its tag file, one level up."""
    if not (directory / MANIFEST).is_file() and (directory.parent / MANIFEST).is_file():
        return directory.parent
    return directory


def read_manifest(directory: Path | Location) -> Manifest | None:
    """The manifest of a directory; None where it has none.

    Raises:
        UnreadableError: it is damaged, or of a version this release does not know.
    """
    path = as_location(directory) / MANIFEST
    if not path.is_file():
        return None
    try:
        raw = path.read_small(LARGEST_RECORD)
        data = parse_json(raw, str(path))
        version = data["manifest_version"]
        if version not in (_BEFORE_CHECKSUMS, _BEFORE_CRCS, MANIFEST_VERSION):
            raise UnreadableError(
                f"{path} is of version {version}; this release of ckpt-tool reads up to version "
                f"{MANIFEST_VERSION}. Use the release that wrote it."
            )
        if version != _BEFORE_CHECKSUMS:
            _check(path, raw, data.pop("checksum"))
        files = tuple(as_written(file, version > _BEFORE_CRCS) for file in data["files"])
    except OSError as error:
        raise reading_failed(str(path), error) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UnreadableError(f"{path} is damaged ({type(error).__name__}: {error}).") from error
    return Manifest({key: value for key, value in data.items() if key != "files"}, files)


def _check(path: Location, raw: bytes, stated: str) -> None:
    blank = raw.replace(stated.encode(), _NO_CHECKSUM.encode(), 1)
    if len(stated) != len(_NO_CHECKSUM) or _checksum(blank) != stated:
        raise UnreadableError(
            f"{path} is damaged: it is not what its own checksum says. Copy the checkpoint again from "
            "where it was written; remove the manifest only if its files are known to be good."
        )
