"""Which directories make up a checkpoint: one, accelerate's two, or shards with an optimizer beside."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ckpt_tool.errors import MismatchError, UnreadableError
from ckpt_tool.formats.dcp.contents import Contents, metadata_files, read_directory
from ckpt_tool.formats.dcp.grammar.keys import Scheme, Sorted, sort_entries
from ckpt_tool.formats.dcp.reading.beside import VEOMNI, is_veomni
from ckpt_tool.formats.dcp.reading.shards import read_shards, shard_directory
from ckpt_tool.storage import Reader

_MODEL_DIRECTORY = re.compile(r"pytorch_model_fsdp_(\d{1,6})$")
_OPTIMIZER_DIRECTORIES = ("optimizer", "optimizer_0", "optim")
TITAN_NAME = re.compile(r"tok_embeddings\.weight|layers\.\d+\.(?:attention|moe|feed_forward)\..*")


@dataclass
class Found:
    """The directories of a checkpoint, read."""

    scheme: Scheme
    contents: Contents = field(default_factory=Contents)
    sorted: Sorted = field(default_factory=Sorted)


def recognises(reader: Reader) -> bool:
    names = reader.list()
    return (
        bool(metadata_files(reader, ""))
        or any(name.endswith(".distcp") for name in names)
        or any(_MODEL_DIRECTORY.match(name) and _is_dcp(reader, name) for name in names)
        or shard_directory(reader) == ""
        or (shard_directory(reader) is not None and not any(n.endswith(".safetensors") for n in names))
    )


def _is_dcp(reader: Reader, directory: str) -> bool:
    names = reader.list(directory)
    return bool(metadata_files(reader, directory)) or any(name.endswith(".distcp") for name in names)


def read_directories(reader: Reader) -> Found:
    shards = shard_directory(reader)
    if shards is not None:
        return _read_sharded(reader, shards)
    accelerate = [name for name in reader.list() if _MODEL_DIRECTORY.match(name) and _is_dcp(reader, name)]
    if not metadata_files(reader, "") and accelerate:
        return _read_accelerate(reader, accelerate)
    contents = read_directory(reader, "")
    entries = sort_entries(contents, reader.root)
    titan = any(TITAN_NAME.fullmatch(fqn) for fqn in entries.model) and not entries.model_root
    style = "torchtitan" if titan else VEOMNI if is_veomni(reader) else "plain"
    scheme = Scheme(style, entries.model_root, entries.optimizer_root, entries.flat or titan)
    return Found(scheme, contents, entries)


def _read_accelerate(reader: Reader, models: list[str]) -> Found:
    if len(models) > 1:
        raise UnreadableError(
            f"{reader.root} holds several models ({', '.join(models)}). Pass the directory of one of them."
        )
    number = models[0].rpartition("_")[2]
    contents = read_directory(reader, models[0])
    optimizer = f"optimizer_{number}"
    if reader.list(optimizer):
        contents.add(read_directory(reader, optimizer), reader.root)
    entries = sort_entries(contents, reader.root)
    scheme = Scheme(
        "accelerate", entries.model_root, entries.optimizer_root, entries.flat, models[0], optimizer
    )
    return Found(scheme, contents, entries)


def _read_sharded(reader: Reader, directory: str) -> Found:
    """The model from safetensors; its optimizer in a DCP directory of its own, or in the same one."""
    contents = read_shards(reader, directory)
    model = dict(contents.tensors)
    at = next((d for d in ("", directory, *_OPTIMIZER_DIRECTORIES) if _is_dcp(reader, d)), None)
    optimizer = Contents() if at is None else read_directory(reader, at)
    entries = sort_entries(optimizer, reader.root, with_model=False)
    entries.model = model
    _check_shapes(entries, reader.root)
    contents.add(optimizer, reader.root)
    scheme = Scheme(
        "transformers",
        (),
        entries.optimizer_root,
        entries.flat or not entries.groups,
        directory,
        at or "",
        shards=True,
    )
    return Found(scheme, contents, entries)


def _check_shapes(entries: Sorted, root: str) -> None:
    """The optimizer knows the whole shapes; shards alone do not tell that the last ones are missing."""
    for (fqn, state), held in entries.states.items():
        if fqn not in entries.model:
            raise MismatchError(f"{root} has optimizer state of {fqn}, but no parameter of that name.")
        shape = entries.model[fqn].tensor.shape
        if held.tensor.shape != shape:
            raise UnreadableError(
                f"{root}: the shards hold {list(shape)} of {fqn}, but its {state} has "
                f"{list(held.tensor.shape)}. The last shards are missing."
            )
