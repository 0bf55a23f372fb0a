"""The rules of ``tensors.json`` against transformers' own models of configs they were not learnt from: a
whole model passes, and one with a tensor less, or an axis of another length, does not."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from ckpt_tool.canonical import Checkpoint, ExpertName, Tensor, TensorName
from ckpt_tool.errors import CkptToolError
from ckpt_tool.families import family_of
from ckpt_tool.families.agreement import check_config, embedding_name, head_name, ties_embeddings
from ckpt_tool.families.completeness import not_compared
from ckpt_tool.families.expected import expected_of
from tests.engine.hf_models import MODELS, can_build
from tests.engine.table_models import DENSE, changed, config_of, options_of, published
from tests.engine.table_samples import changes, nested, sample, text_of_options

pytestmark = pytest.mark.engine

Values = dict[TensorName, Tensor]
TABLED = [
    name
    for name in dict.fromkeys((*MODELS, *DENSE))
    if can_build(name) and expected_of({"model_type": name, "text_config": {"model_type": "mistral4"}})
]


# dbrx builds experts of another width than its layers where one of these is changed alone.
COUPLED = ("d_model", "ffn_config.hidden_size")


def whole(name: str, options: dict[str, Any]) -> tuple[Checkpoint, dict[str, Any]]:
    found = published(name, options)
    assert found is not None
    config: dict[str, Any] = json.loads(json.dumps(config_of(name, options), default=str))
    embedding = embedding_name({tensor.name: tensor for tensor in found.tensors})
    if embedding is None or not ties_embeddings(config):
        return found, config
    head = head_name(embedding)
    kept = tuple(tensor for tensor in found.tensors if tensor.name != head)
    return replace(found, tensors=kept, aliases={head: embedding}), config


def problem(checkpoint: Checkpoint, values: Values, config: dict[str, Any]) -> str:
    """Why the model is refused; else what a note says was not compared."""
    family = family_of(config)
    try:
        check_config(replace(checkpoint, tensors=tuple(values.values())), family, config)
    except CkptToolError as error:
        return f"refused: {error}"
    return " ".join(not_compared(values, family, config))


def of_the_text_model(checkpoint: Checkpoint, config: dict[str, Any]) -> Iterator[TensorName]:
    """What a class of its own is loaded into: not a composite's towers, whose absence is noted."""
    expected = expected_of(config)
    assert expected is not None
    for tensor in checkpoint.tensors:
        if isinstance(tensor.name, ExpertName) or not tensor.name.startswith(expected.towers or "\0"):
            yield tensor.name


@pytest.mark.parametrize("name", TABLED)
def test_a_tensor_less_or_another_size_is_seen_in_every_family(name: str) -> None:
    checkpoint, config = whole(name, options_of(name))
    values: Values = {tensor.name: tensor for tensor in checkpoint.tensors}
    assert not problem(checkpoint, values, config).startswith("refused")
    for one in of_the_text_model(checkpoint, config):
        rest = {other: tensor for other, tensor in values.items() if other != one}
        last = str(one).rpartition("layers.")[2].partition(".")[2]
        said = problem(checkpoint, rest, config)
        assert said.startswith("refused") or last in said, f"without {one}: {said}"
        for axis, size in enumerate(values[one].shape):
            shape = (*values[one].shape[:axis], size + 3, *values[one].shape[axis + 1 :])
            said = problem(checkpoint, {**values, one: replace(values[one], shape=shape)}, config)
            assert said.startswith("refused") or last in said, f"{one} {shape}: {said}"


@pytest.mark.parametrize("name", TABLED)
def test_a_whole_model_of_a_config_that_no_rule_was_learnt_from(name: str) -> None:
    draw, options = random.Random(f"held out {name}"), options_of(name)
    first = sample(name, options)
    assert first is not None
    known = [(field, value) for field, value in changes(first, few=False) if field not in COUPLED]
    passed = 0
    for _ in range(30):
        other = options
        for field, value in draw.sample(known, min(4, len(known))):
            size = value * 5 + 3 if type(value) is int and value > 3 else value
            other = changed(name, other, nested(text_of_options(name, other), field, size))
        if sample(name, other) is None:
            continue
        passed += 1
        checkpoint, config = whole(name, other)
        values: Values = {tensor.name: tensor for tensor in checkpoint.tensors}
        said = problem(checkpoint, values, config)
        assert not said.startswith("refused"), f"{said} {other}"
    assert passed
