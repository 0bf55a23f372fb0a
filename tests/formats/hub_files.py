"""Hub directories written by hand, and the values ckpt-tool reads from them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ckpt_tool.canonical import Checkpoint, DType, ExpertName, Tensor
from ckpt_tool.containers.decoding.reader import DecodingReader
from ckpt_tool.execute.budget import Budget
from ckpt_tool.execute.gather import gather
from ckpt_tool.execute.local import execute
from ckpt_tool.execute.meter import Silent
from ckpt_tool.formats.hf.format import HuggingFace
from ckpt_tool.formats.hf.target_options import HfOptions
from ckpt_tool.formats.registry import open_checkpoint
from ckpt_tool.geometry import pieces
from ckpt_tool.layout import Layout
from ckpt_tool.plan import make_plan
from ckpt_tool.storage import LocalReader, LocalWriter, Reader

Tensors = dict[str, torch.Tensor]
_BUDGET = Budget.share(1 << 18, 2)


def noise(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + math.prod(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def write(path: Path, config: dict[str, Any], *shards: Tensors) -> Path:
    """A directory with ``shards`` and, for more than one, an index."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        single = len(shards) == 1
        name = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path / name)
        weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def value(reader: Reader, tensor: Tensor) -> torch.Tensor:
    """A canonical tensor, read through its regions."""
    raw, scratch = memoryview(bytearray(tensor.nbytes)), memoryview(bytearray(tensor.nbytes + 64))
    gather(DecodingReader(reader), tensor, pieces(tensor, 0, tensor.numel), 0, tensor.numel, raw, scratch)
    return torch.frombuffer(raw, dtype=getattr(torch, tensor.dtype.torch_name)).reshape(tensor.shape)


def read(path: Path) -> tuple[Checkpoint, dict[str, torch.Tensor]]:
    """The catalogue and all values, by canonical name."""
    reader, checkpoint = open_checkpoint(path)
    return checkpoint, {str(tensor.name): value(reader, tensor) for tensor in checkpoint.tensors}


def experts(values: dict[str, torch.Tensor], layer: str, part: str = "weight") -> dict[str, torch.Tensor]:
    """gate, up and down of one layer."""
    names = {p: str(ExpertName(layer, p, part)) for p in ("gate", "up", "down")}
    return {projection: values[name] for projection, name in names.items() if name in values}


def plan_for(path: Path, style: str = "hub", dtype: DType | None = None, **more: Any) -> Layout:
    reader, checkpoint = open_checkpoint(path)
    reader.close()
    return HuggingFace().layout(checkpoint, HfOptions(hf_layout=style, dtype=dtype, **more))


def convert(source: Path, target: Path, style: str = "hub", dtype: DType | None = None) -> Layout:
    """Write the model at ``source`` in another form."""
    reader, checkpoint = open_checkpoint(source)
    reader.close()
    layout = HuggingFace().layout(checkpoint, HfOptions(hf_layout=style, dtype=dtype))
    target.mkdir()
    execute(
        make_plan(layout, checkpoint),
        LocalReader(source),
        LocalWriter(target, fsync=False),
        _BUDGET,
        meter=Silent(),
        skip=lambda file: False,
        on_file=lambda file: None,
    )
    return layout


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same dtype, shape and bits."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return bool(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)))
