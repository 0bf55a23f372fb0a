"""What a checkpoint is, as plain data for tables and ``--json``: pure functions of the catalogue."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ckpt_tool.canonical import Box, Checkpoint, ExpertName, Region, Role, Tensor
from ckpt_tool.containers.decoding.virtual import real_file
from ckpt_tool.families import is_expert
from ckpt_tool.formats.deepspeed.facts.names import AUTOEP_OF, expert_parameter
from ckpt_tool.geometry import pieces


def overview(checkpoint: Checkpoint) -> dict[str, Any]:
    """The stable keys of ``inspect --json``. Sizes in bytes; None where the format does not say."""
    topology = checkpoint.topology
    states: dict[str, dict[str, int]] = {}
    dtypes: dict[str, int] = {}
    for tensor in checkpoint.tensors:
        entry = states.setdefault(tensor.state, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += tensor.nbytes
        dtypes[str(tensor.dtype)] = dtypes.get(str(tensor.dtype), 0) + tensor.nbytes
    for _, state in checkpoint.scalars:
        states.setdefault(state, {"tensors": 0, "bytes": 0})["tensors"] += 1
    experts = sorted({layer.num_experts for layer in checkpoint.moe_layers})
    values = checkpoint.values()
    return {
        "format": checkpoint.format,
        "path": checkpoint.root,
        "engine_version": checkpoint.training.engine_version,
        "step": checkpoint.training.step,
        "world_size": topology.world_size,
        "ep_size": topology.ep_size,
        "edp_size": topology.edp_size,
        "zero_stage": topology.zero_stage,
        "parameters": sum(t.numel for t in values if t.role is not Role.BUFFER),
        "trained_parameters": sum(t.numel for t in values if t.role is Role.PARAMETER),
        "bytes": sum(t.nbytes for t in checkpoint.tensors),
        "file_bytes": sum(file.size for file in checkpoint.files),
        "files": len(checkpoint.files),
        "dtypes": dtypes,
        "states": states,
        "moe_layers": len(checkpoint.moe_layers),
        "moe_layer_ids": sorted(int(x.layer_path.rsplit(".", 1)[-1]) for x in checkpoint.moe_layers),
        "experts_per_layer": experts[0] if len(experts) == 1 else (experts or None),
        "names": checkpoint.dialect,
        "parameter_groups": len(checkpoint.training.param_groups),
        "aliases": dict(checkpoint.aliases),
        "client_state": sorted(map(str, checkpoint.training.client_state)),
        "client_state_per_rank": list(map(str, checkpoint.training.per_rank)),
        "notes": [*checkpoint.notes, *_experts_in_sight(checkpoint)],
    }


def _experts_in_sight(checkpoint: Checkpoint) -> list[str]:
    """What to do about experts that no config.json told apart."""
    if checkpoint.moe_layers or checkpoint.model_config is not None:
        return []
    named = next(
        (t.name for t in checkpoint.tensors if isinstance(t.name, str) and is_expert(t.name)), None
    )
    if named is None:
        return []
    return [
        f"{named} is named like experts. The model's config.json tells them apart; pass it with --config."
    ]


def tensor_rows(checkpoint: Checkpoint, pattern: str) -> list[dict[str, Any]]:
    """One row per tensor and state with a name that matches the glob: its own, one expert's of a stack,
    the engine's, or a further name that the checkpoint records."""
    rows = []
    names = _Names(checkpoint)
    matches = re.compile(fnmatch.translate(pattern)).match
    for tensor in checkpoint.tensors:
        if not any(map(matches, names.of(tensor))):
            continue
        files = sorted({real_file(region.file) for region in tensor.regions})
        rows.append(
            {
                "name": str(tensor.name),
                "state": tensor.state,
                "role": tensor.role.value,
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype),
                "bytes": tensor.nbytes,
                "files": files,
                "scheme": tensor.encoding.scheme if tensor.encoding else None,
            }
        )
    return rows


