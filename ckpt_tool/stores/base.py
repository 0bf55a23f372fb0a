"""What a store is to the rest of the program: places to read from, and places to prepare results in."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Protocol

from ckpt_tool.replacing import Judge
from ckpt_tool.storage import Location, Writer


class Publishing(NamedTuple):
    """How a result is published: whether it may replace something, of which ``judge`` says what belongs to
    a checkpoint, and whether it is made durable first."""

    overwrite: bool
    fsync: bool
    judge: Judge


class Area(Protocol):
    """Where one run prepares a result. Whatever an earlier run left there is still in it.

    ``location`` is where the result can be read before it is published. ``removal`` says how a user gets
    rid of it: "remove the directory: rm -r ...".
    """

    @property
    def location(self) -> Location: ...

    @property
    def removal(self) -> str: ...

    def journal(self) -> bytes:
        """All lines that were recorded; the last one may be cut off."""
        ...

    def cut_journal(self, length: int) -> None:
        """Forget what lies behind the first ``length`` bytes of the journal."""
        ...

    def record(self, line: bytes, *, durable: bool) -> None:
        """Add a line to the journal; ``durable``: before anything else happens."""
        ...

    def writer(self) -> Writer: ...

    def holds(self, path: str, size: int) -> bool:
        """Whether a file of that size is there."""
        ...

    def remove_all_but(self, kept: Collection[str]) -> Collection[str]:
        """Remove all other files, and of these what is no file of the area's own. Returns what went."""
        ...

    def remove(self, path: str) -> None: ...

    def sync(self, path: str) -> None:
        """Make a file durable that a run without fsync has written."""
        ...

    def publish(self, manifest: bytes) -> None:
        """Give all that was prepared its final name, with this manifest.

        Raises:
            ExecutionError: nothing was published, or all was and the message says so.
        """
        ...

    def published(self) -> bool:
        """Whether it has its final name."""
        ...

    def discard(self) -> None:
        """Remove all of it."""
        ...

    def close(self) -> None:
        """Let go of it: another run may take it over."""
        ...


class Store(Protocol):
    """A kind of place where checkpoints lie."""

    # Whether results can replace others (``--overwrite``). Where they cannot, judges are not asked.
    replaces: bool

    def location(self, url: str) -> Location:
        """What a URL of the store's scheme means; raises UsageError where it means nothing."""
        ...

    def absolute(self, location: Location) -> Location:
        """The same place, wherever the program runs."""
        ...

    def parts(self, location: Location) -> tuple[str, ...]:
        """The names that lead to a place; those of another place begin with them where it lies inside."""
        ...

    def is_taken(self, location: Location) -> bool:
        """Whether a result would replace something there."""
        ...

    def free(self, location: Location) -> int | None:
        """The bytes that a result may have there; None where the store does not say."""
        ...

    def area(self, location: Location, how: Publishing) -> Area:
        """Where a result for ``location`` is prepared, for this run alone.

        Raises:
            UsageError: ``location`` is taken, or another run prepares a result for it.
        """
        ...

    def is_untidy(self, location: Location) -> bool:
        """Whether a run has published there and was stopped before it was done."""
        ...

    def tidy(self, location: Location, how: Publishing) -> None:
        """Finish that; UsageError where the run still goes on."""
        ...
