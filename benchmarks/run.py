"""Time ckpt-tool against ``cp`` and DeepSpeed's own converter; print tables in markdown.

    python benchmarks/run.py --gb 1 8 --pairs 5 --peer --work DIR

Every ratio is between two runs side by side: the jobs of a row take turns, all after one warm-up.
Outputs are removed between runs. ``DIR`` should be on the disk of interest and needs about three
times the largest size.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from measure import Job, Place, Usage, alternate, measure, peak, ratios, remove, size, walls

ROOT = Path(__file__).resolve().parents[1]
MAKE = Path(__file__).resolve().with_name("make_checkpoint.py")
TAG = "global_step100"
JOBS = ("universal", "reshard", "consolidate", "consolidate-bf16")
OF_THE_WHOLE_SOURCE = ("universal", "reshard")  # the others read the masters only
BUDGETS = ("64MiB", "512MiB")
# ds_to_universal is measured where it takes seconds and gigabytes, not minutes and more than there is.
PEER_UP_TO = 1.0
# The command line is run from this checkout, installed or not, and from byte code, as if installed.
ENV = {
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
    "PYTHONDONTWRITEBYTECODE": "",
}
# Where files can share their blocks, cp would copy nothing.
COPY = ("cp", "-r", "--reflink=never")


class ZeroPlace(Place):
    """A ZeRO-3 checkpoint and the model consolidated from it."""

    @property
    def tag(self) -> Path:
        return self.source / TAG

    @property
    def fp32(self) -> Path:
        """The published fp32 model: what the copies that consolidation is compared with copy."""
        return self.home / "fp32"

    def make(self, world: int, ep: int) -> None:
        if not (self.source / "config.json").is_file():  # written last
            remove([self.source])
            sizes = ["--gb", f"{self.gb:g}", "--world", str(world), "--ep", str(ep)]
            measure([sys.executable, str(MAKE), str(self.source), *sizes])

    def make_fp32(self) -> None:
        if not self.fp32.is_dir():
            measure(tool("consolidate", str(self.source), str(self.fp32), "--no-fsync"), env=ENV)


def tool(verb: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "ckpt_tool", verb, *arguments, "--quiet"]


def command(job: str, place: ZeroPlace, out: Path, *options: str) -> list[str]:
    """ckpt-tool's command of a job."""
    if job == "universal":
        return tool("convert", str(place.source), str(out), "--to", "universal", *options)
    if job == "reshard":
        return tool("reshard", str(place.source), str(out), "--ep", "1", "--world", "2", *options)
    if job == "consolidate":
        return tool("consolidate", str(place.source), str(out), *options)
    if job == "consolidate-bf16":
        return tool("consolidate", str(place.source), str(out), "--dtype", "bf16", *options)
    raise ValueError(job)


def copied(job: str, place: ZeroPlace) -> Path:
    """What ``cp -r`` copies for comparison: as many bytes as the job reads."""
    return place.tag if job in OF_THE_WHOLE_SOURCE else place.fp32


@dataclass(frozen=True)
class Row:
    """One line of the table of times."""

    job: str
    gb: float
    tool: Sequence[Usage]
    copy: Sequence[Usage]
    peer: Sequence[Usage] = ()

    def cells(self, with_peer: bool) -> list[str]:
        peer = ["", ""]
        if self.peer:
            peer = [walls(self.peer).text(1), f"{peak(self.peer):.0f}"]
        return [
            self.job,
            f"{self.gb:.2f}",
            walls(self.tool).text(),
            walls(self.copy).text(),
            f"**{ratios(self.tool, self.copy).text()}**",
            f"{peak(self.tool):.0f}",
            *(peer if with_peer else []),
        ]


