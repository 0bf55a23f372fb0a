"""What people get wrong on the command line and from Python: a sentence that says what was meant."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from ckpt_tool import CkptToolError, Execution, api
from ckpt_tool.limits import MOST_RANKS
from ckpt_tool.replacing import nothing_owned
from ckpt_tool.stores.base import Publishing
from ckpt_tool.stores.local_area import LocalArea
from tests.conftest import Runner, checkpoint_of, config_of
from tests.formats.dcp_tools import CHECKPOINTS as DCP_CHECKPOINTS

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


# ---- the source


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    """A run's directory: its checkpoints below, each in a directory of its step."""
    shutil.copytree(MIXTRAL, tmp_path / "run" / "checkpoints")
    tags = tmp_path / "run" / "checkpoints"
    (tags / "global_step2").rename(tags / "global_step10")
    shutil.copytree(tags / "global_step10", tags / "global_step9")
    (tags / "latest").write_text("global_step10")
    return tmp_path / "run"


def unreadable(run: Runner, source: Path | str) -> str:
    done = run("inspect", source)
    assert (done.rc, done.stdout) == (3, ""), done
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


def test_an_empty_path(run: Runner) -> None:
    assert "An empty path names nothing" in refused(run, "inspect", "")


@pytest.mark.parametrize(
    ("name", "contents", "called"),
    [
        ("run.zip", b"PK\x03\x04rest", "a zip archive"),
        ("run.tar", bytes(257) + b"ustar\x00", "a tar archive"),
        ("run.tar.gz", b"\x1f\x8brest", "compressed by gzip"),
        ("notes.txt", b"to do\n", "a text file"),
        ("empty.log", b"", "empty"),
        ("model.gguf", b"GGUF\x03", "a GGUF file"),
        ("odd", b"\x00\x01", "of no kind that is known"),
    ],
)
def test_a_file_that_is_no_checkpoints(
    run: Runner, run_directory: Path, name: str, contents: bytes, called: str
) -> None:
    file = run_directory / "checkpoints" / "global_step10" / name
    file.write_bytes(contents)
    assert f"{file} is {called}, and no file of a checkpoint." in unreadable(run, file)


def test_a_file_that_is_another_checkpoints(run: Runner, run_directory: Path) -> None:
    file = run_directory / "checkpoints" / "global_step10" / "adapter_model.safetensors"
    file.write_bytes(b"")
    assert f"{file} is no part of the checkpoint beside it" in unreadable(run, file)


def test_each_file_of_a_checkpoint_may_be_passed_for_it(run: Runner, run_directory: Path) -> None:
    tags = run_directory / "checkpoints"
    for file in [tags / "latest", *(tags / "global_step10").iterdir()]:
        assert run("inspect", file).rc == 0, file


def test_a_step_that_is_not_there(run: Runner, run_directory: Path) -> None:
    tags = run_directory / "checkpoints"
    said = unreadable(run, tags / "global_step11")
    assert "There are global_step9, global_step10. Pass the one you mean, for example the newest" in said
    assert str(tags / "global_step10") in said


def test_a_tag_file_that_names_no_step(run: Runner, run_directory: Path) -> None:
    (run_directory / "checkpoints" / "latest").write_text("global_step11")
    said = unreadable(run, run_directory / "checkpoints")
    assert "names 'global_step11', but there is no such directory" in said
    assert "There are global_step9, global_step10." in said


def test_steps_without_a_tag_file(run: Runner, run_directory: Path) -> None:
    tags = run_directory / "checkpoints"
    (tags / "latest").unlink()
    said = unreadable(run, tags)
    assert "has no `latest` file, but holds global_step9, global_step10." in said
    assert f"for example the newest by its number, {tags / 'global_step10'}." in said


# ---- config.json


def test_where_a_config_was_looked_for(
    run: Runner, run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run_directory)
    said = refused(run, "consolidate", "checkpoints", tmp_path / "out")
    places = "checkpoints/global_step10", run_directory / "checkpoints", run_directory
    assert f"(There is no config.json in {', '.join(map(str, places))}.)" in said


@pytest.mark.parametrize("source", ["checkpoints", "checkpoints/global_step10", "checkpoints/latest"])
def test_a_config_above_the_checkpoints_directory(run: Runner, run_directory: Path, source: str) -> None:
    shutil.copy(config_of("mixtral_w4e2"), run_directory)
    with api.open(run_directory / source) as checkpoint:
        assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in checkpoint
    done = run("consolidate", run_directory / source, run_directory.parent / "out", "--no-fsync")
    assert done.rc == 0, done.stderr
    (run_directory.parent / "out" / "config.json").unlink()
    assert run("verify", run_directory / source, run_directory.parent / "out").rc == 0


def test_experts_told_apart_by_a_config_above(run: Runner) -> None:
    done = run("inspect", DCP_CHECKPOINTS["mixtral_accelerate_w2"])
    assert "1 (0 to 0) of 4 experts" in done.stdout


def test_a_trainers_own_config_above_is_not_the_models(run: Runner, run_directory: Path) -> None:
    (run_directory / "config.json").write_text("{}")
    assert run("inspect", run_directory / "checkpoints").rc == 0
    done = run("convert", run_directory / "checkpoints", run_directory.parent / "o", "--to", "universal")
    assert done.rc == 0, done.stderr


def test_the_config_that_was_found_is_of_another_model(run: Runner, run_directory: Path) -> None:
    text = config_of("mixtral_w4e2").read_text()
    assert '"num_local_experts": 4' in text
    (run_directory / "config.json").write_text(
        text.replace('"num_local_experts": 4', '"num_local_experts": 8')
    )
    done = run("consolidate", run_directory / "checkpoints", run_directory.parent / "out")
    assert done.rc == 3
    assert "Is this the config.json of another model?" in done.stderr
    assert f"(config.json is that in {run_directory}; --config names another.)" in done.stderr


