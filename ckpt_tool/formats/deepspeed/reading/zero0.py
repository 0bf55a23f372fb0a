"""ZeRO-0 checkpoints: no partitions, torch's own optimizer state, with AutoEP and without.

Without experts the optimizer is in ``mp_rank_00_model_states.pt``; with AutoEP each EP rank saves
``expp_rank_{e}_mp_rank_00_optim_states.pt``: all dense parameters, then its own experts. The state is by
number, not by name: which parameter a number is follows from the model's order, and where that leaves a
doubt the optimizer state is left out rather than guessed.

Format facts: deepspeed 0.19.8, runtime/engine.py (``_save_moe_checkpoint``, ``_common_checkpoint_state``),
runtime/fp16/unfused_optimizer.py and fused_optimizer.py (``state_dict``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckpt_tool.canonical import (
    MASTER,
    Checkpoint,
    DType,
    ParamGroup,
    Role,
    Scalar,
    Tensor,
    TensorName,
    same,
)
from ckpt_tool.containers.pickle_records import TensorRecord
from ckpt_tool.containers.torch_zip import TorchArchive
from ckpt_tool.errors import MismatchError, UnreadableError
from ckpt_tool.formats.deepspeed.facts.optimizer_order import assign
from ckpt_tool.formats.deepspeed.facts.scalars import scalar_state
from ckpt_tool.formats.deepspeed.reading.expert_files import Experts
from ckpt_tool.formats.deepspeed.reading.model_file import (
    COPY_AGAIN,
    ModelFile,
    Named,
    has_model_file,
    sort_names,
)
from ckpt_tool.formats.deepspeed.reading.whole_model import (
    OptimizerStates,
    build,
    build_weights,
    model_order,
)
from ckpt_tool.formats.deepspeed.reading.zero12 import read_zero12
from ckpt_tool.storage import Reader

_EXPERT_OPTIMIZER = re.compile(r"expp_rank_(\d{1,6})_mp_rank_(\d{1,6})_optim_states\.pt$")
_LOSS_SCALE = ("dynamic_loss_scale", "cur_scale")

_NONE = "The checkpoint holds no optimizer state."
_FLAT = (
    "The optimizer state is flat and unnamed (FP16_Optimizer of a fused Adam, ZeRO-0): which parameter "
    "lies where is written nowhere, and it is left out. Load the checkpoint and save it under ZeRO-1 to "
    "keep it."
)
_DOUBT = (
    "Which parameter each optimizer state belongs to cannot be told from their shapes and order (ZeRO-0 "
    "writes no names), and it is left out. Load the checkpoint and save it under ZeRO-1 to keep it."
)


class Zero0:
    """The format as the registry knows it, and stages 1 and 2 without their optimizer files."""

    name = "deepspeed-zero0"

    def recognises(self, reader: Reader) -> bool:
        names = reader.list()
        return has_model_file(names) and not any("zero_pp_rank_" in name for name in names)

    def read(self, reader: Reader) -> Checkpoint:
        model = ModelFile(reader)
        if model.shapes is not None:  # stage 1 or 2
            return read_zero12(reader, model)
        experts = Experts(reader, model)
        files = _optimizer_files(reader, model, experts)
        sources = tuple(file.archive.source for file in files if file.archive is not model.archive)
        for why, applies in (
            (_NONE, not files or not any(slot.tensors for file in files for slot in file.slots())),
            (_FLAT, any(file.flat for file in files)),
        ):
            if applies:
                _account_for(files)
                return build_weights(reader, model, experts, why, sources)
        return _Catalogue(reader, model, experts, files).checkpoint(sources)


@dataclass(frozen=True, slots=True)
class _Slot:
    """What the optimizer has for one number: per-element states, and scalars."""

    tensors: Mapping[str, TensorRecord]
    scalars: Mapping[str, Scalar]

    @property
    def shape(self) -> tuple[int, ...] | None:
        return next((record.shape for record in self.tensors.values()), None)


class _OptimizerFile:
    """One optimizer's state: ``groups[g]`` are its parameters by position, ``options[g]`` their settings.

    ``flat``: it is a fused optimizer's, one number per group.
    """

    def __init__(self, archive: TorchArchive, state: Any) -> None:
        self.archive = archive
        base = state.get("optimizer_state_dict", state) if isinstance(state, dict) else None
        if not isinstance(base, dict) or not isinstance(base.get("param_groups"), list):
            raise UnreadableError(f"{archive.where} holds no optimizer state of torch's form. {COPY_AGAIN}")
        self.flat = "fp32_groups_flat" in state
        self.loss_scale = {key: state[key] for key in _LOSS_SCALE if key in state}
        self.options = [
            {key: value for key, value in group.items() if key != "params"}
            for group in base["param_groups"]
        ]
        masters = state.get("fp32_groups")
        self.groups: list[list[_Slot]] = []
        for index, group in enumerate(base["param_groups"]):
            own = masters[index] if masters is not None else None
            if own is not None and len(own) != len(group["params"]):
                raise MismatchError(
                    f"{archive.where}: group {index} has {len(group['params'])} parameters and {len(own)} "
                    f"master weights. {COPY_AGAIN}"
                )
            self.groups.append(
                [
                    self._slot(number, base["state"].get(number) or {}, own[position] if own else None)
                    for position, number in enumerate(group["params"])
                ]
            )

    def slots(self) -> list[_Slot]:
        return [slot for group in self.groups for slot in group]

    def digest(self, slot: _Slot) -> str:
        """A text equal for equal values, told by the archive's CRCs."""
        return self.archive.digest(dict(slot.tensors)) + repr(slot.scalars)

    def _slot(self, number: Any, state: Mapping[str, Any], master: Any) -> _Slot:
        tensors: dict[str, TensorRecord] = {}
        scalars: dict[str, Scalar] = {}
        if isinstance(master, TensorRecord):
            tensors[MASTER] = master
        for key, value in state.items():
            if isinstance(value, TensorRecord) and value.shape:
                tensors[key] = value
            elif isinstance(value, TensorRecord | int | float):
                scalars[key] = scalar_state(self.archive, value)
            else:
                raise UnreadableError(
                    f"{self.archive.where}: optimizer state {key} of parameter {number} is neither a "
                    "tensor nor a number; not supported."
                )
        shapes = {record.shape for record in tensors.values()}
        if len(shapes) > 1 and not self.flat:
            raise UnreadableError(
                f"{self.archive.where}: the states of parameter {number} have shapes {sorted(shapes)}. The "
                "optimizer keeps a state that is not per element, which is not supported."
            )
        return _Slot(tensors, scalars)


