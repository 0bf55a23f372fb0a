"""Make a large ZeRO-3 AutoEP checkpoint without training: files as the engine writes them, random values.

    python benchmarks/make_checkpoint.py DIR --gb 1 --world 4 --ep 2

The model is a Mixtral with 8 experts; ``DIR/config.json`` describes it. Names, keys, key order, classes,
groups and partitions follow deepspeed 0.19.8. DeepSpeed's own ``ds_to_universal`` accepts the result.
Memory is about one rank's share of the size.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DS_LOG_LEVEL", "error")

import torch
from deepspeed.checkpoint.autoep_affine import (
    autoep_placement_to_affine_map,
    make_autoep_placement_descriptor,
)
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

EXPERTS, STEP, VERSION = 8, 100, "0.19.8"
# Constants of deepspeed: elements in an expert group, elements of one rank in a sub-group.
GROUP_LIMIT, SUB_GROUP_SIZE = 178_956_971, 1_000_000_000
# Three fp32 states: master, exp_avg, exp_avg_sq.
BYTES_PER_PARAMETER = 12
# Padding of the masters is uninitialised memory in real files. This stands out wherever it leaks.
GARBAGE = 4.7e30

Shapes = OrderedDict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Model:
    """A Mixtral's sizes."""

    hidden: int
    inner: int
    layers: int
    vocab: int

    @property
    def heads(self) -> int:
        return self.hidden // 64

    @property
    def kv_heads(self) -> int:
        return max(1, self.heads // 4)

    def names(self) -> Shapes:
        """All parameters in the order of ``module.parameters()``, whole, by AutoEP's names."""
        hidden, kv = self.hidden, 64 * self.kv_heads
        shapes: Shapes = OrderedDict({"model.embed_tokens.weight": (self.vocab, hidden)})
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            shapes |= {
                f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
                f"{prefix}.self_attn.k_proj.weight": (kv, hidden),
                f"{prefix}.self_attn.v_proj.weight": (kv, hidden),
                f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
                f"{prefix}.mlp.router.gate.weight": (EXPERTS, hidden),
                f"{prefix}.mlp.experts.w1": (EXPERTS, self.inner, hidden),
                f"{prefix}.mlp.experts.w2": (EXPERTS, hidden, self.inner),
                f"{prefix}.mlp.experts.w3": (EXPERTS, self.inner, hidden),
                f"{prefix}.input_layernorm.weight": (hidden,),
                f"{prefix}.post_attention_layernorm.weight": (hidden,),
            }
        shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (self.vocab, hidden)}
        return shapes

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.names().values())

    def config(self, dtype: str) -> dict[str, Any]:
        """The Hugging Face config."""
        return {
            "architectures": ["MixtralForCausalLM"],
            "dtype": dtype,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "max_position_embeddings": 4096,
            "model_type": "mixtral",
            "num_attention_heads": self.heads,
            "num_experts_per_tok": 2,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "num_local_experts": EXPERTS,
            "rms_norm_eps": 1e-05,
            "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
            "sliding_window": None,
            "tie_word_embeddings": False,
            "vocab_size": self.vocab,
        }


def model_of(nbytes: float) -> Model:
    """A model of about that many bytes: a width for the size, then layers, then the experts' width."""
    hidden = 512 if nbytes < 0.9e9 else 1024 if nbytes < 6e9 else 2048
    target = int(nbytes / BYTES_PER_PARAMETER)
    wide = Model(hidden, hidden, 1, 8 * hidden)
    fixed = 2 * wide.vocab * hidden
    layers = max(2, round((target - fixed) / (wide.parameters - fixed)))
    rest = Model(hidden, 0, layers, wide.vocab).parameters
    inner = max(32, round((target - rest) / (3 * EXPERTS * hidden * layers * 32)) * 32)
    return Model(hidden, inner, layers, wide.vocab)


@dataclass(frozen=True)
class SubGroup:
    """Parameters that share one flat buffer, with their full (for experts: EP-local) shapes."""

    shapes: Shapes
    expert: bool


