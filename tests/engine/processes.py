"""How an engine runs in the tests: a child interpreter that imports once and forks one process per rank.

Ranks meet on the loopback device. Nothing outlives the test: the child has a session of its own, and
every process ends by an alarm when the caller was killed and cannot end it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
_TIMEOUT = "ENGINE_RUN_TIMEOUT"


def run_child(
    module: str,
    arguments: list[str],
    log: Path,
    timeout: float,
    *,
    python: str = sys.executable,
    environment: Mapping[str, str] | None = None,
) -> int | str:
    """``python -m module``, what it says in ``log``; its exit status, or in words that it took too long."""
    given = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        _TIMEOUT: str(int(timeout) + 10),
        **(environment or {}),
    }
    with log.open("wb") as output:
        child = subprocess.Popen(
            [python, "-m", module, *arguments],
            cwd=ROOT,
            env=given,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return child.wait(timeout)
        except subprocess.TimeoutExpired:
            return f"a timeout of {timeout:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def failure(engine: str, status: int | str, said: str) -> RuntimeError:
    """With the last words of the child."""
    tail = "\n".join(said.splitlines()[-60:])
    return RuntimeError(f"{engine} run ended with {status}:\n{tail}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end_in_time() -> None:
    """To be called first in the child; an alarm is not inherited over a fork."""
    signal.alarm(int(os.environ.get(_TIMEOUT, "310")))


def fork_ranks(world: int, port: int, rank_main: Callable[[int], None]) -> int:
    """Run ``rank_main(rank)`` in ``world`` processes; 0, or the status of the first that failed, which
    ends all others."""
    os.environ["MASTER_PORT"] = str(port)
    ranks = [_fork(world, rank, rank_main) for rank in range(world)]
    failed = 0
    while ranks:
        pid, status = os.wait()
        if pid not in ranks:
            continue
        ranks.remove(pid)
        if status and not failed:
            failed = os.waitstatus_to_exitcode(status) or 1
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    return abs(failed)


def _fork(world: int, rank: int, rank_main: Callable[[int], None]) -> int:
    pid = os.fork()
    if pid == 0:
        _be_rank(world, rank, rank_main)
    return pid


def _be_rank(world: int, rank: int, rank_main: Callable[[int], None]) -> NoReturn:
    end_in_time()
    code = 1
    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        rank_main(rank)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
