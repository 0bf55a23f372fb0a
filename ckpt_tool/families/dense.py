"""Dense tensors that transformers holds in memory otherwise than published files do: several as one, one as
several, or transposed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from ckpt_tool.canonical import Tensor
from ckpt_tool.errors import MismatchError, UnreadableError
from ckpt_tool.families import Family
from ckpt_tool.families.forms import compiled
from ckpt_tool.geometry import Axis, Placed, assemble, take

# The names of wholes, each with those of the tensors that are concatenated in it.
Relation = Mapping[str, Sequence[str]]


def published_parts(tensor: Tensor, family: Family) -> list[Tensor]:
    """The published tensors that a dense one in memory holds; none where names alone differ."""
    return _split(tensor, family.parts, family.published_path) or _turned(
        tensor, family.transposed.items(), family.published_path
    )


def memory_parts(tensor: Tensor, family: Family) -> list[Tensor]:
    """The tensors in memory that a published one holds; none where names alone differ."""
    turned = ((published, own) for own, published in family.transposed.items())
    return _split(tensor, family.joined, family.memory_module) or _turned(
        tensor, turned, family.memory_module
    )


def _split(tensor: Tensor, relation: Relation, path: Callable[[str], str]) -> list[Tensor]:
    """The equal parts along the first dimension of a whole."""
    for pattern, names in relation.items():
        match = compiled(pattern).fullmatch(str(tensor.name))
        if match is None:
            continue
        if not tensor.shape or tensor.shape[0] % len(names):
            raise UnreadableError(
                f"{tensor.label()} of shape {list(tensor.shape)} has no {len(names)} equal parts."
            )
        rows = tensor.shape[0] // len(names)
        rest = [Axis(dim, 0, size) for dim, size in enumerate(tensor.shape)][1:]
        return [
            replace(
                take(tensor, [Axis(0, number * rows, rows), *rest]),
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


class Joined:
    """Wholes put together from their parts, among tensors of one state."""

    def __init__(self, tensors: Iterable[Tensor], relation: Relation, path: Callable[[str], str]) -> None:
        self._relation, self._path = relation, path
        held = tensors if relation else ()
        self._held = {tensor.name: tensor for tensor in held if isinstance(tensor.name, str)}
        self._done: set[str] = set()

    @staticmethod
    def in_memory(tensors: Iterable[Tensor], family: Family) -> Joined:
        """Of published tensors, those that transformers has as one."""
        return Joined(tensors, family.parts, family.memory_module)

    @staticmethod
    def published(tensors: Iterable[Tensor], family: Family) -> Joined:
        """Of tensors in memory, those that are published as one."""
        return Joined(tensors, family.joined, family.published_path)

    def tensors(self, tensor: Tensor) -> list[Tensor] | None:
        """The tensor that this is a part of, with its first part; nothing with the others. None where it
        is no part of another."""
        found = self.whole(str(tensor.name))
        if found is None:
            return None
        key, names = found
        if key in self._done:
            return []
        self._done.add(key)
        return [self._join(key, names)]

    def whole(self, name: str) -> tuple[str, list[str]] | None:
        """The tensor that this one is a part of, and the names of all its parts.

        Raises:
            MismatchError: another part is missing.
        """
        for whole, parts in self._relation.items():
            for part in parts:
                match = compiled(part).fullmatch(name)
                if match is None:
                    continue
                names = [other.format(layer=match["layer"]) for other in parts]
                missing = [other for other in names if other not in self._held]
                if missing:
                    raise MismatchError(
                        f"{missing[0]} is missing; the target holds it and {name} as one tensor."
                    )
                return whole.format(layer=self._path(match["layer"])), names
        return None

    def _join(self, key: str, names: Sequence[str]) -> Tensor:
        parts = [self._held[name] for name in names]
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
        return replace(assemble(first, (row, *first.shape[1:]), placed), name=key)
