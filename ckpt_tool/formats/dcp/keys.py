"""What the keys of a DCP checkpoint mean: parameters, optimizer state, parameter groups, the rest.

A key is the path of an entry through the saved state dict, joined with dots. ``planner_data`` keeps the
path itself, but flattened optimizer states are one component (``state.<fqn>.exp_avg``), so keys are taken
apart as text either way (torch/distributed/checkpoint/state_dict.py, ``_flatten_optim_state_dict``).
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ckpt_tool.canonical import STEP, Scalar
from ckpt_tool.containers.dcp_metadata import Path
from ckpt_tool.errors import MismatchError, UnreadableError
from ckpt_tool.formats.dcp.contents import Contents, Held

# optimizer (torchtitan, accelerate, transformers, VeOmni), optim (PyTorch's tutorial)
_OPTIMIZER = re.compile(
    r"(?P<root>(?:\w+\.)*?optim(?:izers?)?)\.(?P<kind>state|param_groups)\.(?P<rest>.+)"
)
# What frameworks save beside a model whose keys have no root of their own (torchtitan).
_BESIDE = ("lr_scheduler", "scheduler", "dataloader", "train_state", "extra_state", "rng_state", "rng")
_MODEL_ROOTS = (("app", "model"), ("model",), ("state_dict",))


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a checkpoint forms its keys, and in which directories it keeps them.

    Keys are ``model_root`` + fqn and ``optimizer_root`` + state + fqn + name. ``flat`` parameter groups
    have one entry per parameter and option, others one per group and option and a list ``params``.
    With ``shards`` the model is in safetensors files and not under DCP keys.
    """

    style: str
    model_root: Path = ()
    optimizer_root: Path = ("optimizer",)
    flat: bool = False
    model_directory: str = ""
    optimizer_directory: str = ""
    shards: bool = False

    def model_key(self, fqn: str) -> tuple[str, Path]:
        return joined((*self.model_root, fqn))

    def state_key(self, fqn: str, state: str) -> tuple[str, Path]:
        if self.flat:
            return joined((*self.optimizer_root, f"state.{fqn}.{state}"))
        return joined((*self.optimizer_root, "state", fqn, state))

    def group_key(self, group: int | str, option: str) -> tuple[str, Path]:
        if self.flat:
            return joined((*self.optimizer_root, f"param_groups.{group}.{option}"))
        return joined((*self.optimizer_root, "param_groups", group, option))


def joined(path: Path) -> tuple[str, Path]:
    return ".".join(map(str, path)), path


@dataclass
class Sorted:
    """The entries by meaning. ``meaning`` maps the key of an optimizer state to (fqn, state)."""

    model_root: Path = ()
    optimizer_root: Path = ("optimizer",)
    flat: bool = False
    model: dict[str, Held] = field(default_factory=dict)
    states: dict[tuple[str, str], Held] = field(default_factory=dict)
    scalars: dict[tuple[str, str], Scalar] = field(default_factory=dict)
    groups: list[tuple[dict[str, Any], list[str]]] = field(default_factory=list)
    others: dict[str, Any] = field(default_factory=dict)
    other_tensors: dict[str, Held] = field(default_factory=dict)

    @property
    def has_optimizer(self) -> bool:
        return bool(self.states or self.scalars or self.groups)


def sort_entries(contents: Contents, root: str, *, with_model: bool = True) -> Sorted:
    """Tell the entries apart.

    Args:
        with_model: whether the model is among them (transformers keeps it in safetensors).

    Raises:
        UnreadableError: the optimizer state is keyed by number, or a parameter of it is not in the model.
    """
    found = Sorted()
    options: dict[str, dict[str, Any]] = {}
    rest: dict[str, Held] = {}
    for key, value in [*contents.tensors.items(), *contents.objects.items()]:
        match = _OPTIMIZER.fullmatch(key)
        if match is None:
            if isinstance(value, Held):
                rest[key] = value
            else:
                found.others[key] = value
            continue
        found.optimizer_root = _path_of(match["root"])
        name, _, last = match["rest"].rpartition(".")
        if name.isdecimal() and match["kind"] == "state":
            raise UnreadableError(
                f"{root}: optimizer state is keyed by number ({key}), which only the run that saved it can "
                "resolve. Save it with torch.distributed.checkpoint.state_dict.get_optimizer_state_dict."
            )
        if match["kind"] == "param_groups":
            options.setdefault(name, {})[last] = _value(value, key, root)
        else:
            _add_state(found, name, last, value, key, root)
    _split_model(found, rest, contents.paths, root, with_model)
    found.flat = bool(options) and not all(name.isdecimal() for name in options)
    found.groups = _groups(options, found.flat, root)
    return found


