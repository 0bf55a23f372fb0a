"""How long ``doctor`` and the search for copied experts take beside ``cp`` of the same bytes.

python benchmarks/doctor.py --gb 0.7 8 --pairs 5 --work DIR
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import Job, Place, Summary, alternate, measure, peak, ratios, remove, size, walls

ROOT = Path(__file__).resolve().parent.parent
_DOCTOR = "import sys; from ckpt_tool import api; api.doctor(sys.argv[1])"
_COPIES = "import sys; from ckpt_tool import api; api.find_copied_experts(sys.argv[1])"
_START = "from ckpt_tool import api; import numpy"


def rows(place: Place, pairs: int) -> list[str]:
    """One line of the table for each job; the random values of the checkpoint give a finding, so the
    functions are called and not the command, which would end with 1."""
    make = [sys.executable, str(ROOT / "benchmarks" / "make_checkpoint.py"), str(place.source)]
    if not place.source.exists():
        measure([*make, "--gb", f"{place.gb:g}"])
    copy = place.out("cp")
    jobs = [Job(name, [sys.executable, "-c", code, str(place.source)]) for name, code in (
        ("doctor", _DOCTOR), ("copied experts", _COPIES), ("start", _START)
    )]  # fmt: skip
    jobs.append(Job("cp", ["cp", "-r", str(place.source), str(copy)], [copy]))
    found = alternate(jobs, pairs, env={"PYTHONPATH": str(ROOT)})
    start = Summary.of([usage.cpu for usage in found["start"]]).median
    lines = []
    for name, share in (("doctor", 1.0), ("copied experts", None)):
        usages = found[name]
        cpu = Summary.of([usage.cpu for usage in usages]).median
        speed = f"{size(place.source) / (cpu - start):.1f}" if share else "-"
        lines.append(
            f"| {name} | {size(place.source):.2f} | {walls(usages).text()} | {walls(found['cp']).text()} | "
            f"**{ratios(usages, found['cp']).text()}** | {cpu:.2f} | {speed} | {peak(usages):.0f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, nargs="+", default=[0.7])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--work", type=Path, required=True)
    given = parser.parse_args()
    print(
        "| job | GB | ckpt-tool, s | cp, s | ckpt-tool / cp | CPU, s | GB/s of CPU time | peak RSS, MiB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for gb in given.gb:
        place = Place(given.work, gb, "doctor-")
        try:
            print("\n".join(rows(place, given.pairs)), flush=True)
        finally:
            remove([place.home])


if __name__ == "__main__":
    main()
