"""--overwrite never removes what is not the checkpoint it replaces."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ckpt_tool import api, replacing
from ckpt_tool.errors import ExecutionError, UsageError
from ckpt_tool.execute.meter import Silent
from ckpt_tool.manifest import MANIFEST
from tests.conftest import ROOT, checkpoint_of, config_of, run_cli, tree

SOURCE = checkpoint_of("dense_w3")
CONFIG = config_of("dense_w3")
TAG = "global_step2"
UNIVERSAL = f"{TAG}_universal"


def overwrite(target: Path, to: str = "universal", *, during: Callable[[], None] | None = None) -> None:
    class Meter(Silent):
        def add(self, count: int) -> None:
            if during is not None:
                during()

    how = api.Execution(overwrite=True, workers=1, meter=Meter())
    api.convert(SOURCE, target, to=to, config=CONFIG, how=how)


def refused(
    target: Path, *names: str, to: str = "universal", during: Callable[[], None] | None = None
) -> None:
    """Nothing is touched, and the message names what is in the way."""
    before = None if during else tree(target)
    with pytest.raises(UsageError) as raised:
        overwrite(target, to, during=during)
    for name in names:
        assert name in str(raised.value)
    if before is not None:
        assert tree(target) == before


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A result in every format."""
    out = tmp_path_factory.mktemp("results")
    for to in ("universal", "zero3", "zero2", "dcp", "hf"):
        api.convert(SOURCE, out / to, to=to, config=CONFIG)
    return {path.name: path for path in out.iterdir()}


def fresh(to: str, tmp_path: Path) -> dict[str, bytes]:
    api.convert(SOURCE, tmp_path / "fresh", to=to, config=CONFIG)
    return tree(tmp_path / "fresh")


# ---- what is replaced


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("to", ["universal", "zero3", "zero2", "dcp", "hf"])
def test_a_result_of_any_format_is_replaced(
    to: str, manifest: bool, results: dict[str, Path], tmp_path: Path
) -> None:
    target = shutil.copytree(results[to], tmp_path / "out")
    if not manifest:
        (target / MANIFEST).unlink()
    # without a manifest, a ZeRO directory is an engine's run with one step, and the result another step
    kept = tree(target) if to in ("zero3", "zero2") and not manifest else {}
    overwrite(target)
    assert tree(target) == {**kept, **fresh("universal", tmp_path)}
    assert {path.name for path in tmp_path.iterdir()} == {"out", "fresh"}


def test_a_run_with_one_step_keeps_it_beside_another(results: dict[str, Path], tmp_path: Path) -> None:
    target = shutil.copytree(results["zero3"], tmp_path / "out")
    (target / MANIFEST).unlink()
    (target / TAG).rename(target / "global_step1")
    (target / "latest").write_text("global_step1")
    before = tree(target)
    overwrite(target, "zero3")
    assert tree(target) == {**before, **fresh("zero3", tmp_path)}
    assert (target / "latest").read_text() == TAG


@pytest.mark.parametrize(
    "fixture",
    sorted(path.parent for path in (ROOT / "fixtures").glob("*/*/made_with.json")),
    ids=lambda p: p.name,
)
def test_a_checkpoint_of_any_engine_is_replaced(fixture: Path, tmp_path: Path) -> None:
    """Each file in it is known to belong."""
    found = next(path for path in (fixture / "checkpoint", *fixture.glob("step-*")) if path.exists())
    target = shutil.copytree(found, tmp_path / "out")
    overwrite(target, "hf")
    assert tree(target) == fresh("hf", tmp_path)


def test_a_published_model_with_its_tokenizer_is_replaced(results: dict[str, Path], tmp_path: Path) -> None:
    target = shutil.copytree(results["hf"], tmp_path / "out")
    (target / MANIFEST).unlink()
    (target / "tokenizer.json").write_text("{}")
    overwrite(target)
    assert tree(target) == fresh("universal", tmp_path)


# ---- what is not


def test_a_home_directory_with_an_adapter_and_a_thesis(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "thesis").mkdir(parents=True)
    (home / "thesis" / "thesis.tex").write_text("x")
    (home / ".bashrc").write_text("x")
    shutil.copy(next((ROOT / "fixtures").rglob("*.safetensors")), home / "adapter.safetensors")
    refused(home, ".bashrc", "thesis/")


