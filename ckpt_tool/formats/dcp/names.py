"""A catalogue under the names of an FSDP2 run: transformers' modules or torchtitan's, experts stacked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ckpt_tool.canonical import (
    MASTER,
    PROJECTIONS,
    WEIGHT,
    Checkpoint,
    DType,
    ExpertName,
    Role,
    Scalar,
    Tensor,
    TensorName,
)
from ckpt_tool.containers.torch_zip import Inline
from ckpt_tool.errors import MismatchError, UsageError
from ckpt_tool.families import Family, family_of, stated, text_config
from ckpt_tool.families.forms import compiled, join
from ckpt_tool.families.naming import to_hub
from ckpt_tool.formats.dcp.experts import TITAN_NAMES, titan_layer
from ckpt_tool.formats.dcp.reader import Hint
from ckpt_tool.formats.dcp.titan import Fused, fuse, key_value_heads, unnumbered

TITAN, TRANSFORMERS = "torchtitan", "transformers"


@dataclass
class Styled:
    """Tensors by (name in the run, state); ``weight`` is the parameter itself, whatever it was before.

    ``groups`` are (options, names). ``aliases`` are further names of tied tensors. ``zeros`` are buffers
    the run has and the source has not.
    """

    tensors: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    roles: dict[str, Role] = field(default_factory=dict)
    scalars: dict[tuple[str, str], Scalar] = field(default_factory=dict)
    groups: list[tuple[Mapping[str, Any], list[str]]] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    zeros: dict[str, Inline] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def model(self) -> list[tuple[str, Tensor]]:
        return [(name, tensor) for (name, state), tensor in self.tensors.items() if state == WEIGHT]


def dialect_of(style: str) -> str:
    return TITAN if style == TITAN else TRANSFORMERS


def styled(
    checkpoint: Checkpoint,
    dialect: str,
    config: Mapping[str, Any] | None,
    fused: Mapping[str, Fused] | None = None,
) -> Styled:
    """The catalogue as a run whose modules have ``dialect``'s names would save it.

    Args:
        fused: the parameters that the run is known to have fused; else those of the source, or those that
            the family's table says torchtitan fuses.

    Raises:
        UsageError: names must change, and there is no config.json to say which model this is.
        MismatchError: the model's family has no such names.
    """
    hint = checkpoint.layout_hint
    if isinstance(hint, Hint) and checkpoint.dialect == dialect:
        return _as_saved(checkpoint, hint, hint.fused if fused is None else fused)
    found = Styled()
    found.left_out = {
        tensor.label(): "the run keeps the fp32 values and rounds them itself"
        for tensor in _shadowed(checkpoint)
    }
    dropped = set(found.left_out)
    kept = replace(checkpoint, tensors=tuple(t for t in checkpoint.tensors if t.label() not in dropped))
    namer = _namer(kept, dialect, config)
    for tensor in namer.checkpoint.tensors:
        if not isinstance(tensor.name, ExpertName):
            _add(found, namer.dense(tensor.name), tensor)
    for name, tensor in namer.stacks():
        _add(found, name, tensor)
    found.left_out |= namer.left_out
    found.notes = [note for note in namer.checkpoint.notes if note not in checkpoint.notes]
    if sum(t.nbytes for t in found.tensors.values()) != sum(t.nbytes for t in namer.checkpoint.tensors):
        raise MismatchError("Naming tensors for the run lost elements. This is a bug in ckpt-tool.")
    _add_scalars(found, namer)
    found.groups = [
        (group.options, list(dict.fromkeys(namer.name(name) for name in group.parameters)))
        for group in namer.checkpoint.training.param_groups
    ]
    found.aliases = {
        namer.dense(alias): namer.dense(name) for alias, name in namer.checkpoint.aliases.items()
    }
    found.zeros = namer.zeros(found)
    wanted = namer.fused(found) if fused is None else fused
    found.groups = fuse(found.tensors, found.scalars, found.groups, wanted)
    return found


def _as_saved(checkpoint: Checkpoint, hint: Hint, fused: Mapping[str, Fused]) -> Styled:
    """A DCP source under the very names it has: whatever a config.json tells of its experts, what was
    saved as one tensor stays one, in the form it has.
    """
    found, apart = Styled(aliases=dict(checkpoint.aliases)), hint.apart
    values = {tensor.name: tensor for tensor in checkpoint.values()}
    for name, names in hint.names.items():
        listed = values[names[0]]
        found.tensors[name, WEIGHT] = replace(apart.model[name].tensor, name=name, state=listed.state)
        found.roles[name] = listed.role
    for (name, state), held in apart.states.items():
        found.tensors[name, state] = replace(held.tensor, name=name, state=state)
    if sum(t.nbytes for t in found.tensors.values()) != sum(t.nbytes for t in checkpoint.tensors):
        raise MismatchError("Keeping the names of the source lost elements. This is a bug in ckpt-tool.")
    found.scalars = dict(apart.scalars)
    found.groups = [(options, list(names)) for options, names in apart.groups]
    found.groups = fuse(found.tensors, found.scalars, found.groups, fused)
    return found


def _shadowed(checkpoint: Checkpoint) -> list[Tensor]:
    masters = {tensor.name for tensor in checkpoint.tensors if tensor.state == MASTER}
    return [t for t in checkpoint.tensors if t.state == WEIGHT and t.name in masters]


def _add(found: Styled, name: str, tensor: Tensor) -> None:
    state = WEIGHT if tensor.state == MASTER else tensor.state
    if (name, state) in found.tensors:
        raise MismatchError(f"Two tensors of the checkpoint get the same name: {name} [{state}].")
    found.tensors[name, state] = replace(tensor, name=name, replicas=())
    if state == WEIGHT:
        found.roles[name] = tensor.role


def _add_scalars(found: Styled, namer: _Namer) -> None:
    """torch's optimizers want a 0-d fp32 tensor; experts fused into one parameter share it."""
    for (name, state), scalar in namer.checkpoint.scalars.items():
        key = (namer.name(name), state)
        value = Scalar(scalar.value, scalar.dtype or DType.float32)
        known = found.scalars.setdefault(key, value)
        if known != value:
            raise MismatchError(
                f"{state} is {value.value} for {name} and {known.value} for another part of {key[0]}, "
                "which is one parameter in the target run."
            )


