"""What the user sees: progress on stderr, tables and JSON on stdout."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from types import TracebackType
from typing import Any

from ckpt_tool.printable import printable
from ckpt_tool.sizes import human_bytes as human_bytes
from ckpt_tool.storage import Location

_PERIOD = 10.0  # seconds between lines where there is no terminal


class Progress:
    """Bytes done, rate and time left: a bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self, label: str, *, quiet: bool = False, resumable: bool = True) -> None:
        self._label, self._quiet, self._resumable = label, quiet, resumable
        self._lock = threading.Lock()
        self._done = self._total = 0
        self._bar: Any = None
        self._target: Location | None = None
        self._began = self._spoke = time.monotonic()

    def start(self, total: int) -> None:
        self.close()  # the bar of the phase before, if there was one
        self._done, self._total = 0, total
        self._began = self._spoke = time.monotonic()
        if not self._quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, desc=self._label, unit="B", unit_scale=True, file=sys.stderr, leave=False
            )

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._bar is not None:
                self._bar.update(count)
            elif not self._quiet and time.monotonic() - self._spoke >= _PERIOD:
                self._speak()

    def _speak(self) -> None:
        self._spoke = time.monotonic()
        rate = self._done / max(1e-9, self._spoke - self._began)
        left = (self._total - self._done) / rate if rate else 0.0
        share = 100 * self._done / max(1, self._total)
        say(
            f"{self._label}: {human_bytes(self._done)} of {human_bytes(self._total)} ({share:.0f} %), "
            f"{human_bytes(rate)}/s, {left:.0f} s left"
        )

    def published(self, target: Location) -> None:
        """The result is there: whatever ends the command from now on, the user is told so."""
        self._target = target

    def close(self) -> None:
        """Take the bar away."""
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        if kind is None or not issubclass(kind, KeyboardInterrupt | OSError):
            return
        if self._target is not None:
            say(f"ckpt-tool: {self._target} is complete")
        elif self._resumable and issubclass(kind, KeyboardInterrupt):
            say("ckpt-tool: nothing was published, and the same command goes on from here")


def print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=2, default=str), flush=True)  # noqa: T201


def print_fields(title: str, fields: list[tuple[str, str]]) -> None:
    """A titled two-column list."""
    title, fields = printable(title), [(name, printable(value)) for name, value in fields]
    if not sys.stdout.isatty():
        _print_plain(title, [[name, value] for name, value in fields], set())
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in fields:
        table.add_row(name, escape(value))
    Console().print(table)


def print_table(title: str, columns: list[str], rows: list[list[str]], *, right: set[str]) -> None:
    """A table; columns in ``right`` are aligned to the right."""
    title, rows = printable(title), [[printable(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        _print_plain(title, [columns, *rows], {i for i, name in enumerate(columns) if name in right})
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    Console().print(table)


def _print_plain(title: str, lines: list[list[str]], right: set[int]) -> None:
    """For a pipe: whole lines in aligned columns, without blanks at their ends."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)] if lines else []
    print(title)  # noqa: T201
    for line in lines:
        cells = [
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())  # noqa: T201
    sys.stdout.flush()


def say(message: str) -> None:
    """A sentence for the user, beside the results: on stderr. No run fails because nobody can read it."""
    with contextlib.suppress(OSError):
        print(printable(message), file=sys.stderr, flush=True)  # noqa: T201


def show(line: str) -> None:
    """A line of the result, on stdout."""
    print(printable(line))  # noqa: T201


def discard_stdout() -> None:
    """What could not be written would be tried again, and complained about, when the interpreter ends."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
