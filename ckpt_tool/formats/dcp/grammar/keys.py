"""What the keys of a DCP checkpoint mean: parameters, optimizer state, parameter groups, the rest.

A key is the path of an entry through the saved state dict, joined with dots. ``planner_data`` keeps the
path itself, but flattened optimizer states are one component (``state.<fqn>.exp_avg``), so keys are taken
apart as text either way (torch/distributed/checkpoint/state_dict.py, ``_flatten_optim_state_dict``).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ckpt_tool.canonical import STEP, Scalar
from ckpt_tool.containers.dcp_metadata import Path
from ckpt_tool.containers.pickle_records import Unread
from ckpt_tool.errors import MismatchError, UnreadableError
from ckpt_tool.formats.dcp.contents import Contents, Held
from ckpt_tool.wrappers import saved_names, unwrapped

# optimizer (torchtitan, accelerate, transformers, VeOmni), optim (PyTorch's tutorial)
_OPTIMIZER = re.compile(
    r"(?P<root>(?:\w+\.)*?optim(?:izers?)?)\.(?P<kind>state|param_groups)\.(?P<rest>.+)"
)
_LIST_OF_GROUP = re.compile(r"(?:.+\.)?param_groups\.\d+\.params")
# Keys of optimizer state wherever it stands: overlooked, a run would go on without its moments.
_LIKE_OPTIMIZER = re.compile(
    r"(?:.+\.)?(?:param_groups\..+"
    r"|state\..+\.(?:step|exp_avg|exp_avg_sq|max_exp_avg_sq|exp_inf|momentum_buffer|square_avg|sum))"
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
    """The entries by meaning: those of the model and of its optimizer, options of parameter groups, other
    objects and other tensors (random states, averaged weights), which stay under their keys.
    ``model_objects`` are what modules keep beside their tensors, by name (``get_extra_state``).
    ``listed`` has the names that groups list their parameters by, where they are others than here.
    ``unresolved`` says why optimizer state is among the others, where it is, and ``nameless`` why the
    model's names have something before them."""

    model_root: Path = ()
    optimizer_root: Path = ("optimizer",)
    flat: bool = False
    model: dict[str, Held] = field(default_factory=dict)
    states: dict[tuple[str, str], Held] = field(default_factory=dict)
    scalars: dict[tuple[str, str], Scalar] = field(default_factory=dict)
    groups: list[tuple[dict[str, Any], list[str]]] = field(default_factory=list)
    listed: dict[str, str] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)
    other_tensors: dict[str, Held] = field(default_factory=dict)
    model_objects: dict[str, Any] = field(default_factory=dict)
    unresolved: str = ""
    nameless: str = ""

    @property
    def has_optimizer(self) -> bool:
        return bool(self.states or self.scalars or self.groups)


def sort_entries(contents: Contents, root: str, *, with_model: bool = True) -> Sorted:
    """Tell the entries apart.

    Args:
        with_model: whether the model is among them (transformers keeps it in safetensors).

    Raises:
        UnreadableError: there is more than one optimizer or model.
        MismatchError: a parameter of the optimizer is not in the model.
    """
    found = Sorted()
    options: dict[str, dict[str, Any]] = {}
    rest: dict[str, Held] = {}
    roots: dict[str, str] = {}
    numbered = any(_LIST_OF_GROUP.fullmatch(key) for key in contents.objects)
    entries = [
        (key, value, None if _is_models(key, contents.paths) else _OPTIMIZER.fullmatch(key))
        for key, value in [*contents.tensors.items(), *contents.objects.items()]
    ]
    strange = {key for key, _, match in entries if match is None and _is_strange_optimizers(key)}
    found.unresolved = _why_unresolved(entries, strange)
    for key, value, match in entries:
        if match is None or found.unresolved:
            if not isinstance(value, Held):
                found.others[key] = value
            elif match is not None or key in strange:
                found.other_tensors[key] = value
            else:
                rest[key] = value
            continue
        roots.setdefault(match["root"], key)
        name, _, last = match["rest"].rpartition(".")
        if match["kind"] == "param_groups":
            if numbered:  # an option may itself be a dict, whose keys are joined on
                name, _, last = match["rest"].partition(".")
            options.setdefault(name, {})[last] = _value(value, key, root)
        else:
            _add_state(found, name, last, value, key, root)
    if len(roots) > 1:
        raise UnreadableError(
            f"{root} holds the state of more than one optimizer ({', '.join(roots.values())}). A "
            "checkpoint of one model and one optimizer is converted; save others elsewhere."
        )
    found.optimizer_root = _path_of(next(iter(roots), "optimizer"))
    found.flat = bool(options) and not all(name.isdecimal() for name in options)
    groups = _groups(options, found.flat, root)
    found.listed = saved_names(dict.fromkeys(name for _, names in groups for name in names), root)
    found.groups = [(values, [unwrapped(name) for name in names]) for values, names in groups]
    if with_model:
        _split_model(found, rest, contents.paths, root)
    else:
        found.other_tensors |= rest
    return found