# ---- what is at the source


@pytest.mark.parametrize(
    ("rank", "file"),
    [(0, "optim_states"), (1, "model_states"), (1, "optim_states")],
)
@pytest.mark.parametrize("other", ["mixtral_w4e4", "mixtral_w2e1", "mixtral_odd_w4e2"])
def test_a_rank_file_of_another_save(
    run: Runner, run_directory: Path, rank: int, file: str, other: str
) -> None:
    name = f"zero_pp_rank_{rank}_mp_rank_00_{file}.pt"
    shutil.copy(next(checkpoint_of(other).glob(f"*/{name}")), run_directory / "checkpoints/global_step10")
    assert "copy this checkpoint again" in unreadable(run, run_directory / "checkpoints")


@pytest.mark.parametrize(
    ("left", "said"),
    [
        (["config.json"], "no weights in safetensors. Copy or download its model*.safetensors again."),
        (["config.json", "pytorch_model.bin"], "but pytorch_model.bin, which is not read."),
    ],
)
def test_a_published_model_without_its_weights(
    run: Runner, tmp_path: Path, left: list[str], said: str
) -> None:
    for name in left:
        (tmp_path / name).write_text("{}")
    assert said in unreadable(run, tmp_path)


def test_half_of_a_pattern_after_experts(run: Runner) -> None:
    said = refused(run, "inspect", MIXTRAL, "--experts", "1")
    assert "write LAYER:EXPERT, '1:*' for the experts of a layer or '*:1' for one expert" in said
    assert run("inspect", MIXTRAL, "--experts", "1:*").rc == 0
    assert "--experts alone lists all" in refused(run, "inspect", MIXTRAL, "--experts", "all")


# ---- the target


@pytest.mark.parametrize(
    ("to", "meant"),
    [("safetensors", "hf"), ("Universal", "universal"), ("ZeRO-3", "zero3"), ("huggingface", "hf")],
)
def test_a_target_by_another_name(run: Runner, tmp_path: Path, to: str, meant: str) -> None:
    said = refused(run, "convert", MIXTRAL, tmp_path / "out", "--to", to)
    assert f"--to '{to}' is unknown. Did you mean {meant}?" in said


def test_a_number_that_is_none(run: Runner, tmp_path: Path) -> None:
    assert "is not a whole number." in refused(run, "reshard", MIXTRAL, tmp_path / "out", "--ep", "two")


@pytest.mark.parametrize("place", ["/proc/new", "/dev/null/new", "PATH/file/new", f"PATH/{'x' * 300}"])
@pytest.mark.parametrize("command", ["convert", "inspect"])
def test_a_place_where_nothing_can_be_made(run: Runner, tmp_path: Path, place: str, command: str) -> None:
    (tmp_path / "file").write_text("")
    where = place.replace("PATH", str(tmp_path))
    more = ["--html", where] if command == "inspect" else [where, "--to", "universal"]
    said = refused(run, command, MIXTRAL, *more)
    assert "cannot be made: " in said


def test_a_page_in_a_directory_that_is_not_there(run: Runner, tmp_path: Path) -> None:
    said = refused(run, "inspect", MIXTRAL, "--html", tmp_path / "none" / "page.html")
    assert "Make the directory above it first" in said


def test_a_target_that_another_run_prepares(run: Runner, tmp_path: Path) -> None:
    staging = LocalArea(tmp_path / "out", Publishing(overwrite=False, fsync=False, judge=nothing_owned))
    try:
        said = refused(run, "reshard", MIXTRAL, tmp_path / "out")
    finally:
        staging.close()
    assert "Wait until that has ended, or choose another destination." in said


def test_an_interrupted_plan_has_nothing_to_go_on_from(
    run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "make_plan", interrupted)
    for options, is_said in (["--dry-run"], False), ([], True):
        done = run("reshard", MIXTRAL, tmp_path / "out", *options)
        assert done.rc == 130
        assert ("goes on from here" in done.stderr) == is_said


# ---- the demo


def test_the_demo_says_where_its_results_are(
    run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    assert "`ckpt-tool demo DIR` keeps them" in run("demo").stdout
    assert f"The results are in {tmp_path / 'demo'}." in run("demo", tmp_path / "demo").stdout
    assert run("demo", tmp_path / "demo").rc == 0


def test_a_demo_into_a_checkpoint(run: Runner, run_directory: Path) -> None:
    said = refused(run, "demo", run_directory / "checkpoints")
    assert "which is no result of the demo. Choose a new directory." in said


# ---- names


def test_a_difference_of_experts_has_the_names_that_others_use() -> None:
    found = api.verify(MIXTRAL, checkpoint_of("mixtral_w2e1")).differences
    said = next(one.message for one in found if one.name == "model.layers.0.experts.*.gate.weight")
    assert "model.layers.0.mlp.experts.w1 in DeepSpeed AutoEP" in said
    published = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
    assert f"{published.format(0)} to {published.format(3)} in published files" in said


def test_a_name_that_is_not_there_says_what_published_names_need(run_directory: Path) -> None:
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    with api.open(run_directory / "checkpoints") as checkpoint:
        with pytest.raises(KeyError, match="published names need the model's config"):
            checkpoint[name]
        with pytest.raises(KeyError, match=r"model\.layers\.0\.mlp\.experts\.w1"):
            checkpoint["model.layers.0.mlp.experts.w4"]
