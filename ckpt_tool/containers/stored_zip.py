"""Zip archives whose records are stored as they are: where in the file each record's bytes lie.

``torch.save`` writes such (torch 2.13, caffe2/serialize/inline_container.cc): one top folder, no
compression, records padded so that data is aligned.
"""

from __future__ import annotations

import binascii
import struct
from array import array
from bisect import bisect_right
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import xxhash

from ckpt_tool.canonical import SourceFile
from ckpt_tool.errors import UnreadableError
from ckpt_tool.storage import Reader

LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_CHUNK = 1 << 20
_TENSORS = "data/"
_SAMPLE = 4096
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END, _END_MARK = struct.Struct("<4s4H2IH"), b"PK\x05\x06"
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")  # says where the second end is, which large archives have
_TAIL = _END.size + _LOCATOR.size + _END64.size
# What miniz, which torch reads with, does not read or takes for empty: encrypted, a patch; a directory.
_FLAGS, _DIRECTORY = 1 << 0 | 1 << 5 | 1 << 6 | 1 << 13, 1 << 4
_FAR = 1 << 16  # where an end is looked for that is not at the end
_SATURATED = 0xFFFFFFFF
_FIELD = 4  # bytes before an extra field's content: its kind and length
_ZIP64_FIELD = 20  # bytes of the extra field that comes first where the sizes need 8 bytes each


class Record(NamedTuple):
    """What the directory says of a record; ``stated`` is its name as it stands there."""

    stated: bytes
    compress_type: int
    CRC: int
    compress_size: int
    file_size: int
    header_offset: int


