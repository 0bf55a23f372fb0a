"""Model families: what their experts are called and how they lie in published files and in memory.

The data is in the ``.toml`` files beside this module, one file per group of families that share a rule,
one table per family; adding a family is adding a table. A family is chosen by ``model_type`` in
``config.json``, never guessed from names or shapes: a square matrix does not tell its orientation, and
AutoEP gives several families the same names.

A pattern holds ``{layer}`` for the module path of a layer (``model.layers.3``), ``{expert}`` for the
global expert id and ``*`` for the rest of the name. ``docs/families.md`` describes every field.
"""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from ckpt_tool.canonical import GATE
from ckpt_tool.errors import UnreadableError, UsageError
from ckpt_tool.families.forms import Stored, compiled, parse_stored

__all__ = ["Family", "families", "families_rows", "family_of", "stated", "text_config"]

HUB_FORM, FUSED_FORM = "hub", "fused"
_FORMS = ("hub", "fused", "also")
# Where composite models keep the description of their language model.
_TEXT_CONFIGS = ("text_config", "thinker_config", "llm_config", "language_config")


# Layouts by pattern, and those by what the pattern ends in, which is quick to look at.
_ByTail = tuple[tuple[str, tuple[tuple[str, tuple[Stored, ...]], ...]], ...]


class Match(NamedTuple):
    """What a stored name may stand for: its possible layouts, the layer's path as named, the expert's id
    (None for a stack of all)."""

    layouts: tuple[Stored, ...]
    layer_path: str
    expert: int | None


