"""Ordinary faults of a machine and its user: one sentence with the file and the remedy, a documented exit
code, and no traceback."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt_tool import api, storage
from ckpt_tool.errors import CkptToolError, ExecutionError, UnreadableError
from ckpt_tool.manifest import JOURNAL, MANIFEST
from ckpt_tool.storage import LocalReader
from ckpt_tool.stores import local_area
from ckpt_tool.system_errors import told
from tests.conftest import Finished, checkpoint_of, child_env, config_of, copy_fixture, tree
from tests.faults.forked import as_an_ordinary_user, forked, tool

pytestmark = pytest.mark.slow

MIXTRAL = checkpoint_of("mixtral_w4e2")
REFUSED = {1, 2, 3, 4}  # of the documented exit codes


@pytest.fixture(scope="module", autouse=True)
def _imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the tool imports late is imported before any test takes rights or file descriptors away."""
    api.convert(MIXTRAL, tmp_path_factory.mktemp("imported") / "out", to="universal", verify=True)


def is_one_sentence(done: Finished, *, codes: set[int] = REFUSED, says: str, file: str | Path) -> None:
    assert done.rc in codes, done
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("ckpt-tool: "), done.stderr
    assert says in lines[-1]
    assert str(file) in lines[-1]
    assert "Traceback" not in done.stderr
    assert "bug" not in done.stderr
    assert lines[-1].endswith(".")


# ---- rights


def without_rights(path: Path, *arguments: str | os.PathLike[str]) -> Finished:
    """The program with these arguments, run by a user who may not touch ``path``."""
    before = path.stat().st_mode
    path.chmod(0)
    try:
        return forked(as_an_ordinary_user(tool(*arguments)))
    finally:
        path.chmod(before)


VERBS = ("inspect", "verify", "doctor", "convert", "reshard", "consolidate")


def of_all_commands(verb: str, out: Path) -> list[str | os.PathLike[str]]:
    """What a command needs behind its source."""
    return {
        "convert": [out, "--to", "universal"],
        "reshard": [out, "--world", "1", "--ep", "1"],
        "consolidate": [out, "--config", config_of("mixtral_w4e2")],
    }.get(verb, [])


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("what", ["file", "directory", "parent"])
def test_a_source_that_may_not_be_read(verb: str, what: str, tmp_path: Path) -> None:
    tag = copy_fixture("mixtral_w2e1", tmp_path / "home")
    closed = {
        "file": tag / "zero_pp_rank_0_mp_rank_00_model_states.pt", "directory": tag, "parent": tag.parent,
    }[what]  # fmt: skip
    done = without_rights(closed, verb, tag, *of_all_commands(verb, tmp_path / "out"))
    is_one_sentence(done, codes={3}, says="Permission denied", file=closed)
    assert "Change the rights" in done.stderr
    assert done.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_config_that_may_not_be_read(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    shutil.copy(config_of("mixtral_w4e2"), config)
    done = without_rights(config, "convert", MIXTRAL, tmp_path / "out", "--to", "hf", "--config", config)
    is_one_sentence(done, codes={3}, says="Permission denied", file=config)


def test_a_tag_file_that_may_not_be_read(tmp_path: Path) -> None:
    latest = copy_fixture("mixtral_w2e1", tmp_path).parent / "latest"
    is_one_sentence(
        without_rights(latest, "inspect", latest.parent), codes={3}, says="Permission denied", file=latest
    )


@pytest.mark.parametrize("mode", [0o000, 0o555])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_parent_that_may_not_be_written_to(mode: int, overwrite: bool, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()
    parent.chmod(mode)
    options = ["--to", "universal", *(["--overwrite"] if overwrite else [])]
    try:
        done = forked(as_an_ordinary_user(tool("convert", MIXTRAL, parent / "out", *options)))
    finally:
        parent.chmod(0o755)
    is_one_sentence(done, codes={2}, says="Permission denied", file=parent)
    assert list(parent.iterdir()) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_target_that_may_not_be_looked_into(overwrite: bool, tmp_path: Path) -> None:
    api.convert(MIXTRAL, tmp_path / "out", to="universal")
    before = tree(tmp_path / "out")
    options = ["--to", "universal", *(["--overwrite"] if overwrite else [])]
    done = without_rights(tmp_path / "out", "convert", MIXTRAL, tmp_path / "out", *options)
    is_one_sentence(done, codes={2, 3}, says="Permission denied", file=tmp_path / "out")
    assert tree(tmp_path / "out") == before


def test_a_staging_directory_of_another_user(tmp_path: Path) -> None:
    staging = tmp_path / ".out.ckpt-tool-staging"
    staging.mkdir()
    (staging / JOURNAL).touch()
    done = without_rights(staging / JOURNAL, "convert", MIXTRAL, tmp_path / "out", "--to", "universal")
    is_one_sentence(done, codes={2}, says="Permission denied", file=staging / JOURNAL)
    done = without_rights(staging, "convert", MIXTRAL, tmp_path / "out", "--to", "universal")
    is_one_sentence(done, codes={2}, says="Permission denied", file=staging)


# ---- what is printed


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["inspect", MIXTRAL], ["verify", MIXTRAL, MIXTRAL], ["doctor", MIXTRAL, "--json"]],
    ids=str,
)
def test_a_full_disk_under_the_output(arguments: list[str]) -> None:
    done = forked(tool(*arguments), stdout="/dev/full")
    is_one_sentence(done, codes={4}, says="No space left on device", file="standard output")
    assert len(done.stderr.splitlines()) == 1


