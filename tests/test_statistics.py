"""The statistics of one pass are torch's, of every dtype, whatever the budget and however tensors lie."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xxhash

from benchmarks.measure import measure as measured
from ckpt_tool.canonical import CASTABLE, DType, ExpertName, Tensor
from ckpt_tool.execute.budget import KIB, MIB, Budget
from ckpt_tool.execute.meter import Silent
from ckpt_tool.geometry import Axis, take
from ckpt_tool.statistics import Statistics, Stats, measure, measuring
from ckpt_tool.storage import LocalReader
from tests.conftest import ROOT, raw, some_of, stored

SMALL, LARGE = Budget.share(128 * KIB, 1), Budget.share(64 * MIB, 2)


def found(directory: Path, tensors: list[Tensor], budget: Budget = LARGE) -> Statistics:
    reader = LocalReader(directory)
    try:
        return measure(tensors, reader, budget, Silent(), sums=True)
    finally:
        reader.close()


def assert_like_torch(stats: Stats, tensor: torch.Tensor) -> None:
    """The numbers of ``tensor``, computed in float64."""
    values = tensor.reshape(-1).to(torch.float32 if tensor.dtype is not torch.float64 else torch.float64)
    values = values.to(torch.float64)
    finite = values[values.isfinite()]
    assert stats.numel == values.numel()
    assert stats.nan == int(values.isnan().sum())
    assert stats.infinite == int(values.isinf().sum())
    assert stats.zeros == int((values == 0).sum())
    assert stats.least == (float(finite.min()) if finite.numel() else math.inf)
    assert stats.most == (float(finite.max()) if finite.numel() else -math.inf)
    size = float(finite.abs().sum())
    if math.isfinite(size):
        assert stats.total == pytest.approx(float(finite.sum()), rel=1e-5, abs=1e-5 * size)
    squares = float(finite.square().sum())
    assert stats.squares == (pytest.approx(squares, rel=1e-5) if math.isfinite(squares) else squares)
    assert stats.digest == xxhash.xxh3_128(raw(tensor)).digest()


@pytest.mark.parametrize("budget", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [dtype.torch_name for dtype in DType])
def test_every_dtype(dtype: str, budget: Budget, tmp_path: Path) -> None:
    """Random bits: NaNs, infinities and subnormals are among them."""
    tensor = some_of(getattr(torch, dtype), 20_011, seed=3)
    tensor[5:9] = 0
    known = stored(tmp_path, {"a.weight": tensor})
    with_numbers = found(tmp_path, list(known.values()), budget).tensors["a.weight", "weight"]
    assert not with_numbers.by_expert
    assert_like_torch(with_numbers.whole, tensor)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e18, 1e30])
def test_squares_neither_overflow_nor_vanish(scale: float, tmp_path: Path) -> None:
    tensor = torch.randn(10_000, generator=torch.Generator().manual_seed(1)) * scale
    known = stored(tmp_path, {"a": tensor})
    assert_like_torch(found(tmp_path, list(known.values())).tensors["a", "weight"].whole, tensor)


def test_sums_that_were_not_asked_for_are_no_numbers(tmp_path: Path) -> None:
    known = stored(tmp_path, {"a": torch.ones(10)})
    reader = LocalReader(tmp_path)
    stats = measure(known.values(), reader, LARGE, Silent()).tensors["a", "weight"].whole
    assert all(map(math.isnan, (stats.total, stats.squares, stats.mean, stats.l2)))
    assert stats.most == 1


def test_experts_one_by_one(tmp_path: Path) -> None:
    tensor = some_of(torch.bfloat16, 5 * 31 * 17, seed=4).reshape(5, 31, 17)
    name = ExpertName("model.layers.0", "gate")
    known = replace(stored(tmp_path, {"w": tensor})["w"], name=name)
    one = found(tmp_path, [known]).tensors[name, "weight"]
    assert one.by_expert
    for number, stats in enumerate(one.parts):
        assert_like_torch(stats, tensor[number])
    assert one.whole.nan == int(tensor.isnan().sum())


@pytest.mark.parametrize("budget", [SMALL, LARGE], ids=["small", "large"])
def test_a_transposed_stack(budget: Budget, tmp_path: Path) -> None:
    tensor = torch.randn(3, 300, 200, generator=torch.Generator().manual_seed(2))
    known = stored(tmp_path, {"w": tensor})["w"]
    turned = take(known, [Axis(0, 0, 3), Axis(2, 0, 200), Axis(1, 0, 300)])
    name = ExpertName("model.layers.0", "down")
    stats = found(tmp_path, [replace(turned, name=name)], budget).tensors[name, "weight"].parts
    for number, part in enumerate(stats):
        assert_like_torch(part, tensor[number].T)


def test_tensors_that_several_workers_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = some_of(torch.float32, 10_000, seed=5)
    known = stored(tmp_path, {"a": tensor})
    whole = found(tmp_path, list(known.values())).tensors["a", "weight"].whole
    monkeypatch.setattr(measuring, "_EXTENT", 999)
    shared = found(tmp_path, list(known.values())).tensors["a", "weight"].whole
    assert shared[:6] == whole[:6]
    assert shared.squares == pytest.approx(whole.squares, rel=1e-6)
    again = found(tmp_path, list(known.values()), SMALL).tensors["a", "weight"].whole
    assert again.digest == shared.digest


def _states(directory: Path, tensors: Mapping[str, torch.Tensor]) -> list[Tensor]:
    """Tensors by their state, as those of one parameter."""
    return [replace(tensor, name="p", state=state) for state, tensor in stored(directory, tensors).items()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1e-4, 1e10, 1e14, 1e30])
def test_update_sizes(scale: float, dtype: torch.dtype, tmp_path: Path) -> None:
    """Of whatever size the moments are; their squares neither overflow nor vanish."""
    generator = torch.Generator().manual_seed(6)
    mean = (torch.randn(30_000, generator=generator) * scale).to(dtype)
    square = (torch.rand(30_000, generator=generator) * min(scale * scale, 1e30)).to(dtype)
    states = _states(tmp_path, {"exp_avg": mean, "exp_avg_sq": square})
    (updates,) = found(tmp_path, states, SMALL).updates["p"]
    size = mean.double().abs() / (square.double() + 1e-16).sqrt()
    assert updates.numel == 30_000
    assert updates.largest == pytest.approx(float(size.max()), rel=1e-4, abs=1e-15)
    assert updates.squares == pytest.approx(float(size.square().sum()), rel=1e-4, abs=1e-15)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1e-16, -1.0])
def test_updates_by_moments_that_are_no_numbers_or_negative_are_not_counted(
    wrong: float, tmp_path: Path
) -> None:
    """That is said of the moments themselves."""
    square = torch.ones(30_000)
    square[7] = wrong
    states = _states(tmp_path, {"exp_avg": torch.ones(30_000), "exp_avg_sq": square})
    assert found(tmp_path, states, LARGE).updates["p"] == [(0, 0.0, 0.0)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_weights_that_are_their_masters_rounded(dtype: torch.dtype, tmp_path: Path) -> None:
    """Random bits, and torch's own cast: every rounding, overflow and subnormal number."""
    master = some_of(torch.float32, 50_000, seed=7)
    weight = master.clone().to(dtype)
    (rounding,) = found(tmp_path, _states(tmp_path, {"master": master, "weight": weight})).rounding["p"]
    assert rounding == (50_000, 0)
    index = torch.nonzero(weight.isfinite() & (weight.abs() > 1e-3))[:3].reshape(-1)
    weight[index] *= -1
    other = tmp_path / "other"
    other.mkdir()
    (rounding,) = found(other, _states(other, {"master": master, "weight": weight}), SMALL).rounding["p"]
    assert rounding == (50_000, 3)


