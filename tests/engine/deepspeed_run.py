"""Run the real DeepSpeed engine on CPU: train, save, load, and say what the engine itself holds.

``run(RunSpec(...))`` starts a child interpreter that imports torch, deepspeed and transformers
once and forks one process per rank. Ranks meet over gloo on the loopback device.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib
import importlib.metadata
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.engine.processes import end_in_time, failure, fork_ranks, free_port, run_child

STATES = ("fp32", "exp_avg", "exp_avg_sq")
_NEXT_RUN = "==== the next run ===="  # in the child's log
MODELS = {
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2Moe",
    "qwen3_moe": "Qwen3Moe",
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
    "qwen3_5_moe": "Qwen3_5Moe",
    "minimax_m3": "MiniMaxM3VL",
    "dense": "Llama",
}
# where not the model's name and "Config": AutoEP takes the text models of these alone
_CONFIGS = {"qwen3_5_moe": "Qwen3_5MoeTextConfig", "minimax_m3": "MiniMaxM3VLTextConfig"}


@dataclass(frozen=True)
class Load:
    """What ``engine.load_checkpoint`` is asked for before the first step."""

    dir: str
    tag: str | None = None
    universal: bool = False
    module_only: bool = False
    optimizer_states: bool = True


@dataclass(frozen=True)
class Save:
    """What ``engine.save_checkpoint`` is asked for, after the last step or ``after`` so many of them."""

    dir: str
    tag: str | None = None
    client_state: dict[str, Any] = field(default_factory=dict)
    after: int | None = None


@dataclass(frozen=True)
class RunSpec:
    """One engine run. The batch of a step depends on ``data_seed`` and the step alone."""

    family: str = "mixtral"  # a key of MODELS
    world: int = 2
    ep: int = 1  # AutoEP size; 0 trains the Hugging Face model as it is
    zero_stage: int = 3
    dtype: str = "fp32"  # fp32 | bf16 | fp16
    steps: int = 2
    start_step: int = 0  # the first batch consumed is that of this global step

    experts: int = 4
    hidden: int = 24
    intermediate: int = 13
    vocab: int = 67
    layers: int = 2
    model_config: dict[str, Any] = field(default_factory=dict)  # wins over the fields above
    correction_bias_std: float = 0.0  # random e_score_correction_bias where the model has one
    frozen: tuple[str, ...] = ()  # fnmatch patterns of Hugging Face parameter names

    lr: float = 1e-2
    param_groups: str = "list"  # list | decay (decay and no_decay) | module (none given)
    warmup: bool = False  # WarmupLR
    gradient_clipping: float = 0.0
    data_before_expert: bool = False
    sub_group_size: int = 0  # 0: the engine's default
    expert_group_limit: int = 0  # 0: the engine's constant (178956971 elements)
    ds_config: dict[str, Any] = field(default_factory=dict)  # merged over what the fields give

    model_seed: int = 11
    data_seed: int = 7
    global_batch: int = 24
    sequence: int = 8

    load: Load | None = None
    clone_step: bool = False  # own Adam step per sub-group: a universal ZeRO-3 load shares one
    save: Save | None = None
    gather_oracle: str | None = None  # folder for the engine's own masters and moments
    gather_logits: str | None = None  # safetensors file: logits in eval mode, after the last step
    result: str | None = None  # filled in by run()


@dataclass(frozen=True)
class RunResult:
    losses: list[float]  # global means, rounded to float32
    global_step: int
    adam_steps: list[float]  # one per optimizer state (rank 0)
    lr: list[float]
    loss_scale: float
    client_state: dict[str, Any]
    versions: dict[str, str]


def spec_from_dict(raw: dict[str, Any]) -> RunSpec:
    values = dict(raw)
    values["frozen"] = tuple(values.get("frozen", ()))
    for key, kind in (("load", Load), ("save", Save)):
        if values.get(key) is not None:
            values[key] = kind(**values[key])
    return RunSpec(**values)


# ---------------------------------------------------------------------------------------------
# The caller's side


def run(spec: RunSpec, *, python: str = sys.executable, timeout: float = 300.0) -> RunResult:
    """Run ``spec`` in a child interpreter; RuntimeError with its last words if it fails."""
    (outcome,) = run_each([spec], python=python, timeout=timeout)
    if isinstance(outcome, RuntimeError):
        raise outcome
    return outcome


def run_each(
    specs: Sequence[RunSpec], *, python: str = sys.executable, timeout: float = 300.0
) -> list[RunResult | RuntimeError]:
    """Run ``specs`` one after the other in one child, which saves its seconds of imports; ``timeout``
    is that of all of them."""
    ports = [free_port() for _ in specs]
    with tempfile.TemporaryDirectory(prefix="deepspeed_run_") as scratch:
        results = [
            Path(spec.result).resolve() if spec.result else Path(scratch, f"result_{number}.json")
            for number, spec in enumerate(specs)
        ]
        jobs = [
            dataclasses.asdict(_with_absolute_paths(dataclasses.replace(spec, result=str(result))))
            for spec, result in zip(specs, results, strict=True)
        ]
        Path(scratch, "jobs.json").write_text(json.dumps([ports, jobs]))
        log = Path(scratch, "log.txt")
        for result in results:
            result.unlink(missing_ok=True)
        try:
            returncode = run_child(
                "tests.engine.deepspeed_run",
                [str(Path(scratch, "jobs.json"))],
                log,
                timeout,
                python=python,
                environment={"DS_ACCELERATOR": "cpu"},
            )
        finally:
            for port in ports:
                _remove_shared_buffers(port)
        said = log.read_text(errors="replace").split(_NEXT_RUN)
        return [
            RunResult(**json.loads(result.read_text()))
            if result.is_file()
            else failure("deepspeed", returncode, said[min(number + 1, len(said) - 1)])
            for number, result in enumerate(results)
        ]


def _with_absolute_paths(spec: RunSpec) -> RunSpec:
    changes: dict[str, Any] = {}
    for key in ("gather_oracle", "gather_logits"):
        if getattr(spec, key):
            changes[key] = os.path.abspath(getattr(spec, key))
    if spec.load:
        changes["load"] = dataclasses.replace(spec.load, dir=os.path.abspath(spec.load.dir))
    if spec.save:
        changes["save"] = dataclasses.replace(spec.save, dir=os.path.abspath(spec.save.dir))
    return dataclasses.replace(spec, **changes)


def _remove_shared_buffers(port: int) -> None:
    """DeepSpeed names them <prefix>_<uid>_<MASTER_ADDR>_<MASTER_PORT>_<rank>, 66 MiB each."""
    for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------
# The child: imports once, forks the ranks


def main(path: str) -> int:
    ports, jobs = json.loads(Path(path).read_text())
    specs = [spec_from_dict(job) for job in jobs]
    end_in_time()
    _import_engine(specs)
    failed = 0
    for port, spec in zip(ports, specs, strict=True):
        print(_NEXT_RUN, flush=True)
        failed = fork_ranks(spec.world, port, partial(_train, spec)) or failed
    return failed


def _import_engine(specs: Sequence[RunSpec]) -> None:
    if "TORCH_EXTENSIONS_DIR" not in os.environ:  # two releases in one directory clash
        version = importlib.metadata.version("deepspeed")
        private = Path(tempfile.gettempdir(), f"torch_extensions_{os.getuid()}_deepspeed_{version}")
        private.mkdir(mode=0o700, exist_ok=True)
        os.environ["TORCH_EXTENSIONS_DIR"] = str(private)

    import torch

    torch.set_num_threads(1)
    import transformers

    deepspeed = _deepspeed()
    release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if release >= (5, 21):
        raise SystemExit(f"AutoEP does not run with transformers {transformers.__version__}")
    # Shared-memory all-reduce serves inference only; without it no compiler and no /dev/shm file.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _wait_for_every_gather(deepspeed)
    if any(spec.dtype == "fp16" for spec in specs):
        # refused without native fp16, yet torch computes it on any CPU
        deepspeed.get_accelerator().is_fp16_supported = lambda: True
    # transformers imports lazily: do it here once, not in every rank.
    for spec in specs:
        getattr(transformers, f"{MODELS[spec.family]}ForCausalLM")


def _wait_for_every_gather(deepspeed: Any) -> None:
    """Before 0.19.8, ``Init._allgather_params_coalesced`` (runtime/zero/partition_parameters.py) launches
    one gather per parameter and waits for the last alone. One CUDA stream ends them in order; gloo runs
    each group's in threads of their own, and the first forward now and then met weights not yet there
    (NaN)."""
    launch = deepspeed.comm.all_gather_into_tensor

    def launch_and_wait(*arguments: Any, **options: Any) -> Any:
        handle = launch(*arguments, **options)
        if handle is not None:
            handle.wait()
        return handle

    deepspeed.comm.all_gather_into_tensor = launch_and_wait


# ---------------------------------------------------------------------------------------------
# A rank


def _deepspeed() -> Any:
    """The module, untyped: it comes without annotations and fills its namespace at run time."""
    return importlib.import_module("deepspeed")


def _train(spec: RunSpec, rank: int) -> None:
    deepspeed = _deepspeed()
    deepspeed.init_distributed("gloo")
    engine = _build_engine(spec)
    client_state = _load(spec, engine)
    losses = []
    for made in range(spec.steps + 1):
        if made:
            losses.append(_train_step(spec, engine, rank, spec.start_step + made - 1))
        if spec.save and made == (spec.steps if spec.save.after is None else spec.save.after):
            engine.save_checkpoint(spec.save.dir, spec.save.tag, client_state=dict(spec.save.client_state))
    result = _result(engine, losses, client_state)
    if spec.gather_oracle:
        _gather_oracle(engine, Path(spec.gather_oracle), rank, dataclasses.asdict(result))
    if spec.gather_logits:
        _gather_logits(spec, engine, Path(spec.gather_logits), rank)
    deepspeed.comm.barrier()
    if rank == 0 and spec.result:
        Path(spec.result).write_text(json.dumps(dataclasses.asdict(result), default=str))


def build_config(spec: RunSpec) -> Any:
    """The Hugging Face config of the model to train."""
    import transformers

    values: dict[str, Any] = {
        "vocab_size": spec.vocab,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        # Gradients well above Adam's epsilon, or rounding differs visibly between topologies.
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if spec.family in ("mixtral", "dense"):
        values["head_dim"] = 8
    if spec.family == "mixtral":
        values["num_local_experts"] = spec.experts
    if spec.family in ("qwen2_moe", "qwen3_moe", "qwen3_5_moe"):
        values |= {
            "num_experts": spec.experts,
            "moe_intermediate_size": spec.intermediate,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "head_dim": 8,
        }
    if spec.family in ("qwen2_moe", "qwen3_5_moe"):
        values["shared_expert_intermediate_size"] = spec.intermediate + 2
    if spec.family == "qwen3_5_moe":
        values |= {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        }
    if spec.family == "minimax_m3":
        values |= {
            "num_local_experts": spec.experts,
            "num_experts_per_tok": 2,
            "dense_intermediate_size": spec.intermediate + 8,
            "shared_intermediate_size": spec.intermediate + 2,
            "mlp_layer_types": ["dense", "sparse"],
            "head_dim": 8,
        }
    if spec.family in ("deepseek_v2", "deepseek_v3"):
        values |= {
            "n_routed_experts": spec.experts,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": spec.intermediate,
            "intermediate_size": spec.intermediate + 8,
            "n_shared_experts": 1,
            "num_key_value_heads": 2,
            "q_lora_rank": 6,
            "kv_lora_rank": 10,
            "qk_nope_head_dim": 6,
            "qk_rope_head_dim": 4,
            "v_head_dim": 7,
            "first_k_dense_replace": 0,
            "n_group": 1,
            "topk_group": 1,
        }
    name = MODELS[spec.family]
    kind = getattr(transformers, _CONFIGS.get(spec.family, f"{name}Config"))
    config = kind(**(values | spec.model_config))
    config.architectures = [f"{name}ForCausalLM"]
    return config


def _build_model(spec: RunSpec) -> Any:
    import torch
    import transformers

    torch.manual_seed(spec.model_seed)
    config = build_config(spec)
    eager = {} if spec.family == "dense" else {"experts_implementation": "eager"}
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager", dtype=torch.float32, **eager)
    noise = torch.Generator().manual_seed(spec.model_seed + 1)
    for name, buffer in model.named_buffers():
        if spec.correction_bias_std and name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=noise) * spec.correction_bias_std)
    for name, parameter in model.named_parameters():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in spec.frozen):
            parameter.requires_grad_(False)
    return model


def _build_engine(spec: RunSpec) -> Any:
    from deepspeed.moe import utils as moe_utils

    if spec.expert_group_limit:
        split = moe_utils.split_params_into_different_moe_groups_for_optimizer
        split.__defaults__ = (spec.expert_group_limit,)
    model = _build_model(spec)
    engine, *_ = _deepspeed().initialize(
        model=model, model_parameters=_model_parameters(spec, model), config=ds_config(spec)
    )
    return engine


def _model_parameters(spec: RunSpec, model: Any) -> list[Any] | None:
    """DeepSpeed splits the experts off by itself; the order differs where none are given."""
    if spec.param_groups == "module":
        return None
    if spec.param_groups == "list":
        return list(model.parameters())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim >= 2]
    vectors = [parameter for parameter in trained if parameter.ndim < 2]
    return [
        {"name": "decay", "params": matrices, "weight_decay": 0.1},
        {"name": "no_decay", "params": vectors, "weight_decay": 0.0},
    ]


def ds_config(spec: RunSpec) -> dict[str, Any]:
    """The DeepSpeed config of the run."""
    if spec.global_batch % spec.world:
        raise ValueError(f"global_batch {spec.global_batch} does not divide by {spec.world}")
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": spec.global_batch // spec.world,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 1_000_000,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": spec.lr, "weight_decay": 0.01, "torch_adam": True},
        },
        "zero_optimization": {"stage": spec.zero_stage},
    }
    if spec.sub_group_size:
        config["zero_optimization"]["sub_group_size"] = spec.sub_group_size
    if spec.ep:
        config["expert_parallel"] = {
            "enabled": True,
            "autoep_size": spec.ep,
            "preset_model": "qwen3_moe" if spec.family == "qwen2_moe" else spec.family,
            "use_grouped_mm": False,
        }
    if spec.dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if spec.dtype == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 8}
    if spec.warmup:
        config["scheduler"] = {
            "type": "WarmupLR",
            "params": {
                "warmup_min_lr": spec.lr / 4,
                "warmup_max_lr": spec.lr,
                "warmup_num_steps": 6,
                "warmup_type": "linear",
            },
        }
    if spec.gradient_clipping:
        config["gradient_clipping"] = spec.gradient_clipping
    if spec.data_before_expert:
        config["use_data_before_expert_parallelism"] = True
    if spec.load and spec.load.universal:
        config["checkpoint"] = {"load_universal": True}
    return _merged(config, spec.ds_config)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _load(spec: RunSpec, engine: Any) -> dict[str, Any]:
    if spec.load is None:
        return {}
    path, client_state = engine.load_checkpoint(
        spec.load.dir,
        tag=spec.load.tag,
        load_module_only=spec.load.module_only,
        load_optimizer_states=spec.load.optimizer_states,
    )
    if path is None:
        raise RuntimeError(f"the engine loaded nothing from {spec.load.dir}")
    if spec.clone_step:
        for state in engine.optimizer.optimizer.state.values():
            state["step"] = state["step"].clone()
    return dict(client_state or {})


def _batch(spec: RunSpec, step: int) -> Any:
    """The global batch of a step, whatever the world size: [global_batch, sequence]."""
    import torch

    generator = torch.Generator().manual_seed(spec.data_seed * 1_000_003 + step)
    return torch.randint(spec.vocab, (spec.global_batch, spec.sequence), generator=generator)


def _train_step(spec: RunSpec, engine: Any, rank: int, step: int) -> float:
    tokens = _batch(spec, step).chunk(spec.world)[rank]
    output = engine(input_ids=tokens, labels=tokens)
    engine.backward(output.loss)
    engine.step()
    return _global_loss(output.logits.detach(), tokens)


def _global_loss(logits: Any, tokens: Any) -> float:
    """The mean over all ranks, summed in float64: the same digits however the batch is cut."""
    import torch
    import torch.distributed as dist

    targets = tokens[:, 1:].reshape(-1)
    flat = logits[:, :-1].reshape(targets.numel(), -1).double()
    total = torch.nn.functional.cross_entropy(flat, targets, reduction="sum")
    sums = torch.stack([total, total.new_tensor(targets.numel())])
    dist.all_reduce(sums)
    return float((sums[0] / sums[1]).float())


def _result(engine: Any, losses: list[float], client_state: dict[str, Any]) -> RunResult:
    import torch
    import transformers

    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return RunResult(
        losses=losses,
        global_step=engine.global_steps,
        adam_steps=[float(state["step"]) for state in inner.state.values() if "step" in state],
        lr=[float(value) for value in engine.get_lr()],
        loss_scale=float(getattr(engine.optimizer, "cur_scale", 1.0)),
        client_state=json.loads(json.dumps(client_state, default=str)),
        versions={
            "deepspeed": _deepspeed().__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )


def _gather_oracle(engine: Any, folder: Path, rank: int, facts: dict[str, Any]) -> None:
    """Write every parameter's master and moments as the engine itself puts them together; there are no
    moments before the first step."""
    from safetensors.torch import save_file

    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        # ZeRO-1/2 links the moments to the parameters during the step of the first group only.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    tensors: dict[str, dict[str, Any]] = {state: {} for state in STATES}
    tensors |= {"frozen": {}, "buffers": {}}
    order = []
    states = STATES if engine.global_steps else STATES[:1]
    for name, parameter in engine.module.named_parameters():
        order.append(name)
        if parameter.requires_grad:
            for state in states:
                tensors[state][name] = _full_state(engine, parameter, state)
        elif hasattr(parameter, "ds_id"):
            with _deepspeed().zero.GatheredParameters([parameter]):
                tensors["frozen"][name] = parameter.detach().clone()
        else:
            tensors["frozen"][name] = parameter.detach().clone()
    persistent = engine.module.state_dict().keys()
    for name, buffer in engine.module.named_buffers():
        if name in persistent:
            tensors["buffers"][name] = buffer.detach().clone()
    if rank != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for kind, values in tensors.items():
        if values:
            save_file(values, str(folder / f"{kind}.safetensors"))
    facts = {key: facts[key] for key in facts if key not in ("client_state", "versions")}
    (folder / "oracle.json").write_text(json.dumps(facts | {"parameters": order}, indent=1) + "\n")


def _full_state(engine: Any, parameter: Any, state: str) -> Any:
    """The whole fp32 tensor of one state; experts [E, ...] in the order of their global ids."""
    import torch
    import torch.distributed as dist
    from deepspeed.utils import groups, safe_get_full_fp32_param, safe_get_full_optimizer_state

    if not hasattr(parameter, "ds_id") and not hasattr(parameter, "_hp_mapping"):  # ZeRO-0
        inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
        local = parameter.detach() if state == "fp32" else inner.state[parameter][state]
    elif state == "fp32":
        local = safe_get_full_fp32_param(parameter)
    else:
        local = safe_get_full_optimizer_state(parameter, state)
    local = local.detach().float().contiguous().clone()
    if getattr(parameter, "allreduce", True):
        return local
    # DeepSpeed gathered over the ranks that hold the same experts: what is left is [E/ep, ...].
    group = groups._get_expert_parallel_group(parameter.group_name)
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, local, group=group)
    return torch.cat(parts)


def _gather_logits(spec: RunSpec, engine: Any, path: Path, rank: int) -> None:
    import torch
    from safetensors.torch import save_file

    tokens = _batch(spec, step=-1)[:2].clone()
    engine.eval()
    with torch.no_grad():
        logits = engine(input_ids=tokens).logits.detach().float().contiguous().clone()
    engine.train()
    if rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"input_ids": tokens, "logits": logits}, str(path))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
