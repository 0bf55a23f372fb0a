"""Is a checkpoint as it was written? It is compared with what it says about itself: coverage of every
tensor, its manifest's checksums, or else the CRC-32 of every record of torch's archives.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

import xxhash
from isal import isal_zlib

from ckpt_tool.canonical import Checkpoint
from ckpt_tool.comparison import Verdict
from ckpt_tool.errors import CkptToolError, MismatchError, UnreadableError
from ckpt_tool.execute.budget import Budget
from ckpt_tool.execute.meter import Meter
from ckpt_tool.execute.threads import in_parallel
from ckpt_tool.formats.registry import TAG_FILES
from ckpt_tool.geometry import check_disjoint, pieces
from ckpt_tool.manifest import JOURNAL, MANIFEST, Manifest
from ckpt_tool.storage import Reader
from ckpt_tool.sums import Sum, archive_sums, manifest_sums
from ckpt_tool.values import Difference, check_replicas
from ckpt_tool.written import WrittenFile

_NO_SUMS = ".safetensors"
_LONGEST_TAG = 4096  # bytes
# What a loader would take for a part of the checkpoint.
_DATA = (".safetensors", ".index.json", ".distcp", ".metadata", ".pt", ".pth", ".bin")


Proven = Callable[[str, int, int], bool]


def none_proven(path: str, offset: int, length: int) -> bool:  # noqa: ARG001
    return False


def check(
    checkpoint: Checkpoint,
    reader: Reader,
    manifest: Manifest | None,
    manifest_reader: Reader,
    budget: Budget,
    *,
    meter: Meter,
    proven: Proven = none_proven,
) -> Verdict:
    """Check coverage, the manifest's checksums, and in files that it does not list the CRC-32 of every
    record of torch's archives.

    Args:
        proven: says of bytes of a file (path, offset, length) whether they were compared before.
    """
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
    left = [one for one in work if not proven(*one.stated[:3])]
    _compare(left, differences, budget, meter)
    total = sum(stretch.stated.length for stretch in work)
    return Verdict(len(checkpoint.tensors), total, tuple(sorted(differences)), tuple(notes))


def check_files(manifest: Manifest, reader: Reader, budget: Budget, *, meter: Meter) -> Verdict:
    """Check the manifest's checksums alone, for a directory that is too damaged to be read."""
    work, differences, notes = _manifest(manifest, reader)
    _compare(work, differences, budget, meter)
    return Verdict(
        0, sum(stretch.stated.length for stretch in work), tuple(sorted(differences)), tuple(notes)
    )


def changed_since_written(
    files: Iterable[WrittenFile], reader: Reader, budget: Budget, *, meter: Meter
) -> set[str]:
    """The paths of those files that do not hold what was written to them."""
    changed: list[Difference] = []
    work: list[_Stretch] = []
    for file in files:
        if _untold(file) is not None or reader.size(file.path) != file.size:
            changed.append(Difference("checksum", file.path, f"{file.path} is not as it was written"))
        else:
            work += [_Stretch(reader, found) for found in manifest_sums(file)]
    _compare(work, changed, budget, meter)
    return {one.name for one in changed}


def _compare(work: list[_Stretch], differences: list[Difference], budget: Budget, meter: Meter) -> None:
    """Add what differs from its checksum to ``differences``."""
    meter.start(sum(stretch.stated.length for stretch in work))
    lock = threading.Lock()

    def one(buffer: memoryview, stretch: _Stretch) -> None:
        if not _matches(stretch, buffer, meter):
            found = stretch.stated
            with lock:
                differences.append(Difference("checksum", found.path, found.differs()))

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
    """Bytes whose checksum is stated somewhere, and where to read them."""

    reader: Reader
    stated: Sum


