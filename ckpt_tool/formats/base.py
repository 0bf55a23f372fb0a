"""What a checkpoint format is to the rest of the program: two small protocols."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from ckpt_tool.canonical import Checkpoint, DType
from ckpt_tool.layout import Layout, LeftOut
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
class Request:
    """What a target is asked for.

    ``to`` is what ``--to`` called it. ``dtype`` None keeps dtypes. ``config`` is the model's
    ``config.json``, which ``config_given`` says the user passed; ``beside`` are the small files beside it
    (tokenizer and the like), by name. ``values`` has every option that the target declares, by name.
    """

    to: str
    checkpoint: Checkpoint
    values: Mapping[str, Any]
    dtype: DType | None = None
    config: Mapping[str, Any] | None = None
    config_given: bool = False
    beside: Mapping[str, bytes] = field(default_factory=dict)


Options = TypeVar("Options")


@dataclass(frozen=True, slots=True)
class Prepared(Generic[Options]):
    """A catalogue ready to be laid out: under the target's names, all that it needs known.

    ``options`` are in the target's own form. ``config`` describes the catalogue, if a config is known.
    ``left_out`` are tensors of the source that are no longer in the catalogue.
    """

    checkpoint: Checkpoint
    options: Options
    config: Mapping[str, Any] | None = None
    left_out: tuple[LeftOut, ...] = ()


class TargetFormat(Protocol[Options]):
    """A format that can be written. ``name`` is the format's, as ``SourceFormat`` has it."""

    @property
    def name(self) -> str: ...

    def prepare(self, request: Request) -> Prepared[Options]:
        """What is done to a catalogue before it is laid out; raises where the target cannot be made of it.

        ``formats.preparing`` has the steps that formats share.
        """
        ...

    def layout(self, checkpoint: Checkpoint, options: Options) -> Layout:
        """The target's files. Pure: reads no tensor bytes; raises UsageError or MismatchError."""
        ...
