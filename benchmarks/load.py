"""What resuming on other hardware costs, conversion and load, by either way; print tables in markdown.

    python benchmarks/load.py --gb 0.3 --runs 3 --work DIR

The real engine trains a Mixtral on 4 ranks at EP 2 for a step and saves it. At world 2 it goes on from

- ``ckpt-tool reshard`` and a plain ``load_checkpoint``,
- ``ds_to_universal`` and the engine's universal load.

The engine runs on CPU, as in the tests, by ``tests/engine/deepspeed_run.py``; here its ranks also say what
the load took. ``DIR`` needs about four times the size.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import Job, Summary, Usage, alternate, measure, peak, remove, walls

from tests.engine import deepspeed_run as harness

ROOT = Path(__file__).resolve().parents[1]
SOURCE, TARGET = (4, 2), (2, 2)  # world size, EP size
AFTER, MORE = 1, 2  # steps before the checkpoint, steps after it
TAG = f"global_step{AFTER}"
PLAIN, UNIVERSAL = "reshard, plain load", "ds_to_universal, universal load"
RANKS = "--ranks"  # what the launcher of the ranks puts before the harness's own arguments
MB = 1e6


# ---------------------------------------------------------------------------------------------
# In the child that forks the ranks


@dataclass(frozen=True)
class Loaded:
    """What ``load_checkpoint`` took in one rank. The peak is that of the load alone; ``before`` includes
    what ranks share with their parent: all imported modules."""

    wall: float
    read_bytes: int
    files: int  # opened by torch.load
    before_mib: float
    peak_mib: float


def ranks_main(arguments: Sequence[str]) -> int:
    """The harness's child, with a load that is measured."""
    load = harness._load

    def measured(spec: harness.RunSpec, engine: Any) -> dict[str, Any]:
        if spec.load is None:
            return load(spec, engine)
        import torch
        import torch.distributed as dist

        with mock.patch.object(torch, "load", side_effect=torch.load) as opened:
            dist.barrier()
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
            before_mib, read, start = status_mib("VmRSS"), read_bytes(), time.monotonic()
            client_state = load(spec, engine)
            wall, read = time.monotonic() - start, read_bytes() - read
        loaded = Loaded(wall, read, opened.call_count, before_mib, status_mib("VmHWM"))
        report(spec, dist.get_rank()).write_text(json.dumps(dataclasses.asdict(loaded)))
        return client_state

    harness._load = measured
    return harness.main(arguments[-1])


def read_bytes() -> int:
    """All bytes this process got from read calls so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def status_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[key].split()[0]) / 1024


def report(spec: harness.RunSpec, rank: int) -> Path:
    """Where a rank says what its load took."""
    assert spec.result is not None
    return Path(f"{spec.result}.rank{rank}")


def reported(spec: harness.RunSpec) -> list[Loaded]:
    """What all ranks of a run said."""
    return [Loaded(**json.loads(report(spec, rank).read_text())) for rank in range(spec.world)]


# ---------------------------------------------------------------------------------------------
# The runs


def model(nbytes: float) -> harness.RunSpec:
    """The model that make_checkpoint.py has for the size."""
    from make_checkpoint import EXPERTS, model_of

    sizes = model_of(nbytes)
    heads = {"num_attention_heads": sizes.heads, "num_key_value_heads": sizes.kv_heads, "head_dim": 64}
    return harness.RunSpec(
        experts=EXPERTS,
        hidden=sizes.hidden,
        intermediate=sizes.inner,
        layers=sizes.layers,
        vocab=sizes.vocab,
        model_config=heads | {"initializer_range": 0.02},
        lr=1e-3,
    )


def run_all(specs: Sequence[harness.RunSpec], work: Path) -> list[harness.RunResult]:
    """Run the specs in one interpreter: ours, in place of the harness's."""
    launcher = work / "python"
    words = [sys.executable, str(Path(__file__).resolve()), RANKS]
    launcher.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    launcher.chmod(0o755)
    results = harness.run_each(specs, python=str(launcher), timeout=600.0 * len(specs))
    for result in results:
        if isinstance(result, RuntimeError):
            raise result
    return [result for result in results if isinstance(result, harness.RunResult)]


def conversions(source: Path, targets: Mapping[str, Path]) -> list[Job]:
    ours, theirs = targets[PLAIN], targets[UNIVERSAL]
    module = [sys.executable, "-m"]
    world, ep = map(str, TARGET)
    options = ["--world", world, "--ep", ep, "--no-fsync", "--quiet"]
    folders = ["--input_folder", str(source / TAG), "--output_folder", str(theirs / f"{TAG}_universal")]
    return [
        Job(PLAIN, [*module, "ckpt_tool", "reshard", str(source), str(ours), *options], [ours]),
        Job(UNIVERSAL, [*module, "deepspeed.checkpoint.ds_to_universal", *folders], [theirs]),
    ]