class _Namer:
    """Names of one dialect: here, those that the source has, for a model without stacks of experts.

    ``checkpoint`` is the catalogue under the names it starts from, without what is ``left_out``.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.left_out: Mapping[str, str] = {}

    def dense(self, name: str) -> str:
        return name

    def expert(self, name: ExpertName) -> str:
        raise MismatchError(f"{name} is a stack of experts, for which the target has no name.")

    def name(self, name: TensorName) -> str:
        return self.expert(name) if isinstance(name, ExpertName) else self.dense(name)

    def zeros(self, found: Styled) -> dict[str, Inline]:  # noqa: ARG002
        """Buffers that the run has and the catalogue has not."""
        return {}

    def fused(self, found: Styled) -> Mapping[str, Fused]:  # noqa: ARG002
        """Parameters of the run that the catalogue has in three parts."""
        return {}

    def stacks(self) -> Iterable[tuple[str, Tensor]]:
        """The expert tensors: by default one per canonical stack."""
        for tensor in self.checkpoint.tensors:
            if isinstance(tensor.name, ExpertName):
                yield self.expert(tensor.name), tensor


class _Renamed(_Namer):
    """Names made from published ones by the family's tables."""

    def __init__(self, checkpoint: Checkpoint, family: Family, dialect: str) -> None:
        super().__init__(checkpoint)
        self._family, self._dialect = family, dialect

    def dense(self, name: str) -> str:
        return self._family.unpublished(name, self._dialect)


