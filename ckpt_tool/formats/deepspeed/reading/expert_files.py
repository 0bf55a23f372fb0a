"""AutoEP's routed experts in ZeRO stages 0, 1 and 2: one file per expert, and EP-local stacks elsewhere.

``layer_{L}_expert_{E}_mp_rank_00_model_states.pt`` holds the matrices of global expert E of the L-th MoE
layer (counted among the MoE layers) in the model's dtype. ``ds_autoep_layers`` is rank 0's alone, so that
the EP rank of the others follows from the order of the ranks. Sources: deepspeed 0.19.8, runtime/engine.py
(``_save_moe_checkpoint``), utils/groups.py (``_get_expert_parallel_ranks``) and
checkpoint/autoep_universal.py (``_autoep_zero12_dp_ranks``).
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ckpt_tool.canonical import (
    WEIGHT,
    DType,
    ExpertName,
    MoELayer,
    Regions,
    Role,
    SourceFile,
    Tensor,
    Topology,
)
from ckpt_tool.containers.pickle_records import TensorRecord
from ckpt_tool.containers.torch_zip import TorchArchive
from ckpt_tool.errors import MismatchError, UnreadableError
from ckpt_tool.formats.deepspeed.facts.names import PROJECTION_OF, parse_expert
from ckpt_tool.formats.deepspeed.facts.partition import PartitionRegions, consecutive, expert_holders
from ckpt_tool.formats.deepspeed.reading.model_file import COPY_AGAIN, ModelFile, Shape
from ckpt_tool.geometry import Cut, CutRegions
from ckpt_tool.storage import Reader, read_each

_FILE = re.compile(r"layer_(-?\d{1,6})_expert_(\d{1,6})_mp_rank_(\d{1,6})_model_states\.pt$")
_FIELDS = (
    "moe_layer_id",
    "module_path",
    "num_experts",
    "num_local_experts",
    "ep_size",
    "expert_key_prefix",
)
_DATA_FIRST = "use_data_before_expert_parallelism"


def file_name(layer: int, expert: int) -> str:
    return f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt"


class _Stack(NamedTuple):
    """One projection of a layer over its expert files, by global id."""

    shape: Shape  # of one expert
    dtype: DType
    files: tuple[str, ...]
    offsets: array[int]


class Experts:
    """The MoE layers of a checkpoint and their expert files; empty without AutoEP.

    ``layers`` maps an expert key prefix (``model.layers.0.mlp.experts``) to its entry, ``holders`` to the
    global expert ids on each EP rank, ``names`` an expert parameter (``<prefix>.w1``) to its canonical
    name.

    Raises:
        UnreadableError: the metadata is malformed, or an expert's file is missing or malformed.
        MismatchError: files and metadata disagree.
    """

    def __init__(self, reader: Reader, model: ModelFile) -> None:
        self._reader, self._where = reader, model.where
        self.world = model.world
        self.layers = self._entries(model)
        self.holders = {prefix: expert_holders(entry, self._where) for prefix, entry in self.layers.items()}
        self.names = {
            f"{prefix}.{weight}": self._name(prefix, weight)
            for prefix in self.layers
            for weight in PROJECTION_OF
        }
        sizes = {entry["ep_size"] for entry in self.layers.values()}
        self.ep_size: int = max(sizes, default=1)
        if len(sizes) > 1 or self.world % self.ep_size:
            raise UnreadableError(
                f"{self._where}: {self.world} ranks (dp_world_size) and EP sizes {sorted(sizes)}: all "
                f"layers of one run have the same EP size, and it divides the ranks. {COPY_AGAIN}"
            )
        self.edp_size = self.world // self.ep_size
        self.data_first = data_before_expert(model.config)
        self.sources: list[SourceFile] = []
        self._stacks: dict[str, _Stack] = {}
        self._read_files()

    # ---- ranks

    def ep_rank(self, rank: int) -> int:
        """The EP rank of a data-parallel rank (utils/groups.py)."""
        return rank // self.edp_size if self.data_first else rank % self.ep_size

    def edp_rank(self, rank: int) -> int:
        """A rank's place among those that hold the same experts."""
        return rank % self.edp_size if self.data_first else rank // self.ep_size

    def sharers(self, ep_rank: int) -> list[int]:
        """The ranks that hold an EP rank's experts, in order."""
        return [rank for rank in range(self.world) if self.ep_rank(rank) == ep_rank]

    def topology(self, stage: int) -> Topology:
        if not self.layers:
            return Topology(self.world, zero_stage=stage)
        ranks = range(self.world)
        return Topology(
            self.world,
            self.ep_size,
            self.edp_size,
            stage,
            tuple(self.ep_rank(rank) for rank in ranks),
            tuple(self.edp_rank(rank) for rank in ranks),
        )

    # ---- names and shapes

    @property
    def routers(self) -> tuple[str, ...]:
        """Module paths of the MoE blocks."""
        return tuple(entry["module_path"] for entry in self.layers.values())

    def of_layer(self, prefix: str) -> list[str]:
        """The expert parameters of a layer, in the order of the module."""
        return [f"{prefix}.{weight}" for weight in sorted(PROJECTION_OF)]

    def holders_of(self, name: str) -> tuple[tuple[int, ...], ...]:
        return self.holders[name.rpartition(".")[0]]

    def shape(self, name: str, ep_rank: int | None = None) -> Shape:
        """The shape of an expert parameter, of all experts or of those on one EP rank."""
        holders = self.holders_of(name)
        stack = self._stacks[name]
        count = len(stack.files) if ep_rank is None else len(holders[ep_rank])
        return (count, *stack.shape)

    def moe_layers(self) -> tuple[MoELayer, ...]:
        return tuple(
            MoELayer(
                self.names[f"{prefix}.w1"].layer_path,
                entry["module_path"],
                entry["num_experts"],
                self.holders[prefix],
            )
            for prefix, entry in self.layers.items()
        )

    # ---- tensors

    def weights(self, name: str, role: Role, state: str = WEIGHT) -> Tensor:
        """All experts of a parameter as the expert files hold them."""
        stack = self._stacks[name]
        shape = self.shape(name)
        regions = PartitionRegions(math.prod(shape), stack.files, stack.offsets, 0, stack.dtype.itemsize)
        return Tensor(self.names[name], state, shape, stack.dtype, regions, role)

    def stack(self, name: str, shares: Mapping[int, Tensor]) -> Tensor:
        """Put the EP ranks' shares of one state of a parameter together by global expert id."""
        size = math.prod(self._stacks[name].shape)
        cuts: list[Cut] = []
        copies: list[Cut] = []
        owned: set[int] = set()
        example = next(iter(shares.values()))
        for ep_rank, ids in enumerate(self.holders_of(name)):
            share = shares.get(ep_rank)
            if not ids:
                continue
            if share is None or share.dtype is not example.dtype:
                raise MismatchError(
                    f"{self._reader.root}: EP ranks disagree on {example.state} of {name}: "
                    f"{share.dtype if share else 'absent'} on EP rank {ep_rank}, {example.dtype} on others."
                    f" {COPY_AGAIN}"
                )
            for position, first, count in _runs(ids, owned):
                cut = Cut(first * size, count * size, share, position * size)
                (copies if first in owned else cuts).append(cut)
            owned |= set(ids)
        replicas: Regions = CutRegions(copies) if copies else ()
        return Tensor(
            self.names[name],
            example.state,
            self.shape(name),
            example.dtype,
            CutRegions(cuts),
            replicas=replicas,
        )

    # ---- reading

    def _name(self, prefix: str, weight: str) -> ExpertName:
        module = self.layers[prefix]["module_path"]
        parsed = parse_expert(f"{prefix}.{weight}")
        if parsed is None or parsed[0] != module:
            raise UnreadableError(
                f"{self._where}: the MoE block {module} with experts at {prefix} is not at "
                f"<layers>.<number>.<block>.experts; its layer cannot be told. {COPY_AGAIN}"
            )
        return parsed[1]

    def _entries(self, model: ModelFile) -> dict[str, Mapping[str, Any]]:
        entries = model.engine.get("ds_autoep_layers", model.engine.get("autoep_layers"))
        if entries is None:
            return {}
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UnreadableError(
                f"{self._where}: ds_autoep_layers is malformed (not a list of entries). {COPY_AGAIN}"
            )
        for entry in entries:
            _check_entry(entry, self._where, model.world)
        ids = [entry["moe_layer_id"] for entry in entries]
        found = {entry["expert_key_prefix"]: entry for entry in entries}
        if len(found) != len(entries) or len(set(ids)) != len(ids):
            raise UnreadableError(f"{self._where}: ds_autoep_layers lists a layer twice. {COPY_AGAIN}")
        for prefix, entry in found.items():
            self._check_own_share(entry, prefix)
        return found

    def _check_own_share(self, entry: Mapping[str, Any], prefix: str) -> None:
        """Rank 0 holds as many experts as the placement gives its EP rank."""
        own = expert_holders(entry, self._where)[0]
        if not own:
            raise UnreadableError(
                f"{self._where}: rank 0 holds no experts of {prefix}, and only rank 0 saves the shapes of "
                "the optimizer's groups. Which states of the others are of this layer cannot be told."
                f" {COPY_AGAIN}"
            )
        if entry.get("ep_rank", 0) != 0 or len(own) != entry["num_local_experts"]:
            raise MismatchError(
                f"{self._where}: {prefix} says EP rank {entry.get('ep_rank', 0)} and num_local_experts "
                f"{entry['num_local_experts']}; rank 0 is EP rank 0, and the placement gives it {len(own)}."
                f" {COPY_AGAIN}"
            )

    def _read_files(self) -> None:
        listed = {}
        for name in self._reader.list():
            match = _FILE.match(name)
            if match is None:
                continue
            if int(match[3]) > 0:
                raise UnreadableError(
                    f"{self._reader.root}/{name}: the experts were also split by tensor parallelism. "
                    "ckpt-tool does not read AutoTP checkpoints."
                )
            listed[int(match[1]), int(match[2])] = name
        if listed and not self.layers:
            raise UnreadableError(
                f"{self._reader.root} has expert files ({next(iter(listed.values()))}), but "
                f"{self._where} has no ds_autoep_layers: DeepSpeed's own MoE layers. ckpt-tool reads "
                "AutoEP's."
            )
        wanted = [
            (entry["moe_layer_id"], expert, prefix)
            for prefix, entry in self.layers.items()
            for expert in range(entry["num_experts"])
        ]
        for layer, expert, prefix in wanted:
            if (layer, expert) not in listed:
                raise UnreadableError(
                    f"{self._reader.root}/{file_name(layer, expert)} is missing: the weights of expert "
                    f"{expert} of {prefix}. Copy the files of all ranks."
                )
        extra = sorted(set(listed) - {(layer, expert) for layer, expert, _ in wanted})
        if extra:
            raise UnreadableError(
                f"{self._reader.root}/{listed[extra[0]]} belongs to no layer or expert that {self._where} "
                "describes: left over from another run. Remove it."
            )
        archives = read_each(
            lambda item: _ExpertFile(self._reader, listed[item[0], item[1]], *item[1:]), wanted
        )
        self.sources = [archive.source for archive in archives]
        for prefix, entry in self.layers.items():
            own = [
                archive for archive, (layer, _, _) in zip(archives, wanted, strict=True)
                if layer == entry["moe_layer_id"]
            ]  # fmt: skip
            for weight in PROJECTION_OF:
                self._stacks[f"{prefix}.{weight}"] = self._stack_files(prefix, weight, own)

    def _stack_files(self, prefix: str, weight: str, files: Sequence[_ExpertFile]) -> _Stack:
        first = files[0].matrices[weight]
        for file in files:
            shape, dtype, _ = file.matrices[weight]
            if (shape, dtype) != first[:2]:
                raise MismatchError(
                    f"{self._reader.root}/{file.source.path}: {prefix}.{weight} is {list(shape)} {dtype}, "
                    f"in {files[0].source.path} it is {list(first[0])} {first[1]}. Experts of a layer are "
                    f"alike. {COPY_AGAIN}"
                )
        offsets = array("q", [file.matrices[weight][2] for file in files])
        return _Stack(first[0], first[1], tuple(file.source.path for file in files), offsets)


