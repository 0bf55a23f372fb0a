"""What a checkpoint format is to the rest of the program: two small protocols."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ckpt_tool.canonical import Checkpoint, DType
from ckpt_tool.layout import Layout
from ckpt_tool.storage import Reader


class SourceFormat(Protocol):
    """A format that can be read. ``name`` is what ``inspect`` calls it."""

    name: str

    def recognises(self, reader: Reader) -> bool:
        """Whether the files in ``reader`` look like this format, judged by names alone."""
        ...

    def read(self, reader: Reader) -> Checkpoint:
        """The catalogue, from metadata alone; raises UnreadableError where it does not add up."""
        ...


@dataclass(frozen=True, slots=True)
class TargetOptions:
    """What a user may ask of a target; each format uses what applies to it and refuses the rest.

    ``dtype`` None keeps dtypes (masters stay fp32). ``config`` is a Hugging Face ``config.json``.
    ``max_shard_bytes`` bounds one safetensors file; ``extra_files`` (tokenizer and the like) are
    carried over. ``keep_groups`` writes the source's optimizer group settings where the default leaves
    the target run's own in force. ``world`` and ``ep`` are the target topology, ``like`` a checkpoint
    the target run saved itself, whose layout is taken over. ``style`` names a dialect of DCP, ``hf_layout``
    (hub or fused) how safetensors hold experts. ``ds_config`` is a DeepSpeed config that supplies what the
    source does not say. ``weights_only`` leaves optimizer state out.
    """

    dtype: DType | None = None
    config: Mapping[str, Any] | None = None
    max_shard_bytes: int = 5_000_000_000
    extra_files: Mapping[str, bytes] = field(default_factory=dict)
    keep_groups: bool = False
    world: int | None = None
    ep: int | None = None
    like: Checkpoint | None = None
    style: str | None = None
    hf_layout: str | None = None
    ds_config: Mapping[str, Any] | None = None
    weights_only: bool = False


class TargetFormat(Protocol):
    """A format that can be written."""

    name: str

    def layout(self, checkpoint: Checkpoint, options: TargetOptions) -> Layout:
        """The target's files. Pure: reads no tensor bytes; raises UsageError or MismatchError."""
        ...
