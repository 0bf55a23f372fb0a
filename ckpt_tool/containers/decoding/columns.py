"""AWQ and GPTQ: integers in 32-bit words, rows of the files being inputs of the layer.

The values of a virtual file are a matrix [inputs, outputs], the transpose of the layer's weight. Parts
are the words, zero points int32 [groups, outputs * bits / 32] packed along the row, the scales [groups,
outputs], and for GPTQ, if there is one, the group of each input int32 [inputs]. Values have the scales'
dtype: an integer less its zero point is exact in it, and the product is rounded once.

``awq``: words int32 [inputs, outputs / 8]; the nibbles of a word, from the lowest, are outputs
0, 2, 4, 6, 1, 3, 5, 7, of zero points as well (autoawq 0.2.9, awq/utils/packing_utils.py,
``dequantize_gemm``). Number: inputs of a group.

``gptq``: words int32 [inputs * bits / 32, outputs], the lowest bits first. Numbers: bits, inputs of a
group, and what is added to a stored zero point: 1 in the first format, 0 in ``gptq_v2`` (auto-gptq 0.7.1,
nn_modules/qlinear/qlinear_cuda_old.py; gptqmodel 7.7, nn_modules/qlinear/__init__.py,
``dequantize_weight``). A zero point of all ones is refused in the first format: auto-gptq makes it 0,
gptqmodel carries into the next one, and older programs take it as 2 ** bits.
"""

from __future__ import annotations

from typing import Any

from ckpt_tool.containers.decoding.stored import Rows, Stored, any_rows, put, rows_of
from ckpt_tool.containers.decoding.virtual import Virtual
from ckpt_tool.errors import UnreadableError

_WORDS, _ZEROS, _SCALES, _GROUPS = 0, 1, 2, 3
_AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # which nibble of a word an output is in


def decode_awq(said: Virtual, stored: Stored, start: int, numel: int, out: memoryview) -> None:
    import numpy as np

    (group,) = said.numbers
    outputs = said.shape[-1]
    shifts = np.array(_AWQ_NIBBLES, np.uint32) * 4
    for rows in rows_of(start, numel, outputs, any_rows):
        first, words = rows.column // 8, _words(rows, 8)
        raw = _lines(stored, _WORDS, range(rows.row, rows.row + rows.height), outputs // 8, first, words)
        integers = _unpacked(raw, shifts, 4)
        groups = np.arange(rows.row, rows.row + rows.height) // group
        _finish(said, stored, rows, integers, groups, _Zeros(shifts, 4, 0), out)


def decode_gptq(said: Virtual, stored: Stored, start: int, numel: int, out: memoryview) -> None:
    import numpy as np

    bits, group, offset = said.numbers
    in_word, outputs = 32 // bits, said.shape[-1]
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    for rows in rows_of(start, numel, outputs, any_rows):
        low, high = rows.row // in_word, -(-(rows.row + rows.height) // in_word)
        raw = _lines(stored, _WORDS, range(low, high), outputs, rows.column, rows.width)
        each = (raw[:, None, :] >> shifts[None, :, None]) & np.uint32((1 << bits) - 1)
        skip = rows.row - low * in_word
        integers = each.reshape(-1, rows.width)[skip : skip + rows.height]
        if len(said.parts) > _GROUPS:
            groups = stored.elements(_GROUPS, rows.row, rows.height)
        else:
            groups = np.arange(rows.row, rows.row + rows.height) // group
        zeros = _Zeros(shifts, bits, offset)
        skip = rows.column - rows.column // in_word * in_word
        _finish(said, stored, rows, np.pad(integers, ((0, 0), (skip, 0))), groups, zeros, out)


class _Zeros:
    """How zero points are packed, and what is added to them."""

    def __init__(self, shifts: Any, bits: int, offset: int) -> None:
        self.shifts, self.bits, self.offset = shifts, bits, offset

    def of(self, stored: Stored, groups: Any, outputs: int, first: int, words: int) -> Any:
        """float32 [groups, words * 32 / bits], of words ``first`` on of each group.

        Raises:
            UnreadableError: one of them means different things to different programs.
        """
        import numpy as np

        in_word = 32 // self.bits
        raw = _lines(stored, _ZEROS, groups, -(-outputs // in_word), first, words)
        each = _unpacked(raw, self.shifts, self.bits)
        if self.offset and (each == (1 << self.bits) - 1).any():
            raise UnreadableError(
                f"{stored.part(_ZEROS).file}: zero points of GPTQ's first format are too large for it "
                f"({(1 << self.bits) - 1} stored), and programs differ in what they make of them. Save the "
                "model again with gptqmodel, as checkpoint_format gptq_v2."
            )
        return each.astype(np.float32) + np.float32(self.offset)


def _finish(
    said: Virtual, stored: Stored, rows: Rows, integers: Any, groups: Any, zeros: _Zeros, out: memoryview
) -> None:
    """Integers less zero points, times scales. ``integers`` [rows, ...] begin with the first output of the
    word of zero points that the rectangle begins in."""
    import numpy as np

    outputs, in_word = said.shape[-1], 32 // zeros.bits
    first, words = rows.column // in_word, _words(rows, in_word)
    own, place = np.unique(groups, return_inverse=True)
    skip = rows.column - first * in_word
    points = zeros.of(stored, own, outputs, first, words)[:, skip : skip + rows.width]
    values = integers[:, skip : skip + rows.width].astype(np.float32)
    values -= points[place]
    values *= _scales(stored, own, outputs, rows)[place]
    at = rows.at * said.itemsize
    put(values, out[at : at + values.size * said.itemsize], said.dtype)


def _words(rows: Rows, in_word: int) -> int:
    """How many words the columns of a rectangle lie in."""
    return -(-(rows.column + rows.width) // in_word) - rows.column // in_word


def _unpacked(words: Any, shifts: Any, bits: int) -> Any:
    """uint32 [rows, words] as integers [rows, words * 32 / bits]."""
    import numpy as np

    each = (words[:, :, None] >> shifts) & np.uint32((1 << bits) - 1)
    return each.reshape(words.shape[0], -1)


def _lines(stored: Stored, part: int, lines: Any, across: int, first: int, numel: int) -> Any:
    """Words ``first .. first + numel`` of each of the lines, which have ``across`` words: uint32."""
    import numpy as np

    found = [stored.elements(part, at * across + first, count) for at, count in _runs(lines, across, numel)]
    return np.concatenate(found).view(np.uint32).reshape(len(lines), numel)


def _scales(stored: Stored, groups: Any, outputs: int, rows: Rows) -> Any:
    """float32 [groups, width]"""
    import numpy as np

    found = [
        stored.floats(_SCALES, at * outputs + rows.column, count)
        for at, count in _runs(groups, outputs, rows.width)
    ]
    return np.concatenate(found).reshape(len(groups), rows.width)


def _runs(lines: Any, across: int, numel: int) -> list[tuple[int, int]]:
    """(line, elements from there on) of reads that give ``numel`` elements of each line: one where lines
    follow each other and are wanted whole."""
    one, count = int(lines[0]), len(lines)
    if numel == across and int(lines[-1]) - one + 1 == count:
        return [(one, count * across)]
    return [(int(line), numel) for line in lines]