def time_job(job: str, place: ZeroPlace, pairs: int, *, fsync: bool, peer: bool) -> Row:
    """Run a job, its copy and its peer in turn."""
    ours, theirs, peers = (place.out(name) for name in ("tool", "copy", "peer"))
    copy = [*COPY, str(copied(job, place)), str(theirs)]
    if fsync:
        copy = ["sh", "-c", '"$@" && sync -f "$0"', str(theirs), *copy]
    jobs = [
        Job("tool", command(job, place, ours, *([] if fsync else ["--no-fsync"])), [ours]),
        Job("copy", copy, [theirs]),
    ]
    if peer:
        paths = ["--input_folder", str(place.tag), "--output_folder", str(peers / f"{TAG}_universal")]
        converter = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *paths]
        jobs.append(Job("peer", converter, [peers]))
    found = alternate(jobs, pairs, env=ENV)
    label = f"{job}, fsync" if fsync else job
    return Row(label, size(copied(job, place)), found["tool"], found["copy"], found.get("peer", ()))


def times(
    places: Sequence[ZeroPlace], jobs: Sequence[str], pairs: int, *, peer: bool
) -> Iterable[list[str]]:
    """The table of times, row by row, with its head."""
    yield [
        "job", "GB read", "ckpt-tool, s", "cp, s", "ckpt-tool / cp", "peak RSS, MiB",
        *(["ds_to_universal, s", "its largest process, MiB"] if peer else []),
    ]  # fmt: skip
    for place in places:
        if not set(jobs) <= set(OF_THE_WHOLE_SOURCE):
            place.make_fp32()
        for job in jobs:
            with_peer = peer and job == "universal" and place.gb <= PEER_UP_TO
            yield time_job(job, place, pairs, fsync=False, peer=with_peer).cells(peer)
        # once is enough to say what durability costs
        yield time_job(jobs[0], place, pairs, fsync=True, peer=False).cells(peer)
        remove([place.fp32])


def memory(places: Sequence[ZeroPlace]) -> Iterable[list[str]]:
    """The table of peaks at several budgets, row by row, with its head."""
    yield ["job", *(f"{size(place.tag):.1f} GB, {budget}" for place in places for budget in BUDGETS)]
    cells: dict[str, list[str]] = {name: [] for name in (*JOBS, "verify")}
    for place in places:
        for budget in BUDGETS:
            limit = ["--max-memory", budget]
            for job in JOBS:
                out = place.out(job)
                usage = measure(command(job, place, out, "--no-fsync", *limit), env=ENV)
                cells[job].append(f"{usage.peak_mib:.0f}")
                if job != "universal":  # verify reads that one
                    remove([out])
            both = [str(place.source), str(place.out("universal"))]
            cells["verify"].append(f"{measure(tool('verify', *both, *limit), env=ENV).peak_mib:.0f}")
            remove([place.out("universal")])
    for name, values in cells.items():
        yield [name, *values]


def print_table(rows: Iterable[list[str]]) -> None:
    for number, row in enumerate(rows):
        print(f"| {' | '.join(row)} |", flush=True)
        if number == 0:
            print(f"|{'---|' * len(row)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, nargs="*", default=[1.0], help="sizes to time, in GB")
    parser.add_argument("--pairs", type=int, default=5, help="timed runs of every job")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS)
    parser.add_argument("--peer", action="store_true", help="ds_to_universal, too, at up to 1 GB")
    parser.add_argument("--memory-gb", type=float, nargs="*", default=[0.3, 3.0], help="sizes, in GB")
    parser.add_argument("--world", type=int, default=4)
    parser.add_argument("--ep", type=int, default=2)
    parser.add_argument("--work", type=Path, required=True, help="where checkpoints are made and removed")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints for another run")
    arguments = parser.parse_args()
    work = arguments.work.resolve()

    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, {arguments.pairs} pairs\n")
    for sizes, table in (
        (arguments.gb, lambda p: times(p, arguments.jobs, arguments.pairs, peer=arguments.peer)),
        (arguments.memory_gb, memory),
    ):
        places = [ZeroPlace(work, gb) for gb in sizes]
        for place in places:
            place.make(arguments.world, arguments.ep)
        if places:
            print_table(table(places))
            print()
    if not arguments.keep:
        for gb in {*arguments.gb, *arguments.memory_gb}:
            shutil.rmtree(ZeroPlace(work, gb).home, ignore_errors=True)


if __name__ == "__main__":
    main()