class _Names:
    """Under which names a tensor may be asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._layers = {layer.layer_path: layer for layer in checkpoint.moe_layers}
        self._aliases: dict[str, list[str]] = {}
        for alias, name in checkpoint.aliases.items():
            self._aliases.setdefault(name, []).append(alias)

    def of(self, tensor: Tensor) -> Iterator[str]:
        name = tensor.name
        yield str(name)
        if isinstance(name, str):
            yield from self._aliases.get(name, ())
            return
        if name.layer_path in self._layers and name.projection in AUTOEP_OF:
            yield expert_parameter(name, self._layers)
        for expert in range(tensor.shape[0]):
            yield name.expert(expert)


def no_tensor(checkpoint: Checkpoint, pattern: str) -> str:
    """What to say where no tensor matches: the names that are most like the pattern."""
    names = dict.fromkeys([*(str(tensor.name) for tensor in checkpoint.tensors), *checkpoint.aliases])
    wanted = pattern.replace("*", "")
    near = difflib.get_close_matches(wanted, names, 3, 0.4) or list(names)[:3]
    near = [name for name in names if wanted and wanted in name][:3] or near
    return (
        f"No tensor matches {pattern!r}. Names here are like {', '.join(near)}; a glob matches the whole "
        "name, so write *part* for a part of it."
    )


def expert_rows(checkpoint: Checkpoint, pattern: str = "*:*") -> list[dict[str, Any]]:
    """One row per layer and expert: the EP rank that holds it, the global ranks of its EDP group, files.
    The ranks are None and empty where nothing tells the EP size.

    Args:
        pattern: ``LAYER:EXPERT``, two globs: ``3:*`` are all experts of layer 3.
    """
    of_layer, _, of_expert = pattern.partition(":")
    stacks: dict[str, Tensor] = {}
    for tensor in checkpoint.tensors:
        if isinstance(tensor.name, ExpertName):
            stacks.setdefault(tensor.name.layer_path, tensor)
    rows = []
    known = checkpoint.topology.ep_size is not None
    ranks_of: dict[int, list[int]] = {}
    for rank, ep_rank in enumerate(checkpoint.topology.ep_ranks):
        ranks_of.setdefault(ep_rank, []).append(rank)
    for layer in checkpoint.moe_layers:
        stack = stacks.get(layer.layer_path)
        number = layer.layer_path.rsplit(".", 1)[-1]
        if stack is None or not fnmatch.fnmatchcase(number, of_layer):
            continue
        size = stack.numel // stack.shape[0]
        holders_of: dict[int, list[int]] = {}
        for ep_rank, ids in enumerate(layer.holders):
            for expert in dict.fromkeys(ids):
                holders_of.setdefault(expert, []).append(ep_rank)
        by_expert = _by_expert(stack)
        for expert in range(layer.num_experts):
            if not fnmatch.fnmatchcase(str(expert), of_expert):
                continue
            holders = holders_of.get(expert, [])
            ranks = sorted(rank for ep_rank in holders for rank in ranks_of.get(ep_rank, ()))
            held = stack if by_expert is None else replace(stack, regions=by_expert.get(expert, []))
            found = pieces(held, expert * size, size)
            rows.append(
                {
                    "layer": int(number),
                    "expert": expert,
                    "ep_rank": (holders[0] if len(holders) == 1 else (holders or None)) if known else None,
                    "edp_ranks": ranks,
                    "files": list(dict.fromkeys(real_file(run.file) for run in found)),
                }
            )
    return rows


def _by_expert(stack: Tensor) -> dict[int, list[Region | Box]] | None:
    """The regions that hold each expert of a stack; None where they find that out themselves."""
    if hasattr(stack.regions, "overlapping"):
        return None
    size = max(1, stack.numel // stack.shape[0])
    found: dict[int, list[Region | Box]] = {}
    for region in stack.regions:
        if isinstance(region, Region):
            experts = range(region.start // size, -(-(region.start + region.numel) // size))
        else:
            first, step = region.origin[0], region.steps[0]
            experts = range(first, first + step * region.counts[0], step)
        for expert in experts:
            found.setdefault(expert, []).append(region)
    return found


# ---- the same as text


def overview_lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The overview for people."""
    from ckpt_tool.report import human_bytes

    def shown(value: Any) -> str:
        return "-" if value is None else str(value)

    engine = f" (deepspeed {found['engine_version']})" if found["engine_version"] else ""
    lines = [
        ("format", f"{found['format']}{engine}"),
        ("directory", found["path"]),
        ("step", shown(found["step"])),
    ]
    if found["world_size"] is not None:
        topology = f"world {found['world_size']}, ZeRO stage {shown(found['zero_stage'])}"
        if found["ep_size"] is not None:
            topology += f", EP {found['ep_size']} x EDP {found['edp_size']}"
        lines.append(("topology", topology))
    lines += [
        ("parameters", f"{found['parameters']:,} ({found['trained_parameters']:,} trained)"),
        ("tensor bytes", f"{human_bytes(found['bytes'])} in {found['files']:,} files"),
        ("dtypes", ", ".join(f"{k} {human_bytes(v)}" for k, v in found["dtypes"].items())),
        ("states", ", ".join(f"{k} x {v['tensors']}" for k, v in found["states"].items())),
    ]
    if found["moe_layers"]:
        ids = found["moe_layer_ids"]
        lines.append(
            (
                "MoE layers",
                f"{found['moe_layers']} ({ids[0]} to {ids[-1]}) of {found['experts_per_layer']} experts",
            )
        )
    if found["parameter_groups"]:
        lines.append(("parameter groups", str(found["parameter_groups"])))
    if found["aliases"]:
        first = [f"{a} = {b}" for a, b in list(found["aliases"].items())[:2]]
        more = len(found["aliases"]) - len(first)
        lines.append(("aliases", ", ".join(first) + (f" and {more} more" if more else "")))
    if found["client_state"]:
        lines.append(("client state", ", ".join(found["client_state"])))
    if found["client_state_per_rank"]:
        lines.append(("differs per rank", ", ".join(found["client_state_per_rank"])))
    return lines + [("note", note) for note in found["notes"]]


