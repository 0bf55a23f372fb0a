"""Planning: a layout and a source catalogue in, a checked list of copies out. Pure, no tensor bytes.

The plan is the whole argument that a conversion is right: every byte of every target file is written
exactly once, every byte that the source's containers hold of tensors is used or named as left out, and
whatever cannot be accounted for refuses the conversion before a byte is written. The same inputs give the
same plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import xxhash

from ckpt_tool.accounting import Bytes
from ckpt_tool.canonical import CASTABLE, Checkpoint, Regions, Tensor
from ckpt_tool.errors import CkptToolError, CoverageError, UnreadableError, UsageError
from ckpt_tool.geometry import Piece, block_numel, check_disjoint, cut, pieces
from ckpt_tool.layout import IN_OBJECT, Description, Fill, Layout, LeftOut, TargetFile, left_out
from ckpt_tool.written import as_stored


class Cast(NamedTuple):
    """Tensors whose dtype changes, for the report."""

    label: str
    source: str
    target: str


class PlannedFile(NamedTuple):
    """A file of the target. Its layout is made when the file is written, and not kept."""

    path: str
    size: int
    described: Description

    def layout(self) -> TargetFile:
        return self.described.layout()


@dataclass(frozen=True, slots=True)
class Plan:
    """A layout that was found to be complete, with its totals in bytes. ``left_out`` are all tensors that
    the target does not hold. ``largest_block`` is the most that is best loaded at once: a matrix to be
    transposed. ``identity`` is a hash of what tells the contents of the source's files, and of the layout.

    A plan is data, and can be pickled. The copies themselves are computed file by file when they are needed
    (``copies``), because a large checkpoint has millions.
    """

    files: tuple[PlannedFile, ...]
    left_out: tuple[LeftOut, ...]
    bytes_read: int
    bytes_written: int
    largest_block: int
    casts: tuple[Cast, ...]
    identity: str


def copies(fill: Fill) -> list[Piece]:
    """Where the elements of a fill come from; a piece's ``start`` counts from the tensor's start."""
    return pieces(fill.tensor, fill.start, fill.numel)


def make_plan(layout: Layout, checkpoint: Checkpoint) -> Plan:
    """Check a layout against the source it draws from.

    What the source holds is what its containers say: every stored byte is read by some fill, or belongs
    to a tensor that is left out with a reason, to a copy that is compared, to padding, or was read into
    the catalogue. Names play no part in it.

    Raises:
        CoverageError: a source element is missing or ambiguous, a stored byte is neither used nor named as
            left out, or written twice and the layout does not say as which copy, or a target file has a gap
            or an overlap.
    """
    written = _Written()
    empty: set[str] = set()
    casts: dict[str, Cast] = {}
    bytes_read = bytes_written = largest_block = 0
    files: list[PlannedFile] = []
    paths: set[str] = set()
    identity = _Identity(checkpoint)
    seen: dict[int, Regions] = {}  # holds what it has seen, so that no id is used again
    for described in layout.files:
        file = described.layout()
        files.append(PlannedFile(file.path, file.size, described))
        identity.add(file)
        _check_path(file.path)
        if file.path in paths:
            raise CkptToolError(f"The target would have two files named {file.path}.")
        paths.add(file.path)
        _check_tiling(file)
        bytes_written += file.size
        for fill in file.fills:
            tensor = fill.tensor
            if id(tensor.regions) not in seen:
                seen[id(tensor.regions)] = tensor.regions
                check_disjoint(tensor)
            found = copies(fill)
            block = block_numel(tensor, found)
            if block > 1:
                itemsize = max(tensor.dtype.itemsize, fill.dtype.itemsize)
                largest_block = max(largest_block, block * itemsize)
            bytes_read += fill.numel * tensor.dtype.itemsize
            written.add(fill, found)
            if not tensor.numel:
                empty.add(tensor.label())
            if fill.dtype is not tensor.dtype:
                label = tensor.label()
                if not {tensor.dtype, fill.dtype} <= CASTABLE:
                    raise UsageError(
                        f"{label} is {tensor.dtype}; a cast to {fill.dtype} is not supported. Leave "
                        "--dtype out, or choose another."
                    )
                casts[label] = Cast(label, str(tensor.dtype), str(fill.dtype))
    used = written.checked(checkpoint.root)
    left = (*layout.left_out, *_unused_others(checkpoint, layout, used))
    _check_empty(checkpoint, left, empty)
    _check_stored(checkpoint, left, used)
    return Plan(
        tuple(files),
        left,
        bytes_read,
        bytes_written,
        largest_block,
        tuple(casts.values()),
        identity.hexdigest(),
    )


class _Identity:
    """A hash that tells whether two plans make the same bytes of the same source."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._digest = xxhash.xxh3_128()
        for file in sorted(checkpoint.files):
            self._digest.update(as_stored(file.path) + f"\0{file.size}\0{file.fingerprint}\n".encode())

    def add(self, file: TargetFile) -> None:
        self._digest.update(f"{file.path}\0{file.size}\n".encode())
        for literal in file.literals:
            self._digest.update(literal.data)
        lines = (f"{f.offset} {f.tensor.label()} {f.start} {f.dtype.torch_name}\n" for f in file.fills)
        self._digest.update("".join(lines).encode())

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


