"""Every fixture in every format it can be converted to: the bytes of the results, as hashes kept in a file.

A change of structure leaves every hash as it is. A change that is meant to alter bytes makes them anew, and
the difference is part of its commit: ``python -m tests.test_golden_outputs``.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from ckpt_tool import api
from ckpt_tool.errors import CkptToolError
from ckpt_tool.manifest import MANIFEST
from tests.conftest import ROOT, tree

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).with_suffix(".json")
FIXTURES = sorted(path.parent for path in (ROOT / "fixtures").glob("*/*/made_with.json"))
STYLES = ("plain", "torchtitan", "accelerate", "transformers", "veomni")


def conversions(fixture: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A name for each conversion of a fixture, and what ``api.convert`` is to be given."""
    config = fixture / "config.json"
    given = {"config": config} if config.exists() else {}
    for topology in ({}, {"world": 1, "ep": 1}, {"world": 6, "ep": 2}, {"world": 2}):
        name = "_".join(f"{key}{value}" for key, value in topology.items()) or "same"
        yield f"own_{name}", {"to": None, **topology}
        yield f"dcp_{name}", {"to": "dcp", **given, **topology}
        for stage in (1, 2, 3) if fixture.parent.name == "deepspeed" else ():
            yield f"zero{stage}_{name}", {"to": f"zero{stage}", **given, **topology}
    for style in STYLES:
        yield f"dcp_{style}", {"to": "dcp", "style": style, "world": 4, "ep": 2, **given}
    yield "dcp_bf16_weights", {"to": "dcp", "dtype": "bf16", "weights_only": True, **given}
    yield "universal", {"to": "universal", **given}
    yield "universal_groups", {"to": "universal", "keep_groups": True, **given}
    for layout in ("hub", "fused"):
        for dtype in ("fp32", "bf16", None):
            parameters = {"to": "hf", "hf_layout": layout, "dtype": dtype, "max_shard_bytes": 60_000}
            yield f"hf_{layout}_{dtype}", {**parameters, **given}


def outcome(fixture: Path, parameters: Mapping[str, Any], workers: int = 1, budget: int = 1 << 30) -> str:
    """A hash over the names and bytes of all files but the manifest, or that it was refused."""
    with tempfile.TemporaryDirectory() as place:
        target = Path(place) / "result"
        try:
            how = api.Execution(max_memory=budget, fsync=False, workers=workers)
            api.convert(next(iter(_source(fixture))), target, how=how, **parameters)
        except CkptToolError as error:
            return f"refused: {type(error).__name__}"
        digest = hashlib.sha256()
        for path, data in tree(target).items():
            if path != MANIFEST:
                digest.update(f"{path}\0{len(data)}\0".encode() + data)
        return digest.hexdigest()[:32]


def _source(fixture: Path) -> Iterator[Path]:
    yield from (path for path in (fixture / "checkpoint", *fixture.glob("step-*")) if path.exists())


def outcomes(fixture: Path) -> dict[str, str]:
    return {name: outcome(fixture, parameters) for name, parameters in conversions(fixture)}


@pytest.mark.parametrize("fixture", FIXTURES, ids=[path.name for path in FIXTURES])
def test_the_same_bytes_as_ever(fixture: Path) -> None:
    assert outcomes(fixture) == json.loads(GOLDEN.read_text())[fixture.name]


@pytest.mark.parametrize(
    "name", ["own_world2", "dcp_world6_ep2", "universal", "zero1_same", "hf_fused_bf16"]
)
def test_workers_and_budget_change_no_byte(name: str) -> None:
    fixture = next(path for path in FIXTURES if path.name == "mixtral_w4e2")
    parameters = dict(conversions(fixture))[name]
    expected = json.loads(GOLDEN.read_text())[fixture.name][name]
    assert {outcome(fixture, parameters, workers, 1 << 20) for workers in (2, 7)} == {expected}


if __name__ == "__main__":
    made = {fixture.name: outcomes(fixture) for fixture in FIXTURES}
    GOLDEN.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")
    sys.stdout.write(f"{sum(map(len, made.values()))} results\n")