@dataclass(frozen=True)
class Run:
    """A model and the topology it was trained with."""

    model: Model
    world: int
    ep: int
    bf16: bool

    def __post_init__(self) -> None:
        if EXPERTS % self.ep or self.world % self.ep:
            raise SystemExit(f"--ep {self.ep} must divide the {EXPERTS} experts and --world {self.world}")

    @property
    def edp(self) -> int:
        return self.world // self.ep

    def param_groups(self) -> list[list[SubGroup]]:
        """The optimizer's groups as sub-groups: dense ones first, routers last in them; then experts."""
        dense: Shapes = OrderedDict()
        routers: Shapes = OrderedDict()
        experts: list[Shapes] = []
        held = 0
        for name, shape in self.model.names().items():
            if ".mlp.experts." in name:
                local = (shape[0] // self.ep, *shape[1:])
                if not experts or held + math.prod(local) > GROUP_LIMIT:
                    experts.append(OrderedDict())
                    held = 0
                experts[-1][name] = local
                held += math.prod(local)
            else:
                (routers if ".mlp.router." in name else dense)[name] = shape
        groups = [self._split(dense | routers, False)]
        return groups + [self._split(group, True) for group in experts]

    def _split(self, shapes: Shapes, expert: bool) -> list[SubGroup]:
        over = self.edp if expert else self.world
        sizes = {name: -(-math.prod(shape) // over) for name, shape in shapes.items()}
        if sum(sizes.values()) <= SUB_GROUP_SIZE:
            return [SubGroup(shapes, expert)]
        parts: list[Shapes] = [OrderedDict()]
        held = 0
        for name, shape in shapes.items():
            if held >= SUB_GROUP_SIZE:
                parts.append(OrderedDict())
                held = 0
            parts[-1][name] = shape
            held += sizes[name]
        return [SubGroup(part, expert) for part in parts]


def make(directory: Path, nbytes: float, *, world: int = 4, ep: int = 2, bf16: bool = False) -> Run:
    """Write the checkpoint; return what it is of."""
    run = Run(model_of(nbytes), world, ep, bf16)
    tag = f"global_step{STEP}"
    (directory / tag).mkdir(parents=True, exist_ok=True)
    prefix = "bf16_" if bf16 else ""
    for rank in range(world):
        stem = directory / tag / f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save(model_state(run, rank), f"{stem}_model_states.pt")
        optim = stem.with_name(f"{prefix}{stem.name}_optim_states.pt")
        torch.save(optim_state(run, rank), optim)
    (directory / "latest").write_text(tag)
    config = run.model.config("bfloat16" if bf16 else "float32")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return run


def model_state(run: Run, rank: int) -> dict[str, Any]:
    """One rank's model_states: placeholders and metadata, no weights."""
    layers = autoep_layers(run, rank)
    return {
        "module": OrderedDict(placeholders(run)),
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [sub.shapes for group in run.param_groups() for sub in group],
        "frozen_param_shapes": OrderedDict(),
        "shared_params": {},
        "frozen_param_fragments": OrderedDict(),
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": 0,
        "global_steps": STEP,
        "global_samples": STEP * run.world * 6,
        "dp_world_size": run.world,
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": ds_config(run),
        "ds_version": VERSION,
        "num_experts": [EXPERTS] * run.model.layers,
        "ds_autoep_layers": layers,
        "universal_checkpoint_info": {
            "universal_checkpoint_version": 0.4,
            "expert_parameter_patterns": [r".*\.experts\.w[123]$"],
            "ds_autoep_layers": copy.deepcopy(layers),
        },
    }


def placeholders(run: Run) -> Iterator[tuple[str, torch.Tensor]]:
    """Empty tensors under every name but the experts'; each router under its second name, too."""
    for name in run.model.names():
        if ".mlp.experts." in name:
            continue
        empty = torch.empty(0, dtype=torch.bfloat16 if run.bf16 else torch.float32)
        yield name, empty
        if ".mlp.router." in name:
            yield name.replace(".mlp.router.gate.", ".mlp.gate.gate."), empty


def autoep_layers(run: Run, rank: int) -> list[dict[str, Any]]:
    """AutoEP's description of every MoE layer; its last keys are those of the rank."""
    local = EXPERTS // run.ep
    ep_rank, edp_rank = rank % run.ep, rank // run.ep
    ids = [list(range(owner * local, (owner + 1) * local)) for owner in range(run.ep)]
    shapes = run.model.names()
    layers = []
    for layer in range(run.model.layers):
        module = f"model.layers.{layer}.mlp"
        placement = make_autoep_placement_descriptor(EXPERTS, ids)
        maps = {
            name: autoep_placement_to_affine_map(placement, shapes[name]).to_dict()
            for name in (f"{module}.experts.{part}" for part in ("w1", "w2", "w3"))
        }
        layers.append(
            {
                "moe_layer_id": layer,
                "module_path": module,
                "num_experts": EXPERTS,
                "num_local_experts": local,
                "ep_size": run.ep,
                "expert_placement": placement,
                "affine_maps": {"version": 1, "params": maps},
                "expert_key_prefix": f"{module}.experts",
                "checkpoint_format": "zero3_partitioned",
                "checkpoint_format_version": 1,
                "ep_group_name": f"ep_size_{run.ep}",
                "ep_rank": ep_rank,
                "expert_data_parallel_rank": edp_rank,
                "expert_data_parallel_world_size": run.edp,
                "global_expert_start": ep_rank * local,
                "global_expert_end": (ep_rank + 1) * local,
            }
        )
    return layers


def optim_state(run: Run, rank: int) -> dict[str, Any]:
    """One rank's optim_states: its partition of every master and moment."""
    numbers = {name: number for number, name in enumerate(run.model.names())}
    random = torch.Generator().manual_seed(rank)
    partitions: list[dict[str, Any]] = []
    param_groups: list[dict[str, Any]] = []
    flats: list[torch.Tensor] = []
    state: dict[int, dict[str, torch.Tensor]] = {}
    for group in run.param_groups():
        first = len(flats)
        for sub in group:
            index, expert = len(flats), sub.expert
            count, own = (run.edp, rank // run.ep) if expert else (run.world, rank)
            ranks = list(range(rank % run.ep, run.world, run.ep)) if expert else list(range(run.world))
            family = f"ep_size_{run.ep}" if expert else "replicated"
            partitions.append(
                {
                    "sub_group": index,
                    "partition_count": count,
                    "partition_rank": own,
                    "partition_ranks": ranks,
                    "families": ["autoep_expert" if expert else "replicated"],
                    "group_names": [family],
                }
            )
            flat = values(sub.shapes, count, own, random, 0.02, GARBAGE).requires_grad_(True)
            names = list(sub.shapes)
            flat.ds_id = f"{numbers[names[0]]}_{numbers[names[-1]]}"  # type: ignore[attr-defined]
            flats.append(flat)
            state[index] = {
                "step": torch.tensor(float(STEP)),
                "exp_avg": values(sub.shapes, count, own, random, 1e-3, 0.0),
                "exp_avg_sq": values(sub.shapes, count, own, random, 1e-3, 0.0).square_(),
            }
        param_groups.append(param_group(run, group[0].expert, list(range(first, len(flats)))))
    return {
        "optimizer_state_dict": {
            "zero_stage": ZeroStageEnum.weights,
            "loss_scaler": LossScaler(scale=1.0),
            "dynamic_loss_scale": False,
            "overflow": False,
            "partition_count": run.world,
            "ds_zero_partition_groups": partitions,
            "optimizer_state_dict": {"state": state, "param_groups": param_groups},
            "fp32_flat_groups": flats,
        },
        "ds_config": ds_config(run),
        "ds_version": VERSION,
    }


def values(
    shapes: Shapes, count: int, own: int, random: torch.Generator, scale: float, padding: float
) -> torch.Tensor:
    """Partition ``own`` of ``count`` of all parameters: normal numbers, ``padding`` behind each."""
    sizes = {name: -(-math.prod(shape) // count) for name, shape in shapes.items()}
    flat = torch.empty(sum(sizes.values())).normal_(0.0, scale, generator=random)
    end = 0
    for name, shape in shapes.items():
        size = sizes[name]
        real = min(max(math.prod(shape) - own * size, 0), size)
        flat[end + real : end + size] = padding
        end += size
    return flat


def param_group(run: Run, expert: bool, params: list[int]) -> dict[str, Any]:
    """A group of torch's AdamW as DeepSpeed names it."""
    name: dict[str, Any] = {"name": "dense-params"}
    if expert:
        name = {"name": f"ep_size_{run.ep}", "moe": True}
    return {
        **name,
        "lr": 0.0001,
        "betas": (0.9, 0.999),
        "eps": 1e-08,
        "weight_decay": 0.01,
        "amsgrad": False,
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": None,
        "decoupled_weight_decay": True,
        "params": params,
    }


def ds_config(run: Run) -> dict[str, Any]:
    """The user's config of the run."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 6,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.0001, "weight_decay": 0.01, "torch_adam": True}},
        "zero_optimization": {"stage": 3},
        "expert_parallel": {"enabled": True, "autoep_size": run.ep, "preset_model": "mixtral"},
    }
    if run.bf16:
        config["bf16"] = {"enabled": True}
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--gb", type=float, default=1.0, help="size in GB (1e9 bytes)")
    parser.add_argument("--world", type=int, default=4, help="data-parallel ranks")
    parser.add_argument("--ep", type=int, default=2, help="expert-parallel size")
    parser.add_argument("--dtype", choices=("fp32", "bf16-engine"), default="fp32", help="of the engine")
    arguments = parser.parse_args()
    run = make(
        arguments.directory,
        arguments.gb * 1e9,
        world=arguments.world,
        ep=arguments.ep,
        bf16=arguments.dtype == "bf16-engine",
    )
    size = sum(path.stat().st_size for path in arguments.directory.rglob("*.pt"))
    print(f"{arguments.directory}: {size / 1e9:.2f} GB, {run.model.parameters / 1e6:.0f} M parameters")
    print(run)


if __name__ == "__main__":
    main()
