"""The zip archives that ``torch.save`` writes: reading their directory, and laying out new ones.

An archive holds stored (uncompressed) records below one top folder: ``data.pkl``, one ``data/<key>``
per storage, ``version``, and a few markers (torch 2.13, torch/serialization.py and
caffe2/serialize/inline_container.cc). A storage's bytes therefore lie in one piece in the file.
"""

from __future__ import annotations

import binascii
import struct
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ckpt_tool.accounting import Bytes
from ckpt_tool.canonical import DType, Region, Tensor, contiguous
from ckpt_tool.containers import pickle_writer, pickles
from ckpt_tool.containers.alike import Alike
from ckpt_tool.containers.pickle_records import (
    LEAVES,
    Opaque,
    StorageRecord,
    TensorRecord,
    Unread,
    check_spelled_out,
    has_storage,
    map_containers,
    tensor_records,
)
from ckpt_tool.containers.pickle_writer import Spelled
from ckpt_tool.containers.stored_zip import LOCAL_HEADER, StoredZip
from ckpt_tool.errors import UnreadableError
from ckpt_tool.geometry import row_major
from ckpt_tool.layout import IN_OBJECT, CrcSlot, Fill, Literal, Slot, TargetFile, whole
from ckpt_tool.limits import LARGEST_PICKLE
from ckpt_tool.storage import Reader

_CENTRAL_HEADER = struct.Struct("<4s6H3I5H2I")
_ALIGNMENT = 64  # torch aligns storages to this, relative to the start of the archive
_ZIP64_LIMIT = 0xFFFFFFFF


