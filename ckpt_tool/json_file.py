"""Small JSON files: config.json, an engine's config, an index of files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt_tool.errors import UnreadableError, UsageError
from ckpt_tool.json_text import parse_json
from ckpt_tool.limits import LARGEST_JSON
from ckpt_tool.storage import Location, Reader, as_location, too_large


def read_json(file: Path | Location) -> Mapping[str, Any]:
    """A JSON object; UsageError where there is no file, UnreadableError where it holds something else."""
    try:
        data = as_location(file).read_small(LARGEST_JSON)
    except FileNotFoundError:
        raise UsageError(f"{file} does not exist.") from None
    except IsADirectoryError:
        raise UsageError(f"{file} is a directory; pass the file.") from None
    return _object(data, str(file))


def read_object(reader: Reader, path: str) -> dict[str, Any]:
    """A JSON object in a checkpoint's directory; UnreadableError where there is none, or something else."""
    where, size = f"{reader.root}/{path}", reader.size(path)
    if size > LARGEST_JSON:
        raise too_large(where, size, LARGEST_JSON)
    return _object(reader.read(path, 0, size), where)


def _object(data: bytes, where: str) -> dict[str, Any]:
    value = parse_json(data, where)
    if not isinstance(value, dict):
        raise UnreadableError(f"{where} holds no JSON object.")
    return value
