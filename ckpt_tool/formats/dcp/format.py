"""The format as the registry knows it."""

from __future__ import annotations

import re

from ckpt_tool.canonical import Checkpoint
from ckpt_tool.errors import UnreadableError
from ckpt_tool.families.naming import HUB
from ckpt_tool.families.roots import check_described
from ckpt_tool.formats.base import Prepared, Request
from ckpt_tool.formats.dcp.reading import reader as reading
from ckpt_tool.formats.dcp.reading.directories import recognises
from ckpt_tool.formats.dcp.writing.target import make_layout
from ckpt_tool.formats.dcp.writing.target_options import DcpOptions
from ckpt_tool.formats.preparing import Described, described, refuse_unreadable_parts, template
from ckpt_tool.layout import Layout
from ckpt_tool.storage import Reader

# What torch_checkpointing 0.1.0 calls its files (metadata_serialization.py, checkpoint_layout.py).
_RELATED_METADATA, _RELATED_FILE = "metadata.pkl", re.compile(r"\w+_\d+\.pt")


class Dcp:
    """torch.distributed.checkpoint in the dialects of FSDP2 frameworks."""

    name = "torch-dcp"

    def recognises(self, reader: Reader) -> bool:
        return recognises(reader) or _is_torch_checkpointing(reader)

    def read(self, reader: Reader) -> Checkpoint:
        if _is_torch_checkpointing(reader):
            raise UnreadableError(
                f"{reader.root} was saved by torch_checkpointing ({_RELATED_METADATA} and a file for each "
                "item and rank), a format of its own that ckpt-tool does not read. Save with torchtitan's "
                "CheckpointManager (components/checkpointer/dcp.py), which writes torch DCP."
            )
        return reading.read(reader, self.name)

    def prepare(self, request: Request) -> Prepared[DcpOptions]:
        """Names are translated by the layout, in the style asked for; a config must describe the source."""
        values = request.values
        like = template(values["like"])
        refuse_unreadable_parts(
            request.checkpoint, states=not values["weights_only"], names=values["style"] is not None
        )
        source = Described(request.checkpoint, request.config)
        if source.checkpoint.format != self.name:
            source = described(source.checkpoint, source.config)
        if source.config is not None and (source.checkpoint.dialect == HUB or request.config_given):
            check_described(source.checkpoint, source.config)
        options = DcpOptions(
            dtype=request.dtype,
            config=source.config,
            world=values["world"],
            ep=values["ep"],
            like=like,
            style=values["style"],
            weights_only=values["weights_only"],
        )
        return Prepared(source.checkpoint, options, source.config, source.left_out)

    def layout(self, checkpoint: Checkpoint, options: DcpOptions) -> Layout:
        """The files that a run of ``options.world`` ranks would have saved itself."""
        return make_layout(checkpoint, options)


def _is_torch_checkpointing(reader: Reader) -> bool:
    names = reader.list()
    return _RELATED_METADATA in names and any(_RELATED_FILE.fullmatch(name) for name in names)
