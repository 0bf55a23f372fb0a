"""Places that are named by URLs, and what every store has to do: the local one, and one in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ckpt_tool import api
from ckpt_tool.cli import app
from ckpt_tool.errors import ExecutionError, UsageError
from ckpt_tool.execute.local import execute
from ckpt_tool.manifest import MANIFEST
from ckpt_tool.storage import LocalLocation, Order
from ckpt_tool.stores import known
from ckpt_tool.stores.known import open_location
from ckpt_tool.written import WrittenFile
from tests.conftest import ROOT, checkpoint_of, tree
from tests.memory_store import MemoryStore


def run(*arguments: str | Path) -> tuple[int, str]:
    found = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=True)
    return found.exit_code, found.output + str(found.exception or "")


# ---- URLs


def test_file_urls_are_local_paths(tmp_path: Path) -> None:
    place = tmp_path / "a run"
    place.mkdir()
    spelled = place.as_uri()
    assert "%20" in spelled
    for url in (spelled, spelled.replace("file://", "file://localhost"), spelled.replace("file:", "FILE:")):
        assert open_location(url) == LocalLocation(place)
    assert str(open_location(spelled)) == str(place)


def test_the_command_line_takes_file_urls(tmp_path: Path) -> None:
    source = checkpoint_of("mixtral_w2e1")
    assert run("convert", source.as_uri(), (tmp_path / "url").as_uri(), "--to", "universal", "-q")[0] == 0
    assert run("convert", source, tmp_path / "path", "--to", "universal", "-q")[0] == 0
    assert tree(tmp_path / "url") == tree(tmp_path / "path")
    assert run("verify", (tmp_path / "url").as_uri(), source.as_uri())[0] == 0
    code, printed = run("inspect", (tmp_path / "url").as_uri())
    assert (code, str(tmp_path / "url") in printed) == (0, True)


@pytest.mark.parametrize("url", ["s4://bucket/run", "S4://bucket/run", "git+ssh://host/run"])
def test_an_unknown_scheme_is_told_with_those_that_are_known(url: str, tmp_path: Path) -> None:
    scheme = url.partition(":")[0].lower()
    for source, target in ((url, tmp_path / "out"), (checkpoint_of("mixtral_w2e1"), url)):
        with pytest.raises(UsageError, match=f"not known: {scheme.replace('+', '.')}. Known are .*file://"):
            api.convert(source, target, to="universal")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["file://server/share/run", "file://"])
def test_a_file_url_of_another_machine_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="three slashes and an absolute path"):
        open_location(url)


def test_a_path_with_a_colon_is_a_path(tmp_path: Path) -> None:
    for path in ("./s3://x", "c:/x", str(tmp_path / "a://b")):
        assert open_location(path) == LocalLocation(Path(path))


# ---- one contract, whatever the store

FIXTURES = {"zero3": "deepspeed/mixtral_w4e2", "dcp": "dcp/mixtral_accelerate_w2"}
CONVERSIONS = [("zero3", "hf"), ("zero3", "universal"), ("zero3", "zero3"), ("dcp", "hf")]
ORDERS = (Order.PATCHED, Order.FRONT_TO_BACK)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """A store that is known by one line."""
    monkeypatch.setattr(known, "STORES", dict(known.STORES))
    store = MemoryStore()
    known.register("mem", store)
    return store


class Ends:
    """A source and a destination, each in a store."""

    def __init__(self, kinds: tuple[str, str], source: str, memory: MemoryStore, tmp_path: Path) -> None:
        fixture = ROOT / "fixtures" / FIXTURES[source]
        self.config = fixture / "config.json"
        self.local, self.memory, self.kinds = tmp_path / "local", memory, kinds
        for path, data in tree(fixture / "checkpoint").items():
            if kinds[0] == "memory":
                memory.put(f"bucket/source/{path}", data)
            else:
                file = self.local / "source" / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
        if kinds[0] == "memory":
            memory.put("bucket/source/config.json", self.config.read_bytes())
        else:
            (self.local / "source" / "config.json").write_bytes(self.config.read_bytes())
        self.source, self.target = (
            f"mem://bucket/{name}" if kind == "memory" else str(self.local / name)
            for kind, name in zip(kinds, ("source", "out"), strict=True)
        )

    def convert(self, to: str, **how: Any) -> api.Result:
        more = {"world": 2, "ep": 2} if to == "zero3" else {}
        return api.convert(self.source, self.target, to=to, how=api.Execution(fsync=False, **how), **more)

    def result(self) -> dict[str, bytes]:
        if self.kinds[1] == "memory":
            prefix = "bucket/out/"
            return {
                key.removeprefix(prefix): self.memory.blobs[key].data
                for key in self.memory.below("bucket/out")
            }
        return tree(self.local / "out")


KINDS = [(a, b) for a in ("local", "memory") for b in ("local", "memory")]


@pytest.mark.parametrize(("source", "to"), CONVERSIONS)
@pytest.mark.parametrize("order", ORDERS)
def test_a_conversion_gives_the_same_bytes_between_any_stores(
    order: Order, source: str, to: str, memory: MemoryStore, tmp_path: Path
) -> None:
    memory.order = order
    results = []
    for number, kinds in enumerate(KINDS):
        memory.blobs.clear()
        ends = Ends(kinds, source, memory, tmp_path / str(number))
        ends.convert(to)
        results.append(ends.result())
        assert MANIFEST in results[-1]
        assert api.verify(ends.target).passed
        assert api.verify(ends.source, ends.target, config=ends.config).passed
        if kinds[1] == "memory":
            assert not memory.below("bucket/.out.ckpt-tool-staging")
            assert (memory.journals, memory.in_use) == ({}, set())
    assert all(result == results[0] for result in results)


class Failing:
    """Files that were written until a failure; the local executor with an end to it."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.written: list[str] = []

    def __call__(self, *arguments: Any, on_file: Callable[[WrittenFile], None], **more: Any) -> None:
        def counted(file: WrittenFile) -> None:
            if len(self.written) == self.most:
                raise ExecutionError("the network is gone")
            on_file(file)
            self.written.append(file.path)

        execute(*arguments, on_file=counted, **more)


