"""Each kind of defect in values, put into a copy of a real checkpoint by torch, is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from ckpt_tool import api
from ckpt_tool.diagnosis import Case, Severity
from ckpt_tool.diagnosis.values import unreadable
from ckpt_tool.formats.registry import open_checkpoint
from ckpt_tool.statistics import Statistics
from tests.conftest import checkpoint_of, config_of, copy_fixture
from tests.diagnosis.tools import edit, examined, flats, one, optim

W4E4 = (
    "mixtral_w4e4"  # four experts on four ranks: each rank's expert sub-group is one expert of each layer
)


@pytest.fixture
def w4e4(tmp_path: Path) -> Path:
    return copy_fixture(W4E4, tmp_path)


def test_a_nan_in_an_experts_master(w4e4: Path) -> None:
    flats(w4e4 / optim(2), lambda masters, _: masters[1].fill_(1).__setitem__(0, float("nan")))
    diagnosis = examined(w4e4, W4E4)
    kinds = {finding.check: finding for finding in diagnosis.findings}
    assert kinds["non_finite"].severity is Severity.ERROR
    assert kinds["non_finite"].subjects == ("model.layers.0.experts.2.gate.weight [master] (1 of 273)",)
    assert not diagnosis.healthy


@pytest.mark.parametrize("state", ["exp_avg", "exp_avg_sq"])
def test_an_infinity_in_a_moment(state: str, w4e4: Path) -> None:
    flats(w4e4 / optim(0), lambda _, states: states[0][state].__setitem__(3, float("inf")))
    found = one(w4e4, "non_finite", W4E4)
    assert found.subjects == (f"model.embed_tokens.weight [{state}] (1 of 1,407)",)
    assert "first step after loading" in found.meaning


def test_a_mask_with_infinities_is_no_defect(tmp_path: Path) -> None:
    """A buffer of attention scores may hold -inf; a NaN in one is a defect."""
    z2 = copy_fixture("deepseek_v3_z2_w2e1", tmp_path)
    buffer = "model.layers.1.mlp.router.e_score_correction_bias"

    def put(value: float) -> None:
        edit(z2 / "mp_rank_00_model_states.pt", lambda root: root["module"][buffer].__setitem__(0, value))

    put(float("-inf"))
    assert examined(z2).findings == ()
    put(float("nan"))
    assert buffer in one(z2, "non_finite").subjects[0]


def test_a_negative_mean_of_squares(w4e4: Path) -> None:
    flats(w4e4 / optim(1), lambda _, states: states[1]["exp_avg_sq"].__setitem__(0, -1e-9))
    found = one(w4e4, "negative_exp_avg_sq", W4E4)
    assert found.subjects == ("model.layers.0.experts.1.gate.weight [exp_avg_sq] (least -1e-09)",)


def test_an_experts_weights_are_zero(w4e4: Path) -> None:
    flats(w4e4 / optim(3), lambda masters, _: masters[1].zero_())
    found = one(w4e4, "constant", W4E4)
    assert found.severity is Severity.ERROR
    assert "model.layers.0.experts.3.gate.weight [master] (all 0)" in found.subjects
    assert len(found.subjects) == 6  # three matrices in each of two layers


def test_published_experts_that_are_zero(tmp_path: Path) -> None:
    """Without optimizer state: an expert whose peers have values."""
    published = tmp_path / "published"
    api.convert(checkpoint_of(W4E4), published, to="hf", config=config_of(W4E4), how=_quick())
    key = next(k for k in load_file(published / "model.safetensors") if "experts.2." in k)
    _put(published, key, 0.0)
    found = one(published, "constant")
    assert found.severity is Severity.ERROR
    assert ".experts.2." in found.subjects[0]


def test_a_published_matrix_that_is_constant(tmp_path: Path) -> None:
    """A dense one without moments to tell whether it was trained: likely lost, not surely."""
    published = tmp_path / "published"
    api.convert(checkpoint_of(W4E4), published, to="hf", config=config_of(W4E4), how=_quick())
    _put(published, "model.layers.0.self_attn.q_proj.weight", 0.5)
    found = one(published, "constant")
    assert (found.severity, found.subjects) == (
        Severity.WARNING,
        ("model.layers.0.self_attn.q_proj.weight [weight] (all 0.5)",),
    )


def test_norms_of_ones_and_zero_biases_are_no_defect(tmp_path: Path) -> None:
    published = tmp_path / "published"
    api.convert(checkpoint_of("qwen2_moe_w2e2"), published, to="hf", config=config_of("qwen2_moe_w2e2"))
    keys = load_file(published / "model.safetensors")
    for key in keys:
        if key.endswith(("norm.weight", "layernorm.weight")):
            _put(published, key, 1.0)
        elif key.endswith(".bias"):
            _put(published, key, 0.0)
    assert examined(published).findings == ()


def test_one_norm_that_is_zero(tmp_path: Path) -> None:
    published = tmp_path / "published"
    api.convert(checkpoint_of(W4E4), published, to="hf", config=config_of(W4E4), how=_quick())
    name = "model.layers.1.input_layernorm.weight"
    _put(published, name, 0.0)
    assert one(published, "zero_norm").subjects == (f"{name} [weight]",)


def test_an_expert_that_was_never_trained(w4e4: Path) -> None:
    def untrained(_: Any, states: dict[int, dict[str, torch.Tensor]]) -> None:
        states[1]["exp_avg"].zero_()
        states[1]["exp_avg_sq"].zero_()

    flats(w4e4 / optim(3), untrained)
    found = one(w4e4, "untrained_experts", W4E4)
    assert found.severity is Severity.WARNING
    assert found.subjects == (
        "model.layers.0: expert 3 (EP rank 3)",
        "model.layers.1: expert 3 (EP rank 3)",
    )


def test_a_parameter_that_was_never_trained(tmp_path: Path) -> None:
    """The first parameter of a ZeRO-2 run's first group, on all ranks that hold a part of it."""
    z2 = copy_fixture("mixtral_z2_w4e2", tmp_path)
    name = ""
    for rank in range(4):

        def untrained(root: Any) -> None:
            nonlocal name
            zero = root["optimizer_state_dict"]
            slices = zero["param_slice_mappings"][0]
            name = name or next(iter(slices))
            if name in slices:
                at = slices[name]
                for state in ("exp_avg", "exp_avg_sq"):
                    zero["base_optimizer_state"]["state"][0][state][at.start : at.start + at.numel] = 0

        edit(z2 / optim(rank), untrained)
    assert one(z2, "untrained_parameters").subjects == (name,)


