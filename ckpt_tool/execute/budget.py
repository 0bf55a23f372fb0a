"""The memory budget: every buffer comes out of it, and what does not fit is not admitted."""

from __future__ import annotations

from dataclasses import dataclass

from ckpt_tool.errors import UsageError

KIB, MIB = 1 << 10, 1 << 20

# Below this a tile costs more in system calls than in bytes; above the other, nothing gets faster.
_SMALLEST_TILE = 64 * KIB
_LARGEST_TILE = 1 * MIB
# The most that a matrix to be transposed, which is best read whole, may take.
_LARGEST_BLOCK = 256 * MIB
# Two buffers per worker: what was read, and what a cast makes of it (or, for verify, the other side).
_BUFFERS = 2


@dataclass(frozen=True, slots=True)
class Budget:
    """How a limit on memory is shared: ``workers`` threads, each with two buffers of ``tile`` bytes, or of
    up to ``largest`` bytes where that much is best loaded at once."""

    workers: int
    tile: int
    largest: int = 0

    def tile_for(self, block: int) -> int:
        """The size of a buffer that is to hold ``block`` bytes, if the limit allows it."""
        return max(self.tile, min(-(-block // 64) * 64, self.largest))

    def nbytes(self, block: int = 0) -> int:
        """Bytes all buffers hold together: never more than the limit."""
        return self.workers * _BUFFERS * self.tile_for(block)

    @staticmethod
    def share(max_memory: int, workers: int) -> Budget:
        """Divide ``max_memory`` bytes among ``workers``; where it is too little, among fewer.

        Raises:
            UsageError: it does not even hold one worker's smallest tile.
        """
        least = _BUFFERS * _SMALLEST_TILE
        if max_memory < least:
            raise UsageError(
                f"--max-memory {max_memory} bytes is too little to work with; the least that works is "
                f"{least} bytes ({least // KIB} KiB)."
            )
        workers = max(1, min(workers, max_memory // least))
        each = max_memory // (workers * _BUFFERS) // 64 * 64
        return Budget(workers, min(_LARGEST_TILE, each), min(_LARGEST_BLOCK, each))
