"""Publishing: a target appears complete or not at all.

Files are written into a place beside the target, which the store provides (``stores.base.Area``). A
journal there records the command and every file that is complete and durable, so that the same command goes
on where a killed run stopped, and any other command refuses. When all is written, the place is published. A
manifest in it says where it came from and holds checksums of every byte.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from ckpt_tool.errors import UsageError
from ckpt_tool.journal import Run, boot, file_entry, journal_line, read_journal
from ckpt_tool.manifest import manifest_bytes
from ckpt_tool.replacing import Judge, nothing_owned
from ckpt_tool.storage import Location, Token, Writer
from ckpt_tool.stores.base import Publishing
from ckpt_tool.stores.known import Place, open_location, store_of
from ckpt_tool.written import WrittenFile

# A file of the target, and the files of the source that it is made of.
MadeOf = tuple[str, Collection[str]]


class Staging:
    """A result in the making.

    Args:
        target: where it is to be. Nothing may be there, or an empty directory, unless ``overwrite``.
        identity: the command, its parameters and the source: what a resumed run must share.
        fsync: make the result durable before publishing it.
        judge: says what of an existing target is replaced; it raises UsageError where something there is
            not proven to belong to that.

    Raises:
        UsageError: the target exists, or another command has begun to prepare it.
    """

    def __init__(
        self,
        target: Place,
        identity: Mapping[str, Any],
        *,
        overwrite: bool,
        fsync: bool,
        judge: Judge = nothing_owned,
    ) -> None:
        self.target = open_location(target)
        self._identity = dict(identity)
        self._fsync = fsync
        self._keep = False
        self._run: Run | None = None
        self.done: dict[str, WrittenFile] = {}
        how = Publishing(overwrite, fsync, judge)
        self.area = store_of(self.target).area(self.target, how)
        try:
            self._take_over()
        except BaseException:
            self.area.close()
            raise

    @property
    def location(self) -> Location:
        """Where the result can be read before it is published."""
        return self.area.location

    def writer(self) -> Writer:
        return self.area.writer()

    def _take_over(self) -> None:
        """Find the files an earlier run of this command completed."""
        found = read_journal(self.area.journal())
        self.area.cut_journal(found.whole)
        own = json.loads(json.dumps(self._identity))
        if found.whole and found.identity != own:
            raise UsageError(
                f"{self.location} was left by another command, {_described(found.identity)}. "
                f"{_difference(found.identity, own)} Run that command again to go on with it, choose "
                f"another destination, or {self.area.removal}"
            )
        if not found.whole:
            self._record(self._identity)
        self._run = found.run
        self.done = found.files
        self._discard(path for path, file in found.files.items() if not self.area.holds(path, file.size))
        for path in self.area.remove_all_but(self.done):
            self.done.pop(path, None)

    def begin(self, sources: Mapping[str, Token], made_of: Callable[[], Iterable[MadeOf]]) -> None:
        """Judge what an earlier run completed, before anything is added to it. A file is kept where all
        that it was made of is as it was then, and where it cannot have been lost since.

        Args:
            sources: every file of the source, as it was before any of it was read.
            made_of: gives each file of the target with the source's files that it is made of.
        """
        run = Run(sources, self._fsync, boot())
        before, self._run = self._run, run
        if before is None or not (before.synced or before.is_in_memory()):
            self._discard(self.done)
        elif before.sources != run.sources and self.done:
            same = {path for path, state in run.sources.items() if before.sources.get(path) == state}
            self.discard(path for path, files in made_of() if not same.issuperset(files))
        if before is not None and self._fsync and not before.synced:
            for path in self.done:
                self.area.sync(path)
        if before != run:
            self._record(run.entry(), durable=bool(self.done))

    def discard(self, paths: Iterable[str]) -> None:
        """Note that files are to be written again, by this run or the next of this command."""
        self._discard(path for path in paths if path in self.done)

    def discard_all(self) -> None:
        """Note that no file is to be relied upon. They stay to be looked at until the next run."""
        self._keep = True
        self._discard(self.done, unlink=False)

    def _discard(self, paths: Iterable[str], *, unlink: bool = True) -> None:
        """The journal says so first: a file that is begun again has its full size at once."""
        discarded = sorted(paths)
        if not discarded:
            return
        self._record({"discarded": discarded}, durable=True)
        for path in discarded:
            del self.done[path]
            if unlink:
                self.area.remove(path)

    def is_done(self, path: str, size: int) -> bool:
        return path in self.done and self.done[path].size == size

    def add(self, file: WrittenFile) -> None:
        """Note a file as complete."""
        self.done[file.path] = file
        self._record(file_entry(file))

    def _record(self, entry: Mapping[str, Any], *, durable: bool = False) -> None:
        """Add a line. That a file is complete need not be ``durable``: lost, it costs writing one file
        again, and the data it speaks of is. What takes such a line back has to be."""
        self.area.record(journal_line(entry), durable=durable)

    def publish(self) -> None:
        """Give the result its final name, with a manifest in it.

        Raises:
            ExecutionError: nothing was published, or all was and the message says so.
        """
        files = [file for _, file in sorted(self.done.items())]
        self.area.publish(manifest_bytes(self._identity, files))

    def published(self) -> bool:
        """Whether the result has its final name. An interrupt may come between any two steps, so that only
        a look tells."""
        return self.area.published()

    def stays(self) -> str:
        """What to tell of an unfinished result that ``close`` leaves where it is; else nothing."""
        if self.published():
            return ""
        if self._keep:
            return (
                f"What was written stays in {self.location} to be looked at; the same command writes all "
                f"of it anew. To be rid of it, {self.area.removal}"
            )
        if not self.done:
            return ""
        return (
            f"{self.location} stays, with {len(self.done)} complete files: the same command goes on with "
            f"them. To be rid of them, {self.area.removal}"
        )

    def close(self) -> None:
        """Let go of the place; remove it where it holds nothing worth going on with."""
        if not self.done and not self._keep and not self.published():
            self.area.discard()
        self.area.close()


def _part(identity: Any, name: str) -> dict[str, Any]:
    found = identity.get(name) if isinstance(identity, dict) else None
    return found if isinstance(found, dict) else {}


def _described(identity: Any) -> str:
    """The command in words: what it converted, and to what."""
    source, parameters = _part(identity, "source"), _part(identity, "parameters")
    if not source or "to" not in parameters:
        return "of which nothing is known"
    step = "" if source.get("step") is None else f", step {source['step']}"
    return f"a conversion of {source.get('name')} ({source.get('format')}{step}) to {parameters['to']}"


def _difference(found: Any, own: Any) -> str:
    """In what that command differs from this one."""
    said = []
    for name, owner in (("source", "the source's "), ("parameters", "")):
        old, new = _part(found, name), _part(own, name)
        said += [
            f"{owner}{key.replace('_', ' ')} was {_shown(old.get(key))} and is {_shown(new.get(key))}"
            for key in dict.fromkeys([*old, *new])
            if old.get(key) != new.get(key)
        ]
    tools = [one.get("tool") if isinstance(one, dict) else None for one in (found, own)]
    if tools[0] != tools[1]:
        said.append(f"it was run by {_shown(tools[0])}, this one by {_shown(tools[1])}")
    return f"It differs: {', '.join(said) or 'the files of the source, or its config, are others now'}."


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "given" if value else "not given"
    return str(value)
