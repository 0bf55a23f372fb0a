"""The manifest knows when it is not what was written."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from ckpt_tool.errors import UnreadableError
from ckpt_tool.manifest import MANIFEST, manifest_bytes, read_manifest
from ckpt_tool.written import WrittenExtent, WrittenFile

FILES = (
    WrittenFile(
        "a/b.pt", 300, (WrittenExtent(0, 100, "0123456789abcdef"), WrittenExtent(100, 200, "f" * 16))
    ),
    WrittenFile("latest", 0, ()),
)
IDENTITY = {"tool": "ckpt-tool 0", "parameters": {"to": "hf", "ep": None}, "identity": "00" * 16}


def written(tmp_path: Path, data: bytes) -> Path:
    (tmp_path / MANIFEST).write_bytes(data)
    return tmp_path


def test_what_was_written_is_read(tmp_path: Path) -> None:
    found = read_manifest(written(tmp_path, manifest_bytes(IDENTITY, FILES)))
    assert found is not None
    assert found.files == FILES
    assert IDENTITY.items() <= found.identity.items()


def test_a_manifest_of_the_version_without_a_checksum(tmp_path: Path) -> None:
    old = {"manifest_version": 1, "files": [{"path": "a", "size": 1, "extents": [[0, 1, "x"]]}]}
    found = read_manifest(written(tmp_path, json.dumps(old).encode()))
    assert found is not None
    assert found.files == (WrittenFile("a", 1, (WrittenExtent(0, 1, "x"),)),)


def test_any_flipped_bit(tmp_path: Path) -> None:
    data = manifest_bytes(IDENTITY, FILES)
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << random.Random(at).randrange(8)
        with pytest.raises(UnreadableError, match=r"damaged|version"):
            read_manifest(written(tmp_path, bytes(flipped)))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.replace(b'"size": 300', b'"size": 301'),
        lambda data: data.replace(b"  ", b" ", 1),
        lambda data: data + b"\n",
        lambda data: json.dumps({**json.loads(data), "checksum": ""}).encode(),
        lambda data: json.dumps({**json.loads(data), "checksum": 3}).encode(),
        lambda data: json.dumps({k: v for k, v in json.loads(data).items() if k != "checksum"}).encode(),
    ],
    ids=["a size", "a blank", "a line", "no checksum's digits", "a number for a checksum", "no checksum"],
)
def test_a_manifest_that_was_edited(change: object, tmp_path: Path) -> None:
    assert callable(change)
    with pytest.raises(UnreadableError, match=MANIFEST):
        read_manifest(written(tmp_path, change(manifest_bytes(IDENTITY, FILES))))


def test_a_manifest_of_a_later_version(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match="Use the release that wrote it"):
        read_manifest(written(tmp_path, b'{"manifest_version": 3, "files": []}'))
