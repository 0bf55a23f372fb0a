"""Every MoE family of the installed transformers: saved by it, read, written in both forms, loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.hf_models import MODELS

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All families in one child, which imports transformers once."""
    command = [sys.executable, "-m", "tests.engine.hf_families_run", str(tmp_path_factory.mktemp("hf"))]
    done = subprocess.run([*command, *MODELS], cwd=ROOT, capture_output=True, text=True, timeout=900)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(lines) == len(MODELS), done.stderr[-3000:]
    return {found["name"]: found for found in (json.loads(line[7:]) for line in lines)}


@pytest.mark.parametrize("name", MODELS)
def test_family_survives_both_forms(name: str, results: dict[str, dict[str, Any]]) -> None:
    assert not results[name]["skipped"], f"the installed transformers has no {name}"
    assert results[name]["error"] is None, results[name]["error"]
