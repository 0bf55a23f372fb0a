"""What all tests share: the real fixtures, the command line in a child, and one way to read a tensor."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, settings

from ckpt_tool import cli
from ckpt_tool.canonical import Checkpoint, DType, ExpertName, Region, SourceFile, Tensor, contiguous
from ckpt_tool.execute.budget import Budget
from ckpt_tool.execute.local import execute
from ckpt_tool.execute.meter import Silent
from ckpt_tool.families import agreement
from ckpt_tool.layout import Layout
from ckpt_tool.plan import make_plan
from ckpt_tool.storage import LocalReader, LocalWriter, Reader
from ckpt_tool.written import WrittenFile

ROOT = Path(__file__).parent.parent
DEEPSPEED = ROOT / "fixtures" / "deepspeed"

# Every run tries the same examples, so that a red build means a change. To explore:
# pytest --hypothesis-profile=explore
_COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("quick", derandomize=True, max_examples=25, **_COMMON)
settings.register_profile("explore", max_examples=300, **_COMMON)
settings.load_profile("quick")

AUTOEP = {"w1": "gate", "w3": "up", "w2": "down"}


def _zero3_fixtures() -> tuple[str, ...]:
    """Names of the fixtures that are ZeRO-3: each rank saved both of its files."""
    return tuple(
        path.name
        for path in sorted(DEEPSPEED.iterdir())
        if any(path.glob("checkpoint/*/zero_pp_rank_*_model_states.pt"))
    )


ZERO3 = _zero3_fixtures()


def checkpoint_of(name: str) -> Path:
    """The checkpoint of a fixture: the directory with ``latest``."""
    return DEEPSPEED / name / "checkpoint"


def config_of(name: str) -> Path:
    """The ``config.json`` of a fixture."""
    return DEEPSPEED / name / "config.json"


def copy_fixture(name: str, tmp_path: Path) -> Path:
    """A copy of a fixture's checkpoint that a test may damage; returns the tag directory."""
    copy = tmp_path / name
    shutil.copytree(checkpoint_of(name), copy)
    return copy / (copy / "latest").read_text().strip()


class Finished(NamedTuple):
    """A child process that ended."""

    rc: int
    stdout: str
    stderr: str


def run_cli(*args: str | os.PathLike[str]) -> Finished:
    """``python -m ckpt_tool ARGS`` in a child process."""
    done = subprocess.run(
        [sys.executable, "-m", "ckpt_tool", *map(os.fspath, args)],
        capture_output=True,
        text=True,
        timeout=120,
        env=child_env(),
    )
    return Finished(done.returncode, done.stdout, done.stderr)


class Runner:
    """Runs the command line in this process: the same function, streams and exit codes, no start-up."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch
        monkeypatch.setenv("COLUMNS", "200")

    def __call__(self, *args: str | os.PathLike[str]) -> Finished:
        self._monkeypatch.setattr(sys, "argv", ["ckpt-tool", *map(os.fspath, args)])
        self._capsys.readouterr()
        rc: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            rc = end.code or 0
        shown = self._capsys.readouterr()
        return Finished(int(rc), shown.out, shown.err)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Runner:
    return Runner(capsys, monkeypatch)


def child_env() -> dict[str, str]:
    """The environment of a child process: finds the package, and folds no lines."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Power is not cut in tests; what a killed process leaves does not depend on fsync."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture
def partial_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """For models written by hand, with the tensors that a test is about and no others: whether they are
    whole is not asked (``families.completeness``, which has tests of its own)."""
    monkeypatch.setattr(agreement, "check_tensors", lambda *given: None)


@pytest.fixture(params=ZERO3)
def zero3_fixture(request: pytest.FixtureRequest) -> str:
    """The name of each ZeRO-3 fixture in turn."""
    return str(request.param)


# ---- reading tensors without the code under test


