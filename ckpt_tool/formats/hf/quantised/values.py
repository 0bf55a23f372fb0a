"""Making tensors of values out of stored ones, each of which is used once or named."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from ckpt_tool.canonical import Box, DType, Encoding, Region, Tensor
from ckpt_tool.containers.decoding.virtual import virtual_path
from ckpt_tool.errors import UnreadableError
from ckpt_tool.storage import Reader

FLOAT8 = (DType.float8_e4m3fn, DType.float8_e5m2)
# In which scales are multiplied, and what values are then.
SCALES = (DType.float32, DType.bfloat16, DType.float16)


class Model:
    """The stored tensors of a model by name, and what becomes of them."""

    def __init__(self, tensors: Mapping[str, Tensor], reader: Reader) -> None:
        self.tensors, self._reader = tensors, reader
        self._made: dict[str, Tensor] = {}
        self._used: set[str] = set()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.tensors.items())

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(name)

    def beside(self, names: Iterable[str]) -> tuple[Tensor, ...]:
        """Those of the names that the files have."""
        return tuple(self.tensors[name] for name in names if name in self.tensors)

    def integers(self, tensor: Tensor) -> tuple[int, ...]:
        """The elements of a small stored tensor of integers, read now."""
        region = next(iter(tensor.regions))
        data = self._reader.read(region.file, region.offset, tensor.nbytes)
        size = tensor.dtype.itemsize
        return tuple(
            int.from_bytes(data[at : at + size], "little", signed=True) for at in range(0, len(data), size)
        )

    def put(self, key: str, value: Tensor, stored: Iterable[Tensor]) -> None:
        """``value`` takes the place of the stored tensor ``key``; ``stored`` are in it."""
        if key in self._made or (value.name != key and value.name in self.tensors):
            raise UnreadableError(f"{value.name} is in the files twice, once as {key}.")
        self._made[key] = value
        self._used |= {str(tensor.name) for tensor in stored}

    def refuse_rest(self, method: str, is_part: Callable[[str], bool]) -> None:
        """Parts of quantised weights, by their names, that no weight has used cannot be read either."""
        for name, tensor in self.tensors.items():
            if name not in self._made and name not in self._used and is_part(name):
                reason = "no weight that it belongs to is there, or was read."
                self._made[name] = unreadable(tensor, method, reason)

    def result(self) -> dict[str, Tensor]:
        """All tensors, by name: values where there are any, and those that nothing used as they are."""
        found: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            if name in self._made:
                found[str(self._made[name].name)] = self._made[name]
            elif name not in self._used:
                found[name] = tensor
        return found


def unreadable(tensor: Tensor, scheme: str, reason: str = "") -> Tensor:
    return replace(tensor, encoding=Encoding(scheme, (), reason))


def values_of(
    weight: Tensor,
    name: str,
    shape: Sequence[int],
    dtype: DType,
    scheme: tuple[str, str],
    stored: Sequence[Tensor],
    numbers: Sequence[int],
    more: Iterable[Tensor] = (),
    *,
    transposed: bool = False,
) -> Tensor:
    """The tensor ``name`` of ``shape`` and ``dtype`` that is computed from ``stored``.

    Args:
        scheme: its name in ``containers.decoding.known``, and what it is called for people.
        numbers: what the scheme needs to know.
        more: tensors that belong to it and have no part in its values.
        transposed: the files' rows are its columns.
    """
    rows, columns = shape[-2:]
    inside = (*shape[:-2], columns, rows) if transposed else tuple(shape)
    path = virtual_path(scheme[0], dtype, inside, stored, numbers)
    regions: tuple[Region | Box, ...] = (Region(0, math.prod(shape), path, 0),)
    if transposed:
        strides = (dtype.itemsize, rows * dtype.itemsize)
        regions = (Box((0, 0), (rows, columns), (1, 1), path, 0, strides),)
    return replace(
        weight,
        name=name,
        shape=tuple(shape),
        dtype=dtype,
        regions=regions,
        encoding=Encoding(scheme[1], (*stored, *more)),
    )


def do_not_fit(weight: Tensor, others: Iterable[Tensor], expected: str) -> UnreadableError:
    """The error about stored tensors whose shapes or dtypes do not belong together."""
    shapes = ", ".join(f"{other.name} is {other.dtype} {list(other.shape)}" for other in others)
    return UnreadableError(
        f"{weight.name} is {weight.dtype} {list(weight.shape)}, {shapes}; {expected} they do not belong "
        "together. Download the files again, or check config.json."
    )


def scaled_block(
    weight: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int] | None
) -> tuple[int, int] | None:
    """The rows and columns that one element of a scale is for; None where the shapes do not fit."""
    if len(weight) < 2:
        return None
    *lead, rows, columns = weight
    all_of_it: list[tuple[int, ...]] = [(*lead,), (*lead, 1, 1)]
    if math.prod(lead) == 1:
        all_of_it += [(), (1,)]
    if scale in all_of_it:
        return rows, columns
    if block is None:
        return (1, columns) if scale in [(*lead, rows), (*lead, rows, 1)] else None
    fits = scale == (*lead, -(-rows // block[0]), -(-columns // block[1]))
    return block if fits else None


def is_float8(tensor: Tensor) -> bool:
    return len(tensor.shape) > 1 and tensor.dtype in FLOAT8


def blocked(
    weight: Tensor,
    scale: Tensor,
    block: tuple[int, int],
    label: str,
    *,
    dtype: DType = DType.float32,
    zero: Tensor | None = None,
    more: Iterable[Tensor] = (),
) -> Tensor:
    """8-bit numbers times the scale of their block, under the weight's own name."""
    stored = (weight, scale) if zero is None else (weight, scale, zero)
    name = str(weight.name)
    return values_of(weight, name, weight.shape, dtype, ("blocks", label), stored, block, more)


def block_label(kind: str, block: tuple[int, int], shape: Sequence[int]) -> str:
    if block == tuple(shape[-2:]):
        return f"{kind} per tensor"
    if block == (1, shape[-1]):
        return f"{kind} per channel"
    return f"{kind} {block[0]}x{block[1]}"


def with_more(value: Tensor, more: Iterable[Tensor]) -> Tensor:
    """The tensor of values with what else belongs to it and has no part in its values."""
    if value.encoding is None:
        return value
    return replace(value, encoding=replace(value.encoding, stored=(*value.encoding.stored, *more)))


def stored_in(value: Tensor) -> tuple[Tensor, ...]:
    return value.encoding.stored if value.encoding else ()
