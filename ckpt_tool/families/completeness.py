"""Has a checkpoint all the tensors of its model, and no others? Each layer against its peers, and
everything against what the family's model has by its config (``expected``, ``by_config``). Names are
published ones; the experts of a layer are ``experts.*.gate.weight`` and so on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ckpt_tool.canonical import ExpertName, Tensor, TensorName
from ckpt_tool.errors import MismatchError
from ckpt_tool.families import Family, stated, text_config
from ckpt_tool.families.adapters import adapters_name
from ckpt_tool.families.by_config import Given, check_presence, check_sizes
from ckpt_tool.families.expected import Expected, Names, expected_of, release

# Buffers that older releases saved, and what quantised models keep of their activations.
_PASSED_OVER = re.compile(
    r"(?:.*\.)?(?:rotary_emb\.inv_freq|masked_bias|_extra_state|[kv]_scale|(?:in|out)put_scale)"
)
# ``mtp``, ``mtp_layers``, ``model.mtp``: layers for multi-token prediction, and what stands below them.
MTP_PATH = re.compile(r"(?:.*\.)?mtp(?:_\w+)?(?:\..*)?")
# Fields that say at which distance kinds of layers come again.
_PERIODIC = re.compile(r".*(?:interval|period|pattern|step|every|group_size|freq)\w*")
# The heads of classes for other tasks than writing text.
OTHER_HEADS = ("score.", "classifier.", "qa_outputs.")
# What a single layer lacks or has, of its nature: zaya's first router has nothing before it to scale.
_OF_ONE_LAYER = re.compile(r"mlp\.gate\.router_states_scale")
# Fields of configs that do not say how many layers there are.
_ONE_PER_LAYER = ("layers_block_type", "hybrid_override_pattern")
# What layers have in common, with experts or without.
_COMMON = re.compile(r"(?:\w*att(?:ention|n)\w*\.|input_layernorm|post_attention_layernorm)")
_INCOMPLETE = "The checkpoint is not complete: save or copy it again."

Layers = dict[int, dict[str, Tensor]]


class _Model(NamedTuple):
    """A model's tensors: the path of its list of layers, the layers, those that have routed experts, and
    what stands beside them."""

    root: str
    layers: Layers
    moe: set[int]
    top: dict[str, Tensor]


def check_tensors(
    values: Mapping[TensorName, Tensor],
    family: Family,
    config: Mapping[str, Any],
    aliases: Mapping[str, str],
) -> None:
    """Compare a model's tensors with each other and with what its config asks for.

    Args:
        aliases: further names of tied tensors, which are there.

    Raises:
        MismatchError: a tensor is missing, is none of the model's, or has another shape; the message names
            it.
    """
    expected = expected_of(config)
    model = _model(values, family, config, expected)
    if model is None:
        return
    text = text_config(config)
    if expected is not None:
        for number, held in sorted(model.layers.items()):
            wanted = expected.layer(number in model.moe)
            if wanted.known:
                _check_layer(f"{model.root}.{number}", held, wanted, expected)
        if expected.writes_text:
            _check_top(model.top, expected, config, aliases)
        elif model.root == expected.root:
            _check_beside(model.top, expected)
    _check_peers(model, text)
    _check_both_kinds(model, text, expected)
    if expected is not None:
        _by_config(model, expected, config)


def not_compared(
    values: Mapping[TensorName, Tensor], family: Family, config: Mapping[str, Any]
) -> tuple[str, ...]:
    """A note on what ``check_tensors`` cannot decide, if there is any: fields that the config lacks,
    tensors that no rule is known for, a model that is not in the table."""
    if adapters_name(values):
        return ()
    expected = expected_of(config)
    model = _model(values, family, config, expected)
    if expected is None or model is None:
        why = "no table of its tensors" if expected is None else "no list of layers to compare"
        return (
            f"ckpt-tool has {why} for model_type {config.get('model_type')}: names and shapes were "
            "compared between layers alone, and not with what its config.json asks for.",
        )
    try:
        note = _by_config(model, expected, config).undecided.note(expected.architecture)
    except MismatchError:
        return ()  # which is told where it is checked
    return () if note is None else (note,)


def _model(
    values: Mapping[TensorName, Tensor],
    family: Family,
    config: Mapping[str, Any],
    expected: Expected | None,
) -> _Model | None:
    """The model's parts; None for an encoder and a decoder, a run's LoRA, layers under several paths."""
    if not family.config["layers"] or adapters_name(values):
        return None
    paths = dict.fromkeys(name.layer_path for name in values if isinstance(name, ExpertName))
    moe = [
        path for path in paths if not MTP_PATH.fullmatch(path) and not path.startswith(family.apart or "\0")
    ]
    parents = {path.rpartition(".")[0] for path in moe}
    root = parents.pop() if len(parents) == 1 else expected.root if expected and not moe else None
    text = text_config(config)
    found = stated(text, (*family.config["layers"], *_ONE_PER_LAYER))
    count = found and (len(found[1]) if isinstance(found[1], list | str) else found[1])
    if root is None or type(count) is not int:
        return None
    layers, top = _sorted({str(name): one for name, one in values.items()}, root, count)
    return _Model(root, layers, {int(path.rpartition(".")[2]) for path in moe}, top)


def _by_config(model: _Model, expected: Expected, config: Mapping[str, Any]) -> Given:
    """Compare with the rules of the family; raises MismatchError."""
    given = Given(expected, text_config(config))
    for check in (check_presence, check_sizes):
        for number, held in sorted(model.layers.items()):
            check(f"{model.root}.{number}.", number, held, expected.layer(number in model.moe), given)
        if expected.writes_text or model.root == expected.root:
            bare = not model.root.startswith("model.") and expected.root.startswith("model.")
            top = {**model.top, **{f"model.{name}": one for name, one in model.top.items() if bare}}
            check("", None, top, expected.top, given)
    return given


def _sorted(names: Mapping[str, Tensor], root: str, count: int) -> tuple[Layers, dict[str, Tensor]]:
    """Tensors by layer, without multi-token-prediction layers after the last, and the others."""
    layers: Layers = {}
    top: dict[str, Tensor] = {}
    pattern = re.compile(rf"{re.escape(root)}\.(\d+)\.(.+)")
    for name, tensor in names.items():
        match = pattern.fullmatch(name)
        if match is None:
            top[name] = tensor
        elif int(match[1]) < count:
            layers.setdefault(int(match[1]), {})[match[2]] = tensor
    return layers, top


# ---- against what the model has


def _check_layer(path: str, held: Mapping[str, Tensor], wanted: Names, expected: Expected) -> None:
    missing = sorted(wanted.required - held.keys())
    if missing:
        raise MismatchError(
            f"The checkpoint has no {path}.{missing[0]}{_more(missing)}, which every such layer of "
            f"{expected.architecture} has. {_INCOMPLETE} Or is this the config.json of another model?"
        )
    extra = sorted(
        name for name in held if name not in wanted.known and not is_passed_over(name, expected.ignored)
    )
    if extra:
        raise _not_the_models(f"{path}.{extra[0]}", extra, expected)


def _check_top(
    top: Mapping[str, Tensor], expected: Expected, config: Mapping[str, Any], aliases: Mapping[str, str]
) -> None:
    says = config.get("tie_word_embeddings", text_config(config).get("tie_word_embeddings"))
    given = config.get("architectures")
    classes = [str(name) for name in given] if isinstance(given, list) else []
    writes = all(name.endswith(("ForCausalLM", "ForConditionalGeneration")) for name in classes)
    headless = bool(expected.tied if says is None else says) or not writes
    bare = any(name.endswith("Model") for name in classes)  # whose names are without the model's own
    have = {*top, *aliases, *(f"model.{name}" for name in top if bare)}
    if says is None and expected.tied and writes and expected.head in top.keys() - aliases.keys():
        raise MismatchError(
            f"The checkpoint has {expected.head}, and {expected.architecture} ties its head to its "
            "embedding unless config.json says otherwise, which it does not: loading would throw it away. "
            "Write tie_word_embeddings false into config.json."
        )
    missing = sorted(
        name
        for name in expected.top.required
        if name not in have and not (headless and name == expected.head)
    )
    if missing:
        hint = " (its head is not tied to its embedding)" if missing[0] == expected.head else ""
        raise MismatchError(
            f"The checkpoint has no {missing[0]}{_more(missing)}, which {expected.architecture} has by "
            f"this config.json{hint}. {_INCOMPLETE}"
        )
    extra = sorted(
        name
        for name in top
        if name not in expected.top.known
        and not (bare and f"model.{name}" in expected.top.known)
        and not (not writes and name.startswith(OTHER_HEADS))
        and not name.startswith(expected.towers or "\0")
        and not is_passed_over(name, expected.ignored)
    )
    if extra:
        raise _not_the_models(extra[0], extra, expected)


def _check_beside(top: Mapping[str, Tensor], expected: Expected) -> None:
    """What stands beside the layers of a model without a head; a head may stand there, too."""
    missing = sorted(expected.top.required - top.keys())
    if missing:
        raise MismatchError(
            f"The checkpoint has no {missing[0]}{_more(missing)}, which {expected.architecture} has by "
            f"this config.json. {_INCOMPLETE}"
        )


def is_passed_over(name: str, ignored: Iterable[re.Pattern[str]]) -> bool:
    """Whether a tensor is none of the model's and does no harm: what transformers ignores as it loads,
    layers for multi-token prediction, buffers that older releases saved."""
    return bool(
        _PASSED_OVER.fullmatch(name)
        or MTP_PATH.fullmatch(name)
        or any(pattern.search(name) for pattern in ignored)
    )


def _not_the_models(name: str, extra: Sequence[str], expected: Expected) -> MismatchError:
    return MismatchError(
        f"The checkpoint has {name}{_more(extra)}, and {expected.architecture} has no such tensor "
        f"(transformers {release()}): it would be loaded nowhere. Leave it out of the state dict that is "
        "saved, or pass the config.json of the model that was trained."
    )


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


# ---- against each other


def _check_peers(model: _Model, text: Mapping[str, Any]) -> None:
    root, layers, moe, _ = model
    groups: dict[Any, list[int]] = {}
    kind_of = _kinds(text, len(layers))
    for number, held in sorted(layers.items()):
        groups.setdefault((number in moe, _mixers(held), *kind_of(number)), []).append(number)
    for numbers in groups.values():
        for name in dict.fromkeys(name for number in numbers for name in layers[number]):
            holders = [number for number in numbers if name in layers[number]]
            lacking = [number for number in numbers if name not in layers[number]]
            if _OF_ONE_LAYER.fullmatch(name):
                continue
            if lacking and len(lacking) == len(holders):
                raise MismatchError(
                    f"The checkpoint has {root}.{holders[0]}.{name}, and layer {lacking[0]}, which is of "
                    f"the same kind, has none. {_INCOMPLETE}"
                )
            if lacking and len(lacking) < len(holders):
                raise MismatchError(
                    f"The checkpoint has no {root}.{lacking[0]}.{name}, which {len(holders)} other layers "
                    f"of the same kind have (such as layer {holders[0]}). {_INCOMPLETE}"
                )
            if lacking:
                raise MismatchError(
                    f"The checkpoint has {root}.{holders[0]}.{name}, which no other of the {len(lacking)} "
                    "layers of the same kind has. Leave it out of the state dict that is saved, or save "
                    "the others, too."
                )
            _check_shapes(root, name, {number: layers[number][name].shape for number in holders})


def _check_both_kinds(model: _Model, text: Mapping[str, Any], expected: Expected | None) -> None:
    """Attention and norms are alike in layers with experts and without, where no rule of the family says
    what each has: a kind of layer that occurs once has no peers."""
    kind_of = _kinds(text, len(model.layers))
    groups: dict[Any, list[int]] = {}
    for number, held in sorted(model.layers.items()):
        modules = frozenset(name.partition(".")[0] for name in held if _COMMON.match(name))
        groups.setdefault((modules, *kind_of(number)), []).append(number)
    for numbers in groups.values():
        for name in sorted({name for number in numbers for name in model.layers[number]}):
            rules = [expected.layer(number in model.moe) for number in numbers] if expected else []
            if not _COMMON.match(name) or any(
                name in one.known and one.when.get(name, 0) is not None for one in rules
            ):
                continue
            holders = [number for number in numbers if name in model.layers[number]]
            lacking = [number for number in numbers if name not in model.layers[number]]
            if lacking:
                raise MismatchError(
                    f"The checkpoint has {model.root}.{holders[0]}.{name}, and layer {lacking[0]} has "
                    f"none, whose attention is of the same kind. {_INCOMPLETE}"
                )


def _check_shapes(root: str, name: str, shapes: Mapping[int, tuple[int, ...]]) -> None:
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for number, shape in shapes.items():
        by_shape.setdefault(shape, []).append(number)
    if len(by_shape) > 1:
        (odd, few), *_, (usual, most) = sorted(by_shape.items(), key=lambda item: len(item[1]))
        raise MismatchError(
            f"{root}.{few[0]}.{name} has shape {list(odd)}; {len(most)} other layers of the same kind have "
            f"{list(usual)} (such as layer {most[0]}). {_INCOMPLETE}"
        )


def _mixers(held: Mapping[str, Tensor]) -> frozenset[str]:
    """The modules of a layer with more than one matrix: attention of one sort or another, state spaces."""
    counts: dict[str, int] = {}
    for name, tensor in held.items():
        if len(tensor.shape) > 1:
            module = name.partition(".")[0]
            counts[module] = counts.get(module, 0) + 1
    return frozenset(module for module, count in counts.items() if count > 1)


def _kinds(text: Mapping[str, Any], count: int) -> Any:
    """A function that gives all that a config says of one layer in particular."""
    fields = list(_fields(text))
    # one value per layer; some have another for the layer for multi-token prediction
    lists = [
        value
        for key, value in fields
        if (isinstance(value, list) and count <= len(value) <= count + 1)
        or (isinstance(value, str) and len(value) == count and "pattern" in key)
    ]
    numbered = [
        set(value)
        for _, value in fields
        if isinstance(value, list) and value and all(type(one) is int and one <= count for one in value)
    ]
    periods = [
        value
        for key, value in fields
        if type(value) is int and 1 < value <= count and _PERIODIC.fullmatch(key)
    ]

    # gemma4's last layers use the keys and values of others
    sharing = [value for key, value in fields if key == "num_kv_shared_layers" and type(value) is int]

    def kind(number: int) -> tuple[Any, ...]:
        return (
            *(number >= count - value for value in sharing),
            *(repr(value[number]) for value in lists),
            *(number in value for value in numbered),
            *(number + 1 in value for value in numbered),  # kimi_linear counts from 1
            *(number % period for period in periods),
        )

    return kind


def _fields(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All fields of a config and of those in it."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _fields(value)
        elif "token" not in key:
            yield key, value