class TorchArchive(StoredZip):
    """One file written by ``torch.save``, known by its directory; data is only described.

    ``root`` is what was saved, tensors as ``TensorRecord``. ``offset`` and ``length`` say where in the file
    the archive lies: a .distcp file is many archives back to back. ``extra`` is passed on to
    ``pickles.loads``. A pickle of more than ``largest`` bytes is not read; ``root`` says so (``Unread``).
    ``alike`` reads the pickles of many archives that have much in common; nobody may change ``root`` then.
    ``compared`` says that another archive has the values that are taken, and this one's are compared.

    Raises:
        UnreadableError: the file is missing, truncated, or no torch archive.
        UnsafePickleError: its pickle names something a checkpoint has no business naming.
    """

    def __init__(
        self,
        reader: Reader,
        path: str,
        offset: int = 0,
        length: int | None = None,
        *,
        extra: Mapping[tuple[str, str], Any] | None = None,
        largest: int | None = None,
        alike: Alike | None = None,
        compared: bool = False,
    ) -> None:
        self.compared = compared
        self._views = False
        super().__init__(reader, path, offset, length)
        if "byteorder" in self.records and self.read_record("byteorder") != b"little":
            raise UnreadableError(f"{self.where} was saved on a big-endian machine; not supported.")
        size = self.info("data.pkl").file_size
        if largest is not None and size > largest:
            self.root: Any = Unread(size)
            return
        if size > LARGEST_PICKLE:
            raise UnreadableError(
                f"{self.where}: its pickle has {size} bytes; at most {LARGEST_PICKLE} are read. The file "
                "is damaged, or holds data that torch.save was not given as tensors."
            )
        data = self._checked_record("data.pkl")
        if alike is not None:
            self.root = alike.loads(data, where=self.where)
            return
        self.root = pickles.loads(data, where=self.where, extra=extra)
        check_spelled_out(self.root, size, self.where)

    def _checked_record(self, name: str) -> bytes:
        """The bytes of a small record; they have the CRC-32 that the archive states, unless that is 0."""
        data, stated = self.read_record(name), self.info(name).CRC
        if stated and binascii.crc32(data) != stated:
            raise UnreadableError(
                f"{self.where}: record {name} is not what its checksum says. The file is damaged; copy it "
                "again from where it was saved."
            )
        return data

    def storage_crc(self, record: TensorRecord) -> int:
        """The CRC-32 of a tensor's storage: as the archive states it, else computed. In an archive whose
        tensors are only ``compared`` that accounts for it."""
        if self.compared:
            self.account_for(f"data/{record.storage.key}")
        return self.record_crc(f"data/{record.storage.key}")

    def offset_of(self, record: TensorRecord) -> int:
        """Byte offset of a contiguous tensor's first element in the file.

        Raises:
            UnreadableError: the record is shorter than the storage, or the tensor is not contiguous.
        """
        self.require_contiguous(record)
        return self.strided_offset_of(record)

    def require_contiguous(self, record: TensorRecord) -> None:
        """Raises UnreadableError where a tensor is not contiguous."""
        if not record.is_contiguous:
            raise UnreadableError(
                f"{self.where}: a tensor of shape {record.shape} is stored with strides "
                f"{record.stride}; only contiguous tensors are read here."
            )

    def offsets_of(self, records: Iterable[TensorRecord]) -> array[int]:
        """``strided_offset_of`` of each; 0 for a tensor of no elements."""
        return array("q", [self.strided_offset_of(one) if one.numel else 0 for one in records])

    def strided_offset_of(self, record: TensorRecord) -> int:
        """The same for a tensor of any strides."""
        storage = record.storage
        name = f"data/{storage.key}"
        itemsize = 1 if storage.dtype is None else storage.dtype.itemsize
        if self.info(name).file_size != storage.numel * itemsize:
            raise UnreadableError(
                f"{self.where}: record {name} has {self.info(name).file_size} bytes; its tensor "
                f"needs {storage.numel * itemsize}. The file is damaged; copy it again from where it was "
                "saved."
            )
        if record.numel * record.dtype.itemsize != storage.numel * itemsize and not self._views:
            self._find_views()
        return self.record_offset(name) + record.offset * record.dtype.itemsize

    def _find_views(self) -> None:
        """torch saves whole storages: of one that no tensor covers, the rest belongs to nobody. It is noted
        as accounted for, once all tensors in the archive are known."""
        self._views = True
        held = Bytes()
        for record in tensor_records(self.root):
            if record.numel:
                start = record.offset * record.dtype.itemsize
                steps = zip(record.shape, record.stride, strict=True)
                last = sum((count - 1) * stride for count, stride in steps)
                end = start + (last + 1) * record.dtype.itemsize
                held.add(record.storage.key, start, end)
        for key in {record.storage.key for record in tensor_records(self.root) if record.numel}:
            name = f"data/{key}"
            at, size = self.record_offset(name), self.info(name).file_size
            for start, end in held.gaps(key, size):
                self.account_for_bytes(at + start, end - start)

    def read_tensor(self, record: TensorRecord) -> bytes:
        """The bytes of a small contiguous tensor, which are accounted for."""
        self.account_for(f"data/{record.storage.key}")
        return self._reader.read(self.path, self.offset_of(record), record.numel * record.dtype.itemsize)

    def describe(self, value: Any) -> Any:
        """``value`` with its tensors as ``Tensor``, so that they are streamed like all others."""
        if isinstance(value, TensorRecord):
            return self.tensor("client_state", "weight", value)
        return map_containers(value, self.describe)

    def carried(self, value: Any) -> Any:
        """The same of an object that goes on, or is left out, as a whole: its tensors are accounted for."""
        self.account_for_tensors(value)
        return self.describe(value)

    def account_for_tensors(self, value: Any) -> None:
        """``account_for`` the storages of all tensors in ``value``."""
        for record in tensor_records(value):
            if record.storage.numel:
                self.account_for(f"data/{record.storage.key}")

    def digest(self, value: Any) -> str:
        """A text equal for equal values; tensors compare by the CRC-32 of their storage."""
        if isinstance(value, TensorRecord):
            crc = self.storage_crc(value)
            return f"tensor({value.dtype}, {value.shape}, {value.stride}, {value.offset}, {crc})"
        if isinstance(value, dict):
            items = (f"{key!r}: {self.digest(item)}" for key, item in value.items())
            return "{" + ", ".join(items) + "}"
        if isinstance(value, list | tuple):
            return f"{type(value).__name__}({', '.join(map(self.digest, value))})"
        if isinstance(value, Opaque):
            return f"{value.module}.{value.qualname}{self.digest((value.args, value.state))}"
        return repr(value)

    def tensor(self, name: str, state: str, record: TensorRecord) -> Tensor:
        """A whole contiguous tensor of this file as a canonical one."""
        regions: tuple[Region, ...] = ()
        if record.numel:
            regions = contiguous(record.shape, self.path, self.offset_of(record))
        return Tensor(name, state, record.shape, record.dtype, regions)


