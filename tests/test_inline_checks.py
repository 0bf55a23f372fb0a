"""What a source says of its own bytes is checked while they are copied; what was not checked is said."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import threading
import zlib
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tool import api
from ckpt_tool.containers.stored_zip import StoredZip
from ckpt_tool.errors import DamagedError, ExecutionError, UnreadableError
from ckpt_tool.execute import checked
from ckpt_tool.execute.checked import EARLIER, IN_PART, NO_SUM, OUT_OF_ORDER, TOO_MANY, CheckingReader
from ckpt_tool.execute.meter import Silent
from ckpt_tool.formats.registry import locate, open_checkpoint
from ckpt_tool.manifest import MANIFEST, manifest_bytes
from ckpt_tool.storage import LocalReader
from ckpt_tool.stores.known import local_path
from ckpt_tool.sums import SourceSums
from ckpt_tool.written import WrittenExtent, WrittenFile
from tests.conftest import ROOT, checkpoint_of, config_of, run_cli, tree

CONFIG = config_of("dense_w3")


def flip(file: Path, record: str | None = None, *, at: int | None = None) -> None:
    """Change one bit in the middle of a record of an archive, or at a byte; the file's times stay."""
    times = file.stat()
    if record is not None:
        archive = StoredZip(LocalReader(file.parent), file.name)
        at = archive.record_offset(record) + archive.info(record).file_size // 3
    assert at is not None
    with file.open("r+b") as out:
        out.seek(at)
        byte = out.read(1)[0]
        out.seek(at)
        out.write(bytes([byte ^ 4]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.fixture
def zero3(tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint_of("dense_w3"), tmp_path / "source")


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Safetensors that ckpt-tool wrote, with a manifest."""
    api.convert(checkpoint_of("dense_w3"), tmp_path / "model", to="hf", config=CONFIG)
    return tmp_path / "model"


def convert(source: Path, target: Path, to: str = "universal", **options: object) -> api.Result:
    config = None if to == "hf" and (source / "config.json").exists() else CONFIG
    return api.convert(source, target, to=to, config=config, **options)  # type: ignore[arg-type]


# ---- a flipped bit


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("to", ["universal", "dcp", "hf"])
def test_a_flipped_bit_in_a_ranks_file(to: str, verify: bool, zero3: Path, tmp_path: Path) -> None:
    file = local_path(locate(zero3), "a test") / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    whole = file.read_bytes()
    masters = "data/3"
    flip(file, masters)
    for _ in range(2):  # and what was staged of it does not help the second run through
        with pytest.raises(DamagedError, match="Copy it again") as raised:
            convert(zero3, tmp_path / "out", to, verify=verify)
        assert file.name in str(raised.value)
        assert f"record {masters}" in str(raised.value)
        assert not (tmp_path / "out").exists()
    file.write_bytes(whole)
    convert(zero3, tmp_path / "out", to)
    convert(checkpoint_of("dense_w3"), tmp_path / "expected", to)
    assert _data(tmp_path / "out") == _data(tmp_path / "expected")


def _data(directory: Path) -> dict[str, bytes]:
    return {path: data for path, data in tree(directory).items() if path != MANIFEST}


@pytest.mark.parametrize("name", ["dense_tied_w3", "mixtral_accelerate_w2"])
def test_a_flipped_bit_in_a_chunk_of_dcp(name: str, tmp_path: Path) -> None:
    source = shutil.copytree(ROOT / "fixtures" / "dcp" / name / "checkpoint", tmp_path / "source")
    reader, checkpoint = open_checkpoint(source)
    reader.close()
    tensor = next(tensor for tensor in checkpoint.tensors if "o_proj" in str(tensor.name))
    region = next(iter(tensor.regions))
    flip(source / region.file, at=region.offset + 1)
    with pytest.raises(DamagedError, match=r"record data/0 of the archive at byte") as raised:
        api.convert(source, tmp_path / "out", to="dcp")
    assert region.file in str(raised.value)


@pytest.mark.parametrize("verify", [True, False])
def test_a_flipped_bit_in_safetensors_with_a_manifest(
    verify: bool, published: Path, tmp_path: Path
) -> None:
    flip(published / "model.safetensors", at=(published / "model.safetensors").stat().st_size - 50)
    with pytest.raises(DamagedError, match="remove ckpt_tool_manifest") as raised:
        convert(published, tmp_path / "out", "hf", verify=verify)
    assert "model.safetensors: bytes" in str(raised.value)
    assert not (tmp_path / "out").exists()
    (published / MANIFEST).unlink()  # as the message says
    convert(published, tmp_path / "out", "hf", verify=verify)


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """Safetensors of a mixture of experts, with a manifest. Gate and up lie in one tensor."""
    source, config = checkpoint_of("mixtral_w4e2"), config_of("mixtral_w4e2")
    api.convert(source, tmp_path / "mixture", to="hf", config=config, hf_layout="fused")
    return tmp_path / "mixture"


def test_listed_safetensors_are_checked_in_whatever_order_they_are_read(
    mixture: Path, tmp_path: Path
) -> None:
    """All gates of a layer go into one file, and then all its ups into another."""
    how = api.Execution(workers=1)
    result = api.convert(mixture, tmp_path / "out", to="universal", how=how)
    assert result.unchecked_bytes == {}
    assert result.checked_bytes >= result.bytes_read > 0
    as_version_2(mixture)
    result = api.convert(mixture, tmp_path / "out2", to="universal", how=how)
    assert set(result.unchecked_bytes) == {OUT_OF_ORDER}


def test_a_flipped_bit_in_any_tensor_of_listed_safetensors(mixture: Path, tmp_path: Path) -> None:
    file = mixture / "model.safetensors"
    header = json.loads(file.read_bytes()[8:][: int.from_bytes(file.read_bytes()[:8], "little")])
    start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    for name, tensor in header.items():
        if name != "__metadata__":
            at = start + sum(tensor["data_offsets"]) // 2
            flip(file, at=at)
            with pytest.raises(DamagedError, match=r"model\.safetensors: bytes"):
                api.convert(mixture, tmp_path / "out", to="universal", how=api.Execution(fsync=False))
            flip(file, at=at)
    assert not (tmp_path / "out").exists()


def test_a_result_with_a_manifest_of_before_is_recognised_by_the_command_that_made_it(
    zero3: Path, tmp_path: Path
) -> None:
    convert(zero3, tmp_path / "out")
    as_version_2(tmp_path / "out")
    assert "was there already" in convert(zero3, tmp_path / "out").notes[-1]
    assert api.verify(tmp_path / "out").passed


def test_a_flipped_bit_in_the_header_of_listed_safetensors(published: Path, tmp_path: Path) -> None:
    """Another name for a tensor, or its place, and the values are right."""
    file = published / "model.safetensors"
    flip(file, at=file.read_bytes().index(b'"model.norm.weight"') + 1)
    with pytest.raises(UnreadableError):
        convert(published, tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()


def test_a_file_of_another_size_than_the_manifest_states(published: Path, tmp_path: Path) -> None:
    data = (published / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    padded = (length + 8).to_bytes(8, "little") + data[8 : 8 + length] + b" " * 8 + data[8 + length :]
    (published / "model.safetensors").write_bytes(padded)
    with pytest.raises(DamagedError, match=f"{MANIFEST} states {len(data)}"):
        convert(published, tmp_path / "out", "hf")


def test_a_manifest_that_is_damaged(published: Path, tmp_path: Path) -> None:
    flip(published / MANIFEST, at=(published / MANIFEST).read_bytes().index(b'"size": ') + 8)
    with pytest.raises(UnreadableError, match="own checksum"):
        convert(published, tmp_path / "out", "hf")


def test_a_flipped_bit_in_a_small_record_that_is_read_before_all_else(zero3: Path, tmp_path: Path) -> None:
    """A step of all ranks, which agree on the wrong number."""
    for file in local_path(locate(zero3), "a test").glob("*optim_states.pt"):
        flip(file, "data/0")
    with pytest.raises(DamagedError, match="record data/0"):
        convert(zero3, tmp_path / "out")


def test_state_that_is_not_converted_is_checked_by_verify_alone(zero3: Path, tmp_path: Path) -> None:
    file = local_path(locate(zero3), "a test") / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    flip(file, "data/2")
    convert(zero3, tmp_path / "out", "hf")
    with pytest.raises(DamagedError, match=file.name):
        convert(zero3, tmp_path / "out2", "hf", verify=True)


def test_damage_that_a_run_before_has_staged(published: Path, tmp_path: Path) -> None:
    """The run that goes on does not read it again, but for --verify; then nothing staged of it is kept."""

    class Stopping(Silent):
        left = 8

        def add(self, count: int) -> None:
            self.left -= 1
            if self.left < 0:
                raise ExecutionError("stopped")

    fresh = shutil.copytree(published, tmp_path / "fresh" / published.name)
    (published / MANIFEST).unlink()
    file = published / "model.safetensors"
    flip(file, at=8 + int.from_bytes(file.read_bytes()[:8], "little") + 1)
    how = api.Execution(workers=1, meter=Stopping())
    with pytest.raises(ExecutionError, match="stopped"):
        convert(published, tmp_path / "out", "hf", max_shard_bytes=5000, how=how)
    shutil.copy(fresh / MANIFEST, published)
    for _ in range(2):
        with pytest.raises(DamagedError, match=r"model\.safetensors"):
            convert(published, tmp_path / "out", "hf", max_shard_bytes=5000, verify=True)
    result = convert(fresh, tmp_path / "out", "hf", max_shard_bytes=5000, verify=True)
    assert result.verdict
    assert api.verify(tmp_path / "out", fresh).passed


# ---- what is said of it


def test_all_that_is_read_of_archives_is_checked(zero3: Path, tmp_path: Path) -> None:
    """Padding of ranks, which belongs to no tensor, is read for it."""
    result = convert(zero3, tmp_path / "out")
    assert result.unchecked_bytes == {}
    assert result.checked_bytes >= result.bytes_read > 0


def test_what_has_no_checksum_is_not_called_checked(published: Path, tmp_path: Path) -> None:
    (published / MANIFEST).unlink()
    for verify in (True, False):
        result = convert(published, tmp_path / f"out{verify}", "hf", verify=verify)
        assert result.checked_bytes == 0
        assert result.unchecked_bytes == {NO_SUM: result.bytes_read}


def test_what_a_run_before_has_read_is_not_called_checked(zero3: Path, tmp_path: Path) -> None:
    class Stopping(Silent):
        left = 60

        def add(self, count: int) -> None:
            self.left -= 1
            if self.left < 0:
                raise ExecutionError("stopped")

    with pytest.raises(ExecutionError, match="stopped"):
        convert(zero3, tmp_path / "out", how=api.Execution(workers=1, meter=Stopping()))
    result = convert(zero3, tmp_path / "out")
    assert set(result.unchecked_bytes) == {EARLIER}
    assert api.verify(tmp_path / "out").passed


def test_after_verify_everything_with_a_checksum_is_called_checked(zero3: Path, tmp_path: Path) -> None:
    class Stopping(Silent):
        left = 60

        def add(self, count: int) -> None:
            self.left -= 1
            if self.left < 0:
                raise ExecutionError("stopped")

    with pytest.raises(ExecutionError, match="stopped"):
        convert(zero3, tmp_path / "out", how=api.Execution(workers=1, meter=Stopping()))
    result = convert(zero3, tmp_path / "out", verify=True)
    assert result.unchecked_bytes == {}
    assert result.checked_bytes > 0


def test_the_command_line_says_what_was_checked(published: Path, tmp_path: Path) -> None:
    done = run_cli("convert", published, tmp_path / "out", "--to", "hf", "--json")
    assert json.loads(done.stdout)["checked_bytes"] > 0
    assert json.loads(done.stdout)["unchecked_bytes"] == {}
    (published / MANIFEST).unlink()
    done = run_cli("convert", published, tmp_path / "out2", "--to", "hf")
    assert NO_SUM in done.stdout


# ---- the reader itself

SIZE = 10_000


def archive(directory: Path) -> tuple[int, bytes]:
    """An archive with one record of ``SIZE`` bytes, and where it begins."""
    values = torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    torch.save(values, directory / "a.pt")
    start = StoredZip(LocalReader(directory), "a.pt").record_offset("data/0")
    return start, values.numpy().tobytes()


def checking(directory: Path) -> CheckingReader:
    reader = LocalReader(directory)
    return CheckingReader(reader, SourceSums(reader, [StoredZip(reader, "a.pt").source]))


def with_manifest(directory: Path, *, version: int = 3) -> bytes:
    """A file of two extents and its manifest; the file's bytes."""
    data = random.Random(3).randbytes(SIZE)
    (directory / "a.bin").write_bytes(data)
    step = SIZE // 2
    parts = [(at, data[at : at + step]) for at in range(0, SIZE, step)]
    found = [WrittenExtent(at, step, xxhash.xxh3_64_hexdigest(d), zlib.crc32(d)) for at, d in parts]
    (directory / MANIFEST).write_bytes(manifest_bytes({}, [WrittenFile("a.bin", SIZE, tuple(found))]))
    if version == 2:
        as_version_2(directory)
    return data


def as_version_2(directory: Path) -> None:
    """Make of a manifest what ckpt-tool wrote before version 3: extents without a CRC-32."""
    stated = json.loads((directory / MANIFEST).read_bytes())
    files = [{**file, "extents": [one[:3] for one in file["extents"]]} for file in stated["files"]]
    blank = json.dumps({**stated, "manifest_version": 2, "checksum": "0" * 32, "files": files}).encode()
    digits = xxhash.xxh3_128_hexdigest(blank).encode()
    (directory / MANIFEST).write_bytes(blank.replace(b"0" * 32, digits, 1))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, bytes]:
    directory = tmp_path_factory.mktemp("one")
    return directory, *archive(directory)


@given(
    cuts=st.lists(st.integers(1, SIZE - 1), unique=True, max_size=12),
    order=st.randoms(use_true_random=False),
    wider=st.lists(st.integers(0, 500), min_size=13, max_size=13),
)
def test_a_record_is_put_together_of_pieces_in_any_order_that_may_overlap(
    one: tuple[Path, int, bytes], cuts: list[int], order: random.Random, wider: list[int]
) -> None:
    directory, start, data = one
    edges = [0, *sorted(cuts), SIZE]
    pieces = [
        (max(0, low - more), min(SIZE, high + more))
        for low, high, more in zip(edges, edges[1:], wider, strict=False)
    ]
    order.shuffle(pieces)
    reader = checking(directory)
    for low, high in pieces:
        assert reader.read("a.pt", start + low, high - low) == data[low:high]
    assert reader.result(resumed=False) == (SIZE, {})
    assert reader.is_right("a.pt", start + 5, SIZE - 5)
    assert not reader.is_right("a.pt", start + 5, SIZE)


@given(at=st.integers(0, SIZE - 1), order=st.randoms(use_true_random=False))
def test_one_flipped_bit_anywhere_is_found_by_the_last_piece(
    one: tuple[Path, int, bytes], at: int, order: random.Random
) -> None:
    directory, start, _ = one
    flip(directory / "a.pt", at=start + at)
    try:
        pieces = list(range(0, SIZE, 1000))
        order.shuffle(pieces)
        reader = checking(directory)
        for low in pieces[:-1]:
            reader.read("a.pt", start + low, 1000)
        with pytest.raises(DamagedError, match="data/0") as raised:
            reader.read("a.pt", start + pieces[-1], 1000)
        assert raised.value.files == {"a.pt"}
    finally:
        flip(directory / "a.pt", at=start + at)


def test_pieces_that_threads_read_at_once(one: tuple[Path, int, bytes]) -> None:
    directory, start, _ = one
    reader = checking(directory)
    pieces = [(low, low + 150) for low in range(0, SIZE, 50)]
    random.Random(1).shuffle(pieces)

    def read(mine: list[tuple[int, int]]) -> None:
        for low, high in mine:
            reader.read("a.pt", start + low, min(high, SIZE) - low)

    threads = [threading.Thread(target=read, args=(pieces[number::4],)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reader.finish(1000)
    assert reader.result(resumed=False) == (SIZE, {})


@pytest.mark.parametrize("left", [1, SIZE // 8, SIZE // 2, SIZE - 100])
def test_a_record_that_was_read_but_for_a_little_is_read_to_its_end(
    left: int, one: tuple[Path, int, bytes]
) -> None:
    directory, start, _ = one
    reader = checking(directory)
    reader.read("a.pt", start, SIZE - left)
    reader.finish(1000)
    little = left <= checked._BYTES_LEFT
    assert reader.result(resumed=False) == ((SIZE, {}) if little else (0, {IN_PART: SIZE - left}))


def test_a_record_in_too_many_pieces(one: tuple[Path, int, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    directory, start, _ = one
    monkeypatch.setattr(checked, "_MOST_PARTS", 20)
    reader = checking(directory)
    for low in range(0, SIZE, 100):
        reader.read("a.pt", start + low, 50)
    reader.finish(1000)
    assert reader.result(resumed=False) == (0, {TOO_MANY: SIZE // 2})
    assert reader._parts == 0


def test_bytes_between_records_have_no_checksum(one: tuple[Path, int, bytes]) -> None:
    directory, start, _ = one
    reader = checking(directory)
    reader.read("a.pt", start - 64, 64 + SIZE)
    assert reader.result(resumed=False) == (SIZE, {NO_SUM: 64})


@given(order=st.randoms(use_true_random=False), at=st.none() | st.integers(0, SIZE - 1))
def test_extents_are_put_together_of_pieces_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, order: random.Random, at: int | None
) -> None:
    """Pieces that lie across two extents as well; with a flipped bit at ``at``."""
    home = tmp_path_factory.mktemp("extents")
    data = with_manifest(home)
    if at is not None:
        flip(home / "a.bin", at=at)
    reader = CheckingReader(LocalReader(home), SourceSums(LocalReader(home), ()))
    pieces = list(itertools.pairwise([0, *sorted(order.sample(range(1, SIZE), 9)), SIZE]))
    order.shuffle(pieces)
    wrong = []
    for low, high in pieces:
        try:
            found = reader.read("a.bin", low, high - low)
        except DamagedError as error:
            wrong.append(str(error))
        else:
            assert found == data[low:high] or at is not None
    if at is None:
        assert wrong == []
        assert reader.result(resumed=False) == (SIZE, {})
    else:
        start = at // (SIZE // 2) * (SIZE // 2)
        assert wrong
        assert all(f"bytes {start} to {start + SIZE // 2}" in message for message in wrong)


def test_extents_that_are_read_from_front_to_back(tmp_path: Path) -> None:
    """A manifest of version 2 has checksums that take them in no other way."""
    with_manifest(tmp_path, version=2)
    reader = CheckingReader(LocalReader(tmp_path), SourceSums(LocalReader(tmp_path), ()))
    for low in (0, 5000, 2000, 6000, 4000, 9000):  # of two extents by turns
        reader.read("a.bin", low, {2000: 3000, 6000: 3000}.get(low, 2000 if low < 5000 else 1000))
    assert reader.result(resumed=False) == (SIZE, {})


def test_extents_that_are_not_read_from_front_to_back(tmp_path: Path) -> None:
    with_manifest(tmp_path, version=2)
    reader = CheckingReader(LocalReader(tmp_path), SourceSums(LocalReader(tmp_path), ()))
    reader.read("a.bin", 0, 5000)
    reader.read("a.bin", 7000, 3000)
    reader.read("a.bin", 5000, 2000)
    reader.finish(1000)
    assert reader.result(resumed=False) == (5000, {OUT_OF_ORDER: 5000})
    assert reader.result(resumed=False, all_else=True) == (SIZE, {})


@pytest.mark.parametrize("version", [2, 3])
def test_a_flipped_bit_in_an_extent(version: int, tmp_path: Path) -> None:
    with_manifest(tmp_path, version=version)
    flip(tmp_path / "a.bin", at=7777)
    reader = CheckingReader(LocalReader(tmp_path), SourceSums(LocalReader(tmp_path), ()))
    reader.read("a.bin", 0, 7000)
    with pytest.raises(DamagedError, match="bytes 5000 to 10000"):
        reader.read("a.bin", 6000, 4000)
