"""torch.save without tensor bytes: pickle and zip as torch 2.13 writes them, storages as holes of the file.

``save(path, value)`` takes the same object ``torch.save`` takes, with ``Hole`` in place of large tensors.
Real (small) tensors are written with their bytes. CRC-32s of holes are those of zeros, so that
``torch.load`` and every checksum accept the file. ``check()`` compares it with torch.save byte by byte.
"""

from __future__ import annotations

import binascii
import functools
import io
import os
import pickle
import struct
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from isal import isal_zlib

_LOCAL, _CENTRAL = struct.Struct("<4s5H3I2H"), struct.Struct("<4s6H3I5H2I")
_LIMIT, _ALIGN = 0xFFFFFFFF, 64


@functools.cache
def zero_crc(length: int) -> int:
    """The CRC-32 of ``length`` zero bytes."""
    if length <= 4096:
        return binascii.crc32(bytes(length))
    half = length // 2
    return isal_zlib.crc32_combine(zero_crc(length - half), zero_crc(half), half)


class Store:
    """A storage of zeros that is not there."""

    def __init__(self, numel: int, dtype: torch.dtype = torch.float32) -> None:
        self.numel, self.dtype = numel, dtype

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Hole:
    """A contiguous tensor of zeros whose storage is a hole; ``attributes`` as of a leaf with a __dict__."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        *,
        requires_grad: bool = False,
        attributes: Mapping[str, Any] | None = None,
        store: Store | None = None,
    ) -> None:
        numel = 1
        strides: list[int] = []
        for size in reversed(shape):
            strides.insert(0, numel)
            numel *= size
        self.shape, self.strides, self.requires_grad = shape, tuple(strides), requires_grad
        self.attributes, self.store = attributes, store or Store(numel, dtype)

    def __reduce_ex__(self, protocol: int) -> Any:
        args = (self.store, 0, self.shape, self.strides, self.requires_grad, OrderedDict())
        if self.attributes is None:
            return torch._utils._rebuild_tensor_v2, args
        wrapped = (torch._utils._rebuild_tensor_v2, torch.Tensor, args, dict(self.attributes))
        return torch._tensor._rebuild_from_type_v2, wrapped


_KINDS = {
    torch.float32: torch.FloatStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.float16: torch.HalfStorage,
    torch.uint8: torch.ByteStorage,
    torch.float64: torch.DoubleStorage,
}


@dataclass
class Pickled:
    """A pickle and the storages it names: a real storage or a ``Store``."""

    data: bytes
    storages: list[Any] = field(default_factory=list)


def dumps(value: Any) -> Pickled:
    """As torch.serialization._save pickles."""
    found = Pickled(b"")
    keys: dict[int, str] = {}
    kept: list[Any] = []

    def persistent_id(item: Any) -> Any:
        if isinstance(item, Store):
            kind, numel, ident, store = _KINDS[item.dtype], item.numel, id(item), item
        elif isinstance(item, torch.storage.TypedStorage):
            store = item._untyped_storage
            kind = getattr(torch, item._pickle_storage_type())
            numel, ident = item._size(), store._cdata
        else:
            return None
        if ident not in keys:
            keys[ident] = str(len(keys))
            found.storages.append(store)
            kept.append(item)
        return ("storage", kind, keys[ident], "cpu", numel)

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> Any:
            return persistent_id(item)

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(value)
    found.data = buffer.getvalue()
    return found


def write(path: str | os.PathLike[str], pickled: Pickled, *, fsync: bool = False) -> int:
    """Write the archive; returns its (apparent) size."""
    stem = os.path.splitext(os.path.basename(path))[0]
    central = bytearray()
    count = position = 0
    pending: list[tuple[int, bytearray]] = []

    def put(data: bytes) -> None:
        nonlocal position
        if pending and pending[-1][0] + len(pending[-1][1]) == position:
            pending[-1][1].extend(data)
        else:
            pending.append((position, bytearray(data)))
        position += len(data)

    def record(name: str, data: bytes | int) -> None:
        nonlocal position, count
        size = data if isinstance(data, int) else len(data)
        crc = zero_crc(size) if isinstance(data, int) else binascii.crc32(data)
        encoded = f"{stem}/{name}".encode()
        start = position
        large, far = size >= _LIMIT, start >= _LIMIT
        # inline_container.cc: room is kept for zip64 fields by size and offset
        zip64 = b""
        if large or far:
            sizes = (struct.pack("<QQ", size, size) if large else b"") + (
                struct.pack("<Q", start) if far else b""
            )
            zip64 = struct.pack("<HH", 1, len(sizes)) + sizes
        fixed = start + _LOCAL.size + len(encoded) + len(zip64) + 4
        padding = -fixed % _ALIGN
        extra = zip64 + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        stated = _LIMIT if large else size
        put(
            _LOCAL.pack(
                b"PK\x03\x04",
                0,
                0x0808,
                0,
                0,
                0,
                0,
                0 if not large else _LIMIT,
                0 if not large else _LIMIT,
                len(encoded),
                len(extra),
            )
            + encoded
            + extra
        )
        if isinstance(data, int):
            position += size
        else:
            put(data)
        put(
            struct.pack("<4sI", b"PK\x07\x08", crc)
            + (struct.pack("<QQ", size, size) if large or far else struct.pack("<II", size, size))
        )
        central.extend(
            _CENTRAL.pack(
                b"PK\x01\x02",
                0,
                0,
                0x0808,
                0,
                0,
                0,
                crc,
                stated,
                stated,
                len(encoded),
                len(zip64),
                0,
                0,
                0,
                0,
                _LIMIT if far else start,
            )
            + encoded
            + zip64
        )
        count += 1

    record("data.pkl", pickled.data)
    record(".format_version", b"1")
    record(".storage_alignment", b"64")
    record("byteorder", b"little")
    for key, store in enumerate(pickled.storages):
        record(f"data/{key}", store.nbytes if isinstance(store, Store) else _bytes(store))
    record("version", b"3\n")
    record(".data/serialization_id", b"0" * 40)
    begin, size = position, len(central)
    put(bytes(central))
    if begin >= _LIMIT or count >= 0xFFFF:
        put(
            struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 0x031E, 0x002D, 0, 0, count, count, size, begin)
            + struct.pack("<4sIQI", b"PK\x06\x07", 0, begin + size, 1)
        )
    put(
        struct.pack(
            "<4s4H2IH",
            b"PK\x05\x06",
            0,
            0,
            min(count, 0xFFFF),
            min(count, 0xFFFF),
            min(size, _LIMIT),
            min(begin, _LIMIT),
            0,
        )
    )
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.ftruncate(fd, position)
        for offset, data in pending:
            os.pwrite(fd, data, offset)
        if fsync:
            os.fsync(fd)
    finally:
        os.close(fd)
    return position


def _bytes(storage: torch.UntypedStorage) -> bytes:
    return (
        bytes(storage.tolist())
        if storage.nbytes() < 4096
        else memoryview(torch.tensor([], dtype=torch.uint8).set_(storage).numpy()).tobytes()
    )


def save(path: str | os.PathLike[str], value: Any) -> int:
    return write(path, dumps(value))


def check(directory: str) -> None:
    """Beside torch.save: pickles byte by byte, positions, names, sizes, CRCs; torch.load of both."""
    import zipfile

    def value(hole: bool) -> Any:
        make = (lambda s, **k: Hole(s, **k)) if hole else (lambda s, **k: _plain(s, **k))
        return {
            "a": make((1000,), requires_grad=True, attributes={"ds_id": "1_2"}),
            "b": {0: make((3, 5))},
            "c": torch.tensor(100.0),
            "d": OrderedDict(x=torch.empty(0, dtype=torch.bfloat16)),
            "e": [1, 2],
        }

    ours, theirs = f"{directory}/ours.pt", f"{directory}/theirs.pt"
    save(ours, value(True))
    torch.save(value(False), theirs)
    with zipfile.ZipFile(ours) as a, zipfile.ZipFile(theirs) as b:
        rows = [[(i.filename.split("/", 1)[1], i.file_size, i.CRC) for i in z.infolist()] for z in (a, b)]
        same = a.read("ours/data.pkl") == b.read("theirs/data.pkl")
        differing = [
            (x, y) for x, y in zip(*rows, strict=True) if x != y and "serialization_id" not in x[0]
        ]
        offsets = [[i.header_offset for i in z.infolist()] for z in (a, b)]
    print(
        "pickles equal:",
        same,
        "| records differing:",
        differing,
        "| offsets shift:",
        sorted({x - y for x, y in zip(*offsets, strict=True)}),
    )
    print("torch.load:", torch.load(ours, weights_only=False)["a"].ds_id)


def _plain(shape: Any, *, requires_grad: bool = False, attributes: Any = None) -> torch.Tensor:
    tensor = torch.zeros(shape).requires_grad_(requires_grad)
    for key, item in (attributes or {}).items():
        setattr(tensor, key, item)
    return tensor


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        check(place)
