"""What a store is to the rest of the program."""

from __future__ import annotations

from typing import Protocol

from ckpt_tool.storage import Location


class Store(Protocol):
    """A kind of place where checkpoints lie."""

    def location(self, url: str) -> Location:
        """What a URL of the store's scheme means; raises UsageError where it means nothing."""
        ...
