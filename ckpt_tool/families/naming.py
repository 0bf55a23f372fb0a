"""From a module tree's names to published ones, from stored files to expert stacks, and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckpt_tool.canonical import (
    Checkpoint,
    Encoding,
    ExpertName,
    MoELayer,
    ParamGroup,
    Scalar,
    Tensor,
    TensorName,
    even_holders,
)
from ckpt_tool.errors import MismatchError, UnreadableError
from ckpt_tool.families import FUSED_FORM, Family
from ckpt_tool.families.agreement import with_stated_ties
from ckpt_tool.families.dense import (
    Whole,
    joined_as_published,
    joined_in_memory,
    memory_parts,
    published_parts,
)
from ckpt_tool.families.forms import Stored, compiled, join, split
from ckpt_tool.geometry import Cut, CutRegions
from ckpt_tool.layout import LeftOut, left_out
from ckpt_tool.limits import first_missing

HUB = "hub"
_WHOSE = {
    HUB: "those of published files",
    "autoep": "those of DeepSpeed AutoEP",
    "transformers": "those of transformers' modules",
    "torchtitan": "torchtitan's",
}


def whose(dialect: str) -> str:
    """Whose names a catalogue has, in a user's words."""
    return _WHOSE.get(dialect, dialect)


# ---- from a module tree


def to_hub(checkpoint: Checkpoint, family: Family, config: Mapping[str, Any] | None = None) -> Checkpoint:
    """The same catalogue under the family's published names, fused experts taken apart.

    Args:
        config: the ``config.json``, if not the checkpoint's own, which has the number of experts that some
            layouts are taken apart by.

    Raises:
        MismatchError: a tensor of an MoE block has no published name in this family.
        UnreadableError: AutoEP stores this family wrongly.
    """
    if checkpoint.dialect == HUB:
        return checkpoint
    if checkpoint.dialect == "autoep" and checkpoint.moe_layers and family.autoep_wrong:
        raise UnreadableError(f"{checkpoint.root}: {family.autoep_wrong}. It cannot be converted back.")
    checkpoint = _publishable(checkpoint, family)
    blocks = tuple(f"{layer.module}." for layer in checkpoint.moe_layers)

    def published(name: str) -> str:
        renamed = family.published(name, checkpoint.dialect)
        # torchtitan shares no name with published files, AutoEP none within its MoE blocks: a name
        # without a rule is unknown there. AutoEP leaves transformers' names elsewhere, which are
        # published ones unless a rule says so.
        unknown = {"torchtitan": True, "autoep": name.startswith(blocks)}.get(checkpoint.dialect, False)
        if renamed is None and checkpoint.dialect == "autoep" and not unknown:
            renamed = family.published(name, "transformers")
        if renamed is None and unknown:
            raise MismatchError(
                f"{name}: the family {family.name} has no published name for it. Is this the "
                "config.json of another model?"
            )
        return name if renamed is None else renamed

    tensors: list[Tensor] = []
    layers = {layer.layer_path: layer for layer in checkpoint.moe_layers}
    taken_apart: dict[TensorName, tuple[TensorName, ...]] = {}
    experts = family.sizes(config or checkpoint.model_config or {}).get("E")
    ep = checkpoint.topology.ep_size
    joined = {state: joined_as_published(held, family) for state, held in checkpoint.by_state().items()}
    for tensor in checkpoint.tensors:
        whole = joined[tensor.state].get(tensor.name)
        parts = _taken_apart(tensor, family, experts)
        if whole is not None:
            taken_apart[tensor.name] = (whole.name,)
            tensors += whole.here
        elif parts:
            taken_apart[tensor.name] = tuple(part.name for part in parts)
            first = parts[0].name
            if isinstance(first, ExpertName) and first.layer_path not in layers:
                layers[first.layer_path] = moe_layer(first.layer_path, parts[0].shape[0], family, ep)
            tensors += parts
        elif isinstance(tensor.name, ExpertName):
            tensors.append(tensor)
        else:
            tensors.append(replace(tensor, name=published(tensor.name)))

    check_names(tensors)

    def names(name: TensorName) -> tuple[TensorName, ...]:
        if name in taken_apart:
            return taken_apart[name]
        return (published(name),) if isinstance(name, str) else (name,)

    scalars: dict[tuple[TensorName, str], Scalar] = {}
    for (name, state), scalar in checkpoint.scalars.items():
        for renamed in names(name):
            if scalars.setdefault((renamed, state), scalar) != scalar:
                raise MismatchError(f"{state} differs among the tensors that are published as {renamed}.")
    groups = tuple(
        ParamGroup(
            group.options, tuple(dict.fromkeys(new for name in group.parameters for new in names(name)))
        )
        for group in checkpoint.training.param_groups
    )
    # The router's second name in AutoEP's module tree exists nowhere else.
    tied = {
        published(alias): published(name)
        for alias, name in checkpoint.aliases.items()
        if not alias.startswith(blocks)
    }
    found = replace(
        checkpoint,
        dialect=HUB,
        tensors=tuple(tensors),
        scalars=scalars,
        aliases=tied,
        equal={published(one): published(other) for one, other in checkpoint.equal.items()},
        moe_layers=tuple(layers.values()),
        training=replace(checkpoint.training, param_groups=groups),
    )
    return with_stated_ties(found, config or {})


