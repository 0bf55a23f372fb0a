"""A disk that fills up while a conversion writes: told as such, nothing published, and gone on with once
there is room.

On a real small file system where the tests may mount one; where they may not, a limit on the size of files
and calls that fail stand for it. The tests' names say which it was.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt_tool import api
from ckpt_tool.errors import ExecutionError
from tests.conftest import checkpoint_of, config_of, tree
from tests.faults.forked import forked
from tests.faults.injection import failing, system_calls

JOBS = {
    "zero3-universal": ("mixtral_w2e1", "universal"),
    "zero3-dcp": ("mixtral_w2e1", "dcp"),
    "zero2-zero3": ("dense_z2_w3", "zero3"),
    "zero3-hf": ("dense_w3", "hf"),
}
PARTS = (0.1, 0.5, 0.95)  # of the result that is written when the disk is full


def mounted(path: str, options: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", path]
    return bool(shutil.which("mount")) and subprocess.run(command, capture_output=True).returncode == 0


def may_mount() -> bool:
    with tempfile.TemporaryDirectory() as place:
        if not mounted(place, "size=64k"):
            return False
        subprocess.run(["umount", place], check=True)
        return True


DISK = "tmpfs" if may_mount() else "limited-files-and-injected-faults"


class Filling:
    """A meter that uses up the disk once a part of the result is written, and not while it is checked."""

    def __init__(self, home: Path, part: float) -> None:
        self._home, self._part = home, part
        self._left, self._used = 0.0, 0

    def start(self, total: int) -> None:
        self._left = total * self._part
        self._used = self._in_use()

    def _in_use(self) -> int:
        return shutil.disk_usage(self._home).used

    def add(self, size: int) -> None:
        self._left -= size
        if self._left <= 0 and self._in_use() > self._used:
            with (self._home / "filler").open("ab", buffering=0) as filler:
                try:
                    while True:
                        filler.write(bytes(4096))
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise


def convert(fixture: str, to: str, target: Path, meter: object = None) -> None:
    how = api.Execution(max_memory=1 << 20, workers=1, **({} if meter is None else {"meter": meter}))  # type: ignore[arg-type]
    config = config_of(fixture) if to in ("dcp", "hf") else None
    api.convert(checkpoint_of(fixture), target, to=to, config=config, how=how)


@pytest.fixture(params=[(DISK, job) for job in JOBS], ids=lambda param: "-".join(param))
def job(request: pytest.FixtureRequest) -> tuple[str, str]:
    return JOBS[request.param[1]]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB and 2,000 files; without the right to mount, a directory."""
    home = tmp_path / "small"
    home.mkdir()
    if DISK == "tmpfs":
        assert mounted(str(home), "size=4m,nr_inodes=2000")
    try:
        yield home
    finally:
        if DISK == "tmpfs":
            subprocess.run(["umount", str(home)], check=True)


def is_told(raised: pytest.ExceptionInfo[ExecutionError], home: Path) -> None:
    message = str(raised.value)
    assert str(home) in message
    assert "the disk is full" in message
    assert "free some space" in message
    assert len(message.splitlines()) == 1


def test_a_disk_that_fills_up_while_writing(job: tuple[str, str], small: Path, tmp_path: Path) -> None:
    fixture, to = job
    convert(fixture, to, tmp_path / "whole")
    target = small / "out"
    for part in PARTS:
        if DISK == "tmpfs":
            with pytest.raises(ExecutionError) as raised:
                convert(fixture, to, target, Filling(small, part))
            (small / "filler").unlink()
        else:
            act = failing("pwrite", 2, errno.ENOSPC)
            with pytest.raises(ExecutionError) as raised, system_calls(small, act):
                convert(fixture, to, target)
        is_told(raised, small)
        assert not target.exists()
    convert(fixture, to, target)
    assert tree(target) == tree(tmp_path / "whole")
    assert [path.name for path in small.iterdir()] == ["out"]


def test_a_disk_without_room_for_another_file(job: tuple[str, str], small: Path, tmp_path: Path) -> None:
    """Where nothing is left to name files with, however many bytes are free."""
    fixture, to = job
    convert(fixture, to, tmp_path / "whole")
    target = small / "out"
    needed = sum(1 for _ in (tmp_path / "whole").rglob("*"))
    for part in PARTS:
        if DISK == "tmpfs":
            missing = int(needed * part) - sum(1 for _ in small.rglob("*"))  # earlier attempts left some
            for number in range(os.statvfs(small).f_ffree - max(0, missing)):
                (small / f"filler{number}").touch()
            with pytest.raises(ExecutionError) as raised:
                convert(fixture, to, target)
            for filler in small.glob("filler*"):
                filler.unlink()
        else:
            act = failing("open", 1, errno.ENOSPC)
            with pytest.raises(ExecutionError) as raised, system_calls(small, act):
                convert(fixture, to, target)
        is_told(raised, small)
        assert not target.exists()
    convert(fixture, to, target)
    assert tree(target) == tree(tmp_path / "whole")


@pytest.mark.parametrize(("fixture", "to"), JOBS.values(), ids=JOBS)
def test_a_limit_on_the_size_of_files(fixture: str, to: str, tmp_path: Path) -> None:
    convert(fixture, to, tmp_path / "whole")
    largest = max(path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file())

    def call() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, resource.RLIM_INFINITY))
        with pytest.raises(ExecutionError, match=r"File too large\. Raise the limit \(`ulimit -f`\)"):
            convert(fixture, to, tmp_path / "out")

    assert forked(call) == (0, "", "")
    assert not (tmp_path / "out").exists()
    convert(fixture, to, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
