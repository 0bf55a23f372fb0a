"""Parts of names that wrappers of modules add, and that mean nothing to the model.

* ``module``: torch's DistributedDataParallel and DataParallel;
* ``_orig_mod``: torch.compile (torch 2.13, _dynamo/eval_frame.py, ``OptimizedModule``);
* ``_checkpoint_wrapped_module``: activation checkpointing (distributed/algorithms/_checkpoint/
  checkpoint_wrapper.py, ``_CHECKPOINT_WRAPPED_MODULE``);
* ``_fsdp_wrapped_module``: FSDP1 (distributed/fsdp/_common_utils.py, ``FSDP_WRAPPED_MODULE``).

They stand anywhere in a path, before the whole model or before one of its layers. A catalogue has names
without them; ``Checkpoint.saved_names`` has those that a run of the same wrappers wants, for the engine's
own format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

from ckpt_tool.canonical import Checkpoint, ExpertName, ParamGroup, TensorName
from ckpt_tool.errors import UnreadableError

WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_WRAPPER = re.compile(rf"(?:(?<=\.)|^)(?:{'|'.join(WRAPPERS)})\.")
_LAST = re.compile(rf"(?:\.|^)(?:{'|'.join(WRAPPERS)})$")

_Value = TypeVar("_Value")


def unwrapped(name: str) -> str:
    """A name or a module's path without the parts that wrappers add. A last part stays: a tensor's."""
    return _WRAPPER.sub("", name)


def saved_names(names: Iterable[str], where: str) -> dict[str, str]:
    """The names that change, by what becomes of them.

    Raises:
        UnreadableError: two names become one.
    """
    found: dict[str, str] = {}
    changed = {}
    for name in names:
        plain = unwrapped(name)
        other = found.setdefault(plain, name)
        if other != name:
            raise UnreadableError(
                f"{where} has both {other} and {name}, which are one name without the parts that wrappers "
                "add: two copies of a model, of which nothing tells the right one. Save the state dict of "
                "one of them."
            )
        if plain != name:
            changed[plain] = name
    return changed


def without_wrappers(values: Mapping[str, _Value], where: str) -> tuple[dict[str, _Value], dict[str, str]]:
    """The values under names without wrappers' parts, and the names that changed (``saved_names``)."""
    changed = saved_names(values, where)
    return {unwrapped(name): value for name, value in values.items()}, changed


def note_of(changed: Mapping[str, str]) -> tuple[str, ...]:
    """What is to be said of names that changed."""
    if not changed:
        return ()
    parts = {part.rstrip(".") for name in changed.values() for part in _WRAPPER.findall(name)}
    return (
        f"Names are read without {' and '.join(f'`{part}.`' for part in WRAPPERS if part in parts)}, which "
        f"wrappers of modules add ({len(changed)} of them, such as {next(iter(changed.values()))}). A "
        "result for the same engine has the names that were saved.",
    )


def unwrapped_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """The catalogue with all names without wrappers' parts: tensors, scalars, aliases, parameter groups,
    layers. ``saved_names`` then has those that changed; names that a reader has changed itself stay there.

    Raises:
        UnreadableError: two names become one.
    """
    dense = {tensor.name: None for tensor in checkpoint.tensors if isinstance(tensor.name, str)}
    names = [*dense, *checkpoint.aliases, *checkpoint.equal, *checkpoint.module_names]
    changed = saved_names(dict.fromkeys(names), checkpoint.root)
    paths = {layer.layer_path for layer in checkpoint.moe_layers}
    paths |= {layer.module for layer in checkpoint.moe_layers}
    paths |= {
        tensor.name.layer_path for tensor in checkpoint.tensors if isinstance(tensor.name, ExpertName)
    }
    changed_paths = {_path(path): path for path in paths if _path(path) != path}
    if not changed and not changed_paths:
        return checkpoint
    found = renamed(checkpoint, unwrapped, _path)
    return replace(
        found,
        saved_names={**checkpoint.saved_names, **changed, **changed_paths},
        notes=(*checkpoint.notes, *note_of(changed or changed_paths)),
    )


def as_saved(checkpoint: Checkpoint, saved: Mapping[str, str]) -> Checkpoint:
    """The catalogue under the names of a run: ``saved_names`` of the source or of a template."""
    if not saved:
        return checkpoint

    def name_of(name: str) -> str:
        return saved.get(name, name)

    return replace(renamed(checkpoint, name_of, name_of), saved_names={})


def _path(path: str) -> str:
    return _LAST.sub("", unwrapped(path))


def renamed(
    checkpoint: Checkpoint, name_of: Callable[[str], str], path_of: Callable[[str], str]
) -> Checkpoint:
    """The catalogue with other names of dense tensors and other paths of layers and MoE blocks."""

    def new(name: TensorName) -> TensorName:
        if isinstance(name, ExpertName):
            return replace(name, layer_path=path_of(name.layer_path))
        return name_of(name)

    groups = tuple(
        ParamGroup(group.options, tuple(map(new, group.parameters)))
        for group in checkpoint.training.param_groups
    )
    return replace(
        checkpoint,
        tensors=tuple(replace(tensor, name=new(tensor.name)) for tensor in checkpoint.tensors),
        scalars={(new(name), state): scalar for (name, state), scalar in checkpoint.scalars.items()},
        aliases={name_of(alias): name_of(name) for alias, name in checkpoint.aliases.items()},
        equal={name_of(one): name_of(other) for one, other in checkpoint.equal.items()},
        moe_layers=tuple(
            replace(layer, layer_path=path_of(layer.layer_path), module=path_of(layer.module))
            for layer in checkpoint.moe_layers
        ),
        module_names=tuple(map(name_of, checkpoint.module_names)),
        training=replace(checkpoint.training, param_groups=groups),
    )
