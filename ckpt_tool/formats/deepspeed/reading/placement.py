"""Where each parameter lies in each rank's flat buffers, and whether the ranks agree about it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ckpt_tool.canonical import same
from ckpt_tool.errors import MismatchError, UnreadableError
from ckpt_tool.formats.deepspeed.facts.partition import partition_size
from ckpt_tool.formats.deepspeed.reading.autoep import AutoEP
from ckpt_tool.formats.deepspeed.reading.rank_files import RankFiles

_MIXED = "The directory mixes files of different saves; copy this checkpoint again from its origin."


class Place(NamedTuple):
    """Where a parameter lies in the flat buffers of the ranks that hold a part of it: ``within`` elements
    into those of ``sub_group``, cut over ``cut_over`` ranks. ``shape`` is its full shape (for experts: that
    of the EP rank)."""

    sub_group: int
    within: int
    cut_over: int
    shape: tuple[int, ...]


class Group(NamedTuple):
    """Ranks that share tensors, in the order of their partitions, and their optimizer files.
    ``kinds`` are the first of each kind of ranks: those that say the same of all their buffers."""

    ranks: tuple[int, ...]
    files: tuple[str, ...]
    kinds: tuple[int, ...]


class Placement:
    """``places[r]`` maps each parameter that rank r holds a part of to its place there, which ranks that
    place everything alike have in common; ``partitions[r]`` are the numbers of its parts, by sub-group.

    Raises:
        MismatchError: shapes, partitions and buffers do not fit together, or ranks disagree.
        UnreadableError: the metadata that says how buffers are cut is missing or malformed.
    """

    def __init__(self, root: str, ranks: list[RankFiles], autoep: AutoEP) -> None:
        self._root, self._ranks, self._autoep = root, ranks, autoep
        self._first, self._world = ranks[0], len(ranks)
        self._known: dict[tuple[int, int, tuple[int, ...]], dict[str, Place]] = {}
        self._groups: dict[tuple[int, ...], Group] = {}
        self._sub_groups: dict[int, list[tuple[bool, str]]] = {}
        self.places: list[dict[str, Place]] = []
        self.partitions: list[tuple[int, ...]] = []
        for files in ranks:
            cuts = [self._partition(files, index) for index in range(len(files.shapes))]
            self.places.append(self._placed(files, tuple(count for count, _ in cuts)))
            self.partitions.append(tuple(own for _, own in cuts))
        self._check_same_names()
        self._check_same_order()

    def group(self, ranks: tuple[int, ...]) -> Group:
        """Ranks that share tensors, by their partitions of them."""
        if ranks not in self._groups:
            kinds: dict[tuple[int, int, int], int] = {}
            for rank in ranks:
                files = self._ranks[rank]
                kinds.setdefault((id(self.places[rank]), id(files.states), id(files.scalars)), rank)
            names = tuple(self._ranks[rank].optim_file for rank in ranks)
            self._groups[ranks] = Group(ranks, names, tuple(kinds.values()))
        return self._groups[ranks]

    def partition(self, rank: int, name: str) -> int:
        """A rank's part of a parameter, among those it is cut into."""
        return self.partitions[rank][self.places[rank][name].sub_group]

    def kinds(self) -> list[int]:
        """The first of all ranks that place everything alike, for each way to place it."""
        return list({id(places): rank for rank, places in reversed(list(enumerate(self.places)))}.values())

    def _where(self, files: RankFiles) -> str:
        return f"{self._root}/{files.model_file}"

    def _placed(self, files: RankFiles, counts: tuple[int, ...]) -> dict[str, Place]:
        key = (id(files.shapes), id(files.states), counts)
        if key not in self._known:
            self._known[key] = self._place(files, counts)
        return self._known[key]

    def _place(self, files: RankFiles, counts: tuple[int, ...]) -> dict[str, Place]:
        places: dict[str, Place] = {}
        for index, (group, count) in enumerate(zip(files.shapes, counts, strict=True)):
            within = 0
            for name, shape in group:
                if name in places:
                    raise UnreadableError(f"{self._where(files)}: {name} is in two sub-groups.")
                places[name] = Place(index, within, count, shape)
                within += partition_size(math.prod(shape), count)
            for state, flat in files.states[index].items():
                if flat.numel != within:
                    raise MismatchError(
                        f"{self._root}/{files.optim_file}: {state} of sub-group {index} has "
                        f"{flat.numel} elements; the shapes in {files.model_file}, cut over {count} "
                        f"ranks, make {within}. {_MIXED}"
                    )
        return places

    def _sub_group(self, files: RankFiles, index: int) -> tuple[bool, str]:
        """Whether a sub-group is one of experts, and its first parameter."""
        key = id(files.shapes)
        if key not in self._sub_groups:
            found = []
            for number, group in enumerate(files.shapes):
                expert = [name in self._autoep.experts for name, _ in group]
                if any(expert) != all(expert):
                    raise UnreadableError(
                        f"{self._root}/{files.optim_file}: sub-group {number} mixes experts and dense "
                        "parameters."
                    )
                found.append((bool(expert) and expert[0], group[0][0] if group else ""))
            self._sub_groups[key] = found
        return self._sub_groups[key][index]

    def _partition(self, files: RankFiles, index: int) -> tuple[int, int]:
        """(number of ranks a sub-group is cut over, this rank's place among them)."""
        where = f"{self._root}/{files.optim_file}"
        is_expert, name = self._sub_group(files, index)
        expected: int = self._world
        if is_expert:
            entry = self._autoep.entry_of(files, name)
            expected = self._world // max(1, entry["ep_size"])
            if expected * entry["ep_size"] != self._world or (
                entry["expert_data_parallel_world_size"] != expected
            ):
                raise MismatchError(
                    f"{self._where(files)}: {entry['expert_data_parallel_world_size']} "
                    f"expert-data-parallel ranks times ep_size {entry['ep_size']} is not the world "
                    f"size {self._world}."
                )
        if files.partition_groups is None:
            if is_expert:
                raise UnreadableError(
                    f"{where} lacks ds_zero_partition_groups, which says how experts are cut."
                )
            count: Any = files.partition_count
            own: Any = files.rank
            if isinstance(count, list):
                count = count[index]
        else:
            if index >= len(files.partition_groups):
                raise UnreadableError(f"{where}: ds_zero_partition_groups lacks sub-group {index}.")
            group = files.partition_groups[index]
            count, own = group.get("partition_count"), group.get("partition_rank")
            members = group.get("partition_ranks") or range(self._world)
            if not isinstance(own, int) or not 0 <= own < len(members) or members[own] != files.rank:
                raise MismatchError(
                    f"{where}: sub-group {index} lists partition_rank {own} of ranks {members}, which "
                    f"is not this file's rank {files.rank}. The file is in another "
                    "rank's place; copy this checkpoint again."
                )
        if is_expert and own != entry["expert_data_parallel_rank"]:
            raise MismatchError(
                f"{self._where(files)} is of expert-data-parallel rank "
                f"{entry['expert_data_parallel_rank']}, {files.optim_file} holds partition {own}. One of "
                "the two files is in another rank's place; copy both again."
            )
        if count != expected:
            raise MismatchError(
                f"{where}: sub-group {index} is cut over {count!r} ranks (partition_count), and its "
                f"parameters are on {expected}. {_MIXED}"
            )
        return expected, int(own)

    def _check_same_names(self) -> None:
        """Dense parameters are on all ranks; an EP rank without experts lists none of theirs."""
        names = self.places[0].keys() - self._autoep.experts.keys()
        for rank in self.kinds():
            differing = sorted((self.places[rank].keys() - self._autoep.experts.keys()) ^ names)
            if differing:
                raise MismatchError(
                    f"{self._where(self._ranks[rank])} and {self._first.model_file} list different "
                    f"parameters: {differing[:5]}. They are not of the same save; copy the checkpoint "
                    "again."
                )

    def _check_same_order(self) -> None:
        """All ranks train one model: experts, too, stand in the same order in each EP rank's buffers. A
        buffer says no names, so that two experts' matrices of one size would change places unnoticed."""
        ours = list(self.places[0])
        for rank in self.kinds():
            theirs = list(self.places[rank])
            here = [name for name in ours if name in self.places[rank]]
            there = [name for name in theirs if name in self.places[0]]
            if here != there:
                one, other = next((a, b) for a, b in zip(here, there, strict=True) if a != b)
                raise MismatchError(
                    f"{self._where(self._ranks[rank])} lists {other} where {self._first.model_file} lists "
                    f"{one}: the ranks place parameters in different orders. They are not of the same "
                    "save; copy the checkpoint again."
                )
            counts = [[len(group) for group in files.shapes] for files in (self._ranks[rank], self._first)]
            if counts[0] != counts[1] and self._same_share(rank):
                raise MismatchError(
                    f"{self._where(self._ranks[rank])} has {counts[0]} parameters in its sub-groups, "
                    f"{self._first.model_file} has {counts[1]}, of the same sizes. They are not of the "
                    "same save; copy the checkpoint again."
                )

    def _same_share(self, rank: int) -> bool:
        """Whether a rank's parameters have the shapes of rank 0's."""
        return {name: place.shape for name, place in self.places[rank].items()} == {
            name: place.shape for name, place in self.places[0].items()
        }

    def check_same_slot(self, group: Group, name: str) -> None:
        """Ranks of a partition group lay out their flat buffers alike, and are at the same step."""
        first, *others = group.kinds
        ours, other = self.places[first][name], self._ranks[first]
        for rank in others:
            theirs, files = self.places[rank].get(name), self._ranks[rank]
            if theirs != ours:
                raise MismatchError(
                    f"{self._where(files)} and {other.model_file} place {name} differently: "
                    f"{theirs} and {ours}. {_MIXED}"
                )
            index = ours.sub_group
            mine, their = files.states[index], other.states[index]
            if {key: flat.dtype for key, flat in mine.items()} != {
                key: flat.dtype for key, flat in their.items()
            }:
                raise MismatchError(
                    f"{self._root}/{files.optim_file} has states {sorted(mine)} for sub-group "
                    f"{index}, {other.optim_file} has {sorted(their)}. {_MIXED}"
                )
            if not same(files.scalars[index], other.scalars[index]):
                raise MismatchError(
                    f"{self._root}/{files.optim_file} is at {_scalars(files, index)}, "
                    f"{other.optim_file} at {_scalars(other, index)}, for the same parameters. The "
                    "directory mixes files of different saves; copy this checkpoint again from its origin."
                )


def _scalars(files: RankFiles, index: int) -> str:
    return ", ".join(f"{key} {scalar.value}" for key, scalar in files.scalars[index].items())
