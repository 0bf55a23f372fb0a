"""Casts against torch, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ckpt_tool.canonical import DType
from ckpt_tool.errors import ExecutionError
from ckpt_tool.execute.casts import cast, refuse_overflow

TORCH = {DType.float32: torch.float32, DType.bfloat16: torch.bfloat16, DType.float16: torch.float16}
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _check(values: torch.Tensor, source: DType, target: DType) -> None:
    expected = values.to(TORCH[target])
    data = bytearray(values.view(BITS[source.itemsize]).numpy().tobytes())
    out = bytearray(values.numel() * target.itemsize)
    cast(memoryview(data), source, memoryview(out), target)
    found = torch.frombuffer(out, dtype=TORCH[target])
    broken = torch.isnan(values)
    kind = BITS[target.itemsize]
    assert torch.equal(found.view(kind)[~broken], expected.view(kind)[~broken])
    assert bool(torch.isnan(found)[broken].all())


@pytest.mark.parametrize("lower", [0, 1, 0x1234, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
@pytest.mark.parametrize("target", [DType.bfloat16, DType.float16])
def test_every_upper_half_of_a_float32_is_rounded_as_torch_rounds_it(lower: int, target: DType) -> None:
    bits = (np.arange(1 << 16, dtype=np.uint32) << 16) | np.uint32(lower)
    _check(torch.from_numpy(bits.view(np.float32).copy()), DType.float32, target)


@pytest.mark.parametrize("target", [DType.bfloat16, DType.float16])
def test_random_bits_are_rounded_as_torch_rounds_them(target: DType) -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint64).astype(np.uint32)
    _check(torch.from_numpy(bits.view(np.float32).copy()), DType.float32, target)


@pytest.mark.parametrize("source", [DType.bfloat16, DType.float16])
def test_every_half_is_widened_exactly(source: DType) -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    _check(bits.view(TORCH[source]), source, DType.float32)


@pytest.mark.parametrize(
    ("source", "target"), [(DType.bfloat16, DType.float16), (DType.float16, DType.bfloat16)]
)
def test_every_half_becomes_the_other_kind_as_torch_makes_it(source: DType, target: DType) -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    _check(bits.view(TORCH[source]), source, target)


@pytest.mark.parametrize("target", [DType.bfloat16, DType.float16, DType.float32])
def test_float64_is_rounded_as_torch_rounds_it(target: DType) -> None:
    """To the halves in two steps: seen beside the middle of two of them, by less than a float32 shows."""
    half = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    middle = (half[:-1] + half[1:]) / 2
    values = np.concatenate([middle, middle * (1 + 2.0**-40), middle * (1 - 2.0**-40)])
    _check(torch.from_numpy(values), DType.float64, target)


def test_nothing_is_fine() -> None:
    cast(memoryview(bytearray()), DType.float32, memoryview(bytearray()), DType.bfloat16)


def test_integers_are_not_cast() -> None:
    with pytest.raises(ExecutionError, match="int32 to bfloat16"):
        cast(memoryview(bytearray(4)), DType.int32, memoryview(bytearray(2)), DType.bfloat16)


@pytest.mark.parametrize("source", [DType.float32, DType.bfloat16, DType.float64])
@pytest.mark.parametrize("at", [0, (1 << 16) - 1, 1 << 16, 150_000, 199_999])
def test_a_number_too_large_for_fp16_is_found_wherever_it_is(source: DType, at: int) -> None:
    values = torch.ones(200_000, dtype=getattr(torch, source.torch_name))
    out = bytearray(2 * values.numel())
    for number, refused in ((3.0, False), (float("inf"), False), (float("nan"), False), (1e6, True)):
        values[at] = number
        data = memoryview(bytearray(values.view(BITS[source.itemsize]).numpy().tobytes()))
        cast(data, source, memoryview(out), DType.float16)
        if refused:
            with pytest.raises(ExecutionError, match="at least 1 of its numbers"):
                refuse_overflow(data, source, memoryview(out))
        else:
            refuse_overflow(data, source, memoryview(out))
