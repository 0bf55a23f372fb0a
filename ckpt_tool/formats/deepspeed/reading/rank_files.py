"""The files that each rank of a ZeRO-3 run saves, and what each of them says.

Names and keys: deepspeed 0.19.8, runtime/engine.py (``_get_zero_ckpt_name``, ``_save_checkpoint``)
and runtime/zero/stage3.py (``_rigid_state_dict``). Only metadata is read; tensors are described by
where they lie.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ckpt_tool.canonical import DType, Scalar, SourceFile, Tensor
from ckpt_tool.containers.pickle_records import Opaque, TensorRecord
from ckpt_tool.containers.torch_zip import TorchArchive
from ckpt_tool.errors import UnreadableError
from ckpt_tool.formats.deepspeed.facts.file_names import MODEL, OPTIMIZER, files_by_rank, require_all
from ckpt_tool.formats.deepspeed.facts.scalars import scalar_state
from ckpt_tool.storage import Reader, read_each

# Keys the engine itself puts into a model_states file; all others are the user's client_state.
ENGINE_KEYS = frozenset(
    [
        "module",
        "buffer_names",
        "optimizer",
        "param_shapes",
        "frozen_param_shapes",
        "frozen_param_fragments",
        "shared_params",
        "lr_scheduler",
        "data_sampler",
        "random_ltd",
        "sparse_tensor_module_names",
        "skipped_steps",
        "global_steps",
        "global_samples",
        "dp_world_size",
        "mp_world_size",
        "checkpoint_parallel_dimensions",
        "ds_config",
        "ds_version",
        "num_experts",
        "ds_autoep_layers",
        "autoep_layers",
        "universal_checkpoint_info",
    ]
)

LAYER_KEYS = ("ds_autoep_layers", "autoep_layers")

Shapes = tuple[tuple[tuple[str, tuple[int, ...]], ...], ...]


@dataclass(frozen=True, slots=True)
class FlatState:
    """One per-element state of one sub-group on one rank: ``numel`` elements from byte ``offset``."""

    offset: int
    numel: int
    dtype: DType


@dataclass(frozen=True, slots=True)
class SavedObjects:
    """What rank 0 saved, its tensors described: to write the like again with every key in its place.

    ``model`` and ``optimizer`` are the objects of its two files; ``bf16`` says that the optimizer's file
    name has the prefix of a bf16 engine.
    """

    model: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    bf16: bool


@dataclass(slots=True)
class RankFiles:
    """What the two files of one rank say.

    ``shapes`` are the sub-groups: per sub-group the parameters in order with their full (for experts:
    EP-local) shapes. ``states[i]`` maps a state of sub-group i to its flat buffer, ``scalars[i]`` to
    its value. ``engine`` and ``client`` are the remaining keys of the model file; tensors in
    ``client`` are ``Tensor``. ``client_digests`` compare client values across ranks by content.
    ``saved`` is kept of rank 0 only.
    """

    rank: int
    model_file: str
    optim_file: str
    sources: tuple[SourceFile, SourceFile]
    shapes: Shapes
    frozen_shapes: Mapping[str, tuple[int, ...]]
    frozen: Mapping[str, FlatState]
    buffers: Mapping[str, Tensor]
    buffer_crcs: Mapping[str, int]
    module_names: tuple[str, ...]
    engine: Mapping[str, Any]
    client: Mapping[str, Any]
    client_digests: Mapping[str, str]
    notes: tuple[str, ...]
    states: list[dict[str, FlatState]] = field(default_factory=list)
    scalars: list[dict[str, Scalar]] = field(default_factory=list)
    partition_groups: list[Mapping[str, Any]] | None = None
    partition_count: Any = None
    param_groups: list[Mapping[str, Any]] = field(default_factory=list)
    loss_scale: Mapping[str, Any] = field(default_factory=dict)
    optimizer_digest: str = ""
    zero_stage: int = 3
    saved: SavedObjects | None = None


def file_names(reader: Reader) -> list[tuple[str, str]]:
    """(model file, optimizer file) of every rank, by rank.

    Raises:
        UnreadableError: a rank's file is missing, or the files are of a kind that is not read.
    """
    model, optim = files_by_rank(reader, MODEL), files_by_rank(reader, OPTIMIZER)
    world = 1 + max([*model, *optim])
    prefix = "bf16_" if any(name.startswith("bf16_") for name in optim.values()) else ""
    return list(
        zip(
            require_all(reader, model, world, "zero_pp_rank_{rank}_mp_rank_00_model_states.pt"),
            require_all(reader, optim, world, f"{prefix}zero_pp_rank_{{rank}}_mp_rank_00_optim_states.pt"),
            strict=True,
        )
    )


def read_ranks(reader: Reader, names: list[tuple[str, str]]) -> list[RankFiles]:
    """Read the metadata of all ranks, several files at a time; what ranks say alike is kept once."""
    shared: dict[Any, Any] = {}
    collecting = gc.isenabled()
    gc.disable()  # millions of small objects are made and none of them in cycles
    try:
        return read_each(
            lambda item: _read_rank(reader, item[0], item[1][0], item[1][1], shared), enumerate(names)
        )
    finally:
        if collecting:
            gc.enable()


def _read_rank(
    reader: Reader, rank: int, model_name: str, optim_name: str, shared: dict[Any, Any]
) -> RankFiles:
    model, optim = TorchArchive(reader, model_name), TorchArchive(reader, optim_name)
    with _naming(model):
        files = _read_model(reader, model, rank, optim_name)
    with _naming(optim):
        _read_optim(reader, optim, files)
    files.sources = (model.source, optim.source)
    files.shapes = shared.setdefault(files.shapes, files.shapes)
    files.module_names = shared.setdefault(files.module_names, files.module_names)
    if rank > 0:
        files.engine = {
            key: _slim(value, shared) if key in LAYER_KEYS else value
            for key, value in files.engine.items()
            if key not in ("universal_checkpoint_info", "ds_config")
        }
    if rank == 0:
        left_out = set(model.root) - ENGINE_KEYS - set(files.client)
        files.saved = SavedObjects(
            {
                key: files.client[key] if key in files.client else model.describe(value)
                for key, value in model.root.items()
                if key not in left_out
            },
            optim.describe(optim.root),
            optim_name.startswith("bf16_"),
        )
    return files


def _slim(entries: Any, shared: dict[Any, Any]) -> Any:
    """Layer entries without their affine maps, which repeat the placement, and with one copy of that."""
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return entries
    slim = []
    for entry in entries:
        kept = {key: value for key, value in entry.items() if key != "affine_maps"}
        if "expert_placement" in kept:
            placement = kept["expert_placement"]
            kept["expert_placement"] = shared.setdefault(repr(placement), placement)
        slim.append(kept)
    return slim


@contextlib.contextmanager
def _naming(archive: TorchArchive) -> Iterator[None]:
    """Whatever was not foreseen in damaged metadata is said of the file it is in."""
    try:
        yield
    except (TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
        raise UnreadableError(
            f"{archive.where}: its metadata is malformed ({type(error).__name__}: {error}). Copy the file "
            "again from where it was saved."
        ) from error


def _read_model(reader: Reader, archive: TorchArchive, rank: int, optim_name: str) -> RankFiles:
    where = f"{reader.root}/{archive.path}"
    root = archive.root
    missing = [key for key in ("module", "param_shapes", "dp_world_size") if not _has(root, key)]
    if missing:
        raise UnreadableError(f"{where} lacks {missing}: it is no ZeRO-3 model_states file.")
    shapes = tuple(
        tuple((name, _shape(shape, name, where)) for name, shape in group.items())
        for group in root["param_shapes"]
    )
    buffers, crcs = {}, {}
    # Parameters are placeholders of no elements; what holds data in 'module' is a buffer.
    for name, record in root["module"].items():
        if isinstance(record, TensorRecord) and (record.numel or name in (root.get("buffer_names") or ())):
            buffers[name] = archive.tensor(name, "weight", record)
            crcs[name] = archive.storage_crc(record)
    fragments = root.get("frozen_param_fragments") or {}
    frozen_shapes = {
        name: _shape(shape, name, where) for name, shape in (root.get("frozen_param_shapes") or {}).items()
    }
    frozen = {
        name: FlatState(archive.offset_of(record) if record.numel else 0, record.numel, record.dtype)
        for name, record in fragments.items()
    }
    client, digests, notes = {}, {}, []
    for key, value in root.items():
        if key in ENGINE_KEYS and not (key in ("data_sampler", "random_ltd") and value):
            continue
        try:
            client[key] = archive.describe(value)
            digests[key] = archive.digest(value)
        except UnreadableError as error:
            notes.append(f"client state {key!r} is left out: {error}")
        except RecursionError:
            notes.append(f"client state {key!r} is left out: it contains itself.")
    engine = {
        key: archive.describe(root[key])
        for key in ENGINE_KEYS
        if key in root and key not in ("module", "frozen_param_fragments", "param_shapes")
    }
    return RankFiles(
        rank, archive.path, optim_name, (archive.source, archive.source), shapes, frozen_shapes,
        frozen, buffers, crcs, tuple(root["module"]), engine, client, digests, tuple(notes),
    )  # fmt: skip


def _read_optim(reader: Reader, archive: TorchArchive, files: RankFiles) -> None:
    where = f"{reader.root}/{archive.path}"
    zero: Any = archive.root["optimizer_state_dict"] if _has(archive.root, "optimizer_state_dict") else None
    if not _has(zero, "fp32_flat_groups"):
        raise UnreadableError(f"{where} has no fp32_flat_groups: it is no ZeRO-3 optim_states file.")
    stage = zero.get("zero_stage")
    files.zero_stage = stage.args[0] if isinstance(stage, Opaque) else (3 if stage is None else stage)
    files.partition_groups = zero.get("ds_zero_partition_groups")
    files.partition_count = zero.get("partition_count")
    files.loss_scale = {
        key: archive.describe(zero[key])
        for key in ("loss_scaler", "dynamic_loss_scale", "overflow")
        if key in zero
    }
    base = zero.get("optimizer_state_dict") or {"state": {}, "param_groups": []}
    files.param_groups = [archive.describe(group) for group in base.get("param_groups") or []]
    # Experts' groups refer to sub-groups, which an EP rank without experts numbers differently.
    files.optimizer_digest = archive.digest(
        [
            {key: value for key, value in group.items() if key != "params"}
            for group in base.get("param_groups") or ()
            if not group.get("moe")
        ]
    )
    flats = zero["fp32_flat_groups"]
    if len(flats) != len(files.shapes):
        raise UnreadableError(
            f"{where} has {len(flats)} flat groups; {files.model_file} describes {len(files.shapes)} "
            "sub-groups. The two files are not of the same save."
        )
    for index, flat in enumerate(flats):
        states = {"master": _flat(archive, flat)}
        scalars: dict[str, Scalar] = {}
        for key, value in (base["state"].get(index) or {}).items():
            if isinstance(value, TensorRecord) and value.shape:
                if value.numel != flat.numel:
                    raise UnreadableError(
                        f"{where}: {key} of sub-group {index} has {value.numel} elements, the master "
                        f"weights have {flat.numel}. The file is damaged, or the optimizer keeps a "
                        "state that is not per element, which is not supported."
                    )
                states[key] = _flat(archive, value)
            elif isinstance(value, TensorRecord | int | float):
                scalars[key] = scalar_state(archive, value)
            else:
                raise UnreadableError(
                    f"{where}: optimizer state {key} of sub-group {index} is neither a tensor nor a "
                    "number; not supported."
                )
        files.states.append(states)
        files.scalars.append(scalars)


def _flat(archive: TorchArchive, record: TensorRecord) -> FlatState:
    offset = archive.offset_of(record) if record.numel else 0
    return FlatState(offset, record.numel, record.dtype)


def _has(value: Any, key: str) -> bool:
    return isinstance(value, dict) and key in value


def _shape(shape: Any, name: str, where: str) -> tuple[int, ...]:
    sizes = tuple(shape) if isinstance(shape, tuple | list) else None
    if sizes is None or any(type(size) is not int or size < 0 for size in sizes):
        raise UnreadableError(f"{where}: the shape of {name} is malformed: {shape!r}.")
    return sizes
