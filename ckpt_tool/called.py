"""What others call a stack of experts: its engine, and published files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ckpt_tool.canonical import Checkpoint, ExpertName
from ckpt_tool.errors import CkptToolError
from ckpt_tool.families import HUB_FORM, family_of
from ckpt_tool.families.naming import entries
from ckpt_tool.formats.deepspeed.facts.names import AUTOEP_OF, expert_parameter


def other_names(
    sides: Iterable[Checkpoint], config: Mapping[str, Any] | None, wanted: Iterable[str]
) -> dict[str, str]:
    """For each of the ``wanted`` stacks, by name, what else it is called; the others are left out."""
    names, sides = set(wanted), tuple(sides)
    config = next((one for one in (config, *(side.model_config for side in sides)) if one), None)
    found: dict[str, dict[str, None]] = {}
    for side in sides:
        layers = {layer.layer_path: layer for layer in side.moe_layers}
        stacks = [tensor.name for tensor in side.tensors if isinstance(tensor.name, ExpertName)]
        for stack in stacks if side.dialect == "autoep" else ():
            if str(stack) in names and stack.layer_path in layers and stack.projection in AUTOEP_OF:
                engines = expert_parameter(stack, layers)
                found.setdefault(str(stack), {})[f"{engines} in DeepSpeed AutoEP"] = None
        for name, published in _published(side, config, names).items():
            found.setdefault(name, {})[f"{published} in published files"] = None
    return {name: " and ".join(called) for name, called in found.items()}


def _published(side: Checkpoint, config: Mapping[str, Any] | None, names: set[str]) -> dict[str, str]:
    """The names that a family's published files have for stacks: the first, and the last of several."""
    if config is None:
        return {}
    states = side.by_state()
    values = {tensor.name: tensor for state in states.values() for tensor in state}
    held = {name: tensor for name, tensor in values.items() if isinstance(name, ExpertName)}
    layers = {name.layer_path for name in held if str(name) in names}
    stacks = [tensor for name, tensor in held.items() if name.layer_path in layers]
    try:
        listed = entries(stacks, family_of(config), HUB_FORM, config)
    except CkptToolError:
        return {}  # the names that are known are told anyway
    spelt: dict[str, list[str]] = {}
    for entry in listed:
        for name in map(str, entry.sources):
            if name in names:
                spelt.setdefault(name, []).append(entry.name)
    return {name: of[0] if len(of) == 1 else f"{of[0]} to {of[-1]}" for name, of in spelt.items()}
