"""What the tests of the doctor share: findings by their kind, and changes made with the real torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ckpt_tool import api
from ckpt_tool.diagnosis import Diagnosis, Finding
from tests.conftest import ROOT, config_of


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Load a file, let ``change`` alter what it holds, and save it again."""
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def optim(rank: int, prefix: str = "") -> str:
    return f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def model(rank: int) -> str:
    return f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"


def flats(
    path: Path, change: Callable[[list[torch.Tensor], dict[int, dict[str, torch.Tensor]]], Any]
) -> None:
    """Change the masters and the optimizer states of a ZeRO-3 rank: lists by sub-group."""

    def inner(content: Any) -> None:
        zero = content["optimizer_state_dict"]
        with torch.no_grad():
            change(zero["fp32_flat_groups"], zero["optimizer_state_dict"]["state"])

    edit(path, inner)


def examined(source: Path, fixture: str | None = None) -> Diagnosis:
    """The diagnosis, with the config of a DeepSpeed fixture where one is named."""
    config = config_of(fixture) if fixture else None
    return api.doctor(source, config=config, how=api.Execution(workers=2))


def one(source: Path, check: str, fixture: str | None = None) -> Finding:
    """The finding of a kind: there is exactly one, and no other error."""
    diagnosis = examined(source, fixture)
    kinds = [(finding.check, finding.severity.value) for finding in diagnosis.findings]
    found = [finding for finding in diagnosis.findings if finding.check == check]
    assert len(found) == 1, kinds
    assert all(kind == check for kind, severity in kinds if severity == "error"), kinds
    return found[0]


def fixtures() -> list[Path]:
    """The directory of every fixture."""
    return sorted(path.parent for path in (ROOT / "fixtures").glob("*/*/made_with.json"))


def source_of(fixture: Path) -> Path:
    return next(path for path in (fixture / "checkpoint", *fixture.glob("step-*")) if path.exists())
