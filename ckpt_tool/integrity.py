"""Is a checkpoint as it was written? It is compared with what it says about itself: coverage of every
tensor, its manifest's checksums, or else the CRC-32 of every record of torch's archives.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterator
from typing import NamedTuple

import xxhash
from isal import isal_zlib

from ckpt_tool.canonical import Checkpoint
from ckpt_tool.comparison import Verdict
from ckpt_tool.containers.stored_zip import StoredZip
from ckpt_tool.errors import CkptToolError, MismatchError
from ckpt_tool.execute.budget import Budget
from ckpt_tool.execute.meter import Meter
from ckpt_tool.execute.threads import in_parallel
from ckpt_tool.geometry import check_disjoint, pieces
from ckpt_tool.manifest import JOURNAL, MANIFEST, Manifest
from ckpt_tool.storage import Reader
from ckpt_tool.values import Difference, check_replicas

_NO_SUMS = ".safetensors"
# What a loader would take for a part of the checkpoint.
_DATA = (".safetensors", ".index.json", ".distcp", ".metadata", ".pt", ".pth", ".bin")


def check(
    checkpoint: Checkpoint,
    reader: Reader,
    manifest: Manifest | None,
    manifest_reader: Reader,
    budget: Budget,
    *,
    meter: Meter,
) -> Verdict:
    """Check coverage, the manifest's checksums, and in files that it does not list the CRC-32 of every
    record of torch's archives."""
    differences = [*_coverage(checkpoint), *_copies(checkpoint, reader, budget)]
    listed = {_place(manifest_reader, file.path) for file in manifest.files} if manifest else set()
    work, notes = _archives(checkpoint, reader, listed)
    if manifest is not None:
        stretches, found, others = _manifest(manifest, manifest_reader)
        notes += others
        work, differences = [*stretches, *work], [*differences, *found]
    elif work:
        notes.append(f"No {MANIFEST}: contents were checked against the archives' own CRC-32.")
    if manifest is None and (without := [s.path for s in checkpoint.files if s.path.endswith(_NO_SUMS)]):
        notes.append(
            f"No {MANIFEST}, and safetensors files have no checksums: of {len(without)} files only the "
            "structure was checked."
        )
    _compare(work, differences, budget, meter)
    total = sum(stretch.length for stretch in work)
    return Verdict(len(checkpoint.tensors), total, tuple(sorted(differences)), tuple(notes))


def check_files(manifest: Manifest, reader: Reader, budget: Budget, *, meter: Meter) -> Verdict:
    """Check the manifest's checksums alone, for a directory that is too damaged to be read."""
    work, differences, notes = _manifest(manifest, reader)
    _compare(work, differences, budget, meter)
    return Verdict(0, sum(stretch.length for stretch in work), tuple(sorted(differences)), tuple(notes))


def _compare(work: list[_Stretch], differences: list[Difference], budget: Budget, meter: Meter) -> None:
    """Add what differs from its checksum to ``differences``."""
    meter.start(sum(stretch.length for stretch in work))
    lock = threading.Lock()

    def one(buffer: memoryview, stretch: _Stretch) -> None:
        if not _matches(stretch, buffer, meter):
            kind = "checksum in the manifest" if stretch.crc is None else "CRC-32"
            message = (
                f"{stretch.path}: bytes from {stretch.offset} on do not have the {kind} stated for them"
            )
            with lock:
                differences.append(Difference("checksum", stretch.path, message))

    in_parallel(iter(work), lambda: memoryview(bytearray(budget.tile)), one, budget.workers)


def _coverage(checkpoint: Checkpoint) -> Iterator[Difference]:
    for tensor in checkpoint.tensors:
        try:
            check_disjoint(tensor)
            pieces(tensor, 0, tensor.numel)
        except CkptToolError as error:
            yield Difference("coverage", str(tensor.name), str(error))


def _copies(checkpoint: Checkpoint, reader: Reader, budget: Budget) -> Iterator[Difference]:
    try:
        check_replicas(checkpoint, reader, budget)
    except MismatchError as error:
        yield Difference("value", "replicas", str(error))


class _Stretch(NamedTuple):
    """Bytes whose checksum is stated somewhere."""

    reader: Reader
    path: str
    offset: int
    length: int
    xxh3: str | None
    crc: int | None


def _manifest(manifest: Manifest, reader: Reader) -> tuple[list[_Stretch], list[Difference], list[str]]:
    """What it has checksums of, what is wrong at first sight, and notes."""
    stretches: list[_Stretch] = []
    differences: list[Difference] = []
    for file in manifest.files:
        if _size(reader, file.path) == file.size:
            stretches += [
                _Stretch(reader, file.path, extent.offset, extent.length, extent.xxh3, None)
                for extent in file.extents
            ]
        else:
            message = f"{file.path} is missing or not of {file.size} bytes, which {MANIFEST} states"
            differences.append(Difference("checksum", file.path, message))
    listed = {file.path for file in manifest.files} | {MANIFEST, JOURNAL}
    added = [path for path in _all_files(reader) if path not in listed]
    differences += [
        Difference("extra", path, f"{path} is not in {MANIFEST}: it was added afterwards")
        for path in added
        if path.endswith(_DATA)
    ]
    beside = [path for path in added if not path.endswith(_DATA)]
    notes = (
        [f"Added after the manifest was written, and not checked: {', '.join(beside)}."] if beside else []
    )
    return stretches, differences, notes


def _place(reader: Reader, path: str) -> str:
    return os.path.normpath(os.path.join(reader.root, path))  # noqa: PTH118 (no file is looked for)


def _archives(
    checkpoint: Checkpoint, reader: Reader, listed: Collection[str]
) -> tuple[list[_Stretch], list[str]]:
    stretches: list[_Stretch] = []
    unchecked = 0
    for source in checkpoint.files:
        if _place(reader, source.path) in listed:
            continue
        for offset, length in source.archives:
            archive = StoredZip(reader, source.path, offset, length)
            for name, info in archive.records.items():
                if info.file_size and not info.CRC:
                    unchecked += 1  # torch was told not to compute it
                    continue
                start = archive.record_offset(name)
                stretches.append(_Stretch(reader, source.path, start, info.file_size, None, info.CRC))
    if not unchecked:
        return stretches, []
    return stretches, [f"{unchecked} records were saved without a CRC-32 and could not be checked by it."]


def _size(reader: Reader, path: str) -> int | None:
    try:
        return reader.size(path)
    except CkptToolError:
        return None


def _all_files(reader: Reader, directory: str = "") -> Iterator[str]:
    for name in reader.list(directory):
        path = f"{directory}/{name}" if directory else name
        if reader.is_directory(path):
            yield from _all_files(reader, path)
        else:
            yield path


def _matches(stretch: _Stretch, buffer: memoryview, meter: Meter) -> bool:
    crc, digest = 0, xxhash.xxh3_64()
    for low in range(0, stretch.length, len(buffer)):
        data = buffer[: min(len(buffer), stretch.length - low)]
        stretch.reader.read_into(stretch.path, stretch.offset + low, data)
        if stretch.crc is not None:
            crc = isal_zlib.crc32(data, crc)
        else:
            digest.update(data)
        meter.add(len(data))
    return crc == stretch.crc if stretch.crc is not None else digest.hexdigest() == stretch.xxh3
