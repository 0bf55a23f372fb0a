"""``ds_autoep_layers`` of a target's ranks: the uniform contiguous placement at another topology.

Fields: deepspeed 0.19.8, checkpoint/autoep_zero3_metadata.py; affine maps: checkpoint/autoep_affine.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckpt_tool.canonical import ExpertName, MoELayer, TensorName
from ckpt_tool.containers.torch_zip import Constant
from ckpt_tool.formats.deepspeed.facts.affine import expert_map
from ckpt_tool.formats.deepspeed.facts.names import PROJECTION_OF
from ckpt_tool.formats.deepspeed.facts.topology import Ranks

_FIXED = frozenset({"moe_layer_id", "module_path", "num_experts", "expert_key_prefix"})


class LayerEntries:
    """The entries of each rank. What all ranks say is made once.

    Keys, and their order, are those of the source's entries in ``model`` where it has any (releases
    before 0.19.8 write no placement and no affine maps); else those of 0.19.8.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        layers: Sequence[MoELayer],
        shapes: Mapping[TensorName, tuple[int, ...]],
        ranks: Ranks,
    ) -> None:
        source = model.get("ds_autoep_layers") or model.get("autoep_layers") or []
        known = {entry["module_path"]: entry for entry in source}
        self._ranks = ranks
        self._common = [
            _of_all_ranks(number, layer, shapes, ranks, known.get(layer.module))
            for number, layer in enumerate(layers)
        ]

    def of(self, rank: int) -> list[dict[str, Any]]:
        """The entries of one rank, layer by layer."""
        own = self._ranks.ep_rank(rank)
        changed = {"ep_rank": own, "expert_data_parallel_rank": self._ranks.edp_rank(rank)}
        return [self._of(common, changed, own * common["num_local_experts"]) for common in self._common]

    def _of(self, common: Mapping[str, Any], changed: Mapping[str, int], first: int) -> dict[str, Any]:
        changed = {
            **changed,
            "global_expert_start": first,
            "global_expert_end": first + common["num_local_experts"],
        }
        return {key: changed.get(key, value) for key, value in common.items()}


def _of_all_ranks(
    number: int,
    layer: MoELayer,
    shapes: Mapping[TensorName, tuple[int, ...]],
    ranks: Ranks,
    entry: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """A layer's entry, with EP rank 0's numbers."""
    local = layer.num_experts // ranks.ep
    prefix = f"{layer.module}.experts"
    held = [list(range(e * local, (e + 1) * local)) for e in range(ranks.ep)]
    new: dict[str, Any] = {
        "moe_layer_id": number,
        "module_path": layer.module,
        "num_experts": layer.num_experts,
        "num_local_experts": local,
        "ep_size": ranks.ep,
        "expert_placement": Constant(
            {
                "version": 1,
                "num_experts": layer.num_experts,
                "ep_size": ranks.ep,
                "ranks": [{"rank": e, "experts": ids} for e, ids in enumerate(held)],
            }
        ),
        "affine_maps": Constant(
            {
                "version": 1,
                "params": {
                    f"{prefix}.{weight}": expert_map(
                        held, shapes[ExpertName(layer.layer_path, PROJECTION_OF[weight])]
                    )
                    for weight in ("w1", "w2", "w3")
                },
            }
        ),
        "expert_key_prefix": prefix,
        "checkpoint_format": "zero3_partitioned",
        "checkpoint_format_version": 1,
        "ep_group_name": f"ep_size_{ranks.ep}",
        "ep_rank": 0,
        "expert_data_parallel_rank": 0,
        "expert_data_parallel_world_size": ranks.edp,
        "global_expert_start": 0,
        "global_expert_end": local,
    }
    if entry is None:
        return new
    return {key: value if key in _FIXED else new.get(key, value) for key, value in entry.items()}
