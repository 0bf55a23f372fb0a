"""Code under test in a child of this process: made by fork, because starting an interpreter takes longer
than most tests, and ended by whatever the test does to it."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.conftest import Finished

_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 1, 2
_CAPABILITY_VERSION_3 = 0x20080522


def forked(call: Callable[[], int | None], *, stdout: str | os.PathLike[str] | None = None) -> Finished:
    """What ``call`` prints in a child process, and its exit code; minus the signal that killed it.

    ``stdout`` is opened instead of a temporary file. The child runs no handlers at its exit.
    """
    with tempfile.TemporaryDirectory() as home:
        streams = [Path(stdout or f"{home}/out"), Path(f"{home}/err")]
        child = os.fork()
        if child == 0:
            os._exit(_in_child(call, streams))
        _, status = os.waitpid(child, 0)
        said = [path.read_text() if path.is_file() else "" for path in streams]
    return Finished(os.waitstatus_to_exitcode(status), said[0], said[1])


def _in_child(call: Callable[[], int | None], streams: list[Path]) -> int:
    code: int | None = 99
    try:
        for number, path in enumerate(streams, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))
        code = call()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = 120  # as the interpreter does
    return code or 0


def tool(*arguments: str | os.PathLike[str]) -> Callable[[], int]:
    """The whole program, for ``forked``."""

    def call() -> int:
        from ckpt_tool.__main__ import main

        sys.argv = ["ckpt-tool", *map(os.fspath, arguments)]
        os.environ["COLUMNS"] = "200"
        main()
        return 0

    return call


def as_an_ordinary_user(call: Callable[[], int]) -> Callable[[], int]:
    """``call`` under the files' permissions, which mean nothing to root: without root's capabilities to
    pass them by. (Another user could not even read the directories that pytest makes.)"""

    def without() -> int:
        if os.geteuid() == 0:
            kept = ~(1 << _CAP_DAC_OVERRIDE | 1 << _CAP_DAC_READ_SEARCH) & 0xFFFFFFFF
            header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
            effective, permitted, _ = _capabilities(header)
            low = struct.pack("III", effective[0] & kept, permitted[0] & kept, 0)
            high = struct.pack("III", effective[1], permitted[1], 0)
            if _LIBC.capset(header, low + high) != 0:
                raise OSError(ctypes.get_errno(), "capset")
        return call()

    return without


def _capabilities(header: bytes) -> list[tuple[int, int]]:
    """(low, high) 32 bits each of the effective, permitted and inheritable capabilities."""
    data = ctypes.create_string_buffer(24)
    if _LIBC.capget(header, data) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    low, high = struct.unpack("III", data.raw[:12]), struct.unpack("III", data.raw[12:])
    return list(zip(low, high, strict=True))


_LIBC = ctypes.CDLL(None, use_errno=True)
