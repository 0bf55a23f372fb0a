"""Does a ``config.json`` describe a checkpoint? If not, it is the wrong config, or a broken run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from ckpt_tool.canonical import DOWN, Checkpoint, ExpertName, Tensor, TensorName
from ckpt_tool.errors import MismatchError
from ckpt_tool.families import Family, is_strange_expert, of_all_layers, stated, text_config
from ckpt_tool.families.completeness import check_tensors
from ckpt_tool.families.forms import compiled
from ckpt_tool.families.rows import row_fields, stated_rows
from ckpt_tool.limits import MOST_LAYERS

_EMBEDDINGS = re.compile(r"(?:.*\.)?(?:embed_tokens|word_embeddings|embeddings|wte)\.weight")
_MTP_FIELDS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules")


def check_config(checkpoint: Checkpoint, family: Family, config: Mapping[str, Any]) -> None:
    """Compare a checkpoint under published names with its ``config.json``.

    Raises:
        MismatchError: layers, experts, sizes or tied embeddings disagree; the message has both numbers.
    """
    text = text_config(config)
    for key in ("layers", "extra_experts", "hidden_size"):
        _size(text, family.config.get(key, ()))
    for key in ("experts", "expert_size"):
        _size_of_all(text, family.config.get(key, ()))
    values = {tensor.name: tensor for tensor in checkpoint.values()}
    _check_names(values, family)
    _check_layers(values, family, text)
    _check_experts(values, family, text)
    _check_blocks(values, family)
    _check_embeddings(checkpoint, values, family, config)
    _check_rows(values, family, text)
    check_tensors(values, family, config, checkpoint.aliases)


def _check_names(values: Mapping[TensorName, Tensor], family: Family) -> None:
    """No expert tensor is left that this family does not know and another does."""
    for name in values:
        if isinstance(name, str) and not name.startswith(family.apart) and is_strange_expert(name, family):
            raise MismatchError(
                f"{name} is named like the experts of other families, and the family {family.name} has no "
                "such tensor. Is this the config.json of another model?"
            )


def _check_rows(values: Mapping[TensorName, Tensor], family: Family, text: Mapping[str, Any]) -> None:
    """Dense tensors have as many rows as the config says, where the family's table says whose they are."""
    if not family.rows:
        return
    _size(text, ["num_attention_heads"])
    _size(text, ["hidden_size"])
    fields = row_fields(text)
    decoder = f"{_decoder(values)}."  # a vision tower may use the same names, with sizes of its own
    for name, tensor in values.items():
        if not isinstance(name, str) or not name.startswith(decoder):
            continue
        for pattern, product in family.rows.items():
            if not compiled(pattern).fullmatch(name):
                continue
            expected = stated_rows(product, fields)
            rows = tensor.shape[0] if tensor.shape else 0
            if expected is not None and expected != rows:
                raise _disagree(" x ".join(product.split()), expected, rows, name)


def _size(text: Mapping[str, Any], keys: Iterable[str]) -> tuple[str, int] | None:
    """The first of ``keys`` that a config has; raises MismatchError where its value is no size."""
    return _checked(stated(text, keys))


def _size_of_all(text: Mapping[str, Any], keys: Iterable[str]) -> tuple[str, int] | None:
    """The same, where a config may have a list of one per layer, all the same."""
    found = stated(text, keys)
    return None if found is None else _checked((found[0], of_all_layers(found[1])))


def _checked(found: tuple[str, Any] | None) -> tuple[str, int] | None:
    if found is not None and (type(found[1]) is not int or found[1] < 0):
        raise MismatchError(f"config.json has {found[0]} {found[1]!r}, which is no size.")
    return found


def _check_embeddings(
    checkpoint: Checkpoint,
    values: Mapping[TensorName, Tensor],
    family: Family,
    config: Mapping[str, Any],
) -> None:
    text = text_config(config)
    name = embedding_name(values)
    if name is not None:
        rows, columns = _matrix(values[name].shape, name)
        hidden = _size(text, family.config["hidden_size"])
        for field, size in ((_size(text, ["vocab_size"]), rows), (hidden, columns)):
            if field is not None and field[1] != size:
                raise _disagree(field[0], field[1], size, name)
    head = "lm_head.weight" if name is None else head_name(name)
    tied, says = head in checkpoint.aliases, ties_embeddings(config)
    if head in values and says:
        raise MismatchError(
            f"config.json has tie_word_embeddings true, but the checkpoint has a {head} of its "
            f"own beside {name}; loading would throw it away. Set it to false."
        )
    if tied and not says:
        raise MismatchError(
            "config.json has tie_word_embeddings false (or does not say), but in the checkpoint "
            f"{head} is tied to {name}. Set it to true."
        )


def ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether the language model's head is its embedding.

    Raises:
        MismatchError: the config says something that is neither true nor false.
    """
    return bool(says_of_ties(config))


def says_of_ties(config: Mapping[str, Any]) -> bool | None:
    """The same; None where the config does not say."""
    says = config.get("tie_word_embeddings", text_config(config).get("tie_word_embeddings"))
    if says is not None and type(says) is not bool:
        raise MismatchError(
            f"config.json has tie_word_embeddings {says!r}, which is neither true nor false. Correct it."
        )
    return says


def with_stated_ties(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """The same catalogue with a head under the embedding's name, where the config ties them and checksums
    say that they are equal."""
    if not checkpoint.equal or not ties_embeddings(config):
        return checkpoint
    kept = [tensor for tensor in checkpoint.tensors if tensor.name not in checkpoint.equal]
    aliases = {**checkpoint.aliases, **checkpoint.equal}
    return replace(checkpoint, tensors=tuple(kept), aliases=aliases, equal={})


def embedding_name(names: Mapping[TensorName, Any] | Mapping[str, Any]) -> str | None:
    """The language model's input embedding: the one with the shortest path."""
    found = [name for name in names if isinstance(name, str) and _EMBEDDINGS.fullmatch(name)]
    text = [name for name in found if not re.search(r"vis|image|audio|mtp|layers\.", name)]
    return min(text, key=len, default=None)


def head_name(embedding: str) -> str:
    """The output head that belongs to an embedding: beside the model, whatever the prefix."""
    path = embedding.rsplit(".", 2)[0]
    return "language_model.lm_head.weight" if path == "language_model.model" else "lm_head.weight"


# ---- layers


def _main_moe_layers(values: Iterable[TensorName]) -> set[str]:
    """The layer paths of routed experts, without multi-token-prediction layers kept apart as ``mtp.*``."""
    paths = {name.layer_path for name in values if isinstance(name, ExpertName)}
    return {path for path in paths if not path.startswith("mtp.")}


def _decoder(values: Iterable[TensorName]) -> str:
    """The path of the decoder's list of layers: the one that has experts, else ``model.layers``."""
    parents = {path.rpartition(".")[0] for path in _main_moe_layers(values)}
    return parents.pop() if len(parents) == 1 else "model.layers"


def _check_layers(values: Mapping[TensorName, Tensor], family: Family, text: Mapping[str, Any]) -> None:
    main = _main_moe_layers(values)
    pattern = re.compile(rf"{re.escape(_decoder(values))}\.(\d+)\.")
    numbers = {int(path.rpartition(".")[2]) for path in main}
    moe = set(numbers)
    for name in values:
        match = pattern.match(name) if isinstance(name, str) else None
        numbers |= {int(match[1])} if match else set()
    field = _size(text, family.config["layers"])
    if field is None or not numbers:
        return
    count = field[1]
    if count > MOST_LAYERS:
        raise MismatchError(
            f"config.json has {field[0]} {count}; no model has more than {MOST_LAYERS} layers."
        )
    # Multi-token-prediction layers are numbered after the last and not counted.
    extra = promised_mtp_layers(text)
    if not count <= max(numbers) + 1 <= count + extra:
        raise _disagree(field[0], count, max(numbers) + 1, "the names of its tensors")
    lost = sorted(set(range(count)) - numbers)  # as many as there are names, as was just seen
    if lost:
        raise MismatchError(
            f"config.json has {field[0]} {count}, and the checkpoint has no tensor of layers {lost}. It is "
            "not complete."
        )
    expected = moe_layer_numbers(family.moe_layers, text, count)
    if expected is not None and {layer for layer in moe if layer < count} != expected:
        raise MismatchError(
            f"By config.json the MoE layers are {sorted(expected)}; the checkpoint has routed experts "
            f"in layers {sorted(moe)}. Is this the config.json of another model?"
        )


