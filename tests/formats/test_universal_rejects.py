"""Files of one parameter of a Universal directory that contradict each other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from ckpt_tool import api
from ckpt_tool.errors import UnreadableError
from tests.conftest import checkpoint_of
from tests.diagnosis.tools import edit

EXPERTS, DENSE = "model.layers.0.mlp.experts.w1", "model.norm.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("universal") / "out"
    api.convert(checkpoint_of("mixtral_w2e1"), target, to="universal")
    return next(target.glob("global_step*"))


@pytest.mark.parametrize(
    ("parameter", "state", "flag"),
    [
        (EXPERTS, "exp_avg", None),
        (EXPERTS, "fp32", None),
        (EXPERTS, "exp_avg_sq", False),
        (DENSE, "fp32", True),
    ],
)
def test_the_flag_of_experts_in_one_file(
    parameter: str, state: str, flag: bool | None, made: Path, tmp_path: Path
) -> None:
    tag = Path(shutil.copytree(made, tmp_path / made.name))

    def change(content: dict[str, Any]) -> None:
        content.pop("is_expert_param", None)
        if flag is not None:
            content["is_expert_param"] = flag

    edit(tag / "zero" / parameter / f"{state}.pt", change)
    with pytest.raises(UnreadableError, match="is_expert_param"):
        api.open(tag)


def test_the_sound_one_is_read(made: Path) -> None:
    assert api.open(made).topology is not None
