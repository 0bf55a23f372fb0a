"""Links in the directory in which a result is prepared lead nowhere: nothing is written or removed behind
them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ckpt_tool import api
from ckpt_tool.errors import CkptToolError, UsageError
from ckpt_tool.manifest import JOURNAL
from tests.conftest import checkpoint_of, tree

SOURCE = checkpoint_of("dense_w3")
HOW = api.Execution(fsync=False, workers=1)


def convert(target: Path, how: api.Execution = HOW) -> None:
    api.convert(SOURCE, target, to="universal", how=how)


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    """What a run leaves behind that was interrupted after some files."""

    class Stop(BaseException):
        pass

    class Meter:
        done = 0

        def start(self, total: int) -> None: ...

        def add(self, count: int) -> None:
            self.done += count
            if self.done > 40_000:
                raise Stop

    with pytest.raises(Stop):
        convert(tmp_path / "out", api.Execution(fsync=False, workers=1, meter=Meter()))
    found = tmp_path / ".out.ckpt-tool-staging"
    assert len(tree(found)) > 3
    return found


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    found = tmp_path / "elsewhere"
    found.mkdir()
    (found / "precious").write_text("x")
    return found


def test_a_link_to_a_directory_among_the_staged(staging: Path, elsewhere: Path, tmp_path: Path) -> None:
    inside = next(path for path in sorted(staging.glob("*/zero/*")) if path.is_dir())
    shutil.rmtree(inside)
    inside.symlink_to(elsewhere)
    convert(tmp_path / "out")
    assert tree(elsewhere) == {"precious": b"x"}
    convert(tmp_path / "fresh")
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_a_link_to_a_file_among_the_staged(staging: Path, elsewhere: Path, tmp_path: Path) -> None:
    one = next(path for path in sorted(staging.rglob("*.pt")))
    kept = elsewhere / "kept.pt"
    one.rename(kept)
    one.symlink_to(kept)
    before = tree(elsewhere)
    convert(tmp_path / "out")
    assert tree(elsewhere) == before
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_a_journal_that_is_a_link(staging: Path, elsewhere: Path, tmp_path: Path) -> None:
    (staging / JOURNAL).rename(elsewhere / "journal")
    (staging / JOURNAL).symlink_to(elsewhere / "journal")
    before = tree(elsewhere)
    with pytest.raises(UsageError, match="in the way"):
        convert(tmp_path / "out")
    assert tree(elsewhere) == before


def test_a_staging_directory_that_is_a_link(elsewhere: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.ckpt-tool-staging").symlink_to(elsewhere)
    with pytest.raises(UsageError, match="in the way"):
        convert(tmp_path / "out")
    assert tree(elsewhere) == {"precious": b"x"}


def test_a_journal_of_two_gigabytes(staging: Path, tmp_path: Path) -> None:
    with (staging / JOURNAL).open("r+b") as journal:
        journal.truncate(2 << 30)
    with pytest.raises(CkptToolError, match="has 2147483648 bytes"):
        convert(tmp_path / "out")
