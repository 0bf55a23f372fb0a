"""Parameter groups for torch's optimizers: a DCP source's own, or made of DeepSpeed's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# torch 2.13, torch/optim/adam.py: the keys of a parameter group of AdamW. A run that loads a checkpoint
# asks for every key its own groups have; what it does not ask for is ignored.
_DEFAULTS: Mapping[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "amsgrad": False,
    "foreach": None,
    "maximize": False,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}
# DeepSpeed's own keys of a group, which say something about its partitions only.
_FOREIGN = ("name", "moe", "params", "lp_params", "bias_correction", "ds_adam", "ep_size")
_PLAIN = (int, float, bool, str, type(None))


def own_options(options: Mapping[str, Any], *, scheduled: bool) -> dict[str, Any]:
    """The options of a group of torch's own optimizer, none of them changed. With ``scheduled`` the target
    may ask for ``initial_lr``, as runs do that have a scheduler."""
    merged = dict(options)
    if scheduled and "lr" in options:
        merged.setdefault("initial_lr", options["lr"])
    return merged


def stated_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """What DeepSpeed's group says of its optimizer: no keys of DeepSpeed's own, numbers and text only."""
    return {key: value for key, value in options.items() if key not in _FOREIGN and _is_plain(value)}


def dropped_options(groups: Iterable[tuple[Mapping[str, Any], list[str]]]) -> str:
    """The names of options that ``stated_options`` leaves out and that are not DeepSpeed's own."""
    return ", ".join(
        dict.fromkeys(
            key
            for options, _ in groups
            for key, value in options.items()
            if key not in _FOREIGN and not _is_plain(value)
        )
    )


def group_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of DeepSpeed's group with every key of AdamW's, where it is a group of an Adam."""
    stated = stated_options(options)
    merged = stated if "momentum" in stated else {**_DEFAULTS, **stated}
    if "lr" in merged:
        merged.setdefault("initial_lr", merged["lr"])  # asked for by runs that have a scheduler
    return merged


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(item, _PLAIN) for item in value)
    return isinstance(value, _PLAIN)


def merged_groups(
    groups: Sequence[tuple[Mapping[str, Any], list[str]]], order: Sequence[str]
) -> list[tuple[dict[str, Any], list[str]]]:
    """DeepSpeed's groups for the target run. Those with equal options become one: DeepSpeed keeps experts
    in groups of their own. Parameters are in the model's order."""
    place = {name: number for number, name in enumerate(order)}
    found: list[tuple[dict[str, Any], list[str]]] = []
    for options, names in groups:
        wanted = group_options(options)
        known = next((have for given, have in found if given == wanted), None)
        if known is None:
            found.append((wanted, list(names)))
        else:
            known.extend(names)
    return [
        (options, sorted(names, key=lambda name: place.get(name, len(place)))) for options, names in found
    ]
