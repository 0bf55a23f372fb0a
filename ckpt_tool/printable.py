"""Text that may come from a stranger's file, as it is safe to print: escaped, and cut where it is long."""

from __future__ import annotations

_MOST = 4000  # characters of a message, a note or a cell


def printable(text: str, most: int = _MOST) -> str:
    """``text`` with control characters, line ends, marks of direction and lone surrogates as ``\\x1b``, and
    with its middle left out beyond ``most`` characters."""
    if len(text) > most:
        half = most // 2
        left_out = len(text) - 2 * half
        text = f"{text[:half]} ... ({left_out:,} characters left out) ... {text[-half:]}"
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else _escaped(one) for one in text)


def _escaped(one: str) -> str:
    return one.encode("unicode_escape").decode("ascii")
