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
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath
from typing import Any

from ckpt_tool.canonical import MASTER, Checkpoint, DType, ExpertName, Tensor, TensorName
from ckpt_tool.containers.torch_zip import Flat, torch_file
from ckpt_tool.formats.base import TargetOptions
from ckpt_tool.formats.deepspeed.facts.groups import SubGroup
from ckpt_tool.formats.deepspeed.facts.partition import partition_size
from ckpt_tool.formats.deepspeed.facts.scalars import saved_scalar
from ckpt_tool.formats.deepspeed.facts.topology import target_ranks
from ckpt_tool.formats.deepspeed.reading.autoep import layer_entries
from ckpt_tool.formats.deepspeed.writing.engine_plan import EnginePlan, notes, refuse_unsuitable
from ckpt_tool.formats.deepspeed.writing.saved_objects import as_template_says, saved_objects, shape_type
from ckpt_tool.layout import Layout, LazyFiles, Slot, TargetFile, text_file


class Zero3Target:
    """The format as the registry knows it."""

    name = "deepspeed-zero3"

    def layout(self, checkpoint: Checkpoint, options: TargetOptions) -> Layout:
        """All ranks' files below the source's tag, and ``latest``."""
        refuse_unsuitable(checkpoint, options)
        checkpoint = as_template_says(checkpoint, options)
        saved = saved_objects(checkpoint, options)
        plan = _Plan(checkpoint, saved, target_ranks(checkpoint, options), options)
        tag = PurePath(checkpoint.root).name
        if checkpoint.format != self.name:
            tag = f"global_step{checkpoint.training.step or 0}"
        return Layout(
            _files(plan, tag),
            checkpoint.tensors,
            plan.left_out(),
            notes(checkpoint, weights_only=options.weights_only),
        )


def _files(plan: _Plan, tag: str) -> LazyFiles:
    """Two files per rank and ``latest``."""

    def model(rank: int) -> TargetFile:
        return torch_file(f"{tag}/zero_pp_rank_{rank}_mp_rank_00_model_states.pt", plan.model(rank))

    def optimizer(rank: int) -> TargetFile:
        prefix = "bf16_" if plan.saved.bf16 else ""
        name = f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        return torch_file(f"{tag}/{name}", plan.optimizer(rank))

    makers = [partial(make, rank) for rank in range(plan.ranks.world) for make in (model, optimizer)]
    return LazyFiles([*makers, partial(text_file, "latest", tag)])


@dataclass(frozen=True, slots=True)
class _Share:
    """A rank's part of a parameter: elements ``start .. start + numel`` of its canonical tensor, then
    ``padding`` elements."""

    start: int
    numel: int
    padding: int


