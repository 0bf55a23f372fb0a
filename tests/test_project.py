"""What the documents promise of the project itself: no unsafe calls, changelog, links, one version."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import ckpt_tool
from tests.conftest import ROOT

SOURCES = sorted((ROOT / "ckpt_tool").rglob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("*/README.md"))]
KINDS = {"added", "changed", "fixed", "removed"}


def calls(path: Path) -> list[str]:
    """The dotted names that a module calls."""
    return [
        ast.unparse(node.func)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    ]


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_the_package_neither_runs_pickles_nor_asserts_input(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not {"pickle.load", "pickle.loads", "torch.load", "eval", "exec"} & set(calls(path))
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert "weights_only=False" not in path.read_text()


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_within_the_project_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", text):
        linked = (page.parent / target) if target else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", linked.read_text(), flags=re.MULTILINE)
            assert anchor in {
                re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles
            }


def test_every_guarantee_names_a_test_that_exists() -> None:
    """Paragraphs that begin with a word in bold are promises."""
    text = (ROOT / "docs" / "guarantees.md").read_text()
    files = {path.name for path in (ROOT / "tests").rglob("*.py")}
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for paragraph in text.split("\n\n"):
        named = re.findall(r"test_\w+(?:\.py)?|tests\.faults\.\w+", paragraph)
        if paragraph.startswith("**"):
            assert named, paragraph[:60]
        for name in named:
            known = name in files or f"{name}.py" in files or f"def {name}(" in sources
            assert known or f"{name.rpartition('.')[2]}.py" in files, name


def test_each_changelog_fragment_has_a_known_kind() -> None:
    for path in (ROOT / "docs" / "changes").iterdir():
        if path.name != "README.md":
            assert path.name.split(".")[1:] == [path.name.split(".")[1], "md"], path.name
            assert path.name.split(".")[1] in KINDS, path.name


def test_one_version_everywhere() -> None:
    stated = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert stated is not None
    assert stated[1] == ckpt_tool.__version__