@dataclass(frozen=True, slots=True)
class Family:
    """One family's table.

    ``hub`` is how published files hold experts, ``fused`` how transformers holds them in memory,
    ``also`` what else occurs in files. ``autoep``, ``transformers`` and ``torchtitan`` are the renames
    from the names of those module trees to published ones; ``prefixes`` those of module paths, from
    transformers' to published. ``parts`` maps a dense tensor in memory to the published tensors that
    are concatenated in it, ``joined`` a published one to those in memory that are concatenated in it, and
    ``transposed`` a matrix in memory to the published one that is its transpose. ``misnamed`` are names
    that transformers' ``save_pretrained`` gives and no published file has. ``config`` maps ``experts``,
    ``expert_size``, ``vision_expert_size`` (of a second stack in each layer), ``hidden_size``, ``layers``,
    ``extra_experts`` and ``expert_hidden_size`` (the model's, unless it says otherwise) to the fields
    that state them, the hub's name first. ``autoep_alias`` says that AutoEP keeps the router reachable
    as ``gate``, too. ``apart`` are the beginnings of names of other models in the same files, whose
    experts stay as they are. ``untranslated`` are patterns of published names of tensors that
    transformers has in memory under names that no rename here tells. ``rows`` says of which config
    fields' product the rows of a dense tensor are, ``shares`` the same of each part of a ``joined`` one
    whose parts are not equal. ``autoep_wrong`` is the reason why AutoEP's
    checkpoints of this family cannot be used.

    What renames cannot say of torchtitan: ``torchtitan_buffers`` are patterns of its own names, of buffers
    its MoE layers always have; they begin as zeros where the source has none, and are left out where no
    published name stands for them. ``torchtitan_shared`` are patterns of published names, of tensors it
    has none of its own of. With ``torchtitan_mtp`` layers after the last are its ``mtp_layers``; with
    ``torchtitan_fused_qkv`` its optimizer knows query, key and value as one parameter.
    """

    name: str
    model_types: tuple[str, ...]
    moe_layers: str
    hub: tuple[Stored, ...] = ()
    fused: tuple[Stored, ...] = ()
    also: tuple[Stored, ...] = ()
    config: Mapping[str, list[str]] = field(default_factory=dict)
    keep_fp32: tuple[str, ...] = ()
    prefixes: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, list[str]] = field(default_factory=dict)
    joined: Mapping[str, list[str]] = field(default_factory=dict)
    transposed: Mapping[str, str] = field(default_factory=dict)
    autoep: Mapping[str, str] = field(default_factory=dict)
    transformers: Mapping[str, str] = field(default_factory=dict)
    torchtitan: Mapping[str, str] = field(default_factory=dict)
    torchtitan_buffers: tuple[str, ...] = ()
    torchtitan_shared: tuple[str, ...] = ()
    torchtitan_mtp: bool = False
    torchtitan_fused_qkv: bool = False
    misnamed: Mapping[str, str] = field(default_factory=dict)
    apart: tuple[str, ...] = ()
    untranslated: tuple[str, ...] = ()
    rows: Mapping[str, str] = field(default_factory=dict)
    shares: Mapping[str, list[str]] = field(default_factory=dict)
    autoep_wrong: str = ""
    autoep_alias: bool = False

    def form(self, style: str) -> tuple[Stored, ...]:
        """How ``style`` (hub or fused) holds the experts."""
        return self.fused if style == FUSED_FORM else self.hub

    def keeps_fp32(self, name: str) -> bool:
        """Whether a tensor routes or trains wrongly when it is rounded; by its published name or by that
        in transformers' memory."""
        names = {name, self.published(name, "transformers") or name}
        return any(fnmatch.fnmatchcase(one, pattern) for one in names for pattern in self.keep_fp32)

    def renames(self, dialect: str) -> Mapping[str, str]:
        """The renames from a module tree's names to published ones."""
        found: dict[str, Mapping[str, str]] = {"autoep": self.autoep, "torchtitan": self.torchtitan}
        return found.get(dialect, self.transformers)

    def match(self, name: str, sizes: Mapping[str, int]) -> Match | None:
        """The layouts that a stored name may stand for, over all forms that occur in files.

        Args:
            sizes: of ``sizes()``; E tells a layer's second stack of experts from its first.

        Raises:
            UnreadableError: the layer has two stacks, and ``sizes`` has no E.
        """
        if name.startswith(self.apart):
            return None
        for tail, layouts in _by_tail(self):
            if name.endswith(tail):
                for pattern, candidates in layouts:
                    found = compiled(pattern).fullmatch(name)
                    if found is not None:
                        expert = found.groupdict().get("expert")
                        number = None if expert is None else int(expert)
                        return self._of_stack(candidates, found["layer"], number, sizes)
        return None

    def _of_stack(
        self, layouts: tuple[Stored, ...], path: str, number: int | None, sizes: Mapping[str, int]
    ) -> Match:
        if number is None or not any(stored.after for stored in layouts):
            return Match(layouts, path, number)
        if "E" not in sizes:
            raise UnreadableError(
                f"The family {self.name} numbers two kinds of experts as one list, and config.json does "
                f"not say how many there are of each ({', '.join(self.config['experts'])})."
            )
        after = number >= sizes["E"]
        chosen = tuple(stored for stored in layouts if stored.after is after)
        return Match(chosen, path, number - sizes["E"] * after)

    def sizes(self, config: Mapping[str, Any]) -> dict[str, int]:
        """E, I and H as far as a config states them."""
        text = text_config(config)
        found = {
            letter: stated(text, self.config.get(key, ()))
            for letter, key in (("E", "experts"), ("I", "expert_size"), ("H", "expert_hidden_size"))
        }
        sizes = {letter: of_all_layers(value[1]) for letter, value in found.items() if value}
        return {letter: size for letter, size in sizes.items() if type(size) is int}

    def is_translated(self, name: str) -> bool:
        """Whether it is known what transformers calls a published tensor in memory."""
        if self.unpublished_by_rule(name, "transformers") is not None:
            return True
        return not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.untranslated)

    def published_path(self, path: str) -> str:
        """A module path or name of transformers' tree with its published prefix."""
        return _swap_prefix(path, self.prefixes.items())

    def memory_path(self, path: str) -> str:
        """The inverse of ``published_path``."""
        return _swap_prefix(path, ((hub, own) for own, hub in self.prefixes.items()))

    def memory_module(self, path: str) -> str:
        """The path of a module in transformers' tree, from its published one."""
        return self.memory_path(f"{path}.").removesuffix(".")

    def published(self, name: str, dialect: str) -> str | None:
        """The published name of a dense tensor; None where no rule says anything about it."""
        placed = self.published_path(name)
        for pattern, target in _specific_first(self.renames(dialect).items()):
            renamed = _renamed(placed, pattern, target)
            if renamed is not None:
                return renamed
        return placed if placed != name else None

    def unpublishable(self, name: str, dialect: str) -> bool:
        """Whether a tensor is one of torchtitan's own, which no published file has."""
        return (
            dialect == "torchtitan"
            and any(compiled(pattern).fullmatch(name) for pattern in self.torchtitan_buffers)
            and self.published(name, dialect) is None
        )

    def corrected(self, name: str) -> str:
        """A name found in a file, with what transformers misnames put right."""
        for pattern, target in self.misnamed.items():
            renamed = _renamed(name, pattern, target)
            if renamed is not None:
                return renamed
        return name

    def unpublished(self, name: str, dialect: str) -> str:
        """The inverse of ``published``."""
        return self.memory_path(self.unpublished_by_rule(name, dialect) or name)

    def unpublished_by_rule(self, name: str, dialect: str) -> str | None:
        """What a rename of the dialect makes of a published name; None where none is about it."""
        inverse = [(target, pattern) for pattern, target in reversed(list(self.renames(dialect).items()))]
        for pattern, target in _specific_first(inverse):
            renamed = _renamed(name, pattern, target)
            if renamed is not None:
                return renamed
        return None


