"""Quantised tensors as files of values: a reader in which such files can be read like any other.

A *virtual path* names stored tensors and how to decode them, all in one string; the bytes of that file
are the tensor's values in row-major order. Regions, slices, transposes and stacks of quantised tensors
are thus regions of virtual files, and nothing else in the program knows of quantisation. Decoding goes in
small steps inside ``read_into``, so its memory is bounded whatever is asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

from ckpt_tool.containers.decoding.known import SCHEMES
from ckpt_tool.containers.decoding.stored import Stored
from ckpt_tool.containers.decoding.virtual import Virtual, is_virtual, parsed, real_file
from ckpt_tool.errors import ExecutionError
from ckpt_tool.storage import Reader, Token

_STEP = 1 << 18  # values decoded at once: about four megabytes with all that is in between


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
        if not is_virtual(path):
            self._inner.read_into(path, offset, buffer)
            return
        said = parsed(path)
        itemsize = said.itemsize
        if offset % itemsize or len(buffer) % itemsize:
            raise ExecutionError(f"{real_file(path)}: part of a decoded value was asked for.")
        position, end = offset // itemsize, (offset + len(buffer)) // itemsize
        while position < end:
            step, skip = divmod(position, _STEP)
            count = min(_STEP - skip, end - position)
            at = position * itemsize - offset
            out = buffer[at : at + count * itemsize]
            if count * 2 > _STEP:
                self._decode(said, position, count, out)
            else:
                near = self._step(path, said, step)
                out[:] = near[skip * itemsize : (skip + count) * itemsize]
            position += count

    def close(self) -> None:
        self._inner.close()

    def _decode(self, said: Virtual, start: int, numel: int, out: memoryview) -> None:
        import numpy as np

        with np.errstate(all="ignore"):  # of damaged scales there come infinities, as in torch
            SCHEMES[said.scheme](said, Stored(self._inner, said), start, numel, out)

    def _step(self, path: str, said: Virtual, step: int) -> memoryview:
        """All values of one step, kept for the next small read of this thread."""
        key = (path, step)
        if getattr(self._near, "key", None) != key:
            numel = min(_STEP, said.numel - step * _STEP)
            values = memoryview(bytearray(numel * said.itemsize))
            self._decode(said, step * _STEP, numel, values)
            self._near.key, self._near.values = key, values
        kept: memoryview = self._near.values
        return kept
