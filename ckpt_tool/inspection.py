"""What a checkpoint is, as plain data for tables and ``--json``: pure functions of the catalogue."""

from __future__ import annotations

import fnmatch
from dataclasses import replace
from typing import Any

from ckpt_tool.canonical import Box, Checkpoint, ExpertName, Region, Role, Tensor
from ckpt_tool.containers.decoded import real_file
from ckpt_tool.families import is_expert
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
    """One row per tensor and state whose name matches the glob; experts as stacks, or by their number."""
    rows = []
    for tensor in checkpoint.tensors:
        if not _matches(tensor, pattern):
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
            }
        )
    return rows


def _matches(tensor: Tensor, pattern: str) -> bool:
    if fnmatch.fnmatchcase(str(tensor.name), pattern):
        return True
    name = tensor.name
    if not isinstance(name, ExpertName):
        return False
    return any(fnmatch.fnmatchcase(name.expert(e), pattern) for e in range(tensor.shape[0]))


def expert_rows(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """One row per layer and expert: the EP rank that holds it, the global ranks of its EDP group, files.
    The ranks are None and empty where nothing tells the EP size."""
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
        if stack is None:
            continue
        size = stack.numel // stack.shape[0]
        holders_of: dict[int, list[int]] = {}
        for ep_rank, ids in enumerate(layer.holders):
            for expert in dict.fromkeys(ids):
                holders_of.setdefault(expert, []).append(ep_rank)
        by_expert = _by_expert(stack)
        for expert in range(layer.num_experts):
            holders = holders_of.get(expert, [])
            ranks = sorted(rank for ep_rank in holders for rank in ranks_of.get(ep_rank, ()))
            held = stack if by_expert is None else replace(stack, regions=by_expert.get(expert, []))
            found = pieces(held, expert * size, size)
            rows.append(
                {
                    "layer": int(layer.layer_path.rsplit(".", 1)[-1]),
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
            _files(row["files"]),
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
            _files(row["files"]),
        ]
        for row in rows
    ]
    return f"{len(rows)} experts", columns, lines


def _files(files: list[str]) -> str:
    return ", ".join(files[:2]) + (f" and {len(files) - 2} more" if len(files) > 2 else "")
