"""docs/architecture.md says who may import whom and which folders there are; the code is held to it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "ckpt_tool"
PAGE = ROOT / "docs" / "architecture.md"
MODULES = sorted(PACKAGE.rglob("*.py"))
# The package's face, which imports what it shows, and what runs it.
ENTRANCES = {"__init__", "__main__"}


def block(heading: str) -> list[str]:
    """The lines of the indented block that follows a line of the page."""
    lines = iter(PAGE.read_text().splitlines())
    for line in lines:
        if line.startswith(heading):
            break
    found: list[str] = []
    for line in lines:
        if line.startswith("    "):
            found.append(line.strip())
        elif found and line:
            break
    return found


def floors() -> dict[str, int]:
    """Each module or folder of the package with the number of its line, from the top."""
    lines = block("Who may import whom")
    return {name.rstrip("/"): number for number, line in enumerate(lines) for name in line.split()}


def place(module: str) -> str:
    """``ckpt_tool.formats.dcp.reading`` -> ``formats``."""
    return module.split(".")[1]


def imported(path: Path) -> Iterator[str]:
    """The modules of the package that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "ckpt_tool":
                yield from (f"ckpt_tool.{name.name}" for name in node.names if name.name != "__version__")
            elif node.module.startswith("ckpt_tool."):
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith("ckpt_tool."))


def own_place(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


@pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(PACKAGE)) for path in MODULES])
def test_nothing_imports_upward(path: Path) -> None:
    own = own_place(path)
    if own in ENTRANCES:
        return
    levels = floors()
    upward = {
        module for module in imported(path) if place(module) != own and levels[place(module)] <= levels[own]
    }
    assert not upward


def test_every_module_and_folder_is_on_the_page() -> None:
    assert set(floors()) == {own_place(path) for path in MODULES} - ENTRANCES


def test_every_folder_of_the_package_says_what_it_is_for() -> None:
    silent = [
        path
        for path in PACKAGE.rglob("__init__.py")
        if not ast.get_docstring(ast.parse(path.read_text())) and path.stat().st_size
    ]
    assert not silent
