"""What kind of numbers a tensor can hold: what is trained is floating point."""

from __future__ import annotations

from ckpt_tool.canonical import (
    CASTABLE,
    EXP_AVG,
    EXP_AVG_SQ,
    MASTER,
    WEIGHT,
    Checkpoint,
    ExpertName,
    Role,
    Tensor,
    TensorName,
)
from ckpt_tool.errors import UnreadableError
from ckpt_tool.families import text_config

_OPTIMIZERS = frozenset({MASTER, EXP_AVG, EXP_AVG_SQ, "max_exp_avg_sq"})
_QUANTISED = ("quantization_config", "compression_config", "quantization")


def refuse_integers(checkpoint: Checkpoint) -> None:
    """Refuse integers, truth values and 8-bit floats where an optimizer or a model works with numbers.

    Buffers may be integers, and so may a published model that its config.json says is quantised.

    Raises:
        UnreadableError: a master, a moment or a trained weight is of another kind.
    """
    trained = {tensor.name for tensor in checkpoint.tensors if tensor.state in _OPTIMIZERS}
    for tensor in checkpoint.tensors:
        if tensor.dtype in CASTABLE or tensor.encoding is not None:
            continue
        if tensor.state in _OPTIMIZERS or _is_trained(tensor, checkpoint, trained):
            raise UnreadableError(
                f"{checkpoint.root}: {tensor.label()} is stored as {tensor.dtype}; what a run trains is "
                "float32, bfloat16, float16 or float64. The metadata is damaged, or the model is quantised "
                "and does not say so. Copy the checkpoint again, or pass the one that was trained."
            )


def _is_trained(tensor: Tensor, checkpoint: Checkpoint, trained: set[TensorName]) -> bool:
    if tensor.state != WEIGHT:
        return False
    if tensor.name in trained:
        return True
    if checkpoint.format.startswith("deepspeed-"):
        return tensor.role in (Role.PARAMETER, Role.FROZEN)
    config = checkpoint.model_config
    if config is None or tensor.dtype.is_float:
        return False  # nothing says that the model is not quantised
    if any(text.get(key) for text in (config, text_config(config)) for key in _QUANTISED):
        return False
    name = tensor.name
    return isinstance(name, ExpertName) or (name.endswith(".weight") and len(tensor.shape) > 1)
