"""Reading a directory of safetensors: its files, its index, its config.json."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ckpt_tool.canonical import WEIGHT, Checkpoint, ExpertName, MoELayer, SourceFile, Tensor, Topology
from ckpt_tool.containers.safetensors import SafetensorsFile
from ckpt_tool.errors import UnreadableError, UsageError
from ckpt_tool.families import Family, adapters, family_of, text_config
from ckpt_tool.families.agreement import embedding_name, head_name, ties_embeddings
from ckpt_tool.families.naming import HUB, from_hub, moe_layer
from ckpt_tool.formats.hf.quantised import decoded, files_of_values, note_of_scheme, with_description
from ckpt_tool.json_file import read_object
from ckpt_tool.storage import Reader
from ckpt_tool.wrappers import note_of, without_wrappers

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SERIES = re.compile(r"(.*-)(\d{1,6})-of-(\d{1,6})\.safetensors", re.ASCII)


def looks_like(reader: Reader) -> bool:
    names = reader.list()
    return INDEX in names or any(name.endswith(".safetensors") for name in names)


def read(reader: Reader, format_name: str) -> Checkpoint:
    """The catalogue under published names, from headers and JSON alone."""
    config = with_description(_config(reader), reader)
    held, sources = _tensors(reader)
    stored, changed = without_wrappers(held, reader.root)
    stored = {name: replace(tensor, name=name) for name, tensor in stored.items()} if changed else stored
    family, notes = _family(config)
    notes += note_of(changed)
    values = decoded(stored, config, reader)
    found = from_hub(values, family, config)
    found, aliases = _tied(config, found)
    notes += note_of_scheme(config, values.values())
    return Checkpoint(
        format=format_name,
        root=reader.root,
        dialect=HUB,
        tensors=tuple(found),
        files=tuple(sources),
        topology=Topology(),
        moe_layers=_moe_layers(found, family),
        aliases=aliases,
        model_config=config,
        notes=notes,
        decoded=files_of_values(values),
    )


def _moe_layers(tensors: list[Tensor], family: Family | None) -> tuple[MoELayer, ...]:
    counts: dict[str, int] = {}
    for tensor in tensors:
        if isinstance(tensor.name, ExpertName):
            path = tensor.name.layer_path
            counts[path] = min(counts.get(path, tensor.shape[0]), tensor.shape[0])
    return tuple(moe_layer(path, count, family) for path, count in counts.items()) if family else ()


# ---- files


def _tensors(reader: Reader) -> tuple[dict[str, Tensor], list[SourceFile]]:
    tensors: dict[str, Tensor] = {}
    sources = []
    for path, expected in _files(reader).items():
        file = SafetensorsFile(reader, path, state=WEIGHT)
        sources.append(file.source)
        if expected is not None and expected != set(file.tensors):
            wrong = sorted(expected ^ set(file.tensors))[:5]
            raise UnreadableError(
                f"{reader.root}/{INDEX} and {path} disagree about which tensors are in it: {wrong}."
            )
        twice = next((name for name in file.tensors if name in tensors), None)
        if twice is not None:
            raise UnreadableError(f"{reader.root}: {twice} is in two files, one of them {path}.")
        tensors |= file.tensors
    return tensors, sources


def _files(reader: Reader) -> dict[str, set[str] | None]:
    """The safetensors files of the model, with the tensors the index expects in each."""
    names = reader.list()
    _refuse_adapter(reader, names)
    if INDEX not in names:
        # transformers takes the file of this name alone (5.20, modeling_utils.py)
        found = [SINGLE] if SINGLE in names else [name for name in names if name.endswith(".safetensors")]
        _check_series(reader, found, found)
        return dict.fromkeys(found)
    where = f"{reader.root}/{INDEX}"
    files: dict[str, set[str] | None] = {}
    for name, path in _weight_map(reader, where).items():
        if "/" in path or "\\" in path or path.startswith("."):
            raise UnreadableError(f"{where} points outside its directory: {path!r}.")
        expected = files.setdefault(path, set())
        if expected is not None:
            expected.add(name)
    if SINGLE in names and SINGLE not in files:
        raise UnreadableError(
            f"{reader.root} holds {SINGLE} and an index of other files (such as {next(iter(files))}): "
            f"two models. transformers loads {SINGLE}, and other programs what the index names. Move away "
            f"what is not meant: {SINGLE}, or {INDEX} and its files."
        )
    present = set(names)
    for path in files:
        if path not in present:
            raise UnreadableError(
                f"{reader.root}/{path} is missing; {INDEX} names it. Copy or download it again."
            )
    _check_series(reader, files, names)
    return files


def _refuse_adapter(reader: Reader, names: list[str]) -> None:
    """transformers puts an adapter beside a model onto it where peft is installed (5.20,
    integrations/peft.py): what is loaded is not what the model's own files hold."""
    found = next((name for name in adapters.WEIGHTS if name in names), None)
    if found is not None:
        raise UnreadableError(
            f"{reader.root}/{found} holds an adapter, not a model's own weights. {adapters.MERGE} If the "
            "model beside it is meant without it, move the adapter away."
        )