def test_all_castable_dtypes_are_compared() -> None:
    assert {dtype.torch_name for dtype in CASTABLE} == {"bfloat16", "float16", "float32", "float64"}


def test_a_file_that_ends_early_fails_its_own_tensors_alone(tmp_path: Path) -> None:
    known = stored(tmp_path, {"a": torch.ones(10), "b": torch.ones(10)})
    with (tmp_path / "source.bin").open("r+b") as file:
        file.truncate(60)
    statistics_ = found(tmp_path, list(known.values()))
    assert list(statistics_.tensors) == [("a", "weight")]
    assert "is truncated" in statistics_.failures["b"]


def test_tensors_of_no_elements(tmp_path: Path) -> None:
    known = stored(tmp_path, {"a": torch.ones(3), "b": torch.ones(0, 4)})
    stats = found(tmp_path, list(known.values())).tensors["b", "weight"].whole
    assert (stats.numel, stats.nan, stats.absmax, stats.l2, stats.mean) == (0, 0, 0.0, 0.0, 0.0)


_EXAMINE = """
import sys
from ckpt_tool import api
print(len(api.doctor(sys.argv[1], how=api.Execution(max_memory=int(sys.argv[2]))).findings))
"""


def test_peak_memory_is_that_of_the_budget(tmp_path: Path) -> None:
    """One tensor of 256 MB in a sparse file, measured in a child process."""
    header = b'{"model.w.weight":{"dtype":"BF16","shape":[16384,8192],"data_offsets":[0,268435456]}}'
    header += b" " * (-len(header) % 8)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 268435456)
    usage = measured(
        [sys.executable, "-c", _EXAMINE, str(tmp_path), str(16 * MIB)], env={"PYTHONPATH": str(ROOT)}
    )
    assert usage.peak_mib <= 16 + 100
    assert 268435456 <= usage.read_bytes <= 268435456 + (20 << 20)
