"""Expert tensors in DCP checkpoints: which keys they are, and the canonical stacks they hold.

torchtitan's experts are recognised by their names alone; those of transformers are told apart with the
family of a config.json, because names do not tell how gate and up are packed. Only experts are: dense
tensors keep the names of the run's modules, but for models that have one tensor per expert, whose names
are those of published files throughout.

torchtitan (models/common/moe.py): ``w1`` is gate [E, F, D], ``w3`` up [E, F, D], ``w2`` down [E, D, F], all
in ``nn.Linear`` orientation. Since June 2026 names end in their dimensions, since July 2026 the module is
``moe.routed_experts.inner_experts``; before, it was ``moe.experts``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from ckpt_tool.canonical import DOWN, GATE, UP, Box, ExpertName, Tensor, TensorName
from ckpt_tool.families import Family, Match
from ckpt_tool.families.naming import from_hub
from ckpt_tool.formats.dcp.grammar.titan import main_layers, numbered

_TITAN = re.compile(
    r"(?P<layer>(?:mtp_)?layers\.\d+)\.moe\.(?:routed_experts\.inner_)?experts\.(?P<w>w[123])"
    r"(?:_EFD|_EDF)?"
)
_ROOT = "model."  # what transformers has before `layers`, and torchtitan has not
_PROJECTION = {"w1": GATE, "w3": UP, "w2": DOWN}
# A stacked tensor of routed experts of any naming: three dimensions, directly in a module `experts`.
_STACKED = re.compile(r"(?!.*shared_experts\.).*(?:^|[._])experts\.(?:\w+_proj|w[123](?:_\w+)?)")

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


class Naming:
    """Canonical names for the keys of one model: stacks of experts where they are recognised, all else
    under its own name.

    ``layers`` is how many there are before torchtitan's ``mtp_layers``, which get the numbers after.
    ``published`` says that the model has a tensor per expert, as published files of the family do.
    """

    def __init__(
        self, names: Collection[str], family: Family | None, config: Mapping[str, Any] | None
    ) -> None:
        self._family, self._config = family, config
        self._sizes = family.sizes(config or {}) if family else {}
        self.layers = main_layers(names)
        matches = map(self._match, names)
        self.published = any(match is not None and match.expert is not None for match in matches)

    def canonical(self, tensors: Mapping[str, Tensor]) -> Named:
        """The tensors in their order.

        Raises:
            UnreadableError: experts are missing, or do not have the form that the family has.
        """
        given: dict[str, tuple[TensorName, ...]] = {}
        found: dict[TensorName, Tensor] = {}
        stacked = {key: tensor for key, tensor in tensors.items() if self._is_expert(key, tensor)}
        stacks = {stack.name: stack for stack in from_hub(stacked, self._family, self._config)}
        for key, tensor in tensors.items():
            if key in stacked:
                parts = [stacks[name] for name in self._stacks_of(key)]
            else:
                parts = self._dense(key, tensor)
            given[key] = tuple(part.name for part in parts)
            found |= {part.name: part for part in parts}
        return Named(list(found.values()), given)

    def _match(self, key: str) -> Match | None:
        return self._family.match(self._family.corrected(key), self._sizes) if self._family else None

    def _is_expert(self, key: str, tensor: Tensor) -> bool:
        match = self._match(key)
        if match is None:
            return False
        flattened = any("E" in dim and len(dim) > 1 for stored in match.layouts for dim in stored.dims)
        # Rows of several experts in boxes are not taken apart: such a tensor stays as it was saved.
        return not (flattened and any(isinstance(region, Box) for region in tensor.regions))

    def _stacks_of(self, key: str) -> tuple[ExpertName, ...]:
        match = self._match(key)
        if match is None or self._family is None:
            return ()
        return match.layouts[0].names(self._family.published_path(match.layer_path))

    def _dense(self, key: str, tensor: Tensor) -> list[Tensor]:
        own = numbered(key, self.layers)
        expert = titan_expert(own)
        if expert is None and self.published:
            return from_hub({key: tensor}, self._family)
        return [replace(tensor, name=expert or own)]
