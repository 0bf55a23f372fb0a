"""What each rank of a ZeRO-1 or ZeRO-2 run says of the optimizer, in ``*zero_pp_rank_R_*_optim_states.pt``.

Keys: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py (``state_dict``); a bf16 engine of stage 1 that
accumulates gradients in fp32 saves runtime/bf16_optimizer.py's, which says no stage and keeps its padding.
Only metadata is read; tensors are described by where they lie.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckpt_tool.canonical import Scalar, SourceFile
from ckpt_tool.containers.pickle_records import Opaque, TensorRecord
from ckpt_tool.containers.torch_zip import TorchArchive
from ckpt_tool.errors import UnreadableError
from ckpt_tool.formats.deepspeed.facts.file_names import OPTIMIZER, files_by_rank, require_all
from ckpt_tool.formats.deepspeed.facts.flat_groups import Fragments
from ckpt_tool.formats.deepspeed.facts.scalars import scalar_state
from ckpt_tool.formats.deepspeed.reading.expert_files import data_before_expert
from ckpt_tool.formats.deepspeed.reading.model_file import COPY_AGAIN
from ckpt_tool.formats.deepspeed.reading.rank_files import FlatState
from ckpt_tool.storage import Reader, read_each

_LOSS_SCALE = ("loss_scaler", "dynamic_loss_scale", "overflow")


@dataclass(frozen=True, slots=True)
class OptimFile:
    """One rank's file. Lists run over the parameter groups.

    ``states[i]`` maps a state of group i to this rank's part of it, ``scalars[i]`` to its value;
    ``counts`` are the ranks each group is cut over, ``paddings`` the elements added to this rank's parts,
    ``gaps`` the zeros after each parameter. ``fragments[i]`` is where the engine had each parameter's
    piece. ``flags`` are facts all ranks must state alike. ``own_padding`` says that a part's padding is
    stripped from it.
    """

    rank: int
    path: str
    where: str
    source: SourceFile
    stage: int
    states: Sequence[Mapping[str, FlatState]]
    scalars: Sequence[Mapping[str, Scalar]]
    counts: Sequence[Any]
    paddings: Sequence[Any] | None
    gaps: Sequence[Sequence[int]] | None
    fragments: Sequence[Fragments] | None
    groups: Sequence[Mapping[str, Any]]
    loss_scale: Mapping[str, Any]
    flags: Mapping[str, str]
    bf16_optimizer: bool


def optim_file_names(reader: Reader) -> list[str]:
    """The optimizer file of every rank, by rank; none where none was saved.

    Raises:
        UnreadableError: a rank's file is missing, or the files are of a kind that is not read.
    """
    found = files_by_rank(reader, OPTIMIZER)
    if not found:
        return []
    pattern = re.sub(r"rank_\d+", "rank_{rank}", next(iter(found.values())), count=1)
    return require_all(reader, found, 1 + max(found), pattern)


def read_optim_files(reader: Reader, names: Sequence[str]) -> list[OptimFile]:
    """Read the metadata of all ranks, several files at a time."""
    return read_each(lambda item: _read(reader, *item), enumerate(names))


def _read(reader: Reader, rank: int, name: str) -> OptimFile:
    archive = TorchArchive(reader, name)
    root = archive.root if isinstance(archive.root, dict) else {}
    zero = root.get("optimizer_state_dict")
    flats = zero.get("single_partition_of_fp32_groups") if isinstance(zero, dict) else None
    if not isinstance(zero, dict) or not isinstance(flats, list):
        raise UnreadableError(
            f"{archive.where} has no single_partition_of_fp32_groups: it is no optim_states file of ZeRO-1 "
            f"or ZeRO-2. {COPY_AGAIN}"
        )
    base = zero.get("base_optimizer_state")
    # elastic_checkpoint saves the bare list of the groups' states, and the step beside it
    groups = list(base.get("param_groups") or ()) if isinstance(base, dict) else []
    states, scalars = [], []
    for index, flat in enumerate(flats):
        tensors, numbers = _group(archive, index, flat, _base_state(base, groups, index))
        if "base_optimizer_state_step" in zero and "step" not in numbers:
            numbers["step"] = scalar_state(archive, zero["base_optimizer_state_step"])
        states.append(tensors)
        scalars.append(numbers)
    counts = zero.get("partition_count")
    stage = zero.get("zero_stage")
    return OptimFile(
        rank=rank,
        path=name,
        where=archive.where,
        source=archive.source,
        # without one it is a BF16_Optimizer's, which the engine uses in stage 1 alone
        stage=stage.args[0] if isinstance(stage, Opaque) else (1 if stage is None else stage),
        states=states,
        scalars=scalars,
        counts=counts if isinstance(counts, list | tuple) else [counts] * len(flats),
        paddings=zero.get("group_paddings"),
        gaps=zero.get("param_alignment_paddings"),
        fragments=_fragments(archive, zero.get("param_slice_mappings"), len(flats)),
        groups=groups,
        loss_scale={key: zero[key] for key in _LOSS_SCALE if key in zero},
        flags={
            "ds_version": repr(root.get("ds_version", zero.get("ds_version"))),
            "zero_stage": repr(stage),
            "the number of groups": repr(len(flats)),
            "use_data_before_expert_parallelism": repr(data_before_expert(root.get("ds_config"))),
            "param_groups": archive.digest(groups),
        },
        bf16_optimizer=stage is None,
    )


def _base_state(base: Any, groups: Sequence[Mapping[str, Any]], index: int) -> Mapping[Any, Any]:
    """The base optimizer's state of a group, which it sees as one flat parameter."""
    if isinstance(base, list):
        return base[index] if index < len(base) else {}
    if not isinstance(base, dict):
        return {}
    ids = groups[index].get("params") if index < len(groups) else None
    key = ids[0] if isinstance(ids, list) and len(ids) == 1 else index
    found = (base.get("state") or {}).get(key)
    return found if isinstance(found, dict) else {}


