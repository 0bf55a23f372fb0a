"""torch's archives: what torch.save wrote is found; what is written here torch.load reads, bit for bit."""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
import tempfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tool.canonical import DType, Tensor
from ckpt_tool.containers.torch_zip import Constant, Flat, Inline, TorchArchive, TorchFiles, torch_file
from ckpt_tool.errors import UnreadableError
from ckpt_tool.execute.budget import Budget
from ckpt_tool.layout import Layout, Slot, whole
from ckpt_tool.storage import LocalReader
from tests.conftest import DTYPES, carry_out, materialise, raw, some_of, stored

LOADS = {
    "weights_only": {"weights_only": True},
    "pickle": {"weights_only": False},
    "mmap": {"weights_only": True, "mmap": True},
    "mmap pickle": {"weights_only": False, "mmap": True},
}
UNZIP = shutil.which("unzip")


def opened(path: Path) -> TorchArchive:
    return TorchArchive(LocalReader(path.parent), path.name)


def write(directory: Path, value: Any, tensors: list[Tensor], **options: Any) -> Path:
    """Write ``value`` as an archive below ``directory/out``; its tensors lie in ``directory``."""
    layout = Layout((torch_file("file.pt", value, **options),))
    carry_out(layout, directory, directory / "out")
    return directory / "out" / "file.pt"


