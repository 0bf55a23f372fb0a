"""Every system call of a small conversion fails once: always our error, nothing published or all of it,
the source untouched, and the same command afterwards gives the same bytes."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ckpt_tool import api
from ckpt_tool.errors import CkptToolError
from ckpt_tool.manifest import JOURNAL
from tests.conftest import ROOT, tree
from tests.faults.injection import CODES, count, failing, system_calls

pytestmark = pytest.mark.slow


class Job(NamedTuple):
    """A conversion of a fixture; ``before`` is what it is to overwrite."""

    fixture: str
    parameters: dict[str, Any]
    before: bool = False


JOBS = {
    "zero3-universal": Job("deepspeed/mixtral_w2e1", {"to": "universal"}),
    "zero2-zero3": Job("deepspeed/dense_z2_w3", {"to": "zero3"}),
    "dcp-hf": Job("dcp/dense_tied_w3", {"to": "hf", "config": "config.json"}),
    "zero3-dcp": Job("deepspeed/dense_w3", {"to": "dcp", "config": "config.json", "weights_only": True}),
    "overwrite-verify": Job("deepspeed/dense_w3", {"to": "zero1", "verify": True}, before=True),
}
# Calls whose failure may lose nothing, so that the command succeeds; its result is compared all the same.
HARMLESS = {
    "close": "what was read was read, and unfinished files are written again",
    "lstat": "os.path.realpath takes a path as it stands where it cannot look",
    "mkdir": "the directory was there already",
    "listdir": "a directory beside the checkpoint that cannot be looked into is named as unknown",
    "stat": "as above",
    "open": "a reader that may open no more files closes others, and tries again",
}
# Where something is replaced: the list of what is removed only helps a removal that is cut off.
OF_THE_LIST = {"open", "unlink", "replace"}
_AT_MOST = 4  # calls of one kind that fail in CI; `python -m tests.faults.test_system_calls` has all fail


class Bench:
    """A source and a target of one job in a directory of their own."""

    def __init__(self, name: str, home: Path) -> None:
        self.home, self.name = home, name
        self._job = job = JOBS[name]
        fixture = ROOT / "fixtures" / job.fixture
        shutil.copytree(fixture / "checkpoint", home / "source")
        self._parameters = dict(job.parameters)
        if "config" in self._parameters:
            self._parameters["config"] = fixture / "config.json"
        self.target = home / "out"
        self._prepared = home.parent / f"{home.name}-before"
        if job.before:
            api.convert(home / "source", self._prepared, to="universal")
        self._source = self._state_of_source()
        self.prepare()
        with system_calls(home, count) as layer:
            self.convert()
        self.counts = dict(layer.counts)
        self.expected = tree(self.target)

    def prepare(self) -> None:
        """What is there before the command: nothing, or what it is to replace."""
        shutil.rmtree(self.target, ignore_errors=True)
        if self._job.before:
            shutil.copytree(self._prepared, self.target)

    def convert(self) -> None:
        how = api.Execution(max_memory=1 << 20, workers=1, overwrite=self._job.before)
        api.convert(self.home / "source", self.target, how=how, **self._parameters)

    def _state_of_source(self) -> dict[str, tuple[bytes, int]]:
        files = (path for path in (self.home / "source").rglob("*") if path.is_file())
        return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    def fails(self, kind: str, number: int, code: int) -> None:
        """The ``number``-th call of a kind fails with ``code``; all that is promised then is checked."""
        self.prepare()
        told: CkptToolError | None = None
        try:
            with system_calls(self.home, failing(kind, number, code)):
                self.convert()
        except CkptToolError as error:
            told = error
        self._check_result(told, kind, code)
        assert self._state_of_source() == self._source
        self.convert()
        assert tree(self.target) == self.expected
        assert sorted(path.name for path in self.home.iterdir()) == ["out", "source"]

    def _check_result(self, told: CkptToolError | None, kind: str, code: int) -> None:
        found = tree(self.target)
        if told is None:
            of_the_list = self._job.before and kind in OF_THE_LIST
            assert of_the_list or kind in HARMLESS, "a failure that was passed over"
            assert of_the_list or kind != "open" or code == errno.EMFILE
            assert found == self.expected
            return
        assert told.exit_code in (2, 3, 4)
        assert len(str(told).splitlines()) == 1
        if "is complete" in str(told):
            found.pop(JOURNAL, None)
            assert found == self.expected
        elif self._job.before:
            assert found == tree(self._prepared)
        else:
            assert not self.target.exists()


@pytest.fixture(scope="module", params=JOBS)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    home = tmp_path_factory.mktemp("calls") / "home"
    home.mkdir()
    return Bench(request.param, home)


def test_a_call_of_every_kind_fails(bench: Bench) -> None:
    """One of each kind in one half of the jobs, one in the other; more in the test below."""
    own = list(JOBS).index(bench.name) % 2
    for index, (kind, calls) in enumerate(sorted(bench.counts.items())):
        if index % 2 == own:
            number = calls - 1 if index // 2 % 2 else calls // 2
            bench.fails(kind, number, CODES[kind][index % len(CODES[kind])])


@pytest.mark.scale
def test_calls_all_over_a_conversion_fail(bench: Bench) -> None:
    for kind, calls in sorted(bench.counts.items()):
        for number in sorted({calls * part // _AT_MOST for part in range(_AT_MOST)}):
            bench.fails(kind, number, CODES[kind][number % len(CODES[kind])])


def test_the_layer_sees_the_calls_of_a_conversion(bench: Bench) -> None:
    """Else the tests above would test nothing."""
    expected = set(CODES) - {"rmdir", "replace", "file.read"}
    assert expected <= set(bench.counts), expected - set(bench.counts)
    assert sum(bench.counts.values()) > 100


def main() -> None:
    """Every call of every job fails once; the number of them."""
    os.fsync = lambda fd: None
    for name in JOBS:
        with tempfile.TemporaryDirectory() as place:
            home = Path(place) / "home"
            home.mkdir()
            bench = Bench(name, home)
            for kind, calls in sorted(bench.counts.items()):
                for number in range(calls):
                    try:
                        bench.fails(kind, number, CODES[kind][number % len(CODES[kind])])
                    except BaseException:
                        print(f"{name}: call {number} of {kind}", flush=True)
                        raise
            print(f"{name}: {sum(bench.counts.values())} calls failed, each once", flush=True)


if __name__ == "__main__":
    main()
