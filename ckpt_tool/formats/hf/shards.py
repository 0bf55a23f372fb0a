"""A model's tensors in files of a size, and the index that says which is in which.

As transformers writes them (5.20, modeling_utils.py ``save_pretrained``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from ckpt_tool.formats.hf.files import SINGLE
from ckpt_tool.layout import Slot

Named = tuple[str, Slot]


def shards(slots: list[Named], limit: int) -> dict[str, list[Named]]:
    """Fill files up to ``limit`` bytes in order; a tensor larger than that gets a file of its own."""
    parts: list[list[Named]] = [[]]
    held = 0
    for entry in slots:
        if parts[-1] and held + entry[1].nbytes > limit:
            parts.append([])
            held = 0
        parts[-1].append(entry)
        held += entry[1].nbytes
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    return {
        f"model-{number:05d}-of-{len(parts):05d}.safetensors": part for number, part in enumerate(parts, 1)
    }


def index(parts: Mapping[str, list[Named]]) -> str:
    total = sum(slot.nbytes for part in parts.values() for _, slot in part)
    parameters = sum(slot.numel for part in parts.values() for _, slot in part)
    weight_map = {name: path for path, part in parts.items() for name, _ in part}
    metadata = {"total_parameters": parameters, "total_size": total}
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n"
