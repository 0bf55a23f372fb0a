"""The catalogue of ZeRO stages 0, 1 and 2: whole weights, and an optimizer's states by parameter.

What the three stages share. How the optimizer's files hold the states is zero12.py's and zero0.py's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckpt_tool.canonical import (
    MASTER,
    Apart,
    Checkpoint,
    ParamGroup,
    Role,
    Scalar,
    SourceFile,
    Tensor,
    TensorName,
)
from ckpt_tool.formats.deepspeed.reading.expert_files import Experts
from ckpt_tool.formats.deepspeed.reading.model_file import ModelFile, Named, sort_names
from ckpt_tool.storage import Reader


@dataclass(frozen=True, slots=True)
class OptimizerStates:
    """What the optimizer's files hold.

    ``states`` are the tensors of each trained parameter under the engine's name (experts: the whole
    stack); ``trained`` those names. Where the model's weights are themselves the masters (an fp32 engine
    of stage 0), ``weights_are_masters``.
    """

    stage: int
    trained: frozenset[str]
    states: Mapping[str, Sequence[Tensor]]
    scalars: Mapping[tuple[TensorName, str], Scalar] = field(default_factory=dict)
    param_groups: tuple[ParamGroup, ...] = ()
    loss_scale: Mapping[str, object] = field(default_factory=dict)
    sources: tuple[SourceFile, ...] = ()
    notes: tuple[str, ...] = ()
    weights_are_masters: bool = False
    apart: tuple[Apart, ...] = ()


def build(
    reader: Reader,
    model: ModelFile,
    experts: Experts,
    names: Named,
    optimizer: OptimizerStates,
) -> Checkpoint:
    """The catalogue of a checkpoint with what its optimizer files hold."""
    return Checkpoint(
        format=f"deepspeed-zero{optimizer.stage}",
        root=reader.root,
        dialect="autoep" if experts.layers else "transformers",
        tensors=tuple(_tensors(model, experts, names, optimizer)),
        files=(model.source, *optimizer.sources, *experts.sources),
        topology=experts.topology(optimizer.stage),
        training=model.training(optimizer.param_groups, optimizer.loss_scale),
        scalars=optimizer.scalars,
        moe_layers=experts.moe_layers(),
        aliases=names.aliases,
        module_names=tuple(model.weights),
        notes=(*model.notes, *optimizer.notes),
        apart=optimizer.apart,
    )


def build_weights(
    reader: Reader, model: ModelFile, experts: Experts, why: str, sources: tuple[SourceFile, ...] = ()
) -> Checkpoint:
    """The catalogue of a checkpoint whose optimizer state is absent or cannot be told apart."""
    trained = None if model.shapes is None else frozenset(name for g in model.shapes for name, _ in g)
    states = OptimizerStates(
        model.stage(),
        frozenset(experts.names) if trained is None else trained,
        {},
        sources=sources,
        notes=(f"{why} The weights are taken as the model file has them; there are no moments.",),
    )
    return build(reader, model, experts, sort_names(model, trained, experts.routers), states)


def model_order(model: ModelFile, experts: Experts) -> list[str]:
    """Names in the order of the module tree; experts follow their router (moe/auto_ep_layer.py)."""
    order: list[str] = []
    pending = dict.fromkeys(experts.layers)
    for name in model.weights:
        order.append(name)
        prefix = name.removesuffix(".router.gate.weight") + ".experts"
        if prefix in pending:
            order += experts.of_layer(prefix)
            del pending[prefix]
    for prefix in pending:
        order += experts.of_layer(prefix)
    return order


def _tensors(
    model: ModelFile, experts: Experts, names: Named, optimizer: OptimizerStates
) -> Iterator[Tensor]:
    for name in model_order(model, experts):
        if name in names.aliases:
            continue
        states = optimizer.states.get(name, ())
        trained = name in optimizer.trained
        state = MASTER if optimizer.weights_are_masters and trained else "weight"
        if name in experts.names:
            role = Role.PARAMETER if trained else Role.FROZEN
            weight = experts.weights(name, role, state)
        else:
            weight = replace(model.weights[name], role=names.roles[name], state=state)
        # masters first: they are what the parameter is
        yield from (weight, *states) if state == MASTER else (*states, weight)
