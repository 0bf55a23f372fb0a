"""The command line in child processes: help, exit codes, JSON, and what goes to which stream."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from safetensors.torch import load_file

from ckpt_tool import __version__, api, cli, cli_options, inspection
from ckpt_tool.errors import UsageError
from tests.conftest import (
    ZERO3,
    Runner,
    checkpoint_of,
    child_env,
    config_of,
    copy_fixture,
    run_cli,
    tree,
)
from tests.formats.dcp_tools import CHECKPOINTS as DCP_CHECKPOINTS

VERBS = sorted(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]
MIXTRAL = checkpoint_of("mixtral_w4e2")
INSPECT_KEYS = (
    "format path step world_size ep_size edp_size zero_stage parameters bytes dtypes states moe_layers "
    "experts_per_layer"
).split()
DRY_RUN_KEYS = "bytes_read bytes_written files peak_memory_bytes disk_bytes".split()


# ---- help


def test_help_names_every_verb_and_the_exit_codes() -> None:
    done = run_cli("--help")
    assert (done.rc, done.stderr) == (0, "")
    for verb in VERBS:
        assert verb in done.stdout
    assert "Exit codes" in done.stdout


def test_the_verbs_are_there() -> None:
    assert {"inspect", "convert", "consolidate", "verify", "demo"} <= set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(run: Runner, verb: str) -> None:
    done = run(verb, "--help")
    assert (done.rc, done.stderr) == (0, "")
    assert "Usage" in done.stdout
    assert verb in done.stdout


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom ckpt_tool import cli\nsys.argv = ['ckpt-tool', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "heavy = ('torch', 'numpy', 'deepspeed', 'transformers', 'safetensors')\n"
        "print('heavy:', [name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=child_env())
    assert "heavy: []" in done.stdout, done.stdout + done.stderr


def test_moving_bytes_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom ckpt_tool import api\n"
        f"api.convert({str(MIXTRAL)!r}, {str(tmp_path / 'out')!r}, to='universal', verify=True)\n"
        "print([name for name in ('torch', 'numpy', 'deepspeed') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=child_env())
    assert done.stdout.strip() == "[]", done.stderr


def test_version() -> None:
    assert run_cli("--version").stdout.strip() == f"ckpt-tool {__version__}"


# ---- exit codes

_ARGUMENTS: dict[str, list[str]] = {
    "no such option": ["inspect", str(MIXTRAL), "--nonsense"],
    "no such verb": ["nonsense"],
    "missing argument": ["convert", str(MIXTRAL)],
    "missing --to": ["convert", str(MIXTRAL), "OUT"],
    "unknown format": ["convert", str(MIXTRAL), "OUT", "--to", "gguf"],
    "unknown dtype": ["consolidate", str(MIXTRAL), "OUT", "--dtype", "int4"],
    "unknown layout": ["consolidate", str(MIXTRAL), "OUT", "--hf-layout", "megatron"],
    "no size": ["convert", str(MIXTRAL), "OUT", "--to", "universal", "--max-memory", "much"],
    "too little memory": ["convert", str(MIXTRAL), "OUT", "--to", "universal", "--max-memory", "1kB"],
    "no workers": ["convert", str(MIXTRAL), "OUT", "--to", "universal", "--workers", "0"],
    "config that is not there": ["consolidate", str(MIXTRAL), "OUT", "--config", "/nowhere.json"],
    "dtype for universal": ["convert", str(MIXTRAL), "OUT", "--to", "universal", "--dtype", "bf16"],
}


@pytest.mark.parametrize("name", _ARGUMENTS)
def test_usage_is_2_and_says_so_on_stderr(run: Runner, name: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    done = run(*[out if argument == "OUT" else argument for argument in _ARGUMENTS[name]])
    assert (done.rc, done.stdout) == (2, "")
    assert done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_existing_destination_is_2(run: Runner, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    done = run("convert", MIXTRAL, tmp_path, "--to", "universal")
    assert (done.rc, done.stdout) == (2, "")
    assert "--overwrite" in done.stderr
    assert tree(tmp_path) == {"precious": b"x"}


@pytest.mark.parametrize("verb", ["inspect", "verify", "convert"])
def test_an_unreadable_source_is_3(run: Runner, verb: str, tmp_path: Path) -> None:
    tag = copy_fixture("mixtral_w2e1", tmp_path)
    (file := tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    extra = [tmp_path / "out", "--to", "universal"] if verb == "convert" else []
    done = run(verb, tag, *extra)
    assert (done.rc, done.stdout) == (3, "")
    assert done.stderr.startswith("ckpt-tool: ")
    assert str(file) in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_not_there_is_3(run: Runner, tmp_path: Path) -> None:
    done = run("inspect", tmp_path / "nowhere")
    assert (done.rc, done.stdout) == (3, "")
    assert "nowhere" in done.stderr


def test_a_full_disk_is_4(tmp_path: Path) -> None:
    """A limit on file size stands for it."""
    arguments = ["convert", str(MIXTRAL), str(tmp_path / "out"), "--to", "universal"]
    command = ["bash", "-c", 'ulimit -f 4; exec "$@"', "-", sys.executable, "-m", "ckpt_tool", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=child_env())
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith("ckpt-tool: ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_found_equal_is_0_and_found_wrong_is_1(run: Runner) -> None:
    same = run("verify", MIXTRAL, MIXTRAL)
    assert same.rc == 0
    assert same.stdout.startswith("equal:")
    other = run("verify", MIXTRAL, checkpoint_of("mixtral_frozen_w2e1"))
    assert other.rc == 1
    assert "differences: " in other.stdout.splitlines()[0]
    assert other.stdout.splitlines()[1].split(":")[0] in ("extra", "missing", "scalar", "shape", "value")


INTERRUPTED = """
import signal, sys
from ckpt_tool import __main__, storage