def _swap_prefix(path: str, prefixes: Iterable[tuple[str, str]]) -> str:
    for old, new in prefixes:
        if path.startswith(old):
            return new + path[len(old) :]
    return path


def _specific_first(rules: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Rules in the order to try them in: whole names, then the longest pattern."""
    return sorted(rules, key=lambda rule: ("*" in rule[0], -len(rule[0])))


def _renamed(name: str, pattern: str, target: str) -> str | None:
    match = compiled(pattern).fullmatch(name)
    if match is None:
        return None
    groups = match.groupdict()
    return target.format(layer=groups.get("layer")).replace("*", groups.get("rest") or "*")


def is_expert(name: str) -> bool:
    """Whether a stored name is that of an expert tensor in some family."""
    return _is_expert(name, _everyones())


def is_strange_expert(name: str, family: Family) -> bool:
    """Whether a stored name is that of an expert tensor in some family, and not in this one."""
    return is_expert(name) and not _is_expert(name, _by_tail(family))


def _is_expert(name: str, by_tail: _ByTail) -> bool:
    return any(
        name.endswith(tail) and any(compiled(pattern).fullmatch(name) for pattern, _ in layouts)
        for tail, layouts in by_tail
    )


@cache
def _everyones() -> _ByTail:
    return _tails(
        tuple(stored for family in families() for stored in (*family.hub, *family.fused, *family.also))
    )


@cache
def _tails(forms: tuple[Stored, ...]) -> _ByTail:
    by_pattern: dict[str, list[Stored]] = {}
    for stored in forms:
        same = by_pattern.setdefault(stored.pattern, [])
        if stored not in same:
            same.append(stored)
    tails: dict[str, list[tuple[str, tuple[Stored, ...]]]] = {}
    for pattern, candidates in by_pattern.items():
        tails.setdefault(pattern.rsplit("}", 1)[-1], []).append((pattern, tuple(candidates)))
    return tuple((tail, tuple(layouts)) for tail, layouts in tails.items())


def _by_tail(family: Family) -> _ByTail:
    return _tails((*family.hub, *family.fused, *family.also))


# ---- the tables


@cache
def families() -> tuple[Family, ...]:
    """All families, by name."""
    found = []
    for entry in resources.files(__name__).iterdir():
        if entry.name.endswith(".toml"):
            found += _read(tomllib.loads(entry.read_text(encoding="utf-8")))
    return tuple(sorted(found, key=lambda family: family.name))


def _read(tables: Mapping[str, Any]) -> list[Family]:
    """The families of one file. ``defaults`` holds for all of them; ``like`` takes over another's table."""
    whole: dict[str, dict[str, Any]] = {}
    for name, table in tables.items():
        if name != "defaults":
            base = whole[table["like"]] if "like" in table else tables.get("defaults", {})
            whole[name] = _merged(base, {key: value for key, value in table.items() if key != "like"})
    return [_family(name, table) for name, table in whole.items()]


def _merged(base: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """A table over another: its own values win. Tables are merged, but for the layouts of experts; an
    empty one empties."""
    result = dict(base)
    for key, value in table.items():
        merge = isinstance(value, dict) and value and key in base and key not in _FORMS
        result[key] = {**base[key], **value} if merge else value
    return result


def _family(name: str, table: Mapping[str, Any]) -> Family:
    fields: dict[str, Any] = {"name": name, **table}
    for key, value in table.items():
        if key in _FORMS:
            fields[key] = tuple(parse_stored(pattern, layout) for pattern, layout in value.items())
        elif isinstance(value, list):
            fields[key] = tuple(value)
    config = {"hidden_size": ["hidden_size"], "layers": ["num_hidden_layers"], **table["config"]}
    fields["config"] = {"expert_hidden_size": config["hidden_size"], **config}
    return Family(**fields)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family a ``config.json`` names: by the model's and its text model's type together, by the
    model's, by its text model's, whichever is in the tables first.

    Raises:
        UsageError: it names none, or one that is not in the tables.
    """
    own, text = config.get("model_type"), text_config(config).get("model_type")
    known = _by_type()
    for model_type in (f"{own}/{text}", own, text):
        if isinstance(model_type, str) and model_type in known:
            return known[model_type]
    raise UsageError(
        f"config.json has model_type {text or own!r}, whose expert names and layout ckpt-tool does not "
        "know, and it does not guess them. `ckpt-tool families` lists what it knows."
    )


@cache
def _by_type() -> dict[str, Family]:
    return {model_type: family for family in families() for model_type in family.model_types}


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model."""
    for key in _TEXT_CONFIGS:
        nested = config.get(key)
        if isinstance(nested, Mapping):
            return text_config(nested)
    return config


def stated(config: Mapping[str, Any], keys: Iterable[str]) -> tuple[str, Any] | None:
    """The first of ``keys`` that a config has, with its value; a dot goes into a nested config or list."""
    for key in keys:
        value: Any = config
        for part in key.split("."):
            if isinstance(value, list) and part.isdigit():
                value = value[int(part)] if int(part) < len(value) else None
            else:
                value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            return key, value
    return None


def of_all_layers(value: Any) -> Any:
    """A list of one value per layer, all the same, as that value."""
    same = isinstance(value, list) and value and all(one == value[0] for one in value)
    return value[0] if same else value


def families_rows() -> list[dict[str, Any]]:
    """One row per family for ``ckpt-tool families``: plain data with stable keys."""
    return [
        {
            "family": family.name,
            "model_types": list(family.model_types),
            "moe_layers": family.moe_layers,
            "hub_layout": _kind(family.hub),
            "fused_layout": _kind(family.fused),
            "biases": any(stored.part == "bias" for stored in family.hub),
            "autoep": "refused" if family.autoep_wrong else ("yes" if family.autoep else "no"),
            "kept_fp32": list(family.keep_fp32),
            "experts": list(family.config.get("experts", ())),
        }
        for family in families()
    ]


def _kind(forms: tuple[Stored, ...]) -> str:
    """A layout in a few words: per expert, or stacked, with what is particular about it."""
    weights = [stored for stored in forms if stored.part == "weight"]
    if not weights:
        return "no experts"
    words = ["per expert" if weights[0].per_expert else "stacked"]
    many = [stored for stored in weights if len(stored.projections) > 1]
    words += ["fused"] if many else []
    words += ["interleaved"] if any(("I", "2") in stored.dims for stored in many) else []
    transposed = any(
        not stored.per_expert and stored.letters.index("H") < stored.letters.index("I")
        if stored.projections[0] != "down"
        else not stored.per_expert and stored.letters.index("I") < stored.letters.index("H")
        for stored in weights
    )
    words += ["transposed"] if transposed else []
    words += ["flattened"] if any("E" in dim and len(dim) > 1 for s in weights for dim in s.dims) else []
    gated = any(GATE in stored.projections for stored in weights)
    return " ".join(words + ([] if gated else ["no gate"]))
