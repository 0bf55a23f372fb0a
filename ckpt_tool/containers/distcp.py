"""``.distcp`` files: torch archives back to back, without header or gaps.

Each item of a rank (a tensor's chunk, or a pickled object) is one complete ``torch.save`` archive; where
it lies is said in ``.metadata`` (torch 2.13, torch/distributed/checkpoint/filesystem.py,
``_write_item``). Offsets inside an archive count from its own start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from ckpt_tool.layout import CrcSlot, Fill, Literal, TargetFile

_LARGE = 1 << 16  # joining pieces beyond this costs more copying than writing them apart


class Span(NamedTuple):
    """A range of bytes."""

    offset: int
    length: int


def concatenated(path: str, parts: Sequence[TargetFile]) -> tuple[TargetFile, list[Span]]:
    """One file of several back to back, and where each of them lies in it."""
    literals: list[Literal] = []
    fills: list[Fill] = []
    slots: list[CrcSlot] = []
    spans: list[Span] = []
    position = 0
    for part in parts:
        before = len(fills)
        for literal in part.literals:
            _append(literals, Literal(position + literal.offset, literal.data))
        slots += [
            CrcSlot(
                position + slot.offset,
                tuple(item + before if isinstance(item, int) else item for item in slot.parts),
            )
            for slot in part.crc_slots
        ]
        fills += [replace(fill, offset=position + fill.offset) for fill in part.fills]
        spans.append(Span(position, part.size))
        position += part.size
    return TargetFile(path, position, tuple(literals), tuple(fills), tuple(slots)), spans


def _append(literals: list[Literal], new: Literal) -> None:
    """The end of one archive and the beginning of the next are one piece, and written as one."""
    last = literals[-1] if literals else None
    if last is not None and last.offset + len(last.data) == new.offset and len(last.data) < _LARGE:
        literals[-1] = Literal(last.offset, last.data + new.data)
    else:
        literals.append(new)