def _is_models(key: str, paths: Mapping[str, Path]) -> bool:
    """Whether an entry stands under a root of models: its modules may have any name."""
    path = paths.get(key, ())
    return any(path[: len(known)] == known for known in _MODEL_ROOTS)


def _why_unresolved(
    entries: Iterable[tuple[str, Any, re.Match[str] | None]], strange: Collection[str]
) -> str:
    """Why the optimizer's state cannot be understood; empty where it can, or there is none."""
    for key, _, match in entries:
        if key in strange:
            return (
                f"{key} looks like an optimizer's, but optimizer state is read only where it is saved as "
                "`optimizer`, `optimizers` or `optim` and then `state` and `param_groups`, one optimizer "
                "for the model."
            )
        if match and match["kind"] == "state" and match["rest"].rpartition(".")[0].isdecimal():
            return (
                f"Optimizer state is keyed by number ({key}), which only the run that saved it can "
                "resolve; torch.distributed.checkpoint.state_dict.get_optimizer_state_dict keys it by name."
            )
    return ""


def _is_strange_optimizers(key: str) -> bool:
    """Whether optimizer state stands where it is not known."""
    return bool(_LIKE_OPTIMIZER.fullmatch(key)) and key.split(".")[0] not in _BESIDE


def _path_of(text: str) -> Path:
    return tuple(text.split(".")) if text else ()


def _value(value: Any, key: str, root: str) -> Any:
    """An option of a parameter group; capturable optimizers keep lr as a tensor."""
    if isinstance(value, Unread):
        raise UnreadableError(
            f"{root}: {key} holds tensors or {value.nbytes} bytes, which is not read for an option of a "
            "parameter group. Save the optimizer without it."
        )
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


def _split_model(found: Sorted, rest: dict[str, Held], paths: Mapping[str, Path], root: str) -> None:
    """Which of the remaining tensors are the model's, and what stands before their names."""
    trained = dict.fromkeys(fqn for fqn, _ in [*found.states, *found.scalars])
    listed = dict.fromkeys(fqn for _, fqns in found.groups for fqn in fqns)
    found.model_root = _model_root(rest, paths, trained or listed, root)
    prefix = "".join(f"{part}." for part in found.model_root)
    under = sorted(".".join(map(str, parent)) for parent in _parents(rest, paths) if parent)
    if not prefix and under:
        found.nameless = (
            f"Its tensors are saved under `{'` and `'.join(under)}`, and nothing says which of them are "
            "the model's. Save those as `model`."
        )
    for key, held in rest.items():
        beside = not prefix and key not in trained and _stands_beside(key, paths)
        if key.startswith(prefix) and not beside:
            found.model[key.removeprefix(prefix)] = held
        else:
            found.other_tensors[key] = held
    for key in [key for key in found.others if _is_modules(key, prefix)]:
        found.model_objects[key.removeprefix(prefix)] = found.others.pop(key)
    if (found.has_optimizer or found.unresolved) and not found.model:
        raise UnreadableError(
            f"{root} holds the state of an optimizer and no model. Pass the directory that has both; for "
            "accelerate that is the one above."
        )
    missing = [fqn for fqn in trained if not _has(found.model, fqn)]
    if missing:
        raise MismatchError(
            f"{root} has optimizer state of {missing[0]} ({len(missing)} such), but no such parameter."
        )


