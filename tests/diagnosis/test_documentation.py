"""docs/doctor.md and the code name the same checks, and each of them has a test that names it, too."""

from __future__ import annotations

import re

from tests.conftest import ROOT

PAGE = ROOT / "docs" / "doctor.md"
SOURCES = sorted((ROOT / "ckpt_tool" / "diagnosis").glob("*.py"))
TESTS = [
    *(ROOT / "tests" / "diagnosis").glob("test_*.py"),
    *(ROOT / "tests" / "engine").glob("test_doctor.py"),
]


def in_code() -> set[str]:
    text = "\n".join(path.read_text() for path in SOURCES)
    named = re.findall(r"(?:\bfound|\bFinding)\(\s*\"(\w+)\"", text)
    return {*named, *re.findall(r"Error: \"(\w+)\"", text), *re.findall(r"kind or \"(\w+)\"", text)}


def documented() -> dict[str, set[str]]:
    rows = re.findall(r"^\| `(\w+)` \| ([\w, ]+) \|", PAGE.read_text(), re.MULTILINE)
    return {check: set(severities.split(", ")) for check, severities in rows}


def test_the_page_names_every_check_and_no_other() -> None:
    assert set(documented()) == in_code()
    assert set.union(*documented().values()) == {"error", "warning", "info"}


def test_every_check_has_a_test_that_names_it() -> None:
    text = "\n".join(path.read_text() for path in TESTS if path.name != "test_documentation.py")
    assert {check for check in in_code() if f'"{check}"' not in text} == set()
