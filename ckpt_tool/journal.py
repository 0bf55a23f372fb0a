"""What a staging directory says of itself, in lines of JSON that are only ever added to.

The first is the command's identity. A ``run`` says what its files may be judged by: the state of every
source file before any of it was read, whether files were made durable, and in which start of the machine.
Then comes a line for each file that is complete, and one for files to be written again (``discarded``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, NamedTuple

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


def read_journal(data: bytes) -> Journal:
    """All entries of a journal. Where one makes no sense (an earlier release's may not), nothing staged is
    relied upon: the run is None."""
    found = Journal()
    for number, (entry, length) in enumerate(_lines(data)):
        found.whole += length
        if number == 0:
            found.identity = entry
            continue
        try:
            _add(found, entry)
        except (TypeError, ValueError, KeyError, AttributeError):
            found.run, found.files = None, {}
    return found


def _add(found: Journal, entry: Any) -> None:
    """Raises TypeError, ValueError, KeyError or AttributeError where an entry makes no sense."""
    if "run" in entry:
        found.run = _run(entry["run"])
    elif "discarded" in entry:
        for path in entry["discarded"]:
            found.files.pop(path, None)
    else:
        file = as_written(entry, crcs=True)
        if PurePath(file.path).is_absolute() or ".." in PurePath(file.path).parts:
            raise ValueError(f"{file.path} is not inside the staging directory")
        found.files[file.path] = file


def file_entry(file: WrittenFile) -> dict[str, Any]:
    return {"path": file.path, "size": file.size, "extents": file.extents}


def boot() -> str:
    """Which start of the machine this is; empty where it does not say."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""


def _lines(data: bytes) -> Iterator[tuple[Any, int]]:
    """Entries and the bytes they take, up to a line that was cut off by a crash."""
    for line in data.split(b"\n")[:-1]:
        try:
            yield json.loads(line), len(line) + 1
        except (ValueError, RecursionError):
            return


def _run(said: Any) -> Run:
    sources = {path: tuple(token) for path, *token in said["sources"]}
    if not all(type(part) in (int, str) for path, token in sources.items() for part in (path, *token)):
        raise ValueError("what it says of a source is no path and token")
    return Run(sources, said["synced"] is True, str(said["boot"]))
