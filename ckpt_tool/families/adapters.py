"""Adapters (LoRA and its like) are not a model's own weights: they are recognised, and refused.

Names as peft gives them (peft 0.18, utils/save_and_load.py and tuners/*/layer.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ckpt_tool.canonical import Checkpoint
from ckpt_tool.errors import UnreadableError

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_ADAPTERS = re.compile(
    r"(?:.*\.)?(?:"
    r"base_model\.model\..*|base_layer\..*|modules_to_save\..*|original_module\..*"
    r"|(?:lora|vera|loha|lokr|hada|oft|boft|ia3|randlora)_\w+(?:\..*)?"
    r"|prompt_(?:encoder|embeddings)(?:\..*)?)"
)
MERGE = (
    "Merge it into the model first: load the base model with the adapter by "
    "peft.AutoPeftModelForCausalLM.from_pretrained, then merge_and_unload() and save_pretrained(), and "
    "convert what that saves."
)


def adapters_name(names: Iterable[object]) -> str | None:
    """The first name that an adapter gives to a tensor; None where there is none."""
    return next((name for name in names if isinstance(name, str) and _ADAPTERS.fullmatch(name)), None)


def refuse_adapters(checkpoint: Checkpoint) -> None:
    """Raises UnreadableError where tensors of an adapter are among the model's."""
    found = adapters_name(tensor.name for tensor in checkpoint.tensors)
    if found is not None:
        raise UnreadableError(
            f"{checkpoint.root} holds an adapter ({found}), which no model loads as weights of its own. "
            f"{MERGE}"
        )