class _Plan(EnginePlan):
    """What every rank's files hold."""

    # ---- one rank's share

    def _share(self, name: TensorName, rank: int) -> _Share:
        local = self.local_numel(name, self.ranks.ep)
        if isinstance(name, ExpertName):
            count, own = self.ranks.edp, self.ranks.edp_rank(rank)
            base = self.ranks.ep_rank(rank) * local
        else:
            count, own, base = self.ranks.world, rank, 0
        return _cut(local, count, own, base)

    def _flat(self, sub_group: SubGroup, state: str, rank: int) -> list[Slot | int]:
        parts: list[Slot | int] = []
        for name in sub_group.parameters:
            if state == MASTER:  # a weight where the source holds no master, widened exactly
                parts += _slots(self.value_of(name), self._share(name, rank), DType.float32)
            else:
                tensor = self.tensors[name, state]
                parts += _slots(tensor, self._share(name, rank), tensor.dtype)
        return parts

    # ---- the model file

    def model(self, rank: int) -> dict[str, Any]:
        """The object in a rank's model_states file."""
        entries = layer_entries(
            self.saved.model, self.checkpoint.moe_layers, self._shapes(), self.ranks, rank
        )
        changed: dict[str, Any] = {
            "param_shapes": [self._param_shapes(group) for group in self.sub_groups],
            "frozen_param_fragments": self._frozen(rank),
            "dp_world_size": self.ranks.world,
            "ds_config": self.new_config(self.saved.model.get("ds_config"), 3),
            "shared_params": self.saved.model.get("shared_params") if rank == 0 else {},
        }
        return self.model_entries(changed, entries)

    def _shapes(self) -> dict[TensorName, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.values.items()}

    def _param_shapes(self, sub_group: SubGroup) -> OrderedDict[str, Any]:
        kind = shape_type(self.saved)
        found: OrderedDict[str, Any] = OrderedDict()
        for name in sub_group.parameters:
            shape = self.value_of(name).shape
            if isinstance(name, ExpertName):
                found[self.parameter(name)] = kind((shape[0] // self.ranks.ep, *shape[1:]))
            else:
                found[name] = kind(shape)
        return found

    def _frozen(self, rank: int) -> OrderedDict[str, Any]:
        found: OrderedDict[str, Any] = OrderedDict()
        for name in self.saved.model.get("frozen_param_shapes") or ():
            tensor = self.value_of(name)
            share = _cut(tensor.numel, self.ranks.world, rank, 0)
            found[name] = Flat(tuple(_slots(tensor, share, tensor.dtype)), tensor.dtype)
        return found

    # ---- the optimizer file

    def optimizer(self, rank: int) -> dict[str, Any]:
        """The object in a rank's optim_states file."""
        zero = self.saved.optimizer["optimizer_state_dict"]
        flats = [
            Flat(
                tuple(self._flat(group, MASTER, rank)),
                DType.float32,
                requires_grad=True,
                attributes={"ds_id": self._ds_id(group)},
            )
            for group in self.sub_groups
        ]
        changed: dict[str, Any] = {
            "partition_count": self.ranks.world,
            "ds_zero_partition_groups": self._partition_groups(rank),
            "optimizer_state_dict": {
                **zero["optimizer_state_dict"],
                "state": self._all_states(rank),
                "param_groups": self._param_groups(),
            },
            "fp32_flat_groups": flats,
        }
        new = {key: changed.get(key, value) for key, value in zero.items()}
        if self.options.weights_only:
            del new["optimizer_state_dict"]
        return {
            **self.saved.optimizer,
            "optimizer_state_dict": new,
            "ds_config": self.new_config(self.saved.optimizer.get("ds_config"), 3),
        }

    def _ds_id(self, sub_group: SubGroup) -> str:
        ends = (sub_group.parameters[0], sub_group.parameters[-1])
        return "_".join(str(self.position[name]) for name in ends)

    def _partition_groups(self, rank: int) -> list[dict[str, Any]]:
        result = []
        for index, group in enumerate(self.sub_groups):
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
                "params": [i for i, sub in enumerate(self.sub_groups) if sub.group == index],
            }
            for index, group in enumerate(self.groups)
        ]

    def _all_states(self, rank: int) -> dict[int, Any]:
        """Nothing where the source has no optimizer state: the engine then begins with a fresh one."""
        states = {i: self._state(i, rank) for i in range(len(self.sub_groups))}
        return states if any(states.values()) else {}

    def _state(self, index: int, rank: int) -> dict[str, Any]:
        sub_group = self.sub_groups[index]
        state: dict[str, Any] = {}
        for key, scalar in self.scalars_of(sub_group).items():
            state[key] = saved_scalar(scalar)
        for key in self.states[index]:
            dtype = self.tensors[sub_group.parameters[0], key].dtype
            state[key] = Flat(tuple(self._flat(sub_group, key, rank)), dtype)
        return state


def _cut(numel: int, count: int, own: int, base: int) -> _Share:
    size = partition_size(numel, count)
    real = max(0, min(size, numel - own * size))
    return _Share(base + min(numel, own * size), real, size - real)


def _slots(tensor: Tensor, share: _Share, dtype: DType) -> list[Slot | int]:
    parts: list[Slot | int] = []
    if share.numel or not tensor.numel:  # a tensor without elements has a place, too
        parts.append(Slot(tensor, (share.numel,), dtype, share.start))
    if share.padding:
        parts.append(share.padding)
    return parts
