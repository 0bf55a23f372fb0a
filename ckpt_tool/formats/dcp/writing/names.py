"""A catalogue under the names of an FSDP2 run: transformers' modules or torchtitan's, experts stacked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ckpt_tool.canonical import (
    MASTER,
    WEIGHT,
    Checkpoint,
    DType,
    ExpertName,
    Role,
    Scalar,
    Tensor,
    TensorName,
    same,
)
from ckpt_tool.containers.torch_zip import Inline
from ckpt_tool.errors import MismatchError, UsageError
from ckpt_tool.families import FUSED_FORM, Family, families, family_of, stated, text_config
from ckpt_tool.families.forms import compiled
from ckpt_tool.families.naming import Entry, entries, to_hub, unpublishable, whose
from ckpt_tool.formats.dcp.grammar.experts import TITAN_NAMES, titan_layer
from ckpt_tool.formats.dcp.grammar.titan import Fused, fuse, key_value_heads, unnumbered
from ckpt_tool.formats.dcp.reading.reader import Hint
from ckpt_tool.layout import LeftOut, left_out

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
    left_out: tuple[LeftOut, ...] = ()
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
        MismatchError: the model's family has no such names, or not of all its tensors.
    """
    hint = checkpoint.layout_hint
    if isinstance(hint, Hint) and checkpoint.dialect == dialect:
        return _as_saved(checkpoint, hint, hint.fused if fused is None else fused)
    found = Styled()
    shadowed = _shadowed(checkpoint)
    found.left_out = left_out(shadowed, "the run keeps the fp32 values and rounds them itself")
    dropped = {tensor.label() for tensor in shadowed}
    kept = checkpoint.select(t for t in checkpoint.tensors if t.label() not in dropped)
    namer = _namer(kept, dialect, config)
    for name, tensor in namer.tensors():
        _add(found, name, tensor)
    found.left_out += namer.left_out
    found.notes = [note for note in namer.checkpoint.notes if note not in checkpoint.notes]
    _add_scalars(found, namer)
    found.groups = [
        (group.options, list(dict.fromkeys(new for name in group.parameters for new in namer.names(name))))
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
        value = Scalar(scalar.value, scalar.dtype or DType.float32)
        for new in namer.names(name):
            known = found.scalars.setdefault((new, state), value)
            if not same(known, value):
                raise MismatchError(
                    f"{state} is {value.value} for {name} and {known.value} for another part of {new}, "
                    "which is one parameter in the target run."
                )


class _Namer:
    """Names of one dialect: here, those that the source has, for a model without stacks of experts.

    ``checkpoint`` is the catalogue under the names it starts from, without what is ``left_out``.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.left_out: tuple[LeftOut, ...] = ()

    def dense(self, name: str) -> str:
        return name

    def expert(self, name: ExpertName) -> str:
        raise MismatchError(f"{name} is a stack of experts, for which the target has no name.")

    def names(self, name: TensorName) -> tuple[str, ...]:
        """The tensors of the run that a canonical one is in."""
        return (self.expert(name) if isinstance(name, ExpertName) else self.dense(name),)

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """The tensors of the run under their names: by default one per canonical one."""
        for tensor in self.checkpoint.tensors:
            yield self.names(tensor.name)[0], tensor

    def zeros(self, found: Styled) -> dict[str, Inline]:  # noqa: ARG002
        """Buffers that the run has and the catalogue has not."""
        return {}

    def fused(self, found: Styled) -> Mapping[str, Fused]:  # noqa: ARG002
        """Parameters of the run that the catalogue has in three parts."""
        return {}


class _Titan(_Namer):
    """torchtitan's names from published ones."""

    def __init__(self, checkpoint: Checkpoint, family: Family, config: Mapping[str, Any]) -> None:
        super().__init__(checkpoint)
        self._family, self._config = family, config
        self.left_out = left_out(
            (tensor for tensor in checkpoint.tensors if self._shared(tensor.name)),
            "torchtitan's layers for multi-token prediction use the model's own",
        )
        self.checkpoint = checkpoint.select(t for t in checkpoint.tensors if not self._shared(t.name))
        count = stated(text_config(config), family.config["layers"])
        self._layers = count[1] if family.torchtitan_mtp and count and type(count[1]) is int else None

    def _shared(self, name: TensorName) -> bool:
        patterns = self._family.torchtitan_shared
        return isinstance(name, str) and any(compiled(pattern).fullmatch(name) for pattern in patterns)

    def _placed(self, name: str) -> str:
        return name if self._layers is None else unnumbered(name, self._layers)

    def dense(self, name: str) -> str:
        found = self._family.unpublished(name, TITAN)
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


class _InMemory(_Namer):
    """transformers' names, stacks and joined tensors, from published ones."""

    def __init__(self, checkpoint: Checkpoint, family: Family, config: Mapping[str, Any]) -> None:
        super().__init__(checkpoint)
        self._family = family
        self._entries: list[Entry] = []
        self._names: dict[TensorName, dict[str, None]] = {}
        by_state: dict[str, list[Tensor]] = {}
        for tensor in checkpoint.tensors:
            if isinstance(tensor.name, str) and not family.is_translated(tensor.name):
                raise MismatchError(
                    f"{tensor.name}: ckpt-tool does not know what transformers calls it in memory (that is "
                    f"no matter of prefixes in the family {family.name}, or differs between releases), and "
                    "a run would not find it. Load the model with transformers, save it with "
                    "torch.distributed.checkpoint, and reshard that."
                )
            by_state.setdefault(WEIGHT if tensor.state == MASTER else tensor.state, []).append(tensor)
        for tensors in by_state.values():
            for entry in entries(tensors, family, FUSED_FORM, config):
                self._entries.append(entry)
                for source in entry.sources:
                    self._names.setdefault(source, {})[entry.name] = None

    def dense(self, name: str) -> str:
        return self._family.unpublished(name, TRANSFORMERS)

    def names(self, name: TensorName) -> tuple[str, ...]:
        return tuple(self._names[name]) if name in self._names else super().names(name)

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        return ((entry.name, entry.sliced()) for entry in self._entries)


def _titan_name(name: ExpertName) -> str:
    return TITAN_NAMES[name.projection].format(layer=titan_layer(name.layer_path))


def _namer(checkpoint: Checkpoint, dialect: str, config: Mapping[str, Any] | None) -> _Namer:
    has_stacks = any(isinstance(tensor.name, ExpertName) for tensor in checkpoint.tensors)
    if checkpoint.dialect == dialect and not has_stacks:
        return _Namer(checkpoint)
    found = config if config is not None else checkpoint.model_config
    if found is None:
        raise UsageError(
            f"The names of the source are {whose(checkpoint.dialect)}, the target's are "
            f"{whose(dialect)}, and the checkpoint does not say which model it is. Pass "
            "--config with the model's config.json."
        )
    family = family_of(found)
    if dialect == TITAN:
        if not family.torchtitan:
            known = ", ".join(one.name for one in families() if one.torchtitan)
            raise UsageError(
                f"torchtitan's names for the family {family.name} are not known, but for {known}. Choose "
                "another --style."
            )
        namer: _Namer = _Titan(to_hub(checkpoint, family, found), family, found)
    else:
        namer = _InMemory(to_hub(checkpoint, family, found), family, found)
    namer.left_out += unpublishable(checkpoint, family)
    return namer
