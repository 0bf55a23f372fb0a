"""Expert tensors in DCP checkpoints: which keys they are, and the canonical stacks they hold.

torchtitan's experts are recognised by their names alone; those of transformers are told apart with the
family of a config.json, because names do not tell how gate and up are packed.

torchtitan (models/common/moe.py): ``w1`` is gate [E, F, D], ``w3`` up [E, F, D], ``w2`` down [E, D, F], all
in ``nn.Linear`` orientation. Since June 2026 names end in their dimensions, since July 2026 the module is
``moe.routed_experts.inner_experts``; before, it was ``moe.experts``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from ckpt_tool.canonical import DOWN, GATE, UP, ExpertName, Tensor, TensorName
from ckpt_tool.families import Family
from ckpt_tool.families.naming import from_hub
from ckpt_tool.formats.dcp.titan import numbered

_TITAN = re.compile(
    r"(?P<layer>(?:mtp_)?layers\.\d+)\.moe\.(?:routed_experts\.inner_)?experts\.(?P<w>w[123])"
    r"(?:_EFD|_EDF)?"
)
_ROOT = "model."  # what transformers has before `layers`, and torchtitan has not
_PROJECTION = {"w1": GATE, "w3": UP, "w2": DOWN}
# A stacked expert tensor of any naming: three dimensions, directly in a module `experts`.
_STACKED = re.compile(r".*(?:^|[._])experts\.(?:\w+_proj|w[123](?:_\w+)?)")

TITAN_NAMES = {
    GATE: "{layer}.moe.routed_experts.inner_experts.w1_EFD",
    UP: "{layer}.moe.routed_experts.inner_experts.w3_EFD",
    DOWN: "{layer}.moe.routed_experts.inner_experts.w2_EDF",
}


def titan_expert(name: str) -> ExpertName | None:
    match = _TITAN.fullmatch(name)
    return ExpertName(f"{_ROOT}{match['layer']}", _PROJECTION[match["w"]]) if match else None


def titan_layer(layer_path: str) -> str:
    """torchtitan's path of a layer, from the one the rest of the world uses."""
    return layer_path.removeprefix(_ROOT)


def is_stacked(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor holds all experts of a layer: what expert parallelism shards."""
    return len(shape) == 3 and (titan_expert(name) is not None or _STACKED.fullmatch(name) is not None)


class Named(NamedTuple):
    """Tensors under canonical names, and for each key what became of it."""

    tensors: list[Tensor]
    names: dict[str, tuple[TensorName, ...]]


def canonical(tensors: Mapping[str, Tensor], family: Family | None, layers: int) -> Named:
    """Stacks of experts where they are recognised; all else under its own name. Keeps the order.

    Args:
        layers: how many there are before torchtitan's ``mtp_layers``, which get the numbers after.
    """
    found: list[Tensor | ExpertName] = []
    names: dict[str, tuple[TensorName, ...]] = {}
    per_expert: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        own = numbered(key, layers)
        expert = titan_expert(own)
        match = family.match(key) if family else None
        if expert is not None:
            parts = [replace(tensor, name=expert)]
        elif match is not None and match.expert is not None:
            name = match.layouts[0].names(match.layer_path)[0]
            per_expert[key] = tensor
            names[key] = (name,)
            if name not in found:
                found.append(name)
            continue
        else:
            parts = from_hub({own: replace(tensor, name=own)}, family)
        names[key] = tuple(part.name for part in parts)
        found += parts
    stacks = {stack.name: stack for stack in from_hub(per_expert, family)}
    return Named([stacks[item] if isinstance(item, ExpertName) else item for item in found], names)
