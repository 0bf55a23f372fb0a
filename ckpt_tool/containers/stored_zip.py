"""Zip archives whose records are stored as they are: where in the file each record's bytes lie.

``torch.save`` writes such (torch 2.13, caffe2/serialize/inline_container.cc): one top folder, no
compression, records padded so that data is aligned.
"""

from __future__ import annotations

import binascii
import io
import struct
import zipfile
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

import xxhash

from ckpt_tool.canonical import SourceFile
from ckpt_tool.errors import UnreadableError
from ckpt_tool.storage import Reader

LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_CHUNK = 1 << 20
_SAMPLE = 4096
_END = struct.Struct("<4s4H2IH")
_FIELD = 4  # bytes before an extra field's content: its kind and length


class _FileView(io.RawIOBase):
    """A seekable view of a range of a stored file for the zip module."""

    def __init__(self, reader: Reader, path: str, base: int, size: int) -> None:
        self._reader, self._path, self._base, self._size, self._position = reader, path, base, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        base = {0: 0, 1: self._position, 2: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._position))
        self._reader.read_into(self._path, self._base + self._position, memoryview(buffer)[:count])
        self._position += count
        return count


class StoredZip:
    """The directory of one archive: ``records`` by name, without the top folder.

    ``offset`` and ``length`` say where in the file the archive lies (by default: it is the file).

    Raises:
        UnreadableError: the file is missing, truncated, no zip archive, or a compressed one.
    """

    def __init__(self, reader: Reader, path: str, offset: int = 0, length: int | None = None) -> None:
        self.path = path
        self._reader, self._base = reader, offset
        self.where = f"{reader.root}/{path}" + (f" at byte {offset}" if length is not None else "")
        held = reader.size(path)
        self.size = held if length is None else length
        if offset + self.size > held:
            raise UnreadableError(
                f"{self.where}: {self.size} bytes should lie here, the file has {held}: truncated while "
                "copying or saving."
            )
        try:
            view = _FileView(reader, path, offset, self.size)
            archive = zipfile.ZipFile(io.BufferedReader(view, 4096))
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise UnreadableError(
                f"{self.where} is not a complete torch archive ({error}): truncated while copying or "
                "saving, or another kind of file. Copy it again from where it was saved."
            ) from error
        self.records: Mapping[str, zipfile.ZipInfo] = {
            info.filename.split("/", 1)[-1]: info for info in archive.infolist()
        }
        directory = reader.read(path, offset + archive.start_dir, self.size - archive.start_dir)
        self._starts = sorted(info.header_offset for info in archive.infolist())
        self._directory_at = archive.start_dir
        self._check_bounds(directory, len(archive.infolist()))
        self.source = SourceFile(path, self.size, self._fingerprint(directory), ((offset, self.size),))
        for name, info in self.records.items():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise UnreadableError(f"{self.where}: record {name} is compressed; torch stores.")

    def _check_bounds(self, directory: bytes, count: int) -> None:
        """The zip module takes the last archive of several, and skips what precedes or follows it."""
        end = directory[-_END.size :]
        ends = len(end) == _END.size and end[:4] == b"PK\x05\x06" and end[-2:] == b"\0\0"
        last = self._directory_at - LOCAL_HEADER.size
        within = self._starts[:1] == [0] and self._starts[-1] <= last
        if not ends or not within or count != len(self.records):
            raise UnreadableError(
                f"{self.where}: {self.size} bytes from here on are not exactly one torch archive: its "
                "first record does not begin there, it does not end there, a record lies outside, or "
                "two records have one name. The file or what says where its parts lie is damaged; copy it "
                "again from where it was saved."
            )

    def _fingerprint(self, directory: bytes) -> str:
        """Of the directory, and where it states no CRCs of the first bytes of every record."""
        digest = xxhash.xxh3_64(directory)
        for name, info in sorted(self.records.items()):
            if not info.CRC and info.file_size:
                length = min(_SAMPLE, info.file_size)
                digest.update(self._reader.read(self.path, self.record_offset(name), length))
        return digest.hexdigest()

    def info(self, name: str) -> zipfile.ZipInfo:
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
        info = self.info(name)
        stated = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
        room = min(LOCAL_HEADER.size + len(stated) + _FIELD, self.size - info.header_offset)
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

    def _extra(self, info: zipfile.ZipInfo, begun: bytes, start: int, length: int) -> bytes:
        """The extra fields of a local header; of torch's padding, which mostly is the only one, what was
        read with the header."""
        if length < _FIELD or begun[:2] == b"FB":
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
