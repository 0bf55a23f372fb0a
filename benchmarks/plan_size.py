"""What a plan weighs that is sent to another process, and how long it takes there until a file is laid out.

    python benchmarks/plan_size.py SOURCE [TARGET ...]      (sparse_zero3.py makes sources)

A row for each target (universal, zero3, dcp, hf): files, bytes of the pickle, seconds to make it and to
load it, and to lay out one file in the process that loaded it.
"""

from __future__ import annotations

import argparse
import pickle
import time
from itertools import pairwise
from pathlib import Path

from ckpt_tool.formats.base import Request
from ckpt_tool.formats.known import targets
from ckpt_tool.formats.registry import open_checkpoint
from ckpt_tool.model_files import find_config
from ckpt_tool.plan import Plan, make_plan


def planned(source: Path, to: str) -> Plan:
    reader, checkpoint = open_checkpoint(source)
    reader.close()
    config, beside = find_config(source, None)
    target = targets()[to]
    written = target.load()
    prepared = written.prepare(Request(to, checkpoint, target.values({}), config=config, beside=beside))
    return make_plan(written.layout(prepared.checkpoint, prepared.options), prepared.checkpoint)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("targets", nargs="*", default=["universal", "zero3"])
    given = parser.parse_args()
    print("| target | planned, s | files | pickle, bytes | pickled, s | loaded, s | one file, s |")
    print("|---|---|---|---|---|---|---|")
    for to in given.targets:
        times = [time.perf_counter()]
        plan = planned(given.source, to)
        times.append(time.perf_counter())
        sent = pickle.dumps(plan)
        times.append(time.perf_counter())
        arrived = pickle.loads(sent)
        times.append(time.perf_counter())
        arrived.files[len(arrived.files) // 2].layout()
        times.append(time.perf_counter())
        took = [f"{after - before:.2f}" for before, after in pairwise(times)]
        row = (to, took[0], len(plan.files), f"{len(sent):,}", *took[1:])
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
