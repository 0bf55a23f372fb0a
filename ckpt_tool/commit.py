"""Publishing: a target appears complete or not at all.

Files are written into a staging directory beside the target. A journal there records the command and
every file that is complete and durable, so that the same command goes on where a killed run stopped,
and any other command refuses. When all is written, one rename publishes the directory. A manifest in
it says where it came from and holds checksums of every byte.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from ckpt_tool.errors import CkptToolError, ExecutionError, UsageError
from ckpt_tool.journal import Run, boot, file_entry, read_journal
from ckpt_tool.limits import LARGEST_RECORD
from ckpt_tool.manifest import JOURNAL, MANIFEST, manifest_bytes
from ckpt_tool.replacing import Judge, Owned, aside, clear, put_back, remove, set_aside
from ckpt_tool.storage import FileState, sync_directory, too_large
from ckpt_tool.system_errors import reading_failed, unusable_destination, writing_failed
from ckpt_tool.written import WrittenFile


def nothing_owned(place: Path) -> Owned:
    """The judge of a run that replaces nothing."""
    raise UsageError(f"{place} exists. Choose another destination, or pass --overwrite to replace it.")


# A file of the target, and the files of the source that it is made of.
MadeOf = tuple[str, Collection[str]]


class Staging:
    """The directory beside ``target`` in which it is prepared.

    Args:
        target: the final path. It must not exist, or be empty, unless ``overwrite``.
        identity: the command, its parameters and the source: what a resumed run must share.
        fsync: make the result durable before publishing it.
        judge: says what of an existing target is replaced; it raises UsageError where something there is
            not proven to belong to that.

    Raises:
        UsageError: the target exists, or its staging directory belongs to another command.
    """

    def __init__(
        self,
        target: Path,
        identity: Mapping[str, Any],
        *,
        overwrite: bool,
        fsync: bool,
        judge: Judge = nothing_owned,
    ) -> None:
        self.target = target
        self.path = target.parent / f".{target.name}.ckpt-tool-staging"
        self._identity = dict(identity)
        self._fsync = fsync
        self._overwrite = overwrite
        self._judge = judge
        self._aside: tuple[Path, Collection[str]] | None = None  # what was replaced, and its files
        self._keep = self._moved = False
        self._run: Run | None = None
        self.done: dict[str, WrittenFile] = {}
        self._journal = self._locked_journal()
        try:
            self._directory = self.path.stat()
            self._take_over()
        except BaseException:
            _let_go(self._journal)
            raise

    def _locked_journal(self) -> int:
        """Make the directory and take the journal's lock. Another run may publish, and so take away, the
        directory at any moment before that."""
        while True:
            self._refuse_occupied()
            if occupied(self.path) and not self._is_ours():
                raise UsageError(
                    f"{self.path} is in the way and was not left by a run of ckpt-tool. Remove it or "
                    "choose another destination."
                )
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise unusable_destination(self.path, error) from error
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                journal = os.open(self.path / JOURNAL, flags, 0o666)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise writing_failed(self.path / JOURNAL, error) from error
            try:
                lock(journal, self.path)
                if self._is_journal(journal):
                    return journal
            except BaseException:
                _let_go(journal)
                raise
            _let_go(journal)

    def _is_ours(self) -> bool:
        """Whether what has the staging directory's name is one: a directory with a journal, no links."""
        journal = self.path / JOURNAL
        return not self.path.is_symlink() and not journal.is_symlink() and journal.is_file()

    def _is_journal(self, descriptor: int) -> bool:
        """Whether an open file still is the one with the journal's name."""
        try:
            return os.path.samestat(os.fstat(descriptor), (self.path / JOURNAL).stat())
        except FileNotFoundError:
            return False
        except OSError as error:
            raise reading_failed(self.path / JOURNAL, error) from error

    def _refuse_occupied(self) -> None:
        if not self._overwrite and occupied(self.target):
            nothing_owned(self.target)

    def _take_over(self) -> None:
        """Find the files an earlier run of this command completed."""
        try:
            size = os.fstat(self._journal).st_size
            if size > LARGEST_RECORD:
                raise too_large(str(self.path / JOURNAL), size, LARGEST_RECORD)
            found = read_journal(os.pread(self._journal, size, 0))
            os.ftruncate(self._journal, found.whole)
        except OSError as error:
            raise writing_failed(self.path / JOURNAL, error) from error
        if found.whole and found.identity != json.loads(json.dumps(self._identity)):
            raise UsageError(
                f"{self.path} was left by another command ({_summary(found.identity)}). Run that command "
                f"again to go on with it, or remove the directory: rm -r '{self.path}'"
            )
        if not found.whole:
            self._record(self._identity)
        self._run = found.run
        self.done = found.files
        self._discard(path for path, file in found.files.items() if not self._is_there(file))
        for directory, below, names in os.walk(self.path, onerror=_raise):
            # A link to a directory is no directory of ours: what is written below it would be elsewhere.
            links = [name for name in below if (Path(directory) / name).is_symlink()]
            below[:] = [name for name in below if name not in links]
            for path in map(Path(directory).joinpath, [*links, *names]):
                relative = str(path.relative_to(self.path))
                if relative != JOURNAL and (relative not in self.done or path.is_symlink()):
                    self.done.pop(relative, None)
                    path.unlink()

    def _is_there(self, file: WrittenFile) -> bool:
        """Whether it lies in the directory itself, and not behind a link."""
        path = self.path / file.path
        if any(place.is_symlink() for place in (path, *path.parents) if self.path in place.parents):
            return False
        return not path.is_symlink() and path.is_file() and path.stat().st_size == file.size

    def begin(self, sources: Mapping[str, FileState], made_of: Callable[[], Iterable[MadeOf]]) -> None:
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
                self._sync(path)
        if before != run:
            self._record(run.entry(), durable=bool(self.done))

    def _sync(self, path: str) -> None:
        """Make a file durable that a run without fsync has written."""
        try:
            with (self.path / path).open("rb") as written:
                os.fsync(written.fileno())
        except OSError as error:
            raise writing_failed(self.path / path, error) from error

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
                (self.path / path).unlink(missing_ok=True)

    def is_done(self, path: str, size: int) -> bool:
        return path in self.done and self.done[path].size == size

    def add(self, file: WrittenFile) -> None:
        """Note a file as complete."""
        self.done[file.path] = file
        self._record(file_entry(file))

    def _record(self, entry: Mapping[str, Any], *, durable: bool = False) -> None:
        """Add a line. That a file is complete need not be ``durable``: lost, it costs writing one file
        again, and the data it speaks of is. What takes such a line back has to be."""
        line = json.dumps(entry).encode() + b"\n"
        try:
            os.lseek(self._journal, 0, os.SEEK_END)
            while line:
                line = line[os.write(self._journal, line) :]
            if durable:
                os.fsync(self._journal)
        except OSError as error:
            raise writing_failed(self.path / JOURNAL, error) from error

    def publish(self) -> None:
        """Write the manifest and move the directory to its final name.

        Raises:
            ExecutionError: nothing was published, or all was and the message says so.
        """
        try:
            self._seal()
            self._move()
        except OSError as error:
            if not self.published():
                raise writing_failed(Path(error.filename or self.path), error) from error
        try:
            self._tidy()
        except (OSError, CkptToolError) as error:
            why = error.__cause__ if isinstance(error.__cause__, OSError) else error
            raise ExecutionError(
                f"{self.target} is complete, but not all that follows could be done: {why}. Run the same "
                "command again to finish."
            ) from error

    def published(self) -> bool:
        """Whether the directory has its final name. An interrupt may come between any two steps, so that
        only a look tells."""
        if self._moved:
            return True
        try:
            return os.path.samestat(self._directory, self.target.lstat())
        except OSError:
            return False

    def _seal(self) -> None:
        files = [file for _, file in sorted(self.done.items())]
        (self.path / MANIFEST).write_bytes(manifest_bytes(self._identity, files))
        if self._fsync:
            with (self.path / MANIFEST).open("rb") as written:
                os.fsync(written.fileno())
        self._refuse_occupied()
        if self._fsync:
            for directory, _, _ in os.walk(self.path, onerror=_raise):
                sync_directory(directory)

    def _move(self) -> None:
        """The locked journal goes along and is removed last: until then no other run can take over."""
        owned = self._judge(self.target) if occupied(self.target) else None
        if owned is None or owned.tag is None:
            self._name(self.path, self.target, owned and owned.files)
        else:
            put_back(self.target / owned.tag)  # where an earlier run was killed between its renames
            self._move_tag(self._judge(self.target), owned.tag)
        self._moved = True

    def _move_tag(self, owned: Owned, tag: str) -> None:
        """Into a run's directory, where everything but the tag stays. What names the tag comes after it."""
        place = self.target / tag
        self._name(self.path / tag, place, owned.below(tag) if os.path.lexists(place) else None)
        for file in sorted(self.path.iterdir()):
            if file.name != JOURNAL:
                file.replace(self.target / file.name)
        if self._fsync:
            sync_directory(self.target)

    def _name(self, new: Path, place: Path, replaced: Collection[str] | None) -> None:
        """Rename ``new`` to ``place``, of which ``replaced`` are all files if there is one."""
        try:
            if replaced is not None:
                self._aside = place, replaced
                set_aside(place, replaced, self._judge)
            new.rename(place)
        except BaseException:
            # Also where the user interrupts: what was to be replaced gets its name back.
            if replaced is not None:
                with contextlib.suppress(OSError):
                    put_back(place)
            raise

    def _tidy(self) -> None:
        if self._fsync:
            sync_directory(self.target.parent)
        if self._aside is not None:
            place, files = self._aside
            remove(aside(place), files)
        tidy(self.target, self._judge if self._overwrite else None)
        if self.path.is_dir():  # of a tag, the directory that it was prepared in is left
            (self.path / JOURNAL).unlink(missing_ok=True)
            self.path.rmdir()

    def close(self) -> None:
        """Let go of the directory; remove it where it holds nothing worth going on with."""
        if not self.done and not self._keep and not self.published():
            shutil.rmtree(self.path, ignore_errors=True)
        _let_go(self._journal)


