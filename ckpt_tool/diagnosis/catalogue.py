"""Checks of metadata: each a function of a case, that reads at most a few small files again."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ckpt_tool.canonical import EXP_AVG, EXP_AVG_SQ, MASTER, STEP, WEIGHT, Role, TensorName
from ckpt_tool.containers.pickle_records import Opaque
from ckpt_tool.diagnosis.findings import Case, Finding, Severity, found
from ckpt_tool.errors import MismatchError, UsageError
from ckpt_tool.families import Family, family_of, of_all_layers, stated, text_config
from ckpt_tool.families.agreement import check_config
from ckpt_tool.families.naming import to_hub
from ckpt_tool.statistics import layer_of

Check = Callable[[Case], Iterable[Finding]]

# What DeepSpeed and torchtitan call the directory of a step.
_TAG = re.compile(r"(?:global_step|step-)(\d+)(?:_universal)?")


def optimizer_steps(case: Case) -> Iterator[Finding]:
    """The optimizer's own step, which it corrects its bias by, beside the run's counter."""
    steps = {
        name: scalar.value for (name, state), scalar in case.checkpoint.scalars.items() if state == STEP
    }
    wrong = {name: step for name, step in steps.items() if not math.isfinite(step) or step < 0}
    yield from found(
        "step",
        Severity.ERROR,
        "The optimizer's step is no count: {}.",
        [f"{name} ({step})" for name, step in wrong.items()],
        "Adam corrects its bias by the step: the first step after loading makes these weights NaN or "
        "throws "
        "them off.",
        "Take another copy or checkpoint, or resume with the weights alone.",
    )
    training = case.checkpoint.training
    if isinstance(training.step, float) and not math.isfinite(training.step):
        yield Finding(
            "step",
            Severity.ERROR,
            f"The run's step is no count: {training.step}.",
            "What a run does by its step (schedules, saves, the end) goes wrong, or the load fails.",
            "Take another copy or checkpoint: the file is damaged, or was changed by a tool.",
        )
    skipped = training.counters.get("skipped_steps", 0)
    skipped = skipped if isinstance(skipped, int) else 0
    done = training.step - skipped if isinstance(training.step, int) else None
    ahead = {n: step for n, step in steps.items() if n not in wrong and done is not None and step > done}
    if ahead:
        most = max(ahead.values())
        yield Finding(
            "step_ahead",
            Severity.WARNING,
            f"The optimizer is at step {most:g}, and the run has made {done}"
            + (f" (and has skipped {skipped})." if skipped else "."),
            "After a Universal load into ZeRO-3 all sub-groups share one step, and torch's Adam counts "
            "it once "
            "for each of them (docs/resume.md). Bias is corrected too little: from there on the run is not "
            "the one that it would have been; the difference fades over some 1 / (1 - beta2) steps.",
            "Go back to the checkpoint before the Universal load and resume it with `ckpt-tool reshard` "
            "and a "
            "plain load, or give each sub-group a step tensor of its own after loading. To go on from "
            "here, "
            "set step to the run's count in every group.",
            tuple(f"{name} ({step:g})" for name, step in ahead.items()),
        )
    sound = {name: step for name, step in steps.items() if name not in wrong}
    counts = {step: [str(n) for n, one in sound.items() if one == step] for step in set(sound.values())}
    usual = max(counts, key=lambda step: len(counts[step]), default=None)
    yield from found(
        "steps_differ",
        Severity.WARNING,
        f"Parameters are at another step of the optimizer than most others, which are at {usual}: {{}}.",
        [f"{name} ({step:g})" for step in counts if step != usual for name in counts[step]],
        "Right where they were frozen for a while or had no gradient. Else their state is of another "
        "save. A "
        "ZeRO-3 Universal load gives all parameters one and the same step.",
        "See whether these parameters were trained from the start.",
    )


def lost_states(case: Case) -> Iterable[Finding]:
    """Optimizer state that some parameters of a group have and others do not; of Adam's, all parameters."""
    states: dict[TensorName, set[str]] = {}
    for tensor in case.checkpoint.tensors:
        if tensor.role is Role.PARAMETER:
            states.setdefault(tensor.name, set()).update({tensor.state} - {WEIGHT, MASTER})
    for name, state in case.checkpoint.scalars:
        if name in states:
            states[name].add(state)
    groups = [group.parameters for group in case.checkpoint.training.param_groups] or [tuple(states)]
    adam = {EXP_AVG, EXP_AVG_SQ, STEP} & set().union(*states.values())
    part = []
    for group in groups:
        members = [name for name in group if name in states]
        most: set[str] = set().union(*(states[name] for name in members))
        for name in members:
            own = states[name]
            lacking = (most | adam if own & {EXP_AVG, EXP_AVG_SQ} else most) - own
            if lacking and own:
                has, no = (", ".join(sorted(some)) for some in (own, lacking))
                part.append(f"{name} (has {has}, no {no})")
    return found(
        "lost_state",
        Severity.ERROR,
        "Parameters lack a part of the optimizer state that others of their group have: {}.",
        part,
        "An optimizer writes all of a parameter's state at once: the rest was lost. The load fails, or the "
        "optimizer begins anew for these parameters.",
        "Take another copy or checkpoint, or resume with the weights alone.",
    )


