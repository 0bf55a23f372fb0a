"""Numbers of bytes as people write and read them."""

from __future__ import annotations

import re

from ckpt_tool.errors import UsageError

LARGEST_SIZE = 1 << 62  # bytes; no file, and no memory, is larger


def parse_size(text: str) -> int:
    """``1GiB``, ``512MiB``, ``5GB``, ``1000000`` -> bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if match is not None:
        base = 1024 if match[3] else 1000
        size = float(match[1]) * base ** " kmgt".index(match[2].lower() or " ")
        if size < LARGEST_SIZE:
            return int(size)
    raise UsageError(f"{text!r} is not a size. Write it like 512MiB, 2GB or 1000000.")


def as_size(value: object, name: str) -> int:
    """A size given from Python, as a number of bytes or as text; ``name`` is the parameter's."""
    if isinstance(value, str):
        return parse_size(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise UsageError(f"{name}={value!r} is not a size. Pass a number of bytes, or text like '512MiB'.")


def size_text(nbytes: int | None) -> str | None:
    """5000000000 -> ``5GB``: the shortest text that ``parse_size`` reads as this number."""
    if nbytes is None:
        return None
    for power in (4, 3, 2, 1):
        if nbytes and nbytes % 1000**power == 0:
            return f"{nbytes // 1000**power}{' kMGT'[power]}B"
    return str(nbytes)


def human_bytes(count: float) -> str:
    """``1.5 GB``: powers of ten, as disks and networks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
