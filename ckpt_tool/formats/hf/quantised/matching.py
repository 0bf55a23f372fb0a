"""Which modules a description names: exactly, by their end, by wildcards, or by a regular expression."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable
from typing import Any

from ckpt_tool.formats.hf.quantised.described import NotUnderstoodError

# A pattern comes from a file. These bounds keep a hostile one from running for hours.
_LONGEST = 400
_NESTED = re.compile(r"[*+}]\??\)[*+{]")
_UNBOUNDED = re.compile(r"(?<!\\)[*+]|,\}")
_MOST_UNBOUNDED = 6


def names_of(value: Any, where: str) -> tuple[str, ...]:
    """A list of names in a description.

    Raises:
        NotUnderstoodError: it is no list of text.
    """
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise NotUnderstoodError(f"{where} in config.json is not a list of names: {value!r:.80}.")
    return tuple(value)


def expression(pattern: str) -> re.Pattern[str]:
    """A regular expression of a description.

    Raises:
        NotUnderstoodError: it is none, or could take very long.
    """
    simple = len(pattern) <= _LONGEST and not _NESTED.search(pattern)
    if not simple or len(_UNBOUNDED.findall(pattern)) > _MOST_UNBOUNDED:
        raise NotUnderstoodError(
            f"the pattern {pattern!r:.120} in config.json is too involved to be tried on every tensor. "
            "Write it as several patterns, or as names."
        )
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise NotUnderstoodError(
            f"the pattern {pattern!r:.120} in config.json is no regular expression ({error})."
        ) from error


def exactly_or_below(names: Iterable[str]) -> Callable[[str], bool]:
    """Modules of these names, below them, or whose last components they are: ``lm_head``, ``mlp.gate``."""
    known = frozenset(names)

    def matches(module: str) -> bool:
        parts = module.split(".")
        heads = {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
        tails = {".".join(parts[count:]) for count in range(len(parts))}
        return not known.isdisjoint(heads | tails)

    return matches


def wildcards(names: Iterable[str]) -> Callable[[str], bool]:
    """Modules that a wildcard names, or that lie below one (modelopt 0.47, torch/export/quant_utils.py)."""
    patterns = [re.compile(fnmatch.translate(name)) for name in names] + [
        re.compile(fnmatch.translate(f"{name}.*")) for name in names
    ]
    return lambda module: any(pattern.match(module) for pattern in patterns)


def names_or_expressions(names: Iterable[str]) -> Callable[[str], bool]:
    """Modules of these names, or that match what follows ``re:`` from their beginning (compressed-tensors
    0.20, utils/match.py, ``match_name``)."""
    names = tuple(names)
    exact = frozenset(name for name in names if not name.startswith("re:"))
    patterns = [expression(name.removeprefix("re:")) for name in names if name.startswith("re:")]
    return lambda module: module in exact or any(pattern.match(module) for pattern in patterns)
