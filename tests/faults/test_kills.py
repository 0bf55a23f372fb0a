"""Killed at any moment, a conversion leaves nothing half done under the target's name, and the same command
completes it, byte for byte."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckpt_tool import api
from ckpt_tool.errors import CkptToolError
from ckpt_tool.manifest import JOURNAL
from tests.conftest import ROOT, tree
from tests.faults.killing import changing_calls, killed_after, killed_at

pytestmark = pytest.mark.slow

FIXTURES = {
    "zero3": "deepspeed/mixtral_w2e1",
    "zero2": "deepspeed/mixtral_z2_w4e2",
    "zero0": "deepspeed/mixtral_z0_w2e2",
    "dcp": "dcp/mixtral_accelerate_w2",
}
SOURCES = (*FIXTURES, "universal", "hf")
TARGETS = ("universal", "zero3", "zero2", "zero1", "dcp", "hf")
# A few of each kind of conversion; `python -m tests.faults.test_kills` takes every pair.
QUICK = (("zero3", "universal"), ("dcp", "hf"), ("hf", "dcp"), ("universal", "zero1"))


class Pair:
    """One conversion from a format to another, in a directory of its own. ``replaces`` is what it
    overwrites: a ``result`` of ckpt-tool, or one ``tag`` of a run."""

    def __init__(self, source: str, target: str, home: Path, *, replaces: str | None = None) -> None:
        self.home, self.target = home, home / "out"
        fixture = ROOT / "fixtures" / FIXTURES.get(source, FIXTURES["zero3"])
        config = fixture / "config.json"
        if source in FIXTURES:
            shutil.copytree(fixture / "checkpoint", home / "source")
        else:
            api.convert(fixture / "checkpoint", home / "source", to=source, config=config)
        self.replaces = replaces
        self._parameters: dict[str, Any] = {"to": target, "config": config}
        if target.startswith("zero"):
            self._parameters |= {"world": 2, "ep": 1}
        if replaces == "result":
            api.convert(home / "source", home / "before", to="universal")
        elif replaces == "tag":
            shutil.copytree(ROOT / "fixtures/deepspeed/dense_w3/checkpoint", home / "before")
            shutil.copytree(home / "before" / "global_step2", home / "before" / "global_step1")
            (home / "before" / "train.log").write_text("loss 2.5")
        self.prepare()
        began = time.monotonic()
        self.convert()
        self.seconds = time.monotonic() - began
        self.expected = tree(self.target)

    def prepare(self) -> None:
        for path in self.home.iterdir():
            if path.name not in ("source", "before"):
                shutil.rmtree(path)
        if self.replaces:
            shutil.copytree(self.home / "before", self.target)

    def convert(self) -> None:
        how = api.Execution(max_memory=1 << 20, workers=2, overwrite=bool(self.replaces))
        api.convert(self.home / "source", self.target, how=how, **self._parameters)

    def calls(self) -> list[str]:
        self.prepare()
        return changing_calls(self.home, self.convert)

    def check(self) -> None:
        """After a kill: nothing half done under the name; and the same command completes it."""
        if self.target.exists():
            found = tree(self.target)
            found.pop(JOURNAL, None)
            assert found == self.expected or (self.replaces and self._is_between(found))
        self.convert()
        assert tree(self.target) == self.expected
        left = {path.name for path in self.home.iterdir()}
        assert left <= {"source", "before", "out"}, left

    def _is_between(self, found: dict[str, bytes]) -> bool:
        """Whether the old is there; of a run, a tag that is old or new as a whole, all else as it was."""
        before = tree(self.home / "before")
        if self.replaces == "result":
            return found == before
        kept = [path for path in before if path.startswith("global_step1/") or path == "train.log"]
        tags = [
            {path: data for path, data in held.items() if path.startswith("global_step2/")}
            for held in (found, before, self.expected)
        ]
        return all(found[path] == before[path] for path in kept) and tags[0] in ({}, *tags[1:])

    def killed_at(self, number: int) -> bool:
        self.prepare()
        killed = killed_at(number, self.home, self.convert)
        self.check()
        return killed

    def killed_after(self, seconds: float) -> bool:
        self.prepare()
        killed = killed_after(seconds, self.convert)
        self.check()
        return killed


def boundaries(calls: list[str]) -> list[int]:
    """Before and after each line of the journal, and each step of publishing."""
    chosen = {at + after for at, kind in enumerate(calls) if kind == "write" for after in (0, 1)}
    last = max(at for at, kind in enumerate(calls) if kind == "write")
    return sorted({at for at in chosen | set(range(last, len(calls))) if at < len(calls)})


def spread(numbers: list[int], count: int) -> list[int]:
    return sorted({numbers[len(numbers) * part // count] for part in range(count)} | set(numbers[-1:]))


@pytest.fixture(scope="module", params=QUICK, ids="-".join)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(*request.param, tmp_path_factory.mktemp("killed"))


def test_a_kill_at_the_boundaries_of_the_journal(pair: Pair) -> None:
    for number in spread(boundaries(pair.calls()), 5):
        assert pair.killed_at(number)


@pytest.mark.scale
def test_a_kill_at_any_moment(pair: Pair) -> None:
    chosen = random.Random(1)
    for number in spread(boundaries(pair.calls()), 20):
        pair.killed_at(number)
    for _ in range(10):
        pair.killed_after(chosen.uniform(0, pair.seconds))


@pytest.fixture(scope="module", params=["result", "tag"])
def replacing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair("zero3", "zero3", tmp_path_factory.mktemp("replacing"), replaces=request.param)


def test_a_kill_while_a_result_replaces_another(replacing: Pair) -> None:
    """From the first rename on: the others, and the removal of what was replaced."""
    calls = replacing.calls()
    renamed = [at for at, kind in enumerate(calls) if kind in ("rename", "replace")]
    assert len(renamed) > 1
    after = list(range(renamed[1] + 1, len(calls)))
    for number in (*renamed[:4], *spread(after, 3)):
        assert replacing.killed_at(number)


@pytest.mark.scale
def test_a_kill_at_every_step_of_replacing(replacing: Pair) -> None:
    calls = replacing.calls()
    steps = list(range(calls.index("rename"), len(calls)))
    for number in spread(steps, min(30, len(steps))):
        assert replacing.killed_at(number)


def pairs() -> Iterator[tuple[str, str]]:
    yield from ((source, target) for source in SOURCES for target in TARGETS)


def main() -> None:
    """Kill conversions of every pair of formats, at boundaries of the journal and at random moments."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--kills", type=int, default=8, help="of each pair, half of either kind")
    arguments = parser.parse_args()
    os.fsync = lambda fd: None  # a kill loses nothing that the system has
    total = survived = 0
    for number, (source, target) in enumerate(pairs()):
        with tempfile.TemporaryDirectory() as place:
            try:
                pair = Pair(source, target, Path(place))
            except CkptToolError as error:
                print(f"{source} -> {target}: no such conversion ({error})", flush=True)
                continue
            chosen = random.Random(number)
            half = arguments.kills // 2
            ends = [pair.killed_at(at) for at in chosen.sample(boundaries(pair.calls()), half)]
            ends += [pair.killed_after(chosen.uniform(0, pair.seconds)) for _ in range(half)]
            total, survived = total + len(ends), survived + ends.count(False)
            print(f"{source} -> {target}: {len(ends)} kills, all completed alike", flush=True)
    print(f"{total} kills ({survived} came after the end); Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
