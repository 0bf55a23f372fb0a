"""Parameter groups as torch's AdamW keeps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def group_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options with every key of AdamW's; what is no plain number or text is left out."""
    known = {key: value for key, value in options.items() if key not in _FOREIGN and _is_plain(value)}
    merged = {**_DEFAULTS, **known}
    merged.setdefault("initial_lr", merged["lr"])  # asked for by runs that have a scheduler
    return merged


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(item, _PLAIN) for item in value)
    return isinstance(value, _PLAIN)


def merged_groups(
    groups: Sequence[tuple[Mapping[str, Any], list[str]]], order: Sequence[str], *, merge: bool
) -> list[tuple[dict[str, Any], list[str]]]:
    """Groups for the target run. With ``merge`` those with equal options become one: DeepSpeed keeps
    experts in groups of their own. Parameters are in the model's order."""
    place = {name: number for number, name in enumerate(order)}
    found: list[tuple[dict[str, Any], list[str]]] = []
    for options, names in groups:
        wanted = group_options(options)
        known = next((have for given, have in found if given == wanted), None) if merge else None
        if known is None:
            found.append((wanted, list(names)))
        else:
            known.extend(names)
    return [
        (options, sorted(names, key=lambda name: place.get(name, len(place)))) for options, names in found
    ]
