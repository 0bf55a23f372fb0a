"""What the files of a DCP checkpoint hold: tensors and objects by key, before anybody knows what they mean.

Every chunk's archive is opened once: its shape, dtype and strides are checked against ``.metadata``, and
so is coverage, because torch itself loads on in silence where a chunk is missing
(torch/distributed/checkpoint/default_planner.py validates at save only, and only with several ranks).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import xxhash

from ckpt_tool.canonical import WEIGHT, Box, DType, Region, Scalar, SourceFile, Tensor
from ckpt_tool.containers import pickles
from ckpt_tool.containers.dcp_metadata import (
    METADATA,
    BytesEntry,
    Metadata,
    Path,
    Stored,
    TensorEntry,
    read_metadata,
)
from ckpt_tool.containers.pickle_records import Opaque, TensorRecord
from ckpt_tool.containers.torch_zip import TorchArchive
from ckpt_tool.errors import CoverageError, MismatchError, UnreadableError
from ckpt_tool.formats.deepspeed.scalars import scalar_state
from ckpt_tool.geometry import Axis, check_disjoint, pieces, take
from ckpt_tool.storage import Reader

_RANK_FILE = re.compile(r"(?:.*/)?__(\d+)_\d+\.distcp$")
_SHARD_FILE = re.compile(r"(?:.*/)?shard-(\d+)-model-\d+-of-\d+\.safetensors$")
_RANK_METADATA = re.compile(r"__\d+\.metadata$")
_THREADS = 8
# What a 0-d tensor is read as a number of: steps and learning rates.
_NUMBERS = (DType.float32, DType.float64, DType.int64, DType.int32)

# Older torchtitan pickled its train_state as BytesIO objects (torchtitan/train.py before 2025).
_OBJECTS = pickles.stand_ins({"_io": "BytesIO"})

Item = TypeVar("Item")
Result = TypeVar("Result")


class Part(NamedTuple):
    """A box of a tensor as it was saved: where it begins, its size, and who holds it.

    ``crc`` is of its stored bytes (None: not stated), ``rank`` as the file's name has it.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    crc: int | None = None

    @property
    def rank(self) -> int | None:
        return rank_of(self.file)


