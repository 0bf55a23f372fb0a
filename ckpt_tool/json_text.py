"""JSON of any origin: bounded, and without what two readers take for different things."""

from __future__ import annotations

import json
from typing import Any

from ckpt_tool.errors import UnreadableError

_MOST_DIGITS = 40  # of an integer; tokenizers state 10 ** 30 for "no limit"


def parse_json(data: bytes, where: str) -> Any:
    """The value that ``data`` describes; ``where`` is the file, for messages.

    Raises:
        UnreadableError: it is no JSON, nests too deep, has a number of hundreds of digits, or gives a name
            two values.
    """
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique, parse_int=_integer)
    except RecursionError:
        raise UnreadableError(f"{where} is damaged or no JSON: it nests too deep.") from None
    except ValueError as error:
        raise UnreadableError(f"{where} is damaged or no JSON ({error}).") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        first: dict[str, Any] = {}
        for name, value in pairs:
            if first.setdefault(name, value) != value:
                raise ValueError(f"{name!r} has two values")
    return found


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)
