"""A layout: the files a target consists of, each as literal bytes and ranges to be filled.

Pure data, made by ``formats`` and ``containers`` from metadata alone, read by the planner and the
executor, which know no format.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ckpt_tool.canonical import DType, Tensor, Topology

# The copy of a whole tensor that is part of an object (client state, a buffer in a module's dict): as
# often as the object has it, and the object as often as it is written. Parameters are never written so.
IN_OBJECT = "in an object"


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor to be stored: elements of ``tensor`` in row-major order from flat element ``start`` on,
    with the shape and dtype they get in the new file.

    ``copy`` is empty where these elements are written for the first time. What a target holds again, under
    a tied name or as the rounded weight of a master, says as which copy: an element is in each copy once
    at most, and a copy of a tensor is a whole one.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    dtype: DType
    start: int = 0
    copy: str = ""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def whole(tensor: Tensor, dtype: DType | None = None, copy: str = "") -> Slot:
    """All of a tensor, cast only where ``dtype`` says so."""
    return Slot(tensor, tensor.shape, dtype or tensor.dtype, copy=copy)


@dataclass(frozen=True, slots=True)
class Literal:
    """Bytes known beforehand (headers, pickles), at ``offset`` of the file."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Fill:
    """``numel`` elements of ``tensor`` from flat element ``start`` on, stored as ``dtype`` from byte
    ``offset`` of the file on. A dtype other than the tensor's is a cast that was asked for. ``copy`` is the
    slot's."""

    offset: int
    tensor: Tensor
    start: int
    numel: int
    dtype: DType
    copy: str = ""

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class CrcSlot:
    """Four bytes at ``offset``, inside a literal, that take the CRC-32 of a record.

    ``parts`` are what the record consists of, in order: numbers of fills, and literal bytes.
    """

    offset: int
    parts: tuple[int | bytes, ...]


@dataclass(frozen=True, slots=True)
class TargetFile:
    """One file: its parts tile it without gap or overlap, which the planner checks."""

    path: str
    size: int
    literals: tuple[Literal, ...]
    fills: tuple[Fill, ...] = ()
    crc_slots: tuple[CrcSlot, ...] = ()

    def layout(self) -> TargetFile:
        """Itself: a file that is laid out describes itself."""
        return self


class Description(Protocol):
    """A file that is laid out when it is needed, because those of a large run together hold millions of
    chunks.

    It is data, and can be pickled: a plan goes to another process, which lays out the files it writes.
    What several files share they refer to, so that a pickle of them all has it once.
    """

    def layout(self) -> TargetFile:
        """The same whenever it is asked for."""
        ...


class LeftOut(NamedTuple):
    """A tensor (None: another object) that the target does not hold, under its name in the report."""

    label: str
    tensor: Tensor | None
    reason: str


def left_out(tensors: Iterable[Tensor], reason: str) -> tuple[LeftOut, ...]:
    """Tensors that the target does not hold, for one reason."""
    return tuple(LeftOut(tensor.label(), tensor, reason) for tensor in tensors)


@dataclass(frozen=True, slots=True)
class Layout:
    """All files of a target, and what the user is to know about it.

    ``left_out`` are the tensors of the source that the target has no place for. ``notes`` are sentences for
    the report. ``topology`` is the ranks that the target is for, None where any load it. ``loading`` is the
    line that loads it, in which ``{target}`` stands for its path.
    """

    files: Sequence[Description]
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()
    topology: Topology | None = None
    loading: str = ""

    def laid_out(self) -> Iterator[TargetFile]:
        """File by file; whoever keeps none holds one at a time."""
        return (file.layout() for file in self.files)


def text_file(path: str, text: str) -> TargetFile:
    """A small file of known content, such as ``latest``."""
    data = text.encode()
    return TargetFile(path, len(data), (Literal(0, data),))