def rank_of(file: str) -> int | None:
    """The rank in a file's name; None where it has another name, for names are a custom only."""
    match = _RANK_FILE.match(file)
    if match:
        return int(match[1])
    shard = _SHARD_FILE.match(file)
    return int(shard[1]) - 1 if shard else None


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor under its key. ``scalar`` is its value where it has no dimensions."""

    tensor: Tensor
    parts: tuple[Part, ...]
    scalar: Scalar | None = None


@dataclass
class Contents:
    """All entries of one or more directories. ``home`` is the directory an entry was in."""

    tensors: dict[str, Held] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)
    files_of_objects: dict[str, str] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)
    sources: list[SourceFile] = field(default_factory=list)

    def add(self, other: Contents, root: str) -> None:
        twice = sorted((set(self.tensors) | set(self.objects)) & (set(other.tensors) | set(other.objects)))
        if twice:
            raise UnreadableError(f"{root}: {twice[0]} is saved twice, in two directories.")
        self.tensors |= other.tensors
        self.objects |= other.objects
        self.files_of_objects |= other.files_of_objects
        self.paths |= other.paths
        self.sources += other.sources


def metadata_files(reader: Reader, directory: str) -> list[str]:
    """The metadata files of a directory: one, or one per rank (``use_collectives=False``)."""
    names = reader.list(directory)
    if METADATA in names:
        return [METADATA]
    return sorted(name for name in names if _RANK_METADATA.match(name))


def read_directory(reader: Reader, directory: str) -> Contents:
    """The entries of one DCP directory.

    Raises:
        UnreadableError: there is no metadata, or a file does not hold what it says.
        CoverageError: chunks of a tensor are missing, overlap, or reach outside.
    """
    prefix = f"{directory}/" if directory else ""
    files = metadata_files(reader, directory)
    if not files:
        raise UnreadableError(
            f"{reader.root}/{prefix}{METADATA} is missing: it is written last, so this save was not "
            "finished (or not copied whole). Use an earlier step."
        )
    metadata, copies = _merged([read_metadata(reader, prefix + name) for name in files])
    found = Contents(paths=dict(metadata.paths))
    opened = _open_all(reader, metadata, copies)
    _check_copies(copies, opened)
    for key, entry in metadata.entries.items():
        if isinstance(entry, BytesEntry):
            found.objects[key] = opened[entry.stored].value
            found.files_of_objects[key] = entry.stored.file
        else:
            found.tensors[key] = _held(reader, key, entry, opened)
    found.sources = [_metadata_source(reader, prefix + name) for name in files] + _sources(reader, opened)
    return found


class _Copy(NamedTuple):
    """A chunk that two ranks saved, each for itself."""

    key: str
    kept: Stored
    other: Stored


def _merged(all_metadata: list[Metadata]) -> tuple[Metadata, list[_Copy]]:
    """Rank-local saves know their own chunks only; what several ranks hold is taken once."""
    if len(all_metadata) == 1:
        return all_metadata[0], []
    entries: dict[str, TensorEntry | BytesEntry] = {}
    paths: dict[str, Path] = {}
    copies: list[_Copy] = []
    for metadata in all_metadata:
        paths |= metadata.paths
        for key, entry in metadata.entries.items():
            known = entries.setdefault(key, entry)
            if known is entry or not (isinstance(known, TensorEntry) and isinstance(entry, TensorEntry)):
                continue
            if (known.shape, known.dtype) != (entry.shape, entry.dtype):
                raise MismatchError(f"Ranks disagree on {key}: {known.shape} and {entry.shape}.")
            have = {chunk.offsets: chunk.stored for chunk in known.chunks}
            new = tuple(chunk for chunk in entry.chunks if chunk.offsets not in have)
            copies += [
                _Copy(key, have[chunk.offsets], chunk.stored)
                for chunk in entry.chunks
                if chunk.offsets in have
            ]
            entries[key] = replace(known, chunks=known.chunks + new)
    return Metadata(entries, paths), copies


def _check_copies(copies: Iterable[_Copy], opened: Mapping[Stored, _Opened]) -> None:
    for key, kept, other in copies:
        if opened[kept].crc != opened[other].crc:
            raise MismatchError(
                f"{key} differs between {kept.file} and {other.file}, which both claim the same part of "
                "it. The ranks saved tensors of their own under one name; only they can load them."
            )


class _Opened(NamedTuple):
    """What is needed of an archive: a tensor's record or an object, and where its first element lies."""

    value: Any
    where: str
    fingerprint: str
    offset: int = 0
    crc: int | None = None
    scalar: Scalar | None = None


def _open_all(reader: Reader, metadata: Metadata, copies: Iterable[_Copy]) -> dict[Stored, _Opened]:
    wanted: list[tuple[str, Stored]] = [(copy.key, copy.other) for copy in copies]
    computed = {stored for copy in copies for stored in (copy.kept, copy.other)}
    for key, entry in metadata.entries.items():
        if isinstance(entry, BytesEntry):
            wanted.append((key, entry.stored))
        else:
            wanted += [(key, chunk.stored) for chunk in entry.chunks]

    def open_one(item: tuple[str, Stored]) -> _Opened:
        key, stored = item
        if stored.transforms:
            raise UnreadableError(
                f"{reader.root}/{stored.file}: {key} was written through {', '.join(stored.transforms)}. "
                "Transformed streams are not read; save without `_extensions`, or load and save it once."
            )
        archive = TorchArchive(reader, stored.file, stored.offset, stored.length, extra=_OBJECTS)
        record, fingerprint = archive.root, archive.source.fingerprint
        if not isinstance(record, TensorRecord):
            return _Opened(_object(archive, reader), archive.where, fingerprint)
        scalar = None
        if not record.shape and record.dtype in _NUMBERS:
            scalar = scalar_state(archive, record)
        offset = archive.strided_offset_of(record) if record.numel else 0
        crc = archive.info(f"data/{record.storage.key}").CRC or None
        if stored in computed:
            crc = archive.storage_crc(record)
        return _Opened(record, archive.where, fingerprint, offset, crc, scalar)

    opened = in_threads(open_one, wanted)
    return {stored: one for (_, stored), one in zip(wanted, opened, strict=True)}


