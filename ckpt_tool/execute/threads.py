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

    pool = [threading.Thread(target=run, daemon=True) for _ in range(threads)]
    try:
        for thread in pool:
            thread.start()
        for thread in pool:
            while thread.is_alive():
                thread.join(0.1)  # with a timeout, so that Ctrl-C is noticed
    except BaseException:
        stop.set()
        for thread in pool:
            if thread.ident is not None:
                thread.join()
        raise
    if failures:
        raise failures[0]
