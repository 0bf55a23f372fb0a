"""Any module of the user's, in every ZeRO stage: what DeepSpeed's own ``zero_to_fp32`` gathers, bit for
bit, and loaded into the module."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model

import ckpt_tool
from ckpt_tool import api
from ckpt_tool.errors import UsageError
from tests.conftest import checkpoint_of, raw
from tests.engine.own_module_run import CASES, build, name_of, run

pytestmark = pytest.mark.engine
TIED = {"embed.weight", "head.weight"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    run(folder, CASES)
    return folder


def gathered(path: Path) -> dict[str, torch.Tensor]:
    """What the engine's own script makes of it."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()):
        found: dict[str, Any] = get_fp32_state_dict_from_zero_checkpoint(str(path))
    return {name: tensor.clone() for name, tensor in found.items()}


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_it_is_what_zero_to_fp32_gathers(case: dict[str, Any], saved: Path, tmp_path: Path) -> None:
    source = saved / name_of(case)
    result = api.consolidate(source, tmp_path / "out", verify=True)
    assert result.verdict is not None
    assert result.verdict.passed
    truth = gathered(source)
    held = load_file(tmp_path / "out" / "model.safetensors")
    if case["stage"] == 1:  # zero_to_fp32 knows of frozen parameters in stages 2 and 3 alone
        truth["frozen"] = (
            build().frozen.data.bfloat16().float() if case["dtype"] == "bf16" else build().frozen
        )
    assert set(held) | TIED == set(truth)
    assert len(TIED & set(held)) == 1
    for name, tensor in held.items():
        assert raw(tensor) == raw(truth[name].to(tensor.dtype)), name
    with ckpt_tool.open(source) as found:
        everything = {name: view.torch() for name, view in found.state_dict("own").items()}
    assert set(everything) == set(truth)
    for name, tensor in truth.items():
        assert raw(everything[name].to(tensor.dtype)) == raw(tensor), name


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_module_loads_it(case: dict[str, Any], saved: Path, tmp_path: Path) -> None:
    source = saved / name_of(case)
    api.consolidate(source, tmp_path / "out", max_shard_bytes=10**9)
    first, second = build(), build()
    missing, unexpected = load_model(first, tmp_path / "out" / "model.safetensors")
    assert (missing, unexpected) == (set(), [])
    with ckpt_tool.open(source) as found:
        second.load_state_dict(found.state_dict("own"))
    assert first.head.weight is first.embed.weight
    for name, tensor in first.state_dict().items():
        assert raw(tensor) == raw(second.state_dict()[name]), name
    assert not torch.equal(first.embed.weight, build().embed.weight)


@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.parametrize("to", ["universal", "dcp", "zero2"])
def test_by_way_of_another_format(to: str, case: dict[str, Any], saved: Path, tmp_path: Path) -> None:
    source = saved / name_of(case)
    api.convert(source, tmp_path / "between", to=to, verify=True)
    api.consolidate(tmp_path / "between", tmp_path / "out")
    api.consolidate(source, tmp_path / "direct")
    between, direct = (load_file(tmp_path / one / "model.safetensors") for one in ("out", "direct"))
    assert set(between) | TIED == set(direct) | TIED
    for name, tensor in between.items():
        assert raw(tensor) == raw(direct["embed.weight" if name in TIED else name]), name
    assert len(TIED & set(between)) == (2 if to == "dcp" else 1)  # DCP has no word for tied tensors


def test_routed_experts_still_need_the_family(tmp_path: Path) -> None:
    import shutil

    shutil.copytree(checkpoint_of("mixtral_w4e2"), tmp_path / "run" / "checkpoint")
    with pytest.raises(UsageError, match="routed experts"):
        api.consolidate(tmp_path / "run" / "checkpoint", tmp_path / "out")
