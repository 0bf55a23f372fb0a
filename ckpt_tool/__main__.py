"""The program: ``python -m ckpt_tool``, and ``ckpt-tool`` where it is installed."""

from __future__ import annotations

import signal
import sys

_INTERRUPTED = 130


def main() -> None:
    """Run the command line. Imports take a moment in which Ctrl-C is Ctrl-C already."""
    # `| head` ends the command as it ends others, and not with the exit code of a check that failed.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        from ckpt_tool.cli import main as command

        command()
    except KeyboardInterrupt:
        sys.exit(_interrupted())
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            _interrupted()
        raise


def _interrupted() -> int:
    sys.stderr.write("ckpt-tool: interrupted\n")
    return _INTERRUPTED


if __name__ == "__main__":
    main()
