"""Chunks above 4 GiB, whose sizes only zip64 records can state: torch's are read, ours torch loads."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.measure import measure
from tests.scale.test_memory import REST, tool

pytestmark = pytest.mark.scale

NUMEL = (1 << 32) + 12_345

# A period that no power of two is a multiple of: what is displaced differs.
_VALUES = """
import sys, torch, torch.distributed.checkpoint as dcp
numel, period = int(sys.argv[2]), 1_000_003
base = torch.randint(256, (period,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
"""
SAVE = f"""{_VALUES}
large = torch.empty(numel, dtype=torch.uint8)
for low in range(0, numel, period):
    large[low:low + period] = base[:numel - low]
dcp.save({{"model": {{"large": large}}}}, checkpoint_id=sys.argv[1], no_dist=True)
"""
LOAD = f"""{_VALUES}
state = {{"model": {{"large": torch.zeros(numel, dtype=torch.uint8)}}}}
dcp.load(state, checkpoint_id=sys.argv[1], no_dist=True)
for low in range(0, numel, period):
    part = state["model"]["large"][low:low + period]
    assert torch.equal(part, base[:len(part)]), low
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("large")
    try:
        yield home
    finally:
        shutil.rmtree(home)


def test_a_chunk_above_4_gib_is_read_and_written(home: Path) -> None:
    python = [sys.executable, "-c"]
    measure([*python, SAVE, str(home / "saved"), str(NUMEL)])
    options = ["--max-memory", "64MiB", "--no-fsync", "--quiet"]
    convert = [str(home / "saved"), str(home / "written"), "--to", "dcp", "--world", "1"]
    written = tool("convert", *convert, *options)
    assert written.peak_mib <= 64 + REST
    shutil.rmtree(home / "saved")
    measure([*python, LOAD, str(home / "written"), str(NUMEL)])
    verified = tool("verify", str(home / "written"), "--max-memory", "64MiB", "--quiet")
    assert verified.peak_mib <= 64 + REST