@pytest.mark.parametrize(
    "entry",
    ["notes.txt", "train.py", "README.md", "logs/", "empty/", "link", f"{UNIVERSAL}/"],
)
@pytest.mark.parametrize("manifest", [True, False])
def test_one_entry_that_is_not_the_checkpoints(
    entry: str, manifest: bool, results: dict[str, Path], tmp_path: Path
) -> None:
    target = shutil.copytree(results["hf"], tmp_path / "out")
    if not manifest:
        (target / MANIFEST).unlink()
    added = target / entry
    if entry == "empty/":
        added.mkdir()
    elif entry.endswith("/"):
        added.mkdir()
        (added / "mine.pt").write_text("x")
    elif entry == "link":
        added.symlink_to(tmp_path)
    else:
        added.write_text("x")
    with pytest.raises(UsageError) as raised:
        overwrite(target)
    assert entry in str(raised.value)
    assert os.path.lexists(added)


def test_the_message_names_a_few_and_counts_the_rest(results: dict[str, Path], tmp_path: Path) -> None:
    target = shutil.copytree(results["hf"], tmp_path / "out")
    for number in range(40):
        (target / f"note{number:02}").write_text("x")
    refused(target, "note00", "note04 and 35 more")


def test_a_checkpoint_that_cannot_be_read(results: dict[str, Path], tmp_path: Path) -> None:
    target = shutil.copytree(results["hf"], tmp_path / "out")
    (target / MANIFEST).unlink()
    os.truncate(target / "model.safetensors", 100)
    refused(target, "Remove it yourself")


def test_a_manifest_that_cannot_be_read(results: dict[str, Path], tmp_path: Path) -> None:
    target = shutil.copytree(results["hf"], tmp_path / "out")
    (target / MANIFEST).write_text("x")
    refused(target, "damaged")


