"""A format in one file: the values of a model in ``model.toy``, a line of JSON and then the tensors.

It has an option of its own, ``--motto``, which is kept in the line of JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ckpt_tool.canonical import (
    WEIGHT,
    Checkpoint,
    DType,
    ExpertName,
    MoELayer,
    Region,
    SourceFile,
    Tensor,
    TensorName,
)
from ckpt_tool.errors import UsageError
from ckpt_tool.formats.base import Prepared, Request
from ckpt_tool.formats.declaration import Format, Target
from ckpt_tool.formats.options import Option
from ckpt_tool.formats.preparing import refuse_unreadable_parts
from ckpt_tool.layout import Fill, Layout, Literal, TargetFile, left_out
from ckpt_tool.storage import Reader

FILE = "model.toy"
MOTTO = Option("motto", ("--motto",), str, "toy: words that are kept in the file.", metavar="WORDS")
LENGTH = 8  # bytes that say how long the line of JSON is


class Toy:
    """The format as the registry knows it, read and written."""

    name = "toy"

    def recognises(self, reader: Reader) -> bool:
        return FILE in reader.list()

    def read(self, reader: Reader) -> Checkpoint:
        length = int.from_bytes(reader.read(FILE, 0, LENGTH), "little")
        line = reader.read(FILE, LENGTH, length)
        said = json.loads(line)
        tensors, stored, offset = [], [], LENGTH + length
        for name, dtype, shape in said["tensors"]:
            known = ExpertName(*name) if isinstance(name, list) else name
            tensor = Tensor(known, WEIGHT, tuple(shape), DType[dtype], ())
            region = Region(0, tensor.numel, FILE, offset)
            tensors.append(Tensor(known, WEIGHT, tensor.shape, tensor.dtype, (region,)))
            stored += [offset, tensor.nbytes]
            offset += tensor.nbytes
        layers = [MoELayer(path, module, count) for path, module, count in said["layers"]]
        return Checkpoint(
            format=self.name,
            root=reader.root,
            dialect=said["dialect"],
            tensors=tuple(tensors),
            files=(SourceFile(FILE, reader.size(FILE), line.hex(), stored=stored),),
            moe_layers=tuple(layers),
            notes=(f"The motto is {said['motto']!r}.",) if said["motto"] else (),
        )

    def prepare(self, request: Request) -> Prepared[Mapping[str, Any]]:
        if request.dtype is not None:
            raise UsageError("A toy keeps what it gets; --dtype does not apply.")
        refuse_unreadable_parts(request.checkpoint, states=False)
        return Prepared(request.checkpoint, request.values, request.config)

    def layout(self, checkpoint: Checkpoint, options: Mapping[str, Any]) -> Layout:
        values = checkpoint.values()
        said = {
            "motto": options["motto"],
            "dialect": checkpoint.dialect,
            "layers": [[one.layer_path, one.module, one.num_experts] for one in checkpoint.moe_layers],
            "tensors": [[spelled(one.name), one.dtype.name, one.shape] for one in values],
        }
        line = json.dumps(said).encode()
        fills, offset = [], LENGTH + len(line)
        for tensor in values:
            fills.append(Fill(offset, tensor, 0, tensor.numel, tensor.dtype))
            offset += tensor.nbytes
        head = Literal(0, len(line).to_bytes(LENGTH, "little") + line)
        kept = {id(tensor) for tensor in values}
        others = (tensor for tensor in checkpoint.tensors if id(tensor) not in kept)
        return Layout(
            (TargetFile(FILE, offset, (head,), tuple(fills)),),
            left_out=left_out(others, "a toy holds values alone"),
            notes=checkpoint.notes,
        )


def spelled(name: TensorName) -> str | list[str]:
    return name if isinstance(name, str) else [name.layer_path, name.projection, name.part]


TOY = Format("toy", Toy, Target("toy", Toy, (MOTTO,)))
