"""Looking through a pickle's opcodes before anything is built from them.

The unpickler believes what a pickle says: it makes room for a memo of the largest index, and for bytes of
the length stated, before it finds out that the pickle is too short for them. One flipped bit can thus take
gigabytes. Runs of ordinary opcodes are matched by one regular expression; the rest are looked at singly,
by the table of Python's ``pickletools`` (3.11).
"""

from __future__ import annotations

import pickletools
import re
from functools import lru_cache

_RUN = 1 << 14  # opcodes matched at once
_FEWEST_MEMO = 256
_BYTES_PER_MEMO = 6  # the least a pickle that counts its memo up from 0 needs: a value, LONG_BINPUT
_LONGEST_TEXT = 127  # matched in a run
_OPCODES = {ord(opcode.code): opcode for opcode in pickletools.opcodes}
_LENGTH_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_PUT, _GET, _LONG_BINPUT, _LONG_BINGET, _STOP = b"pgrj."
_LINES = {ord("c"): 2, ord("i"): 2}


@lru_cache(maxsize=32)
def _ordinary(high: int) -> re.Pattern[bytes]:
    """Opcodes that need no look of their own, where memo indices stay below ``high << 16``."""
    texts = b"|".join(rb"\x%02x\0\0\0.{%d}" % (n, n) for n in range(_LONGEST_TEXT + 1))
    pattern = (
        rb"[(NRQabe}\]sut)0\x81\x85-\x89l]|[Kqh\x80].|M..|J....|G.{8}"
        rb"|[rj]..[\0-\x%02x]\0" % (high - 1)
    )
    return re.compile(rb"(?:" + pattern + rb"|X(?:" + texts + rb")){1,%d}" % _RUN, re.DOTALL)


def check_opcodes(data: bytes) -> None:
    """Refuse a pickle that says more than its bytes can hold.

    Raises:
        ValueError: a memo index, or the length of a value, is larger than the pickle could have; an opcode
            is unknown or cut off; it does not end with STOP.
    """
    most = _FEWEST_MEMO + len(data) // _BYTES_PER_MEMO
    ordinary = _ordinary(min((most >> 16) + 1, 256))
    at = 0
    while True:
        run = ordinary.match(data, at)
        if run is not None:
            at = run.end()
        if at >= len(data):
            raise ValueError("it is cut off")
        if data[at] == _STOP:
            return
        at = _after(data, at, most)


def _after(data: bytes, at: int, most: int) -> int:
    """Where the opcode after the one at ``at`` begins."""
    opcode = _OPCODES.get(data[at])
    if opcode is None:
        raise ValueError(f"byte {data[at]} at {at} is no opcode")
    start = at + 1
    if opcode.arg is None:
        return start
    size = opcode.arg.n
    if size >= 0:
        end = start + size
    elif size == pickletools.UP_TO_NEWLINE:
        end = start
        for _ in range(_LINES.get(data[at], 1)):
            end = data.find(b"\n", end) + 1
            if not end:
                raise ValueError(f"{opcode.name} at {at} is cut off")
    else:
        width = _LENGTH_BYTES[size]
        end = start + width + int.from_bytes(data[start : start + width], "little")
    if end > len(data):
        raise ValueError(f"{opcode.name} at {at} reaches to byte {end} of {len(data)}")
    if data[at] in (_LONG_BINPUT, _LONG_BINGET):
        _check_index(int.from_bytes(data[start:end], "little"), at, most)
    elif data[at] in (_PUT, _GET):
        if end - start > 12 or not data[start : end - 1].isdigit():
            raise ValueError(f"{opcode.name} at {at} names no memo index")
        _check_index(int(data[start : end - 1]), at, most)
    return end


def _check_index(index: int, at: int, most: int) -> None:
    if index > most:
        raise ValueError(f"memo index {index} at {at}, of at most {most}")
