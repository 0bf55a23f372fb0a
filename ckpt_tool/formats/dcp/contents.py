"""What the files of a DCP checkpoint hold: tensors and objects by key, before anybody knows what they mean.

Every chunk's archive is opened once: its shape, dtype and strides are checked against ``.metadata``, and
so is coverage, because torch itself loads on in silence where a chunk is missing
(torch/distributed/checkpoint/default_planner.py validates at save only, and only with several ranks).
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

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
from ckpt_tool.containers.pickle_records import Opaque, TensorRecord, Unread
from ckpt_tool.containers.torch_zip import TorchArchive
from ckpt_tool.errors import CoverageError, MismatchError, UnreadableError
from ckpt_tool.formats.deepspeed.facts.scalars import scalar_state
from ckpt_tool.geometry import Axis, check_disjoint, pieces, take
from ckpt_tool.limits import first_missing
from ckpt_tool.storage import Reader, Token, read_each
from ckpt_tool.wrappers import WRAPPERS, saved_names, unwrapped

_RANK_FILE = re.compile(r"(?:.*/)?__(\d{1,6})_\d{1,6}\.distcp$")
_SHARD_FILE = re.compile(r"(?:.*/)?shard-(\d{1,6})-model-\d{1,6}-of-\d{1,6}\.safetensors$")
_RANK_METADATA = re.compile(r"__(\d{1,6})\.metadata$")
# The largest pickle of an object that is read: the names of a model with an entry for each of its experts
# take some MiB. What is larger is copied as it lies there, or refused where its value is needed.
_LARGEST_OBJECT = 16 << 20
# What a 0-d tensor is read as a number of: steps and learning rates.
_NUMBERS = (DType.float32, DType.float64, DType.int64, DType.int32)

# Older torchtitan pickled its train_state as BytesIO objects (torchtitan/train.py before 2025).
_OBJECTS = pickles.stand_ins({"_io": "BytesIO"})


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
    """All entries of one or more directories. ``objects`` may be ``Unread``; ``archives`` says where they
    lie. ``saved`` has the keys and paths of the entries whose keys here are without the parts that wrappers
    add. ``notes`` are on what ranks did not agree on."""

    tensors: dict[str, Held] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)
    archives: dict[str, Stored] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)
    saved: dict[str, tuple[str, Path]] = field(default_factory=dict)
    sources: list[SourceFile] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, other: Contents, root: str) -> None:
        twice = sorted((set(self.tensors) | set(self.objects)) & (set(other.tensors) | set(other.objects)))
        if twice:
            raise UnreadableError(f"{root}: {twice[0]} is saved twice, in two directories.")
        self.tensors |= other.tensors
        self.objects |= other.objects
        self.archives |= other.archives
        self.paths |= other.paths
        self.saved |= other.saved
        self.sources += other.sources
        self.notes += other.notes

    def without_wrappers(self, root: str) -> Contents:
        """The same under keys and paths without the parts that wrappers add; raises UnreadableError where
        two keys become one."""
        changed = saved_names([*self.tensors, *self.objects], root)
        if not changed:
            return self
        return replace(
            self,
            tensors={unwrapped(key): held for key, held in self.tensors.items()},
            objects={unwrapped(key): value for key, value in self.objects.items()},
            archives={unwrapped(key): stored for key, stored in self.archives.items()},
            paths={unwrapped(key): _unwrapped_path(path) for key, path in self.paths.items()},
            saved={plain: (key, self.paths.get(key, (key,))) for plain, key in changed.items()},
        )


def _unwrapped_path(path: Path) -> Path:
    *parents, last = path
    kept = [unwrapped(part) if isinstance(part, str) else part for part in parents if part not in WRAPPERS]
    return (*kept, unwrapped(last) if isinstance(last, str) else last)


def metadata_files(reader: Reader, directory: str) -> list[str]:
    """The metadata files of a directory: one, or one per rank (``use_collectives=False``)."""
    names = reader.list(directory)
    if METADATA in names:
        return [METADATA]
    by_rank = {int(match[1]): name for name in names if (match := _RANK_METADATA.match(name))}
    return [by_rank[rank] for rank in sorted(by_rank)]


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
    _check_ranks(f"{reader.root}/{prefix}", files)
    metadata, copies = _merged([read_metadata(reader, prefix + name) for name in files])
    found = Contents(paths=dict(metadata.paths))
    opened = _open_all(reader, metadata, copies)
    found.notes = _check_copies(copies, opened)
    for key, entry in metadata.entries.items():
        if isinstance(entry, BytesEntry):
            found.objects[key] = opened[entry.stored].value
            found.archives[key] = entry.stored
        else:
            found.tensors[key] = _held(reader, key, entry, opened)
    found.sources = [_metadata_source(reader, prefix + name) for name in files] + _sources(reader, opened)
    return found.without_wrappers(reader.root)


def _check_ranks(where: str, files: list[str]) -> None:
    """Each rank that saved for itself has a metadata file; the highest tells how many there are."""
    ranks = [int(match[1]) for name in files if (match := _RANK_METADATA.match(name))]
    missing = first_missing(ranks, max(ranks, default=-1) + 1)
    if missing is not None:
        raise UnreadableError(
            f"{where}__{missing}.metadata is missing, while that of rank {max(ranks)} is there: what "
            f"rank {missing} saved is lost or was not copied. Copy the directory whole, or use an "
            "earlier step."
        )


class _Copy(NamedTuple):
    """A chunk or an object that two ranks saved, each for itself."""

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
            if known is entry:
                continue
            if isinstance(known, BytesEntry) and isinstance(entry, BytesEntry):
                copies.append(_Copy(key, known.stored, entry.stored))
                continue
            if isinstance(known, BytesEntry) or isinstance(entry, BytesEntry):
                raise MismatchError(f"Ranks disagree on {key}: a tensor for some, an object for others.")
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


def _check_copies(copies: Iterable[_Copy], opened: Mapping[Stored, _Opened]) -> list[str]:
    """Notes on the objects that differ; tensors and parameter groups must not."""
    differing: dict[str, None] = {}
    for key, kept, other in copies:
        one, another = opened[kept], opened[other]
        if (one.crc, one.digest) == (another.crc, another.digest):
            continue
        if isinstance(one.value, TensorRecord) or isinstance(another.value, TensorRecord):
            raise MismatchError(
                f"{key} differs between {kept.file} and {other.file}, which both claim the same part of "
                "it. The ranks saved tensors of their own under one name; only they can load them."
            )
        if ".param_groups." in f".{key}":
            raise MismatchError(
                f"{key} differs between {kept.file} and {other.file}: the ranks do not agree on the "
                "options of the optimizer, and ckpt-tool does not choose."
            )
        differing[key] = None
    return [f"{key} differs by rank; that of the first rank is taken." for key in differing]


class _Opened(NamedTuple):
    """What is needed of an archive: a tensor's record or an object, and where its first element lies.

    ``crc`` and ``digest`` (of an object) are alike for copies of the same. ``stored`` and ``read``
    are those of ``SourceFile``, of a tensor.
    """

    value: Any
    where: str
    fingerprint: str
    offset: int = 0
    crc: int | None = None
    scalar: Scalar | None = None
    digest: str | int | None = None
    stored: Sequence[int] = ()
    read: Sequence[int] = ()


def _open_all(reader: Reader, metadata: Metadata, copies: Iterable[_Copy]) -> dict[Stored, _Opened]:
    wanted: list[tuple[str, Stored]] = [(copy.key, copy.other) for copy in copies]
    computed = {stored for copy in copies for stored in (copy.kept, copy.other)}
    for key, entry in metadata.entries.items():
        if isinstance(entry, BytesEntry):
            wanted.append((key, entry.stored))
        else:
            wanted += [(key, chunk.stored) for chunk in entry.chunks]
    _check_apart(reader.root, wanted)

    def open_one(item: tuple[str, Stored]) -> _Opened:
        key, stored = item
        if stored.transforms:
            raise UnreadableError(
                f"{reader.root}/{stored.file}: {key} was written through {', '.join(stored.transforms)}. "
                "Transformed streams are not read; save without `_extensions`, or load and save it once."
            )
        archive = TorchArchive(
            reader, stored.file, stored.offset, stored.length, extra=_OBJECTS, largest=_LARGEST_OBJECT
        )
        record, fingerprint = archive.root, archive.source.fingerprint
        if not isinstance(record, TensorRecord):
            digest = _digest(archive) if stored in computed else None
            return _Opened(_object(archive, reader), archive.where, fingerprint, digest=digest)
        source = archive.source
        scalar = None
        if not record.shape and record.dtype in _NUMBERS:
            scalar = scalar_state(archive, record)
        offset = archive.strided_offset_of(record) if record.numel else 0
        crc = archive.info(f"data/{record.storage.key}").CRC or None
        if stored in computed:
            crc = archive.storage_crc(record)
        return _Opened(
            record, archive.where, fingerprint, offset, crc, scalar, None, source.stored, source.read
        )

    opened = read_each(open_one, wanted)
    return {stored: one for (_, stored), one in zip(wanted, opened, strict=True)}


def _check_apart(root: str, wanted: Iterable[tuple[str, Stored]]) -> None:
    """No two entries lie on the same bytes: each was written for itself."""
    by_place = sorted(wanted, key=lambda item: item[1])
    for (key, stored), (next_key, following) in pairwise(by_place):
        if stored.file == following.file and stored.offset + stored.length > following.offset:
            raise UnreadableError(
                f"{root}/{stored.file}: the metadata says that {key} ends at byte "
                f"{stored.offset + stored.length} and {next_key} begins at byte {following.offset}. They "
                "overlap: the metadata is damaged or was changed. Copy it again from where it was saved."
            )


def _digest(archive: TorchArchive) -> str | int:
    """Equal for equal objects."""
    if isinstance(archive.root, Unread):
        return archive.record_crc("data.pkl")
    return archive.digest(archive.root)


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
    """A pickled object. A BytesIO is itself an archive: of a number in older torchtitan; one of tensors,
    as modules have in their ``_extra_state``, is not looked into."""
    value = archive.root
    if isinstance(value, Unread):
        return value
    if isinstance(value, Opaque) and value.qualname == "BytesIO":
        data = value.state[0] if isinstance(value.state, tuple) and value.state else None
        if not isinstance(data, bytes):
            raise UnreadableError(f"{archive.where} holds a BytesIO without bytes.")
        inner = TorchArchive(_Memory(reader.root, data), archive.path)
        number = isinstance(inner.root, TensorRecord) and inner.root.numel == 1
        if number and inner.root.dtype in _NUMBERS:
            return scalar_state(inner, inner.root).value
        return Unread(len(data)) if holds_stored(inner.root) else inner.root
    return archive.describe(value)


def holds_stored(value: Any) -> bool:
    """Whether there is something in a value that must be copied from a file."""
    if isinstance(value, Tensor | TensorRecord | Unread):
        return True
    if isinstance(value, dict):
        return any(map(holds_stored, value.values()))
    if isinstance(value, Opaque):
        return holds_stored(value.args) or holds_stored(value.state)
    return isinstance(value, list | tuple) and any(map(holds_stored, value))


class _Memory:
    """Bytes in memory as a one-file directory."""

    def __init__(self, root: str, data: bytes) -> None:
        self.root, self._data = root, data

    def list(self, directory: str = "") -> list[str]:  # noqa: ARG002
        return []

    def is_directory(self, path: str) -> bool:  # noqa: ARG002
        return False

    def changed(self) -> str | None:
        return None

    def states(self) -> Mapping[str, Token]:
        return {}

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
        stored_bytes = array("q", [n for one in archives for n in opened[one].stored])
        read = array("q", [n for one in archives for n in opened[one].read])
        found.append(SourceFile(path, reader.size(path), digest.hexdigest(), places, stored_bytes, read))
    return found
