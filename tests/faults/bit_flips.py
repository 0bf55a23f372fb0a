"""One bit of a checkpoint is flipped: who notices?

``python -m tests.faults.bit_flips outputs`` flips bits of one result in each format: ``verify`` has to find
all. ``python -m tests.faults.bit_flips sources`` prints the table of docs/guarantees.md: bits of what
engines save, without a manifest.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ckpt_tool import api
from ckpt_tool.errors import CkptToolError
from ckpt_tool.manifest import MANIFEST
from tests.conftest import ROOT, tree

# Name -> (fixture, what it is converted with): one result in each format.
OUTPUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "universal": ("deepspeed/dense_w3", {"to": "universal"}),
    "zero3": ("deepspeed/dense_w3", {"to": "zero3", "world": 2}),
    "zero2": ("deepspeed/dense_z2_w3", {"to": "zero2", "world": 2}),
    "zero1": ("deepspeed/dense_w3", {"to": "zero1", "world": 2}),
    "dcp": ("dcp/dense_tied_w3", {"to": "dcp", "world": 2}),
    "hf": ("deepspeed/dense_w3", {"to": "hf"}),
}
# Name -> (fixture, or what makes one of it; a conversion that reads all of it).
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "DeepSpeed ZeRO-3": ("deepspeed/dense_w3", {"to": "universal"}),
    "DeepSpeed ZeRO-2": ("deepspeed/dense_z2_w3", {"to": "universal"}),
    "DeepSpeed ZeRO-0": ("deepspeed/mixtral_z0_w2e2", {"to": "universal"}),
    "torch DCP": ("dcp/dense_tied_w3", {"to": "dcp", "world": 1}),
    "safetensors": ("deepspeed/dense_w3", {"to": "dcp"}),
}


class Flips:
    """Random bits of all files below a directory: every other one in a file chosen without regard to its
    size, so that small files get some, too."""

    def __init__(self, directory: Path, seed: int) -> None:
        self._files = sorted(path for path in directory.rglob("*") if path.is_file())
        self._sizes = [path.stat().st_size for path in self._files]
        self._random = random.Random(seed)

    def __call__(self, count: int) -> Iterator[tuple[Path, int]]:
        """(file, bit) of each; the bit is flipped while the caller has it, and then flipped back."""
        for number in range(count):
            weights = self._sizes if number % 2 else [bool(size) for size in self._sizes]
            path = self._random.choices(self._files, weights)[0]
            bit = self._random.randrange(8 * path.stat().st_size)
            _flip(path, bit)
            try:
                yield path, bit
            finally:
                _flip(path, bit)


def _flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def flipped(path: Path, bit: int, look: Callable[[], bool]) -> bool:
    """What ``look`` says while a bit of a file is flipped."""
    _flip(path, bit)
    try:
        return look()
    finally:
        _flip(path, bit)


def is_found(directory: Path) -> bool:
    """Whether ``verify`` finds something wrong with a checkpoint."""
    try:
        return not api.verify(directory).passed
    except CkptToolError:
        return True


def made(name: str, home: Path) -> Path:
    """A result in the format ``name``."""
    fixture, parameters = OUTPUTS[name]
    source = ROOT / "fixtures" / fixture
    how = api.Execution(fsync=False)
    config = source / "config.json"
    api.convert(source / "checkpoint", home / "result", config=config, how=how, **parameters)
    return home / "result"


def unnoticed(name: str, count: int, home: Path, seed: int = 0) -> list[str]:
    """The flips of a result in a format that ``verify`` does not find."""
    result = made(name, home)
    assert not is_found(result)
    missed = []
    for path, bit in Flips(result, seed)(count):
        if not is_found(result):
            missed.append(f"{path.relative_to(result)}: bit {bit % 8} of byte {bit // 8}")
    assert not is_found(result)
    return missed


def outcomes(name: str, count: int, home: Path, seed: int = 0) -> Counter[tuple[str, str]]:
    """Flips of a source by kind of file and what comes of them."""
    fixture, parameters = SOURCES[name]
    source, config = home / "source", ROOT / "fixtures" / fixture / "config.json"
    shutil.copytree(ROOT / "fixtures" / fixture / "checkpoint", home / "copy")
    if name == "safetensors":
        api.consolidate(home / "copy", source, config=config)
        (source / MANIFEST).unlink()
    else:
        (home / "copy").rename(source)
    expected = _converted(source, home / "whole", config, parameters)
    found: Counter[tuple[str, str]] = Counter()
    for path, _ in Flips(source, seed)(count):
        found[_kind(path), _outcome(source, home, config, parameters, expected)] += 1
    return found


def _outcome(source: Path, home: Path, config: Path, parameters: dict[str, Any], expected: object) -> str:
    if is_found(source):
        return "found"
    try:
        got = _converted(source, home / "out", config, parameters)
    except CkptToolError:
        return "refused"
    finally:
        for left in home.glob("*out*"):
            shutil.rmtree(left)
    return "harmless" if got == expected else "unseen"


def _converted(source: Path, target: Path, config: Path, parameters: dict[str, Any]) -> dict[str, bytes]:
    how = api.Execution(fsync=False)
    api.convert(source, target, config=config, how=how, **parameters)
    found = tree(target)
    del found[MANIFEST]
    return found


def _kind(path: Path) -> str:
    for ending in ("model_states.pt", "optim_states.pt", ".metadata", ".distcp", ".safetensors"):
        if path.name.endswith(ending):
            return f"*{ending}" if ending != ".metadata" else ending
    return path.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["outputs", "sources"])
    parser.add_argument("--flips", type=int, default=2000, help="in each format")
    arguments = parser.parse_args()
    os.fsync = lambda fd: None
    run: Callable[[str, int, Path], Any] = unnoticed if arguments.what == "outputs" else outcomes
    for name in OUTPUTS if arguments.what == "outputs" else SOURCES:
        with tempfile.TemporaryDirectory() as place:
            found = run(name, arguments.flips, Path(place))
        if arguments.what == "outputs":
            print(f"{name}: {arguments.flips} flips, {len(found)} not found {found[:5]}", flush=True)
            continue
        for kind in sorted({kind for kind, _ in found}):
            row = [str(found[kind, outcome]) for outcome in ("found", "refused", "harmless", "unseen")]
            print(f"| {name} | `{kind}` | " + " | ".join(row) + " |", flush=True)
    print(f"Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
