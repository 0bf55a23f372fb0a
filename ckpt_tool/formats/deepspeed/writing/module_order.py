"""The order of a model's parameters, for sources that do not record it: that of transformers' model.

A ZeRO file does not name what it holds, so the order decides. Published files and DCP have none of their
own: the modules of the model that transformers builds from its config tell.
AutoEP puts router, experts and shared experts in the place of each MoE block (deepspeed 0.19.8,
module_inject/auto_ep_layer.py); passed to ``initialize`` as a list of parameters, routers come last in
their group, because they are new parameters (runtime/engine.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ckpt_tool.canonical import Checkpoint, ExpertName, Role, TensorName
from ckpt_tool.errors import MismatchError
from ckpt_tool.families import Family, family_of
from ckpt_tool.families.autoep import name_in_run
from ckpt_tool.families.expected import runs_as
from ckpt_tool.families.forms import compiled
from ckpt_tool.formats.deepspeed.writing.module_tree import state_dict_names
from ckpt_tool.formats.deepspeed.writing.new_groups import new_groups

_NOTE = (
    "The order of parameters is that of transformers' model for this config, the routers last in their "
    "group, as initialize(model_parameters=[...]) makes it. Groups and their options are the source's, "
    "where it has some; else there is one, with the options of --ds-config or AdamW's own. For a run that "
    "groups otherwise, pass --like."
)


def with_module_order(
    checkpoint: Checkpoint, config: Mapping[str, Any], ds_config: Mapping[str, Any], ep: int
) -> Checkpoint:
    """The catalogue with the module order and the default parameter groups of a run of this config.

    Raises:
        UsageError: transformers is not installed or does not know the config.
        MismatchError: its model has other parameters than the checkpoint.
    """
    aliases = dict(checkpoint.aliases)
    if checkpoint.dialect == "autoep" and family_of(config).autoep_alias:
        aliases |= _router_aliases(checkpoint)
    found, buffers = state_dict_names(config)
    ends = {name.rsplit(".", 1)[-1] for name in buffers}
    checkpoint = _with_buffers(replace(checkpoint, aliases=aliases), ends)
    if checkpoint.dialect == "autoep":
        _check_blocks(found, checkpoint, family_of(config))
    names = _under_autoep(found, checkpoint)
    values = {tensor.name: tensor for tensor in checkpoint.values()}
    dense: list[TensorName] = [
        name for name in names if name in values and values[name].role is Role.PARAMETER
    ]
    missing = {name for name in values if isinstance(name, str)} - set(names)
    if missing:
        raise MismatchError(
            f"The checkpoint has {sorted(missing)[:5]} ({len(missing)} in all), which transformers' model "
            "of this config has not. Pass --like with a checkpoint that the target run saved itself."
        )
    lacking = [name for name in names if name not in values and name not in aliases]
    if lacking:
        raise MismatchError(
            f"transformers' model of this config has {lacking[:5]} ({len(lacking)} in all), which the "
            "checkpoint has not: is it complete, and of this config?"
        )
    routers = [name for name in dense if ".router." in str(name)]
    dense = [name for name in dense if name not in routers] + routers
    experts = tuple(
        name
        for layer in checkpoint.moe_layers
        for projection in ("gate", "down", "up")
        if (name := ExpertName(layer.layer_path, projection)) in values
    )
    groups = new_groups(checkpoint.training.param_groups, dense, experts, ds_config, ep)
    return replace(
        checkpoint,
        module_names=tuple(names),
        training=replace(checkpoint.training, param_groups=groups),
        notes=(*checkpoint.notes, _NOTE, *_run_as(config)),
    )


def _run_as(config: Mapping[str, Any]) -> Iterable[str]:
    other = runs_as(config)
    if other is not None:
        yield (
            f"transformers has no class for {config['model_type']}; {other} runs it. Load the model with "
            f'model_type "{other}" in its config.json.'
        )


def _router_aliases(checkpoint: Checkpoint) -> dict[str, str]:
    """AutoEP keeps the whole router, its buffers too, reachable under the name ``gate``."""
    routers = {f"{layer.module}.router.": f"{layer.module}.gate." for layer in checkpoint.moe_layers}
    return {
        alias + tensor.name.removeprefix(router): tensor.name
        for tensor in checkpoint.values()
        for router, alias in routers.items()
        if isinstance(tensor.name, str) and tensor.name.startswith(router)
    }


def _with_buffers(checkpoint: Checkpoint, ends: set[str]) -> Checkpoint:
    """Published files do not tell buffers from parameters; the model does, by the ends of their names."""
    tensors = tuple(
        replace(tensor, role=Role.BUFFER)
        if isinstance(tensor.name, str) and tensor.name.rsplit(".", 1)[-1] in ends
        else tensor
        for tensor in checkpoint.tensors
    )
    return replace(checkpoint, tensors=tensors)


def _check_blocks(names: Sequence[str], checkpoint: Checkpoint, family: Family) -> None:
    """Each MoE block holds what AutoEP makes of the model's.

    Raises:
        MismatchError: it lacks a tensor of the model, or has one more.
    """
    own: list[TensorName] = [tensor.name for tensor in checkpoint.values()]
    for layer in checkpoint.moe_layers:
        block = f"{layer.module}."
        held = {
            name
            for name in own
            if (name.startswith(block) if isinstance(name, str) else name.layer_path == layer.layer_path)
        }
        wanted = {new for name in names if name.startswith(block) for new in _in_block(name, family, block)}
        lacking, extra = (sorted(map(str, one)) for one in (wanted - held, held - wanted))
        if lacking or extra:
            what = f"lacks {lacking[:5]}" if lacking else f"has {extra[:5]}, which the model has not"
            raise MismatchError(
                f"The MoE block {layer.module} of the checkpoint {what}, by transformers' model of this "
                "config: is the checkpoint complete, and of this config?"
            )


def _in_block(name: str, family: Family, block: str) -> Iterable[TensorName]:
    """What AutoEP makes of a tensor in a MoE block of transformers' model."""
    for stored in family.fused:
        match = compiled(stored.pattern).fullmatch(name)
        if match is not None:
            return stored.names(match["layer"])
    published = family.published(name, "transformers") or name
    return (name_in_run(published, family, (block,)),)


def _under_autoep(names: list[str], checkpoint: Checkpoint) -> list[str]:
    """Each MoE block's names replaced by those AutoEP's module has, where the block's first name stood."""
    own = [tensor.name for tensor in checkpoint.values() if isinstance(tensor.name, str)]
    own += checkpoint.aliases
    result: list[str] = []
    seen: set[str] = set()
    blocks = {f"{layer.module}.": layer.module for layer in checkpoint.moe_layers}
    for name in names:
        module = next((blocks[prefix] for prefix in blocks if name.startswith(prefix)), None)
        if module is None or checkpoint.dialect != "autoep":
            result.append(name)
        elif module not in seen:
            seen.add(module)
            result += sorted((n for n in own if n.startswith(f"{module}.")), key=_place)
    return result


def _place(name: str) -> tuple[int, int]:
    """The router, its buffers first; both again under its second name; shared experts; their gate."""
    parts = ("router.e_", "router.", "gate.e_", "gate.gate.", "shared_experts.", "shared_experts_gate.")
    matrices = ("gate_proj", "up_proj", "down_proj")
    return (
        next((i for i, part in enumerate(parts) if f".{part}" in name), len(parts)),
        next((i for i, matrix in enumerate(matrices) if f".{matrix}." in name), 0),
    )
