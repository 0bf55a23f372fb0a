"""Files that frameworks keep beside the tensors, without which they do not resume, or not whole.

They are copied byte by byte; nothing in them is unpickled.

* accelerate 1.15 (checkpointing.py, accelerator.py): schedulers, samplers, the loss scaler and registered
  objects are saved once for all ranks, and loading fails without them; random states and stateful
  dataloaders are each rank's own, and left as they are where their files are missing.
* transformers' Trainer 5.20 (trainer.py): the same directories, with ``trainer_state.json``, and with
  ``scheduler.pt``, without which ``_load_optimizer_and_scheduler`` leaves out the optimizer in silence.
* VeOmni 0.1.12 (checkpoint/dcp_checkpointer.py, ``_load_extra_state``): every rank wants a file of its own
  with the step, the learning rate scheduler, its dataloader's and random states.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from ckpt_tool.canonical import WEIGHT, Checkpoint, DType, Tensor, contiguous
from ckpt_tool.errors import UnreadableError
from ckpt_tool.layout import Fill, TargetFile
from ckpt_tool.limits import first_missing
from ckpt_tool.storage import Reader

ACCELERATE, VEOMNI = "accelerate", "veomni"
SCHEDULERS = ("scheduler.bin", "scheduler.pt")  # accelerate's, the Trainer's
NOT_CONVERTED = "Not converted:"
SCHEDULER_LEFT_OUT = "The scheduler is left out:"

# What is to be said where the source has nothing of what the framework wants.
WITHOUT = {
    ACCELERATE: (
        "The source has no state of a scheduler of torch's. accelerate's load_state wants one for each "
        "that was prepared; without scheduler.pt the Trainer loads no optimizer, and does not say so."
    ),
    VEOMNI: (
        "The source has no extra_state of VeOmni, whose trainer wants a file of each rank: copy those of a "
        "save of the run's own, at the same step."
    ),
}

_EXTRA_STATE, _CONFIG = "extra_state", "config.json"
_EXTRA_STATE_FILE = re.compile(r"extra_state_rank_(\d{1,6})\.pt")
_SHARED = re.compile(
    r"scheduler(?:_\d+)?\.bin|scheduler\.pt|sampler(?:_\d+)?\.bin|scaler\.pt|custom_checkpoint_\d+\.pkl"
    r"|trainer_state\.json|training_args\.bin"
)
_OF_RANKS = re.compile(
    r"random_states_\d{1,6}\.pkl|rng_state(?:_\d{1,6})?\.pth|dl_state_dict(?:_\d{1,6})?\.bin"
)
# What means nothing to any other framework; a scheduler and a step do.
_OWN = re.compile(
    rf"{_OF_RANKS.pattern}|sampler(?:_\d{1, 6})?\.bin|scaler\.pt|custom_checkpoint_\d{1, 6}\.pkl"
)


@dataclass(frozen=True, slots=True)
class Beside:
    """The files of a source, by path, with their sizes. ``extra_states`` are by rank, ``config`` is the
    size of a config.json."""

    shared: Mapping[str, int] = field(default_factory=dict)
    of_ranks: Mapping[str, int] = field(default_factory=dict)
    extra_states: tuple[tuple[str, int], ...] = ()
    config: int | None = None

    def note(self) -> str | None:
        """What a target of another framework does without."""
        names = [name for name in [*self.shared, *self.of_ranks] if _OWN.fullmatch(name)]
        names += [_EXTRA_STATE] * bool(self.extra_states)
        if not names:
            return None
        return (
            f"{NOT_CONVERTED} {_listed(names)} (random and dataloader states, which mean something to the "
            "ranks that saved them only)."
        )


def _listed(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    return f"{first} and {len(others)} more" if len(others) > 3 else ", ".join([first, *others])


def find_beside(reader: Reader) -> Beside:
    names = reader.list()
    paths = _extra_state_files(reader)
    return Beside(
        {name: reader.size(name) for name in names if _SHARED.fullmatch(name)},
        {name: reader.size(name) for name in names if _OF_RANKS.fullmatch(name)},
        tuple((path, reader.size(path)) for path in paths),
        reader.size(_CONFIG) if _CONFIG in names else None,
    )


def _extra_state_files(reader: Reader) -> list[str]:
    """VeOmni's files in the order of the ranks; raises UnreadableError where one is missing."""
    matches = map(_EXTRA_STATE_FILE.fullmatch, reader.list(_EXTRA_STATE))
    ranks = {int(match[1]) for match in matches if match}
    missing = first_missing(ranks, max(ranks, default=-1) + 1)
    if missing is not None:
        raise UnreadableError(
            f"{reader.root}/{_EXTRA_STATE} has files of {len(ranks)} ranks up to {max(ranks)}, and none of "
            f"rank {missing}. Copy the directory whole, or take it away to convert without."
        )
    return [f"{_EXTRA_STATE}/extra_state_rank_{rank}.pt" for rank in range(len(ranks))]


