"""Quantised tensors as files of values: a reader in which such files can be read like any other.

A *virtual path* names a stored tensor and how to decode it, all in one string; the bytes of that file are
the tensor's values in row-major order. Regions, slices, transposes and stacks of quantised tensors are
thus regions of virtual files, and nothing else in the program knows of quantisation. Decoding goes in
small steps inside ``read_into``, so its memory is bounded whatever is asked for.

- ``fp8``: float8 [..., R, C] times the scale of its block, [..., ceil(R / r), ceil(C / c)]; the last
  block of a row or column may be ragged. Values are float32, the product of both rounded once
  (DeepSeek-V3, README_WEIGHTS.md; transformers 5.20, integrations/finegrained_fp8.py, Fp8Dequantize).
- ``mxfp4``: uint8 pairs of 4-bit floats, the low nibble first, 32 values to a scale of 2 ** (byte - 127)
  (OCP Microscaling Formats 1.0; transformers 5.20, integrations/mxfp4.py). Values are bfloat16, exact.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from ckpt_tool.canonical import DType, Region, Tensor
from ckpt_tool.containers.float8 import as_float32
from ckpt_tool.errors import CoverageError, ExecutionError
from ckpt_tool.storage import Reader, Token

_MARK = "::decoded:"
_STEP = 1 << 18  # values decoded at once: a megabyte at most
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1, without the sign
MXFP4_BLOCK = 32


class _Virtual(NamedTuple):
    """What a virtual path says. ``at`` and ``scale_at`` are byte offsets in ``file`` and ``scale_file``;
    ``numel`` counts
    values, ``rows`` and ``columns`` are those of one matrix, ``block`` the extent of one scale."""

    scheme: str
    file: str
    at: int
    dtype: str
    scale_file: str
    scale_at: int
    scale_dtype: str
    numel: int
    rows: int
    columns: int
    block: tuple[int, int]


def fp8_path(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> str:
    """The virtual file of a float8 tensor with block scales; its values are float32."""
    return _path("fp8", weight, scale, weight.shape[-2], weight.shape[-1], block)


def mxfp4_path(blocks: Tensor, scales: Tensor) -> str:
    """The virtual file of an MXFP4 tensor; its values are bfloat16."""
    columns = blocks.shape[-2] * MXFP4_BLOCK
    return _path("mxfp4", blocks, scales, blocks.shape[-3], columns, (1, MXFP4_BLOCK))


def _path(scheme: str, data: Tensor, scale: Tensor, rows: int, columns: int, block: tuple[int, int]) -> str:
    (file, at), (scale_file, scale_at) = _place(data), _place(scale)
    kinds = data.dtype.torch_name, scale.dtype.torch_name
    numel = data.numel * (2 if scheme == "mxfp4" else 1)
    said = _Virtual(scheme, file, at, kinds[0], scale_file, scale_at, kinds[1], numel, rows, columns, block)
    return f"{file}{_MARK}{json.dumps(said, separators=(',', ':'))}"


def _place(tensor: Tensor) -> tuple[str, int]:
    regions = list(tensor.regions)
    if len(regions) != 1 or not isinstance(regions[0], Region):
        raise CoverageError(f"{tensor.label()} does not lie in one piece.")
    return regions[0].file, regions[0].offset


def real_file(path: str) -> str:
    """The file a path means to a person: itself, or the one a virtual file decodes."""
    return path.partition(_MARK)[0]


def files_behind(path: str) -> tuple[str, ...]:
    """The files whose bytes are read for a path: itself, or those that a virtual file is decoded from."""
    if _MARK not in path:
        return (path,)
    virtual = _parsed(path)
    return (virtual.file, virtual.scale_file)


@lru_cache(maxsize=4096)
def _parsed(path: str) -> _Virtual:
    found = json.loads(path.partition(_MARK)[2])
    return _Virtual._make([*found[:-1], tuple(found[-1])])


class DecodingReader:
    """A reader with virtual files besides the real ones."""

    def __init__(self, inner: Reader) -> None:
        self._inner = inner
        self._near = threading.local()  # per thread: the last few values decoded, for scattered small reads

    @property
    def root(self) -> str:
        return self._inner.root

    def list(self, directory: str = "") -> list[str]:
        return self._inner.list(directory)

    def is_directory(self, path: str) -> bool:
        return self._inner.is_directory(path)

    def changed(self) -> str | None:
        return self._inner.changed()

    def states(self) -> Mapping[str, Token]:
        return self._inner.states()

    def size(self, path: str) -> int:
        return self._inner.size(real_file(path))

    def read(self, path: str, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        self.read_into(path, offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        if _MARK not in path:
            self._inner.read_into(path, offset, buffer)
            return
        virtual = _parsed(path)
        itemsize = 4 if virtual.scheme == "fp8" else 2
        if offset % itemsize or len(buffer) % itemsize:
            raise ExecutionError(f"{real_file(path)}: part of a decoded value was asked for.")
        decode = self._fp8 if virtual.scheme == "fp8" else self._mxfp4
        position, end = offset // itemsize, (offset + len(buffer)) // itemsize
        while position < end:
            step, skip = divmod(position, _STEP)
            count = min(_STEP - skip, end - position)
            at = position * itemsize - offset
            out = buffer[at : at + count * itemsize]
            if count * 2 > _STEP:
                decode(virtual, position, count, out)
            else:
                near = self._step(path, virtual, step, itemsize, decode)
                out[:] = near[skip * itemsize : (skip + count) * itemsize]
            position += count

    def close(self) -> None:
        self._inner.close()

    def _step(
        self, path: str, virtual: _Virtual, step: int, itemsize: int, decode: Callable[..., None]
    ) -> memoryview:
        """All values of one step, kept for the next small read of this thread."""
        key = (path, step)
        if getattr(self._near, "key", None) != key:
            numel = min(_STEP, virtual.numel - step * _STEP)
            values = memoryview(bytearray(numel * itemsize))
            decode(virtual, step * _STEP, numel, values)
            self._near.key, self._near.values = key, values
        kept: memoryview = self._near.values
        return kept

    def _bytes(self, file: str, offset: int, length: int) -> Any:
        import numpy as np

        data = bytearray(length)
        self._inner.read_into(file, offset, memoryview(data))
        return np.frombuffer(data, np.uint8)

    def _scales(self, file: str, offset: int, dtype: str, numel: int) -> Any:
        """Scales as float32, whatever float they are stored as."""
        return as_float32(self._bytes(file, offset, numel * DType[dtype].itemsize), dtype)

    def _fp8(self, said: _Virtual, start: int, numel: int, out: memoryview) -> None:
        import numpy as np

        raw = self._bytes(said.file, said.at + start, numel)
        values = np.frombuffer(out, np.float32)
        np.take(_float8_values(said.dtype), raw, out=values, mode="wrap")  # 4 times as fast as torch's cast
        across = -(-said.columns // said.block[1])
        down = -(-said.rows // said.block[0])
        position = 0
        while position < numel:  # rows of one matrix that share their scales, or part of one row
            row, column = divmod(start + position, said.columns)
            matrix, row = divmod(row, said.rows)
            if column:
                rows, width = 1, min(said.columns - column, numel - position)
            else:
                left = min(said.block[0] - row % said.block[0], said.rows - row)
                rows = max(1, min(left, (numel - position) // said.columns))
                width = min(said.columns, numel - position)
            first = (matrix * down + row // said.block[0]) * across
            at = said.scale_at + first * DType[said.scale_dtype].itemsize
            scales = self._scales(said.scale_file, at, said.scale_dtype, across)
            each = np.repeat(scales, said.block[1])[column : column + width]
            part = values[position : position + rows * width].reshape(rows, width)
            np.multiply(part, each, out=part)
            position += rows * width

    def _mxfp4(self, said: _Virtual, start: int, numel: int, out: memoryview) -> None:
        import numpy as np

        low, high = start // MXFP4_BLOCK, -(-(start + numel) // MXFP4_BLOCK)
        packed = self._bytes(said.file, said.at + low * 16, (high - low) * 16)
        scales = self._bytes(said.scale_file, said.scale_at + low, high - low)
        index = (scales.astype(np.uint16) << 8)[:, None] | packed.reshape(-1, MXFP4_BLOCK // 2)
        values = np.take(_mxfp4_pairs(), index, mode="wrap").reshape(-1).view(np.uint16)
        skip = start - low * MXFP4_BLOCK
        np.frombuffer(out, np.uint16)[...] = values[skip : skip + numel]


@lru_cache(maxsize=4)
def _float8_values(dtype: str) -> Any:
    """The float32 value of each of the 256 bytes."""
    import numpy as np

    return as_float32(np.arange(256, dtype=np.uint8), dtype)


@lru_cache(maxsize=1)
def _mxfp4_pairs() -> Any:
    """The two bfloat16 values of a byte under a scale, as one 32-bit number, at ``scale * 256 + byte``."""
    import numpy as np

    signed = np.array([*_FP4, *(-value for value in _FP4)], np.float64)
    byte = np.arange(256)
    pairs = np.stack([signed[byte & 15], signed[byte >> 4]], axis=-1)
    values = np.ldexp(1.0, byte - 127)[:, None, None] * pairs
    with np.errstate(over="ignore"):
        bits = values.astype(np.float32).view(np.uint32)
    return (bits >> 16).astype(np.uint16).reshape(-1).view(np.uint32)  # exact: three bits at most
