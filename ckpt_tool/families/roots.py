"""Where a model's layers stand in its names, and where its config.json says they do.

A composite model (text with a vision tower) has its text model under a path of its own. A text model saved
with the composite's config.json, or a composite with its text model's, is brought together here; any other
root is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from ckpt_tool.canonical import Checkpoint, ExpertName
from ckpt_tool.errors import MismatchError, UnreadableError, UsageError
from ckpt_tool.families import Family, family_of, stated, text_config
from ckpt_tool.families.adapters import adapters_name, refuse_adapters
from ckpt_tool.families.agreement import check_config, promised_mtp_layers
from ckpt_tool.families.completeness import MTP_PATH, OTHER_HEADS, not_compared
from ckpt_tool.families.expected import Expected, composites_of, expected_of, text_of
from ckpt_tool.families.naming import to_hub
from ckpt_tool.layout import LeftOut, left_out
from ckpt_tool.wrappers import renamed

# What a composite's config says for its text model, too.
_SHARED = ("tie_word_embeddings", "dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id")


class Fitted(NamedTuple):
    """A catalogue and the config that describes it. ``left_out`` are tensors that it has none of, with the
    reason, by label."""

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    left_out: tuple[LeftOut, ...]


def fitted(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Fitted:
    """The catalogue and a config that fit each other, with notes on what the config promises in vain.

    Raises:
        MismatchError: the layers stand under a path that no model of this config has.
    """
    expected = expected_of(config)
    try:
        family = family_of(config)
    except UsageError:
        return Fitted(checkpoint, config, ())
    if adapters_name(tensor.name for tensor in checkpoint.tensors):
        return Fitted(checkpoint, config, ())
    published = to_hub(checkpoint, family, config)
    if expected is None or not expected.writes_text or family.untranslated:
        return Fitted(_with_promises(checkpoint, published, config, family, None), config, ())
    root = _root(published, expected)
    if root is None or root in _roots(config, expected):
        return Fitted(_with_promises(checkpoint, published, config, family, expected), config, ())
    text = text_of(config)
    towers = [
        t.name
        for t in published.tensors
        if isinstance(t.name, str) and t.name.startswith(expected.towers or "\0")
    ]
    if text is not None and root == text.root:
        if towers:
            return Fitted(_moved(published, text, expected), config, ())
        return _as_text_model(checkpoint, config, text)
    whole = next((one for one in composites_of(config) if one.root == root), None)
    if whole is not None:
        return _without_towers(published, whole, expected, config)
    raise MismatchError(
        f"The checkpoint has its layers under {root}, and {expected.architecture}, which config.json is "
        f"of, has them under {' or '.join(one.root for one in (expected, text) if one)}: nothing would be "
        "loaded. Save the model's own state dict, without what stands around it, or pass the config.json "
        "of the model that was trained."
    )


def check_described(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Fitted:
    """What of a checkpoint a config describes, proven both ways.

    Raises:
        MismatchError: they are not of one model, or the model is not whole.
        UsageError: the config's family is not known.
    """
    found = fitted(checkpoint, config)
    family = family_of(found.config)
    check_config(to_hub(found.checkpoint, family, found.config), family, found.config)
    return found


def misfit(checkpoint: Checkpoint) -> str | None:
    """Why a published model would not be loaded as it lies there; None where it would."""
    config = checkpoint.model_config
    if config is None:
        return None
    try:
        refuse_adapters(checkpoint)
        found = check_described(checkpoint, config)
    except UsageError:
        return None
    except UnreadableError as error:
        return str(error)
    if found.config is config and found.checkpoint.tensors is checkpoint.tensors:
        return None
    return found.checkpoint.notes[-1] + " `ckpt-tool convert --to hf` makes one of the two."


def _with_promises(
    checkpoint: Checkpoint,
    published: Checkpoint,
    config: Mapping[str, Any],
    family: Family,
    expected: Expected | None,
) -> Checkpoint:
    """The catalogue with notes on what a config promises and the checkpoint does not have, which no class
    needs to load the rest."""
    names = {str(getattr(tensor.name, "layer_path", tensor.name)) for tensor in published.tensors}
    values = {tensor.name: tensor for tensor in published.values()}
    notes = list(not_compared(values, family, config))
    text = text_config(config)
    layers = promised_mtp_layers(text)
    count = stated(text, family.config["layers"])
    numbers = (re.search(r"layers\.(\d+)(?:\.|$)", name) for name in names)
    last = max((int(match[1]) for match in numbers if match), default=-1)
    beyond = count is not None and type(count[1]) is int and last >= count[1]
    if layers and not beyond and not any(MTP_PATH.fullmatch(name) for name in names):
        notes.append(
            f"config.json promises {layers} layers for multi-token prediction, and the checkpoint has "
            "none: transformers does without, and decoding that speculates with them will not work."
        )
    towers = expected.towers if expected is not None else ()
    if expected is not None and towers and not any(name.startswith(towers) for name in names):
        notes.append(
            f"config.json is of {expected.architecture}, and the checkpoint lacks its other parts: "
            f"{', '.join(towers)} would begin with random values. For text alone, pass the text model's "
            "config.json."
        )
    task = _other_task(config)
    if task and not any(name.startswith(OTHER_HEADS) for name in names):
        notes.append(
            f"config.json asks for {task}, and the checkpoint has no head for that task: it would begin "
            "with random values."
        )
    return replace(checkpoint, notes=(*checkpoint.notes, *notes))


def _other_task(config: Mapping[str, Any]) -> str:
    """A class with a head for another task than writing text, if a config asks for one."""
    given = config.get("architectures")
    names = [str(name) for name in given] if isinstance(given, list) else []
    return next((name for name in names if re.search(r"For\w*(?:Classification|Answering)$", name)), "")


def _root(published: Checkpoint, expected: Expected) -> str | None:
    """The path of the list of layers: that of the experts, or of most tensors."""
    names = [tensor.name for tensor in published.tensors]
    paths = [name.layer_path for name in names if isinstance(name, ExpertName)]
    if not paths:
        last = re.escape(expected.root.rpartition(".")[2])
        found = [re.match(rf"((?:\w+\.)*?{last}\.\d+)\.", name) for name in names if isinstance(name, str)]
        paths = [match[1] for match in found if match and not match[1].startswith(expected.towers or "\0")]
    counts: dict[str, int] = {}
    for path in paths:
        if not MTP_PATH.fullmatch(path):
            parent = path.rpartition(".")[0]
            counts[parent] = counts.get(parent, 0) + 1
    return max(counts, key=lambda parent: counts[parent], default=None)


def _roots(config: Mapping[str, Any], expected: Expected) -> set[str]:
    """Where a class that the config names has its layers: the bare model without its own name."""
    given = config.get("architectures")
    bare = isinstance(given, list) and any(str(name).endswith("Model") for name in given)
    return {expected.root} | ({expected.root.removeprefix("model.")} if bare else set())


def _as_text_model(checkpoint: Checkpoint, config: Mapping[str, Any], text: Expected) -> Fitted:
    """A text model with the composite's config: the text model's own is what describes it."""
    own = dict(text_config(config))
    for key in _SHARED:
        if key in config and own.get(key) is None:
            own[key] = config[key]
    own["architectures"] = [text.architecture]
    note = (
        f"config.json is of {config.get('model_type')}, and the checkpoint has its text model alone "
        f"under {text.root}: it is converted as {text.architecture}, with that model's own config.json. "
        "The other parts (vision, audio) are not in the checkpoint."
    )
    return Fitted(replace(checkpoint, notes=(*checkpoint.notes, note)), own, ())


def _without_towers(
    published: Checkpoint, whole: Expected, text: Expected, config: Mapping[str, Any]
) -> Fitted:
    """A composite's text model, under the names it has by itself."""
    why = f"{text.architecture}, which config.json asks for, has no such part"
    towers = [
        tensor
        for tensor in published.tensors
        if isinstance(tensor.name, str) and tensor.name.startswith(whole.towers)
    ]
    names = {tensor.name for tensor in towers}
    found = _moved(published.select(t for t in published.tensors if t.name not in names), whole, text)
    if towers:
        note = (
            f"config.json is of {text.architecture}, and the checkpoint is a composite model: its "
            f"text model is converted, and {len(towers)} tensors of other parts are left out."
        )
        found = replace(found, notes=(*found.notes, note))
    return Fitted(found, config, left_out(towers, why))


def _moved(published: Checkpoint, source: Expected, target: Expected) -> Checkpoint:
    """The text model's names under another path, its head included; a note says so."""
    old, new = f"{source.text_path}.", f"{target.text_path}."
    heads = {source.head: target.head} if source.head and target.head else {}

    def path_of(path: str) -> str:
        return new + path.removeprefix(old) if path.startswith(old) else path

    def name_of(name: str) -> str:
        known = heads.get(name)
        if known is not None:
            return known
        return name if name.startswith((*source.towers, *target.towers, "mtp.")) else path_of(name)

    note = (
        f"The names of {source.architecture} (layers under {source.root}) were changed to those of "
        f"{target.architecture} ({target.root}), which config.json asks for."
    )
    return replace(renamed(published, name_of, path_of), notes=(*published.notes, note))