def check_archive(path: Path) -> None:
    """Valid to Python's zip module and Info-ZIP; every storage aligned as torch's mmap wants it."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        names = [info.filename for info in archive.infolist()]
        assert len(set(names)) == len(names)
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
    mine = opened(path)
    for name in mine.records:
        assert mine.record_offset(name) % 64 == 0, name
    if UNZIP:
        done = subprocess.run([UNZIP, "-tqq", str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


# ---- reading what torch wrote


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_every_dtype_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = some_of(dtype, 60).reshape(3, 4, 5)
    torch.save({"t": tensor}, tmp_path / "a.pt")
    archive = opened(tmp_path / "a.pt")
    described = archive.tensor("t", "weight", archive.root["t"])
    assert (described.shape, str(described.dtype)) == ((3, 4, 5), str(dtype).removeprefix("torch."))
    assert raw(materialise(LocalReader(tmp_path), described)) == raw(tensor)


def test_reads_views_of_shared_storages(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    views = {
        "base": base,
        "slice": base[5:9],
        "matrix": base.view(4, 6),
        "rows": base.view(4, 6)[1:3],
        "last": base[-1:],
        "scalar": base[7],
        "narrow of one": base.view(4, 6)[2:3, 1:4],
    }
    torch.save(views, tmp_path / "a.pt")
    archive = opened(tmp_path / "a.pt")
    assert len([name for name in archive.records if name.startswith("data/")]) == 1
    reader = LocalReader(tmp_path)
    for name, view in views.items():
        found = archive.tensor(name, "weight", archive.root[name])
        assert raw(materialise(reader, found)) == raw(view), name


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).view(2, 3).t(),
        torch.arange(6.0)[::2],
        torch.ones(1).expand(3),
        torch.arange(6.0).view(2, 3)[:, :2],
    ],
    ids=["transposed", "strided", "expanded", "columns"],
)
def test_refuses_a_tensor_that_is_not_contiguous(tensor: torch.Tensor, tmp_path: Path) -> None:
    torch.save({"t": tensor}, tmp_path / "a.pt")
    archive = opened(tmp_path / "a.pt")
    with pytest.raises(UnreadableError, match=r"a\.pt"):
        archive.tensor("t", "weight", archive.root["t"])


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0, 2), ()], ids=str)
def test_reads_empty_tensors_and_scalars(shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.save({"t": torch.ones(shape)}, tmp_path / "a.pt")
    archive = opened(tmp_path / "a.pt")
    assert archive.tensor("t", "weight", archive.root["t"]).shape == shape


def test_reads_a_large_storage_that_is_stored_with_zip64(tmp_path: Path) -> None:
    """Not large, but with the header large files have: our own, forced."""
    (source,) = stored(tmp_path, {"t": some_of(torch.float32, 1000)}).values()
    path = write(tmp_path, {"t": source}, [source], zip64_limit=1000)
    archive = opened(path)
    found = archive.tensor("t", "weight", archive.root["t"])
    expected = raw(materialise(LocalReader(tmp_path), source))
    assert raw(materialise(LocalReader(path.parent), found)) == expected


def test_the_fingerprint_changes_with_any_byte_of_data(tmp_path: Path) -> None:
    prints = set()
    for index in range(4):
        torch.save({"t": torch.arange(100.0).index_fill(0, torch.tensor(index), -1)}, tmp_path / "a.pt")
        prints.add(opened(tmp_path / "a.pt").source.fingerprint)
    assert len(prints) == 4


def saved(value: Any) -> bytearray:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return bytearray(buffer.getvalue())


@given(st.data())
def test_a_truncated_archive_is_refused(data: st.DataObject) -> None:
    sound = saved({"t": torch.arange(50.0), "x": ["a", {"b": 2}]})
    length = data.draw(st.integers(0, len(sound) - 1))
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "a.pt").write_bytes(sound[:length])
        with pytest.raises(UnreadableError, match=r"a\.pt"):
            opened(Path(directory) / "a.pt")


@given(st.data())
def test_a_damaged_archive_is_read_or_refused(data: st.DataObject) -> None:
    sound = saved({"t": torch.arange(5.0), "x": ["a", {"b": 2}]})
    for _ in range(data.draw(st.integers(1, 4))):
        sound[data.draw(st.integers(0, len(sound) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "a.pt").write_bytes(sound)
        with contextlib.suppress(UnreadableError):
            archive = opened(Path(directory) / "a.pt")
            if isinstance(archive.root, dict):
                for value in archive.root.values():
                    archive.describe(value)


def test_refuses_a_record_shorter_than_its_tensor(tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(saved({"t": torch.arange(5.0)}))) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as out:
        for name, data in records.items():
            out.writestr(name, data[:-4] if name.endswith("data/0") else data)
    damaged = opened(tmp_path / "a.pt")
    with pytest.raises(UnreadableError, match="data/0"):
        damaged.tensor("t", "weight", damaged.root["t"])


@pytest.mark.parametrize("missing", ["archive/data.pkl", "archive/data/0"])
def test_refuses_an_archive_without_a_record(missing: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(saved({"t": torch.arange(5.0)}))) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as out:
        for name, data in records.items():
            if name != missing:
                out.writestr(name, data)

    def read() -> Tensor:
        damaged = opened(tmp_path / "a.pt")
        return damaged.tensor("t", "weight", damaged.root["t"])

    with pytest.raises(UnreadableError, match=missing.split("/", 1)[1]):
        read()


def test_refuses_big_endian_archives(tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(saved({"t": torch.arange(5.0)}))) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as out:
        for name, data in records.items():
            out.writestr(name, b"big" if name.endswith("byteorder") else data)
    with pytest.raises(UnreadableError, match="big-endian"):
        opened(tmp_path / "a.pt")


# ---- writing what torch reads


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_loads_every_dtype_bit_for_bit(
    dtype: torch.dtype, load: dict[str, Any], tmp_path: Path
) -> None:
    tensor = some_of(dtype, 60).reshape(3, 20)
    (source,) = stored(tmp_path, {"t": tensor}).values()
    path = write(tmp_path, {"t": source}, [source])
    found = torch.load(path, **load)["t"]
    assert (found.dtype, found.shape) == (dtype, tensor.shape)
    assert raw(found) == raw(tensor)
    assert found.is_contiguous()


def some_tree(tmp_path: Path) -> tuple[Any, list[Tensor], Any]:
    """(what to write, its tensors, what torch.load must give)."""
    tensors = {
        "a": some_of(torch.float32, 33),
        "b": some_of(torch.bfloat16, 8).reshape(2, 4),
        "c": some_of(torch.int64, 1).reshape(()),
        "empty": torch.empty(0, 5),
    }
    described = stored(tmp_path, tensors)
    value = {
        "plain": [1, 2.5, "x", None, True, b"\0\xff", (1, (2,)), {3: 4}],
        "ordered": OrderedDict(a=described["a"], b=[described["b"], (described["c"],)]),
        "empty": described["empty"],
        "inline": Inline(torch.tensor(2.0).numpy().tobytes(), (), DType.float32),
        "twice": described["a"],
    }
    expected = {
        **value,
        "ordered": OrderedDict(a=tensors["a"], b=[tensors["b"], (tensors["c"],)]),
        "empty": tensors["empty"],
        "inline": torch.tensor(2.0),
        "twice": tensors["a"],
    }
    return value, list(described.values()), expected


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return (a.shape, a.dtype, raw(a)) == (b.shape, b.dtype, raw(b))
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize("zip64_limit", [0xFFFFFFFF, 300, 100, 1])
def test_torch_loads_a_tree_also_with_zip64(zip64_limit: int, load: dict[str, Any], tmp_path: Path) -> None:
    value, tensors, expected = some_tree(tmp_path)
    path = write(tmp_path, value, tensors, zip64_limit=zip64_limit)
    check_archive(path)
    assert same(expected, torch.load(path, **load))


def test_a_slot_is_part_of_a_tensor_in_another_dtype(tmp_path: Path) -> None:
    tensor = torch.linspace(-3, 3, 24).reshape(4, 6)
    (source,) = stored(tmp_path, {"t": tensor}).values()
    value = {
        "row": Slot(source, (1, 6), DType.float32, 0),
        "half": whole(source, DType.bfloat16, "rounded"),
        "rest": Slot(source, (3, 6), DType.float16, 6),
    }
    found = torch.load(write(tmp_path, value, [source]), weights_only=True)
    assert same(found, {"row": tensor[:1], "half": tensor.bfloat16(), "rest": tensor[1:].half()})


def test_the_written_file_is_as_large_as_planned(tmp_path: Path) -> None:
    value, tensors, _ = some_tree(tmp_path)
    target = torch_file("file.pt", value)
    assert write(tmp_path, value, tensors).stat().st_size == target.size


def test_the_same_value_gives_the_same_bytes(tmp_path: Path) -> None:
    value, tensors, _ = some_tree(tmp_path)
    first = write(tmp_path, value, tensors).read_bytes()
    layout = Layout((torch_file("file.pt", value),))
    carry_out(layout, tmp_path, tmp_path / "again", budget=Budget(4, 64))
    assert (tmp_path / "again" / "file.pt").read_bytes() == first


def test_reads_what_it_wrote(tmp_path: Path) -> None:
    value, tensors, expected = some_tree(tmp_path)
    path = write(tmp_path, value, tensors)
    archive = opened(path)
    found = archive.describe(archive.root)
    reader = LocalReader(path.parent)

    def read(item: Any) -> Any:
        if isinstance(item, Tensor):
            return materialise(reader, item)
        if isinstance(item, dict):
            copy = item.copy()
            copy.update({key: read(entry) for key, entry in item.items()})
            return copy
        return type(item)(map(read, item)) if type(item) in (list, tuple) else item

    assert same(expected, read(found))


def test_torch_sees_crcs_that_are_right(tmp_path: Path) -> None:
    """Every storage's CRC-32 is that of its bytes, also where several workers wrote it in pieces."""
    (source,) = stored(tmp_path, {"t": some_of(torch.uint8, 300_000)}).values()
    layout = Layout((torch_file("file.pt", {"t": source}),))
    carry_out(layout, tmp_path, tmp_path / "out", budget=Budget(3, 4096))
    check_archive(tmp_path / "out" / "file.pt")


