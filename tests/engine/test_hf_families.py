"""Every MoE family of two releases of transformers: saved by it, read, written in both forms, loaded."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ckpt_tool.families import families
from tests.engine.environments import python_with
from tests.engine.hf_models import MODELS, NEWER_ONLY, NOT_BUILT
from tests.engine.processes import failure, run_child

pytestmark = pytest.mark.engine

INSTALLED, NEWER = importlib.metadata.version("transformers"), "5.24.0"
RUNS = [(INSTALLED, name) for name in MODELS if name not in NEWER_ONLY] + [(NEWER, name) for name in MODELS]


@dataclass(frozen=True)
class Results:
    families: dict[str, dict[str, Any]]
    without_family: list[str]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    """Both releases side by side, all families of one in a child that imports transformers once."""
    pythons = {
        INSTALLED: sys.executable,
        NEWER: str(python_with(f"transformers=={NEWER}", "scipy==1.15.3")),
    }
    directories = {release: tmp_path_factory.mktemp("hf") for release in pythons}
    with ThreadPoolExecutor() as pool:
        found = pool.map(_run, pythons.values(), directories.values())
        return dict(zip(pythons, found, strict=True))


def _run(python: str, directory: Path) -> Results:
    log = directory / "log"
    status = run_child(
        "tests.engine.hf_families_run", [str(directory), *MODELS], log, timeout=900, python=python
    )
    said = log.read_text()
    if status != 0:
        raise failure("transformers", status, said)
    lines = dict(line.split(" ", 1) for line in said.splitlines() if line.startswith("WITHOUT_FAMILY "))
    rows = [json.loads(line[7:]) for line in said.splitlines() if line.startswith("RESULT ")]
    return Results({row["name"]: row for row in rows}, json.loads(lines["WITHOUT_FAMILY"]))


@pytest.mark.parametrize(("release", "name"), RUNS)
def test_family_survives_both_forms(release: str, name: str, results: dict[str, Results]) -> None:
    result = results[release].families[name]
    assert not result["skipped"], f"transformers {release} cannot build {name}"
    assert result["error"] is None, result["error"]


@pytest.mark.parametrize(("release", "expected"), [(INSTALLED, set(NEWER_ONLY)), (NEWER, set())])
def test_what_a_release_has_is_run_with_it(
    release: str, expected: set[str], results: dict[str, Results]
) -> None:
    skipped = {name for name, row in results[release].families.items() if row["skipped"]}
    assert skipped == expected
    assert results[release].without_family == []


def test_every_model_type_of_the_tables_is_run() -> None:
    types = {model_type for family in families() for model_type in family.model_types}
    assert types - set(MODELS) == set(NOT_BUILT)
