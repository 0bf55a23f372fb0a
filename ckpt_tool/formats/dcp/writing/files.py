"""From items and their chunks to files: ``.distcp``, ``.metadata`` and sharded safetensors."""

from __future__ import annotations

import json
import math
import posixpath
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ckpt_tool.canonical import WEIGHT, Box, DType, Region, Scalar, Tensor, contiguous
from ckpt_tool.containers.dcp_metadata import (
    METADATA,
    BytesEntry,
    Chunk,
    Metadata,
    Path,
    Stored,
    TensorEntry,
    metadata_bytes,
)
from ckpt_tool.containers.distcp import Span, concatenated
from ckpt_tool.containers.safetensors import safetensors_file
from ckpt_tool.containers.torch_zip import Inline, torch_file
from ckpt_tool.errors import CoverageError
from ckpt_tool.formats.dcp.reading.shards import SHARDING_INFO
from ckpt_tool.formats.deepspeed.facts.scalars import saved_scalar
from ckpt_tool.geometry import Axis, take
from ckpt_tool.layout import Description, Fill, Literal, Slot, TargetFile, whole


class Placement(NamedTuple):
    """A box of a tensor, and the file it is saved in."""

    file: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def object_or_archive(value: Any, stored: Stored) -> Any:
    """An object of the source for the target: numbers and text as such, all else as its archive, which is
    copied byte by byte and means the same wherever it lies."""
    return value if isinstance(value, str | int | float | type(None)) else stored


@dataclass(frozen=True, slots=True)
class Item:
    """An entry to be saved: a tensor in chunks; a tensor known beforehand, a scalar, an object, or the
    archive of one (``Stored``), in the one place it has. ``copy`` is that of its slots."""

    key: str
    path: Path
    value: Any
    places: tuple[Placement, ...]
    dtype: DType | None = None
    copy: str = ""

    @property
    def is_tensor(self) -> bool:
        return isinstance(self.value, Tensor)

    def as_saved(self, saved: Mapping[str, tuple[str, Path]]) -> Item:
        """The entry under the key and path of a run whose wrappers add parts to them (``Hint.saved``)."""
        key, path = saved.get(self.key, (self.key, self.path))
        return replace(self, key=key, path=path)


class _Cutter:
    """Cuts chunks out of one tensor. Its regions are sorted by row once, so that a chunk looks at those
    near it only: with as many chunks as ranks, on both sides, there would be ranks squared to look at."""

    def __init__(self, item: Item) -> None:
        self._item = item
        self._tensor: Tensor = item.value
        spans = [(*_rows(region, self._tensor.shape), region) for region in self._tensor.regions]
        spans.sort(key=lambda span: span[0])
        self._regions = [region for _, _, region in spans]
        self._firsts = [first for first, _, _ in spans]
        self._longest = max((last - first for first, last, _ in spans), default=0)

    def chunk(self, place: Placement) -> Tensor:
        """A box of the tensor as a tensor of its own, under a name of its own."""
        tensor, key = self._tensor, self._item.key
        if not place.offsets:
            return replace(tensor, name=key)
        low, high = place.offsets[0], place.offsets[0] + place.sizes[0]
        begin = bisect_left(self._firsts, low - self._longest)
        end = bisect_left(self._firsts, high)
        near = replace(tensor, regions=tuple(self._regions[begin:end]))
        corner = zip(place.offsets, place.sizes, strict=True)
        cut = take(near, [Axis(dim, at, size) for dim, (at, size) in enumerate(corner)])
        return replace(cut, name=f"{key} from {list(place.offsets)} on" if any(place.offsets) else key)


def _rows(region: Region | Box, shape: Sequence[int]) -> tuple[int, int]:
    """The first and last index a region has in dimension 0."""
    if isinstance(region, Box):
        first = region.origin[0] if region.origin else 0
        return first, first + (region.counts[0] - 1) * region.steps[0] if region.origin else 0
    inner = max(1, math.prod(shape[1:]))
    return region.start // inner, max(region.start, region.start + region.numel - 1) // inner


def check_tiled(item: Item) -> None:
    """The chunks of a tensor have as many elements as it has; grids do not overlap by construction."""
    if isinstance(item.value, Tensor):
        held = sum(math.prod(place.sizes) for place in item.places)
        if held != item.value.numel:
            raise CoverageError(
                f"{item.key}: its chunks would hold {held} of {item.value.numel} elements. This is a bug "
                "in ckpt-tool; nothing was written."
            )


