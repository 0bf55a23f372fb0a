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
    ended = [threading.Event() for _ in range(threads)]
    # Taken by a thread that begins, or here where an interrupt may have come before its start.
    claims = [threading.Lock() for _ in range(threads)]

    def run(number: int) -> None:
        if not claims[number].acquire(blocking=False):
            return
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
            ended[number].set()

    started = 0
    interrupt: BaseException | None = None
    while True:
        try:
            while started < threads and interrupt is None:
                started += 1
                threading.Thread(target=run, args=(started - 1,), daemon=True).start()
            for event in ended[:started]:
                while not event.wait(0.1):  # with a timeout, so that Ctrl-C is noticed
                    pass
            break
        except BaseException as error:  # an interrupt, or a thread that could not be started
            interrupt = interrupt or error
            stop.set()
            if started and claims[started - 1].acquire(blocking=False):
                ended[started - 1].set()
    if interrupt is not None:
        raise interrupt
    if failures:
        raise failures[0]
