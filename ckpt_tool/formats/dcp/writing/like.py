"""The layout of a checkpoint that the target run saved itself, filled with the source's values."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckpt_tool.canonical import MASTER, WEIGHT, Checkpoint, DType, Scalar, Tensor
from ckpt_tool.containers.dcp_metadata import Path
from ckpt_tool.containers.torch_zip import Inline
from ckpt_tool.errors import MismatchError
from ckpt_tool.formats.dcp.contents import Held, holds_stored
from ckpt_tool.formats.dcp.grammar.keys import Scheme
from ckpt_tool.formats.dcp.reading.beside import carried_config, carry
from ckpt_tool.formats.dcp.reading.reader import ONLY_HERE, Hint
from ckpt_tool.formats.dcp.writing.files import (
    Item,
    Placement,
    dcp_directory,
    object_or_archive,
    sharded_model,
)
from ckpt_tool.formats.dcp.writing.loading import loading
from ckpt_tool.formats.dcp.writing.names import Styled, styled
from ckpt_tool.formats.dcp.writing.options import stated_options
from ckpt_tool.formats.dcp.writing.target_options import DcpOptions
from ckpt_tool.layout import Description, Layout, LeftOut
from ckpt_tool.manifest import RESERVED

_NO_STATE = "the template keeps no such state"
_LISTED = 40  # the most entries that a note names


@dataclass(frozen=True, slots=True)
class _Meaning:
    """What a key of the template stands for."""

    name: str
    state: str


def like_layout(checkpoint: Checkpoint, options: DcpOptions) -> Layout:
    """Every entry of the template in the chunks and files it has there.

    Raises:
        MismatchError: the template asks for what the source does not have, or in another shape.
    """
    template = options.like
    if template is None or not isinstance(template.layout_hint, Hint):
        raise MismatchError("--like names no DCP checkpoint.")
    hint: Hint = template.layout_hint
    found = styled(checkpoint, template.dialect, options.config or template.model_config, hint.fused)
    _check_files(hint, template.root)
    filler = _Filler(hint, found, template, checkpoint)
    items = [item.as_saved(hint.saved) for item in filler.items()]
    carried = carry(checkpoint, hint.scheme.style, template.topology.world_size)
    left = (*found.left_out, *filler.left_out())
    own = [note for note in carried.notes if left or not note.startswith(ONLY_HERE)]
    config = carried_config(checkpoint) if checkpoint.dialect == template.dialect else []
    files = (*carried.files, *config, *_descriptions(hint, items))
    optimizer = any(tensor.state not in (WEIGHT, MASTER) for tensor in template.tensors)
    notes = (*own, *found.notes, *filler.notes())
    return Layout(files, left, notes, template.topology, loading(hint.scheme, optimizer=optimizer))


def _check_files(hint: Hint, root: str) -> None:
    parts = [part.file for held in hint.entries.values() for part in held.parts]
    files = {posixpath.basename(file) for file in (*parts, *(one.file for one in hint.archives.values()))}
    taken = files & RESERVED
    if taken:
        raise MismatchError(
            f"{root} keeps data in a file named {min(taken)}, a name that ckpt-tool uses for a file of its "
            "own. Use a template whose files have the names that frameworks give them."
        )


def _descriptions(hint: Hint, items: list[Item]) -> list[Description]:
    described: list[Description] = []
    last: list[Description] = []
    shards = [item for item in items if item.places[0].file.endswith(".safetensors")]
    if shards:
        described += sharded_model(shards, _files_of(shards))
    by_directory: dict[str, list[Item]] = {}
    for item in items:
        if item not in shards:
            by_directory.setdefault(_directory(hint.scheme, item.places[0].file), []).append(item)
    for directory, held in by_directory.items():
        files = [file for file in hint.files if _directory(hint.scheme, file) == directory]
        made, metadata = dcp_directory(directory, held, files)
        described += made
        last.append(metadata)
    return [*described, *last]


def _directory(scheme: Scheme, file: str) -> str:
    """Whose metadata lists a file: it may lie further below."""
    known = sorted({scheme.model_directory, scheme.optimizer_directory}, key=len, reverse=True)
    return next((name for name in known if name and file.startswith(f"{name}/")), "")


def _files_of(items: list[Item]) -> list[str]:
    return sorted({place.file for item in items for place in item.places})


_NOTHING = object()  # where the source says nothing; None is a value
# What a source without such entries says by its step.
_STEPS = ("train_state.step", "lr_scheduler.last_epoch")


class _Groups:
    """The template's parameter groups, with the options that their members have in the source."""

    def __init__(self, hint: Hint, found: Styled, root: str, *, own: bool) -> None:
        self._aliases, self._root = found.aliases, root
        self._options: dict[str, Mapping[str, Any]] = {}
        for options, names in found.groups:
            self._options |= dict.fromkeys(names, options if own else stated_options(options))
        self.members: dict[str, tuple[list[str], str]] = {}
        self.lists: set[str] = set()
        for number, (options, names) in enumerate(hint.sorted.groups):
            self._add(hint.scheme, number, list(options), names)

    def _add(self, scheme: Scheme, number: int, options: list[str], names: list[str]) -> None:
        if not scheme.flat:
            self.members |= {scheme.group_key(number, one)[0]: (names, one) for one in options}
            self.lists.add(scheme.group_key(number, "params")[0])
            return
        for name in names:
            self.members |= {scheme.group_key(name, one)[0]: ([name], one) for one in options}

    def option(self, key: str) -> Any:
        """The source's value; raises MismatchError where members of one group have several."""
        names, option = self.members[key]
        found: dict[str, tuple[str, Any]] = {}
        for name in names:
            options = self._options.get(self._aliases.get(name, name), {})
            if option in options:
                found.setdefault(repr(options[option]), (name, options[option]))
        if len(found) > 1:
            (one, first), (other, second), *_ = found.values()
            raise MismatchError(
                f"{one} and {other} are in one parameter group of {self._root}, and in the source {option} "
                f"is {first} for the first, {second} for the second. Use a template of a run whose groups "
                "are divided as the source's are."
            )
        return next((value for _, value in found.values()), _NOTHING)


