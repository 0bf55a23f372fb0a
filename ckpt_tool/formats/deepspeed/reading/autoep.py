"""What AutoEP says of its MoE layers in a checkpoint: ``ds_autoep_layers``, checked and cross-checked.

Fields and rules: deepspeed 0.19.8, checkpoint/autoep_zero3_metadata.py. Releases before 0.19.8 write no
``expert_placement``, and the first ones used the key ``autoep_layers``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_tool.errors import MismatchError, UnreadableError
from ckpt_tool.formats.deepspeed.facts.names import PROJECTION_OF
from ckpt_tool.formats.deepspeed.facts.partition import expert_holders
from ckpt_tool.formats.deepspeed.facts.topology import Ranks
from ckpt_tool.formats.deepspeed.reading.rank_files import DATA_FIRST, RankFiles

Entry = Mapping[str, Any]

_LAYER_FIELDS = frozenset(
    "moe_layer_id module_path num_experts num_local_experts ep_size expert_key_prefix".split()
)
_PARTITIONED_FIELDS = frozenset(
    "checkpoint_format_version ep_group_name ep_rank expert_data_parallel_rank "
    "expert_data_parallel_world_size global_expert_start global_expert_end".split()
)
_COUNTS = ("num_experts", "num_local_experts", "ep_size", "ep_rank")


class AutoEP:
    """The MoE layers of a checkpoint; empty without AutoEP.

    ``layers`` maps an expert key prefix (``model.layers.0.mlp.experts``) to rank 0's entry, ``holders``
    to the global expert ids on each EP rank, ``experts`` an expert parameter to its prefix and
    projection. ``entries[r]`` is what rank r says.

    Raises:
        UnreadableError: an entry is malformed or of an unknown version.
        MismatchError: ranks disagree.
    """

    def __init__(self, root: str, ranks: list[RankFiles]) -> None:
        self._root, self._first = root, ranks[0]
        self.entries = [self._entries(files) for files in ranks]
        self.layers = self.entries[0]
        self.holders = {
            prefix: expert_holders(entry, self._where(ranks[0])) for prefix, entry in self.layers.items()
        }
        self.experts = {
            f"{prefix}.{weight}": (prefix, projection)
            for prefix in self.layers
            for weight, projection in PROJECTION_OF.items()
        }
        for files in ranks:
            for prefix in self.layers:
                self._check_same_layer(files, self.entry(files, prefix), prefix)
            self._check_place(files, len(ranks))

    def entry(self, files: RankFiles, prefix: str) -> Entry:
        """What a rank says of a layer."""
        entry = self.entries[files.rank].get(prefix)
        if entry is None:
            raise MismatchError(f"{self._where(files)} does not describe the MoE layer {prefix}.")
        return entry

    def entry_of(self, files: RankFiles, parameter: str) -> Entry:
        """What a rank says of the layer an expert parameter belongs to."""
        return self.entry(files, self.experts[parameter][0])

    def layer_path(self, prefix: str) -> str:
        """The module path of the layer: ``model.layers.0``."""
        module: str = self.layers[prefix]["module_path"]
        path, _, _ = module.rpartition(".")
        if prefix != f"{module}.experts" or not path.rsplit(".", 1)[-1].isdigit():
            raise UnreadableError(
                f"{self._where(self._first)}: the MoE block {module} with experts at {prefix} is not "
                "at <layers>.<number>.<block>.experts; its layer cannot be told."
            )
        return path

    def _where(self, files: RankFiles) -> str:
        return f"{self._root}/{files.model_file}"

    def _entries(self, files: RankFiles) -> dict[str, Entry]:
        entries = files.engine.get("ds_autoep_layers", files.engine.get("autoep_layers"))
        if entries is None:
            return {}
        where = self._where(files)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UnreadableError(f"{where}: ds_autoep_layers is malformed (not a list of entries).")
        for entry in entries:
            _check_entry(entry, where)
        found = {entry["expert_key_prefix"]: entry for entry in entries}
        if len(found) != len(entries):
            raise UnreadableError(f"{where}: ds_autoep_layers lists a layer twice.")
        numbers = [entry["moe_layer_id"] for entry in entries]
        if numbers != list(range(len(entries))):
            raise UnreadableError(
                f"{where}: ds_autoep_layers numbers its layers {numbers[:8]} (moe_layer_id), the engine "
                "counts them from 0 in the model's order. The metadata is damaged; copy the file again."
            )
        return found

    def _check_same_layer(self, files: RankFiles, entry: Entry, prefix: str) -> None:
        holders = self.holders[prefix]
        where = self._where(files)
        known = self.layers[prefix]
        same = entry.get("expert_placement") == known.get("expert_placement") and all(
            entry[key] == known[key] for key in ("num_experts", "ep_size")
        )
        if (not same and expert_holders(entry, where) != holders) or entry["ep_rank"] >= len(holders):
            raise MismatchError(
                f"{where} places the experts of {prefix} differently than {self._first.model_file} does. "
                "The directory mixes files of different saves; copy this checkpoint again from its origin."
            )
        own = holders[entry["ep_rank"]]
        if len(own) != entry["num_local_experts"]:
            raise MismatchError(
                f"{where}: EP rank {entry['ep_rank']} of {prefix} says num_local_experts "
                f"{entry['num_local_experts']}; the placement gives it {len(own)}."
            )
        span = (entry["global_expert_start"], entry["global_expert_end"])
        start = entry["ep_rank"] * len(own)  # of any placement: deepspeed 0.19.8, runtime/engine.py
        if span != (start, start + len(own)):
            raise MismatchError(
                f"{where}: EP rank {entry['ep_rank']} of {prefix} states experts {span[0]} to {span[1]}; "
                f"{len(own)} experts on each rank make it {start} to {start + len(own)}. The metadata "
                "contradicts itself; copy the file again."
            )
        if entry["moe_layer_id"] != known["moe_layer_id"] or entry["module_path"] != known["module_path"]:
            raise MismatchError(
                f"{where}: {prefix} is layer {entry['moe_layer_id']} ({entry['module_path']}); in "
                f"{self._first.model_file} it is {known['moe_layer_id']} ({known['module_path']}). They "
                "are not of the same save; copy the checkpoint again."
            )

    def _check_place(self, files: RankFiles, world: int) -> None:
        """Each layer's EP rank is the one that the file's rank has in that topology."""
        data_first = bool(self._first.engine.get(DATA_FIRST))
        for prefix, entry in self.entries[files.rank].items():
            ep_size = entry["ep_size"]
            if world % ep_size:
                continue  # refused where the partitions are looked at, with the numbers
            ranks = Ranks(world, ep_size, data_first)
            wanted = (ranks.ep_rank(files.rank), ranks.edp_rank(files.rank))
            found = (entry["ep_rank"], entry["expert_data_parallel_rank"])
            if found != wanted:
                raise MismatchError(
                    f"{self._where(files)} is of EP rank {found[0]} and expert-data-parallel rank "
                    f"{found[1]} by its {prefix}; rank {files.rank} of {world} at EP size {ep_size} is EP "
                    f"rank {wanted[0]}, expert-data-parallel rank {wanted[1]}. The file is in another "
                    "rank's place, or its metadata is damaged; copy it again."
                )


def _check_entry(entry: Entry, where: str) -> None:
    missing = sorted(_LAYER_FIELDS - entry.keys())
    if not missing and entry.get("checkpoint_format") == "zero3_partitioned":
        missing = sorted(_PARTITIONED_FIELDS - entry.keys())
    if missing:
        raise UnreadableError(f"{where}: an entry of ds_autoep_layers lacks {missing}.")
    layer = entry["expert_key_prefix"]
    if not isinstance(layer, str) or not isinstance(entry["module_path"], str):
        raise UnreadableError(f"{where}: expert_key_prefix or module_path is malformed: {layer!r}.")
    if entry.get("checkpoint_format") != "zero3_partitioned":
        raise UnreadableError(
            f"{where}: {layer} is stored as {entry.get('checkpoint_format')!r}; a ZeRO-3 checkpoint of "
            "AutoEP is 'zero3_partitioned'."
        )
    if entry["checkpoint_format_version"] != 1:
        raise UnreadableError(
            f"{where}: {layer} is in AutoEP ZeRO-3 format version {entry['checkpoint_format_version']!r}; "
            "this release of ckpt-tool reads version 1."
        )
    for key in _COUNTS:
        least = 1 if key in ("num_experts", "ep_size") else 0
        if type(entry[key]) is not int or entry[key] < least:
            raise UnreadableError(f"{where}: {key} of {layer} is malformed: {entry[key]!r}.")
