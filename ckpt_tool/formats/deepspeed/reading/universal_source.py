"""Reading Universal checkpoints: those written here, and both dialects of DeepSpeed's (stage 3; 1 and 2).

``ds_to_universal`` (deepspeed 0.19.8, checkpoint/ds_to_universal.py) writes dense stage-3 tensors flat and
without a ``step``, keeps buffers and frozen parameters in copies of the model files only, and in stages 1
and 2 gives both of them directories that look like trained parameters. What the loaders do not check is
checked here: that no directory and no state is missing, and that sizes fit.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ckpt_tool.canonical import (
    EXP_AVG,
    MASTER,
    STEP,
    WEIGHT,
    Checkpoint,
    DType,
    MoELayer,
    ParamGroup,
    Role,
    Scalar,
    SourceFile,
    Tensor,
    TensorName,
    TrainingState,
)
from ckpt_tool.containers.pickle_records import TensorRecord, opaque
from ckpt_tool.containers.torch_zip import TorchArchive
from ckpt_tool.errors import UnreadableError
from ckpt_tool.formats.deepspeed.facts.names import parse_expert
from ckpt_tool.formats.deepspeed.facts.partition import Paddings, PartitionRegions, partition_size
from ckpt_tool.formats.deepspeed.facts.scalars import scalar_state
from ckpt_tool.formats.deepspeed.reading.rank_files import ENGINE_KEYS
from ckpt_tool.limits import first_missing
from ckpt_tool.storage import Reader, read_each

FORMAT = "deepspeed-universal"
# Stages 1 and 2 look for the first of these, stage 3 for the second; every rank opens the same one.
MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
OPTIMIZER_FILE = "zero/optimizer_state.pt"
# Keys of ours, which the loaders skip: a tensor's role; what a conversion onwards needs to know.
ROLE = "ckpt_tool_role"
SOURCE = "ckpt_tool_source"
SCALERS = "deepspeed.runtime.fp16.loss_scaler"

_MODEL_COPY = re.compile(r"zero_pp_rank_(\d{1,6})_mp_rank_00_model_states\.pt$")


def read_universal(reader: Reader) -> Checkpoint:
    """The catalogue of the tag directory in ``reader``."""
    model = _archive(reader, MODEL_FILES)
    optimizer = _archive(reader, (OPTIMIZER_FILE,))
    about = _about(model, optimizer)
    parameters = _parameters(reader, about)
    shared = _shared_step(optimizer)
    if shared is not None and not any(one.scalars for one in parameters):
        for one in parameters:
            if len(one.tensors) > 1:
                one.scalars[STEP] = shared
    _check_states(reader, parameters)
    tensors = [tensor for one in parameters for tensor in one.tensors]
    known = {one.name for one in parameters} | set(about.aliases)
    extra_files: list[SourceFile] = []
    partitioned: list[PartitionRegions] = []
    if model is not None and not about.ours:
        tensors += _buffers(model, known)
        frozen, partitioned, extra_files = _frozen(reader, model, known)
        tensors += frozen
    if model is not None and not about.ours:
        # 16-bit weights of stages 1 and 2, whose masters are in directories of their own
        names = {tensor.name for tensor in tensors if tensor.state == WEIGHT}
        module = model.root.get("module") or {}
        model.account_for_tensors([value for name, value in module.items() if name not in names])
    if optimizer is not None:
        # ds_to_universal leaves rank 0's part of the flat optimizer there, which was taken apart
        optimizer.account_for_tensors(optimizer.root)
    layers = {one.layer.layer_path: one.layer for one in parameters if one.layer}
    return Checkpoint(
        format=FORMAT,
        root=reader.root,
        dialect="autoep" if layers else "transformers",
        tensors=tuple(tensors),
        files=tuple(archive.source for archive in (model, optimizer) if archive)
        + tuple(extra_files)
        + tuple(source for one in parameters for source in one.sources),
        training=_training(model, about),
        apart=Paddings(partitioned),
        scalars={(one.key, state): value for one in parameters for state, value in one.scalars.items()},
        moe_layers=tuple(layers.values()),
        aliases=about.aliases,
        module_names=about.module_names,
    )


def _archive(reader: Reader, paths: Iterable[str]) -> TorchArchive | None:
    for path in paths:
        directory, _, name = path.rpartition("/")
        if name in reader.list(directory):
            return TorchArchive(reader, path)
    return None


# ---- what the checkpoint says about the model


@dataclass(frozen=True, slots=True)
class _About:
    """Order, groups and names: from our own record, or from ds_to_universal's copies of rank 0's files.

    ``parameters`` are the names that must have a directory, in order. ``untrained`` are the names that
    have none of their own in stage 3 and one like a trained parameter's in stages 1 and 2.
    ``shapes`` gives dense tensors written flat theirs back.
    """

    ours: bool = False
    parameters: tuple[str, ...] = ()
    untrained: Mapping[str, Role] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    module_names: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    param_groups: tuple[Mapping[str, Any], ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    loss_scale: Mapping[str, Any] = field(default_factory=dict)


def _about(model: TorchArchive | None, optimizer: TorchArchive | None) -> _About:
    if optimizer is not None and SOURCE in optimizer.root:
        return _our_record(optimizer.root[SOURCE])
    if model is None or "param_shapes" not in model.root:
        return _About(ours=True)  # the four counters and nothing else: written for the loaders alone
    root = model.root
    shapes = [list(group) for group in root["param_shapes"]]
    zero = (optimizer.root.get("optimizer_state_dict") or {}) if optimizer else {}
    groups = tuple(
        {**group, "params": [name for index in group["params"] for name in shapes[index]]}
        for group in zero.get("param_groups") or ()
        if all(index < len(shapes) for index in group["params"])
    )
    untrained = dict.fromkeys(root.get("buffer_names") or (), Role.BUFFER)
    untrained |= dict.fromkeys(root.get("frozen_param_shapes") or (), Role.FROZEN)
    names = tuple(root.get("module") or ())
    return _About(
        parameters=tuple(name for group in shapes for name in group),
        untrained=untrained,
        shapes={name: tuple(shape) for group in root["param_shapes"] for name, shape in group.items()},
        module_names=names,
        aliases={**(root.get("shared_params") or {}), **_router_aliases(names)},
        param_groups=groups,
        config=root.get("ds_config") or {},
    )


def _our_record(source: Mapping[str, Any]) -> _About:
    scale = dict(source.get("loss_scale") or {})
    if isinstance(scale.get("loss_scaler"), dict):
        scaler = scale["loss_scaler"]
        scale["loss_scaler"] = opaque(SCALERS, scaler["name"], state=scaler["state"])
    return _About(
        ours=True,
        parameters=tuple(source.get("parameters") or ()),
        module_names=tuple(source.get("module_names") or ()),
        aliases=source.get("aliases") or {},
        param_groups=tuple(source.get("param_groups") or ()),
        config=source.get("ds_config") or {},
        loss_scale=scale,
    )


def _router_aliases(names: Iterable[str]) -> dict[str, str]:
    """AutoEP keeps the router reachable under its old name (moe/auto_ep_layer.py)."""
    known = set(names)
    targets = {name: name.replace(".gate.gate.", ".router.gate.") for name in known}
    return {name: target for name, target in targets.items() if name != target and target in known}


def _training(model: TorchArchive | None, about: _About) -> TrainingState:
    root: Mapping[str, Any] = model.root if model else {}
    groups = []
    for group in about.param_groups:
        names: list[TensorName] = []
        for name in group.get("params") or ():
            expert = parse_expert(name)
            names.append(expert[1] if expert else name)
        options = {key: value for key, value in group.items() if key != "params"}
        groups.append(ParamGroup(options, tuple(names)))
    counters = ("global_steps", "skipped_steps", "global_samples")
    return TrainingState(
        step=root.get("global_steps"),
        counters={key: root[key] for key in counters if key in root},
        param_groups=tuple(groups),
        scheduler=root.get("lr_scheduler"),
        loss_scale=about.loss_scale,
        client_state={
            key: model.carried(value) for key, value in root.items() if model and key not in ENGINE_KEYS
        },
        config=about.config,
        engine_version=root.get("ds_version"),
    )


# ---- one directory per parameter


def _parameters(reader: Reader, about: _About) -> list[_Parameter]:
    present = [name for name in reader.list("zero") if not name.endswith(".pt") and name != "tmp"]
    position = {name: number for number, name in enumerate(about.parameters)}
    missing = sorted(position.keys() - set(present))
    if missing:
        raise UnreadableError(
            f"{reader.root}/zero/{missing[0]} is missing ({len(missing)} parameters in all): the copy is "
            "incomplete. Copy the checkpoint again."
        )
    doubled = sorted(set(about.aliases) & set(present)) if about.ours else []
    if doubled:
        raise UnreadableError(
            f"{reader.root}/zero/{doubled[0]} has values, but is recorded as a further name of "
            f"{about.aliases[doubled[0]]}. Files of another checkpoint are in the directory; remove them."
        )
    names = sorted(
        (name for name in present if name not in about.aliases),
        key=lambda name: (position.get(name, len(position)), name),
    )
    return read_each(lambda name: _Parameter(reader, name, about), names)


class _Parameter:
    """One directory: its tensors and scalars."""

    def __init__(self, reader: Reader, name: str, about: _About) -> None:
        self.name = name
        self._where = f"{reader.root}/zero/{name}"
        self._shape = about.shapes.get(name)
        # stages 1 and 2 copy everything in 'module' that no optimizer state was found for
        trained = about.ours or not about.parameters or name in about.parameters
        self._role = about.untrained.get(name, Role.PARAMETER if trained else Role.FROZEN)
        expert = parse_expert(name)
        self._is_expert = expert is not None
        self.key: TensorName = expert[1] if expert else name
        self.tensors: list[Tensor] = []
        self.scalars: dict[str, Scalar] = {}
        self.sources: list[SourceFile] = []
        self._flags: dict[str, object] = {}
        files = [file for file in reader.list(f"zero/{name}") if file.endswith(".pt")]
        if "fp32.pt" not in files:
            raise UnreadableError(
                f"{self._where}/fp32.pt is missing: the copy is incomplete. Copy the checkpoint again."
            )
        for file in sorted(files, key=lambda file: (file != "fp32.pt", file)):
            archive = TorchArchive(reader, f"zero/{name}/{file}")
            self.sources.append(archive.source)
            self._add(archive, file.removesuffix(".pt"))
        self._check()
        self.layer: MoELayer | None = None
        if expert:
            self.layer = MoELayer(expert[1].layer_path, expert[0], self.tensors[0].shape[0])

    def _add(self, archive: TorchArchive, state: str) -> None:
        root = archive.root
        if isinstance(root, int | float) or (isinstance(root, TensorRecord) and not root.shape):
            self.scalars[state] = scalar_state(archive, root)
            return
        entry = root if isinstance(root, dict) else {"param": root}
        record = entry.get("param")
        if not isinstance(record, TensorRecord):
            raise UnreadableError(
                f"{archive.where} holds no tensor: it is not a file of a Universal checkpoint."
            )
        # The engine's loader goes by this flag of each file (checkpoint/universal_checkpoint.py, 0.19.8).
        self._flags[state] = entry.get("is_expert_param", False)
        tensor = replace(archive.tensor(self.name, state, record), name=self.key)
        if self._shape is not None and not self._is_expert and len(tensor.shape) == 1:
            if math.prod(self._shape) != tensor.numel:
                raise UnreadableError(
                    f"{archive.where} has {tensor.numel} elements; the shape {list(self._shape)} in the "
                    f"model file needs {math.prod(self._shape)}. They are not of the same conversion."
                )
            tensor = replace(tensor, shape=self._shape)
        experts = entry.get("ep_num_experts", tensor.shape[0])
        if self._is_expert and experts != tensor.shape[0]:
            raise UnreadableError(
                f"{archive.where} has {tensor.shape[0]} experts and says ep_num_experts {experts}."
            )
        if ROLE in entry:
            self._role = Role(entry[ROLE])
        if state == "fp32":
            trained = self._role is Role.PARAMETER and tensor.dtype is DType.float32
            state = MASTER if trained else WEIGHT
        self.tensors.append(replace(tensor, state=state, role=self._role))

    def _check(self) -> None:
        first = self.tensors[0]
        said = self._flags["fp32"]
        for state, flag in self._flags.items():
            if flag is not said or (flag and not self._is_expert):
                raise UnreadableError(
                    f"{self._where}/{state}.pt has is_expert_param {flag!r}, "
                    + (f"fp32.pt {said!r}" if flag is not said else "and this is no parameter of experts")
                    + ": the loader would cut them differently. Convert the original checkpoint again."
                )
        if first.state == WEIGHT and first.role is Role.PARAMETER and len(self.tensors) > 1:
            raise UnreadableError(
                f"{self._where}/fp32.pt is {first.dtype}, beside optimizer states: it is no master copy, "
                "and training on from it would lose precision. Convert the original checkpoint again."
            )
        for tensor in self.tensors:
            if tensor.shape != first.shape:
                raise UnreadableError(
                    f"{self._where}/{tensor.state}.pt has shape {list(tensor.shape)}, fp32.pt has "
                    f"{list(first.shape)}. The files are not of the same conversion."
                )
        if self._is_expert and len(first.shape) != 3:
            raise UnreadableError(
                f"{self._where}: expert tensors are [E, rows, columns]; this is {list(first.shape)}."
            )

    @property
    def states(self) -> set[str]:
        return {tensor.state for tensor in self.tensors} | set(self.scalars)


def _check_states(reader: Reader, parameters: list[_Parameter]) -> None:
    """Trained parameters all have the same states: what one lacks was lost."""
    trained = [one for one in parameters if one.tensors[0].role is Role.PARAMETER]
    every = set().union(*(one.states for one in trained))
    for one in trained:
        lacking = sorted(every - one.states)
        if lacking:
            raise UnreadableError(
                f"{reader.root}/zero/{one.name}/{lacking[0]}.pt is missing; other parameters have it. The "
                "copy is incomplete. Copy the checkpoint again."
            )
    if EXP_AVG in every and STEP not in every:
        raise UnreadableError(
            f"{reader.root}/{OPTIMIZER_FILE} is missing or has no step, and the parameters' directories "
            "have none either. Copy the checkpoint again."
        )


def _shared_step(optimizer: TorchArchive | None) -> Scalar | None:
    """The one step of ds_to_universal's stage-3 dialect."""
    if optimizer is None:
        return None
    state = (optimizer.root.get("optimizer_state_dict") or {}).get("state") or {}
    step = (state.get(0) or {}).get("step")
    return scalar_state(optimizer, step) if isinstance(step, TensorRecord | int | float) else None


