"""Sparse ZeRO-3 AutoEP checkpoints of trillion-parameter models: metadata exact, tensor bytes are holes.

    python benchmarks/sparse_zero3.py DIR --world 2048 --ep 64 [--model kimi|slice] [--layers N] ...

What is real: every rank has its two files of its own, each with the pickle, the zip directory, record
positions, CRCs (of zeros) and sizes that torch.save gives for that rank; groups, sub-groups, partitions,
affine maps and placements are computed by benchmarks/make_checkpoint.py's rules and deepspeed 0.19.8's own
functions. What is copied: the model_states pickle is made once per EP rank; ranks that share it differ in
one number per layer (expert_data_parallel_rank), which is patched in place.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DS_LOG_LEVEL", "error")

import make_checkpoint as mk
import torch
from sparse_torch import Hole, Pickled, dumps, write


@dataclass(frozen=True)
class Kimi:
    """Kimi-K2's shape under AutoEP's names."""

    hidden: int = 7168
    inner: int = 2048
    dense_inner: int = 18432
    layers: int = 61
    first_dense: int = 1
    experts: int = 384
    vocab: int = 163840
    heads: int = 64
    q_lora: int = 1536
    kv_lora: int = 512
    nope: int = 128
    rope: int = 64
    value: int = 128

    def names(self) -> mk.Shapes:
        h, i = self.hidden, self.inner
        shapes: mk.Shapes = OrderedDict({"model.embed_tokens.weight": (self.vocab, h)})
        for layer in range(self.layers):
            p = f"model.layers.{layer}"
            shapes |= {
                f"{p}.self_attn.q_a_proj.weight": (self.q_lora, h),
                f"{p}.self_attn.q_a_layernorm.weight": (self.q_lora,),
                f"{p}.self_attn.q_b_proj.weight": (self.heads * (self.nope + self.rope), self.q_lora),
                f"{p}.self_attn.kv_a_proj_with_mqa.weight": (self.kv_lora + self.rope, h),
                f"{p}.self_attn.kv_a_layernorm.weight": (self.kv_lora,),
                f"{p}.self_attn.kv_b_proj.weight": (self.heads * (self.nope + self.value), self.kv_lora),
                f"{p}.self_attn.o_proj.weight": (h, self.heads * self.value),
            }
            if layer < self.first_dense:
                d = self.dense_inner
                shapes |= {
                    f"{p}.mlp.gate_proj.weight": (d, h),
                    f"{p}.mlp.up_proj.weight": (d, h),
                    f"{p}.mlp.down_proj.weight": (h, d),
                }
            else:
                shapes |= {
                    f"{p}.mlp.router.gate.weight": (self.experts, h),
                    f"{p}.mlp.experts.w1": (self.experts, i, h),
                    f"{p}.mlp.experts.w2": (self.experts, h, i),
                    f"{p}.mlp.experts.w3": (self.experts, i, h),
                    f"{p}.mlp.shared_experts.gate_proj.weight": (i, h),
                    f"{p}.mlp.shared_experts.up_proj.weight": (i, h),
                    f"{p}.mlp.shared_experts.down_proj.weight": (h, i),
                }
            shapes |= {f"{p}.input_layernorm.weight": (h,), f"{p}.post_attention_layernorm.weight": (h,)}
        return shapes | {"model.norm.weight": (h,), "lm_head.weight": (self.vocab, h)}

    def buffers(self) -> dict[str, tuple[int, ...]]:
        return {
            f"model.layers.{n}.mlp.router.e_score_correction_bias": (self.experts,)
            for n in range(self.first_dense, self.layers)
        }

    @property
    def moe_layers(self) -> range:
        return range(self.first_dense, self.layers)

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.names().values())

    def config(self, dtype: str) -> dict[str, Any]:
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "dtype": dtype,
            "hidden_size": self.hidden,
            "intermediate_size": self.dense_inner,
            "moe_intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "vocab_size": self.vocab,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "n_routed_experts": self.experts,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": self.first_dense,
            "moe_layer_freq": 1,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": self.q_lora,
            "kv_lora_rank": self.kv_lora,
            "qk_nope_head_dim": self.nope,
            "qk_rope_head_dim": self.rope,
            "v_head_dim": self.value,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "routed_scaling_factor": 2.827,
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "tie_word_embeddings": False,
            "max_position_embeddings": 131072,
        }


MODELS = {
    "kimi": Kimi(),
    "slice": Kimi(
        hidden=1792,
        inner=512,
        dense_inner=4608,
        layers=61,
        vocab=40960,
        heads=16,
        q_lora=384,
        kv_lora=128,
        nope=32,
        rope=16,
        value=32,
    ),
}


class Run(mk.Run):
    """mk.Run asks for EXPERTS divisible; the module's constant is set to the model's."""


def placeholders(run: Run) -> OrderedDict[str, Any]:
    module: OrderedDict[str, Any] = OrderedDict()
    buffers = {}
    dtype = torch.bfloat16 if run.bf16 else torch.float32
    for name in run.model.names():
        if ".mlp.experts." in name:
            continue
        empty = torch.empty(0, dtype=dtype)
        module[name] = empty
        if ".mlp.router." in name:
            module[name.replace(".mlp.router.gate.", ".mlp.gate.gate.")] = empty
            bias = name.replace(".gate.weight", ".e_score_correction_bias")
            buffers[bias] = Hole((run.model.experts,))
            module[bias] = buffers[bias]
    return module


def autoep_layers(run: Run, ep_rank: int, edp_rank: int, maps: list[Any]) -> list[dict[str, Any]]:
    local = run.model.experts // run.ep
    ids = [list(range(owner * local, (owner + 1) * local)) for owner in range(run.ep)]
    result = []
    for number, layer in enumerate(run.model.moe_layers):
        module = f"model.layers.{layer}.mlp"
        result.append(
            {
                "moe_layer_id": number,
                "module_path": module,
                "num_experts": run.model.experts,
                "num_local_experts": local,
                "ep_size": run.ep,
                "expert_placement": mk.make_autoep_placement_descriptor(run.model.experts, ids),
                "affine_maps": maps[number],
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
    return result


def affine_maps(run: Run) -> list[Any]:
    """deepspeed's own maps, for every MoE layer."""
    local = run.model.experts // run.ep
    ids = [list(range(owner * local, (owner + 1) * local)) for owner in range(run.ep)]
    shapes = run.model.names()
    placement = mk.make_autoep_placement_descriptor(run.model.experts, ids)
    made = {}
    result = []
    for layer in run.model.moe_layers:
        params = {}
        for part in ("w1", "w2", "w3"):
            name = f"model.layers.{layer}.mlp.experts.{part}"
            if shapes[name] not in made:
                made[shapes[name]] = mk.autoep_placement_to_affine_map(placement, shapes[name]).to_dict()
            params[name] = copy.deepcopy(made[shapes[name]])
        result.append({"version": 1, "params": params})
    return result


