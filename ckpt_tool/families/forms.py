"""How one stored tensor holds expert matrices, written as einops writes it.

A stored layout such as ``"gate,up: E H (I 2)"`` says: a tensor of three dimensions, experts by hidden size
by 2 I, in which gate and up alternate along the last one. Letters are E (experts), I (intermediate size),
H (hidden size) and 2 (the projections before the colon, in that order); parentheses flatten dimensions
into one, the last letter running fastest. ``bias`` before the colon names another part than the weight; so
does any other word, for a second stack of matrices that the layer has, of its own I.
The canonical orders are those of ``canonical``: gate and up [E, I, H], down [E, H, I], biases [E, I] and
[E, H].
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from ckpt_tool.canonical import DOWN, PROJECTIONS, Box, ExpertName, Region, Regions, Tensor
from ckpt_tool.errors import UnreadableError
from ckpt_tool.geometry import Axis, Cut, CutRegions, Placed, assemble, take

_LAYOUT = re.compile(r"(?P<names>[a-z]+(?:,[a-z]+)*)(?: (?P<part>[a-z]+))?: (?P<dims>.+)")
_DIM = re.compile(r"\(([^()]+)\)|(\S+)")
_MANY = "2"
_EXPERT, _AFTER = "{expert}", "{expert+E}"


@dataclass(frozen=True, slots=True)
class Stored:
    """One key pattern of a family and the matrices under it; ``dims`` are the stored dimensions, each a
    tuple of letters, the last running fastest. ``after``: its experts are numbered after those of the
    other stack that the layer has (``{expert+E}`` in the tables)."""

    pattern: str
    projections: tuple[str, ...]
    part: str
    dims: tuple[tuple[str, ...], ...]
    after: bool = False

    @property
    def per_expert(self) -> bool:
        return _EXPERT in self.pattern

    @property
    def letters(self) -> tuple[str, ...]:
        return tuple(letter for dim in self.dims for letter in dim)

    def names(self, layer_path: str) -> tuple[ExpertName, ...]:
        return tuple(ExpertName(layer_path, projection, self.part) for projection in self.projections)

    def key(self, layer_path: str, expert: int | None = None) -> str:
        """The stored name; ``expert`` is the number that stands in it."""
        return self.pattern.format(layer=layer_path, expert=expert)

    def expected(self, sizes: Mapping[str, int]) -> tuple[int, ...] | None:
        """The stored shape, where ``sizes`` has every letter."""
        known = {**sizes, _MANY: len(self.projections)}
        if not set(self.letters) <= known.keys():
            return None
        return tuple(math.prod(known[letter] for letter in dim) for dim in self.dims)


def parse_stored(pattern: str, layout: str) -> Stored:
    """Read a layout such as ``"gate,up bias: E (I 2)"``; raises ValueError where it makes no sense."""
    match = _LAYOUT.fullmatch(layout)
    if match is None:
        raise ValueError(f"{layout!r} is not 'projections part: dimensions'")
    dims = tuple(tuple((one or other).split()) for one, other in _DIM.findall(match["dims"]))
    after, pattern = _AFTER in pattern, pattern.replace(_AFTER, _EXPERT)
    found = Stored(pattern, tuple(match["names"].split(",")), match["part"] or "weight", dims, after)
    letters = ["E"] * found.per_expert + list(found.letters)
    wanted = {*canonical_dims(found.projections[0], found.part)}
    wanted |= {_MANY} if len(found.projections) > 1 else set()
    if sorted(letters) != sorted(wanted) or not set(found.projections) <= set(PROJECTIONS):
        raise ValueError(f"{layout!r} of {pattern!r} has not the dimensions {sorted(wanted)}, once each")
    if found.per_expert and ((_MANY,) in dims or found.letters != wanted_order(found)):
        raise ValueError(f"{pattern!r}: one tensor per expert must be a canonical matrix")
    return found


def wanted_order(stored: Stored) -> tuple[str, ...]:
    return canonical_dims(stored.projections[0], stored.part)[1:]


def canonical_dims(projection: str, part: str) -> tuple[str, ...]:
    """The letters of a canonical expert stack."""
    if part == "bias":
        return ("E", "H") if projection == DOWN else ("E", "I")
    return ("E", "H", "I") if projection == DOWN else ("E", "I", "H")


# ---- one stored tensor to canonical stacks


def split(tensor: Tensor, stored: Stored, layer_path: str, experts: int | None = None) -> list[Tensor]:
    """The canonical stacks in a stored tensor that holds all experts of a layer.

    Args:
        experts: their number, needed only where experts are flattened into another dimension.

    Raises:
        UnreadableError: the tensor's shape does not fit the layout.
    """
    sizes = _sizes(tensor, stored, experts)
    origin, dims = tensor, stored.dims
    if any(len(dim) > 1 and _MANY not in dim for dim in dims):
        tensor, dims = _expanded(tensor, dims, sizes)
    found = []
    for place, name in enumerate(stored.names(layer_path)):
        letters = canonical_dims(name.projection, name.part)
        axes = [_axis(letter, dims, sizes, place) for letter in letters]
        shape = tuple(axis.length for axis in axes)
        regions = (
            tensor.regions
            if shape == tensor.shape and _plain(axes)
            else Slice(tensor, axes, origin, stored)
        )
        found.append(replace(tensor, name=name, shape=shape, regions=regions))
    return found


def _plain(axes: Sequence[Axis]) -> bool:
    return all(axis == Axis(dim, 0, axis.length) for dim, axis in enumerate(axes))


def _sizes(tensor: Tensor, stored: Stored, experts: int | None) -> dict[str, int]:
    sizes = {_MANY: len(stored.projections)}
    if experts is not None and any("E" in dim and len(dim) > 1 for dim in stored.dims):
        sizes["E"] = experts
    fits = len(tensor.shape) == len(stored.dims)
    for dim, size in zip(stored.dims, tensor.shape, strict=False):
        unknown = [letter for letter in dim if letter not in sizes]
        known = math.prod(sizes[letter] for letter in dim if letter in sizes)
        if len(unknown) > 1 or known < 1 or size % known or (not unknown and size != known):
            fits = False
            break
        if unknown:
            sizes[unknown[0]] = size // known
    if not fits:
        layout = " ".join("(" + " ".join(dim) + ")" if len(dim) > 1 else dim[0] for dim in stored.dims)
        raise UnreadableError(
            f"{tensor.label()} has shape {list(tensor.shape)}, which is not {layout}, the layout its "
            "family stores it in."
        )
    return sizes


def _expanded(
    tensor: Tensor, dims: Sequence[tuple[str, ...]], sizes: Mapping[str, int]
) -> tuple[Tensor, tuple[tuple[str, ...], ...]]:
    """The tensor with flattened dimensions taken apart; its runs stay where they are."""
    if any(isinstance(region, Box) for region in tensor.regions):
        raise UnreadableError(
            f"{tensor.label()} flattens its experts and is stored in chunks; not supported."
        )
    apart = tuple((letter,) for dim in dims for letter in dim)
    return replace(tensor, shape=tuple(sizes[letter] for (letter,) in apart)), apart


def _axis(letter: str, dims: Sequence[tuple[str, ...]], sizes: Mapping[str, int], place: int) -> Axis:
    """Where a canonical dimension runs in the stored tensor, for the projection at ``place`` of "2"."""
    dim = next(number for number, letters in enumerate(dims) if letter in letters)
    if dims[dim] == (letter,):
        return Axis(dim, 0, sizes[letter])
    if dims[dim] == (letter, _MANY):
        return Axis(dim, place, sizes[letter], sizes[_MANY])
    return Axis(dim, place * sizes[letter], sizes[letter])


class Slice:
    """The regions of a slice: runs, where the stored tensor lies in runs and the slice is made of whole
    rows of it; boxes elsewhere. ``origin`` and ``stored`` are what was split, for ``join`` to undo."""

    def __init__(self, tensor: Tensor, axes: Sequence[Axis], origin: Tensor, stored: Stored) -> None:
        self._tensor, self._axes = tensor, tuple(axes)
        self.origin, self.stored = origin, stored

    def __iter__(self) -> Iterator[Region | Box]:
        return iter(self._regions())

    def _regions(self) -> Regions:
        tensor, axes = self._tensor, self._axes
        in_order = all(axis.dim == dim for dim, axis in enumerate(axes))
        whole = all(axis.length == tensor.shape[axis.dim] for axis in axes[2:])
        if not (in_order and whole and axes[0].length == tensor.shape[0] and axes[1].step == 1):
            return take(tensor, axes).regions
        if any(isinstance(region, Box) for region in tensor.regions):
            return take(tensor, axes).regions
        row = math.prod(tensor.shape[2:])
        size, outer = axes[1].length * row, tensor.shape[1] * row
        return CutRegions(
            [Cut(e * size, size, tensor, e * outer + axes[1].start * row) for e in range(axes[0].length)]
        )


# ---- canonical stacks to one stored tensor


def join(stacks: Sequence[Tensor], stored: Stored, key: str) -> tuple[Tensor, tuple[int, ...]]:
    """The stored tensor that holds ``stacks`` (one per projection of ``stored``), and its stored shape.

    Where dimensions are flattened, the tensor's own shape has them apart; its elements are in the order
    of the stored shape either way.
    """
    first = stacks[0]
    origin = _origin(stacks, stored)
    if origin is not None:
        return replace(origin, name=key), origin.shape
    letters = canonical_dims(stored.projections[0], stored.part)
    sizes = {**dict(zip(letters, first.shape, strict=True)), _MANY: len(stored.projections)}
    shape = tuple(math.prod(sizes[letter] for letter in dim) for dim in stored.dims)
    dims: Sequence[tuple[str, ...]] = stored.dims
    if any(len(dim) > 1 and _MANY not in dim for dim in dims):
        dims = [(letter,) for dim in dims for letter in dim]
    apart = tuple(math.prod(sizes[letter] for letter in dim) for dim in dims)
    parts = []
    for place, stack in enumerate(stacks):
        own = canonical_dims(stored.projections[place], stored.part)
        parts.append(Placed(stack, tuple(_axis(letter, dims, sizes, place) for letter in own)))
    if len(parts) == 1 and _plain(parts[0].axes) and apart == first.shape:
        return replace(first, name=key), shape
    return replace(assemble(first, apart, parts), name=key), shape


def _origin(stacks: Sequence[Tensor], stored: Stored) -> Tensor | None:
    """The stored tensor that ``stacks`` were split from, where it has the layout asked for."""
    slices = [stack.regions for stack in stacks if isinstance(stack.regions, Slice)]
    if len(slices) != len(stored.projections):
        return None
    origin = slices[0].origin
    layout = (stored.projections, stored.part, stored.dims)
    same = all(
        piece.origin is origin
        and (piece.stored.projections, piece.stored.part, piece.stored.dims) == layout
        for piece in slices
    )
    names = [stack.name.projection for stack in stacks if isinstance(stack.name, ExpertName)]
    return origin if same and tuple(names) == stored.projections else None


@cache
def compiled(pattern: str) -> re.Pattern[str]:
    """A name pattern as a regular expression with the groups ``layer``, ``expert`` and ``rest``."""
    text = re.escape(pattern).replace(r"\*", "(?P<rest>.+)")
    text = text.replace(r"\{layer\}", r"(?P<layer>(?:.*\.)?[0-9]+)")
    return re.compile(text.replace(r"\{expert\}", r"(?P<expert>[0-9]+)"))