@pytest.mark.parametrize("kinds", KINDS)
def test_a_run_that_failed_is_gone_on_with_in_any_store(
    kinds: tuple[str, str], memory: MemoryStore, tmp_path: Path
) -> None:
    ends = Ends(kinds, "zero3", memory, tmp_path)
    failing = Failing(7)
    with pytest.raises(ExecutionError, match="the network is gone"):
        ends.convert("universal", executor=failing)
    assert ends.result() == {}
    with pytest.raises(UsageError, match="was left by another command"):
        ends.convert("hf")
    again = Failing(1 << 30)
    ends.convert("universal", executor=again)
    assert not set(failing.written) & set(again.written)
    assert set(failing.written) | set(again.written) | {MANIFEST} == set(ends.result())
    whole = Ends(("local", "local"), "zero3", memory, tmp_path / "whole")
    whole.convert("universal")
    assert whole.result() == ends.result()
    assert "was there already" in " ".join(ends.convert("universal").notes)


@pytest.mark.parametrize("kinds", KINDS)
def test_what_was_made_of_a_file_that_changed_is_written_again_in_any_store(
    kinds: tuple[str, str], memory: MemoryStore, tmp_path: Path
) -> None:
    ends = Ends(kinds, "zero3", memory, tmp_path)
    failing = Failing(7)
    with pytest.raises(ExecutionError):
        ends.convert("universal", executor=failing)
    for key in memory.below("bucket/source"):
        memory.put(key, memory.blobs[key].data)
    for file in (tmp_path / "local" / "source").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes())
    again = Failing(1 << 30)
    ends.convert("universal", executor=again)
    # What comes from no tensor's bytes is what the command's identity is a hash of.
    assert {path for path in failing.written if path.endswith("fp32.pt")} <= set(again.written)


@pytest.mark.parametrize("kinds", [("memory", "local"), ("memory", "memory")])
def test_a_file_that_changes_while_it_is_read_is_not_published_from_any_store(
    kinds: tuple[str, str], memory: MemoryStore, tmp_path: Path
) -> None:
    ends = Ends(kinds, "zero3", memory, tmp_path)

    def changing(*arguments: Any, **more: Any) -> None:
        execute(*arguments, **more)
        key = next(key for key in memory.below("bucket/source") if key.endswith("optim_states.pt"))
        memory.put(key, memory.blobs[key].data)

    with pytest.raises(
        ExecutionError, match=r"mem://bucket/source/.*optim_states\.pt changed while it was read"
    ):
        ends.convert("universal", executor=changing)
    assert ends.result() == {}


def test_a_store_that_replaces_nothing_says_so(memory: MemoryStore, tmp_path: Path) -> None:
    ends = Ends(("local", "memory"), "zero3", memory, tmp_path)
    memory.put("bucket/out/precious", b"x")
    with pytest.raises(UsageError, match="mem://bucket/out exists"):
        ends.convert("universal")
    with pytest.raises(UsageError, match=r"replaces nothing in a mem:// store"):
        ends.convert("universal", overwrite=True)
    assert ends.result() == {"precious": b"x"}


def test_a_full_store_is_told_before_anything_is_written(memory: MemoryStore, tmp_path: Path) -> None:
    ends = Ends(("local", "memory"), "zero3", memory, tmp_path)
    memory.most = 1000
    with pytest.raises(ExecutionError, match=r"1\.0 kB free"):
        ends.convert("universal")
    assert ends.result() == {}


@pytest.mark.parametrize("target", ["source/global_step2/out", "source/global_step2", "source", ""])
def test_a_result_inside_of_its_source_is_refused_in_any_store(
    target: str, memory: MemoryStore, tmp_path: Path
) -> None:
    ends = Ends(("memory", "memory"), "zero3", memory, tmp_path)
    ends.target = f"mem://bucket/{target}"
    before = dict(memory.blobs)
    with pytest.raises(UsageError, match="source"):
        ends.convert("universal")
    assert memory.blobs == before


def test_two_stores_of_one_scheme_are_refused(memory: MemoryStore) -> None:
    with pytest.raises(ValueError, match="mem"):
        known.register("mem", memory)
    with pytest.raises(UsageError, match=r"Known are file://, mem://"):
        open_location("s4://x")


def test_what_needs_a_disk_says_so(memory: MemoryStore, tmp_path: Path) -> None:
    ends = Ends(("memory", "local"), "zero3", memory, tmp_path)
    with pytest.raises(UsageError, match="doctor needs a local directory"):
        api.doctor(ends.source)
    assert run("inspect", ends.source)[0] == 0
