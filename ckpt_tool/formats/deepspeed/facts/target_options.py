"""What a user may ask of DeepSpeed's targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckpt_tool.canonical import Checkpoint, DType


@dataclass(frozen=True, slots=True)
class UniversalOptions:
    """``dtype`` is refused. ``keep_groups`` writes the source's optimizer group settings, where the default
    leaves the target run's own in force. ``weights_only`` leaves optimizer state out."""

    dtype: DType | None = None
    keep_groups: bool = False
    weights_only: bool = False


@dataclass(frozen=True, slots=True)
class ZeroOptions:
    """``dtype`` is refused. ``world`` and ``ep`` are the target topology, ``like`` a checkpoint that the
    target run saved itself, whose layout is taken over. ``ds_config`` is a DeepSpeed config that supplies
    what the source does not say. ``weights_only`` leaves optimizer state out."""

    dtype: DType | None = None
    world: int | None = None
    ep: int | None = None
    like: Checkpoint | None = None
    ds_config: Mapping[str, Any] | None = None
    weights_only: bool = False
