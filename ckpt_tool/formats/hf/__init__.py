"""Hugging Face safetensors directories: ``model.safetensors``, or shards with an index.

Names and index as transformers writes them (5.20, modeling_utils.py ``save_pretrained``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ckpt_tool.canonical import WEIGHT, Checkpoint, DType, ExpertName, MoELayer, Tensor, Topology
from ckpt_tool.containers.safetensors import SafetensorsFile, safetensors_file
from ckpt_tool.errors import UnreadableError, UsageError
from ckpt_tool.families import Family, family_of, text_config
from ckpt_tool.families.agreement import check_config
from ckpt_tool.families.naming import HUB, from_hub, to_hub
from ckpt_tool.formats.base import TargetOptions
from ckpt_tool.layout import Layout, Literal, Slot, TargetFile, text_file
from ckpt_tool.storage import Reader

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class HuggingFace:
    """The format as the registry knows it."""

    name = "huggingface-safetensors"

    # ---- reading

    def recognises(self, reader: Reader) -> bool:
        names = reader.list()
        return _INDEX in names or any(name.endswith(".safetensors") for name in names)

    def read(self, reader: Reader) -> Checkpoint:
        config = _config(reader)
        tensors: dict[str, Tensor] = {}
        sources = []
        for path, expected in _files(reader).items():
            file = SafetensorsFile(reader, path, state=WEIGHT)
            sources.append(file.source)
            if expected is not None and expected != set(file.tensors):
                wrong = sorted(expected ^ set(file.tensors))[:5]
                raise UnreadableError(
                    f"{reader.root}/{_INDEX} and {path} disagree about which tensors are in it: {wrong}."
                )
            twice = sorted(set(tensors) & set(file.tensors))
            if twice:
                raise UnreadableError(f"{reader.root}: {twice[0]} is in two files, one of them {path}.")
            tensors |= file.tensors
        family, notes = _family(config)
        found = from_hub(tensors, family)
        layers = {
            tensor.name.layer_path: MoELayer(
                tensor.name.layer_path, f"{tensor.name.layer_path}.mlp", tensor.shape[0]
            )
            for tensor in found
            if isinstance(tensor.name, ExpertName)
        }
        return Checkpoint(
            format=self.name,
            root=reader.root,
            dialect=HUB,
            tensors=tuple(found),
            files=tuple(sources),
            topology=Topology(),
            moe_layers=tuple(layers.values()),
            aliases=_tied(config, tensors),
            model_config=config,
            notes=notes,
        )

    # ---- writing

    def layout(self, checkpoint: Checkpoint, options: TargetOptions) -> Layout:
        """The model's values (masters where there are any) under published names."""
        config = options.config if options.config is not None else checkpoint.model_config
        if config is None:
            raise UsageError(
                "The checkpoint does not say which model it is. Pass --config with the model's "
                "config.json, or a directory that has one (its tokenizer is carried over, too)."
            )
        family = family_of(config)
        published = to_hub(checkpoint, family)
        check_config(published, family, config)
        dtype = options.dtype
        entries = _entries(published, family, dtype)
        shards = _shards(entries, options.max_shard_bytes)
        files = [safetensors_file(path, part, {"format": "pt"}) for path, part in shards.items()]
        if list(shards) != [_SINGLE]:
            files.append(text_file(_INDEX, _index(shards)))
        written = _written_dtype(entries)
        new_config, notes = _new_config(config, written)
        files.append(text_file("config.json", json.dumps(new_config, indent=2) + "\n"))
        for name, data in options.extra_files.items():
            files.append(TargetFile(name, len(data), (Literal(0, data),) if data else ()))
        values = {id(tensor) for tensor in published.values()}
        left_out = {
            tensor.label(): "a model file holds no optimizer state"
            for tensor in published.tensors
            if id(tensor) not in values
        }
        kept = sorted({str(slot.tensor.name) for _, slot in entries if dtype and slot.dtype is not dtype})
        if kept:
            notes.append(f"Kept in their own precision, which routing needs: {', '.join(kept)}.")
        return Layout(tuple(files), published.tensors, left_out, (*published.notes, *notes))


