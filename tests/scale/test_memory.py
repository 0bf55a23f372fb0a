"""Peak memory stays within the budget plus a constant, whatever the size of the checkpoint.

A re-shard reads and writes every byte once.

Commands run in child processes and are measured as ``benchmarks/measure.py`` says. Nothing is timed.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.measure import Usage, measure

pytestmark = pytest.mark.scale

ROOT = Path(__file__).resolve().parents[2]
MAKE = ROOT / "benchmarks" / "make_checkpoint.py"
# Beside the budget, in MiB: interpreter, imports, metadata. No job here imports torch, casts included.
REST = 100
# What a start reads beside the checkpoint: the modules of interpreter and tool, in bytes.
MODULES = 20 << 20
RESHARD = ["reshard", "--ep", "1", "--world", "2"]
JOBS = {
    "universal": ["convert", "--to", "universal"],
    "reshard": RESHARD,
    "consolidate": ["consolidate"],
    "consolidate-bf16": ["consolidate", "--dtype", "bf16"],
}


def tool(*arguments: str) -> Usage:
    """Run ckpt-tool; the test fails where its exit code is not 0."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return measure([sys.executable, "-m", "ckpt_tool", *arguments], env={"PYTHONPATH": path})


@pytest.fixture(scope="module", params=["0.3", "3"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A ZeRO-3 AutoEP checkpoint of that many GB."""
    home = tmp_path_factory.mktemp("scale")
    try:
        measure([sys.executable, str(MAKE), str(home / "source"), "--gb", request.param])
        yield home / "source"
    finally:
        shutil.rmtree(home)


@pytest.mark.parametrize("budget", [64, 512])
@pytest.mark.parametrize("job", JOBS)
def test_peak_memory_is_bounded_by_the_budget(source: Path, job: str, budget: int) -> None:
    target = source.parent / "target"
    options = ["--max-memory", f"{budget}MiB"]
    verb, *kind = JOBS[job]
    try:
        written = tool(verb, str(source), str(target), *kind, *options, "--no-fsync", "--quiet")
        verified = tool("verify", str(source), str(target), *options, "--quiet")
    finally:
        shutil.rmtree(target, ignore_errors=True)
    assert written.peak_mib <= budget + REST
    assert verified.peak_mib <= budget + REST


def test_a_reshard_reads_and_writes_every_byte_once(source: Path) -> None:
    target = source.parent / "target"
    verb, *kind = RESHARD
    options = ["--max-memory", "64MiB", "--no-fsync", "--quiet"]
    try:
        usage = tool(verb, str(source), str(target), *kind, *options)
        new = size(target)
    finally:
        shutil.rmtree(target, ignore_errors=True)
    assert size(source) <= usage.read_bytes <= 1.02 * size(source) + MODULES
    assert new <= usage.written_bytes <= 1.02 * new


def size(directory: Path) -> int:
    """Of its files, in bytes."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def test_a_large_parent_does_not_count_as_the_childs_memory() -> None:
    held = bytearray(256 << 20)
    held[:: 1 << 12] = bytes(len(range(0, len(held), 1 << 12)))  # touch every page
    small = measure([sys.executable, "-c", "pass"]).peak_mib
    grown = measure([sys.executable, "-c", "b = bytearray(200 << 20); b[::4096] = bytes(51200)"]).peak_mib
    assert len(held) > 0
    assert small < 50
    assert 200 <= grown < 250
