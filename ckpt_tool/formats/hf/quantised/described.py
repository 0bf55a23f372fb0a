"""What a model says of its quantisation, and the questions that every method asks of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ckpt_tool.errors import UnreadableError
from ckpt_tool.families import text_config
from ckpt_tool.json_file import read_object
from ckpt_tool.storage import Reader

QUANTISATION_KEYS = ("quantization_config", "compression_config")
# Where modelopt describes a model whose config.json does not (0.47, torch/export/unified_export_hf.py).
MODELOPT_FILE = "hf_quant_config.json"

Settings = Mapping[str, Any]


class NotUnderstoodError(Exception):
    """The description says something that is not understood; the message is a sentence for the user."""


def described(config: Mapping[str, Any] | None) -> Settings | None:
    """What a config says of its quantisation, under either of the names that transformers reads."""
    if config is None:
        return None
    for part in (config, text_config(config)):
        for key in QUANTISATION_KEYS:
            found = part.get(key)
            if isinstance(found, Mapping) and found:
                return found
    return None


def method_of(settings: Settings) -> str:
    """Its ``quant_method``; bitsandbytes' older configs lack it (transformers 5.20, quantizers/auto.py)."""
    if settings.get("load_in_8bit") or settings.get("load_in_4bit"):
        return "bitsandbytes"
    return str(settings.get("quant_method", "unknown"))


def with_description(config: Mapping[str, Any] | None, reader: Reader) -> Mapping[str, Any] | None:
    """The config, with what modelopt says in a file of its own as its newer releases say it in config.json.

    Raises:
        UnreadableError: that file is not JSON of its form.
    """
    if config is None or described(config) is not None or MODELOPT_FILE not in reader.list():
        return config
    found = read_object(reader, MODELOPT_FILE)
    inner = found.get("quantization")
    if not isinstance(inner, dict):
        raise UnreadableError(
            f"{reader.root}/{MODELOPT_FILE} is malformed: it has no object 'quantization'."
        )
    if not inner.get("quant_algo"):
        return config
    renamed = {"exclude_modules": "ignore", "kv_cache_quant_algo": "kv_cache_scheme"}
    settings = {renamed.get(key, key): value for key, value in inner.items()}
    more = {"producer": found["producer"]} if "producer" in found else {}
    return {**config, "quantization_config": {"quant_method": "modelopt", **settings, **more}}


def check_keys(settings: Settings, known: Iterable[str], where: str = "quantization_config") -> None:
    """Raises NotUnderstoodError where the description has a key that nobody here knows, and a value."""
    unknown = sorted(
        str(key)
        for key, value in settings.items()
        if key not in known and value not in (None, {}, [], False)
    )
    if unknown:
        raise NotUnderstoodError(
            f"{where} in config.json has {unknown[0]!r}, which ckpt-tool does not know."
        )


def whole(settings: Settings, key: str, choices: Iterable[int] | None = None) -> int:
    """A number that a description must have.

    Raises:
        NotUnderstoodError: it has none, or none of ``choices``.
    """
    found = settings.get(key)
    if type(found) is not int or (choices is not None and found not in choices):
        known = f"; ckpt-tool decodes {', '.join(map(str, choices))}" if choices is not None else ""
        raise NotUnderstoodError(f"quantization_config in config.json has {key} = {found!r}{known}.")
    return found
