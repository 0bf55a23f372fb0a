"""Peak memory stays within the budget plus a constant, whatever the size of the checkpoint.

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
# Beside the budget, in MiB: interpreter, imports and metadata; where values are cast, torch.
REST, TORCH = 100, 350
JOBS = {
    "universal": ["convert", "--to", "universal"],
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
    limit = budget + REST + (TORCH if job == "consolidate-bf16" else 0)
    options = ["--max-memory", f"{budget}MiB"]
    verb, *kind = JOBS[job]
    try:
        written = tool(verb, str(source), str(target), *kind, *options, "--no-fsync", "--quiet")
        verified = tool("verify", str(source), str(target), *options, "--quiet")
    finally:
        shutil.rmtree(target, ignore_errors=True)
    assert written.peak_mib <= limit
    assert verified.peak_mib <= limit


def test_a_large_parent_does_not_count_as_the_childs_memory() -> None:
    held = bytearray(256 << 20)
    held[:: 1 << 12] = bytes(len(range(0, len(held), 1 << 12)))  # touch every page
    small = measure([sys.executable, "-c", "pass"]).peak_mib
    grown = measure([sys.executable, "-c", "b = bytearray(200 << 20); b[::4096] = bytes(51200)"]).peak_mib
    assert len(held) > 0
    assert small < 50
    assert 200 <= grown < 250
