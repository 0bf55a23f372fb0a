"""Does a ``config.json`` describe a checkpoint? If not, it is the wrong config, or a broken run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ckpt_tool.canonical import DOWN, PROJECTIONS, Checkpoint, ExpertName, Tensor, TensorName
from ckpt_tool.errors import MismatchError
from ckpt_tool.families import Family, text_config


def check_config(checkpoint: Checkpoint, family: Family, config: Mapping[str, Any]) -> None:
    """Compare a checkpoint under published names with its ``config.json``.

    Raises:
        MismatchError: layers, experts, sizes or tied embeddings disagree; the message has both numbers.
    """
    text = text_config(config)
    values = {tensor.name: tensor for tensor in checkpoint.values()}
    _check_layers(values, family, text)
    _check_experts(values, family, text)
    embedding = values.get("model.embed_tokens.weight")
    if embedding is not None:
        for key, size in (("vocab_size", embedding.shape[0]), ("hidden_size", embedding.shape[1])):
            if key in text and text[key] != size:
                raise _disagree(key, text[key], size, "model.embed_tokens.weight")
    tied = "lm_head.weight" in checkpoint.aliases
    stated = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
    if "lm_head.weight" in values and stated:
        raise MismatchError(
            "config.json has tie_word_embeddings true, but the checkpoint has a lm_head.weight of its "
            "own beside model.embed_tokens.weight; loading would throw it away. Set it to false."
        )
    if tied and not stated:
        raise MismatchError(
            "config.json has tie_word_embeddings false (or does not say), but in the checkpoint "
            "lm_head.weight is tied to model.embed_tokens.weight. Set it to true."
        )


def _check_layers(values: Mapping[TensorName, Tensor], family: Family, text: Mapping[str, Any]) -> None:
    numbers = set()
    moe = set()
    for name in values:
        if isinstance(name, ExpertName):
            moe.add(name.layer)
            numbers.add(name.layer)
        else:
            match = re.match(r"(?:.*\.)?layers\.(\d+)\.", name)
            numbers |= {int(match[1])} if match else set()
    stated = text.get("num_hidden_layers")
    # A multi-token-prediction layer is numbered after the last and not counted.
    extra = text.get("num_nextn_predict_layers") or 0
    if stated is not None and numbers and not stated <= max(numbers) + 1 <= stated + extra:
        raise _disagree("num_hidden_layers", stated, max(numbers) + 1, "the names of its tensors")
    if stated is None:
        return
    expected = {layer for layer in range(stated) if _is_moe_layer(family.moe_layers, text, layer)}
    if {layer for layer in moe if layer < stated} != expected:
        raise MismatchError(
            f"By config.json the MoE layers are {sorted(expected)}; the checkpoint has routed experts "
            f"in layers {sorted(moe)}. Is this the config.json of another model?"
        )


def _is_moe_layer(rule: str, text: Mapping[str, Any], layer: int) -> bool:
    if rule == "all":
        return True
    if rule == "first_k_dense":
        kinds = text.get("mlp_layer_types")
        if kinds is not None:
            return bool(kinds[layer] != "dense")
        return layer >= int(text.get("first_k_dense_replace") or 0)
    if rule == "sparse_step":
        step = int(text.get("decoder_sparse_step") or 1)
        return layer not in (text.get("mlp_only_layers") or ()) and (layer + 1) % step == 0
    return False


def _check_experts(values: Mapping[TensorName, Tensor], family: Family, text: Mapping[str, Any]) -> None:
    experts = _stated(text, family.config.get("experts", []))
    size = _stated(text, family.config.get("expert_size", []))
    hidden = text.get("hidden_size")
    present: dict[str, set[str]] = {}
    for name, tensor in values.items():
        if not isinstance(name, ExpertName):
            continue
        present.setdefault(name.layer_path, set()).add(name.projection)
        rows, columns = tensor.shape[1:]
        inner, outer = (columns, rows) if name.projection == DOWN else (rows, columns)
        if experts is not None and experts[1] != tensor.shape[0]:
            raise MismatchError(
                f"config.json has {experts[0]} {experts[1]}, the checkpoint's {name} has "
                f"{tensor.shape[0]} experts. If the config is right, experts were lost before this "
                "checkpoint was saved: an expert-parallel model wrapped by ZeRO-3 without AutoEP saves "
                "one rank's share only. Such a checkpoint cannot be repaired."
            )
        if size is not None and size[1] != inner:
            raise _disagree(size[0], size[1], inner, str(name))
        if hidden is not None and hidden != outer:
            raise _disagree("hidden_size", hidden, outer, str(name))
    for path, projections in present.items():
        if projections != set(PROJECTIONS):
            missing = sorted(set(PROJECTIONS) - projections)
            raise MismatchError(f"Layer {path} has no {missing} of its experts.")


def _stated(text: Mapping[str, Any], keys: Iterable[str]) -> tuple[str, int] | None:
    return next(((key, text[key]) for key in keys if text.get(key) is not None), None)


def _disagree(key: str, stated: Any, found: int, where: str) -> MismatchError:
    return MismatchError(
        f"config.json has {key} {stated}, the checkpoint has {found} (from {where}). Pass the "
        "config.json of the model that was trained."
    )
