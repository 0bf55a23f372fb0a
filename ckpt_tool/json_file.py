"""Small JSON files that a user gives: config.json, an engine's config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt_tool.errors import UnreadableError, UsageError
from ckpt_tool.system_errors import reading_failed


def read_json(file: Path) -> Mapping[str, Any]:
    """A JSON object; UsageError where there is no file, UnreadableError where it holds something else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{file} does not exist.") from None
    except IsADirectoryError:
        raise UsageError(f"{file} is a directory; pass the file.") from None
    except OSError as error:
        raise reading_failed(file, error) from error
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"{file} is not readable JSON ({error}).") from error
    if not isinstance(value, dict):
        raise UnreadableError(f"{file} holds no JSON object.")
    return value
