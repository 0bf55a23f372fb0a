"""Published tensors that hold parts of unequal sizes, which config.json alone tells."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ckpt_tool.errors import MismatchError, UnreadableError
from ckpt_tool.families import family_of
from ckpt_tool.families.naming import entries, from_hub
from ckpt_tool.families.rows import row_fields, stated_rows
from ckpt_tool.storage import LocalReader
from tests.conftest import materialise, stored

QKV = "model.layers.0.attention.query_key_value.weight"
CONFIG = {"model_type": "bailing_moe", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 3}


def test_query_key_and_value_of_unequal_sizes_are_taken_apart_by_the_config(tmp_path: Path) -> None:
    whole = torch.randn(24, 5)
    family = family_of(CONFIG)
    held = from_hub(stored(tmp_path, {QKV: whole}), family, CONFIG)
    parts = {entry.name: entry.tensor for entry in entries(held, family, "fused", CONFIG)}
    reader = LocalReader(tmp_path)
    found = [materialise(reader, parts[f"model.layers.0.self_attn.{p}_proj.weight"]) for p in "qkv"]
    assert [len(part) for part in found] == [12, 6, 6]
    assert torch.equal(torch.cat(found), whole)
    again = from_hub(parts, family, CONFIG)
    assert torch.equal(materialise(reader, again[0]), whole)
    reader.close()


def test_a_config_without_the_sizes_is_refused(tmp_path: Path) -> None:
    family = family_of(CONFIG)
    held = from_hub(stored(tmp_path, {QKV: torch.zeros(24, 5)}), family, CONFIG)
    with pytest.raises(MismatchError, match=r"num_attention_heads head_dim.*--config"):
        entries(held, family, "fused", {"model_type": "bailing_moe"})


def test_sizes_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    family = family_of(CONFIG)
    held = from_hub(stored(tmp_path, {QKV: torch.zeros(25, 5)}), family, CONFIG)
    with pytest.raises(UnreadableError, match=r"does not consist of 3 parts \(12 \+ 6 \+ 6 rows\)"):
        entries(held, family, "fused", CONFIG)


def test_formulas_of_rows() -> None:
    fields = row_fields({"hidden_size": 32, "num_attention_heads": 4, "a": 3, "b": 5})
    assert stated_rows("2 a + b", fields) == 11
    assert stated_rows("num_attention_heads head_dim", fields) == 32
    assert stated_rows("a missing", fields) is None
