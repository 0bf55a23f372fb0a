"""A checkpoint as one self-contained page: a map of its experts, its tensors, and what is wrong with it.

``data`` says what is on the page, ``template.html`` how it is shown. Nothing is fetched from anywhere.
"""

from __future__ import annotations

import contextlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from ckpt_tool.errors import UsageError
from ckpt_tool.system_errors import unusable_destination

_BEGINS = b"<!doctype html>"
_DATA = "/*DATA*/"


def rendered(data: dict[str, Any]) -> str:
    """The page for what ``data.page_data`` found. Names in a checkpoint are text on it and nothing else."""
    template = (files("ckpt_tool.page") / "template.html").read_text(encoding="utf-8")
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    # A script element ends at its end tag, whatever stands around it.
    safe = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return template.replace(_DATA, safe)


def refuse_other_files(file: Path) -> None:
    """Raises:
    UsageError: there is something at ``file`` that is no page of HTML.
    """
    try:
        with file.open("rb") as there:
            if there.read(len(_BEGINS)).lower() == _BEGINS:
                return
    except FileNotFoundError:
        return
    except IsADirectoryError:
        pass
    except OSError as error:
        raise unusable_destination(file, error) from error
    raise UsageError(f"{file} exists and is no HTML page. Choose another name for the page.")


def write_page(file: Path, page: str) -> None:
    """Put the page under its name, whole or not at all.

    Raises:
        UsageError: nothing can be made under its name.
        ExecutionError: the disk is full, or storage fails.
    """
    beside = file.with_name(f".{file.name}.ckpt-tool")
    try:
        beside.write_text(page, encoding="utf-8")
        beside.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise unusable_destination(file, error) from error
