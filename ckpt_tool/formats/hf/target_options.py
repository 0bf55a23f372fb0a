"""What a user may ask of a safetensors target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ckpt_tool.canonical import DType
from ckpt_tool.formats.hf.declared import DEFAULT_SHARD_BYTES


@dataclass(frozen=True, slots=True)
class HfOptions:
    """``dtype`` None keeps dtypes. ``config`` is the model's ``config.json``. ``hf_layout`` is how experts
    are held: hub or fused. ``max_shard_bytes`` bounds one file. ``extra_files`` (tokenizer and the like)
    are carried over."""

    dtype: DType | None = None
    config: Mapping[str, Any] | None = None
    hf_layout: str | None = None
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    extra_files: Mapping[str, bytes] = field(default_factory=dict)
