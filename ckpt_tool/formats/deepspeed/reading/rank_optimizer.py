"""What a rank's optim_states file says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ckpt_tool.canonical import same
from ckpt_tool.containers.pickle_records import Opaque, TensorRecord
from ckpt_tool.containers.torch_zip import TorchArchive
from ckpt_tool.errors import MismatchError, UnreadableError
from ckpt_tool.formats.deepspeed.facts.scalars import scalar_state
from ckpt_tool.formats.deepspeed.reading.rank_files import DATA_FIRST, FlatBuffer, RankFiles
from ckpt_tool.formats.deepspeed.reading.repeated import Repeated


def read_optimizer(archive: TorchArchive, files: RankFiles, repeated: Repeated) -> None:
    """Add to ``files`` what the file says.

    Raises:
        UnreadableError: it is no optimizer file of ZeRO-3, malformed, or does not fit the model file.
        MismatchError: another release wrote it than the model file.
    """
    where = archive.where
    zero: Any = archive.root["optimizer_state_dict"] if _has(archive.root, "optimizer_state_dict") else None
    if not _has(zero, "fp32_flat_groups"):
        raise UnreadableError(f"{where} has no fp32_flat_groups: it is no ZeRO-3 optim_states file.")
    version, theirs = archive.root.get("ds_version"), files.engine.get("ds_version")
    if None not in (version, theirs) and not same(version, theirs):
        raise MismatchError(
            f"{where} says ds_version={version!r}, {files.model_file} says {theirs!r}. The directory mixes "
            "files of different saves; copy this checkpoint again from its origin."
        )
    _check_data_first(archive.root.get("ds_config"), files, where)
    stage = zero.get("zero_stage")
    files.zero_stage = stage.args[0] if isinstance(stage, Opaque) else (3 if stage is None else stage)
    files.partition_groups = zero.get("ds_zero_partition_groups")
    files.partition_count = zero.get("partition_count")
    base = zero.get("optimizer_state_dict") or {"state": {}, "param_groups": []}
    groups = base.get("param_groups") or []
    if files.rank == 0:
        files.loss_scale = {
            key: archive.carried(zero[key])
            for key in ("loss_scaler", "dynamic_loss_scale", "overflow")
            if key in zero
        }
        files.param_groups = [archive.carried(group) for group in groups]
    compared = repeated.once("compared options", (groups,), lambda: _compared_options(groups))
    files.optimizer_digest = repeated.one(digest := repeated.digest(archive, compared), digest)
    flats, state = zero["fp32_flat_groups"], base["state"]
    if len(flats) != len(files.shapes):
        raise UnreadableError(
            f"{where} has {len(flats)} flat groups; {files.model_file} describes {len(files.shapes)} "
            "sub-groups. The two files are not of the same save; copy this checkpoint again."
        )
    found = repeated.once("buffers", (flats, state), lambda: _buffers(archive, flats, state))
    files.states = found.states
    files.offsets = archive.offsets_of(found.records)
    scalars = tuple(
        {key: scalar_state(archive, value) for key, value in group.items()} for group in found.scalars
    )
    files.scalars = repeated.one(tuple(tuple(group.items()) for group in scalars), scalars)


def _check_data_first(config: Any, files: RankFiles, where: str) -> None:
    """The engine writes one config into both files; of it the order of ranks decides who holds what."""
    theirs = files.engine.get(DATA_FIRST)
    if not isinstance(config, Mapping) or theirs is None:
        return
    if bool(config.get(DATA_FIRST, False)) != theirs:
        raise MismatchError(
            f"{where} and {files.model_file} disagree on use_data_before_expert_parallelism, which decides "
            "which experts a rank holds. They are not of the same save; copy this checkpoint again."
        )


def _compared_options(groups: Any) -> list[dict[str, Any]]:
    """Experts' groups refer to sub-groups, which an EP rank without experts numbers differently."""
    return [
        {key: value for key, value in group.items() if key != "params"}
        for group in groups
        if not group.get("moe")
    ]


class _Buffers(NamedTuple):
    """By sub-group: its flat buffers, which ``records`` are in their order, and its scalars."""

    states: list[dict[str, FlatBuffer]]
    records: list[TensorRecord]
    scalars: list[dict[str, Any]]


def _buffers(archive: TorchArchive, flats: Any, state: Mapping[int, Any]) -> _Buffers:
    states: list[dict[str, FlatBuffer]] = []
    records: list[TensorRecord] = []
    scalars: list[dict[str, Any]] = []

    def flat(record: TensorRecord) -> FlatBuffer:
        archive.require_contiguous(record)
        records.append(record)
        return FlatBuffer(len(records) - 1, record.numel, record.dtype)

    for index, master in enumerate(flats):
        found, single = {"master": flat(master)}, {}
        for key, value in (state.get(index) or {}).items():
            if isinstance(value, TensorRecord) and value.shape:
                if value.numel != master.numel:
                    raise UnreadableError(
                        f"{archive.where}: {key} of sub-group {index} has {value.numel} elements, the "
                        f"master weights have {master.numel}. The file is damaged, or the optimizer keeps "
                        "a state that is not per element, which is not supported."
                    )
                found[key] = flat(value)
            elif isinstance(value, TensorRecord | int | float):
                single[key] = value
            else:
                raise UnreadableError(
                    f"{archive.where}: optimizer state {key} of sub-group {index} is neither a tensor nor "
                    "a number; not supported."
                )
        states.append(found)
        scalars.append(single)
    return _Buffers(states, records, scalars)


def _has(value: Any, key: str) -> bool:
    return isinstance(value, dict) and key in value
