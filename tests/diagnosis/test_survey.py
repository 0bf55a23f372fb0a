"""What does not make up a checkpoint: all that is wrong with its files is named, not the first of it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.metadata import MetadataIndex

from ckpt_tool import api
from ckpt_tool.diagnosis import Finding
from ckpt_tool.errors import UnreadableError
from tests.conftest import checkpoint_of, config_of, copy_fixture, run_cli
from tests.diagnosis.tools import edit, examined, model, optim
from tests.formats.dcp_tools import CHECKPOINTS

QUICK = api.Execution(fsync=False, workers=2)


@pytest.fixture
def w4e4(tmp_path: Path) -> Path:
    return copy_fixture("mixtral_w4e4", tmp_path)


def errors(source: Path) -> dict[str, Finding]:
    diagnosis = examined(source)
    assert not diagnosis.healthy
    assert diagnosis.format is None
    return {finding.check: finding for finding in diagnosis.findings}


def test_files_of_three_ranks_are_missing(w4e4: Path) -> None:
    for name in (model(1), optim(1), optim(3)):
        (w4e4 / name).unlink()
    found = errors(w4e4)
    assert set(found["missing_rank"].subjects) == {model(1), optim(1), optim(3)}
    assert f"{model(1)} is missing" in found["unreadable"].message, "the reader's own sentence"


def test_all_optimizer_files_are_missing(w4e4: Path) -> None:
    for rank in range(4):
        (w4e4 / optim(rank)).unlink()
    assert errors(w4e4)["missing_rank"].subjects == tuple(optim(rank) for rank in range(4))


def test_the_model_file_of_stage_2_is_missing(tmp_path: Path) -> None:
    tag = copy_fixture("mixtral_z2_w4e2", tmp_path)
    (tag / "mp_rank_00_model_states.pt").unlink()
    assert errors(tag)["missing_rank"].subjects == ("mp_rank_00_model_states.pt",)


def test_all_model_files_of_stage_3_are_missing(w4e4: Path) -> None:
    for rank in range(4):
        (w4e4 / model(rank)).unlink()
    assert errors(w4e4)["missing_rank"].subjects == tuple(model(rank) for rank in range(4))


def test_sizes_that_cannot_be_are_not_believed(tmp_path: Path) -> None:
    tag = copy_fixture("mixtral_z2_w4e2", tmp_path)
    wrong = {"dp_world_size": 10**12, "num_experts": [10**12]}
    edit(tag / "mp_rank_00_model_states.pt", lambda root: root.update(wrong))
    assert all(len(finding.subjects) < 10 for finding in examined(tag).findings)


def test_the_highest_ranks_are_missing(w4e4: Path) -> None:
    """What a world size says: file names alone look complete."""
    for rank in (2, 3):
        (w4e4 / model(rank)).unlink()
        (w4e4 / optim(rank)).unlink()
    assert set(errors(w4e4)["missing_rank"].subjects) == {model(2), model(3), optim(2), optim(3)}


def test_files_of_a_larger_run_are_left(w4e4: Path) -> None:
    shutil.copy(w4e4 / model(3), w4e4 / model(4))
    shutil.copy(w4e4 / optim(3), w4e4 / optim(4))
    assert set(errors(w4e4)["foreign_rank"].subjects) == {model(4), optim(4)}


def test_two_files_are_cut_short_and_one_is_empty(w4e4: Path) -> None:
    for name in (optim(0), model(2)):
        os.truncate(w4e4 / name, (w4e4 / name).stat().st_size // 2)
    os.truncate(w4e4 / optim(3), 0)
    found = errors(w4e4)["broken_file"]
    assert len(found.subjects) == 3
    assert all(
        any(name in subject for subject in found.subjects) for name in (optim(0), model(2), optim(3))
    )


def test_ranks_of_different_steps(w4e4: Path) -> None:
    for rank in (1, 2):
        edit(w4e4 / model(rank), lambda root: root.update(global_steps=4))
    edit(w4e4 / model(0), lambda root: root.update(ds_version="0.19.3"))
    findings = [f for f in examined(w4e4).findings if f.check == "mixed_saves"]
    assert any("ds_version 0.19.8" in found.message and model(0) in found.message for found in findings)
    steps = next(found for found in findings if "global_steps" in found.message)
    assert len(steps.subjects) == 2


@pytest.mark.parametrize("pattern", ["*model_states.pt", "*optim_states.pt"])
@pytest.mark.parametrize("name", ["mixtral_w4e4", "mixtral_z2_w4e2", "mixtral_z1_bf16_w2e2"])
def test_a_file_of_another_release(name: str, pattern: str, tmp_path: Path) -> None:
    tag = copy_fixture(name, tmp_path)
    file = max(path for path in tag.glob(pattern) if "expert" not in path.name)

    def older(root: dict[str, Any]) -> None:
        for holder in (root, root.get("optimizer_state_dict", {})):
            if "ds_version" in holder:
                holder["ds_version"] = "0.18.0"

    edit(file, older)
    found = errors(tag)["mixed_saves"]
    assert "ds_version 0.19.8" in found.message
    assert found.subjects == (f"{file.name} (0.18.0)",)


def test_an_optimizer_of_another_step(w4e4: Path) -> None:
    def later(root: dict) -> None:  # type: ignore[type-arg]
        for state in root["optimizer_state_dict"]["optimizer_state_dict"]["state"].values():
            state["step"].fill_(7)

    edit(w4e4 / optim(2), later)
    found = errors(w4e4)["mixed_saves"]
    assert found.subjects == (f"{optim(2)} (7)",)


def test_files_of_experts_are_missing(tmp_path: Path) -> None:
    tag = copy_fixture("mixtral_z2_w4e2", tmp_path)
    gone = [f"layer_{layer}_expert_{e}_mp_rank_00_model_states.pt" for layer, e in ((0, 2), (1, 5))]
    for name in gone:
        (tag / name).unlink()
    assert errors(tag)["missing_experts"].subjects == tuple(gone)


def test_states_of_universal_parameters_are_missing(tmp_path: Path) -> None:
    universal = tmp_path / "universal"
    api.convert(checkpoint_of("mixtral_w4e4"), universal, to="universal", how=QUICK)
    gone = sorted(universal.rglob("exp_avg.pt"))[:2]
    for file in gone:
        file.unlink()
    subjects = errors(universal)["missing_file"].subjects
    assert len(subjects) == 2
    assert all(str(file).endswith(subject) for file, subject in zip(gone, subjects, strict=True))


def test_dcp_data_files_that_are_missing_or_short(tmp_path: Path) -> None:
    step = Path(shutil.copytree(CHECKPOINTS["titan_w4e2"], tmp_path / "step-2"))
    (step / "__1_0.distcp").unlink()
    os.truncate(step / "__2_0.distcp", 1000)
    found = errors(step)
    assert found["missing_file"].subjects == ("__1_0.distcp",)
    assert found["broken_file"].subjects[0].startswith("__2_0.distcp has 1000 bytes")


def test_a_dcp_save_that_was_not_finished(tmp_path: Path) -> None:
    step = Path(shutil.copytree(CHECKPOINTS["titan_w4e2"], tmp_path / "step-2"))
    (step / ".metadata").unlink()
    assert errors(step)["unfinished_save"].subjects == (".metadata",)


def test_a_chunk_that_the_metadata_lost(tmp_path: Path) -> None:
    """torch's loader leaves such rows as they were initialised, without an error."""
    step = Path(shutil.copytree(CHECKPOINTS["titan_w4e2"], tmp_path / "step-2"))
    metadata = pickle.loads((step / ".metadata").read_bytes())
    name = "layers.0.attention.wo.weight"
    gone = metadata.state_dict_metadata[name].chunks.pop(1)
    del metadata.storage_data[MetadataIndex(name, gone.offsets)]
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    assert name in errors(step)["coverage"].message


