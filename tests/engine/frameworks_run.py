"""Run the real frameworks on CPU (gloo, loopback): train, save and load as they do it, gather the truth.

``run_each([FrameworkSpec(...)])`` starts a child interpreter that imports torch once and forks one process
per rank. What stands in for something of a framework, because it does not run on CPU:

* accelerate 1.15 takes an FSDP plugin on accelerators only (state.py, ``AcceleratorState.__init__``); its
  state is told of the plugin here, ``Accelerator`` and transformers' ``Trainer`` do the rest.
* VeOmni 0.1.12 calls ``torch.cpu.empty_cache``, which torch has not, and computes experts under EP with
  Triton; the experts' forward is fsdp_run's there. Its kernels are the eager ones.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.engine.deepspeed_run import RunSpec, _batch, _build_model
from tests.engine.fsdp_run import FsdpSpec, _patch_experts, _whole
from tests.engine.processes import end_in_time, failure, fork_ranks, free_port, run_child


@dataclass(frozen=True)
class FrameworkSpec:
    """One run: load, train, save, gather; what is None is left out."""

    framework: str  # a key of FRAMEWORKS
    world: int = 2
    ep: int = 1
    steps: int = 2
    family: str = "qwen3_moe"
    model_config: dict[str, Any] = field(default_factory=dict)
    model_seed: int = 11
    lr: float = 1e-2
    scheduler: bool = True  # accelerate: prepare one
    load: str | None = None
    save: str | None = None
    gathered: str | None = None  # folder: a file of tensors per state, and groups.json
    published: str | None = None  # the gathered model, as transformers' save_pretrained publishes it
    merged: dict[str, str] = field(default_factory=dict)  # accelerate: checkpoint -> its merged weights

    def model(self) -> RunSpec:
        """The same model and data as a DeepSpeed run."""
        return RunSpec(
            family=self.family,
            world=self.world,
            hidden=24,
            intermediate=12,
            vocab=33,
            layers=1,
            model_config=self.model_config,
            model_seed=self.model_seed,
        )


# ---- the caller's side


def run_each(specs: Sequence[FrameworkSpec], *, python: Path, timeout: float = 240.0) -> None:
    """Run them one after the other; RuntimeError with the child's last words if one fails."""
    with tempfile.TemporaryDirectory(prefix="frameworks_run_") as scratch:
        jobs, log = Path(scratch, "specs.json"), Path(scratch, "log.txt")
        jobs.write_text(json.dumps([dataclasses.asdict(spec) for spec in specs]))
        code = run_child("tests.engine.frameworks_run", [str(jobs)], log, timeout, python=str(python))
        if code != 0:
            raise failure(specs[0].framework, code, log.read_text(errors="replace"))


# ---- the child: imports once, forks the ranks


def main(path: str) -> int:
    specs = [FrameworkSpec(**job) for job in json.loads(Path(path).read_text())]
    end_in_time()
    import torch
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for number, spec in enumerate(specs):
        start = Path(path).parent / f"start_{number}"
        _build_model(spec.model()).save_pretrained(start)
        code = fork_ranks(spec.world, free_port(), partial(_rank, spec, start))
        if code:
            return code
    return 0


@dataclass
class Run:
    """What a framework has made of a model. ``whole`` gathers a tensor of the parameter with this name."""

    model: Any
    optimizers: Sequence[Any]
    whole: Callable[[str, Any], Any] = lambda name, value: _whole(value)


def _rank(spec: FrameworkSpec, start: Path, rank: int) -> None:
    import torch.distributed as dist

    run = FRAMEWORKS[spec.framework](spec, start, rank)
    if spec.gathered:
        _gather(run, Path(spec.gathered), rank)
    if spec.published:
        _publish(run, start, Path(spec.published), rank)
    for source, target in spec.merged.items():
        from accelerate.utils import merge_fsdp_weights

        merge_fsdp_weights(source, target)
    dist.barrier()


def _train(spec: FrameworkSpec, rank: int, model: Any, after: Callable[[Any], None]) -> None:
    """Forward and loss of each step; ``after`` has the rest to do."""
    for step in range(spec.steps):
        tokens = _batch(spec.model(), step).chunk(spec.world)[rank]
        after(model(input_ids=tokens, labels=tokens).loss)


def _decay_groups(spec: FrameworkSpec, model: Any) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 10 * spec.lr},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


# ---- accelerate and the Trainer


