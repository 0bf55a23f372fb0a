"""What a conversion did, as people and programs read it."""

from __future__ import annotations

from ckpt_tool import report
from ckpt_tool.api import Result
from ckpt_tool.canonical import Topology
from ckpt_tool.sizes import human_bytes

_ASSUMED_RATE = 10**9  # bytes per second, for an estimate: a disk that reads and writes


def show(result: Result, *, dry_run: bool, json: bool, quiet: bool) -> None:
    if json:
        report.print_json(_plain(result, dry_run=dry_run))
    elif not quiet:
        _for_people(result, dry_run=dry_run)


def _plain(result: Result, *, dry_run: bool) -> dict[str, object]:
    return {
        "source": result.source,
        "source_format": result.source_format,
        "target": result.target,
        "dry_run": dry_run,
        "topology": {"source": _sizes(result.was), "target": _sizes(result.becomes)},
        "bytes_read": result.bytes_read,
        "bytes_written": result.bytes_written,
        "files": result.files,
        "resumed": result.resumed,
        "seconds": round(result.seconds, 3),
        "checked_bytes": result.checked_bytes,
        "unchecked_bytes": dict(result.unchecked_bytes),
        "peak_memory_bytes": result.peak_memory_bytes,
        "disk_bytes": result.disk_bytes,
        "kept": dict(result.kept),
        "left_out": dict(result.left_out),
        "casts": [list(cast) for cast in result.casts],
        "notes": list(result.notes),
        "verified": result.verdict.passed if result.verdict else None,
        "load_with": result.loading,
    }


def _sizes(topology: Topology | None) -> dict[str, int | None] | None:
    if topology is None or topology.world_size is None:
        return None
    return {"world_size": topology.world_size, "ep_size": topology.ep_size}


def _for_people(result: Result, *, dry_run: bool) -> None:
    fields = [
        ("source", f"{result.source} ({result.source_format})"),
        ("target", result.target),
        ("topology", change(result.was, result.becomes)),
        ("files", f"{result.files:,}"),
        *([("resumed", f"{result.resumed} of {result.files} files kept")] if result.resumed else []),
        ("read", human_bytes(result.bytes_read)),
        ("written", human_bytes(result.bytes_written)),
        ("buffers", f"{human_bytes(result.peak_memory_bytes)} at most"),
    ]
    if dry_run:
        moved = result.bytes_read + result.bytes_written
        fields.append(("disk", f"{human_bytes(result.disk_bytes)} needed"))
        fields.append(
            ("time", f"about {_duration(max(1.0, moved / _ASSUMED_RATE))} where the disks move 1 GB/s")
        )
    else:
        rate = result.bytes_written / max(result.seconds, 1e-9)
        fields.append(("time", f"{_duration(result.seconds)}, {human_bytes(rate)}/s"))
        fields.append(("checked", _checked(result)))
    if result.kept:
        kinds = ", ".join(f"{count:,} of {state}" for state, count in result.kept.items())
        fields.append(("kept", f"values: {kinds}"))
    if result.casts:
        kinds = ", ".join(sorted({f"{source} -> {target}" for _, source, target in result.casts}))
        fields.append(("cast", f"{len(result.casts)} tensors, {kinds}"))
    reasons = list(result.left_out.values())
    for reason in sorted(set(reasons)):
        fields.append(("left out", f"{reasons.count(reason)} tensors: {reason}"))
    if result.verdict:
        equal = "after rounding" if result.casts else "bit for bit"
        compared = human_bytes(result.verdict.bytes_compared)
        fields.append(("verified", f"{result.verdict.tensors} tensors, {compared}, equal {equal}"))
    elif not dry_run:
        fields.append(("verified", "no: --verify compares the result with the source"))
    if result.loading:
        fields.append(("load it", result.loading))
    report.print_fields("Plan (nothing was written)" if dry_run else "Done", fields)
    for note in result.notes + (result.verdict.notes if result.verdict else ()):
        report.say(f"note: {note}")


def change(was: Topology, becomes: Topology | None) -> str:
    """``world 4, EP 2 -> world 2, EP 1``."""
    before, after = _ranks(was), _ranks(becomes)
    return f"{after}, as it was" if before == after else f"{before} -> {after}"


def _ranks(topology: Topology | None) -> str:
    if topology is None or topology.world_size is None:
        return "no ranks"
    ep = f", EP {topology.ep_size}" if topology.ep_size is not None else ""
    return f"world {topology.world_size}{ep}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _checked(result: Result) -> str:
    """What of the source was compared with its own checksums, and why the rest was not."""
    if not result.checked_bytes and not result.unchecked_bytes:
        return "nothing of the source: it has no checksums of what was read"
    said = [f"{human_bytes(result.checked_bytes)} of the source, by its own checksums"]
    said += [
        f"not {human_bytes(size)}: {why}"
        for why, size in sorted(result.unchecked_bytes.items(), key=lambda item: -item[1])
    ]
    return "; ".join(said)
