"""From entries to a catalogue: which directories belong together, and what they say of a run.

FSDP2 keeps its parameters in the optimizer's precision and casts them for compute, so a parameter that
has optimizer state and is fp32 *is* the master; it is listed as ``master`` and there is no ``weight``
beside it. Parameters in another precision, and those without optimizer state, are listed as ``weight``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ckpt_tool.canonical import (
    MASTER,
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
)
from ckpt_tool.containers.dcp_metadata import Path
from ckpt_tool.containers.torch_zip import TorchArchive
from ckpt_tool.errors import MismatchError, UnreadableError, UnsafePickleError, UsageError
from ckpt_tool.families import Family, family_of
from ckpt_tool.formats.dcp.beside import SCHEDULER_LEFT_OUT, Beside, find_beside
from ckpt_tool.formats.dcp.contents import Held
from ckpt_tool.formats.dcp.directories import TITAN_NAME, Found, read_directories
from ckpt_tool.formats.dcp.experts import canonical, is_stacked, titan_expert
from ckpt_tool.formats.dcp.keys import Scheme, Sorted
from ckpt_tool.formats.dcp.titan import Fused, main_layers, take_apart
from ckpt_tool.formats.dcp.topology import ep_size, layers_of, topology, world_size
from ckpt_tool.storage import Reader

_BUFFER = re.compile(
    r".*(?:expert_bias(?:_E)?|e_score_correction_bias|inv_freq|running_mean|running_var|num_batches_tracked)"
)
_EMBEDDINGS = ("model.embed_tokens.weight", "tok_embeddings.weight")
_HEADS = ("lm_head.weight", "output.weight")


@dataclass(frozen=True, slots=True, repr=False)
class Hint:
    """What the writer needs to write the like again: the keys, and each entry's chunks and file.

    ``files`` are all .distcp files, those that hold nothing among them. ``fused`` are torchtitan's
    parameters whose states are taken apart in the catalogue, and not in ``sorted``.
    """

    scheme: Scheme
    entries: Mapping[str, Held]
    objects: Mapping[str, Any]
    files_of_objects: Mapping[str, str]
    paths: Mapping[str, Path]
    files: tuple[str, ...]
    sorted: Sorted
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
    try:
        config = json.loads(reader.read("config.json", 0, reader.size("config.json")))
    except ValueError as error:
        raise UnreadableError(f"{reader.root}/config.json is not JSON ({error}).") from error
    return config if isinstance(config, dict) else None


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
        self._layers = main_layers(self._entries.model)
        self._config, self._family, self._notes = config, family, list(notes)
        self._beside = find_beside(reader)
        if note := self._beside.note():
            self._notes.append(note)
        listed = {fqn for _, names in self._entries.groups for fqn in names}
        stateful = {fqn for fqn, _ in [*self._entries.states, *self._entries.scalars]}
        self._trained = stateful or listed

    def checkpoint(self, name: str) -> Checkpoint:
        model = self._entries.model
        aliases = self._tied()
        named = canonical(
            {
                fqn: self._model_tensor(fqn, held, aliases)
                for fqn, held in model.items()
                if fqn not in aliases
            },
            self._family,
            self._layers,
        )
        names = named.names
        tensors = self._with_states(named.tensors)
        parts = [part for held in [*model.values(), *self._entries.states.values()] for part in held.parts]
        world = world_size([*(part.file for part in parts), *self._distcp_files()])
        stacks = [held for fqn, held in model.items() if is_stacked(fqn, held.tensor.shape)]
        ep = ep_size(stacks, world) if stacks else None
        titan = any(titan_expert(fqn) or TITAN_NAME.fullmatch(fqn) for fqn in model)
        return Checkpoint(
            format=name,
            root=self._reader.root,
            dialect="torchtitan" if titan else self._dialect(),
            tensors=tuple(tensors),
            files=tuple(self._found.contents.sources),
            topology=topology(world, ep),
            training=self._training(names),
            scalars=self._scalars(names),
            moe_layers=layers_of(named.tensors, names, model, ep),
            aliases=aliases,
            model_config=self._config,
            layout_hint=Hint(
                self._found.scheme,
                self._found.contents.tensors,
                self._found.contents.objects,
                self._found.contents.files_of_objects,
                self._found.contents.paths,
                self._distcp_files(),
                self._found.sorted,
                names,
                self._fused,
                self._beside,
            ),
            notes=tuple(self._notes),
        )

    def _distcp_files(self) -> tuple[str, ...]:
        scheme = self._found.scheme
        return tuple(
            f"{directory}/{name}" if directory else name
            for directory in dict.fromkeys((scheme.model_directory, scheme.optimizer_directory))
            for name in self._reader.list(directory)
            if name.endswith(".distcp")
        )

    def _dialect(self) -> str:
        family = self._family
        for match in map(family.match, self._entries.model) if family else ():
            if match is not None and match.expert is not None:
                return "hub"
        return "transformers"

    def _model_tensor(self, fqn: str, held: Held, aliases: Mapping[str, str]) -> Tensor:
        optimizer = self._entries.has_optimizer
        trained = fqn in self._trained
        if _BUFFER.fullmatch(fqn) or not held.tensor.dtype.is_float:
            role = Role.BUFFER
        else:
            role = Role.FROZEN if optimizer and not trained else Role.PARAMETER
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

        They are taken for one tensor where the config says so, or where the head has no optimizer state
        of its own and every chunk has the CRC-32 of the embedding's.
        """
        model = self._entries.model
        head = next((name for name in _HEADS if name in model), None)
        embedding = next((name for name in _EMBEDDINGS if name in model), None)
        if head is None or embedding is None or head in self._trained:
            return {}
        ours, theirs = model[head], model[embedding]
        if ours.tensor.shape != theirs.tensor.shape or ours.tensor.dtype is not theirs.tensor.dtype:
            return {}
        stated = bool((self._config or {}).get("tie_word_embeddings"))
        crcs = [
            {(part.offsets, part.sizes): part.crc for part in held.parts if 0 not in part.sizes}
            for held in (ours, theirs)
        ]
        equal = crcs[0] == crcs[1] and None not in crcs[0].values()
        seen = embedding in self._trained and equal
        return {head: embedding} if stated or seen else {}

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
                self._check_shape(fqn, tensor)
            for tensor in canonical(of_state, self._family, self._layers).tensors:
                states.setdefault(tensor.name, []).append(tensor)
        ordered = [tensor for one in model for tensor in (one, *states.pop(one.name, ()))]
        if states:
            raise MismatchError(
                f"{self._reader.root}: optimizer state of {next(iter(states))} has no parameter."
            )
        return ordered

    def _check_shape(self, fqn: str, state: Tensor) -> None:
        shape = self._entries.model[fqn].tensor.shape
        if state.shape != shape:
            raise UnreadableError(
                f"{self._reader.root}: {state.label()} has shape {list(state.shape)}, its parameter "
                f"{list(shape)}. Only optimizers with a state per element (the Adams, SGD) are read."
            )

    def _scalars(self, names: Mapping[str, tuple[TensorName, ...]]) -> dict[tuple[TensorName, str], Scalar]:
        found: dict[tuple[TensorName, str], Scalar] = {}
        for (fqn, state), scalar in self._entries.scalars.items():
            for name in names.get(fqn, (fqn,)):
                known = found.setdefault((name, state), scalar)
                if known != scalar:
                    raise MismatchError(
                        f"{self._reader.root}: {state} of {fqn} is {scalar.value}, of another expert of "
                        f"the same layer {known.value}. Experts of one layer are converted together."
                    )
        return found

    def _training(self, names: Mapping[str, tuple[TensorName, ...]]) -> TrainingState:
        others = nested(self._entries.others)
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
            data = self._reader.read("trainer_state.json", 0, self._reader.size("trainer_state.json"))
            candidates.append(json.loads(data).get("global_step"))
        steps = [scalar.value for (_, kind), scalar in self._entries.scalars.items() if kind == STEP]
        candidates += [int(max(steps))] if steps else []
        return next((step for step in candidates if isinstance(step, int)), None)

    def _saved_scheduler(self) -> Any:
        """accelerate and the Trainer save it beside, with torch.save."""
        for name in ("scheduler.bin", "scheduler.pt"):
            if name in self._reader.list():
                try:
                    archive = TorchArchive(self._reader, name)
                except UnsafePickleError as error:
                    self._notes.append(f"{SCHEDULER_LEFT_OUT} {error}")
                    return None
                return archive.describe(archive.root)
        return None


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
