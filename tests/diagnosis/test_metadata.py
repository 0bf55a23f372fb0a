"""Each kind of defect in metadata, put into a copy of a real checkpoint by torch, is named."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_tool import api
from ckpt_tool.diagnosis import Severity
from tests.conftest import checkpoint_of, config_of, copy_fixture
from tests.diagnosis.tools import edit, examined, flats, model, one, optim
from tests.formats.dcp_tools import CHECKPOINTS

W4E4 = "mixtral_w4e4"
QUICK = api.Execution(fsync=False, workers=2)


@pytest.fixture
def w4e4(tmp_path: Path) -> Path:
    return copy_fixture(W4E4, tmp_path)


def test_a_step_that_counted_sub_groups(w4e4: Path) -> None:
    """What a Universal load into ZeRO-3 with torch's Adam leaves: one step shared by two sub-groups."""
    for rank in range(4):
        flats(w4e4 / optim(rank), lambda _, states: [state["step"].fill_(4) for state in states.values()])
    found = one(w4e4, "step_ahead", W4E4)
    assert found.severity is Severity.WARNING
    assert found.message == "The optimizer is at step 4, and the run has made 2."


def test_steps_that_fp16_skipped_are_not_the_optimizers(tmp_path: Path) -> None:
    tag = copy_fixture("mixtral_fp16_w2e1", tmp_path)
    for rank in range(2):
        edit(tag / model(rank), lambda root: root.update(skipped_steps=1))
    assert "has made 1 (and has skipped 1)" in one(tag, "step_ahead").message


def test_one_sub_group_at_another_step(w4e4: Path) -> None:
    for rank in range(4):
        flats(w4e4 / optim(rank), lambda _, states: states[1]["step"].fill_(1))
    found = one(w4e4, "steps_differ", W4E4)
    assert len(found.subjects) == 6
    assert "model.layers.0.experts.*.gate.weight (1)" in found.subjects


def test_a_moment_lost_by_all_ranks_alike(w4e4: Path) -> None:
    for rank in range(4):
        flats(w4e4 / optim(rank), lambda _, states: states[1].pop("exp_avg_sq"))
    found = one(w4e4, "lost_state", W4E4)
    assert any("(has exp_avg, step, no exp_avg_sq)" in subject for subject in found.subjects)


def test_all_optimizer_state_of_a_sub_group_lost_by_all_ranks_alike(w4e4: Path) -> None:
    for rank in range(4):
        flats(w4e4 / optim(rank), lambda _, states: states.pop(1))
    found = one(w4e4, "no_optimizer_state", W4E4)
    assert found.severity is Severity.WARNING
    assert "model.layers.0.experts.*.gate.weight" in found.subjects


def replaced(value: Any, key: str, new: float) -> Any:
    """A structure with the number ``key`` set to another wherever it stands; classes stay as they are."""
    if isinstance(value, dict):
        for name, held in value.items():
            if name == key and isinstance(held, torch.Tensor):
                held.fill_(new)
            elif name == key and isinstance(held, int | float):
                value[name] = new
            else:
                replaced(held, key, new)
    elif isinstance(value, list | tuple):
        for member in value:
            replaced(member, key, new)
    return value


def everywhere(directory: Path, key: str, new: float) -> None:
    for path in directory.rglob("*.pt"):
        edit(path, lambda content: replaced(content, key, new))


STAGES = ["mixtral_w4e4", "mixtral_z2_w4e2", "mixtral_z1_bf16_w2e2", "mixtral_z0_w2e2"]


def test_a_step_that_is_no_count(w4e4: Path) -> None:
    for rank in range(4):
        flats(w4e4 / optim(rank), lambda _, states: states[0]["step"].fill_(-1))
    assert "model.embed_tokens.weight (-1.0)" in one(w4e4, "step", W4E4).subjects


@pytest.mark.parametrize("step", [math.nan, math.inf])
@pytest.mark.parametrize("name", STAGES)
def test_a_step_that_is_nan_on_all_ranks(name: str, step: float, tmp_path: Path) -> None:
    """NaN equals nothing, itself included; ranks agree on it all the same. What is made of it has it."""
    tag = copy_fixture(name, tmp_path)
    everywhere(tag, "step", step)
    said = f"model.embed_tokens.weight ({step})"
    assert said in one(tag, "step").subjects
    for to in ("universal", "dcp"):
        api.convert(tag, tmp_path / to, to=to, config=config_of(name))
        assert said in one(tmp_path / to, "step").subjects
        assert api.verify(tmp_path / to, tag, config=config_of(name)).passed


@pytest.mark.parametrize("name", ["mixtral_w4e4", "mixtral_fp16_w2e1"])
@pytest.mark.parametrize("step", [math.nan, math.inf])
def test_a_run_whose_step_is_no_count(name: str, step: float, tmp_path: Path) -> None:
    tag = copy_fixture(name, tmp_path)
    everywhere(tag, "global_steps", step)
    assert f"The run's step is no count: {step}" in one(tag, "step").message


