"""A result that an earlier run of the same command published, perhaps without tidying up after itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ckpt_tool.errors import UnreadableError
from ckpt_tool.execute.budget import Budget
from ckpt_tool.execute.local import execute
from ckpt_tool.execute.meter import Meter, Silent
from ckpt_tool.integrity import check_files
from ckpt_tool.manifest import read_manifest
from ckpt_tool.plan import Plan
from ckpt_tool.storage import Location, Order, Patch, Reader
from ckpt_tool.stores.known import store_of
from ckpt_tool.written import WrittenFile


def is_published(target: Location, identity: Mapping[str, Any], *, overwrite: bool) -> bool:
    """Whether what is at ``target`` was published by a run of the same command.

    With ``overwrite`` a result that is complete is made again, as asked; one that was not tidied up yet is
    what the command made itself.
    """
    store = store_of(target)
    if not store.is_taken(target) or not target.is_directory():
        return False
    if overwrite and not store.is_untidy(target):
        return False
    try:
        manifest = read_manifest(target)
    except UnreadableError:
        return False
    own = json.loads(json.dumps(identity))
    return manifest is not None and all(manifest.identity.get(key) == own[key] for key in own)


def is_what_it_would_be(plan: Plan, source: Reader, target: Location, budget: Budget, meter: Meter) -> bool:
    """Whether the result holds, byte for byte, what the source would give now.

    The identity of a command knows the headers of the source's files only. So all of the source is read
    and checksummed as if it were written, and the result is checked against the same checksums.
    """
    manifest = read_manifest(target)
    if manifest is None:
        return False
    written: list[WrittenFile] = []
    meter.start(plan.bytes_written)
    execute(plan, source, _Nowhere(), budget, meter=meter, skip=lambda _: False, on_file=written.append)
    if sorted(map(_by_xxh3, written)) != sorted(map(_by_xxh3, manifest.files)):
        return False
    reader = target.reader()
    try:
        return check_files(manifest, reader, budget, meter=Silent()).passed
    finally:
        reader.close()


def _by_xxh3(file: WrittenFile) -> WrittenFile:
    """Without the CRC-32s, which manifests have from version 3 on."""
    return file._replace(extents=tuple(extent._replace(crc=None) for extent in file.extents))


class _Nowhere:
    """A writer for what is only checksummed."""

    order = Order.ANY

    def create(self, path: str, size: int) -> None:
        pass

    def join(self, path: str) -> None:
        pass

    def write(self, path: str, offset: int, data: memoryview | bytes) -> None:
        pass

    def finish(self, path: str, patches: Sequence[Patch] = ()) -> None:
        pass

    def close(self) -> None:
        pass
