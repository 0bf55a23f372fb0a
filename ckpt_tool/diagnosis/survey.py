"""Files that do not make up a checkpoint: all that is missing, cut short, or of another save.

Each file is looked at by itself: its name, its container, and in DeepSpeed's files what it says of its run.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ckpt_tool.canonical import WEIGHT
from ckpt_tool.containers.dcp_metadata import BytesEntry, read_metadata
from ckpt_tool.containers.pickle_records import Opaque, TensorRecord
from ckpt_tool.containers.safetensors import SafetensorsFile
from ckpt_tool.containers.torch_zip import TorchArchive
from ckpt_tool.diagnosis.findings import Finding, Severity, found
from ckpt_tool.errors import UnreadableError
from ckpt_tool.formats.dcp.contents import metadata_files
from ckpt_tool.formats.deepspeed.facts.file_names import MODEL, OPTIMIZER
from ckpt_tool.formats.deepspeed.facts.scalars import scalar_state
from ckpt_tool.formats.hf.files import INDEX
from ckpt_tool.formats.registry import TAG_FILES, locate
from ckpt_tool.json_file import read_object
from ckpt_tool.limits import LONGEST_TAG
from ckpt_tool.storage import Reader, is_file, read_each, read_small
from ckpt_tool.system_errors import reading_failed

_MODEL_FILE = re.compile(r"mp_rank_00_model_states\.pt")
_EXPERT_OPTIMIZER = re.compile(r"expp_rank_(?P<rank>\d{1,6})_mp_rank_00_optim_states\.pt")
_EXPERT = re.compile(r"layer_(\d{1,6})_expert_(\d{1,6})_mp_rank_00_model_states\.pt")
_RANK_FILES = (MODEL, OPTIMIZER)
# What all files of one save say alike.
_OF_THE_RUN = ("global_steps", "skipped_steps", "dp_world_size", "ds_version")
# What a damaged file may claim is not believed beyond this: ranks of a run, experts of a model.
_MOST_RANKS, _MOST_EXPERTS = 1 << 17, 1 << 20
_COPY = (
    "Copy the files of all ranks from where the checkpoint was saved; nodes often save to their own disk."
)
_SERIES = re.compile(r"(.*-)(\d{1,6})-of-(\d{1,6})\.safetensors", re.ASCII)


def survey(path: Path) -> list[Finding]:
    """Everything found wrong with the files of the checkpoint at ``path``."""
    reader = locate(path).reader()
    try:
        return [finding for look in _LOOKS for finding in look(reader)]
    finally:
        reader.close()


def tag_file(path: Path) -> list[Finding]:
    """Whether the ``latest`` file beside a run's steps names the newest of them, where ``path`` has one.

    Raises:
        CkptToolError: the system does not let it be read.
    """
    if path.name in TAG_FILES and is_file(path):
        path = path.parent
    findings: list[Finding] = []
    for name in TAG_FILES:
        file = path / name
        if not is_file(file):
            continue
        tag = read_small(file, LONGEST_TAG).decode(errors="replace").strip()
        try:
            steps = [entry.name for entry in path.iterdir() if entry.is_dir()]
        except OSError as error:
            raise reading_failed(error.filename or file, error) from error
        findings += _tag(file, tag, steps)
    return findings


def _tag(file: Path, tag: str, steps: list[str]) -> Iterator[Finding]:
    named = re.fullmatch(r"(.*?)(\d+)(\D*)", tag)
    alike = {
        int(match[2]): step
        for step in steps
        if (match := re.fullmatch(r"(.*?)(\d+)(\D*)", step))
        and (named is None or (match[1], match[3]) == (named[1], named[3]))
    }
    if not tag or tag not in steps:
        yield Finding(
            "tag",
            Severity.ERROR,
            f"{file} names {tag!r}, and there is no such directory beside it"
            + (f" (there are {', '.join(sorted(steps)[:5])})." if steps else "."),
            "A run that resumes from here finds nothing, and starts anew.",
            "Write the name of the step to resume from into the file, or copy the directory that it names.",
            (tag,),
        )
    elif named is not None and max(alike) > int(named[2]):
        yield Finding(
            "tag",
            Severity.WARNING,
            f"{file} names {tag}, and {alike[max(alike)]} is newer.",
            "The newer step was not saved to its end, or the file is old: a run that resumes goes back to "
            f"{tag}.",
            "Run `ckpt-tool doctor` on the newer step. If it is sound, write its name into the file; if "
            "not, "
            "remove it.",
            (alike[max(alike)],),
        )


# ---- any format


def _broken_files(reader: Reader) -> Iterator[Finding]:
    """Files whose container cannot be read: cut short, empty, or something else."""
    files = [f for f in _files(reader, "") if f.endswith((".pt", ".safetensors"))]
    messages = [message for message in read_each(lambda path: _container(reader, path), files) if message]
    yield from found(
        "broken_file",
        Severity.ERROR,
        "Files are damaged: {}",
        messages,
        "What is in them cannot be loaded.",
        "Copy them again from where the checkpoint was saved. A file of a save that was interrupted is "
        "lost: "
        "use an earlier step.",
    )


def _files(reader: Reader, directory: str) -> Iterator[str]:
    for name in reader.list(directory):
        path = f"{directory}/{name}" if directory else name
        if reader.is_directory(path):
            if not name.startswith("global_step"):  # another checkpoint
                yield from _files(reader, path)
        else:
            yield path


def _container(reader: Reader, path: str) -> str | None:
    try:
        if path.endswith(".safetensors"):
            SafetensorsFile(reader, path, state=WEIGHT)
        else:
            TorchArchive(reader, path)
    except UnreadableError as error:
        return str(error)
    return None


# ---- DeepSpeed


class _Said:
    """What one file says of its run; empty where it cannot be read."""

    def __init__(self, reader: Reader, path: str) -> None:
        self.path = path
        self.values: dict[str, Any] = {}
        try:
            archive = TorchArchive(reader, path)
            root = archive.root if isinstance(archive.root, dict) else {}
            self.values = {key: root[key] for key in (*_OF_THE_RUN, "num_experts") if key in root}
            zero = root.get("optimizer_state_dict")
            stage = zero.get("zero_stage") if isinstance(zero, dict) else None
            self.values["stage"] = stage.args[0] if isinstance(stage, Opaque) else stage
            steps = {f"{scalar_state(archive, step).value:g}" for step in _steps(root)}
            if steps:
                self.values["the optimizer's step"] = " and ".join(sorted(steps))
        except (UnreadableError, TypeError, AttributeError, ValueError, KeyError):
            return  # said of the file elsewhere


def _steps(root: Mapping[str, Any]) -> Iterator[Any]:
    zero = root.get("optimizer_state_dict")
    if not isinstance(zero, dict):
        return
    base = zero.get("optimizer_state_dict", zero.get("base_optimizer_state"))
    states = base.get("state") if isinstance(base, dict) else None
    for state in (states or {}).values():
        step = state.get("step") if isinstance(state, dict) else None
        if isinstance(step, TensorRecord | int | float):
            yield step


def _ranks(reader: Reader) -> Iterator[Finding]:
    """Ranks that are missing or too many, and files of different saves."""
    names = reader.list()
    by_kind = {
        pattern: {int(match["rank"]): name for name in names if (match := pattern.fullmatch(name))}
        for pattern in _RANK_FILES
    }
    model_files = [name for name in names if _MODEL_FILE.fullmatch(name)]
    if not model_files and not any(by_kind.values()):
        return
    said = read_each(
        lambda name: _Said(reader, name),
        [*model_files, *(name for files in by_kind.values() for name in files.values())],
    )
    worlds = Counter(
        world
        for one in said
        if type(world := one.values.get("dp_world_size")) is int and 0 < world <= _MOST_RANKS
    )
    highest = min(_MOST_RANKS, max((rank for files in by_kind.values() for rank in files), default=-1) + 1)
    world = worlds.most_common(1)[0][0] if worlds else highest
    missing, foreign = [], []
    by_rank = any(
        MODEL.fullmatch(one.path) or one.values.get("stage") == 3 for one in said
    )  # else one of all
    if not by_rank and not model_files:
        missing.append("mp_rank_00_model_states.pt")
    for pattern, files in by_kind.items():
        if not files and not by_rank:
            continue  # weights alone, in stages 0 to 2
        example = next(iter(files.values()), _example(pattern, by_kind))
        missing += [
            re.sub(r"rank_\d+", f"rank_{r}", example, count=1) for r in range(world) if r not in files
        ]
        foreign += [name for rank, name in files.items() if rank >= world]
    yield from found(
        "missing_rank",
        Severity.ERROR,
        f"Files of ranks are missing, of {world} that saved: {{}}.",
        missing,
        "Every rank holds a part of every tensor: without them no tensor is complete.",
        _COPY,
    )
    yield from found(
        "foreign_rank",
        Severity.ERROR,
        f"There are files of more ranks than the {world} that saved: {{}}.",
        foreign,
        "Files of another run are in the directory; a run with that many ranks would load them.",
        "Find out which run is wanted, and remove the other's files.",
    )
    yield from _different_saves(said)
    yield from _expert_files(names, said)


def _example(pattern: re.Pattern[str], by_kind: Mapping[re.Pattern[str], Mapping[int, str]]) -> str:
    """The name of a file of a kind of which none is there, by those of the other kind."""
    other = next((name for files in by_kind.values() for name in files.values()), "")
    if pattern is MODEL:
        name = other.removeprefix("bf16_").removeprefix("fp16_").replace("optim_states", "model_states")
        return name or "zero_pp_rank_0_mp_rank_00_model_states.pt"
    return other.replace("model_states", "optim_states") or "zero_pp_rank_0_mp_rank_00_optim_states.pt"


def _different_saves(said: Iterable[_Said]) -> Iterator[Finding]:
    told = list(said)
    for key in (*_OF_THE_RUN, "the optimizer's step"):
        values = Counter(repr(one.values[key]) for one in told if key in one.values)
        if len(values) < 2:
            continue
        usual = values.most_common(1)[0][0]
        yield from found(
            "mixed_saves",
            Severity.ERROR,
            f"Files are of different saves: most say {key} {usual.strip(chr(39))}, others {{}}.",
            [
                f"{one.path} ({one.values[key]})"
                for one in told
                if key in one.values and repr(one.values[key]) != usual
            ],
            "DeepSpeed loads each rank's file without comparing them: a model of two steps or runs.",
            "Copy the checkpoint again from its origin, all of its files together.",
        )


def _expert_files(names: Iterable[str], said: Iterable[_Said]) -> Iterator[Finding]:
    """One file per layer and expert in stages 0 to 2, as many as ``num_experts`` says."""
    counts = next((one.values["num_experts"] for one in said if one.values.get("num_experts")), None)
    held = {(int(match[1]), int(match[2])) for name in names if (match := _EXPERT.fullmatch(name))}
    if not held or not isinstance(counts, list) or not all(type(count) is int for count in counts):
        return
    if sum(counts) > _MOST_EXPERTS:
        return
    yield from found(
        "missing_experts",
        Severity.ERROR,
        "Files of experts are missing: {}.",
        [
            f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt"
            for layer, count in enumerate(counts)
            for expert in range(count)
            if (layer, expert) not in held
        ],
        "These experts cannot be loaded.",
        _COPY,
    )


def _universal(reader: Reader) -> Iterator[Finding]:
    """Directories of parameters that lack a state which others have."""
    held = {
        name: {file for file in reader.list(f"zero/{name}") if file.endswith(".pt")}
        for name in reader.list("zero")
        if reader.is_directory(f"zero/{name}") and name != "tmp"
    }
    every = Counter(file for files in held.values() for file in files)
    common = {file for file, count in every.items() if 2 * count > len(held)}
    yield from found(
        "missing_file",
        Severity.ERROR,
        "Files of parameters are missing, which others have: {}.",
        [f"zero/{name}/{file}" for name, files in held.items() for file in sorted(common - files)],
        "DeepSpeed stops at the first, or (stages 1 and 2) leaves the state as it was initialised.",
        "Copy the directory again, or convert the original checkpoint again.",
    )


# ---- torch DCP


def _dcp(reader: Reader) -> Iterator[Finding]:
    """Data files that the metadata names: missing, or shorter than it says."""
    directories = ["", *(name for name in reader.list() if reader.is_directory(name))]
    for directory in directories:
        prefix = f"{directory}/" if directory else ""
        files = metadata_files(reader, directory)
        data = [name for name in reader.list(directory) if name.endswith(".distcp")]
        if data and not files:
            yield Finding(
                "unfinished_save",
                Severity.ERROR,
                f"{prefix}.metadata is missing, and {len(data)} data files are there.",
                "It is written last: the save was not finished, or not copied whole. Nothing tells what "
                "the data "
                "files hold.",
                "Use an earlier step, or copy the directory again with its hidden files.",
                (f"{prefix}.metadata",),
            )
        for name in files:
            yield from _dcp_files(reader, prefix + name)


def _dcp_files(reader: Reader, path: str) -> Iterator[Finding]:
    try:
        metadata = read_metadata(reader, path)
    except UnreadableError:
        return  # the reader's own sentence says it
    ends: dict[str, int] = {}
    for entry in metadata.entries.values():
        stored = (
            [entry.stored] if isinstance(entry, BytesEntry) else [chunk.stored for chunk in entry.chunks]
        )
        for one in stored:
            ends[one.file] = max(ends.get(one.file, 0), one.offset + one.length)
    sizes = {file: _size(reader, file) for file in ends}
    yield from found(
        "missing_file",
        Severity.ERROR,
        f"Data files that {path} names are missing: {{}}.",
        [file for file, size in sizes.items() if size is None],
        "Parts of tensors are gone; torch's loader stops, or leaves them as they were.",
        _COPY,
    )
    yield from found(
        "broken_file",
        Severity.ERROR,
        "Files are damaged: {}",
        [
            f"{file} has {size} bytes; {path} says that it has {ends[file]} at least"
            for file, size in sizes.items()
            if size is not None and size < ends[file]
        ],
        "What is in them cannot be loaded.",
        "Copy them again from where the checkpoint was saved.",
    )


def _size(reader: Reader, path: str) -> int | None:
    try:
        return reader.size(path)
    except UnreadableError:
        return None


# ---- safetensors


def _safetensors(reader: Reader) -> Iterable[Finding]:
    """Files that the index or the others' names speak of."""
    names = set(reader.list())
    wanted: set[str] = set()
    if INDEX in names:
        try:
            wanted |= set(read_object(reader, INDEX)["weight_map"].values())
        except (UnreadableError, KeyError, TypeError, AttributeError):
            wanted = set()  # the reader's own sentence says it
    for name in names:
        match = _SERIES.fullmatch(name)
        if match and int(match[3]) <= 10 * len(names):
            width = len(match[2])
            wanted |= {
                f"{match[1]}{n:0{width}d}-of-{match[3]}.safetensors" for n in range(1, int(match[3]) + 1)
            }
    return found(
        "missing_file",
        Severity.ERROR,
        "Files of the model are missing: {}.",
        sorted(str(name) for name in wanted if name not in names),
        "transformers stops, or leaves what is in them random.",
        "Copy or download them again.",
    )


_LOOKS: tuple[Callable[[Reader], Iterable[Finding]], ...] = (
    _broken_files,
    _ranks,
    _universal,
    _dcp,
    _safetensors,
)
