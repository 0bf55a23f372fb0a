"""The format as the registry knows it."""

from __future__ import annotations

from ckpt_tool.canonical import Checkpoint
from ckpt_tool.formats.base import TargetOptions
from ckpt_tool.formats.dcp import reader as reading
from ckpt_tool.formats.dcp.directories import recognises
from ckpt_tool.formats.dcp.target import make_layout
from ckpt_tool.layout import Layout
from ckpt_tool.storage import Reader


class Dcp:
    """torch.distributed.checkpoint in the dialects of FSDP2 frameworks."""

    name = "torch-dcp"

    def recognises(self, reader: Reader) -> bool:
        return recognises(reader)

    def read(self, reader: Reader) -> Checkpoint:
        return reading.read(reader, self.name)

    def layout(self, checkpoint: Checkpoint, options: TargetOptions) -> Layout:
        """The files that a run of ``options.world`` ranks would have saved itself."""
        return make_layout(checkpoint, options)
