"""Makes ``ckpt_tool/families/tensors.json``: which tensors transformers' models of each family have.

    python -m tests.engine.model_tables [NAME ...]

Models of ``hf_models`` are built on torch's meta device, with the fields of their configs changed
(``table_samples``). What all layers of a kind have is required; when they have the others, and the sizes of
all, is learnt as rules (``table_rules``).
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig

from ckpt_tool.families import family_of
from ckpt_tool.families.conditions import Fields
from tests.engine.hf_models import MODELS, can_build
from tests.engine.table_models import DENSE, build, options_of
from tests.engine.table_rules import NoRuleError, Point, fitted, learnt, questions_of
from tests.engine.table_samples import Samples, flat, text_of_options, without

TABLE = Path(__file__).parents[2] / "ckpt_tool" / "families" / "tensors.json"
# Tensors that layers of a newer release (5.24) have in the place of another.
SINCE: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "bailing_hybrid": {
        "attention.q_proj.weight": (
            "attention.q_a_layernorm.weight", "attention.q_a_proj.weight", "attention.q_b_proj.weight",
        ),
    },
}  # fmt: skip


NO_RULE = object()
# Fields that classes take and do not keep: they make a list of one per layer of them.
UNSAID = (
    "full_attention_interval", "sliding_window_pattern", "attn_layer_period", "interleave_moe_layer_step",
    "no_rope_layer_interval", "global_attn_every_n_layers", "layer_group_size", "attention_interval",
)  # fmt: skip


class Learnt:
    """What the samples of a family tell, as data."""

    def __init__(self, name: str, samples: Samples) -> None:
        self.name, self.samples = name, samples
        self.used: set[str] = set()
        self.asked: set[str] = set()
        self.unsaid: dict[str, int] = {}
        self.config = AutoConfig.for_model(name, **samples.start).get_text_config(decoder=True)
        self._fields = [Fields(one.text) for one in samples.all]
        self._types: dict[str, set[Any]] = {}
        for one in samples.all:
            for field, value in flat(one.text):
                values = value if isinstance(value, list) else [value]
                self._types.setdefault(field, set()).update(v for v in values if isinstance(v, str | int))
        self._lists = {
            field for one in samples.all for field, value in flat(one.text) if isinstance(value, list)
        }

    def kind(self, kind: str) -> dict[str, Any]:
        """Names and rules of one kind of layer, or of what stands beside the layers."""
        held = [
            (fields, number, layer.shapes)
            for fields, one in zip(self._fields, self.samples.all, strict=True)
            for number, layer in one.layers.items()
            if layer.kind == kind
        ]
        since = SINCE.get(self.name, {})
        known = {name for _, _, shapes in held for name in shapes}
        found: dict[str, Any] = {"required": [], "known": [], "when": {}, "size": {}}
        for name in sorted(known):
            if all(name in shapes for _, _, shapes in held) and name not in since:
                found["required"].append(name)
            else:
                found["known"].append(name)
                found["when"][name] = None if name in since else self._presence(name, held)
            found["size"][name] = [
                self._size(name, axis, held) for axis in range(len(self._any_shape(name, held)))
            ]
        for names in (new for old, new in since.items() if old in known):
            found["known"] = sorted({*found["known"], *names})
            found["when"] |= dict.fromkeys(names)
        return found

    def _any_shape(self, name: str, held: Any) -> tuple[int, ...]:
        shapes = [shapes[name] for _, _, shapes in held if name in shapes]
        return () if len({len(shape) for shape in shapes}) > 1 else shapes[0]

    def _presence(self, name: str, held: Any) -> Any:
        """The rule of a tensor's presence; None where none can be told."""
        points = [Point(fields, number, name in shapes) for fields, number, shapes in held]
        fields = self.samples.presence.get(name, set())
        beside = [one for other, one in self.samples.presence.items() if _module(other) == _module(name)]
        for some in (fields, fields.union(*beside)):
            try:
                return self._kept(learnt(points, self._questions(some)))
            except NoRuleError:
                pass
        sys.stderr.write(f"{self.name}: when {name}? {sorted(fields)}\n")
        return None

    def _size(self, name: str, axis: int, held: Any) -> Any:
        points = [
            Point(fields, number, shapes[name][axis]) for fields, number, shapes in held if name in shapes
        ]
        kinds = {field for field in self._lists if all(isinstance(one, str) for one in self._types[field])}
        kinds |= {field for field in self.samples.values if field.endswith("_layers")} - self._lists
        questions = self._questions(kinds)
        own = self._sizes_of(lambda other, number: (other, number) == (name, axis))
        weight = name.removesuffix("bias") + "weight"
        alike = own | self._sizes_of(lambda other, number: (other, number) == (weight, axis))
        beside = own | self._sizes_of(lambda other, _: _module(other) == _module(name))
        for fields in (own, alike, beside):
            try:
                return self._kept(fitted(points, sorted(fields), [*questions, *self._questions(fields)]))
            except NoRuleError:
                pass
        sys.stderr.write(f"{self.name}: size {axis} of {name}? {sorted(own)}\n")
        return None

    def _sizes_of(self, chosen: Callable[[str, int], bool]) -> set[str]:
        """The fields that the sizes of some tensors follow."""
        return set().union(*(fields for key, fields in self.samples.sizes.items() if chosen(*key)))

    def _questions(self, fields: set[str]) -> list[list[Any]]:
        scalars = sorted(field for field in fields if field not in self._lists)
        numbers = [f for f in scalars if any(type(v) is int for v in self._types[f])]
        lists = [(field, self._types[field]) for field in sorted(fields & self._lists)]
        return questions_of(scalars, lists, numbers)

    def _kept(self, rule: Any) -> Any:
        self.used |= set(fields_of(rule))
        self.asked |= set(asked_of(rule))
        return rule

    def aliases(self) -> dict[str, list[str]]:
        """Other names of the fields that rules use."""
        found: dict[str, list[str]] = {}
        for other, field in (self.config.attribute_map or {}).items():
            if field in self.used:
                found.setdefault(field, []).append(other)
        return found

    def defaults(self) -> dict[str, Any]:
        """What transformers takes for fields that a config lacks: of those that presence hangs on, and of
        those that may be null. Other sizes have none: a config without them is not judged by its sizes."""
        found: dict[str, Any] = {}
        asked = set(self.asked)
        while asked:
            field = asked.pop()
            rule = self._default(field)
            if rule is not NO_RULE:
                found[field] = rule
                asked |= set(fields_of(rule if isinstance(rule, list) else None)) - found.keys()
        return dict(sorted(found.items()))

    def _default(self, field: str) -> Any:
        count = len([n for n in self.samples.all[0].layers if n is not None])
        if field in self.unsaid:
            return self.unsaid[field]
        (text,) = list(without(self.name, self.samples.start, field, [{}])) or ({},)
        value = dict(flat(text)).get(field)
        if value == []:
            return None
        if isinstance(value, list) and len(value) == count:
            return self._default_of_layers(field, text)
        return NO_RULE if isinstance(value, list) else value

    def _default_of_layers(self, field: str, text: Mapping[str, Any]) -> Any:
        """The rule of a list of one per layer that the config's own code makes of other fields."""
        count = len(text[field])

        def made(change: dict[str, Any]) -> Mapping[str, Any] | None:
            layers = change.get("num_hidden_layers", count)
            lists = {
                key: (value * layers)[:layers]
                for key, value in text_of_options(self.name, self.samples.start).items()
                if isinstance(value, list) and len(value) == count and key != field
            }
            found = next(without(self.name, self.samples.start, field, [{**lists, **change}]), None)
            return None if found is None or not isinstance(found.get(field), list) else {**found, **change}

        numbers = [key for key, value in text.items() if type(value) is int and "layers" not in key]
        plain = made({"num_hidden_layers": 12})
        if plain is None:
            return NO_RULE
        relevant = []
        for key in (*numbers, *UNSAID):
            others = {value: made({"num_hidden_layers": 12, key: value}) for value in range(1, 9)}
            if any(one is not None and one[field] != plain[field] for one in others.values()):
                relevant.append(key)
                if key in UNSAID:
                    same = [
                        v for v, one in others.items() if one is not None and one[field] == plain[field]
                    ]
                    self.unsaid |= {key: same[0]} if len(same) == 1 else {}
        draw = random.Random(field)
        changes = [
            {"num_hidden_layers": draw.randint(4, 9), **{key: draw.randint(1, 5) for key in relevant}}
            for _ in range(80)
        ]
        points = [
            Point(Fields(one), number, value)
            for one in map(made, changes)
            if one is not None
            for number, value in enumerate(one[field])
        ]
        try:
            return learnt(points, questions_of(relevant, [], [*relevant, "num_hidden_layers"]))
        except (NoRuleError, IndexError):
            sys.stderr.write(f"{self.name}: default of {field}? {relevant}\n")
            return NO_RULE


