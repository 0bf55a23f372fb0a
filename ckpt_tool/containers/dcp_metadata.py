"""torch.distributed.checkpoint's ``.metadata``: what a directory of .distcp files holds, and where.

One pickle of ``Metadata`` (torch 2.13, torch/distributed/checkpoint/metadata.py; ``_StorageInfo`` in
filesystem.py). torch itself reads it with ``pickle.load`` and so runs what it says; here its classes are
stand-ins, and anything else in it is refused by name.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ckpt_tool.canonical import DType
from ckpt_tool.containers import pickle_writer, pickles
from ckpt_tool.containers.pickle_records import Named, Opaque, TorchSize, opaque
from ckpt_tool.errors import UnreadableError
from ckpt_tool.limits import LARGEST_METADATA, MOST_DIMENSIONS
from ckpt_tool.storage import Reader

METADATA = ".metadata"
_VERSION = "1.0.0"  # CURRENT_DCP_VERSION, torch/distributed/checkpoint/filesystem.py
_MODULE = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"
_DTYPES = {dtype.torch_name: dtype for dtype in DType}

# torch dtypes that are no canonical ones: let through here, and refused with the tensor's name.
_FURTHER_DTYPES = (
    "uint16 uint32 uint64 complex32 complex64 complex128 float8_e8m0fnu float8_e4m3fnuz float8_e5m2fnuz "
    "float4_e2m1fn_x2 quint8 qint8 qint32"
)


class _Index(Opaque):
    """``MetadataIndex``: the key of ``storage_data``. ``index`` is a hint and not part of it."""

    module = _MODULE
    qualname = "MetadataIndex"
    __slots__ = ()

    def key(self) -> tuple[Any, Any]:
        state = self.state if isinstance(self.state, dict) else {}
        return state.get("fqn"), state.get("offset")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Index) and self.key() == other.key()

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(self.key())


_GLOBALS: Mapping[tuple[str, str], Any] = {
    **pickles.stand_ins(
        {
            _MODULE: "Metadata TensorStorageMetadata TensorProperties ChunkStorageMetadata "
            "BytesStorageMetadata StorageMeta _MEM_FORMAT_ENCODING",
            _FILESYSTEM: "_StorageInfo",
            # TensorProperties.layout: called with 'torch.strided'
            "torch.serialization": "_get_layout",
            # where TensorProperties lived before torch 2.3
            "torch.distributed._shard.sharded_tensor.metadata": "TensorProperties MEM_FORMAT_ENCODING",
            "torch.distributed._shard.metadata": "ShardMetadata",
            # planner_data of Megatron's saves
            "torch.distributed.checkpoint.planner": "SavePlan WriteItem WriteItemType TensorWriteData "
            "LoadItemType",
        }
    ),
    (_MODULE, "MetadataIndex"): _Index,
    **{("torch", name): Named("torch", name) for name in _FURTHER_DTYPES.split()},
}

Path = tuple[str | int, ...]


class Stored(NamedTuple):
    """Where an item lies: ``length`` bytes of ``file`` from ``offset`` on, put through ``transforms``."""

    file: str
    offset: int
    length: int
    transforms: tuple[str, ...] = ()


class Chunk(NamedTuple):
    """A box of a tensor, and where its archive lies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    stored: Stored


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor; ``chunks`` in the order of the metadata, which is that of the ranks."""

    shape: tuple[int, ...]
    dtype: DType
    chunks: tuple[Chunk, ...]
    requires_grad: bool = False


@dataclass(frozen=True, slots=True)
class BytesEntry:
    """A pickled object."""

    stored: Stored


@dataclass(frozen=True, slots=True)
class Metadata:
    """``entries`` by key; ``paths`` are the keys as they were before they were joined with dots."""

    entries: Mapping[str, TensorEntry | BytesEntry]
    paths: Mapping[str, Path] = field(default_factory=dict)


def read_metadata(reader: Reader, path: str) -> Metadata:
    """Read one ``.metadata`` (or ``__<rank>.metadata``) file. Files in it count from its directory.

    Raises:
        UnsafePickleError: it names something that has no business in it.
        UnreadableError: it is damaged, or says things that do not fit together.
    """
    where = f"{reader.root}/{path}"
    size = reader.size(path)
    if size > LARGEST_METADATA:
        raise UnreadableError(
            f"{where} has {size} bytes; metadata of millions of chunks has less than {LARGEST_METADATA}. "
            "It is damaged, or another kind of file."
        )
    root = pickles.loads(reader.read(path, 0, size), where=where, extra=_GLOBALS)
    try:
        state = _state(root, "Metadata")
        storage = {
            index.key(): _stored(info, posixpath.dirname(path))
            for index, info in (state.get("storage_data") or {}).items()
        }
        entries = {
            key: _entry(key, value, storage, where) for key, value in state["state_dict_metadata"].items()
        }
        _check_all_listed(storage, entries, where)
        paths = state.get("planner_data")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnreadableError(
            f"{where} is not what torch.distributed.checkpoint writes ({type(error).__name__}: {error})."
        ) from error
    return Metadata(entries, _paths(paths, entries, where))


def _check_all_listed(
    storage: Mapping[tuple[Any, Any], Stored], entries: Mapping[str, TensorEntry | BytesEntry], where: str
) -> None:
    """Each part that was stored belongs to an entry, and no entry lists a part twice."""
    for key, count in Counter(key for key, _ in storage).items():
        entry = entries.get(key)
        listed = len(entry.chunks) if isinstance(entry, TensorEntry) else int(entry is not None)
        if listed != count:
            raise UnreadableError(
                f"{where}: {count} parts of {key!r} are stored, {listed} are listed. The save is "
                "incomplete, or the file was changed."
            )


def _paths(planner_data: Any, keys: Collection[str], where: str) -> dict[str, Path]:
    """None where the state dict was not flattened; Megatron puts other things here.

    A key is its path joined with dots (torch 2.13, distributed/checkpoint/_nested_dict.py): the file says
    every name twice. A rank's paths may be more than was saved: objects are saved by one rank alone.
    """
    if not isinstance(planner_data, dict):
        return {}
    paths = {
        key: tuple(path)
        for key, path in planner_data.items()
        if isinstance(key, str) and isinstance(path, tuple) and all(isinstance(p, str | int) for p in path)
    }
    other = [key for key in {**planner_data, **dict.fromkeys(keys)} if _joined(paths.get(key)) != key]
    if other and 2 * len(other) < len(planner_data):  # else another planner's, which has its own way
        raise UnreadableError(
            f"{where}: {other[0]!r} is at {paths.get(other[0])!r} in the state dict; a key is its path "
            "joined with dots. The file is damaged; copy it again from where it was saved."
        )
    return paths


def _joined(path: Path | None) -> str | None:
    return None if path is None else ".".join(map(str, path))


def _state(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, Opaque) or value.qualname != name or not isinstance(value.state, dict):
        raise ValueError(f"{value!r} where a {name} belongs")
    return value.state


def _entry(
    key: str, value: Any, storage: Mapping[tuple[Any, Any], Stored], where: str
) -> TensorEntry | BytesEntry:
    if isinstance(value, Opaque) and value.qualname == "BytesStorageMetadata":
        if (key, None) not in storage:
            raise UnreadableError(f"{where}: nothing is stored for {key!r}.")
        return BytesEntry(storage[key, None])
    state = _state(value, "TensorStorageMetadata")
    properties = state["properties"]
    described = properties.state if isinstance(properties, Opaque) else None
    if isinstance(described, tuple):
        named, _, _, memory_format, _ = described
        if not isinstance(memory_format, Opaque) or "MEM_FORMAT" not in memory_format.qualname:
            raise ValueError(f"{memory_format!r} where a memory format belongs")
    else:
        named = _mapping(described)["dtype"]
    shape = _numbers(state["size"])
    if not isinstance(named, Named) or named.name not in _DTYPES:
        raise UnreadableError(f"{where}: {key!r} is of {named!r}, a dtype that is not supported.")
    chunks = []
    for chunk in state["chunks"]:
        box = _state(chunk, "ChunkStorageMetadata")
        offsets, sizes = _numbers(box["offsets"]), _numbers(box["sizes"])
        if (key, offsets) not in storage:
            raise UnreadableError(
                f"{where}: no file holds the part of {key!r} at {list(offsets)}. A part is missing."
            )
        chunks.append(Chunk(offsets, sizes, storage[key, offsets]))
    return TensorEntry(shape, _DTYPES[named.name], tuple(chunks))


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} where properties belong")
    return value


def _numbers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > MOST_DIMENSIONS:
        raise ValueError(
            f"{type(value).__name__} where sizes of at most {MOST_DIMENSIONS} dimensions belong"
        )
    if any(type(item) is not int or not 0 <= item < 1 << 63 for item in value):
        raise ValueError(f"{value!r} where sizes belong")
    return tuple(value)


def _stored(value: Any, directory: str) -> Stored:
    if isinstance(value, Opaque) and value.qualname != "_StorageInfo":
        raise ValueError(f"stored as {value.qualname}")
    state = _state(value, "_StorageInfo")
    path, offset, length = state["relative_path"], state["offset"], state["length"]
    if not isinstance(path, str) or path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"a file outside the checkpoint: {path!r}")
    if type(offset) is not int or type(length) is not int or offset < 0 or length < 0:
        raise ValueError(f"bytes {offset!r} + {length!r} of {path}")
    transforms = state.get("transform_descriptors") or ()
    return Stored(posixpath.join(directory, path), offset, length, tuple(map(str, transforms)))


# ---- writing


def metadata_bytes(metadata: Metadata) -> bytes:
    """The same as a pickle that torch reads; ``Stored.file`` counts from the metadata's directory."""
    listed: dict[str, Any] = {}
    storage: dict[_Index, Opaque] = {}
    for key, entry in metadata.entries.items():
        if isinstance(entry, BytesEntry):
            listed[key] = opaque(_MODULE, "BytesStorageMetadata")
            storage[_index(key, None, None)] = _storage_info(entry.stored)
            continue
        listed[key] = _tensor_metadata(entry)
        for number, chunk in enumerate(entry.chunks):
            storage[_index(key, chunk.offsets, number)] = _storage_info(chunk.stored)
    state = {
        "state_dict_metadata": listed,
        "planner_data": dict(metadata.paths),
        "storage_data": storage,
        "storage_meta": opaque(
            _MODULE,
            "StorageMeta",
            state={"checkpoint_id": None, "save_id": None, "load_id": None, "modules": []},
        ),
        "version": _VERSION,
    }
    return pickle_writer.dumps(opaque(_MODULE, "Metadata", state=state))


def _index(key: str, offsets: Sequence[int] | None, number: int | None) -> _Index:
    index = _Index()
    size = None if offsets is None else TorchSize(offsets)
    index.state = {"fqn": key, "index": number, "offset": size}
    return index


def _storage_info(stored: Stored) -> Opaque:
    state = {"relative_path": stored.file, "offset": stored.offset, "length": stored.length}
    return opaque(_FILESYSTEM, "_StorageInfo", state=state)


def _tensor_metadata(entry: TensorEntry) -> Opaque:
    properties = (
        Named("torch", entry.dtype.torch_name),
        opaque("torch.serialization", "_get_layout", "torch.strided"),
        entry.requires_grad,
        opaque(_MODULE, "_MEM_FORMAT_ENCODING", 0),
        False,
    )
    chunks = [
        opaque(
            _MODULE,
            "ChunkStorageMetadata",
            state={"offsets": TorchSize(chunk.offsets), "sizes": TorchSize(chunk.sizes)},
        )
        for chunk in entry.chunks
    ]
    state = {
        "properties": opaque(_MODULE, "TensorProperties", state=properties),
        "size": TorchSize(entry.shape),
        "chunks": chunks,
    }
    return opaque(_MODULE, "TensorStorageMetadata", state=state)
