"""DeepSpeed Universal checkpoints: one directory per parameter, whole tensors, no ranks.

What the engine's loaders need was measured with deepspeed 0.19.8 (runtime/zero/stage3.py
``load_hp_checkpoint_state_from_checkpoint_dir_stage3``; runtime/base_optimizer.py
``load_hp_checkpoint_state_from_checkpoint_dir`` for stages 1 and 2; checkpoint/universal_checkpoint.py).
The directory written here is better than ``ds_to_universal``'s where those loaders allow:

* it loads in ZeRO stages 1, 2 and 3: both names of the model file, dense tensors as dicts, a ``step``
  per parameter;
* its parameter groups are empty, so that the target run keeps its own lr, decay and names (with a
  scheduler they hold the lr it has set for the next step); there are as many as parameters, because
  stages 1 and 2 stop silently at the shorter of the two lists;
* it holds no rank's shard, no DeepSpeed class, and nothing that differs between ranks.
"""

from __future__ import annotations

from typing import Any

from ckpt_tool.canonical import (
    MASTER,
    STEP,
    WEIGHT,
    Checkpoint,
    DType,
    ExpertName,
    MoELayer,
    ParamGroup,
    Role,
    Tensor,
    TensorName,
    same,
)
from ckpt_tool.containers.pickle_records import Opaque
from ckpt_tool.containers.torch_zip import torch_file
from ckpt_tool.errors import UsageError
from ckpt_tool.formats.base import Prepared, Request
from ckpt_tool.formats.deepspeed.facts.names import expert_parameter
from ckpt_tool.formats.deepspeed.facts.scalars import saved_scalar
from ckpt_tool.formats.deepspeed.facts.target_options import UniversalOptions
from ckpt_tool.formats.deepspeed.reading.universal_source import (
    FORMAT,
    MODEL_FILES,
    OPTIMIZER_FILE,
    ROLE,
    SOURCE,
    read_universal,
)
from ckpt_tool.formats.deepspeed.writing.engine_plan import loading, optimizer_state, shadowed_weights
from ckpt_tool.formats.deepspeed.writing.preparing import prepare_universal
from ckpt_tool.formats.deepspeed.writing.universal_states import refuse_uneven_states
from ckpt_tool.layout import Layout, TargetFile, text_file, whole
from ckpt_tool.storage import Reader

_LATEST = "latest_universal"
_FILE_OF = {MASTER: "fp32", WEIGHT: "fp32"}  # other states are files of their own name
# Stages 1 and 2 insist on a version; any from 0.3.17 on does.
_FALLBACK_VERSION = "0.19.8"

_INEXACT = (
    "DeepSpeed's Universal load into ZeRO-3 is not exact with torch's Adam and AdamW: one `step` is shared "
    "by all sub-groups and counted up once per sub-group. `ckpt-tool reshard` writes checkpoints that "
    "resume exactly."
)
_NOT_RESTORED = (
    "DeepSpeed's Universal load does not restore frozen parameters and buffers ({names}): they are in the "
    "directory, but the engine keeps what the model was built with. `ckpt-tool reshard` restores them."
)


