"""Where each parameter lies in each rank's flat buffers, and whether the ranks agree about it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ckpt_tool.errors import MismatchError, UnreadableError
from ckpt_tool.formats.deepspeed.facts.partition import partition_size
from ckpt_tool.formats.deepspeed.reading.autoep import AutoEP
from ckpt_tool.formats.deepspeed.reading.rank_files import RankFiles


class Place(NamedTuple):
    """Where a parameter lies in a rank's flat buffers: ``within`` elements into those of ``sub_group``,
    as ``partition`` of ``cut_over``. ``shape`` is its full shape (for experts: that of the EP rank)."""

    sub_group: int
    within: int
    cut_over: int
    partition: int
    shape: tuple[int, ...]


class Placement:
    """``places[r]`` maps each parameter that rank r holds a part of to its place there.

    Raises:
        MismatchError: shapes, partitions and buffers do not fit together, or ranks disagree.
        UnreadableError: the metadata that says how buffers are cut is missing or malformed.
    """

    def __init__(self, root: str, ranks: list[RankFiles], autoep: AutoEP) -> None:
        self._root, self._ranks, self._autoep = root, ranks, autoep
        self._first, self._world = ranks[0], len(ranks)
        self.places = [self._place(files) for files in ranks]
        self._check_same_names()

    def _where(self, files: RankFiles) -> str:
        return f"{self._root}/{files.model_file}"

    def _place(self, files: RankFiles) -> dict[str, Place]:
        places: dict[str, Place] = {}
        for index, group in enumerate(files.shapes):
            count, own = self._partition(files, index)
            within = 0
            for name, shape in group:
                if name in places:
                    raise UnreadableError(f"{self._where(files)}: {name} is in two sub-groups.")
                places[name] = Place(index, within, count, own, shape)
                within += partition_size(math.prod(shape), count)
            for state, flat in files.states[index].items():
                if flat.numel != within:
                    raise MismatchError(
                        f"{self._root}/{files.optim_file}: {state} of sub-group {index} has "
                        f"{flat.numel} elements; the shapes in {files.model_file}, cut over {count} "
                        f"ranks, make {within}. Shapes and partitions are not of the same run."
                    )
        return places

    def _partition(self, files: RankFiles, index: int) -> tuple[int, int]:
        """(number of ranks a sub-group is cut over, this rank's place among them)."""
        where = f"{self._root}/{files.optim_file}"
        names = [name for name, _ in files.shapes[index]]
        expert = [name in self._autoep.experts for name in names]
        if any(expert) != all(expert):
            raise UnreadableError(f"{where}: sub-group {index} mixes experts and dense parameters.")
        is_expert = bool(expert) and expert[0]
        expected: int = self._world
        if is_expert:
            entry = self._autoep.entry_of(files, names[0])
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
            members = list(group.get("partition_ranks") or range(self._world))
            if not isinstance(own, int) or not 0 <= own < len(members) or members[own] != files.rank:
                raise MismatchError(
                    f"{where}: sub-group {index} lists partition_rank {own} of ranks {members}, which "
                    f"is not this file's rank {files.rank}. The file is in another rank's place."
                )
        if is_expert and own != entry["expert_data_parallel_rank"]:
            raise MismatchError(
                f"{self._where(files)} is of expert-data-parallel rank "
                f"{entry['expert_data_parallel_rank']}, {files.optim_file} holds partition {own}. One of "
                "the two files is in another rank's place; copy both again."
            )
        if count != expected:
            raise MismatchError(
                f"{where}: partition_count of sub-group {index} is {count!r}; the topology makes it "
                f"{expected}. The metadata does not fit together."
            )
        return expected, int(own)

    def _check_same_names(self) -> None:
        """Dense parameters are on all ranks; an EP rank without experts lists none of theirs."""
        names = self.places[0].keys() - self._autoep.experts.keys()
        for files, places in zip(self._ranks, self.places, strict=True):
            differing = sorted((places.keys() - self._autoep.experts.keys()) ^ names)
            if differing:
                raise MismatchError(
                    f"{self._where(files)} and {self._first.model_file} list different parameters: "
                    f"{differing[:5]}. They are not of the same save; copy the checkpoint again."
                )

    def check_same_slot(self, rank: int, first: int, name: str) -> None:
        """Ranks of a partition group lay out their flat buffers alike, and are at the same step."""
        ours, theirs = self.places[first][name], self.places[rank].get(name)
        files, other = self._ranks[rank], self._ranks[first]
        if theirs is None or theirs._replace(partition=ours.partition) != ours:
            raise MismatchError(
                f"{self._where(files)} and {other.model_file} place {name} differently: "
                f"{theirs} and {ours}. They are not of the same save."
            )
        index = ours.sub_group
        mine, their = files.states[index], other.states[index]
        if {key: flat.dtype for key, flat in mine.items()} != {
            key: flat.dtype for key, flat in their.items()
        }:
            raise MismatchError(
                f"{self._root}/{files.optim_file} has states {sorted(mine)} for sub-group "
                f"{index}, {other.optim_file} has {sorted(their)}."
            )
        if files.scalars[index] != other.scalars[index]:
            raise MismatchError(
                f"{self._root}/{files.optim_file} is at {_scalars(files, index)}, "
                f"{other.optim_file} at {_scalars(other, index)}, for the same parameters. The "
                "directory mixes files of different saves; copy this checkpoint again from its origin."
            )


def _scalars(files: RankFiles, index: int) -> str:
    return ", ".join(f"{key} {scalar.value}" for key, scalar in files.scalars[index].items())
