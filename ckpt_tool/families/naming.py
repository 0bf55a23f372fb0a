"""From a module tree's names to published ones, and from published files to expert stacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ckpt_tool.canonical import (
    DOWN,
    GATE,
    UP,
    Checkpoint,
    ExpertName,
    MoELayer,
    ParamGroup,
    Scalar,
    Tensor,
    TensorName,
)
from ckpt_tool.errors import MismatchError, UnreadableError
from ckpt_tool.families import Family, compiled
from ckpt_tool.geometry import Cut, CutRegions

HUB = "hub"


def to_hub(checkpoint: Checkpoint, family: Family) -> Checkpoint:
    """The same catalogue under the family's published names, fused experts taken apart.

    Raises:
        MismatchError: a tensor of an MoE block has no published name in this family.
    """
    if checkpoint.dialect == HUB:
        return checkpoint
    rules = family.autoep if checkpoint.dialect == "autoep" else family.transformers
    blocks = tuple(f"{layer.module}." for layer in checkpoint.moe_layers)

    def published(name: str) -> str:
        renamed = _rename(name, rules)
        if renamed is None and name.startswith(blocks):
            raise MismatchError(
                f"{name} is part of an MoE block, but the family {family.name} has no published name "
                "for it. Is this the config.json of another model?"
            )
        return name if renamed is None else renamed

    tensors: list[Tensor] = []
    layers = {layer.layer_path: layer for layer in checkpoint.moe_layers}
    split: dict[TensorName, tuple[ExpertName, ...]] = {}
    for tensor in checkpoint.tensors:
        if isinstance(tensor.name, ExpertName):
            tensors.append(tensor)
            continue
        parts = _split_fused(tensor, family)
        if parts:
            split[tensor.name] = tuple(p.name for p in parts if isinstance(p.name, ExpertName))
            path = split[tensor.name][0].layer_path
            layers[path] = MoELayer(path, f"{path}.mlp", tensor.shape[0])
            tensors += parts
        else:
            tensors.append(replace(tensor, name=published(tensor.name)))

    _check_conserved(checkpoint.tensors, tensors)

    def names(name: TensorName) -> tuple[TensorName, ...]:
        if name in split:
            return split[name]
        return (published(name),) if isinstance(name, str) else (name,)

    scalars: dict[tuple[TensorName, str], Scalar] = {
        (renamed, state): scalar
        for (name, state), scalar in checkpoint.scalars.items()
        for renamed in names(name)
    }
    groups = tuple(
        ParamGroup(group.options, tuple(new for name in group.parameters for new in names(name)))
        for group in checkpoint.training.param_groups
    )
    # The router's second name in AutoEP's module tree exists nowhere else.
    tied = {
        alias: published(name) for alias, name in checkpoint.aliases.items() if not alias.startswith(blocks)
    }
    return replace(
        checkpoint,
        dialect=HUB,
        tensors=tuple(tensors),
        scalars=scalars,
        aliases=tied,
        moe_layers=tuple(layers.values()),
        training=replace(checkpoint.training, param_groups=groups),
    )


def _check_conserved(before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
    """Renaming moves no element to another state, and gives no two tensors one name."""
    keys = [(tensor.name, tensor.state) for tensor in after]
    if len(set(keys)) != len(keys):
        double = next(key for key in keys if keys.count(key) > 1)
        raise MismatchError(
            f"Two tensors of the checkpoint get the same published name: {double[0]} [{double[1]}]."
        )
    if sum(tensor.nbytes for tensor in before) != sum(tensor.nbytes for tensor in after):
        raise MismatchError("Renaming to published names lost elements. This is a bug in ckpt-tool.")


def _split_fused(tensor: Tensor, family: Family) -> list[Tensor]:
    """The canonical stacks in one of transformers' fused expert tensors; none for other tensors."""
    if not isinstance(tensor.name, str) or len(tensor.shape) != 3:
        return []
    experts, rows, columns = tensor.shape
    for kind, pattern in family.fused.items():
        match = compiled(pattern).fullmatch(tensor.name)
        if match is None:
            continue
        if kind == "down":
            return [replace(tensor, name=ExpertName(match["layer"], DOWN))]
        half, size = rows // 2, rows * columns
        if rows % 2:
            raise UnreadableError(f"{tensor.label()} of shape {tensor.shape} has no two equal halves.")
        return [
            replace(
                tensor,
                name=ExpertName(match["layer"], projection),
                shape=(experts, half, columns),
                regions=CutRegions(
                    [
                        Cut(e * half * columns, half * columns, tensor, e * size + first * columns)
                        for e in range(experts)
                    ]
                ),
            )
            for projection, first in ((GATE, 0), (UP, half))
        ]
    return []


def from_hub(tensors: Mapping[str, Tensor], family: Family | None) -> list[Tensor]:
    """Published tensors as canonical ones: one stack per layer and projection.

    Raises:
        UnreadableError: the experts of a layer are not exactly 0 to E-1, or differ in form.
    """
    stacks: dict[ExpertName, dict[int, Tensor]] = {}
    found: list[Tensor | ExpertName] = []
    for name, tensor in tensors.items():
        expert = family.parse_expert(name) if family else None
        if expert is None:
            found += _split_fused(tensor, family) if family else []
            if not family or not _split_fused(tensor, family):
                found.append(tensor)
            continue
        if expert[0] not in stacks:
            stacks[expert[0]] = {}
            found.append(expert[0])
        stacks[expert[0]][expert[1]] = tensor
    return [_stack(item, stacks[item]) if isinstance(item, ExpertName) else item for item in found]


def _stack(name: ExpertName, experts: Mapping[int, Tensor]) -> Tensor:
    if sorted(experts) != list(range(len(experts))):
        missing = sorted(set(range(max(experts) + 1)) - set(experts))
        raise UnreadableError(
            f"{name}: expert {missing[0]} is missing; the files have {len(experts)} experts up to "
            f"number {max(experts)}. Experts must be exactly 0 to E-1."
        )
    first = experts[0]
    for tensor in experts.values():
        if (tensor.shape, tensor.dtype) != (first.shape, first.dtype):
            raise UnreadableError(
                f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}; expert 0 of the same layer is "
                f"{first.dtype} {list(first.shape)}."
            )
    size = first.numel
    cuts = [Cut(expert * size, size, experts[expert], 0) for expert in range(len(experts))]
    return Tensor(
        name, first.state, (len(experts), *first.shape), first.dtype, CutRegions(cuts), first.role
    )


def _rename(name: str, rules: Mapping[str, str]) -> str | None:
    for pattern, target in rules.items():
        match = compiled(pattern).fullmatch(name)
        if match:
            groups = match.groupdict()
            return target.format(layer=groups.get("layer")).replace("*", groups.get("rest") or "*")
    return None
