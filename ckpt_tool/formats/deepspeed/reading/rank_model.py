"""What a rank's model_states file says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ckpt_tool.containers.pickle_records import TensorRecord
from ckpt_tool.containers.torch_zip import TorchArchive
from ckpt_tool.errors import MismatchError, UnreadableError
from ckpt_tool.formats.deepspeed.facts.affine import expert_map
from ckpt_tool.formats.deepspeed.facts.partition import expert_holders
from ckpt_tool.formats.deepspeed.reading.rank_files import (
    DATA_FIRST,
    ENGINE_KEYS,
    LAYER_KEYS,
    FlatBuffer,
    RankFiles,
    Shapes,
)
from ckpt_tool.formats.deepspeed.reading.repeated import Repeated

_IN_FIELDS_OF_THEIR_OWN = frozenset({"module", "frozen_param_fragments", "param_shapes"})
_SIZES = frozenset({"num_experts", "num_local_experts", "ep_size", "expert_key_prefix"})
_OF_RANK_0 = frozenset({"universal_checkpoint_info", "ds_config", "optimizer"})  # as far as they are read


def read_model(archive: TorchArchive, rank: int, optim_name: str, repeated: Repeated) -> RankFiles:
    """A rank's file, without what its optimizer file adds.

    Raises:
        UnreadableError: it is no model file of ZeRO-3, or malformed.
    """
    root, where = archive.root, archive.where
    missing = [
        key
        for key in ("module", "param_shapes", "dp_world_size")
        if not (isinstance(root, dict) and key in root)
    ]
    if missing:
        raise UnreadableError(f"{where} lacks {missing}: it is no ZeRO-3 model_states file.")
    shapes = repeated.once("shapes", (root["param_shapes"],), lambda: _shapes(root["param_shapes"], where))
    module = repeated.once(
        "module", (root["module"], root.get("buffer_names")), lambda: _module(root, repeated)
    )
    fragments = root.get("frozen_param_fragments") or {}
    stated = root.get("frozen_param_shapes") or {}
    frozen_shapes = repeated.once("frozen shapes", (stated,), lambda: _named_shapes(stated, where))
    frozen = repeated.once("frozen", (fragments,), lambda: _fragments(archive, fragments))
    buffers, crcs = {}, {}
    for name, record in module.buffers.items():
        tensor = archive.tensor(name, "weight", record)
        crcs[name] = archive.storage_crc(record)
        if rank == 0:
            buffers[name] = tensor
    client, digests, notes = _client_state(archive, repeated)
    return RankFiles(
        rank, archive.path, optim_name, (archive.source, archive.source), repeated.one(shapes, shapes),
        frozen_shapes, frozen, archive.offsets_of(fragments.values()), buffers, crcs, module.names,
        _engine(archive, rank, repeated, shapes), client, digests, notes,
    )  # fmt: skip


class _Module(NamedTuple):
    """The names in 'module' in order, and those of buffers with their records."""

    names: tuple[str, ...]
    buffers: Mapping[str, TensorRecord]


def _module(root: Mapping[str, Any], repeated: Repeated) -> _Module:
    """Parameters are placeholders of no elements; what holds data in 'module' is a buffer."""
    known = root.get("buffer_names") or ()
    buffers = {
        name: record
        for name, record in root["module"].items()
        if isinstance(record, TensorRecord) and (record.numel or name in known)
    }
    names = tuple(root["module"])
    return _Module(repeated.one(names, names), buffers)


def _fragments(archive: TorchArchive, fragments: Mapping[str, TensorRecord]) -> dict[str, FlatBuffer]:
    for record in fragments.values():
        archive.require_contiguous(record)
    return {
        name: FlatBuffer(number, record.numel, record.dtype)
        for number, (name, record) in enumerate(fragments.items())
    }


def _client_state(
    archive: TorchArchive, repeated: Repeated
) -> tuple[dict[str, Any], dict[str, str], tuple[str, ...]]:
    """The user's own entries, digests of them, and why some are left out."""
    client, digests, notes = {}, {}, []
    for key, value in archive.root.items():
        if key in ENGINE_KEYS and not (key in ("data_sampler", "random_ltd") and value):
            continue
        try:
            client[key] = repeated.carried(archive, value)
            digests[key] = repeated.digest(archive, value)
        except UnreadableError as error:
            notes.append(f"client state {key!r} is left out: {error}")
        except RecursionError:
            notes.append(f"client state {key!r} is left out: it contains itself.")
    return client, digests, tuple(notes)


def _engine(archive: TorchArchive, rank: int, repeated: Repeated, shapes: Shapes) -> dict[str, Any]:
    engine = {}
    for key in ENGINE_KEYS:
        if key not in archive.root or key in _IN_FIELDS_OF_THEIR_OWN or (rank and key in _OF_RANK_0):
            continue
        value = archive.root[key]
        if key in LAYER_KEYS:
            engine[key] = _slim(value, repeated, shapes, archive.where)
        else:
            engine[key] = repeated.carried(archive, value)
    config = archive.root.get("ds_config")
    if isinstance(config, dict):
        engine[DATA_FIRST] = bool(config.get(DATA_FIRST, False))
    return engine


def _slim(entries: Any, repeated: Repeated, shapes: Shapes, where: str) -> Any:
    """Layer entries without their affine maps, which repeat the placement, and with one copy of that.

    Raises:
        MismatchError: the maps say something else than the placement.
    """
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return entries
    slim = []
    for entry in entries:
        kept = {key: value for key, value in entry.items() if key != "affine_maps"}
        maps, placement = entry.get("affine_maps"), entry.get("expert_placement")
        if maps and not repeated.once(
            f"maps of {entry.get('expert_key_prefix')}",
            (maps, placement, shapes),
            lambda entry=entry: _maps_agree(entry, shapes, where),  # type: ignore[misc]
        ):
            raise MismatchError(
                f"{where}: expert_placement and affine_maps of {entry.get('expert_key_prefix')} say "
                "different things of where its experts are. The metadata is damaged; copy the file again."
            )
        if "expert_placement" in kept:
            kept["expert_placement"] = _one_placement(kept["expert_placement"], repeated)
        slim.append(kept)
    return slim


def _maps_agree(entry: Mapping[str, Any], shapes: Shapes, where: str) -> bool:
    """Whether the maps are those of the placement, for the experts that the rank's buffers list."""
    maps = entry["affine_maps"]
    params = maps.get("params") if isinstance(maps, Mapping) and maps.get("version") == 1 else None
    if not isinstance(params, Mapping):
        return False
    if not entry.keys() >= _SIZES:
        return True  # refused for what it lacks
    holders = expert_holders(entry, where)
    return all(
        params[name] == expert_map(holders, (entry["num_experts"], *shape[1:]))
        for group in shapes
        for name, shape in group
        if name in params
    )


def _one_placement(placement: Any, repeated: Repeated) -> Any:
    return repeated.once("placement", (placement,), lambda: repeated.one(repr(placement), placement))


def _shapes(groups: Any, where: str) -> Shapes:
    return tuple(tuple(_named_shapes(group, where).items()) for group in groups)


def _named_shapes(group: Mapping[str, Any], where: str) -> dict[str, tuple[int, ...]]:
    return {name: _shape(shape, name, where) for name, shape in group.items()}


def _shape(shape: Any, name: str, where: str) -> tuple[int, ...]:
    sizes = tuple(shape) if isinstance(shape, tuple | list) else None
    if sizes is None or any(type(size) is not int or size < 0 for size in sizes):
        raise UnreadableError(f"{where}: the shape of {name} is malformed: {shape!r}.")
    return sizes
