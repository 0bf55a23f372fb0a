"""The names in a transformers model's state dict, in their order: asked of transformers in a child process.

The imports of transformers and torch alone take some 500 MiB, which a process of its own gives back before
anything is converted. The model is built on torch's meta device, where it takes no memory. Nothing of a
checkpoint is run: the config chooses among transformers' own classes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from ckpt_tool.errors import UsageError
from ckpt_tool.families.expected import runs_as
from ckpt_tool.formats.hf.quantised import QUANTISATION_KEYS


def state_dict_names(config: Mapping[str, Any]) -> tuple[list[str], set[str]]:
    """The keys of the model's state dict in its order, and those of them that are buffers.

    Raises:
        UsageError: transformers is not installed, or cannot build the model of this config.
    """
    other = runs_as(config)
    if other is not None:
        config = {**config, "model_type": other}
    child = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(dict(config)),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    lines = child.stdout.splitlines()
    answer = json.loads(lines[-1]) if child.returncode == 0 and lines else {}
    if "names" in answer:
        return answer["names"], set(answer["buffers"])
    if answer.get("missing"):
        raise UsageError(
            "The source does not record the order of parameters. Install transformers (pip install "
            "transformers), which tells it, or pass --like with a checkpoint that the target run saved "
            "itself."
        )
    why = answer.get("error") or " ".join(child.stderr.splitlines()[-1:])
    raise UsageError(
        f"transformers cannot build the model of this config ({why}). Pass --like with a checkpoint that "
        "the target run saved itself."
    )


def _answer(config: dict[str, Any]) -> dict[str, Any]:
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        return {"missing": True}
    plain = {key: value for key, value in config.items() if key not in QUANTISATION_KEYS}
    try:
        with torch.device("meta"):
            build: Any = AutoModelForCausalLM.from_config
            model = build(AutoConfig.for_model(**plain))
    except Exception as error:  # whatever a model's own code makes of its config
        return {"error": f"{type(error).__name__}: {error}"}
    names = list(model.state_dict())
    return {"names": names, "buffers": sorted({name for name, _ in model.named_buffers()} & set(names))}


if __name__ == "__main__":
    print(json.dumps(_answer(json.load(sys.stdin))))  # noqa: T201 (the answer of the child)
