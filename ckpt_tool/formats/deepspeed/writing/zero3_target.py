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
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePath
from typing import Any, NamedTuple

from ckpt_tool.canonical import MASTER, Checkpoint, DType, ExpertName, Scalar, Tensor
from ckpt_tool.containers.torch_zip import Constant, Flat, TorchFiles
from ckpt_tool.formats.base import Prepared, Request
from ckpt_tool.formats.deepspeed.facts.groups import SubGroup
from ckpt_tool.formats.deepspeed.facts.partition import partition_size
from ckpt_tool.formats.deepspeed.facts.scalars import saved_scalar
from ckpt_tool.formats.deepspeed.facts.target_options import ZeroOptions
from ckpt_tool.formats.deepspeed.facts.topology import target_ranks
from ckpt_tool.formats.deepspeed.writing.engine_plan import EnginePlan, loading, notes, refuse_unsuitable
from ckpt_tool.formats.deepspeed.writing.preparing import prepare_zero
from ckpt_tool.formats.deepspeed.writing.saved_objects import as_template_says, saved_objects, shape_type
from ckpt_tool.layout import Description, Layout, Slot, TargetFile, text_file


class Zero3Target:
    """The format as the registry knows it."""

    name = "deepspeed-zero3"

    def prepare(self, request: Request) -> Prepared[ZeroOptions]:
        return prepare_zero(request)

    def layout(self, checkpoint: Checkpoint, options: ZeroOptions) -> Layout:
        """All ranks' files below the source's tag, and ``latest``."""
        refuse_unsuitable(checkpoint, options)
        checkpoint = as_template_says(checkpoint, options)
        saved = saved_objects(checkpoint, options)
        plan = _Plan(checkpoint, saved, target_ranks(checkpoint, options), options)
        tag = PurePath(checkpoint.root).name
        if checkpoint.format != self.name:
            tag = f"global_step{checkpoint.training.step or 0}"
        return Layout(
            _Files(plan, tag).descriptions(),
            plan.left_out(),
            notes(checkpoint, weights_only=options.weights_only),
            plan.ranks.topology(3),
            loading(checkpoint, weights_only=options.weights_only),
        )


@dataclass(frozen=True)
class _Files:
    """What all files of a target are made of."""

    plan: _Plan
    tag: str
    models: TorchFiles = field(default_factory=TorchFiles)
    optimizers: TorchFiles = field(default_factory=TorchFiles)

    def descriptions(self) -> list[Description]:
        """Two files per rank and ``latest``."""
        ranks = range(self.plan.ranks.world)
        files = [file for rank in ranks for file in (_ModelFile(self, rank), _OptimizerFile(self, rank))]
        return [*files, text_file("latest", self.tag)]


@dataclass(frozen=True)
class _ModelFile:
    files: _Files
    rank: int

    def layout(self) -> TargetFile:
        name = f"{self.files.tag}/zero_pp_rank_{self.rank}_mp_rank_00_model_states.pt"
        return self.files.models.file(name, self.files.plan.model(self.rank))


@dataclass(frozen=True)
class _OptimizerFile:
    files: _Files
    rank: int

    def layout(self) -> TargetFile:
        plan = self.files.plan
        prefix = "bf16_" if plan.saved.bf16 else ""
        name = f"{prefix}zero_pp_rank_{self.rank}_mp_rank_00_optim_states.pt"
        return self.files.optimizers.file(f"{self.files.tag}/{name}", plan.optimizer(self.rank))


class _Share(NamedTuple):
    """A rank's part of a parameter: elements ``start .. start + numel`` of its canonical tensor, then
    ``padding`` elements."""

    start: int
    numel: int
    padding: int


