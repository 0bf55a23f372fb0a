"""What a staging directory says of itself, in lines of JSON that are only ever added to.

Each has a checksum of itself (``sum``). The first is the command's identity. A ``run`` says what its files
may be judged by: the state of every source file before any of it was read, whether files were made durable,
and in which start of the machine.
Then comes a line for each file that is complete, and one for files to be written again (``discarded``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import xxhash

from ckpt_tool.storage import Token
from ckpt_tool.written import WrittenFile, as_written

# Linux: random(4). Another number after every start of the machine.
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Run(NamedTuple):
    """What holds for all files that are complete at the end of a run: the ``sources`` they were made from,
    and whether each was ``synced`` or is only in the memory of a machine since its start ``boot``."""

    sources: Mapping[str, Token]
    synced: bool
    boot: str

    def entry(self) -> dict[str, Any]:
        sources = [[path, *state] for path, state in sorted(self.sources.items())]
        return {"run": {"synced": self.synced, "boot": self.boot, "sources": sources}}

    def is_in_memory(self) -> bool:
        """Whether the machine still holds what was written and not synced."""
        return bool(self.boot) and self.boot == boot()


@dataclass
class Journal:
    """What the lines say together. ``whole`` are the bytes they take; a torn last line is not counted."""

    identity: Any = None
    run: Run | None = None
    files: dict[str, WrittenFile] = field(default_factory=dict)
    whole: int = 0


def journal_line(entry: Mapping[str, Any]) -> bytes:
    """An entry as it is added to a journal."""
    return json.dumps({**entry, "sum": _sum(entry)}).encode() + b"\n"


def _sum(entry: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(entry).encode())


def read_journal(data: bytes) -> Journal:
    """All entries of a journal. Where one makes no sense or is not what its checksum says (an earlier
    release's have none), nothing that was staged before it is relied upon: it may have taken that back. Of
    a journal without a right first line nothing is."""
    found = Journal()
    for number, line in enumerate(data.split(b"\n")[:-1]):  # what a crash cut off has no end
        try:
            entry, right = _parsed(line)
        except (ValueError, TypeError, RecursionError):
            if number == 0:
                return found
            right = False
        else:
            if number == 0:
                found.identity = entry
            else:
                right = right and _add(found, entry)
        if not right:
            found.run, found.files = None, {}
        found.whole += len(line) + 1
    return found


def _parsed(line: bytes) -> tuple[Any, bool]:
    """A line's entry without its checksum, and whether it has one.

    Raises:
        ValueError, TypeError, RecursionError: the line is not what was written.
    """
    entry = json.loads(line)
    stated = entry.pop("sum", None) if isinstance(entry, dict) else None
    if stated is not None and stated != _sum(entry):
        raise ValueError("the checksum of a line is wrong")
    return entry, stated is not None


def _add(found: Journal, entry: Any) -> bool:
    """Whether an entry makes sense."""
    try:
        if "run" in entry:
            found.run = _run(entry["run"])
        elif "discarded" in entry:
            for path in entry["discarded"]:
                found.files.pop(path, None)
        else:
            file = as_written(entry, crcs=True)
            if PurePath(file.path).is_absolute() or ".." in PurePath(file.path).parts:
                return False
            found.files[file.path] = file
    except (TypeError, ValueError, KeyError, AttributeError):
        return False
    return True


def file_entry(file: WrittenFile) -> dict[str, Any]:
    return {"path": file.path, "size": file.size, "extents": file.extents}


def boot() -> str:
    """Which start of the machine this is; empty where it does not say."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""


def _run(said: Any) -> Run:
    sources = {path: tuple(token) for path, *token in said["sources"]}
    if not all(type(part) in (int, str) for path, token in sources.items() for part in (path, *token)):
        raise ValueError("what it says of a source is no path and token")
    return Run(sources, said["synced"] is True, str(said["boot"]))
