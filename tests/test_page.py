"""The page: what is on it, that names on it are text, and that it replaces no other file."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ckpt_tool import api
from ckpt_tool.errors import UsageError
from ckpt_tool.page import rendered
from ckpt_tool.page.data import COPY, NON_FINITE, UNTOUCHED
from tests.conftest import checkpoint_of, config_of, run_cli

MIXTRAL = checkpoint_of("mixtral_w4e2")


def data_of(file: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', file.read_text(), re.S)
    assert found is not None
    return dict(json.loads(found[1]))


def published(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    from safetensors.torch import load_file

    api.consolidate(MIXTRAL, tmp_path / "model", config=config_of("mixtral_w4e2"))
    (tmp_path / "model" / "ckpt_tool_manifest.json").unlink()
    return tmp_path / "model", load_file(tmp_path / "model" / "model.safetensors")


def test_the_page_has_experts_bytes_and_tensors_from_metadata_alone(tmp_path: Path) -> None:
    done = run_cli("inspect", MIXTRAL, "--html", tmp_path / "page.html")
    assert (done.rc, done.stderr) == (0, "")
    data = data_of(tmp_path / "page.html")
    assert data["experts"] == {"layers": [0, 1], "count": 4, "rank": [[0, 0, 1, 1]] * 2}
    assert sum(size for _, size in data["bytes"]["state"]) == 139860
    assert [row[0] for row in data["tensors"]][:2] == ["model.embed_tokens.weight"] * 2 or data["tensors"]
    assert len(data["tensors"]) == 69
    assert (data["stats"], data["doctor"]) == (False, None)


def test_statistics_are_torchs(tmp_path: Path) -> None:
    model, held = published(tmp_path)
    api.page(model, tmp_path / "page.html", stats=True)
    data = data_of(tmp_path / "page.html")
    for layer, norms in zip(data["experts"]["layers"], data["experts"]["norm"], strict=True):
        for expert, norm in enumerate(norms):
            prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}."
            mine = [tensor.double().flatten() for name, tensor in held.items() if name.startswith(prefix)]
            assert norm == pytest.approx(float(torch.cat(mine).norm()), rel=1e-4)
    assert data["experts"]["flags"] == [[0] * 4] * 2
    assert data["doctor"]["healthy"]


def test_an_overwritten_expert_and_one_with_nan_stand_out(tmp_path: Path) -> None:
    model, held = published(tmp_path)
    for weight in ("w1", "w2", "w3"):
        prefix = "model.layers.1.block_sparse_moe.experts"
        held[f"{prefix}.3.{weight}.weight"] = held[f"{prefix}.0.{weight}.weight"].clone()
    held["model.layers.0.block_sparse_moe.experts.2.w2.weight"][0, 0] = float("nan")
    save_file(held, model / "model.safetensors", {"format": "pt"})
    api.page(model, tmp_path / "page.html", stats=True)
    experts = data_of(tmp_path / "page.html")["experts"]
    assert experts["flags"] == [[0, 0, NON_FINITE, 0], [COPY, 0, 0, COPY]]
    assert experts["copies"] == [[[1, 0], [1, 3]]]


def test_an_expert_that_was_never_trained_stands_out(tmp_path: Path) -> None:
    api.convert(checkpoint_of("mixtral_z2_w4e2"), tmp_path / "universal", to="universal")
    for file in tmp_path.glob("universal/*/zero/model.layers.0.mlp.experts.w*/exp_avg*.pt"):
        saved = torch.load(file, weights_only=True)
        saved["param"][1] = 0
        torch.save(saved, file)
    (tmp_path / "universal" / "ckpt_tool_manifest.json").unlink()
    api.page(tmp_path / "universal", tmp_path / "page.html", stats=True)
    flags = data_of(tmp_path / "page.html")["experts"]["flags"]
    assert flags == [[0, UNTOUCHED, 0, 0, 0, 0], [0] * 6]


def test_names_that_are_html_are_text(tmp_path: Path) -> None:
    name = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028"
    save_file({name: torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    api.page(tmp_path, tmp_path / "page.html")
    assert "alert" in (tmp_path / "page.html").read_text()
    assert "<script>alert" not in (tmp_path / "page.html").read_text()
    assert "<img" not in (tmp_path / "page.html").read_text()
    assert data_of(tmp_path / "page.html")["tensors"][0][0].startswith("</script>")


def test_the_page_fetches_nothing_and_is_small() -> None:
    page = rendered({})
    assert len(page) < 300_000
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|src=|@import|url\(", page)


def test_an_earlier_page_is_replaced_and_another_file_is_not(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    api.page(MIXTRAL, page)
    before = page.stat().st_ino
    api.page(MIXTRAL, page, stats=True)
    assert page.stat().st_ino != before
    (tmp_path / "thesis.html").write_text("dear diary")
    shutil.copytree(MIXTRAL, tmp_path / "run")
    for other in (tmp_path / "thesis.html", tmp_path / "run", tmp_path / "run" / "latest"):
        with pytest.raises(UsageError, match="no HTML page"):
            api.page(MIXTRAL, other)
    assert (tmp_path / "thesis.html").read_text() == "dear diary"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "run", "thesis.html"]


def test_a_page_where_none_can_be_written_is_told(tmp_path: Path) -> None:
    done = run_cli("inspect", MIXTRAL, "--html", tmp_path / "no" / "page.html")
    assert done.rc == 2
    assert str(tmp_path / "no" / "page.html") in done.stderr
    assert "Traceback" not in done.stderr


def test_statistics_without_a_page_are_told_what_shows_them() -> None:
    done = run_cli("inspect", MIXTRAL, "--stats")
    assert done.rc == 2
    assert "doctor" in done.stderr
