"""From entries to a catalogue: which directories belong together, and what they say of a run.

FSDP2 keeps its parameters in the optimizer's precision and casts them for compute, so a parameter that
has optimizer state and is fp32 *is* the master; it is listed as ``master`` and there is no ``weight``
beside it. Parameters in another precision, and those without optimizer state, are listed as ``weight``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ckpt_tool.canonical import (
    MASTER,
    NOT_COMPARED,
    STEP,
    WEIGHT,
    Checkpoint,
    DType,
    ParamGroup,
    Role,
    Scalar,
    Tensor,
    TensorName,
    TrainingState,
    same,
)
from ckpt_tool.containers.dcp_metadata import METADATA, Path, Stored
from ckpt_tool.containers.pickle_records import Unread
from ckpt_tool.containers.torch_zip import TorchArchive
from ckpt_tool.errors import MismatchError, UnreadableError, UsageError
from ckpt_tool.families import Family, family_of
from ckpt_tool.families.agreement import embedding_name, head_name, says_of_ties
from ckpt_tool.formats.dcp.contents import Held, rank_of
from ckpt_tool.formats.dcp.grammar.experts import Naming, is_stacked, titan_expert
from ckpt_tool.formats.dcp.grammar.keys import Scheme, Sorted
from ckpt_tool.formats.dcp.grammar.titan import Fused, take_apart
from ckpt_tool.formats.dcp.reading.beside import SCHEDULER_LEFT_OUT, Beside, find_beside
from ckpt_tool.formats.dcp.reading.completeness import check_rows
from ckpt_tool.formats.dcp.reading.directories import TITAN_NAME, Found, read_directories
from ckpt_tool.formats.dcp.reading.topology import ep_size, layers_of, topology, unbroken, world_size
from ckpt_tool.json_file import read_object
from ckpt_tool.storage import Reader
from ckpt_tool.wrappers import note_of

_BUFFER = re.compile(
    r".*(?:expert_bias(?:_E)?|e_score_correction_bias|inv_freq|running_mean|running_var|num_batches_tracked)"
)
_TITAN_EMBEDDING = "tok_embeddings.weight"
# What is to be said of entries that are neither a model's tensors nor an optimizer's.
ONLY_HERE = f"{NOT_COMPARED} and carried only to a DCP checkpoint of the same framework:"
_HEADS = ("lm_head.weight", "output.weight")


@dataclass(frozen=True, slots=True, repr=False)
class Hint:
    """What the writer needs to write the like again: the keys, and each entry's chunks and file.

    ``saved`` has the keys and paths that entries were saved under, where wrappers add parts to them.
    ``files`` are all .distcp files, those that hold nothing among them. ``names`` are those in the
    catalogue of each parameter, ``archives`` where objects lie. ``fused`` are torchtitan's parameters whose
    states are taken apart in the catalogue and in ``apart``, and not in ``sorted``.
    """

    scheme: Scheme
    entries: Mapping[str, Held]
    objects: Mapping[str, Any]
    archives: Mapping[str, Stored]
    paths: Mapping[str, Path]
    saved: Mapping[str, tuple[str, Path]]
    files: tuple[str, ...]
    sorted: Sorted
    apart: Sorted
    names: Mapping[str, tuple[TensorName, ...]]
    fused: Mapping[str, Fused]
    beside: Beside


def read(reader: Reader, name: str) -> Checkpoint:
    """The catalogue of a DCP checkpoint in any framework's layout."""
    found = read_directories(reader)
    config = _config(reader)
    family, notes = _family(config)
    return _Catalogue(reader, found, config, family, notes).checkpoint(name)


def _config(reader: Reader) -> Mapping[str, Any] | None:
    if "config.json" not in reader.list():
        return None
    return _json(reader, "config.json")


def _json(reader: Reader, name: str) -> Mapping[str, Any]:
    """A JSON object in a file; raises UnreadableError where it is none."""
    return read_object(reader, name)


def _family(config: Mapping[str, Any] | None) -> tuple[Family | None, tuple[str, ...]]:
    if config is None:
        return None, ()
    try:
        return family_of(config), ()
    except UsageError as error:
        return None, (f"{error} Experts are not told apart.",)


# ---- the catalogue


