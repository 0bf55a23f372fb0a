"""One test per way a ZeRO-0, ZeRO-1 or ZeRO-2 checkpoint can be wrong.

Each is refused before a byte is written, by an error of the right kind that names the file and what to do.
The sources are copies of the real fixtures, damaged.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_tool import api
from ckpt_tool.errors import CkptToolError, CoverageError, MismatchError, UnreadableError
from tests.conftest import checkpoint_of, copy_fixture

ADVICE = re.compile(r"\b(copy|remove|save it|not supported|does not read|cannot be told)\b", re.IGNORECASE)
MODEL = "mp_rank_00_model_states.pt"
PREFIX = "model.layers.1.mlp.experts"


def optim(rank: int, prefix: str = "") -> str:
    return f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def expert(layer: int, number: int) -> str:
    return f"layer_{layer}_expert_{number}_mp_rank_00_model_states.pt"


def expp(rank: int) -> str:
    return f"expp_rank_{rank}_mp_rank_00_optim_states.pt"


@pytest.fixture
def z2(tmp_path: Path) -> Path:
    """World 4, EP 2; groups decay, no_decay and two of experts."""
    return copy_fixture("mixtral_z2_w4e2", tmp_path)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """World 3, tied weights."""
    return copy_fixture("dense_z2_w3", tmp_path)


@pytest.fixture
def z0(tmp_path: Path) -> Path:
    """World 2, EP 2, stage 0."""
    return copy_fixture("mixtral_z0_w2e2", tmp_path)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Load a file, let ``change`` alter what it holds, and save it again."""
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def edit_zero(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    edit(path, lambda content: change(content["optimizer_state_dict"]))


def edit_layer(path: Path, **changes: Any) -> None:
    edit(path / MODEL, lambda model: model["ds_autoep_layers"][1].update(changes))


def refused(source: Path, kind: type[CkptToolError], *names: str, advice: bool = True) -> str:
    """Assert that opening and converting refuse ``source`` and leave nothing; return the message."""
    with pytest.raises(kind) as raised:
        api.catalogue(source)
    assert type(raised.value) is kind
    target = source.parent.parent / "target"
    with pytest.raises(kind):
        api.convert(source, target, to="universal")
    assert not target.exists()
    message = str(raised.value)
    for name in names:
        assert name in message, f"{name!r} is not in: {message}"
    assert not advice or ADVICE.search(message), f"nothing to do in: {message}"
    return message


@pytest.mark.parametrize("name", ["mixtral_z2_w4e2", "dense_z2_w3", "mixtral_z0_w2e2"])
def test_the_sound_checkpoints_are_not_refused(name: str, tmp_path: Path) -> None:
    assert api.convert(checkpoint_of(name), tmp_path / name, to="universal")


# ---- files missing, or others'


def test_missing_optimizer_file_of_a_rank(z2: Path) -> None:
    (z2 / optim(1)).unlink()
    refused(z2, UnreadableError, optim(1), "rank 3")


def test_missing_optimizer_file_of_the_last_rank(z2: Path) -> None:
    (z2 / optim(3)).unlink()
    refused(z2, UnreadableError, MODEL, "4 ranks", "files of 3")


def test_missing_optimizer_file_of_the_first_rank_in_bf16(tmp_path: Path) -> None:
    copy = copy_fixture("mixtral_z1_bf16_w2e2", tmp_path)
    (copy / optim(0, "bf16_")).unlink()
    refused(copy, UnreadableError, optim(0, "bf16_"))


def test_optimizer_file_of_a_larger_run_left_over(z2: Path) -> None:
    shutil.copy(z2 / optim(3), z2 / optim(4))
    refused(z2, UnreadableError, "files of 5", "remove")


def test_optimizer_file_left_over_from_another_precision(z2: Path) -> None:
    shutil.copy(z2 / optim(0), z2 / optim(0, "bf16_"))
    refused(z2, UnreadableError, optim(0, "bf16_"), "remove")


def test_missing_model_file(z2: Path) -> None:
    """Nothing names the format then, and the message lists what is read."""
    (z2 / MODEL).unlink()
    refused(z2, UnreadableError, "deepspeed-zero1/2", advice=False)


def test_missing_expert_file(z2: Path) -> None:
    (z2 / expert(1, 4)).unlink()
    refused(z2, UnreadableError, expert(1, 4), "expert 4", PREFIX)


def test_expert_file_of_no_expert(z2: Path) -> None:
    shutil.copy(z2 / expert(1, 5), z2 / expert(1, 6))
    refused(z2, UnreadableError, expert(1, 6), "remove".title())


def test_expert_file_of_no_layer(z2: Path) -> None:
    shutil.copy(z2 / expert(1, 5), z2 / expert(2, 5))
    refused(z2, UnreadableError, expert(2, 5))


def test_expert_files_in_each_others_place(z2: Path) -> None:
    shutil.copy(z2 / expert(1, 5), z2 / expert(1, 4))
    refused(z2, UnreadableError, expert(1, 4), f"{PREFIX}.w1.5", "expert 4")


def test_truncated_optimizer_file(z2: Path) -> None:
    data = (z2 / optim(2)).read_bytes()
    (z2 / optim(2)).write_bytes(data[: len(data) // 2])
    refused(z2, UnreadableError, optim(2), advice=False)


def test_truncated_expert_file(z2: Path) -> None:
    data = (z2 / expert(0, 0)).read_bytes()
    (z2 / expert(0, 0)).write_bytes(data[:-40])
    refused(z2, UnreadableError, expert(0, 0), advice=False)


# ---- what is not read


@pytest.mark.parametrize(
    "name",
    [
        "mp_rank_01_model_states.pt",
        "zero_pp_rank_0_mp_rank_01_optim_states.pt",
        "layer_0_expert_0_mp_rank_01_model_states.pt",
    ],
)
def test_tensor_parallel_checkpoint(z2: Path, name: str) -> None:
    shutil.copy(z2 / name.replace("mp_rank_01", "mp_rank_00"), z2 / name)
    refused(z2, UnreadableError, name, "parallel")


def test_pipeline_parallel_checkpoint(plain: Path) -> None:
    edit(plain / MODEL, lambda model: model.update(module=None))
    refused(plain, UnreadableError, MODEL, "pipeline")


def test_deepspeeds_own_moe_layers(z2: Path) -> None:
    edit(z2 / MODEL, lambda model: model.update(ds_autoep_layers=None))
    refused(z2, UnreadableError, MODEL, "ds_autoep_layers", advice=False)


def test_optimizer_file_of_stage_3(plain: Path) -> None:
    for rank in range(3):
        edit_zero(plain / optim(rank), lambda zero: zero.update(zero_stage=3))
    refused(plain, UnreadableError, optim(0), "stage 3")


def test_optimizer_file_of_another_kind(plain: Path) -> None:
    edit_zero(plain / optim(1), lambda zero: zero.pop("single_partition_of_fp32_groups"))
    refused(plain, UnreadableError, optim(1), "single_partition_of_fp32_groups")


def test_optimizer_state_that_is_not_per_element(plain: Path) -> None:
    """Nor is it a scalar: an Adafactor's rows, say."""
    for rank in range(3):
        edit_zero(
            plain / optim(rank),
            lambda zero: zero["base_optimizer_state"]["state"][0].update(rows=torch.zeros(7)),
        )
    refused(plain, MismatchError, optim(0), "rows", "7 elements")


def test_optimizer_state_of_an_unknown_kind(plain: Path) -> None:
    edit_zero(plain / optim(2), lambda zero: zero["base_optimizer_state"]["state"][0].update(history=["x"]))
    refused(plain, UnreadableError, optim(2), "history")


# ---- ranks that disagree


def test_ranks_of_two_releases(z2: Path) -> None:
    edit(z2 / optim(2), lambda content: content.update(ds_version="0.19.3"))
    refused(z2, MismatchError, optim(2), "0.19.3", "0.19.8", "ds_version")


def test_model_file_of_another_release(z2: Path) -> None:
    edit(z2 / MODEL, lambda model: model.update(ds_version="0.19.3"))
    refused(z2, MismatchError, MODEL, "0.19.3", "0.19.8")


def test_ranks_at_two_steps(z2: Path) -> None:
    edit_zero(
        z2 / optim(2), lambda zero: zero["base_optimizer_state"]["state"][0].update(step=torch.tensor(4.0))
    )
    refused(z2, MismatchError, optim(2), "step 4.0", "step 2.0")


def test_ep_ranks_at_two_steps(z2: Path) -> None:
    """Ranks 1 and 3 are EP rank 1: among themselves they agree."""
    for rank in (1, 3):
        edit_zero(
            z2 / optim(rank),
            lambda zero: zero["base_optimizer_state"]["state"][3].update(step=torch.tensor(4.0)),
        )
    refused(z2, MismatchError, optim(1), "step", "4.0", "2.0")


def test_ranks_with_other_settings(z2: Path) -> None:
    edit_zero(z2 / optim(3), lambda zero: zero["base_optimizer_state"]["param_groups"][1].update(lr=0.5))
    refused(z2, MismatchError, optim(3), "param_groups")


def test_ranks_with_other_states(z2: Path) -> None:
    edit_zero(z2 / optim(1), lambda zero: zero["base_optimizer_state"]["state"][0].pop("exp_avg_sq"))
    refused(z2, MismatchError, optim(1), "exp_avg_sq")


def test_ranks_of_two_stages(z2: Path) -> None:
    edit_zero(z2 / optim(1), lambda zero: zero.update(zero_stage=1))
    refused(z2, MismatchError, optim(1), "zero_stage")


def test_ranks_that_order_experts_otherwise(z2: Path) -> None:
    for rank in range(4):
        edit(
            z2 / optim(rank),
            lambda content: content["ds_config"].update(use_data_before_expert_parallelism=True),
        )
    refused(z2, MismatchError, MODEL, "use_data_before_expert_parallelism")


def test_rank_order_that_does_not_fit_the_files(z2: Path) -> None:
    """All files claim the other order: rank 1 would then be the second of EP rank 0."""
    flag = {"use_data_before_expert_parallelism": True}
    for path in (z2 / MODEL, *(z2 / optim(rank) for rank in range(4))):
        edit(path, lambda content: content["ds_config"].update(flag))
    refused(z2, CoverageError, optim(1), "group 2", "gap or overlap")


# ---- a rank's file in another's place


@pytest.mark.parametrize(("one", "other"), [(0, 1), (1, 3), (2, 3)])
def test_rank_files_exchanged(one: int, other: int, z2: Path) -> None:
    for a, b in ((optim(one), "x"), (optim(other), optim(one)), ("x", optim(other))):
        (z2 / a).rename(z2 / b)
    message = refused(z2, CoverageError if one == 0 else MismatchError)
    assert optim(one) in message or optim(other) in message


def test_rank_file_copied_over_another(plain: Path) -> None:
    shutil.copy(plain / optim(0), plain / optim(1))
    refused(plain, CoverageError, optim(1), "gap or overlap")


def test_rank_files_of_a_run_of_another_world(plain: Path) -> None:
    for rank in range(3):
        edit_zero(plain / optim(rank), lambda zero: zero.update(partition_count=[4]))
    refused(plain, MismatchError, optim(0), "partition_count", "3")


# ---- partitions that do not add up


def test_partition_too_short(z2: Path) -> None:
    def shorten(zero: dict[str, Any]) -> None:
        flats = zero["single_partition_of_fp32_groups"]
        flats[0] = flats[0][:-1].detach().clone()

    edit_zero(z2 / optim(1), shorten)
    refused(z2, MismatchError, optim(1), "master of group 0")


def test_moments_too_short(z2: Path) -> None:
    def shorten(zero: dict[str, Any]) -> None:
        state = zero["base_optimizer_state"]["state"][2]
        state["exp_avg"] = state["exp_avg"][:-1].clone()

    edit_zero(z2 / optim(0), shorten)
    refused(z2, MismatchError, optim(0), "exp_avg of group 2")


def test_padding_that_does_not_fit(z2: Path) -> None:
    edit_zero(z2 / optim(3), lambda zero: zero["group_paddings"].__setitem__(1, 0))
    refused(z2, MismatchError, optim(3), "group_paddings of group 1")


def test_fewer_groups_than_shapes(z2: Path) -> None:
    edit(z2 / MODEL, lambda model: model["param_shapes"].pop())
    refused(z2, MismatchError, MODEL, "4 flat groups", "3")


def test_alignment_that_does_not_fit(z2: Path) -> None:
    edit_zero(z2 / optim(0), lambda zero: zero["param_alignment_paddings"][0].pop())
    refused(z2, UnreadableError, optim(0), "param_alignment_paddings")


def test_ranks_aligned_differently(z2: Path) -> None:
    edit_zero(z2 / optim(1), lambda zero: zero["param_alignment_paddings"][0].__setitem__(0, 4))
    refused(z2, MismatchError, optim(1), "param_alignment_paddings")


def fragment(zero: dict[str, Any], index: int, position: int) -> Any:
    return list(zero["param_slice_mappings"][index].values())[position]


def test_fragment_that_leaves_a_gap(z2: Path) -> None:
    edit_zero(z2 / optim(0), lambda zero: setattr(fragment(zero, 0, 0), "numel", 100))
    refused(z2, CoverageError, optim(0), "model.embed_tokens.weight", "100 elements", "gap or overlap")


def test_fragment_that_overlaps_another(z2: Path) -> None:
    edit_zero(z2 / optim(1), lambda zero: setattr(fragment(zero, 0, 1), "start", 0))
    refused(z2, CoverageError, optim(1), "gap or overlap", "from 0 on")


def test_fragment_missing(z2: Path) -> None:
    edit_zero(z2 / optim(0), lambda zero: zero["param_slice_mappings"][0].popitem())
    refused(z2, CoverageError, optim(0), "nothing of")


def test_parameters_in_another_order(z2: Path) -> None:
    """Their shapes still add up; the mappings do not."""

    def swap(model: dict[str, Any]) -> None:
        group = model["param_shapes"][0]
        group.move_to_end("model.embed_tokens.weight")

    edit(z2 / MODEL, swap)
    refused(z2, CoverageError, optim(0), "model.layers.0.self_attn.q_proj.weight")


def test_mappings_malformed(z2: Path) -> None:
    edit_zero(z2 / optim(0), lambda zero: zero.update(param_slice_mappings=[{}]))
    refused(z2, UnreadableError, optim(0), "param_slice_mappings")


# ---- the model file against itself


def test_shape_that_is_not_the_weights(z2: Path) -> None:
    edit(z2 / MODEL, lambda model: model["param_shapes"][0].update({"lm_head.weight": (17, 41)}))
    refused(z2, MismatchError, MODEL, "lm_head.weight", "[17, 41]", "[41, 17]")


def test_parameter_without_a_weight(z2: Path) -> None:
    edit(z2 / MODEL, lambda model: model["module"].pop("lm_head.weight"))
    refused(z2, UnreadableError, MODEL, "lm_head.weight")


def test_weight_that_is_nothing_known(z2: Path) -> None:
    edit(z2 / MODEL, lambda model: model["module"].update(stray=torch.zeros(3)))
    refused(z2, UnreadableError, MODEL, "stray")


def test_parameter_in_two_groups(z2: Path) -> None:
    edit(z2 / MODEL, lambda model: model["param_shapes"][0].update({"model.norm.weight": (17,)}))
    refused(z2, UnreadableError, MODEL, "model.norm.weight", "two parameter groups")


def test_group_of_experts_and_dense_parameters(z2: Path) -> None:
    def mix(model: dict[str, Any]) -> None:
        shapes = model["param_shapes"]
        shapes[3]["model.norm.weight"] = shapes[1].pop("model.norm.weight")

    edit(z2 / MODEL, mix)
    refused(z2, UnreadableError, MODEL, "group 3", "mixes")


def test_tied_weights_that_differ(plain: Path) -> None:
    def untie(model: dict[str, Any]) -> None:
        model["module"]["lm_head.weight"] = model["module"]["lm_head.weight"].clone() + 1

    edit(plain / MODEL, untie)
    refused(plain, MismatchError, MODEL, "lm_head.weight", "model.embed_tokens.weight")


def test_router_that_differs_from_its_second_name(z2: Path) -> None:
    edit(z2 / MODEL, lambda model: model["module"]["model.layers.1.mlp.gate.gate.weight"].add_(1))
    refused(z2, MismatchError, MODEL, "model.layers.1.mlp.gate.gate.weight")


def test_shapes_malformed(plain: Path) -> None:
    edit(plain / MODEL, lambda model: model["param_shapes"][0].update({"model.norm.weight": "22"}))
    refused(plain, UnreadableError, MODEL, "model.norm.weight")


def test_world_size_malformed(plain: Path) -> None:
    edit(plain / MODEL, lambda model: model.update(dp_world_size="three"))
    refused(plain, UnreadableError, MODEL, "dp_world_size")


# ---- experts


def test_layer_without_its_fields(z2: Path) -> None:
    edit(z2 / MODEL, lambda model: model["ds_autoep_layers"][0].pop("moe_layer_id"))
    refused(z2, UnreadableError, MODEL, "moe_layer_id")


def test_layer_listed_twice(z2: Path) -> None:
    edit_layer(z2, moe_layer_id=0)
    refused(z2, UnreadableError, MODEL, "twice")


def test_layers_of_two_ep_sizes(z2: Path) -> None:
    edit_layer(z2, ep_size=1, num_local_experts=6, expert_placement=None, expert_data_parallel_world_size=4)
    refused(z2, UnreadableError, MODEL, "EP sizes [1, 2]")


def test_layer_in_the_form_of_stage_3(z2: Path) -> None:
    edit_layer(z2, checkpoint_format="zero3_partitioned")
    refused(z2, UnreadableError, MODEL, "zero3_partitioned")


def test_layer_that_is_nowhere_in_the_model(z2: Path) -> None:
    edit_layer(z2, module_path="model.moe")
    refused(z2, UnreadableError, MODEL, "model.moe", advice=False)


def test_rank_count_that_ep_size_does_not_divide(z2: Path) -> None:
    edit_layer(z2, expert_data_parallel_world_size=3)
    refused(z2, MismatchError, MODEL, "world size 4")


def test_placement_that_leaves_an_expert_out(z2: Path) -> None:
    placement = {
        "version": 1, "num_experts": 6, "ep_size": 2,
        "ranks": [{"rank": 0, "experts": [0, 1, 2]}, {"rank": 1, "experts": [3, 4]}],
    }  # fmt: skip
    edit_layer(z2, expert_placement=placement)
    refused(z2, UnreadableError, MODEL, "[5]", advice=False)


def test_rank_0_without_experts(z2: Path) -> None:
    placement = {
        "version": 1, "num_experts": 6, "ep_size": 2,
        "ranks": [{"rank": 0, "experts": []}, {"rank": 1, "experts": [0, 1, 2, 3, 4, 5]}],
    }  # fmt: skip
    edit_layer(z2, expert_placement=placement, num_local_experts=0)
    refused(z2, UnreadableError, MODEL, PREFIX)


def test_share_that_is_not_the_placements(z2: Path) -> None:
    edit_layer(z2, num_local_experts=2)
    refused(z2, MismatchError, MODEL, "num_local_experts")


def test_expert_of_another_shape(z2: Path) -> None:
    edit(z2 / expert(1, 3), lambda states: states.update({f"{PREFIX}.w1.3": torch.zeros(9, 16)}))
    refused(z2, MismatchError, expert(1, 3), "[9, 16]", "[9, 17]")


def test_expert_of_another_precision(z2: Path) -> None:
    edit(
        z2 / expert(1, 3),
        lambda states: states.update({f"{PREFIX}.w1.3": states[f"{PREFIX}.w1.3"].bfloat16()}),
    )
    refused(z2, MismatchError, expert(1, 3), "bfloat16")


def test_all_experts_of_another_shape_than_the_optimizer_states(z2: Path) -> None:
    for number in range(6):
        key = f"{PREFIX}.w1.{number}"
        edit(z2 / expert(1, number), lambda states, key=key: states.update({key: torch.zeros(9, 16)}))
    refused(z2, MismatchError, MODEL, f"{PREFIX}.w1", "[3, 9, 17]", "[3, 9, 16]")


def test_expert_that_is_no_matrix(z2: Path) -> None:
    edit(
        z2 / expert(0, 0), lambda states: states.update({"model.layers.0.mlp.experts.w2.0": torch.zeros(3)})
    )
    refused(z2, UnreadableError, expert(0, 0), "no matrix")


# ---- stage 0


def test_stage_0_missing_optimizer_file_of_an_ep_rank(z0: Path) -> None:
    (z0 / expp(1)).unlink()
    refused(z0, UnreadableError, expp(1), "missing")


def test_stage_0_optimizer_file_of_a_larger_ep_size(z0: Path) -> None:
    shutil.copy(z0 / expp(1), z0 / expp(2))
    refused(z0, UnreadableError, expp(2), "left over")


def test_stage_0_ep_ranks_at_two_steps(z0: Path) -> None:
    edit(z0 / expp(1), lambda content: content["optimizer"]["state"][3].update(step=torch.tensor(9.0)))
    refused(z0, MismatchError, expp(1), "step 9.0", "step 2.0")


def test_stage_0_ep_ranks_with_other_dense_moments(z0: Path) -> None:
    edit(z0 / expp(1), lambda content: content["optimizer"]["state"][3]["exp_avg"].add_(1))
    refused(z0, MismatchError, expp(1), expp(0), "v_proj")


def test_stage_0_ep_ranks_with_other_settings(z0: Path) -> None:
    edit(z0 / expp(1), lambda content: content["optimizer"]["param_groups"][0].update(lr=3.0))
    refused(z0, MismatchError, expp(1), "parameter groups")


def test_stage_0_optimizer_of_another_save_than_the_model_file(z0: Path) -> None:
    for rank in (0, 1):
        edit(z0 / expp(rank), lambda content: content["optimizer"]["state"][0]["exp_avg"].add_(1))
    refused(z0, MismatchError, expp(0), MODEL)


def test_stage_0_states_of_one_parameter_of_two_shapes(z0: Path) -> None:
    edit(z0 / expp(1), lambda content: content["optimizer"]["state"][0].update(exp_avg=torch.zeros(3, 3)))
    refused(z0, UnreadableError, expp(1), "not supported")


def test_stage_0_optimizer_of_another_form(z0: Path) -> None:
    edit(z0 / expp(1), lambda content: content.update(optimizer={"state": {}}))
    refused(z0, UnreadableError, expp(1))


def test_stage_0_order_that_is_not_certain_costs_the_states_and_says_so(z0: Path) -> None:
    """Not refused: the weights are certain."""

    def regroup(optimizer: dict[str, Any]) -> None:
        first = optimizer["param_groups"][0]
        rest = dict(first, params=first["params"][7:])
        first["params"] = first["params"][:7]
        optimizer["param_groups"].insert(1, rest)

    for path in (z0 / MODEL, z0 / expp(0), z0 / expp(1)):
        edit(path, lambda content: regroup(content["optimizer"]))
    checkpoint = api.catalogue(z0)
    assert {tensor.state for tensor in checkpoint.tensors} == {"weight"}
    assert [note for note in checkpoint.notes if "left out" in note and "ZeRO-1" in note]


def test_a_frozen_parameter_with_another_value_beside_the_module(tmp_path: Path) -> None:
    """Stage 2 saves frozen parameters twice; nothing else tells which copy the run had."""
    tag = copy_fixture("deepseek_v3_z2_w2e1", tmp_path)
    path = tag / "mp_rank_00_model_states.pt"
    saved = torch.load(path, weights_only=False)
    fragments = saved["frozen_param_fragments"]
    fragments["model.embed_tokens.weight"] = fragments["model.embed_tokens.weight"] + 1
    torch.save(saved, path)
    with pytest.raises(MismatchError, match=r"frozen_param_fragments has model\.embed_tokens\.weight"):
        api.catalogue(tag)
