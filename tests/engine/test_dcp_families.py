"""A config.json beside a DCP checkpoint changes nothing in a reshard, whatever the family calls things."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp

from tests.engine.hf_models import MODELS, NEWER_ONLY, build
from tests.formats.dcp_tools import convert, read
from tests.formats.test_dcp_keys import assert_same, load

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("name", [name for name in MODELS if name not in NEWER_ONLY])
def test_keys_paths_and_values_stay(name: str, tmp_path: Path) -> None:
    model = build(name)
    state = {"model": {key: value.detach().contiguous() for key, value in model.state_dict().items()}}
    source = tmp_path / "c"
    dcp.save(state, checkpoint_id=source, no_dist=True)
    (source / "config.json").write_text(json.dumps(model.config.to_dict(), default=str))
    convert(source, tmp_path / "out", world=2)
    assert_same(load(tmp_path / "out"), state)
    with_config = {tensor.name for tensor in read(tmp_path / "out")[1].tensors}
    assert with_config == {tensor.name for tensor in read(source)[1].tensors}
