"""Hugging Face safetensors directories: ``model.safetensors``, or shards with an index.

Names and index as transformers writes them (5.20, modeling_utils.py ``save_pretrained``).
"""

from __future__ import annotations

from ckpt_tool.canonical import Checkpoint
from ckpt_tool.formats.base import TargetOptions
from ckpt_tool.formats.hf.files import looks_like, read
from ckpt_tool.formats.hf.writing import layout
from ckpt_tool.layout import Layout
from ckpt_tool.storage import Reader

__all__ = ["HuggingFace"]


class HuggingFace:
    """The format as the registry knows it."""

    name = "huggingface-safetensors"

    def recognises(self, reader: Reader) -> bool:
        return looks_like(reader)

    def read(self, reader: Reader) -> Checkpoint:
        return read(reader, self.name)

    def layout(self, checkpoint: Checkpoint, options: TargetOptions) -> Layout:
        """The model's values (masters where there are any) under published names."""
        return layout(checkpoint, options)