def group_options(case: Case) -> Iterable[Finding]:
    """Numbers that the optimizer takes from the files as they are: nothing checks them after a load."""
    groups = case.checkpoint.training.param_groups
    return found(
        "group_options",
        Severity.ERROR,
        "Options of parameter groups are no numbers that an optimizer can use: {}.",
        [
            f"{option} of group {number} ({value})"
            for number, group in enumerate(groups)
            for option, value in group.options.items()
            if not all(map(math.isfinite, _floats(value)))
            or (option == "betas" and not all(0 <= beta < 1 for beta in _floats(value)))
        ],
        "A load takes them over: the first step after it makes the weights of these groups NaN.",
        "Take another copy or checkpoint, or set these options after loading. If the run computed them "
        "itself, see what its scheduler divides by.",
    )


def _floats(value: object) -> list[float]:
    """The floats in an option: itself, or members of a tuple such as ``betas``."""
    members = value if isinstance(value, tuple | list) else (value,)
    return [member for member in members if isinstance(member, float)]


def experts_of_the_config(case: Case) -> Iterable[Finding]:
    family = _family(case)
    if family is None or case.config is None:
        return
    said = stated(text_config(case.config), family.config.get("experts", ()))
    wanted = of_all_layers(said[1]) if said is not None else None
    if said is None or type(wanted) is not int:
        return
    fewer = {
        layer.layer_path: layer.num_experts
        for layer in case.checkpoint.moe_layers
        if layer.num_experts < wanted
    }
    yield from found(
        "missing_experts",
        Severity.ERROR,
        f"Layers have fewer experts than config.json says ({said[0]} {wanted}): {{}}.",
        [f"{path} ({count})" for path, count in fewer.items()],
        "A run that loads this trains what is left of the model, or starts the others from random values.",
        "If the config is this model's, experts were lost before the checkpoint was saved: an "
        "expert-parallel model wrapped by ZeRO-3 without AutoEP, or plain local tensors saved by DCP, keep "
        "one rank's share only. Such a checkpoint cannot be repaired; take one of each rank's own saves.",
    )


def unusable_config(error: Exception) -> Finding:
    """A config.json beside the checkpoint that cannot be read, as ``error`` says."""
    return Finding(
        "config",
        Severity.WARNING,
        str(error),
        "transformers and ckpt-tool take the model's description from it. The checkpoint was not "
        "compared with "
        "it.",
        "Copy it again from the model, or pass another with --config.",
    )


def agrees_with_the_config(case: Case) -> Iterable[Finding]:
    """Everything else that ``families`` compares."""
    family = _family(case)
    if family is None or case.config is None or any(experts_of_the_config(case)):
        return
    try:
        check_config(to_hub(case.checkpoint, family, case.config), family, case.config)
    except MismatchError as error:
        yield Finding(
            "config",
            Severity.ERROR,
            str(error),
            "Loading this checkpoint into a model of this config fails, or leaves a part of the model "
            "random.",
            "Pass the config.json of the model that was trained with --config. If it is that, tensors were "
            "lost or renamed before this checkpoint was saved.",
        )
    except UsageError:
        return  # said in the notes


def _family(case: Case) -> Family | None:
    if case.config is None:
        return None
    try:
        return family_of(case.config)
    except UsageError:
        return None