def _check_series(reader: Reader, read: Iterable[str], present: list[str]) -> None:
    """Files of one model are numbered: of each series that is used, all are there and all are used."""
    used = set(read)
    series = {(match[1], match[3]) for name in used if (match := _SERIES.fullmatch(name))}
    for name in present:
        match = _SERIES.fullmatch(name)
        if match and (match[1], match[3]) in series and name not in used:
            raise UnreadableError(
                f"{reader.root}/{name} belongs to the files that {INDEX} names, which does not name it. "
                "Copy the index again from its origin, or remove the file if it is another model's."
            )
    for prefix, count in sorted(series):
        for number in range(1, int(count) + 1):
            expected = f"{prefix}{number:0{len(count)}d}-of-{count}.safetensors"
            if expected not in used:
                raise UnreadableError(
                    f"{reader.root}/{expected} is missing: by their names there are {int(count)} files. "
                    "Copy it from where the model was saved or downloaded."
                )


def _weight_map(reader: Reader, where: str) -> dict[str, str]:
    found = read_object(reader, INDEX).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(path, str) for path in found.values()):
        raise UnreadableError(f"{where} is malformed: weight_map is not a map of names to files.")
    return found


# ---- config.json


def _config(reader: Reader) -> Mapping[str, Any] | None:
    if "config.json" not in reader.list():
        return None
    return read_object(reader, "config.json")


def _family(config: Mapping[str, Any] | None) -> tuple[Family | None, tuple[str, ...]]:
    if config is None:
        return None, ("No config.json: tensors keep their names and experts are not told apart.",)
    try:
        return family_of(config), ()
    except UsageError:
        kind = text_config(config).get("model_type")
        return None, (f"model_type {kind!r} is not known: experts are not told apart.",)


def _tied(config: Mapping[str, Any] | None, tensors: list[Tensor]) -> tuple[list[Tensor], dict[str, str]]:
    """The output head of a model that ties it to its embedding, as an alias; where the files hold it
    all the same, as a copy that conversions compare before they drop it."""
    names = {tensor.name: tensor for tensor in tensors}
    embedding = embedding_name(names)
    if config is None or embedding is None or not ties_embeddings(config):
        return tensors, {}
    head = names.get(head_name(embedding))
    if head is None:
        return tensors, {head_name(embedding): embedding}
    shared = names[embedding]
    if (head.shape, head.dtype) != (shared.shape, shared.dtype):
        return tensors, {}
    kept = [
        replace(tensor, replicas=tuple(head.regions)) if tensor is shared else tensor
        for tensor in tensors
        if tensor is not head
    ]
    return kept, {head_name(embedding): embedding}
