"""Finding out which format a path holds, and reading it. ``known`` lists the formats."""

from __future__ import annotations

import os
import re
from dataclasses import replace

from ckpt_tool import collecting
from ckpt_tool.canonical import Checkpoint, ExpertName
from ckpt_tool.errors import CkptToolError, UnreadableError
from ckpt_tool.families import adapters
from ckpt_tool.formats.base import SourceFormat
from ckpt_tool.formats.beside import beside_tags, is_engines, not_understood
from ckpt_tool.formats.kinds import refuse_integers
from ckpt_tool.formats.known import FORMATS
from ckpt_tool.formats.strangers import refuse_strangers
from ckpt_tool.limits import LONGEST_NUMBER, LONGEST_TAG
from ckpt_tool.storage import Location, Reader
from ckpt_tool.stores.known import Place, open_location
from ckpt_tool.system_errors import reading_failed
from ckpt_tool.wrappers import unwrapped_checkpoint

# Files that name the subdirectory to take, in order of preference.
TAG_FILES = ("latest", "latest_universal")
_SHOWN = 5
_LONG_NUMBER = re.compile(rf"(?:^|\.)[0-9]{{{LONGEST_NUMBER + 1}}}")


def sources() -> list[SourceFormat]:
    """The formats that are read, in order of detection."""
    return [known.load() for known in FORMATS if known.load is not None]


def locate(place: Place) -> Location:
    """The directory a user means by a checkpoint path: itself, the one its tag file names, or a file's.

    Raises:
        UnreadableError: there is nothing at the path, or its tag file names a missing directory.
    """
    path = open_location(place)
    if path.is_file():
        if path.name in TAG_FILES:
            return _tagged(path)
        refuse_strangers(path)
        return path.parent
    if not path.is_directory():
        raise UnreadableError(f"{path} does not exist.{_others(path.parent)}")
    for tag_file in TAG_FILES:
        if (path / tag_file).is_file():
            return _tagged(path / tag_file)
    return _newest_step(path) or path


def _newest_step(path: Location) -> Location | None:
    """torchtitan has no tag file: its steps are ``step-<N>``, and a finished one has its metadata."""
    steps = {
        int(entry.name.removeprefix("step-")): entry
        for entry in map(path.__truediv__, path.reader().list())
        if entry.name.startswith("step-")
        and entry.name.removeprefix("step-").isdecimal()
        and (entry / ".metadata").is_file()
    }
    return steps[max(steps)] if steps else None


def _tag_named(path: Location) -> Location | None:
    """The directory that a tag file in a directory names, or torchtitan's newest; None without both."""
    for tag_file in TAG_FILES:
        if (path / tag_file).is_file():
            tag, directory = _tag_in(path / tag_file)
            return directory if tag and directory.is_directory() else None
    return _newest_step(path)


def _tag_in(tag_file: Location) -> tuple[str, Location]:
    try:
        tag = os.fsdecode(tag_file.read_small(LONGEST_TAG)).strip()
    except OSError as error:
        raise reading_failed(str(tag_file), error) from error
    return tag, tag_file.parent / tag


def _tagged(tag_file: Location) -> Location:
    tag, directory = _tag_in(tag_file)
    if not tag or not directory.is_directory():
        raise UnreadableError(
            f"{tag_file} names {tag!r}, but there is no such directory beside it. Pass the directory of "
            f"the step you want.{_others(tag_file.parent)}"
        )
    return directory


def _others(directory: Location) -> str:
    """The checkpoints in a directory, as the end of a message that one is missing; nothing without such."""
    try:
        found = _checkpoints_in(directory)
    except CkptToolError:
        return ""  # what cannot be looked into offers nothing
    return f" There {'is' if len(found) == 1 else 'are'} {_offered(directory, found)}" if found else ""


def _offered(directory: Location, found: list[str]) -> str:
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    newest = "the newest by its number, " if len(found) > 1 else ""
    return (
        f"{', '.join(found[-_SHOWN:])}{more}. Pass the one you mean, for example {newest}"
        f"{directory / found[-1]}."
    )


