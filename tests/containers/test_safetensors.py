"""safetensors files: against the safetensors library both ways, and one test per way a header is wrong."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ckpt_tool.canonical import DType
from ckpt_tool.containers.safetensors import SafetensorsFile, safetensors_file
from ckpt_tool.errors import UnreadableError
from ckpt_tool.layout import Layout, Slot, whole
from ckpt_tool.storage import LocalReader
from tests.conftest import DTYPES, carry_out, materialise, raw, some_of, stored


def opened(path: Path) -> SafetensorsFile:
    return SafetensorsFile(LocalReader(path.parent), path.name, state="weight")


def write(directory: Path, slots: list[tuple[str, Slot]], metadata: Mapping[str, str]) -> Path:
    layout = Layout((safetensors_file("file.safetensors", slots, metadata),))
    carry_out(layout, directory, directory / "out")
    return directory / "out" / "file.safetensors"


def trees() -> dict[str, torch.Tensor]:
    return {
        **{f"a.{dtype}": some_of(dtype, 12).reshape(3, 4) for dtype in DTYPES},
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "δ name\n": some_of(torch.float32, 5),
    }


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    tensors = trees()
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    file = opened(tmp_path / "a.safetensors")
    reader = LocalReader(tmp_path)
    assert file.metadata == {"format": "pt"}
    assert set(file.tensors) == set(tensors)
    for name, tensor in tensors.items():
        found = file.tensors[name]
        assert (found.shape, getattr(torch, found.dtype.torch_name)) == (tuple(tensor.shape), tensor.dtype)
        assert raw(materialise(reader, found)) == raw(tensor), name


def test_the_library_reads_what_is_written_here(tmp_path: Path) -> None:
    tensors = trees()
    described = stored(tmp_path, tensors)
    path = write(tmp_path, [(n, whole(t)) for n, t in described.items()], {"format": "pt", "δ": '"\\'})
    found = load_file(path)
    assert {n: (t.shape, t.dtype, raw(t)) for n, t in found.items()} == {
        n: (t.shape, t.dtype, raw(t)) for n, t in tensors.items()
    }
    with safe_open(path, "pt") as handle:
        assert handle.metadata() == {"format": "pt", "δ": '"\\'}


def test_slots_are_parts_and_casts(tmp_path: Path) -> None:
    tensor = torch.linspace(-2, 2, 24).reshape(4, 6)
    (source,) = stored(tmp_path, {"t": tensor}).values()
    slots = [
        ("row", Slot(source, (6,), DType.float32, 6)),
        ("half", whole(source, DType.bfloat16, "rounded")),
    ]
    found = load_file(write(tmp_path, slots, {}))
    assert torch.equal(found["row"], tensor[1])
    assert torch.equal(found["half"], tensor.bfloat16())


def test_data_begins_eight_byte_aligned(tmp_path: Path) -> None:
    for length in range(1, 12):
        described = stored(tmp_path, {"n" * length: torch.arange(3.0)})
        target = safetensors_file("x", [(n, whole(t)) for n, t in described.items()], {})
        assert target.fills[0].offset % 8 == 0


@given(
    st.lists(st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 4), max_size=3)), max_size=6)
)
def test_any_tensors_both_ways(forms: list[tuple[torch.dtype, list[int]]]) -> None:
    tensors = {
        f"t{n}": some_of(dtype, int(torch.Size(shape).numel()), n).reshape(shape)
        for n, (dtype, shape) in enumerate(forms)
    }
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        path = write(directory, [(n, whole(t)) for n, t in stored(directory, tensors).items()], {})
        assert {n: raw(t) for n, t in load_file(path).items()} == {n: raw(t) for n, t in tensors.items()}
        found = opened(path).tensors
        reader = LocalReader(path.parent)
        assert {n: raw(materialise(reader, t)) for n, t in found.items()} == {
            n: raw(t) for n, t in tensors.items()
        }


# ---- headers that are wrong. The library is asked, too: what it refuses must be refused here.

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file_of(header: bytes, data: bytes = bytes(8), *, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def entry(**changes: Any) -> bytes:
    return json.dumps({"t": {**ENTRY, **changes}}).encode()


def two(first: list[int], second: list[int]) -> bytes:
    return json.dumps(
        {"a": {**ENTRY, "data_offsets": first}, "b": {**ENTRY, "data_offsets": second}}
    ).encode()


INVALID = {
    "empty file": b"",
    "shorter than a length": b"\x08\x00",
    "header longer than the file": file_of(entry(), length=10_000),
    "header too large": file_of(entry(), length=100_000_001),
    "header length overflow": file_of(entry(), length=2**64 - 1),
    "no header": file_of(b"", b""),
    "not UTF-8": file_of(b'{"\xff":1}', b""),
    "not JSON": file_of(b"{not json}", b""),
    "JSON cut off": file_of(entry()[:-1]),
    "not an object": file_of(b"[1, 2]", b""),
    "a number": file_of(b"7", b""),
    "nested too deep": file_of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""),
    "integer of 5000 digits": file_of(b'{"a":' + b"9" * 5000 + b"}", b""),
    "entry is no object": file_of(b'{"t": 3}', b""),
    "entry is a list": file_of(b'{"t": []}', b""),
    "no dtype": file_of(json.dumps({"t": {"shape": [2], "data_offsets": [0, 8]}}).encode()),
    "no shape": file_of(json.dumps({"t": {"dtype": "F32", "data_offsets": [0, 8]}}).encode()),
    "no offsets": file_of(json.dumps({"t": {"dtype": "F32", "shape": [2]}}).encode()),
    "unknown dtype": file_of(entry(dtype="F99")),
    "dtype is a list": file_of(entry(dtype=["F32"])),
    "dtype is an object": file_of(entry(dtype={})),
    "dtype is null": file_of(entry(dtype=None)),
    "shape is no list": file_of(entry(shape=2)),
    "shape is text": file_of(entry(shape="2")),
    "shape of floats": file_of(entry(shape=[2.0])),
    "shape of booleans": file_of(entry(shape=[True, 2])),
    "negative size": file_of(entry(shape=[-2])),
    "two negative sizes": file_of(entry(shape=[-1, -2])),
    "size overflow": file_of(entry(shape=[2**62, 4])),
    "shape too large for its bytes": file_of(entry(shape=[3])),
    "shape too small for its bytes": file_of(entry(shape=[1])),
    "one offset": file_of(entry(data_offsets=[0])),
    "three offsets": file_of(entry(data_offsets=[0, 4, 8])),
    "offsets are text": file_of(entry(data_offsets="08")),
    "offsets reversed": file_of(entry(data_offsets=[8, 0])),
    "negative offset": file_of(entry(data_offsets=[-8, 0])),
    "offset of floats": file_of(entry(data_offsets=[0.0, 8.0])),
    "begins late": file_of(entry(data_offsets=[4, 12]), bytes(12)),
    "gap": file_of(two([0, 8], [12, 20]), bytes(20)),
    "overlap": file_of(two([0, 8], [4, 12]), bytes(12)),
    "the same bytes twice": file_of(two([0, 8], [0, 8])),
    "data too short": file_of(entry(), bytes(7)),
    "data missing": file_of(entry(), b""),
    "data too long": file_of(entry(), bytes(9)),
    "metadata is no object": file_of(b'{"__metadata__": 3}', b""),
    "metadata of numbers": file_of(b'{"__metadata__": {"a": 1}}', b""),
}


@pytest.mark.parametrize("name", INVALID)
def test_refuses(name: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(INVALID[name])
    with pytest.raises((SafetensorError, ValueError, OverflowError)):
        load_file(path)
    with pytest.raises(UnreadableError, match=r"bad\.safetensors"):
        opened(path)


def test_refuses_a_name_twice(tmp_path: Path) -> None:
    """The specification disallows it; JSON parsers silently take the last."""
    path = tmp_path / "bad.safetensors"
    one = json.dumps(ENTRY).encode()
    path.write_bytes(file_of(b'{"t": ' + one + b', "t": ' + one + b"}"))
    with pytest.raises(UnreadableError, match="twice"):
        opened(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match=r"no\.safetensors"):
        opened(tmp_path / "no.safetensors")


@given(st.data())
def test_a_damaged_header_is_read_or_refused(data: st.DataObject) -> None:
    sound = bytearray(file_of(two([0, 8], [8, 16]), bytes(16)))
    for _ in range(data.draw(st.integers(1, 4))):
        sound[data.draw(st.integers(0, len(sound) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "a.safetensors"
        path.write_bytes(sound)
        with contextlib.suppress(UnreadableError):
            opened(path)
