"""The source is what was planned, to the end and across a resume: what was staged from a file that changed,
or was never made durable, is not published."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from ckpt_tool import api, conversion, journal
from ckpt_tool.comparison import Verdict
from ckpt_tool.errors import ExecutionError
from ckpt_tool.execute.meter import Silent
from ckpt_tool.manifest import JOURNAL, MANIFEST
from ckpt_tool.values import Difference
from tests.conftest import checkpoint_of, run_cli, tree

SHARD = 5_000  # bytes
FIRST = "model-00001-of-00004.safetensors"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in a few files, without any checksum of its values."""
    out = tmp_path_factory.mktemp("published") / "model"
    config = checkpoint_of("dense_w3").parent / "config.json"
    api.consolidate(checkpoint_of("dense_w3"), out, config=config, max_shard_bytes=9_000)
    (out / MANIFEST).unlink()
    assert len(list(out.glob("*.safetensors"))) == 4
    return out


@pytest.fixture
def source(published: Path, tmp_path: Path) -> Path:
    return shutil.copytree(published, tmp_path / "source")


def revised(file: Path) -> bytes:
    """The file with all values changed; names, shapes and size stay."""
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start:] = bytes(byte ^ 1 for byte in data[start:])
    return bytes(data)


def replace_all(source: Path) -> None:
    for file in source.glob("*.safetensors"):
        replace(file)


def replace(file: Path) -> None:
    fresh = file.with_name("fresh")
    fresh.write_bytes(revised(file))
    fresh.replace(file)


def rewrite_in_place(source: Path) -> None:
    """Same inodes, and the old times of writing, as rsync --inplace --times leaves them."""
    for file in source.glob("*.safetensors"):
        times, data = file.stat(), revised(file)
        with file.open("r+b") as out:
            out.write(data)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


class Stopping(Silent):
    """A meter that ends the run once it has written ``after`` tiles."""

    def __init__(self, after: int) -> None:
        self._left = after

    def add(self, count: int) -> None:
        self._left -= 1
        if self._left < 0:
            raise ExecutionError("stopped")


def convert(
    source: Path, target: Path, *, fsync: bool = True, after: int | None = None, verify: bool = False
) -> None:
    meter = Silent() if after is None else Stopping(after)
    how = api.Execution(workers=1, fsync=fsync, meter=meter)
    api.convert(source, target, to="hf", max_shard_bytes=SHARD, how=how, verify=verify)


def stopped(source: Path, target: Path, *, fsync: bool = True, after: int = 20) -> list[str]:
    """A run that is stopped; the files that were complete by then."""
    with pytest.raises(ExecutionError, match="stopped"):
        convert(source, target, fsync=fsync, after=after)
    complete = completed(target)
    assert 2 < len(complete) < 6
    return complete


def staging_of(target: Path) -> Path:
    return target.parent / f".{target.name}.ckpt-tool-staging"


def completed(target: Path) -> list[str]:
    return sorted(journal.read_journal((staging_of(target) / JOURNAL).read_bytes()).files)


def mark(target: Path, complete: list[str]) -> None:
    """So that what is written again can be told from what was kept."""
    for path in complete:
        os.utime(staging_of(target) / path, ns=(0, 0))


def kept(target: Path, complete: list[str]) -> set[str]:
    return {path for path in complete if (target / path).stat().st_mtime_ns == 0}


def names_in(file: Path) -> set[str]:
    if file.suffix != ".safetensors":
        return set()
    with safe_open(file, "numpy") as opened:
        return set(opened.keys())


def expected(source: Path, tmp_path: Path) -> dict[str, bytes]:
    convert(source, tmp_path / "whole")
    return tree(tmp_path / "whole")


@pytest.mark.parametrize("change", [replace_all, rewrite_in_place])
def test_another_revision_of_the_same_shapes_in_the_place_of_the_source(
    change: object, source: Path, tmp_path: Path
) -> None:
    """Headers are the same, so it is the same command; values are not."""
    stopped(source, tmp_path / "out")
    assert callable(change)
    change(source)
    convert(source, tmp_path / "out")
    assert tree(tmp_path / "out") == expected(source, tmp_path)


