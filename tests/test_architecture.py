"""docs/architecture.md says who may import whom and which folders there are; the code is held to it."""

from __future__ import annotations

import ast
import re
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


# ---- formats are known in their folders alone

# What every conversion goes through, whatever the formats.
COMMON = ("api.py", "conversion.py", "cli.py", "cli_options.py", "plan.py", "commit.py")
FOLDERS = {path.name for path in (PACKAGE / "formats").iterdir() if path.is_dir()} - {"__pycache__"}
OF_FORMATS = re.compile(
    "|".join({*FOLDERS, "universal", "zero_?[0-3]", "torch-", "hugging", "safetensors"}), re.IGNORECASE
)
# Options that the typed API names, and words of the commands' help.
ALLOWED = {"hf_layout"}


def knowledge(source: str) -> set[str]:
    """Imports, names and strings that speak of a format; docstrings may."""
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            found.add(node.value)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.ImportFrom):
            found.update((node.module or "", *(name.name for name in node.names)))
    return {word for word in found - ALLOWED if OF_FORMATS.search(word)}


@pytest.mark.parametrize("name", COMMON)
def test_what_all_formats_share_knows_none(name: str) -> None:
    assert knowledge((PACKAGE / name).read_text()) == set()


@pytest.mark.parametrize(
    "source",
    [
        'if to == "dcp": pass',
        "_DEEPSPEED = 1",
        "from ckpt_tool.formats.hf.files import x",
        "def f(zero3): pass",
    ],
)
def test_knowledge_of_a_format_is_found(source: str) -> None:
    assert knowledge(source)