class Universal:
    """The format as the registry knows it: read in DeepSpeed's dialects and ours, written in ours."""

    name = FORMAT

    # ---- reading

    def recognises(self, reader: Reader) -> bool:
        names = reader.list()
        return "zero" in names and any(name.endswith("model_states.pt") for name in names)

    def read(self, reader: Reader) -> Checkpoint:
        return read_universal(reader)

    # ---- writing

    def prepare(self, request: Request) -> Prepared[UniversalOptions]:
        return prepare_universal(request)

    def layout(self, checkpoint: Checkpoint, options: UniversalOptions) -> Layout:
        """One directory per parameter below ``<tag>/zero``, and the three files the loaders ask for."""
        if options.dtype is not None:
            raise UsageError(
                "A Universal checkpoint keeps masters and moments as they are; --dtype does not apply. "
                "`ckpt-tool consolidate --dtype` writes weights in another precision."
            )
        if checkpoint.dialect == "hub":
            raise UsageError(
                "A Universal checkpoint needs the names of the training run's modules; this source has "
                "published names. Convert from a training checkpoint."
            )
        tag = f"global_step{checkpoint.training.step or 0}_universal"
        layers = {layer.layer_path: layer for layer in checkpoint.moe_layers}
        left = shadowed_weights(checkpoint) + (optimizer_state(checkpoint) if options.weights_only else ())
        no_place = {one.label for one in left}
        refuse_uneven_states(checkpoint, no_place, weights_only=options.weights_only)
        files: list[TargetFile] = []
        for tensor in checkpoint.tensors:
            if tensor.label() in no_place:
                continue
            directory = f"{tag}/zero/{_parameter(tensor.name, layers)}"
            file = _FILE_OF.get(tensor.state, tensor.state)
            files.append(torch_file(f"{directory}/{file}.pt", _entry(tensor)))
        for (name, state), scalar in () if options.weights_only else checkpoint.scalars.items():
            directory = f"{tag}/zero/{_parameter(name, layers)}"
            files.append(torch_file(f"{directory}/{state}.pt", saved_scalar(scalar)))
        if not options.weights_only and any(t.state != WEIGHT for t in checkpoint.tensors):
            files.append(torch_file(f"{tag}/{OPTIMIZER_FILE}", self._optimizer(checkpoint, options)))
        model = _model_state(checkpoint)
        files += [torch_file(f"{tag}/{name}", model) for name in MODEL_FILES]
        files.append(text_file(_LATEST, tag))
        line = loading(checkpoint, weights_only=options.weights_only)
        line = f'"checkpoint": {{"load_universal": true}} in the DeepSpeed config, then {line}'
        return Layout(tuple(files), left, _notes(checkpoint, options), loading=line)

    def _optimizer(self, checkpoint: Checkpoint, options: UniversalOptions) -> dict[str, Any]:
        groups = checkpoint.training.param_groups
        count = len({tensor.name for tensor in checkpoint.tensors}) + len(groups)
        first = _scheduled(checkpoint)
        kept = [dict(first) for _ in range(count)]
        if options.keep_groups:
            settings = [_settings(group) for group in groups]
            kept[: len(settings)] = settings
            # Stage 3 copies this one over all groups of the run: right only where all are equal.
            first = settings[0] if settings and all(same(one, settings[0]) for one in settings) else {}
        steps = [scalar for (_, state), scalar in checkpoint.scalars.items() if state == STEP]
        state = {0: {STEP: saved_scalar(steps[0])}} if steps else {}
        return {
            "ds_version": checkpoint.training.engine_version or _FALLBACK_VERSION,
            "param_groups": kept,
            "optimizer_state_dict": {"state": state, "param_groups": [first]},
            SOURCE: self._source(checkpoint),
        }

    def _source(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """What the loaders have no use for and a conversion onwards has: order, groups, config, scale."""
        layers = {layer.layer_path: layer for layer in checkpoint.moe_layers}
        scale = dict(checkpoint.training.loss_scale)
        scaler = scale.get("loss_scaler")
        if isinstance(scaler, Opaque):
            scale["loss_scaler"] = {"name": scaler.qualname, "state": scaler.state}
        names = dict.fromkeys(_parameter(tensor.name, layers) for tensor in checkpoint.tensors)
        return {
            "parameters": list(names),
            "module_names": list(checkpoint.module_names),
            "aliases": dict(checkpoint.aliases),
            "param_groups": [
                {**group.options, "params": [_parameter(name, layers) for name in group.parameters]}
                for group in checkpoint.training.param_groups
            ],
            "ds_config": checkpoint.training.config,
            "loss_scale": scale,
        }


def _scheduled(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a scheduler has set for the next step, where it is one value for all groups.

    A scheduler's ``load_state_dict`` restores its counter only; it sets lr and betas after the next
    step, which is made with what stands in the groups (runtime/lr_schedules.py).
    """
    if checkpoint.training.scheduler is None:
        return {}
    groups = [group.options for group in checkpoint.training.param_groups]
    return {
        key: groups[0][key]
        for key in ("lr", "betas")
        if groups and all(key in group and group[key] == groups[0].get(key) for group in groups)
    }


def _settings(group: ParamGroup) -> dict[str, Any]:
    """A group's options without its name, which says the source's EP size (``ep_size_4``)."""
    return {key: value for key, value in group.options.items() if key != "name"}


def _parameter(name: TensorName, layers: dict[str, MoELayer]) -> str:
    return expert_parameter(name, layers) if isinstance(name, ExpertName) else name


def _entry(tensor: Tensor) -> dict[str, Any]:
    widened = tensor.state == WEIGHT and tensor.role is Role.PARAMETER
    entry: dict[str, Any] = {
        "cat_dim": 0,
        "param": whole(tensor, DType.float32 if widened else None),
    }
    if isinstance(tensor.name, ExpertName):
        entry |= {"is_expert_param": True, "ep_num_experts": tensor.shape[0]}
    if tensor.role is not Role.PARAMETER:
        entry[ROLE] = tensor.role.value
    return entry


def _model_state(checkpoint: Checkpoint) -> dict[str, Any]:
    training = checkpoint.training
    state: dict[str, Any] = {
        "dp_world_size": 1,
        "mp_world_size": 1,
        "global_steps": training.step or 0,
        "skipped_steps": 0,
        **training.counters,
        "lr_scheduler": training.scheduler,
        "ds_version": training.engine_version or _FALLBACK_VERSION,
    }
    return {**state, **training.client_state}


def _notes(checkpoint: Checkpoint, options: UniversalOptions) -> tuple[str, ...]:
    notes = list(checkpoint.notes)
    training = checkpoint.training
    if all(tensor.state == WEIGHT for tensor in checkpoint.tensors):
        notes.append(
            "There is no optimizer state: load with load_checkpoint(..., load_module_only=True, "
            "load_optimizer_states=False)."
        )
    if any(s == STEP and scalar.dtype for (_, s), scalar in checkpoint.scalars.items()):
        notes.append(_INEXACT)
    lost = [str(t.name) for t in checkpoint.tensors if t.role is not Role.PARAMETER]
    if lost:
        listed = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        notes.append(_NOT_RESTORED.format(names=listed))
    if training.per_rank:
        notes.append(
            f"Client state {', '.join(map(str, training.per_rank))} differs between ranks and means "
            "nothing on others; it is left out. Your code must do without it after loading."
        )
    if training.loss_scale.get("dynamic_loss_scale"):
        notes.append(
            "The dynamic loss scale is left out (a DeepSpeed object): the target run starts from its own."
        )
    if training.scheduler is not None and not options.keep_groups and not _scheduled(checkpoint):
        notes.append(
            "The parameter groups have no lr in common, so none is written: the first step after loading "
            "uses the lr the target run starts with; its scheduler sets it from the second step on."
        )
    settings = [_settings(group) for group in training.param_groups]
    if options.keep_groups and not all(same(one, settings[0]) for one in settings):
        notes.append(
            "--keep-groups: the parameter groups differ in their options. A ZeRO-3 engine would copy the "
            "first over all, so for stage 3 they are left empty and the run keeps its own; stages 1 and 2 "
            "get them by position."
        )
    return tuple(notes)
