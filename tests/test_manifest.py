"""The manifest knows when it is not what was written, and a result when it is not what it says."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from ckpt_tool import api
from ckpt_tool.errors import UnreadableError
from ckpt_tool.manifest import MANIFEST, manifest_bytes, read_manifest
from ckpt_tool.written import WrittenExtent, WrittenFile
from tests.conftest import checkpoint_of

FILES = (
    WrittenFile(
        "a/b.pt",
        300,
        (WrittenExtent(0, 100, "0123456789abcdef", 7), WrittenExtent(100, 200, "f" * 16, 2**32 - 1)),
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


def test_a_manifest_of_the_version_without_crcs(tmp_path: Path) -> None:
    """As ckpt-tool wrote it before version 3."""
    before = tuple(
        file._replace(extents=tuple(extent[:3] for extent in file.extents))  # type: ignore[misc]
        for file in FILES
    )
    data = manifest_bytes(IDENTITY, before).replace(b'"manifest_version": 3', b'"manifest_version": 2')
    digits = json.loads(data)["checksum"].encode()
    blank = data.replace(digits, b"0" * 32)
    old = blank.replace(b"0" * 32, xxhash.xxh3_128_hexdigest(blank).encode(), 1)
    found = read_manifest(written(tmp_path, old))
    assert found is not None
    assert [file.extents for file in found.files] == [
        tuple(extent._replace(crc=None) for extent in file.extents) for file in FILES
    ]


def test_an_extent_without_its_crc(tmp_path: Path) -> None:
    file = WrittenFile("a", 1, (WrittenExtent(0, 1, "x"),))
    with pytest.raises(UnreadableError, match="the file 'a' is no path"):
        read_manifest(written(tmp_path, manifest_bytes(IDENTITY, [file])))


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
        read_manifest(written(tmp_path, b'{"manifest_version": 4, "files": []}'))


# ---- a result and its manifest

SOURCE = checkpoint_of("dense_w3")
TAG = "global_step2"


@pytest.fixture
def result(tmp_path: Path) -> Path:
    api.convert(SOURCE, tmp_path / "result", to="zero3", world=2, how=api.Execution(fsync=False))
    return tmp_path / "result"


def rewritten(result: Path, change: Callable[[WrittenFile], WrittenFile]) -> None:
    """The manifest with other files, and the right checksum of itself."""
    manifest = read_manifest(result)
    assert manifest is not None
    (result / MANIFEST).write_bytes(manifest_bytes({}, [change(file) for file in manifest.files]))


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file._replace(extents=file.extents[1:]),
        lambda file: file._replace(extents=file.extents[:-1]),
        lambda file: file._replace(extents=()),
        lambda file: file._replace(extents=(*file.extents, file.extents[0])),
    ],
    ids=["not of the beginning", "not of the end", "of nothing", "twice of the beginning"],
)
def test_a_manifest_without_a_checksum_of_every_byte(
    change: Callable[[WrittenFile], WrittenFile], result: Path
) -> None:
    """What it says is right, and yet it does not say that the file is."""
    rewritten(result, lambda file: change(file) if file.path.endswith("_states.pt") else file)
    verdict = api.verify(result)
    assert len(verdict.differences) == len(list(result.glob("*/*_states.pt")))
    assert all(
        "has no checksum, or two, of the bytes from" in found.message for found in verdict.differences
    )


def test_a_step_that_an_engine_saved_beside_the_result(result: Path) -> None:
    shutil.copytree(result / TAG, result / "global_step10")
    (result / "latest").write_text("global_step10")
    (result / "zero_to_fp32.py").write_text("# recovery")
    verdict = api.verify(result)
    assert verdict.passed, verdict.differences
    assert "latest names global_step10, which was saved afterwards." in verdict.notes
    said = "Added after the manifest was written, and not checked: zero_to_fp32.py, global_step10/."
    assert said in verdict.notes


def test_damage_is_found_beside_a_step_that_an_engine_saved(result: Path) -> None:
    shutil.copytree(result / TAG, result / "global_step10")
    (result / "latest").write_text("global_step10")
    file = next((result / TAG).glob("*optim_states.pt"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert [found.name for found in api.verify(result).differences] == [f"{TAG}/{file.name}"]


def test_a_later_step_itself_is_not_judged_by_the_manifest_beside_it(result: Path) -> None:
    shutil.copytree(result / TAG, result / "global_step10")
    for file in (result / TAG).iterdir():
        file.unlink()
    verdict = api.verify(result / "global_step10")
    assert verdict.passed
    assert any("No ckpt_tool_manifest.json" in note for note in verdict.notes)


@pytest.mark.parametrize("text", ["", "nowhere", TAG + "\n", "../result"])
def test_a_file_that_names_no_later_step_is_damage(text: str, result: Path) -> None:
    (result / "latest").write_text(text)
    try:
        wrong = [found.name for found in api.verify(result).differences]
    except UnreadableError as error:
        wrong = ["latest"] if "latest" in str(error) else []
    assert wrong == ["latest"]
