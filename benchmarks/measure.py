"""Run commands in child processes and measure them: time, peak memory, bytes read and written.

The peak is ``ru_maxrss`` of the child, as ``wait4`` reports it. On Linux that figure starts from the
memory of the process that called exec: a child of a large parent looks large. So every command is
started by a launcher of its own, a bare interpreter of about 10 MiB.

Bytes are those of all read and write calls (``rchar`` and ``wchar`` of ``/proc/<pid>/io``), whether the
page cache answered or the disk; the program's own modules are among them.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20

# Starts argv[2:], waits for it, and writes what it used to the descriptor argv[1].
_LAUNCHER = """
import os, sys, time
report = int(sys.argv[1])
os.set_inheritable(report, False)
start = time.monotonic()
child = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
wall = time.monotonic() - start
with open(f"/proc/{child}/io") as io:
    counts = dict(line.split(": ") for line in io.read().splitlines())
_, status, usage = os.wait4(child, 0)
code = os.waitstatus_to_exitcode(status)
cpu = usage.ru_utime + usage.ru_stime
os.write(report, f"{code} {wall} {cpu} {usage.ru_maxrss} {counts['rchar']} {counts['wchar']}".encode())
"""


@dataclass(frozen=True)
class Usage:
    """What one run of a command took. Of several processes: the largest one's peak, the sum of bytes."""

    wall: float
    cpu: float
    peak_mib: float
    read_bytes: int
    written_bytes: int


@dataclass(frozen=True)
class Job:
    """A command to be timed, and what it writes: removed before and after every run."""

    name: str
    command: Sequence[str]
    outputs: Sequence[Path] = ()


def measure(command: Sequence[str], *, env: Mapping[str, str] | None = None) -> Usage:
    """Run ``command`` to its end.

    Raises:
        RuntimeError: it exits with another code than 0; the end of what it printed is in the message.
    """
    receive, send = os.pipe()
    with tempfile.TemporaryFile() as printed, open(receive, "rb") as answer:
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(send), *command]
        with subprocess.Popen(
            launcher,
            pass_fds=(send,),
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
        ):
            os.close(send)
            fields = answer.read().split()
        if not fields or int(fields[0]) != 0:
            printed.seek(0)
            said = printed.read()[-4000:].decode(errors="replace")
            code = int(fields[0]) if fields else "none, it did not start"
            raise RuntimeError(f"{' '.join(command)}\nexit code {code}\n{said}")
    wall, cpu, kib, read, written = fields[1:]
    return Usage(float(wall), float(cpu), int(kib) / 1024, int(read), int(written))


@dataclass(frozen=True)
class Place:
    """The paths of one size, in GB (1e9 bytes), of one benchmark."""

    work: Path
    gb: float
    name: str = ""

    @property
    def home(self) -> Path:
        return self.work / f"{self.name}{self.gb:g}gb"

    @property
    def source(self) -> Path:
        return self.home / "source"

    def out(self, name: str) -> Path:
        return self.home / f"out-{name}"


def size(path: Path) -> float:
    """Of a file or directory, in GB."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e9


def remove(paths: Sequence[Path]) -> None:
    """Remove files and directories, those that exist."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def alternate(
    jobs: Sequence[Job],
    rounds: int,
    *,
    warm_up: bool = True,
    sync: bool = True,
    env: Mapping[str, str] | None = None,
) -> dict[str, list[Usage]]:
    """Run the jobs in turn, A B C A B C ..., so that all meet the same weather.

    Args:
        warm_up: run all once before, unmeasured: sources get into the page cache, imports too.
        sync: write back what earlier runs left dirty before each run.
        env: additions to the environment.
    """
    found: dict[str, list[Usage]] = {job.name: [] for job in jobs}
    for number in range(rounds + warm_up):
        for job in jobs:
            remove(job.outputs)
            if sync:
                os.sync()
            usage = measure(job.command, env=env)
            remove(job.outputs)
            if number >= warm_up:
                found[job.name].append(usage)
    return found


@dataclass(frozen=True)
class Summary:
    """Median, least and greatest of some numbers."""

    median: float
    least: float
    greatest: float

    @staticmethod
    def of(numbers: Sequence[float]) -> Summary:
        return Summary(statistics.median(numbers), min(numbers), max(numbers))

    def text(self, digits: int = 2) -> str:
        """``1.23 (1.20 to 1.31)``."""
        return f"{self.median:.{digits}f} ({self.least:.{digits}f} to {self.greatest:.{digits}f})"


def walls(usages: Sequence[Usage]) -> Summary:
    """Wall seconds."""
    return Summary.of([usage.wall for usage in usages])


def peak(usages: Sequence[Usage]) -> float:
    """The greatest peak, in MiB."""
    return max(usage.peak_mib for usage in usages)


def ratios(usages: Sequence[Usage], base: Sequence[Usage]) -> Summary:
    """Wall time as a multiple of the base's, pair by pair."""
    return Summary.of([one.wall / other.wall for one, other in zip(usages, base, strict=True)])