def promised_mtp_layers(text: Mapping[str, Any]) -> int:
    """How many layers for multi-token prediction a config says there are."""
    return max(_integer(text, key) for key in _MTP_FIELDS)


def moe_layer_numbers(rule: str, text: Mapping[str, Any], count: int) -> set[int] | None:
    """The layers of ``count`` that have routed experts; None where the config does not say."""
    is_moe = _RULES[rule](text)
    return None if is_moe is None else {layer for layer in range(count) if is_moe(layer)}


def _integer(text: Mapping[str, Any], key: str, default: int = 0) -> int:
    """A config's number, or ``default``; raises MismatchError where it is no whole number."""
    value = text.get(key)
    if value is not None and type(value) is not int:
        raise MismatchError(f"config.json has {key} {value!r}, which is no whole number.")
    return default if value is None else value


def _list(text: Mapping[str, Any], key: str) -> list[Any] | None:
    """A config's list; raises MismatchError where it is none."""
    value = text.get(key)
    if value is not None and not isinstance(value, list):
        raise MismatchError(f"config.json has {key} {value!r}, which is no list.")
    return value


_Rule = Callable[[int], bool]


def _every(_: int) -> bool:
    return True


def _no(_: int) -> bool:
    return False


def _first_k_dense(text: Mapping[str, Any]) -> _Rule | None:
    kinds = _list(text, "mlp_layer_types")
    if kinds is not None:
        return lambda layer: layer < len(kinds) and kinds[layer] != "dense"
    frequency = text.get("moe_layer_freq")
    if isinstance(frequency, list):
        return lambda layer: layer < len(frequency) and bool(frequency[layer])
    numbers = _enumerated(text)
    if numbers is not None:
        return lambda layer: layer in numbers
    dense = _integer(text, "first_k_dense_replace", _integer(text, "num_dense_layers"))
    step = max(_integer(text, "moe_layer_freq"), 1)
    return lambda layer: layer >= dense and layer % step == 0


def _enumerated(text: Mapping[str, Any]) -> set[int] | None:
    """``moe_layers_enum``: numbers, or a text of them with commas between."""
    named = text.get("moe_layers_enum")
    if named is None:
        return None
    found = named.split(",") if isinstance(named, str) else named
    if isinstance(found, list) and all(re.fullmatch(r" *\d+ *", str(number)) for number in found):
        return {int(number) for number in found}
    raise MismatchError(f"config.json has moe_layers_enum {named!r}, which is no list of layers.")


def _sparse_step(text: Mapping[str, Any]) -> _Rule | None:
    step, dense = _integer(text, "decoder_sparse_step") or 1, _list(text, "mlp_only_layers") or ()
    return lambda layer: layer not in dense and (layer + 1) % step == 0


def _llama4(text: Mapping[str, Any]) -> _Rule | None:
    layers = _list(text, "moe_layers")
    step = _integer(text, "interleave_moe_layer_step") or 1
    return lambda layer: layer in layers if layers else (layer + 1) % step == 0


def _period(text: Mapping[str, Any]) -> _Rule | None:
    if text.get("expert_layer_period") is None or text.get("num_experts", 2) == 1:
        return None
    period, offset = _integer(text, "expert_layer_period") or 1, _integer(text, "expert_layer_offset")
    return lambda layer: layer % period == offset


def _interval(text: Mapping[str, Any]) -> _Rule | None:
    if text.get("mlp_layer_types") is not None:
        return _first_k_dense(text)
    start, step = _integer(text, "moe_layer_start_index"), _integer(text, "moe_layer_interval") or 1
    last = _integer(text, "moe_layer_end_index", -1)
    return lambda layer: (layer + 1) % step == 0 and start <= layer and (last < 0 or layer <= last)


def _layer_kinds(text: Mapping[str, Any]) -> _Rule | None:
    kinds = _list(text, "layers_block_type")
    if kinds is not None:
        return lambda layer: layer < len(kinds) and kinds[layer] == "moe"
    pattern = text.get("hybrid_override_pattern")
    if pattern is not None and not isinstance(pattern, str):
        raise MismatchError(f"config.json has hybrid_override_pattern {pattern!r}, which is no text.")
    return None if pattern is None else lambda layer: layer < len(pattern) and pattern[layer] == "E"


