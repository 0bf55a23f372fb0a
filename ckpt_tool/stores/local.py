"""The local file system."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from ckpt_tool.errors import UsageError
from ckpt_tool.storage import LocalLocation


class LocalStore:
    """Paths, and ``file://`` URLs of this machine."""

    def location(self, url: str) -> LocalLocation:
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise UsageError(
                f"{url} names no file of this machine: a file URL has three slashes and an absolute path, "
                "file:///data/run."
            )
        return LocalLocation(Path(unquote(parts.path)))
