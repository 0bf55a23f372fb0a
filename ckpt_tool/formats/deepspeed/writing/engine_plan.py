"""What a DeepSpeed target's files hold, whatever the ZeRO stage: groups, order, states, scalars, config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from ckpt_tool.canonical import (
    MASTER,
    WEIGHT,
    Checkpoint,
    ExpertName,
    ParamGroup,
    Role,
    Scalar,
    Tensor,
    TensorName,
    same,
)
from ckpt_tool.containers.torch_zip import Constant
from ckpt_tool.errors import MismatchError, UsageError
from ckpt_tool.formats.deepspeed.facts import groups
from ckpt_tool.formats.deepspeed.facts.groups import SubGroup
from ckpt_tool.formats.deepspeed.facts.names import expert_parameter
from ckpt_tool.formats.deepspeed.facts.partition import partition_size
from ckpt_tool.formats.deepspeed.facts.target_options import ZeroOptions
from ckpt_tool.formats.deepspeed.facts.topology import Ranks
from ckpt_tool.formats.deepspeed.reading.rank_files import SavedObjects
from ckpt_tool.formats.deepspeed.writing.layer_entries import LayerEntries
from ckpt_tool.layout import LeftOut, left_out

_PER_RANK = (
    "Client state {names} differs between ranks and means nothing on others; it is left out on all ranks. "
    "Your code must do without it after loading."
)

_NO_STATE = (
    "There is no optimizer state: load with load_checkpoint(..., load_module_only=True, "
    "load_optimizer_states=False)."
)


def refuse_unsuitable(checkpoint: Checkpoint, options: ZeroOptions) -> None:
    """Refuse what no DeepSpeed target can be made from.

    Raises:
        UsageError: a cast is asked for, or the source has published names.
    """
    if options.dtype is not None:
        raise UsageError(
            "A ZeRO checkpoint keeps masters and moments in fp32, and the engine derives its weights; "
            "--dtype does not apply."
        )
    if checkpoint.dialect == "hub":
        raise UsageError(
            "A ZeRO checkpoint needs the names of the training run's modules; this source has published "
            "names. Convert from a training checkpoint."
        )


def notes(checkpoint: Checkpoint, *, weights_only: bool) -> tuple[str, ...]:
    """What the user is to know about any DeepSpeed target of this source."""
    found = list(checkpoint.notes)
    if checkpoint.training.per_rank:
        found.append(_PER_RANK.format(names=", ".join(map(str, checkpoint.training.per_rank))))
    if weights_only or all(tensor.state in (MASTER, WEIGHT) for tensor in checkpoint.tensors):
        found.append(_NO_STATE)
    return tuple(found)


def loading(checkpoint: Checkpoint, *, weights_only: bool) -> str:
    """The line that loads a DeepSpeed target of this source."""
    bare = weights_only or all(tensor.state in (MASTER, WEIGHT) for tensor in checkpoint.tensors)
    options = ", load_module_only=True, load_optimizer_states=False" if bare else ""
    return f'engine.load_checkpoint("{{target}}"{options})'


class EnginePlan:
    """Who is grouped with whom at the target, and what each group holds: common to all ZeRO stages.

    A subclass says how a group is cut over ranks and what the files look like.
    """

    def __init__(
        self, checkpoint: Checkpoint, saved: SavedObjects, ranks: Ranks, options: ZeroOptions
    ) -> None:
        self.ranks, self.saved = ranks, saved
        self.checkpoint, self.options = checkpoint, options
        self.layers = {layer.layer_path: layer for layer in checkpoint.moe_layers}
        self.tensors = checkpoint.by_key()
        self.values = {tensor.name: tensor for tensor in checkpoint.values()}
        self._element_states: dict[TensorName, list[str]] = {}
        for name, state in self.tensors:
            if state not in (MASTER, WEIGHT):
                self._element_states.setdefault(name, []).append(state)
        self._scalars: dict[TensorName, dict[str, Scalar]] = {}
        for (name, state), scalar in checkpoint.scalars.items():
            self._scalars.setdefault(name, {})[state] = scalar
        self.position = {name: i for i, name in enumerate(self._parameters())}
        self.groups = self._regrouped()
        self.sub_groups = groups.sub_groups(self.groups, self._partition_numel, self._sub_group_size())
        self.states = [self._states_of(sub_group) for sub_group in self.sub_groups]
        self._check_all_grouped()

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made when it is asked for, so that a plan that is sent to others is small."""
        made = {
            name
            for kind in type(self).__mro__
            for name, value in vars(kind).items()
            if isinstance(value, cached_property)
        }
        return {name: value for name, value in vars(self).items() if name not in made}

    @cached_property
    def layer_entries(self) -> LayerEntries:
        """What each rank says of the MoE layers."""
        shapes = {name: tensor.shape for name, tensor in self.values.items()}
        return LayerEntries(self.saved.model, self.checkpoint.moe_layers, shapes, self.ranks)

    # ---- who is grouped with whom

    def _parameters(self) -> list[TensorName]:
        """``module.parameters()``: module order, w1, w2, w3 behind their router, frozen ones too."""
        order: list[TensorName] = []
        pending = {name for name in self.values if isinstance(name, ExpertName)}
        modules = {layer.module: path for path, layer in self.layers.items()}

        def experts(path: str) -> list[TensorName]:
            return [
                name
                for projection in ("gate", "down", "up")
                if (name := ExpertName(path, projection)) in pending
            ]

        for name in self.checkpoint.module_names:
            tensor = self.values.get(name)
            if tensor is None or tensor.role is Role.BUFFER:
                continue
            order.append(name)
            module = name.removesuffix(".router.gate.weight")
            if module != name and module in modules:
                order += experts(modules[module])
        known = set(order)
        order += [
            name
            for name, tensor in self.values.items()
            if name not in known and tensor.role is not Role.BUFFER
        ]
        return order

    def _regrouped(self) -> list[ParamGroup]:
        source = self.checkpoint.topology
        like = self.options.like
        if like is not None:
            params = list(like.training.param_groups)
        else:
            params = list(self.checkpoint.training.param_groups)
        if not params:
            raise UsageError(
                "The source does not say how the run grouped its parameters, and a wrong order would load "
                "without an error. Pass --like with a checkpoint that the target run saved itself (at step "
                "0, say)."
            )
        if like is None and any(group.options.get("moe") for group in params):
            source_ep = source.ep_size or _configured_ep(self.checkpoint.training.config)
            params = groups.regroup(
                params,
                self.position,
                lambda name: self.local_numel(name, source_ep),
                lambda name: self.local_numel(name, self.ranks.ep),
                f"ep_size_{self.ranks.ep}",
                groups.EXPERT_GROUP_LIMIT,
            )
        return params

    def _sub_group_size(self) -> int:
        """Elements at which a sub-group is closed."""
        size = self.zero_config().get("sub_group_size")
        if size is None:
            return groups.DEFAULT_SUB_GROUP_SIZE
        if type(size) not in (int, float) or not 1 <= size < math.inf:
            raise UsageError(
                f"zero_optimization.sub_group_size in the run's DeepSpeed config is {size!r}; a number of "
                "elements was expected. Pass --ds-config with the number that the run uses."
            )
        return int(size)

    def config(self) -> Mapping[str, Any]:
        if self.options.ds_config is not None:
            return self.options.ds_config
        if self.options.like is not None:
            return self.options.like.training.config
        return self.checkpoint.training.config

    def zero_config(self) -> Mapping[str, Any]:
        zero = self.config().get("zero_optimization")
        return zero if isinstance(zero, Mapping) else {}

    def local_numel(self, name: TensorName, ep: int) -> int:
        tensor = self.value_of(name)
        return tensor.numel // ep if isinstance(name, ExpertName) else tensor.numel

    def _partition_numel(self, name: TensorName) -> int:
        count = self.ranks.edp if isinstance(name, ExpertName) else self.ranks.world
        return partition_size(self.local_numel(name, self.ranks.ep), count)

    def value_of(self, name: TensorName) -> Tensor:
        if name not in self.values:
            raise MismatchError(f"The source has no values for {name}, which the target run trains.")
        return self.values[name]

    def _check_all_grouped(self) -> None:
        grouped = [name for group in self.sub_groups for name in group.parameters]
        trained = {t.name for t in self.values.values() if t.role is Role.PARAMETER}
        if len(set(grouped)) != len(grouped) or set(grouped) != trained:
            wrong = sorted(map(str, set(grouped) ^ trained))[:5]
            raise MismatchError(
                f"The parameter groups and the trained parameters are not the same: {wrong}. Pass --like "
                "with a checkpoint that the target run saved itself."
            )

    def _states_of(self, sub_group: SubGroup) -> list[str]:
        """The per-element states of a sub-group other than its masters; all its parameters have them."""
        if self.options.weights_only:
            return []
        kept = list(
            dict.fromkeys(
                state for name in sub_group.parameters for state in self._element_states.get(name, ())
            )
        )
        for name in sub_group.parameters:
            for state in kept:
                if (name, state) not in self.tensors:
                    raise MismatchError(
                        f"{name} has no {state}, but another parameter of the same sub-group does. "
                        "The engine keeps optimizer state for a sub-group as a whole."
                    )
        return kept

    def parameter(self, name: TensorName) -> str:
        return expert_parameter(name, self.layers) if isinstance(name, ExpertName) else name

    def model_entries(self, changed: Mapping[str, Any], layers: Any) -> dict[str, Any]:
        """What a model_states file holds: the source's with ``changed`` entries and these AutoEP layers."""
        changed = dict(changed)
        for key in ("ds_autoep_layers", "autoep_layers"):
            if self.saved.model.get(key) is not None:
                changed[key] = layers
        info = self.saved.model.get("universal_checkpoint_info")
        if info is not None and "ds_autoep_layers" in info:
            changed["universal_checkpoint_info"] = {**info, "ds_autoep_layers": layers}
        per_rank = self.checkpoint.training.per_rank
        return {
            key: changed.get(key, value) for key, value in self._saved_model.items() if key not in per_rank
        }

    @cached_property
    def _saved_model(self) -> Mapping[str, Constant]:
        return {key: Constant(value) for key, value in self.saved.model.items()}

    def new_config(self, config: Any, stage: int) -> Any:
        """The run's config with the new EP size and ZeRO stage in it."""
        if self.options.ds_config is not None:
            return dict(self.options.ds_config)
        if not isinstance(config, dict):
            return config
        new = dict(config)
        if isinstance(config.get("expert_parallel"), dict):
            new["expert_parallel"] = {**config["expert_parallel"], "autoep_size": self.ranks.ep}
        if isinstance(config.get("zero_optimization"), dict):
            new["zero_optimization"] = {**config["zero_optimization"], "stage": stage}
        return new

    def scalars_of(self, sub_group: SubGroup) -> dict[str, Scalar]:
        """``step`` and the like: one per sub-group, on which its parameters must agree."""
        first = sub_group.parameters[0]
        found = self._scalars.get(first, {})
        for name in sub_group.parameters:
            other = self._scalars.get(name, {})
            for state in sorted(found.keys() | other.keys()):
                mine, theirs = found.get(state), other.get(state)
                if not same(mine, theirs):
                    raise MismatchError(
                        f"{name} has {state} {theirs.value if theirs else 'none'}, {first} has "
                        f"{mine.value if mine else 'none'}; at the target they share one sub-group, which "
                        f"has one {state}. Their histories differ, and no ZeRO checkpoint of this topology "
                        "holds both."
                    )
        return found

    # ---- what has no place

    def left_out(self) -> tuple[LeftOut, ...]:
        """Tensors that a checkpoint of the engine does not hold, with the reason."""
        return shadowed_weights(self.checkpoint) + (
            optimizer_state(self.checkpoint) if self.options.weights_only else ()
        )


def shadowed_weights(checkpoint: Checkpoint) -> tuple[LeftOut, ...]:
    """The 16-bit weights of parameters that have a master."""
    masters = {tensor.name for tensor in checkpoint.tensors if tensor.state == MASTER}
    return left_out(
        (t for t in checkpoint.tensors if t.state == WEIGHT and t.name in masters),
        "recomputed from its master when the engine loads",
    )


def optimizer_state(checkpoint: Checkpoint) -> tuple[LeftOut, ...]:
    states = (t for t in checkpoint.tensors if t.state not in (WEIGHT, MASTER))
    return left_out(states, "optimizer state; --weights-only")


def _configured_ep(config: Mapping[str, Any]) -> int:
    section = config.get("expert_parallel")
    return int(section.get("autoep_size") or 1) if isinstance(section, Mapping) else 1
