"""Preparing a result on the local file system: a directory beside it, which one rename publishes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
from collections.abc import Collection
from pathlib import Path

from ckpt_tool.errors import CkptToolError, ExecutionError, UsageError
from ckpt_tool.limits import LARGEST_RECORD
from ckpt_tool.manifest import JOURNAL, MANIFEST
from ckpt_tool.replacing import Judge, Owned, aside, clear, nothing_owned, put_back, remove, set_aside
from ckpt_tool.storage import LocalLocation, LocalWriter, sync_directory, too_large
from ckpt_tool.stores.base import Publishing
from ckpt_tool.system_errors import reading_failed, unusable_destination, writing_failed


class LocalArea:
    """The directory beside ``target``, and its journal, which is locked.

    Raises:
        UsageError: the target exists, or another run prepares it, or something else is in the way.
    """

    def __init__(self, target: Path, how: Publishing) -> None:
        self.target, self._how = target, how
        self.path = target.parent / f".{target.name}.ckpt-tool-staging"
        self.location = LocalLocation(self.path)
        self._aside: tuple[Path, Collection[str]] | None = None  # what was replaced, and its files
        self._moved = False
        self._journal = self._locked_journal()
        try:
            self._directory = self.path.stat()
        except BaseException:
            let_go(self._journal)
            raise

    @property
    def removal(self) -> str:
        return f"remove the directory: rm -r '{self.path}'"

    def _locked_journal(self) -> int:
        """Make the directory and take the journal's lock. Another run may publish, and so take away, the
        directory at any moment before that."""
        while True:
            self.refuse_taken()
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
                raise unusable_destination(self.path / JOURNAL, error) from error
            try:
                lock(journal, self.path)
                if self._is_journal(journal):
                    return journal
            except BaseException:
                let_go(journal)
                raise
            let_go(journal)

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

    def refuse_taken(self) -> None:
        if not self._how.overwrite and occupied(self.target):
            nothing_owned(self.target)

    # ---- the journal

    def journal(self) -> bytes:
        try:
            size = os.fstat(self._journal).st_size
            if size > LARGEST_RECORD:
                raise too_large(str(self.path / JOURNAL), size, LARGEST_RECORD)
            return os.pread(self._journal, size, 0)
        except OSError as error:
            raise writing_failed(self.path / JOURNAL, error) from error

    def cut_journal(self, length: int) -> None:
        try:
            os.ftruncate(self._journal, length)
        except OSError as error:
            raise writing_failed(self.path / JOURNAL, error) from error

    def record(self, line: bytes, *, durable: bool) -> None:
        try:
            os.lseek(self._journal, 0, os.SEEK_END)
            while line:
                line = line[os.write(self._journal, line) :]
            if durable:
                os.fsync(self._journal)
        except OSError as error:
            raise writing_failed(self.path / JOURNAL, error) from error

    # ---- its files

    def writer(self) -> LocalWriter:
        return LocalWriter(self.path, fsync=self._how.fsync)

    def holds(self, path: str, size: int) -> bool:
        """Whether it lies in the directory itself, and not behind a link."""
        file = self.path / path
        if any(place.is_symlink() for place in (file, *file.parents) if self.path in place.parents):
            return False
        return not file.is_symlink() and file.is_file() and file.stat().st_size == size

    def remove_all_but(self, kept: Collection[str]) -> set[str]:
        removed, directories = set(), []
        for directory, below, names in os.walk(self.path, onerror=_raise):
            directories.append(Path(directory))
            # A link to a directory is no directory of ours: what is written below it would be elsewhere.
            links = [name for name in below if (Path(directory) / name).is_symlink()]
            below[:] = [name for name in below if name not in links]
            for path in map(Path(directory).joinpath, [*links, *names]):
                relative = str(path.relative_to(self.path))
                if relative != JOURNAL and (relative not in kept or path.is_symlink()):
                    removed.add(relative)
                    path.unlink()
        for empty in reversed(directories[1:]):  # would be published
            with contextlib.suppress(OSError):
                empty.rmdir()
        return removed

    def remove(self, path: str) -> None:
        """Also where a directory has taken the file's place, or a file that of a directory above it."""
        place = self.path / path
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            with contextlib.suppress(NotADirectoryError):
                place.unlink(missing_ok=True)

    def sync(self, path: str) -> None:
        try:
            with (self.path / path).open("rb") as written:
                os.fsync(written.fileno())
        except OSError as error:
            raise writing_failed(self.path / path, error) from error

    # ---- publishing

    def publish(self, manifest: bytes) -> None:
        try:
            self._seal(manifest)
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

    def _seal(self, manifest: bytes) -> None:
        (self.path / MANIFEST).write_bytes(manifest)
        if self._how.fsync:
            with (self.path / MANIFEST).open("rb") as written:
                os.fsync(written.fileno())
        self.refuse_taken()
        if self._how.fsync:
            for directory, _, _ in os.walk(self.path, onerror=_raise):
                sync_directory(directory)

    def _move(self) -> None:
        """The locked journal goes along and is removed last: until then no other run can take over."""
        owned = self._how.judge(self.target) if occupied(self.target) else None
        if owned is None or owned.tag is None:
            self._name(self.path, self.target, owned and owned.files)
        else:
            put_back(self.target / owned.tag)  # where an earlier run was killed between its renames
            self._move_tag(self._how.judge(self.target), owned.tag)
        self._moved = True

    def _move_tag(self, owned: Owned, tag: str) -> None:
        """Into a run's directory, where everything but the tag stays. What names the tag comes after it."""
        place = self.target / tag
        self._name(self.path / tag, place, owned.below(tag) if os.path.lexists(place) else None)
        for file in sorted(self.path.iterdir()):
            if file.name != JOURNAL:
                file.replace(self.target / file.name)
        if self._how.fsync:
            sync_directory(self.target)

    def _name(self, new: Path, place: Path, replaced: Collection[str] | None) -> None:
        """Rename ``new`` to ``place``, of which ``replaced`` are all files if there is one."""
        try:
            if replaced is not None:
                self._aside = place, replaced
                set_aside(place, replaced, self._how.judge)
            new.rename(place)
        except BaseException:
            # Also where the user interrupts: what was to be replaced gets its name back.
            if replaced is not None:
                with contextlib.suppress(OSError):
                    put_back(place)
            raise

    def _tidy(self) -> None:
        if self._how.fsync:
            sync_directory(self.target.parent)
        if self._aside is not None:
            place, files = self._aside
            remove(aside(place), files)
        tidy(self.target, self._how.judge if self._how.overwrite else None)
        if self.path.is_dir():  # of a tag, the directory that it was prepared in is left
            (self.path / JOURNAL).unlink(missing_ok=True)
            self.path.rmdir()

    def discard(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        let_go(self._journal)


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
        raise UsageError(
            f"{directory} is in use by another run of ckpt-tool. Wait until that has ended, or choose "
            "another destination."
        ) from None
    except OSError as error:
        raise writing_failed(directory / JOURNAL, error) from error


def let_go(journal: int) -> None:
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