def test_published_files_that_are_missing_or_cut(tmp_path: Path) -> None:
    published = tmp_path / "published"
    config = config_of("mixtral_w4e4")
    api.convert(
        checkpoint_of("mixtral_w4e4"), published, to="hf", config=config, max_shard_bytes=10_000, how=QUICK
    )
    files = sorted(published.glob("*.safetensors"))
    assert len(files) > 3
    files[0].unlink()
    files[2].unlink()
    os.truncate(files[1], files[1].stat().st_size - 10)
    found = errors(published)
    assert found["missing_file"].subjects == (files[0].name, files[2].name)
    assert files[1].name in found["broken_file"].message


def test_what_is_no_checkpoint_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(UnreadableError, match="is no checkpoint"):
        api.doctor(tmp_path)
    done = run_cli("doctor", tmp_path)
    assert (done.rc, done.stdout) == (3, "")
    assert "is no checkpoint" in done.stderr


def test_the_command_line(w4e4: Path) -> None:
    assert run_cli("doctor", w4e4, "--quiet").stdout.startswith("Nothing found: ")
    (w4e4 / optim(1)).unlink()
    done = run_cli("doctor", w4e4, "--json")
    assert done.rc == 1
    found = json.loads(done.stdout)
    assert set(found) == {
        *("path", "format", "step", "healthy", "tensors", "bytes_read", "findings", "notes")
    }
    assert set(found["findings"][0]) == {*("check", "severity", "message", "meaning", "remedy", "subjects")}
    text = run_cli("doctor", w4e4)
    assert text.rc == 1
    assert "ERROR [missing_rank]" in text.stdout
    assert "    To do: Copy the files of all ranks" in text.stdout
    assert "1 error" in text.stdout or "2 error" in text.stdout
