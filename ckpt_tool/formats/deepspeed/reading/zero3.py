"""ZeRO-3 checkpoints, with AutoEP (partition-native, format version 1) and without.

Every rank saves one model_states and one optim_states file. A parameter's fp32 master and moments are
cut over the ranks of its partition group: all ranks for dense parameters, the EDP ranks of one EP rank
for experts. This module reads what all ranks say, checks that they say the same, and describes where
each element of the logical tensors lies.

Format facts: deepspeed 0.19.8, runtime/zero/stage3.py, checkpoint/autoep_zero3_metadata.py and
checkpoint/ds_to_universal.py (``_consolidate_zero3_autoep_expert_states``).
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ckpt_tool.canonical import (
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
    same,
)
from ckpt_tool.errors import MismatchError, UnreadableError
from ckpt_tool.formats.deepspeed.facts.partition import (
    Paddings,
    PartitionRegions,
    consecutive,
    partition_size,
)
from ckpt_tool.formats.deepspeed.reading.autoep import AutoEP
from ckpt_tool.formats.deepspeed.reading.placement import Group, Placement
from ckpt_tool.formats.deepspeed.reading.rank_files import DATA_FIRST, RankFiles
from ckpt_tool.formats.deepspeed.reading.rank_reading import file_names, read_ranks
from ckpt_tool.geometry import Cut, CutRegions
from ckpt_tool.storage import Reader

# Values every rank must state alike; they differ where files of two saves were mixed.
_COMMON = (
    "global_steps skipped_steps global_samples dp_world_size mp_world_size ds_version lr_scheduler "
    "num_experts"
).split()


class Zero3:
    """The format as the registry knows it."""

    name = "deepspeed-zero3"

    def recognises(self, reader: Reader) -> bool:
        names = reader.list()
        return any("zero_pp_rank_" in name and name.endswith("optim_states.pt") for name in names) and (
            any(name.startswith("zero_pp_rank_") and name.endswith("model_states.pt") for name in names)
        )

    def read(self, reader: Reader) -> Checkpoint:
        ranks = read_ranks(reader, file_names(reader))
        _check_ranks_agree(reader, ranks)
        return _Catalogue(reader, ranks).checkpoint()


def _check_ranks_agree(reader: Reader, ranks: list[RankFiles]) -> None:
    first = ranks[0]
    world = first.engine.get("dp_world_size")
    for files in ranks:
        where = f"{reader.root}/{files.model_file}"
        for key in _COMMON:
            theirs, ours = files.engine.get(key), first.engine.get(key)
            if not same(theirs, ours):
                raise MismatchError(
                    f"{where} says {key}={theirs!r}, {first.model_file} says {ours!r}. The directory "
                    "mixes files of different saves; copy this checkpoint again from its origin."
                )
        said = (files.engine.get(DATA_FIRST), first.engine.get(DATA_FIRST))
        if None not in said and said[0] != said[1]:
            raise MismatchError(
                f"{where} says {DATA_FIRST}={said[0]}, {first.model_file} says {said[1]}; it decides which "
                "experts a rank holds. The directory mixes files of different saves; copy this checkpoint "
                "again from its origin."
            )
        if files.zero_stage != 3:
            raise UnreadableError(
                f"{reader.root}/{files.optim_file} is of ZeRO stage {files.zero_stage}; "
                "stage 3 was expected beside zero_pp_rank_*_model_states.pt files."
            )
        if files.frozen_shapes != first.frozen_shapes and not _empty_experts(files, first):
            raise MismatchError(f"{where} lists other frozen parameters than {first.model_file}.")
        if files.module_names is not first.module_names and (
            set(files.module_names) != set(first.module_names)
        ):
            differing = sorted(set(files.module_names) ^ set(first.module_names))[:5]
            raise MismatchError(f"{where} and {first.model_file} describe different models: {differing}.")
        if files.optimizer_digest != first.optimizer_digest:
            raise MismatchError(
                f"{reader.root}/{files.optim_file} and {first.optim_file} state different options of the "
                "optimizer's groups. The directory mixes files of different saves; copy this checkpoint "
                "again from its origin."
            )
        for name in files.buffer_crcs.keys() | first.buffer_crcs.keys():
            if files.buffer_crcs.get(name) != first.buffer_crcs.get(name):
                raise MismatchError(
                    f"{where}: buffer {name} differs from the one in {first.model_file}. A buffer that "
                    "differs between ranks has no single value to convert."
                )
    if world != len(ranks):
        raise UnreadableError(
            f"{reader.root}/{first.model_file} was saved by {world} ranks (dp_world_size); the "
            f"directory has files of {len(ranks)}. "
            + (
                "Another run's files are in it; remove them."
                if len(ranks) > (world or 0)
                else "Copy the files of all ranks (nodes often save to their own local disk)."
            )
        )


def _empty_experts(files: RankFiles, first: RankFiles) -> bool:
    """Whether two ranks' frozen parameters differ by nothing but experts an EP rank holds none of."""
    differing = set(files.frozen_shapes.items()) ^ set(first.frozen_shapes.items())
    return all(math.prod(shape) == 0 for _, shape in differing)


