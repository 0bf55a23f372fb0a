"""What a Universal checkpoint cannot be made of: nothing that reads one would take the result."""

from __future__ import annotations

from collections.abc import Collection

from ckpt_tool.canonical import MASTER, WEIGHT, Checkpoint, DType, Role, Tensor, TensorName
from ckpt_tool.errors import MismatchError, UnreadableError
from ckpt_tool.geometry import pieces


def refuse_uneven_states(checkpoint: Checkpoint, left_out: Collection[str], *, weights_only: bool) -> None:
    """Each trained parameter has the states of its peers, and an fp32 master beside moments and those of
    others.

    Raises:
        MismatchError: a parameter lacks a state that others have: it was lost.
        UnreadableError: a master is of another dtype.
    """
    trained: dict[TensorName, dict[str, Tensor]] = {}
    for tensor in checkpoint.tensors:
        if tensor.role is Role.PARAMETER and tensor.label() not in left_out:
            state = MASTER if tensor.state == WEIGHT else tensor.state
            trained.setdefault(tensor.name, {})[state] = tensor
    states = {name: set(own) for name, own in trained.items()}
    for name, state in () if weights_only else checkpoint.scalars:
        if name in states:
            states[name].add(state)
    every = set[str]().union(*states.values())
    for name, own in states.items():
        lacking = sorted(every - own)
        if lacking:
            other = next(known for known in states if lacking[0] in states[known])
            raise MismatchError(
                f"{_file(checkpoint, trained[name])}: the optimizer has no {lacking[0]} of {name} (only "
                f"{', '.join(sorted(own))}), and one of {other}. The Universal format has the same states "
                "of all trained parameters. Copy this checkpoint again from where it was saved; if the "
                "optimizer keeps none of it, pass --weights-only."
            )
    masters = [own[MASTER] for own in trained.values() if MASTER in own]
    narrow = [one for one in masters if one.state == MASTER and one.dtype is not DType.float32]
    if narrow and (len(every) > 1 or len(narrow) < len(masters)):
        alone = len(narrow) == len(masters)
        raise UnreadableError(
            f"{_file(checkpoint, {MASTER: narrow[0]})}: the master of {narrow[0].name} is "
            f"{narrow[0].dtype}; in a Universal checkpoint it is float32. Use `ckpt-tool reshard`, "
            "which keeps masters as they are"
            + ("; to convert the weights alone, pass --weights-only." if alone else ".")
        )


def _file(checkpoint: Checkpoint, own: dict[str, Tensor]) -> str:
    """A file in which something of a parameter lies."""
    for tensor in own.values():
        for piece in pieces(tensor, 0, min(1, tensor.numel)):
            return f"{checkpoint.root}/{piece.file}"
    return checkpoint.root
