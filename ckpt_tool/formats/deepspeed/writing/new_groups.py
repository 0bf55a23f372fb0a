"""The parameter groups of a DeepSpeed run that goes on from another engine's checkpoint, or begins.

A run that passes its groups to ``initialize`` has them in its own order, without the experts; behind them
come the experts, as many groups as the run's groups they are taken from (deepspeed 0.19.8, moe/utils.py
``split_params_into_different_moe_groups_for_optimizer``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckpt_tool.canonical import ParamGroup, TensorName

# torch.optim.AdamW's options as DeepSpeed saves them, for a run of which nothing else is known.
_ADAMW: Mapping[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.01,
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}


def new_groups(
    source: Sequence[ParamGroup],
    dense: Sequence[TensorName],
    experts: Sequence[TensorName],
    ds_config: Mapping[str, Any],
    ep: int,
) -> tuple[ParamGroup, ...]:
    """The source's groups as the run has them; one of all parameters where the source has none.

    Args:
        dense: the trained parameters in the order of the run's groups; experts likewise.
        ds_config: supplies the options that the source does not state.
    """
    stated = dict(ds_config.get("optimizer") or {}).get("params") or {}
    known = [group for group in source if group.parameters] or [ParamGroup({}, (*dense, *experts))]
    names = ("dense-params",) if len(known) == 1 else (None,) * len(known)
    own, routed = [], []
    for group, name in zip(known, names, strict=True):
        options = {key: group.options.get(key, stated.get(key, default)) for key, default in _ADAMW.items()}
        members = set(group.parameters)
        label = group.options.get("name", name) if experts else None
        named = {} if label is None else {"name": label}
        trained = tuple(parameter for parameter in dense if parameter in members)
        own.append(ParamGroup({**named, **options}, trained))
        held = tuple(parameter for parameter in experts if parameter in members)
        if held:
            routed.append(ParamGroup({"name": f"ep_size_{ep}", "moe": True, **options}, held))
    return (*own, *routed)
