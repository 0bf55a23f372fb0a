"""How many rows a dense tensor has by the config: sums of products of fields, as the tables write them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def row_fields(text: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a text config, with ``head_dim`` where only hidden size and heads are stated."""
    fields = dict(text)
    heads, hidden = fields.get("num_attention_heads"), fields.get("hidden_size")
    if fields.get("head_dim") is None and type(heads) is int and heads > 0 and type(hidden) is int:
        fields["head_dim"] = hidden // heads
    return fields


def stated_rows(formula: str, fields: Mapping[str, Any]) -> int | None:
    """``2 key_heads key_dim + value_heads value_dim`` of ``fields``; None where one is no number."""
    total = 0
    for product in formula.split("+"):
        factors = [int(word) if word.isdecimal() else fields.get(word) for word in product.split()]
        if not all(type(factor) is int for factor in factors):
            return None
        total += math.prod(factor for factor in factors if factor is not None)
    return total