class StoredZip:
    """The directory of one archive: ``records`` by name, without the top folder.

    ``offset`` and ``length`` say where in the file the archive lies (by default: it is the file).

    Raises:
        UnreadableError: the file is missing, truncated, no zip archive, or a compressed one.
    """

    def __init__(self, reader: Reader, path: str, offset: int = 0, length: int | None = None) -> None:
        self.path = path
        self._offsets: dict[str, int] = {}
        self._looked_into = array("q")
        self._reader, self._base = reader, offset
        self.where = f"{reader.root}/{path}" + (f" at byte {offset}" if length is not None else "")
        held = reader.size(path)
        self.size = held if length is None else length
        if offset + self.size > held:
            raise UnreadableError(
                f"{self.where}: {self.size} bytes should lie here, the file has {held}: truncated while "
                "copying or saving."
            )
        directory = self._read_directory()
        self._starts = sorted(record.header_offset for record in self.records.values())
        self._check_bounds()
        self._fingerprinted = self._fingerprint(directory)
        for name, info in self.records.items():
            if info.compress_type or info.file_size != info.compress_size:
                raise UnreadableError(f"{self.where}: record {name} is compressed; torch stores.")

    @cached_property
    def source(self) -> SourceFile:
        """The archive as a file of the source, with where its tensors lie."""
        archives = ((self._base, self.size),)
        read = self._looked_into
        return SourceFile(self.path, self.size, self._fingerprinted, archives, self.stored(), read)

    def stored(self) -> array[int]:
        """Where tensors lie, as ``SourceFile`` has it: in torch's records ``data/*``."""
        found = array("q")
        for name, record in self.records.items():
            if record.file_size and name.startswith(_TENSORS):
                found.extend((self.record_offset(name), record.file_size))
        return found

    def account_for(self, name: str) -> None:
        """Note that a record's bytes are in the catalogue as values, or equal to those of one that is."""
        self.account_for_bytes(self.record_offset(name), self.info(name).file_size)

    def account_for_bytes(self, offset: int, length: int) -> None:
        """The same of bytes of the file."""
        self._looked_into.extend((offset, length))

    def _read_directory(self) -> bytes:
        """The directory and the end that follows it; its entries become ``records``."""
        tail = self._read(max(0, self.size - _TAIL), min(_TAIL, self.size))
        end = tail[-_END.size :]
        if len(end) < _END.size or end[:4] != _END_MARK or end[-2:] != b"\0\0":
            if _END_MARK in self._read(max(0, self.size - _FAR), min(_FAR, self.size)):
                raise self._not_one_archive()
            raise self._incomplete("no end of a zip archive")
        _, disk, first_disk, here, count, length, start, _ = _END.unpack(end)
        after, disks = self.size - _END.size, [disk, first_disk]
        locator = tail[-_END.size - _LOCATOR.size : -_END.size]
        if locator[:4] == b"PK\x06\x07":
            after -= _LOCATOR.size + _END64.size
            large = tail[-_END.size - _LOCATOR.size - _END64.size :][: _END64.size]
            if len(large) < _END64.size or large[:4] != b"PK\x06\x06":
                raise self._incomplete("its second end is missing")
            _, _, _, _, disk, first_disk, here, count, length, start = _END64.unpack(large)
            _, held_by, place, total = _LOCATOR.unpack(locator)
            disks += [disk, first_disk, held_by, total - 1, place - after]
        if start + length != after or here != count or any(disks):
            raise self._not_one_archive()
        from_end = self.size - start
        directory = tail[-from_end:] if from_end <= len(tail) else self._read(start, from_end)
        try:
            entries = _entries(directory, length)
        except (struct.error, ValueError) as error:
            raise self._incomplete(str(error)) from error
        self.records: Mapping[str, Record] = dict(entries)
        self._directory_at = start
        if not len(entries) == len(self.records) == count:
            raise self._not_one_archive()
        return directory

    def _read(self, start: int, length: int) -> bytes:
        return self._reader.read(self.path, self._base + start, length)

    def _incomplete(self, reason: str) -> UnreadableError:
        return UnreadableError(
            f"{self.where} is not a complete torch archive ({reason}): truncated while copying or "
            "saving, or another kind of file. Copy it again from where it was saved."
        )

    def _not_one_archive(self) -> UnreadableError:
        return UnreadableError(
            f"{self.where}: {self.size} bytes from here on are not exactly one torch archive: its "
            "first record does not begin there, it does not end there, a record lies outside, or "
            "two records have one name. The file or what says where its parts lie is damaged; copy it "
            "again from where it was saved."
        )

    def _check_bounds(self) -> None:
        if self._starts[:1] != [0] or self._starts[-1] > self._directory_at - LOCAL_HEADER.size:
            raise self._not_one_archive()

    def _fingerprint(self, directory: bytes) -> str:
        """Of the directory, and where it states no CRCs of the first bytes of every record."""
        digest = xxhash.xxh3_64(directory)
        for name, info in sorted(self.records.items()):
            if not info.CRC and info.file_size:
                length = min(_SAMPLE, info.file_size)
                digest.update(self._reader.read(self.path, self.record_offset(name), length))
        return digest.hexdigest()

    def info(self, name: str) -> Record:
        """What the directory says of a record."""
        try:
            return self.records[name]
        except KeyError:
            raise UnreadableError(
                f"{self.where} has no record {name}: not a torch archive, or a damaged one."
            ) from None

    def read_record(self, name: str) -> bytes:
        """The bytes of a small record."""
        return self._reader.read(self.path, self.record_offset(name), self.info(name).file_size)

    def record_offset(self, name: str) -> int:
        """Where a record's data begins in the file; its local header alone knows the padding."""
        known = self._offsets.get(name)
        if known is None:
            known = self._offsets[name] = self._found_offset(self.info(name), name)
        return known

    def _found_offset(self, info: Record, name: str) -> int:
        stated = info.stated
        large = _ZIP64_FIELD if info.file_size >= _SATURATED else 0
        room = min(LOCAL_HEADER.size + len(stated) + large + _FIELD, self.size - info.header_offset)
        header = self._reader.read(self.path, self._base + info.header_offset, room)
        signature, *_, name_length, extra_length = LOCAL_HEADER.unpack_from(header)
        fields = LOCAL_HEADER.size + name_length
        start = info.header_offset + fields + extra_length
        if (
            signature != b"PK\x03\x04"
            or header[LOCAL_HEADER.size : fields] != stated
            or not _tiled(self._extra(info, header[fields:], fields, extra_length), extra_length)
            or start + info.file_size > self._next(info.header_offset)
        ):
            raise UnreadableError(
                f"{self.where}: record {name} is not where the directory says. The file is damaged; copy "
                "it again from where it was saved."
            )
        return self._base + int(start)

    def _extra(self, info: Record, begun: bytes, start: int, length: int) -> bytes:
        """The extra fields of a local header; of torch's padding, which mostly is the only or the last one,
        what was read with the header."""
        if length < _FIELD or b"FB" in (begun[:2], begun[_ZIP64_FIELD : _ZIP64_FIELD + 2]):
            return begun[:length]
        return self._reader.read(self.path, self._base + info.header_offset + start, length)

    def _next(self, start: int) -> int:
        """Where the record after the one at ``start`` begins, or the directory."""
        later = bisect_right(self._starts, start)
        return self._starts[later] if later < len(self._starts) else self._directory_at

    def record_crc(self, name: str) -> int:
        """The CRC-32 of a record: as the archive states it, else computed.

        torch can be told not to compute them (``set_crc32_options``) and then writes zeros.
        """
        info = self.info(name)
        if info.CRC or not info.file_size:
            return info.CRC
        crc, start = 0, self.record_offset(name)
        for low in range(0, info.file_size, _CHUNK):
            length = min(_CHUNK, info.file_size - low)
            crc = binascii.crc32(self._reader.read(self.path, start + low, length), crc)
        return crc