def test_more_records_than_sixteen_bits_count() -> None:
    """torch believes the count in the end record; beyond 65535 it must be in a zip64 one."""
    value = [Inline(b"x", (1,), DType.uint8)] * 65_540
    tail = torch_file("file.pt", value).literals[-1].data[-200:]
    assert int.from_bytes(tail[-14:-12], "little") == 0xFFFF
    zip64 = tail.rfind(b"PK\x06\x06")
    assert zip64 >= 0, "no zip64 end record"
    assert int.from_bytes(tail[zip64 + 24 : zip64 + 32], "little") == 65_540 + 3


def test_a_tensor_of_another_archive_is_not_written_as_ours(tmp_path: Path) -> None:
    """Its storage key means another record here."""
    torch.save({"t": torch.arange(3.0)}, tmp_path / "a.pt")
    with pytest.raises(TypeError):
        torch_file("file.pt", {"t": opened(tmp_path / "a.pt").root["t"]})


@pytest.mark.parametrize("change", [-4, -1, 4])
def test_a_local_header_that_would_move_the_data_is_refused(change: int, tmp_path: Path) -> None:
    """The data are zeros: what follows the padding looks like an empty field."""
    torch.save({"a": torch.zeros(64)}, tmp_path / "file.pt")
    data = bytearray((tmp_path / "file.pt").read_bytes())
    header = data.rfind(b"PK\x03\x04", 0, data.find(b"/data/0"))
    length = int.from_bytes(data[header + 28 : header + 30], "little") + change
    data[header + 28 : header + 30] = length.to_bytes(2, "little")
    (tmp_path / "file.pt").write_bytes(data)
    archive = opened(tmp_path / "file.pt")
    with pytest.raises(UnreadableError, match="not where the directory says"):
        archive.offset_of(archive.root["a"])


