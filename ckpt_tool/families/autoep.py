"""Towards DeepSpeed AutoEP's module tree, from any other engine's."""

from __future__ import annotations

from dataclasses import replace

from ckpt_tool.canonical import Checkpoint, ExpertName, MoELayer, ParamGroup, TensorName
from ckpt_tool.errors import MismatchError
from ckpt_tool.families import Family
from ckpt_tool.families.naming import to_hub

AUTOEP = "autoep"
_ROUTER = ".router."


def to_autoep(checkpoint: Checkpoint, family: Family) -> Checkpoint:
    """The same catalogue under the names AutoEP's modules have (deepspeed 0.19.8, moe/auto_ep.py).

    Experts are canonical stacks in both; the router and shared experts have other names. A model without
    experts keeps transformers' names, which is what DeepSpeed trains.

    Raises:
        MismatchError: AutoEP does not know the family, or stores it wrongly.
    """
    if checkpoint.dialect == AUTOEP:
        return checkpoint
    hub = to_hub(checkpoint, family)
    has_experts = any(isinstance(tensor.name, ExpertName) for tensor in hub.tensors)
    if has_experts and (not family.autoep or family.autoep_wrong):
        reason = family.autoep_wrong or "DeepSpeed AutoEP has no preset for it"
        raise MismatchError(f"The family {family.name} cannot become an AutoEP checkpoint: {reason}.")
    dialect = AUTOEP if has_experts else "transformers"

    def name_of(name: TensorName) -> TensorName:
        if isinstance(name, ExpertName):
            return replace(name, layer_path=family.memory_path(name.layer_path))
        return family.unpublished(name, dialect)

    layers = tuple(
        MoELayer(path, _module(family, path), layer.num_experts)
        for layer in hub.moe_layers
        for path in (family.memory_path(layer.layer_path),)
    )
    groups = tuple(
        ParamGroup(group.options, tuple(map(name_of, group.parameters)))
        for group in hub.training.param_groups
    )
    return replace(
        hub,
        dialect=dialect,
        tensors=tuple(replace(tensor, name=name_of(tensor.name)) for tensor in hub.tensors),
        scalars={(name_of(name), state): scalar for (name, state), scalar in hub.scalars.items()},
        aliases={
            family.unpublished(alias, dialect): family.unpublished(name, dialect)
            for alias, name in hub.aliases.items()
        },
        moe_layers=layers,
        training=replace(hub.training, param_groups=groups),
        module_names=(),
        layout_hint=None,
    )


def _module(family: Family, layer_path: str) -> str:
    """The path of a layer's MoE block: what stands before AutoEP's router."""
    pattern = next(key for key in family.autoep if _ROUTER in key)
    return pattern.split(_ROUTER)[0].format(layer=layer_path)
