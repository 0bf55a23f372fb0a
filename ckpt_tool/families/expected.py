"""Which tensors a family's model has besides its experts: asked of transformers once, and kept in a file.

``tensors.json`` is made by ``tests/engine/model_tables.py`` of the release it names: every family's model
with its config's fields varied. What all variants have is *required*, what some have is *known*, with
a rule for when (``conditions``); anything else is no tensor of that model. Families whose names
transformers changes by no rule are not in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from ckpt_tool.families import text_config

# Models that transformers has no class for, and the one that runs them: the names and shapes are its own.
# Kimi-K2's config.json names DeepseekV3ForCausalLM under ``architectures``.
_RUN_AS: Mapping[str, str] = {"kimi_k2": "deepseek_v3"}


def runs_as(config: Mapping[str, Any]) -> str | None:
    """The model type whose class runs this config's model, where that is another one."""
    own = config.get("model_type")
    return _RUN_AS.get(own) if isinstance(own, str) else None


class Names(NamedTuple):
    """Names of tensors: of a layer without its path, of others whole. ``known`` has the required, too.

    ``when`` has the rule of each that is known and not required, ``size`` the rules of each axis; None
    where no rule is known.
    """

    required: frozenset[str]
    known: frozenset[str]
    when: Mapping[str, Any]
    size: Mapping[str, list[Any]]


@dataclass(frozen=True, slots=True)
class Expected:
    """A model's tensors under published names.

    ``architecture`` is transformers' class, ``root`` the path of its list of layers, ``tied`` whether it
    ties its head to its embedding where a config does not say, ``ignored`` what it passes over as it loads.
    ``towers`` are the beginnings of names of a composite model's other parts. ``defaults`` are of fields
    that a config may lack, ``aliases`` their other names.
    """

    architecture: str
    root: str
    tied: bool
    ignored: tuple[re.Pattern[str], ...]
    towers: tuple[str, ...]
    top: Names
    moe: Names
    dense: Names
    defaults: Mapping[str, Any]
    aliases: Mapping[str, list[str]]

    def layer(self, moe: bool) -> Names:
        """What a layer has, with routed experts or without."""
        return self.moe if moe else self.dense

    @property
    def writes_text(self) -> bool:
        """Whether the class is one that has an output head, and not the bare model in one."""
        return self.architecture.endswith(("ForCausalLM", "ForConditionalGeneration"))

    @property
    def text_path(self) -> str:
        """The path of the text model: what its layers, embedding and norm stand under."""
        return self.root.rpartition(".")[0]

    @property
    def head(self) -> str | None:
        return next((name for name in sorted(self.top.required) if name.endswith("head.weight")), None)


def expected_of(config: Mapping[str, Any]) -> Expected | None:
    """What a ``config.json`` describes; None where the table does not have it."""
    own, text = runs_as(config) or config.get("model_type"), text_config(config).get("model_type")
    known = _table()
    return next(
        (known[key] for key in (f"{own}/{text}", own) if isinstance(key, str) and key in known), None
    )


def text_of(config: Mapping[str, Any]) -> Expected | None:
    """The text model of a composite one's config, as a model by itself; None where it has none."""
    text = text_config(config)
    found = None if text is config else expected_of(text)
    return found if found is not None and found.writes_text else None


def composites_of(config: Mapping[str, Any]) -> list[Expected]:
    """The composite models that a text model may be a part of."""
    own = expected_of(config)
    if own is None or own.towers or not own.writes_text:
        return []
    layers = (own.moe.known, own.dense.known)
    return [one for one in _table().values() if one.towers and (one.moe.known, one.dense.known) == layers]


def release() -> str:
    """The release of transformers that the table is of."""
    return str(_file()["transformers"])


@cache
def _file() -> Mapping[str, Any]:
    text = (resources.files(__package__) / "tensors.json").read_text(encoding="utf-8")
    found: Mapping[str, Any] = json.loads(text)
    return found


@cache
def _table() -> Mapping[str, Expected]:
    return {name: _expected(table) for name, table in _file()["models"].items()}


def _expected(table: Mapping[str, Any]) -> Expected:
    kinds = {
        kind: Names(
            frozenset(table[kind]["required"]),
            frozenset(table[kind]["required"] + table[kind]["known"]),
            table[kind]["when"],
            table[kind]["size"],
        )
        for kind in ("top", "moe", "dense")
    }
    return Expected(
        architecture=table["class"],
        root=table["root"],
        tied=table["tied"],
        ignored=tuple(map(re.compile, table["ignored"])),
        towers=tuple(table["towers"]),
        defaults=table["defaults"],
        aliases=table["aliases"],
        **kinds,
    )
