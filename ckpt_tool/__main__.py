"""The program: ``python -m ckpt_tool``, and ``ckpt-tool`` where it is installed."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

_USAGE = 2
_INTERRUPTED = 128 + signal.SIGINT
_TERMINATED = 128 + signal.SIGTERM


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which schedulers send before they kill: the same as Ctrl-C to all that it passes."""

    came = False


def main() -> None:
    """Run the command line. Imports take a moment in which Ctrl-C is Ctrl-C already."""
    # `| head` ends the command as it ends others, and not with the exit code of a check that failed.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _terminate)
        _prepare_streams()
        from ckpt_tool.cli import main as command

        command()
    except KeyboardInterrupt:
        sys.exit(_interrupted())
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            raise SystemExit(_interrupted()) from None
        raise


def _prepare_streams() -> None:
    """Whatever the locale and whoever started the program, every message can be printed somewhere."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # Else the next file that is opened would get the number, and what libraries print.
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115 (until the program ends)
    if sys.stdout is None:
        sys.stderr.write("ckpt-tool: standard output is closed. Redirect it, to /dev/null for example.\n")
        sys.exit(_USAGE)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that the locale cannot express


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001 (what signal calls)
    _Terminated.came = True
    raise _Terminated


def _interrupted() -> int:
    with contextlib.suppress(OSError):
        sys.stderr.write(f"ckpt-tool: {'terminated' if _Terminated.came else 'interrupted'}\n")
    return _TERMINATED if _Terminated.came else _INTERRUPTED


if __name__ == "__main__":
    main()
