"""The layout of a checkpoint that the target run saved itself, filled with the source's values."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ckpt_tool.canonical import WEIGHT, Checkpoint, DType, Scalar, Tensor
from ckpt_tool.containers.dcp_metadata import Path
from ckpt_tool.containers.torch_zip import Inline
from ckpt_tool.errors import MismatchError
from ckpt_tool.formats.base import TargetOptions
from ckpt_tool.formats.dcp.beside import carry
from ckpt_tool.formats.dcp.contents import Held
from ckpt_tool.formats.dcp.files import Item, Placement, dcp_directory, sharded_model
from ckpt_tool.formats.dcp.names import Styled, styled
from ckpt_tool.formats.dcp.options import group_options
from ckpt_tool.formats.dcp.reader import Hint
from ckpt_tool.layout import Layout, LazyFiles, Maker, given


@dataclass(frozen=True, slots=True)
class _Meaning:
    """What a key of the template stands for."""

    name: str
    state: str


def like_layout(checkpoint: Checkpoint, options: TargetOptions) -> Layout:
    """Every entry of the template in the chunks and files it has there.

    Raises:
        MismatchError: the template asks for what the source does not have, or in another shape.
    """
    template = options.like
    if template is None or not isinstance(template.layout_hint, Hint):
        raise MismatchError("--like names no DCP checkpoint.")
    hint: Hint = template.layout_hint
    found = styled(checkpoint, template.dialect, options.config or template.model_config, hint.fused)
    filler = _Filler(hint, found, template.root, checkpoint)
    items = filler.items()
    carried = carry(checkpoint, hint.scheme.style, template.topology.world_size)
    notes = [*carried.notes, *found.notes, *filler.notes()]
    files = LazyFiles([*map(given, carried.files), *_makers(hint, items)])
    return Layout(files, (), {**found.left_out, **filler.left_out()}, tuple(notes))


def _makers(hint: Hint, items: list[Item]) -> list[Maker]:
    makers: list[Maker] = []
    last: list[Maker] = []
    shards = [item for item in items if item.places[0].file.endswith(".safetensors")]
    if shards:
        makers += sharded_model(shards, _files_of(shards))
    by_directory: dict[str, list[Item]] = {}
    for item in items:
        if item not in shards:
            by_directory.setdefault(posixpath.dirname(item.places[0].file), []).append(item)
    for directory, held in by_directory.items():
        files = [file for file in hint.files if posixpath.dirname(file) == directory]
        made, metadata = dcp_directory(directory, held, files)
        makers += made
        last.append(metadata)
    return [*makers, *last]


def _files_of(items: list[Item]) -> list[str]:
    return sorted({place.file for item in items for place in item.places})


class _Filler:
    """Finds the source's value for every entry of the template."""

    def __init__(self, hint: Hint, found: Styled, root: str, checkpoint: Checkpoint) -> None:
        self._hint, self._found, self._root, self._checkpoint = hint, found, root, checkpoint
        self._used: set[tuple[str, str]] = set()
        self._kept: list[str] = []
        entries = hint.sorted
        self._meaning = {id(held): _Meaning(name, WEIGHT) for name, held in entries.model.items()}
        self._meaning |= {id(held): _Meaning(*key) for key, held in entries.states.items()}
        self._options = {name: options for options, names in found.groups for name in names}
        self._scalars = {hint.scheme.state_key(*key)[0]: value for key, value in found.scalars.items()}
        self._group_keys = dict(self._keys_of_groups())

    def items(self) -> list[Item]:
        found = []
        for key, held in self._hint.entries.items():
            places = tuple(Placement(part.file, part.offsets, part.sizes) for part in held.parts)
            found.append(Item(key, self._path(key), self._value(key, held), places, self._dtype(held)))
        for key, file in self._hint.files_of_objects.items():
            place = Placement(file, (), ())
            found.append(Item(key, self._path(key), self._object(key), (place,)))
        return found

    def _path(self, key: str) -> Path:
        return self._hint.paths.get(key, (key,))

    def _value(self, key: str, held: Held) -> Tensor | Scalar | Inline:
        if held.scalar is not None and id(held) not in self._meaning:
            theirs = self._scalars.get(key)
            return held.scalar if theirs is None else replace(theirs, dtype=held.scalar.dtype)
        meaning = self._meaning.get(id(held))
        if meaning is None:
            self._kept.append(key)
            return held.tensor
        wanted = (self._found.aliases.get(meaning.name, meaning.name), meaning.state)
        tensor = self._found.tensors.get(wanted) or self._zeros(meaning)
        if isinstance(tensor, Inline):
            return tensor
        if tensor is None:
            raise MismatchError(
                f"{self._root} has {meaning.name} [{meaning.state}], and the source has not. The "
                "template must be of the same model and optimizer."
            )
        if tensor.shape != held.tensor.shape:
            raise MismatchError(
                f"{meaning.name} [{meaning.state}] has shape {list(tensor.shape)} in the source, "
                f"{list(held.tensor.shape)} in {self._root}."
            )
        self._used.add(wanted)
        return tensor

    def _zeros(self, meaning: _Meaning) -> Inline | None:
        return self._found.zeros.get(meaning.name) if meaning.state == WEIGHT else None

    def _dtype(self, held: Held) -> DType | None:
        """The template's: a run that trains in bf16 holds bf16."""
        return held.tensor.dtype if held.tensor.dtype.is_float and held.scalar is None else None

    def _object(self, key: str) -> Any:
        """Options of parameter groups and counters from the source; what it does not know stays."""
        own = self._hint.objects[key]
        if key in self._group_keys:
            name, option = self._group_keys[key]
            given = self._options.get(name)
            return own if given is None else group_options(given).get(option, own)
        step = self._checkpoint.training.step
        if step is not None and key in ("train_state.step", "lr_scheduler.last_epoch"):
            return step
        theirs = getattr(self._checkpoint.layout_hint, "objects", {})
        return theirs[key] if key in theirs and not key.startswith("dataloader") else own

    def _keys_of_groups(self) -> Iterator[tuple[str, tuple[str, str]]]:
        """The keys of the template's group options: key -> (a parameter of the group, option)."""
        scheme = self._hint.scheme
        for number, (options, names) in enumerate(self._hint.sorted.groups):
            for option in options:
                if scheme.flat:
                    yield from ((scheme.group_key(name, option)[0], (name, option)) for name in names)
                elif names:
                    yield scheme.group_key(number, option)[0], (names[0], option)

    def left_out(self) -> dict[str, str]:
        unused = [key for key in self._found.tensors if key not in self._used]
        states = [f"{name} [{state}]" for name, state in unused if state == WEIGHT]
        if states:
            raise MismatchError(
                f"The source has {states[0]} ({len(states)} such), for which {self._root} has no place. "
                "The template must be of the same model."
            )
        return {f"{name} [{state}]": "the template keeps no such state" for name, state in unused}

    def notes(self) -> list[str]:
        return [f"Taken from the template as it is: {key}." for key in self._kept]
