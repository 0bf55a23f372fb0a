"""Statistics of every tensor, and of every expert in it, in one streaming pass under the budget.

What belongs to one parameter (its stored weight, master and moments) is read together, a tile at a time, so
that states can be compared with each other while each byte is read once. Numbers are computed in small
blocks that stay in the processor's cache. Floats of 16 and 8 bits, and integers, are taken as float32.
"""

from __future__ import annotations

from ckpt_tool.statistics.measuring import measure as measure
from ckpt_tool.statistics.results import Rounding as Rounding
from ckpt_tool.statistics.results import Statistics as Statistics
from ckpt_tool.statistics.results import Stats as Stats
from ckpt_tool.statistics.results import TensorStatistics as TensorStatistics
from ckpt_tool.statistics.results import Updates as Updates
from ckpt_tool.statistics.results import experts_of as experts_of
from ckpt_tool.statistics.results import layer_of as layer_of
from ckpt_tool.statistics.results import merged as merged