def _module(name: str) -> str:
    return name.partition(".")[0]


def asked_of(rule: Any) -> Iterator[str]:
    """The fields that a rule's questions are about, and not its formulas alone."""
    if isinstance(rule, list):
        question, yes, no = rule
        yield from fields_of([question, None, None])
        yield from asked_of(yes)
        yield from asked_of(no)


def fields_of(rule: Any) -> Iterator[str]:
    """The fields that a rule asks for."""
    if isinstance(rule, list):
        (kind, field, *more), yes, no = rule
        if isinstance(field, str):
            yield field
        if kind in ("at", "last"):
            yield more[0]
        yield from fields_of(yes)
        yield from fields_of(no)
    elif isinstance(rule, str):
        for word in rule.replace("//", " ").split():
            if word != "+" and not word.lstrip("-").isdecimal():
                yield word


def table(name: str) -> dict[str, Any] | None:
    options = options_of(name)
    config = AutoConfig.for_model(name, **options)
    if name == "diffusion_gemma" or config.is_encoder_decoder or family_of(config.to_dict()).untranslated:
        return None
    model = build(name, options)
    samples = Samples(name, options)
    roots = {one.root for one in samples.all}
    if len(roots) != 1:
        raise SystemExit(f"{name}: {sorted(roots)}")
    learnt = Learnt(name, samples)
    found = {
        "class": type(model).__name__,
        "root": roots.pop(),
        "tied": bool(getattr(AutoConfig.for_model(name), "tie_word_embeddings", False)),
        "ignored": sorted(model._keys_to_ignore_on_load_unexpected or ()),
        "towers": sorted(set().union(*(one.towers for one in samples.all))),
        **{kind: learnt.kind(kind) for kind in ("top", "moe", "dense")},
    }
    return {**found, "aliases": learnt.aliases(), "defaults": learnt.defaults()}


def main() -> None:
    """All models, or those that are named, whose tables replace those in the file."""
    transformers.logging.set_verbosity_error()
    wanted = sys.argv[1:]
    tables = json.loads(TABLE.read_text())["models"] if wanted else {}
    for name in (*MODELS, *(one for one in DENSE if one not in MODELS)):
        if can_build(name) and (not wanted or name in wanted):
            found = table(name)
            if found is not None:
                tables["mistral3/mistral4" if name == "mistral3" else name] = found
    TABLE.write_text(written({"transformers": transformers.__version__, "models": tables}))


def written(tables: Mapping[str, Any]) -> str:
    """One line per model and kind of layer, so that a difference can be read."""
    models = []
    for name, found in tables["models"].items():
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items()]
        models.append(f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n}")
    return f'{{"transformers": "{tables["transformers"]}", "models": {{\n' + ",\n".join(models) + "\n}}\n"


if __name__ == "__main__":
    main()
