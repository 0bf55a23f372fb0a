"""ZeRO-1 and ZeRO-2 checkpoints, with AutoEP (one file per expert) and without.

Rank 0 saves the model's weights whole; every rank saves its part of the flat fp32 masters and moments:
the dense groups are cut over all ranks, each EP rank's experts over the ranks that share them. This module
recomputes where every parameter lies, checks it against what every rank says, and describes it.

Format facts: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py, runtime/engine.py (``_save_moe_checkpoint``,
``_get_zero_param_shapes``) and checkpoint/ds_to_universal.py (``extract_zero_shards``).
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence

from ckpt_tool.canonical import (
    Apart,
    Checkpoint,
    ParamGroup,
    Scalar,
    Tensor,
    TensorName,
    same,
)
from ckpt_tool.errors import CoverageError, MismatchError, UnreadableError
from ckpt_tool.formats.deepspeed.facts.flat_groups import FlatGroup, FlatRegions, Fragments
from ckpt_tool.formats.deepspeed.reading.expert_files import Experts
from ckpt_tool.formats.deepspeed.reading.model_file import (
    COPY_AGAIN,
    ModelFile,
    Shape,
    Shapes,
    has_model_file,
    sort_names,
)
from ckpt_tool.formats.deepspeed.reading.whole_model import OptimizerStates, build, build_weights
from ckpt_tool.formats.deepspeed.reading.zero12_files import OptimFile, optim_file_names, read_optim_files
from ckpt_tool.storage import Reader

_NO_OPTIMIZER = "There are no optimizer files (zero_pp_rank_*_optim_states.pt) in the directory."


class Zero12:
    """The format as the registry knows it; a checkpoint says which of the two stages it is."""

    name = "deepspeed-zero1/2"

    def recognises(self, reader: Reader) -> bool:
        names = reader.list()
        return has_model_file(names) and any(
            "zero_pp_rank_" in name and name.endswith("optim_states.pt") for name in names
        )

    def read(self, reader: Reader) -> Checkpoint:
        return read_zero12(reader, ModelFile(reader))


def read_zero12(reader: Reader, model: ModelFile) -> Checkpoint:
    """The catalogue; from the weights alone where no optimizer file is there."""
    experts = Experts(reader, model)
    names = optim_file_names(reader)
    if not names:
        return build_weights(reader, model, experts, _NO_OPTIMIZER)
    if model.shapes is None:
        raise UnreadableError(
            f"{model.where} has no param_shapes, which say what the optimizer files hold: it is not of the "
            f"same save as {names[0]}. {COPY_AGAIN}"
        )
    if len(names) != model.world:
        raise UnreadableError(
            f"{model.where} was saved by {model.world} ranks (dp_world_size); the directory has optimizer "
            f"files of {len(names)}. "
            + (
                "Another run's files are in it; remove them."
                if len(names) > model.world
                else "Copy the files of all ranks (nodes often save to their own local disk)."
            )
        )
    ranks = read_optim_files(reader, names)
    _check_ranks_agree(model, experts, ranks)
    return _Catalogue(reader, model, experts, model.shapes, ranks).checkpoint()


def _check_ranks_agree(model: ModelFile, experts: Experts, ranks: Sequence[OptimFile]) -> None:
    first = ranks[0]
    for file in ranks:
        for key, value in file.flags.items():
            if value != first.flags[key]:
                raise MismatchError(
                    f"{file.where}: {key} is {value[:80]}, in {first.path} it is {first.flags[key][:80]}. "
                    "The directory mixes files of different saves; copy this checkpoint again from its "
                    "origin."
                )
        if file.stage not in (1, 2):
            raise UnreadableError(
                f"{file.where} is of ZeRO stage {file.stage}; stage 1 or 2 was expected beside "
                f"{model.where}. {COPY_AGAIN}"
            )
    version = repr(model.engine.get("ds_version"))
    if first.flags["ds_version"] != version:
        raise MismatchError(
            f"{first.where}: ds_version is {first.flags['ds_version']}, in {model.where} it is {version}. "
            "The directory mixes files of different saves; copy this checkpoint again."
        )
    if first.flags["use_data_before_expert_parallelism"] != repr(experts.data_first):
        raise MismatchError(
            f"{first.where} and {model.where} disagree on use_data_before_expert_parallelism, which "
            "decides which experts a rank holds. They are not of the same save; copy this checkpoint again."
        )


class _Catalogue:
    """Builds the catalogue from what the ranks say."""

    def __init__(
        self,
        reader: Reader,
        model: ModelFile,
        experts: Experts,
        shapes: tuple[Shapes, ...],
        ranks: Sequence[OptimFile],
    ) -> None:
        self._reader, self._model, self._experts, self._ranks = reader, model, experts, ranks
        self._groups = shapes
        self._scalars: dict[tuple[TensorName, str], Scalar] = {}
        self._notes: list[str] = []
        self._parts: list[_Part] = []
        zero = model.config.get("zero_optimization")
        self._dealt = isinstance(zero, dict) and bool(zero.get("round_robin_gradients"))
        for file in ranks:
            if len(file.states) != len(shapes):
                raise MismatchError(
                    f"{file.where} has {len(file.states)} flat groups; {model.where} describes "
                    f"{len(shapes)}. The two are not of the same save; copy this checkpoint again."
                )

    def checkpoint(self) -> Checkpoint:
        self._check_groups()
        states = {
            name: tensors
            for index, group in enumerate(self._groups)
            for name, tensors in self._group(index, group)
        }
        trained = frozenset(states)
        if self._ranks[0].fragments is None:
            self._notes.append(
                "The optimizer files state no param_slice_mappings: where each parameter lies follows from "
                "the order in param_shapes alone."
            )
        optimizer = OptimizerStates(
            self._ranks[0].stage,
            trained,
            states,
            self._scalars,
            self._param_groups(),
            self._ranks[0].loss_scale,
            tuple(file.source for file in self._ranks),
            tuple(self._notes),
            apart=tuple(stretch for part in self._parts for stretch in part.apart()),
        )
        names = sort_names(self._model, trained, self._experts.routers)
        return build(self._reader, self._model, self._experts, names, optimizer)

    def _check_groups(self) -> None:
        """Every parameter is in one group, and experts are in groups of their own."""
        seen: set[str] = set()
        for index, group in enumerate(self._groups):
            if len({name in self._experts.names for name, _ in group}) > 1:
                raise UnreadableError(
                    f"{self._model.where}: group {index} of param_shapes mixes experts and dense "
                    f"parameters. {COPY_AGAIN}"
                )
            for name, _ in group:
                if name in seen:
                    raise UnreadableError(
                        f"{self._model.where}: {name} is in two parameter groups. {COPY_AGAIN}"
                    )
                seen.add(name)

    def _group(self, index: int, group: Shapes) -> Iterator[tuple[str, list[Tensor]]]:
        """The parameters of a group, each with one tensor per state."""
        for name, shape in group:
            found = self._shape(name)
            if shape != found:
                raise MismatchError(
                    f"{self._model.where}: {name} has shape {list(shape)} in param_shapes; the weights "
                    f"have {list(found)}. The metadata contradicts itself; copy this checkpoint again."
                )
        if any(name in self._experts.names for name, _ in group):
            yield from self._expert_group(index, group)
        else:
            part = _Part(self, index, group, range(len(self._ranks)))
            for name, shape in group:
                yield name, [part.tensor(name, name, state, shape) for state in part.states]
                self._add_scalars(name, part)

    def _expert_group(self, index: int, group: Shapes) -> Iterator[tuple[str, list[Tensor]]]:
        experts = self._experts
        parts: dict[int, _Part] = {}
        for ep_rank in range(experts.ep_size):
            local = [(name, experts.shape(name, ep_rank)) for name, _ in group]
            held = tuple((name, shape) for name, shape in local if math.prod(shape))
            if held:
                parts[ep_rank] = _Part(self, index, held, experts.sharers(ep_rank))
        first = next(iter(parts.values()))
        for ep_rank, part in parts.items():
            if set(part.states) != set(first.states):
                raise MismatchError(
                    f"{self._reader.root}: group {index} has states {sorted(part.states)} on EP rank "
                    f"{ep_rank}, {sorted(first.states)} on others. They are not of the same save; copy "
                    "this checkpoint again."
                )
        for name, _ in group:
            key = experts.names[name]
            own = {ep_rank: part for ep_rank, part in parts.items() if name in part.flat.sizes}
            stacks = [
                experts.stack(
                    name,
                    {
                        ep_rank: part.tensor(name, key, state, experts.shape(name, ep_rank))
                        for ep_rank, part in own.items()
                    },
                )
                for state in first.states
            ]
            for part in own.values():
                self._add_scalars(key, part)
            yield name, stacks

    def _shape(self, name: str) -> Shape:
        """A parameter's shape on rank 0, as the weights have it."""
        if name in self._experts.names:
            return self._experts.shape(name, self._experts.ep_rank(0))
        return self._model.weight_shape(name)

    def _add_scalars(self, key: TensorName, part: _Part) -> None:
        for state, scalar in part.scalars.items():
            known = self._scalars.setdefault((key, state), scalar)
            if not same(known, scalar):
                raise MismatchError(
                    f"{part.where}: {state} of {key} is {scalar.value}, on other EP ranks it is "
                    f"{known.value}. The directory mixes files of different saves. {COPY_AGAIN}"
                )

    def _param_groups(self) -> tuple[ParamGroup, ...]:
        stated = self._ranks[0].groups
        if stated and len(stated) != len(self._groups):
            raise MismatchError(
                f"{self._ranks[0].where} has {len(stated)} parameter groups; {self._model.where} describes "
                f"{len(self._groups)}. The two are not of the same save; copy this checkpoint again."
            )
        groups = []
        for index, group in enumerate(self._groups):
            options = stated[index] if stated else {}
            groups.append(
                ParamGroup(
                    {key: value for key, value in options.items() if key != "params"},
                    tuple(self._experts.names.get(name, name) for name, _ in group),
                )
            )
        return tuple(groups)

    # ---- checks of one rank's part of a group

    def check_part(self, index: int, flat: FlatGroup, file: OptimFile, place: int) -> None:
        """A rank's part of a group is what its place among the group's ranks makes it."""
        if index >= len(file.counts) or file.counts[index] != flat.count:
            raise MismatchError(
                f"{file.where}: group {index} is cut over {file.counts[index : index + 1]} ranks "
                f"(partition_count), and its parameters are on {flat.count}. The directory mixes files of "
                f"different saves. {COPY_AGAIN}"
            )
        held = flat.held(place)
        padding = flat.part - held
        if file.bf16_optimizer:  # states all padding on the last rank, and strips none
            padding = flat.part * flat.count - flat.total if place == flat.count - 1 else 0
        if file.paddings is not None and list(file.paddings)[index : index + 1] != [padding]:
            raise MismatchError(
                f"{file.where}: group_paddings of group {index} is "
                f"{list(file.paddings)[index : index + 1]}; as part {place} of {flat.count} it has "
                f"{padding}. The file is in another rank's place, or its group was cut otherwise."
                f" {COPY_AGAIN}"
            )
        for state, found in file.states[index].items():
            if found.numel not in (held, flat.part):
                raise MismatchError(
                    f"{file.where}: {state} of group {index} has {found.numel} elements; the shapes in "
                    f"{self._model.where}, cut over {flat.count} ranks, make {held} (with padding "
                    f"{flat.part}). They are not of the same run; copy this checkpoint again."
                )
        if file.fragments is not None:
            self._check_fragments(index, flat, file, place)

    def _check_fragments(self, index: int, flat: FlatGroup, file: OptimFile, place: int) -> None:
        expected, stated = flat.fragments(place), (file.fragments or ())[index]
        if stated == expected:
            return
        if self._dealt and stated == flat.unordered_fragments(place):
            # DeepSpeed 0.19.8 flattens in the dealt order and maps in the other: param_shapes is right
            note = (
                "The run used round_robin_gradients: DeepSpeed's param_slice_mappings do not say where "
                "parameters lie then (and ds_to_universal mixes them up); the order in param_shapes does."
            )
            if note not in self._notes:
                self._notes.append(note)
            return
        name = next(
            name for name in (*expected, *stated) if expected.get(name) != stated.get(name)
        )  # fmt: skip
        raise CoverageError(
            f"{file.where}: param_slice_mappings puts {_piece(stated, name)} of {name} into this rank's "
            f"part of group {index}; the order and shapes in {self._model.where} put "
            f"{_piece(expected, name)} there. Its pieces would leave a gap or overlap: the files are not "
            f"of the same save. {COPY_AGAIN}"
        )

    # ---- what a part needs of its catalogue

    @property
    def root(self) -> str:
        return self._reader.root

    def add_part(self, part: _Part) -> None:
        self._parts.append(part)

    def file(self, rank: int) -> OptimFile:
        return self._ranks[rank]