class _Directory:
    """What is to be in each file of a directory."""

    def __init__(self, items: Sequence[Item], files: Iterable[str]) -> None:
        self._cutters = {item.key: _Cutter(item) for item in items if item.is_tensor}
        self.by_file: dict[str, list[tuple[Item, Placement]]] = {file: [] for file in files}
        for item in items:
            check_tiled(item)
            for place in item.places:
                self.by_file.setdefault(place.file, []).append((item, place))

    def slot(self, item: Item, place: Placement) -> Slot:
        chunk = self._cutters[item.key].chunk(place)
        return whole(chunk, item.dtype, item.copy)


def dcp_directory(
    directory: str, items: Sequence[Item], files: Iterable[str]
) -> tuple[list[Description], Description]:
    """The .distcp files of one DCP directory, and its metadata.

    Args:
        files: all .distcp files, those that hold nothing among them.
    """
    tensors = (Tensor, Scalar, Inline)
    ordered = sorted(items, key=lambda item: isinstance(item.value, tensors))  # objects first
    contents = _Directory(ordered, files)
    described = [_DistcpFile(contents, file) for file in contents.by_file]
    stored: dict[tuple[str, tuple[int, ...]], Stored] = {}
    for file in described:
        name = posixpath.relpath(file.path, directory) if directory else file.path
        for (item, place), span in zip(contents.by_file[file.path], file.spans(), strict=True):
            stored[item.key, place.offsets] = Stored(name, span.offset, span.length)
    data = metadata_bytes(_metadata(items, stored))
    metadata = TargetFile(posixpath.join(directory, METADATA), len(data), (Literal(0, data),))
    return list(described), metadata


@dataclass(frozen=True, slots=True)
class _DistcpFile:
    """One file of a DCP directory."""

    contents: _Directory
    path: str

    def layout(self) -> TargetFile:
        return self._concatenated()[0]

    def spans(self) -> list[Span]:
        """Where each of its archives lies."""
        return self._concatenated()[1]

    def _concatenated(self) -> tuple[TargetFile, list[Span]]:
        held = self.contents.by_file[self.path]
        return concatenated(self.path, [_archive(self.contents, *one) for one in held])


def _archive(contents: _Directory, item: Item, place: Placement) -> TargetFile:
    if item.is_tensor:
        return torch_file("", contents.slot(item, place))
    if isinstance(item.value, Stored):
        return _copied(item.key, item.value)
    return torch_file("", saved_scalar(item.value) if isinstance(item.value, Scalar) else item.value)


def _copied(key: str, stored: Stored) -> TargetFile:
    size = stored.length
    data = Tensor(key, WEIGHT, (size,), DType.uint8, contiguous((size,), stored.file, stored.offset))
    return TargetFile("", size, (), (Fill(0, data, 0, size, DType.uint8),))


def _metadata(items: Sequence[Item], stored: dict[tuple[str, tuple[int, ...]], Stored]) -> Metadata:
    entries: dict[str, TensorEntry | BytesEntry] = {}
    for item in items:
        value = item.value
        if isinstance(value, Tensor):
            chunks = tuple(Chunk(p.offsets, p.sizes, stored[item.key, p.offsets]) for p in item.places)
            entries[item.key] = TensorEntry(value.shape, item.dtype or value.dtype, chunks)
        elif isinstance(value, Inline):
            (place,) = item.places
            chunk = Chunk(place.offsets, place.sizes, stored[item.key, place.offsets])
            entries[item.key] = TensorEntry(value.shape, value.dtype, (chunk,))
        elif isinstance(value, Scalar) and value.dtype is not None:
            entries[item.key] = TensorEntry((), value.dtype, (Chunk((), (), stored[item.key, ()]),))
        else:
            entries[item.key] = BytesEntry(stored[item.key, ()])
    return Metadata(entries, {item.key: item.path for item in items})


def sharded_model(items: Sequence[Item], files: Iterable[str]) -> list[Description]:
    """A model as DCP's Hugging Face writer shards it; empty chunks have no place there."""
    contents = _Directory(items, files)
    return [_Shard(contents, file) for file in contents.by_file]


@dataclass(frozen=True, slots=True)
class _Shard:
    """One file of a sharded model."""

    contents: _Directory
    path: str

    def layout(self) -> TargetFile:
        held = [(item, place) for item, place in self.contents.by_file[self.path] if 0 not in place.sizes]
        offsets = {item.key: {"saved_offsets": list(place.offsets)} for item, place in held}
        header = {SHARDING_INFO: json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
        slots = [(item.key, self.contents.slot(item, place)) for item, place in held]
        return safetensors_file(self.path, slots, header)