def _path_of(text: str) -> Path:
    return tuple(text.split(".")) if text else ()


def _value(value: Any, key: str, root: str) -> Any:
    """An option of a parameter group; capturable optimizers keep lr as a tensor."""
    if not isinstance(value, Held):
        return value
    if value.scalar is None:
        raise UnreadableError(f"{root}: {key} is a tensor where a parameter group has a number.")
    return value.scalar.value


def _add_state(found: Sorted, fqn: str, state: str, value: Any, key: str, root: str) -> None:
    if isinstance(value, Held):
        if value.scalar is not None and state == STEP:
            found.scalars[fqn, state] = value.scalar
        else:
            found.states[fqn, state] = value
    elif isinstance(value, int | float):
        found.scalars[fqn, state] = Scalar(value, None)
    else:
        raise UnreadableError(
            f"{root}: the optimizer state {key} is a {type(value).__name__}; not supported."
        )


def _split_model(
    found: Sorted, rest: dict[str, Held], paths: Mapping[str, Path], root: str, with_model: bool
) -> None:
    """Which of the remaining tensors are the model's, and what stands before their names."""
    trained = dict.fromkeys(fqn for fqn, _ in [*found.states, *found.scalars])
    if not with_model:
        found.other_tensors = rest
        return
    found.model_root = _model_root(rest, paths, trained)
    prefix = "".join(f"{part}." for part in found.model_root)
    for key, held in rest.items():
        beside = not prefix and key.split(".")[0] in _BESIDE
        if key.startswith(prefix) and not beside:
            found.model[key.removeprefix(prefix)] = held
        else:
            found.other_tensors[key] = held
    missing = [fqn for fqn in trained if fqn not in found.model and not fused_parts(fqn, found.model)]
    if missing and found.model:
        raise MismatchError(
            f"{root} has optimizer state of {missing[0]} ({len(missing)} such), but no such parameter."
        )


def fused_parts(fqn: str, model: Container[str]) -> tuple[str, str, str] | None:
    """The parameters that a module of torchtitan saves its fused ``wqkv`` as (see ``titan``)."""
    path, _, kind = fqn.rpartition(".wqkv.")
    parts = (f"{path}.wq.{kind}", f"{path}.wk.{kind}", f"{path}.wv.{kind}")
    return parts if path and fqn not in model and all(part in model for part in parts) else None


def _model_root(rest: Mapping[str, Held], paths: Mapping[str, Path], trained: Iterable[str]) -> Path:
    """By the names the optimizer uses; without one, by the paths and the roots known from frameworks."""
    for fqn in trained:
        for key in rest:
            if key == fqn:
                return ()
        ends = [key for key in rest if key.endswith(f".{fqn}")]
        if ends:
            return _path_of(min(ends, key=len).removesuffix(f".{fqn}"))
    for known in _MODEL_ROOTS:
        depth = len(known)
        text = "".join(f"{part}." for part in known)
        if any(paths[key][:depth] == known and len(paths[key]) > depth for key in rest if key in paths):
            return known
        # not flattened by the planner: only the keys tell (`model.model.layers...`, `app.model...`)
        if not paths and any(key.startswith((f"{text}model.", f"{text}lm_head.")) for key in rest):
            return known
    return ()


def _groups(
    options: Mapping[str, dict[str, Any]], flat: bool, root: str
) -> list[tuple[dict[str, Any], list[str]]]:
    """(options, parameters) of each group. Flattened ones: parameters with equal options are a group."""
    groups: list[tuple[dict[str, Any], list[str]]] = []
    if flat:
        for fqn, values in options.items():
            known = next((names for have, names in groups if have == values), None)
            if known is None:
                groups.append((values, [fqn]))
            else:
                known.append(fqn)
        return groups
    for number in sorted(options, key=int):
        values = dict(options[number])
        names = values.pop("params", None)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UnreadableError(f"{root}: parameter group {number} does not list its parameters by name.")
        groups.append((values, names))
    return groups