def _is_modules(key: str, prefix: str) -> bool:
    return key.startswith(prefix) if prefix else key.endswith("_extra_state")


def _stands_beside(key: str, paths: Mapping[str, Path]) -> bool:
    """Whether frameworks save an entry beside a model without a root; a module may have the same name."""
    path = paths.get(key)
    return key.split(".")[0] in _BESIDE and (path is None or len(path) > 1)


def _has(model: Container[str], fqn: str) -> bool:
    return fqn in model or fused_parts(fqn, model) is not None


def fused_parts(fqn: str, model: Container[str]) -> tuple[str, str, str] | None:
    """The parameters that a module of torchtitan saves its fused ``wqkv`` as (see ``titan``)."""
    path, _, kind = fqn.rpartition(".wqkv.")
    parts = (f"{path}.wq.{kind}", f"{path}.wk.{kind}", f"{path}.wv.{kind}")
    return parts if path and fqn not in model and all(part in model for part in parts) else None


def _model_root(
    rest: Mapping[str, Held], paths: Mapping[str, Path], trained: Collection[str], root: str
) -> Path:
    """By the names the optimizer uses; without one, by the paths and the roots known from frameworks."""
    found = _roots_of(rest, trained)
    known = [path for path in found if path in ((), *_MODEL_ROOTS)]
    if len(found) == 1 or len(known) == 1:
        return (known or found)[0]
    if found:
        names = " and ".join(f"`{'.'.join(map(str, path))}`" for path in found)
        raise UnreadableError(
            f"{root} holds more than one model ({names}) with the names of the optimizer's parameters, and "
            "nothing says which one is trained. Save that one as `model`."
        )
    return _known_root(rest, paths)


def _roots_of(rest: Mapping[str, Held], trained: Collection[str]) -> list[Path]:
    """What may stand before the names of the optimizer's parameters: with it, there are all of them; else
    the most that there are, of which the missing ones are named later."""
    fqn = next((fqn for fqn in trained if any(f".{key}".endswith(f".{fqn}") for key in rest)), None)
    if fqn is None:
        return []
    roots = [key.removesuffix(fqn) for key in rest if f".{key}".endswith(f".{fqn}")]
    counts = {root: sum(_has(_Under(rest, root), name) for name in trained) for root in roots}
    most = max(counts.values())
    return [_path_of(root.removesuffix(".")) for root, count in counts.items() if count == most]


class _Under:
    """The names of entries without what stands before them."""

    def __init__(self, entries: Container[str], root: str) -> None:
        self._entries, self._root = entries, root

    def __contains__(self, name: object) -> bool:
        return f"{self._root}{name}" in self._entries


def _known_root(rest: Mapping[str, Held], paths: Mapping[str, Path]) -> Path:
    for known in _MODEL_ROOTS:
        depth = len(known)
        text = "".join(f"{part}." for part in known)
        if any(paths[key][:depth] == known and len(paths[key]) > depth for key in rest if key in paths):
            return known
        # not flattened by the planner: only the keys tell (`model.model.layers...`, `app.model...`)
        if not paths and any(key.startswith((f"{text}model.", f"{text}lm_head.")) for key in rest):
            return known
    parents = _parents(rest, paths)
    return next(iter(parents)) if len(parents) == 1 else ()


def _parents(rest: Mapping[str, Held], paths: Mapping[str, Path]) -> set[Path]:
    """What tensors are saved under, whatever it is called: a state dict's own keys have no parts."""
    return {paths[key][:-1] for key in rest if key in paths and not _stands_beside(key, paths)}


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
