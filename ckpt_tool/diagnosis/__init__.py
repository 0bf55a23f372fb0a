"""What is wrong with a checkpoint, before a week of training finds out.

``examine`` goes through all values once and asks every check of the tables. A check is a function of a
``Case`` that yields findings: to add one, write it and put it into the table of its module.

* ``values``: from the statistics of all tensors and experts;
* ``catalogue``: from metadata; ``deepspeed``: the engine's own traps;
* ``survey``: of files that do not make up a checkpoint: what is missing, cut short, or of another save.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt_tool.canonical import Checkpoint
from ckpt_tool.diagnosis import catalogue, deepspeed, values
from ckpt_tool.diagnosis.catalogue import unusable_config as unusable_config
from ckpt_tool.diagnosis.findings import Case as Case
from ckpt_tool.diagnosis.findings import Diagnosis as Diagnosis
from ckpt_tool.diagnosis.findings import Finding as Finding
from ckpt_tool.diagnosis.findings import Severity as Severity
from ckpt_tool.diagnosis.survey import survey
from ckpt_tool.diagnosis.survey import tag_file as tag_file
from ckpt_tool.errors import CkptToolError, CoverageError, ExecutionError, MismatchError, UsageError
from ckpt_tool.execute.budget import Budget
from ckpt_tool.execute.meter import Meter
from ckpt_tool.families import family_of
from ckpt_tool.geometry import check_disjoint, pieces
from ckpt_tool.statistics import measure
from ckpt_tool.storage import Reader
from ckpt_tool.values import check_replicas

# What a reader found that is wrong with the checkpoint, and no limit of the reader.
_KINDS: dict[type[CkptToolError], str] = {CoverageError: "coverage", MismatchError: "contradiction"}
CHECKS = (*catalogue.CHECKS, *deepspeed.CHECKS, *values.CHECKS)


def examine(
    checkpoint: Checkpoint,
    reader: Reader,
    config: Mapping[str, Any] | None,
    budget: Budget,
    meter: Meter,
    *,
    sums: bool = False,
) -> Diagnosis:
    """Every check of a checkpoint that could be read.

    Args:
        sums: the statistics are to have means and norms, which no check needs.

    Raises:
        ExecutionError: storage failed, or the checkpoint changed meanwhile.
    """
    findings = [*_coverage(checkpoint), *_copies(checkpoint, reader, budget)]
    broken = {subject for finding in findings for subject in finding.subjects}
    sound = [tensor for tensor in checkpoint.tensors if tensor.label() not in broken]
    case = Case(checkpoint, reader, config, measure(sound, reader, budget, meter, sums=sums))
    changed = reader.changed()
    if changed is not None:
        raise ExecutionError(
            f"{reader.root}/{changed} changed while it was read. Run the command again once nothing writes "
            "to the checkpoint."
        )
    findings += [finding for check in CHECKS for finding in check(case)]
    return Diagnosis(
        checkpoint.root,
        checkpoint.format,
        checkpoint.training.step,
        len(sound),
        sum(tensor.nbytes for tensor in sound),
        tuple(findings),
        (*checkpoint.notes, *deepspeed.notes(case), *_not_checked(case)),
        case.statistics,
    ).with_findings(())


def examine_files(path: Path, error: CkptToolError) -> Diagnosis:
    """What is wrong with files that could not be read as a checkpoint, as ``error`` says.

    Raises:
        CkptToolError: ``error``, where nothing more is found and it does not itself say that files
            contradict each other; or where it is of the user's rights and not of the files.
    """
    if isinstance(error.__cause__, PermissionError):
        raise error
    findings = survey(path)
    kind = _KINDS.get(type(error))
    if findings or kind is not None:
        if not any(str(error) in finding.message for finding in findings):
            findings.append(
                Finding(
                    kind or "unreadable",
                    Severity.ERROR,
                    str(error),
                    "The checkpoint cannot be loaded as a whole. Values were not examined.",
                    "Put right what is found above, and run the command again.",
                )
            )
        return Diagnosis(str(path), None, None, 0, 0, tuple(findings), ()).with_findings(())
    raise error


def _coverage(checkpoint: Checkpoint) -> list[Finding]:
    findings = []
    for tensor in checkpoint.tensors:
        try:
            check_disjoint(tensor)
            pieces(tensor, 0, tensor.numel)
        except CkptToolError as error:
            findings.append(
                Finding(
                    "coverage",
                    Severity.ERROR,
                    str(error),
                    "Loaders do not check this: what no file holds stays as it was initialised.",
                    "Copy the files of all ranks from where the checkpoint was saved.",
                    (tensor.label(),),
                )
            )
    return findings


def _copies(checkpoint: Checkpoint, reader: Reader, budget: Budget) -> list[Finding]:
    try:
        check_replicas(checkpoint, reader, budget)
    except MismatchError as error:
        return [
            Finding(
                "replicas_differ",
                Severity.ERROR,
                str(error),
                "Ranks that are to hold the same values have drifted apart; which of them is loaded "
                "depends on "
                "the loader.",
                "Go back to a checkpoint in which they agree, and see why their gradients were not reduced "
                "over these ranks.",
            )
        ]
    return []


def _not_checked(case: Case) -> list[str]:
    notes = []
    if case.checkpoint.unresolved:
        notes.append(f"Optimizer state was not examined: {case.checkpoint.unresolved}")
    if case.config is None and case.checkpoint.moe_layers:
        notes.append(
            "There is no config.json to compare with (--config): whether all experts of the model are "
            "there is "
            "known from the checkpoint alone."
        )
    if case.config is not None:
        try:
            family_of(case.config)
        except UsageError as error:
            notes.append(f"Not compared with config.json: {error}")
    if not case.checkpoint.moe_layers and case.config is None:
        notes.append(
            "No routed experts are recognised. If the model has some, pass its config.json with --config, "
            "which tells their names."
        )
    return notes
