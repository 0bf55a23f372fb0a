"""What reading and planning cost by the number of ranks, tensors, chunks and files; a table in markdown.

    python benchmarks/metadata.py --ranks DIR128 DIR512 DIR2048 --others DIR ... --work DIR

Checkpoints are sparse (sparse.py): their metadata is real, their bytes are holes. README.md has the table.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from measure import Usage, measure
from run import ENV, print_table, tool


def world(checkpoint: Path) -> int:
    return sum(1 for path in checkpoint.rglob("*_model_states.pt"))


def inspect(checkpoint: Path, *extra: str) -> list[str]:
    return [sys.executable, "-m", "ckpt_tool", "inspect", str(checkpoint), "--json", *extra]


def commands(checkpoint: Path, target: Path) -> dict[str, list[str]]:
    """The commands of a checkpoint of many ranks, by what the table calls them."""
    ranks = world(checkpoint)
    plan = ["--dry-run", "--json"]
    return {
        "inspect": inspect(checkpoint),
        "to universal": tool("convert", str(checkpoint), str(target), "--to", "universal", *plan),
        "consolidate": tool("consolidate", str(checkpoint), str(target), *plan),
        f"reshard to {ranks // 2}": tool(
            "reshard", str(checkpoint), str(target), "--world", str(ranks // 2), *plan
        ),
    }


def cells(usage: Usage) -> list[str]:
    return [f"{usage.cpu:.1f}", f"{usage.wall:.1f}", f"{usage.peak_mib:.0f}"]


def by_ranks(checkpoints: Sequence[Path], target: Path) -> Iterator[list[str]]:
    yield ["world", "job", "CPU, s", "wall, s", "peak RSS, MiB", "growth of CPU s"]
    before: dict[str, tuple[int, float]] = {}
    for checkpoint in checkpoints:
        ranks = world(checkpoint)
        for job, command in commands(checkpoint, target).items():
            usage = measure(command, env=ENV)
            kind = job.split(" to ")[0] if job.startswith("reshard") else job
            growth = ""
            if kind in before:
                least, cpu = before[kind]
                growth = f"world^{math.log(usage.cpu / cpu) / math.log(ranks / least):.2f}"
            before[kind] = (ranks, usage.cpu)
            yield [str(ranks), job, *cells(usage), growth]


def others(checkpoints: Sequence[Path]) -> Iterator[list[str]]:
    yield ["checkpoint", "files", "job", "CPU, s", "wall, s", "peak RSS, MiB"]
    for checkpoint in checkpoints:
        files = sum(1 for path in checkpoint.rglob("*") if path.is_file())
        for extra in ([], ["--experts"]):
            usage = measure(inspect(checkpoint, *extra), env=ENV)
            yield [checkpoint.name, f"{files:,}", " ".join(["inspect", *extra]), *cells(usage)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=Path, nargs="*", default=[], help="ZeRO-3 checkpoints")
    parser.add_argument("--others", type=Path, nargs="*", default=[], help="checkpoints of other formats")
    parser.add_argument("--work", type=Path, required=True, help="where nothing is written")
    given = parser.parse_args()
    target = given.work / "never-written"
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}\n")
    if given.ranks:
        print_table(by_ranks(sorted(given.ranks, key=world), target))
    if given.others:
        print_table(others(given.others))


if __name__ == "__main__":
    sys.exit(main())
