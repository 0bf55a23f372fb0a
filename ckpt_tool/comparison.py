"""Are two checkpoints the same? Canonically: tensor by tensor, state by state, bit for bit, whatever their
formats and topologies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ckpt_tool.called import other_names
from ckpt_tool.canonical import (
    MASTER,
    NOT_COMPARED,
    WEIGHT,
    Checkpoint,
    ExpertName,
    Tensor,
    TensorName,
    same,
)
from ckpt_tool.containers.decoding.virtual import real_file
from ckpt_tool.errors import UsageError
from ckpt_tool.execute.budget import Budget
from ckpt_tool.execute.meter import Meter
from ckpt_tool.families import Family, family_of
from ckpt_tool.families.naming import HUB, from_hub, to_hub, whose
from ckpt_tool.storage import Reader
from ckpt_tool.values import Difference, Pair, check_replicas, differing
from ckpt_tool.wrappers import unwrapped_checkpoint


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was compared and what was found. ``notes`` say what could not be compared, and why."""

    tensors: int
    bytes_compared: int
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.differences


def compare(
    a: Checkpoint,
    b: Checkpoint,
    readers: tuple[Reader, Reader],
    budget: Budget,
    *,
    config: Mapping[str, Any] | None = None,
    nearby: Mapping[str, Any] | None = None,
    rounded: bool = False,
    meter: Meter,
) -> Verdict:
    """Compare two checkpoints canonically.

    Args:
        config: a ``config.json``, needed where one side has published names and neither carries it.
        nearby: one that lies near one of the two, used where there is no other and names cannot be brought
            together without.
        rounded: floats of another dtype are equal where the wider, rounded, gives the narrower. Always
            so where one side holds no optimizer state and is compared by its values.

    Raises:
        UsageError: the names of the two cannot be brought together.
    """
    a, b = unwrapped_checkpoint(a), unwrapped_checkpoint(b)
    for side, reader in zip((a, b), readers, strict=True):
        check_replicas(side, reader, budget)
    sides = _same_names(a, b, config, nearby)
    said, own = {*a.notes, *b.notes}, (a, b)
    a, b = sides
    pairs, differences, notes = _pair_up(a, b)
    notes += [note for side in sides for note in side.notes if note not in said]  # of what has no such name
    notes += sorted(note for note in said if note.startswith(NOT_COMPARED))
    checked = []
    for pair in pairs:
        found = _form(pair, rounded or pair.rounded)
        differences += found
        if not found:
            checked.append(pair)
    differences += _scalars(a, b)
    notes += _one_sided(a, b)
    casts = sum(pair.a.dtype is not pair.b.dtype for pair in checked)
    if casts:
        notes.append(f"{casts} tensors differ in dtype and were compared after rounding the wider one.")
    meter.start(sum(pair.a.nbytes for pair in checked))
    differences += differing(checked, readers, budget, meter)
    called = other_names(own, config or nearby, {one.name for one in differences}) if differences else {}
    differences = [
        one._replace(message=f"{one.message}; it is {called[one.name]}") if one.name in called else one
        for one in differences
    ]
    differences.sort()
    if differences and all(difference.kind == "dtype" for difference in differences):
        notes.append(
            "The values of tensors that differ in dtype were not compared. `convert --dtype ... --verify` "
            "compares them after rounding."
        )
    return Verdict(len(pairs), sum(pair.a.nbytes for pair in checked), tuple(differences), tuple(notes))


def _same_names(
    a: Checkpoint, b: Checkpoint, config: Mapping[str, Any] | None, nearby: Mapping[str, Any] | None
) -> tuple[Checkpoint, Checkpoint]:
    found = next((c for c in (config, a.model_config, b.model_config) if c is not None), None)
    if a.dialect == b.dialect and not (found is not None and _named_by_one(a, b)):
        return a, b
    if found is None and _of_one_module(a, b):
        return a, b
    found = nearby if found is None else found
    if found is None:
        raise UsageError(
            f"The two use different names ({whose(a.dialect)} and {whose(b.dialect)}), and neither "
            "carries the model's config.json. Pass it with --config."
        )
    family = family_of(found)
    return _published(a, family, found), _published(b, family, found)