def is_veomni(reader: Reader) -> bool:
    return bool(find_beside(reader).extra_states)


@dataclass(frozen=True, slots=True)
class Carried:
    """Copies for the target, and the catalogue's notes as they stand with them."""

    files: list[TargetFile]
    notes: list[str]


def carry(checkpoint: Checkpoint, target: str, world: int | None) -> Carried:
    """What a run of ``world`` ranks needs of the source's files, where both are of one framework.

    Args:
        target: the style that is written.
    """
    notes = list(checkpoint.notes)
    hint = checkpoint.layout_hint
    beside, source = getattr(hint, "beside", None), getattr(getattr(hint, "scheme", None), "style", None)
    if not isinstance(beside, Beside) or source != target or target not in (ACCELERATE, VEOMNI):
        return Carried([], notes)
    notes = [note for note in notes if not note.startswith((NOT_CONVERTED, SCHEDULER_LEFT_OUT))]
    if target == VEOMNI:
        return _extra_states(beside, world or 1, notes)
    files = dict(beside.shared)
    if world == checkpoint.topology.world_size:
        files |= beside.of_ranks
    else:
        notes += _changed_world(beside)
    return Carried([_copy(path, path, size) for path, size in files.items()], notes)


def carried_config(checkpoint: Checkpoint) -> list[TargetFile]:
    """The config.json beside a source whose names stay: by it experts are told apart in the target, too."""
    beside = getattr(checkpoint.layout_hint, "beside", None)
    if not isinstance(beside, Beside) or beside.config is None:
        return []
    return [_copy(_CONFIG, _CONFIG, beside.config)]


def _changed_world(beside: Beside) -> Iterator[str]:
    if beside.of_ranks:
        yield (
            f"{NOT_CONVERTED} {_listed(beside.of_ranks)} (each of one rank; random numbers and the places "
            "in the data are those the run starts with)."
        )
    if SCHEDULERS[0] in beside.shared:
        # accelerate 1.15, scheduler.py, AcceleratedScheduler.step
        yield (
            f"{SCHEDULERS[0]} is the source's: accelerate advances a scheduler once per rank and step "
            "(unless split_batches), so its count is that of the source's number of ranks."
        )


def _extra_states(beside: Beside, world: int, notes: list[str]) -> Carried:
    """Each rank's own; those of a larger run get the files of others, as VeOmni has no way to start with
    fewer than there are ranks."""
    states = beside.extra_states
    if states and world != len(states):
        notes.append(
            f"{_EXTRA_STATE}: saved by {len(states)} ranks, for {world}. Rank r gets that of rank r modulo "
            f"{len(states)}; the step and the scheduler are everybody's, the dataloader's position and "
            "random states are not: check where the data goes on."
        )
    files = []
    for rank in range(world if states else 0):
        path, size = states[rank % len(states)]
        copy = "" if rank < len(states) else f"for rank {rank}"
        files.append(_copy(f"{_EXTRA_STATE}/extra_state_rank_{rank}.pt", path, size, copy))
    return Carried(files, notes)


def _copy(target: str, source: str, size: int, copy: str = "") -> TargetFile:
    """A file as it is."""
    data = Tensor(source, WEIGHT, (size,), DType.uint8, contiguous((size,), source, 0))
    return TargetFile(target, size, (), (Fill(0, data, 0, size, DType.uint8, copy),) if size else ())
