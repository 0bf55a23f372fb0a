"""Hugging Face safetensors as the registry knows them. The code is imported when it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckpt_tool.formats.declaration import Format, Target
from ckpt_tool.formats.options import Option, Size

if TYPE_CHECKING:
    from ckpt_tool.formats.hf.format import HuggingFace

DEFAULT_SHARD_BYTES = 5_000_000_000

HF_LAYOUT = Option(
    "hf_layout",
    ("--hf-layout",),
    str,
    "Experts as published (hub, the default), or as transformers holds them in memory (fused).",
    metavar="LAYOUT",
    choices=("hub", "fused"),
)
MAX_SHARD_BYTES = Option(
    "max_shard_bytes",
    ("--max-shard-size",),
    Size,
    "Largest safetensors file.",
    DEFAULT_SHARD_BYTES,
    metavar="SIZE",
    minimum=1,
)


def _hugging_face() -> HuggingFace:
    from ckpt_tool.formats.hf.format import HuggingFace

    return HuggingFace()


HUGGING_FACE = Format(
    "huggingface-safetensors",
    _hugging_face,
    Target("hf", _hugging_face, (HF_LAYOUT, MAX_SHARD_BYTES), published=True),
)
