"""Scalar optimizer states (``step``): a 0-d tensor with torch's optimizers, an int with DeepSpeed's own."""

from __future__ import annotations

import struct

from ckpt_tool.canonical import DType, Scalar
from ckpt_tool.containers.pickle_records import TensorRecord
from ckpt_tool.containers.torch_zip import Inline, TorchArchive
from ckpt_tool.errors import UnreadableError

_CODES = {DType.float32: "<f", DType.float64: "<d", DType.int64: "<q", DType.int32: "<i"}


def scalar_state(archive: TorchArchive, value: TensorRecord | int | float) -> Scalar:
    """A scalar as it stands in an archive, with its kind, which optimizers insist on."""
    if not isinstance(value, TensorRecord):
        return Scalar(value, None)
    if value.dtype not in _CODES or value.numel != 1:
        raise UnreadableError(
            f"{archive.where}: a scalar optimizer state of dtype {value.dtype} and shape {value.shape}."
        )
    return Scalar(struct.unpack(_CODES[value.dtype], archive.read_tensor(value))[0], value.dtype)


def saved_scalar(scalar: Scalar) -> Inline | int | float:
    """The same, to be put into a new archive."""
    if scalar.dtype is None:
        return scalar.value
    return Inline(struct.pack(_CODES[scalar.dtype], scalar.value), (), scalar.dtype)