@pytest.mark.parametrize("option", ["lr", "eps", "weight_decay"])
@pytest.mark.parametrize("name", STAGES)
def test_an_option_of_a_group_that_is_nan(option: str, name: str, tmp_path: Path) -> None:
    tag = copy_fixture(name, tmp_path)
    everywhere(tag, option, math.nan)
    assert f"{option} of group 0 (nan)" in one(tag, "group_options").subjects


def test_a_beta_that_is_one(w4e4: Path) -> None:
    for rank in range(4):
        edit(
            w4e4 / optim(rank),
            lambda root: [
                group.update(betas=(0.9, 1.0))
                for group in root["optimizer_state_dict"]["optimizer_state_dict"]["param_groups"]
            ],
        )
    assert "betas of group 0 ((0.9, 1.0))" in one(w4e4, "group_options").subjects


def test_fewer_experts_than_the_config_says(w4e4: Path, tmp_path: Path) -> None:
    config = json.loads(config_of(W4E4).read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_local_experts": 8}))
    diagnosis = api.doctor(w4e4, config=tmp_path, how=QUICK)
    (found,) = diagnosis.findings
    assert (found.check, found.severity) == ("missing_experts", Severity.ERROR)
    assert found.subjects == ("model.layers.0 (4)", "model.layers.1 (4)")
    assert "num_local_experts 8" in found.message


def test_a_config_of_another_size(w4e4: Path, tmp_path: Path) -> None:
    config = json.loads(config_of(W4E4).read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    (found,) = api.doctor(w4e4, config=tmp_path, how=QUICK).findings
    assert found.check == "config"
    assert "num_hidden_layers 3" in found.message


def test_a_config_of_an_unknown_family_is_a_note(w4e4: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nobody_knows"}))
    diagnosis = api.doctor(w4e4, config=tmp_path, how=QUICK)
    assert diagnosis.findings == ()
    assert any("nobody_knows" in note for note in diagnosis.notes)


def test_a_config_beside_the_checkpoint_that_is_no_json(w4e4: Path) -> None:
    (w4e4 / "config.json").write_text("{")
    assert "is damaged or no JSON" in one(w4e4, "config").message


def test_a_ds_config_of_another_ep_size(w4e4: Path) -> None:
    for rank in range(4):
        edit(w4e4 / model(rank), lambda root: root["ds_config"]["expert_parallel"].update(autoep_size=2))
    found = one(w4e4, "stale_ep_size", W4E4)
    assert "autoep_size 2; the files are of EP size 4" in found.message


def test_stale_metadata_of_another_ep_size(w4e4: Path) -> None:
    """ds_autoep_layers of EP size 2 beside partitions of EP size 4, which the engine loads."""
    other = checkpoint_of("mixtral_w4e2") / "global_step2"
    for rank in range(4):
        stale = torch.load(other / model(rank), weights_only=False)["ds_autoep_layers"]
        edit(w4e4 / model(rank), lambda root, stale=stale: root.update(ds_autoep_layers=stale))
    diagnosis = examined(w4e4)
    assert [found.check for found in diagnosis.findings] == ["contradiction"]


def test_a_copy_for_the_converter_of_another_ep_size(w4e4: Path) -> None:
    other = checkpoint_of("mixtral_w4e2") / "global_step2"
    for rank in range(4):
        stale = torch.load(other / model(rank), weights_only=False)["ds_autoep_layers"]
        edit(
            w4e4 / model(rank),
            lambda root, stale=stale: root["universal_checkpoint_info"].update(ds_autoep_layers=stale),
        )
    assert "ep_size 2" in one(w4e4, "stale_universal_info", W4E4).message


def test_a_static_loss_scale_in_an_fp16_run(tmp_path: Path) -> None:
    """What hand-made files hold: it loads, and the scale is 1 from then on."""
    tag = copy_fixture("mixtral_fp16_w2e1", tmp_path)
    static = torch.load(checkpoint_of(W4E4) / "global_step2" / optim(0), weights_only=False)[
        "optimizer_state_dict"
    ]["loss_scaler"]
    for rank in range(2):
        edit(tag / optim(rank), lambda root: root["optimizer_state_dict"].update(loss_scaler=static))
    assert "static one" in one(tag, "loss_scale").message


def test_a_loss_scale_at_its_least(tmp_path: Path) -> None:
    tag = copy_fixture("mixtral_fp16_w2e1", tmp_path)
    for rank in range(2):
        edit(
            tag / optim(rank),
            lambda root: setattr(root["optimizer_state_dict"]["loss_scaler"], "cur_scale", 1.0),
        )
    assert "down to 1, its least" in one(tag, "loss_scale").message


@pytest.mark.parametrize("scale", [math.nan, math.inf, 0.0])
def test_a_loss_scale_that_is_none(scale: float, tmp_path: Path) -> None:
    tag = copy_fixture("mixtral_fp16_w2e1", tmp_path)
    for rank in range(2):
        edit(
            tag / optim(rank),
            lambda root: setattr(root["optimizer_state_dict"]["loss_scaler"], "cur_scale", scale),
        )
    assert f"The loss scale is {scale:g}" in one(tag, "loss_scale").message


def test_a_directory_named_after_another_step(w4e4: Path) -> None:
    tag = w4e4.rename(w4e4.with_name("global_step5"))
    assert "global_step5, and the checkpoint in it is of step 2" in one(tag, "tag").message


def test_latest_names_a_directory_that_is_not_there(w4e4: Path) -> None:
    (w4e4.parent / "latest").write_text("global_step9")
    diagnosis = examined(w4e4.parent)
    (found,) = diagnosis.findings
    assert (found.check, found.severity) == ("tag", Severity.ERROR)
    assert "global_step2" in found.message


def test_latest_names_an_older_step(w4e4: Path) -> None:
    (w4e4.parent / "global_step10").mkdir()
    found = one(w4e4.parent, "tag")
    assert (found.severity, found.subjects) == (Severity.WARNING, ("global_step10",))
    assert examined(w4e4).findings == (), "who passes a step means that one"


def _universal(name: str, tmp_path: Path) -> Path:
    target = tmp_path / "universal"
    api.convert(checkpoint_of(name), target, to="universal", how=QUICK)
    return target


def test_universal_groups_that_stage_3_would_make_alike(tmp_path: Path) -> None:
    """As ds_to_universal writes them: the first group's options, and the loader copies them over all."""
    universal = _universal("mixtral_odd_w4e2", tmp_path)

    def like_deepspeed(root: Any) -> None:
        root["optimizer_state_dict"]["param_groups"] = [
            dict(group) for group in root["ckpt_tool_source"]["param_groups"]
        ]

    edit(next(universal.rglob("optimizer_state.pt")), like_deepspeed)
    found = one(universal, "universal_groups")
    assert found.severity is Severity.WARNING
    assert any("weight_decay 0" in subject for subject in found.subjects)


def test_fewer_universal_groups_than_stages_1_and_2_need(tmp_path: Path) -> None:
    universal = _universal("mixtral_z2_w4e2", tmp_path)
    edit(next(universal.rglob("optimizer_state.pt")), lambda root: root.update(param_groups=[{}]))
    found = one(universal, "universal_groups")
    assert found.severity is Severity.ERROR
    assert "lists 1 parameter groups, and the checkpoint has 4" in found.message


def test_how_a_universal_directory_has_to_be_loaded_is_noted(tmp_path: Path) -> None:
    notes = examined(_universal("deepseek_v3_w2e2", tmp_path)).notes
    assert any("shares one Adam step" in note for note in notes)
    assert any("restores neither frozen parameters nor buffers" in note for note in notes)


def test_at_which_ep_size_stage_2_has_to_be_loaded_is_noted(tmp_path: Path) -> None:
    assert any("Load it at EP size 2" in note for note in examined(checkpoint_of("mixtral_z2_w4e2")).notes)


def test_replicas_that_differ(tmp_path: Path) -> None:
    """Two EP ranks that hold the same expert, with other values."""
    from tests import synthetic

    shared = ((0, 1), (1, 2))
    layer = synthetic.Layer(0, shared, 3, 2)
    full = synthetic.model({"model.norm.weight": (3,)}, [layer])
    tag = synthetic.write(tmp_path / "shared", full, synthetic.Save(world=2))
    assert "replicas_differ" not in {found.check for found in examined(tag).findings}
    flats(tag / optim(1), lambda masters, _: masters[-1].__setitem__(0, 9.0))
    assert "replicas_differ" in {found.check for found in examined(tag).findings}


def test_experts_without_optimizer_state(tmp_path: Path) -> None:
    """An FSDP2 run whose optimizer never had the experts, or lost them."""
    step = Path(shutil.copytree(CHECKPOINTS["mixtral_accelerate_w2"], tmp_path / "checkpoint"))
    file = step / "optimizer_0" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    lost = [key for key in metadata.state_dict_metadata if ".state." in key and ".experts." in key]
    assert lost
    for key in lost:
        del metadata.state_dict_metadata[key]
        metadata.planner_data.pop(key)
    for index in [index for index in metadata.storage_data if index.fqn in lost]:
        del metadata.storage_data[index]
    file.write_bytes(pickle.dumps(metadata))
    found = one(step, "no_optimizer_state")
    assert found.severity is Severity.WARNING
    assert found.subjects == tuple(
        f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")
    )


def test_a_copy_of_a_directory_changes_nothing(w4e4: Path, tmp_path: Path) -> None:
    """The tag's number is its own: a directory of any other name is no finding."""
    copy = Path(shutil.copytree(w4e4, tmp_path / "backup"))
    assert examined(copy).findings == ()