class _ExpertFile:
    """One expert's file: ``matrices`` are (shape, dtype, byte offset) by w1, w2, w3."""

    def __init__(self, reader: Reader, path: str, expert: int, prefix: str) -> None:
        archive = TorchArchive(reader, path)
        self.source = archive.source
        root = archive.root if isinstance(archive.root, dict) else {}
        expected = {weight: f"{prefix}.{weight}.{expert}" for weight in PROJECTION_OF}
        if set(root) != set(expected.values()):
            raise UnreadableError(
                f"{archive.where} holds {sorted(map(str, root))[:4]}; expert {expert} of {prefix} is "
                f"expected there: {sorted(expected.values())}. The file is in another's place, or of "
                f"another engine. {COPY_AGAIN}"
            )
        self.matrices: dict[str, tuple[Shape, DType, int]] = {}
        for weight, key in expected.items():
            record = root[key]
            if not isinstance(record, TensorRecord) or len(record.shape) != 2 or not record.numel:
                shape = list(record.shape) if isinstance(record, TensorRecord) else type(record).__name__
                raise UnreadableError(f"{archive.where}: {key} is no matrix but {shape}. {COPY_AGAIN}")
            self.matrices[weight] = (record.shape, record.dtype, archive.offset_of(record))


def data_before_expert(config: Any) -> bool:
    """Whether neighbouring ranks hold the same experts, from a ``ds_config``."""
    return isinstance(config, dict) and bool(config.get(_DATA_FIRST, False))


