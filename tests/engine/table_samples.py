"""Many configs of one family, and what transformers' models of them have: each field changed alone, from
several starts, to find which tensors it is about; then many at once, to learn and to prove rules.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import AutoConfig
from transformers.configuration_utils import ALLOWED_LAYER_TYPES

from ckpt_tool.canonical import ExpertName
from ckpt_tool.families import family_of, stated, text_config
from tests.engine.hf_models import COMPOSITE
from tests.engine.table_models import DENSE, changed, config_of, is_text, published, tower_of

# Layers of other kinds than the tiny configs have, for models whose kinds no field of all models names.
MORE: Mapping[str, tuple[dict[str, Any], ...]] = {
    "jamba": ({"attn_layer_period": 2, "attn_layer_offset": 1},),
    "granitemoehybrid": ({"layer_types": ["mamba", "attention", "mamba"]},),
    "nemotron_h": ({"layers_block_type": ["mamba", "moe", "mlp"]},),
    "bailing_hybrid": ({"layer_group_size": 3}, {"layer_group_size": 1}),
}  # fmt: skip
_NOT_OF_TENSORS = frozenset({
    "use_cache", "output_hidden_states", "return_dict", "output_attentions", "torchscript", "is_decoder",
    "output_router_logits", "is_encoder_decoder", "add_cross_attention", "tie_word_embeddings", "is_moe",
    "enable_moe_block", "ffn_config.hidden_size",
})  # fmt: skip
STARTS, RANDOM, ATTEMPTS = 6, 120, 360
# Sizes of the whole model, which no tensor's presence hangs on.
_CORE = ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "head_dim", "d_model")


class Held(NamedTuple):
    """What one layer has, or what stands beside the layers: names without the layer's path, shapes."""

    kind: str
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Sample:
    """One config and its model. ``layers`` has the tensors beside the layers under None."""

    text: Mapping[str, Any]
    root: str
    layers: Mapping[int | None, Held]
    towers: frozenset[str]


