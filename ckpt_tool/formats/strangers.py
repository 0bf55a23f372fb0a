"""Files that a user passes as a checkpoint and that are none: what they are, and what to do instead."""

from __future__ import annotations

import re
from typing import NamedTuple

from ckpt_tool.errors import UnreadableError
from ckpt_tool.manifest import MANIFEST
from ckpt_tool.storage import Location

# Files that checkpoints are made of, by their names.
_OWN = re.compile(r".*\.(pt|pth|bin|safetensors|distcp)|.*\.index\.json|\.metadata|config\.json")
_UNPACK = "Unpack it, and pass the directory that was in it."
_READ = 512  # bytes, in which every kind is told


class _Kind(NamedTuple):
    magic: bytes
    called: str
    remedy: str
    at: int = 0


_KINDS = (
    _Kind(b"PK\x03\x04", "a zip archive", _UNPACK),
    _Kind(b"PK\x05\x06", "an empty zip archive", _UNPACK),
    _Kind(b"\x1f\x8b", "compressed by gzip", _UNPACK),
    _Kind(b"BZh", "compressed by bzip2", _UNPACK),
    _Kind(b"\xfd7zXZ\x00", "compressed by xz", _UNPACK),
    _Kind(b"\x28\xb5\x2f\xfd", "compressed by zstd", _UNPACK),
    _Kind(b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    _Kind(b"ustar", "a tar archive", _UNPACK, 257),
    _Kind(b"GGUF", "a GGUF file", "That format is not read; pass what it was made of."),
    _Kind(b"\x89HDF", "an HDF5 file", "That format is not read; pass what it was made of."),
)


def refuse_strangers(path: Location) -> None:
    """Raises:
    UnreadableError: a file has no name that files of checkpoints have.
    """
    if _OWN.fullmatch(path.name) or path.name == MANIFEST:
        return
    reader = path.parent.reader()
    try:
        head = reader.read(path.name, 0, min(_READ, reader.size(path.name)))
    finally:
        reader.close()
    called, remedy = _called(head)
    raise UnreadableError(f"{path} is {called}, and no file of a checkpoint. {remedy}")


def _called(head: bytes) -> tuple[str, str]:
    for kind in _KINDS:
        if head[kind.at :].startswith(kind.magic):
            return kind.called, kind.remedy
    if not head:
        return "empty", "Pass the checkpoint's directory."
    is_text = b"\x00" not in head and not re.search(rb"[\x80-\xff]{8}", head)
    return "a text file" if is_text else "of no kind that is known", "Pass the checkpoint's directory."
