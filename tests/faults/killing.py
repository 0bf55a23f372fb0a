"""Conversions that are killed, in a forked child: at a chosen call of the system, or at a moment."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.injection import CHANGING, system_calls


class Killed:
    """Kills its own process before the ``number``-th call that changes something on the disk. As a power
    cut, no code runs after."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self, kind: str, number: int) -> None:
        if kind not in CHANGING:
            return
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1


def changing_calls(home: Path, convert: Callable[[], object]) -> list[str]:
    """The kinds of all calls of a conversion that change something, in order."""
    seen: list[str] = []

    def act(kind: str, number: int) -> None:
        if kind in CHANGING:
            seen.append(kind)

    with system_calls(home, act):
        convert()
    return seen


def killed_at(number: int, home: Path, convert: Callable[[], object]) -> bool:
    """Run ``convert`` in a child that is killed before its ``number``-th changing call; whether it was."""

    def call() -> None:
        with system_calls(home, Killed(number)):
            convert()

    return _ended(_forked(call)) == -signal.SIGKILL


def killed_after(seconds: float, convert: Callable[[], object]) -> bool:
    """Run ``convert`` in a child that is killed after a while; whether it was not done yet."""
    child = _forked(convert)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return _ended(child) == -signal.SIGKILL


def _forked(call: Callable[[], object]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        call()
        code = 0
    except BaseException as error:
        sys.__stderr__ and sys.__stderr__.write(f"{error}\n")
    finally:
        os._exit(code)


def _ended(child: int) -> int:
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), code
    return code
