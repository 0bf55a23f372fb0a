"""Each scheme against its definition, written out in torch a matrix at a time: ragged last groups, zero
points, stacks, and any range of values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ckpt_tool.canonical import WEIGHT, DType, Tensor
from ckpt_tool.containers.decoding.reader import DecodingReader
from ckpt_tool.containers.decoding.virtual import files_behind, real_file, virtual_path
from ckpt_tool.containers.safetensors import SafetensorsFile
from ckpt_tool.errors import ExecutionError
from ckpt_tool.storage import LocalReader
from tests.formats.hub_files import equal

Shape = tuple[int, ...]
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def bits(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Every pattern of bits alike, NaN apart."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    if dtype is torch.float8_e4m3fn:
        raw[(raw & 0x7F) == 0x7F] = 0x12
    return raw.view(dtype)


def power(exponents: torch.Tensor) -> torch.Tensor:
    """2 ** (byte - 127)."""
    return torch.exp2(exponents.to(torch.float64) - 127)


def scales(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 0.01).to(dtype)


def as_words(integers: torch.Tensor, width: int) -> torch.Tensor:
    """Unsigned integers along the last dimension in int32 words, the lowest bits first."""
    in_word = 32 // width
    padded = torch.nn.functional.pad(integers, (0, -integers.shape[-1] % in_word))
    parts = padded.reshape(*padded.shape[:-1], -1, in_word).to(torch.int64)
    words = (parts << (torch.arange(in_word) * width)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


class Held:
    """Stored tensors in a real file, and what virtual files say of them."""

    def __init__(self, directory: Path, **stored: torch.Tensor) -> None:
        save_file({key: tensor.contiguous() for key, tensor in stored.items()}, directory / "f.safetensors")
        self.inner = LocalReader(directory)
        self.reader = DecodingReader(self.inner)
        self.tensors = SafetensorsFile(self.inner, "f.safetensors", state=WEIGHT).tensors

    def path(
        self, scheme: str, dtype: DType, shape: tuple[int, ...], *names: str, numbers: tuple[int, ...] = ()
    ) -> str:
        return virtual_path(scheme, dtype, shape, [self.tensors[name] for name in names], numbers)

    def check(self, path: str, expected: torch.Tensor) -> None:
        """All values, and ranges that begin and end anywhere."""
        raw = expected.contiguous().view(torch.uint8).numpy().tobytes()
        size, numel = expected.dtype.itemsize, expected.numel()
        columns = expected.shape[-1]
        edges = (0, 1, 3, columns - 1, columns, columns + 7, 3 * columns + 5, numel // 2, numel - 1, numel)
        edges = tuple(sorted({edge for edge in edges if edge <= numel}))
        for start in edges:
            for end in edges:
                if start < end:
                    found = self.reader.read(path, start * size, (end - start) * size)
                    assert found == raw[start * size : end * size], (start, end)


# ---- integers in words


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    ("lead", "rows", "columns", "group"),
    [
        ((), 24, 64, 32),
        ((), 13, 36, 32),
        ((), 9, 20, 8),
        ((), 5, 7, 7),
        ((3,), 13, 52, 32),
        ((), 300, 1100, 128),
    ],
)
@pytest.mark.parametrize("width", [4, 8])
def test_packed_integers(
    width: int,
    lead: tuple[int, ...],
    rows: int,
    columns: int,
    group: int,
    zeros: bool,
    dtype: torch.dtype,
    tmp_path: Path,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(rows)
    integers = torch.randint(0, 1 << width, (*lead, rows, columns), generator=generator)
    groups = -(-columns // group)
    scale = scales(*lead, rows, groups, dtype=dtype)
    points = torch.randint(0, 1 << width, (*lead, rows, groups), generator=generator)
    packed_points = as_words(points.transpose(-1, -2), width).transpose(-1, -2)
    held = Held(tmp_path, w=as_words(integers, width), s=scale, z=packed_points)
    each = torch.arange(columns) // group
    offset = points[..., each] if zeros else 1 << (width - 1)
    expected = (integers - offset).to(dtype) * scale[..., each]
    names = ("w", "s", "z") if zeros else ("w", "s")
    shape = (*lead, rows, columns)
    path = held.path("packed", DType[str(dtype)[6:]], shape, *names, numbers=(width, group, int(zeros)))
    held.check(path, expected)


# ---- 8-bit numbers in blocks


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("lead", "rows", "columns", "block"),
    [((), 24, 64, (1, 64)), ((), 300, 1100, (1, 1100)), ((), 13, 36, (1, 32)), ((2,), 13, 36, (1, 36)),
     ((2,), 13, 36, (8, 16)), ((3,), 8, 8, (8, 8))],
)  # fmt: skip
def test_blocks(
    lead: tuple[int, ...],
    rows: int,
    columns: int,
    block: tuple[int, int],
    dtype: torch.dtype,
    kind: torch.dtype,
    tmp_path: Path,
) -> None:
    weight = bits(*lead, rows, columns, dtype=kind)
    grid = (*lead, -(-rows // block[0]), -(-columns // block[1]))
    scale = scales(*grid, dtype=dtype)
    points = bits(*grid, dtype=torch.int8, seed=5)
    held = Held(tmp_path, w=weight, s=scale, z=points)
    at = (..., (torch.arange(rows) // block[0])[:, None], (torch.arange(columns) // block[1])[None, :])
    wide = weight.to(dtype)
    shape, value = weight.shape, DType[str(dtype)[6:]]
    held.check(held.path("blocks", value, shape, "w", "s", numbers=block), wide * scale[at])
    if kind is torch.int8:
        expected = (wide - points.to(dtype)[at]) * scale[at]
        held.check(held.path("blocks", value, shape, "w", "s", "z", numbers=block), expected)


def test_mxfp8_in_every_finite_scale(tmp_path: Path) -> None:
    weight = bits(15, 544, dtype=torch.float8_e4m3fn)
    exponents = torch.arange(255, dtype=torch.uint8).reshape(15, 17)
    stored = {"as_bytes": exponents, "as_floats": exponents.clone().view(torch.float8_e8m0fnu)}
    held = Held(tmp_path, w=weight, **stored)
    expected = weight.float() * power(exponents).float().repeat_interleave(32, 1)
    for scale in stored:
        held.check(held.path("blocks", DType.float32, (15, 544), "w", scale, numbers=(1, 32)), expected)


# ---- 4-bit floats


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    raw = packed.view(torch.uint8).to(torch.int64)
    return E2M1[torch.stack([raw & 15, raw >> 4], -1).flatten(-2)]


@pytest.mark.parametrize(
    ("packed", "exponent"), [(torch.uint8, torch.uint8), (torch.int8, torch.float8_e8m0fnu)]
)
def test_mxfp4_in_every_scale(packed: torch.dtype, exponent: torch.dtype, tmp_path: Path) -> None:
    weight = bits(2, 16, 128, dtype=packed)
    raw = torch.arange(256, dtype=torch.uint8).repeat(1).reshape(2, 16, 8)
    held = Held(tmp_path, w=weight, s=raw.view(exponent))
    factor = power(raw)
    if exponent is torch.float8_e8m0fnu:
        factor[raw == 255] = float("nan")
    expected = (nibbles(weight).double() * factor.repeat_interleave(32, -1)).to(torch.bfloat16)
    path = held.path("mxfp4", DType.bfloat16, (2, 16, 256), "w", "s")
    found = torch.frombuffer(
        bytearray(held.reader.read(path, 0, expected.numel() * 2)), dtype=torch.bfloat16
    )
    expected = torch.where(expected.isnan(), torch.tensor(float("nan"), dtype=torch.bfloat16), expected)
    assert equal(found.reshape(expected.shape), expected)


@pytest.mark.parametrize("divides", [False, True])
@pytest.mark.parametrize("lead", [(), (3,)])
def test_nvfp4(lead: tuple[int, ...], divides: bool, tmp_path: Path) -> None:
    weight = bits(*lead, 21, 24, dtype=torch.uint8)
    scale = bits(*lead, 21, 3, dtype=torch.float8_e4m3fn, seed=2)
    whole = torch.rand(*(lead or (1,)), generator=torch.Generator().manual_seed(3)) * 700
    held = Held(tmp_path, w=weight, s=scale, g=whole)
    each = whole.reshape(*whole.shape, 1, 1) if lead else whole
    combined = scale.float() / each if divides else scale.float() * each
    expected = nibbles(weight) * combined.repeat_interleave(16, -1)
    path = held.path("nvfp4", DType.float32, (*lead, 21, 48), "w", "s", "g", numbers=(16, int(divides)))
    held.check(path, expected)


# ---- AWQ and GPTQ


@pytest.mark.parametrize(("inputs", "outputs", "group"), [(64, 32, 16), (40, 24, 16), (384, 1024, 128)])
def test_awq(inputs: int, outputs: int, group: int, tmp_path: Path) -> None:
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # the output that each nibble of a word holds
    generator = torch.Generator().manual_seed(inputs)
    groups = -(-inputs // group)
    integers = torch.randint(0, 16, (inputs, outputs), generator=generator)
    points = torch.randint(0, 16, (groups, outputs), generator=generator)
    scale = scales(groups, outputs, dtype=torch.float16)

    def shuffled(plain: torch.Tensor) -> torch.Tensor:
        return as_words(plain.reshape(len(plain), -1, 8)[..., order].reshape(plain.shape), 4)

    held = Held(tmp_path, w=shuffled(integers), z=shuffled(points), s=scale)
    each = torch.arange(inputs) // group
    expected = (integers - points[each]).to(torch.float16) * scale[each]
    held.check(
        held.path("awq", DType.float16, (inputs, outputs), "w", "z", "s", numbers=(group,)), expected
    )


@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("order", ["plain", "act-order", "repeated"])
@pytest.mark.parametrize(("inputs", "outputs", "group"), [(64, 32, 16), (40, 24, 16), (384, 1024, 128)])
def test_gptq(
    inputs: int, outputs: int, group: int, order: str, offset: int, width: int, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(inputs)
    groups = -(-inputs // group)
    integers = torch.randint(0, 1 << width, (inputs, outputs), generator=generator)
    points = torch.randint(0, (1 << width) - 1, (groups, outputs), generator=generator)
    scale = scales(groups, outputs, dtype=torch.float16)
    each = torch.arange(inputs) // group
    if order != "plain":
        each = each[torch.randperm(inputs, generator=generator)] if order == "act-order" else each * 0
    words = as_words(integers.t(), width).t()
    held = Held(tmp_path, w=words, z=as_words(points, width), s=scale, g=each.to(torch.int32))
    names = ("w", "z", "s") if order == "plain" else ("w", "z", "s", "g")
    expected = (integers - (points[each] + offset)).to(torch.float16) * scale[each]
    path = held.path("gptq", DType.float16, (inputs, outputs), *names, numbers=(width, group, offset))
    held.check(path, expected)


# ---- virtual files


def test_part_of_a_value_is_no_answer(tmp_path: Path) -> None:
    held = Held(tmp_path, w=bits(4, 32, dtype=torch.int8), s=scales(4, 1))
    path = held.path("blocks", DType.bfloat16, (4, 32), "w", "s", numbers=(1, 32))
    with pytest.raises(ExecutionError, match="part of a decoded value"):
        held.reader.read(path, 1, 2)
    assert (real_file(path), files_behind(path)) == ("f.safetensors", ("f.safetensors",))
    assert isinstance(held.tensors["w"], Tensor)
