"""A few threads taking work from one iterator, each with buffers of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Worker = TypeVar("Worker")


def in_parallel(
    items: Iterator[Item],
    make_worker: Callable[[], Worker],
    one: Callable[[Worker, Item], None],
    threads: int,
    stop: threading.Event | None = None,
) -> None:
    """Call ``one(worker, item)`` for all items, from ``threads`` threads.

    ``items`` is advanced under a lock. The first failure stops all threads and is raised here, as is an
    interrupt of the calling thread; either way no thread is left running. ``stop`` is set in both
    cases, for work that wants to end early.
    """
    lock = threading.Lock()
    stop = stop or threading.Event()
    failures: list[BaseException] = []
    # Not Thread.join: interrupted, it takes a running thread for stopped (bpo-45274, Python < 3.13).
    finished = threading.Semaphore(0)

    def run() -> None:
        try:
            worker = make_worker()
            while not stop.is_set():
                with lock:
                    item = next(items, None)
                if item is None:
                    return
                one(worker, item)
        except BaseException as error:
            failures.append(error)
            stop.set()
        finally:
            finished.release()

    started = ended = 0
    interrupt: BaseException | None = None
    try:
        for _ in range(threads):
            threading.Thread(target=run, daemon=True).start()
            started += 1
    except BaseException as error:
        interrupt = error
        stop.set()
    while ended < started:
        try:
            ended += finished.acquire(timeout=0.1)  # with a timeout, so that Ctrl-C is noticed
        except BaseException as error:
            interrupt = interrupt or error
            stop.set()
    if interrupt is not None:
        raise interrupt
    if failures:
        raise failures[0]
