"""Run the real torchtitan 0.3.0 on CPU (gloo, loopback): its models, its parallelize functions, its
optimizer container, its checkpointer. ``run_each([TitanSpec(...)])`` starts one child interpreter.

What is not torchtitan's own: gradients are random numbers, because its attention has no backward pass on
CPU (FlexAttention: torch/nn/attention/flex_attention.py, ``_validate_device``), and so are the experts'
biases, which its load balancing would set from the routing. Stand-ins are in place of two modules of it:
the Triton kernels of a token dispatcher that no run here uses, and the trainer, of which the models look
at the type of its configuration only. The backend is ``partial_dtensor``, not the default ``spmd_types``,
which needs a newer FSDP2 than torch 2.13.0's.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import tempfile
import types
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.engine.environments import python_with
from tests.engine.processes import end_in_time, failure, fork_ranks, free_port, run_child

# 0.3.0 imports torch_checkpointing.dtensor_resharder, which 0.1.1 has no more.
REQUIREMENTS = (
    "torchtitan==0.3.0",
    "spmd_types==0.2.3",
    "tyro==1.0.17",
    "docstring_parser==0.18.0",
    "torch_checkpointing==0.1.0",
)


@dataclass(frozen=True)
class TitanSpec:
    """One run. It loads, or takes ``steps`` steps from its initial weights, or both; then it saves."""

    family: str = "deepseek_v3"
    world: int = 1
    ep: int = 1
    backend: str = "partial_dtensor"
    steps: int = 1
    seed: int = 5

    experts: int = 4
    layers: int = 2
    mtp: int = 0
    q_lora_rank: int = 0
    fuse_qkv: bool = True
    tied: bool = False

    load: str | None = None  # a folder of step-N directories
    exclude: tuple[str, ...] = ("dataloader",)
    save: str | None = None
    model_only: bool = False  # as after the last step: the model alone, in export_dtype
    oracle: str | None = None  # folder for the gathered tensors, and for what to_hf makes of them
    backend_save: str | None = None  # what torch_checkpointing makes of it, which needs CUDA for more ranks


# ---- the caller's side


def run_each(specs: Sequence[TitanSpec], *, timeout: float = 240.0) -> None:
    """Run them one after the other; RuntimeError with the last words of the child if one fails."""
    with tempfile.TemporaryDirectory(prefix="titan_run_") as scratch:
        Path(scratch, "spec.json").write_text(json.dumps([dataclasses.asdict(spec) for spec in specs]))
        log = Path(scratch, "log.txt")
        python = str(python_with(*REQUIREMENTS))
        code = run_child(
            "tests.engine.titan_run", [str(Path(scratch, "spec.json"))], log, timeout, python=python
        )
        if code != 0:
            raise failure("torchtitan", code, log.read_text(errors="replace"))


# ---- the child: imports once, forks the ranks


def main(path: str) -> int:
    specs = [TitanSpec(**job) for job in json.loads(Path(path).read_text())]
    end_in_time()
    _stand_ins()
    import torch

    for module in ("components.checkpointer.dcp", "models.deepseek_v3", "models.qwen3"):
        importlib.import_module(f"torchtitan.{module}")
    torch.set_num_threads(1)
    for spec in specs:
        code = fork_ranks(spec.world, free_port(), partial(_rank, spec))
        if code:
            return code
    return 0


def _stand_ins() -> None:
    import torch._utils

    # torchtitan asks for an accelerator and takes "cuda" where there is none (tools/utils.py).
    torch._utils._get_available_device_type = lambda: "cpu"
    kernels = types.ModuleType("torchtitan.distributed.minimal_async_ep.kernels")
    kernels.__getattr__ = lambda name: None  # type: ignore[method-assign]
    trainer = types.ModuleType("torchtitan.trainer")
    trainer.Trainer = type("Trainer", (), {"Config": type("Config", (), {})})  # type: ignore[attr-defined]
    sys.modules |= {module.__name__: module for module in (kernels, trainer)}


# ---- a rank


class _TrainState:
    """The part of the trainer that is saved (trainer.py, ``Trainer.state_dict``)."""

    def __init__(self, step: int) -> None:
        self.state = {"step": step, "ntokens_seen": 1000 * step}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = dict(state)


class _Data:
    """Stands for a dataloader: a state per data-parallel rank (components/dataloader.py)."""

    def __init__(self, rank: int, world: int) -> None:
        self._state = {f"dp_rank_{rank}": bytes([rank]), "world_size": world}

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("not loaded here")


def _rank(spec: TitanSpec, rank: int) -> None:
    import torch
    import torch.distributed as dist
    from torchtitan.components.checkpointer.dcp import CheckpointManager
    from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, default_adamw
    from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
    from torchtitan.distributed import ParallelDims
    from torchtitan.distributed.utils import set_spmd_backend

    dist.init_process_group("gloo")
    parallelism = ParallelismConfig(expert_parallel_degree=spec.ep, spmd_backend=spec.backend)
    training = TrainingConfig(mixed_precision_param="float32")
    dims = ParallelDims.from_config(parallelism, spec.world)
    dims.build_mesh()
    set_spmd_backend(spec.backend)
    model_spec = _model_spec(spec)
    config = model_spec.model
    config.update_from_config(config=types.SimpleNamespace(parallelism=parallelism, training=training))
    torch.manual_seed(spec.seed)
    with torch.device("meta"):
        model = config.build()
    model = model_spec.parallelize_fn(
        model,
        parallel_dims=dims,
        training=training,
        parallelism=parallelism,
        compile_config=CompileConfig(),
        ac_config=None,
        dump_folder="",
    )
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_weights(buffer_device=None)
    optimizer_config: OptimizersContainer.Config = default_adamw(lr=1e-2)
    optimizer_config.implementation = "for-loop"
    optimizers = optimizer_config.build(model_parts=[model])
    schedulers = LRSchedulersContainer.Config(warmup_steps=2).build(optimizers=optimizers, training_steps=9)
    state = _TrainState(spec.steps)

    def checkpointer(folder: str) -> CheckpointManager:
        return CheckpointManager.Config(
            enable=True,
            interval=1,
            keep_latest_k=0,
            folder=folder,
            initial_load_model_only=False,
            last_save_model_only=spec.model_only,
            exclude_from_loading=list(spec.exclude),
        ).build(
            dataloader=_Data(rank, spec.world),
            model_parts=[model],
            optimizers=optimizers,
            lr_schedulers=schedulers,
            states={"train_state": state},
            sd_adapter=model_spec.state_dict_adapter(config, None),
        )

    if spec.load and not checkpointer(spec.load).load():
        raise AssertionError(f"torchtitan found nothing to load in {spec.load}")
    for _ in range(spec.steps):
        _random_step(model, optimizers)
        schedulers.step()
    if spec.save:
        checkpointer(spec.save).save(spec.steps, last_step=spec.model_only)
    if spec.oracle:
        adapter = model_spec.state_dict_adapter(config, None)
        _gather(model, optimizers, adapter, state, Path(spec.oracle), rank)
    if spec.backend_save:
        _save_with_backend(
            {"model": model.state_dict(), "optimizer": optimizers.state_dict()}, spec.backend_save
        )
    dist.barrier()


def _save_with_backend(items: dict[str, Any], directory: str) -> None:
    """With the items of torchtitan's TorchCheckpointingManager, whose own ``save`` in 0.3.0 raises
    NotImplementedError (components/checkpointer/torch_checkpointing.py)."""
    from torch_checkpointing.checkpoint_manager import CheckpointManager
    from torch_checkpointing.config import SyncCheckpointSaverConfig
    from torch_checkpointing.dtensor_resharder import DTensorResharder
    from torch_checkpointing.schema import ItemSpec
    from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

    spec = ItemSpec(requires_copy=True, resharder=DTensorResharder(), required=False)
    config = CheckpointManager.Config(
        items=dict.fromkeys(items, spec),
        save=SyncCheckpointSaverConfig(),
        storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
    )
    manager = config.build()
    manager.save(directory, items)
    manager.close()


def _random_step(model: Any, optimizers: Any) -> None:
    import torch

    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizers.step()
    optimizers.zero_grad()
    same = torch.Generator().manual_seed(1)  # what ranks hold alike
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias_E"):
            local = buffer.to_local() if hasattr(buffer, "to_local") else buffer
            local.copy_(torch.randn(buffer.shape, generator=same))


def _model_spec(spec: TitanSpec) -> Any:
    """A tiny model, built by the functions that build torchtitan's own configurations."""
    from torchtitan.models import deepseek_v3, qwen3
    from torchtitan.models.common import ComplexRoPE, CosSinRoPE, Embedding, Linear, RMSNorm

    dim, vocabulary = 24, 33
    if spec.family == "deepseek_v3":
        layers = deepseek_v3._build_dsv3_layers(
            n_layers=spec.layers,
            n_dense_layers=1,
            dim=dim,
            n_heads=2,
            q_lora_rank=spec.q_lora_rank,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=6,
            mscale=1.0,
            dense_hidden_dim=40,
            moe_hidden_dim=16,
            num_experts=spec.experts,
            num_shared_experts=1,
            router_top_k=2,
            router_score_func="sigmoid",
            attn_backend="flex",
            moe_comm_backend="standard",
            non_blocking_capacity_factor=None,
            rope=ComplexRoPE.Config(dim=4, max_seq_len=64),
        )
        config = deepseek_v3.DeepSeekV3Model.Config(
            vocab_size=vocabulary,
            dim=dim,
            tok_embeddings=Embedding.Config(
                num_embeddings=vocabulary, embedding_dim=dim, param_init=deepseek_v3._EMBEDDING_INIT
            ),
            norm=RMSNorm.Config(normalized_shape=dim, param_init=deepseek_v3._NORM_INIT),
            lm_head=Linear.Config(
                in_features=dim, out_features=vocabulary, param_init=deepseek_v3._output_linear_init(dim)
            ),
            layers=layers,
            mtp_layers=deepseek_v3._build_mtp_layers(layers[-1], dim=dim, num_mtp_layers=spec.mtp),
        )
        return dataclasses.replace(deepseek_v3.model_registry("debugmodel"), model=config)
    config = qwen3.Qwen3Model.Config(
        vocab_size=vocabulary,
        dim=dim,
        norm=qwen3._qwen3_norm(dim),
        enable_weight_tying=spec.tied,
        tok_embeddings=Embedding.Config(
            num_embeddings=vocabulary,
            embedding_dim=dim,
            param_init=qwen3._EMBEDDING_SKIP_INIT if spec.tied else qwen3._EMBEDDING_INIT,
        ),
        lm_head=Linear.Config(in_features=dim, out_features=vocabulary, param_init=qwen3._LINEAR_INIT),
        layers=qwen3._build_qwen3_moe_layers(
            n_layers=spec.layers,
            dim=dim,
            n_heads=6,
            n_kv_heads=2,
            head_dim=8,
            moe_hidden_dim=16,
            num_experts=spec.experts,
            top_k=2,
            fuse_qkv=spec.fuse_qkv,
            attn_backend="flex",
            moe_comm_backend="standard",
            rope=CosSinRoPE.Config(dim=8, max_seq_len=64),
        ),
    )
    return dataclasses.replace(qwen3.model_registry("debugmodel_moe"), model=config)


# ---- the truth


def _whole(value: Any) -> Any:
    whole = value.detach()
    whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
    return whole.contiguous().clone()


def _gather(model: Any, optimizers: Any, adapter: Any, state: _TrainState, folder: Path, rank: int) -> None:
    """The module's state dict, the optimizer's states by parameter, and the model as to_hf writes it."""
    from safetensors.torch import save_file

    weights = {name: _whole(value) for name, value in model.state_dict().items()}
    tensors: dict[str, dict[str, Any]] = {"weight": weights, "hf": adapter.to_hf(weights)}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                for kind, value in optimizer.state[parameter].items():
                    tensors.setdefault(kind, {})[name] = _whole(value)
    if rank != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for kind, values in tensors.items():
        save_file(
            {name: value.clone() for name, value in values.items()}, str(folder / f"{kind}.safetensors")
        )
    said = {
        "train_state": state.state,
        "lr": [group["lr"] for group in optimizers.optimizers[0].param_groups],
    }
    (folder / "oracle.json").write_text(json.dumps(said))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
