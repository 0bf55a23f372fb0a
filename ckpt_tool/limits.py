"""What is believed of a file at most, so that a damaged or hostile one costs no more than an honest one.

Far above what any run has; whatever is larger is refused with its number.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import count

# Numbers that lists are made of.
MOST_RANKS = 1 << 20
MOST_EXPERTS = 1 << 20
MOST_LAYERS = 1 << 16
# torch has at most 64 dimensions (c10/core/impl/SizesAndStrides.h grows, but its kernels refuse more).
MOST_DIMENSIONS = 64
# Bytes of what is read whole. A rank of a trillion-parameter run has a pickle of 4 MB; a million chunks of
# DCP take 200 MB of metadata.
LARGEST_PICKLE = 128 << 20
LARGEST_METADATA = 384 << 20
LONGEST_TAG = 4096
LONGEST_NUMBER = 9  # digits, in names
LARGEST_JSON = 64 << 20
LARGEST_RECORD = 128 << 20  # manifest and journal


def first_missing(found: Collection[int], expected: int) -> int | None:
    """The least of the numbers 0 to ``expected`` - 1 that is not in ``found``; None where all are. It takes
    as many steps as ``found`` has members, whatever is expected."""
    known = set(found)
    least = next(number for number in count() if number not in known)
    return least if least < expected else None
