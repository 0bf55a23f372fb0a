"""Every hostile source costs at most 500 MB and 5 s, runs nothing, and is told in a sentence, whatever
the command."""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.forked import forked, tool
from tests.hostile.corpus import CASES

_RAN = Path("/tmp/ckpt_tool_hostile_ran")
MOST_MEMORY, MOST_SECONDS = 500 << 20, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


def limited(call: Callable[[], int]) -> Callable[[], int]:
    """With no more address space than it has, and 500 MB, and little time."""

    def run() -> int:
        sys.settrace(None)  # the limit is the tool's, not that of a coverage run
        threading.settrace(None)  # type: ignore[arg-type]
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MOST_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        spent = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(spent.ru_utime + spent.ru_stime) + MOST_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        return call()

    return run


@pytest.mark.parametrize("command", ["inspect", "doctor", "verify", "convert"])
@pytest.mark.parametrize("name", CASES)
def test_it_costs_nothing_and_is_told(name: str, command: str, folder: Path) -> None:
    source = folder / name
    if not source.exists():
        source.mkdir()
        CASES[name](source)
    arguments: list[str | os.PathLike[str]] = [command, source]
    if command == "convert":
        arguments += [folder / f"out-{name}", "--to", "hf", "--workers", "1", "--max-memory", "64MiB"]
    elif command != "inspect":
        arguments += ["--workers", "1", "--max-memory", "64MiB"]
    done = forked(limited(tool(*arguments)))
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    assert "bug in ckpt-tool" not in done.stderr
    assert done.rc in (0, 1, 2, 3), (done.rc, done.stderr[-3000:])
    assert len(done.stderr) + len(done.stdout) < 20_000
    assert not _RAN.exists()
    assert not (folder / f"out-{name}").exists() or done.rc == 0


def test_an_index_of_five_thousand_files(tmp_path: Path) -> None:
    """Files and names are looked up, and not gone through for each other."""
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    names = {f"model.layers.{number}.a.weight": f"part-{number}.safetensors" for number in range(5000)}
    for name, file in names.items():
        raw = json.dumps({name: entry}).encode()
        (tmp_path / file).write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(4))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    done = forked(limited(tool("inspect", tmp_path)))
    assert done.rc == 0, done.stderr[-3000:]
