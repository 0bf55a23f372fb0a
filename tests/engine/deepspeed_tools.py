"""What the tests against DeepSpeed share: its fixtures, its files, its converter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.engine.deepspeed_run import RunSpec, spec_from_dict

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "deepspeed"

# ds_to_universal's own command line, for many checkpoints in one interpreter
_DS_TO_UNIVERSAL = """
import json, sys
from deepspeed.checkpoint import ds_to_universal
options, jobs = json.load(sys.stdin)
for source, target in jobs:
    sys.argv = ["ds_to_universal", "--input_folder", source, "--output_folder", target]
    sys.argv += ["--num_extract_workers", "1", "--num_merge_workers", "1", *options]
    ds_to_universal.main(ds_to_universal.parse_arguments())
"""


def fixture_spec(name: str) -> RunSpec:
    """The run that made a fixture."""
    return spec_from_dict(json.loads((FIXTURES / name / "made_with.json").read_text())["spec"])


def zero3_fixtures() -> list[str]:
    names = sorted(path.parent.name for path in FIXTURES.glob("*/made_with.json"))
    return [name for name in names if fixture_spec(name).zero_stage == 3]


def facts(name: str) -> dict[str, Any]:
    """What the engine said when a fixture was made: losses before and after the save."""
    found: dict[str, Any] = json.loads((FIXTURES / name / "oracle" / "oracle.json").read_text())
    return found


def read(path: Path) -> Any:
    import torch

    return torch.load(path, weights_only=True)


def tensor_in(path: Path) -> Any:
    """The tensor of a parameter's file in a Universal checkpoint: bare, or in a dict."""
    content = read(path)
    return content["param"] if isinstance(content, dict) else content


def same_bits(a: Any, b: Any) -> bool:
    import torch

    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    one, other = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    return bool(torch.equal(one, other))


def ds_to_universal(jobs: list[tuple[Path, Path]], *options: str) -> None:
    """DeepSpeed's own converter, once for all: (tag directory, new directory)."""
    child = subprocess.run(
        [sys.executable, "-c", _DS_TO_UNIVERSAL],
        input=json.dumps([options, [[str(source), str(target)] for source, target in jobs]]),
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert child.returncode == 0, child.stderr[-3000:]
