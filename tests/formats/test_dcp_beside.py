"""What accelerate, the Trainer and VeOmni keep beside the tensors goes along, byte by byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import ckpt_tool.api
from ckpt_tool.errors import UnreadableError
from ckpt_tool.layout import Layout

from .dcp_tools import CHECKPOINTS, FIXTURES, convert, read

ACCELERATE = CHECKPOINTS["mixtral_accelerate_w2"]
# Bytes that no unpickler would take: nothing reads them.
SHARED = ("sampler.bin", "scaler.pt", "custom_checkpoint_0.pkl", "scheduler_1.bin", "training_args.bin")
OF_RANKS = ("random_states_0.pkl", "random_states_1.pkl")
EXTRA = ("extra_state/extra_state_rank_0.pt", "extra_state/extra_state_rank_1.pt")


class Hostile:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit",)


def source_with(tmp_path: Path, *names: str, checkpoint: Path = ACCELERATE) -> Path:
    shutil.copytree(checkpoint, tmp_path / "c")
    (tmp_path / "c" / "extra_state").mkdir()
    for name in names:
        (tmp_path / "c" / name).write_bytes(f"what {name} holds".encode())
    return tmp_path / "c"


def files(directory: Path) -> dict[str, bytes]:
    """All but the tensors."""
    found = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in found
        if path.suffix not in (".distcp", ".safetensors") and path.name != ".metadata"
    }


def not_converted(layout: Layout) -> list[str]:
    return [note for note in layout.notes if note.startswith("Not converted")]


def test_accelerate_at_the_same_number_of_ranks_gets_everything(tmp_path: Path) -> None:
    source = source_with(tmp_path, *SHARED, *OF_RANKS, "trainer_state.json")
    (source / "trainer_state.json").write_text(json.dumps({"global_step": 2}))
    layout = convert(source, tmp_path / "out", world=2, ep=2)
    assert files(tmp_path / "out") == files(source)
    assert not not_converted(layout)


def test_accelerate_at_another_number_gets_what_is_for_all_ranks(tmp_path: Path) -> None:
    source = source_with(tmp_path, *SHARED, *OF_RANKS)
    layout = convert(source, tmp_path / "out", world=3)
    assert files(tmp_path / "out").keys() == {*SHARED, "scheduler.bin"}
    (note,) = not_converted(layout)
    assert "random_states_0.pkl, random_states_1.pkl" in note
    assert any("once per rank" in note for note in layout.notes)


def test_a_scheduler_that_cannot_be_read_is_copied(tmp_path: Path) -> None:
    source = source_with(tmp_path)
    torch.save({"last_epoch": 2, "odd": Hostile()}, source / "scheduler.bin")
    assert any("scheduler is left out" in note for note in read(source)[1].notes)
    layout = convert(source, tmp_path / "out", world=3)
    assert files(tmp_path / "out") == files(source)
    assert not any("left out" in note for note in layout.notes)


def test_a_scheduler_in_torchs_older_form_is_copied(tmp_path: Path) -> None:
    source = source_with(tmp_path)
    torch.save({"last_epoch": 2}, source / "scheduler.bin", _use_new_zipfile_serialization=False)
    assert any("scheduler is left out" in note for note in read(source)[1].notes)
    convert(source, tmp_path / "out", world=3)
    assert files(tmp_path / "out") == files(source)


@pytest.mark.parametrize("text", ['{"global_step": 2,', "[]"], ids=["cut short", "a list"])
def test_a_broken_trainer_state_is_named(text: str, tmp_path: Path) -> None:
    source = source_with(tmp_path)
    (source / "trainer_state.json").write_text(text)
    with pytest.raises(
        UnreadableError, match=r"trainer_state\.json (is damaged or no JSON|holds no JSON object)"
    ):
        read(source)


@pytest.mark.parametrize("options", [{"style": "plain"}, {"style": "transformers"}, {"weights_only": True}])
def test_another_framework_gets_none_of_it(options: dict[str, Any], tmp_path: Path) -> None:
    source = source_with(tmp_path, *OF_RANKS)
    layout = convert(source, tmp_path / "out", **options)
    assert not files(tmp_path / "out")
    assert not_converted(layout)


def test_a_torch_scheduler_from_elsewhere_has_the_names_of_both(tmp_path: Path) -> None:
    state = {"model": {"w": torch.ones(3)}, "lr_scheduler": {"last_epoch": 2}}
    dcp.save(state, checkpoint_id=tmp_path / "c", no_dist=True)
    convert(tmp_path / "c", tmp_path / "out", style="accelerate")
    assert files(tmp_path / "out").keys() == {"scheduler.bin", "scheduler.pt"}


def test_no_scheduler_is_said(tmp_path: Path) -> None:
    dcp.save({"model": {"w": torch.ones(3)}}, checkpoint_id=tmp_path / "c", no_dist=True)
    layout = convert(tmp_path / "c", tmp_path / "out", style="accelerate")
    assert any("without scheduler.pt the Trainer loads no optimizer" in note for note in layout.notes)
    layout = convert(tmp_path / "c", tmp_path / "veomni", style="veomni")
    assert any("no extra_state of VeOmni" in note for note in layout.notes)


def test_transformers_finds_a_config_beside_the_shards(tmp_path: Path) -> None:
    config = {"model_type": "mixtral", "quantization_config": {}}
    layout = convert(ACCELERATE, tmp_path / "with", style="transformers", config=config)
    written = json.loads(files(tmp_path / "with")["config.json"])
    assert (written["model_type"], written["dtype"]) == ("mixtral", "float32")
    assert "quantization_config" not in written
    assert not any("no config.json" in note for note in layout.notes)
    layout = convert(ACCELERATE, tmp_path / "without", style="transformers")
    assert any("no config.json" in note for note in layout.notes)


def test_with_and_without_a_config_are_equal(tmp_path: Path) -> None:
    """Only where there is a config are experts told apart, and routers called as they are published."""
    config = FIXTURES / "mixtral_accelerate_w2" / "config.json"
    done = ckpt_tool.api.convert(
        ACCELERATE, tmp_path / "out", to="dcp", style="transformers", config=config, verify=True
    )
    assert done.verdict is not None
    assert done.verdict.passed
    assert ckpt_tool.api.verify(tmp_path / "out", ACCELERATE).passed


# ---- VeOmni


@pytest.fixture
def veomni(tmp_path: Path) -> Path:
    convert(ACCELERATE, tmp_path / "plain", style="veomni", world=2)
    return source_with(tmp_path, *EXTRA, checkpoint=tmp_path / "plain")


def test_veomni_ranks_keep_their_extra_state(veomni: Path, tmp_path: Path) -> None:
    assert not_converted(convert(veomni, tmp_path / "other", style="plain"))
    layout = convert(veomni, tmp_path / "out", world=2, ep=2)
    assert files(tmp_path / "out") == files(veomni)
    assert not any("extra_state" in note for note in layout.notes)


def test_more_ranks_of_veomni_get_the_extra_state_of_others(veomni: Path, tmp_path: Path) -> None:
    layout = convert(veomni, tmp_path / "out", world=3)
    found = files(tmp_path / "out")
    assert list(found.values()) == [*files(veomni).values(), files(veomni)[EXTRA[0]]]
    assert any("rank r modulo 2" in note for note in layout.notes)


@pytest.mark.parametrize(
    ("missing", "match"), [(0, "none of rank 0"), (1, "2 ranks saved the tensors and 1 an extra_state")]
)
def test_an_extra_state_that_is_missing(missing: int, match: str, veomni: Path) -> None:
    (veomni / EXTRA[missing]).unlink()
    with pytest.raises(UnreadableError, match=match):
        read(veomni)


def test_veomni_has_the_groups_of_its_ep(veomni: Path, tmp_path: Path) -> None:
    """Without EP one optimizer with numbered groups, with EP two, flattened, and another grid."""
    convert(veomni, tmp_path / "ep", world=4, ep=2)
    convert(tmp_path / "ep", tmp_path / "back", world=2, ep=1)
    schemes = {name: read(tmp_path / name)[1].layout_hint.scheme for name in ("c", "ep", "back")}
    assert {name: (scheme.style, scheme.flat) for name, scheme in schemes.items()} == {
        "c": ("veomni", False),
        "ep": ("veomni", True),
        "back": ("veomni", False),
    }
    checkpoint = read(tmp_path / "ep")[1]
    assert (checkpoint.topology.world_size, checkpoint.topology.ep_size) == (4, 2)
    held = checkpoint.layout_hint.entries["model.model.layers.0.mlp.experts.gate_up_proj"]
    assert {part.offsets[1] for part in held.parts} == {0, held.tensor.shape[1] // 2}
