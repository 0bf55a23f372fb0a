"""What the DCP tests share: fixtures, whole tensors of a catalogue, conversions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ckpt_tool.canonical import MASTER, WEIGHT, Checkpoint, ExpertName, Tensor
from ckpt_tool.execute.budget import MIB, Budget
from ckpt_tool.execute.gather import gather
from ckpt_tool.execute.local import execute
from ckpt_tool.execute.meter import Silent
from ckpt_tool.formats.dcp.format import Dcp
from ckpt_tool.formats.dcp.writing.target_options import DcpOptions
from ckpt_tool.formats.registry import open_checkpoint
from ckpt_tool.geometry import pieces
from ckpt_tool.layout import Layout
from ckpt_tool.plan import make_plan
from ckpt_tool.storage import LocalReader, LocalWriter, Reader

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "dcp"
CHECKPOINTS = {
    path.parent.name: path
    for pattern in ("*/step-2", "*/checkpoint")
    for path in sorted(FIXTURES.glob(pattern))
}


def read(path: Path) -> tuple[Reader, Checkpoint]:
    reader = LocalReader(path)
    return reader, Dcp().read(reader)


def whole(reader: Reader, tensor: Tensor) -> torch.Tensor:
    """The values of a catalogued tensor."""
    data, scratch = bytearray(max(1, tensor.nbytes)), bytearray(max(64, 2 * tensor.nbytes))
    found = pieces(tensor, 0, tensor.numel)
    view = memoryview(data)[: tensor.nbytes]
    gather(reader, tensor, found, 0, tensor.numel, view, memoryview(scratch))
    dtype = getattr(torch, tensor.dtype.torch_name)
    return torch.frombuffer(data, dtype=dtype, count=tensor.numel).reshape(tensor.shape)


def states(reader: Reader, checkpoint: Checkpoint) -> dict[tuple[str, str], torch.Tensor]:
    """All tensors by the key they were saved under and their state (``weight`` for masters too)."""
    keys = {name: key for key, names in checkpoint.layout_hint.names.items() for name in names}
    found: dict[tuple[str, str], torch.Tensor] = {}
    for tensor in checkpoint.tensors:
        state = WEIGHT if tensor.state == MASTER else tensor.state
        values = whole(reader, tensor)
        key = (keys[tensor.name], state)
        if (
            isinstance(tensor.name, ExpertName)
            and tensor.name.projection in ("gate", "up")
            and key in found
        ):
            values = torch.cat([found[key], values], dim=1)  # gate comes before up
        found[key] = values
    return found


def oracle(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    """What the run itself gathered: parameters, states and buffers; steps are scalars."""
    found: dict[tuple[str, str], torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, value in load_file(file).items():
            found[name, WEIGHT if file.stem == "buffers" else file.stem] = value
    return found


def assert_equal_to_oracle(reader: Reader, checkpoint: Checkpoint, folder: Path) -> None:
    truth = oracle(folder)
    steps = {key: truth.pop(key) for key in list(truth) if key[1] == "step"}
    found = states(reader, checkpoint)
    tied = {(alias, WEIGHT) for alias in checkpoint.aliases}
    assert set(found) == set(truth) - tied
    for key, value in found.items():
        assert value.dtype == truth[key].dtype, key
        assert torch.equal(value, truth[key]), key
    names = checkpoint.layout_hint.names
    for (name, _), value in steps.items():
        for given in names[name]:
            assert checkpoint.scalars[given, "step"].value == float(value)


def write(checkpoint: Checkpoint, reader: Reader, target: Path, **options: Any) -> Layout:
    """Convert to DCP, files in the order of the layout."""
    layout = Dcp().layout(checkpoint, DcpOptions(**options))
    write_layout(layout, checkpoint, reader, target)
    return layout


def write_layout(layout: Layout, checkpoint: Checkpoint, reader: Reader, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    execute(
        make_plan(layout, checkpoint),
        reader,
        LocalWriter(target, fsync=False),
        Budget.share(8 * MIB, 2),
        meter=Silent(),
        skip=lambda file: False,
        on_file=lambda file: None,
    )


def convert(source: Path, target: Path, **options: Any) -> Layout:
    reader, checkpoint = open_checkpoint(source)
    return write(checkpoint, reader, target, **options)