class _Plan(EnginePlan):
    """What every rank's files hold."""

    # ---- one rank's share

    def _shares(self, rank: int) -> list[list[_Share]]:
        """The rank's part of every parameter, sub-group by sub-group."""
        own, ep_rank = self.ranks.edp_rank(rank), self.ranks.ep_rank(rank)
        shares = []
        for sub_group, sizes in zip(self.sub_groups, self._local_sizes, strict=True):
            if sub_group.is_expert:
                shares.append([_cut(local, self.ranks.edp, own, ep_rank * local) for local in sizes])
            else:
                shares.append([_cut(local, self.ranks.world, rank, 0) for local in sizes])
        return shares

    @cached_property
    def _local_sizes(self) -> list[list[int]]:
        """By sub-group, the elements of each parameter that are cut over its ranks."""
        return [
            [self.local_numel(name, self.ranks.ep) for name in sub_group.parameters]
            for sub_group in self.sub_groups
        ]

    def _flat(self, index: int, state: str, shares: list[_Share]) -> tuple[Slot | int, ...]:
        parts: list[Slot | int] = []
        for (tensor, dtype), share in zip(self._sources(index, state), shares, strict=True):
            parts += _slots(tensor, share, dtype)
        return tuple(parts)

    def _sources(self, index: int, state: str) -> list[tuple[Tensor, DType]]:
        """The tensors that a flat buffer is cut from, and the dtypes they get there."""
        if (index, state) not in self._known_sources:
            names = self.sub_groups[index].parameters
            if state == MASTER:  # a weight where the source holds no master, widened exactly
                found = [(self.value_of(name), DType.float32) for name in names]
            else:
                found = [(tensor := self.tensors[name, state], tensor.dtype) for name in names]
            self._known_sources[index, state] = found
        return self._known_sources[index, state]

    @cached_property
    def _known_sources(self) -> dict[tuple[int, str], list[tuple[Tensor, DType]]]:
        return {}

    # ---- the model file

    def model(self, rank: int) -> dict[str, Any]:
        """The object in a rank's model_states file."""
        changed: dict[str, Any] = {
            **self._of_all_models,
            "frozen_param_fragments": self._frozen(rank),
            "shared_params": self.saved.model.get("shared_params") if rank == 0 else {},
        }
        return self.model_entries(changed, Constant(self.layer_entries.of(rank)))

    @cached_property
    def _of_all_models(self) -> Mapping[str, Constant]:
        """What the topology changes alike in every rank's file."""
        return {
            "param_shapes": Constant([self._param_shapes(group) for group in self.sub_groups]),
            "dp_world_size": Constant(self.ranks.world),
            "ds_config": Constant(self.new_config(self.saved.model.get("ds_config"), 3)),
        }

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
        shares = self._shares(rank)
        flats = [
            Flat(
                self._flat(index, MASTER, shares[index]),
                DType.float32,
                requires_grad=True,
                attributes={"ds_id": self._ds_id(group)},
            )
            for index, group in enumerate(self.sub_groups)
        ]
        changed: dict[str, Any] = {
            "partition_count": self.ranks.world,
            "ds_zero_partition_groups": self._partition_groups(rank),
            "optimizer_state_dict": {
                **zero["optimizer_state_dict"],
                "state": self._all_states(shares),
                "param_groups": self._param_groups,
            },
            "fp32_flat_groups": flats,
        }
        new = {key: changed.get(key, value) for key, value in zero.items()}
        if self.options.weights_only:
            del new["optimizer_state_dict"]
        return {
            **self.saved.optimizer,
            "optimizer_state_dict": new,
            "ds_config": self._optimizer_config,
        }

    @cached_property
    def _optimizer_config(self) -> Constant:
        return Constant(self.new_config(self.saved.optimizer.get("ds_config"), 3))

    def _ds_id(self, sub_group: SubGroup) -> str:
        ends = (sub_group.parameters[0], sub_group.parameters[-1])
        return "_".join(str(self.position[name]) for name in ends)

    def _partition_groups(self, rank: int) -> list[dict[str, Any]]:
        result = []
        for index, group in enumerate(self.sub_groups):
            members = self.ranks.edp_group(rank) if group.is_expert else range(self.ranks.world)
            if members not in self._members:
                self._members[members] = Constant(list(members))
            name = f"ep_size_{self.ranks.ep}" if group.is_expert else "replicated"
            result.append(
                {
                    "sub_group": index,
                    "partition_count": len(members),
                    "partition_rank": members.index(rank),
                    "partition_ranks": self._members[members],
                    "families": ["autoep_expert" if group.is_expert else "replicated"],
                    "group_names": [name],
                }
            )
        return result

    @cached_property
    def _members(self) -> dict[range, Constant]:
        """Lists of ranks that share sub-groups."""
        return {}

    @cached_property
    def _param_groups(self) -> Constant:
        return Constant(
            [
                {
                    **group.options,
                    "params": [i for i, sub in enumerate(self.sub_groups) if sub.group == index],
                }
                for index, group in enumerate(self.groups)
            ]
        )

    def _all_states(self, shares: list[list[_Share]]) -> dict[int, Any]:
        """Nothing where the source has no optimizer state: the engine then begins with a fresh one."""
        states = {i: self._state(i, shares[i]) for i in range(len(self.sub_groups))}
        return states if any(states.values()) else {}

    def _state(self, index: int, shares: list[_Share]) -> dict[str, Any]:
        sub_group = self.sub_groups[index]
        state: dict[str, Any] = {}
        for key, scalar in self._scalars_by_group[index].items():
            state[key] = saved_scalar(scalar)
        for key in self.states[index]:
            dtype = self.tensors[sub_group.parameters[0], key].dtype
            state[key] = Flat(self._flat(index, key, shares), dtype)
        return state

    @cached_property
    def _scalars_by_group(self) -> list[dict[str, Scalar]]:
        return [self.scalars_of(sub_group) for sub_group in self.sub_groups]


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