class _Catalogue:
    """Builds the catalogue from what the ranks say."""

    def __init__(self, reader: Reader, ranks: list[RankFiles]) -> None:
        self._reader, self._ranks, self._first = reader, ranks, ranks[0]
        self._world = len(ranks)
        self._autoep = AutoEP(reader.root, ranks)
        self._bases: dict[tuple[int, str, int], array[int]] = {}
        self._placement = Placement(reader.root, ranks, self._autoep)
        self._places = self._placement.places
        self._everyone = self._placement.group(tuple(range(self._world)))
        self._scalars: dict[tuple[TensorName, str], Scalar] = {}
        self._partitioned: list[PartitionRegions] = []
        self._copies: list[Tensor] = []  # buffers under a second name, with equal checksums
        self._model_files = tuple(files.model_file for files in ranks)
        # the first of all ranks that say the same of their frozen parameters, for each thing said
        self._frozen_kinds = list({id(files.frozen): files for files in reversed(ranks)}.values())[::-1]

    def _where(self, files: RankFiles) -> str:
        return f"{self._reader.root}/{files.model_file}"

    # ---- tensors

    def checkpoint(self) -> Checkpoint:
        dense = self._dense_names()
        aliases = self._aliases(dense)
        tensors: list[Tensor] = []
        for name in self._model_order():
            if name in self._autoep.experts:
                tensors += self._expert_tensors(name)
            elif name in self._places[0]:
                tensors += self._dense_tensors(name)
            elif name in self._first.frozen_shapes:
                tensors += self._frozen_tensor(name)
            elif name in self._first.buffers and name not in aliases:
                tensors.append(replace(self._first.buffers[name], role=Role.BUFFER))
        return Checkpoint(
            format=Zero3.name,
            root=self._reader.root,
            dialect="autoep" if self._autoep.layers else "transformers",
            tensors=tuple(tensors),
            files=tuple(source for files in self._ranks for source in files.sources),
            topology=self._topology(),
            training=self._training(),
            scalars=self._scalars,
            moe_layers=tuple(self._moe_layer(prefix) for prefix in self._autoep.layers),
            aliases=aliases,
            module_names=self._first.module_names,
            layout_hint=self._first.saved,
            notes=tuple(note for files in self._ranks[:1] for note in files.notes),
            apart=Paddings(self._partitioned, self._copies),
        )

    def _dense_names(self) -> set[str]:
        """All names with values, other than experts."""
        return (
            {name for name in self._places[0] if name not in self._autoep.experts}
            | set(self._first.frozen_shapes)
            | set(self._first.buffers)
        )

    def _model_order(self) -> list[str]:
        """Names in the order of the module tree; experts follow their router."""
        order: list[str] = []
        pending = dict.fromkeys(self._autoep.experts)
        for name in self._first.module_names:
            order.append(name)
            if name.endswith(".router.gate.weight"):
                prefix = name.removesuffix(".router.gate.weight") + ".experts"
                for expert in [key for key in pending if self._autoep.experts[key][0] == prefix]:
                    order.append(expert)
                    del pending[expert]
        known = set(order)
        order += [name for name in self._places[0] if name not in known and name not in pending]
        return order + list(pending)

    def _aliases(self, named: set[str]) -> dict[str, str]:
        """Names in 'module' that are further names of a parameter: tied weights and the router."""
        aliases = dict(self._first.engine.get("shared_params") or {})
        for alias, name in aliases.items():
            if alias in named or name not in named:
                raise MismatchError(
                    f"{self._where(self._first)}: shared_params says that {alias} is {name}, but "
                    + (f"{alias} has values of its own" if alias in named else f"{name} has no values")
                    + ". The metadata does not fit together; copy the checkpoint again."
                )
        modules = [entry["module_path"] for entry in self._autoep.layers.values()]
        for name in self._first.module_names:
            for module in modules:
                rest = name.removeprefix(f"{module}.gate.")
                target = f"{module}.router.{rest}"
                if rest == name or target not in named:
                    continue
                # AutoEP keeps the router reachable under its old name (moe/auto_ep_layer.py)
                if name not in named or self._first.buffer_crcs.get(name) == self._first.buffer_crcs.get(
                    target
                ):
                    aliases[name] = target
                    if name in self._first.buffers:
                        self._copies.append(self._first.buffers[name])
        known = named | set(aliases)
        unknown = [name for name in self._first.module_names if name not in known]
        if unknown:
            raise UnreadableError(
                f"{self._where(self._first)}: 'module' names {unknown[:5]} ({len(unknown)} in all), of "
                "which no file has values: no parameter, buffer, frozen parameter or alias."
            )
        return aliases

    def _dense_tensors(self, name: str) -> Iterable[Tensor]:
        shape = self._places[0][name].shape
        for rank in self._placement.kinds():
            files, places = self._ranks[rank], self._places[rank]
            if name not in places or places[name].shape != shape:
                found = list(places[name].shape) if name in places else "none"
                raise MismatchError(
                    f"{self._where(files)}: {name} has shape {found}, in {self._first.model_file} it has "
                    f"{list(shape)}. Ranks of one run agree on it. (A model "
                    "whose experts were split before ZeRO-3 wrapped it saves a different share of them "
                    "on every rank, and most are lost: such a checkpoint cannot be repaired.)"
                )
        yield from self._states(name, shape, self._everyone, name, Role.PARAMETER)

    def _states(
        self, name: str, shape: tuple[int, ...], group: Group, key: TensorName, role: Role
    ) -> Iterable[Tensor]:
        """One tensor per state of a parameter cut over the ranks of ``group``."""
        first = self._ranks[group.ranks[0]]
        place = self._places[first.rank][name]
        index = place.sub_group
        self._placement.check_same_slot(group, name)
        for state, flat in first.states[index].items():
            regions = PartitionRegions(
                math.prod(shape),
                group.files,
                self._base(index, state, group),
                place.within,
                flat.dtype.itemsize,
            )
            self._partitioned.append(regions)
            yield Tensor(key, state, shape, flat.dtype, regions, role)
        for state, scalar in first.scalars[index].items():
            self._add_scalar(key, state, scalar, first)

    def _base(self, index: int, state: str, group: Group) -> array[int]:
        """Byte offset of a sub-group's flat buffer in each of its ranks' files."""
        key = (index, state, id(group))
        if key not in self._bases:
            ranks = [self._ranks[rank] for rank in group.ranks]
            self._bases[key] = array(
                "q", [files.offsets[files.states[index][state].number] for files in ranks]
            )
        return self._bases[key]

    def _add_scalar(self, key: TensorName, state: str, scalar: Scalar, files: RankFiles) -> None:
        known = self._scalars.setdefault((key, state), scalar)
        if not same(known, scalar):
            raise MismatchError(
                f"{self._reader.root}/{files.optim_file}: {state} of {key} is {scalar.value}, on other "
                f"EP ranks it is {known.value}. The directory mixes files of different saves."
            )

    def _frozen_tensor(self, name: str) -> Iterable[Tensor]:
        shape = self._first.frozen_shapes[name]
        numel, size = math.prod(shape), partition_size(math.prod(shape), self._world)
        if name in self._autoep.experts:
            return
        for files in self._frozen_kinds:
            held = files.frozen.get(name)
            if held is not None and held.dtype is not self._first.frozen[name].dtype:
                raise MismatchError(
                    f"{self._where(files)}: the frozen parameter {name} is {held.dtype}, in "
                    f"{self._first.model_file} it is {self._first.frozen[name].dtype}. The directory mixes "
                    "files of different saves; copy it again from its origin."
                )
            if held is None or held.numel != size:
                raise MismatchError(
                    f"{self._where(files)}: the fragment of the frozen parameter {name} has "
                    f"{held.numel if held else 'no'} elements; {numel} cut over {self._world} ranks "
                    f"make {size}."
                )
        dtype = self._first.frozen[name].dtype
        regions = PartitionRegions(
            numel,
            self._model_files,
            array("q", [files.frozen_offsets[files.frozen[name].number] for files in self._ranks]),
            0,
            dtype.itemsize,
        )
        self._partitioned.append(regions)
        yield Tensor(name, WEIGHT, shape, dtype, regions, Role.FROZEN)

    # ---- experts

    def _expert_tensors(self, name: str) -> Iterable[Tensor]:
        prefix, projection = self._autoep.experts[name]
        key = ExpertName(self._autoep.layer_path(prefix), projection)
        holders = self._autoep.holders[prefix]
        locals_: list[dict[str, Tensor]] = []
        by_ep_rank: dict[int, list[RankFiles]] = {}
        for files in self._ranks:
            by_ep_rank.setdefault(self._autoep.entry(files, prefix)["ep_rank"], []).append(files)
        for ep_rank, ids in enumerate(holders):
            if not ids:
                locals_.append({})
                continue
            group = self._expert_group(prefix, name, ep_rank, by_ep_rank.get(ep_rank, []))
            first = group.ranks[0]
            shape = self._places[first][name].shape
            if shape[0] != len(ids):
                raise MismatchError(
                    f"{self._where(self._ranks[first])}: {name} has {shape[0]} experts on EP rank "
                    f"{ep_rank}, the placement gives it {len(ids)}."
                )
            found = self._states(name, shape, group, key, Role.PARAMETER)
            locals_.append({tensor.state: tensor for tensor in found})
        yield from self._stack(key, name, holders, locals_)

    def _expert_group(self, prefix: str, name: str, ep_rank: int, ranks: Iterable[RankFiles]) -> Group:
        """The ranks that share an EP rank's experts."""
        by_partition: dict[int, int] = {}
        for files in ranks:
            if name not in self._places[files.rank]:
                raise MismatchError(
                    f"{self._where(files)}: EP rank {ep_rank} should hold experts of {name}, but no "
                    "sub-group of this rank lists it: those experts are missing."
                )
            own = self._placement.partition(files.rank, name)
            if own in by_partition:
                raise MismatchError(
                    f"{self._where(files)} and {self._ranks[by_partition[own]].model_file} both claim "
                    f"partition {own} of EP rank {ep_rank}'s experts of {prefix}: the same experts are "
                    "owned twice, and others by nobody."
                )
            by_partition[own] = files.rank
        expected = self._world // self._autoep.layers[prefix]["ep_size"]
        if sorted(by_partition) != list(range(expected)):
            raise MismatchError(
                f"{self._reader.root}: of the {expected} ranks that share EP rank {ep_rank}'s experts "
                f"of {prefix}, files claim partitions {sorted(by_partition)}. Experts are missing."
            )
        return self._placement.group(tuple(by_partition[partition] for partition in range(expected)))

    def _stack(
        self,
        key: ExpertName,
        name: str,
        holders: Sequence[Sequence[int]],
        locals_: Sequence[Mapping[str, Tensor]],
    ) -> Iterable[Tensor]:
        """Put the EP ranks' shares together by global expert id, state by state."""
        shares = [share for share in locals_ if share]
        for share in shares:
            if share.keys() != shares[0].keys():
                raise MismatchError(
                    f"{self._reader.root}: EP ranks keep different optimizer states for {name}: "
                    f"{sorted(share)} and {sorted(shares[0])}. They are not of the same save."
                )
        for state, example in shares[0].items():
            matrix = example.shape[1:]
            size = math.prod(matrix)
            cuts: list[Cut] = []
            copies: list[Cut] = []
            owned: set[int] = set()
            for ids, share in zip(holders, locals_, strict=True):
                if not ids:
                    continue
                tensor = share.get(state)
                if tensor is None or tensor.shape[1:] != matrix or tensor.dtype != example.dtype:
                    raise MismatchError(
                        f"{self._reader.root}: EP ranks disagree on {name} [{state}]: "
                        f"{tensor.shape if tensor else 'absent'} and {example.shape}."
                    )
                for position, first, count in _single_runs(ids, owned):
                    cut = Cut(first * size, count * size, tensor, position * size)
                    (copies if first in owned else cuts).append(cut)
                owned |= set(ids)
            shape = (len(owned), *matrix)
            yield Tensor(
                key,
                state,
                shape,
                example.dtype,
                CutRegions(cuts),
                replicas=CutRegions(copies) if copies else (),
            )

    def _moe_layer(self, prefix: str) -> MoELayer:
        entry = self._autoep.layers[prefix]
        return MoELayer(
            self._autoep.layer_path(prefix),
            entry["module_path"],
            entry["num_experts"],
            self._autoep.holders[prefix],
        )

    # ---- everything else

    def _topology(self) -> Topology:
        if not self._autoep.layers:
            return Topology(self._world, zero_stage=3)
        layer, first = next(iter(self._autoep.layers.items()))
        entries = [self._autoep.entry(files, layer) for files in self._ranks]
        ep_size: int = first["ep_size"]
        return Topology(
            self._world,
            ep_size,
            self._world // ep_size,
            3,
            tuple(entry["ep_rank"] for entry in entries),
            tuple(entry["expert_data_parallel_rank"] for entry in entries),
        )

    def _training(self) -> TrainingState:
        engine = self._first.engine
        per_rank = tuple(
            key
            for key in self._first.client
            if any(
                files.client_digests.get(key) != self._first.client_digests[key] for files in self._ranks
            )
        ) + tuple(
            sorted(
                {key for files in self._ranks for key in files.client} - set(self._first.client), key=repr
            )
        )
        return TrainingState(
            step=engine.get("global_steps"),
            counters={
                key: engine[key]
                for key in ("global_steps", "skipped_steps", "global_samples")
                if key in engine
            },
            param_groups=self._param_groups(),
            scheduler=engine.get("lr_scheduler"),
            loss_scale=self._first.loss_scale,
            client_state={key: value for key, value in self._first.client.items() if key not in per_rank},
            per_rank=per_rank,
            config=engine.get("ds_config") or {},
            engine_version=engine.get("ds_version"),
        )

    def _param_groups(self) -> tuple[ParamGroup, ...]:
        groups = []
        for group in self._first.param_groups:
            names: list[TensorName] = []
            for index in group.get("params", ()):
                if not isinstance(index, int) or index >= len(self._first.shapes):
                    raise UnreadableError(
                        f"{self._reader.root}/{self._first.optim_file}: a parameter group refers to "
                        f"sub-group {index!r}, of {len(self._first.shapes)}."
                    )
                for name, _ in self._first.shapes[index]:
                    if name in self._autoep.experts:
                        prefix, projection = self._autoep.experts[name]
                        names.append(ExpertName(self._autoep.layer_path(prefix), projection))
                    else:
                        names.append(name)
            options = {key: value for key, value in group.items() if key != "params"}
            groups.append(ParamGroup(options, tuple(names)))
        return tuple(groups)


def _single_runs(ids: Sequence[int], owned: set[int]) -> Iterable[tuple[int, int, int]]:
    """Runs of consecutive ids, cut where ids another EP rank owns begin or end."""
    for position, first, count in consecutive(ids):
        begin = 0
        for step in range(1, count + 1):
            if step == count or (first + step in owned) != (first + step - 1 in owned):
                yield position + begin, first + begin, step - begin
                begin = step
