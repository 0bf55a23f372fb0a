"""A few threads taking work from one iterator, each with buffers of its own."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
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
    # Not Event.wait: interrupted as it takes its lock again, it ends in "release unlocked lock".
    ended = [False] * threads
    wake = [_thread.allocate_lock() for _ in range(threads)]
    for one_ended in wake:
        one_ended.acquire()
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
            end(number)

    def end(number: int) -> None:
        ended[number] = True
        with suppress(RuntimeError):  # released before
            wake[number].release()

    started = 0
    interrupt: BaseException | None = None
    while True:
        try:
            while started < threads and interrupt is None:
                started += 1
                threading.Thread(target=run, args=(started - 1,), daemon=True).start()
            for number in range(started):
                while not ended[number]:
                    wake[number].acquire(timeout=0.1)  # so that Ctrl-C is noticed
            break
        except BaseException as error:  # an interrupt, or a thread that could not be started
            # Thread.start, interrupted as it takes its lock again, ends in "release unlocked lock".
            cause = error.__context__
            interrupt = interrupt or (cause if isinstance(cause, KeyboardInterrupt) else error)
            stop.set()
            if started and claims[started - 1].acquire(blocking=False):
                end(started - 1)
    if interrupt is not None:
        raise interrupt
    if failures:
        raise failures[0]
