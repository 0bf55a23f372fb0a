"""What is said about quantised tensors whose values cannot be read."""

from __future__ import annotations

from ckpt_tool.canonical import ExpertName, Tensor
from ckpt_tool.errors import UnreadableError

# What makes a readable form of those that are not decoded.
_OTHERWISE = (
    "Where its library can load and dequantise the model, save that with save_pretrained, without "
    "quantization_config in config.json, and convert the result."
)


def refuse_unreadable(tensors: tuple[Tensor, ...]) -> None:
    """Raises UnreadableError where a tensor's values cannot be read."""
    for tensor in tensors:
        if isinstance(tensor.name, ExpertName) and tensor.encoding is None and not tensor.dtype.is_float:
            raise UnreadableError(
                f"{tensor.name} is {tensor.dtype}, so it is quantised in a way that config.json does not "
                "describe. Use the config.json that the model was published with."
            )
        if tensor.encoding is not None and not tensor.encoding.stored:
            why = tensor.encoding.reason
            raise UnreadableError(
                f"{tensor.name} is quantised as {tensor.encoding.scheme}, and its values cannot be read"
                f"{f': {why}' if why else '.'} {_OTHERWISE}"
            )
