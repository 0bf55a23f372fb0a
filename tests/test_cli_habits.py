"""What people are used to from command lines: short options, completion, one form of error, quiet."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ckpt_tool import api, inspection
from ckpt_tool.formats.dcp.declared import STYLE
from ckpt_tool.formats.dcp.writing.target import SCHEMES
from ckpt_tool.formats.known import targets
from ckpt_tool.formats.options import DTYPES
from tests.conftest import checkpoint_of, child_env, run_cli

MIXTRAL = checkpoint_of("mixtral_w4e2")
COMMANDS = ["inspect", "convert", "reshard", "consolidate", "verify", "doctor", "families", "demo"]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_short_option_for_help(command: str) -> None:
    done = run_cli(command, "-h")
    assert (done.rc, done.stderr) == (0, "")
    assert done.stdout == run_cli(command, "--help").stdout
    assert "--help" in done.stdout


def test_the_short_option_for_the_version() -> None:
    assert run_cli("-V").stdout == run_cli("--version").stdout


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("families", "demo")])
def test_help_ends_with_examples(command: str) -> None:
    _, _, examples = run_cli(command, "--help").stdout.partition("Examples:\n")
    lines = examples.strip().splitlines()
    assert lines
    assert all(line.strip().startswith(f"ckpt-tool {command} ") for line in lines)


def completed(*words: str) -> list[str]:
    """What a shell is told to offer for the last word."""
    env = child_env() | {
        "_CKPT_TOOL_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(("ckpt-tool", *words)),
        "COMP_CWORD": str(len(words)),
    }
    command = [sys.executable, "-c", "from ckpt_tool.cli import main; main()"]
    return subprocess.run(
        command, env=env, check=True, capture_output=True, text=True, cwd=os.curdir
    ).stdout.split()


def test_shells_complete_commands_options_and_values() -> None:
    assert completed("re") == ["reshard"]
    assert "--dry-run" in completed("reshard", "a", "b", "--d")
    assert completed("convert", "a", "b", "--to", "") == list(targets())
    assert completed("convert", "a", "b", "--style", "t") == ["torchtitan", "transformers"]
    assert completed("consolidate", "a", "b", "--dtype", "") == list(DTYPES)


def test_the_styles_in_the_help_are_those_that_are_written() -> None:
    assert set(STYLE.choices) == set(SCHEMES)


WRONG = [
    (["convert", MIXTRAL, "OUT", "--to", "universl"], "Did you mean universal?"),
    (["convert", MIXTRAL, "OUT", "--to", "dcp", "--style", "torchtit"], "Did you mean torchtitan?"),
    (["consolidate", MIXTRAL, "OUT", "--dtype", "bf61"], "Did you mean bf16?"),
    (["consolidate", MIXTRAL, "OUT", "--hf-layout", "fussed"], "Did you mean fused?"),
    (["convert", MIXTRAL, "OUT", "--verfy"], "--verify"),
    (["convrt"], "convert"),
    (["inspect"], "SRC"),
    (["reshard", MIXTRAL, "OUT", "--ep", "0"], "--ep"),
    (["reshard", MIXTRAL, "OUT", "--max-memory", "3q"], "512MiB"),
]


@pytest.mark.parametrize(("arguments", "meant"), WRONG)
def test_every_mistake_is_one_line_of_one_form(arguments: list[str], meant: str, tmp_path: Path) -> None:
    done = run_cli(*(tmp_path / "out" if one == "OUT" else one for one in arguments))
    assert (done.rc, done.stdout) == (2, "")
    assert done.stderr.startswith("ckpt-tool: ")
    assert len(done.stderr.splitlines()) == 1
    assert meant in done.stderr
    assert not list(tmp_path.iterdir())


def test_no_command_at_all_shows_the_help() -> None:
    done = run_cli()
    assert (done.rc, done.stderr) == (2, "")
    assert done.stdout == run_cli("--help").stdout


def test_quiet_prints_nothing_where_nothing_is_wrong(tmp_path: Path) -> None:
    done = run_cli("reshard", MIXTRAL, tmp_path / "out", "--ep", "1", "--quiet", "--no-fsync")
    assert (done.rc, done.stdout, done.stderr) == (0, "", "")
    done = run_cli("verify", MIXTRAL, tmp_path / "out", "--quiet")
    assert (done.rc, done.stdout, done.stderr) == (0, "", "")


def test_quiet_prints_what_is_wrong() -> None:
    done = run_cli("verify", MIXTRAL, checkpoint_of("mixtral_frozen_w2e1"), "--quiet")
    assert done.rc == 1
    assert "difference" in done.stdout


def test_differences_are_counted_by_kind_first() -> None:
    done = run_cli("verify", MIXTRAL, checkpoint_of("mixtral_frozen_w2e1"))
    first, *lines = done.stdout.splitlines()
    counts = [line.split(": ") for line in lines if not line.startswith("  ")]
    assert int(first.split()[0]) == sum(int(count) for _, count in counts)
    assert len({kind for kind, _ in counts}) == len(counts)


# ---- tables


def test_files_that_differ_in_one_number_are_shown_as_one() -> None:
    done = run_cli("inspect", MIXTRAL, "--tensors", "model.norm.weight")
    assert "zero_pp_rank_{0-3}_mp_rank_00_optim_states.pt" in done.stdout


@pytest.mark.parametrize(
    ("files", "shown"),
    [
        (["a_0.pt", "a_1.pt", "a_3.pt"], "a_{0-1,3}.pt"),
        (["model.safetensors"], "model.safetensors"),
        (["a_0_b_0", "a_1_b_1"], "a_0_b_0, a_1_b_1"),
        (["a_0", "a_1", "b_0", "b_1", "c"], "a_{0-1}, b_{0-1} and 1 more"),
        (["a_9", "a_10", "a_11"], "a_{9-11}"),
        ([], ""),
    ],
)
def test_lists_of_files(files: list[str], shown: str) -> None:
    assert inspection.shown_files(files) == shown


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.mlp.experts.w1", {f"model.layers.{n}.experts.*.gate.weight" for n in (0, 1)}),
        ("model.layers.1.experts.3.up.weight", {"model.layers.1.experts.*.up.weight"}),
        ("model.layers.0.mlp.gate.gate.weight", {"model.layers.0.mlp.router.gate.weight"}),
    ],
)
def test_tensors_are_found_by_the_engines_names_too(pattern: str, names: set[str]) -> None:
    assert {row["name"] for row in inspection.tensor_rows(api.catalogue(MIXTRAL), pattern)} == names


def test_a_pattern_that_matches_no_tensor_is_told_what_would() -> None:
    done = run_cli("inspect", MIXTRAL, "--tensors", "mlp.gate")
    assert "No tensor matches 'mlp.gate'" in done.stdout
    assert "model.layers.0.mlp.gate.gate.weight" in done.stdout
    assert "*part*" in done.stdout


def test_one_layers_experts_and_one_expert_of_every_layer() -> None:
    checkpoint = api.catalogue(MIXTRAL)
    every = inspection.expert_rows(checkpoint)
    assert inspection.expert_rows(checkpoint, "1:*") == [row for row in every if row["layer"] == 1]
    assert inspection.expert_rows(checkpoint, "*:[02]") == [row for row in every if row["expert"] in (0, 2)]


def test_a_path_after_experts_is_the_checkpoint() -> None:
    before, after = (run_cli("inspect", *a) for a in ((MIXTRAL, "--experts"), ("--experts", MIXTRAL)))
    assert before.rc == 0
    assert before.stdout == after.stdout
    assert len(run_cli("inspect", MIXTRAL, "--experts", "0:2").stdout.splitlines()) < len(
        before.stdout.splitlines()
    )


def test_experts_that_are_not_there_are_told_which_are() -> None:
    done = run_cli("inspect", MIXTRAL, "--experts", "9:*")
    assert "MoE layers are 0 to 1, of 4 experts each" in done.stdout
