"""Small floats against torch's own casts, every value there is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ckpt_tool.containers.float8 import as_float32
from ckpt_tool.errors import ExecutionError

SMALL = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"]


@pytest.mark.parametrize("name", [*SMALL, "bfloat16", "float16", "float32", "float64"])
def test_values_are_torchs(name: str) -> None:
    dtype = getattr(torch, name)
    if dtype.itemsize <= 2:
        raw = torch.arange(1 << 8 * dtype.itemsize, dtype=torch.int32)
        raw = raw.to(torch.uint8 if dtype.itemsize == 1 else torch.uint16).view(torch.uint8)
    else:
        raw = torch.randn(999, dtype=dtype).view(torch.uint8)
    expected = raw.view(dtype).to(torch.float32)
    found = torch.from_numpy(as_float32(raw.numpy(), name).copy())
    assert found.dtype == torch.float32
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)
    assert torch.equal(found[~nan].view(torch.int32), expected[~nan].view(torch.int32))


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ExecutionError, match="int64"):
        as_float32(np.zeros(8, np.uint8), "int64")
