"""What a format says of itself before it is used: names, options, and where its code is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ckpt_tool.formats.options import Option

if TYPE_CHECKING:
    from ckpt_tool.formats.base import SourceFormat, TargetFormat


class Target(NamedTuple):
    """How a format is written.

    ``to`` is what ``--to`` calls it. ``options`` are all that it takes beside those of every conversion.
    ``resharded``: a checkpoint of it is of a number of ranks, and can be written for another.
    ``published``: it is a model as it is published, config.json and tokenizer included.
    ``example``: arguments of ``convert`` for its help.
    ``load`` imports the code.
    """

    to: str
    load: Callable[[], TargetFormat[Any]]
    options: tuple[Option, ...] = ()
    resharded: bool = False
    published: bool = False
    example: str = ""

    def values(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Each option by name with the value given, or its default where that is None or missing."""
        values = {}
        for option in self.options:
            value = given.get(option.name)
            values[option.name] = option.default if value is None else value
        return values


class Format(NamedTuple):
    """A format as ``formats.known`` lists it; ``name`` is what ``inspect`` calls it.

    ``load`` imports the code that reads it; None where it is not read, or by another format's code.
    """

    name: str
    load: Callable[[], SourceFormat] | None = None
    target: Target | None = None
