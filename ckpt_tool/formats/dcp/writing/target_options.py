"""What a user may ask of a DCP target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckpt_tool.canonical import Checkpoint, DType


@dataclass(frozen=True, slots=True)
class DcpOptions:
    """``dtype`` None keeps dtypes. ``config`` is a model's ``config.json``. ``world`` and ``ep`` are the
    target topology, ``like`` a checkpoint that the target run saved itself, whose layout is taken over.
    ``style`` names a framework's dialect. ``weights_only`` leaves optimizer state out."""

    dtype: DType | None = None
    config: Mapping[str, Any] | None = None
    world: int | None = None
    ep: int | None = None
    like: Checkpoint | None = None
    style: str | None = None
    weights_only: bool = False
