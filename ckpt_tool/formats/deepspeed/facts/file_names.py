"""The files that each rank saves, found by their names.

deepspeed 0.19.8, runtime/engine.py ``_get_zero_ckpt_name`` and ``_get_ckpt_name``; some stages and releases
put bf16_ or fp16_ in front of optimizer files.
"""

from __future__ import annotations

import re

from ckpt_tool.errors import UnreadableError
from ckpt_tool.storage import Reader

MODEL = re.compile(r"(bf16_)?zero_pp_rank_(?P<rank>\d{1,6})_mp_rank_(?P<tp>\d{1,6})_model_states\.pt")
OPTIMIZER = re.compile(
    r"(bf16_|fp16_)?zero_pp_rank_(?P<rank>\d{1,6})_mp_rank_(?P<tp>\d{1,6})_optim_states\.pt"
)


def files_by_rank(reader: Reader, pattern: re.Pattern[str]) -> dict[int, str]:
    """The files whose names match ``pattern`` (with groups ``rank`` and ``tp``), by rank.

    Raises:
        UnreadableError: two files claim a rank, or the model was split by tensor parallelism.
    """
    found: dict[int, str] = {}
    for name in reader.list():
        match = pattern.fullmatch(name)
        if match is None:
            continue
        if int(match["tp"]) > 0:
            raise UnreadableError(
                f"{reader.root}/{name}: the model was also split by tensor parallelism (mp_rank "
                f"{match['tp']}). ckpt-tool does not read AutoTP checkpoints."
            )
        rank = int(match["rank"])
        if rank in found:
            raise UnreadableError(
                f"{reader.root}: {found[rank]} and {name} both claim rank {rank}. One of them is left "
                "over from a run in another precision; remove it."
            )
        found[rank] = name
    return found


def require_all(reader: Reader, found: dict[int, str], world: int, expected: str) -> list[str]:
    """The files of ranks 0 to ``world`` - 1, in order; ``expected`` is the name of one, with ``{rank}``.

    Raises:
        UnreadableError: a rank's file is missing.
    """
    for rank in range(world):
        if rank not in found:
            raise UnreadableError(
                f"{reader.root}/{expected.format(rank=rank)} is missing: the directory has a file of rank "
                f"{world - 1}, so it was saved by at least {world} ranks. Copy the files of all ranks "
                "(nodes often save to their own local disk)."
            )
    return [found[rank] for rank in range(world)]
