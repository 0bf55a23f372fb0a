"""Publishing: complete or not at all, through kills and reruns, with a manifest that sees every byte."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from ckpt_tool import api, commit
from ckpt_tool.commit import Staging
from ckpt_tool.errors import ExecutionError, UnreadableError, UsageError
from ckpt_tool.journal import journal_line
from ckpt_tool.manifest import JOURNAL, MANIFEST, read_manifest
from ckpt_tool.stores import local_area
from ckpt_tool.stores.local_area import LocalArea
from ckpt_tool.written import WrittenExtent, WrittenFile
from tests import synthetic
from tests.conftest import checkpoint_of, child_env, run_cli, tree
from tests.synthetic import Layer, Save, uniform

# Kills its own process in the middle of the nth write of the executor: as a power cut, no code runs after.
KILLED = """
import os, signal, sys
from ckpt_tool import api, storage

writes, real = [int(sys.argv[3])], storage.LocalWriter.write

def write(self, path, offset, data):
    writes[0] -= 1
    if writes[0] == 0:
        real(self, path, offset, memoryview(data)[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, path, offset, data)

storage.LocalWriter.write = write
how = api.Execution(max_memory=1 << 18, workers=2)
api.convert(sys.argv[1], sys.argv[2], to="universal", how=how)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of some 3 MB."""
    full = synthetic.model({"model.embed_tokens.weight": (1000, 64)}, [Layer(0, uniform(4, 2), 64, 128)])
    return synthetic.write(tmp_path_factory.mktemp("source"), full, Save(world=2)).parent


@pytest.fixture(scope="module")
def uninterrupted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    api.convert(source, out, to="universal")
    return tree(out)


def killed(source: Path, target: Path, after: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(source), str(target), str(after)],
        env=child_env(),
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def staging_of(target: Path) -> Path:
    return target.parent / f".{target.name}.ckpt-tool-staging"


# ---- complete or not at all


class Spy:
    """A meter that looks at the destination whenever bytes are written."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look
        self.calls = 0

    def start(self, total: int) -> None:
        self._look()

    def add(self, count: int) -> None:
        self.calls += 1
        self._look()


def test_nothing_is_under_the_final_name_before_all_is_written(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    seen: set[bool] = set()
    spy = Spy(lambda: seen.add(target.exists()))
    api.convert(source, target, to="universal", how=api.Execution(meter=spy), verify=True)
    assert spy.calls > 10
    assert seen == {False}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_result_holds_no_trace_of_the_staging(source: Path, tmp_path: Path) -> None:
    api.convert(source, tmp_path / "out", to="universal")
    names = [path.name for path in (tmp_path / "out").rglob("*")]
    assert not [name for name in names if "staging" in name or "journal" in name]
    assert MANIFEST in names


def test_parent_directories_are_made(source: Path, tmp_path: Path) -> None:
    api.convert(source, tmp_path / "a" / "b" / "out", to="universal")
    assert (tmp_path / "a" / "b" / "out" / "latest_universal").exists()


def test_an_empty_directory_is_taken(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    api.convert(source, tmp_path / "out", to="universal")
    assert (tmp_path / "out" / "latest_universal").exists()


def test_a_failed_run_leaves_nothing_when_nothing_was_complete(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: object) -> None:
        raise ExecutionError("disk")

    monkeypatch.setattr("ckpt_tool.storage.LocalWriter.write", failing)
    with pytest.raises(ExecutionError):
        api.convert(source, tmp_path / "out", to="universal")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_before_writing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ExecutionError, match=r"1\.0 kB free"):
        api.convert(source, tmp_path / "out", to="universal")
    assert list(tmp_path.iterdir()) == []


# ---- killed, and run again


@pytest.mark.parametrize("after", [1, 12, 40])
def test_a_killed_run_leaves_only_staging_and_the_same_command_completes_it(
    after: int, source: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    target = tmp_path / "out"
    killed(source, target, after)
    assert [path.name for path in tmp_path.iterdir()] == [staging_of(target).name]
    api.convert(source, target, to="universal", how=api.Execution(max_memory=1 << 18))
    assert tree(target) == uninterrupted
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_killed_twice_is_completed(
    source: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    killed(source, tmp_path / "out", 30)
    killed(source, tmp_path / "out", 20)
    api.convert(source, tmp_path / "out", to="universal")
    assert tree(tmp_path / "out") == uninterrupted


def test_what_was_complete_is_not_written_again(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    killed(source, target, 40)
    journal = (staging_of(target) / JOURNAL).read_text().splitlines()
    complete = {json.loads(line)["path"] for line in journal[2:]}
    assert complete, "nothing was complete: kill later"
    before = {path: (staging_of(target) / path).stat().st_ino for path in complete}
    api.convert(source, target, to="universal")
    assert {path: (target / path).stat().st_ino for path in complete} == before


@pytest.mark.parametrize("option", ["to", "source", "groups"])
def test_another_command_refuses_the_staging_of_a_killed_run(
    option: str, source: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    killed(source, target, 30)
    before = tree(staging_of(target))
    runs = {
        "to": lambda: api.convert(
            checkpoint_of("dense_w3"), target, to="hf", config=fixture_config("dense_w3")
        ),
        "groups": lambda: api.convert(source, target, to="universal", keep_groups=True),
        "source": lambda: api.convert(checkpoint_of("mixtral_w2e1"), target, to="universal"),
    }
    with pytest.raises(UsageError, match="another command") as raised:
        runs[option]()
    assert str(staging_of(target)) in str(raised.value)
    assert tree(staging_of(target)) == before


def fixture_config(name: str) -> Path:
    return checkpoint_of(name).parent / "config.json"


def test_a_source_that_changed_meanwhile_is_another_command(tmp_path: Path) -> None:
    full = synthetic.model({"model.a": (9000,), "model.b": (9000,)}, seed=1)
    source = synthetic.write(tmp_path / "source", full, Save(world=1)).parent
    killed(source, tmp_path / "out", 8)
    shutil.rmtree(source)
    synthetic.write(
        source, synthetic.model({"model.a": (9000,), "model.b": (9000,)}, seed=2), Save(world=1)
    )
    with pytest.raises(UsageError, match="another command"):
        api.convert(source, tmp_path / "out", to="universal")


@pytest.mark.parametrize("damage", ["empty journal", "torn first line", "torn last line"])
def test_a_damaged_journal_does_not_block_the_same_command(
    damage: str, source: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    target = tmp_path / "out"
    killed(source, target, 40)
    journal = staging_of(target) / JOURNAL
    data = journal.read_bytes()
    cut = {"empty journal": 0, "torn first line": 20, "torn last line": len(data) - 7}[damage]
    journal.write_bytes(data[:cut])
    api.convert(source, target, to="universal")
    assert tree(target) == uninterrupted


def test_a_directory_in_the_way_that_no_run_left_is_not_touched(source: Path, tmp_path: Path) -> None:
    staging = staging_of(tmp_path / "out")
    staging.mkdir()
    (staging / "precious").write_text("x")
    with pytest.raises(UsageError, match="in the way"):
        api.convert(source, tmp_path / "out", to="universal")
    assert tree(staging) == {"precious": b"x"}


def test_a_symlink_in_the_way_is_not_followed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "precious").write_text("x")
    staging_of(tmp_path / "out").symlink_to(tmp_path / "real")
    with pytest.raises(UsageError, match="in the way"):
        api.convert(source, tmp_path / "out", to="universal")
    assert tree(tmp_path / "real") == {"precious": b"x"}


def test_a_source_that_changes_while_it_is_read_is_not_published(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    touched = next(copy.rglob("*optim_states.pt"))
    spy = Spy(lambda: os.utime(touched))
    with pytest.raises(ExecutionError, match="changed while it was read"):
        api.convert(copy, tmp_path / "out", to="universal", how=api.Execution(meter=spy))
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_written_to_with_its_old_time_is_not_published(
    source: Path, tmp_path: Path
) -> None:
    """As rsync and cp do that keep times."""
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    touched = next(copy.rglob("*optim_states.pt"))
    before = touched.stat()

    def rewrite() -> None:
        with touched.open("r+b") as file:
            file.write(b"PK")
        os.utime(touched, ns=(before.st_atime_ns, before.st_mtime_ns))

    with pytest.raises(ExecutionError, match="changed while it was read"):
        api.convert(copy, tmp_path / "out", to="universal", how=api.Execution(meter=Spy(rewrite)))
    assert not (tmp_path / "out").exists()


def test_a_hard_link_to_a_source_file_is_no_change_of_it(source: Path, tmp_path: Path) -> None:
    """Snapshots are made so."""
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    linked = next(copy.rglob("*optim_states.pt"))

    def link() -> None:
        if not (tmp_path / "link").exists():
            (tmp_path / "link").hardlink_to(linked)

    api.convert(copy, tmp_path / "out", to="universal", how=api.Execution(meter=Spy(link)))
    assert (tmp_path / "link").exists()


def test_a_source_that_changes_while_it_is_planned_with_is_not_published(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    original = api.open_checkpoint

    def opened(path: Path) -> object:
        found = original(path)
        os.utime(next(copy.rglob("*optim_states.pt")))
        return found

    monkeypatch.setattr(api, "open_checkpoint", opened)
    with pytest.raises(ExecutionError, match="changed while it was read"):
        api.convert(copy, tmp_path / "out", to="universal")
    assert not (tmp_path / "out").exists()


def test_a_lock_on_a_journal_that_was_published_is_not_taken_for_the_directorys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the journal and locking it another run has published, and a third has begun."""
    first = staged(tmp_path / "out")
    original, calls = local_area.fcntl.flock, []

    def flock(descriptor: int, operation: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            first.publish()
            first.close()
            shutil.rmtree(tmp_path / "out")
            (tmp_path / ".out.ckpt-tool-staging").mkdir()
        original(descriptor, operation)

    monkeypatch.setattr(local_area.fcntl, "flock", flock)
    second = staged(tmp_path / "out")
    assert len(calls) == 2
    assert os.path.samestat(os.fstat(area_of(second)._journal), (area_of(second).path / JOURNAL).stat())
    second.close()


@pytest.mark.parametrize("when", ["identity", "file", "manifest"])
def test_a_disk_that_is_full_for_our_own_records_is_told_as_such(
    when: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    original = os.write

    def write(descriptor: int, data: bytes) -> int:
        if (b'"parameters"' in data) == (when == "identity"):
            raise full
        return original(descriptor, data)

    def write_bytes(path: Path, data: bytes) -> int:
        raise full

    with monkeypatch.context() as patch:
        if when == "manifest":
            patch.setattr(Path, "write_bytes", write_bytes)
        else:
            patch.setattr(os, "write", write)
        with pytest.raises(ExecutionError, match="the disk is full"):
            api.convert(source, tmp_path / "out", to="universal")
    assert not (tmp_path / "out").exists()
    api.convert(source, tmp_path / "out", to="universal", verify=True)


def test_a_second_run_never_takes_over_a_run_that_publishes(source: Path, tmp_path: Path) -> None:
    """The lock is held until the directory has its final name."""
    staging = commit.Staging(tmp_path / "out", {"parameters": {}}, overwrite=False, fsync=False)
    seen: list[bool] = []

    def walk(*args: object, **how: object) -> object:
        with pytest.raises(UsageError, match="in use"):
            commit.Staging(tmp_path / "out", {"parameters": {}}, overwrite=False, fsync=False)
        seen.append(True)
        return iter(())

    staging.done["x"] = WrittenFile("x", 0, ())
    area_of(staging)._how = area_of(staging)._how._replace(fsync=True)
    original, local_area.os.walk = os.walk, walk  # type: ignore[assignment]
    try:
        staging.publish()
    finally:
        local_area.os.walk = original
        staging.close()
    assert seen
    assert (tmp_path / "out").is_dir()


def test_a_file_damaged_in_size_after_the_kill_is_written_again(
    source: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    target = tmp_path / "out"
    killed(source, target, 40)
    journal = (staging_of(target) / JOURNAL).read_text().splitlines()
    os.truncate(staging_of(target) / json.loads(journal[2])["path"], 10)
    api.convert(source, target, to="universal")
    assert tree(target) == uninterrupted


@pytest.fixture
def unpublished(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A target of which every file is complete, killed before it got its name."""

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ckpt_tool.stores.local_area.LocalArea.publish", die)
        with pytest.raises(KeyboardInterrupt):
            api.convert(source, tmp_path / "out", to="universal")
    return tmp_path / "out"


@pytest.mark.parametrize("name", ["latest_universal", "fp32.pt", "mp_rank_00_model_states.pt"])
def test_a_byte_of_a_complete_file_flipped_after_the_kill_is_written_again(
    name: str, source: Path, uninterrupted: dict[str, bytes], unpublished: Path
) -> None:
    staged = sorted(staging_of(unpublished).rglob(name))
    before = {path: path.stat() for path in staged}
    for path in staged:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(before[path].st_atime_ns, before[path].st_mtime_ns))
    assert staged
    api.convert(source, unpublished, to="universal")
    assert tree(unpublished) == uninterrupted


def test_a_complete_file_replaced_by_another_of_its_size_after_the_kill_is_written_again(
    source: Path, uninterrupted: dict[str, bytes], unpublished: Path
) -> None:
    staged = sorted(staging_of(unpublished).rglob("exp_avg.pt"))
    sizes = {path.stat().st_size: path for path in staged}
    one, other = next((a, sizes[a.stat().st_size]) for a in staged if sizes[a.stat().st_size] != a)
    shutil.copyfile(other, one)
    api.convert(source, unpublished, to="universal")
    assert tree(unpublished) == uninterrupted


def test_a_garbled_line_of_the_journal_after_the_kill(
    source: Path, uninterrupted: dict[str, bytes], unpublished: Path
) -> None:
    """A line behind it may have said that a file is to be written again."""
    journal = staging_of(unpublished) / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[len(lines) // 2] = b"{]\n"
    journal.write_bytes(b"".join(lines))
    next(staging_of(unpublished).rglob("fp32.pt")).write_bytes(b"")
    api.convert(source, unpublished, to="universal")
    assert tree(unpublished) == uninterrupted


# ---- two at once


def test_a_concurrent_second_run_refuses(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    refused: list[str] = []

    def second() -> None:
        if not refused:
            refused.append("")
            with pytest.raises(UsageError, match="in use") as raised:
                api.convert(source, target, to="universal")
            refused[0] = str(raised.value)

    api.convert(source, target, to="universal", how=api.Execution(meter=Spy(second), workers=1))
    assert str(staging_of(target)) in refused[0]
    assert api.verify(target).passed


def test_a_concurrent_run_of_another_process_refuses(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    other: list[int] = []

    def second() -> None:
        if not other:
            other.append(0)
            other[0] = run_cli("convert", source, target, "--to", "universal").rc

    api.convert(source, target, to="universal", how=api.Execution(meter=Spy(second), workers=1))
    assert other == [2]


def test_a_destination_that_appears_meanwhile_is_not_replaced(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"

    def appear() -> None:
        target.mkdir(exist_ok=True)
        (target / "precious").write_text("x")

    with pytest.raises(UsageError, match="out"):
        api.convert(source, target, to="universal", how=api.Execution(meter=Spy(appear)))
    assert (target / "precious").read_text() == "x"


# ---- overwriting


def old_result(target: Path) -> None:
    """A directory that ckpt-tool wrote, as far as its manifest tells."""
    target.mkdir()
    (target / "old").write_text("x")
    files = [{"path": "old", "size": 1, "extents": []}]
    (target / MANIFEST).write_text(json.dumps({"manifest_version": 1, "files": files}))


def test_overwrite_replaces_all_of_the_old(
    source: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    target = tmp_path / "out"
    old_result(target)
    api.convert(source, target, to="universal", how=api.Execution(overwrite=True))
    assert tree(target) == uninterrupted
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_leaves_the_old_until_the_new_is_complete(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    old_result(target)
    seen: set[bool] = set()
    spy = Spy(lambda: seen.add((target / "old").exists()))
    api.convert(source, target, to="universal", how=api.Execution(overwrite=True, meter=spy), verify=True)
    assert seen == {True}


def test_a_failed_overwrite_keeps_the_old(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    old_result(target)

    def failing(*args: object) -> None:
        raise ExecutionError("disk")

    monkeypatch.setattr("ckpt_tool.storage.LocalWriter.write", failing)
    with pytest.raises(ExecutionError):
        api.convert(source, target, to="universal", how=api.Execution(overwrite=True))
    assert tree(target).keys() == {"old", MANIFEST}


def test_overwrite_replaces_no_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(UsageError, match="not a directory"):
        api.convert(source, tmp_path / "out", to="universal", how=api.Execution(overwrite=True))
    assert (tmp_path / "out").read_text() == "x"


def test_overwrite_replaces_no_directory_of_other_things(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="no checkpoint"):
        api.convert(source, tmp_path / "out", to="universal", how=api.Execution(overwrite=True))
    assert tree(tmp_path / "out") == {"thesis.tex": b"x"}


# ---- the manifest


def test_the_manifest_covers_every_byte_of_every_file(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    api.convert(source, target, to="universal")
    manifest = read_manifest(target)
    assert manifest is not None
    sizes = {str(p.relative_to(target)): p.stat().st_size for p in target.rglob("*") if p.is_file()}
    del sizes[MANIFEST]
    assert {file.path: file.size for file in manifest.files} == sizes
    for file in manifest.files:
        position = 0
        for extent in sorted(file.extents):
            assert extent.offset == position, file.path
            position += extent.length
        assert position == file.size


def test_the_same_input_gives_the_same_bytes_everywhere(
    source: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    elsewhere = tmp_path / "moved" / source.name
    shutil.copytree(source, elsewhere)
    time.sleep(0.01)
    how = api.Execution(max_memory=1 << 17, workers=1, fsync=False)
    api.convert(elsewhere, tmp_path / "deep" / "other-name", to="universal", how=how)
    assert tree(tmp_path / "deep" / "other-name") == uninterrupted


def test_the_manifest_names_tool_source_and_parameters(source: Path, tmp_path: Path) -> None:
    api.convert(source, tmp_path / "out", to="universal", keep_groups=True)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["tool"].startswith("ckpt-tool ")
    assert manifest["source"]["format"] == "deepspeed-zero3"
    assert manifest["source"]["step"] == 2
    assert manifest["parameters"]["to"] == "universal"
    assert manifest["parameters"]["keep_groups"] is True


FLIPPED = ["a tensor", "a pickle", "a zip directory", "the tag file", "the first byte"]


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out"
    api.convert(source, out, to="universal")
    return out


@pytest.mark.parametrize("what", FLIPPED)
def test_verify_finds_a_flipped_byte_and_names_the_file(what: str, converted: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    shutil.copytree(converted, target)
    name = "global_step2_universal/zero/model.embed_tokens.weight/exp_avg.pt"
    if what == "the tag file":
        name = "latest_universal"
    path = target / name
    size = path.stat().st_size
    at = {"a tensor": size // 2, "a pickle": 150, "a zip directory": size - 60}.get(what, 0)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    if what == "the tag file":
        data = bytearray(path.read_bytes()) + b"\n"  # still names the directory
    path.write_bytes(data)
    if what == "a tensor":
        done = run_cli("verify", target)
        assert done.rc == 1, done.stdout + done.stderr
        assert Path(name).name in done.stdout
        return
    try:
        said = [difference.message for difference in api.verify(target).differences]
    except UnreadableError as error:  # so damaged that it cannot be read
        said = [str(error)] if what != "the tag file" else []
    assert any(Path(name).name in message for message in said), said


def test_verify_finds_a_missing_and_a_short_file(converted: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    shutil.copytree(converted, target)
    model = target / "global_step2_universal" / "mp_rank_00_model_states.pt"
    model.unlink()
    verdict = api.verify(target)
    assert any("mp_rank_00_model_states.pt" in difference.message for difference in verdict.differences)
    os.truncate(target / "latest_universal", 10)
    with pytest.raises(UnreadableError, match="latest_universal"):
        api.verify(target)


def test_verify_finds_a_file_that_was_added(converted: Path, tmp_path: Path) -> None:
    """A parameter nobody wrote would be loaded by the engine."""
    target = tmp_path / "out"
    shutil.copytree(converted, target)
    zero = target / "global_step2_universal" / "zero"
    shutil.copytree(zero / "model.embed_tokens.weight", zero / "model.added.weight")
    verdict = api.verify(target)
    assert any("model.added.weight" in difference.message for difference in verdict.differences)


def test_verify_says_which_files_it_has_no_checksums_of(converted: Path, tmp_path: Path) -> None:
    """A config.json is to be put beside a checkpoint; no engine takes it for a part of it."""
    target = tmp_path / "out"
    shutil.copytree(converted, target)
    (target / "config.json").write_text("{}")
    verdict = api.verify(target)
    assert verdict.passed
    assert "Added after the manifest was written, and not checked: config.json." in verdict.notes


def test_verify_accepts_what_was_converted(converted: Path) -> None:
    verdict = api.verify(converted)
    assert verdict.passed
    assert verdict.bytes_compared > sum(path.stat().st_size for path in converted.rglob("*.pt")) * 0.9


MANIFESTS = {
    "not JSON": "{",
    "another version": '{"manifest_version": 99, "files": []}',
    "no files": '{"manifest_version": 1}',
    "no version": '{"files": []}',
    "not an object": "[]",
    "files of numbers": '{"manifest_version": 1, "files": [3]}',
    "a size that is none": '{"manifest_version": 1, "files": [{"path": "a", "size": -1, "extents": []}]}',
    "a path that is none": '{"manifest_version": 1, "files": [{"path": 3, "size": 1, "extents": []}]}',
    "an extent at no number": '{"manifest_version": 1, "files": '
    '[{"path": "a", "size": 1, "extents": [["0", 1, "x"]]}]}',
    "a checksum that is none": '{"manifest_version": 1, "files": '
    '[{"path": "a", "size": 1, "extents": [[0, 1, 2]]}]}',
    "nested beyond reason": '{"manifest_version": 1, "files": ' + "[" * 100_000,
    "extents of numbers": '{"manifest_version": 1, "files": [{"path": "a", "size": 1, "extents": [3]}]}',
}


@pytest.mark.parametrize("text", MANIFESTS.values(), ids=MANIFESTS)
def test_a_damaged_manifest_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(UnreadableError, match=MANIFEST):
        read_manifest(tmp_path)


def test_no_manifest_is_none(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None


# ---- the staging directory itself


def area_of(staging: Staging) -> LocalArea:
    """The directory of a result that is prepared on the local file system."""
    assert isinstance(staging.area, LocalArea)
    return staging.area


def staged(target: Path, **identity: str) -> Staging:
    return Staging(target, {"parameters": {"to": "x"}, **identity}, overwrite=False, fsync=False)


def test_staging_remembers_complete_files_only(tmp_path: Path) -> None:
    staging = staged(tmp_path / "out")
    for name in ("complete", "half"):
        (area_of(staging).path / name).write_text(name)
    staging.add(WrittenFile("complete", 8, (WrittenExtent(0, 8, "x", 1),)))
    os.close(area_of(staging)._journal)  # killed
    again = staged(tmp_path / "out")
    assert list(again.done) == ["complete"]
    assert not (area_of(again).path / "half").exists()
    again.close()


def test_a_line_that_a_kill_cut_off_does_not_hide_those_after_it(tmp_path: Path) -> None:
    staging = staged(tmp_path / "out")
    os.close(area_of(staging)._journal)
    with (area_of(staging).path / JOURNAL).open("a") as journal:
        journal.write('{"path": "torn", "si')
    again = staged(tmp_path / "out")
    (area_of(again).path / "complete").write_text("complete")
    again.add(WrittenFile("complete", 8, (WrittenExtent(0, 8, "x", 1),)))
    os.close(area_of(again)._journal)
    last = staged(tmp_path / "out")
    assert list(last.done) == ["complete"]
    last.close()


def test_a_file_that_an_earlier_release_completed_is_written_again(tmp_path: Path) -> None:
    """Before manifests of version 3 the journal kept no CRC-32 of extents."""
    staging = staged(tmp_path / "out")
    (area_of(staging).path / "complete").write_text("complete")
    staging.add(WrittenFile("complete", 8, ((0, 8, "x"),)))  # type: ignore[arg-type]
    os.close(area_of(staging)._journal)
    again = staged(tmp_path / "out")
    assert again.done == {}
    assert not (area_of(again).path / "complete").exists()
    again.close()


ODD_LINES = {
    "a number": "3",
    "a list": '["path"]',
    "null": "null",
    "no path": '{"size": 1, "extents": []}',
    "a size of text": '{"path": "complete", "size": "8", "extents": []}',
    "extents of numbers": '{"path": "complete", "size": 8, "extents": [3]}',
    "a path that leads out": '{"path": "../precious", "size": 8, "extents": []}',
    "a path from the root": '{"path": "/etc/hostname", "size": 8, "extents": []}',
    "discarded numbers": '{"discarded": 3}',
    "discarded lists": '{"discarded": [[]]}',
    "nested beyond reason": '{"run": ' + "[" * 100_000 + "]" * 100_000 + "}",
}


@pytest.mark.parametrize("line", ODD_LINES.values(), ids=ODD_LINES)
def test_a_line_of_the_journal_that_makes_no_sense(line: str, tmp_path: Path) -> None:
    """Nothing outside is touched, and what may be true of the files inside is not relied upon."""
    (tmp_path / "precious").write_text("12345678")
    staging = staged(tmp_path / "out")
    os.close(area_of(staging)._journal)
    with suppress(ValueError, TypeError, RecursionError):  # some are no entry that could have a checksum
        line = journal_line(json.loads(line)).decode().rstrip()
    with (area_of(staging).path / JOURNAL).open("a") as journal:
        journal.write(line + "\n")
    again = staged(tmp_path / "out")
    assert again.done == {}
    again.begin({}, list)
    again.close()
    assert (tmp_path / "precious").read_text() == "12345678"


@pytest.mark.parametrize("identity", ["3", "[]", '{"parameters": 3}', "null"])
def test_a_journal_of_no_command(identity: str, tmp_path: Path) -> None:
    staging = staged(tmp_path / "out")
    os.close(area_of(staging)._journal)
    (area_of(staging).path / JOURNAL).write_text(identity + "\n")
    with pytest.raises(UsageError, match="left by another command"):
        staged(tmp_path / "out")


def test_a_symlink_in_a_staging_directory_is_no_complete_file(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("12345678")
    staging = staged(tmp_path / "out")
    (area_of(staging).path / "a").symlink_to(tmp_path / "precious")
    staging.add(WrittenFile("a", 8, (WrittenExtent(0, 8, "x", 1),)))
    os.close(area_of(staging)._journal)
    again = staged(tmp_path / "out")
    assert again.done == {}
    assert not os.path.lexists(area_of(again).path / "a")
    assert (tmp_path / "precious").read_text() == "12345678"
    again.close()


def test_staging_is_removed_where_it_holds_nothing(tmp_path: Path) -> None:
    staged(tmp_path / "out").close()
    assert list(tmp_path.iterdir()) == []
