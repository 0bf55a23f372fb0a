"""What a result may replace: directories of which every entry is proven to belong to a checkpoint.

Proven is what a manifest of ckpt-tool lists, what the catalogue was read from, and what the format's engine
is known to write beside it. One entry more, and nothing is replaced.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterable
from pathlib import Path

from ckpt_tool.errors import CkptToolError, UnreadableError, UsageError
from ckpt_tool.formats.beside import DEEPSPEED_FILES
from ckpt_tool.formats.dcp.reading.beside import find_beside
from ckpt_tool.formats.registry import TAG_FILES, open_checkpoint
from ckpt_tool.limits import LONGEST_TAG
from ckpt_tool.manifest import JOURNAL, MANIFEST, read_manifest
from ckpt_tool.replacing import Owned, aside, entries, named, parents
from ckpt_tool.storage import Reader, read_small

# DeepSpeed copies this script beside its tags (runtime/engine.py, ``_copy_recovery_script``).
_BESIDE_TAGS = frozenset({*TAG_FILES, "zero_to_fp32.py"})
# What ``save_pretrained`` of models and processors writes beside the weights (transformers 5.20).
_PUBLISHED = frozenset(
    {
        "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
        "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
        "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "preprocessor_config.json",
        "processor_config.json", "video_preprocessor_config.json",
    }
)  # fmt: skip


def owned(destination: Path, result: Iterable[str]) -> Owned:
    """What a result of the files ``result`` replaces at an existing ``destination``.

    Raises:
        UsageError: something there is not proven to belong to a checkpoint; it is named.
    """
    if destination.is_symlink() or not destination.is_dir():
        raise UsageError(f"{destination} is not a directory; --overwrite replaces checkpoints only.")
    present = list(entries(destination))
    known, unread = _known(destination, present)
    strangers = [path for path in present if path not in known]
    tag, beside = _tag_of(result)
    if not strangers and not _is_another_step(destination, tag, present):
        return Owned(None, frozenset(present))
    own = known.intersection(present)
    flat = {path for path in own if "/" not in path} - _BESIDE_TAGS - {MANIFEST, JOURNAL}
    if tag is not None and not flat and _holds_tags(destination, tag):
        return _one_tag(destination, tag, beside)
    if unread is not None:
        raise UsageError(
            f"{destination} holds no checkpoint that tells what belongs to it: {unread} --overwrite "
            "replaces checkpoints only. Remove it yourself, or choose another destination."
        )
    raise _refusal(destination, strangers, own)


def _refusal(directory: Path, strangers: Iterable[str], own: Iterable[str]) -> UsageError:
    """Names ``strangers``, and a subdirectory as one where nothing of the checkpoint's ``own`` is in it."""
    ours = {path.partition("/")[0] for path in own}
    shown = set()
    for path in strangers:
        top, slash, _ = path.partition("/")
        shown.add(path if top in ours else top + slash)
    return UsageError(
        f"{directory} holds what is not known to belong to the checkpoint in it: {named(shown)}. "
        "--overwrite replaces checkpoints only. Move that elsewhere, or choose another destination."
    )


def _known(directory: Path, present: list[str]) -> tuple[set[str], CkptToolError | None]:
    """What belongs to the checkpoint in a directory, and why it could not be read, where that is so."""
    known = {JOURNAL}  # what a removal begins with; it may have been cut off
    try:
        manifest = read_manifest(directory)
    except UnreadableError as error:
        return known, error
    if manifest is not None:
        known = {file.path for file in manifest.files} | {MANIFEST, JOURNAL}
        # A removal that was cut off leaves directories that are empty.
        known |= {f"{folder}/" for path in known for folder in parents(path)}
        if known.issuperset(present):
            return known, None
    try:
        reader, checkpoint = open_checkpoint(directory)
    except CkptToolError as error:
        return known, None if manifest is not None else error
    try:
        inside = os.path.relpath(reader.root, directory)
        own = {file.path for file in checkpoint.files} | _beside(checkpoint.format, reader)
    finally:
        reader.close()
    if inside == ".":
        return known | own, None
    return known | {posixpath.join(inside, path) for path in own} | _BESIDE_TAGS, None