def test_a_run_at_step_0(w4e4: Path) -> None:
    """Nothing is trained yet: zero moments, and matrices that are initialised as zeros."""
    for rank in range(4):

        def fresh(masters: list[torch.Tensor], states: dict[int, dict[str, torch.Tensor]]) -> None:
            for state in states.values():
                for value in state.values():
                    value.zero_()
            masters[1].zero_()

        flats(w4e4 / optim(rank), fresh)
        edit(w4e4 / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", lambda r: r.update(global_steps=0))
    w4e4 = w4e4.rename(w4e4.with_name("start"))
    diagnosis = examined(w4e4, W4E4)
    assert diagnosis.healthy
    assert [(found.check, found.severity) for found in diagnosis.findings] == [("constant", Severity.INFO)]


def test_moments_that_were_lost(w4e4: Path) -> None:
    for rank in range(4):

        def lost(_: Any, states: dict[int, dict[str, torch.Tensor]]) -> None:
            for state in states.values():
                state["exp_avg"].zero_()
                state["exp_avg_sq"].zero_()

        flats(w4e4 / optim(rank), lost)
    assert "at step 2" in one(w4e4, "moments_lost", W4E4).message


def test_one_ranks_experts_overwrote_anothers(w4e4: Path) -> None:
    """Masters only, as a state dict that was broadcast from rank 0 leaves them."""
    own = torch.load(w4e4 / optim(0), weights_only=False)["optimizer_state_dict"]["fp32_flat_groups"][1]
    flats(w4e4 / optim(2), lambda masters, _: masters[1].copy_(own))
    found = one(w4e4, "copied_experts", W4E4)
    assert found.severity is Severity.ERROR
    assert found.subjects == (
        "model.layers.0: experts 0, 2 (EP ranks 0, 2)",
        "model.layers.1: experts 0, 2 (EP ranks 0, 2)",
    )
    assert "overwritten" in found.message


def test_copies_within_a_rank(tmp_path: Path) -> None:
    """Expert 1 of a published model is expert 0."""
    published = tmp_path / "published"
    api.convert(checkpoint_of(W4E4), published, to="hf", config=config_of(W4E4), how=_quick())
    file = published / "model.safetensors"
    state = load_file(file)
    for key in [key for key in state if ".experts.1." in key]:
        state[key] = state[key.replace(".experts.1.", ".experts.0.")].clone()
    save_file(state, file, {"format": "pt"})
    found = one(published, "copied_experts")
    assert found.severity is Severity.WARNING
    assert found.subjects[0] == "model.layers.0: experts 0, 1"


def test_a_model_just_upcycled_from_a_dense_one(tmp_path: Path) -> None:
    state = {}
    for number in (1, 2, 3):
        matrix = torch.randn(8, 8)
        state[f"layers.0.moe.experts.w{number}"] = torch.stack([matrix] * 4)
    dcp.save(state, checkpoint_id=tmp_path / "c", no_dist=True)
    diagnosis = examined(tmp_path / "c")
    assert diagnosis.healthy
    assert [(one.check, one.severity) for one in diagnosis.findings] == [("copied_experts", Severity.INFO)]


@pytest.mark.parametrize("fixture", ["mixtral_z1_bf16_w2e2", "mixtral_z2_w4e2"])
def test_a_weight_that_is_not_its_master_rounded(fixture: str, tmp_path: Path) -> None:
    """bf16 beside fp32, and fp32 beside fp32: one element of a dense weight, by its lowest bit."""
    tag = copy_fixture(fixture, tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"

    def flip(root: Any) -> None:
        weight = root["module"][name]
        bits = torch.int16 if weight.element_size() == 2 else torch.int32
        weight.reshape(-1).view(bits)[0] ^= 1

    edit(tag / "mp_rank_00_model_states.pt", flip)
    found = one(tag, "master_differs")
    assert found.subjects[0].startswith(f"{name} [weight] (1 of ")


def test_an_expert_file_of_another_expert(tmp_path: Path) -> None:
    """The weights of expert 3 are expert 2's; the masters are right."""
    tag = copy_fixture("mixtral_z2_w4e2", tmp_path)
    file = "layer_1_expert_{}_mp_rank_00_model_states.pt"
    other = torch.load(tag / file.format(2), weights_only=False)
    edit(
        tag / file.format(3),
        lambda own: own.update({key.replace(".2", ".3"): other[key] for key in other}),
    )
    found = one(tag, "master_differs")
    assert len(found.subjects) == 3
    assert all(subject.startswith("model.layers.1.experts.3.") for subject in found.subjects)


def test_squares_of_other_gradients(w4e4: Path) -> None:
    """exp_avg_sq of an expert is as small as no history of its gradients makes it."""
    flats(w4e4 / optim(1), lambda _, states: states[1]["exp_avg_sq"].mul_(1e-3))
    found = one(w4e4, "moments_disagree", W4E4)
    assert found.severity is Severity.WARNING
    assert "model.layers.0.experts.1.gate.weight [exp_avg]" in found.subjects[0]


def test_a_tensor_that_cannot_be_read_to_its_end(w4e4: Path) -> None:
    reader, checkpoint = open_checkpoint(w4e4)
    reader.close()
    broken = Statistics({}, failures={"model.norm.weight": "a.pt is truncated."})
    (found,) = unreadable(Case(checkpoint, reader, None, broken))
    assert (found.check, found.severity) == ("unreadable", Severity.ERROR)
    assert found.subjects == ("model.norm.weight",)


def _quick() -> api.Execution:
    return api.Execution(fsync=False, workers=2)


def _put(published: Path, key: str, value: float) -> None:
    file = published / "model.safetensors"
    state = load_file(file)
    state[key] = torch.full_like(state[key], value)
    save_file(state, file, {"format": "pt"})
