"""Run real FSDP2 on CPU (gloo, loopback): train, save as each framework does, load, gather the truth.

``run(FsdpSpec(...))`` starts a child interpreter that imports torch once and forks one process per rank.
Models: ``titan`` is a tiny transformer with torchtitan's names, all others are transformers' own.
Expert parallelism is applied here as torchtitan does it (torchtitan/distributed/fsdp.py): expert weights
are DTensors over the ep mesh and, within it, FSDP2 shards over efsdp; tokens travel by all-gather.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.engine.deepspeed_run import MODELS, RunSpec, _batch, _build_model, _global_loss
from tests.engine.processes import end_in_time, failure, fork_ranks, free_port, run_child

STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


@dataclass(frozen=True)
class FsdpSpec:
    """One run. The batch of a step depends on ``data_seed`` and the step alone."""

    family: str = "titan"  # titan, or a key of deepspeed_run.MODELS
    world: int = 2
    ep: int = 1
    ep_only: bool = False  # expert weights are left to EP alone: 1-D DTensors
    dtype: str = "fp32"  # fp32 | mixed (fp32 parameters, bf16 compute) | bf16
    steps: int = 2
    start_step: int = 0

    experts: int = 4
    hidden: int = 24
    intermediate: int = 12
    vocab: int = 67
    layers: int = 2
    old_names: bool = False  # titan: moe.experts.w1 and output
    tied: bool = False
    model_config: dict[str, Any] = field(default_factory=dict)

    lr: float = 1e-2
    amsgrad: bool = False
    decay_groups: bool = False  # two parameter groups
    model_seed: int = 11
    data_seed: int = 7
    global_batch: int = 24
    sequence: int = 8

    load: str | None = None
    save: str | None = None
    style: str = "torchtitan"  # of load and save, see SAVERS
    writer: dict[str, Any] = field(default_factory=dict)  # options of FileSystemWriter
    oracle: str | None = None  # folder for the gathered tensors
    result: str | None = None


@dataclass(frozen=True)
class FsdpResult:
    losses: list[float]
    lr: list[float]
    versions: dict[str, str]


def model_spec(spec: FsdpSpec) -> RunSpec:
    """The same model and data as a DeepSpeed run."""
    config = {**spec.model_config, **({"tie_word_embeddings": True} if spec.tied else {})}
    return RunSpec(
        family="dense" if spec.family == "titan" else spec.family,
        world=spec.world,
        experts=spec.experts,
        hidden=spec.hidden,
        intermediate=spec.intermediate,
        vocab=spec.vocab,
        layers=spec.layers,
        model_config=config,
        model_seed=spec.model_seed,
        data_seed=spec.data_seed,
        global_batch=spec.global_batch,
        sequence=spec.sequence,
    )


# ---- the caller's side


def run(spec: FsdpSpec, *, timeout: float = 240.0) -> FsdpResult:
    """Run ``spec`` in a child interpreter; RuntimeError with its last words if it fails."""
    return run_each([spec], timeout=timeout)[0]


def run_each(specs: Sequence[FsdpSpec], *, timeout: float = 240.0) -> list[FsdpResult]:
    """Run them one after the other; torch is imported once."""
    with tempfile.TemporaryDirectory(prefix="fsdp_run_") as scratch:
        results = [Path(scratch, f"result_{number}.json") for number in range(len(specs))]
        jobs = []
        for spec, result in zip(specs, results, strict=True):
            job = dataclasses.asdict(dataclasses.replace(spec, result=str(result)))
            for key in ("load", "save", "oracle"):
                job[key] = os.path.abspath(job[key]) if job[key] else None
            jobs.append(job)
        Path(scratch, "spec.json").write_text(json.dumps(jobs))
        log = Path(scratch, "log.txt")
        code = run_child("tests.engine.fsdp_run", [str(Path(scratch, "spec.json"))], log, timeout)
        if code != 0:
            raise failure("fsdp", code, log.read_text(errors="replace"))
        return [FsdpResult(**json.loads(result.read_text())) for result in results]


# ---- the child: imports once, forks the ranks


def main(path: str) -> int:
    specs = [FsdpSpec(**job) for job in json.loads(Path(path).read_text())]
    end_in_time()
    import torch
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import transformers

    torch.set_num_threads(1)
    for family in {spec.family for spec in specs} - {"titan"}:
        getattr(transformers, f"{MODELS[family]}ForCausalLM")
    for spec in specs:
        code = fork_ranks(spec.world, free_port(), partial(_train, spec))
        if code:
            return code
    return 0


# ---- a rank


def _train(spec: FsdpSpec, rank: int) -> None:
    import torch
    import torch.distributed as dist
    import transformers

    dist.init_process_group("gloo")
    model = build_titan(spec) if spec.family == "titan" else _build_model(model_spec(spec))
    if spec.dtype == "bf16":
        model = model.to(torch.bfloat16)
    alone = parallelize(spec, model)
    optimizer = _optimizer(spec, model)
    if spec.load:
        load(spec, model, optimizer, spec.load)
    losses = []
    for step in range(spec.start_step, spec.start_step + spec.steps):
        losses.append(_step(spec, model, optimizer, alone, rank, step))
    if spec.save:
        save(spec, model, optimizer, spec.save, spec.start_step + spec.steps)
    if spec.oracle:
        _gather_oracle(model, optimizer, Path(spec.oracle), rank, losses)
    dist.barrier()
    if rank == 0 and spec.result:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        lr = [float(group["lr"]) for group in optimizer.param_groups]
        Path(spec.result).write_text(json.dumps({"losses": losses, "lr": lr, "versions": versions}))


def _optimizer(spec: FsdpSpec, model: Any) -> Any:
    import torch

    options = {"lr": spec.lr, "weight_decay": 0.01, "foreach": False, "amsgrad": spec.amsgrad}
    parameters = list(model.parameters())
    if not spec.decay_groups:
        return torch.optim.AdamW(parameters, **options)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, **options)


def _step(spec: FsdpSpec, model: Any, optimizer: Any, alone: list[Any], rank: int, step: int) -> float:
    import torch
    import torch.distributed as dist

    tokens = _batch(model_spec(spec), step).chunk(spec.world)[rank]
    output = model(input_ids=tokens)
    logits = output.logits
    flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
    loss = torch.nn.functional.cross_entropy(flat, tokens[:, 1:].reshape(-1))
    loss.backward()
    for parameter, group in alone:  # the mean over all ranks' tokens, which EP has only added up
        gradient = parameter.grad.to_local()
        if group is not None:
            dist.all_reduce(gradient, group=group)
        gradient /= spec.ep if group is None else spec.world
    optimizer.step()
    optimizer.zero_grad()
    return _global_loss(logits.detach(), tokens)


# ---- parallelism


def parallelize(spec: FsdpSpec, model: Any) -> list[Any]:
    """FSDP2 over all ranks, experts over (efsdp, ep). Returns (expert weight, group to reduce over)."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if spec.dtype == "mixed" else None
    keywords: dict[str, Any] = {"mp_policy": policy} if policy else {}
    world = init_device_mesh("cpu", (spec.world,), mesh_dim_names=("fsdp",))
    efsdp = spec.world // spec.ep
    mesh = init_device_mesh("cpu", (efsdp, spec.ep), mesh_dim_names=("efsdp", "ep"))
    modules = [module for name, module in model.named_modules() if _is_experts(name, module)]
    by_row = efsdp * spec.ep > spec.experts and spec.family == "titan"
    alone: list[Any] = []
    ignored: set[Any] = set()
    for module in modules:
        _patch_experts(module, spec)
        if spec.ep > 1:
            _split_experts(module, mesh["ep"])
            module.ep_group = mesh["ep"].get_group()
            if spec.ep_only:
                ignored |= set(module.parameters())
                alone += [(p, mesh["efsdp"].get_group()) for p in module.parameters()]
            else:
                placement = (lambda p: Shard(1)) if by_row else None
                fully_shard(module, mesh=mesh["efsdp"], shard_placement_fn=placement, **keywords)
                alone += [(p, None) for p in module.parameters()]
    placement = None
    if spec.ep == 1 and by_row:
        experts = {p for module in modules for p in module.parameters()}
        placement = lambda p: Shard(1) if p in experts else Shard(0)  # noqa: E731
    layers = model.layers.values() if spec.family == "titan" else model.model.layers
    for module in [*layers, model]:
        fully_shard(
            module, mesh=world, shard_placement_fn=placement, ignored_params=ignored or None, **keywords
        )
    return alone