def _entries(checkpoint: Checkpoint, family: Family, dtype: DType | None) -> list[tuple[str, Slot]]:
    """(published name, slot) of every tensor in the order of the model; experts one by one."""
    entries: list[tuple[str, Slot]] = []
    stacks: dict[str, list[Tensor]] = {}
    for tensor in checkpoint.values():
        if isinstance(tensor.name, ExpertName):
            stacks.setdefault(tensor.name.layer_path, []).append(tensor)
    for tensor in checkpoint.values():
        if isinstance(tensor.name, str):
            target = _target_dtype(tensor, family, dtype)
            entries.append((tensor.name, Slot(tensor, tensor.shape, target)))
            continue
        layer = stacks.pop(tensor.name.layer_path, [])
        for expert in range(layer[0].shape[0] if layer else 0):
            for stack in layer:
                matrix = stack.shape[1:]
                slot = Slot(
                    stack,
                    matrix,
                    _target_dtype(stack, family, dtype),
                    expert * (stack.numel // stack.shape[0]),
                )
                if isinstance(stack.name, ExpertName):
                    entries.append((family.expert_name(stack.name, expert), slot))
    return entries


def _target_dtype(tensor: Tensor, family: Family, dtype: DType | None) -> DType:
    if dtype is None or not tensor.dtype.is_float:
        return tensor.dtype
    if isinstance(tensor.name, str) and family.keeps_fp32(tensor.name):
        return tensor.dtype
    return dtype


def _shards(entries: list[tuple[str, Slot]], limit: int) -> dict[str, list[tuple[str, Slot]]]:
    """Fill files up to ``limit`` bytes in order; a tensor larger than that gets a file of its own."""
    parts: list[list[tuple[str, Slot]]] = [[]]
    held = 0
    for entry in entries:
        if parts[-1] and held + entry[1].nbytes > limit:
            parts.append([])
            held = 0
        parts[-1].append(entry)
        held += entry[1].nbytes
    if len(parts) == 1:
        return {_SINGLE: parts[0]}
    return {
        f"model-{number:05d}-of-{len(parts):05d}.safetensors": part for number, part in enumerate(parts, 1)
    }


def _index(shards: Mapping[str, list[tuple[str, Slot]]]) -> str:
    total = sum(slot.nbytes for part in shards.values() for _, slot in part)
    parameters = sum(slot.numel for part in shards.values() for _, slot in part)
    weight_map = {name: path for path, part in shards.items() for name, _ in part}
    metadata = {"total_parameters": parameters, "total_size": total}
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n"


def _written_dtype(entries: list[tuple[str, Slot]]) -> DType:
    """The dtype of most bytes."""
    sizes: dict[DType, int] = {}
    for _, slot in entries:
        sizes[slot.dtype] = sizes.get(slot.dtype, 0) + slot.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _new_config(config: Mapping[str, Any], dtype: DType) -> tuple[dict[str, Any], list[str]]:
    """The config as given, but with the dtype that was written: transformers loads in that one."""
    new, notes = dict(config), []
    if new.pop("quantization_config", None) is not None:
        notes.append("quantization_config is dropped from config.json: the weights are not quantised.")
    for part in [new] + ([new["text_config"]] if isinstance(new.get("text_config"), dict) else []):
        for key in ("dtype", "torch_dtype"):
            if key in part or part is new:
                part[key] = dtype.torch_name
    return new, notes


def _config(reader: Reader) -> Mapping[str, Any] | None:
    if "config.json" not in reader.list():
        return None
    data = reader.read("config.json", 0, reader.size("config.json"))
    try:
        config = json.loads(data)
    except ValueError as error:
        raise UnreadableError(f"{reader.root}/config.json is not JSON ({error}).") from error
    if not isinstance(config, dict):
        raise UnreadableError(f"{reader.root}/config.json is not a JSON object.")
    return config


def _files(reader: Reader) -> dict[str, set[str] | None]:
    """The safetensors files of the model, with the tensors the index expects in each."""
    names = reader.list()
    if _INDEX not in names:
        return {name: None for name in names if name.endswith(".safetensors")}
    where = f"{reader.root}/{_INDEX}"
    try:
        weight_map = json.loads(reader.read(_INDEX, 0, reader.size(_INDEX)))["weight_map"]
        files: dict[str, set[str] | None] = {}
        for name, path in weight_map.items():
            if "/" in path or "\\" in path or path.startswith("."):
                raise UnreadableError(f"{where} points outside its directory: {path!r}.")
            expected = files.setdefault(path, set())
            if expected is not None:
                expected.add(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreadableError(f"{where} is malformed ({type(error).__name__}: {error}).") from error
    for path in files:
        if path not in names:
            raise UnreadableError(f"{reader.root}/{path} is missing; {_INDEX} names it.")
    return files


def _family(config: Mapping[str, Any] | None) -> tuple[Family | None, tuple[str, ...]]:
    if config is None:
        return None, ("No config.json: tensors keep their names and experts are not told apart.",)
    try:
        return family_of(config), ()
    except UsageError:
        kind = text_config(config).get("model_type")
        return None, (f"model_type {kind!r} is not known: experts are not told apart.",)


def _tied(config: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    tied = config is not None and config.get("tie_word_embeddings", False)
    if tied and "lm_head.weight" not in tensors and "model.embed_tokens.weight" in tensors:
        return {"lm_head.weight": "model.embed_tokens.weight"}
    return {}