def test_a_manifest_that_lists_another_directorys_files(results: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    shutil.copy(results["hf"] / MANIFEST, target)
    (target / "thesis.tex").write_text("x")
    refused(target, "thesis.tex")


# ---- what appears during the run


def test_a_strangers_directory_that_appears_during_the_run(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def appear() -> None:
        target.mkdir(exist_ok=True)
        (target / "precious").write_text("x")

    refused(target, "precious", during=appear)
    assert tree(target) == {"precious": b"x"}


def test_a_file_that_appears_in_what_is_replaced(results: dict[str, Path], tmp_path: Path) -> None:
    target = shutil.copytree(results["hf"], tmp_path / "out")
    before = tree(target)

    def appear() -> None:
        (target / "precious").write_text("x")

    refused(target, "precious", during=appear)
    assert tree(target) == {**before, "precious": b"x"}


def test_a_file_that_appears_at_the_rename(
    results: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last look at the directory, and before it has another name."""
    target = shutil.copytree(results["hf"], tmp_path / "out")
    before = tree(target)
    rename = Path.rename

    def late(self: Path, to: Path) -> Path:
        if self == target:
            (target / "precious").write_text("x")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", late)
    refused(target, "precious", "meanwhile", during=lambda: None)
    assert tree(target) == {**before, "precious": b"x"}


def test_a_file_that_appears_in_what_was_replaced(
    results: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody holds the directory open. The result is there, and so is the file."""
    target = shutil.copytree(results["hf"], tmp_path / "out")
    unlink = Path.unlink

    def late(self: Path, missing_ok: bool = False) -> None:
        if self.name == "model.safetensors":
            (self.parent / "precious").write_text("x")
        unlink(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", late)
        with pytest.raises(ExecutionError, match="precious"):
            overwrite(target)
    complete = fresh("universal", tmp_path)
    assert complete.items() <= tree(target).items()
    assert tree(replacing.aside(target)) == {"precious": b"x"}
    (replacing.aside(target) / "precious").unlink()
    overwrite(target)  # finishes
    assert tree(target) == complete
    assert {path.name for path in tmp_path.iterdir()} == {"out", "fresh"}


def test_a_stranger_under_the_name_that_replaced_directories_get(
    results: dict[str, Path], tmp_path: Path
) -> None:
    target = shutil.copytree(results["hf"], tmp_path / "out")
    before = tree(target)
    old = replacing.aside(target)
    old.mkdir()
    (old / "precious").write_text("x")
    with pytest.raises(UsageError, match="Remove it yourself") as raised:
        overwrite(target)
    assert str(old) in str(raised.value)
    assert tree(old) == {"precious": b"x"}
    assert tree(target) == before


@pytest.mark.parametrize("manifest", [True, False])
def test_a_checkpoint_whose_removal_was_cut_off_is_removed(
    manifest: bool, results: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def killed(self: Path, missing_ok: bool = False) -> None:
        if self.name == MANIFEST or self.suffix == ".distcp":
            raise KeyboardInterrupt
        unlink(self, missing_ok)

    target = shutil.copytree(results["hf"], tmp_path / "out")
    old = shutil.copytree(results["dcp"], replacing.aside(target))
    if not manifest:
        (old / MANIFEST).unlink()
    files = list(replacing.entries(old))
    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        replacing.remove(old, files)
    assert len(tree(old)) > 1, "its removal had only begun"
    overwrite(target)
    assert not old.exists()
    assert tree(target) == fresh("universal", tmp_path)


# ---- a run's directory


@pytest.fixture
def run(results: dict[str, Path], tmp_path: Path) -> Path:
    """A run's directory: two steps, code, logs, and a step in Universal form."""
    directory = shutil.copytree(results["zero3"], tmp_path / "run")
    (directory / MANIFEST).unlink()
    shutil.copytree(directory / TAG, directory / "global_step1")
    shutil.copytree(results["universal"] / UNIVERSAL, directory / UNIVERSAL)
    (directory / "latest_universal").write_text(UNIVERSAL)
    (directory / "zero_to_fp32.py").write_text("# recovery")
    (directory / "train.py").write_text("# mine")
    (directory / "logs").mkdir()
    (directory / "logs" / "run.log").write_text("x")
    return directory


def test_a_run_loses_only_the_tag_that_is_replaced(run: Path, tmp_path: Path) -> None:
    before = tree(run)
    replaced = run / UNIVERSAL / "zero" / "model.norm.weight" / "exp_avg.pt"
    os.utime(replaced, ns=(0, 0))
    overwrite(run)
    assert replaced.stat().st_mtime_ns, "the tag is the new one"
    assert tree(run) == {**before, **fresh("universal", tmp_path)}
    assert not [path for path in run.rglob("*") if "ckpt-tool" in path.name and path.name != MANIFEST]
    assert not [path for path in tmp_path.iterdir() if "ckpt-tool" in path.name]


def test_a_run_without_the_tag_loses_nothing(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / UNIVERSAL)
    (run / "latest_universal").unlink()
    before = tree(run)
    overwrite(run)
    assert tree(run) == {**before, **fresh("universal", tmp_path)}


def test_the_file_that_names_the_tag_is_replaced_with_it(run: Path, tmp_path: Path) -> None:
    (run / "latest").write_text("global_step1")
    overwrite(run, "zero3")
    assert (run / "latest").read_text() == TAG
    assert (run / "train.py").exists()
    assert (run / "global_step1").exists()


def test_a_tag_with_something_else_in_it(run: Path) -> None:
    (run / UNIVERSAL / "analysis.ipynb").write_text("x")
    refused(run, "analysis.ipynb")


def test_a_tag_that_is_a_link(run: Path, tmp_path: Path) -> None:
    moved = (run / UNIVERSAL).rename(tmp_path / "elsewhere")
    (run / UNIVERSAL).symlink_to(moved)
    refused(run, UNIVERSAL)
    assert moved.exists()


@pytest.mark.parametrize("to", ["hf", "dcp"])
def test_a_result_without_tags_replaces_no_run(to: str, run: Path) -> None:
    refused(run, "train.py", "global_step1/", "logs/", to=to)


def test_a_file_that_names_no_tag_is_somebodys(run: Path) -> None:
    (run / "latest_universal").write_text("the latest universal truths")
    refused(run, "latest_universal")


def test_the_checksums_of_another_step_are_not_lost(
    run: Path, results: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copy(results["zero3"] / MANIFEST, run)
    refused(run, MANIFEST, TAG)


def test_a_run_into_which_a_kill_came(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the tag and what names it: the same command completes it."""
    before = tree(run)
    replace = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if self.name == "latest_universal":
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            overwrite(run)
    overwrite(run)
    assert tree(run) == {**before, **fresh("universal", tmp_path)}


def test_the_command_line_names_what_is_in_the_way(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("x")
    (home / MANIFEST).write_text(json.dumps({"manifest_version": 1, "files": []}))
    done = run_cli("convert", SOURCE, home, "--to", "universal", "--overwrite")
    assert done.rc == 2
    assert "thesis.tex" in done.stderr
    assert (home / "thesis.tex").exists()


def test_a_removal_that_left_empty_directories_behind(results: dict[str, Path], tmp_path: Path) -> None:
    """A kill between a directory's last file and the directory: what the manifest lists lay in it."""
    target = shutil.copytree(results["hf"], tmp_path / "out")
    old = shutil.copytree(results["universal"], replacing.aside(target))
    for file in (old / UNIVERSAL).rglob("*.pt"):
        file.unlink()
    overwrite(target)
    assert tree(target) == fresh("universal", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "fresh"}
