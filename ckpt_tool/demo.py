"""The main job end to end on the small real checkpoint that ships with the package."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ckpt_tool import api, inspection, report
from ckpt_tool.comparison import Verdict
from ckpt_tool.errors import UsageError

_RESULTS = ("resharded", "universal", "model")


def run(directory: Path | None) -> None:
    """Inspect, re-shard, convert to Universal, consolidate, and verify all three; print a summary.

    Results go into ``directory``, or a temporary one that is removed.
    """
    checkpoint, config = _shipped()
    if directory is not None:
        _refuse_strangers(directory)
        _run(checkpoint, config, directory)
        report.show(f"The results are in {directory}.")
        return
    with tempfile.TemporaryDirectory(prefix="ckpt-tool-demo-") as temporary:
        _run(checkpoint, config, Path(temporary))
    report.show(
        "The results were in a temporary directory, which is removed: `ckpt-tool demo DIR` keeps them."
    )


def _refuse_strangers(directory: Path) -> None:
    """Raises:
    UsageError: there is something at the place for the results that is not an earlier demo's.
    """
    if not directory.exists():
        return
    own = {*_RESULTS, *(f".{name}.ckpt-tool-staging" for name in _RESULTS)}
    found = sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else [directory.name]
    other = next((name for name in found if name not in own), None)
    if other is not None:
        raise UsageError(
            f"{directory} exists and holds {other}, which is no result of the demo. Choose a new directory."
        )


def _shipped() -> tuple[Path, Path]:
    package = Path(__file__).parent
    installed = package / "_demo"
    source = package.parent / "fixtures" / "deepspeed" / "mixtral_w4e2"
    for candidate in (installed, source):
        if (candidate / "checkpoint").is_dir():
            return candidate / "checkpoint", candidate / "config.json"
    raise UsageError(f"The demo checkpoint is neither in {installed} nor in {source}; reinstall ckpt-tool.")


def _run(checkpoint: Path, config: Path, directory: Path) -> None:
    resharded, universal, model = (directory / name for name in _RESULTS)
    report.print_fields(
        "1. A checkpoint saved by DeepSpeed AutoEP + ZeRO-3",
        inspection.overview_lines(inspection.overview(api.catalogue(checkpoint))),
    )
    _timed(
        "2. Re-sharded: resumes exactly at EP 1 on 2 ranks",
        lambda how: api.reshard(checkpoint, resharded, ep=1, world=2, how=how),
    )
    _timed(
        "3. As a Universal checkpoint: loads at any topology, in ZeRO stages 1, 2 and 3",
        lambda how: api.convert(checkpoint, universal, to="universal", how=how),
    )
    _timed(
        "4. As fp32 safetensors for transformers",
        lambda how: api.consolidate(checkpoint, model, config=config, how=how),
    )
    verdicts = [
        (path.name, api.verify(checkpoint, path), api.verify(path))
        for path in (resharded, universal, model)
    ]
    report.print_fields(
        "5. Verified against the source, and by checksums",
        [(name, f"{_words(same)}; {_words(sound)}") for name, same, sound in verdicts],
    )


def _timed(title: str, job: Callable[[api.Execution], api.Result]) -> None:
    began = time.monotonic()
    with report.Progress("demo") as progress:
        result = job(api.Execution(meter=progress))
    report.print_fields(
        title,
        [
            ("written", f"{report.human_bytes(result.bytes_written)} in {result.files} files"),
            ("to", result.target),
            ("took", f"{time.monotonic() - began:.2f} s"),
        ],
    )


def _words(verdict: Verdict) -> str:
    if verdict.passed:
        return f"{verdict.tensors} tensors, {report.human_bytes(verdict.bytes_compared)} equal"
    return f"{len(verdict.differences)} DIFFERENCES, the first: {verdict.differences[0].message}"
