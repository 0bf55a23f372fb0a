"""Hugging Face safetensors directories: ``model.safetensors``, or shards with an index.

Names and index as transformers writes them (5.20, modeling_utils.py ``save_pretrained``).
"""

from __future__ import annotations

from ckpt_tool.canonical import Checkpoint
from ckpt_tool.formats.base import Prepared, Request
from ckpt_tool.formats.hf.files import looks_like, read
from ckpt_tool.formats.hf.target_options import HfOptions
from ckpt_tool.formats.hf.writing import layout
from ckpt_tool.formats.preparing import described, refuse_unreadable_parts
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

    def prepare(self, request: Request) -> Prepared[HfOptions]:
        """The model's values need a config that describes them; optimizer state has no place."""
        refuse_unreadable_parts(request.checkpoint, states=False)
        source = described(request.checkpoint, request.config)
        options = HfOptions(
            dtype=request.dtype,
            config=source.config,
            hf_layout=request.values["hf_layout"],
            max_shard_bytes=request.values["max_shard_bytes"],
            extra_files=request.beside,
        )
        return Prepared(source.checkpoint, options, source.config, source.left_out)

    def layout(self, checkpoint: Checkpoint, options: HfOptions) -> Layout:
        """The model's values (masters where there are any) under published names."""
        return layout(checkpoint, options)
