"""Does a ``config.json`` describe a checkpoint? If not, it is the wrong config, or a broken run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ckpt_tool.canonical import DOWN, Checkpoint, ExpertName, Tensor, TensorName
from ckpt_tool.errors import MismatchError
from ckpt_tool.families import Family, stated, text_config
from ckpt_tool.families.forms import compiled

_EMBEDDINGS = re.compile(r"(?:.*\.)?(?:embed_tokens|word_embeddings|embeddings|wte)\.weight")
_MTP_FIELDS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules")


def check_config(checkpoint: Checkpoint, family: Family, config: Mapping[str, Any]) -> None:
    """Compare a checkpoint under published names with its ``config.json``.

    Raises:
        MismatchError: layers, experts, sizes or tied embeddings disagree; the message has both numbers.
    """
    text = text_config(config)
    for key in ("layers", "experts", "extra_experts", "expert_size", "hidden_size"):
        _size(text, family.config.get(key, ()))
    values = {tensor.name: tensor for tensor in checkpoint.values()}
    _check_layers(values, family, text)
    _check_experts(values, family, text)
    _check_embeddings(checkpoint, values, family, config)
    _check_rows(values, family, text)


def _check_rows(values: Mapping[TensorName, Tensor], family: Family, text: Mapping[str, Any]) -> None:
    """Dense tensors have as many rows as the config says, where the family's table says whose they are."""
    fields = dict(text)
    if fields.get("head_dim") is None and fields.get("num_attention_heads") and "hidden_size" in fields:
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    decoder = f"{_decoder(values)}."  # a vision tower may use the same names, with sizes of its own
    for name, tensor in values.items():
        if not isinstance(name, str) or not name.startswith(decoder):
            continue
        for pattern, product in family.rows.items():
            factors = product.split()
            if not compiled(pattern).fullmatch(name):
                continue
            if all(type(fields.get(factor)) is int for factor in factors):
                stated_rows = math.prod(fields[factor] for factor in factors)
                if stated_rows != tensor.shape[0]:
                    raise _disagree(" x ".join(factors), stated_rows, tensor.shape[0], name)


def _size(text: Mapping[str, Any], keys: Iterable[str]) -> tuple[str, int] | None:
    """The first of ``keys`` that a config has; raises MismatchError where its value is no size."""
    found = stated(text, keys)
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
        rows, columns = values[name].shape
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
    """Whether the language model's head is its embedding."""
    return bool(config.get("tie_word_embeddings", text_config(config).get("tie_word_embeddings", False)))


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
    # Multi-token-prediction layers are numbered after the last and not counted.
    extra = max((int(text.get(key) or 0) for key in _MTP_FIELDS), default=0)
    if not count <= max(numbers) + 1 <= count + extra:
        raise _disagree(field[0], count, max(numbers) + 1, "the names of its tensors")
    expected = moe_layer_numbers(family.moe_layers, text, count)
    if expected is not None and {layer for layer in moe if layer < count} != expected:
        raise MismatchError(
            f"By config.json the MoE layers are {sorted(expected)}; the checkpoint has routed experts "
            f"in layers {sorted(moe)}. Is this the config.json of another model?"
        )


def moe_layer_numbers(rule: str, text: Mapping[str, Any], count: int) -> set[int] | None:
    """The layers of ``count`` that have routed experts; None where the config does not say."""
    is_moe = _RULES[rule](text)
    return None if is_moe is None else {layer for layer in range(count) if is_moe(layer)}


_Rule = Callable[[int], bool]


def _every(_: int) -> bool:
    return True


def _no(_: int) -> bool:
    return False


