"""ckpt-tool: convert, re-shard, consolidate and inspect Mixture-of-Experts training checkpoints.

The verbs of the command line as functions; see ``ckpt_tool.api``. Nothing heavy is imported until one
of them is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "CkptToolError",
    "Execution",
    "__version__",
    "consolidate",
    "convert",
    "doctor",
    "open",
    "reshard",
    "verify",
]

if TYPE_CHECKING:
    from ckpt_tool.api import Execution, consolidate, convert, doctor, open, reshard, verify
    from ckpt_tool.errors import CkptToolError


def __getattr__(name: str) -> Any:
    if name == "CkptToolError":
        from ckpt_tool.errors import CkptToolError

        return CkptToolError
    if name in __all__:
        from ckpt_tool import api

        return getattr(api, name)
    raise AttributeError(f"module 'ckpt_tool' has no attribute {name!r}")