def canonical_key(engine_name: str) -> str | ExpertName:
    """``model.layers.0.mlp.experts.w1`` -> the stack of gates of layer 0; other names stay."""
    module, _, weight = engine_name.rpartition(".")
    if module.endswith(".experts") and weight in AUTOEP:
        return ExpertName(module.removesuffix(".experts").rpartition(".")[0], AUTOEP[weight])
    return engine_name


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor in row-major order: NaNs compare, and 0.0 is not -0.0."""
    flat = tensor.detach().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""


def materialise(reader: Reader, tensor: Tensor) -> torch.Tensor:
    """The whole tensor, region by region, element by element where it must be; checks that each element
    is held exactly once."""
    itemsize = tensor.dtype.itemsize
    data = bytearray(tensor.nbytes)
    held = bytearray(tensor.numel)
    for region in tensor.regions:
        for element, numel, offset in _stretches(region, tensor.shape, itemsize):
            assert not any(held[element : element + numel]), f"{tensor.element(element)} is held twice"
            held[element : element + numel] = b"\1" * numel
            data[element * itemsize : (element + numel) * itemsize] = reader.read(
                region.file, offset, numel * itemsize
            )
    assert all(held), f"{tensor.label()}: {held.count(0)} elements are held nowhere"
    dtype = getattr(torch, tensor.dtype.torch_name)
    return torch.frombuffer(data, dtype=dtype).reshape(tensor.shape) if data else torch.empty(
        tensor.shape, dtype=dtype
    )  # fmt: skip


def _stretches(region: object, shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[int, int, int]]:
    """(first flat element, count, byte offset) of every contiguous stretch of a region."""
    if isinstance(region, Region):
        yield region.start, region.numel, region.offset
        return
    box = region
    flat = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    for index in itertools.product(*(range(count) for count in box.counts)):  # type: ignore[attr-defined]
        element = sum(
            (origin + i * step) * size
            for origin, i, step, size in zip(box.origin, index, box.steps, flat, strict=True)  # type: ignore[attr-defined]
        )
        offset = sum(i * stride for i, stride in zip(index, box.strides, strict=True))  # type: ignore[attr-defined]
        yield element, 1, box.offset + offset  # type: ignore[attr-defined]


def values_of(checkpoint: Checkpoint) -> dict[tuple[str, str], bytes]:
    """Every tensor of a catalogue as bytes, by (name, state)."""
    reader = LocalReader(checkpoint.root)
    try:
        return {(str(t.name), t.state): raw(materialise(reader, t)) for t in checkpoint.tensors}
    finally:
        reader.close()


def tree(path: Path) -> dict[str, bytes]:
    """All files below a directory with their bytes."""
    return {
        str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()
    }


# ---- writing through the code under test


def nothing_stored(*tensors: Tensor, root: str = ".") -> Checkpoint:
    """A catalogue of a source in which no container says what is stored."""
    return Checkpoint("made-by-a-test", root, "hub", tensors, ())


def stored_whole(*tensors: Tensor) -> Checkpoint:
    """A catalogue of a source whose containers hold exactly the regions of these tensors."""
    by_file: dict[str, list[int]] = {}
    for tensor in tensors:
        for region in tensor.regions:
            assert isinstance(region, Region)
            by_file.setdefault(region.file, []).extend(
                (region.offset, region.numel * tensor.dtype.itemsize)
            )
    files = tuple(SourceFile(path, 0, "", (), stored) for path, stored in by_file.items())
    return replace(nothing_stored(*tensors), files=files)


def carry_out(
    layout: Layout,
    source: Path,
    target: Path,
    *,
    budget: Budget | None = None,
    fsync: bool = False,
    reader: LocalReader | None = None,
) -> list[WrittenFile]:
    """Plan and write ``layout``, whose tensors lie in files below ``source``, into ``target``."""
    reader = reader or LocalReader(source)
    written: list[WrittenFile] = []
    try:
        execute(
            make_plan(layout, nothing_stored()),
            reader,
            LocalWriter(target, fsync=fsync),
            budget or Budget.share(8 << 20, 2),
            meter=Silent(),
            skip=lambda file: False,
            on_file=written.append,
        )
    finally:
        reader.close()
    return written


def stored(
    directory: Path, tensors: Mapping[str, torch.Tensor], *, file: str = "source.bin"
) -> dict[str, Tensor]:
    """Put tensors one after the other into one file, and describe them."""
    described, position = {}, 0
    with (directory / file).open("wb") as out:
        for name, tensor in tensors.items():
            data = raw(tensor)
            out.write(data)
            shape = tuple(tensor.shape)
            dtype = DTYPES[tensor.dtype]
            described[name] = Tensor(name, "weight", shape, dtype, contiguous(shape, file, position))
            position += len(data)
    return described


DTYPES = {getattr(torch, dtype.torch_name): dtype for dtype in DType}


def some_of(dtype: torch.dtype, numel: int = 101, seed: int = 0) -> torch.Tensor:
    """Random bits as ``dtype``: NaNs, infinities and subnormals are among them."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, (numel,), generator=generator).bool()
    itemsize = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, 256, (numel * itemsize,), dtype=torch.uint8, generator=generator).view(dtype)
