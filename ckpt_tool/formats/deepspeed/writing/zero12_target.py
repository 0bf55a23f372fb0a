"""Writing ZeRO-1 and ZeRO-2 checkpoints for any world and EP size, AutoEP's per-expert files included.

Rank 0's file holds the model in the precision the engine computes in, derived from the masters as the
engine derives it; every rank's file holds its part of each group's flat masters and moments
(``flat_groups``). The engine compares neither with the other, so both come from the same masters here.

What a loader needs was measured with deepspeed 0.19.8 (runtime/zero/stage_1_and_2.py
``_load_legacy_checkpoint``; runtime/engine.py ``load_moe_state_dict``).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

from ckpt_tool.canonical import MASTER, Checkpoint, DType, ExpertName, Role, TensorName
from ckpt_tool.containers.pickle_records import opaque
from ckpt_tool.containers.torch_zip import Flat, torch_file
from ckpt_tool.errors import UsageError
from ckpt_tool.formats.base import Prepared, Request
from ckpt_tool.formats.deepspeed.facts.flat_groups import FlatGroup
from ckpt_tool.formats.deepspeed.facts.groups import SubGroup
from ckpt_tool.formats.deepspeed.facts.scalars import saved_scalar
from ckpt_tool.formats.deepspeed.facts.target_options import ZeroOptions
from ckpt_tool.formats.deepspeed.facts.topology import target_ranks
from ckpt_tool.formats.deepspeed.writing.engine_plan import EnginePlan, loading, notes, refuse_unsuitable
from ckpt_tool.formats.deepspeed.writing.preparing import prepare_zero
from ckpt_tool.formats.deepspeed.writing.saved_objects import (
    as_template_says,
    compute_dtype,
    saved_objects,
    shape_type,
)
from ckpt_tool.layout import Description, Layout, Slot, TargetFile, text_file, whole

_WEIGHTS = {"w1": "gate", "w2": "down", "w3": "up"}
# What these checkpoints hold twice: parameters beside their masters, frozen ones in two dicts.
_COMPUTED, _FRAGMENT = "as computed with", "frozen_param_fragments"


class Zero12Target:
    """The format as the registry knows it, for one of the two stages."""

    def __init__(self, stage: int) -> None:
        self._stage = stage
        self.name = f"deepspeed-zero{stage}"

    def prepare(self, request: Request) -> Prepared[ZeroOptions]:
        return prepare_zero(request)

    def layout(self, checkpoint: Checkpoint, options: ZeroOptions) -> Layout:
        """The model file, one file per expert, one optimizer file per rank, and ``latest``."""
        refuse_unsuitable(checkpoint, options)
        checkpoint = as_template_says(checkpoint, options)
        saved = saved_objects(checkpoint, options)
        plan = _Plan(checkpoint, saved, target_ranks(checkpoint, options), options)
        plan.check_supported()
        tag = f"global_step{checkpoint.training.step or 0}"
        return Layout(
            _Files(plan, self._stage, tag).descriptions(),
            plan.left_out(),
            notes(checkpoint, weights_only=options.weights_only),
            plan.ranks.topology(self._stage),
            loading(checkpoint, weights_only=options.weights_only),
        )


@dataclass(frozen=True)
class _Files:
    """What all files of a target are made of."""

    plan: _Plan
    stage: int
    tag: str

    def descriptions(self) -> list[Description]:
        """The model, the experts, the ranks, ``latest``."""
        experts = [
            _ExpertFile(self, number, index)
            for number, layer in enumerate(self.plan.checkpoint.moe_layers)
            for index in range(layer.num_experts)
        ]
        ranks = 0 if self.plan.options.weights_only else self.plan.ranks.world
        optimizers = [_OptimizerFile(self, rank) for rank in range(ranks)]
        return [_ModelFile(self), *experts, *optimizers, text_file("latest", self.tag)]


@dataclass(frozen=True)
class _ModelFile:
    files: _Files

    def layout(self) -> TargetFile:
        name = f"{self.files.tag}/mp_rank_00_model_states.pt"
        return torch_file(name, self.files.plan.model(self.files.stage))


@dataclass(frozen=True)
class _ExpertFile:
    """``layer`` counts MoE layers from 0."""

    files: _Files
    layer: int
    expert: int

    def layout(self) -> TargetFile:
        name = f"layer_{self.layer}_expert_{self.expert}_mp_rank_00_model_states.pt"
        return torch_file(f"{self.files.tag}/{name}", self.files.plan.expert(self.layer, self.expert))


@dataclass(frozen=True)
class _OptimizerFile:
    files: _Files
    rank: int

    def layout(self) -> TargetFile:
        plan = self.files.plan
        prefix = "bf16_" if plan.saved.bf16 else ""
        name = f"{prefix}zero_pp_rank_{self.rank}_mp_rank_00_optim_states.pt"
        return torch_file(f"{self.files.tag}/{name}", plan.optimizer(self.rank, self.files.stage))


class _Part(NamedTuple):
    """A rank's part of a group: number ``own`` of those ``flat`` is cut into, of EP rank ``ep_rank``."""

    group: SubGroup
    flat: FlatGroup
    own: int
    ep_rank: int

    @property
    def padding(self) -> int:
        return self.flat.part - self.flat.held(self.own)


