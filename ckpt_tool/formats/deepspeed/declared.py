"""DeepSpeed's formats as the registry knows them. The code is imported when it is used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_tool.formats.declaration import Format, Target
from ckpt_tool.formats.options import EP, LIKE, WEIGHTS_ONLY, WORLD, Option

if TYPE_CHECKING:
    from ckpt_tool.formats.base import SourceFormat, TargetFormat

KEEP_GROUPS = Option(
    "keep_groups",
    ("--keep-groups",),
    bool,
    "Universal: write the source's lr, decay, ... instead of none.",
    False,
)
DS_CONFIG = Option(
    "ds_config", ("--ds-config",), Path, "A DeepSpeed config, for what the source does not say."
)
_ZERO = (EP, WORLD, LIKE, WEIGHTS_ONLY, DS_CONFIG)


def _universal() -> Any:
    from ckpt_tool.formats.deepspeed.writing.universal import Universal

    return Universal()


def _zero3() -> SourceFormat:
    from ckpt_tool.formats.deepspeed.reading.zero3 import Zero3

    return Zero3()


def _zero12() -> SourceFormat:
    from ckpt_tool.formats.deepspeed.reading.zero12 import Zero12

    return Zero12()


def _zero0() -> SourceFormat:
    from ckpt_tool.formats.deepspeed.reading.zero0 import Zero0

    return Zero0()


def _zero3_target() -> TargetFormat[Any]:
    from ckpt_tool.formats.deepspeed.writing.zero3_target import Zero3Target

    return Zero3Target()


def _zero2_target() -> TargetFormat[Any]:
    from ckpt_tool.formats.deepspeed.writing.zero12_target import Zero12Target

    return Zero12Target(2)


def _zero1_target() -> TargetFormat[Any]:
    from ckpt_tool.formats.deepspeed.writing.zero12_target import Zero12Target

    return Zero12Target(1)


UNIVERSAL = Format(
    "deepspeed-universal",
    _universal,
    Target(
        "universal",
        _universal,
        (KEEP_GROUPS, WEIGHTS_ONLY),
        example="run/checkpoints universal --to universal",
    ),
)
ZERO3 = Format(
    "deepspeed-zero3",
    _zero3,
    Target(
        "zero3",
        _zero3_target,
        _ZERO,
        resharded=True,
        example="path/to/model start --to zero3 --ep 8 --world 64 --ds-config ds_config.json",
    ),
)
ZERO2 = Format("deepspeed-zero2", _zero12, Target("zero2", _zero2_target, _ZERO, resharded=True))
ZERO1 = Format("deepspeed-zero1", None, Target("zero1", _zero1_target, _ZERO, resharded=True))
ZERO0 = Format("deepspeed-zero0", _zero0)