@pytest.mark.parametrize(("before", "after"), [(b"x", b""), (b"", b"x")])
def test_an_archive_with_something_around_it_is_refused(
    before: bytes, after: bytes, tmp_path: Path
) -> None:
    (tmp_path / "file.pt").write_bytes(before + bytes(saved({"a": torch.ones(2)})) + after)
    with pytest.raises(
        UnreadableError, match=r"not exactly one torch archive|not a complete torch archive"
    ):
        opened(tmp_path / "file.pt")


@pytest.mark.parametrize("beyond", [0, 40, 1 << 20])
def test_a_record_that_lies_outside_of_the_archive_is_refused(beyond: int, tmp_path: Path) -> None:
    data = bytearray(saved({"a": torch.ones(2)}))
    directory = data.find(b"PK\x01\x02")
    entry = data.rfind(b"PK\x01\x02")
    data[entry + 42 : entry + 46] = (directory + beyond).to_bytes(4, "little")
    (tmp_path / "file.pt").write_bytes(data)
    with pytest.raises(UnreadableError, match="a record lies outside"):
        opened(tmp_path / "file.pt")


# ---- many archives that are alike


def flat_state(rank: int, tensors: dict[str, Tensor], padding: int = 0) -> dict[str, Any]:
    """Like an optimizer file of a rank: numbers of its own, what all ranks say, parts of tensors."""
    part = Slot(tensors["a"], (3,), DType.float32, 3 * rank)
    return {
        "rank": rank,
        "same": {"list": list(range(5)), "text": "x"},
        "step": Inline(b"\0\0\x80\x3f", (), DType.float32),
        "flat": Flat((part, padding) if padding else (part,), DType.float32, attributes={"ds_id": "0_1"}),
        "whole": tensors["b"],
        "empty": Slot(tensors["a"], (0,), DType.float32),
    }


@pytest.fixture
def some_tensors(tmp_path: Path) -> dict[str, Tensor]:
    torch.save({"a": torch.arange(30.0), "b": torch.arange(4, dtype=torch.int64)}, tmp_path / "a.pt")
    archive = opened(tmp_path / "a.pt")
    return {name: archive.tensor(name, "weight", record) for name, record in archive.root.items()}


@pytest.mark.parametrize("limit", [2**32 - 1, 64])
def test_files_laid_out_together_are_those_laid_out_alone(
    limit: int, some_tensors: dict[str, Tensor]
) -> None:
    together = TorchFiles(zip64_limit=limit)
    for rank, padding in ((0, 0), (1, 0), (9, 2), (3, 0), (2**31, 0), (8, 2), (0, 1)):
        value = flat_state(rank % 10, some_tensors, padding) | {"rank": rank}
        ours = together.file(f"{rank}.pt", value)
        assert ours == torch_file(f"{rank}.pt", value, zip64_limit=limit)


def test_file_whose_small_tensor_has_another_value(some_tensors: dict[str, Tensor]) -> None:
    together = TorchFiles()
    for data in (b"\0\0\x80\x3f", b"\0\0\0\x40"):
        value = flat_state(1, some_tensors) | {"step": Inline(data, (), DType.float32)}
        assert together.file("f.pt", value) == torch_file("f.pt", value)


def test_constant_parts_are_written_as_the_parts_themselves(some_tensors: dict[str, Tensor]) -> None:
    part = {"tensors": [some_tensors["b"], Inline(b"", (0,), DType.float16)], "list": [1, (2, "x")]}
    constant = Constant(part)
    for before in ([], [some_tensors["b"]], [some_tensors["b"]] * 2, []):
        ours = torch_file("f.pt", {"before": before, "part": constant, "again": constant, "after": part})
        assert ours == torch_file("f.pt", {"before": before, "part": part, "again": part, "after": part})
