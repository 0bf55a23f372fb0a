"""safetensors files: reading and checking a header, and laying out a new file.

The format (github.com/huggingface/safetensors, README, "Format"): eight bytes of header length, a
JSON object of name -> {dtype, shape, data_offsets} padded with spaces, then the data, without holes.
"""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import xxhash

from ckpt_tool.canonical import DType, SourceFile, Tensor, contiguous
from ckpt_tool.errors import UnreadableError
from ckpt_tool.layout import Fill, Literal, Slot, TargetFile
from ckpt_tool.limits import MOST_DIMENSIONS
from ckpt_tool.storage import Reader

_CODES = {
    "F64": DType.float64,
    "F32": DType.float32,
    "F16": DType.float16,
    "BF16": DType.bfloat16,
    "F8_E4M3": DType.float8_e4m3fn,
    "F8_E5M2": DType.float8_e5m2,
    "F8_E4M3FNUZ": DType.float8_e4m3fnuz,
    "F8_E5M2FNUZ": DType.float8_e5m2fnuz,
    "F8_E8M0": DType.float8_e8m0fnu,
    "I64": DType.int64,
    "I32": DType.int32,
    "I16": DType.int16,
    "I8": DType.int8,
    "U64": DType.uint64,
    "U32": DType.uint32,
    "U16": DType.uint16,
    "U8": DType.uint8,
    "BOOL": DType.bool_,
}
_CODE_OF = {dtype: code for code, dtype in _CODES.items()}
_MAX_HEADER = 100_000_000  # the specification's limit
_LFS = b"version "  # how a pointer begins, in place of a length


class SafetensorsFile:
    """The header of one file: ``tensors`` by name, ``metadata``, ``source``.

    Raises:
        UnreadableError: the header breaks the specification; the message says where.
    """

    def __init__(self, reader: Reader, path: str, *, state: str) -> None:
        where = f"{reader.root}/{path}"
        size = reader.size(path)
        if size < 8:
            raise UnreadableError(f"{where} is too short to be a safetensors file ({size} bytes).")
        first = reader.read(path, 0, 8)
        if first == _LFS:
            raise UnreadableError(
                f"{where} is a pointer of git-lfs and not the file itself. Run `git lfs pull` in its "
                "repository."
            )
        length = int.from_bytes(first, "little")
        if length > _MAX_HEADER or 8 + length > size:
            raise UnreadableError(
                f"{where}: the header claims {length} bytes in a file of {size}. Not a safetensors "
                "file, or a truncated one."
            )
        raw = reader.read(path, 8, length)
        header = _parse(raw, where)
        self.metadata = _metadata(header.pop("__metadata__", {}), where)
        self.tensors: dict[str, Tensor] = {}
        spans = []
        for name, entry in header.items():
            _check_name(name, where)
            shape, dtype, begin, end = _entry(entry, name, where)
            spans.append((begin, end, name))
            regions = contiguous(shape, path, 8 + length + begin) if begin != end else ()
            self.tensors[name] = Tensor(name, state, shape, dtype, regions)
        position = 0
        for begin, end, name in sorted(spans):
            if begin != position:
                raise UnreadableError(
                    f"{where}: tensor {name} begins at byte {begin} of the data; the one before ends "
                    f"at {position}. A safetensors file has no gaps and no overlaps."
                )
            position = end
        if 8 + length + position != size:
            raise UnreadableError(
                f"{where}: the header describes {8 + length + position} bytes, the file has {size}. "
                "Truncated, or two files in one."
            )
        start = 8 + length
        stored = [n for begin, end, _ in spans if begin < end for n in (start + begin, end - begin)]
        self.source = SourceFile(path, size, xxhash.xxh3_64_hexdigest(raw), stored=array("q", stored))


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            counts = Counter(name for name, _ in pairs)
            double = next(name for name, count in counts.items() if count > 1)
            raise UnreadableError(f"{where}: the header names {double} twice.")
        return found

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    if not raw.startswith(b"{"):
        raise UnreadableError(f"{where}: the header does not begin with '{{'. Not a safetensors file.")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"{where}: the header is not JSON ({error}).") from error
    if not isinstance(header, dict):
        raise UnreadableError(f"{where}: the header is not a JSON object.")
    return header


def _check_name(name: str, where: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UnreadableError(f"{where}: the tensor name {name!a} is no valid Unicode.") from error


def _metadata(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise UnreadableError(f"{where}: __metadata__ is not a map from text to text: {value!r:.80}.")
    return value


def _entry(entry: Any, name: str, where: str) -> tuple[tuple[int, ...], DType, int, int]:
    try:
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sound = len(shape) <= MOST_DIMENSIONS and all(
            type(number) is int and 0 <= number < 1 << 63 for number in (*shape, begin, end)
        )
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise UnreadableError(f"{where}: the header's entry for {name} is malformed: {str(entry)[:200]}.")
    if not isinstance(code, str) or code not in _CODES:
        raise UnreadableError(f"{where}: tensor {name} has dtype {code}, which ckpt-tool does not read.")
    dtype = _CODES[code]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise UnreadableError(
            f"{where}: tensor {name} of shape {list(shape)} and dtype {code} needs "
            f"{math.prod(shape) * dtype.itemsize} bytes; its offsets span {end - begin}."
        )
    return shape, dtype, begin, end


def safetensors_file(
    path: str, tensors: Sequence[tuple[str, Slot]], metadata: Mapping[str, str]
) -> TargetFile:
    """The layout of a file that holds ``tensors`` in that order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, slot in tensors:
        header[name] = {
            "dtype": _CODE_OF[slot.dtype],
            "shape": list(slot.shape),
            "data_offsets": [position, position + slot.nbytes],
        }
        position += slot.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    fills = tuple(
        Fill(
            start + header[name]["data_offsets"][0],
            slot.tensor,
            slot.start,
            slot.numel,
            slot.dtype,
            slot.copy,
        )
        for name, slot in tensors
    )
    literal = Literal(0, len(text).to_bytes(8, "little") + text)
    return TargetFile(path, start + position, (literal,), fills)
