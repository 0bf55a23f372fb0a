"""Reading the two files that each rank of a ZeRO-3 run saves: metadata only.

Names and keys: deepspeed 0.19.8, runtime/engine.py (``_get_zero_ckpt_name``, ``_save_checkpoint``)
and runtime/zero/stage3.py (``_rigid_state_dict``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ckpt_tool.containers.torch_zip import TorchArchive
from ckpt_tool.errors import UnreadableError
from ckpt_tool.formats.deepspeed.facts.file_names import MODEL, OPTIMIZER, files_by_rank, require_all
from ckpt_tool.formats.deepspeed.reading.rank_files import ENGINE_KEYS, RankFiles, SavedObjects
from ckpt_tool.formats.deepspeed.reading.rank_model import read_model
from ckpt_tool.formats.deepspeed.reading.rank_optimizer import read_optimizer
from ckpt_tool.formats.deepspeed.reading.repeated import Repeated
from ckpt_tool.storage import Reader, read_each


def file_names(reader: Reader) -> list[tuple[str, str]]:
    """(model file, optimizer file) of every rank, by rank.

    Raises:
        UnreadableError: a rank's file is missing, or the files are of a kind that is not read.
    """
    model, optim = files_by_rank(reader, MODEL), files_by_rank(reader, OPTIMIZER)
    world = 1 + max([*model, *optim])
    prefix = "bf16_" if any(name.startswith("bf16_") for name in optim.values()) else ""
    return list(
        zip(
            require_all(reader, model, world, "zero_pp_rank_{rank}_mp_rank_00_model_states.pt"),
            require_all(reader, optim, world, f"{prefix}zero_pp_rank_{{rank}}_mp_rank_00_optim_states.pt"),
            strict=True,
        )
    )


def read_ranks(reader: Reader, names: list[tuple[str, str]]) -> list[RankFiles]:
    """Read the metadata of all ranks; what ranks say alike is read and kept once."""
    repeated = Repeated()
    return read_each(
        lambda item: _read_rank(reader, item[0], item[1][0], item[1][1], repeated), enumerate(names)
    )


def _read_rank(
    reader: Reader, rank: int, model_name: str, optim_name: str, repeated: Repeated
) -> RankFiles:
    model = TorchArchive(reader, model_name, alike=repeated.models, compared=rank > 0)
    optim = TorchArchive(reader, optim_name, alike=repeated.optimizers, compared=rank > 0)
    with _naming(model):
        files = read_model(model, rank, optim_name, repeated)
    with _naming(optim):
        read_optimizer(optim, files, repeated)
    files.sources = (model.source, optim.source)
    if rank == 0:
        left_out = set(model.root) - ENGINE_KEYS - set(files.client)
        files.saved = SavedObjects(
            {
                key: files.client[key] if key in files.client else repeated.described(model, value)
                for key, value in model.root.items()
                if key not in left_out
            },
            repeated.described(optim, optim.root),
            optim_name.startswith("bf16_"),
        )
    return files


@contextlib.contextmanager
def _naming(archive: TorchArchive) -> Iterator[None]:
    """Whatever was not foreseen in damaged metadata is said of the file it is in."""
    try:
        yield
    except (TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
        raise UnreadableError(
            f"{archive.where}: its metadata is malformed ({type(error).__name__}: {error}). Copy the file "
            "again from where it was saved."
        ) from error