def _is_experts(name: str, module: Any) -> bool:
    own = {key for key, _ in module.named_parameters(recurse=False)}
    return bool(own & {"gate_up_proj", "w1", "w1_EFD"}) and name.endswith("experts")


def _split_experts(module: Any, mesh: Any) -> None:
    import torch
    from torch.distributed.tensor import Shard, distribute_tensor

    for key, parameter in list(module.named_parameters(recurse=False)):
        value = distribute_tensor(parameter.data, mesh, [Shard(0)])
        module.register_parameter(key, torch.nn.Parameter(value))


def _patch_experts(module: Any, spec: FsdpSpec) -> None:
    """One way to compute for all models: gather the tokens of the EP group, add up what each rank has."""

    def local(value: Any) -> Any:
        return value.to_local() if hasattr(value, "to_local") else value

    def forward(hidden: Any, index: Any, weights: Any) -> Any:
        import torch
        import torch.distributed as dist

        group = getattr(module, "ep_group", None)
        if hasattr(module, "gate_up_proj"):
            gate, up = local(module.gate_up_proj).chunk(2, dim=1)
            down = local(module.down_proj)
        else:
            gate, down, up = (local(value) for value in module.parameters())
        first = 0
        if group is not None:
            hidden, weights = _Gather.apply(hidden, group), _Gather.apply(weights, group)
            index = _gathered(index, group)
            first = dist.get_rank(group) * gate.shape[0]
        out = torch.zeros_like(hidden)
        for expert in range(gate.shape[0]):
            token, place = torch.where(index == first + expert)
            inner = torch.nn.functional.silu(hidden[token] @ gate[expert].T) * (
                hidden[token] @ up[expert].T
            )
            value = (inner @ down[expert].T) * weights[token, place, None]
            out = out.index_add(0, token, value.to(out.dtype))
        return out if group is None else _Sum.apply(out, group)

    module.forward = forward