def test_a_full_disk_under_the_report_of_a_conversion_says_that_the_result_is_there(tmp_path: Path) -> None:
    arguments = ["convert", MIXTRAL, tmp_path / "out", "--to", "universal"]
    done = forked(tool(*arguments), stdout="/dev/full")
    is_one_sentence(done, codes={4}, says="No space left on device", file="standard output")
    assert f"{tmp_path / 'out'} is complete" in done.stderr
    assert api.verify(tmp_path / "out").passed


def in_shell(redirected: str, *arguments: str | os.PathLike[str], **variables: str) -> Finished:
    """The program with streams redirected by a shell, and environment variables."""
    done = subprocess.run(
        ["bash", "-c", f'exec "$@" {redirected}', "-", sys.executable, "-m", "ckpt_tool", *arguments],
        capture_output=True,
        text=True,
        env=child_env() | variables,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def test_a_closed_output_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    done = in_shell(">&-", "convert", MIXTRAL, tmp_path / "out", "--to", "universal")
    is_one_sentence(done, codes={2}, says="is closed", file="standard output")
    assert list(tmp_path.iterdir()) == []


def test_with_streams_closed_no_file_of_the_result_gets_their_numbers(tmp_path: Path) -> None:
    done = in_shell("<&- 2>&-", "convert", MIXTRAL, tmp_path / "out", "--to", "universal")
    assert (done.rc, done.stderr) == (0, "")
    assert api.verify(tmp_path / "out").passed


def test_a_full_disk_under_progress_and_notes_stops_nothing(tmp_path: Path) -> None:
    done = in_shell("2>/dev/full", "convert", MIXTRAL, tmp_path / "out", "--to", "universal")
    assert done.rc == 0
    assert "Done" in done.stdout


# ---- names

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}


