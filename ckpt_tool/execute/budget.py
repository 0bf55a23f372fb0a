"""The memory budget: every buffer comes out of it, and what does not fit is not admitted."""

from __future__ import annotations

from dataclasses import dataclass

from ckpt_tool.errors import UsageError

KIB, MIB = 1 << 10, 1 << 20

# Below this a tile costs more in system calls than in bytes; above the other, nothing gets faster.
_SMALLEST_TILE = 64 * KIB
_LARGEST_TILE = 1 * MIB
# Two buffers per worker: what was read, and what a cast makes of it (or, for verify, the other side).
_BUFFERS = 2


@dataclass(frozen=True, slots=True)
class Budget:
    """How a limit on memory is shared: ``workers`` threads, each with two buffers of ``tile`` bytes."""

    workers: int
    tile: int

    @property
    def nbytes(self) -> int:
        """Bytes all buffers hold together: never more than the limit."""
        return self.workers * _BUFFERS * self.tile

    @staticmethod
    def share(max_memory: int, workers: int) -> Budget:
        """Divide ``max_memory`` bytes among ``workers``; where it is too little, among fewer.

        Raises:
            UsageError: it does not even hold one worker's smallest tile.
        """
        least = _BUFFERS * _SMALLEST_TILE
        if max_memory < least:
            raise UsageError(
                f"--max-memory {max_memory} bytes is too little for one tile; the least that works is "
                f"{least} bytes ({least // KIB} KiB)."
            )
        workers = max(1, min(workers, max_memory // least))
        tile = min(_LARGEST_TILE, max_memory // (workers * _BUFFERS))
        return Budget(workers, tile // 64 * 64)
