"""The objects in rank 0's files: those of the source, of a template, or made from what is known.

A source that is ZeRO-3 itself has them. For any other, they are made as deepspeed 0.19.8 saves them
(runtime/engine.py ``_save_checkpoint``, runtime/zero/stage3.py ``_rigid_state_dict``), in its key order.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ckpt_tool.canonical import Checkpoint, DType, ExpertName, Role, Tensor
from ckpt_tool.containers.pickle_records import TorchSize, map_containers, opaque
from ckpt_tool.containers.torch_zip import Inline
from ckpt_tool.errors import MismatchError, UsageError
from ckpt_tool.formats.deepspeed.facts.names import AUTOEP_OF, expert_parameter
from ckpt_tool.formats.deepspeed.facts.target_options import ZeroOptions
from ckpt_tool.formats.deepspeed.reading.rank_files import ENGINE_KEYS, SavedObjects

VERSION = "0.19.8"


def saved_objects(checkpoint: Checkpoint, options: ZeroOptions) -> SavedObjects:
    """What the target's files are modelled on."""
    if options.like is not None:
        if options.like.topology.world_size is None:
            raise UsageError(
                f"--like {options.like.root} is {options.like.format}, which is the layout of no run's "
                "ranks; a ZeRO-3 checkpoint is needed (or ZeRO-1 or 2)."
            )
        template = options.like.layout_hint
        if isinstance(template, SavedObjects):
            return _with_progress(template, checkpoint)
        return _made(_modelled_on(checkpoint, options.like), options)
    saved = checkpoint.layout_hint
    if isinstance(saved, SavedObjects):
        module = _with_buffers(saved.model["module"], checkpoint)
        return SavedObjects({**saved.model, "module": module}, saved.optimizer, saved.bf16)
    return _made(checkpoint, options)


def as_template_says(checkpoint: Checkpoint, options: ZeroOptions) -> Checkpoint:
    """The source with the second names that the template's parameters have, such as a router's ``gate``.

    Raises:
        MismatchError: the template is of another model.
    """
    template = options.like
    if template is None:
        return checkpoint
    shapes = {tensor.name: tensor.shape for tensor in template.values()}
    own = {tensor.name for tensor in checkpoint.values()}
    for tensor in checkpoint.values():
        expected = shapes.get(tensor.name, tensor.shape)
        if tensor.shape != expected:
            raise MismatchError(
                f"--like {template.root} is of another model: {tensor.name} has shape {list(expected)} "
                f"there and {list(tensor.shape)} in {checkpoint.root}. Pass a template saved by the same "
                "model."
            )
    aliases = {alias: name for alias, name in template.aliases.items() if name in own and alias not in own}
    return replace(checkpoint, aliases={**aliases, **checkpoint.aliases})


def compute_dtype(config: Mapping[str, Any]) -> DType:
    """The precision that an engine with this config computes in."""
    if _enabled(config, "bf16") or _enabled(config, "bfloat16"):
        return DType.bfloat16
    return DType.float16 if _enabled(config, "fp16") else DType.float32


def shape_type(saved: SavedObjects) -> Callable[[tuple[int, ...]], Any]:
    """``param_shapes`` holds torch.Size without MoE layers, and tuples with them."""
    for group in saved.model["param_shapes"]:
        for shape in group.values():
            return TorchSize if isinstance(shape, TorchSize) else tuple
    return tuple


def _modelled_on(checkpoint: Checkpoint, template: Checkpoint) -> Checkpoint:
    """The source with the module tree, names and config of a template of another stage.

    Raises:
        UsageError: the template does not record its module tree.
    """
    if not template.module_names:
        raise UsageError(
            f"--like {template.root} ({template.format}) does not say in which order the model has its "
            "parameters. Pass a checkpoint that DeepSpeed saved."
        )
    training = replace(checkpoint.training, config=template.training.config)
    return replace(
        checkpoint, module_names=template.module_names, aliases=template.aliases, training=training
    )


def _with_progress(template: SavedObjects, checkpoint: Checkpoint) -> SavedObjects:
    """A template's objects with the source's counters, scheduler, buffers and client state in them.

    Raises:
        MismatchError: the template holds a tensor that the source has no values for.
    """
    training = checkpoint.training
    model = {key: value for key, value in template.model.items() if key in ENGINE_KEYS}
    model |= dict(training.client_state) | dict(training.counters)
    if training.scheduler is not None and model.get("lr_scheduler") is not None:
        model["lr_scheduler"] = training.scheduler
    model["module"] = _with_buffers(model["module"], checkpoint)
    model["frozen_param_fragments"] = OrderedDict()  # cut anew for every rank
    zero = dict(template.optimizer["optimizer_state_dict"]) | dict(training.loss_scale)
    zero["fp32_flat_groups"] = []
    if "optimizer_state_dict" in zero:
        zero["optimizer_state_dict"] = {**zero["optimizer_state_dict"], "state": {}}
    optimizer = {**template.optimizer, "optimizer_state_dict": zero}
    own = {id(tensor) for tensor in checkpoint.tensors} | set(_tensors(training.client_state))
    for part in (model, optimizer):
        foreign = [tensor for key, tensor in _tensors(part).items() if key not in own and tensor.numel]
        if foreign:
            raise MismatchError(
                f"The template holds {foreign[0].name} of shape {list(foreign[0].shape)}, which the source "
                "has no values for. Pass a template saved by the same model."
            )
    return SavedObjects(model, optimizer, template.bf16)