def _manifest(manifest: Manifest, reader: Reader) -> tuple[list[_Stretch], list[Difference], list[str]]:
    """What it has checksums of, what is wrong at first sight, and notes."""
    stretches: list[_Stretch] = []
    differences: list[Difference] = []
    notes: list[str] = []
    own = {top for top, slash, _ in (file.path.partition("/") for file in manifest.files) if slash}
    for file in manifest.files:
        try:
            size = reader.size(file.path)
        except UnreadableError as error:
            differences.append(Difference("checksum", file.path, str(error)))
            continue
        later = _later_tag(reader, file.path, size, own)
        if later is not None:
            notes.append(f"{file.path} names {later}, which was saved afterwards.")
        elif size != file.size:
            message = f"{file.path} has {size} bytes, {MANIFEST} states {file.size}"
            differences.append(Difference("checksum", file.path, message))
        elif (gap := _untold(file)) is not None:
            message = f"{file.path}: {MANIFEST} has no checksum, or two, of the bytes from {gap} on"
            differences.append(Difference("checksum", file.path, message))
        else:
            stretches += [_Stretch(reader, found) for found in manifest_sums(file)]
    listed = {file.path for file in manifest.files} | {MANIFEST, JOURNAL}
    added = [path for path in _all_files(reader) if path not in listed]
    others = {path.partition("/")[0] for path in added if "/" in path} - own
    added = [path for path in added if path.partition("/")[0] not in others]
    differences += [
        Difference("extra", path, f"{path} is not in {MANIFEST}: it was added afterwards")
        for path in added
        if path.endswith(_DATA)
    ]
    beside = [path for path in added if not path.endswith(_DATA)] + [f"{top}/" for top in sorted(others)]
    if beside:
        notes.append(f"Added after the manifest was written, and not checked: {', '.join(beside)}.")
    return stretches, differences, notes


def _later_tag(reader: Reader, path: str, size: int, own: Collection[str]) -> str | None:
    """The tag that a file such as ``latest`` names, where an engine saved it beside the manifest's own."""
    if path not in TAG_FILES or not 0 < size <= _LONGEST_TAG:
        return None
    tag = reader.read(path, 0, size).decode(errors="replace").strip()
    return tag if tag and "/" not in tag and tag not in own and reader.is_directory(tag) else None


def _untold(file: WrittenFile) -> int | None:
    """The first byte of a file that its extents do not tile; None where they do."""
    position = 0
    for extent in sorted(file.extents):
        if extent.offset != position or extent.length < 0:
            return position
        position += extent.length
    return None if position == file.size else position


def _place(reader: Reader, path: str) -> str:
    return os.path.normpath(os.path.join(reader.root, path))  # noqa: PTH118 (no file is looked for)


def _archives(
    checkpoint: Checkpoint, reader: Reader, listed: Collection[str]
) -> tuple[list[_Stretch], list[str]]:
    stretches: list[_Stretch] = []
    unchecked = 0
    for source in checkpoint.files:
        if _place(reader, source.path) not in listed:
            found = archive_sums(reader, source)
            unchecked += found.without
            stretches += [_Stretch(reader, one) for one in found.sums]
    if not unchecked:
        return stretches, []
    return stretches, [f"{unchecked} records were saved without a CRC-32 and could not be checked by it."]


def _all_files(reader: Reader, directory: str = "") -> Iterator[str]:
    for name in reader.list(directory):
        path = f"{directory}/{name}" if directory else name
        if reader.is_directory(path):
            yield from _all_files(reader, path)
        else:
            yield path


def _matches(stretch: _Stretch, buffer: memoryview, meter: Meter) -> bool:
    reader, stated = stretch
    crc, digest = 0, xxhash.xxh3_64()
    for low in range(0, stated.length, len(buffer)):
        data = buffer[: min(len(buffer), stated.length - low)]
        reader.read_into(stated.path, stated.offset + low, data)
        if stated.of_manifest:
            digest.update(data)
        else:
            crc = isal_zlib.crc32(data, crc)
        meter.add(len(data))
    return digest.hexdigest() == stated.xxh3 if stated.of_manifest else crc == stated.crc