def _gemma4(text: Mapping[str, Any]) -> _Rule | None:
    return _every if text.get("enable_moe_block") else _no


_RULES: Mapping[str, Callable[[Mapping[str, Any]], _Rule | None]] = {
    "all": lambda _: _every,
    "none": lambda _: _no,
    "unknown": lambda _: None,
    "first_k_dense": _first_k_dense,
    "sparse_step": _sparse_step,
    "llama4": _llama4,
    "period": _period,
    "interval": _interval,
    "layer_kinds": _layer_kinds,
    "gemma4": _gemma4,
}


# ---- experts


def _check_experts(values: Mapping[TensorName, Tensor], family: Family, text: Mapping[str, Any]) -> None:
    experts = _size_of_all(text, family.config.get("experts", ()))
    extra = _size(text, family.config.get("extra_experts", ()))
    counts = {experts[1], experts[1] + (extra[1] if extra else 0)} if experts else set()
    sizes = {
        part: _size_of_all(text, family.config.get(key, ()))
        for part, key in (("weight", "expert_size"), ("vision", "vision_expert_size"))
    }
    hidden = _size(text, family.config["expert_hidden_size"])
    present: dict[str, set[tuple[str, str]]] = {}
    for name, tensor in values.items():
        if not isinstance(name, ExpertName):
            continue
        if experts is not None and tensor.shape[0] not in counts:
            lost = (
                "If it is not, experts were lost before this checkpoint was saved: an expert-parallel "
                "model wrapped by ZeRO-3 without AutoEP saves one rank's share only. Such a checkpoint "
                "cannot be repaired."
            )
            raise MismatchError(
                f"config.json has {experts[0]} {experts[1]}, the checkpoint's {name} has "
                f"{tensor.shape[0]} experts. Is this the config.json of another model? "
                f"{lost if tensor.shape[0] < experts[1] else ''}".rstrip()
            )
        if name.part not in sizes:
            continue
        present.setdefault(name.layer_path, set()).add((name.projection, name.part))
        rows, columns = _matrix(tensor.shape[1:], str(name))
        inner, outer = (columns, rows) if name.projection == DOWN else (rows, columns)
        size = sizes[name.part]
        if size is not None and size[1] != inner:
            raise _disagree(size[0], size[1], inner, str(name))
        if hidden is not None and hidden[1] != outer:
            raise _disagree(hidden[0], hidden[1], outer, str(name))
    wanted = {
        (projection, stored.part)
        for stored in family.hub
        for projection in stored.projections
        if stored.part in sizes
    }
    for path, found in present.items():
        if found != wanted:
            missing = sorted(" ".join(one) for one in wanted ^ found)
            raise MismatchError(f"Layer {path} has no {', '.join(missing)} of its experts.")


def _matrix(shape: tuple[int, ...], where: str) -> tuple[int, int]:
    if len(shape) != 2:
        raise MismatchError(f"{where} has shape {list(shape)}, where the model has a matrix.")
    return shape[0], shape[1]


def _check_blocks(values: Mapping[TensorName, Tensor], family: Family) -> None:
    """Every MoE layer has what the others have beside its experts, and a router; known of the families
    whose table says what AutoEP's blocks hold."""
    held: dict[str, set[str]] = {path: set() for path in _main_moe_layers(values)}
    for name in values:
        for pattern in family.autoep.values():
            match = compiled(pattern).fullmatch(name) if isinstance(name, str) else None
            if match is not None and match["layer"] in held:
                held[match["layer"]].add(str(name).removeprefix(match["layer"]))
    routers = {
        target.format(layer="").replace("*", "weight")
        for own, target in family.autoep.items()
        if ".router.gate." in own
    }
    wanted = routers.union(*held.values())
    for path, names in sorted(held.items()):
        missing = sorted(wanted - names)
        if missing:
            raise MismatchError(
                f"The checkpoint has no {path}{missing[0]}, which a model of the family {family.name} has "
                "in every MoE layer. It is not complete."
            )


def _disagree(key: str, value: Any, found: int, where: str) -> MismatchError:
    return MismatchError(
        f"config.json has {key} {value}, the checkpoint has {found} (from {where}). Pass the "
        "config.json of the model that was trained."
    )