class _Written:
    """The source's bytes that fills read, copy by copy (``Slot.copy``)."""

    def __init__(self) -> None:
        self._copies: dict[str, Bytes] = {"": Bytes(), IN_OBJECT: Bytes()}
        self._tensors: dict[tuple[str, int], Tensor] = {}  # those of copies

    def add(self, fill: Fill, found: Iterable[Piece]) -> None:
        held = self._copies.get(fill.copy)
        if held is None:
            held = self._copies[fill.copy] = Bytes()
        held.add_pieces(found, fill.tensor.dtype.itemsize)
        if fill.copy not in ("", IN_OBJECT):
            self._tensors[fill.copy, id(fill.tensor.regions)] = fill.tensor

    def checked(self, root: str) -> Bytes:
        """What is written at all, copies apart.

        Raises:
            CoverageError: a byte is written twice, and the layout does not say as which copy; or in one
                copy twice, or as part of a tensor that the copy does not hold whole.
        """
        in_objects = self._copies.pop(IN_OBJECT)
        for copy, held in self._copies.items():
            double = held.double()
            if double is not None:
                file, position = double
                raise CoverageError(
                    f"{root}/{file}: the target would hold byte {position} twice"
                    f"{f' ({copy})' if copy else ''}. If two tensors share memory in part in the "
                    "checkpoint, save it again with clones of them; else please report it with the output "
                    "of `ckpt-tool inspect --json`. Nothing was written."
                )
        for (copy, _), tensor in self._tensors.items():
            if not _reads(tensor, self._copies[copy]):
                raise CoverageError(
                    f"{tensor.label()}: the target would hold a part of it only ({copy}). This is a bug in "
                    "ckpt-tool; nothing was written."
                )
        used = self._copies[""]
        used.add_all(in_objects)
        return used


def _unused_others(checkpoint: Checkpoint, layout: Layout, used: Bytes) -> tuple[LeftOut, ...]:
    """The tensors beside the model and its optimizer that no fill reads, and no reason was given for."""
    named = {one.label for one in layout.left_out}
    others = [
        tensor
        for tensor in checkpoint.others
        if not ({tensor.label(), str(tensor.name)} & named) and not _reads(tensor, used)
    ]
    return left_out(others, "neither the model's nor its optimizer's")


def _reads(tensor: Tensor, used: Bytes) -> bool:
    """Whether all bytes of a tensor are in the set."""
    own = Bytes()
    own.add_pieces(tensor.regions, tensor.dtype.itemsize)
    return own.within(used)