def _check_entry(entry: Mapping[str, Any], where: str, world: int) -> None:
    missing = sorted(set(_FIELDS) - entry.keys())
    if missing:
        raise UnreadableError(f"{where}: an entry of ds_autoep_layers lacks {missing}. {COPY_AGAIN}")
    layer = entry["expert_key_prefix"]
    if not isinstance(layer, str) or not isinstance(entry["module_path"], str):
        raise UnreadableError(
            f"{where}: expert_key_prefix or module_path is malformed: {layer!r}. {COPY_AGAIN}"
        )
    if entry.get("checkpoint_format", "per_expert_files") != "per_expert_files":
        raise UnreadableError(
            f"{where}: {layer} is stored as {entry['checkpoint_format']!r}; beside "
            f"{where.rpartition('/')[2]} it is 'per_expert_files'. The directory mixes files of different "
            f"saves. {COPY_AGAIN}"
        )
    for key, least in (("moe_layer_id", 0), ("num_experts", 1), ("num_local_experts", 0), ("ep_size", 1)):
        if type(entry[key]) is not int or entry[key] < least:
            raise UnreadableError(f"{where}: {key} of {layer} is malformed: {entry[key]!r}. {COPY_AGAIN}")
    edp = entry.get("expert_data_parallel_world_size")
    if edp is not None and edp * entry["ep_size"] != world:
        raise MismatchError(
            f"{where}: {edp} expert-data-parallel ranks of {layer} times ep_size {entry['ep_size']} is not "
            f"the world size {world}. {COPY_AGAIN}"
        )


def _runs(ids: Sequence[int], owned: set[int]) -> list[tuple[int, int, int]]:
    """Runs of consecutive ids; one by one where another EP rank has some of them too."""
    if owned.isdisjoint(ids):
        return list(consecutive(ids))
    return [(position, expert, 1) for position, expert in enumerate(ids)]