class Samples:
    """All samples of a family, and which fields each tensor's presence and each axis's size follow."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        self.name = name
        self.all: list[Sample] = []
        self.presence: dict[str, set[str]] = {}
        self.sizes: dict[tuple[str, int], set[str]] = {}
        self.values: dict[str, list[Any]] = {}
        self._random = random.Random(name)
        self._of_presence: list[tuple[str, Any]] = []
        options = under_own_names(name, options)
        self.start = self._long(options)
        starts = [self.start, *self._more(options)]
        self._compared(starts[0], starts)
        for start in starts[1 : STARTS + 1]:
            self._compared(start, starts)
        self._mixed(starts)

    def _long(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options with twice the layers, if such a model can be built."""
        text = text_of_options(self.name, options)
        count = text.get("num_hidden_layers")
        change: dict[str, Any] = {
            key: value * 2 for key, value in text.items() if isinstance(value, list) and len(value) == count
        }
        if count:
            change["num_hidden_layers"] = count * 2
        longer = changed(self.name, options, change)
        return longer if self._sample(longer) is not None else options

    def _more(self, options: dict[str, Any]) -> list[dict[str, Any]]:
        found = [changed(self.name, options, more) for more in MORE.get(self.name, ())]
        found.append(changed(self.name, self.start, {"head_dim": None}))
        return [one for one in found if self._sample(one) is not None]

    def _sample(self, options: dict[str, Any]) -> Sample | None:
        found = sample(self.name, options)
        if found is not None:
            self.all.append(found)
        return found

    def _compared(self, start: dict[str, Any], starts: list[dict[str, Any]]) -> None:
        """Each field changed alone; changes of which tensors there are become starts, too."""
        first = sample(self.name, start)
        assert first is not None  # it was built before
        seen: set[Any] = set()
        for field, value in changes(first, few=start is not self.start):
            options = self._with(start, [(field, value)])
            other = self._sample(options)
            if other is None:
                continue
            names, sizes = self._differences(field, first, other)
            if names or sizes:
                values = self.values.setdefault(field, [])
                if value not in values:
                    values.append(value)
            if names and (field, frozenset(names)) not in seen:
                seen.add((field, frozenset(names)))
                if (field, value) not in self._of_presence:
                    self._of_presence.append((field, value))
                if start is self.start:
                    starts.append(options)

    def _differences(self, field: str, first: Sample, other: Sample) -> tuple[set[Any], bool]:
        """Which tensors' presence differs, by layer, and whether a size does; both are kept."""
        found, sizes = set(), False
        for number in first.layers.keys() & other.layers.keys():
            one, two = first.layers[number].shapes, other.layers[number].shapes
            for name in one.keys() ^ two.keys():
                self.presence.setdefault(name, set()).add(field)
                found.add((number, name))
            for name in one.keys() & two.keys():
                for axis, (old, new) in enumerate(zip(one[name], two[name], strict=False)):
                    if old != new:
                        self.sizes.setdefault((name, axis), set()).add(field)
                        sizes = True
        return found, sizes

    def _mixed(self, starts: list[dict[str, Any]]) -> None:
        """Many fields changed at once, always the same ones."""
        sizes = sorted(set().union(*self.sizes.values()) if self.sizes else ())
        count = 0
        for _ in range(ATTEMPTS):
            chosen = [
                (field, self._random.choice([one for one in self.values[field] if one] or [1]))
                for field in sizes
                if self._random.random() < 0.5 and not isinstance(self.values[field][0], list)
            ]
            chosen += [
                (field, self._shuffled(field, value))
                for field, value in self._of_presence
                if self._random.random() < 0.25
            ]
            count += self._sample(self._with(self._random.choice(starts), chosen)) is not None
            if count == RANDOM:
                return

    def _shuffled(self, field: str, value: Any) -> Any:
        """A value; of a list of one per layer, a value for each layer drawn from all that occur."""
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            return value
        known = sorted({one for values in self.values[field] for one in values})
        return [self._random.choice(known) for _ in value]

    def _with(self, options: dict[str, Any], chosen: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        for field, value in chosen:
            options = changed(self.name, options, nested(text_of_options(self.name, options), field, value))
        return options


def nested(text: Mapping[str, Any], field: str, value: Any) -> dict[str, Any]:
    """A change of one field, which may stand in a config in the config."""
    first, _, rest = field.partition(".")
    if not rest:
        return {first: value}
    inner = text.get(first)
    return {first: {**(inner if isinstance(inner, Mapping) else {}), rest: value}}


def under_own_names(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options without other names of fields, which would win over a field that is changed."""
    text = text_of_options(name, options)
    names = AutoConfig.for_model(name, **options).get_text_config(decoder=True).attribute_map or {}
    own = {names[key]: value for key, value in text.items() if key in names}
    own |= {key: value for key, value in text.items() if key not in names}
    return {**options, "text_config": own} if text is not options else own


def text_of_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    found = options["text_config"] if name in COMPOSITE and "text_config" in options else options
    assert isinstance(found, dict)
    return found


def changes(first: Sample, *, few: bool) -> Iterator[tuple[str, Any]]:
    """Changes of one field each, of all that may matter to tensors. With ``few``, one other size."""
    count = max((number for number in first.layers if number is not None), default=0) + 1
    for key, value in flat(first.text):
        if key in _NOT_OF_TENSORS or key.endswith("_token_id") or key.startswith("num_hidden_layers"):
            continue
        if type(value) is bool:
            yield key, not value
        elif type(value) is int:
            yield from ((key, other) for other in _other_sizes(key, value)[: 1 if few and value else None])
        elif value is None and any(word in key for word in ("_rank", "shared", "bias", "num_", "_size")):
            yield from ((key, 8), (key, True))
        elif isinstance(value, list):
            yield from ((key, other) for other in _other_lists(key, value, count))


def flat(text: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """All fields of a config, and of those in it but for positions."""
    for key, value in text.items():
        if not isinstance(value, Mapping):
            yield f"{path}{key}", value
        elif "rope" not in str(key) and key not in ("id2label", "label2id"):
            yield from flat(value, f"{path}{key}.")


def _other_sizes(key: str, value: int) -> list[int | None]:
    sizes: list[int | None] = [value * 2, value * 3] if value else [1, 2]
    if value > 1:
        sizes.append(value + value // 2 if value % 2 == 0 else value + 1)
    if value > 2 and value % 2 == 0:
        sizes.append(value // 2)
    if value and key not in _CORE:
        sizes += [0, None]
    return sizes


def _other_lists(key: str, value: list[Any], count: int) -> Iterator[list[Any]]:
    if key in ("mlp_only_layers", "moe_layers"):
        yield from ([1], [0, 2], [])
        return
    if not value or len(value) != count or not all(isinstance(one, str) for one in value):
        return
    kinds = {*value, *(("dense", "sparse") if key.startswith("mlp") else ())}
    for kind in sorted(kinds | set(ALLOWED_LAYER_TYPES if key == "layer_types" else ())):
        yield [kind] * count
        yield [kind, *value[1:]]
        yield [*value[:-1], kind]


def sample(name: str, options: dict[str, Any]) -> Sample | None:
    """The model of a config; None where it cannot be built, has no experts, or an axis of no size."""
    checkpoint = published(name, options)
    if checkpoint is None:
        return None
    tensors = checkpoint.tensors
    moe = {t.name.layer_path for t in tensors if isinstance(t.name, ExpertName)}
    if (not moe and name not in DENSE) or any(0 in t.shape for t in tensors):
        return None
    config = config_of(name, options)
    text = text_config(config)
    root = next(iter(moe)).rpartition(".")[0] if moe else "model.layers"
    count = stated(text, family_of(config).config["layers"])
    layers: dict[int, dict[str, tuple[int, ...]]] = {}
    top: dict[str, tuple[int, ...]] = {}
    for tensor in tensors:
        full = str(tensor.name)
        if not full.startswith(f"{root}."):
            top[full] = tensor.shape
            continue
        number, _, rest = full.removeprefix(f"{root}.").partition(".")
        if count is None or int(number) < count[1]:
            layers.setdefault(int(number), {})[rest] = tensor.shape
    beside = root.rpartition(".")[0]
    own = {one: shape for one, shape in top.items() if name not in COMPOSITE or is_text(one, beside)}
    numbers = {int(path.rpartition(".")[2]) for path in moe}
    return Sample(
        text,
        root,
        {None: Held("top", own)}
        | {n: Held("moe" if n in numbers else "dense", held) for n, held in layers.items()},
        frozenset(map(tower_of, top.keys() - own.keys())),
    )


def without(
    config_name: str, options: dict[str, Any], field: str, more: Iterable[dict[str, Any]]
) -> Iterator[Any]:
    """The text configs of options without a field, with each of ``more`` changes."""
    text = text_of_options(config_name, options)
    bare = {key: value for key, value in text.items() if key != field}
    for change in more:
        given = {**bare, **change}
        if "text_config" in options and config_name in COMPOSITE:
            given = {**options, "text_config": given}
        try:
            yield text_config(AutoConfig.for_model(config_name, **given).to_dict())
        except Exception:  # whatever a config's own code makes of it
            continue
