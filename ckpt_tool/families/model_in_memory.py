"""A checkpoint against transformers' own model of its config, where transformers is installed: every name
and every shape, as the model has them in memory.

It is asked in a child process, whose imports take some seconds and 500 MiB: worth it beside a conversion of
a gigabyte and more, below which the family's table (``expected``) has to do. The model is built on torch's
meta device. Nothing of a checkpoint is run: the config chooses among transformers' own classes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from ckpt_tool.canonical import Checkpoint
from ckpt_tool.errors import MismatchError, UsageError
from ckpt_tool.families import FUSED_FORM, family_of
from ckpt_tool.families.completeness import is_passed_over
from ckpt_tool.families.naming import entries, to_hub

WORTH = 1 << 30  # bytes of a model from which on transformers is asked
_TIMEOUT = 300  # seconds; a model of 100 layers takes a few
_QUANTISATION = ("quantization_config", "compression_config")


def check_against_model(checkpoint: Checkpoint, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Compare a model with what transformers builds from its config.

    Returns: a note where that could not be done.

    Raises:
        MismatchError: a tensor is missing, is none of the model's, or has another shape.
    """
    if sum(tensor.nbytes for tensor in checkpoint.values()) < WORTH:
        return ()
    try:
        family = family_of(config)
    except UsageError:
        return ()
    if family.untranslated:
        return ()
    answer = _ask(config)
    if "names" not in answer:
        why = answer.get("error")
        return (f"The names were not compared with transformers' model ({why}).",) if why else ()
    published = to_hub(checkpoint, family, config)
    held = {entry.name: entry.shape for entry in entries(published.values(), family, FUSED_FORM)}
    model = {name: tuple(shape) for name, shape in answer["names"].items()}
    same: dict[str, list[str]] = {}
    for name, first in answer["tied"].items():
        same.setdefault(first, [first]).append(name)
    tied = {name: names for names in same.values() for name in names}
    missing = sorted(n for n in model if not any(one in held for one in tied.get(n, [n])))
    ignored = [re.compile(pattern) for pattern in answer["ignored"]]
    extra = sorted(name for name in held if name not in model and not is_passed_over(name, ignored))
    what = f"transformers' {answer['class']} of this config.json ({answer['release']})"
    if missing:
        raise MismatchError(
            f"The checkpoint has no {missing[0]} ({len(missing)} such), which {what} has. Save or copy it "
            "again, or pass the config.json of the model that was trained."
        )
    if extra:
        raise MismatchError(
            f"The checkpoint has {extra[0]} ({len(extra)} such), which {what} has not. Leave it out of "
            "the state dict that is saved, or pass the config.json of the model that was trained."
        )
    for name, shape in held.items():
        if name in model and model[name] != shape:
            raise MismatchError(
                f"{name} has shape {list(shape)}, and {what} has {list(model[name])} there. Pass the "
                "config.json of the model that was trained."
            )
    return ()


def _ask(config: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        child = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps(dict(config)),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": f"{type(error).__name__}: no answer"}
    lines = child.stdout.splitlines()
    if child.returncode or not lines:
        return {"error": " ".join(child.stderr.splitlines()[-1:]) or f"status {child.returncode}"}
    found: Mapping[str, Any] = json.loads(lines[-1])
    return found


def _answer(config: dict[str, Any]) -> dict[str, Any]:
    try:
        import torch
        import transformers
    except ImportError:
        return {}
    plain = {key: value for key, value in config.items() if key not in _QUANTISATION}
    try:
        full = transformers.AutoConfig.for_model(**plain)
        with torch.device("meta"):
            model = _built(transformers, full, plain)
        held = model.state_dict(keep_vars=True)
    except Exception as error:  # whatever a model's own code makes of its config
        return {"error": f"{type(error).__name__}: {error}"}
    first: dict[int, str] = {}
    tied = {name: first.setdefault(id(tensor), name) for name, tensor in held.items()}
    return {
        "names": {name: list(tensor.shape) for name, tensor in held.items()},
        "tied": {name: other for name, other in tied.items() if name != other},
        "ignored": sorted(model._keys_to_ignore_on_load_unexpected or ()),
        "class": type(model).__name__,
        "release": transformers.__version__,
    }


def _built(transformers: Any, full: Any, config: Mapping[str, Any]) -> Any:
    """The class that the config names, or else the one that transformers chooses for it."""
    for name in config.get("architectures") or ():
        kind = getattr(transformers, str(name), None)
        if kind is not None and getattr(kind, "config_class", None) is type(full):
            return kind._from_config(full)
    for name in ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM"):
        kind = getattr(transformers, name)
        if type(full) in kind._model_mapping:
            return kind.from_config(full)
    return transformers.AutoModel.from_config(full)


if __name__ == "__main__":
    print(json.dumps(_answer(json.load(sys.stdin))))  # noqa: T201 (the answer of the child)