def model_state(run: Run, ep_rank: int, edp_rank: int, maps: list[Any], groups: Any) -> dict[str, Any]:
    layers = autoep_layers(run, ep_rank, edp_rank, maps)
    return {
        "module": placeholders(run),
        "buffer_names": list(run.model.buffers()),
        "optimizer": None,
        "param_shapes": [sub.shapes for group in groups for sub in group],
        "frozen_param_shapes": OrderedDict(),
        "shared_params": {},
        "frozen_param_fragments": OrderedDict(),
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": 0,
        "global_steps": mk.STEP,
        "global_samples": mk.STEP * run.world * 6,
        "dp_world_size": run.world,
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": mk.ds_config(run),
        "ds_version": mk.VERSION,
        "num_experts": [run.model.experts] * len(run.model.moe_layers),
        "ds_autoep_layers": layers,
        "universal_checkpoint_info": {
            "universal_checkpoint_version": 0.4,
            "expert_parameter_patterns": [r".*\.experts\.w[123]$"],
            "ds_autoep_layers": copy.deepcopy(layers),
        },
    }


def optim_state(run: Run, rank: int, groups: Any, numbers: dict[str, int]) -> dict[str, Any]:
    partitions: list[Any] = []
    param_groups, flats, state = [], [], {}
    for group in groups:
        first = len(flats)
        for sub in group:
            index, expert = len(flats), sub.expert
            count, own = (run.edp, rank // run.ep) if expert else (run.world, rank)
            ranks = list(range(rank % run.ep, run.world, run.ep)) if expert else list(range(run.world))
            partitions.append(
                {
                    "sub_group": index,
                    "partition_count": count,
                    "partition_rank": own,
                    "partition_ranks": ranks,
                    "families": ["autoep_expert" if expert else "replicated"],
                    "group_names": [f"ep_size_{run.ep}" if expert else "replicated"],
                }
            )
            numel = sum(-(-math.prod(shape) // count) for shape in sub.shapes.values())
            names = list(sub.shapes)
            ident = f"{numbers[names[0]]}_{numbers[names[-1]]}"
            flats.append(Hole((numel,), requires_grad=True, attributes={"ds_id": ident}))
            state[index] = {
                "step": torch.tensor(float(mk.STEP)),
                "exp_avg": Hole((numel,)),
                "exp_avg_sq": Hole((numel,)),
            }
        param_groups.append(mk.param_group(run, group[0].expert, list(range(first, len(flats)))))
    return {
        "optimizer_state_dict": {
            "zero_stage": mk.ZeroStageEnum.weights,
            "loss_scaler": mk.LossScaler(scale=1.0),
            "dynamic_loss_scale": False,
            "overflow": False,
            "partition_count": run.world,
            "ds_zero_partition_groups": partitions,
            "optimizer_state_dict": {"state": state, "param_groups": param_groups},
            "fp32_flat_groups": flats,
        },
        "ds_config": mk.ds_config(run),
        "ds_version": mk.VERSION,
    }


def patched(a: Pickled, b: Pickled, value: int, path_check: bytes = b"") -> Pickled:
    """``a`` (edp rank 0) with ``value`` wherever ``b`` (edp rank 1) has another byte."""
    if value == 0:
        return a
    data = bytearray(a.data)
    assert len(a.data) == len(b.data)
    assert value < 256
    import numpy as np

    at = np.flatnonzero(np.frombuffer(a.data, np.uint8) != np.frombuffer(b.data, np.uint8))
    for position in at:
        assert a.data[position] == 0
        assert b.data[position] == 1
        data[position] = value
    return Pickled(bytes(data), a.storages)


def make(
    directory: Path, model: Kimi, *, world: int, ep: int, bf16: bool = True, tag_step: int | None = None
) -> Run:
    mk.EXPERTS = model.experts
    run = Run(model, world, ep, bf16)  # type: ignore[arg-type]
    tag = f"global_step{mk.STEP}"
    (directory / tag).mkdir(parents=True, exist_ok=True)
    groups, maps = run.param_groups(), affine_maps(run)
    numbers = {name: number for number, name in enumerate(model.names())}
    prefix = "bf16_" if bf16 else ""
    begun = time.time()
    for ep_rank in range(ep):
        first = dumps(model_state(run, ep_rank, 0, maps, groups))
        second = dumps(model_state(run, ep_rank, 1, maps, groups)) if run.edp > 1 else first
        for edp_rank in range(run.edp):
            rank = edp_rank * ep + ep_rank
            stem = directory / tag / f"zero_pp_rank_{rank}_mp_rank_00"
            write(f"{stem}_model_states.pt", patched(first, second, edp_rank))
            optim = stem.with_name(f"{prefix}{stem.name}_optim_states.pt")
            write(optim, dumps(optim_state(run, rank, groups, numbers)))
    (directory / "latest").write_text(tag)
    (directory / "config.json").write_text(
        json.dumps(model.config("bfloat16" if bf16 else "float32"), indent=1) + "\n"
    )
    apparent = sum(p.stat().st_size for p in (directory / tag).iterdir())
    real = sum(p.stat().st_blocks * 512 for p in (directory / tag).iterdir())
    print(
        f"{directory}: {model.parameters / 1e9:.0f} B parameters, {sum(map(len, groups))} sub-groups, "
        f"world {world}, EP {ep}: {apparent / 1e12:.3f} TB apparent, {real / 1e9:.2f} GB on disk, "
        f"model pickle {len(first.data) / 1e6:.2f} MB, "
        f"{time.time() - begun:.0f} s",
        flush=True,
    )
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", choices=MODELS, default="kimi")
    parser.add_argument("--world", type=int, default=64)
    parser.add_argument("--ep", type=int, default=64)
    parser.add_argument("--fp32", action="store_true", help="of the engine")
    for name in ("layers", "experts", "hidden", "inner", "vocab"):
        parser.add_argument(f"--{name}", type=int)
    a = parser.parse_args()
    given = {k: getattr(a, k) for k in ("layers", "experts", "hidden", "inner", "vocab") if getattr(a, k)}
    make(a.directory, replace(MODELS[a.model], **given), world=a.world, ep=a.ep, bf16=not a.fp32)


if __name__ == "__main__":
    main()
