"""Who is told how many bytes are done: the executor's and the verifier's side of a progress bar."""

from __future__ import annotations

from typing import Protocol


class Meter(Protocol):
    """``start`` is called with the total of each phase as it begins; ``add`` from any thread."""

    def start(self, total: int) -> None: ...

    def add(self, count: int) -> None: ...


class Silent:
    """Nobody is watching."""

    def start(self, total: int) -> None:
        pass

    def add(self, count: int) -> None:
        pass
