"""Quantised models on the hub: their values, where the scheme is known.

``config.json`` decides (``described``), by a table with a line per method (``known``) and a module per
method; what it says is held against the tensors. Quantised tensors become tensors of values that are
decoded as they are read (``containers.decoding``). Whatever is not understood is named, can be inspected,
and is refused for conversion (``refusing``). docs/quantised.md has the schemes and what their values are.
"""

from ckpt_tool.formats.hf.quantised.described import QUANTISATION_KEYS, with_description
from ckpt_tool.formats.hf.quantised.known import decoded, files_of_values, note_of_scheme
from ckpt_tool.formats.hf.quantised.refusing import refuse_unreadable

__all__ = [
    "QUANTISATION_KEYS",
    "decoded",
    "files_of_values",
    "note_of_scheme",
    "refuse_unreadable",
    "with_description",
]
