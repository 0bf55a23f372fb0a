"""Every command, through the program itself in a child process, while a call of the system fails: one
sentence and a documented exit code, or a result that does not depend on the call."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from ckpt_tool import api
from tests.conftest import Finished, config_of, copy_fixture
from tests.faults.forked import forked, tool
from tests.faults.injection import CODES, count, failing, system_calls

# Each in a directory with a run's ``source``, its ``config.json``, a ``published`` model of it and a
# Universal ``result``; ``out`` is to be written.
COMMANDS = {
    "inspect": "inspect source --tensors --experts --json",
    "inspect a model": "inspect published",
    "inspect --check": "inspect source --check",
    "verify": "verify result",
    "verify a source": "verify source",
    "verify two": "verify result source",
    "doctor": "doctor source --json",
    "doctor a model": "doctor published",
    "convert": "convert source out --to dcp --config config.json --workers 1 --json",
    "convert a model": "convert published out --to universal --workers 1 --verify",
    "reshard": "reshard source out --world 1 --ep 1 --workers 1",
    "consolidate": "consolidate source out --config config.json --dtype bf16 --workers 1",
}
WRITING = ("convert", "reshard", "consolidate")
# Calls whose failure may lose nothing: what the command prints is the same then.
HARMLESS = {
    "close": "what was read was read",
    "lstat": "os.path.realpath takes a path as it stands where it cannot look",
    "mkdir": "the directory was there already",
    "listdir": "a directory beside the checkpoint that cannot be looked into is named as unknown",
    "stat": "as above",
    "scandir": "as above",
    "open": "a reader that may open no more files closes others, and tries again",
}


def prepare(home: Path) -> None:
    """Put into ``home`` what the commands need."""
    source = copy_fixture("mixtral_w2e1", home / "copy").parent.rename(home / "source")
    shutil.rmtree(home / "copy")
    config = shutil.copy(config_of("mixtral_w2e1"), home / "config.json")
    api.convert(source, home / "published", to="hf", config=config)
    api.convert(source, home / "result", to="universal")


class Bench:
    """What a command does in a home where nothing fails, and where something does."""

    def __init__(self, name: str, home: Path) -> None:
        self.name, self.home = name, home
        self._before = self._tree()
        self.sound = self.run(count)
        self.counts: Counter[str] = Counter(json.loads((home.parent / "counts").read_text()))
        assert self.sound.rc == 0, self.sound

    def run(self, act: Callable[[str, int], None]) -> Finished:
        """The command, with what ``act`` makes of calls below the home; a file ``counts`` them."""
        verb, *rest = COMMANDS[self.name].split()
        places = {"source", "published", "result", "out", "config.json"}
        arguments = [str(self.home / word) if word in places else word for word in rest]

        def call() -> int:
            with system_calls(self.home, act) as layer:
                try:
                    return tool(verb, *arguments)()
                finally:
                    counts.write_text(json.dumps(layer.counts))

        counts = self.home.parent / "counts"
        for left in ("out", ".out.ckpt-tool-staging"):
            shutil.rmtree(self.home / left, ignore_errors=True)
        return forked(call)

    def _tree(self) -> dict[str, bytes]:
        return {
            str(path): path.read_bytes()
            for place in ("source", "published", "result")
            for path in (self.home / place).rglob("*")
            if path.is_file()
        }

    def fails(self, kind: str, number: int, code: int) -> None:
        """The ``number``-th call of a kind fails with ``code``: what is promised then."""
        done = self.run(failing(kind, number, code))
        assert "Traceback" not in done.stderr + done.stdout, done.stderr
        assert "bug" not in done.stderr, done.stderr
        assert self._tree() == self._before
        if done.rc == 0:
            assert kind in HARMLESS, f"a failure that was passed over: {done}"
            return
        assert done.rc in (2, 3, 4) or (done.rc == 1 and self.name.startswith(("verify", "doctor"))), done
        said = done.stderr.strip().splitlines()
        assert done.rc == 1 or (said and said[-1].startswith("ckpt-tool: ")), done
        if self.name.startswith(WRITING) and "is complete" not in done.stderr:
            assert not (self.home / "out").exists()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("commands") / "home"
    home.mkdir()
    prepare(home)
    return home


@pytest.mark.parametrize("name", COMMANDS)
def test_a_call_of_every_kind_fails_under_a_command(name: str, home: Path) -> None:
    """A third of the kinds under each; `python -m tests.faults.test_commands` has every call fail."""
    bench, own = Bench(name, home), list(COMMANDS).index(name)
    for index, (kind, calls) in enumerate(sorted(bench.counts.items())):
        if index % 3 == own % 3:
            bench.fails(kind, calls * (own % 4) // 4, CODES[kind][own % len(CODES[kind])])


def main() -> None:
    """Every call of every command fails once, with the error codes of its kind in turn."""
    wrong = 0
    for name in sys.argv[1:] or COMMANDS:
        with tempfile.TemporaryDirectory() as place:
            home = Path(place) / "home"
            home.mkdir()
            prepare(home)
            bench = Bench(name, home)
            for kind, calls in sorted(bench.counts.items()):
                for number in range(calls):
                    code = CODES[kind][number % len(CODES[kind])]
                    try:
                        bench.fails(kind, number, code)
                    except AssertionError as error:
                        wrong += 1
                        print(f"{name}: call {number} of {kind}, error {code}: {error}", flush=True)
            print(f"{name}: {sum(bench.counts.values())} calls failed, each once", flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
