"""What the doctor says: findings, and the case that its checks look at. Plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import Any

from ckpt_tool.canonical import MASTER, WEIGHT, Checkpoint, ExpertName, MoELayer, TensorName
from ckpt_tool.statistics import Statistics, TensorStatistics
from ckpt_tool.storage import Reader

_SHOWN = 4  # subjects in a message; ``Finding.subjects`` has all


class Severity(Enum):
    """``error``: a run that goes on from here is broken. ``warning``: it probably is, or will be where the
    message says. ``info``: worth knowing, and often as it should be."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of thing found wrong. ``subjects`` are the tensors, experts, files or ranks it is about;
    ``check`` is a stable name of the kind."""

    check: str
    severity: Severity
    message: str
    meaning: str
    remedy: str
    subjects: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was found. ``notes`` are no findings: how the checkpoint has to be loaded, and what was not
    checked. ``tensors`` and ``nbytes`` say how much was read, ``statistics`` what the findings rest on."""

    path: str
    format: str | None
    step: int | None
    tensors: int
    nbytes: int
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    statistics: Statistics | None = None

    @property
    def healthy(self) -> bool:
        """Whether there is no error and no warning."""
        return all(finding.severity is Severity.INFO for finding in self.findings)

    def with_findings(self, others: Iterable[Finding]) -> Diagnosis:
        """The same with further findings, the gravest first."""
        order = list(Severity)
        several = sorted((*self.findings, *others), key=lambda finding: order.index(finding.severity))
        return replace(self, findings=tuple(several))


@dataclass(frozen=True)
class Case:
    """What a check looks at: the catalogue, the model's config where there is one, and what the pass over
    all values found."""

    checkpoint: Checkpoint
    reader: Reader
    config: Mapping[str, Any] | None
    statistics: Statistics

    @cached_property
    def layers(self) -> dict[str, MoELayer]:
        return {layer.layer_path: layer for layer in self.checkpoint.moe_layers}

    @cached_property
    def moments(self) -> dict[TensorName, list[TensorStatistics]]:
        """The optimizer's states of each parameter."""
        found: dict[TensorName, list[TensorStatistics]] = {}
        for (name, state), one in self.statistics.tensors.items():
            if state not in (WEIGHT, MASTER) and one.tensor.numel:
                found.setdefault(name, []).append(one)
        return found

    @cached_property
    def trained(self) -> dict[TensorName, list[bool]]:
        """Of each parameter with moments, by part: whether any of them is not zero."""
        return {
            name: [
                not all(stats.all_zero for stats in parts)
                for parts in zip(*(one.parts for one in states), strict=True)
            ]
            for name, states in self.moments.items()
        }

    @cached_property
    def any_trained(self) -> bool:
        return any(any(parts) for parts in self.trained.values())

    def part(self, one: TensorStatistics, part: int) -> str:
        """A name for a part of a tensor: an expert's matrix, or the tensor itself."""
        name = one.tensor.name
        if isinstance(name, ExpertName):
            return f"{name.expert(part)} [{one.tensor.state}]"
        return f"{one.tensor.label()}{f' at [{part}]' if one.by_expert else ''}"

    def experts(self, layer_path: str, experts: Sequence[int]) -> str:
        """``model.layers.0: experts 2, 3 (EP rank 1)``."""
        layer = self.layers.get(layer_path)
        ranks = {
            rank for rank, held in enumerate(layer.holders if layer else ()) if set(held) & set(experts)
        }
        where = ""
        if ranks and self.checkpoint.topology.ep_size is not None:
            where = f" (EP rank{'s' * (len(ranks) > 1)} {', '.join(map(str, sorted(ranks)))})"
        plural = "s" * (len(experts) > 1)
        return f"{layer_path}: expert{plural} {', '.join(map(str, experts))}{where}"


def listed(subjects: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    more = len(subjects) - _SHOWN
    return "; ".join(subjects[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def found(
    check: str, severity: Severity, what: str, subjects: Iterable[str], meaning: str, remedy: str
) -> Iterable[Finding]:
    """One finding about all ``subjects``; none where there are none. ``what`` has ``{}`` for them."""
    several = tuple(subjects)
    if several:
        yield Finding(check, severity, what.format(listed(several)), meaning, remedy, several)
