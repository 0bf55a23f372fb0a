"""Virtual files: paths that say where a quantised tensor is stored and how its values are computed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from ckpt_tool.canonical import DType, Region, Tensor
from ckpt_tool.errors import CoverageError

_MARK = "::decoded:"


class Part(NamedTuple):
    """One stored tensor: bytes from ``offset`` on in ``file``, ``numel`` elements of ``dtype`` (torch's
    name)."""

    file: str
    offset: int
    dtype: str
    numel: int


class Virtual(NamedTuple):
    """What a virtual path says.

    ``dtype`` and ``shape`` are those of the values, whose bytes the virtual file has in row-major order;
    ``shape`` has at least two dimensions. ``parts`` and ``numbers`` mean what the module of the scheme
    says.
    """

    scheme: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    numbers: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return DType[self.dtype].itemsize


def virtual_path(
    scheme: str, dtype: DType, shape: Sequence[int], stored: Sequence[Tensor], numbers: Sequence[int] = ()
) -> str:
    """The path of the file of values that ``scheme`` computes from ``stored``.

    Raises:
        CoverageError: a stored tensor does not lie in one piece.
    """
    parts = tuple(_part(tensor) for tensor in stored)
    said = Virtual(scheme, dtype.torch_name, tuple(shape), parts, tuple(numbers))
    return f"{parts[0].file}{_MARK}{json.dumps(said, separators=(',', ':'))}"


def _part(tensor: Tensor) -> Part:
    regions = list(tensor.regions)
    if len(regions) != 1 or not isinstance(regions[0], Region):
        raise CoverageError(f"{tensor.label()} does not lie in one piece.")
    return Part(regions[0].file, regions[0].offset, tensor.dtype.torch_name, tensor.numel)


def is_virtual(path: str) -> bool:
    return _MARK in path


def real_file(path: str) -> str:
    """The file a path means to a person: itself, or the one a virtual file decodes."""
    return path.partition(_MARK)[0]


def files_behind(path: str) -> tuple[str, ...]:
    """The files whose bytes are read for a path: itself, or those that a virtual file is decoded from."""
    if _MARK not in path:
        return (path,)
    return tuple(dict.fromkeys(part.file for part in parsed(path).parts))


@lru_cache(maxsize=4096)
def parsed(path: str) -> Virtual:
    scheme, dtype, shape, parts, numbers = json.loads(path.partition(_MARK)[2])
    return Virtual(scheme, dtype, tuple(shape), tuple(Part(*part) for part in parts), tuple(numbers))
