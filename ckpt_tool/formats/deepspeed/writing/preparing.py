"""A catalogue under the names that a DeepSpeed run's modules have, with the order of its parameters."""

from __future__ import annotations

from pathlib import Path

from ckpt_tool.canonical import Checkpoint
from ckpt_tool.errors import UsageError
from ckpt_tool.families import family_of
from ckpt_tool.families.agreement import check_config
from ckpt_tool.families.autoep import refuse_composite, to_autoep
from ckpt_tool.families.mtp import has_mtp, without_mtp
from ckpt_tool.families.naming import to_hub
from ckpt_tool.formats.base import Prepared, Request
from ckpt_tool.formats.deepspeed.facts.run_config import read_ds_config
from ckpt_tool.formats.deepspeed.facts.target_options import UniversalOptions, ZeroOptions
from ckpt_tool.formats.deepspeed.writing.module_order import with_module_order
from ckpt_tool.formats.preparing import Described, described, refuse_unreadable_parts, template
from ckpt_tool.wrappers import as_saved


def prepare_universal(request: Request) -> Prepared[UniversalOptions]:
    """The source under a run's names. A Universal checkpoint needs no order of parameters."""
    weights_only = request.values["weights_only"]
    source = _described(request, weights_only=weights_only)
    source = _under_module_names(source, None)
    checkpoint = as_saved(source.checkpoint, source.checkpoint.saved_names)
    options = UniversalOptions(request.dtype, request.values["keep_groups"], weights_only)
    return Prepared(checkpoint, options, source.config, source.left_out)


def prepare_zero(request: Request) -> Prepared[ZeroOptions]:
    """The source under a run's names, in the order of its modules, which a ZeRO file does not state."""
    values = request.values
    like = template(values["like"])
    source = _described(request, weights_only=values["weights_only"])
    given = values["ds_config"]
    run_config = read_ds_config(Path(given), request.to) if given is not None else None
    source = _under_module_names(source, like, trained=True)
    checkpoint = source.checkpoint
    if like is None and not checkpoint.module_names:
        checkpoint = with_module_order(checkpoint, source.config or {}, run_config or {}, values["ep"] or 1)
    saved = checkpoint.saved_names if like is None else like.saved_names
    options = ZeroOptions(
        dtype=request.dtype,
        world=values["world"],
        ep=values["ep"],
        like=None if like is None else as_saved(like, saved),
        ds_config=run_config,
        weights_only=values["weights_only"],
    )
    return Prepared(as_saved(checkpoint, saved), options, source.config, source.left_out)


def _described(request: Request, *, weights_only: bool) -> Described:
    """The source and its config; one of another engine gets other names, so the two must fit."""
    refuse_unreadable_parts(request.checkpoint, states=not weights_only)
    if _is_own(request.checkpoint):
        return Described(request.checkpoint, request.config)
    return described(request.checkpoint, request.config)


def _is_own(checkpoint: Checkpoint) -> bool:
    return checkpoint.format.startswith("deepspeed-")


def _under_module_names(source: Described, like: Checkpoint | None, *, trained: bool = False) -> Described:
    """A source of another engine under the names its parameters have in a DeepSpeed run.

    That is AutoEP's module tree, unless a template shows that the run trains transformers' own.

    Args:
        trained: leave out layers for multi-token prediction, which no run trains, unless the template has
            them.

    Raises:
        UsageError: the source does not say which model it is, and no config was given.
    """
    checkpoint, config, left_out = source
    if _is_own(checkpoint) or (like is not None and like.dialect == checkpoint.dialect):
        return source
    if config is None:
        raise UsageError(
            f"{checkpoint.root} is {checkpoint.format}, whose tensors have other names than a DeepSpeed "
            "run's. Pass --config with the model's config.json, which tells the family."
        )
    family = family_of(config)
    published = to_hub(checkpoint, family, config)
    if trained and not (like is not None and has_mtp(like, family, config)):
        published, gone = without_mtp(published, family, config)
        left_out = (*left_out, *gone)
    check_config(published, family, config)
    refuse_composite(published, config)
    return Described(to_autoep(published, family), config, left_out)