class _Part:
    """A group as the ranks ``members`` share it: all of it, or one EP rank's experts.

    Raises:
        MismatchError: the ranks' parts are not those of one group of these shapes, or disagree.
    """

    def __init__(self, catalogue: _Catalogue, index: int, shapes: Shapes, members: Sequence[int]) -> None:
        self._files = [catalogue.file(rank) for rank in members]
        first = self._files[0]
        self._index, self.where = index, first.where
        catalogue.add_part(self)
        self.flat = _flat_group(first, index, shapes, len(members))
        for place, file in enumerate(self._files):
            self._check_alike(first, file)
            catalogue.check_part(index, self.flat, file, place)
        self.states = first.states[index]
        self.scalars = first.scalars[index]
        self._paths = tuple(file.path for file in self._files)
        self._bases = {
            state: array("q", [file.states[index][state].offset for file in self._files])
            for state in self.states
        }

    def apart(self) -> Iterator[Apart]:
        """Padding at the end of the group, and gaps after its parameters."""
        for place, file in enumerate(self._files):
            held = self.flat.held(place)
            for state, bases in self._bases.items():
                found = file.states[self._index][state]
                itemsize = found.dtype.itemsize
                stretches = [(held, found.numel - held)] if found.numel > held else []
                for start, numel in (*stretches, *self.flat.gaps(place)):
                    yield Apart(file.path, bases[place] + start * itemsize, numel * itemsize, "padding")

    def tensor(self, name: str, key: TensorName, state: str, shape: Shape) -> Tensor:
        """One state of a parameter in this part."""
        flat, dtype = self.flat, self.states[state].dtype
        regions = FlatRegions(
            flat.starts[name], flat.sizes[name], flat.part, self._paths, self._bases[state], dtype.itemsize
        )
        return Tensor(key, state, shape, dtype, regions)

    def _check_alike(self, first: OptimFile, file: OptimFile) -> None:
        """Ranks that share a group hold the same states of it, at the same step."""
        index = self._index
        mine = {state: flat.dtype for state, flat in file.states[index].items()}
        theirs = {state: flat.dtype for state, flat in first.states[index].items()}
        if mine != theirs:
            raise MismatchError(
                f"{file.where} has states {sorted(mine)} for group {index}, {first.path} has "
                f"{sorted(theirs)}. The directory mixes files of different saves. {COPY_AGAIN}"
            )
        if not same(file.scalars[index], first.scalars[index]):
            raise MismatchError(
                f"{file.where} is at {_values(file.scalars[index])}, {first.path} at "
                f"{_values(first.scalars[index])}, for the same parameters. The directory mixes files of "
                f"different saves. {COPY_AGAIN}"
            )
        if (file.gaps or ())[index : index + 1] != (first.gaps or ())[index : index + 1]:
            raise MismatchError(
                f"{file.where} and {first.path} state different param_alignment_paddings for group "
                f"{index}: they cut it differently, and are not of the same save. {COPY_AGAIN}"
            )


def _flat_group(file: OptimFile, index: int, shapes: Shapes, count: int) -> FlatGroup:
    sizes = [(name, math.prod(shape)) for name, shape in shapes]
    gaps = file.gaps[index] if file.gaps is not None and index < len(file.gaps) else None
    if gaps is not None and (
        len(gaps) != len(sizes) or any(type(gap) is not int or gap < 0 for gap in gaps)
    ):
        raise UnreadableError(
            f"{file.where}: param_alignment_paddings of group {index} is malformed: {list(gaps)[:8]} for "
            f"{len(sizes)} parameters. {COPY_AGAIN}"
        )
    return FlatGroup(sizes, count, gaps)


def _piece(fragments: Fragments, name: str) -> str:
    if name not in fragments:
        return "nothing"
    numel, start = fragments[name]
    return f"{numel} elements from {start} on"


def _values(scalars: Mapping[str, Scalar]) -> str:
    return ", ".join(f"{key} {scalar.value}" for key, scalar in scalars.items()) or "no step"