def _beside(format_name: str, reader: Reader) -> set[str]:
    names = set(reader.list())
    if format_name.startswith("deepspeed"):
        return {name for name in names if DEEPSPEED_FILES.fullmatch(name)}
    if format_name == "torch-dcp":
        found = find_beside(reader)
        others = {path for path, _ in found.extra_states} | ({"config.json"} & names)
        return {*found.shared, *found.of_ranks} | others
    return set(_PUBLISHED & names)


# ---- a run's directory, with a subdirectory for every step


def _tag_of(result: Iterable[str]) -> tuple[str | None, frozenset[str]]:
    """The one directory that a result consists of, beside files that name it; and these."""
    tops = {path.partition("/")[::2] for path in result}
    directories = {top for top, rest in tops if rest}
    files = frozenset(top for top, rest in tops if not rest)
    tag = directories.pop() if len(directories) == 1 and files.issubset(TAG_FILES) else None
    return tag, files


def _is_another_step(destination: Path, tag: str | None, present: Iterable[str]) -> bool:
    """Whether an engine's run has one step, and the result is another: the run keeps both.

    A result of ours (it has a manifest) is replaced as a whole.
    """
    files = [path for path in present if not path.endswith("/")]
    if tag is None or MANIFEST in files:
        return False
    tops = {path.partition("/")[0] for path in files if "/" in path}
    return (
        len(tops) == 1 and tag not in tops and any(_names_a_tag(destination / name) for name in TAG_FILES)
    )


def _holds_tags(destination: Path, tag: str) -> bool:
    return any(_names_a_tag(destination / name) for name in TAG_FILES) or _is_there(destination / tag)


def _is_there(place: Path) -> bool:
    """Whether a tag has its name, or a run was killed that had set it aside."""
    return place.is_dir() or aside(place).is_dir()


def _names_a_tag(file: Path) -> bool:
    """Whether a file is one that names a directory beside it."""
    try:
        tag = read_small(file, LONGEST_TAG).decode().strip() if file.is_file() else ""
    except (OSError, ValueError, UnreadableError):
        return False
    return bool(tag) and "/" not in tag and _is_there(file.parent / tag)


def _one_tag(destination: Path, tag: str, beside: frozenset[str]) -> Owned:
    """The tag alone, with the files that name it; everything else in the directory stays."""
    place = destination / tag
    replaced = {name for name in beside if os.path.lexists(destination / name)}
    strange = [name for name in replaced if not _names_a_tag(destination / name)]
    if strange:
        raise _refusal(destination, strange, ())
    try:
        manifest = read_manifest(destination)
    except UnreadableError as error:
        raise UsageError(f"{error} Move it away, or choose another destination.") from error
    if manifest is not None:
        others = [path for path in (file.path for file in manifest.files) if path.partition("/")[0] != tag]
        if set(others).difference(TAG_FILES):
            raise UsageError(
                f"{destination / MANIFEST} holds the checksums of another checkpoint, of {others[0]}, and "
                "would be replaced. Choose another destination."
            )
        replaced.add(MANIFEST)
    if not os.path.lexists(place):
        return Owned(tag, frozenset(replaced))
    if place.is_symlink() or not place.is_dir():
        raise UsageError(f"{place} is not a directory; --overwrite replaces checkpoints only.")
    present = list(entries(place))
    known, unread = _known(place, present)
    if manifest is not None:
        known |= {file.path.removeprefix(f"{tag}/") for file in manifest.files}
    strangers = [path for path in present if path not in known]
    if strangers and unread is not None and manifest is None:
        raise UsageError(
            f"{place} holds no checkpoint that tells what belongs to it: {unread} --overwrite replaces "
            "checkpoints only. Remove it yourself, or choose another destination."
        )
    if strangers:
        raise _refusal(place, strangers, known.intersection(present))
    return Owned(tag, frozenset({f"{tag}/{path}" for path in present} | replaced))
