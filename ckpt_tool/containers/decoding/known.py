"""The schemes that are decoded, by the name that virtual paths have: one line each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ckpt_tool.containers.decoding import blocks, columns, fp4, packed
from ckpt_tool.containers.decoding.stored import Stored
from ckpt_tool.containers.decoding.virtual import Virtual

# Fills a buffer with values ``start .. start + numel``.
Decode = Callable[[Virtual, Stored, int, int, memoryview], None]

SCHEMES: Mapping[str, Decode] = {
    "blocks": blocks.decode,
    "mxfp4": fp4.decode_mxfp4,
    "nvfp4": fp4.decode_nvfp4,
    "packed": packed.decode,
    "awq": columns.decode_awq,
    "gptq": columns.decode_gptq,
}
