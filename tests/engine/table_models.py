"""Models of each family on torch's meta device, and their tensors under published names."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from ckpt_tool.canonical import WEIGHT, Checkpoint, DType, Tensor, contiguous
from ckpt_tool.errors import CkptToolError
from ckpt_tool.families import family_of
from ckpt_tool.families.naming import to_hub
from tests.engine.hf_models import _CLASSES, BASE, COMPOSITE, TEXT, D, _text

DENSE = ("doge", "llama", "mistral", "qwen2", "qwen3")


def changed(name: str, options: dict[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    for key in ("text_config", "thinker_config"):
        if name in COMPOSITE and key in options:
            return {**options, key: {**options[key], **change}}
    return {**options, **change}


@contextmanager
def _no_values() -> Iterator[None]:
    """Models without first values, which nothing here needs and which take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d):
            patch.setattr(kind, "reset_parameters", lambda self: None)
        patch.setattr(transformers.PreTrainedModel, "initialize_weights", lambda self: None)
        yield


def build(name: str, options: dict[str, Any]) -> Any:
    config = AutoConfig.for_model(name, **copy.deepcopy(options))  # some classes change what they get
    with torch.device("meta"), _no_values():
        if name in _CLASSES:
            return getattr(transformers, _CLASSES[name])._from_config(config)
        first: Any = AutoModelForImageTextToText if name in COMPOSITE else AutoModelForCausalLM
        return (first if type(config) in first._model_mapping else AutoModel).from_config(config)


_cache: dict[str, Any] = {}


def names_of(name: str, options: dict[str, Any]) -> Any:
    """The names and shapes of the model's state dict; None where it cannot be built."""
    key = name + json.dumps(options, sort_keys=True, default=str)
    if key not in _cache:
        try:
            model = build(name, options)
            held = {one: tuple(tensor.shape) for one, tensor in model.state_dict().items()}
            _cache[key] = (held, model.config.to_dict())
        except Exception:  # whatever a model's own code makes of such a config
            _cache[key] = None
    found = _cache[key]
    return None if found is None else found[0]


def published(name: str, options: dict[str, Any]) -> Checkpoint | None:
    """The model's tensors under published names."""
    if names_of(name, options) is None:
        return None
    held, config = _cache[name + json.dumps(options, sort_keys=True, default=str)]
    tensors = tuple(
        Tensor(one, WEIGHT, shape, DType.float32, contiguous(shape, "-", 0)) for one, shape in held.items()
    )
    try:
        found = to_hub(Checkpoint("meta", "-", "transformers", tensors, ()), family_of(config), config)
    except CkptToolError as error:
        sys.stderr.write(f"{name}: {error}\n")
        return None
    return found


def is_text(name: str, text: str) -> bool:
    """Whether a published tensor of a composite model belongs to its text model, whose path is given."""
    parent = name.rpartition(".")[0]
    within = name.startswith(f"{text}.") if text != "model" else parent.rpartition(".")[0] == text
    return within or parent.rpartition(".")[2] == "lm_head"


def tower_of(name: str) -> str:
    """The beginning of all names of the part that a published tensor belongs to."""
    first, second = name.split(".")[:2]
    return f"{first}.{second}." if first == "model" else f"{first}."


def options_of(name: str) -> dict[str, Any]:
    if name in COMPOSITE:
        return COMPOSITE[name]
    return _text(name) if name in TEXT else {**BASE, "intermediate_size": D}


def config_of(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The whole config of a model that was built."""
    found: dict[str, Any] = _cache[name + json.dumps(options, sort_keys=True, default=str)][1]
    return found
