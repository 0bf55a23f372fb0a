"""Names in a file cannot write to the terminal, and no message is long."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ckpt_tool.errors import CkptToolError, UnreadableError
from ckpt_tool.printable import printable
from tests.conftest import run_cli

HOSTILE = "w\x1b[2J\x07\n\u202eevil\u2066\x00\ud800"


def test_control_characters_and_marks_of_direction_are_escaped() -> None:
    shown = printable(HOSTILE)
    assert shown.isprintable()
    assert shown == r"w\x1b[2J\x07\n\u202eevil\u2066\x00\ud800"
    assert printable("модель 模型 é") == "модель 模型 é"


@pytest.mark.parametrize("kind", [CkptToolError, UnreadableError])
def test_a_message_of_75_megabytes_is_cut(kind: type[CkptToolError]) -> None:
    message = str(kind(f"begin {'x' * 75_000_000} end"))
    assert len(message) < 5000
    assert message.startswith("begin x")
    assert message.endswith("x end")
    assert "characters left out" in message


def test_a_name_that_would_clear_the_terminal_does_not(tmp_path: Path) -> None:
    name = HOSTILE.replace("\ud800", "")
    save_file({name: torch.ones(2, 2)}, tmp_path / "model.safetensors")
    for arguments in (["inspect", str(tmp_path), "--tensors", "*"], ["doctor", str(tmp_path)]):
        done = run_cli(*arguments)
        for text in (done.stdout, done.stderr):
            assert all(line.isprintable() for line in text.splitlines()), (arguments, text)
    shown = run_cli("inspect", str(tmp_path), "--tensors", "*").stdout
    assert r"w\x1b[2J\x07\n\u202eevil\u2066\x00" in shown