def _gathered(value: Any, group: Any) -> Any:
    import torch
    import torch.distributed as dist

    parts = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, value.contiguous(), group=group)
    return torch.cat(parts)


def _own(value: Any, group: Any) -> Any:
    import torch.distributed as dist

    return value.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone()


def _summed(value: Any, group: Any) -> Any:
    import torch.distributed as dist

    total = value.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


def _functions() -> tuple[Any, Any]:
    import torch

    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Any, group: Any) -> Any:
            ctx.group = group
            return _gathered(value, group)

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            return _own(_summed(gradient, ctx.group), ctx.group), None

    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Any, group: Any) -> Any:
            ctx.group = group
            return _own(_summed(value, group), group)

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            return _gathered(gradient, ctx.group), None

    return Gather, Sum


_Gather, _Sum = _functions()


# ---- torchtitan's names


def build_titan(spec: FsdpSpec) -> Any:
    """A tiny MoE transformer under torchtitan's names (models/common/moe.py, models/qwen3/model.py)."""
    import torch
    from torch import nn

    names = ("w1", "w2", "w3") if spec.old_names else ("w1_EFD", "w2_EDF", "w3_EFD")

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shapes = (
                (spec.experts, spec.intermediate, spec.hidden),
                (spec.experts, spec.hidden, spec.intermediate),
                (spec.experts, spec.intermediate, spec.hidden),
            )
            for name, shape in zip(names, shapes, strict=True):
                self.register_parameter(name, nn.Parameter(torch.randn(shape) * 0.1))

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(spec.hidden, spec.experts, bias=False)

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner_experts = Experts()

    class MoE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = Router()
            if spec.old_names:
                self.experts: nn.Module = Experts()
            else:
                self.routed_experts = Routed()
            bias = "expert_bias" if spec.old_names else "expert_bias_E"
            self.register_buffer(bias, torch.randn(spec.experts) * 0.1)

        def forward(self, x: Any) -> Any:
            flat = x.reshape(-1, spec.hidden)
            weights, index = torch.topk(torch.softmax(self.router.gate(flat), -1), 2, -1)
            experts = self.experts if spec.old_names else self.routed_experts.inner_experts
            return experts(flat, index, weights).reshape(x.shape)

    class Attention(nn.Module):
        """Small, because every parameter is dozens of entries in a torchtitan checkpoint."""

        def __init__(self) -> None:
            super().__init__()
            self.wo = nn.Linear(spec.hidden, spec.hidden, bias=False)

        def forward(self, x: Any) -> Any:
            heads = x.reshape(*x.shape[:2], 2, spec.hidden // 2).transpose(1, 2)
            out = nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
            return self.wo(out.transpose(1, 2).reshape(x.shape))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.moe = Attention(), MoE()
            self.attention_norm, self.ffn_norm = nn.RMSNorm(spec.hidden), nn.RMSNorm(spec.hidden)

        def forward(self, x: Any) -> Any:
            x = x + self.attention(self.attention_norm(x))
            return x + self.moe(self.ffn_norm(x))

    class Output:
        def __init__(self, logits: Any) -> None:
            self.logits = logits

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tok_embeddings = nn.Embedding(spec.vocab, spec.hidden)
            self.layers = nn.ModuleDict({str(i): Block() for i in range(spec.layers)})
            self.norm = nn.RMSNorm(spec.hidden)
            head = nn.Linear(spec.hidden, spec.vocab, bias=False)
            if spec.old_names:
                self.output: nn.Module = head
            else:
                self.lm_head = head

        def forward(self, input_ids: Any) -> Any:
            x = self.tok_embeddings(input_ids)
            for layer in self.layers.values():
                x = layer(x)
            x = self.norm(x)
            return Output(self.output(x) if spec.old_names else self.lm_head(x))

    torch.manual_seed(spec.model_seed)
    return Model()


# ---- saving and loading, in each framework's way


def _model_state(model: Any) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    return dict(get_model_state_dict(model))


def _optimizer_state(model: Any, optimizer: Any, flat: bool) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    return dict(get_optimizer_state_dict(model, optimizer, options=options))


def _parts(spec: FsdpSpec, model: Any, optimizer: Any, directory: str, step: int) -> dict[str, Any]:
    """directory -> state dict, as the framework ``spec.style`` saves them."""
    state = _model_state(model)
    if spec.style in ("torchtitan", "transformers"):
        flat = _optimizer_state(model, optimizer, True)
        if spec.style == "transformers":
            return {directory: {"optimizer": flat}}
        extra = {
            "optimizer": flat,
            "lr_scheduler": {"last_epoch": step},
            "train_state": {"step": step, "ntokens_seen": step * spec.global_batch * spec.sequence},
            "dataloader": {"version": 1, "dp_world_size": spec.world},
        }
        return {directory: {**state, **extra}}
    nested = _optimizer_state(model, optimizer, False)
    if spec.style == "accelerate":
        return {
            f"{directory}/pytorch_model_fsdp_0": {"model": state},
            f"{directory}/optimizer_0": {"optimizer": nested},
        }
    if spec.style == "app":
        return {directory: {"app": {"model": state, "optim": nested}}}
    return {directory: {"model": state, "optimizer": nested}}


def save(spec: FsdpSpec, model: Any, optimizer: Any, directory: str, step: int) -> None:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    options = dict(spec.writer)
    keywords = {"use_collectives": options.pop("use_collectives")} if "use_collectives" in options else {}
    for path, state in _parts(spec, model, optimizer, directory, step).items():
        dcp.save(state, storage_writer=dcp.FileSystemWriter(path, **options), **keywords)
    if spec.style == "transformers":
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from transformers.distributed.checkpoint import _redistribute_state_dict

        writer = HuggingFaceStorageWriter(path=directory, save_distributed=True)
        dcp.save(_redistribute_state_dict(_model_state(model)), storage_writer=writer)
    if spec.style == "accelerate" and dist.get_rank() == 0:
        scheduler = {"last_epoch": step, "_step_count": step + 1, "base_lrs": [spec.lr]}
        torch.save(scheduler, Path(directory, "scheduler.bin"))


def load(spec: FsdpSpec, model: Any, optimizer: Any, directory: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    flat = spec.style in ("torchtitan", "transformers")
    parts = _parts(spec, model, optimizer, directory, 0)
    loaded: dict[str, Any] = {}
    for path, state in parts.items():
        state.pop("dataloader", None)  # as torchtitan's exclude_from_loading
        dcp.load(state, checkpoint_id=path)
        loaded |= state.get("app", state)
    if spec.style == "transformers":
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from transformers.distributed.checkpoint import _redistribute_state_dict

        original = _model_state(model)
        state = _redistribute_state_dict(original)
        dcp.load(state, storage_reader=HuggingFaceStorageReader(directory))
        loaded["model"] = _redistribute_state_dict(state, reference_state_dict=original)
    weights = loaded.get("model")
    if weights is None:
        known = _model_state(model)
        weights = {key: value for key, value in loaded.items() if key in known}
    set_model_state_dict(model, weights)
    set_optimizer_state_dict(
        model,
        optimizer,
        loaded.get("optimizer", loaded.get("optim")),
        options=StateDictOptions(flatten_optimizer_state_dict=flat),
    )


# ---- the truth


def _whole(value: Any) -> Any:
    value = value.detach()
    whole = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole.contiguous().clone()


def _gather_states(model: Any, optimizer: Any) -> dict[str, dict[str, Any]]:
    tensors: dict[str, dict[str, Any]] = {"weight": {}, "buffers": {}, "step": {}}
    for name, parameter in model.named_parameters():
        tensors["weight"][name] = _whole(parameter)
        for state, value in optimizer.state.get(parameter, {}).items():
            tensors.setdefault(state, {})[name] = _whole(value)
    persistent = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in persistent:
            tensors["buffers"][name] = _whole(buffer)
    return tensors


def _gather_oracle(model: Any, optimizer: Any, folder: Path, rank: int, losses: list[float]) -> None:
    from safetensors.torch import save_file

    tensors = _gather_states(model, optimizer)
    if rank != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for kind, values in tensors.items():
        if values:
            save_file(values, str(folder / f"{kind}.safetensors"))
    (folder / "oracle.json").write_text(json.dumps({"losses": losses}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
