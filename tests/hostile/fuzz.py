"""Every parser with thousands of changed inputs, under limits; by hand with as many as wanted:

    python -m tests.hostile.fuzz --inputs 200000 [--parser NAME ...] [--seed N]

An input is read, or refused with an error of ours. Nothing is run, imported or written; none takes more
than 5 s of CPU, and all together not more than 500 MB beyond what honest inputs take.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from ckpt_tool import api, inspection
from ckpt_tool.containers import pickles
from ckpt_tool.containers.dcp_metadata import read_metadata
from ckpt_tool.containers.safetensors import SafetensorsFile
from ckpt_tool.containers.torch_zip import TorchArchive
from ckpt_tool.errors import CkptToolError
from ckpt_tool.formats.registry import open_checkpoint
from ckpt_tool.journal import journal_line, read_journal
from ckpt_tool.json_file import read_json
from ckpt_tool.manifest import JOURNAL, MANIFEST, read_manifest
from ckpt_tool.storage import LocalReader
from tests.conftest import ROOT, checkpoint_of, config_of
from tests.hostile import mutations

SECONDS, BYTES = 5, 500 << 20
_REFUSED = (
    "exec", "compile", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.remove", "os.rename",
    "os.mkdir", "subprocess.Popen", "socket.", "ctypes.dlopen", "shutil.",
)  # fmt: skip
# Modules of these places may be imported while an input is read: those that were not needed before.
_OURS = tuple(map(str, (ROOT, Path(os.__file__).parent)))


class Parser(NamedTuple):
    """``make`` fills a directory; a file in it that matches ``glob`` is changed, and ``read`` reads it."""

    make: Callable[[Path], object]
    glob: str
    change: mutations.Mutation
    read: Callable[[Path], object]


def read(folder: Path) -> object:
    reader, checkpoint = open_checkpoint(folder)
    reader.close()
    inspection.overview(checkpoint)
    return inspection.expert_rows(checkpoint)


def _read_journal(folder: Path) -> object:
    data = (folder / JOURNAL).read_bytes()
    return read_journal(data), read_journal(b"".join(map(_with_its_sum, data.splitlines(keepends=True))))


def _with_its_sum(line: bytes) -> bytes:
    """Else a changed line is told by its checksum, and nothing behind that would be shown."""
    try:
        entry = json.loads(line)
        return journal_line({key: entry[key] for key in entry if key != "sum"})
    except (ValueError, TypeError, RecursionError):
        return line


def _copy(source: Path) -> Callable[[Path], object]:
    return lambda folder: shutil.copytree(source, folder, dirs_exist_ok=True)


def _published(folder: Path) -> None:
    api.consolidate(
        checkpoint_of("mixtral_w4e2"), folder, config=config_of("mixtral_w4e2"), max_shard_bytes=20000
    )


def _universal(folder: Path) -> None:
    api.convert(checkpoint_of("mixtral_w2e1"), folder, to="universal")


def _journal(folder: Path) -> None:
    """What a conversion's journal says, and its manifest."""
    api.convert(checkpoint_of("dense_w3"), folder, to="universal")
    lines = (folder / MANIFEST).read_bytes()
    manifest = json.loads(lines)
    files = manifest.pop("files")
    run = {"run": {"synced": True, "boot": "x", "sources": [["a.pt", 1, 2, 3, 4]]}}
    entries = [manifest, run, *files, {"discarded": [files[0]["path"]]}]
    (folder / JOURNAL).write_bytes(b"".join(map(journal_line, entries)))


def _read_archives(folder: Path) -> object:
    return [TorchArchive(LocalReader(folder), path.name).root for path in folder.glob("*.pt")]


def _read_pickle(folder: Path) -> object:
    return pickles.loads((folder / "data.pkl").read_bytes(), where="data.pkl")


def _one_rank(folder: Path) -> None:
    folder.mkdir()
    shutil.copy(next(checkpoint_of("dense_w3").rglob("*rank_0*model_states.pt")), folder / "rank.pt")


def _one_pickle(folder: Path) -> None:
    _one_rank(folder)
    with zipfile.ZipFile(folder / "rank.pt") as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        (folder / "data.pkl").write_bytes(archive.read(name))


def _one_metadata(folder: Path) -> None:
    folder.mkdir()
    shutil.copy(next((DCP / "dense_tied_w3" / "checkpoint").rglob(".metadata")), folder)