def in_threads(one: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Small reads in parallel: on network storage each costs a round trip."""
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        return list(pool.map(one, items))


def _held(reader: Reader, key: str, entry: TensorEntry, opened: Mapping[Stored, _Opened]) -> Held:
    regions: list[Region | Box] = []
    parts: list[Part] = []
    scalar = None
    for chunk in entry.chunks:
        archive = opened[chunk.stored]
        record = archive.value
        if not isinstance(record, TensorRecord):
            raise UnreadableError(f"{archive.where} holds no tensor; {key} should have its part there.")
        if record.shape != chunk.sizes or record.dtype is not entry.dtype:
            raise UnreadableError(
                f"{archive.where} holds {record.dtype} {list(record.shape)}; the metadata says a part of "
                f"{key} of {entry.dtype} {list(chunk.sizes)} is there."
            )
        strides = tuple(stride * record.dtype.itemsize for stride in record.stride)
        file = chunk.stored.file
        box = Box(chunk.offsets, chunk.sizes, (1,) * len(strides), file, archive.offset, strides)
        regions += placed(key, entry.shape, entry.dtype, box)
        parts.append(Part(chunk.offsets, chunk.sizes, file, archive.crc if record.is_contiguous else None))
        scalar = archive.scalar
    tensor = Tensor(key, WEIGHT, entry.shape, entry.dtype, tuple(regions))
    check_coverage(reader.root, tensor)
    return Held(tensor, tuple(parts), scalar)


def placed(key: str, shape: tuple[int, ...], dtype: DType, box: Box) -> list[Region | Box]:
    """The region of a tensor that a chunk makes up; none where the chunk is empty.

    Raises:
        CoverageError: it reaches outside of the tensor.
    """
    inside = len(box.origin) == len(box.counts) == len(shape) and all(
        first + size <= whole for first, size, whole in zip(box.origin, box.counts, shape, strict=True)
    )
    if not inside:
        raise CoverageError(
            f"{key} has shape {list(shape)}; {box.file} claims to hold a part of {list(box.counts)} from "
            f"{list(box.origin)} on, which reaches outside."
        )
    if not math.prod(box.counts):
        return []
    whole = Tensor(key, WEIGHT, shape, dtype, (box,))
    axes = tuple(Axis(dim, 0, size) for dim, size in enumerate(shape))
    return list(take(whole, axes).regions)


def check_coverage(root: str, tensor: Tensor) -> None:
    """Every element lies in exactly one place."""
    try:
        pieces(tensor, 0, tensor.numel)
        check_disjoint(tensor)
    except CoverageError as error:
        raise CoverageError(f"{root}: {error}") from None


def _object(archive: TorchArchive, reader: Reader) -> Any:
    """A pickled object; a BytesIO in it is itself an archive."""
    value = archive.root
    if isinstance(value, Opaque) and value.qualname == "BytesIO":
        data = value.state[0] if isinstance(value.state, tuple) and value.state else None
        if not isinstance(data, bytes):
            raise UnreadableError(f"{archive.where} holds a BytesIO without bytes.")
        inner = TorchArchive(_Memory(reader.root, data), archive.path)
        number = isinstance(inner.root, TensorRecord) and inner.root.numel == 1
        return scalar_state(inner, inner.root).value if number else inner.root
    return archive.describe(value)


class _Memory:
    """Bytes in memory as a one-file directory."""

    def __init__(self, root: str, data: bytes) -> None:
        self.root, self._data = root, data

    def list(self, directory: str = "") -> list[str]:  # noqa: ARG002
        return []

    def is_directory(self, path: str) -> bool:  # noqa: ARG002
        return False

    def signature(self, path: str) -> tuple[int, ...]:  # noqa: ARG002
        return (len(self._data),)

    def size(self, path: str) -> int:  # noqa: ARG002
        return len(self._data)

    def read(self, path: str, offset: int, length: int) -> bytes:  # noqa: ARG002
        return self._data[offset : offset + length]

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:  # noqa: ARG002
        buffer[:] = self._data[offset : offset + len(buffer)]

    def close(self) -> None:
        pass


def _metadata_source(reader: Reader, path: str) -> SourceFile:
    size = reader.size(path)
    return SourceFile(path, size, xxhash.xxh3_64_hexdigest(reader.read(path, 0, size)))


def _sources(reader: Reader, opened: Mapping[Stored, _Opened]) -> list[SourceFile]:
    by_file: dict[str, list[Stored]] = {}
    for stored in sorted(opened):
        by_file.setdefault(stored.file, []).append(stored)
    found = []
    for path, archives in by_file.items():
        digest = xxhash.xxh3_64("".join(opened[stored].fingerprint for stored in archives).encode())
        places = tuple((stored.offset, stored.length) for stored in archives)
        found.append(SourceFile(path, reader.size(path), digest.hexdigest(), places))
    return found
