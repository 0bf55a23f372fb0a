"""Model families: what their experts are called in published files, and what their config says.

The data is in the ``.toml`` files beside this module, one table per family; adding a family is adding a
table. A family is chosen by ``model_type`` in ``config.json``, never guessed from names or shapes: a
square matrix does not tell its orientation, and AutoEP gives several families the same names.

A pattern holds ``{layer}`` for the module path of a layer (``model.layers.3``), ``{expert}`` for the
global expert id and ``*`` for the rest of the name. ``autoep`` and ``transformers`` are the renames from
the names of those module trees to published ones.
"""

from __future__ import annotations

import fnmatch
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from ckpt_tool.canonical import ExpertName
from ckpt_tool.errors import UsageError


@dataclass(frozen=True, slots=True)
class Family:
    """One family's table. ``experts`` maps a projection to its published name; ``fused`` names
    transformers' in-memory stacks: ``gate_up`` [E, 2I, H], the gate's rows first, ``down`` [E, H, I]."""

    name: str
    model_types: tuple[str, ...]
    moe_layers: str
    experts: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, list[str]] = field(default_factory=dict)
    keep_fp32: tuple[str, ...] = ()
    autoep: Mapping[str, str] = field(default_factory=dict)
    transformers: Mapping[str, str] = field(default_factory=dict)

    def keeps_fp32(self, name: str) -> bool:
        """Whether a tensor routes or trains wrongly when it is rounded."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.keep_fp32)

    def expert_name(self, name: ExpertName, expert: int) -> str:
        """The published name of one expert's matrix."""
        return self.experts[name.projection].format(layer=name.layer_path, expert=expert)

    def parse_expert(self, name: str) -> tuple[ExpertName, int] | None:
        """The inverse of ``expert_name``."""
        for projection, pattern in self.experts.items():
            match = compiled(pattern).fullmatch(name)
            if match:
                return ExpertName(match["layer"], projection), int(match["expert"])
        return None


@cache
def families() -> tuple[Family, ...]:
    """All families, by name."""
    found = []
    for entry in resources.files(__name__).iterdir():
        if entry.name.endswith(".toml"):
            for name, table in tomllib.loads(entry.read_text(encoding="utf-8")).items():
                lists = {key: tuple(value) for key, value in table.items() if isinstance(value, list)}
                found.append(Family(**{"name": name, **table, **lists}))
    return tuple(sorted(found, key=lambda family: family.name))


def family_of(config: Mapping[str, Any]) -> Family:
    """The family a ``config.json`` names.

    Raises:
        UsageError: it names none, or one that is not in the tables.
    """
    model_type = text_config(config).get("model_type") or config.get("model_type")
    for family in families():
        if model_type in family.model_types:
            return family
    known = ", ".join(sorted(kind for family in families() for kind in family.model_types))
    raise UsageError(
        f"config.json has model_type {model_type!r}, whose expert names and layout ckpt-tool does not "
        f"know, and it does not guess them. Known: {known}."
    )


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


@cache
def compiled(pattern: str) -> re.Pattern[str]:
    """A name pattern as a regular expression with the groups ``layer``, ``expert`` and ``rest``."""
    text = re.escape(pattern).replace(r"\*", "(?P<rest>.+)")
    text = text.replace(r"\{layer\}", r"(?P<layer>(?:.*\.)?\d+)")
    return re.compile(text.replace(r"\{expert\}", r"(?P<expert>\d+)"))
