"""AutoEP's names for expert tensors, and back.

deepspeed 0.19.8, moe/ep_experts.py: ``w1`` is gate [E, I, H], ``w3`` is up [E, I, H], ``w2`` is down
[E, H, I], none of them transposed against ``nn.Linear``.
"""

from __future__ import annotations

import re

from ckpt_tool.canonical import DOWN, GATE, UP, ExpertName, MoELayer
from ckpt_tool.wrappers import WRAPPERS

PROJECTION_OF = {"w1": GATE, "w3": UP, "w2": DOWN}
AUTOEP_OF = {projection: weight for weight, projection in PROJECTION_OF.items()}

_EXPERT = re.compile(
    rf"(?P<module>(?P<layer>(?:.*\.)?\d+)(?:\.(?:{'|'.join(WRAPPERS)}))*\.\w+)\.experts\.(?P<weight>w[123])$"
)


def parse_expert(name: str) -> tuple[str, ExpertName] | None:
    """(module path of the MoE block, canonical name) of an AutoEP expert parameter; else None."""
    match = _EXPERT.match(name)
    if match is None:
        return None
    return match["module"], ExpertName(match["layer"], PROJECTION_OF[match["weight"]])


def expert_parameter(name: ExpertName, layers: dict[str, MoELayer]) -> str:
    """The AutoEP parameter that holds a canonical stack."""
    return f"{layers[name.layer_path].module}.experts.{AUTOEP_OF[name.projection]}"