def _group(
    archive: TorchArchive, index: int, flat: Any, base: Mapping[Any, Any]
) -> tuple[dict[str, FlatState], dict[str, Scalar]]:
    if not isinstance(flat, TensorRecord) or len(flat.shape) != 1:
        raise UnreadableError(
            f"{archive.where}: the master weights of group {index} are no flat tensor. {COPY_AGAIN}"
        )
    tensors = {"master": _flat(archive, flat)}
    numbers: dict[str, Scalar] = {}
    for key, value in base.items():
        if isinstance(value, TensorRecord) and value.shape:
            tensors[key] = _flat(archive, value)
        elif isinstance(value, TensorRecord | int | float):
            numbers[key] = scalar_state(archive, value)
        else:
            raise UnreadableError(
                f"{archive.where}: optimizer state {key} of group {index} is neither a tensor nor a "
                "number; not supported."
            )
    return tensors, numbers


def _flat(archive: TorchArchive, record: TensorRecord) -> FlatState:
    return FlatState(archive.offset_of(record) if record.numel else 0, record.numel, record.dtype)


def _fragments(archive: TorchArchive, stated: Any, groups: int) -> list[Fragments] | None:
    """``param_slice_mappings``: by group and parameter a ``fragment_address`` (a dataclass)."""
    if stated is None:
        return None
    found: list[Fragments] = []
    for mapping in stated if isinstance(stated, list) else ():
        items = mapping.items() if isinstance(mapping, dict) else ()
        fragments: dict[str, tuple[Any, Any]] = {
            name: (address.state.get("numel"), address.state.get("start"))
            for name, address in items
            if isinstance(address, Opaque) and isinstance(address.state, dict)
        }
        if len(fragments) == len(items):
            found.append(fragments)
    if len(found) != groups:
        raise UnreadableError(
            f"{archive.where}: param_slice_mappings is malformed, or not of the {groups} groups the file "
            f"has. {COPY_AGAIN}"
        )
    return found
