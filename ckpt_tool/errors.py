"""The exceptions of ckpt-tool: one small hierarchy, each with the exit code it ends the program with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ckpt_tool.printable import printable


class CkptToolError(Exception):
    """Something a user can act on. The message says what, where, and what to do. Names from a file are in
    it as they are safe to print."""

    exit_code = 4

    def add(self, sentence: str) -> None:
        """Say one thing more: what whoever caught it knows."""
        self.args = (f"{self.args[0]} {sentence}", *self.args[1:])

    def __str__(self) -> str:
        return printable(super().__str__())


class UsageError(CkptToolError):
    """The command or its options do not make sense together."""

    exit_code = 2


class UnreadableError(CkptToolError):
    """The input is missing, damaged, contradictory, or in a form ckpt-tool does not read."""

    exit_code = 3


class UnsafePickleError(UnreadableError):
    """A pickle names a class or function that a checkpoint has no business naming."""


class CoverageError(UnreadableError):
    """Elements of a tensor are missing, or come from more than one place."""


class MismatchError(UnreadableError):
    """Two things that must agree do not: ranks of one checkpoint, or a checkpoint and its config."""


class DamagedError(UnreadableError):
    """Files are not what their own checksums say; ``files`` names them, relative to the checkpoint."""

    def __init__(self, message: str, files: Iterable[str]) -> None:
        super().__init__(message)
        self.files = frozenset(files)

    def __reduce__(self) -> tuple[Any, ...]:
        return DamagedError, (*self.args, self.files)  # another process may have found it


class ExecutionError(CkptToolError):
    """The plan was sound but carrying it out failed: disk full, file vanished, interrupted."""

    exit_code = 4
