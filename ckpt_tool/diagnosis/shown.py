"""A diagnosis as JSON, and as text for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ckpt_tool.diagnosis.findings import Diagnosis
from ckpt_tool.report import human_bytes


def as_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """The stable keys of ``doctor --json``."""
    return {
        "path": diagnosis.path,
        "format": diagnosis.format,
        "step": diagnosis.step,
        "healthy": diagnosis.healthy,
        "tensors": diagnosis.tensors,
        "bytes_read": diagnosis.nbytes,
        "findings": [
            {
                "check": finding.check,
                "severity": finding.severity.value,
                "message": finding.message,
                "meaning": finding.meaning,
                "remedy": finding.remedy,
                "subjects": list(finding.subjects),
            }
            for finding in diagnosis.findings
        ],
        "notes": list(diagnosis.notes),
    }


def as_lines(diagnosis: Diagnosis, *, quiet: bool) -> Iterator[str]:
    """Findings, what each means and what to do about it; notes, and what was read."""
    for finding in diagnosis.findings:
        yield f"{finding.severity.value.upper()} [{finding.check}] {finding.message}"
        yield f"    It means: {finding.meaning}"
        yield f"    To do: {finding.remedy}"
    if not quiet:
        yield from (f"note: {note}" for note in diagnosis.notes)
    counts = [
        f"{sum(finding.severity is severity for finding in diagnosis.findings)} {severity.value}"
        for severity in dict.fromkeys(finding.severity for finding in diagnosis.findings)
    ]
    read = f"{diagnosis.tensors:,} tensors, {human_bytes(diagnosis.nbytes)} read"
    step = f", step {diagnosis.step}" if diagnosis.step is not None else ""
    if diagnosis.format is None:
        read, step = "values were not examined", ""
    yield f"{', '.join(counts) or 'Nothing found'}: {diagnosis.path} ({read}{step})."