def unpublishable(checkpoint: Checkpoint, family: Family) -> tuple[LeftOut, ...]:
    """The tensors that ``to_hub`` leaves out."""
    return left_out(
        (
            tensor
            for tensor in checkpoint.tensors
            if isinstance(tensor.name, str) and family.unpublishable(tensor.name, checkpoint.dialect)
        ),
        f"published files of the family {family.name} have no such tensor",
    )


def _publishable(checkpoint: Checkpoint, family: Family) -> Checkpoint:
    """Without the tensors that no published file has, which a note names."""
    own = {str(one.tensor.name) for one in unpublishable(checkpoint, family) if one.tensor}
    if not own:
        return checkpoint
    note = f"Left out, as published files of the family {family.name} have no such tensors: "
    return replace(
        checkpoint,
        tensors=tuple(tensor for tensor in checkpoint.tensors if tensor.name not in own),
        notes=(*checkpoint.notes, f"{note}{', '.join(sorted(own))}."),
    )


def moe_layer(layer_path: str, experts: int, family: Family, ep: int | None = None) -> MoELayer:
    """A layer with its MoE block where transformers has it in memory, spread over ``ep`` ranks as FSDP2
    runs spread it, if that is known."""
    pattern = family.fused[0].pattern if family.fused else "{layer}.mlp.experts"
    block = pattern.partition("{layer}.")[2].partition(".")[0]
    holders = even_holders(experts // ep, ep) if ep else ()
    return MoELayer(layer_path, f"{layer_path}.{block}", experts, holders)


def check_names(tensors: Iterable[Tensor]) -> None:
    """Renaming gives no two tensors of a state one name. (That it loses no element is for the planner to
    see, by the source's bytes.)

    Raises:
        MismatchError: it does.
    """
    seen: set[tuple[TensorName, str]] = set()
    for tensor in tensors:
        key = tensor.name, tensor.state
        if key in seen:
            raise MismatchError(
                f"Two tensors of the checkpoint get the same published name: {key[0]} [{key[1]}]."
            )
        seen.add(key)


def _taken_apart(tensor: Tensor, family: Family, experts: int | None) -> list[Tensor]:
    """The canonical tensors in one of transformers' fused ones; none for other tensors."""
    if not isinstance(tensor.name, str) or tensor.name.startswith(family.apart):
        return []
    for stored in family.fused:
        match = None if stored.per_expert else compiled(stored.pattern).fullmatch(tensor.name)
        if match is not None:
            return split(tensor, stored, family.published_path(match["layer"]), experts)
    return published_parts(tensor, family)


# ---- from files


def from_hub(
    tensors: Mapping[str, Tensor], family: Family | None, config: Mapping[str, Any] | None = None
) -> list[Tensor]:
    """Tensors of files as canonical ones: published names, one stack per layer, projection and part.

    Args:
        config: the ``config.json``, which has the sizes some layouts are told apart by.

    Raises:
        UnreadableError: the experts of a layer are not exactly 0 to E-1, differ in form, or do not
            have the shape the family stores.
    """
    if family is None:
        return list(tensors.values())
    if family.misnamed:
        tensors = _corrected(tensors.values(), family)
    sizes = family.sizes(config or {})
    chosen = _Choice(tensors, family, sizes)
    stacks: dict[ExpertName, dict[int, Tensor]] = {}
    found: list[Tensor | ExpertName] = []
    joined = joined_as_published(tensors.values(), family)
    for name, tensor in tensors.items():
        match = family.match(name, sizes)
        if match is None:
            if name in joined:
                found += joined[name].here
            else:
                found += published_parts(tensor, family) or [_published(tensor, family)]
            continue
        layer = family.published_path(match.layer_path)
        stored = chosen.layout(match.layouts, match.layer_path)
        if match.expert is None:
            found += _with_encoding(split(tensor, stored, layer, sizes.get("E")), tensor)
            continue
        stack = stored.names(layer)[0]
        if stack not in stacks:
            stacks[stack] = {}
            found.append(stack)
        expected = stored.key(match.layer_path, match.expert + sizes.get("E", 0) * stored.after)
        if name != expected:
            raise UnreadableError(
                f"{name} numbers its expert otherwise than {expected}; "
                "nothing tells whether that is the same expert. Correct the name."
            )
        stacks[stack][match.expert] = tensor
    result = [_stack(item, stacks[item]) if isinstance(item, ExpertName) else item for item in found]
    _check_once(result)
    return result


def _corrected(tensors: Iterable[Tensor], family: Family) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for tensor in tensors:
        name = family.corrected(str(tensor.name))
        if name in found:
            raise UnreadableError(f"{name} is in the files twice, under that name and under another one.")
        found[name] = tensor if name == tensor.name else replace(tensor, name=name)
    return found


def _published(tensor: Tensor, family: Family) -> Tensor:
    renamed = family.published(str(tensor.name), "transformers")
    return tensor if renamed is None else replace(tensor, name=renamed)


def _check_once(tensors: Sequence[Tensor]) -> None:
    seen: set[TensorName] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise UnreadableError(
                f"{tensor.name} is in the files twice, under a published name and under another one."
            )
        seen.add(tensor.name)


def _with_encoding(parts: list[Tensor], whole: Tensor) -> list[Tensor]:
    return [replace(part, encoding=whole.encoding) for part in parts] if whole.encoding else parts


class _Choice:
    """Which of a name's layouts a layer has, where a family has more than one under the same name.

    The sizes in config.json say which shapes each would have; gate_up and down together always tell
    two orientations apart, square or not.
    """

    def __init__(self, tensors: Mapping[str, Tensor], family: Family, sizes: Mapping[str, int]) -> None:
        self._sizes, self._family = sizes, family
        self._shapes: dict[str, list[tuple[tuple[Stored, ...], tuple[int, ...]]]] = {}
        self._chosen: dict[str, int] = {}
        if not any(hub.pattern == fused.pattern and hub != fused for hub, fused in _pairs(family)):
            return
        for name, tensor in tensors.items():
            match = family.match(name, sizes)
            if match is not None and len(match.layouts) > 1:
                self._shapes.setdefault(match.layer_path, []).append((match.layouts, tensor.shape))

    def layout(self, layouts: tuple[Stored, ...], layer_path: str) -> Stored:
        if len(layouts) == 1:
            return layouts[0]
        if layer_path not in self._chosen:
            self._chosen[layer_path] = self._choose(layer_path, len(layouts))
        return layouts[self._chosen[layer_path]]

    def _choose(self, layer_path: str, count: int) -> int:
        held = self._shapes[layer_path]
        fits = [
            number
            for number in range(count)
            if all(layouts[number].expected(self._sizes) == shape for layouts, shape in held)
        ]
        if len(fits) != 1:
            shapes = ", ".join(str(list(shape)) for _, shape in held)
            raise UnreadableError(
                f"The experts of {layer_path} have the shapes {shapes}; by the sizes in config.json "
                f"({dict(self._sizes)}) that is {'either' if fits else 'neither'} of the layouts the "
                f"family {self._family.name} occurs in."
            )
        return fits[0]


def _pairs(family: Family) -> Iterator[tuple[Stored, Stored]]:
    return ((hub, fused) for hub in family.hub for fused in family.fused)


def _stack(name: ExpertName, experts: Mapping[int, Tensor]) -> Tensor:
    if sorted(experts) != list(range(len(experts))):
        missing = first_missing(experts, max(experts) + 1)
        raise UnreadableError(
            f"{name}: expert {missing} is missing; the files have {len(experts)} experts up to "
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
    encoded = [tensor.encoding for tensor in experts.values() if tensor.encoding is not None]
    encoding = Encoding(encoded[0].scheme, tuple(t for e in encoded for t in e.stored)) if encoded else None
    return Tensor(
        name,
        first.state,
        (len(experts), *first.shape),
        first.dtype,
        CutRegions(cuts),
        first.role,
        encoding=encoding,
    )


# ---- to files


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file: its name and shape there, and elements of ``tensor`` from ``start`` on.
    ``sources`` are the canonical tensors that it holds, or a part of which it holds."""

    name: str
    tensor: Tensor
    shape: tuple[int, ...]
    sources: tuple[TensorName, ...]
    start: int = 0

    def sliced(self) -> Tensor:
        """A tensor of this name and shape.

        Raises:
            CoverageError: when its regions are asked for, where it has another shape than ``tensor``, whose
                elements do not lie in contiguous runs.
        """
        if self.tensor.shape == self.shape:
            return replace(self.tensor, name=self.name)
        cuts = [Cut(0, math.prod(self.shape), self.tensor, self.start)]
        return replace(self.tensor, name=self.name, shape=self.shape, regions=CutRegions(cuts))


def entries(
    tensors: Sequence[Tensor], family: Family, style: str, config: Mapping[str, Any] | None = None
) -> list[Entry]:
    """Canonical tensors under published names as the entries of files, in the order of the model.

    Args:
        style: ``hub`` for the published form, ``fused`` for transformers' names and stacks.
        config: the ``config.json``, which has the sizes that some tensors are taken apart by.

    Raises:
        MismatchError: an expert tensor has no place in that form, or half of a fused one is missing.
    """
    by_layer: dict[str, dict[TensorName, Tensor]] = {}
    for tensor in tensors:
        if isinstance(tensor.name, ExpertName):
            by_layer.setdefault(tensor.name.layer_path, {})[tensor.name] = tensor
    joined = joined_in_memory(tensors, family) if style == FUSED_FORM else None
    found: list[Entry] = []
    for tensor in tensors:
        if isinstance(tensor.name, ExpertName):
            found += _layer(tensor.name.layer_path, by_layer.pop(tensor.name.layer_path, {}), family, style)
        elif joined is None:
            found.append(Entry(tensor.name, tensor, tensor.shape, (tensor.name,)))
        else:
            found += _in_memory(tensor, joined, family, config or {})
    return found


def _in_memory(
    tensor: Tensor, joined: Mapping[TensorName, Whole], family: Family, config: Mapping[str, Any]
) -> list[Entry]:
    """A dense tensor as transformers has it: under its name, in parts, or with those it is one with."""
    name = str(tensor.name)
    whole = joined.get(name)
    if whole is not None:
        return [Entry(whole.name, one, one.shape, whole.parts) for one in whole.here]
    found = memory_parts(tensor, family, config) or [
        replace(tensor, name=family.unpublished(name, "transformers"))
    ]
    return [Entry(str(one.name), one, one.shape, (name,)) for one in found]


def _layer(path: str, held: dict[TensorName, Tensor], family: Family, style: str) -> list[Entry]:
    """The entries of one layer's experts."""
    left = dict(held)
    at = family.memory_module(path) if style == FUSED_FORM else path
    singles: list[tuple[Stored, Tensor]] = []
    found: list[Entry] = []
    for stored in family.form(style):
        names = stored.names(path)
        stacks = [left.pop(name) for name in names if name in left]
        if len(stacks) not in (0, len(names)):
            missing = sorted({str(name) for name in names} - {str(stack.name) for stack in stacks})
            raise MismatchError(
                f"{missing[0]} is missing; the files hold it together with {stacks[0].name}."
            )
        if stacks and stored.per_expert:
            singles.append((stored, stacks[0]))
        elif stacks:
            _check_alike(stacks)
            tensor, shape = join(stacks, stored, stored.key(at))
            found.append(Entry(stored.key(at), tensor, shape, names))
    if left:
        name = next(iter(left))
        raise MismatchError(f"{name}: the family {family.name} has no place for it. Is the config right?")
    before = 0
    for after in (False, True):
        chosen = [(stored, stack) for stored, stack in singles if stored.after is after]
        count = max((stack.shape[0] for _, stack in chosen), default=0)
        for expert in range(count):
            for stored, stack in chosen:
                if expert < stack.shape[0]:
                    key, shape = stored.key(at, before + expert), stack.shape[1:]
                    found.append(Entry(key, stack, shape, (stack.name,), expert * math.prod(shape)))
        before = count
    return found


def _check_alike(stacks: Sequence[Tensor]) -> None:
    first = stacks[0]
    for stack in stacks:
        if stack.dtype is not first.dtype or stack.shape[0] != first.shape[0]:
            if stack.dtype is first.dtype:
                raise MismatchError(
                    f"{stack.name} has {stack.shape[0]} experts, {first.name} {first.shape[0]}."
                )
            raise MismatchError(
                f"{stack.name} is {stack.dtype}, {first.name} is {first.dtype}; the files hold them in one "
                "tensor."
            )