# ---------------------------------------------------------------------------------------------
# The tables


def size(path: Path) -> int:
    """Of all files of a directory, in bytes."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def conversion_row(name: str, usages: Sequence[Usage], target: Path) -> list[str]:
    return [
        name,
        walls(usages).text(),
        f"{peak(usages):.0f}",
        f"{max(usage.read_bytes for usage in usages) / MB:.0f}",
        f"{size(target) / MB:.0f}",
    ]


def load_row(name: str, runs: Sequence[Sequence[Loaded]], result: harness.RunResult) -> list[str]:
    """Of every run, the slowest rank; of all, the rank that read most and the largest."""
    ranks = [rank for run in runs for rank in run]
    most = max(ranks, key=lambda rank: rank.read_bytes)
    largest = max(ranks, key=lambda rank: rank.peak_mib)
    return [
        name,
        Summary.of([max(rank.wall for rank in run) for run in runs]).text(),
        f"{most.read_bytes / MB:.0f}",
        str(most.files),
        f"{largest.peak_mib:.0f}",
        f"{largest.before_mib:.0f}",
        losses(result.losses),
    ]


def losses(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:.6f}" for number in numbers)


def print_table(*rows: Sequence[str]) -> None:
    for number, row in enumerate(rows):
        print(f"| {' | '.join(row)} |")
        if number == 0:
            print(f"|{'---|' * len(row)}")
    print(flush=True)


def compare(gb: float, runs: int, work: Path) -> None:
    """Save, convert both ways, load both ways in turn, and print."""
    source = work / "source"
    targets = {PLAIN: work / "resharded", UNIVERSAL: work / "universal"}
    first = dataclasses.replace(
        model(gb * 1e9),
        world=SOURCE[0],
        ep=SOURCE[1],
        steps=AFTER + MORE,
        save=harness.Save(str(source), after=AFTER),
    )
    (uninterrupted,) = run_all([first], work)

    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # Run from byte code, as if installed.
    env = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "", "DS_ACCELERATOR": "cpu"}
    jobs = conversions(source, targets)
    converted = alternate(jobs, runs, env=env)
    for job in jobs:  # once more: measured outputs are removed
        measure(job.command, env=env)

    resumed = dataclasses.replace(
        first, world=TARGET[0], ep=TARGET[1], steps=MORE, start_step=AFTER, save=None, model_seed=99
    )
    specs = {
        (name, number): dataclasses.replace(
            resumed,
            load=harness.Load(str(target), universal=name == UNIVERSAL),
            result=str(work / f"{target.name}-{number}.json"),
        )
        for number in range(runs)
        for name, target in targets.items()
    }
    results = dict(zip(specs, run_all(list(specs.values()), work), strict=True))

    print(f"Source: {size(source) / MB:.0f} MB, world {SOURCE[0]}, EP {SOURCE[1]}.")
    print(f"Target: world {TARGET[0]}, EP {TARGET[1]}.\n")
    print_table(
        ["conversion", "wall, s", "peak RSS, MiB", "read, MB", "written, MB"],
        *(conversion_row(name, converted[name], target) for name, target in targets.items()),
    )
    rows = []
    for name in targets:
        loads = [reported(specs[name, number]) for number in range(runs)]
        rows.append(load_row(name, loads, results[name, 0]))
    print_table(
        ["load", "wall, s", "read per rank, MB", "files per rank", "peak RSS of a rank, MiB",
         "before it, MiB", f"losses of the next {MORE} steps"],
        *rows,
        ["uninterrupted", "", "", "", "", "", losses(uninterrupted.losses[AFTER:])],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=0.3, help="size of the checkpoint, in GB")
    parser.add_argument("--runs", type=int, default=3, help="measured conversions and loads of each kind")
    parser.add_argument("--work", type=Path, required=True, help="where checkpoints are made and removed")
    arguments = parser.parse_args()
    work = arguments.work.resolve() / "load"
    remove([work])
    work.mkdir(parents=True)
    python = platform.python_version()
    print(f"{os.cpu_count()} cores, Python {python}, {arguments.runs} runs\n", flush=True)
    try:
        compare(arguments.gb, arguments.runs, work)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    if RANKS in sys.argv[1:2]:
        sys.exit(ranks_main(sys.argv[2:]))
    main()
