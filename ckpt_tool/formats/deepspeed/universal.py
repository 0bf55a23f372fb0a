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

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from ckpt_tool.canonical import (
    MASTER,
    STEP,
    WEIGHT,
    Checkpoint,
    ExpertName,
    MoELayer,
    ParamGroup,
    Role,
    Scalar,
    Tensor,
    TensorName,
    Topology,
    TrainingState,
)
from ckpt_tool.containers.pickles import Opaque, TensorRecord, opaque
from ckpt_tool.containers.torch_zip import TorchArchive, torch_file
from ckpt_tool.errors import UnreadableError, UsageError
from ckpt_tool.formats.base import TargetOptions
from ckpt_tool.formats.deepspeed.names import expert_parameter, parse_expert
from ckpt_tool.formats.deepspeed.rank_files import ENGINE_KEYS
from ckpt_tool.formats.deepspeed.scalars import saved_scalar, scalar_state
from ckpt_tool.layout import Layout, TargetFile, text_file, whole
from ckpt_tool.storage import Reader

# Stages 1 and 2 look for the first of these, stage 3 for the second; every rank opens the same one.
_MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
_OPTIMIZER_FILE = "zero/optimizer_state.pt"
_LATEST = "latest_universal"
_FILE_OF = {MASTER: "fp32", WEIGHT: "fp32"}  # other states are files of their own name
# Keys of ours, which the loaders skip. A tensor's role; the groups by name, for converting onwards.
_ROLE = "ckpt_tool_role"
_SOURCE = "ckpt_tool_source"
_SCALERS = "deepspeed.runtime.fp16.loss_scaler"
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

    name = "deepspeed-universal"

    # ---- reading

    def recognises(self, reader: Reader) -> bool:
        names = reader.list()
        return "zero" in names and any(name.endswith("model_states.pt") for name in names)

    def read(self, reader: Reader) -> Checkpoint:
        return _read(reader)

    # ---- writing

    def layout(self, checkpoint: Checkpoint, options: TargetOptions) -> Layout:
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
        masters = {tensor.name for tensor in checkpoint.tensors if tensor.state == MASTER}
        left_out = {}
        files: list[TargetFile] = []
        for tensor in checkpoint.tensors:
            if tensor.state == WEIGHT and tensor.name in masters:
                left_out[tensor.label()] = "recomputed from its master when the engine loads"
                continue
            directory = f"{tag}/zero/{_parameter(tensor.name, layers)}"
            file = _FILE_OF.get(tensor.state, tensor.state)
            files.append(torch_file(f"{directory}/{file}.pt", _entry(tensor)))
        for (name, state), scalar in checkpoint.scalars.items():
            directory = f"{tag}/zero/{_parameter(name, layers)}"
            files.append(torch_file(f"{directory}/{state}.pt", saved_scalar(scalar)))
        if any(tensor.state != WEIGHT for tensor in checkpoint.tensors):
            files.append(torch_file(f"{tag}/{_OPTIMIZER_FILE}", self._optimizer(checkpoint, options)))
        model = _model_state(checkpoint)
        files += [torch_file(f"{tag}/{name}", model) for name in _MODEL_FILES]
        files.append(text_file(_LATEST, tag))
        return Layout(tuple(files), checkpoint.tensors, left_out, _notes(checkpoint, options))

    def _optimizer(self, checkpoint: Checkpoint, options: TargetOptions) -> dict[str, Any]:
        groups = checkpoint.training.param_groups
        count = len({tensor.name for tensor in checkpoint.tensors}) + len(groups)
        first = _scheduled(checkpoint)
        kept = [dict(first) for _ in range(count)]
        if options.keep_groups:
            settings = [_settings(group) for group in groups]
            kept[: len(settings)] = settings
            # Stage 3 copies this one over all groups of the run: right only where all are equal.
            first = settings[0] if settings and all(one == settings[0] for one in settings) else {}
        steps = [scalar for (_, state), scalar in checkpoint.scalars.items() if state == STEP]
        state = {0: {STEP: saved_scalar(steps[0])}} if steps else {}
        return {
            "ds_version": checkpoint.training.engine_version or _FALLBACK_VERSION,
            "param_groups": kept,
            "optimizer_state_dict": {"state": state, "param_groups": [first]},
            _SOURCE: self._source(checkpoint),
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
    entry: dict[str, Any] = {"cat_dim": 0, "param": whole(tensor)}
    if isinstance(tensor.name, ExpertName):
        entry |= {"is_expert_param": True, "ep_num_experts": tensor.shape[0]}
    if tensor.role is not Role.PARAMETER:
        entry[_ROLE] = tensor.role.value
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


def _notes(checkpoint: Checkpoint, options: TargetOptions) -> tuple[str, ...]:
    notes = list(checkpoint.notes)
    training = checkpoint.training
    if any(s == STEP and scalar.dtype for (_, s), scalar in checkpoint.scalars.items()):
        notes.append(_INEXACT)
    lost = [str(t.name) for t in checkpoint.tensors if t.role is not Role.PARAMETER]
    if lost:
        listed = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        notes.append(_NOT_RESTORED.format(names=listed))
    if training.per_rank:
        notes.append(
            f"Client state {', '.join(training.per_rank)} differs between ranks and means nothing on "
            "others; it is left out. Your code must do without it after loading."
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
    if options.keep_groups and any(one != settings[0] for one in settings):
        notes.append(
            "--keep-groups: the parameter groups differ in their options. A ZeRO-3 engine would copy the "
            "first over all, so for stage 3 they are left empty and the run keeps its own; stages 1 and 2 "
            "get them by position."
        )
    return tuple(notes)


# ---- reading


def _read(reader: Reader) -> Checkpoint:
    model = _first_archive(reader, _MODEL_FILES)
    optimizer = _first_archive(reader, (_OPTIMIZER_FILE,))
    source = _source_of(model, optimizer)
    present = [name for name in reader.list("zero") if not name.endswith(".pt") and name != "tmp"]
    position = {name: number for number, name in enumerate(source.get("parameters") or ())}
    missing = sorted(position.keys() - set(present))
    if missing:
        raise UnreadableError(
            f"{reader.root}/zero lacks {missing[:5]} ({len(missing)} parameters): the copy is incomplete."
        )
    names = sorted(present, key=lambda name: (position.get(name, len(position)), name))
    shapes = {
        name: tuple(shape)
        for group in (model.root.get("param_shapes") or () if model else ())
        for name, shape in group.items()
    }
    with ThreadPoolExecutor(max_workers=8) as pool:
        parts = list(pool.map(lambda name: _Parameter(reader, name, shapes.get(name)), names))
    aliases = dict(source.get("aliases") or {})
    known = set(names)
    for name in names:
        # stages 1 and 2 of ds_to_universal also write the router under its second name
        target = name.replace(".gate.gate.", ".router.gate.")
        if target != name and target in known:
            aliases[name] = target
    parts = [part for part in parts if part.name not in aliases]
    scalars = {(part.key, state): value for part in parts for state, value in part.scalars.items()}
    shared = _shared_step(optimizer)
    if shared is not None and not scalars:
        scalars = {(part.key, STEP): shared for part in parts if len(part.tensors) > 1}
    layers = {part.layer.layer_path: part.layer for part in parts if part.layer}
    archives = [archive for archive in (model, optimizer) if archive]
    return Checkpoint(
        format=Universal.name,
        root=reader.root,
        dialect="autoep" if layers else "transformers",
        tensors=tuple(tensor for part in parts for tensor in part.tensors),
        files=tuple(archive.source for archive in archives)
        + tuple(source for part in parts for source in part.sources),
        topology=Topology(),
        training=_training(model, source),
        scalars=scalars,
        moe_layers=tuple(layers.values()),
        aliases=aliases,
        module_names=tuple(source.get("module_names") or ()),
    )


def _source_of(model: TorchArchive | None, optimizer: TorchArchive | None) -> Mapping[str, Any]:
    """Our own record of the source; of ds_to_universal's output, the same taken from its copies."""
    if optimizer is not None and _SOURCE in optimizer.root:
        source: Mapping[str, Any] = optimizer.root[_SOURCE]
        return source
    if model is None or "param_shapes" not in model.root:
        return {}
    shapes = [list(group) for group in model.root["param_shapes"]]
    zero = (optimizer.root.get("optimizer_state_dict") or {}) if optimizer else {}
    groups = [
        {**group, "params": [name for index in group["params"] for name in shapes[index]]}
        for group in zero.get("param_groups") or ()
        if all(index < len(shapes) for index in group["params"])
    ]
    return {
        "parameters": [name for group in shapes for name in group],
        "module_names": list(model.root.get("module") or ()),
        "aliases": model.root.get("shared_params") or {},
        "param_groups": groups,
        "ds_config": model.root.get("ds_config") or {},
        "loss_scale": {},
    }


def _first_archive(reader: Reader, paths: tuple[str, ...]) -> TorchArchive | None:
    for path in paths:
        directory, _, name = path.rpartition("/")
        if name in reader.list(directory):
            return TorchArchive(reader, path)
    return None


class _Parameter:
    """One directory: its tensors and scalars."""

    def __init__(self, reader: Reader, name: str, shape: tuple[int, ...] | None) -> None:
        self.name = name
        self._reader = reader
        expert = parse_expert(name)
        self.key: TensorName = expert[1] if expert else name
        self.layer: MoELayer | None = None
        self.tensors: list[Tensor] = []
        self.scalars: dict[str, Scalar] = {}
        self.sources = []
        files = [file for file in reader.list(f"zero/{name}") if file.endswith(".pt")]
        if "fp32.pt" not in files:
            raise UnreadableError(f"{reader.root}/zero/{name} has no fp32.pt: an incomplete checkpoint.")
        for file in sorted(files, key=lambda file: (file != "fp32.pt", file)):
            archive = TorchArchive(reader, f"zero/{name}/{file}")
            self.sources.append(archive.source)
            self._add(archive, file.removesuffix(".pt"), expert is not None, shape)
        if expert and self.layer is None:
            self.layer = MoELayer(expert[1].layer_path, expert[0], self.tensors[0].shape[0])
        self._check(bool(expert))

    def _add(self, archive: TorchArchive, state: str, expert: bool, shape: tuple[int, ...] | None) -> None:
        root = archive.root
        where = f"{self._reader.root}/{archive.path}"
        record = root.get("param") if isinstance(root, dict) else root
        if isinstance(root, int | float) or (isinstance(root, TensorRecord) and not root.shape):
            self.scalars[state] = scalar_state(archive, root)
            return
        if not isinstance(record, TensorRecord):
            raise UnreadableError(f"{where} holds no tensor: not a file of a Universal checkpoint.")
        tensor = replace(archive.tensor(self.name, state, record), name=self.key)
        # ds_to_universal writes dense stage-3 tensors flat; their shape is in the model file
        if shape is not None and not expert and len(tensor.shape) == 1:
            if math.prod(shape) != tensor.numel:
                raise UnreadableError(
                    f"{where} has {tensor.numel} elements; the shape {list(shape)} in the model file "
                    f"needs {math.prod(shape)}."
                )
            tensor = replace(tensor, shape=shape)
        if (
            expert
            and isinstance(root, dict)
            and root.get("ep_num_experts", tensor.shape[0]) != (tensor.shape[0])
        ):
            raise UnreadableError(
                f"{where} has {tensor.shape[0]} experts and says ep_num_experts {root['ep_num_experts']}."
            )
        role = Role(root[_ROLE]) if isinstance(root, dict) and _ROLE in root else Role.PARAMETER
        if state == "fp32":
            state = MASTER if role is Role.PARAMETER else WEIGHT
        self.tensors.append(replace(tensor, state=state, role=role))

    def _check(self, expert: bool) -> None:
        where = f"{self._reader.root}/zero/{self.name}"
        first = self.tensors[0]
        for tensor in self.tensors:
            if tensor.shape != first.shape:
                raise UnreadableError(
                    f"{where}: {tensor.state} has shape {list(tensor.shape)}, {first.state} has "
                    f"{list(first.shape)}."
                )
        if expert and len(first.shape) != 3:
            raise UnreadableError(
                f"{where}: expert tensors are [E, rows, columns]; this is {list(first.shape)}."
            )


def _shared_step(optimizer: TorchArchive | None) -> Scalar | None:
    """The one step of ds_to_universal's stage-3 dialect."""
    if optimizer is None:
        return None
    state = (optimizer.root.get("optimizer_state_dict") or {}).get("state") or {}
    step = (state.get(0) or {}).get("step")
    return scalar_state(optimizer, step) if isinstance(step, TensorRecord | int | float) else None


def _training(model: TorchArchive | None, source: Mapping[str, Any]) -> TrainingState:
    root: Mapping[str, Any] = model.root if model else {}
    groups = []
    for group in source.get("param_groups") or ():
        names: list[TensorName] = []
        for name in group.get("params") or ():
            expert = parse_expert(name)
            names.append(expert[1] if expert else name)
        groups.append(ParamGroup({k: v for k, v in group.items() if k != "params"}, tuple(names)))
    scale = dict(source.get("loss_scale") or {})
    if isinstance(scale.get("loss_scaler"), dict):
        scaler = scale["loss_scaler"]
        scale["loss_scaler"] = opaque(_SCALERS, scaler["name"], state=scaler["state"])
    counters = ("global_steps", "skipped_steps", "global_samples")
    return TrainingState(
        step=root.get("global_steps"),
        counters={key: root[key] for key in counters if key in root},
        param_groups=tuple(groups),
        scheduler=root.get("lr_scheduler"),
        loss_scale=scale,
        client_state={
            key: model.describe(value) for key, value in root.items() if model and key not in ENGINE_KEYS
        },
        config=source.get("ds_config") or {},
        engine_version=root.get("ds_version"),
    )