def expert_parallel_size(case: Case) -> Iterable[Finding]:
    """The EP size in the run's DeepSpeed config, beside that of the files."""
    topology, config = case.checkpoint.topology, case.checkpoint.training.config
    said = config.get("expert_parallel") if isinstance(config, dict) else None
    size = said.get("autoep_size") if isinstance(said, dict) and said.get("enabled") else None
    if type(size) is int and topology.ep_size is not None and size != topology.ep_size:
        yield Finding(
            "stale_ep_size",
            Severity.WARNING,
            f"The DeepSpeed config in the files has autoep_size {size}; the files are of EP size "
            f"{topology.ep_size}.",
            "Files or metadata of two topologies are mixed, or the checkpoint was rewritten by hand. The "
            "engine "
            "does not compare the two: at the wrong EP size ZeRO-1/2 files can load with experts in wrong "
            "places.",
            "Find out at which EP size it was saved, and load it at that one; `ckpt-tool reshard` writes "
            "both "
            "alike.",
        )


def loss_scale(case: Case) -> Iterator[Finding]:
    config, scale = case.checkpoint.training.config, case.checkpoint.training.loss_scale
    half = config.get("fp16") if isinstance(config, dict) else None
    scaler = scale.get("loss_scaler")
    if not isinstance(half, dict) or not half.get("enabled") or not isinstance(scaler, Opaque):
        return
    state = scaler.state if isinstance(scaler.state, dict) else {}
    if half.get("loss_scale", 0) == 0 and scaler.qualname.rpartition(".")[2] == "LossScaler":
        yield Finding(
            "loss_scale",
            Severity.WARNING,
            "The config asks for a dynamic loss scale; the files hold a static one of "
            f"{state.get('cur_scale')}.",
            "A plain load takes it over without an error: small gradients vanish in fp16 from then on.",
            "Load it as Universal (`ckpt-tool convert --to universal`), which keeps the run's own scaler.",
        )
    least, current = state.get("min_scale"), state.get("cur_scale")
    if isinstance(current, float) and not (math.isfinite(current) and current > 0):
        yield Finding(
            "loss_scale",
            Severity.ERROR,
            f"The loss scale is {current:g}, which no loss can be scaled by.",
            "All gradients after the load are NaN or zero: no step is made any more.",
            "Take another copy or checkpoint, or load it as Universal (`ckpt-tool convert --to "
            "universal`), which keeps the run's own scaler.",
        )
        return
    if isinstance(least, int | float) and isinstance(current, int | float) and current <= least:
        yield Finding(
            "loss_scale",
            Severity.WARNING,
            f"The dynamic loss scale is down to {current:g}, its least.",
            "Every step before this one has overflowed: the weights were not updated any more, or are "
            "about to "
            "become NaN.",
            "Go back to a checkpoint with a larger loss scale, and find what overflows; or train in bf16.",
        )


def tag_names_its_step(case: Case) -> Iterable[Finding]:
    name, step = Path(case.checkpoint.root).name, case.checkpoint.training.step
    match = _TAG.fullmatch(name)
    if match is not None and isinstance(step, int) and int(match[1]) != step:
        yield Finding(
            "tag",
            Severity.WARNING,
            f"The directory is called {name}, and the checkpoint in it is of step {step}.",
            "It was renamed or copied over another one: a run that resumes by its name goes on from "
            "another "
            "step than you expect.",
            "Find out which step it is, and give the directory its name (`latest` has to name it, too).",
            (name,),
        )


def weights_without_optimizer(case: Case) -> Iterator[Finding]:
    """Parameters of the optimizer without moments beside others that have some. torch makes them with the
    first gradient; engines that freeze parameters keep them out of the optimizer."""
    if not case.moments:
        return
    lacking: dict[Severity, list[str]] = {Severity.WARNING: [], Severity.INFO: []}
    masters = {tensor.name for tensor in case.checkpoint.tensors if tensor.state == MASTER}
    for tensor in case.checkpoint.tensors:
        if tensor.role is not Role.PARAMETER or tensor.name in case.moments:
            continue
        if tensor.state == MASTER or (tensor.state == WEIGHT and tensor.name not in masters):
            serious = tensor.state == MASTER or layer_of(tensor) is not None
            lacking[Severity.WARNING if serious else Severity.INFO].append(str(tensor.name))
    for severity, names in lacking.items():
        yield from found(
            "no_optimizer_state",
            severity,
            "Parameters have no optimizer state, and others have: {}.",
            names,
            "They were frozen, never had a gradient, or their state was lost. A load fails, or starts "
            "their "
            "moments at zero.",
            "See whether they were meant to be frozen.",
        )


CHECKS: tuple[Check, ...] = (
    optimizer_steps,
    lost_states,
    group_options,
    experts_of_the_config,
    agrees_with_the_config,
    expert_parallel_size,
    loss_scale,
    tag_names_its_step,
    weights_without_optimizer,
)