def _optimizer_files(reader: Reader, model: ModelFile, experts: Experts) -> list[_OptimizerFile]:
    """By EP rank with AutoEP, else the one in the model file; none where none was saved."""
    found: dict[int, str] = {}
    for name in reader.list():
        match = _EXPERT_OPTIMIZER.match(name)
        if match is None:
            continue
        if int(match[2]) > 0:
            raise UnreadableError(
                f"{reader.root}/{name}: the model was also split by tensor parallelism. ckpt-tool does not "
                "read AutoTP checkpoints."
            )
        found[int(match[1])] = name
    if not experts.layers:
        return [] if model.optimizer is None else [_OptimizerFile(model.archive, model.optimizer)]
    if not found:
        return []
    if set(found) != set(range(experts.ep_size)):
        wrong = sorted(set(found) ^ set(range(experts.ep_size)))[0]
        name = f"expp_rank_{wrong}_mp_rank_00_optim_states.pt"
        raise UnreadableError(
            f"{reader.root}/{name} is {'left over from another run' if wrong in found else 'missing'}: "
            f"{model.where} describes {experts.ep_size} EP ranks, and each saves one such file."
            f" {COPY_AGAIN}"
        )
    archives = [TorchArchive(reader, found[rank]) for rank in range(experts.ep_size)]
    states = [archive.root.get("optimizer") for archive in archives if isinstance(archive.root, dict)]
    if len(states) != len(archives) or any(not isinstance(state, dict) for state in states):
        return []
    files = [_OptimizerFile(archive, state) for archive, state in zip(archives, states, strict=True)]
    own = None if model.optimizer is None else model.archive.digest(model.optimizer)
    if own not in (None, archives[0].digest(states[0])):
        raise MismatchError(
            f"{archives[0].where}: its optimizer state is not the one {model.where} has of the same rank. "
            f"The directory mixes files of different saves. {COPY_AGAIN}"
        )
    if own is not None:
        model.archive.account_for_tensors(model.optimizer)
    return files


