"""A model of no known family as safetensors: the module's own names, and no config.json.

Tied tensors are stored once; the others of their names are in the header, as safetensors' own
``torch.save_model`` writes them and ``load_model`` reads them (safetensors 0.8, safetensors/torch.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ckpt_tool.canonical import Checkpoint, Tensor
from ckpt_tool.containers.safetensors import safetensors_file
from ckpt_tool.errors import UsageError
from ckpt_tool.families import is_expert
from ckpt_tool.formats.hf.files import INDEX, SINGLE
from ckpt_tool.formats.hf.shards import Named, index, shards
from ckpt_tool.formats.hf.target_options import HfOptions
from ckpt_tool.layout import Layout, Literal, Slot, TargetFile, left_out, text_file

_NO_STATE = "a model file holds no optimizer state"


def layout(checkpoint: Checkpoint, options: HfOptions) -> Layout:
    """The model's values (masters where there are any) under the names that they have.

    Raises:
        UsageError: there are routed experts, which published files hold in a family's own way.
    """
    _refuse_experts(checkpoint)
    if options.hf_layout is not None:
        raise UsageError("--hf-layout is of a family of models, which a config.json tells: pass --config.")
    values = checkpoint.values()
    slots = _slots(values, options)
    parts = shards(slots, options.max_shard_bytes)
    aliases = _aliases(checkpoint, values)
    files = [
        safetensors_file(path, part, {"format": "pt", **_within(aliases, part)})
        for path, part in parts.items()
    ]
    if list(parts) != [SINGLE]:
        files.append(text_file(INDEX, index(parts)))
    for name, data in options.extra_files.items():
        files.append(TargetFile(name, len(data), (Literal(0, data),) if data else ()))
    used = {id(tensor) for tensor in values}
    states = [tensor for tensor in checkpoint.tensors if id(tensor) not in used]
    notes = [
        "There is no config.json: tensors have the names that the module gives them, and were not compared "
        "with any model's."
    ]
    if aliases:
        first = next(iter(aliases))
        notes.append(
            f"{len(aliases)} tied tensors are stored once, under one of their names (such as {first}, "
            f"which is {aliases[first]}). `safetensors.torch.load_model` ties them again."
        )
    first = next(iter(parts))
    line = f'safetensors.torch.load_model(model, "{{target}}/{first}")' if len(parts) == 1 else ""
    return Layout(tuple(files), left_out(states, _NO_STATE), (*checkpoint.notes, *notes), loading=line)


def _refuse_experts(checkpoint: Checkpoint) -> None:
    names = (str(tensor.name) for tensor in checkpoint.tensors)
    if checkpoint.moe_layers or any(map(is_expert, names)):
        raise UsageError(
            "The checkpoint has routed experts, and does not say which model it is of. Pass --config with "
            "the model's config.json, or a directory that has one (its tokenizer is carried over, too)."
        )


def _slots(values: Sequence[Tensor], options: HfOptions) -> list[Named]:
    return [
        (
            str(tensor.name),
            Slot(
                tensor,
                tensor.shape,
                options.dtype if options.dtype is not None and tensor.dtype.is_float else tensor.dtype,
            ),
        )
        for tensor in values
    ]


def _aliases(checkpoint: Checkpoint, values: Sequence[Tensor]) -> dict[str, str]:
    """The further names of tensors that are written, each with the name that they are written under."""
    written = {str(tensor.name) for tensor in values}
    return {
        alias: name
        for alias, name in checkpoint.aliases.items()
        if name in written and alias not in written and alias != "format"
    }


def _within(aliases: Mapping[str, str], part: Sequence[Named]) -> dict[str, str]:
    names = {name for name, _ in part}
    return {alias: name for alias, name in aliases.items() if name in names}
