"""What lies beside a checkpoint in its directory and is no part of it: named, whatever the format."""

from __future__ import annotations

import re
from collections.abc import Callable

from ckpt_tool.canonical import Checkpoint
from ckpt_tool.errors import CkptToolError
from ckpt_tool.manifest import MANIFEST
from ckpt_tool.storage import Location, Reader

# Beside its weights, what a published model directory consists of.
MODEL_FILES = re.compile(
    r"(README|LICEN[CS]E|NOTICE|USE_POLICY|tokenizer|vocab|audio|image_processor|chat_template)"
    r"|(?!zero_to_fp32)\w+\.py$|.*\.(tiktoken|model|spm|jinja)$|merges\.txt$"
    r"|(generation_config|special_tokens_map|added_tokens|normalizer|(pre|video_pre)?processor_config|params)"
    r"\.json$"
)
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
# What ranks of any stage save (deepspeed 0.19.8, runtime/engine.py, ``_get_ckpt_name`` and its like).
DEEPSPEED_FILES = re.compile(
    r"((bf16_|fp16_)?zero_pp_rank_\d+_)?mp_rank_\d+(_\d+)?_(model|optim)_states\.pt"
    r"|expp_rank_\d+_mp_rank_\d+_optim_states\.pt"
    r"|layer_-?\d+_expert_\d+_mp_rank_\d+_model_states\.pt"
)
# The engines' own: DeepSpeed's tag files and script, the index of safetensors, markers of finished saves.
_ENGINES = frozenset(
    {
        "config.json",
        "latest",
        "latest_universal",
        "zero_to_fp32.py",
        "model.safetensors.index.json",
        MANIFEST,
    }
)
_SHOWN = 5


def is_models(name: str) -> bool:
    """Whether a file is one of the small ones of a published model: its tokenizer, licence, code."""
    return bool(MODEL_FILES.match(name)) and not name.endswith(WEIGHTS)


def is_engines(name: str) -> bool:
    """Whether a file is one that engines and transformers write beside tensors, or one of ranks."""
    return name in _ENGINES or DEEPSPEED_FILES.fullmatch(name) is not None or name == ".metadata"


def not_understood(reader: Reader, checkpoint: Checkpoint) -> tuple[str, ...]:
    """A note that names files and directories which are no part of the checkpoint; none without such."""
    used = {file.path.split("/")[0] for file in checkpoint.files}
    beside = getattr(
        checkpoint.layout_hint, "beside", None
    )  # a DCP source's, which are carried to its like
    for paths in (getattr(beside, "shared", ()), getattr(beside, "of_ranks", ())):
        used |= set(paths)
    used |= {path.split("/")[0] for path, _ in getattr(beside, "extra_states", ())}
    if checkpoint.format.startswith("deepspeed"):
        used |= {name for name in reader.list() if DEEPSPEED_FILES.fullmatch(name)}
    return _note(reader, used)


def beside_tags(
    parent: Location, tag: Location, is_checkpoint: Callable[[Location], bool]
) -> tuple[str, ...]:
    """The same of the directory above a tag, where trainers keep their state; other tags are none of it."""
    reader = parent.reader()
    try:
        directories = [name for name in reader.list() if reader.is_directory(name)]
        tags = {name for name in directories if _is_tag(parent / name, is_checkpoint)}
        return _note(reader, {tag.name, *tags})
    finally:
        reader.close()


def _is_tag(path: Location, is_checkpoint: Callable[[Location], bool]) -> bool:
    try:
        return is_checkpoint(path)
    except CkptToolError as error:
        if isinstance(error.__cause__, PermissionError):
            return False  # nobody's tag that may not be looked into
        raise


def _note(reader: Reader, used: set[str]) -> tuple[str, ...]:
    found = [
        f"{name}/" if reader.is_directory(name) else name
        for name in reader.list()
        if name not in used and name not in _ENGINES and not name.startswith(".") and not is_models(name)
    ]
    if not found:
        return ()
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return (
        f"Beside the checkpoint in {reader.root}, and no part of it as far as is known: "
        f"{', '.join(found[:_SHOWN])}{more}. Not read, and not carried over.",
    )
