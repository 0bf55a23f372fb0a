"""A format is one file and one line: ``toy_format`` is read, written and has an option of its own, and no
module of the package knows it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt_tool import api
from ckpt_tool.errors import UsageError
from ckpt_tool.formats import known
from ckpt_tool.formats.declaration import Format, Target
from ckpt_tool.formats.options import Option, Size
from ckpt_tool.manifest import read_manifest
from tests.conftest import Finished, checkpoint_of, child_env, config_of, tree
from tests.toy_format import MOTTO, TOY, Toy

MIXTRAL = checkpoint_of("mixtral_w4e2")
CONFIG = config_of("mixtral_w4e2")
WITH_TOY = """
from ckpt_tool.formats.known import register
from tests.toy_format import TOY
register(TOY)
from ckpt_tool.cli import main
main()
"""


@pytest.fixture
def toy() -> Iterator[None]:
    known.register(TOY)
    yield
    known.FORMATS.remove(TOY)


def run_with_toy(*args: object) -> Finished:
    done = subprocess.run(
        [sys.executable, "-c", WITH_TOY, *map(str, args)],
        capture_output=True,
        text=True,
        env={**child_env(), "COLUMNS": "200"},
    )
    return Finished(done.returncode, done.stdout, done.stderr)


@pytest.mark.usefixtures("toy")
def test_it_is_written_and_read(tmp_path: Path) -> None:
    made = api.convert(MIXTRAL, tmp_path / "toy", to="toy", motto="bits", verify=True)
    assert made.verdict is not None
    assert made.verdict.passed
    read = api.catalogue(tmp_path / "toy")
    assert (read.format, read.notes) == ("toy", ("The motto is 'bits'.",))
    assert api.verify(tmp_path / "toy").passed
    api.convert(tmp_path / "toy", tmp_path / "through", to="hf", config=CONFIG)
    api.convert(MIXTRAL, tmp_path / "straight", to="hf", config=CONFIG)
    through, straight = tree(tmp_path / "through"), tree(tmp_path / "straight")
    assert through["model.safetensors"] == straight["model.safetensors"]


def test_the_command_line_shows_it_and_its_option(tmp_path: Path) -> None:
    shown = " ".join(run_with_toy("convert", "--help").stdout.split())
    assert "dcp, hf, toy." in shown
    assert "--motto WORDS toy: words that are kept in the file." in shown
    done = run_with_toy("convert", MIXTRAL, tmp_path / "toy", "--to", "toy", "--motto", "bits", "--quiet")
    assert (done.rc, done.stderr) == (0, "")
    found = run_with_toy("inspect", tmp_path / "toy")
    assert (found.rc, "The motto is 'bits'." in found.stdout) == (0, True)


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("to", sorted(known.targets()))
def test_other_targets_have_no_use_for_its_option(to: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        api.convert(MIXTRAL, tmp_path / "out", to=to, motto="bits")
    assert str(refused.value) == f"--motto: --to {to} has no use for it. Leave it out."


@pytest.mark.usefixtures("toy")
def test_it_has_no_use_for_the_options_of_others(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        api.convert(MIXTRAL, tmp_path / "out", to="toy", ep=2, style="plain", max_shard_bytes=7)
    assert (
        str(refused.value) == "--ep, --max-shard-size, --style: --to toy has no use for it. Leave it out."
    )


@pytest.mark.usefixtures("toy")
def test_it_has_no_ranks_to_reshard_for(tmp_path: Path) -> None:
    api.convert(MIXTRAL, tmp_path / "toy", to="toy")
    with pytest.raises(UsageError, match=r"is toy, which has no ranks .*: dcp, zero1, zero2, zero3\."):
        api.reshard(tmp_path / "toy", tmp_path / "out", world=2)


def test_an_option_that_no_format_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="motto: no format has an option of this name"):
        api.convert(MIXTRAL, tmp_path / "out", to="universal", motto="bits")


@pytest.mark.usefixtures("toy")
def test_the_manifest_tells_its_option_and_for_others_what_it_always_told(tmp_path: Path) -> None:
    api.convert(MIXTRAL, tmp_path / "toy", to="toy", motto="bits")
    api.convert(MIXTRAL, tmp_path / "zero3", to="zero3", world=2, ep=1)
    always = {
        "dtype": "keep", "max_shard_bytes": 5_000_000_000, "keep_groups": False, "ep": None, "world": None,
        "style": None, "hf_layout": None, "weights_only": False,
    }  # fmt: skip
    toy, zero3 = (read_manifest(tmp_path / name) for name in ("toy", "zero3"))
    assert toy is not None
    assert zero3 is not None
    assert toy.identity["parameters"] == {"to": "toy", **always, "motto": "bits"}
    assert zero3.identity["parameters"] == {"to": "zero3", **always, "ep": 1, "world": 2}
    assert list(zero3.identity["parameters"]) == ["to", *always]


@pytest.mark.usefixtures("toy")
def test_the_same_command_finds_its_own_result_and_another_motto_does_not(tmp_path: Path) -> None:
    api.convert(MIXTRAL, tmp_path / "toy", to="toy", motto="bits")
    again = api.convert(MIXTRAL, tmp_path / "toy", to="toy", motto="bits")
    assert "written by this command" in again.notes[-1]
    with pytest.raises(UsageError, match="exists"):
        api.convert(MIXTRAL, tmp_path / "toy", to="toy", motto="bytes")


DOUBLES = {
    "the format": TOY,
    "the target": Format("other", None, Target("toy", Toy)),
    "the option, another kind of": Format(
        "third", None, Target("third", Toy, (MOTTO._replace(kind=Size),))
    ),
    "the flag": Format("fourth", None, Target("fourth", Toy, (Option("words", ("--motto",), str, ""),))),
}


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("what", DOUBLES)
def test_what_is_there_already_is_not_registered_again(what: str) -> None:
    before = list(known.FORMATS)
    with pytest.raises(ValueError, match=r"(toy|motto)"):
        known.register(DOUBLES[what])
    assert before == known.FORMATS
