"""Objects and options of parameter groups: carried as they are, or refused by name."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from ckpt_tool import api
from ckpt_tool.errors import MismatchError, UnreadableError
from ckpt_tool.formats.dcp import contents

from .dcp_tools import read
from .test_dcp_like import loaded

W = torch.arange(32.0).reshape(8, 4)


def save(path: Path, options: dict[str, Any] | None = None, **beside: Any) -> Path:
    state: dict[str, Any] = {"model": {"w": W}, **beside}
    if options is not None:
        momentum = {"w": {"momentum_buffer": W + 1}}
        state["optimizer"] = {"state": momentum, "param_groups": [{**options, "params": ["w"]}]}
    dcp.save(state, checkpoint_id=path, no_dist=True)
    return path


@pytest.mark.parametrize(
    "options",
    [
        {"lr": torch.tensor(0.25), "momentum": 0.9, "dampening": 0, "nesterov": True},
        {"lr": 0.1, "name": "decay", "moe": 1},
        {"lr": 0.1, "sched": {"a": 1, "b": [2]}, "ratios": [(1, 2), (3, 4)]},
    ],
    ids=["sgd", "names of DeepSpeed's", "not plain"],
)
def test_options_of_groups_are_carried_as_they_are(options: dict[str, Any], tmp_path: Path) -> None:
    source = save(tmp_path / "source", options)
    api.reshard(source, tmp_path / "out", world=2, verify=True)
    expected, found = (loaded(path)["optimizer"]["param_groups"] for path in (source, tmp_path / "out"))
    assert found == expected
    assert {key: type(value) for key, value in found[0].items()} == {
        key: type(value) for key, value in expected[0].items()
    }
    (group,) = read(tmp_path / "out")[1].training.param_groups
    assert group.parameters == ("w",)


def test_stream_of_tensors_is_copied(tmp_path: Path) -> None:
    """Transformer Engine keeps such in each module's ``_extra_state``."""
    stream = io.BytesIO()
    torch.save({"scale": torch.ones(3), "recipe": "x"}, stream)
    source = save(tmp_path / "source", extra=stream)
    api.reshard(source, tmp_path / "out", world=2, verify=True)
    copied = loaded(tmp_path / "out")["extra"]
    copied.seek(0)
    assert torch.equal(torch.load(copied)["scale"], torch.ones(3))


def test_large_object_is_copied_and_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "_LARGEST_OBJECT", 1 << 12)
    source = save(tmp_path / "source", data={"seen": bytes(range(256)) * 64})
    api.reshard(source, tmp_path / "out", world=2)
    assert loaded(tmp_path / "out")["data"] == loaded(source)["data"]
    assert any("not read" in note and "data" in note for note in read(source)[1].notes)


def test_large_object_that_is_needed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "_LARGEST_OBJECT", 1 << 12)
    with pytest.raises(UnreadableError, match=r"optimizer\.param_groups\.0\.ids"):
        read(save(tmp_path / "source", {"lr": 0.1, "ids": "x" * (1 << 13)}))


def test_object_that_unfolds_without_end(tmp_path: Path) -> None:
    bomb: Any = (1,)
    for _ in range(24):
        bomb = (bomb, bomb)
    with pytest.raises(UnreadableError, match="names the same objects again and again"):
        read(save(tmp_path / "source", extra=bomb))


def test_object_that_holds_itself(tmp_path: Path) -> None:
    loop: list[Any] = []
    loop.append(loop)
    stored = tmp_path / "source"
    save(stored, extra=5)
    _replace_object(stored, "extra", loop)
    with pytest.raises(UnreadableError, match="part of itself"):
        read(stored)


def test_object_nested_very_deeply(tmp_path: Path) -> None:
    deep: list[Any] = []
    for _ in range(300):
        deep = [deep]
    stored = tmp_path / "source"
    save(stored, extra=5)
    _replace_object(stored, "extra", deep)
    with pytest.raises(UnreadableError, match="nested more than 100 deep"):
        read(stored)


def _replace_object(path: Path, key: str, value: Any) -> None:
    torch.save(value, path / "other.distcp")
    metadata = pickle.loads((path / ".metadata").read_bytes())
    info = next(info for index, info in metadata.storage_data.items() if index.fqn == key)
    info.relative_path, info.offset = "other.distcp", 0
    info.length = (path / "other.distcp").stat().st_size
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


# ---- saves of ranks each for itself


def _rank_local(path: Path, ranks: list[dict[str, Any]]) -> Path:
    for rank, state in enumerate(ranks):
        dcp.save({"w": W, **state}, checkpoint_id=path / str(rank), no_dist=True)
        metadata = pickle.loads((path / str(rank) / ".metadata").read_bytes())
        for info in metadata.storage_data.values():
            info.relative_path = f"__{rank}_0.distcp"
        (path / f"__{rank}.metadata").write_bytes(pickle.dumps(metadata))
        (path / str(rank) / "__0_0.distcp").rename(path / f"__{rank}_0.distcp")
        (path / str(rank) / ".metadata").unlink()
        (path / str(rank)).rmdir()
    return path


def test_metadata_of_a_rank_missing(tmp_path: Path) -> None:
    path = _rank_local(tmp_path, [{}, {}])
    (path / "__0.metadata").unlink()
    with pytest.raises(UnreadableError, match=r"__0\.metadata is missing"):
        read(path)


def test_objects_that_differ_by_rank_are_named(tmp_path: Path) -> None:
    _, checkpoint = read(_rank_local(tmp_path, [{"seed": 1, "same": 2}, {"seed": 9, "same": 2}]))
    assert [note for note in checkpoint.notes if "differs by rank" in note] == [
        "seed differs by rank; that of the first rank is taken."
    ]


def test_options_of_groups_that_differ_by_rank_are_refused(tmp_path: Path) -> None:
    def state(lr: float) -> dict[str, Any]:
        return {"optimizer": {"state": {}, "param_groups": [{"lr": lr, "params": ["w"]}]}}

    with pytest.raises(MismatchError, match=r"param_groups\.0\.lr differs between"):
        read(_rank_local(tmp_path, [state(0.1), state(0.2)]))
