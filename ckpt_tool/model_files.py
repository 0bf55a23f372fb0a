"""The small files of a model beside its weights: ``config.json``, the tokenizer, licences."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt_tool.errors import MismatchError, UsageError
from ckpt_tool.families import family_of
from ckpt_tool.formats.beside import is_models
from ckpt_tool.formats.deepspeed.facts.run_config import DS_FIELDS
from ckpt_tool.formats.registry import locate
from ckpt_tool.json_file import read_json
from ckpt_tool.storage import LocalReader, is_directory, is_file, read_small
from ckpt_tool.system_errors import reading_failed

_LARGEST = 64 << 20  # bytes; they are held in memory, and no tokenizer is larger


def find_config(
    source: Path, given: str | os.PathLike[str] | None
) -> tuple[Mapping[str, Any] | None, dict[str, bytes]]:
    """The config to use, and the small files beside it that are carried over.

    Without ``--config``: a config.json in the checkpoint's directory or the one above, where trainers
    put it.
    """
    if given is not None:
        path = Path(given)
        return read_config(path), _beside(path) if is_directory(path) else {}
    root = locate(source)
    for directory in (root, root.parent):
        if is_file(directory / "config.json"):
            return read_config(directory), _beside(directory)
    return None, {}


def read_config(path: Path) -> Mapping[str, Any]:
    """The ``config.json`` at ``path`` or in it; MismatchError where it has no ``model_type``."""
    file = path / "config.json" if is_directory(path) else path
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


def left_behind(source: Path, carried: Mapping[str, bytes]) -> tuple[str, ...]:
    """A note that names a published model's small files which are not carried over; none where all are.
    What else is there, the source's own notes name (``formats.beside``)."""
    root = locate(source)
    names = [
        entry.name
        for entry in map(root.joinpath, LocalReader(root).list())
        if is_file(entry) and is_models(entry.name) and entry.name not in carried
    ]
    return (f"Not carried over: {', '.join(names)}.",) if names else ()


def _beside(directory: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for path in map(directory.joinpath, LocalReader(directory).list()):
        if not is_models(path.name) or not is_file(path):
            continue
        try:
            if path.stat().st_size <= _LARGEST:
                found[path.name] = read_small(path, _LARGEST)
        except OSError as error:
            raise reading_failed(path, error) from error
    return found