def test_a_name_that_the_locale_cannot_express(tmp_path: Path) -> None:
    """In the source's path, its tag and the target's path; and no byte depends on the locale."""
    source = copy_fixture("mixtral_w2e1", tmp_path).parent.rename(tmp_path / "straße")
    (source / "global_step2").rename(source / "schritt-ä")
    (source / "latest").write_text("schritt-ä", encoding="utf-8")
    shutil.copy(config_of("mixtral_w2e1"), source / "schritt-ä")
    config = source / "schritt-ä" / "config.json"
    config.write_text(config.read_text().replace("{", '{"author": "Ä",', 1), encoding="utf-8")
    done = in_shell("", "convert", source, tmp_path / "größe", "--to", "universal", **ASCII)
    assert done.rc == 0, done
    assert "gr\\udcc3" in done.stdout
    api.convert(source, tmp_path / "same", to="universal")
    assert tree(tmp_path / "größe") == tree(tmp_path / "same")
    done = in_shell("", "inspect", tmp_path / "nirgends-ö", **ASCII)
    is_one_sentence(done, codes={3}, says="does not exist", file="nirgends-")


def test_a_parameter_whose_name_no_file_can_have_in_this_locale() -> None:
    with pytest.raises(CkptToolError, match=r"LC_ALL=C\.UTF-8"), told():
        "ä".encode("ascii")


@pytest.mark.parametrize("length", [240, 300])
def test_a_name_that_is_too_long(length: int, tmp_path: Path) -> None:
    """At 240 characters the staging directory's is."""
    name = "n" * length
    done = forked(tool("convert", MIXTRAL, tmp_path / name, "--to", "universal"))
    is_one_sentence(done, codes={2}, says="File name too long. Choose a shorter name.", file=name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", VERBS)
def test_a_source_whose_name_is_too_long(verb: str, tmp_path: Path) -> None:
    done = forked(tool(verb, tmp_path / ("n" * 300), *of_all_commands(verb, tmp_path / "out")))
    is_one_sentence(done, codes={3}, says="File name too long", file="n" * 300)


def test_links_that_lead_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    is_one_sentence(forked(tool("inspect", tmp_path / "a")), codes={3}, says="circle", file=tmp_path / "a")
    done = forked(tool("convert", MIXTRAL, tmp_path / "a" / "out", "--to", "universal"))
    is_one_sentence(done, codes={2}, says="circle", file=tmp_path / "a")


def test_a_target_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = forked(tool("convert", MIXTRAL, tmp_path / "file" / "out", "--to", "universal"))
    is_one_sentence(done, codes={2}, says="Not a directory", file=tmp_path / "file")


# ---- limits


@pytest.mark.parametrize("verb", VERBS)
def test_few_file_descriptors_are_enough(verb: str, tmp_path: Path) -> None:
    command = ["bash", "-c", 'ulimit -n 20; exec "$@"', "-", sys.executable, "-m", "ckpt_tool"]
    arguments = [verb, MIXTRAL, *of_all_commands(verb, tmp_path / "out")]
    verify = [] if verb in ("inspect", "verify", "doctor") else ["--verify"]
    done = subprocess.run([*command, *arguments, *verify], capture_output=True, text=True, env=child_env())
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_a_read_only_file_system(verb: str, tmp_path: Path) -> None:
    """A source on one is read; a target there is refused before anything is done."""
    place = shutil.copytree(MIXTRAL.parent, tmp_path / "place")
    source, extra = place / MIXTRAL.name, of_all_commands(verb, place / "out")
    command = ["unshare", "--mount", "sh", "-c", 'mount --bind -o ro "$0" "$0" && exec "$@"', place]
    if subprocess.run([*command, "true"], capture_output=True).returncode != 0:
        command = ["env"]  # no rights to mount: what is promised of a writable one then
    arguments = [*command, sys.executable, "-m", "ckpt_tool", verb, source, *extra]
    done = subprocess.run(arguments, capture_output=True, text=True, env=child_env())
    if extra and command != ["env"]:
        finished = Finished(done.returncode, done.stdout, done.stderr)
        is_one_sentence(finished, codes={2}, says="Read-only file system", file=place)
    else:
        assert done.returncode == 0, done.stderr


@pytest.fixture
def many(tmp_path: Path) -> Iterator[Path]:
    for number in range(200):
        (tmp_path / str(number)).write_text(str(number))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield tmp_path
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def in_use() -> int:
    """The number that the next file gets; those below it are in use."""
    found = os.open(os.devnull, os.O_RDONLY)
    os.close(found)
    return found


def test_a_reader_keeps_fewer_files_open_where_fewer_may_be(many: Path) -> None:
    for allowed in (400, 4000):
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        before = len(os.listdir("/proc/self/fd"))
        reader = LocalReader(many)
        assert [reader.read(str(number), 0, 1) for number in range(200)]
        assert len(os.listdir("/proc/self/fd")) - before == min(128, allowed // 8)
        reader.close()


def test_a_reader_gives_files_back_where_no_more_can_be_opened(many: Path) -> None:
    """Others in the process may have taken what its limit promised."""
    reader = LocalReader(many)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use() + 3, hard))
    assert [int(reader.read(str(number), 0, 1)) for number in range(10)] == list(range(10))
    reader.close()