def _entries(directory: bytes, length: int) -> list[tuple[str, Record]]:
    """The records, by their names without the top folder, of a directory of ``length`` bytes.

    Raises:
        ValueError, struct.error: it is no directory of a zip archive.
    """
    found = []
    folder = b""
    at = 0
    while at < length:
        (
            mark, _, _, flags, kind, _, _, crc, packed, size, named, extra, comment, disk, _, nature, start,
        ) = _CENTRAL.unpack_from(directory, at)  # fmt: skip
        at += _CENTRAL.size
        if mark != b"PK\x01\x02":
            raise ValueError("its directory is damaged")
        if flags & _FLAGS or nature & _DIRECTORY or disk:
            raise ValueError("a record is encrypted, a directory, or in another file")
        stated = directory[at : at + named]
        folder = folder or stated[: stated.find(b"/") + 1]
        if not folder or not stated.startswith(folder):
            raise ValueError("not all of its records are in one folder")
        at += named + extra + comment
        if at > length:
            raise ValueError("its directory is cut off")
        if extra and _SATURATED in (packed, size, start):
            fields = directory[at - extra - comment : at - comment]
            size, packed, start = _large(fields, size, packed, start)
        name = stated.decode("utf-8" if flags & 0x800 else "cp437")
        found.append((name.split("/", 1)[-1], Record(stated, kind, crc, packed, size, start)))
    return found


def _large(extra: bytes, *numbers: int) -> list[int]:
    """The numbers of an entry, those that have no room there from its extra field of kind 1 (zip64)."""
    at = 0
    while at + _FIELD <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        at += _FIELD
        if kind == 1:
            held = iter(struct.unpack_from(f"<{length // 8}Q", extra, at))
            found = [next(held, -1) if number == _SATURATED else number for number in numbers]
            if -1 in found:
                raise ValueError("a size or place in its directory is missing")
            return found
        at += length
    return list(numbers)


def _tiled(extra: bytes, length: int) -> bool:
    """Whether extra fields end where a local header says that they do: a wrong length would move the data
    that follows. torch's padding is the last of them, and only its beginning is needed."""
    at = 0
    while at + _FIELD <= len(extra):
        padding = extra[at : at + 2] == b"FB"
        at += _FIELD + int.from_bytes(extra[at + 2 : at + _FIELD], "little")
        if padding:
            break
    return at == length