def tidy(target: Path, judge: Judge | None) -> None:
    """Remove what publishing leaves beside and in a result; the journal last, which tells that it is not
    done yet. A command that replaces nothing (``judge`` None) removes nothing that another moved aside."""
    if judge is not None:
        clear(aside(target), judge)
    (target / JOURNAL).unlink(missing_ok=True)


def lock(journal: int, directory: Path) -> None:
    """Take the lock of an open journal; UsageError where another run has it."""
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"{directory} is in use by another run of ckpt-tool.") from None
    except OSError as error:
        raise writing_failed(directory / JOURNAL, error) from error


def _let_go(journal: int) -> None:
    with contextlib.suppress(OSError):  # nothing depends on a journal's last line
        os.close(journal)


def _raise(error: OSError) -> None:
    raise error


def occupied(path: Path) -> bool:
    """Whether a result would replace something at ``path``: anything but an empty directory."""
    try:
        return not stat.S_ISDIR(path.lstat().st_mode) or bool(list(path.iterdir()))
    except FileNotFoundError:
        return False
    except OSError as error:
        raise unusable_destination(path, error) from error


def _summary(identity: Any) -> str:
    parameters = identity.get("parameters") if isinstance(identity, dict) else None
    known = parameters if isinstance(parameters, dict) else {}
    return " ".join(f"{key}={value}" for key, value in known.items()) or "unknown"
