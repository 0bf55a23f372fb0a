"""Planning: a layout and a source catalogue in, a checked list of copies out. Pure, no tensor bytes.

The plan is the whole argument that a conversion is right: every byte of every target file is written
exactly once, every element of every source tensor is used or named as left out, and whatever cannot be
accounted for refuses the conversion before a byte is written. The same inputs give the same plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ckpt_tool.canonical import CASTABLE, Regions, Tensor
from ckpt_tool.errors import CkptToolError, CoverageError, UnreadableError, UsageError
from ckpt_tool.geometry import Piece, block_numel, check_disjoint, cut, pieces
from ckpt_tool.layout import Fill, Layout, TargetFile


class Cast(NamedTuple):
    """Tensors whose dtype changes, for the report."""

    label: str
    source: str
    target: str


@dataclass(frozen=True, slots=True)
class Plan:
    """A layout that was found to be complete, with its totals in bytes. ``largest_block`` is the most
    that is best loaded at once: a matrix to be transposed.

    The copies themselves are computed file by file when they are needed (``copies``), because a large
    checkpoint has millions.
    """

    layout: Layout
    bytes_read: int
    bytes_written: int
    largest_block: int
    casts: tuple[Cast, ...]

    @property
    def files(self) -> Sequence[TargetFile]:
        return self.layout.files


def copies(fill: Fill) -> list[Piece]:
    """Where the elements of a fill come from; a piece's ``start`` counts from the tensor's start."""
    return pieces(fill.tensor, fill.start, fill.numel)


def make_plan(layout: Layout) -> Plan:
    """Check a layout against the catalogue it draws from, ``layout.source``.

    Raises:
        CoverageError: a source element is missing or ambiguous, a source tensor is neither used nor
            named as left out, or a target file has a gap or an overlap.
    """
    used: dict[str, _Ranges] = {}
    casts: dict[str, Cast] = {}
    bytes_read = bytes_written = largest_block = 0
    paths: set[str] = set()
    seen: dict[int, Regions] = {}  # holds what it has seen, so that no id is used again
    for file in layout.files:
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
            block = block_numel(tensor, copies(fill))
            if block > 1:
                itemsize = max(tensor.dtype.itemsize, fill.dtype.itemsize)
                largest_block = max(largest_block, block * itemsize)
            bytes_read += fill.numel * tensor.dtype.itemsize
            used.setdefault(tensor.label(), _Ranges()).add(fill.start, fill.numel)
            if fill.dtype is not tensor.dtype:
                label = tensor.label()
                if not {tensor.dtype, fill.dtype} <= CASTABLE:
                    raise UsageError(
                        f"{label} is {tensor.dtype}; a cast to {fill.dtype} is not supported. Leave "
                        "--dtype out, or choose another."
                    )
                casts[label] = Cast(label, str(tensor.dtype), str(fill.dtype))
    for tensor in layout.source:
        _check_use(tensor, used.get(tensor.label()), layout)
    return Plan(layout, bytes_read, bytes_written, largest_block, tuple(casts.values()))


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


class _Ranges:
    """The elements of a tensor that were used. Adjacent ranges become one, so that the ranks of a large
    run, which take neighbouring pieces, leave few."""

    def __init__(self) -> None:
        self._start_of: dict[int, int] = {}  # end of a range -> its start

    def add(self, start: int, numel: int) -> None:
        end, first = start + numel, self._start_of.pop(start, start)
        self._start_of[end] = min(first, self._start_of.get(end, first))

    def first_unused(self) -> int:
        """The first element not in any range."""
        position = 0
        for start, end in sorted((start, end) for end, start in self._start_of.items()):
            if start > position:
                break
            position = max(position, end)
        return position


def _check_use(tensor: Tensor, used: _Ranges | None, layout: Layout) -> None:
    if tensor.label() in layout.left_out:
        return
    position = used.first_unused() if used else 0
    if used is None or position < tensor.numel:
        where = tensor.element(position) if tensor.numel else tensor.label()
        raise CoverageError(
            f"{where}: the target has no place for it and it is not named as left out. This is a bug in "
            "ckpt-tool; nothing was written."
        )


def _check_tiling(file: TargetFile) -> None:
    spans = sorted(
        [(part.offset, part.offset + len(part.data)) for part in file.literals]
        + [(fill.offset, fill.offset + fill.nbytes) for fill in file.fills if fill.numel]
    )
    position = 0
    for low, high in spans:
        if low != position:
            raise CoverageError(f"{file.path}: bytes {position} to {low} of the layout do not tile.")
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
    for index, fill in enumerate(file.fills):
        found = copies(fill)
        block = block_numel(fill.tensor, found)
        most = max(block, max_bytes // fill.dtype.itemsize)
        for start, numel in cut(fill.start, fill.numel, most, block):
            yield Extent(index, start - fill.start, numel, found, block)
