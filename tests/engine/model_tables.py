"""Makes ``ckpt_tool/families/tensors.json``: which tensors transformers' models of each family have.

    python -m tests.engine.model_tables

Every model of ``hf_models`` is built on torch's meta device, as it is and with each field of its config
that may change its tensors changed, alone and in pairs. What all of them have is required, what some have
is known.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.configuration_utils import ALLOWED_LAYER_TYPES

from ckpt_tool.canonical import WEIGHT, Checkpoint, DType, ExpertName, Tensor, contiguous
from ckpt_tool.errors import CkptToolError
from ckpt_tool.families import family_of
from ckpt_tool.families.naming import to_hub
from tests.engine.hf_models import _CLASSES, BASE, COMPOSITE, MODELS, TEXT, D, _text, can_build

TABLE = Path(__file__).parents[2] / "ckpt_tool" / "families" / "tensors.json"
# Layers of other kinds than the tiny configs have, for models whose kinds no field of all models names.
MORE: Mapping[str, tuple[dict[str, Any], ...]] = {
    "jamba": ({"attn_layer_period": 2, "attn_layer_offset": 1},),
    "granitemoehybrid": ({"layer_types": ["mamba", "attention", "mamba"]},),
    "nemotron_h": ({"layers_block_type": ["mamba", "moe", "mlp"]},),
    "bailing_hybrid": ({"layer_group_size": 3}, {"layer_group_size": 1}),
}  # fmt: skip
# Tensors that layers of a newer release (5.24) have in the place of another.
SINCE: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "bailing_hybrid": {
        "attention.q_proj.weight": (
            "attention.q_a_layernorm.weight", "attention.q_a_proj.weight", "attention.q_b_proj.weight",
        ),
    },
}  # fmt: skip
DENSE = ("doge", "llama", "mistral", "qwen2", "qwen3")
_NOT_OF_TENSORS = frozenset({
    "use_cache", "output_hidden_states", "return_dict", "output_attentions", "torchscript", "is_decoder",
    "output_router_logits", "is_encoder_decoder", "add_cross_attention", "tie_word_embeddings", "is_moe",
    "enable_moe_block",
})  # fmt: skip


def variants(name: str, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The model's options, and with its fields changed: two at a time of those that change its tensors."""
    yield options
    for more in MORE.get(name, ()):
        yield changed(name, options, more)
    single = [
        one for one in changes(name, options) if names_of(name, changed(name, options, one)) is not None
    ]
    plain = names_of(name, options)
    single = [one for one in single if names_of(name, changed(name, options, one)) != plain]
    for one in single:
        yield changed(name, options, one)
    for one, other in itertools.combinations(single, 2):
        if not one.keys() & other.keys():
            yield changed(name, options, {**one, **other})


def changes(name: str, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    full = AutoConfig.for_model(name, **options)
    text = full.get_text_config(decoder=True).to_dict()
    for key, value in text.items():
        if type(value) is bool and key not in _NOT_OF_TENSORS:
            yield {key: not value}
        elif key.endswith("_lora_rank") and value:
            yield {key: None}
        elif "shared_expert" in key and type(value) is int and value and "size" not in key:
            yield {key: 0}
        elif key == "mlp_only_layers" or (key == "moe_layers" and name.startswith("llama4")):
            yield {key: [1]}
        elif key == "layer_types" and value:
            for kind in ALLOWED_LAYER_TYPES:
                yield {key: [kind] * len(value)}
                yield {key: [kind, *value[1:]]}


def changed(name: str, options: dict[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    for key in ("text_config", "thinker_config"):
        if name in COMPOSITE and key in options:
            return {**options, key: {**options[key], **change}}
    return {**options, **change}


def build(name: str, options: dict[str, Any]) -> Any:
    config = AutoConfig.for_model(name, **options)
    with torch.device("meta"):
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


def table(name: str) -> dict[str, Any] | None:
    options = options_of(name)
    config = AutoConfig.for_model(name, **options)
    if name == "diffusion_gemma" or config.is_encoder_decoder or family_of(config.to_dict()).untranslated:
        return None
    model = build(name, options)
    roots = set()
    seen: dict[str, list[set[str]]] = {"moe": [], "dense": [], "top": []}
    towers: set[str] = set()
    for one in variants(name, options):
        checkpoint = published(name, one)
        if checkpoint is None:
            continue
        moe = {t.name.layer_path for t in checkpoint.tensors if isinstance(t.name, ExpertName)}
        if not moe and name not in DENSE:
            continue
        root = next(iter(moe)).rpartition(".")[0] if moe else "model.layers"
        roots.add(root)
        layers: dict[str, set[str]] = {path: set() for path in moe}
        top = set()
        for tensor in checkpoint.tensors:
            if not isinstance(tensor.name, str):
                continue
            if tensor.name.startswith(f"{root}."):
                number, _, rest = tensor.name.removeprefix(f"{root}.").partition(".")
                layers.setdefault(f"{root}.{number}", set()).add(rest)
            else:
                top.add(tensor.name)
        for path, names in layers.items():
            seen["moe" if path in moe else "dense"].append(names)
        beside = root.rpartition(".")[0]
        own = {one for one in top if name not in COMPOSITE or is_text(one, beside)}
        towers |= {tower_of(one) for one in top - own}
        seen["top"].append(own)
    if len(roots) != 1:
        raise SystemExit(f"{name}: {sorted(roots)}")
    found = {
        "class": type(model).__name__,
        "root": roots.pop(),
        "tied": bool(getattr(AutoConfig.for_model(name), "tie_word_embeddings", False)),
        "ignored": sorted(model._keys_to_ignore_on_load_unexpected or ()),
        "towers": sorted(towers),
    }
    for kind, sets in seen.items():
        for old, new in SINCE.get(name, {}).items():
            sets += [one - {old} | set(new) for one in sets if old in one]
        always = set.intersection(*sets) if sets else set()
        found[kind] = {
            "required": sorted(always),
            "known": sorted(set().union(*sets) - always),
        }
    return found


def main() -> None:
    transformers.logging.set_verbosity_error()
    tables = {}
    for name in (*MODELS, *(one for one in DENSE if one not in MODELS)):
        if can_build(name):
            found = table(name)
            if found is not None:
                tables["mistral3/mistral4" if name == "mistral3" else name] = found
    TABLE.write_text(
        json.dumps({"transformers": transformers.__version__, "models": tables}, indent=0) + "\n"
    )


if __name__ == "__main__":
    main()
