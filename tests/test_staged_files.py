"""What a killed run left is damaged or added to before the same command goes on with it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckpt_tool import api, results
from ckpt_tool.errors import ExecutionError, UsageError
from ckpt_tool.journal import journal_line
from ckpt_tool.manifest import JOURNAL
from tests.conftest import checkpoint_of, tree

SOURCE = checkpoint_of("dense_w3")
HOW = api.Execution(fsync=False, workers=1)


def convert(target: Path) -> None:
    api.convert(SOURCE, target, to="universal", how=HOW)


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The staging directory of a run that was killed before its result got its name."""
    folder = tmp_path_factory.mktemp("left")

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ckpt_tool.stores.local_area.LocalArea.publish", die)
        with pytest.raises(KeyboardInterrupt):
            convert(folder / "out")
    return folder / ".out.ckpt-tool-staging"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    target = tmp_path_factory.mktemp("whole") / "out"
    convert(target)
    return tree(target)


@pytest.fixture
def staging(left: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(left, tmp_path / left.name, symlinks=True))


def one_of(staging: Path) -> Path:
    return next(path for path in sorted(staging.rglob("*.pt")))


def a_directory_for_a_file(staging: Path) -> None:
    one = one_of(staging)
    one.unlink()
    one.mkdir()


def a_full_directory_for_a_file(staging: Path) -> None:
    a_directory_for_a_file(staging)
    (one_of(staging) / "more").write_text("x")


def a_pipe_for_a_file(staging: Path) -> None:
    one = one_of(staging)
    one.unlink()
    os.mkfifo(one)


def a_file_for_a_directory(staging: Path) -> None:
    inside = next(path for path in sorted(staging.glob("*/zero/*")) if path.is_dir())
    shutil.rmtree(inside)
    inside.write_text("x")


def an_empty_directory_more(staging: Path) -> None:
    (staging / "more" / "and more").mkdir(parents=True)


def a_file_more(staging: Path) -> None:
    one = one_of(staging)
    shutil.copyfile(one, one.with_name("more.pt"))


def a_file_more_with_a_line_in_the_journal(staging: Path) -> None:
    one = one_of(staging)
    shutil.copyfile(one, one.with_name("more.pt"))
    more = str(one.with_name("more.pt").relative_to(staging))
    add(staging, lambda entry: journal_line({**entry, "path": more}), one)


def a_line_twice(staging: Path) -> None:
    add(staging, journal_line, one_of(staging))


def add(staging: Path, line: Callable[[dict[str, Any]], bytes], one: Path) -> None:
    """Add a line to the journal, made of the one that speaks of a file."""
    journal = staging / JOURNAL
    path = str(one.relative_to(staging))
    entries = map(json.loads, journal.read_bytes().splitlines())
    entry = next(entry for entry in entries if entry.get("path") == path)
    del entry["sum"]
    with journal.open("ab") as file:
        file.write(line(entry))


DAMAGE = [
    a_directory_for_a_file,
    a_full_directory_for_a_file,
    a_pipe_for_a_file,
    a_file_for_a_directory,
    an_empty_directory_more,
    a_file_more,
    a_file_more_with_a_line_in_the_journal,
    a_line_twice,
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_staging_directory_with(
    damage: Callable[[Path], None], staging: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    damage(staging)
    convert(tmp_path / "out")
    assert tree(tmp_path / "out") == whole
    assert folders(tmp_path / "out") == {part for path in whole for part in map(str, Path(path).parents)}


def folders(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_dir()} | {"."}


def test_any_digit_of_the_journal_changed(
    staging: Path, left: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """A changed digit may be one of a checksum that the manifest would state."""
    data = (left / JOURNAL).read_bytes()
    digits = [at for at, byte in enumerate(data) if chr(byte).isdigit()]
    for at in digits[:: len(digits) // 10]:
        shutil.copytree(left, staging, dirs_exist_ok=True)
        changed = bytearray(data)
        changed[at] ^= 1
        (staging / JOURNAL).write_bytes(changed)
        convert(tmp_path / "out")
        assert tree(tmp_path / "out") == whole, (at, data[max(0, at - 60) : at + 10])
        shutil.rmtree(tmp_path / "out")


# ---- what is said


def test_a_result_that_was_gone_on_with_says_how_many_files_were_kept(
    staging: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    removed = sorted(staging.rglob("*.pt"))[:3]
    size = sum(path.stat().st_size for path in removed)
    for path in removed:
        path.unlink()
    found = api.convert(SOURCE, tmp_path / "out", to="universal", how=HOW)
    assert found.resumed == found.files - 3
    assert found.bytes_written == size
    assert 0 < found.bytes_read < api.convert(SOURCE, tmp_path / "x", to="universal", how=HOW).bytes_read
    results.show(found, dry_run=False, json=False, quiet=False)
    said = capsys.readouterr().out
    assert ["resumed", f"{found.resumed}", "of", f"{found.files}", "files", "kept"] in map(
        str.split, said.splitlines()
    )
    results.show(found, dry_run=False, json=True, quiet=False)
    assert json.loads(capsys.readouterr().out)["resumed"] == found.resumed


def test_a_finished_command_that_is_repeated_has_written_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = api.convert(SOURCE, tmp_path / "out", to="universal", how=HOW)
    again = api.convert(SOURCE, tmp_path / "out", to="universal", how=HOW)
    assert (first.bytes_written > 0, again.bytes_written, again.resumed) == (True, 0, 0)
    assert again.bytes_read == first.bytes_read  # it was compared
    assert sum(again.unchecked_bytes.values()) == again.bytes_read
    assert "nothing was written" in again.notes[-1]
    results.show(again, dry_run=False, json=False, quiet=False)
    assert "written   0 B" in capsys.readouterr().out


def test_a_staging_directory_of_another_command_is_told_in_words(staging: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="left by another command") as raised:
        api.convert(SOURCE, tmp_path / "out", to="universal", weights_only=True, how=HOW)
    said = str(raised.value)
    assert "a conversion of global_step2 (deepspeed-zero3, step 2) to universal" in said
    assert "It differs: weights only was not given and is given." in said
    assert f"choose another destination, or remove the directory: rm -r '{staging}'" in said
    assert "=" not in said


def test_an_error_in_the_middle_says_what_stays_and_how_to_go_on(
    staging: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sorted(staging.rglob("*.pt"))[0].unlink()

    def failing(*_: object) -> None:
        raise ExecutionError("The disk is gone.")

    with monkeypatch.context() as patch:
        patch.setattr("ckpt_tool.storage.LocalWriter.write", failing)
        with pytest.raises(ExecutionError, match="The disk is gone") as raised:
            convert(tmp_path / "out")
    said = str(raised.value)
    assert f"{staging} stays, with " in said
    assert "the same command goes on with them" in said
    assert f"rm -r '{staging}'" in said
    convert(tmp_path / "out")


def test_an_error_with_nothing_complete_leaves_nothing_to_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise ExecutionError("The disk is gone.")

    monkeypatch.setattr("ckpt_tool.storage.LocalWriter.write", failing)
    with pytest.raises(ExecutionError) as raised:
        convert(tmp_path / "out")
    assert str(raised.value) == "The disk is gone."
    assert list(tmp_path.iterdir()) == []
