"""What a conversion says of itself: the ranks, what was kept, and the line that loads the result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ckpt_tool import api, results
from ckpt_tool.canonical import Topology
from tests.conftest import Runner, checkpoint_of, config_of
from tests.formats.dcp_tools import CHECKPOINTS as DCP_CHECKPOINTS

MIXTRAL = checkpoint_of("mixtral_w4e2")
SMALL = ("--no-fsync", "--workers", "1")


def said(run: Runner, *args: str | Path) -> dict[str, str]:
    """The fields of a result."""
    done = run(*args)
    assert done.rc == 0, done.stderr
    return {line[:10].strip(): line[10:].strip() for line in done.stdout.splitlines()[1:]}


def test_resharding_says_what_became_of_the_ranks(run: Runner, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = said(run, "reshard", MIXTRAL, out, "--ep", "1", "--world", "2", *SMALL)
    assert found["topology"] == "world 4, EP 2 -> world 2, EP 1"
    assert found["load it"] == f'engine.load_checkpoint("{out}")'
    assert found["verified"] == "no: --verify compares the result with the source"
    assert found["time"].endswith("B/s")
    assert found["kept"].count("of") == 3
    assert api.catalogue(out).topology.world_size == 2


def test_resharding_to_the_same_ranks_says_that_nothing_changes(run: Runner, tmp_path: Path) -> None:
    done = run("reshard", MIXTRAL, tmp_path / "out", *SMALL)
    assert "note: Nothing changes" in done.stderr
    assert "world 4, EP 2, as it was" in done.stdout
    done = run("reshard", MIXTRAL, tmp_path / "less", "--weights-only", *SMALL)
    assert "Nothing changes" not in done.stderr


def test_a_plan_has_ranks_files_disk_and_time(run: Runner, tmp_path: Path) -> None:
    found = said(run, "convert", MIXTRAL, tmp_path / "out", "--to", "universal", "--dry-run")
    assert found["topology"] == "world 4, EP 2 -> no ranks"
    assert {"files", "disk", "time", "load it"} <= set(found)
    assert '"load_universal": true' in found["load it"]


def test_what_a_published_model_keeps_is_its_values(run: Runner, tmp_path: Path) -> None:
    done = run(
        "consolidate",
        MIXTRAL,
        tmp_path / "out",
        "--config",
        config_of("mixtral_w4e2"),
        "--dry-run",
        "--json",
    )
    found = json.loads(done.stdout)
    assert list(found["kept"]) == ["master"]
    assert found["topology"] == {"source": {"world_size": 4, "ep_size": 2}, "target": None}
    assert found["load_with"] == f'transformers.MixtralForCausalLM.from_pretrained("{tmp_path / "out"}")'


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("mixtral_accelerate_w2", ["--style", "accelerate"], 'accelerator.load_state("OUT")'),
        (
            "mixtral_accelerate_w2",
            ["--style", "plain"],
            'dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id="OUT")',
        ),
        (
            "mixtral_accelerate_w2",
            ["--style", "plain", "--weights-only"],
            'dcp.load({"model": model_state}, checkpoint_id="OUT")',
        ),
        (
            "titan_w4e2",
            ["--world", "2"],
            "OUT, named step-N, in the run's checkpoint folder (--checkpoint.folder)",
        ),
    ],
)
def test_the_line_that_loads_a_dcp(
    run: Runner, tmp_path: Path, name: str, options: list[str], line: str
) -> None:
    out = tmp_path / "out"
    found = said(run, "convert", DCP_CHECKPOINTS[name], out, "--to", "dcp", *options, "--dry-run")
    assert found["load it"] == line.replace("OUT", str(out))


def test_changes_of_ranks() -> None:
    four, two, dense = Topology(4, 2), Topology(2, 1), Topology(3)
    assert results.change(four, two) == "world 4, EP 2 -> world 2, EP 1"
    assert results.change(four, four) == "world 4, EP 2, as it was"
    assert results.change(dense, None) == "world 3 -> no ranks"
    assert results.change(Topology(), four) == "no ranks -> world 4, EP 2"