class _Filler:
    """Finds the source's value for every entry of the template."""

    def __init__(self, hint: Hint, found: Styled, template: Checkpoint, checkpoint: Checkpoint) -> None:
        self._hint, self._found, self._root, self._checkpoint = hint, found, template.root, checkpoint
        own = checkpoint.layout_hint
        self._source = own if isinstance(own, Hint) else None
        self._same_world = checkpoint.topology.world_size == template.topology.world_size
        self._used: set[tuple[str, str]] = set()
        self._kept: list[str] = []
        entries, scheme = hint.sorted, hint.scheme
        self._meaning = {id(held): _Meaning(name, WEIGHT) for name, held in entries.model.items()}
        self._meaning |= {id(held): _Meaning(*key) for key, held in entries.states.items()}
        self._scalars = {scheme.state_key(*key)[0]: value for key, value in found.scalars.items()}
        self._steps = {scheme.state_key(*key)[0]: key for key in entries.scalars}
        self._groups = _Groups(hint, found, template.root, own=self._source is not None)
        self._source_keys = {
            scheme.model_key(name)[0]: self._source.scheme.model_key(name)[0] if self._source else name
            for name in entries.model_objects
        }

    def items(self) -> list[Item]:
        found = []
        for key, held in self._hint.entries.items():
            places = tuple(Placement(part.file, part.offsets, part.sizes) for part in held.parts)
            copy = self._copy(key, held)
            value = self._value(key, held)
            found.append(Item(key, self._path(key), value, places, self._dtype(held), copy))
        for key, stored in self._hint.archives.items():
            place = Placement(stored.file, (), ())
            found.append(Item(key, self._path(key), self._object(key), (place,)))
        return found

    def _copy(self, key: str, held: Held) -> str:
        """A tied tensor that the template has again, under a further name, is a copy."""
        meaning = self._meaning.get(id(held))
        return key if meaning is not None and self._wanted(meaning) in self._used else ""

    def _wanted(self, meaning: _Meaning) -> tuple[str, str]:
        return self._found.aliases.get(meaning.name, meaning.name), meaning.state

    def _path(self, key: str) -> Path:
        return self._hint.paths.get(key, (key,))

    def _value(self, key: str, held: Held) -> Tensor | Scalar | Inline:
        meaning = self._meaning.get(id(held))
        if meaning is not None:
            return self._tensor(meaning, held)
        return self._beside(key, held) if held.scalar is None else self._number(key, held.scalar)

    def _tensor(self, meaning: _Meaning, held: Held) -> Tensor | Inline:
        """A tensor of the model or of its optimizer."""
        wanted = self._wanted(meaning)
        tensor = self._found.tensors.get(wanted) or self._zeros(meaning)
        if isinstance(tensor, Inline):
            return tensor
        if tensor is None:
            raise self._absent(*wanted)
        if tensor.shape != held.tensor.shape:
            raise MismatchError(
                f"{meaning.name} [{meaning.state}] has shape {list(tensor.shape)} in the source, "
                f"{list(held.tensor.shape)} in {self._root}."
            )
        self._used.add(wanted)
        return tensor

    def _absent(self, name: str, state: str) -> MismatchError:
        return MismatchError(
            f"{self._root} has {name} [{state}], and the source has not. The template must be of the same "
            "model and optimizer."
        )

    def _zeros(self, meaning: _Meaning) -> Inline | None:
        return self._found.zeros.get(meaning.name) if meaning.state == WEIGHT else None

    def _dtype(self, held: Held) -> DType | None:
        """The template's: a run that trains in bf16 holds bf16."""
        return held.tensor.dtype if held.tensor.dtype.is_float and held.scalar is None else None

    def _beside(self, key: str, held: Held) -> Tensor:
        """A tensor that is neither the model's nor its optimizer's, such as a random state."""
        theirs = self._source.entries.get(key) if self._source else None
        wanted = held.tensor
        if theirs is None or (theirs.tensor.shape, theirs.tensor.dtype) != (wanted.shape, wanted.dtype):
            raise MismatchError(
                f"{self._root} has the tensor {key}, which is neither the model's nor its optimizer's, and "
                "the source has none like it. Save the template without it."
            )
        return theirs.tensor

    def _number(self, key: str, own: Scalar) -> Scalar:
        value = self._known(key)
        if value is _NOTHING:
            self._kept.append(key)
            return own
        whole = own.dtype is not None and not own.dtype.is_float
        if not isinstance(value, int | float) or (whole and value % 1 != 0):
            raise MismatchError(
                f"{key} is a number in {self._root} ({own.dtype}), in the source it is not."
            )
        return Scalar(int(value) if whole else value, own.dtype)

    def _object(self, key: str) -> Any:
        """Lists of parameters as the template has them, all else as the source has it; what it does not
        know stays."""
        own = self._hint.objects[key]
        if key in self._groups.lists:
            return own
        value = self._known(key)
        if value is not _NOTHING:
            return value
        if holds_stored(own):
            raise MismatchError(
                f"{self._root} has {key}, which holds tensors or is too large to be read, and the source "
                "has no such entry. Save the template without it."
            )
        self._kept.append(key)
        return own

    def _known(self, key: str) -> Any:
        """The source's value of an entry that is not a tensor of the model or of its optimizer."""
        if key in self._groups.members:
            return self._groups.option(key)
        if key in self._steps:
            if key not in self._scalars:
                raise self._absent(*self._steps[key])
            return self._scalars[key].value
        value = self._of_source(self._source_keys.get(key, key))
        step = self._checkpoint.training.step
        return step if value is _NOTHING and key in _STEPS and step is not None else value

    def _of_source(self, key: str) -> Any:
        source = self._source
        if source is None or (key.startswith("dataloader") and not self._same_world):
            return _NOTHING
        if key in source.objects:
            return object_or_archive(source.objects[key], source.archives[key])
        held = source.entries.get(key)
        return _NOTHING if held is None or held.scalar is None else held.scalar.value

    def left_out(self) -> tuple[LeftOut, ...]:
        unused = [key for key in self._found.tensors if key not in self._used]
        states = [f"{name} [{state}]" for name, state in unused if state == WEIGHT]
        if states:
            raise MismatchError(
                f"The source has {states[0]} ({len(states)} such), for which {self._root} has no place. "
                "The template must be of the same model."
            )
        left = [
            LeftOut(f"{name} [{state}]", self._found.tensors[name, state], _NO_STATE)
            for name, state in unused
        ]
        if self._source:
            entries = self._source.sorted
            placed = {*self._hint.entries, *self._hint.objects}
            held = {key: one.tensor for key, one in entries.other_tensors.items()}
            left += [
                LeftOut(key, held.get(key), "the template has no such entry")
                for key in (*entries.others, *entries.other_tensors)
                if key not in placed
            ]
        return tuple(left)

    def notes(self) -> list[str]:
        if not self._kept:
            return []
        listed = ", ".join(self._kept[:_LISTED])
        more = f" and {len(self._kept) - _LISTED} more" if len(self._kept) > _LISTED else ""
        return [f"As the template has it, because the source does not say: {listed}{more}."]