class _Catalogue:
    """Builds the catalogue from the sorted entries."""

    def __init__(
        self,
        reader: Reader,
        found: Found,
        config: Mapping[str, Any] | None,
        family: Family | None,
        notes: tuple[str, ...],
    ) -> None:
        self._reader, self._found = reader, found
        self._entries, self._fused = take_apart(found.sorted, config, reader.root)
        self._naming = Naming(self._entries.model, family, config)
        self._config, self._family, self._notes = config, family, [*notes, *found.contents.notes]
        self._notes += note_of({plain: key for plain, (key, _) in found.contents.saved.items()})
        self._beside = find_beside(reader)
        if note := self._beside.note():
            self._notes.append(note)
        self._unresolved = found.sorted.unresolved
        if self._unresolved:
            self._notes.append(
                f"{self._unresolved} The weights are all there. A training script that loads it can save "
                "it again that way."
            )
        if found.sorted.nameless:
            self._notes.append(found.sorted.nameless)
        others = () if self._unresolved else found.sorted.other_tensors
        if kept := [*others, *found.sorted.model_objects]:
            self._notes.append(f"{ONLY_HERE} {_listed(kept)}.")
        listed = {fqn for _, names in self._entries.groups for fqn in names}
        stateful = {fqn for fqn, _ in [*self._entries.states, *self._entries.scalars]}
        self._trained, self._listed = stateful or listed, listed
        self._files = self._distcp_files()

    def checkpoint(self, name: str) -> Checkpoint:
        model, found = self._entries.model, self._found.sorted
        self._equal: dict[str, str] = {}
        aliases = self._tied()
        named = self._naming.canonical(
            {
                fqn: self._model_tensor(fqn, held, aliases)
                for fqn, held in model.items()
                if fqn not in aliases
            }
        )
        names = named.names
        self._check_stacks(names)
        tensors = self._with_states(named.tensors)
        parts = [part for held in [*model.values(), *self._entries.states.values()] for part in held.parts]
        world = world_size([*(part.file for part in parts), *self._files])
        self._check_beside(world)
        self._check_shards(named.tensors)
        stacks = [held for fqn, held in model.items() if is_stacked(fqn, held.tensor.shape)]
        ep = ep_size(stacks, world) if stacks else None
        titan = any(titan_expert(fqn) or TITAN_NAME.fullmatch(fqn) for fqn in model)
        return Checkpoint(
            format=name,
            root=self._reader.root,
            dialect="torchtitan" if titan else "hub" if self._naming.published else "transformers",
            tensors=tuple(tensors),
            files=tuple(self._found.contents.sources),
            topology=topology(world, ep),
            training=self._training(names),
            scalars=self._scalars(names),
            moe_layers=layers_of(named.tensors, names, model, ep),
            aliases=aliases,
            equal=self._equal,
            model_config=self._config,
            unresolved=self._unresolved,
            nameless=found.nameless,
            layout_hint=Hint(
                self._found.scheme,
                self._found.contents.tensors,
                self._found.contents.objects,
                self._found.contents.archives,
                self._found.contents.paths,
                self._found.contents.saved,
                self._files,
                self._found.sorted,
                self._entries,
                names,
                self._fused,
                self._beside,
            ),
            notes=tuple(self._notes),
            others=tuple(
                replace(held.tensor, name=key)
                for key, held in found.other_tensors.items()
                if held.tensor.numel
            ),
        )

    def _distcp_files(self) -> tuple[str, ...]:
        """Those of this save: which hold something, or are of ranks without a gap from rank 0 on."""
        scheme, contents = self._found.scheme, self._found.contents
        held = {part.file for one in contents.tensors.values() for part in one.parts}
        held |= {stored.file for stored in contents.archives.values()}
        found: list[str] = []
        for directory in dict.fromkeys((scheme.model_directory, scheme.optimizer_directory)):
            names = [name for name in self._reader.list(directory) if name.endswith(".distcp")]
            paths = [f"{directory}/{name}" if directory else name for name in names]
            ranks = unbroken(paths)
            found += [path for path in paths if path in held or rank_of(path) in ranks]
            self._notes += [
                f"{path} belongs to another save: {METADATA} does not name it, and it is of no rank that "
                "this save has. It is left out."
                for path in paths
                if path not in found
            ]
        return tuple(found)

    def _check_beside(self, world: int | None) -> None:
        saved = len(self._beside.extra_states)
        if saved and world is not None and saved < world:
            raise UnreadableError(
                f"{self._reader.root}: {world} ranks saved the tensors and {saved} an extra_state. Copy "
                "the directory whole, or take extra_state away to convert without."
            )

    def _check_shards(self, model: list[Tensor]) -> None:
        if not self._found.scheme.shards or self._entries.has_optimizer:
            return
        note = check_rows(self._reader.root, model, self._family, self._config)
        if note is not None:
            self._notes.append(note)

    def _model_tensor(self, fqn: str, held: Held, aliases: Mapping[str, str]) -> Tensor:
        optimizer = self._entries.has_optimizer
        trained = fqn in self._trained
        if _BUFFER.fullmatch(fqn) or not held.tensor.dtype.is_float:
            role = Role.BUFFER
        else:
            frozen = optimizer and not trained and fqn not in self._listed
            role = Role.FROZEN if frozen else Role.PARAMETER
        master = trained and held.tensor.dtype is DType.float32
        copies = [
            region
            for alias, name in aliases.items()
            if name == fqn
            for region in self._entries.model[alias].tensor.regions
        ]
        return replace(
            held.tensor, name=fqn, state=MASTER if master else WEIGHT, role=role, replicas=tuple(copies)
        )

    def _tied(self) -> dict[str, str]:
        """FSDP2 saves tied weights under both names; the optimizer knows one of them.

        They are taken for one tensor where the config says so; where it does not say, where the optimizer
        knows the embedding alone, and every chunk of the head has the CRC-32 of the embedding's. Without
        an optimizer a head may have been begun as a copy; ``_equal`` keeps it for a config to tell.
        """
        model = self._entries.model
        embedding = _TITAN_EMBEDDING if _TITAN_EMBEDDING in model else embedding_name(model)
        heads = () if embedding is None else (head_name(embedding), *_HEADS)
        head = next((name for name in heads if name in model), None)
        if head is None or embedding is None or head in self._trained:
            return {}
        ours, theirs = model[head], model[embedding]
        if ours.tensor.shape != theirs.tensor.shape or ours.tensor.dtype is not theirs.tensor.dtype:
            return {}
        crcs = [
            {(part.offsets, part.sizes): part.crc for part in held.parts if 0 not in part.sizes}
            for held in (ours, theirs)
        ]
        equal = crcs[0] == crcs[1] and None not in crcs[0].values()
        if equal and not self._entries.has_optimizer and self._config is None:
            self._equal = {head: embedding}
        stated = says_of_ties(self._config or {})
        tied = equal and embedding in self._trained if stated is None else stated
        return {head: embedding} if tied else {}

    def _check_stacks(self, names: Mapping[str, tuple[TensorName, ...]]) -> None:
        """Experts with a tensor each are converted together: what the optimizer keeps of one, it must keep
        of all."""
        kept: dict[str, dict[str, float | None]] = {}
        for fqn, state in self._entries.states:
            kept.setdefault(fqn, {})[state] = None
        for (fqn, state), scalar in self._entries.scalars.items():
            kept.setdefault(fqn, {})[state] = scalar.value
        group_of = {fqn: number for number, (_, fqns) in enumerate(self._entries.groups) for fqn in fqns}
        first_of: dict[TensorName, str] = {}
        for fqn, given in names.items():
            first = first_of.setdefault(given[0], fqn)
            ours, theirs = kept.get(fqn, {}), kept.get(first, {})
            if not same(ours, theirs) or group_of.get(fqn) != group_of.get(first):
                raise MismatchError(
                    f"{self._reader.root}: {fqn} and {first} are experts of one layer, which are converted "
                    f"together, and differ in their optimizer states ({_described(ours)} and "
                    f"{_described(theirs)}) or parameter groups ({group_of.get(fqn)} and "
                    f"{group_of.get(first)}). Without config.json in the directory each is a tensor of "
                    "its own."
                )

    def _with_states(self, model: list[Tensor]) -> list[Tensor]:
        """Each tensor of the model followed by its optimizer states."""
        kinds = dict.fromkeys(state for _, state in self._entries.states)
        states: dict[TensorName, list[Tensor]] = {}
        for state in kinds:
            of_state = {
                fqn: replace(held.tensor, name=fqn, state=state)
                for (fqn, kind), held in self._entries.states.items()
                if kind == state
            }
            for fqn, tensor in of_state.items():
                self._check_shape(tensor, self._entries.model[fqn].tensor.shape)
            for tensor in self._naming.canonical(of_state).tensors:
                states.setdefault(tensor.name, []).append(tensor)
        ordered = [tensor for one in model for tensor in (one, *states.get(one.name, ()))]
        shapes = {tensor.name: tensor.shape for tensor in model}
        for name, of_one in states.items():
            if name not in shapes:
                raise MismatchError(f"{self._reader.root}: optimizer state of {name} has no parameter.")
            for tensor in of_one:
                self._check_shape(tensor, shapes[name])
        return ordered

    def _check_shape(self, state: Tensor, shape: tuple[int, ...]) -> None:
        if math.prod(state.shape) == 1 != math.prod(shape):
            raise UnreadableError(
                f"{self._reader.root}: {state.label()} is one number, {state.dtype} {list(state.shape)}. "
                "Of numbers only `step` is read, of fp32, fp64, int32 or int64 and without dimensions."
            )
        if state.shape != shape:
            raise UnreadableError(
                f"{self._reader.root}: {state.label()} has shape {list(state.shape)}, its parameter "
                f"{list(shape)}. Only optimizers with a state per element (the Adams, SGD) are read."
            )

    def _scalars(self, names: Mapping[str, tuple[TensorName, ...]]) -> dict[tuple[TensorName, str], Scalar]:
        return {
            (name, state): scalar
            for (fqn, state), scalar in self._entries.scalars.items()
            for name in names.get(fqn, (fqn,))
        }

    def _training(self, names: Mapping[str, tuple[TensorName, ...]]) -> TrainingState:
        numbers = {
            key: held.scalar.value
            for key, held in self._entries.other_tensors.items()
            if held.scalar is not None
        }
        others = nested({**numbers, **self._read_objects()})
        scheduler = next((others.pop(key) for key in ("lr_scheduler", "scheduler") if key in others), None)
        if scheduler is None:
            scheduler = self._saved_scheduler()
        groups = []
        for options, fqns in self._entries.groups:
            given = dict.fromkeys(name for fqn in fqns for name in names.get(fqn, (fqn,)))
            groups.append(ParamGroup(options, tuple(given)))
        dataloader = others.get("dataloader")
        per_rank: list[str] = []
        if isinstance(dataloader, dict) and any(str(key).startswith("dp_rank_") for key in dataloader):
            others.pop("dataloader")
            per_rank.append("dataloader")
        step = self._step(others)
        return TrainingState(
            step=step,
            counters={"global_steps": step} if step is not None else {},
            param_groups=tuple(groups),
            scheduler=scheduler,
            client_state=others,
            per_rank=tuple(per_rank),
        )

    def _step(self, others: Mapping[str, Any]) -> int | None:
        state = others.get("train_state")
        candidates = [state.get("step")] if isinstance(state, dict) else []
        candidates += [others.get("step"), others.get("global_step")]
        if "trainer_state.json" in self._reader.list():
            candidates.append(_json(self._reader, "trainer_state.json").get("global_step"))
        known = [scalar.value for (_, kind), scalar in self._entries.scalars.items() if kind == STEP]
        steps = [step for step in known if math.isfinite(step)]
        candidates += [int(max(steps))] if steps else []
        return next((step for step in candidates if isinstance(step, int)), None)

    def _read_objects(self) -> dict[str, Any]:
        """What other formats can be given of the objects."""
        others = self._entries.others
        unread = [key for key, value in others.items() if isinstance(value, Unread)]
        if unread:
            self._notes.append(
                f"Only copied, to DCP, and not read (of tensors, or too large): {', '.join(unread)}."
            )
        return {key: value for key, value in others.items() if not isinstance(value, Unread)}

    def _saved_scheduler(self) -> Any:
        """accelerate and the Trainer save it beside, with torch.save."""
        for name in ("scheduler.bin", "scheduler.pt"):
            if name in self._reader.list():
                try:
                    archive = TorchArchive(self._reader, name)
                except UnreadableError as error:  # unsafe, or in torch's older form
                    self._notes.append(f"{SCHEDULER_LEFT_OUT} {error}")
                    return None
                return archive.describe(archive.root)
        return None


def _listed(names: list[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 3 else ", ".join(names)


def _described(kept: Mapping[str, float | None]) -> str:
    found = [state if value is None else f"{state} {value}" for state, value in kept.items()]
    return ", ".join(found) or "none"


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keys with dots as dicts of dicts, one level deep: ``train_state.step``."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        first, _, rest = key.partition(".")
        if rest:
            within = found.setdefault(first, {})
            if isinstance(within, dict):
                within[rest] = value
        else:
            found[first] = value
    return found
