"""The config of a DeepSpeed run: the JSON that ``deepspeed.initialize`` gets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt_tool.errors import UsageError
from ckpt_tool.json_file import read_json

# One of these at least is in every DeepSpeed config (deepspeed 0.19.8, runtime/config.py).
DS_FIELDS = frozenset(
    {"train_batch_size", "train_micro_batch_size_per_gpu", "zero_optimization", "optimizer", "bf16", "fp16"}
)


def read_ds_config(file: Path, to: str) -> Mapping[str, Any]:
    """A DeepSpeed config for the target ``to``; UsageError where it is none, or of another stage."""
    config = read_json(file)
    if not DS_FIELDS & config.keys():
        raise UsageError(
            f"{file} is no DeepSpeed config: it has none of {', '.join(sorted(DS_FIELDS))}. --ds-config "
            "takes the JSON that deepspeed.initialize gets; a model's config.json is passed with --config."
        )
    zero = config.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if type(stage) is int and to in ("zero1", "zero2", "zero3") and to != f"zero{stage}":
        raise UsageError(f"{file} has ZeRO stage {stage}, the target is {to}. Correct one of the two.")
    return config
