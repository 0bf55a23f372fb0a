"""Layers for multi-token prediction, which published models have and transformers' classes do not.

They stand under ``mtp`` (``mtp.layers.0.mlp...``), or are numbered after the last layer that the config
counts (DeepSeek-V3's ``model.layers.61``; ``num_nextn_predict_layers``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from ckpt_tool.canonical import WEIGHT, Checkpoint, ExpertName, TensorName
from ckpt_tool.families import Family, stated, text_config
from ckpt_tool.families.agreement import promised_mtp_layers
from ckpt_tool.families.completeness import MTP_PATH
from ckpt_tool.layout import LeftOut, left_out

_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)(?:\..*)?")
_REASON = "a layer for multi-token prediction, which transformers' model of this config does not have"


class WithoutMtp(NamedTuple):
    """A catalogue without its layers for multi-token prediction, and those."""

    checkpoint: Checkpoint
    left_out: tuple[LeftOut, ...]


def without_mtp(published: Checkpoint, family: Family, config: Mapping[str, Any]) -> WithoutMtp:
    """The model that a run trains: without layers for multi-token prediction, with a note if it had some.

    Args:
        published: under published names.
    """
    apart = _Apart(family, config)
    gone = [tensor for tensor in published.tensors if apart.holds(tensor.name)]
    if not gone:
        return WithoutMtp(published, ())
    names = {tensor.name for tensor in gone}
    kept = published.select(tensor for tensor in published.tensors if tensor.name not in names)
    weights = sum(tensor.state == WEIGHT for tensor in gone)
    note = (
        f"{weights} weights of layers for multi-token prediction are left out: transformers' model of this "
        "config has no such layers, so the run does not train them. The published files keep them."
    )
    groups = tuple(
        replace(group, parameters=tuple(name for name in group.parameters if not apart.holds(name)))
        for group in published.training.param_groups
    )
    checkpoint = replace(
        kept,
        moe_layers=tuple(layer for layer in published.moe_layers if not apart.has(layer.layer_path)),
        scalars={key: value for key, value in published.scalars.items() if not apart.holds(key[0])},
        aliases=_between(published.aliases, apart),
        equal=_between(published.equal, apart),
        training=replace(published.training, param_groups=groups),
        notes=(*published.notes, note),
    )
    return WithoutMtp(checkpoint, left_out(gone, _REASON))


def has_mtp(checkpoint: Checkpoint, family: Family, config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has layers for multi-token prediction."""
    apart = _Apart(family, config)
    return any(apart.holds(tensor.name) for tensor in checkpoint.tensors)


def _between(names: Mapping[str, str], apart: _Apart) -> dict[str, str]:
    return {a: b for a, b in names.items() if not apart.has(a) and not apart.has(b)}


class _Apart:
    """Which paths are those of layers for multi-token prediction."""

    def __init__(self, family: Family, config: Mapping[str, Any]) -> None:
        text = text_config(config)
        count = stated(text, family.config["layers"])
        self._first = count[1] if count is not None and type(count[1]) is int else None
        self._more = promised_mtp_layers(text)

    def has(self, path: str) -> bool:
        if MTP_PATH.fullmatch(path):
            return True
        match = _LAYER.fullmatch(path)
        if match is None or self._first is None:
            return False
        return self._first <= int(match[1]) < self._first + self._more

    def holds(self, name: TensorName) -> bool:
        return self.has(name.layer_path if isinstance(name, ExpertName) else name)
