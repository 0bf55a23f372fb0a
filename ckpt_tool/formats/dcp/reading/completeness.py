"""Are all shards of a model there? Sharded safetensors do not say so, but a ``config.json`` has sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ckpt_tool.canonical import ExpertName, Tensor
from ckpt_tool.errors import UnreadableError
from ckpt_tool.families import Family, stated, text_config
from ckpt_tool.families.agreement import embedding_name


def check_rows(
    root: str, model: Sequence[Tensor], family: Family | None, config: Mapping[str, Any] | None
) -> str | None:
    """Compare first dimensions, along which ranks share tensors, with a config. Returns a note where
    nothing can be compared.

    Raises:
        UnreadableError: a tensor is smaller than stated.
    """
    sizes = [] if config is None else [*_vocabulary(model, config), *_experts(model, family, config)]
    for tensor, rows in sizes:
        if tensor.shape[0] < rows:
            raise UnreadableError(
                f"{root}: by config.json {tensor.name} has {rows} rows or experts, the shards hold "
                f"{tensor.shape[0]}. The last shards are missing."
            )
    if sizes:
        return None
    return (
        "Whether the last shards are missing cannot be told: shards do not say how many there are, and "
        "there is no config.json in the directory with the model's sizes."
    )


def _vocabulary(model: Sequence[Tensor], config: Mapping[str, Any]) -> Iterator[tuple[Tensor, int]]:
    by_name = {tensor.name: tensor for tensor in model}
    embedding = embedding_name(by_name)
    size = stated(text_config(config), ["vocab_size"])
    if embedding is not None and size is not None and type(size[1]) is int:
        yield by_name[embedding], size[1]


def _experts(
    model: Sequence[Tensor], family: Family | None, config: Mapping[str, Any]
) -> Iterator[tuple[Tensor, int]]:
    count = family.sizes(config).get("E") if family else None
    if count is not None:
        yield from ((tensor, count) for tensor in model if isinstance(tensor.name, ExpertName))
