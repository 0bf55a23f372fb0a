"""DeepSpeed's own traps, as far as files show them: what its loaders take without an error and get wrong
(deepspeed 0.19.8; docs/resume.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ckpt_tool.canonical import STEP, Role
from ckpt_tool.containers.torch_zip import TorchArchive
from ckpt_tool.diagnosis.findings import Case, Finding, Severity, found
from ckpt_tool.formats.deepspeed.reading.universal_source import FORMAT, MODEL_FILES, OPTIMIZER_FILE
from ckpt_tool.storage import Reader

Check = Callable[[Case], Iterable[Finding]]

_OPTIONS = ("lr", "betas", "eps", "weight_decay")


def universal_groups(case: Case) -> Iterator[Finding]:
    """How the loaders of a Universal directory hand out parameter groups.

    ZeRO-3 copies the first group's options over all of the run's (runtime/zero/stage3.py,
    ``load_hp_checkpoint_state_from_checkpoint_dir_stage3``). Stages 1 and 2 pair groups by position and
    leave those beyond the last as they were initialised (runtime/base_optimizer.py,
    ``load_hp_checkpoint_state_from_checkpoint_dir``).
    """
    if case.checkpoint.format != FORMAT or OPTIMIZER_FILE.rpartition("/")[2] not in case.reader.list(
        "zero"
    ):
        return
    root = _root(case.reader, OPTIMIZER_FILE)
    stages12, stage3 = (name in case.reader.list() for name in MODEL_FILES)
    groups = case.checkpoint.training.param_groups
    zero = root.get("optimizer_state_dict")
    options = zero.get("param_groups") if isinstance(zero, dict) else None
    first: Any = options[0] if isinstance(options, list | tuple) and options else None
    if stage3 and isinstance(first, dict):
        yield from found(
            "universal_groups",
            Severity.WARNING,
            "Parameter groups have other options than the first: {}.",
            [
                f"group {number}: {key} {group.options[key]} becomes {first[key]}"
                for number, group in enumerate(groups)
                for key in _OPTIONS
                if key in first and key in group.options and group.options[key] != first[key]
            ],
            "A ZeRO-3 engine that loads this Universal checkpoint gives all its groups the options of "
            "the first, "
            "without an error.",
            "Set the groups' options again after loading; or convert the original with `ckpt-tool "
            "convert --to "
            "universal`, which leaves the run's own in force, or resume with `ckpt-tool reshard`.",
        )
    listed = root.get("param_groups")
    if stages12 and isinstance(listed, list | tuple) and len(listed) < len(groups):
        yield Finding(
            "universal_groups",
            Severity.ERROR,
            f"{OPTIMIZER_FILE} lists {len(listed)} parameter groups, and the checkpoint has {len(groups)}.",
            "An engine of stage 1 or 2 pairs groups by position: the rest is not loaded, and stays as it "
            "was "
            "initialised, without an error.",
            "Convert the original again, with `ckpt-tool convert --to universal`.",
        )


def stale_universal_info(case: Case) -> Iterable[Finding]:
    """``universal_checkpoint_info`` repeats what is said of experts; ds_to_universal reads that copy."""
    if not case.checkpoint.format.startswith("deepspeed-zero"):
        return
    name = next((name for name in MODEL_FILES if name in case.reader.list()), None)
    root = _root(case.reader, name) if name is not None else {}
    info, entries = root.get("universal_checkpoint_info"), root.get("ds_autoep_layers")
    copies = info.get("ds_autoep_layers") if isinstance(info, dict) else None
    if not isinstance(copies, list) or not isinstance(entries, list):
        return
    for entry, copy in zip(entries, copies, strict=False):
        for key in ("num_experts", "ep_size", "num_local_experts"):
            if isinstance(copy, dict) and isinstance(entry, dict) and copy.get(key) != entry.get(key):
                yield Finding(
                    "stale_universal_info",
                    Severity.WARNING,
                    f"{name}: universal_checkpoint_info says {key} {copy.get(key)} of "
                    f"{entry.get('module_path')}, "
                    f"ds_autoep_layers {entry.get(key)}.",
                    "The copy is of another topology. A plain load does not read it; ds_to_universal "
                    "does, and "
                    "may put experts together wrongly.",
                    "Convert with `ckpt-tool convert --to universal`, which goes by what all ranks say.",
                )
                return


def _root(reader: Reader, path: str) -> Mapping[str, Any]:
    root = TorchArchive(reader, path).root
    return root if isinstance(root, dict) else {}


def notes(case: Case) -> Iterator[str]:
    """How this checkpoint has to be loaded: true of every such checkpoint, so no finding."""
    checkpoint = case.checkpoint
    if checkpoint.format in ("deepspeed-zero1", "deepspeed-zero2") and checkpoint.moe_layers:
        yield (
            f"Load it at EP size {checkpoint.topology.ep_size} and world size "
            f"{checkpoint.topology.world_size}: "
            "at another EP size of the same world DeepSpeed may take it without an error and put experts "
            "in "
            "wrong places. `ckpt-tool reshard` writes it for other sizes."
        )
    if checkpoint.format != FORMAT:
        return
    if any(state == STEP for _, state in checkpoint.scalars) and (
        checkpoint.moe_layers or len(checkpoint.training.param_groups) > 1
    ):
        yield (
            "A ZeRO-3 load shares one Adam step among all sub-groups, and torch's Adam counts it once "
            "for each: "
            "give every sub-group a copy of its own after loading, or resume with `ckpt-tool reshard`."
        )
    lost = [str(t.name) for t in checkpoint.tensors if t.role is not Role.PARAMETER]
    if lost:
        yield (
            "DeepSpeed restores neither frozen parameters nor buffers from a Universal checkpoint: "
            f"{lost[0]}"
            + (f" and {len(lost) - 1} more have" if len(lost) > 1 else " has")
            + " to be loaded by other means."
        )


CHECKS: tuple[Check, ...] = (universal_groups, stale_universal_info)
