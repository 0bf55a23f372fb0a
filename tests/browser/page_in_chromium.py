"""The page in a real headless Chromium; run by hand, as CI has none:

    python -m pytest tests/browser/page_in_chromium.py

What the page's script did is told by a script that is added to a copy of the page.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ckpt_tool import api
from tests.conftest import checkpoint_of, config_of

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or "chromium"
# A cell's middle on the canvas, in the page's own coordinates.
PROBE = """
<script>
const probe = (() => {
  const shown = {}, canvas = document.querySelector("canvas"), ink = canvas.getContext("2d");
  const [w, h] = sizes(), scale = devicePixelRatio || 1;
  const pixel = (row, expert) => [...ink.getImageData((LEFT + (expert + .2) * w) * scale,
      (TOP + (row + .2) * h) * scale, 1, 1).data].slice(0, 3);
  shown.pixels = experts.layers.map((_, row) => experts.rank[row].map((_, expert) => pixel(row, expert)));
  const resolved = document.createElement("i");
  document.body.append(resolved);
  resolved.style.color = color("copy");
  shown.copy = getComputedStyle(resolved).color.match(/\\d+/g).map(Number);
  canvas.focus();
  canvas.dispatchEvent(new KeyboardEvent("keydown", {key: "n"}));
  shown.told = document.querySelector("output").textContent;
  canvas.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
  shown.moved = document.querySelector("output").textContent;
  const search = document.querySelector("input");
  search.value = "*.norm.weight"; search.oninput();
  shown.rows = [...document.querySelectorAll("tbody tr")].map((row) => row.cells[0].textContent);
  shown.modes = [...document.querySelectorAll("[data-mode]")].map((one) => one.textContent);
  shown.legend = document.querySelector(".legend").textContent;
  shown.overflow = document.documentElement.scrollWidth > innerWidth;
  return shown;
})();
document.body.dataset.probe = JSON.stringify(probe);
</script>
"""


def opened(page: Path, *options: str) -> dict[str, Any]:
    """What the page shows in a browser."""
    copy = page.with_suffix(".probed.html")
    copy.write_text(page.read_text().replace("</body>", f"{PROBE}</body>"))
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", *options, "--dump-dom"]
    shown = subprocess.run(
        [*command, copy.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = re.search(r'data-probe="([^"]*)"', shown.stdout)
    assert found is not None, shown.stdout[-2000:]
    return dict(json.loads(found[1].replace("&quot;", '"').replace("&amp;", "&")))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of a sound model, and of one in which an expert was overwritten by another."""
    folder = tmp_path_factory.mktemp("pages")
    name = "mixtral_w4e2"
    api.consolidate(checkpoint_of(name), folder / "model", config=config_of(name))
    (folder / "model" / "ckpt_tool_manifest.json").unlink()
    api.page(checkpoint_of(name), folder / "sound.html", stats=True)
    file = folder / "model" / "model.safetensors"
    held = load_file(file)
    for weight in ("w1", "w2", "w3"):
        prefix = "model.layers.1.block_sparse_moe.experts"
        held[f"{prefix}.3.{weight}.weight"] = held[f"{prefix}.0.{weight}.weight"].clone()
    save_file(held, file, {"format": "pt"})
    api.page(folder / "model", folder / "overwritten.html", stats=True)
    return {path.stem: path for path in folder.glob("*.html")}


@pytest.mark.parametrize("scheme", [0, 1])  # dark, light
def test_an_overwritten_expert_is_visibly_marked(scheme: int, pages: dict[str, Path]) -> None:
    shown = opened(pages["overwritten"], f"--blink-settings=preferredColorScheme={scheme}")
    marked = [
        (row, expert)
        for row, line in enumerate(shown["pixels"])
        for expert, pixel in enumerate(line)
        if max(abs(a - b) for a, b in zip(pixel, shown["copy"], strict=True)) < 8
    ]
    assert marked == [(1, 0), (1, 3)]
    assert "copies of each other: 2" in shown["legend"]
    assert shown["told"].startswith("Layer 1, expert 0: ")
    assert "bit for bit equal to layer 1 expert 3" in shown["told"]
    assert shown["moved"].startswith("Layer 1, expert 1")


def test_a_sound_checkpoint_shows_ranks_and_nothing_that_stands_out(pages: dict[str, Path]) -> None:
    shown = opened(pages["sound"])
    for line in shown["pixels"]:
        assert line[0] == line[1] != line[2] == line[3]
    assert "No expert stands out" in shown["legend"]
    assert shown["modes"] == ["EP rank", "Norm", "Update size"]


def test_the_table_is_searched_by_globs(pages: dict[str, Path]) -> None:
    assert set(opened(pages["sound"])["rows"]) == {"model.norm.weight"}


@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_cut_off_on_a_narrow_screen(width: int, pages: dict[str, Path]) -> None:
    assert not opened(pages["sound"], f"--window-size={width},900")["overflow"]
