"""What people get wrong on the command line and from Python: a sentence that says what was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ckpt_tool import CkptToolError, Execution, api
from ckpt_tool.limits import MOST_RANKS
from tests.conftest import Runner, checkpoint_of

MIXTRAL = checkpoint_of("mixtral_w4e2")


def refused(run: Runner, *args: Any) -> str:
    """What a command that is misused says: one line, and nothing on stdout."""
    done = run(*args)
    assert (done.rc, done.stdout) == (2, ""), done
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


# ---- numbers and sizes


@pytest.mark.parametrize("option", ["--world", "--ep"])
@pytest.mark.parametrize("number", ["0", "-4", "100000000"])
def test_a_number_of_ranks_that_no_run_has(run: Runner, tmp_path: Path, option: str, number: str) -> None:
    said = refused(run, "reshard", MIXTRAL, tmp_path / "out", option, number)
    assert f"{option} {number}: it has to be a whole number, 1 to {MOST_RANKS:,}." in said


def test_no_threads_at_all(run: Runner, tmp_path: Path) -> None:
    said = refused(run, "reshard", MIXTRAL, tmp_path / "out", "--workers", "0")
    assert "--workers 0: it has to be a whole number, 1 or more." in said


def test_files_of_no_size(run: Runner, tmp_path: Path) -> None:
    said = refused(run, "consolidate", MIXTRAL, tmp_path / "out", "--max-shard-size", "0")
    assert "--max-shard-size 0: it has to be 1 or more. Write it like 512MiB" in said


def test_another_formats_option_with_its_default(run: Runner, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = refused(run, "convert", MIXTRAL, out, "--to", "zero3", "--max-shard-size", "5GB")
    assert "--max-shard-size: --to zero3 has no use for it" in said


def test_the_default_of_a_size_is_in_the_help(run: Runner) -> None:
    assert "Default: 5GB" in " ".join(run("consolidate", "--help").stdout.split())


# ---- from Python


def test_memory_may_be_text_from_python(tmp_path: Path) -> None:
    one = api.reshard(MIXTRAL, tmp_path / "a", dry_run=True, how=Execution(max_memory="1MiB", workers=2))
    other = api.convert(
        MIXTRAL, tmp_path / "b", to="zero3", dry_run=True, max_memory="1MiB", how=Execution(workers=2)
    )
    assert one.peak_memory_bytes == other.peak_memory_bytes <= 1 << 20
    assert api.verify(MIXTRAL, max_memory="1MiB").passed


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ep": "2"}, "ep='2' is str; ep takes a whole number."),
        ({"ep": True}, "ep=True is bool; ep takes a whole number."),
        ({"world": 2.0}, "world=2.0 is float; world takes a whole number."),
        ({"weights_only": "yes"}, "weights_only='yes' is str; weights_only takes True or False."),
        ({"like": 3}, "like=3 is int; like takes a path."),
        ({"style": 3}, "style=3 is int; style takes text."),
        ({"max_shard_bytes": 1.5}, "max_shard_bytes=1.5 is not a size."),
        ({"max_memory": 1.5}, "max_memory=1.5 is not a size."),
        ({"how": Execution(max_memory="much")}, "'much' is not a size."),
        ({"how": Execution(workers="2")}, "--workers 2: it has to be"),
    ],
)
def test_a_value_of_another_kind_from_python(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(CkptToolError) as refusal:
        api.convert(MIXTRAL, tmp_path / "out", to="zero3", **given)
    assert said in str(refusal.value)
