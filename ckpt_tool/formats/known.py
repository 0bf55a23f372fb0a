"""All formats. A new one is a folder (or module) beside this one, and a line here.

Only declarations are imported here; the code that reads and writes a format is imported when it is used.
"""

from __future__ import annotations

from collections.abc import Mapping

from ckpt_tool.formats.dcp.declared import DCP
from ckpt_tool.formats.declaration import Format, Target
from ckpt_tool.formats.deepspeed.declared import UNIVERSAL, ZERO0, ZERO1, ZERO2, ZERO3
from ckpt_tool.formats.hf.declared import HUGGING_FACE
from ckpt_tool.formats.options import Option, united

# In order of detection: a Universal directory also has a stage-3 model file.
FORMATS: list[Format] = [
    UNIVERSAL,
    ZERO3,
    ZERO2,  # its reader reads stage 1, too
    ZERO1,
    ZERO0,
    DCP,
    HUGGING_FACE,
]


def register(new: Format) -> None:
    """Add a format that is not part of the package. The command line shows it where this is called before
    ``ckpt_tool.cli`` is imported.

    Raises:
        ValueError: a format of this name or target is known, or an option is declared in another way.
    """
    if any(new.name == known.name for known in FORMATS):
        raise ValueError(f"the format {new.name} is known already")
    if new.target is not None and new.target.to in targets():
        raise ValueError(f"the target {new.target.to} is known already")
    united(option for known in (*FORMATS, new) if known.target for option in known.target.options)
    FORMATS.append(new)


def targets() -> Mapping[str, Target]:
    """What ``--to`` may name, each with the format's declaration."""
    return {known.target.to: known.target for known in FORMATS if known.target is not None}


def meant_target(text: str) -> str | None:
    """The target of the format whose name has ``text`` in it: safetensors are hf."""
    wanted = text.lower().replace("-", "").replace("_", "").replace(" ", "")
    for known in FORMATS:
        if known.target is not None and wanted and wanted in known.name.replace("-", ""):
            return known.target.to
    return None


def all_options() -> tuple[Option, ...]:
    """The options of all targets, each once."""
    return united(option for target in targets().values() for option in target.options)


def own_target(name: str) -> Target | None:
    """The target that writes the format of this name, if it is written."""
    return next((known.target for known in FORMATS if known.name == name), None)


def published_target() -> Target:
    """The target that is a model as it is published."""
    return next(target for target in targets().values() if target.published)
