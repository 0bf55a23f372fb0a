"""The main job end to end on the small real checkpoint that ships with the package."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from ckpt_tool import api, inspection, report
from ckpt_tool.comparison import Verdict
from ckpt_tool.errors import UsageError


def run(directory: Path | None) -> None:
    """Inspect, convert to Universal, consolidate to fp32 safetensors, and verify both; print a summary.

    Results go into ``directory``, or a temporary one that is removed.
    """
    checkpoint, config = _shipped()
    if directory is not None:
        _run(checkpoint, config, directory)
        return
    with tempfile.TemporaryDirectory(prefix="ckpt-tool-demo-") as temporary:
        _run(checkpoint, config, Path(temporary))


def _shipped() -> tuple[Path, Path]:
    package = Path(__file__).parent
    installed = package / "_demo"
    source = package.parent / "fixtures" / "deepspeed" / "mixtral_w4e2"
    for candidate in (installed, source):
        if (candidate / "checkpoint").is_dir():
            return candidate / "checkpoint", candidate / "config.json"
    raise UsageError(f"The demo checkpoint is neither in {installed} nor in {source}; reinstall ckpt-tool.")


def _run(checkpoint: Path, config: Path, directory: Path) -> None:
    universal, model = directory / "universal", directory / "model"
    report.print_fields(
        "1. A checkpoint saved by DeepSpeed AutoEP + ZeRO-3",
        inspection.overview_lines(inspection.overview(api.open(checkpoint))),
    )
    _step("2. As a Universal checkpoint, which resumes at any topology", "convert", checkpoint, universal)
    _step("3. As fp32 safetensors for transformers", "consolidate", checkpoint, model, config)
    verdicts = {
        "universal": api.verify(checkpoint, universal),
        "model": api.verify(checkpoint, model),
        "universal, checksums": api.verify(universal),
        "model, checksums": api.verify(model),
    }
    report.print_fields("4. Verified", [(name, _words(verdict)) for name, verdict in verdicts.items()])


def _step(title: str, verb: str, source: Path, target: Path, config: Path | None = None) -> None:
    began = time.monotonic()
    with report.Progress(verb) as progress:
        how = api.Execution(meter=progress)
        if verb == "convert":
            result = api.convert(source, target, to="universal", how=how)
        else:
            result = api.consolidate(source, target, config=config, how=how)
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
        return f"{verdict.tensors} tensors equal, {report.human_bytes(verdict.bytes_compared)} compared"
    return f"{len(verdict.differences)} DIFFERENCES, the first: {verdict.differences[0].message}"