def _checkpoints_in(directory: Location) -> list[str]:
    """The names of directories that are checkpoints, by the numbers in them."""
    if not directory.is_directory():
        return []
    reader = directory.reader()
    try:
        names = [name for name in reader.list() if reader.is_directory(name)]
    finally:
        reader.close()
    return sorted((name for name in names if _is_checkpoint(directory / name)), key=_by_number)


def _by_number(name: str) -> tuple[list[int], str]:
    return [int(number) for number in re.findall(r"[0-9]{1,18}", name)], name


def _is_checkpoint(path: Location) -> bool:
    """Whether a directory, or the one that its tag file names, is a checkpoint."""
    try:
        reader = (_tag_named(path) or path).reader()
    except UnreadableError:
        return False
    return any(candidate.recognises(reader) for candidate in sources())


def _refuse_unused(path: Location, found: Checkpoint) -> None:
    """Raises:
    UnreadableError: a user passed a file that is no part of the checkpoint beside it.
    """
    if not path.is_file() or path.name in TAG_FILES or is_engines(path.name):
        return
    if not any(path.name in file.path.split("/") for file in found.files):
        raise UnreadableError(
            f"{path} is no part of the checkpoint beside it, which is {found.format}. If you mean that, "
            f"pass its directory: {path.parent}."
        )


def _refuse_long_numbers(found: Checkpoint) -> None:
    """Raises:
    UnreadableError: a name counts layers or experts with more digits than Python turns into a number.
    """
    for tensor in found.tensors:
        name = tensor.name.layer_path if isinstance(tensor.name, ExpertName) else tensor.name
        if len(name) > LONGEST_NUMBER and _LONG_NUMBER.search(name):
            raise UnreadableError(
                f"{found.root}: the name {name[:60]}... has a number of more than {LONGEST_NUMBER} "
                "digits. No model has such names; the file is damaged. Copy it again from its origin."
            )


def _above(path: Location, directory: Location) -> tuple[str, ...]:
    """What is to be said of the directory that a tag file lies in."""
    parent = path if path.is_directory() else path.parent
    return () if parent == directory else beside_tags(parent, directory, _is_recognised)


def _is_recognised(directory: Location) -> bool:
    reader = directory.reader()
    return any(candidate.recognises(reader) for candidate in sources())


def open_checkpoint(place: Place) -> tuple[Reader, Checkpoint]:
    """Read the catalogue of a checkpoint, whatever its format and the store it lies in."""
    path = open_location(place)
    directory = locate(path)
    reader = directory.reader()
    for candidate in sources():
        if candidate.recognises(reader):
            try:
                with collecting.paused():
                    found = unwrapped_checkpoint(candidate.read(reader))
                _refuse_unused(path, found)
                refuse_integers(found)
                _refuse_long_numbers(found)
                notes = (*found.notes, *not_understood(reader, found), *_above(path, directory))
                return reader, replace(found, notes=notes)
            except UnicodeEncodeError:  # a name that the locale cannot express
                reader.close()
                raise
            except (TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
                # whatever a reader did not foresee in damaged metadata
                reader.close()
                raise UnreadableError(
                    f"{directory}: the metadata of this {candidate.name} checkpoint is malformed "
                    f"({type(error).__name__}: {error}). Copy it again from its origin."
                ) from error
            except BaseException:
                reader.close()
                raise
    names = reader.list()
    if any(name in (adapters.CONFIG, *adapters.WEIGHTS) for name in names):
        raise UnreadableError(f"{directory} holds an adapter and no model. {adapters.MERGE}")
    inside = _checkpoints_in(directory)
    if inside:
        raise UnreadableError(
            f"{directory} is no checkpoint and has no `latest` file, but holds "
            f"{_offered(directory, inside)}"
        )
    if "config.json" in names:
        others = [name for name in names if name.endswith((".bin", ".gguf", ".h5", ".msgpack"))]
        raise UnreadableError(
            f"{directory} has a model's config.json and no weights in safetensors"
            + (
                f", but {others[0]}, which is not read. Save the model again with save_pretrained."
                if others
                else ". Copy or download its model*.safetensors again."
            )
        )
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing"
    raise UnreadableError(
        f"{directory} is no checkpoint ckpt-tool reads (it holds {shown}). Read are: "
        + ", ".join(candidate.name for candidate in sources())
        + ". A path may be the tag directory, or its parent with a `latest` file."
    )