def test_only_what_was_made_of_the_changed_file_is_written_again(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    complete = stopped(source, target)
    mark(target, complete)
    replace(source / FIRST)
    convert(source, target)
    made_of_it = {path for path in complete if names_in(target / path) & names_in(source / FIRST)}
    assert made_of_it
    assert set(complete) > made_of_it
    assert kept(target, complete) == set(complete) - made_of_it
    assert tree(target) == expected(source, tmp_path)


def test_a_source_that_is_moved_is_the_same_source(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    complete = stopped(source, target)
    mark(target, complete)
    (tmp_path / "elsewhere").mkdir()
    moved = source.rename(tmp_path / "elsewhere" / source.name)
    convert(moved, target)
    assert kept(target, complete) == set(complete)


def test_a_source_that_changes_while_it_is_read_and_the_command_again(source: Path, tmp_path: Path) -> None:
    class Replacing(Silent):
        done = False

        def add(self, count: int) -> None:
            if not self.done and len(list(staging_of(tmp_path / "out").glob("*.safetensors"))) > 3:
                replace(source / FIRST)
                self.done = True

    how = api.Execution(workers=1, meter=Replacing())
    with pytest.raises(ExecutionError, match="changed while it was read"):
        api.convert(source, tmp_path / "out", to="hf", max_shard_bytes=SHARD, how=how)
    convert(source, tmp_path / "out")
    assert tree(tmp_path / "out") == expected(source, tmp_path)


def test_a_file_that_was_begun_again_is_not_taken_for_the_one_that_was_complete(
    source: Path, tmp_path: Path
) -> None:
    """It has its full size from the start, and an entry of the run before in the journal."""
    target = tmp_path / "out"
    whole = (staging_of(target) / stopped(source, target)[0]).stat().st_size
    replace(source / FIRST)
    with pytest.raises(ExecutionError, match="stopped"):
        convert(source, target, after=0)  # the first shard is begun
    first = sorted(staging_of(target).glob("model-*"))[0]
    first.write_bytes(bytes(9))  # what a kill would leave, where an error has removed it
    os.truncate(first, whole)
    convert(source, target)
    assert tree(target) == expected(source, tmp_path)


@pytest.mark.parametrize("size", ["short", "whole"])
def test_a_file_that_lost_its_end_is_begun_again_and_killed(
    size: str, source: Path, tmp_path: Path
) -> None:
    """Once its entry is found to be wrong, no later run believes it."""
    target = tmp_path / "out"
    first = staging_of(target) / stopped(source, target)[0]
    whole = first.stat().st_size
    os.truncate(first, 10)
    with pytest.raises(ExecutionError, match="stopped"):
        convert(source, target, after=0)
    first.write_bytes(
        bytes(whole if size == "whole" else 10)
    )  # as a kill leaves it: of full size, and zeros
    convert(source, target)
    assert tree(target) == expected(source, tmp_path)


# ---- a result that was found wrong


def test_a_result_that_verify_refused_is_written_anew(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    wrong = Verdict(1, 1, (Difference("value", "t", "a tensor differs"),), ())
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "compare", lambda *args, **kwargs: wrong)
        with pytest.raises(ExecutionError, match="a tensor differs") as raised:
            convert(source, target, verify=True)
    assert str(staging_of(target)) in str(raised.value)
    files = sorted(staging_of(target).glob("*.safetensors"))
    assert len(files) > 3, "what was written stays to be looked at"
    for file in files:
        os.utime(file, ns=(0, 0))
    convert(source, target, verify=True)
    assert all(file.stat().st_mtime_ns for file in target.glob("*.safetensors"))
    assert tree(target) == expected(source, tmp_path)


# ---- durability


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The inodes of everything that was made durable."""
    found: set[int] = set()
    monkeypatch.setattr(os, "fsync", lambda fd: found.add(os.fstat(fd).st_ino))
    return found


def test_files_of_a_run_without_fsync_are_made_durable_by_one_with_it(
    source: Path, tmp_path: Path, synced: set[int]
) -> None:
    target = tmp_path / "out"
    complete = stopped(source, target, fsync=False)
    inodes = {(staging_of(target) / path).stat().st_ino for path in complete}
    assert not inodes & synced
    convert(source, target)
    published = {file.stat().st_ino for file in target.rglob("*")}
    assert published <= synced
    assert inodes < published, "they were in memory still, and need not be written again"


@pytest.mark.parametrize("fsync", [True, False])
def test_files_of_a_run_without_fsync_before_the_machine_was_started_again(
    fsync: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what was not durable, sizes may be all that is left."""
    target = tmp_path / "out"
    for path in stopped(source, target, fsync=False):
        file = staging_of(target) / path
        file.write_bytes(bytes(file.stat().st_size))
    (tmp_path / "boot").write_text("another\n")
    monkeypatch.setattr(journal, "_BOOT", tmp_path / "boot")
    convert(source, target, fsync=fsync)
    assert tree(target) == expected(source, tmp_path)


def test_files_of_a_run_with_fsync_outlive_the_machine(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    complete = stopped(source, target)
    mark(target, complete)
    monkeypatch.setattr(journal, "_BOOT", tmp_path / "none")
    convert(source, target)
    assert kept(target, complete) == set(complete)


@pytest.mark.parametrize("damage", ["no run", "of text", "sources of numbers", "without states"])
def test_a_journal_that_does_not_say_what_files_were_made_of(
    damage: str, source: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    for path in stopped(source, target):
        (staging_of(target) / path).write_bytes(bytes((staging_of(target) / path).stat().st_size))
    path = staging_of(target) / JOURNAL
    lines = path.read_bytes().splitlines(keepends=True)
    assert "run" in json.loads(lines[1])
    run = {
        "of text": "x",
        "sources of numbers": {"synced": True, "boot": "x", "sources": [3]},
        "without states": {"synced": True, "boot": "x", "sources": [["model-00001-of-00004.safetensors"]]},
    }
    lines[1:2] = [journal.journal_line({"run": run[damage]})] if damage in run else []
    path.write_bytes(b"".join(lines))
    convert(source, target)
    assert tree(target) == expected(source, tmp_path)


def test_the_command_line_goes_on_from_what_is_the_same(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    stopped(source, target)
    replace_all(source)
    done = run_cli("convert", source, target, "--to", "hf", "--max-shard-size", str(SHARD))
    assert done.rc == 0, done.stderr
    assert tree(target) == expected(source, tmp_path)