@dataclass(frozen=True, slots=True)
class Inline:
    """A small tensor whose bytes are known, such as a ``step``."""

    data: bytes
    shape: tuple[int, ...]
    dtype: DType


@dataclass(frozen=True, slots=True)
class Flat:
    """A one-dimensional tensor put together from ``parts`` in order; a number is so many zero elements.

    ``requires_grad`` and ``attributes`` (its ``__dict__``) are stored with it.
    """

    parts: tuple[Slot | int, ...]
    dtype: DType
    requires_grad: bool = False
    attributes: Mapping[str, Any] | None = None

    @property
    def numel(self) -> int:
        return sum(part if isinstance(part, int) else part.numel for part in self.parts)


class Constant:
    """A part of the objects of many archives that is the same in all of them: spelled out once, by the
    number of its first tensor. ``value`` must not change any more."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self._known: dict[int, tuple[Spelled, list[_Payload]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"value": self.value, "_known": {}}  # it is spelled out again where it arrives

    def resolved(self, payloads: list[_Payload]) -> Spelled:
        """As it stands in a pickle; its tensors join ``payloads``."""
        first = len(payloads)
        known = self._known.get(first)
        if known is None:
            own = list(payloads)
            part = pickle_writer.spelled(_resolve(self.value, own))
            known = self._known[first] = (part, own[first:])
        payloads += known[1]
        return known[0]


def torch_file(path: str, value: Any, *, zip64_limit: int = _ZIP64_LIMIT) -> TargetFile:
    """The layout of an archive that ``torch.load`` reads as ``value``.

    ``value`` may hold ``Slot``, ``Inline``, ``Flat`` and whole ``Tensor`` wherever a tensor belongs, and
    ``Constant`` parts. A ``Tensor`` is part of the object (``IN_OBJECT``). The same value always gives
    the same bytes.
    """
    return TorchFiles(zip64_limit=zip64_limit).file(path, value)


class TorchFiles:
    """Lays out archives like ``torch_file``. Of those whose pickles have one length and whose tensors one
    size each, what stands around these is made once."""

    def __init__(self, *, zip64_limit: int = _ZIP64_LIMIT) -> None:
        self._limit = zip64_limit
        self._known: dict[Any, _Skeleton] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_limit": self._limit, "_known": {}}

    def file(self, path: str, value: Any) -> TargetFile:
        """The layout of an archive that ``torch.load`` reads as ``value``."""
        payloads: list[_Payload] = []
        pickled = pickle_writer.dumps(_resolve(value, payloads))
        form = (len(pickled), *map(_form, payloads))
        known = self._known.get(form)
        if known is not None:
            return known.filled(path, pickled, payloads)
        builder = _ZipBuilder(self._limit)
        at = builder.literal("archive/data.pkl", pickled)
        builder.literal("archive/byteorder", b"little")
        for key, payload in enumerate(payloads):
            name = f"archive/data/{key}"
            if isinstance(payload, Inline):
                builder.literal(name, payload.data)
            else:
                builder.fill(name, _parts(payload), payload.dtype)
        builder.literal("archive/version", b"3\n")
        file = builder.finish(path)
        while len(self._known) >= _MOST_SKELETONS:
            self._known.pop(next(iter(self._known)), None)
        self._known[form] = _Skeleton(file, at, builder.directory_at)
        return file


_MOST_SKELETONS = 8
_Payload = Slot | Inline | Flat


def _parts(payload: Slot | Flat) -> Sequence[Slot | int]:
    return payload.parts if isinstance(payload, Flat) else (payload,)


def _form(payload: _Payload) -> Any:
    """Equal for what takes the same room, and for the same bytes."""
    if isinstance(payload, Inline):
        return payload.data
    parts = tuple(~part if isinstance(part, int) else part.numel for part in _parts(payload))
    return (payload.dtype, parts)


@dataclass(frozen=True, slots=True)
class _Skeleton:
    """An archive that others are like: ``at`` says where its pickle lies, ``directory_at`` where the
    directory begins."""

    file: TargetFile
    at: _At
    directory_at: int

    def filled(self, path: str, pickled: bytes, payloads: Sequence[_Payload]) -> TargetFile:
        """The same archive with another pickle and other tensors of the same sizes."""
        crc = struct.pack("<I", binascii.crc32(pickled))
        literals = list(self.file.literals)
        changes = [
            (self.at.crc, crc),
            (self.at.data, pickled),
            (self.directory_at + self.at.central_crc, crc),
        ]
        for offset, data in changes:
            index = next(i for i in reversed(range(len(literals))) if literals[i].offset <= offset)
            whole, at = literals[index].data, offset - literals[index].offset
            literals[index] = Literal(literals[index].offset, whole[:at] + data + whole[at + len(data) :])
        slots = [
            (slot, payload.dtype)
            for payload in payloads
            if not isinstance(payload, Inline)
            for slot in _parts(payload)
            if not isinstance(slot, int)
        ]
        fills = tuple(
            Fill(fill.offset, slot.tensor, slot.start, slot.numel, dtype, slot.copy)
            for fill, (slot, dtype) in zip(self.file.fills, slots, strict=True)
        )
        return TargetFile(path, self.file.size, tuple(literals), fills, self.file.crc_slots)


def _resolve(value: Any, payloads: list[_Payload]) -> Any:
    """``value`` with every tensor to be written turned into a record of its future place."""
    if type(value) in LEAVES:
        return value
    if isinstance(value, Constant):
        return value.resolved(payloads)
    if isinstance(value, Tensor):
        value = whole(value, copy=IN_OBJECT)
    if isinstance(value, Flat):
        key, numel = str(len(payloads)), value.numel
        payloads.append(value)
        storage = _storage(key, value.dtype, numel)
        attributes = None if value.attributes is None else dict(value.attributes)
        return TensorRecord(storage, value.dtype, 0, (numel,), (1,), value.requires_grad, attributes)
    if isinstance(value, Slot | Inline):
        key = str(len(payloads))
        payloads.append(value)
        numel = value.numel if isinstance(value, Slot) else len(value.data) // value.dtype.itemsize
        return TensorRecord(
            _storage(key, value.dtype, numel), value.dtype, 0, value.shape, row_major(value.shape, 1)
        )
    if isinstance(value, TensorRecord):
        raise TypeError("a tensor of another archive; give its Tensor")
    return map_containers(value, lambda item: _resolve(item, payloads))


def _storage(key: str, dtype: DType, numel: int) -> StorageRecord:
    """torch has no storage class for its newer dtypes; those lie in untyped storages."""
    if has_storage(dtype):
        return StorageRecord(key, dtype, numel)
    return StorageRecord(key, None, numel * dtype.itemsize)


class _At(NamedTuple):
    """Where a record's data and its CRC lie in the file, and the latter's copy in the directory."""

    data: int
    crc: int
    central_crc: int


class _ZipBuilder:
    """Stored zip records, data 64-byte aligned, CRC-32 in the headers and no data descriptors."""

    def __init__(self, zip64_limit: int) -> None:
        self._limit = zip64_limit
        self._literals: list[tuple[int, bytearray]] = []
        self._fills: list[Fill] = []
        self._slots: list[CrcSlot] = []
        self._central = bytearray()
        self._central_slots: list[CrcSlot] = []  # positions within ``_central``
        self._count = 0
        self._position = 0
        self.directory_at = 0

    def literal(self, name: str, data: bytes) -> _At:
        crc_at, central_crc_at = self._header(name, len(data), binascii.crc32(data))
        start = self._position
        self._put(data)
        return _At(start, crc_at, central_crc_at)

    def fill(self, name: str, slots: Sequence[Slot | int], dtype: DType) -> None:
        nbytes = sum(slot * dtype.itemsize if isinstance(slot, int) else slot.nbytes for slot in slots)
        crc_at, central_crc_at = self._header(name, nbytes, 0)
        parts: list[int | bytes] = []
        for slot in slots:
            if isinstance(slot, int):
                zeros = bytes(slot * dtype.itemsize)
                parts.append(zeros)
                self._put(zeros)
            else:
                parts.append(len(self._fills))
                fill = Fill(self._position, slot.tensor, slot.start, slot.numel, dtype, slot.copy)
                self._fills.append(fill)
                self._position += fill.nbytes
        self._slots.append(CrcSlot(crc_at, tuple(parts)))
        self._central_slots.append(CrcSlot(central_crc_at, tuple(parts)))

    def _header(self, name: str, size: int, crc: int) -> tuple[int, int]:
        """Write both headers of a record; return the positions of its two CRC fields."""
        encoded = name.encode()
        start = self._position
        large, far = size >= self._limit, start >= self._limit
        zip64 = struct.pack("<HHQQ", 1, 16, size, size) if large else b""
        # the rest of the way to the alignment is an extra field that readers skip ("FB", as torch)
        fixed = start + LOCAL_HEADER.size + len(encoded) + len(zip64) + 4
        padding = -fixed % _ALIGNMENT
        extra = zip64 + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        stated = _ZIP64_LIMIT if large else size
        version = 45 if large or far else 20
        self._put(
            LOCAL_HEADER.pack(
                b"PK\x03\x04", version, 0x800, 0, 0, 0x21, crc, stated, stated,
                len(encoded), len(extra),
            )
            + encoded
            + extra
        )  # fmt: skip
        fields = ([size, size] if large else []) + ([start] if far else [])
        central_extra = struct.pack(f"<HH{len(fields)}Q", 1, 8 * len(fields), *fields) if fields else b""
        central_crc_at = len(self._central) + 16
        self._central += (
            _CENTRAL_HEADER.pack(
                b"PK\x01\x02", version, version, 0x800, 0, 0, 0x21, crc, stated, stated,
                len(encoded), len(central_extra), 0, 0, 0, 0,
                _ZIP64_LIMIT if far else start,
            )
            + encoded
            + central_extra
        )  # fmt: skip
        self._count += 1
        return start + 14, central_crc_at

    def _put(self, data: bytes) -> None:
        if self._literals and self._literals[-1][0] + len(self._literals[-1][1]) == self._position:
            self._literals[-1][1].extend(data)
        else:
            self._literals.append((self._position, bytearray(data)))
        self._position += len(data)

    def finish(self, path: str) -> TargetFile:
        start, size = self._position, len(self._central)
        self.directory_at = start
        self._slots += [CrcSlot(start + slot.offset, slot.parts) for slot in self._central_slots]
        self._put(bytes(self._central))
        many = self._count >= 0xFFFF
        if start >= self._limit or many:
            self._put(
                struct.pack(
                    "<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0,
                    self._count, self._count, size, start,
                )
                + struct.pack("<4sIQI", b"PK\x06\x07", 0, start + size, 1)
            )  # fmt: skip
        self._put(
            struct.pack(
                "<4s4H2IH", b"PK\x05\x06", 0, 0,
                min(self._count, 0xFFFF), min(self._count, 0xFFFF), size,
                _ZIP64_LIMIT if start >= self._limit else start, 0,
            )
        )  # fmt: skip
        literals = tuple(Literal(offset, bytes(data)) for offset, data in self._literals)
        return TargetFile(path, self._position, literals, tuple(self._fills), tuple(self._slots))
