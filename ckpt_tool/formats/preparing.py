"""Steps that formats share before they lay a catalogue out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ckpt_tool.canonical import Checkpoint
from ckpt_tool.errors import UnreadableError
from ckpt_tool.families.adapters import refuse_adapters
from ckpt_tool.families.model_in_memory import check_against_model
from ckpt_tool.families.roots import fitted
from ckpt_tool.formats.hf.quantised import refuse_unreadable
from ckpt_tool.formats.registry import open_checkpoint
from ckpt_tool.layout import LeftOut


class Described(NamedTuple):
    """A catalogue, the config that describes it, and what of the source is not in it."""

    checkpoint: Checkpoint
    config: Mapping[str, Any] | None
    left_out: tuple[LeftOut, ...] = ()


def template(path: Path | None) -> Checkpoint | None:
    """The catalogue of the checkpoint that ``--like`` names, if it was given."""
    if path is None:
        return None
    reader, checkpoint = open_checkpoint(path)
    reader.close()
    return checkpoint


def refuse_unreadable_parts(checkpoint: Checkpoint, *, states: bool = True, names: bool = True) -> None:
    """Refuse a source whose values or names cannot be told.

    Args:
        states: the target has optimizer state.
        names: the target does not take the source's own names as they are.

    Raises:
        UnreadableError: the source has a part that the target needs and that cannot be read.
    """
    refuse_unreadable(checkpoint.tensors)
    if checkpoint.unresolved and states:
        raise UnreadableError(
            f"{checkpoint.root}: {checkpoint.unresolved} Pass --weights-only to convert without it."
        )
    if checkpoint.nameless and names:
        raise UnreadableError(f"{checkpoint.root}: {checkpoint.nameless}")


def described(checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> Described:
    """A catalogue whose names are about to change, and the config that describes it.

    Raises:
        UnreadableError: an adapter is among the tensors.
        MismatchError: catalogue and config are of different models.
    """
    refuse_adapters(checkpoint)
    if config is None:
        return Described(checkpoint, None)
    checkpoint, config, left_out = fitted(checkpoint, config)
    not_compared = check_against_model(checkpoint, config)
    return Described(replace(checkpoint, notes=(*checkpoint.notes, *not_compared)), config, left_out)
