"""What the pass over all values finds, as plain data: by tensor, and by expert."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import xxhash

from ckpt_tool.canonical import ExpertName, Tensor, TensorName
from ckpt_tool.limits import MOST_EXPERTS

# A fused stack whose family is not known: the experts are its first dimension all the same.
_FUSED = re.compile(r"(?P<layer>(?:.*\.)?\d+)\..*experts\.\w+")

# The fields of ``Stats`` as numpy has them, a row of 80 bytes for each expert.
NUMBERS = (
    ("numel", "i8"),
    ("nan", "i8"),
    ("infinite", "i8"),
    ("zeros", "i8"),
    ("least", "f8"),
    ("most", "f8"),
    ("total", "f8"),
    ("squares", "f8"),
    ("digest", "V16"),
)


def layer_of(tensor: Tensor) -> str | None:
    """The layer whose experts a tensor is a stack of; None where it is no such stack."""
    if isinstance(tensor.name, ExpertName):
        return tensor.name.layer_path
    match = _FUSED.fullmatch(tensor.name) if len(tensor.shape) == 3 else None
    return match["layer"] if match else None


def experts_of(tensor: Tensor) -> int | None:
    """How many experts a tensor is a stack of; None where it is no such stack."""
    if layer_of(tensor) is None or not 0 < tensor.shape[0] <= MOST_EXPERTS:
        return None
    return tensor.shape[0]


class Stats(NamedTuple):
    """Numbers of a tensor, or of one expert of it.

    ``least``, ``most``, ``total`` and ``squares`` (the sum of squares) are of the finite elements; without
    any, ``least`` is inf and ``most`` -inf. The two sums are NaN where they were not asked for, as are
    ``mean`` and ``l2`` then. ``digest`` is the XXH3-128 of the bytes in row-major order (of the digests of
    its stretches of 2 ** 24 elements, where there are several).
    """

    numel: int
    nan: int
    infinite: int
    zeros: int
    least: float
    most: float
    total: float
    squares: float
    digest: bytes

    @property
    def non_finite(self) -> int:
        return self.nan + self.infinite

    @property
    def absmax(self) -> float:
        return max(-self.least, self.most, 0.0)

    @property
    def mean(self) -> float:
        return self.total / max(1, self.numel - self.non_finite)

    @property
    def l2(self) -> float:
        return math.sqrt(self.squares)

    @property
    def all_zero(self) -> bool:
        return self.zeros == self.numel

    @property
    def constant(self) -> bool:
        """Whether all elements are one finite number. A tensor of no elements is."""
        return not self.non_finite and (self.least == self.most or not self.numel)


class Updates(NamedTuple):
    """Of ``exp_avg / sqrt(exp_avg_sq + 1e-16)``, without bias correction, in blocks that are finite: how
    many, the sum of squares, and the largest."""

    numel: int
    squares: float
    largest: float


class Rounding(NamedTuple):
    """How many stored weights are not their master rounded to the weight's dtype, of how many."""

    numel: int
    differing: int


class TensorStatistics:
    """The numbers of one tensor: ``parts[e]`` of expert e; a tensor without experts has one part."""

    def __init__(self, tensor: Tensor, rows: Any) -> None:
        self.tensor = tensor
        self._rows = rows

    @property
    def parts(self) -> list[Stats]:
        """By expert, or one of the whole tensor."""
        return [stats_of(row) for row in self._rows]

    @property
    def by_expert(self) -> bool:
        return experts_of(self.tensor) is not None

    @property
    def whole(self) -> Stats:
        return merged(self.parts)


@dataclass(frozen=True, slots=True)
class Statistics:
    """What the pass found. Parts are experts, where a tensor has some.

    ``updates`` are there where both of Adam's moments are, ``rounding`` where a weight is stored beside its
    master. ``failures`` says of a parameter why it could not be read.
    """

    tensors: Mapping[tuple[TensorName, str], TensorStatistics]
    updates: Mapping[TensorName, Sequence[Updates]] = field(default_factory=dict)
    rounding: Mapping[TensorName, Sequence[Rounding]] = field(default_factory=dict)
    failures: Mapping[TensorName, str] = field(default_factory=dict)

    def of(self, state: str) -> dict[TensorName, TensorStatistics]:
        return {name: found for (name, known), found in self.tensors.items() if known == state}


def merged(parts: Sequence[Stats]) -> Stats:
    """The numbers of several stretches together, in their order."""
    if len(parts) == 1:
        return parts[0]
    return Stats(
        sum(part.numel for part in parts),
        sum(part.nan for part in parts),
        sum(part.infinite for part in parts),
        sum(part.zeros for part in parts),
        min((part.least for part in parts), default=math.inf),
        max((part.most for part in parts), default=-math.inf),
        sum(part.total for part in parts),
        sum(part.squares for part in parts),
        xxhash.xxh3_128(b"".join(part.digest for part in parts)).digest(),
    )


def stats_of(row: Any) -> Stats:
    """A row of ``NUMBERS``."""
    return Stats._make(row.tolist())