def _published(side: Checkpoint, family: Family, config: Mapping[str, Any]) -> Checkpoint:
    """A side under published names, its experts stacked: those of files that had no config beside them,
    too."""
    if side.dialect != HUB or side.model_config is not None:
        return to_hub(side, family, config)
    named = {str(tensor.name): tensor for tensor in side.tensors}
    return replace(side, tensors=tuple(from_hub(named, family, config)))


def _of_one_module(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether two without routed experts have the same names: of a module that is no family's."""
    if a.moe_layers or b.moe_layers:
        return False
    return {tensor.name for tensor in a.values()} == {tensor.name for tensor in b.values()}


def _named_by_one(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether the experts of one side only were told apart: its directory has a config.json."""
    known = [any(isinstance(tensor.name, ExpertName) for tensor in side.tensors) for side in (a, b)]
    return known[0] != known[1]


def _pair_up(a: Checkpoint, b: Checkpoint) -> tuple[list[Pair], list[Difference], list[str]]:
    """Match tensors by name and state. A side without optimizer state is compared by its values."""
    notes: list[str] = []
    weights_only = [all(tensor.state == WEIGHT for tensor in side.tensors) for side in (a, b)]
    if any(weights_only) and not all(weights_only):
        states = sorted({t.state for side in (a, b) for t in side.tensors} - {WEIGHT, MASTER})
        which = "the first" if weights_only[0] else "the second"
        notes.append(
            f"Not compared: {', '.join(states) or 'optimizer state'}, which {which} does not hold; its "
            "weights are compared with the other's masters."
        )
    derived: list[Pair] = []
    if any(weights_only):
        left = {(t.name, ""): t for t in a.values()}
        right = {(t.name, ""): t for t in b.values()}
    else:
        left, right = a.by_key(), b.by_key()
        derived += _derived(left, right, notes)
    derived += _aliased(left, right, a.aliases)
    derived += [pair._replace(a=pair.b, b=pair.a) for pair in _aliased(right, left, b.aliases)]
    differences = [
        Difference("missing", str(t.name), f"{t.label()} is in the first only ({_home(t)})")
        for key, t in left.items()
        if key not in right
    ] + [
        Difference("extra", str(t.name), f"{t.label()} is in the second only ({_home(t)})")
        for key, t in right.items()
        if key not in left
    ]
    pairs = [
        Pair(left[key], right[key], weights_only[0] != weights_only[1]) for key in left if key in right
    ]
    return pairs + derived, differences, notes


def _aliased(
    one: dict[tuple[TensorName, str], Tensor],
    other: dict[tuple[TensorName, str], Tensor],
    aliases: Mapping[str, str],
) -> list[Pair]:
    """Tensors that the other side lists, and this side as a further name of another: taken out of there."""
    pairs = []
    for name, state in [key for key in other if key not in one]:
        listed = aliases.get(name) if isinstance(name, str) else None
        state_here = MASTER if state == WEIGHT and listed and (listed, MASTER) in one else state
        if listed is not None and (listed, state_here) in one:
            pairs.append(Pair(one[listed, state_here], other.pop((name, state)), state != state_here))
    return pairs


def _derived(
    left: dict[tuple[TensorName, str], Tensor],
    right: dict[tuple[TensorName, str], Tensor],
    notes: list[str],
) -> list[Pair]:
    """Weights that only one side stores, beside its masters or in their place (a run that trains in bf16):
    they are to be the other's masters, rounded.

    Taken out of both sides. The engine compares them with nothing, so this is the only check they get.
    """
    pairs = []
    for one, other, swap in ((left, right, False), (right, left, True)):
        for name, state in [key for key in one if key[1] == WEIGHT and key not in other]:
            if (name, MASTER) in one and (name, MASTER) in other:
                weight, master = one.pop((name, state)), other[name, MASTER]
                pairs.append(Pair(master, weight, True) if swap else Pair(weight, master, True))
            elif (name, MASTER) in other and (name, MASTER) not in one:
                weight, master = one.pop((name, state)), other.pop((name, MASTER))
                pairs.append(Pair(master, weight, True) if swap else Pair(weight, master, True))
    if pairs:
        notes.append(
            f"{len(pairs)} weights stored on one side only were compared with the other's masters."
        )
    return pairs


def _home(tensor: Tensor) -> str:
    return next((real_file(region.file) for region in tensor.regions), "of no elements")


def _form(pair: Pair, rounded: bool) -> list[Difference]:
    a, b, _ = pair
    if a.shape != b.shape:
        return [
            Difference(
                "shape",
                str(a.name),
                f"{a.label()} has shape {list(a.shape)} in the first ({_home(a)}), {list(b.shape)} in the "
                f"second ({_home(b)})",
            )
        ]
    if a.dtype is not b.dtype and not (rounded and a.dtype.is_float and b.dtype.is_float):
        return [
            Difference(
                "dtype",
                str(a.name),
                f"{a.label()} is {a.dtype} in the first ({_home(a)}), {b.dtype} in the second ({_home(b)})",
            )
        ]
    return []


# Options that choose between implementations of one and the same optimizer.
_IMPLEMENTATION = frozenset({"foreach", "fused", "capturable", "differentiable"})
# What DeepSpeed says in a group of its partitions: of the ranks, and not of the optimizer.
_OF_RANKS = frozenset({"name", "moe", "ep_size"})
_PLAIN = (int, float, bool, str)


def _one_sided(a: Checkpoint, b: Checkpoint) -> list[str]:
    """What only one side holds of a run, and is therefore compared with nothing."""
    notes = []
    for what, first, second in (
        ("parameter groups", a.training.param_groups, b.training.param_groups),
        ("a scheduler's state", a.training.scheduler, b.training.scheduler),
    ):
        if bool(first) != bool(second):
            notes.append(f"Only the {'first' if first else 'second'} has {what}: not compared.")
    for names, which in ((_further(a, b), "first"), (_further(b, a), "second")):
        if names:
            notes.append(
                f"Only the {which} has {', '.join(names)}, as a further name of a tensor that both have."
            )
    return notes


def _further(one: Checkpoint, other: Checkpoint) -> list[str]:
    """Names of tied tensors that the other side has neither as such nor as a tensor's."""
    known = {*other.aliases, *(tensor.name for tensor in other.tensors)}
    return [alias for alias in one.aliases if alias not in known]


def _scalars(a: Checkpoint, b: Checkpoint) -> list[Difference]:
    differences = []
    stateful = [any(t.state not in (WEIGHT, MASTER) for t in side.tensors) for side in (a, b)]
    if all(stateful) or (a.scalars and b.scalars):
        for name, state in sorted(set(a.scalars) | set(b.scalars), key=str):
            one, other = a.scalars.get((name, state)), b.scalars.get((name, state))
            if not same(one, other):
                differences.append(
                    Difference(
                        "scalar",
                        str(name),
                        f"{name} [{state}] is {one.value if one else 'absent'} in the first, "
                        f"{other.value if other else 'absent'} in the second",
                    )
                )
    differences += _group_options(a, b)
    if None not in (a.training.scheduler, b.training.scheduler) and (
        repr(a.training.scheduler) != repr(b.training.scheduler)
    ):
        one, other = a.training.scheduler, b.training.scheduler
        message = f"the scheduler is {one!r} in the first, {other!r} in the second"
        differences.append(Difference("scalar", "lr_scheduler", message))
    for key in sorted(set(a.training.counters) & set(b.training.counters)):
        if not same(a.training.counters[key], b.training.counters[key]):
            differences.append(
                Difference(
                    "scalar",
                    key,
                    f"{key} is {a.training.counters[key]} in the first, {b.training.counters[key]} in the "
                    "second",
                )
            )
    return differences


def _group_options(a: Checkpoint, b: Checkpoint) -> list[Difference]:
    """Parameters whose lr, decay and the like differ; one difference per option, where both sides say."""
    left, right = (
        {name: group.options for group in side.training.param_groups for name in group.parameters}
        for side in (a, b)
    )
    passed_over = _IMPLEMENTATION if a.format == b.format == "torch-dcp" else _IMPLEMENTATION | _OF_RANKS
    found: dict[str, Difference] = {}
    for name in left.keys() & right.keys():
        for option in left[name].keys() & right[name].keys() - passed_over - found.keys():
            one, other = left[name][option], right[name][option]
            if not _same_option(one, other):
                message = f"{option} of {name} is {one} in the first, {other} in the second"
                found[option] = Difference("scalar", option, message)
    return list(found.values())


def _same_option(one: Any, other: Any) -> bool:
    """Whether two options say the same; of others than numbers and text it is not known."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same_option, one, other))
    if not isinstance(one, _PLAIN) or not isinstance(other, _PLAIN):
        return True
    return same(one, other)
