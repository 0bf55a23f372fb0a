"""Towards DeepSpeed AutoEP's module tree, from any other engine's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ckpt_tool.canonical import Checkpoint, ExpertName, MoELayer, ParamGroup, Tensor, TensorName
from ckpt_tool.errors import MismatchError
from ckpt_tool.families import Family, text_config
from ckpt_tool.families.dense import joined_in_memory
from ckpt_tool.families.naming import to_hub

AUTOEP = "autoep"
_ROUTER = ".router."


def to_autoep(checkpoint: Checkpoint, family: Family) -> Checkpoint:
    """The same catalogue under the names AutoEP's modules have (deepspeed 0.19.8, moe/auto_ep.py).

    Experts are canonical stacks in both; the router and shared experts have other names, and everything
    outside the MoE blocks transformers' own. A model without experts keeps transformers' names, which is
    what DeepSpeed trains.

    Raises:
        MismatchError: AutoEP does not know the family, stores it wrongly, or has no place for a tensor.
    """
    if checkpoint.dialect == AUTOEP:
        return checkpoint
    hub = to_hub(checkpoint, family)
    has_experts = any(isinstance(tensor.name, ExpertName) for tensor in hub.tensors)
    if has_experts and (not family.autoep or family.autoep_wrong):
        reason = family.autoep_wrong or "DeepSpeed AutoEP has no preset for it"
        raise MismatchError(f"The family {family.name} cannot become an AutoEP checkpoint: {reason}.")
    dialect = AUTOEP if has_experts else "transformers"
    blocks = _blocks(hub, family) if has_experts else ()
    tensors, wholes = _joined(hub, family)

    def name_of(name: TensorName) -> TensorName:
        if isinstance(name, ExpertName):
            return replace(name, layer_path=family.memory_path(name.layer_path))
        return name_in_run(wholes.get(name, name), family, blocks)

    layers = tuple(
        MoELayer(path, _module(family, path), layer.num_experts)
        for layer in hub.moe_layers
        for path in (family.memory_path(layer.layer_path),)
    )
    groups = tuple(
        ParamGroup(group.options, tuple(dict.fromkeys(map(name_of, group.parameters))))
        for group in hub.training.param_groups
    )
    return replace(
        hub,
        dialect=dialect,
        tensors=tuple(replace(tensor, name=name_of(tensor.name)) for tensor in tensors),
        scalars={(name_of(name), state): scalar for (name, state), scalar in hub.scalars.items()},
        aliases={str(name_of(alias)): str(name_of(name)) for alias, name in hub.aliases.items()},
        moe_layers=layers,
        training=replace(hub.training, param_groups=groups),
        module_names=(),
        layout_hint=None,
    )


def refuse_composite(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    """Raises MismatchError for a model with experts whose language model is one part of it."""
    text = text_config(config)
    if text is not config and any(isinstance(tensor.name, ExpertName) for tensor in checkpoint.tensors):
        raise MismatchError(
            f"config.json describes a composite model ({config.get('model_type')}), and DeepSpeed AutoEP "
            f"trains the text model alone ({text.get('model_type')}), whose tensors have other names. Save "
            "the text model with transformers by itself and convert that."
        )


def name_in_run(name: str, family: Family, blocks: tuple[str, ...]) -> str:
    """The name that a published dense tensor has in a DeepSpeed run.

    Args:
        blocks: what the names in the run's MoE blocks begin with, published ones and transformers'.

    Raises:
        MismatchError: it lies in a MoE block, and AutoEP's has no such tensor.
    """
    renamed = family.unpublished_by_rule(name, AUTOEP) if blocks else None
    if renamed is not None:
        return family.memory_path(renamed)
    own = family.unpublished(name, "transformers")
    if name.startswith(blocks) or own.startswith(blocks):
        raise MismatchError(
            f"{name} lies in a MoE block, and AutoEP's blocks of the family {family.name} have no tensor "
            "for it. If it belongs to the model, AutoEP would train the model without it."
        )
    return own


def _blocks(hub: Checkpoint, family: Family) -> tuple[str, ...]:
    """What names in MoE blocks begin with: published ones, and those in transformers' memory."""
    found: dict[str, None] = {}
    for layer in hub.moe_layers:
        found[f"{_module(family, family.memory_path(layer.layer_path))}."] = None
        for stored in family.hub:
            block = stored.pattern.partition(".experts.")[0]
            found[block.format(layer=layer.layer_path) + "."] = None
    return tuple(found)


def _joined(hub: Checkpoint, family: Family) -> tuple[list[Tensor], dict[str, str]]:
    """The tensors with those joined that are one in memory, and the name of the whole by that of a part."""
    if not family.parts:
        return list(hub.tensors), {}
    joined = {state: joined_in_memory(tensors, family) for state, tensors in hub.by_state().items()}
    result: list[Tensor] = []
    wholes: dict[str, str] = {}
    for tensor in hub.tensors:
        whole = joined[tensor.state].get(tensor.name)
        result += [tensor] if whole is None else whole.here
        if whole is not None:
            wholes[str(tensor.name)] = whole.name
    return result, wholes


def _module(family: Family, layer_path: str) -> str:
    """The path of a layer's MoE block: what stands before AutoEP's router."""
    pattern = next(key for key in family.autoep if _ROUTER in key)
    return pattern.split(_ROUTER)[0].format(layer=layer_path)