real = storage.LocalWriter.write

def write(self, path, offset, data):
    real(self, path, offset, data)
    signal.raise_signal(signal.SIGINT)

storage.LocalWriter.write = write
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
__main__.main()
"""


def test_an_interrupt_is_130_and_publishes_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, "convert", MIXTRAL, tmp_path / "out", "--to", "universal"],
        capture_output=True,
        text=True,
        env=child_env(),
    )
    assert done.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in done.stderr
    assert "interrupted" in done.stderr
    assert "the same command goes on from here" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_interrupt_while_modules_are_imported_is_told_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt")
    done = subprocess.run(
        [sys.executable, "-c", "from ckpt_tool.__main__ import main; main()", "families"],
        capture_output=True,
        text=True,
        env=child_env() | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{child_env()['PYTHONPATH']}"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "ckpt-tool: interrupted\n")


def test_an_interrupted_check_does_not_speak_of_publishing(tmp_path: Path) -> None:
    script = INTERRUPTED.replace("LocalWriter.write", "LocalReader.read_into").replace(
        "path, offset, data", "*a"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "verify", MIXTRAL], capture_output=True, text=True, env=child_env()
    )
    assert done.returncode in (130, -signal.SIGINT)
    assert done.stderr.endswith("interrupted\n")
    assert "publish" not in done.stderr


def test_who_has_read_enough_ends_the_command_as_any_other() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "ckpt_tool", "families"],
        stdout=writer,
        stderr=subprocess.PIPE,
        env=child_env(),
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")


# ---- streams


def test_results_on_stdout_and_notes_on_stderr(run: Runner, tmp_path: Path) -> None:
    done = run("convert", MIXTRAL, tmp_path / "out", "--to", "universal", "--no-fsync")
    assert done.rc == 0
    assert "Done" in done.stdout
    assert "note:" in done.stderr
    assert "note:" not in done.stdout


def test_quiet_says_nothing(run: Runner, tmp_path: Path) -> None:
    done = run("convert", MIXTRAL, tmp_path / "out", "--to", "universal", "--quiet", "--no-fsync")
    assert (done.rc, done.stdout, done.stderr) == (0, "", "")


def test_json_is_all_of_stdout(run: Runner, tmp_path: Path) -> None:
    done = run(
        "convert", MIXTRAL, tmp_path / "out", "--to", "universal", "--json", "--verify", "--no-fsync"
    )
    result = json.loads(done.stdout)
    assert result["verified"] is True
    assert result["dry_run"] is False
    assert result["bytes_written"] == sum(
        p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file() and "manifest" not in p.name
    )
    assert result["notes"]
    verdict = json.loads(run("verify", MIXTRAL, tmp_path / "out", "--json").stdout)
    assert verdict["passed"] is True
    assert verdict["differences"] == []


# ---- inspect


@pytest.mark.parametrize("name", ["mixtral_w4e2", "dense_w3", "deepseek_v3_w2e2"])
def test_inspect_json_has_the_stable_keys(run: Runner, name: str) -> None:
    done = run("inspect", checkpoint_of(name), "--json")
    found = json.loads(done.stdout)
    assert [key for key in INSPECT_KEYS if key not in found] == []
    made_with = json.loads((checkpoint_of(name).parent / "made_with.json").read_text())["spec"]
    assert found["world_size"] == made_with["world"]
    assert found["zero_stage"] == made_with["zero_stage"]
    assert found["step"] == made_with["steps"]
    assert found["ep_size"] == (made_with["ep"] or None)
    if found["ep_size"]:
        assert found["edp_size"] == made_with["world"] // made_with["ep"]
        assert found["experts_per_layer"] == made_with["experts"]
    assert found["path"].endswith("global_step2")


def test_inspect_counts_what_the_engine_has() -> None:
    from safetensors.torch import load_file

    oracle = load_file(checkpoint_of("mixtral_frozen_w2e1").parent / "oracle" / "fp32.safetensors")
    frozen = load_file(checkpoint_of("mixtral_frozen_w2e1").parent / "oracle" / "frozen.safetensors")
    found = inspection.overview(api.catalogue(checkpoint_of("mixtral_frozen_w2e1")))
    trained = sum(tensor.numel() for tensor in oracle.values())
    assert found["trained_parameters"] == trained
    assert found["parameters"] == trained + sum(tensor.numel() for tensor in frozen.values())


def test_inspect_says_what_a_person_asks(run: Runner) -> None:
    done = run("inspect", MIXTRAL)
    assert (done.rc, done.stderr) == (0, "")
    for word in ("deepspeed-zero3", "world 4", "EP 2 x EDP 2", "MoE layers", "exp_avg_sq", "global_step2"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--tensors"], 23 * 3),
        (["--tensors", "*"], 23 * 3),
        (["--tensors=*norm*"], 5 * 3),
        (["--tensors", "*norm*"], 5 * 3),
        (["--tensors", "*.experts.3.gate.*"], 2 * 3),
        (["--tensors", "*.experts.*"], 6 * 3),
        (["--tensors", "nothing"], 0),
    ],
    ids=str,
)
def test_tensors_with_and_without_a_pattern(run: Runner, arguments: list[str], expected: int) -> None:
    found = json.loads(run("inspect", MIXTRAL, *arguments, "--json").stdout)["tensors"]
    assert len(found) == expected
    if expected:
        assert set(found[0]) == {"name", "state", "role", "shape", "dtype", "bytes", "files", "scheme"}


def test_tensors_in_front_of_another_option(run: Runner) -> None:
    found = json.loads(run("inspect", MIXTRAL, "--tensors", "--json").stdout)
    assert len(found["tensors"]) == 69


def test_the_tensor_table_names_all(run: Runner, tmp_path: Path) -> None:
    done = run("inspect", MIXTRAL, "--tensors", "*norm*")
    assert "model.layers.1.post_attention_layernorm.weight" in done.stdout
    assert "15 tensors" in done.stdout


@pytest.mark.parametrize("name", [name for name in ZERO3 if name != "dense_w3"])
def test_the_expert_table_is_what_the_layers_metadata_says(name: str) -> None:
    rows = inspection.expert_rows(api.catalogue(checkpoint_of(name)))
    tag = checkpoint_of(name) / "global_step2"
    expected = {}
    prefix = "bf16_" if list(tag.glob("bf16_*")) else ""
    for path in tag.glob("*model_states.pt"):
        rank = int(path.name.split("_")[3])
        for entry in torch.load(path, weights_only=False)["ds_autoep_layers"]:
            layer = int(entry["module_path"].split(".")[2])
            for expert in range(entry["global_expert_start"], entry["global_expert_end"]):
                row = expected.setdefault(
                    (layer, expert), {"ep_rank": entry["ep_rank"], "edp_ranks": set()}
                )
                row["edp_ranks"].add(rank)
    assert {(row["layer"], row["expert"]): row["ep_rank"] for row in rows} == {
        key: row["ep_rank"] for key, row in expected.items()
    }
    for row in rows:
        ranks = expected[row["layer"], row["expert"]]["edp_ranks"]
        assert set(row["edp_ranks"]) == ranks
        assert set(row["files"]) <= {f"{prefix}zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in ranks}
        assert row["files"]


def test_the_expert_table_is_printed(run: Runner) -> None:
    done = run("inspect", MIXTRAL, "--experts")
    assert done.rc == 0
    assert "8 experts" in done.stdout
    assert "EDP ranks" in done.stdout
    assert "zero_pp_rank_3_mp_rank_00_optim_states.pt" in done.stdout


def test_the_expert_table_as_json(run: Runner) -> None:
    rows = json.loads(run("inspect", checkpoint_of("mixtral_dbe_w4e2"), "--experts", "--json").stdout)
    assert [row["edp_ranks"] for row in rows["experts"]] == [[0, 1], [0, 1], [2, 3], [2, 3]] * 2


# ---- dry runs


@pytest.mark.parametrize("to", ["universal", "hf"])
def test_a_dry_run_states_the_totals_and_writes_nothing(run: Runner, to: str, tmp_path: Path) -> None:
    arguments = ["convert", MIXTRAL, tmp_path / "out", "--to", to, "--config", config_of("mixtral_w4e2")]
    arguments += ["--no-fsync"]
    planned = json.loads(run(*arguments, "--dry-run", "--json").stdout)
    assert [key for key in DRY_RUN_KEYS if key not in planned] == []
    assert planned["dry_run"] is True
    assert list(tmp_path.iterdir()) == []
    done = json.loads(run(*arguments, "--json").stdout)
    assert {key: planned[key] for key in DRY_RUN_KEYS} == {key: done[key] for key in DRY_RUN_KEYS}
    written = [p for p in (tmp_path / "out").rglob("*") if p.is_file() and "manifest" not in p.name]
    assert len(written) == planned["files"]
    assert sum(path.stat().st_size for path in written) == planned["bytes_written"]


def test_a_dry_run_refuses_what_the_run_would(run: Runner, tmp_path: Path) -> None:
    tag = copy_fixture("mixtral_w2e1", tmp_path)
    (tag / "zero_pp_rank_0_mp_rank_00_model_states.pt").unlink()
    assert run("convert", tag, tmp_path / "out", "--to", "universal", "--dry-run").rc == 3


def test_a_dry_run_says_that_nothing_was_written(run: Runner, tmp_path: Path) -> None:
    done = run("consolidate", MIXTRAL, tmp_path / "out", "--config", config_of("mixtral_w4e2"), "--dry-run")
    assert done.rc == 0
    assert "nothing was written" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_inspect_tells_stacked_experts_apart_by_a_config(run: Runner, tmp_path: Path) -> None:
    original = DCP_CHECKPOINTS["mixtral_accelerate_w2"]
    source = tmp_path / "checkpoint"
    shutil.copytree(original, source)
    without = json.loads(run("inspect", source, "--experts", "--json").stdout)
    assert without["experts"] == []
    assert any("pass its config.json with --config" in note for note in without["notes"])
    done = run("inspect", source, "--experts", "--json", "--config", original.parent)
    found = json.loads(done.stdout)
    assert [(row["layer"], row["expert"]) for row in found["experts"]] == [(0, e) for e in range(4)]
    assert not any("No routed experts" in note for note in found["notes"])
    assert (found["moe_layers"], found["experts_per_layer"]) == (1, 4)
    assert all(row["files"] for row in found["experts"])


@pytest.mark.parametrize("beside", [False, True], ids=["--config", "beside"])
@pytest.mark.parametrize(
    ("name", "options", "ranks"),
    [
        ("mixtral_accelerate_w2", (), [None] * 4),  # experts are sharded, but not by EP
        ("mixtral_accelerate_w2", ("--world", "4", "--ep", "2"), [0, 0, 1, 1]),
    ],
)
def test_ep_ranks_of_experts_do_not_depend_on_where_the_config_lies(
    name: str, options: tuple[str, ...], ranks: list[Any], beside: bool, run: Runner, tmp_path: Path
) -> None:
    source = DCP_CHECKPOINTS[name]
    target = tmp_path / "out"
    done = run("convert", source, target, "--to", "dcp", *options)
    assert done.rc == 0, done.stderr
    config = source.parent / "config.json"
    if beside:
        shutil.copy(config, target / "config.json")
    done = run("inspect", target, "--experts", "--json", *(() if beside else ("--config", config)))
    assert [row["ep_rank"] for row in json.loads(done.stdout)["experts"]] == ranks


def test_inspect_with_a_config_that_does_not_fit_says_so(run: Runner, tmp_path: Path) -> None:
    source = DCP_CHECKPOINTS["mixtral_accelerate_w2"]
    config = json.loads((source.parent / "config.json").read_text())
    for changed, words in (
        ({"num_local_experts": 3}, "Is this the config.json of another model?"),
        ({"model_type": "unheard_of"}, "does not guess them"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changed))
        done = run("inspect", source, "--config", tmp_path)
        assert (done.rc, words in done.stdout) == (0, True)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_local_experts": 3}))
    done = run("convert", source, tmp_path / "out", "--to", "dcp", "--config", tmp_path)
    assert done.rc == 3
    assert "Is this the config.json of another model?" in done.stderr


def test_a_deepspeed_config_in_place_of_the_models_is_named(run: Runner, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"train_batch_size": 8}')
    done = run("consolidate", MIXTRAL, tmp_path / "out", "--config", tmp_path / "ds.json")
    assert done.rc == 3
    assert "pass that with --ds-config" in done.stderr


def test_a_pointer_of_git_lfs_is_named(run: Runner, tmp_path: Path) -> None:
    shutil.copy(config_of("mixtral_w4e2"), tmp_path / "config.json")
    (tmp_path / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    )
    done = run("inspect", tmp_path)
    assert done.rc == 3
    assert "git lfs pull" in done.stderr


def test_a_dry_run_prints_its_plan_and_says_that_the_disk_is_too_small(
    run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 5))
    done = run("convert", MIXTRAL, tmp_path / "no" / "out", "--to", "universal", "--dry-run")
    assert done.rc == 0
    assert "nothing was written" in done.stdout
    assert "the disk has 5 B free" in done.stderr


def test_the_directory_above_some_checkpoints_names_them(run: Runner, tmp_path: Path) -> None:
    tag = copy_fixture("mixtral_w2e1", tmp_path)
    (tag.parent / "latest").unlink()
    done = run("inspect", tag.parent)
    assert done.rc == 3
    assert f"for example {tag}" in done.stderr
    (tag.parent / "latest").write_text(tag.name)
    done = run("inspect", tmp_path)
    assert done.rc == 3
    assert f"for example {tag.parent}" in done.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model_type": "mixtral", "hidden_size": 64}, "is no DeepSpeed config"),
        (
            {"train_batch_size": 8, "zero_optimization": {"stage": 2}},
            "has ZeRO stage 2, the target is zero3",
        ),
        *(
            (
                {"train_batch_size": 8, "zero_optimization": {"stage": 3, "sub_group_size": size}},
                "a number of elements was expected",
            )
            for size in ("auto", float("inf"), float("nan"), 0, True)
        ),
    ],
)
def test_a_ds_config_that_is_another_files_or_of_another_stage_is_refused(
    content: dict[str, Any], words: str, run: Runner, tmp_path: Path
) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(content))
    done = run("convert", MIXTRAL, tmp_path / "out", "--to", "zero3", "--ds-config", tmp_path / "ds.json")
    assert done.rc == 2
    assert words in done.stderr


@pytest.mark.parametrize("size", ["9" * 400, "1" + "0" * 5000, "1e9", "-1", "", "5EiB", "8388608TiB"])
def test_a_size_that_is_none_is_refused(size: str, run: Runner) -> None:
    done = run("inspect", MIXTRAL, "--check", f"--max-memory={size}")
    assert done.rc == 2
    assert "is not a size" in done.stderr
    assert "Traceback" not in done.stderr


def test_consolidate_into_transformers_own_layout(run: Runner, tmp_path: Path) -> None:
    config = ("--config", config_of("mixtral_w4e2"))
    done = run("consolidate", MIXTRAL, tmp_path / "out", *config, "--hf-layout", "fused", "--verify")
    assert done.rc == 0, done.stderr
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    assert not any("experts.0" in name for name in names)


def test_consolidate_takes_config_and_tokenizer_from_a_directory(run: Runner, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(config_of("mixtral_w4e2"), model / "config.json")
    (model / "tokenizer.json").write_text("{}")
    (model / "tokenizer_config.json").write_text("")
    (model / "unrelated.bin").write_text("x")
    done = run("consolidate", MIXTRAL, tmp_path / "out", "--config", model, "--quiet")
    assert done.rc == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert not (tmp_path / "out" / "unrelated.bin").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


# ---- sizes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("1000000", 1_000_000),
        ("1kB", 1000),
        ("1KiB", 1024),
        ("1k", 1000),
        ("512MiB", 512 << 20),
        ("1GiB", 1 << 30),
        ("5GB", 5_000_000_000),
        ("1.5GiB", 3 << 29),
        ("2 TB", 2 * 10**12),
        (" 1gib ", 1 << 30),
        ("7b", 7),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert cli_options.parse_size(text) == expected


@pytest.mark.parametrize(
    "text", ["", "-1", "1XB", "GB", "1e9", "1,5GB", "0x10", "1 2", "5GBs", "nan", "inf"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="size"):
        cli_options.parse_size(text)


# ---- demo


def test_the_demo_runs(tmp_path: Path) -> None:
    done = run_cli("demo", tmp_path / "demo")
    assert done.rc == 0, done.stderr
    assert "DIFFERENCES" not in done.stdout
    assert "Verified" in done.stdout
    assert (tmp_path / "demo").is_dir()


def test_the_demo_leaves_nothing_where_no_directory_is_given(
    run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    done = run("demo")
    assert done.rc == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_python_api_is_what_the_package_says() -> None:
    import ckpt_tool

    for name in ckpt_tool.__all__:
        assert getattr(ckpt_tool, name) is not None
    with pytest.raises(AttributeError):
        _ = ckpt_tool.nonsense
    checkpoint: Any = ckpt_tool.open(os.fspath(MIXTRAL))
    assert checkpoint.format == "deepspeed-zero3"
