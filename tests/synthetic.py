"""Builds small ZeRO-3 checkpoints of any topology and placement from given full tensors, in the real form.

The engine only ever writes uniform contiguous placements, and its padding is whatever memory held. This
writes what the format allows (deepspeed 0.19.8, checkpoint/autoep_zero3_metadata.py): experts in any order,
unevenly, on several EP ranks, or none on some; padding is NaN, so that one element of it shows.
The pickles name the real DeepSpeed classes, by ``torch.save``.

``reference`` reads such a directory back in the simplest way there is, and shares no code with ckpt_tool.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

STATES = ("fp32", "exp_avg", "exp_avg_sq")
Placement = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Layer:
    """The MoE layer ``model.layers.<number>.mlp``. ``placement[e]``: the experts on EP rank e, in order."""

    number: int
    placement: Placement
    hidden: int = 3
    inner: int = 2

    @property
    def module(self) -> str:
        return f"model.layers.{self.number}.mlp"

    @property
    def experts(self) -> int:
        return 1 + max(expert for ids in self.placement for expert in ids)

    def shape(self, weight: str) -> tuple[int, ...]:
        return (self.hidden, self.inner) if weight == "w2" else (self.inner, self.hidden)


@dataclass
class Model:
    """Full tensors by the engine's names: parameters by state, frozen parameters and buffers as such."""

    parameters: dict[str, dict[str, torch.Tensor]]
    layers: tuple[Layer, ...] = ()
    frozen: dict[str, torch.Tensor] = field(default_factory=dict)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)  # further name -> name


@dataclass(frozen=True)
class Save:
    """How a model is saved. ``groups`` are parameter groups of sub-groups of names; None: the engine's
    default, one group of all dense parameters and one of all experts."""

    world: int = 2
    groups: Sequence[Sequence[Sequence[str]]] | None = None
    data_before_expert: bool = False
    legacy_key: bool = False  # "autoep_layers", as the first releases wrote it
    with_placement: bool = True  # releases before 0.19.8 wrote none
    empty_listed: bool = True  # a rank without experts of a layer lists [0, I, H]; else it lists nothing
    bf16: bool = False
    int_step: bool = False  # DeepSpeed's own Adams
    step: int = 2
    client: Callable[[int], Mapping[str, Any]] = lambda rank: {}
    padding: float = math.nan


def uniform(experts: int, ep: int) -> Placement:
    """The placement the engine writes: expert e on EP rank e // (E / ep)."""
    local = experts // ep
    return tuple(tuple(range(rank * local, (rank + 1) * local)) for rank in range(ep))


def model(
    dense: Mapping[str, tuple[int, ...]],
    layers: Sequence[Layer] = (),
    *,
    seed: int = 0,
    frozen: Mapping[str, tuple[int, ...]] | None = None,
    buffers: Mapping[str, tuple[int, ...]] | None = None,
    tied: Mapping[str, str] | None = None,
) -> Model:
    """A model of random bits: any float32 but NaN, so that padding is told from values."""
    generator = torch.Generator().manual_seed(seed)

    def made(shape: Sequence[int]) -> torch.Tensor:
        bits = torch.randint(-(2**31), 2**31, tuple(shape), generator=generator).to(torch.int32)
        values = bits.view(torch.float32) if bits.numel() else torch.zeros(tuple(shape))
        return torch.where(values.isnan(), torch.full_like(values, -0.0), values)

    shapes = dict(dense)
    for layer in layers:
        shapes[f"{layer.module}.router.gate.weight"] = (layer.experts, layer.hidden)
        for weight in ("w1", "w2", "w3"):
            shapes[f"{layer.module}.experts.{weight}"] = (layer.experts, *layer.shape(weight))
    return Model(
        {name: {state: made(shape) for state in STATES} for name, shape in shapes.items()},
        tuple(layers),
        {name: made(shape) for name, shape in (frozen or {}).items()},
        {name: made(shape) for name, shape in (buffers or {}).items()},
        dict(tied or {}),
    )


