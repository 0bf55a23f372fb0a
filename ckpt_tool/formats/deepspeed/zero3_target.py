"""Writing ZeRO-3 checkpoints for any world size and EP size: what the engine itself would have saved there.

Every rank's two files are laid out from the catalogue: shapes and flat buffers by the engine's grouping
rules (``groups``), paddings zero. Loaded by a plain ``load_checkpoint``, such a checkpoint resumes exactly.
What does not depend on the topology is taken over from the source as it was saved, key by key, so that a
file of another DeepSpeed release keeps what that release puts into it.

What changes with the topology (complete list, found by saving again with the engine): deepspeed 0.19.8,
runtime/engine.py ``_save_checkpoint``, runtime/zero/stage3.py ``_rigid_state_dict``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, overload

from ckpt_tool.canonical import (
    MASTER,
    WEIGHT,
    Checkpoint,
    ExpertName,
    ParamGroup,
    Role,
    Tensor,
    TensorName,
)
from ckpt_tool.containers.torch_zip import Flat, torch_file
from ckpt_tool.errors import MismatchError, UsageError
from ckpt_tool.formats.base import TargetOptions
from ckpt_tool.formats.deepspeed import groups
from ckpt_tool.formats.deepspeed.autoep import layer_entries
from ckpt_tool.formats.deepspeed.groups import SubGroup
from ckpt_tool.formats.deepspeed.names import expert_parameter
from ckpt_tool.formats.deepspeed.partition import partition_size
from ckpt_tool.formats.deepspeed.rank_files import SavedObjects
from ckpt_tool.formats.deepspeed.saved_objects import saved_objects, shape_type
from ckpt_tool.formats.deepspeed.scalars import saved_scalar
from ckpt_tool.formats.deepspeed.topology import Ranks, target_ranks
from ckpt_tool.layout import Layout, Slot, TargetFile, text_file

_PER_RANK = (
    "Client state {names} differs between ranks and means nothing on others; it is left out on all ranks. "
    "Your code must do without it after loading."
)


class Zero3Target:
    """The format as the registry knows it."""

    name = "deepspeed-zero3"

    def layout(self, checkpoint: Checkpoint, options: TargetOptions) -> Layout:
        """All ranks' files below the source's tag, and ``latest``."""
        if options.dtype is not None:
            raise UsageError(
                "A ZeRO-3 checkpoint keeps masters and moments in fp32, and the engine derives its "
                "weights; --dtype does not apply."
            )
        if checkpoint.dialect == "hub":
            raise UsageError(
                "A ZeRO-3 checkpoint needs the names of the training run's modules; this source has "
                "published names. Convert from a training checkpoint."
            )
        saved = saved_objects(checkpoint, options)
        ranks = target_ranks(checkpoint, options)
        plan = _Plan(checkpoint, saved, ranks, options)
        tag = PurePath(checkpoint.root).name
        if checkpoint.format != self.name:
            tag = f"global_step{checkpoint.training.step or 0}"
        notes = list(checkpoint.notes)
        if checkpoint.training.per_rank:
            notes.append(_PER_RANK.format(names=", ".join(checkpoint.training.per_rank)))
        return Layout(_Files(plan, tag), checkpoint.tensors, plan.left_out(), tuple(notes))


class _Files(Sequence[TargetFile]):
    """Two files per rank and ``latest``, each made when it is asked for."""

    def __init__(self, plan: _Plan, tag: str) -> None:
        self._plan, self._tag = plan, tag

    def __len__(self) -> int:
        return 2 * self._plan.ranks.world + 1

    @overload
    def __getitem__(self, index: int) -> TargetFile: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[TargetFile]: ...

    def __getitem__(self, index: int | slice) -> TargetFile | Sequence[TargetFile]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        rank, kind = divmod(index, 2)
        if rank == self._plan.ranks.world:
            return text_file("latest", self._tag)
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        if kind == 0:
            return torch_file(f"{self._tag}/{name}_model_states.pt", self._plan.model(rank))
        prefix = "bf16_" if self._plan.saved.bf16 else ""
        return torch_file(f"{self._tag}/{prefix}{name}_optim_states.pt", self._plan.optimizer(rank))

    def __iter__(self) -> Iterator[TargetFile]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True, slots=True)
class _Share:
    """A rank's part of a parameter: elements ``start .. start + numel`` of its canonical tensor, then
    ``padding`` elements."""

    start: int
    numel: int
    padding: int


class _Plan:
    """What every rank's files hold."""

    def __init__(
        self, checkpoint: Checkpoint, saved: SavedObjects, ranks: Ranks, options: TargetOptions
    ) -> None:
        self.ranks, self.saved = ranks, saved
        self._checkpoint, self._options = checkpoint, options
        self._layers = {layer.layer_path: layer for layer in checkpoint.moe_layers}
        self._tensors = checkpoint.by_key()
        self._values = {tensor.name: tensor for tensor in checkpoint.values()}
        self._position = {name: i for i, name in enumerate(self._parameters())}
        self._groups, self._sub_groups = self._grouping()
        self._states = [self._states_of(sub_group) for sub_group in self._sub_groups]
        self._check_all_grouped()

    # ---- who is grouped with whom

    def _parameters(self) -> list[TensorName]:
        """``module.parameters()``: module order, w1, w2, w3 behind their router, frozen ones too."""
        order: list[TensorName] = []
        pending = {name for name in self._values if isinstance(name, ExpertName)}
        modules = {layer.module: path for path, layer in self._layers.items()}

        def experts(path: str) -> list[TensorName]:
            return [
                name
                for projection in ("gate", "down", "up")
                if (name := ExpertName(path, projection)) in pending
            ]

        for name in self._checkpoint.module_names:
            tensor = self._values.get(name)
            if tensor is None or tensor.role is Role.BUFFER:
                continue
            order.append(name)
            module = name.removesuffix(".router.gate.weight")
            if module != name and module in modules:
                order += experts(modules[module])
        known = set(order)
        order += [
            name
            for name, tensor in self._values.items()
            if name not in known and tensor.role is not Role.BUFFER
        ]
        return order

    def _grouping(self) -> tuple[list[ParamGroup], list[SubGroup]]:
        source = self._checkpoint.topology
        like = self._options.like
        if like is not None:
            params = list(like.training.param_groups)
        else:
            params = list(self._checkpoint.training.param_groups)
        if not params:
            raise UsageError(
                "The source does not say how the run grouped its parameters, and a wrong order would load "
                "without an error. Pass --like with a checkpoint that the target run saved itself (at step "
                "0, say)."
            )
        if like is None and any(group.options.get("moe") for group in params):
            source_ep = source.ep_size or _configured_ep(self._checkpoint.training.config)
            params = groups.regroup(
                params,
                self._position,
                lambda name: self._local_numel(name, source_ep),
                lambda name: self._local_numel(name, self.ranks.ep),
                f"ep_size_{self.ranks.ep}",
                groups.EXPERT_GROUP_LIMIT,
            )
        zero = dict(self._config().get("zero_optimization") or {})
        size = int(zero.get("sub_group_size") or groups.DEFAULT_SUB_GROUP_SIZE)
        return params, groups.sub_groups(params, self._partition_numel, size)

    def _config(self) -> Mapping[str, Any]:
        if self._options.ds_config is not None:
            return self._options.ds_config
        if self._options.like is not None:
            return self._options.like.training.config
        return self._checkpoint.training.config

    def _local_numel(self, name: TensorName, ep: int) -> int:
        tensor = self._tensor(name)
        return tensor.numel // ep if isinstance(name, ExpertName) else tensor.numel

    def _partition_numel(self, name: TensorName) -> int:
        count = self.ranks.edp if isinstance(name, ExpertName) else self.ranks.world
        return partition_size(self._local_numel(name, self.ranks.ep), count)

    def _tensor(self, name: TensorName) -> Tensor:
        if name not in self._values:
            raise MismatchError(f"The source has no values for {name}, which the target run trains.")
        return self._values[name]

    def _check_all_grouped(self) -> None:
        grouped = [name for group in self._sub_groups for name in group.parameters]
        trained = {t.name for t in self._values.values() if t.role is Role.PARAMETER}
        if len(set(grouped)) != len(grouped) or set(grouped) != trained:
            wrong = sorted(map(str, set(grouped) ^ trained))[:5]
            raise MismatchError(
                f"The parameter groups and the trained parameters are not the same: {wrong}. Pass --like "
                "with a checkpoint that the target run saved itself."
            )

    def _states_of(self, sub_group: SubGroup) -> list[str]:
        """The per-element states of a sub-group other than its masters; all its parameters have them."""
        if self._options.weights_only:
            return []
        first = sub_group.parameters[0]
        kept = [s for name, s in self._tensors if name == first and s not in (MASTER, WEIGHT)]
        for name in sub_group.parameters:
            for state in kept:
                if (name, state) not in self._tensors:
                    raise MismatchError(
                        f"{name} has no {state}, but {sub_group.parameters[0]} of the same sub-group does. "
                        "The engine keeps optimizer state for a sub-group as a whole."
                    )
        return kept

    # ---- one rank's share

    def _share(self, name: TensorName, rank: int) -> _Share:
        local = self._local_numel(name, self.ranks.ep)
        if isinstance(name, ExpertName):
            count, own = self.ranks.edp, self.ranks.edp_rank(rank)
            base = self.ranks.ep_rank(rank) * local
        else:
            count, own, base = self.ranks.world, rank, 0
        return _cut(local, count, own, base)

    def _flat(self, sub_group: SubGroup, state: str, rank: int) -> list[Slot | int]:
        parts: list[Slot | int] = []
        for name in sub_group.parameters:
            tensor = self._tensor(name) if state == MASTER else self._tensors[name, state]
            parts += _slots(tensor, self._share(name, rank))
        return parts

    # ---- the model file

    def model(self, rank: int) -> dict[str, Any]:
        """The object in a rank's model_states file."""
        entries = layer_entries(
            self.saved.model, self._checkpoint.moe_layers, self._shapes(), self.ranks, rank
        )
        changed: dict[str, Any] = {
            "param_shapes": [self._param_shapes(group) for group in self._sub_groups],
            "frozen_param_fragments": self._frozen(rank),
            "dp_world_size": self.ranks.world,
            "ds_config": self._new_config(self.saved.model.get("ds_config")),
            "shared_params": self.saved.model.get("shared_params") if rank == 0 else {},
        }
        for key in ("ds_autoep_layers", "autoep_layers"):
            if self.saved.model.get(key) is not None:
                changed[key] = entries
        info = self.saved.model.get("universal_checkpoint_info")
        if info is not None and "ds_autoep_layers" in info:
            changed["universal_checkpoint_info"] = {**info, "ds_autoep_layers": entries}
        per_rank = self._checkpoint.training.per_rank
        return {
            key: changed.get(key, value) for key, value in self.saved.model.items() if key not in per_rank
        }

    def _shapes(self) -> dict[TensorName, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._values.items()}

    def _param_shapes(self, sub_group: SubGroup) -> OrderedDict[str, Any]:
        kind = shape_type(self.saved)
        found: OrderedDict[str, Any] = OrderedDict()
        for name in sub_group.parameters:
            shape = self._tensor(name).shape
            if isinstance(name, ExpertName):
                found[self._parameter(name)] = kind((shape[0] // self.ranks.ep, *shape[1:]))
            else:
                found[name] = kind(shape)
        return found

    def _parameter(self, name: TensorName) -> str:
        return expert_parameter(name, self._layers) if isinstance(name, ExpertName) else name

    def _frozen(self, rank: int) -> OrderedDict[str, Any]:
        found: OrderedDict[str, Any] = OrderedDict()
        for name in self.saved.model.get("frozen_param_shapes") or ():
            tensor = self._tensor(name)
            share = _cut(tensor.numel, self.ranks.world, rank, 0)
            found[name] = Flat(tuple(_slots(tensor, share)), tensor.dtype)
        return found

    def _new_config(self, config: Any) -> Any:
        """The run's config with the new EP size in it."""
        if self._options.ds_config is not None:
            return dict(self._options.ds_config)
        if not isinstance(config, dict) or not isinstance(config.get("expert_parallel"), dict):
            return config
        return {
            **config,
            "expert_parallel": {**config["expert_parallel"], "autoep_size": self.ranks.ep},
        }

    # ---- the optimizer file

    def optimizer(self, rank: int) -> dict[str, Any]:
        """The object in a rank's optim_states file."""
        zero = self.saved.optimizer["optimizer_state_dict"]
        flats = [
            Flat(
                tuple(self._flat(group, MASTER, rank)),
                self._tensor(group.parameters[0]).dtype,
                requires_grad=True,
                attributes={"ds_id": self._ds_id(group)},
            )
            for group in self._sub_groups
        ]
        if self._options.weights_only:
            kept = ("loss_scaler", "dynamic_loss_scale", "overflow")
            new = {key: zero[key] for key in kept} | {"fp32_flat_groups": flats}
            return {**self.saved.optimizer, "optimizer_state_dict": new}
        changed: dict[str, Any] = {
            "partition_count": self.ranks.world,
            "ds_zero_partition_groups": self._partition_groups(rank),
            "optimizer_state_dict": {
                **zero["optimizer_state_dict"],
                "state": {i: self._state(i, rank) for i in range(len(self._sub_groups))},
                "param_groups": self._param_groups(),
            },
            "fp32_flat_groups": flats,
        }
        new = {key: changed.get(key, value) for key, value in zero.items()}
        return {
            **self.saved.optimizer,
            "optimizer_state_dict": new,
            "ds_config": self._new_config(self.saved.optimizer.get("ds_config")),
        }

    def _ds_id(self, sub_group: SubGroup) -> str:
        ends = (sub_group.parameters[0], sub_group.parameters[-1])
        return "_".join(str(self._position[name]) for name in ends)

    def _partition_groups(self, rank: int) -> list[dict[str, Any]]:
        result = []
        for index, group in enumerate(self._sub_groups):
            members = self.ranks.edp_group(rank) if group.is_expert else range(self.ranks.world)
            name = f"ep_size_{self.ranks.ep}" if group.is_expert else "replicated"
            result.append(
                {
                    "sub_group": index,
                    "partition_count": len(members),
                    "partition_rank": members.index(rank),
                    "partition_ranks": list(members),
                    "families": ["autoep_expert" if group.is_expert else "replicated"],
                    "group_names": [name],
                }
            )
        return result

    def _param_groups(self) -> list[dict[str, Any]]:
        return [
            {
                **group.options,
                "params": [i for i, sub in enumerate(self._sub_groups) if sub.group == index],
            }
            for index, group in enumerate(self._groups)
        ]

    def _state(self, index: int, rank: int) -> dict[str, Any]:
        sub_group = self._sub_groups[index]
        state: dict[str, Any] = {}
        for key, scalar in self._scalars(sub_group).items():
            state[key] = saved_scalar(scalar)
        for key in self._states[index]:
            dtype = self._tensors[sub_group.parameters[0], key].dtype
            state[key] = Flat(tuple(self._flat(sub_group, key, rank)), dtype)
        return state

    def _scalars(self, sub_group: SubGroup) -> dict[str, Any]:
        """``step`` and the like: one per sub-group, on which its parameters must agree."""
        scalars = self._checkpoint.scalars
        first = sub_group.parameters[0]
        found = {state: value for (name, state), value in scalars.items() if name == first}
        for name in sub_group.parameters:
            for state, value in found.items():
                if scalars.get((name, state)) != value:
                    other = scalars.get((name, state))
                    raise MismatchError(
                        f"{name} has {state} {other.value if other else 'none'}, {first} has "
                        f"{value.value}; at the target they share one sub-group, which has one {state}. "
                        "Their histories differ, and no ZeRO-3 checkpoint of this topology holds both."
                    )
        return found

    # ---- what has no place

    def left_out(self) -> dict[str, str]:
        """Labels of tensors that a ZeRO-3 checkpoint does not hold, with the reason."""
        masters = {tensor.name for tensor in self._checkpoint.tensors if tensor.state == MASTER}
        result = {}
        for tensor in self._checkpoint.tensors:
            if tensor.state == WEIGHT and tensor.name in masters:
                result[tensor.label()] = "recomputed from its master when the engine loads"
            elif self._options.weights_only and tensor.state not in (WEIGHT, MASTER):
                result[tensor.label()] = "optimizer state; --weights-only"
        return result


def _configured_ep(config: Mapping[str, Any]) -> int:
    section = config.get("expert_parallel")
    return int(section.get("autoep_size") or 1) if isinstance(section, Mapping) else 1


def _cut(numel: int, count: int, own: int, base: int) -> _Share:
    size = partition_size(numel, count)
    real = max(0, min(size, numel - own * size))
    return _Share(base + min(numel, own * size), real, size - real)


def _slots(tensor: Tensor, share: _Share) -> list[Slot | int]:
    parts: list[Slot | int] = []
    if share.numel:
        parts.append(Slot(tensor, (share.numel,), tensor.dtype, share.start))
    if share.padding:
        parts.append(share.padding)
    return parts
