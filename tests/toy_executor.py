"""Another way to carry out a plan, in one file: processes that share nothing with this one but the disk.

Small files are written each by one process, large ones in parts by several. It is passed where a conversion
is asked for: ``api.convert(..., how=Execution(executor=OtherProcesses()))``.
"""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ckpt_tool.execute.base import Passed, Source
from ckpt_tool.execute.budget import Budget
from ckpt_tool.execute.in_order import write_file
from ckpt_tool.execute.meter import Meter, Silent
from ckpt_tool.execute.writing import Part, seal, write_part
from ckpt_tool.plan import Plan, PlannedFile
from ckpt_tool.storage import Writer
from ckpt_tool.written import WrittenExtent, WrittenFile


class _Job(NamedTuple):
    """What a process writes with."""

    plan: Plan
    source: Source
    sink: Writer
    budget: Budget


_job: _Job


def _arrive(sent: bytes) -> None:
    """A process has begun: it takes the job that others have sent."""
    global _job
    _job = pickle.loads(sent)


def _file(number: int) -> tuple[WrittenFile, Passed]:
    source = copy.copy(_job.source)  # one that has read nothing yet
    layout = _job.plan.files[number].layout()
    return write_file(layout, source, _job.sink, _job.budget, Silent()), source.passed()


def _part(number: int, part: Part) -> tuple[list[WrittenExtent], Passed]:
    source = copy.copy(_job.source)
    layout = _job.plan.files[number].layout()
    _job.sink.join(layout.path)
    written = write_part(layout, part, source, _job.sink, _job.budget, Silent())
    _job.sink.finish(layout.path)
    return written, source.passed()


@dataclass
class OtherProcesses:
    """An executor with so many processes. Files of more than ``large`` bytes are cut into parts of that."""

    processes: int = 2
    large: int = 64 << 20
    sent: int = 0  # bytes of the last job

    def __call__(
        self,
        plan: Plan,
        source: Source,
        sink: Writer,
        budget: Budget,
        *,
        meter: Meter,
        skip: Callable[[PlannedFile], bool],
        on_file: Callable[[WrittenFile], None],
    ) -> None:
        each = replace(budget, workers=1, largest=min(budget.largest, budget.nbytes() // self.processes))
        sent = pickle.dumps(_Job(plan, source, sink, each))
        self.sent = len(sent)
        wanted = [(number, file) for number, file in enumerate(plan.files) if not skip(file)]
        spawn = multiprocessing.get_context("spawn")
        try:
            with ProcessPoolExecutor(self.processes, spawn, _arrive, (sent,)) as pool:
                parts = {
                    pool.submit(_part, number, part): number
                    for number, file in wanted
                    if file.size > self.large
                    for part in self._parts(file, sink)
                }
                files = [pool.submit(_file, number) for number, file in wanted if file.size <= self.large]
                try:
                    self._collect(plan, source, sink, meter, on_file, parts, files)
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
        finally:
            sink.close()

    def _parts(self, file: PlannedFile, sink: Writer) -> Iterable[Part]:
        sink.create(file.path, file.size)
        return [Part(low, low + self.large) for low in range(0, file.size, self.large)]

    def _collect(
        self,
        plan: Plan,
        source: Source,
        sink: Writer,
        meter: Meter,
        on_file: Callable[[WrittenFile], None],
        parts: dict[Future[Any], int],
        files: list[Future[Any]],
    ) -> None:
        """Take what the processes report; whoever's last part is there is sealed here."""
        left = {number: sum(n == number for n in parts.values()) for number in parts.values()}
        extents: dict[int, list[WrittenExtent]] = {number: [] for number in left}
        for future in as_completed([*parts, *files]):
            done, passed = future.result()
            source.take_over(passed)
            if future not in parts:
                meter.add(done.size)
                on_file(done)
                continue
            number = parts[future]
            extents[number] += done
            left[number] -= 1
            if not left[number]:
                on_file(seal(plan.files[number].layout(), extents[number], sink, meter))