def _tensors(value: Any) -> dict[int, Tensor]:
    """All tensors inside a value, by identity."""
    found: dict[int, Tensor] = {}

    def visit(item: Any) -> Any:
        if isinstance(item, Tensor):
            found[id(item)] = item
            return item
        return map_containers(item, visit)

    visit(dict(value))
    return found


def _with_buffers(module: Mapping[str, Any], checkpoint: Checkpoint) -> OrderedDict[str, Any]:
    """The module with the checkpoint's buffers in it, also under their further names."""
    buffers = {tensor.name: tensor for tensor in checkpoint.values() if tensor.role is Role.BUFFER}
    return OrderedDict(
        (name, buffers.get(checkpoint.aliases.get(name, name), value)) for name, value in module.items()
    )


def _made(checkpoint: Checkpoint, options: ZeroOptions) -> SavedObjects:
    training = checkpoint.training
    if not checkpoint.module_names:
        raise UsageError(
            f"A {checkpoint.format} source does not say in which order the model has its parameters, and a "
            "wrong order would load without an error. Pass --like with a checkpoint that the target run "
            "saved itself (at step 0, say)."
        )
    config = options.ds_config if options.ds_config is not None else training.config
    version = training.engine_version or VERSION
    has_experts = bool(checkpoint.moe_layers)
    model: dict[str, Any] = {
        "module": _module(checkpoint, compute_dtype(config)),
        "buffer_names": [t.name for t in checkpoint.tensors if t.role is Role.BUFFER],
        "optimizer": None,
        "param_shapes": [OrderedDict({"": () if has_experts else TorchSize(())})],
        "frozen_param_shapes": OrderedDict(
            (t.name, t.shape if has_experts else TorchSize(t.shape))
            for t in checkpoint.tensors
            if t.role is Role.FROZEN
        ),
        "shared_params": _tied(checkpoint),
        "frozen_param_fragments": OrderedDict(),
        "lr_scheduler": training.scheduler,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": training.counters.get("skipped_steps", 0),
        "global_steps": training.step or 0,
        "global_samples": training.counters.get("global_samples", 0),
        "dp_world_size": 0,
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": dict(config),
        "ds_version": version,
    }
    if has_experts:
        layers: list[Any] = []
        model["num_experts"] = [layer.num_experts for layer in checkpoint.moe_layers]
        model["ds_autoep_layers"] = layers
        model["universal_checkpoint_info"] = {
            "universal_checkpoint_version": 0.4,
            "expert_parameter_patterns": [r".*\.experts\.w[123]$"],
            "ds_autoep_layers": layers,
        }
    model |= dict(training.client_state)
    bf16 = compute_dtype(config) is DType.bfloat16
    return SavedObjects(model, _optimizer(checkpoint, config, version), bf16)


def _module(checkpoint: Checkpoint, compute: DType) -> OrderedDict[str, Any]:
    """Placeholders of no elements for parameters, buffers in full, no experts."""
    layers = {layer.layer_path: layer for layer in checkpoint.moe_layers}
    experts = {
        expert_parameter(ExpertName(path, projection), layers)
        for path in layers
        for projection in AUTOEP_OF
    }
    values = {tensor.name: tensor for tensor in checkpoint.values()}
    module: OrderedDict[str, Any] = OrderedDict()
    for name in checkpoint.module_names:
        tensor = values.get(checkpoint.aliases.get(name, name))
        if name in experts:
            continue
        buffer = tensor is not None and tensor.role is Role.BUFFER
        module[name] = tensor if buffer else Inline(b"", (0,), compute)
    return module


def _tied(checkpoint: Checkpoint) -> dict[str, str]:
    """Tied weights, without the router's second name, which the engine does not list."""
    blocks = tuple(f"{layer.module}." for layer in checkpoint.moe_layers)
    return {alias: name for alias, name in checkpoint.aliases.items() if not alias.startswith(blocks)}


def _optimizer(checkpoint: Checkpoint, config: Mapping[str, Any], version: str) -> dict[str, Any]:
    scale = dict(checkpoint.training.loss_scale)
    if "loss_scaler" not in scale:
        if _enabled(config, "fp16"):
            raise UsageError(
                "An fp16 run needs its dynamic loss scale, which the source does not hold. Pass --like "
                "with a checkpoint that the target run saved itself."
            )
        scale = {
            "loss_scaler": opaque(
                "deepspeed.runtime.fp16.loss_scaler",
                "LossScaler",
                state={"cur_scale": 1.0, "dynamic": False},
            ),
            "dynamic_loss_scale": False,
            "overflow": False,
        }
    zero: dict[str, Any] = {
        "zero_stage": opaque("deepspeed.runtime.zero.config", "ZeroStageEnum", 3),
        "loss_scaler": scale["loss_scaler"],
        "dynamic_loss_scale": scale["dynamic_loss_scale"],
        "overflow": scale.get("overflow", False),
        "partition_count": 0,
    }
    if checkpoint.moe_layers:
        zero["ds_zero_partition_groups"] = []
    zero["optimizer_state_dict"] = {"state": {}, "param_groups": []}
    zero["fp32_flat_groups"] = []
    return {"optimizer_state_dict": zero, "ds_config": dict(config), "ds_version": version}


def _enabled(config: Mapping[str, Any], precision: str) -> bool:
    section = config.get(precision)
    return bool(section.get("enabled")) if isinstance(section, Mapping) else False
