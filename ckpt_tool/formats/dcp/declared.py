"""DCP as the registry knows it. The code is imported when it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckpt_tool.formats.declaration import Format, Target
from ckpt_tool.formats.options import EP, LIKE, WEIGHTS_ONLY, WORLD, Option

if TYPE_CHECKING:
    from ckpt_tool.formats.dcp.format import Dcp

STYLE = Option(
    "style",
    ("--style",),
    str,
    "dcp: whose keys and layout are written. Default: the source's, else plain.",
    metavar="STYLE",
    choices=("torchtitan", "accelerate", "transformers", "veomni", "plain"),
)


def _dcp() -> Dcp:
    from ckpt_tool.formats.dcp.format import Dcp

    return Dcp()


DCP = Format(
    "torch-dcp",
    _dcp,
    Target(
        "dcp",
        _dcp,
        (EP, WORLD, LIKE, WEIGHTS_ONLY, STYLE),
        resharded=True,
        example="run/checkpoints fsdp --to dcp --world 8 --config path/to/model",
    ),
)