class _Plan(EnginePlan):
    """What the files hold."""

    def _sub_group_size(self) -> int:
        return 1 << 62  # groups are not cut further

    def check_supported(self) -> None:
        """Refuse what would be laid out in an order that is not computed here."""
        if self.zero_config().get("round_robin_gradients"):
            raise UsageError(
                "The run's config has round_robin_gradients, which deals parameters out to ranks in "
                "another order; writing that is not supported. Pass --ds-config with it off."
            )
        if len(self.sub_groups) != sum(1 for group in self.groups if group.parameters):
            raise UsageError(
                "A parameter group of the source holds dense parameters and experts alike (a client's own "
                "optimizer); ZeRO-1 and 2 do not take that. Convert to zero3 or universal."
            )

    # ---- the model

    def _weight(self, name: TensorName, shape: tuple[int, ...], start: int = 0, copy: str = "") -> Slot:
        """A parameter as the engine computes with it: its master, rounded to the compute dtype. Beside the
        masters in the optimizer's files it is a copy."""
        tensor = self.value_of(name)
        dtype = (
            compute_dtype(self.saved.model.get("ds_config") or {})
            if tensor.state == MASTER
            else tensor.dtype
        )
        trained = tensor.role is Role.PARAMETER and not self.options.weights_only
        return Slot(tensor, shape, dtype, start, copy or (_COMPUTED if trained else ""))

    def model(self, stage: int) -> dict[str, Any]:
        """The object in rank 0's model file."""
        entries = [
            {**entry, "checkpoint_format": "per_expert_files", "checkpoint_format_version": None}
            for entry in self.layer_entries.of(0)
        ]
        frozen = [t for t in self.values.values() if t.role is Role.FROZEN and isinstance(t.name, str)]
        kind = shape_type(self.saved)
        changed: dict[str, Any] = {
            "module": self._module(),
            "param_shapes": [self._param_shapes(group) for group in self.sub_groups],
            "frozen_param_shapes": OrderedDict((t.name, kind(t.shape)) for t in frozen),
            "frozen_param_fragments": OrderedDict((t.name, whole(t, copy=_FRAGMENT)) for t in frozen),
            "dp_world_size": self.ranks.world,
            "ds_config": self.new_config(self.saved.model.get("ds_config"), stage),
        }
        if stage == 1:
            changed |= {"frozen_param_shapes": None, "frozen_param_fragments": None}
        return self.model_entries(changed, entries)

    def _module(self) -> OrderedDict[str, Any]:
        """Every tensor but the experts, in full, under each of its names."""
        module: OrderedDict[str, Any] = OrderedDict()
        for name in self.saved.model["module"]:
            own = self.checkpoint.aliases.get(name, name)
            module[name] = self._weight(own, self.value_of(own).shape, copy="" if name == own else name)
        return module

    def _param_shapes(self, group: SubGroup) -> OrderedDict[str, Any]:
        kind = shape_type(self.saved)
        found: OrderedDict[str, Any] = OrderedDict()
        for name in group.parameters:
            shape = self.value_of(name).shape
            if isinstance(name, ExpertName):
                shape = (shape[0] // self.ranks.ep, *shape[1:])
            found[self.parameter(name)] = kind(shape)
        return found

    def expert(self, layer: int, expert: int) -> dict[str, Any]:
        """The object in one expert's file; ``layer`` counts MoE layers from 0."""
        found = self.checkpoint.moe_layers[layer]
        entry: dict[str, Any] = {}
        for weight, projection in _WEIGHTS.items():
            name = ExpertName(found.layer_path, projection)
            tensor = self.value_of(name)
            matrix = tensor.shape[1:]
            start = expert * (tensor.numel // tensor.shape[0])
            entry[f"{found.module}.experts.{weight}.{expert}"] = self._weight(name, matrix, start)
        return entry

    # ---- the optimizer

    def _parts(self, rank: int) -> list[_Part]:
        """What a rank holds of each group."""
        parts = []
        for group in self.sub_groups:
            sizes = [
                (self.parameter(name), self.local_numel(name, self.ranks.ep)) for name in group.parameters
            ]
            if group.is_expert:
                flat, own = FlatGroup(sizes, self.ranks.edp), self.ranks.edp_rank(rank)
            else:
                flat, own = FlatGroup(sizes, self.ranks.world), rank
            parts.append(_Part(group, flat, own, self.ranks.ep_rank(rank)))
        return parts

    def optimizer(self, rank: int, stage: int) -> dict[str, Any]:
        """The object in a rank's optim_states file."""
        source = self.saved.optimizer["optimizer_state_dict"]
        parts = self._parts(rank)
        zero: dict[str, Any] = {
            "loss_scaler": source["loss_scaler"],
            "dynamic_loss_scale": source["dynamic_loss_scale"],
            "overflow": source["overflow"],
            "base_optimizer_state": {
                "state": self._all_states(parts),
                "param_groups": self._param_groups(),
            },
            "single_partition_of_fp32_groups": [self._masters(part) for part in parts],
            "zero_stage": opaque("deepspeed.runtime.zero.config", "ZeroStageEnum", stage),
            "group_paddings": [part.padding for part in parts],
            "partition_count": [part.flat.count for part in parts],
            "ds_version": self.saved.optimizer.get("ds_version"),
            "param_slice_mappings": [_slice_mappings(part) for part in parts],
        }
        return {
            **self.saved.optimizer,
            "optimizer_state_dict": zero,
            "ds_config": self.new_config(self.saved.optimizer.get("ds_config"), stage),
        }

    def _param_groups(self) -> list[dict[str, Any]]:
        return [
            {
                **group.options,
                "params": [i for i, sub in enumerate(self.sub_groups) if sub.group == index],
            }
            for index, group in enumerate(self.groups)
        ]

    def _masters(self, part: _Part) -> Flat:
        return Flat(tuple(self._pieces(part, MASTER)), DType.float32, requires_grad=True)

    def _all_states(self, parts: list[_Part]) -> dict[int, Any]:
        """Nothing where the source has no optimizer state: the engine then begins with a fresh one."""
        states = {index: self._state(index, part) for index, part in enumerate(parts)}
        return states if any(states.values()) else {}

    def _state(self, index: int, part: _Part) -> dict[str, Any]:
        state: dict[str, Any] = {
            key: saved_scalar(scalar) for key, scalar in self.scalars_of(part.group).items()
        }
        padding = [part.padding] if part.padding else []
        for key in self.states[index]:
            dtype = self.tensors[part.group.parameters[0], key].dtype
            state[key] = Flat((*self._pieces(part, key), *padding), dtype)
        return state

    def _pieces(self, part: _Part, state: str) -> list[Slot]:
        """What a rank holds of a group, in order, without the padding at the group's end."""
        low = part.own * part.flat.part
        high = low + part.flat.held(part.own)
        pieces: list[Slot] = []
        for name in part.group.parameters:
            start = part.flat.starts[self.parameter(name)]
            local = self.local_numel(name, self.ranks.ep)
            first, last = max(start, low), min(start + local, high)
            if first < last or not local:
                tensor = self.value_of(name) if state == MASTER else self.tensors[name, state]
                dtype = DType.float32 if state == MASTER else tensor.dtype
                base = part.ep_rank * local if isinstance(name, ExpertName) else 0
                pieces.append(Slot(tensor, (max(0, last - first),), dtype, base + first - start))
        return pieces


def _slice_mappings(part: _Part) -> OrderedDict[str, Any]:
    """Where each parameter lies in a rank's part; ds_to_universal reads it."""
    return OrderedDict(
        (
            name,
            opaque(
                "deepspeed.utils.tensor_fragment",
                "fragment_address",
                state={"numel": numel, "start": start},
            ),
        )
        for name, (numel, start) in part.flat.fragments(part.own).items()
    )
