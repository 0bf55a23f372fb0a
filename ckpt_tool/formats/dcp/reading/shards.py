"""Sharded safetensors of DCP's Hugging Face writer: a model, each rank's part in files of its own.

torch 2.13, torch/distributed/checkpoint/hf_storage.py and _hf_utils.py: ``shard-<rank + 1>-model-<file>-of-
<files>.safetensors``; where a part lies in its tensor is in the header (``DCP_SHARDING_INFO``). Nothing
states the shapes of whole tensors nor how many shards there are, so a missing one is looked for here:
torch's own consolidation fills it with zeros.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from ckpt_tool.canonical import WEIGHT, Box, Region, Tensor
from ckpt_tool.containers.safetensors import SafetensorsFile
from ckpt_tool.errors import UnreadableError
from ckpt_tool.formats.dcp.contents import Contents, Held, Part, check_coverage, placed
from ckpt_tool.geometry import row_major
from ckpt_tool.json_text import parse_json
from ckpt_tool.storage import Reader, read_each

SHARD = re.compile(r"shard-(?P<shard>\d{1,6})-model-(?P<file>\d{1,6})-of-(?P<files>\d{1,6})\.safetensors$")
SHARDING_INFO = "DCP_SHARDING_INFO"


class _Piece(NamedTuple):
    offsets: tuple[int, ...]
    tensor: Tensor
    file: str


def shard_directory(reader: Reader) -> str | None:
    """Where the shards are: here, or in ``sharded/`` beside what they were consolidated to."""
    for directory in ("", "sharded"):
        if any(SHARD.match(name) for name in reader.list(directory)):
            return directory
    return None


def read_shards(reader: Reader, directory: str) -> Contents:
    """The model's tensors, under the names in the files.

    Raises:
        UnreadableError: a shard is missing.
        CoverageError: the parts of a tensor leave gaps or overlap.
    """
    prefix = f"{directory}/" if directory else ""
    names = [name for name in reader.list(directory) if SHARD.match(name)]
    _check_numbers(names, f"{reader.root}/{prefix}")
    files = read_each(lambda name: SafetensorsFile(reader, prefix + name, state=WEIGHT), names)
    parts: dict[str, list[_Piece]] = {}
    for file in files:
        offsets = _saved_offsets(file, f"{reader.root}/{file.source.path}")
        for name, tensor in file.tensors.items():
            parts.setdefault(name, []).append(_Piece(offsets[name], tensor, file.source.path))
    found = Contents(sources=[file.source for file in files])
    for name, pieces in parts.items():
        found.tensors[name] = _held(reader.root, name, pieces)
    return found.without_wrappers(reader.root)


def _check_numbers(names: list[str], where: str) -> None:
    present: dict[int, set[int]] = {}
    stated: dict[int, int] = {}
    for name in names:
        match = SHARD.match(name)
        if match:
            present.setdefault(int(match["shard"]), set()).add(int(match["file"]))
            stated[int(match["shard"])] = int(match["files"])
    for shard in range(1, max(present) + 1):
        if shard not in present:
            raise UnreadableError(
                f"{where}: shard {shard} of at least {max(present)} is missing. A rank's part of the model "
                "is lost; copy the directory again."
            )
        if present[shard] != set(range(1, stated[shard] + 1)):
            raise UnreadableError(
                f"{where}: shard {shard} should have {stated[shard]} files; some are missing."
            )


def _saved_offsets(file: SafetensorsFile, where: str) -> Mapping[str, tuple[int, ...]]:
    try:
        info = parse_json(file.metadata[SHARDING_INFO].encode(), where)
        offsets = {name: tuple(info[name]["saved_offsets"]) for name in file.tensors}
    except (KeyError, TypeError, UnreadableError) as error:
        raise UnreadableError(
            f"{where}: the header does not say where its parts belong ({SHARDING_INFO}: "
            f"{type(error).__name__} {error})."
        ) from error
    for name, values in offsets.items():
        sound = all(type(value) is int and value >= 0 for value in values)
        if not sound or len(values) != len(file.tensors[name].shape):
            raise UnreadableError(f"{where}: {name} is said to lie at {list(values)}.")
    return offsets


def _held(root: str, name: str, found: list[_Piece]) -> Held:
    first = found[0].tensor
    shape = tuple(
        max(piece.offsets[dim] + piece.tensor.shape[dim] for piece in found)
        for dim in range(len(first.shape))
    )
    regions: list[Region | Box] = []
    parts = []
    for offsets, tensor, file in found:
        if tensor.dtype is not first.dtype or len(tensor.shape) != len(shape):
            raise UnreadableError(
                f"{root}/{file}: {name} is {tensor.dtype} {list(tensor.shape)}, elsewhere {first.dtype}."
            )
        strides = row_major(tensor.shape, tensor.dtype.itemsize)
        at = next((region.offset for region in tensor.regions), 0)
        box = Box(offsets, tensor.shape, (1,) * len(shape), file, at, strides)
        regions += placed(name, shape, tensor.dtype, box)
        parts.append(Part(offsets, tensor.shape, file))
    whole = Tensor(name, WEIGHT, shape, first.dtype, tuple(regions))
    check_coverage(root, whole)
    return Held(whole, tuple(parts))