Table = tuple[str, list[str], list[list[str]]]


def tensor_table(rows: list[dict[str, Any]]) -> Table:
    columns = ["tensor", "state", "shape", "dtype", "bytes", "files"]
    lines = [
        [
            row["name"],
            row["state"] if row["role"] == "parameter" else f"{row['state']} ({row['role']})",
            "x".join(map(str, row["shape"])) or "scalar",
            row["dtype"],
            f"{row['bytes']:,}",
            shown_files(row["files"]),
        ]
        for row in rows
    ]
    return f"{len(rows)} tensors", columns, lines


def expert_table(rows: list[dict[str, Any]]) -> Table:
    columns = ["layer", "expert", "EP rank", "EDP ranks", "files"]
    lines = [
        [
            str(row["layer"]),
            str(row["expert"]),
            "-" if row["ep_rank"] is None else str(row["ep_rank"]),
            ",".join(map(str, row["edp_ranks"])) or "-",
            shown_files(row["files"]),
        ]
        for row in rows
    ]
    return f"{len(rows)} experts", columns, lines


def shown_files(files: list[str]) -> str:
    """Files for people: those that differ in one number are one, ``rank_{0-7}.pt``."""
    found = list(_together(files))
    return ", ".join(found[:2]) + (f" and {len(found) - 2} more" if len(found) > 2 else "")


def _together(files: list[str]) -> Iterator[str]:
    """Runs of files, in their order, whose names differ in the same one number and nothing else."""
    run: list[list[str]] = []  # each name cut into text and numbers, by turns
    place: int | None = None
    for parts in (re.split(r"(\d+)", file) for file in files):
        differs = [i for i, (a, b) in enumerate(zip(run[-1], parts, strict=False)) if a != b] if run else []
        alike = bool(run) and len(parts) == len(run[-1]) and len(differs) == 1 and differs[0] % 2 == 1
        if alike and place in (None, differs[0]):
            place = differs[0]
        else:
            yield from _as_one(run, place)
            run, place = [], None
        run.append(parts)
    yield from _as_one(run, place)


def _as_one(run: list[list[str]], place: int | None) -> Iterator[str]:
    if not run:
        return
    if place is None:
        yield "".join(run[0])
        return
    numbers = ",".join(_ranges([parts[place] for parts in run]))
    yield "".join([*run[0][:place], "{", numbers, "}", *run[0][place + 1 :]])


def _ranges(numbers: list[str]) -> Iterator[str]:
    """``0 1 2 5`` -> ``0-2``, ``5``."""
    ordered = sorted(numbers, key=int)
    first = last = ordered[0]
    for number in [*ordered[1:], None]:
        if number is not None and int(number) == int(last) + 1:
            last = number
            continue
        yield first if first == last else f"{first}-{last}"
        if number is not None:
            first = last = number
