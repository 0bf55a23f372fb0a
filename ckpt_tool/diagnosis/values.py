"""Checks of values: each a function of a case, from the statistics of one pass over all tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator

from ckpt_tool.canonical import EXP_AVG, EXP_AVG_SQ, MASTER, WEIGHT, DType, Role, TensorName
from ckpt_tool.diagnosis.findings import Case, Finding, Severity, found
from ckpt_tool.duplicates import copies_of
from ckpt_tool.statistics import TensorStatistics, layer_of

Check = Callable[[Case], Iterable[Finding]]

_NORM = re.compile(r".*norm\w*\.weight")
_SQUARES = (EXP_AVG_SQ, "max_exp_avg_sq")
# Rounding makes little of the bound on a moment's size; what is beyond twice of it is no rounding.
_MARGIN = 2.0


def unreadable(case: Case) -> Iterator[Finding]:
    for name, why in case.statistics.failures.items():
        yield Finding(
            "unreadable",
            Severity.ERROR,
            why,
            "The checkpoint cannot be loaded, or is loaded in part.",
            "Copy the file again from where it was saved.",
            (str(name),),
        )


def non_finite(case: Case) -> Iterator[Finding]:
    """NaN anywhere; infinity in what is trained. A buffer may be a mask, which has infinities."""
    weights: list[str] = []
    moments: list[str] = []
    for one in case.statistics.tensors.values():
        buffer = one.tensor.role is Role.BUFFER
        for number, stats in enumerate(one.parts):
            bad = stats.nan if buffer else stats.non_finite
            if bad:
                where = f"{case.part(one, number)} ({bad:,} of {stats.numel:,})"
                (weights if one.tensor.state in (WEIGHT, MASTER) else moments).append(where)
    yield from found(
        "non_finite",
        Severity.ERROR,
        "Weights are NaN or infinite: {}.",
        weights,
        "Whatever passes through them becomes NaN: the loss, and with the first step all other weights.",
        "Resume from the last checkpoint without them, and look for what happened in between: a spike of "
        "the "
        "loss, an overflow in fp16, a faulty device.",
    )
    yield from found(
        "non_finite",
        Severity.ERROR,
        "Optimizer state is NaN or infinite: {}.",
        moments,
        "The first step after loading makes these weights NaN.",
        "Resume from the last checkpoint without them, or with the weights alone if those are sound "
        "(load_optimizer_states=False).",
    )


def negative_squares(case: Case) -> Iterable[Finding]:
    subjects = [
        f"{case.part(one, number)} (least {stats.least:.3g})"
        for one in case.statistics.tensors.values()
        if one.tensor.state in _SQUARES
        for number, stats in enumerate(one.parts)
        if stats.least < 0
    ]
    return found(
        "negative_exp_avg_sq",
        Severity.ERROR,
        "A mean of squares is negative: {}.",
        subjects,
        "Adam divides by its root: the first step after loading makes these weights NaN.",
        "No optimizer computes this: the file is damaged, or the state was changed by a tool. Take another "
        "copy or checkpoint, or resume with the weights alone.",
    )


def constant_matrices(case: Case) -> Iterator[Finding]:
    """Matrices whose elements are all the same. Vectors may be: norms begin as ones, biases as zeros."""
    sure, unsure, untrained = [], [], []
    masters = case.statistics.of(MASTER)
    for one in case.statistics.tensors.values():
        tensor = one.tensor
        beside_master = tensor.state == WEIGHT and tensor.name in masters
        if tensor.state not in (WEIGHT, MASTER) or beside_master or tensor.role is Role.BUFFER:
            continue
        shape = tensor.shape[1:] if one.by_expert else tensor.shape
        if sum(size > 1 for size in shape) < 2:
            continue
        parts = one.parts
        trained = case.trained.get(tensor.name, [False] * len(parts))
        for number, stats in enumerate(parts):
            if not stats.constant:
                continue
            where = f"{case.part(one, number)} (all {stats.most:.6g})"
            if trained[number] or not all(other.constant for other in parts):
                sure.append(where)
            elif case.checkpoint.training.step == 0 or (case.moments and not case.any_trained):
                untrained.append(where)
            else:
                unsure.append(where)
    what = "Weight matrices are one and the same number throughout: {}."
    meaning = "What they compute does not depend on the input: values were lost, or never written."
    remedy = (
        "Compare with another copy of this checkpoint or an earlier one. If a save or a conversion lost "
        "the "
        "values, they are not in this checkpoint."
    )
    yield from found("constant", Severity.ERROR, what, sure, meaning, remedy)
    yield from found("constant", Severity.WARNING, what, unsure, meaning, remedy)
    yield from found(
        "constant",
        Severity.INFO,
        what,
        untrained,
        "Before the first step this is right for a layer that is initialised so, such as a router or the "
        "second half of an adapter.",
        "See whether the model initialises them so.",
    )


def zero_norms(case: Case) -> Iterable[Finding]:
    """Norms that are zero where those of other layers are not. Where all are zero, the model adds one."""
    kinds: dict[str, list[TensorStatistics]] = {}
    for one in case.statistics.tensors.values():
        name = one.tensor.name
        if one.tensor.state in (WEIGHT, MASTER) and isinstance(name, str) and _NORM.fullmatch(name):
            kinds.setdefault(f"{re.sub(r'[0-9]+', '#', name)} {one.tensor.state}", []).append(one)
    subjects = [
        one.tensor.label()
        for several in kinds.values()
        if not all(one.whole.all_zero for one in several)
        for one in several
        if one.tensor.numel and one.whole.all_zero
    ]
    return found(
        "zero_norm",
        Severity.ERROR,
        "Norms are zero, and those of other layers are not: {}.",
        subjects,
        "Nothing passes through these layers.",
        "The values were lost in a save or a conversion. Compare with another copy or an earlier "
        "checkpoint.",
    )


def untrained(case: Case) -> Iterator[Finding]:
    """Moments that are zero while those of others are not."""
    if not case.any_trained:
        yield from _moments_lost(case)
        return
    layers: dict[str, dict[int, bool]] = {}
    dense = []
    for name, parts in case.trained.items():
        one = case.moments[name][0]
        path = layer_of(one.tensor)
        if path is None:
            if not any(parts):
                dense.append(str(name))
            continue
        layer = layers.setdefault(path, {})
        for expert, trained in enumerate(parts):
            layer[expert] = layer.get(expert, False) or trained
    idle = {path: [e for e, trained in layer.items() if not trained] for path, layer in layers.items()}
    yield from found(
        "untrained_experts",
        Severity.WARNING,
        "Experts were never trained: the moments of others are not zero, theirs are: {}.",
        [case.experts(path, experts) for path, experts in idle.items() if experts],
        "The router never chose them, or the gradients of their rank were lost. They stay as they were "
        "initialised, and take memory without adding to the model.",
        "If these are all experts of a rank, see whether its gradients reach the optimizer. Otherwise "
        "look at "
        "the router's load: the auxiliary loss, the correction bias, the expert capacity.",
    )
    yield from found(
        "untrained_parameters",
        Severity.WARNING,
        "Parameters were never trained: the moments of others are not zero, theirs are: {}.",
        dense,
        "No gradient has ever reached them. They stay as they were initialised.",
        "If they are meant to be frozen, set requires_grad to False, which saves their optimizer state. "
        "Otherwise see where the graph is cut: a module that is not called, a detach, an unused head.",
    )


def _moments_lost(case: Case) -> Iterable[Finding]:
    steps = [s.value for (_, state), s in case.checkpoint.scalars.items() if state == "step"]
    if not case.moments or not steps or max(steps) <= 0:
        return
    yield Finding(
        "moments_lost",
        Severity.ERROR,
        f"All moments are zero, at step {max(steps):g} of the optimizer.",
        "Adam takes them for the means of that many gradients: the first steps after loading are several "
        "times as large as they should be.",
        "The optimizer state was lost in a save or a conversion. Convert the original again, or resume "
        "with "
        "the weights alone, so that the optimizer starts at step 0.",
    )


def copied_experts(case: Case) -> Iterator[Finding]:
    overwritten, upcycled, others = [], [], []
    constant = _constant_experts(case)
    for copies in copies_of(case.checkpoint, case.statistics):
        if constant[copies.layer_path].issuperset(copies.experts):
            continue  # said elsewhere
        text = case.experts(copies.layer_path, copies.experts)
        layer = case.layers.get(copies.layer_path)
        every = layer is not None and len(copies.experts) == layer.num_experts
        if copies.overwritten:
            overwritten.append(text)
        elif every and not case.any_trained:
            upcycled.append(text)
        else:
            others.append(text)
    what = "Experts of a layer are copies of each other, bit for bit: {}."
    yield from found(
        "copied_experts",
        Severity.ERROR,
        f"{what} They lie as they do when one rank's experts have overwritten the other ranks'.",
        overwritten,
        "The overwritten experts are lost, and the model has fewer different experts than it seems to.",
        "The originals are not in this checkpoint: go back to one from before the run loaded a state "
        "dict on "
        "one rank and broadcast it (huggingface/transformers#45662).",
    )
    yield from found(
        "copied_experts",
        Severity.ERROR if case.any_trained else Severity.WARNING,
        what,
        others,
        "Experts that are trained differ after the first step: these were copied, or get the same tokens.",
        "See how the checkpoint was made: which save, conversion or merge wrote the same expert twice.",
    )
    yield from found(
        "copied_experts",
        Severity.INFO,
        what,
        upcycled,
        "So is a model that was made of a dense one, before its first step.",
        "If this model was trained, its experts were lost.",
    )


def _constant_experts(case: Case) -> dict[str, set[int]]:
    """By layer the experts of which every matrix is one number throughout."""
    found: dict[str, set[int]] = {}
    for one in case.statistics.tensors.values():
        path = layer_of(one.tensor)
        if path is not None and one.tensor.state in (WEIGHT, MASTER):
            own = {expert for expert, stats in enumerate(one.parts) if stats.constant}
            found[path] = found[path] & own if path in found else own
    return found


def masters_round_to_weights(case: Case) -> Iterable[Finding]:
    subjects = []
    for name, parts in case.statistics.rounding.items():
        weight = case.statistics.tensors[name, WEIGHT]
        subjects += [
            f"{case.part(weight, number)} ({one.differing:,} of {one.numel:,})"
            for number, one in enumerate(parts)
            if one.differing
        ]
    return found(
        "master_differs",
        Severity.ERROR,
        "Stored weights are not their fp32 masters rounded: {}.",
        subjects,
        "The first forward pass uses these weights; after the first step the masters take their place, and "
        "nothing compares the two. One of them is of another step, or lies in another tensor's place.",
        "Find out which is right: `ckpt-tool verify` with an earlier copy. Files of different saves may be "
        "mixed; copy the checkpoint again.",
    )


def moments_belong_together(case: Case) -> Iterable[Finding]:
    """By Cauchy and Schwarz no history of gradients makes exp_avg larger than a multiple of the root of
    exp_avg_sq that the betas say. What is larger was not made of the same gradients."""
    betas = _betas(case)
    subjects = []
    for name, parts in case.statistics.updates.items():
        bound = _bound(betas.get(name))
        states = [case.statistics.tensors.get((name, state)) for state in (EXP_AVG, EXP_AVG_SQ)]
        if bound is None or any(one is None or one.tensor.dtype is not DType.float32 for one in states):
            continue
        mean = states[0]
        subjects += [
            f"{case.part(mean, number)} ({one.largest:.3g} times the root of exp_avg_sq; at most "
            f"{bound:.3g} "
            "is possible)"
            for number, one in enumerate(parts)
            if mean is not None and one.largest > _MARGIN * bound
        ]
    return found(
        "moments_disagree",
        Severity.WARNING,
        "exp_avg and exp_avg_sq are not of the same gradients: {}.",
        subjects,
        "The moments of different parameters, experts or steps were mixed. The first steps after loading "
        "are "
        "far too large for some weights.",
        "Convert the original checkpoint again with another tool, or resume with the weights alone. (A run "
        "that changed its betas, or an optimizer other than Adam, may do this by itself.)",
    )


def _betas(case: Case) -> dict[TensorName, object]:
    return {
        name: group.options.get("betas")
        for group in case.checkpoint.training.param_groups
        for name in group.parameters
    }


def _bound(betas: object) -> float | None:
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        return None
    one, two = betas
    if not all(isinstance(beta, float) and 0 < beta < 1 for beta in betas) or one * one >= two:
        return None
    return float((1 - one) / math.sqrt(1 - two) / math.sqrt(1 - one * one / two))


CHECKS: tuple[Check, ...] = (
    unreadable,
    non_finite,
    negative_squares,
    constant_matrices,
    zero_norms,
    untrained,
    copied_experts,
    masters_round_to_weights,
    moments_belong_together,
)