class _Catalogue:
    """Builds the catalogue from the optimizer states of every EP rank."""

    def __init__(
        self, reader: Reader, model: ModelFile, experts: Experts, files: Sequence[_OptimizerFile]
    ) -> None:
        self._reader, self._model, self._experts, self._files = reader, model, experts, files

    def checkpoint(self, sources: tuple[Any, ...]) -> Checkpoint:
        first = self._files[0]
        names = self._order()
        if names is None:
            _account_for(self._files)
            return build_weights(self._reader, self._model, self._experts, _DOUBT, sources)
        self._check_alike(names)
        slots = {
            name: (group, position)
            for group, own in enumerate(names)
            for position, name in enumerate(own)
            if first.groups[group][position].tensors
        }
        scalars: dict[tuple[TensorName, str], Scalar] = {
            (self._key(name), state): scalar
            for name, (group, position) in slots.items()
            for state, scalar in first.groups[group][position].scalars.items()
        }
        masters = any(MASTER in slot.tensors for slot in first.slots())
        optimizer = OptimizerStates(
            0,
            frozenset(slots),
            {name: self._tensors(name, *place) for name, place in slots.items()},
            scalars,
            tuple(
                ParamGroup(options, tuple(self._key(name) for name in own))
                for options, own in zip(first.options, names, strict=True)
            ),
            first.loss_scale,
            sources,
            # an fp32 engine trains the weights themselves
            weights_are_masters=not masters and self._all_fp32(slots),
        )
        return build(self._reader, self._model, self._experts, self._named(frozenset(slots)), optimizer)

    def _key(self, name: str) -> TensorName:
        return self._experts.names.get(name, name)

    def _order(self) -> list[list[str]] | None:
        """The parameter at each position of the optimizer's groups; None where that is not certain."""
        first, parameters = self._files[0], self._parameters()
        order = model_order(self._model, self._experts)
        return assign(
            [[slot.shape for slot in group] for group in first.groups],
            [repr(sorted(options.items(), key=str)) for options in first.options],
            [(name, self._model.weights[name].shape) for name in order if name in parameters],
            [(name, self._experts.shape(name, 0)) for name in order if name in self._experts.names],
            self._experts.routers,
        )

    def _parameters(self) -> set[str]:
        """Names in 'module' that may be parameters of the optimizer: no buffers, no second names."""
        roles = sort_names(self._model, None, self._experts.routers).roles
        return {name for name in roles if name not in self._model.buffers}

    def _named(self, trained: frozenset[str]) -> Named:
        """Roles and aliases. ZeRO-0 lists no tied weights, and with experts they are cloned into storages
        of their own: a matrix unknown to the optimizer that equals one it knows is its second name."""
        names = sort_names(self._model, trained, self._experts.routers)
        matrices = [name for name in names.roles if len(self._model.weights[name].shape) > 1]
        known = [name for name in matrices if name in trained]
        twins = {}
        for name in matrices:
            if names.roles[name] is not Role.FROZEN:
                continue
            first = next((other for other in known if self._model.same_values(name, other)), None)
            if first is not None:
                twins[name] = first
        roles = {name: role for name, role in names.roles.items() if name not in twins}
        return names._replace(roles=roles, aliases={**names.aliases, **twins})

    def _all_fp32(self, slots: Mapping[str, Any]) -> bool:
        dtypes = {
            self._experts.weights(name, Role.PARAMETER).dtype
            if name in self._experts.names
            else self._model.weights[name].dtype
            for name in slots
        }
        return dtypes == {DType.float32}

    def _check_alike(self, names: Sequence[Sequence[str]]) -> None:
        """EP ranks hold equal dense states, and of experts the shapes the placement gives them."""
        first = self._files[0]
        for ep_rank, file in enumerate(self._files):
            if [len(group) for group in file.groups] != [len(group) for group in first.groups] or (
                not same(file.options, first.options)
            ):
                raise MismatchError(
                    f"{file.archive.where} and {first.archive.path} have different parameter groups. The "
                    f"directory mixes files of different saves. {COPY_AGAIN}"
                )
            for own, group, other in zip(names, file.groups, first.groups, strict=True):
                for name, slot, reference in zip(own, group, other, strict=True):
                    self._check_slot(name, ep_rank, slot, reference)

    def _check_slot(self, name: str, ep_rank: int, slot: _Slot, reference: _Slot) -> None:
        file, first = self._files[ep_rank], self._files[0]
        if not same(slot.scalars, reference.scalars) or set(slot.tensors) != set(reference.tensors):
            raise MismatchError(
                f"{file.archive.where} has {_described(slot)} for {name}, {first.archive.path} has "
                f"{_described(reference)}. The directory mixes files of different saves. {COPY_AGAIN}"
            )
        if name in self._experts.names:
            expected = self._experts.shape(name, ep_rank)
            if slot.shape not in (None, expected):
                raise MismatchError(
                    f"{file.archive.where}: the states of {name} have shape {list(slot.shape or ())}; the "
                    f"placement gives EP rank {ep_rank} {list(expected)}. {COPY_AGAIN}"
                )
        elif file.digest(slot) != first.digest(reference):
            raise MismatchError(
                f"{file.archive.where} and {first.archive.path} hold different optimizer states of {name}, "
                f"which all ranks hold alike. The directory mixes files of different saves. {COPY_AGAIN}"
            )
        elif ep_rank > 0:
            file.archive.account_for_tensors(dict(slot.tensors))

    def _tensors(self, name: str, group: int, position: int) -> list[Tensor]:
        first = self._files[0]
        found = []
        for state in first.groups[group][position].tensors:
            shares = {}
            for ep_rank, file in enumerate(self._files):
                record = file.groups[group][position].tensors[state]
                shares[ep_rank] = file.archive.tensor(name, state, record)
                if name not in self._experts.names:
                    break
            found.append(self._experts.stack(name, shares) if name in self._experts.names else shares[0])
        return found


def _account_for(files: Sequence[_OptimizerFile]) -> None:
    """Of optimizer state that is left out, as a note says."""
    for file in files:
        for slot in file.slots():
            file.archive.account_for_tensors(dict(slot.tensors))


def _described(slot: _Slot) -> str:
    scalars = ", ".join(f"{key} {scalar.value}" for key, scalar in slot.scalars.items())
    return f"states {sorted(slot.tensors)} ({scalars or 'no step'})"
