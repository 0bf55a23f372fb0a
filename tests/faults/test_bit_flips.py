"""``verify`` finds every flipped bit of a result, and what the engines' own checksums cover of a source."""

from __future__ import annotations

import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.conftest import ROOT
from tests.faults.bit_flips import OUTPUTS, SOURCES, flipped, is_found, outcomes, unnoticed

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", OUTPUTS)
def test_flipped_bits_of_a_result_are_found(name: str, tmp_path: Path) -> None:
    assert unnoticed(name, 12, tmp_path) == []


@pytest.mark.scale
@pytest.mark.parametrize("name", OUTPUTS)
def test_many_flipped_bits_of_a_result_are_found(name: str, tmp_path: Path) -> None:
    assert unnoticed(name, 150, tmp_path, seed=1) == []


@pytest.mark.parametrize("name", SOURCES)
def test_a_flipped_bit_of_an_archives_data_is_found(name: str, tmp_path: Path) -> None:
    """Only files without checksums of their own can lose a bit unseen."""
    unseen = {kind for kind, outcome in outcomes(name, 12, tmp_path) if outcome == "unseen"}
    assert unseen <= {"*.safetensors", ".metadata", "config.json", "latest"}


# ---- files that the engine cannot load any more


def _loads(load: Callable[[], Any]) -> bool:
    try:
        load()
    except BaseException:
        return False
    return True


def _sound_and_not_loaded(
    source: Path, flips: Iterator[tuple[Path, int]], load: Callable[[Path], Any]
) -> list[str]:
    """Flips after which ``verify`` calls a source sound that torch does not load."""
    assert not is_found(source)
    return [
        f"{path.name}: bit {bit}"
        for path, bit in flips
        if flipped(path, bit, lambda path=path: not is_found(source) and not _loads(lambda: load(path)))
    ]


@pytest.mark.parametrize("count", [60, pytest.param(600, marks=pytest.mark.scale)])
@pytest.mark.parametrize("fixture", ["dense_w3", "dense_z2_w3"])
def test_an_archives_directory_that_torch_does_not_read(fixture: str, count: int, tmp_path: Path) -> None:
    """Records without a byte have names, too; and what miniz looks at, no checksum covers."""
    source = shutil.copytree(ROOT / "fixtures" / "deepspeed" / fixture / "checkpoint", tmp_path / "source")
    files = sorted(source.rglob("*.pt"))

    def flips() -> Iterator[tuple[Path, int]]:
        chosen = random.Random(count)
        for _ in range(count):
            path = chosen.choice(files)
            with zipfile.ZipFile(path) as archive:
                start = archive.start_dir
            yield path, chosen.randrange(8 * start, 8 * path.stat().st_size)

    assert _sound_and_not_loaded(source, flips(), lambda path: torch.load(path, weights_only=False)) == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [40, pytest.param(600, marks=pytest.mark.scale)])
def test_metadata_of_dcp_that_torch_does_not_read(count: int, tmp_path: Path) -> None:
    """Names stand there twice, as keys and as paths."""
    source = shutil.copytree(
        ROOT / "fixtures" / "dcp" / "dense_tied_w3" / "checkpoint", tmp_path / "source"
    )
    bits = 8 * (source / ".metadata").stat().st_size
    flips = ((source / ".metadata", random.Random(n).randrange(bits)) for n in range(count))
    assert (
        _sound_and_not_loaded(source, flips, lambda _: dcp_to_torch_save(source, tmp_path / "x.pt")) == []
    )