def write(directory: Path, full: Model, save: Save) -> Path:
    """Write ``directory/latest`` and ``directory/global_step<n>`` with the files of every rank."""
    tag = directory / f"global_step{save.step}"
    tag.mkdir(parents=True)
    (directory / "latest").write_text(tag.name)
    prefix = "bf16_" if save.bf16 else ""
    for rank in range(save.world):
        share = _Rank(full, save, rank)
        torch.save(share.model_states(), tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        torch.save(share.optim_states(), tag / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return tag


class _Rank:
    """What one rank saves."""

    def __init__(self, full: Model, save: Save, rank: int) -> None:
        self._full, self._save, self.rank = full, save, rank
        self.ep = len(full.layers[0].placement) if full.layers else 1
        self.edp = save.world // self.ep
        by_data = save.data_before_expert
        self.ep_rank, self.edp_rank = (
            (rank // self.edp, rank % self.edp) if by_data else (rank % self.ep, rank // self.ep)
        )
        self.peers = [
            self.ep_rank * self.edp + k if by_data else self.ep_rank + k * self.ep for k in range(self.edp)
        ]
        self._layer_of = {f"{x.module}.experts.{w}": x for x in full.layers for w in ("w1", "w2", "w3")}
        dense = [name for name in full.parameters if name not in self._layer_of]
        groups = save.groups or [[dense]] + ([[list(self._layer_of)]] if full.layers else [])
        # (is expert, names, parameter group) of every sub-group this rank has
        self.sub_groups = [
            (kept[0] in self._layer_of, kept, number)
            for number, group in enumerate(groups)
            for names in group
            if (kept := [name for name in names if not self._left_out(name)])
        ]
        self._group_count = len(groups)

    def _ids(self, name: str) -> tuple[int, ...]:
        return self._layer_of[name].placement[self.ep_rank]

    def _left_out(self, name: str) -> bool:
        return name in self._layer_of and not self._ids(name) and not self._save.empty_listed

    def _local(self, name: str, state: str) -> torch.Tensor:
        """What is cut over this rank's partition group: the tensor, or its EP rank's experts."""
        tensor = self._full.parameters[name][state]
        return tensor[list(self._ids(name))] if name in self._layer_of else tensor

    def _flat(self, names: Sequence[str], state: str, count: int, own: int) -> torch.Tensor:
        parts = []
        for name in names:
            values = self._local(name, state).reshape(-1)
            size = -(-values.numel() // count)
            padded = torch.full((size * count,), self._save.padding)
            padded[: values.numel()] = values
            parts.append(padded[own * size : (own + 1) * size])
        return torch.cat(parts).clone()

    def _cut_over(self, expert: bool) -> tuple[int, int, list[int]]:
        if expert:
            return self.edp, self.edp_rank, self.peers
        return self._save.world, self.rank, list(range(self._save.world))

    def model_states(self) -> dict[str, Any]:
        full, save = self._full, self._save
        module: OrderedDict[str, torch.Tensor] = OrderedDict()
        for name in [*full.frozen, *full.parameters]:
            if name in self._layer_of:
                continue
            module[name] = torch.empty(0)
            if name.endswith(".router.gate.weight"):
                module[name.replace(".router.gate.", ".gate.gate.")] = torch.empty(0)
        for name in full.tied:
            module[name] = torch.empty(0)
        module.update(full.buffers)
        shapes = [
            OrderedDict((name, tuple(self._local(name, "fp32").shape)) for name in names)
            for _, names, _ in self.sub_groups
        ]
        frozen_shapes = OrderedDict((name, tuple(t.shape)) for name, t in full.frozen.items())
        fragments = OrderedDict(
            (name, self._fragment(tensor.reshape(-1))) for name, tensor in full.frozen.items()
        )
        for name in self._layer_of:
            if self._left_out(name):  # no elements: the engine counts it as frozen
                frozen_shapes[name] = (0, *full.parameters[name]["fp32"].shape[1:])
                fragments[name] = torch.empty(0)
        states: dict[str, Any] = {
            "module": module,
            "buffer_names": list(full.buffers),
            "optimizer": None,
            "param_shapes": shapes if full.layers else [_sizes(group) for group in shapes],
            "frozen_param_shapes": frozen_shapes,
            "frozen_param_fragments": fragments,
            "shared_params": dict(full.tied) if self.rank == 0 else {},
            "lr_scheduler": {"last_batch_iteration": save.step - 1},
            "data_sampler": None,
            "random_ltd": None,
            "skipped_steps": 0,
            "global_steps": save.step,
            "global_samples": 8 * save.step,
            "dp_world_size": save.world,
            "mp_world_size": 1,
            "ds_config": {
                "zero_optimization": {"stage": 3},
                "use_data_before_expert_parallelism": self._save.data_before_expert,
            },
            "ds_version": "0.19.8",
        }
        if full.layers:
            key = "autoep_layers" if save.legacy_key else "ds_autoep_layers"
            states["num_experts"] = [layer.experts for layer in full.layers]
            states[key] = [self._entry(number, layer) for number, layer in enumerate(full.layers)]
        return {**states, **save.client(self.rank)}

    def _fragment(self, values: torch.Tensor) -> torch.Tensor:
        size = -(-values.numel() // self._save.world)
        padded = torch.full((size * self._save.world,), self._save.padding, dtype=values.dtype)
        padded[: values.numel()] = values
        return padded[self.rank * size : (self.rank + 1) * size].clone()

    def _entry(self, number: int, layer: Layer) -> dict[str, Any]:
        own = layer.placement[self.ep_rank]
        entry = {
            "moe_layer_id": number,
            "module_path": layer.module,
            "num_experts": layer.experts,
            "num_local_experts": len(own),
            "ep_size": self.ep,
            "expert_key_prefix": f"{layer.module}.experts",
            "checkpoint_format": "zero3_partitioned",
            "checkpoint_format_version": 1,
            "ep_group_name": f"ep_size_{self.ep}",
            "ep_rank": self.ep_rank,
            "expert_data_parallel_rank": self.edp_rank,
            "expert_data_parallel_world_size": self.edp,
            "global_expert_start": self.ep_rank * len(own),  # as the engine states it, of any placement
            "global_expert_end": self.ep_rank * len(own) + len(own),
        }
        if self._save.with_placement:
            entry["expert_placement"] = {
                "version": 1,
                "num_experts": layer.experts,
                "ep_size": self.ep,
                "ranks": [{"rank": rank, "experts": list(ids)} for rank, ids in enumerate(layer.placement)],
            }
        return entry

    def optim_states(self) -> dict[str, Any]:
        save = self._save
        flats, state, cuts = [], {}, []
        for index, (expert, names, _) in enumerate(self.sub_groups):
            count, own, ranks = self._cut_over(expert)
            flat = self._flat(names, "fp32", count, own).requires_grad_(True)
            flat.ds_id = f"{index}_{len(names)}"  # type: ignore[attr-defined]
            flats.append(flat)
            state[index] = {
                "step": save.step if save.int_step else torch.tensor(float(save.step)),
                "exp_avg": self._flat(names, "exp_avg", count, own),
                "exp_avg_sq": self._flat(names, "exp_avg_sq", count, own),
            }
            cuts.append(
                {
                    "sub_group": index,
                    "partition_count": count,
                    "partition_rank": own,
                    "partition_ranks": ranks,
                    "families": ["autoep_expert" if expert else "replicated"],
                    "group_names": [f"ep_size_{self.ep}" if expert else "replicated"],
                }
            )
        groups = [
            {
                "name": f"group{number}",
                "lr": 0.1 * (number + 1),
                "betas": (0.9, 0.999),
                "weight_decay": 0.01 * number,
                "params": [i for i, (_, _, owner) in enumerate(self.sub_groups) if owner == number],
            }
            for number in range(self._group_count)
        ]
        zero: dict[str, Any] = {
            "zero_stage": ZeroStageEnum(3),
            "loss_scaler": LossScaler(1.0),
            "dynamic_loss_scale": False,
            "overflow": False,
            "partition_count": save.world,
            "optimizer_state_dict": {"state": state, "param_groups": groups},
            "fp32_flat_groups": flats,
        }
        if self._full.layers:
            zero["ds_zero_partition_groups"] = cuts
        flag = {"use_data_before_expert_parallelism": save.data_before_expert}
        return {"optimizer_state_dict": zero, "ds_config": flag, "ds_version": "0.19.8"}


def _sizes(group: Mapping[str, tuple[int, ...]]) -> OrderedDict[str, torch.Size]:
    """Without MoE layers the engine writes torch.Size."""
    return OrderedDict((name, torch.Size(shape)) for name, shape in group.items())


# ---- the reference: everything in memory, a few lines


def reference(tag: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Every parameter of a ZeRO-3 directory, whole, by (engine's name, state); experts by global id."""
    parts: dict[tuple[str, str, tuple[int, ...], int, Any], dict[int, torch.Tensor]] = {}
    world = len(list(tag.glob("zero_pp_rank_*_model_states.pt")))
    for rank in range(world):
        states = _load(tag, f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        zero = _load(tag, f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")["optimizer_state_dict"]
        cuts = zero.get("ds_zero_partition_groups")
        for i, shapes in enumerate(states["param_shapes"]):
            cut = cuts[i] if cuts else {"partition_count": world, "partition_rank": rank}
            flats = {
                "fp32": zero["fp32_flat_groups"][i].detach(),
                **zero["optimizer_state_dict"]["state"][i],
            }
            offset = 0
            for name, shape in shapes.items():
                size = math.ceil(math.prod(shape) / cut["partition_count"])
                for state in STATES:
                    key = (name, state, *_experts(states, name), tuple(shape))
                    part = flats[state][offset : offset + size]
                    parts.setdefault(key, {})[cut["partition_rank"]] = part
                offset += size
    whole: dict[tuple[str, str], torch.Tensor] = {}
    for (name, state, ids, experts, shape), held in parts.items():
        tensor = torch.cat([held[k] for k in sorted(held)])[: math.prod(shape)].reshape(shape)
        if not experts:
            whole[name, state] = tensor
        else:
            whole.setdefault((name, state), torch.empty(experts, *shape[1:]))[list(ids)] = tensor
    return whole


def _experts(states: Mapping[str, Any], name: str) -> tuple[tuple[int, ...], int]:
    """(global ids of the experts this rank holds of a parameter, experts of the layer)."""
    for entry in states.get("ds_autoep_layers") or states.get("autoep_layers") or ():
        if name.startswith(entry["expert_key_prefix"] + "."):
            first = entry["ep_rank"] * entry["num_local_experts"]
            ids = range(first, first + entry["num_local_experts"])
            if "expert_placement" in entry:
                ids = entry["expert_placement"]["ranks"][entry["ep_rank"]]["experts"]
            return tuple(ids), entry["num_experts"]
    return (), 0


def _load(tag: Path, pattern: str) -> Any:
    return torch.load(next(iter(tag.glob(pattern))), weights_only=False)


def random_placement(experts: int, ep: int, random_: random.Random, *, replicas: bool) -> Placement:
    """Experts dealt to EP ranks in any order and number, some ranks perhaps empty, some experts twice."""
    ranks: list[list[int]] = [[] for _ in range(ep)]
    for expert in random_.sample(range(experts), experts):
        ranks[random_.randrange(ep)].append(expert)
    if replicas:
        for ids in ranks:
            for expert in range(experts):
                if expert not in ids and random_.random() < 0.3:
                    ids.insert(random_.randint(0, len(ids)), expert)
    return tuple(map(tuple, ranks))