class _Titan(_Renamed):
    """torchtitan's names from published ones."""

    def __init__(self, checkpoint: Checkpoint, family: Family, config: Mapping[str, Any]) -> None:
        super().__init__(checkpoint, family, TITAN)
        self._config = config
        self.left_out = {
            tensor.label(): "torchtitan's layers for multi-token prediction use the model's own"
            for tensor in checkpoint.tensors
            if self._shared(tensor.name)
        }
        self.checkpoint = checkpoint.select(t for t in checkpoint.tensors if t.label() not in self.left_out)
        count = stated(text_config(config), family.config["layers"])
        self._layers = count[1] if family.torchtitan_mtp and count and type(count[1]) is int else None

    def _shared(self, name: TensorName) -> bool:
        patterns = self._family.torchtitan_shared
        return isinstance(name, str) and any(compiled(pattern).fullmatch(name) for pattern in patterns)

    def _placed(self, name: str) -> str:
        return name if self._layers is None else unnumbered(name, self._layers)

    def dense(self, name: str) -> str:
        found = super().dense(name)
        if found == name and name != "lm_head.weight":
            raise MismatchError(f"torchtitan has no name for {name} of the family {self._family.name}.")
        return self._placed(found)

    def expert(self, name: ExpertName) -> str:
        return self._placed(_titan_name(name))

    def zeros(self, found: Styled) -> dict[str, Inline]:
        names: dict[str, Inline] = {}
        for tensor in self.checkpoint.tensors:
            if isinstance(tensor.name, ExpertName):
                layer = tensor.name.layer_path.rpartition(".")[2]
                empty = Inline(bytes(4 * tensor.shape[0]), (tensor.shape[0],), DType.float32)
                for pattern in self._family.torchtitan_buffers:
                    names[self._placed(pattern.format(layer=layer))] = empty
        return {name: zeros for name, zeros in names.items() if (name, WEIGHT) not in found.tensors}

    def fused(self, found: Styled) -> Mapping[str, Fused]:
        if not self._family.torchtitan_fused_qkv:
            return {}
        shapes = {name: tensor.shape for name, tensor in found.model()}
        fused = {}
        for name in shapes:
            path, _, last = name.rpartition(".wq.")
            parts = (name, f"{path}.wk.{last}", f"{path}.wv.{last}")
            if not path or not all(part in shapes for part in parts):
                continue
            heads = key_value_heads(parts, shapes, self._config)
            if heads is None:
                raise UsageError("config.json has no num_key_value_heads, which torchtitan's names need.")
            fused[f"{path}.wqkv.{last}"] = Fused(parts, heads)
        return fused


class _Fused(_Renamed):
    """transformers' names and fused stacks."""

    def __init__(self, checkpoint: Checkpoint, family: Family) -> None:
        super().__init__(checkpoint, family, TRANSFORMERS)

    def expert(self, name: ExpertName) -> str:
        for stored in self._family.fused:
            if name.projection in stored.projections and name.part == stored.part:
                return stored.key(self._family.memory_path(name.layer_path))
        raise MismatchError(f"The family {self._family.name} has no fused name for {name}.")

    def stacks(self) -> Iterable[tuple[str, Tensor]]:
        layers: dict[tuple[str, str, str], dict[str, Tensor]] = {}
        for tensor in self.checkpoint.tensors:
            if isinstance(tensor.name, ExpertName):
                layer = (tensor.name.layer_path, tensor.name.part, tensor.state)
                layers.setdefault(layer, {})[tensor.name.projection] = tensor
        for (path, part, _), by_projection in layers.items():
            for stored in self._family.fused:
                if stored.part != part or not set(stored.projections) <= by_projection.keys():
                    continue
                stacks = [by_projection.pop(projection) for projection in stored.projections]
                key = stored.key(self._family.memory_path(path))
                tensor, shape = join(stacks, stored, key)
                if tensor.shape != shape:
                    raise MismatchError(
                        f"{key} flattens its experts into another dimension; not written as DCP."
                    )
                state = MASTER if all(s.state == MASTER for s in stacks) else stacks[0].state
                yield key, replace(tensor, state=state)
            if by_projection:
                left = sorted(by_projection, key=PROJECTIONS.index)
                raise MismatchError(
                    f"{path}: the family {self._family.name} has no fused tensor for {left}."
                )


def _titan_name(name: ExpertName) -> str:
    return TITAN_NAMES[name.projection].format(layer=titan_layer(name.layer_path))


def _namer(checkpoint: Checkpoint, dialect: str, config: Mapping[str, Any] | None) -> _Namer:
    has_stacks = any(isinstance(tensor.name, ExpertName) for tensor in checkpoint.tensors)
    if checkpoint.dialect == dialect and not has_stacks:
        return _Namer(checkpoint)
    found = config if config is not None else checkpoint.model_config
    if found is None:
        raise UsageError(
            f"The source has {checkpoint.dialect} names, the target {dialect}'s, and the checkpoint does "
            "not say which model it is. Pass --config with the model's config.json."
        )
    family = family_of(found)
    if dialect == TITAN:
        if not family.torchtitan:
            raise UsageError(f"torchtitan's names for the family {family.name} are not known.")
        return _Titan(to_hub(checkpoint, family), family, found)
    return _Fused(to_hub(checkpoint, family), family)
