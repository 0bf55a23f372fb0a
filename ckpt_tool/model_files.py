"""The small files of a model beside its weights: ``config.json``, the tokenizer, licences."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ckpt_tool.errors import CkptToolError, MismatchError, UsageError
from ckpt_tool.families import family_of
from ckpt_tool.formats.beside import is_models
from ckpt_tool.formats.deepspeed.facts.run_config import DS_FIELDS
from ckpt_tool.formats.registry import TAG_FILES, locate
from ckpt_tool.json_file import read_json
from ckpt_tool.storage import Location
from ckpt_tool.stores.known import Place, open_location, store_of
from ckpt_tool.system_errors import reading_failed

_LARGEST = 64 << 20  # bytes; they are held in memory, and no tokenizer is larger


class Found(NamedTuple):
    """The config to use, the small files beside it that are carried over, where it is, and where was
    looked. ``given``: the user named it."""

    config: Mapping[str, Any] | None
    beside: dict[str, bytes]
    path: Location | None
    looked: tuple[Location, ...]
    given: bool = False


def find_config(source: Place, given: Place | None) -> Found:
    """The config that ``--config`` names, or else a config.json where trainers put it: in the checkpoint's
    directory, in the one above, and in the one above that where the one above has the tags of a run.

    Raises:
        MismatchError: it is not a model's.
    """
    if given is not None:
        path = open_location(given)
        beside = _beside(path) if path.is_directory() else {}
        return Found(read_config(path), beside, path, (path,), given=True)
    root = locate(source)
    places = _where_trainers_put_it(root)
    for place in places:
        if (place / "config.json").is_file() and (place in places[:2] or _is_a_models(place)):
            return Found(read_config(place), _beside(place), place, places)
    return Found(None, {}, None, places)


def _where_trainers_put_it(root: Location) -> tuple[Location, ...]:
    absolute = store_of(root).absolute(root)  # "." has nothing above it
    above = absolute.parent
    places = [root, above, above.parent] if _has_tags(above, absolute) else [root, above]
    return tuple(dict.fromkeys(places))


def _has_tags(directory: Location, tag: Location) -> bool:
    """Whether a directory holds the tags of a run, of which ``tag`` is one."""
    if any((directory / name).is_file() for name in TAG_FILES):
        return True
    return tag.name.startswith("step-") and (tag / ".metadata").is_file()


def _is_a_models(place: Location) -> bool:
    """Whether a config.json is a model's. Two directories up, others have files of this name."""
    try:
        read_config(place)
    except CkptToolError:
        return False
    return True


@contextlib.contextmanager
def naming(found: Found) -> Iterator[None]:
    """An error that asks for a config says where none was found, one that blames it, which it is."""
    try:
        yield
    except CkptToolError as error:
        said, *rest = error.args
        if found.config is None and "--config" in said:
            looked = ", ".join(str(place) for place in found.looked)
            error.args = (f"{said} (There is no config.json in {looked}.)", *rest)
        elif found.path is not None and not found.given and "config.json" in said:
            error.args = (f"{said} (config.json is that in {found.path}; --config names another.)", *rest)
        raise


def read_config(place: Place) -> Mapping[str, Any]:
    """The ``config.json`` at a place or in it; MismatchError where it has no ``model_type``."""
    path = open_location(place)
    file = path / "config.json" if path.is_directory() else path
    config = read_json(file)
    if "model_type" not in config:
        own = (
            "It looks like a DeepSpeed config; pass that with --ds-config."
            if DS_FIELDS & config.keys()
            else ""
        )
        raise MismatchError(
            f"{file} has no model_type, so it does not say which model this is. {own}".rstrip()
        )
    return config


def check_same_family(own: Mapping[str, Any] | None, given: Mapping[str, Any]) -> None:
    """Raises MismatchError where a checkpoint's own config.json is of another family than the one given."""
    if own is None:
        return
    try:
        family = family_of(own)
    except UsageError:
        return
    other = family_of(given)
    if other is not family:
        raise MismatchError(
            f"--config describes a model of the family {other.name} ({given.get('model_type')}), the "
            f"checkpoint's own config.json one of {family.name} ({own.get('model_type')}). Pass the "
            "config.json of the model that was trained, or none."
        )


def left_behind(source: Place, carried: Mapping[str, bytes]) -> tuple[str, ...]:
    """A note that names a published model's small files which are not carried over; none where all are.
    What else is there, the source's own notes name (``formats.beside``)."""
    root = locate(source)
    names = [
        entry.name
        for entry in map(root.__truediv__, root.reader().list())
        if entry.is_file() and is_models(entry.name) and entry.name not in carried
    ]
    return (f"Not carried over: {', '.join(names)}.",) if names else ()


def _beside(directory: Location) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    reader = directory.reader()
    try:
        for path in map(directory.__truediv__, reader.list()):
            if not is_models(path.name) or not path.is_file():
                continue
            try:
                if reader.size(path.name) <= _LARGEST:
                    found[path.name] = path.read_small(_LARGEST)
            except OSError as error:
                raise reading_failed(str(path), error) from error
    finally:
        reader.close()
    return found