DCP = ROOT / "fixtures" / "dcp"
PARSERS = {
    # one file
    "archive of torch": Parser(_one_rank, "rank.pt", mutations.pickle_of_archive, _read_archives),
    "pickle": Parser(_one_pickle, "data.pkl", mutations.opcodes, _read_pickle),
    ".metadata of DCP": Parser(
        _one_metadata,
        ".metadata",
        mutations.opcodes,
        lambda folder: read_metadata(LocalReader(folder), ".metadata"),
    ),
    "header of safetensors": Parser(
        _published,
        "model-00001-of-*.safetensors",
        mutations.header_of_safetensors,
        lambda folder: [
            SafetensorsFile(LocalReader(folder), path.name, state="weight")
            for path in folder.glob("model-00001-of-*.safetensors")
        ],
    ),
    "json": Parser(
        _published, "config.json", mutations.values, lambda folder: read_json(folder / "config.json")
    ),
    "manifest": Parser(_published, MANIFEST, mutations.values_and_checksum, read_manifest),
    "journal": Parser(_journal, JOURNAL, mutations.lines_of_values, _read_journal),
    # a whole checkpoint
    "zero3 model": Parser(
        _copy(checkpoint_of("mixtral_w2e1")), "*/*model_states.pt", mutations.pickle_of_archive, read
    ),
    "zero3 optimizer": Parser(
        _copy(checkpoint_of("dense_w3")), "*/*optim_states.pt", mutations.pickle_of_archive, read
    ),
    "zero2": Parser(_copy(checkpoint_of("mixtral_z2_w4e2")), "*/*.pt", mutations.pickle_of_archive, read),
    "zero0": Parser(_copy(checkpoint_of("mixtral_z0_w2e2")), "*/*.pt", mutations.pickle_of_archive, read),
    "universal": Parser(_universal, "**/*.pt", mutations.pickle_of_archive, read),
    "dcp metadata": Parser(
        _copy(DCP / "qwen3_moe_transformers_w2e2" / "checkpoint"), "**/.metadata", mutations.opcodes, read
    ),
    "dcp archives": Parser(
        _copy(DCP / "dense_tied_w3" / "checkpoint"), "**/*.distcp", mutations.several_bytes, read
    ),
    "safetensors": Parser(_published, "*.safetensors", mutations.header_of_safetensors, read),
    "index": Parser(_published, "*.index.json", mutations.values, read),
    "config": Parser(_published, "config.json", mutations.values, read),
}


class TooSlow(BaseException):
    """An input took more CPU than it may."""


class Violation(BaseException):
    """Reading an input did something that reading has no business to do."""


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise TooSlow


class _Watch:
    """Refuses what a reader does not do, while it is ``on``."""

    def __init__(self) -> None:
        self.on = False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        writing = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        foreign = event == "import" and not _is_known(str(args[0]))
        loaded = event in ("exec", "compile") and _file_of(args).startswith(_OURS)
        if (event.startswith(_REFUSED) and not loaded) or writing or foreign:
            self.on = False
            raise Violation(f"{event}{args[:2]!r:.200}")


def _file_of(args: tuple[Any, ...]) -> str:
    """The file that code is from, as the events of ``exec`` and ``compile`` tell it."""
    return str(getattr(args[0], "co_filename", args[-1]))


def _is_known(module: str) -> bool:
    top = module.partition(".")[0]
    return top in sys.stdlib_module_names or top in ("ckpt_tool", "numpy", "xxhash")


def fuzz(name: str, inputs: int, seed: int) -> tuple[int, int]:
    """Try a parser; how many inputs were read, and how many refused. The process is of no use afterwards.

    Raises:
        AssertionError: an input was not read, and not refused as it should be; it is kept.
    """
    parser, chance = PARSERS[name], random.Random(f"{name} {seed}")
    watch, counts = _Watch(), [0, 0]
    signal.signal(signal.SIGVTALRM, _too_slow)
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "source"
        parser.make(folder)
        files = sorted(path for path in folder.glob(parser.glob) if path.is_file())
        originals = {path: path.read_bytes() for path in files}
        parser.read(folder)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(inputs):
            path = chance.choice(files)
            changed = parser.change(chance, originals[path])
            path.write_bytes(changed)
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
            watch.on = True
            try:
                parser.read(folder)
                counts[0] += 1
            except CkptToolError as error:
                counts[1] += 1
                if len(str(error)) > 5000:
                    raise AssertionError(_kept(changed, name, number, "a message without end")) from error
            except BaseException as error:
                raise AssertionError(_kept(changed, name, number, repr(error)[:500])) from error
            finally:
                watch.on = False
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            path.write_bytes(originals[path])
            more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
            assert more << 10 < BYTES, _kept(changed, name, number, f"{more >> 10} MiB")
    return counts[0], counts[1]


def _kept(data: bytes, name: str, number: int, what: str) -> str:
    kept = Path(tempfile.gettempdir()) / f"fuzz-{name.replace(' ', '-')}-{number}.bin"
    kept.write_bytes(data)
    return f"{name}, input {number}: {what}; the file is in {kept}"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    arguments.add_argument("--inputs", type=int, default=200_000)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--parser", nargs="*", choices=list(PARSERS), default=list(PARSERS))
    given = arguments.parse_args()
    for name in given.parser:
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            accepted, refused = fuzz(name, given.inputs, given.seed)
            print(f"| {name} | {given.inputs:,} | {accepted:,} | {refused:,} |", end=" ", flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(f"{time.monotonic() - began:.0f} s |", "" if status == 0 else "FAILED", flush=True)


if __name__ == "__main__":
    main()