def _take_fsdp_on_cpu() -> None:
    """What ``AcceleratorState.__init__`` does for every device but the CPU."""
    from accelerate import DistributedType, state

    own = state.AcceleratorState.__init__

    def told(self: Any, *args: Any, **keywords: Any) -> None:
        own(self, *args, **keywords)
        if keywords.get("fsdp_plugin") is not None:
            self.fsdp_plugin = keywords["fsdp_plugin"]
            self.distributed_type = DistributedType.FSDP
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    state.AcceleratorState.__init__ = told


def _accelerate(spec: FrameworkSpec, start: Path, rank: int) -> Run:
    import torch
    import transformers
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    _take_fsdp_on_cpu()
    model = transformers.AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        state_dict_type="SHARDED_STATE_DICT",
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=model._no_split_modules,
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    optimizer = torch.optim.AdamW(_decay_groups(spec, model), lr=spec.lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    model, optimizer = accelerator.prepare(model, optimizer)
    if spec.scheduler:
        scheduler = accelerator.prepare(scheduler)
    if spec.load:
        accelerator.load_state(spec.load)

    def after(loss: Any) -> None:
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    _train(spec, rank, model, after)
    if spec.save:
        accelerator.save_state(spec.save)
    return Run(model, [optimizer.optimizer])


def _trainer(spec: FrameworkSpec, start: Path, rank: int) -> Run:
    import torch
    import transformers

    _take_fsdp_on_cpu()
    model = transformers.AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    tokens = [row for step in range(2) for row in _batch(spec.model(), step)]
    directory = Path(spec.save).parent if spec.save else start / "trainer"
    options = transformers.TrainingArguments(
        output_dir=str(directory),
        use_cpu=True,
        fsdp=True,
        fsdp_config={
            "version": 2,
            "state_dict_type": "SHARDED_STATE_DICT",
            "transformer_layer_cls_to_wrap": model._no_split_modules,
        },
        per_device_train_batch_size=len(tokens) // 2 // spec.world,
        max_steps=2,
        save_steps=2,
        save_strategy="steps" if spec.save else "no",
        learning_rate=spec.lr,
        weight_decay=10 * spec.lr,
        report_to=[],
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = transformers.Trainer(model=model, args=options, train_dataset=data)
    trainer.train(resume_from_checkpoint=spec.load)
    if trainer.state.global_step != 2:
        raise RuntimeError(f"The Trainer is at step {trainer.state.global_step}.")
    return Run(trainer.model_wrapped, [trainer.optimizer.optimizer])


# ---- transformers by itself


def _transformers(spec: FrameworkSpec, start: Path, rank: int) -> Run:
    import torch
    import transformers
    from transformers.distributed import (
        DistributedConfig,
        load_optimizer_distributed,
        save_optimizer_distributed,
    )

    model = transformers.AutoModelForCausalLM.from_pretrained(
        spec.load or start,
        dtype=torch.float32,
        distributed_config=DistributedConfig(fsdp_size=spec.world, ep_size=spec.ep),
    )
    # foreach mixes the meshes of experts and of all else
    optimizer = torch.optim.AdamW(_decay_groups(spec, model), lr=spec.lr, foreach=False)
    if spec.load:
        load_optimizer_distributed(model, optimizer, spec.load)

    def after(loss: Any) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    _train(spec, rank, model, after)
    if spec.save:
        model.save_pretrained(spec.save, distributed_checkpoint=True)
        save_optimizer_distributed(model, optimizer, spec.save)
    return Run(model, [optimizer])


# ---- VeOmni


def _veomni(spec: FrameworkSpec, start: Path, rank: int) -> Run:
    import torch
    import torch.distributed as dist

    torch.cpu.empty_cache = lambda: None
    dist.init_process_group("gloo")
    from veomni.arguments import MixedPrecisionConfig, OpsImplementationConfig
    from veomni.checkpoint import build_checkpointer
    from veomni.distributed.parallel_state import init_parallel_state
    from veomni.distributed.torch_parallelize import build_parallelize_model
    from veomni.models import build_foundation_model
    from veomni.optim import build_optimizer

    state = init_parallel_state(
        dp_size=spec.world, dp_shard_size=spec.world, extra_parallel_sizes=(spec.ep,), dp_mode="fsdp2"
    )
    kernels = {
        item.name: "eager"
        for item in dataclasses.fields(OpsImplementationConfig)
        if item.name.endswith("_implementation") and item.name != "qat_implementation"
    }
    model = build_foundation_model(
        str(start),
        weights_path=str(start),
        torch_dtype="float32",
        init_device="meta",
        ops_implementation=OpsImplementationConfig(**kernels),
    )
    model = build_parallelize_model(
        model,
        weights_path=str(start),
        init_device="meta",
        mixed_precision=MixedPrecisionConfig(enable=False),
        enable_gradient_checkpointing=False,
    )
    group = None
    if spec.ep > 1:
        group = state.extra_parallel_fsdp_device_mesh["ep"]["ep"].get_group()
        for name, module in model.named_modules():
            if name.endswith(".experts"):
                _patch_experts(module, FsdpSpec())
                module.ep_group = group
                module.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM
    optimizer = build_optimizer(
        model, lr=spec.lr, weight_decay=10 * spec.lr, no_decay_params=["norm.weight"]
    )
    checkpointer = build_checkpointer("dcp", "fsdp2")
    if spec.load:
        loaded: dict[str, Any] = {"model": model, "optimizer": optimizer, "extra_state": {}}
        checkpointer.load(spec.load, loaded)
        if loaded["extra_state"]["global_step"] != 2:
            raise RuntimeError(f"VeOmni's extra state is {loaded['extra_state']}.")

    def after(loss: Any) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    _train(spec, rank, model, after)
    if spec.save:
        # as trainer/callbacks/checkpoint_callback.py makes it
        extra = {
            "global_step": spec.steps,
            "lr_scheduler": {"last_epoch": spec.steps},
            "train_dataloader": {"rank": rank},
            "environ_meter": {"consume_tokens": 0},
            "channel_loss_callback": {},
            "torch_rng_state": torch.get_rng_state(),
        }
        checkpointer.save(spec.save, {"model": model, "optimizer": optimizer, "extra_state": extra})

    def whole(name: str, value: Any) -> Any:
        own = _whole(value)
        if group is None or ".mlp.experts." not in name or not own.ndim:
            return own
        parts = [torch.empty_like(own) for _ in range(spec.ep)]
        dist.all_gather(parts, own, group=group)
        return torch.cat(parts)

    return Run(model, list(getattr(optimizer, "optimizers_dict", {"": optimizer}).values()), whole)


FRAMEWORKS: Mapping[str, Callable[[FrameworkSpec, Path, int], Run]] = {
    "accelerate": _accelerate,
    "trainer": _trainer,
    "transformers": _transformers,
    "veomni": _veomni,
}


# ---- the truth


def _gather(run: Run, folder: Path, rank: int) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, dict[str, Any]] = {"weight": _weights(run), "buffers": _buffers(run.model)}
    groups: dict[str, dict[str, Any]] = {}
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            options = {key: value for key, value in group.items() if key != "params"}
            for parameter in group["params"]:
                name = _name_of(run.model, parameter)
                groups[name] = options
                for state, value in optimizer.state[parameter].items():
                    tensors.setdefault(state, {})[name] = run.whole(name, value)
    if rank:
        return
    folder.mkdir(parents=True)
    for state, values in tensors.items():
        if values:
            save_file(values, folder / f"{state}.safetensors")
    (folder / "groups.json").write_text(json.dumps(groups, indent=1) + "\n")


def _name_of(model: Any, wanted: Any) -> str:
    return next(name for name, parameter in model.named_parameters() if parameter is wanted)


def _weights(run: Run) -> dict[str, Any]:
    return {name: run.whole(name, parameter) for name, parameter in run.model.named_parameters()}


def _buffers(model: Any) -> dict[str, Any]:
    persistent = model.state_dict().keys()
    return {name: _whole(buffer) for name, buffer in model.named_buffers() if name in persistent}


def _publish(run: Run, start: Path, target: Path, rank: int) -> None:
    import transformers

    weights = {**_weights(run), **_buffers(run.model)}
    if rank == 0:
        model = transformers.AutoModelForCausalLM.from_pretrained(start, dtype="float32")
        missing, unexpected = model.load_state_dict(weights, strict=False)
        if set(missing) - _tied(model) or unexpected:
            raise RuntimeError(f"Gathered without {missing}, with {unexpected}.")
        model.save_pretrained(target)


def _tied(model: Any) -> Iterable[str]:
    return set(model.all_tied_weights_keys)


if __name__ == "__main__":
    sys.exit(main(os.path.abspath(sys.argv[1])))
