"""The tables themselves: every one is sound, and its names and layouts can be undone."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tool.canonical import Checkpoint, DType, ExpertName, Region, Scalar, Tensor
from ckpt_tool.errors import MismatchError, UnreadableError, UsageError
from ckpt_tool.families import Family, families, families_rows, family_of, text_config
from ckpt_tool.families.agreement import moe_layer_numbers
from ckpt_tool.families.forms import Stored, canonical_dims, join, parse_stored, split
from ckpt_tool.families.naming import entries, from_hub, to_hub
from ckpt_tool.geometry import pieces

FORMS = [(family, stored) for family in families() for stored in (*family.hub, *family.fused, *family.also)]
SIZES = {"E": 4, "I": 12, "H": 32}


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_every_form_has_every_projection(family: Family) -> None:
    """Hub and fused form hold the same matrices: what one has a place for, the other has, too."""
    held = [{(p, s.part) for s in form for p in s.projections} for form in (family.hub, family.fused)]
    assert held[0] == held[1]


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_renames_can_be_undone(family: Family) -> None:
    for dialect in ("transformers", "autoep"):
        for own, published in family.renames(dialect).items():
            names = [re.sub(r"\*", "x.weight", p.replace("{layer}", "layers.3")) for p in (own, published)]
            assert family.published(family.unpublished(names[1], dialect), dialect) in (names[1], None)


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_the_rule_for_moe_layers_is_known(family: Family) -> None:
    found = moe_layer_numbers(family.moe_layers, {}, 4)
    assert found is None or found <= set(range(4))


# By the models' own code (transformers 5.24): Qwen2MoeDecoderLayer, (layer_idx + 1) % decoder_sparse_step;
# Llama4TextConfig, range(step - 1, layers, step); JambaConfig, i % expert_layer_period == the offset.
MOE_LAYERS: list[tuple[str, dict[str, Any], set[int]]] = [
    ("sparse_step", {}, {0, 1, 2, 3, 4, 5}),
    ("sparse_step", {"decoder_sparse_step": 2}, {1, 3, 5}),
    ("sparse_step", {"decoder_sparse_step": 3}, {2, 5}),
    ("sparse_step", {"decoder_sparse_step": 2, "mlp_only_layers": [3]}, {1, 5}),
    ("llama4", {"interleave_moe_layer_step": 2}, {1, 3, 5}),
    ("llama4", {"interleave_moe_layer_step": 2, "moe_layers": [0]}, {0}),
    ("period", {"expert_layer_period": 2, "expert_layer_offset": 1}, {1, 3, 5}),
    ("period", {"expert_layer_period": 3}, {0, 3}),
]


@pytest.mark.parametrize(("rule", "config", "layers"), MOE_LAYERS)
def test_which_layers_have_experts(rule: str, config: dict[str, Any], layers: set[int]) -> None:
    assert moe_layer_numbers(rule, config, 6) == layers


def test_no_model_type_is_in_two_families() -> None:
    kinds = [kind for family in families() for kind in family.model_types]
    assert len(kinds) == len(set(kinds))


def test_rows_of_the_table() -> None:
    rows = {row["family"]: row for row in families_rows()}
    assert rows["gpt_oss"]["hub_layout"] == "stacked fused interleaved transposed"
    assert rows["gpt_oss"]["autoep"] == "refused"
    assert rows["mixtral"]["hub_layout"] == "per expert"
    assert rows["nemotron_h"]["hub_layout"] == "per expert no gate"
    assert rows["dense"]["hub_layout"] == "no experts"


# ---- choosing


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"model_type": "mixtral"}, "mixtral"),
        (
            {"model_type": "minimax_m3_vl", "text_config": {"model_type": "minimax_m3_vl_text"}},
            "minimax_m3_vl",
        ),
        ({"model_type": "minimax_m3_vl_text"}, "minimax_m3_vl_text"),
        ({"model_type": "mistral3", "text_config": {"model_type": "mistral4"}}, "mistral3_mistral4"),
        ({"model_type": "mistral3", "text_config": {"model_type": "mistral"}}, "dense"),
        ({"model_type": "a_new_wrapper", "text_config": {"model_type": "qwen3_moe"}}, "qwen3_moe"),
    ],
)
def test_family_of(config: dict[str, object], name: str) -> None:
    assert family_of(config).name == name


def test_thinker_config_goes_down_two_levels() -> None:
    config = {"thinker_config": {"text_config": {"model_type": "qwen3_omni_moe_text"}}}
    assert text_config(config)["model_type"] == "qwen3_omni_moe_text"


@pytest.mark.parametrize("config", [{}, {"model_type": None}, {"model_type": "of_tomorrow"}])
def test_unknown_family_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="does not guess"):
        family_of(config)


# ---- layouts


@pytest.mark.parametrize(
    "layout",
    ["gate E I H", "gate: E I", "gate,up: E I H", "gate: E (2 I) H", "gate: E I I H", "side: E I H"],
)
def test_senseless_layout_is_refused(layout: str) -> None:
    with pytest.raises(ValueError, match=r"gate|side"):
        parse_stored("{layer}.x", layout)


def test_transposed_matrices_of_single_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="canonical matrix"):
        parse_stored("{layer}.{expert}.x", "gate: H I")


def tensor(shape: tuple[int, ...], name: str = "stored") -> Tensor:
    numel = 1
    for size in shape:
        numel *= size
    return Tensor(name, "weight", shape, DType.float32, (Region(0, numel, "file", 0),))


@pytest.mark.parametrize(
    ("family", "stored"),
    [(family, stored) for family, stored in FORMS if not stored.per_expert],
    ids=lambda x: getattr(x, "pattern", getattr(x, "name", "")),
)
def test_split_and_join_are_inverse(family: Family, stored: Stored) -> None:
    shape = stored.expected(SIZES)
    assert shape is not None
    parts = split(tensor(shape), stored, "layers.0", SIZES["E"])
    for part in parts:
        assert isinstance(part.name, ExpertName)
        letters = canonical_dims(part.name.projection, part.name.part)
        assert part.shape == tuple(SIZES[letter] for letter in letters)
        assert pieces(part, 0, part.numel)
    whole, back = join(parts, stored, stored.key("layers.0"))
    assert back == shape
    assert pieces(whole, 0, whole.numel)
    assert sum(part.numel for part in parts) == whole.numel


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), experts=st.integers(1, 4))
def test_shapes_that_do_not_fit_are_refused(rows: int, columns: int, experts: int) -> None:
    stored = parse_stored("{layer}.x", "gate,up: E (2 I) H")
    if rows % 2:
        with pytest.raises(UnreadableError, match=r"which is not E \(2 I\) H"):
            split(tensor((experts, rows, columns)), stored, "layers.0")
    else:
        gate, up = split(tensor((experts, rows, columns)), stored, "layers.0")
        assert gate.shape == up.shape == (experts, rows // 2, columns)
    with pytest.raises(UnreadableError):
        split(tensor((rows, columns)), stored, "layers.0")


# ---- files


def published(family: str) -> Family:
    return next(found for found in families() if found.name == family)


def single(expert: int, weight: str, shape: tuple[int, ...] = (12, 32)) -> tuple[str, Tensor]:
    name = f"model.layers.0.mlp.experts.{expert}.{weight}_proj.weight"
    return name, tensor(shape, name)


def test_missing_expert_is_named() -> None:
    with pytest.raises(UnreadableError, match="expert 1 is missing"):
        from_hub(dict([single(0, "gate"), single(2, "gate")]), published("qwen3_moe"))


def test_experts_of_two_shapes_are_refused() -> None:
    with pytest.raises(UnreadableError, match="expert 0 of the same layer"):
        from_hub(dict([single(0, "gate"), single(1, "gate", (13, 32))]), published("qwen3_moe"))


def test_experts_of_two_dtypes_are_refused() -> None:
    name, second = single(1, "gate")
    both = dict([single(0, "gate"), (name, replace(second, dtype=DType.bfloat16))])
    with pytest.raises(UnreadableError, match=r"is bfloat16 .*; expert 0 of the same layer is float32"):
        from_hub(both, published("qwen3_moe"))


def test_fused_and_single_experts_of_one_layer_are_refused() -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    both = dict([single(0, "down", (32, 12)), (name, tensor((1, 32, 12), name))])
    with pytest.raises(UnreadableError, match="twice"):
        from_hub(both, published("qwen3_moe"))


def test_half_of_a_fused_tensor_is_refused() -> None:
    gate = Tensor(ExpertName("model.layers.0", "gate"), "weight", (4, 12, 32), DType.float32, ())
    with pytest.raises(MismatchError, match=r"up.weight is missing"):
        entries([gate], published("qwen3_5_moe"), "hub")


def test_biases_without_a_place_are_refused() -> None:
    bias = Tensor(ExpertName("model.layers.0", "gate", "bias"), "weight", (4, 12), DType.float32, ())
    with pytest.raises(MismatchError, match="no place"):
        entries([bias], published("mixtral"), "hub")


@pytest.mark.parametrize("step", [2, 3])
def test_steps_that_differ_in_parts_that_are_published_as_one(step: int) -> None:
    """One tensor has one step: which of its parts' would it be?"""
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    tensors = tuple(replace(tensor((4, 8), name), state="master") for name in names)
    steps = {(name, "step"): Scalar(2.0, DType.float32) for name in names}
    steps[names[2], "step"] = Scalar(float(step), DType.float32)
    checkpoint = Checkpoint("made-by-a-test", ".", "transformers", tensors, (), scalars=steps)
    family, whole = published("sarvam_moe"), "model.layers.0.attention.query_key_value.weight"
    if step == 2:
        assert set(to_hub(checkpoint, family).scalars) == {(whole, "step")}
        return
    with pytest.raises(MismatchError, match=f"step differs among the tensors .* published as {whole}"):
        to_hub(checkpoint, family)
