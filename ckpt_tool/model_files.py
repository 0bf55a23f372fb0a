"""The small files of a model beside its weights: ``config.json``, the tokenizer, licences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_tool.errors import MismatchError, UsageError
from ckpt_tool.families import family_of
from ckpt_tool.formats.beside import is_models
from ckpt_tool.formats.deepspeed.facts.run_config import DS_FIELDS
from ckpt_tool.formats.registry import locate
from ckpt_tool.json_file import read_json
from ckpt_tool.storage import Location
from ckpt_tool.stores.known import Place, open_location
from ckpt_tool.system_errors import reading_failed

_LARGEST = 64 << 20  # bytes; they are held in memory, and no tokenizer is larger


def find_config(source: Place, given: Place | None) -> tuple[Mapping[str, Any] | None, dict[str, bytes]]:
    """The config to use, and the small files beside it that are carried over.

    Without ``--config``: a config.json in the checkpoint's directory or the one above, where trainers
    put it.
    """
    if given is not None:
        path = open_location(given)
        return read_config(path), _beside(path) if path.is_directory() else {}
    root = locate(source)
    for directory in (root, root.parent):
        if (directory / "config.json").is_file():
            return read_config(directory), _beside(directory)
    return None, {}


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