# ---- what ds_to_universal leaves in its copies of the model files


def _buffers(model: TorchArchive, known: set[str]) -> list[Tensor]:
    return [
        replace(model.tensor(name, WEIGHT, record), role=Role.BUFFER)
        for name, record in (model.root.get("module") or {}).items()
        if isinstance(record, TensorRecord)
        and name not in known
        and (record.numel or name in (model.root.get("buffer_names") or ()))
    ]


def _frozen(
    reader: Reader, model: TorchArchive, known: set[str]
) -> tuple[list[Tensor], list[PartitionRegions], list[SourceFile]]:
    """Frozen parameters from their fragments in all ranks' model files (ZeRO-3).

    Returns:
        The parameters, their partitions (for the padding in them), and the further ranks' files.
    """
    shapes = {
        name: tuple(shape)
        for name, shape in (model.root.get("frozen_param_shapes") or {}).items()
        if name not in known
    }
    if not shapes:
        return [], [], []
    found = {int(match[1]): match[0] for match in map(_MODEL_COPY.match, reader.list()) if match}
    world = model.root["dp_world_size"]
    if world != len(found) or first_missing(found, len(found)) is not None:
        raise UnreadableError(
            f"{reader.root} holds the frozen parameters {sorted(shapes)[:3]} in pieces, in the model files "
            f"of {world} ranks; there are files of ranks {sorted(found)}. Copy the files of all ranks."
        )
    archives = [TorchArchive(reader, found[rank]) for rank in range(world)]
    tensors = []
    partitioned = []
    for name, shape in shapes.items():
        records = [archive.root["frozen_param_fragments"][name] for archive in archives]
        numel = math.prod(shape)
        if {(record.numel, record.dtype) for record in records} != {
            (partition_size(numel, world), records[0].dtype)
        }:
            raise UnreadableError(
                f"{reader.root}: the pieces of the frozen parameter {name} are not those of {numel} "
                f"elements cut over {world} ranks. The files are not of the same save."
            )
        offsets = [
            archive.offset_of(record) if record.numel else 0
            for archive, record in zip(archives, records, strict=True)
        ]
        regions = PartitionRegions(
            numel,
            tuple(archive.path for archive in archives),
            array("q", offsets),
            0,
            records[0].dtype.itemsize,
        )
        partitioned.append(regions)
        tensors.append(Tensor(name, WEIGHT, shape, records[0].dtype, regions, Role.FROZEN))
    return tensors, partitioned, [archive.source for archive in archives[1:]]
