"""Options that a target format declares; the command line and the API's checks are made from them.

Nothing heavy is imported here: ``convert --help`` reads the declarations of all formats.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ckpt_tool.errors import UsageError
from ckpt_tool.limits import MOST_RANKS
from ckpt_tool.sizes import as_size


class Size(int):
    """A number of bytes, which the command line takes as 512MiB, 2GB or 1000000."""


class Option(NamedTuple):
    """One option of a target format.

    ``name`` is the keyword of ``api.convert``; ``flags`` are those of the command line, of which messages
    name the first. ``kind`` is what a value is; an option that is a bool is a flag without a value.
    ``minimum`` and ``maximum`` bound a number, ``choices`` are all values that a str may have. A value of
    None or False counts as not given.
    """

    name: str
    flags: tuple[str, ...]
    kind: type[int] | type[str] | type[bool] | type[Path] | type[Size]
    help: str
    default: Any = None
    metavar: str | None = None
    minimum: int | None = None
    choices: tuple[str, ...] = ()
    maximum: int | None = None

    @property
    def flag(self) -> str:
        return self.flags[0]

    def is_given(self, value: object) -> bool:
        return value is not None and value is not False

    def checked(self, value: Any) -> Any:
        """The value as the format takes it.

        Raises:
            UsageError: it is of another kind, out of bounds, or none of the choices.
        """
        if value is None:
            return None
        if self.kind is Size:
            value = as_size(value, self.name)
        wanted = _KINDS[self.kind]
        wrong = not isinstance(value, wanted.types)
        # To Python, True is a whole number.
        if wrong or (isinstance(value, bool) and self.kind is not bool):
            raise UsageError(
                f"{self.name}={value!r} is {type(value).__name__}; {self.name} takes {wanted.words}."
            )
        low, high = self.minimum, self.maximum
        if (low is not None and value < low) or (high is not None and value > high):
            raise UsageError(f"{self.flag} {value}: {self._bounds()}.")
        if self.choices:
            refuse_unknown(self.flag, value, self.choices)
        return value

    def _bounds(self) -> str:
        if self.kind is Size:
            return f"it has to be {self.minimum} or more. Write it like 512MiB, 2GB or 1000000"
        upper = "" if self.maximum is None else f" to {self.maximum:,}"
        return f"it has to be a whole number, {self.minimum}{upper or ' or more'}"


def refuse_unknown(flag: str, value: str, choices: Iterable[str], meant: str | None = None) -> None:
    """Raises:
    UsageError: ``value`` is none of ``choices``; it names them, and the one that is ``meant`` or spelt
        like it.
    """
    known = list(choices)
    if value in known:
        return
    close = [meant] if meant else difflib.get_close_matches(value.lower(), known, 1)
    hint = f" Did you mean {close[0]}?" if close else ""
    *first, last = known
    raise UsageError(f"{flag} {value!r} is unknown.{hint} Known are {', '.join(first)} and {last}.")


class _Kind(NamedTuple):
    types: tuple[type, ...]
    words: str


_KINDS: Mapping[type, _Kind] = {
    int: _Kind((int,), "a whole number"),
    Size: _Kind((int,), "a size"),
    bool: _Kind((bool,), "True or False"),
    str: _Kind((str,), "text"),
    Path: _Kind((str, os.PathLike), "a path"),
}


# Of every format with ranks.
EP = Option(
    "ep",
    ("--ep", "--ep-size"),
    int,
    "Expert-parallel size of the target run.",
    minimum=1,
    maximum=MOST_RANKS,
)
WORLD = Option(
    "world",
    ("--world", "--world-size"),
    int,
    "Number of ranks of the target run.",
    minimum=1,
    maximum=MOST_RANKS,
)
LIKE = Option(
    "like", ("--like",), Path, "A checkpoint the target run saved itself: its layout, with these values."
)
# Of every format with optimizer state.
WEIGHTS_ONLY = Option("weights_only", ("--weights-only",), bool, "Leave optimizer state out.", False)

# What every record of a conversion names, in this order, whether the target takes it or not: a run that an
# earlier version began is gone on with. A format's further options follow.
_ALWAYS_RECORDED = ("max_shard_bytes", "keep_groups", "ep", "world", "style", "hf_layout", "weights_only")


# What ``--dtype`` may name.
DTYPES = ("keep", "fp32", "bf16", "fp16")


def united(options: Iterable[Option]) -> tuple[Option, ...]:
    """Each option once.

    Raises:
        ValueError: two formats declare options of one name or flag that differ.
    """
    found: dict[str, Option] = {}
    flags: dict[str, Option] = {}
    for option in options:
        if found.setdefault(option.name, option) != option:
            raise ValueError(f"two formats declare the option {option.name}, and not alike")
        for flag in option.flags:
            if flags.setdefault(flag, option) != option:
                raise ValueError(f"two options of formats are called {flag}")
    return tuple(found.values())


def recorded(
    own: Iterable[Option], everywhere: Iterable[Option], values: Mapping[str, Any]
) -> dict[str, Any]:
    """What the manifest tells of the options of a conversion: values or defaults, no paths."""
    known = {option.name: option for option in (*everywhere, *own)}
    further = [option.name for option in own if option.name not in _ALWAYS_RECORDED]
    names = [name for name in (*_ALWAYS_RECORDED, *further) if name in known]
    return {name: values.get(name, known[name].default) for name in names if known[name].kind is not Path}