def _first_k_dense(text: Mapping[str, Any]) -> _Rule | None:
    kinds = text.get("mlp_layer_types")
    if kinds is not None:
        return lambda layer: layer < len(kinds) and kinds[layer] != "dense"
    frequency = text.get("moe_layer_freq")
    if isinstance(frequency, list):
        return lambda layer: layer < len(frequency) and bool(frequency[layer])
    if text.get("moe_layers_enum") is not None:
        named = text["moe_layers_enum"]
        numbers = named.split(",") if isinstance(named, str) else named
        return lambda layer: layer in {int(number) for number in numbers}
    dense = next(
        (text[key] for key in ("first_k_dense_replace", "num_dense_layers") if text.get(key) is not None), 0
    )
    step = frequency if isinstance(frequency, int) and frequency > 0 else 1
    return lambda layer: layer >= int(dense) and layer % step == 0


def _sparse_step(text: Mapping[str, Any]) -> _Rule | None:
    step, dense = int(text.get("decoder_sparse_step") or 1), text.get("mlp_only_layers") or ()
    return lambda layer: layer not in dense and (layer + 1) % step == 0


def _llama4(text: Mapping[str, Any]) -> _Rule | None:
    layers = text.get("moe_layers")
    step = int(text.get("interleave_moe_layer_step") or 1)
    return lambda layer: layer in layers if layers else (layer + 1) % step == 0


def _period(text: Mapping[str, Any]) -> _Rule | None:
    if text.get("expert_layer_period") is None or text.get("num_experts", 2) == 1:
        return None
    period, offset = int(text["expert_layer_period"]), int(text.get("expert_layer_offset") or 0)
    return lambda layer: layer % period == offset


def _interval(text: Mapping[str, Any]) -> _Rule | None:
    kinds = text.get("mlp_layer_types")
    if kinds is not None:
        return _first_k_dense(text)
    start, step = int(text.get("moe_layer_start_index") or 0), int(text.get("moe_layer_interval") or 1)
    end = text.get("moe_layer_end_index")
    last = -1 if end is None else int(end)
    return lambda layer: (layer + 1) % step == 0 and start <= layer and (last < 0 or layer <= last)


def _layer_kinds(text: Mapping[str, Any]) -> _Rule | None:
    kinds = text.get("layers_block_type")
    if kinds is not None:
        return lambda layer: layer < len(kinds) and kinds[layer] == "moe"
    pattern = text.get("hybrid_override_pattern")
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
    experts = _size(text, family.config.get("experts", ()))
    extra = _size(text, family.config.get("extra_experts", ()))
    counts = {experts[1], experts[1] + (extra[1] if extra else 0)} if experts else set()
    size = _size(text, family.config.get("expert_size", ()))
    hidden = _size(text, family.config["expert_hidden_size"])
    present: dict[str, set[str]] = {}
    for name, tensor in values.items():
        if not isinstance(name, ExpertName):
            continue
        if experts is not None and tensor.shape[0] not in counts:
            raise MismatchError(
                f"config.json has {experts[0]} {experts[1]}, the checkpoint's {name} has "
                f"{tensor.shape[0]} experts. If the config is right, experts were lost before this "
                "checkpoint was saved: an expert-parallel model wrapped by ZeRO-3 without AutoEP saves "
                "one rank's share only. Such a checkpoint cannot be repaired."
            )
        if name.part != "weight":
            continue
        present.setdefault(name.layer_path, set()).add(name.projection)
        rows, columns = tensor.shape[1:]
        inner, outer = (columns, rows) if name.projection == DOWN else (rows, columns)
        if size is not None and size[1] != inner:
            raise _disagree(size[0], size[1], inner, str(name))
        if hidden is not None and hidden[1] != outer:
            raise _disagree(hidden[0], hidden[1], outer, str(name))
    wanted = {projection for stored in family.hub for projection in stored.projections}
    for path, projections in present.items():
        if projections != wanted:
            missing = sorted(wanted ^ projections)
            raise MismatchError(f"Layer {path} has no {missing} of its experts.")


def _disagree(key: str, value: Any, found: int, where: str) -> MismatchError:
    return MismatchError(
        f"config.json has {key} {value}, the checkpoint has {found} (from {where}). Pass the "
        "config.json of the model that was trained."
    )
