"""What a way to carry out a plan is to the rest of the program: one function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ckpt_tool.execute.budget import Budget
from ckpt_tool.execute.meter import Meter
from ckpt_tool.plan import Plan, PlannedFile
from ckpt_tool.storage import Reader, Writer
from ckpt_tool.written import WrittenFile

# By file, what was read of each of its records, as ``execute.checked`` has it.
Passed = Mapping[str, Sequence[tuple[Any, ...]]]


class Source(Reader, Protocol):
    """A reader that checks what is read. It can be pickled, and is opened anew where it arrives."""

    def passed(self) -> Passed:
        """What was read here."""
        ...

    def take_over(self, passed: Passed) -> None:
        """Check what another process has read of the same source as if it had been read here."""
        ...


class Executor(Protocol):
    """Writes every file of a plan. ``execute.local.execute`` is one; ``execute.writing`` has what others
    are made of. Plan, source and sink can be pickled.
    """

    def __call__(
        self,
        plan: Plan,
        source: Source,
        sink: Writer,
        budget: Budget,
        *,
        meter: Meter,
        skip: Callable[[PlannedFile], bool],
        on_file: Callable[[WrittenFile], None],
    ) -> None:
        """Write every file of ``plan`` into ``sink``, and close that.

        Args:
            budget: what all buffers of all processes hold together at most.
            meter: told of every byte written, in any steps; the caller has started it.
            skip: files that are there already.
            on_file: told of every finished file, one call at a time, by the process of the caller.

        Raises:
            CkptToolError: the first failure; nothing writes any more.
        """
        ...
