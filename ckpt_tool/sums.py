"""The checksums that a checkpoint states of its own bytes: the CRC-32 of every record of torch's archives,
and what a manifest of ckpt-tool says of any file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ckpt_tool.canonical import SourceFile
from ckpt_tool.containers.stored_zip import StoredZip
from ckpt_tool.errors import DamagedError
from ckpt_tool.manifest import MANIFEST, Manifest, manifest_root, read_manifest
from ckpt_tool.storage import Location, Reader
from ckpt_tool.stores.known import open_location
from ckpt_tool.written import WrittenFile

COPY_AGAIN = "Copy it again from where it was saved."
ON_PURPOSE = f"If it was changed on purpose, remove {MANIFEST}, which speaks of what it was."
_TENSORS = "data/"  # records of torch archives that hold a storage each


class Sum(NamedTuple):
    """``length`` bytes of a file from ``offset`` on, and what the checkpoint says of them: an archive their
    CRC-32 (``crc``), a manifest their XXH3-64 in hex (``xxh3``) and, from version 3 on, the CRC-32 as well.
    ``where`` names them to a person."""

    path: str
    offset: int
    length: int
    where: str
    crc: int | None = None
    xxh3: str | None = None

    @property
    def end(self) -> int:
        return self.offset + self.length

    @property
    def of_manifest(self) -> bool:
        return self.xxh3 is not None

    def differs(self) -> str:
        """What to say where they are others."""
        if self.of_manifest:
            return f"{self.path}: {self.where} do not have the checksum that {MANIFEST} states"
        return f"{self.path}: {self.where} does not have the CRC-32 that its archive states"

    def remedy(self) -> str:
        return f"{COPY_AGAIN} {ON_PURPOSE}" if self.of_manifest else COPY_AGAIN


class ArchiveSums(NamedTuple):
    """The checksums of a file's archives; ``without`` counts records that have none."""

    sums: list[Sum]
    without: int


def archive_sums(reader: Reader, source: SourceFile, *, tensors_only: bool = False) -> ArchiveSums:
    """Of all records of a file's archives, or of those alone that hold tensors."""
    sums: list[Sum] = []
    without = 0
    for offset, length in source.archives:
        archive = StoredZip(reader, source.path, offset, length)
        within = f" of the archive at byte {offset}" if offset or len(source.archives) > 1 else ""
        for name, info in archive.records.items():
            if tensors_only and not (info.file_size and name.startswith(_TENSORS)):
                continue
            start = archive.record_offset(name)  # looks whether it is there, also where it is empty
            if info.file_size and not info.CRC:
                without += 1  # torch was told not to compute it
            elif info.file_size:
                sums.append(Sum(source.path, start, info.file_size, f"record {name}{within}", info.CRC))
    return ArchiveSums(sums, without)


def manifest_sums(file: WrittenFile) -> list[Sum]:
    return [
        Sum(file.path, start, length, f"bytes {start} to {start + length}", crc, xxh3)
        for start, length, xxh3, crc in file.extents
        if length
    ]


def own_manifest(directory: Location) -> tuple[Location, Manifest] | None:
    """The manifest that lists files of a checkpoint's directory, with its own; None where there is none.

    Raises:
        UnreadableError: it is damaged, or of a later version.
    """
    root = manifest_root(directory)
    manifest = read_manifest(root)
    if manifest is None:
        return None
    if root != directory and not any(_below(file.path, directory.name) for file in manifest.files):
        return None  # of another tag beside this one
    return root, manifest


def listed_below(root: Location, manifest: Manifest, directory: Location) -> Manifest:
    """What a manifest in ``root`` says of the files in ``directory``, which is that or one in it."""
    if directory == root:
        return manifest
    own = (file for file in manifest.files if _below(file.path, directory.name))
    start = len(directory.name) + 1
    return Manifest(manifest.identity, tuple(file._replace(path=file.path[start:]) for file in own))


def _below(path: str, directory: str) -> bool:
    return path.startswith(f"{directory}/")


class SourceSums:
    """The checksums of a source, file by file, as they are asked for.

    A file's archives tell first; of other files a manifest does.

    Raises:
        UnreadableError: the manifest is damaged.
    """

    def __init__(self, reader: Reader, files: Iterable[SourceFile]) -> None:
        self._reader = reader
        self._sources: dict[str, list[SourceFile]] = {}
        for file in files:
            self._sources.setdefault(file.path, []).append(file)
        self._listed: Mapping[str, WrittenFile] = {}
        location = open_location(reader.root)
        own = own_manifest(location)
        if own is not None:
            self._listed = {file.path: file for file in listed_below(*own, location).files}

    def of(self, path: str) -> list[Sum]:
        """In the order of the file; without overlaps.

        Raises:
            DamagedError: the file is not of the size that the manifest states.
        """
        sums: list[Sum] = []
        for source in self._sources.get(path, ()):
            sums += archive_sums(self._reader, source, tensors_only=True).sums
        if not sums and path in self._listed:
            listed = self._listed[path]
            if self._reader.size(path) != listed.size:
                raise DamagedError(
                    f"{self._reader.root}/{path} has {self._reader.size(path)} bytes, {MANIFEST} states "
                    f"{listed.size}. {COPY_AGAIN} {ON_PURPOSE}",
                    {path},
                )
            sums = manifest_sums(listed)
        sums.sort(key=lambda found: found.offset)
        end = 0
        kept = []
        for found in sums:
            if found.offset >= end:
                kept.append(found)
                end = found.end
        return kept