def _check_empty(checkpoint: Checkpoint, left: Iterable[LeftOut], used: set[str]) -> None:
    """Tensors of no elements have no bytes that would be missed: they are counted."""
    known = [tensor.label() for tensor in checkpoint.tensors if not tensor.numel]
    left_empty = sum(1 for one in left if one.tensor is not None and not one.tensor.numel)
    if len(known) > len(used) + left_empty:
        lost = next((label for label in known if label not in used), known[0])
        raise CoverageError(
            f"{lost}: the target has no place for it and it is not named as left out. This is a bug in "
            "ckpt-tool; nothing was written."
        )


def _check_stored(checkpoint: Checkpoint, left: Iterable[LeftOut], used: Bytes) -> None:
    """Every stored byte of the source is accounted for."""
    for path, decoded in checkpoint.decoded.items():
        if used.holds(path, 0, decoded.length):
            _add(used, decoded.stored)
    _add(used, [one.tensor for one in left if one.tensor is not None])
    for tensor in checkpoint.tensors:
        used.add_pieces(tensor.replicas, tensor.dtype.itemsize)
    by_name = {tensor.name: tensor for tensor in checkpoint.tensors}
    for copy, name in checkpoint.equal.items():
        if copy in by_name and name in by_name and _reads(by_name[name], used):
            _add(used, [by_name[copy]])
    for apart in checkpoint.apart:
        used.add(apart.file, apart.offset, apart.offset + apart.length)
    for source in checkpoint.files:
        for offset, length in _pairs(source.read):
            used.add(source.path, offset, offset + length)
    for source in checkpoint.files:
        extents = list(_pairs(source.stored))
        for number, position in used.missing(source.path, extents) if extents else ():
            offset, length = extents[number]
            raise CoverageError(
                f"{checkpoint.root}/{source.path}: of the tensor stored in bytes {offset} to "
                f"{offset + length}, byte {position} goes nowhere: the target has no place for it, and it "
                "is not named as left out. Nothing was written. Please report it with the output of "
                "`ckpt-tool inspect --json`."
            )


def _add(used: Bytes, tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        used.add_pieces(tensor.regions, tensor.dtype.itemsize)
        if tensor.encoding is not None:
            _add(used, tensor.encoding.stored)


def _pairs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    return zip(numbers[::2], numbers[1::2], strict=True)


def _check_path(path: str) -> None:
    """Names in a checkpoint become paths; none may lead out of the target.

    Raises:
        UnreadableError: it would.
    """
    if "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise UnreadableError(
            f"A name in the checkpoint would make the target's file {path!r}, outside of the destination. "
            "This checkpoint is damaged or hostile."
        )


def _check_tiling(file: TargetFile) -> None:
    spans = sorted(
        [(part.offset, part.offset + len(part.data)) for part in file.literals]
        + [(fill.offset, fill.offset + fill.nbytes) for fill in file.fills if fill.numel]
    )
    position = 0
    for low, high in spans:
        if low != position:
            raise CoverageError(
                f"{file.path}: bytes {position} to {low} are in no part of its layout, or in two."
            )
        position = high
    if position != file.size:
        raise CoverageError(f"{file.path}: the layout covers {position} of {file.size} bytes.")


class Extent(NamedTuple):
    """A unit of work: elements ``start .. start + numel`` (counted within the fill) of one fill, where all
    elements of that fill lie, and how many of them are best loaded together."""

    fill: int
    start: int
    numel: int
    pieces: list[Piece]
    block: int


def extents(file: TargetFile, max_bytes: int) -> Iterator[Extent]:
    """Cut a file's fills into units of at most ``max_bytes`` of the target, or of one block
    (``geometry.block_numel``). Fill by fill, as they are asked for: a large file has many."""
    for index in range(len(file.fills)):
        yield from fill_extents(file, index, max_bytes)


def fill_extents(file: TargetFile, index: int, max_bytes: int) -> Iterator[Extent]:
    """The same of one fill."""
    fill = file.fills[index]
    found = copies(fill)
    block = block_numel(fill.tensor, found)
    most = max(block, max_bytes // fill.dtype.itemsize)
    for start, numel in cut(fill.start, fill.numel, most, block):
        yield Extent(index, start - fill.start, numel, found, block)
