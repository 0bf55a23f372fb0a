"""What the operating system refuses, as sentences: which file, why, and what to do about it."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ckpt_tool.errors import CkptToolError, ExecutionError, UnreadableError, UsageError
from ckpt_tool.sizes import human_bytes

_RIGHTS = "Change the rights of it and of the directories above it, or run as a user who has them."
_REMEDIES = {
    errno.EACCES: _RIGHTS,
    errno.ENOENT: "Make the directory above it first, or choose another destination.",
    errno.EPERM: _RIGHTS,
    errno.EROFS: "Choose another destination.",
    errno.EFBIG: "Raise the limit (`ulimit -f`), or choose a destination on another file system.",
    errno.EMFILE: "Raise the limit of open files (`ulimit -n`), or pass fewer --workers.",
    errno.ENFILE: "The whole machine has too many files open; close some, and run the command again.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ELOOP: "Correct the symbolic links, which lead in a circle.",
    errno.ENOTDIR: "A part of the path is a file; correct the path.",
    errno.ENOMEM: "Pass a smaller --max-memory or fewer --workers, and run the command again.",
    errno.ENOLCK: "Mount the file system with locks, or choose a destination on another one.",
    errno.ENOSYS: "The file system cannot do this; choose a destination on another one.",
    errno.ENOTSUP: "The file system cannot do this; choose a destination on another one.",
    errno.ESTALE: "The network file system lost the file; mount it again, and run the command again.",
    errno.EIO: "Check the disk or the network mount (`dmesg`), and run the command again.",
}
_ANYTHING_ELSE = "Run the command again; if it fails again, check the disk or the network mount."
_FULL = (errno.ENOSPC, errno.EDQUOT)
# What is wrong with the path a user gave, rather than with the machine.
_OF_THE_PATH = (
    errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip


def reading_failed(path: str | os.PathLike[str], error: OSError) -> CkptToolError:
    """What to tell of a source's file or directory that could not be read."""
    kind = UnreadableError if error.errno in _OF_THE_PATH else ExecutionError
    if error.errno == errno.ENOENT:
        return kind(
            f"{os.fspath(path)} is missing. Copy it from where the checkpoint was saved, all of its files "
            "together."
        )
    return kind(f"{os.fspath(path)} cannot be read: {_reason(error)}")


def writing_failed(path: str | os.PathLike[str], error: OSError) -> CkptToolError:
    """What to tell of a file, or a name, that could not be written."""
    if error.errno in _FULL:
        return ExecutionError(
            f"{os.fspath(path)}: the disk is full ({_free_above(Path(path))}). Nothing was published; "
            "free some space, or choose another destination, and run the command again."
        )
    return ExecutionError(f"{os.fspath(path)} cannot be written: {_reason(error)}")


def unusable_destination(path: str | os.PathLike[str], error: OSError) -> CkptToolError:
    """What to tell of a path that a result, or what prepares it, cannot have."""
    if error.errno in (*_OF_THE_PATH, errno.EROFS, errno.EEXIST):
        return UsageError(f"{os.fspath(path)} cannot be made: {_reason(error)}")
    return writing_failed(path, error)


def output_failed(error: OSError) -> CkptToolError:
    """What to tell where the result was not a file but what is printed."""
    if error.filename is not None:
        return ExecutionError(f"{os.fsdecode(error.filename)}: {_reason(error)}")
    why = error.strerror or type(error).__name__
    return ExecutionError(
        f"What the command prints could not be written to standard output: {why}. Redirect it to another "
        "file, and run the command again."
    )


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Turn what the machine refuses, wherever that happens inside, into a CkptToolError.

    Calls on open files name no file in their errors; where they are made, they are told with the functions
    above. Here the others come out, and what has no file at all: memory, threads, the locale.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise ExecutionError(f"The system refused a call: {_reason(error)}") from error
        if error.errno in _FULL:
            raise writing_failed(os.fsdecode(error.filename), error) from error
        raise ExecutionError(f"{os.fsdecode(error.filename)}: {_reason(error)}") from error
    except MemoryError as error:
        raise ExecutionError(
            "There is not enough memory. Pass a smaller --max-memory or fewer --workers, and run the "
            "command again."
        ) from error
    except UnicodeEncodeError as error:
        raise UsageError(
            f"The name {error.object!r} cannot be written in the encoding {error.encoding}. Run the "
            "command in a UTF-8 locale: LC_ALL=C.UTF-8."
        ) from error
    except RuntimeError as error:
        if "start new thread" not in str(error):
            raise
        raise ExecutionError(
            "No further thread can be started. Pass fewer --workers, or raise the limit (`ulimit -u`)."
        ) from error


def _reason(error: OSError) -> str:
    why = error.strerror or type(error).__name__
    return f"{why}. {_REMEDIES.get(error.errno or 0, _ANYTHING_ELSE)}"


def _free_above(path: Path) -> str:
    """How much room there is where ``path`` was to be."""
    for parent in path.absolute().parents:
        with contextlib.suppress(OSError):
            return f"{human_bytes(shutil.disk_usage(parent).free)} free"
    return "nothing free"
