"""docs/architecture.md follows two tensors through the code: its functions are called in that order."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ckpt_tool

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(ckpt_tool.__file__).parent
FIXTURES = ROOT / "fixtures"


def ways() -> list[list[tuple[str, list[str]]]]:
    """Of each way, the modules in their order, each with its functions."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    section = page.partition("## Two ways through the code\n")[2].partition("\n## ")[0]
    found: list[list[tuple[str, list[str]]]] = []
    for number, module, functions in re.findall(
        r"^(\d+)\. `([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", section, re.M
    ):
        if number == "1":
            found.append([])
        found[-1].append((module, re.findall(r"`([\w.]+)`", functions)))
    return found


def reshard(target: Path) -> None:
    ckpt_tool.reshard(FIXTURES / "deepspeed" / "mixtral_w4e2" / "checkpoint", target, world=2, ep=1)


def publish(target: Path) -> None:
    source = FIXTURES / "dcp" / "mixtral_accelerate_w2"
    ckpt_tool.convert(source / "checkpoint", target, to="hf", config=source)


def first_calls(run: Callable[[], None]) -> list[tuple[str, str]]:
    """The package's functions in the order in which they are first called, in any thread."""
    seen: dict[tuple[str, str], None] = {}
    package = f"{PACKAGE}/"

    def watch(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(package):
            seen.setdefault((code.co_filename.removeprefix(package), code.co_qualname))

    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return list(seen)


@pytest.mark.parametrize(("number", "run"), [(0, reshard), (1, publish)])
def test_way_through_the_code_is_the_one_the_page_tells(
    number: int, run: Callable[[Path], None], tmp_path: Path
) -> None:
    way = ways()[number]
    called = first_calls(lambda: run(tmp_path / "target"))
    told = [(module, function) for module, functions in way for function in functions]
    assert 8 <= len(told) <= 12
    assert set(told) <= set(called)
    modules = [module for module, _ in way]
    assert len(set(modules)) == len(modules), "a room is entered twice"
    places = [called.index(one) for one in told if one != ("storage.py", "LocalWriter.write")]
    assert places == sorted(places), told
