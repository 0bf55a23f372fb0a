"""Dense tensors that transformers holds in memory otherwise than published files do: several as one, one as
several, or transposed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ckpt_tool.canonical import Tensor, TensorName
from ckpt_tool.errors import MismatchError, UnreadableError
from ckpt_tool.families import Family, text_config
from ckpt_tool.families.forms import compiled
from ckpt_tool.families.rows import row_fields, stated_rows
from ckpt_tool.geometry import Axis, Placed, assemble, take

# The names of wholes, each with those of the tensors that are concatenated in it.
Relation = Mapping[str, Sequence[str]]


def published_parts(tensor: Tensor, family: Family) -> list[Tensor]:
    """The published tensors that a dense one in memory holds; none where names alone differ."""
    return _split(tensor, family.parts, family.published_path, None) or _turned(
        tensor, family.transposed.items(), family.published_path
    )


def memory_parts(tensor: Tensor, family: Family, config: Mapping[str, Any]) -> list[Tensor]:
    """The tensors in memory that a published one holds; none where names alone differ.

    Args:
        config: the ``config.json``, which has the sizes of parts that are not equal.
    """
    turned = ((published, own) for own, published in family.transposed.items())
    return _split(tensor, family.joined, family.memory_module, _Shares(family, config)) or _turned(
        tensor, turned, family.memory_module
    )


class _Shares:
    """The rows of each part of a whole, where a family's table says of which fields they are made."""

    def __init__(self, family: Family, config: Mapping[str, Any]) -> None:
        self._family, self._config = family, config

    def rows(self, pattern: str, tensor: Tensor) -> list[int] | None:
        """None where the parts are equal."""
        if pattern not in self._family.shares:
            return None
        fields = row_fields(text_config(self._config))
        found = []
        for formula in self._family.shares[pattern]:
            rows = stated_rows(formula, fields)
            if rows is None:
                raise MismatchError(
                    f"{tensor.label()} holds several tensors of transformers, and config.json does not "
                    f"say how large they are ({formula}). Pass the model's config.json with --config."
                )
            found.append(rows)
        return found


def _split(
    tensor: Tensor, relation: Relation, path: Callable[[str], str], shares: _Shares | None
) -> list[Tensor]:
    """The parts along the first dimension of a whole, equal unless ``shares`` says otherwise."""
    for pattern, names in relation.items():
        match = compiled(pattern).fullmatch(str(tensor.name))
        if match is None:
            continue
        rows = shares.rows(pattern, tensor) if shares else None
        if rows is None:
            whole = tensor.shape[0] if tensor.shape else 0
            rows = [whole // len(names)] * len(names)
        if not tensor.shape or sum(rows) != tensor.shape[0]:
            sizes = "equal" if len(set(rows)) == 1 else " + ".join(map(str, rows))
            raise UnreadableError(
                f"{tensor.label()} of shape {list(tensor.shape)} does not consist of {len(names)} parts "
                f"({sizes} rows)."
            )
        rest = [Axis(dim, 0, size) for dim, size in enumerate(tensor.shape)][1:]
        return [
            replace(
                take(tensor, [Axis(0, sum(rows[:number]), rows[number]), *rest]),
                name=name.format(layer=path(match["layer"])),
            )
            for number, name in enumerate(names)
        ]
    return []


def _turned(tensor: Tensor, renames: Iterable[tuple[str, str]], path: Callable[[str], str]) -> list[Tensor]:
    """The transpose of a matrix."""
    for pattern, target in renames:
        match = compiled(pattern).fullmatch(str(tensor.name))
        if match is None:
            continue
        if len(tensor.shape) != 2:
            raise UnreadableError(
                f"{tensor.label()} has shape {list(tensor.shape)} and should be a matrix."
            )
        rows, columns = tensor.shape
        turned = take(tensor, [Axis(1, 0, columns), Axis(0, 0, rows)])
        return [replace(turned, name=target.format(layer=path(match["layer"])))]
    return []


class Whole(NamedTuple):
    """What a part is joined into: its name and those of all parts. ``here`` stands in the part's place: the
    whole in the first part's, nothing in the others'."""

    name: str
    parts: tuple[str, ...]
    here: tuple[Tensor, ...]


def joined_in_memory(tensors: Iterable[Tensor], family: Family) -> dict[TensorName, Whole]:
    """Of published tensors, one of each name, the parts of what transformers has as one.

    Raises:
        MismatchError: another part is missing, or of another form.
    """
    return _joined(tensors, family.parts, family.memory_module)


def joined_as_published(tensors: Iterable[Tensor], family: Family) -> dict[TensorName, Whole]:
    """Of tensors in memory, one of each name, the parts of what is published as one.

    Raises:
        MismatchError: another part is missing, or of another form.
    """
    return _joined(tensors, family.joined, family.published_path)


def _joined(
    tensors: Iterable[Tensor], relation: Relation, path: Callable[[str], str]
) -> dict[TensorName, Whole]:
    found: dict[TensorName, Whole] = {}
    if not relation:
        return found
    held = {tensor.name: tensor for tensor in tensors if isinstance(tensor.name, str)}
    for name in held:
        whole = None if name in found else _whole(name, relation, path)
        if whole is None:
            continue
        missing = [part for part in whole.parts if part not in held]
        if missing:
            raise MismatchError(f"{missing[0]} is missing; the target holds it and {name} as one tensor.")
        found |= dict.fromkeys(whole.parts, whole)
        found[name] = whole._replace(here=(_concatenated(whole.name, [held[p] for p in whole.parts]),))
    return found


def _whole(name: str, relation: Relation, path: Callable[[str], str]) -> Whole | None:
    for whole, parts in relation.items():
        for part in parts:
            match = compiled(part).fullmatch(name)
            if match is not None:
                names = tuple(other.format(layer=match["layer"]) for other in parts)
                return Whole(whole.format(layer=path(match["layer"])), names, ())
    return None


def _concatenated(name: str, parts: Sequence[Tensor]) -> Tensor:
    first = parts[0]
    placed, row = [], 0
    for part in parts:
        if (part.dtype, part.shape[1:]) != (first.dtype, first.shape[1:]):
            raise MismatchError(
                f"{part.label()} is {part.dtype} {list(part.shape)}, {first.label()} is {first.dtype} "
                f"{list(first.shape)}; the target holds them as one tensor."
            )
        rest = [Axis(dim, 0, size) for dim, size in enumerate(part.shape)][1:]
        placed.append(Placed(part, (Axis(0, row, part.shape[0]), *rest)))
        row += part.shape[0]
    return replace(assemble(first, (row, *first.shape[1:]), placed), name=name)