def test_no_file_descriptor_is_left_at_all(many: Path) -> None:
    reader = LocalReader(many)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use(), hard))
    with pytest.raises(ExecutionError, match=r"0 cannot be read: Too many open files\. .*ulimit -n"):
        reader.read("0", 0, 1)
    with pytest.raises(ExecutionError, match=r"ulimit -n"):
        reader.list()


def test_no_thread_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", start)
    with pytest.raises(ExecutionError, match="ulimit -u"):
        api.convert(MIXTRAL, tmp_path / "out", to="universal")
    assert list(tmp_path.iterdir()) == []


def test_no_memory_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(self: object, *args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(storage.LocalWriter, "write", write)
    with pytest.raises(ExecutionError, match="--max-memory"):
        api.convert(MIXTRAL, tmp_path / "out", to="universal")
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Lustre is mounted on some clusters."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(local_area.fcntl, "flock", flock)
    with pytest.raises(ExecutionError, match="choose a destination on another"):
        api.convert(MIXTRAL, tmp_path / "out", to="universal")


def test_a_file_system_that_cannot_sync_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", fsync)
    api.convert(MIXTRAL, tmp_path / "out", to="universal")
    assert api.verify(tmp_path / "out").passed


def test_an_unreadable_file_is_told_of_by_verify_as_well(tmp_path: Path) -> None:
    api.convert(MIXTRAL, tmp_path / "out", to="universal")
    done = without_rights(tmp_path / "out" / MANIFEST, "verify", tmp_path / "out")
    is_one_sentence(done, codes={3}, says="Permission denied", file=MANIFEST)


# ---- signals

CONVERT = ["--to", "universal", "--no-fsync"]


def signalled(number: int, where: str, *arguments: str | os.PathLike[str]) -> Finished:
    """The program, with a signal sent to it when it first comes to ``where``."""

    def call() -> int:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        module, _, name = where.rpartition(".")
        owner = {"writer": storage.LocalWriter, "area": local_area, "os": os}[module]
        original = getattr(owner, name)

        def interrupting(*args: object, **named: object) -> object:
            setattr(owner, name, original)
            os.kill(os.getpid(), number)
            return original(*args, **named)

        setattr(owner, name, interrupting)
        return tool(*arguments)()

    return forked(call)


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_while_writing_publishes_nothing(
    number: int, code: int, word: str, tmp_path: Path
) -> None:
    arguments = ["convert", MIXTRAL, tmp_path / "out", *CONVERT]
    done = signalled(number, "writer.finish", *arguments)
    assert (done.rc, done.stdout) == (code, "")
    assert done.stderr == (
        f"ckpt-tool: nothing was published, and the same command goes on from here\nckpt-tool: {word}\n"
    )
    assert not (tmp_path / "out").exists()
    assert forked(tool(*arguments)).rc == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_signal_after_publication_says_that_the_result_is_there(
    number: int, overwrite: bool, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    if overwrite:
        api.convert(checkpoint_of("dense_w3"), target, to="universal")
    options = ["--overwrite"] if overwrite else []
    arguments = ["convert", MIXTRAL, target, *CONVERT, *options]
    done = signalled(number, "area.tidy", *arguments)
    assert done.rc == 128 + number
    assert f"ckpt-tool: {target} is complete\n" in done.stderr
    assert "nothing was published" not in done.stderr
    again = forked(tool(*arguments))
    assert again.rc == 0, again
    assert "was there already" in again.stderr
    api.convert(MIXTRAL, tmp_path / "whole", to="universal")
    assert tree(target) == tree(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_signal_between_the_two_renames_gives_the_old_its_name_back(tmp_path: Path) -> None:
    target = tmp_path / "out"
    api.convert(checkpoint_of("dense_w3"), target, to="universal")
    before = tree(target)
    renames: list[object] = []

    def call() -> int:
        original = os.rename

        def rename(*args: object) -> None:
            original(*args)  # type: ignore[arg-type]
            renames.append(args)
            if len(renames) == 1:
                raise KeyboardInterrupt

        os.rename = rename  # type: ignore[assignment]
        return tool("convert", MIXTRAL, target, "--to", "universal", "--overwrite")()

    done = forked(call)
    assert done.rc == 130
    assert "nothing was published" in done.stderr
    assert tree(target) == before
    assert forked(tool("convert", MIXTRAL, target, "--to", "universal", "--overwrite")).rc == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert api.verify(target).passed


# ---- the same command again


def test_a_finished_result_is_recognised_and_not_written_again(tmp_path: Path) -> None:
    target = tmp_path / "out"
    api.convert(MIXTRAL, target, to="universal")
    before = {path: path.stat().st_ino for path in target.rglob("*")}
    result = api.convert(MIXTRAL, target, to="universal", verify=True)
    assert "was there already" in result.notes[-1]
    assert result.verdict is not None
    assert result.verdict.passed
    assert {path: path.stat().st_ino for path in target.rglob("*")} == before


@pytest.mark.parametrize("what", ["the source", "the result", "the command"])
def test_a_result_is_not_taken_for_one_that_it_is_not(what: str, tmp_path: Path) -> None:
    """The identity of a safetensors source knows its headers: another revision has the same."""
    source, target = tmp_path / "source", tmp_path / "out"
    api.consolidate(MIXTRAL, source, config=config_of("mixtral_w4e2"))
    (source / MANIFEST).unlink()
    api.convert(source, target, to="dcp")
    changed = next(source.glob("*.safetensors")) if what == "the source" else next(target.glob("*.distcp"))
    if what != "the command":
        data = bytearray(changed.read_bytes())
        data[len(data) // 2] ^= 1
        changed.write_bytes(data)
    before = tree(target)
    with pytest.raises(CkptToolError, match="exists"):
        api.convert(source, target, to="dcp", world=2 if what == "the command" else None)
    assert tree(target) == before


def test_an_overwriting_command_writes_a_finished_result_again(tmp_path: Path) -> None:
    target = tmp_path / "out"
    api.convert(MIXTRAL, target, to="universal")
    before = target.stat().st_ino
    api.convert(MIXTRAL, target, to="universal", how=api.Execution(overwrite=True))
    assert target.stat().st_ino != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_another_command_moved_aside_is_kept_by_one_that_replaces_nothing(tmp_path: Path) -> None:
    aside = tmp_path / ".out.ckpt-tool-replaced"
    aside.mkdir()
    (aside / "only copy").touch()
    api.convert(MIXTRAL, tmp_path / "out", to="universal")
    assert (aside / "only copy").exists()


def test_an_unreadable_manifest_is_3_and_not_taken_for_none(tmp_path: Path) -> None:
    api.convert(MIXTRAL, tmp_path / "out", to="universal")
    (tmp_path / "out" / MANIFEST).write_text("{")
    with pytest.raises(UnreadableError, match=MANIFEST):
        api.verify(tmp_path / "out")
