"""What checking the source's own checksums costs; print a table in markdown.

    python benchmarks/checks.py --gb 1 --rounds 6 --work DIR

Three runs of every conversion: with the inline checks taken out, as it is, and with --verify, which also
compares what was not compared on the way, and the result. Each round begins with another of the three, so
that none always follows the heaviest. Ratios are within a round. On a shared machine CPU time is steadier.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from pathlib import Path

from measure import Job, Summary, Usage, alternate, ratios, remove, walls
from run import ENV, ZeroPlace, print_table, tool

# The command line with a reader that passes everything on. The baseline is this file's alone.
UNCHECKED = """
import sys
from ckpt_tool import conversion
from ckpt_tool.__main__ import main
conversion.CheckingReader.read_into = lambda self, *args: self._inner.read_into(*args)
sys.argv[0] = "ckpt-tool"
sys.exit(main())
"""


def jobs(place: ZeroPlace, verb: str, source: Path, *options: str) -> list[Job]:
    out = place.out("checked")
    command = tool(verb, str(source), str(out), "--no-fsync", *options)
    return [
        Job("unchecked", [sys.executable, "-c", UNCHECKED, *command[3:]], [out]),
        Job("inline", command, [out]),
        Job("verify", [*command, "--verify"], [out]),
    ]


def rotated(found: list[Job], rounds: int) -> dict[str, list[Usage]]:
    """All jobs in each round, which begins with the next of them; a round before is not measured."""
    usage: dict[str, list[Usage]] = {job.name: [] for job in found}
    for number in range(rounds):
        first = number % len(found)
        order = [*found[first:], *found[:first]]
        for name, used in alternate(order, 1, warm_up=number == 0, env=ENV).items():
            usage[name] += used
    return usage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=6, help="a multiple of 3")
    parser.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()
    place = ZeroPlace(arguments.work.resolve(), arguments.gb)
    place.make(4, 2)
    place.make_fp32()
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, {arguments.rounds} rounds\n")
    rows = [
        [
            "conversion", "without, s", "inline / without", "--verify / without",
            "without, CPU s", "inline / without, CPU", "--verify / without, CPU",
        ]
    ]  # fmt: skip
    for label, found in (
        ("ZeRO-3 to Universal", jobs(place, "convert", place.source, "--to", "universal")),
        ("ZeRO-3 to ZeRO-3 of 2 ranks", jobs(place, "reshard", place.source, "--ep", "1", "--world", "2")),
        ("ZeRO-3 to safetensors, bf16", jobs(place, "consolidate", place.source, "--dtype", "bf16")),
        ("safetensors with a manifest to bf16", jobs(place, "consolidate", place.fp32, "--dtype", "bf16")),
    ):
        usage = rotated(found, arguments.rounds)
        base = usage["unchecked"]
        wall = [ratios(usage[name], base).text() for name in ("inline", "verify")]
        cpu = [
            Summary.of([one.cpu / other.cpu for one, other in zip(usage[name], base, strict=True)]).text()
            for name in ("inline", "verify")
        ]
        spent = Summary.of([one.cpu for one in base]).text()
        rows.append([label, walls(base).text(), *wall, spent, *cpu])
    print_table(rows)
    remove([place.home])


if __name__ == "__main__":
    main()
