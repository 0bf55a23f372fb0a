"""What the page shows, as JSON: the overview, a matrix of experts, tensors, findings. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ckpt_tool import __version__
from ckpt_tool.canonical import MASTER, WEIGHT, Checkpoint, ExpertName, MoELayer, Tensor, TensorName
from ckpt_tool.containers.decoding.virtual import real_file
from ckpt_tool.diagnosis import Diagnosis
from ckpt_tool.diagnosis.shown import as_json
from ckpt_tool.geometry import pieces
from ckpt_tool.inspection import overview, overview_lines, shown_files
from ckpt_tool.statistics import Statistics, Stats

# Flags of an expert, as bits.
COPY, UNTOUCHED, NON_FINITE = 1, 2, 4
_FILES = 40  # files listed by size


def page_data(checkpoint: Checkpoint, diagnosis: Diagnosis | None = None) -> dict[str, Any]:
    """All that is on the page. With a ``diagnosis`` that has statistics, also what values look like."""
    found = overview(checkpoint)
    statistics = diagnosis.statistics if diagnosis is not None else None
    return {
        "version": __version__,
        "title": f"{found['format']}, step {found['step']}"
        if found["step"] is not None
        else found["format"],
        "overview": [[name, value] for name, value in overview_lines(found)],
        "experts": _experts(checkpoint, statistics),
        "bytes": _bytes(checkpoint),
        "tensors": [_tensor(tensor, statistics) for tensor in checkpoint.tensors],
        "stats": statistics is not None,
        "doctor": as_json(diagnosis) if diagnosis is not None else None,
    }


# ---- experts


def _experts(checkpoint: Checkpoint, statistics: Statistics | None) -> dict[str, Any] | None:
    """A row for each MoE layer: by expert its EP rank (-1: several or unknown), norm, update and flags."""
    layers = sorted(checkpoint.moe_layers, key=_number)
    if not layers:
        return None
    ranked = checkpoint.topology.ep_size is not None
    rows: dict[str, Any] = {
        "layers": [_number(layer) for layer in layers],
        "count": max(layer.num_experts for layer in layers),
        "rank": [_ranks(layer, ranked) for layer in layers],
    }
    if statistics is None:
        return rows
    parts = _parts(statistics)
    copies = _copies(layers, parts)
    rows["norm"] = [_norms(layer, parts) for layer in layers]
    rows["update"] = [_updates(layer, statistics) for layer in layers]
    flags = [_flags(layer, statistics, parts, copies) for layer in layers]
    trained = any(not flag & UNTOUCHED for row in flags for flag in row)  # a run has begun
    rows["flags"] = flags if trained else [[flag & ~UNTOUCHED for flag in row] for row in flags]
    rows["copies"] = [
        [[_number(layers[at]), expert] for at, expert in places] for places in copies.values()
    ]
    return rows


def _number(layer: MoELayer) -> int:
    return int(layer.layer_path.rsplit(".", 1)[-1])


def _ranks(layer: MoELayer, ranked: bool) -> list[int]:
    ranks = [-1] * layer.num_experts
    seen: set[int] = set()
    for rank, held in enumerate(layer.holders if ranked else ()):
        for expert in held:
            ranks[expert] = -1 if expert in seen else rank
            seen.add(expert)
    return ranks


# By layer path: for each projection's value (a master where there is one), the numbers of every expert.
_Parts = Mapping[str, list[list[Stats]]]


def _parts(statistics: Statistics) -> _Parts:
    masters = {name for name, state in statistics.tensors if state == MASTER}
    found: dict[str, list[list[Stats]]] = {}
    for (name, state), one in statistics.tensors.items():
        value = state == MASTER or (state == WEIGHT and name not in masters)
        if value and isinstance(name, ExpertName):
            found.setdefault(name.layer_path, []).append(one.parts)
    return found


def _norms(layer: MoELayer, parts: _Parts) -> list[float | None]:
    """The Euclidean norm of all matrices of an expert together."""
    stacks = parts.get(layer.layer_path, [])
    return [
        _short(math.sqrt(sum(stack[expert].squares for stack in stacks))) if stacks else None
        for expert in range(layer.num_experts)
    ]


def _updates(layer: MoELayer, statistics: Statistics) -> list[float | None]:
    """The root mean square of ``exp_avg / sqrt(exp_avg_sq)`` over all matrices of an expert."""
    stacks = [
        updates
        for name, updates in statistics.updates.items()
        if isinstance(name, ExpertName) and name.layer_path == layer.layer_path
    ]
    found: list[float | None] = []
    for expert in range(layer.num_experts):
        mine = [stack[expert] for stack in stacks if expert < len(stack)]
        numel = sum(one.numel for one in mine)
        found.append(_short(math.sqrt(sum(one.squares for one in mine) / numel)) if numel else None)
    return found


def _copies(layers: list[MoELayer], parts: _Parts) -> dict[tuple[bytes, ...], list[tuple[int, int]]]:
    """Experts that are bit for bit equal in every matrix: (row, expert) by their digests."""
    by_digest: dict[tuple[bytes, ...], list[tuple[int, int]]] = {}
    for row, layer in enumerate(layers):
        stacks = parts.get(layer.layer_path, [])
        for expert in range(layer.num_experts if stacks else 0):
            digest = tuple(stack[expert].digest for stack in stacks)
            by_digest.setdefault(digest, []).append((row, expert))
    return {digest: places for digest, places in by_digest.items() if len(places) > 1}


def _flags(
    layer: MoELayer,
    statistics: Statistics,
    parts: _Parts,
    copies: Mapping[tuple[bytes, ...], list[tuple[int, int]]],
) -> list[int]:
    stacks = parts.get(layer.layer_path, [])
    moments = [
        one.parts
        for (name, state), one in statistics.tensors.items()
        if isinstance(name, ExpertName)
        and name.layer_path == layer.layer_path
        and state not in (MASTER, WEIGHT)
    ]
    flags = []
    for expert in range(layer.num_experts):
        flag = 0
        if stacks and tuple(stack[expert].digest for stack in stacks) in copies:
            flag |= COPY
        if moments and all(stack[expert].all_zero for stack in moments):
            flag |= UNTOUCHED
        if any(stack[expert].non_finite for stack in (*stacks, *moments)):
            flag |= NON_FINITE
        flags.append(flag)
    return flags


# ---- bytes and tensors


def _bytes(checkpoint: Checkpoint) -> dict[str, list[list[Any]]]:
    """Bytes by state, by kind of tensor, and of the largest files."""
    states: dict[str, int] = {}
    kinds: dict[str, int] = {}
    for tensor in checkpoint.tensors:
        states[tensor.state] = states.get(tensor.state, 0) + tensor.nbytes
        kind = _kind(tensor)
        kinds[kind] = kinds.get(kind, 0) + tensor.nbytes
    largest = sorted(checkpoint.files, key=lambda file: -file.size)[:_FILES]
    return {
        "state": _descending(states.items()),
        "kind": _descending(kinds.items()),
        "file": [[file.path, file.size] for file in largest],
    }


def _kind(tensor: Tensor) -> str:
    name: TensorName = tensor.name
    if isinstance(name, ExpertName):
        return "routed experts"
    for kind, words in _KINDS:
        if any(word in name for word in words):
            return kind
    return "other"


# By what is in a name, the first that applies.
_KINDS = (
    ("shared experts", ("shared_expert",)),
    ("routers", ("router", ".gate.")),
    ("embeddings", ("embed", "lm_head", "wte")),
    ("norms", ("norm",)),
    ("attention", ("attn", "attention")),
    ("dense MLP", ("mlp", "feed_forward", "ffn")),
)


def _descending(sizes: Iterable[tuple[str, int]]) -> list[list[Any]]:
    return [[name, size] for name, size in sorted(sizes, key=lambda item: (-item[1], item[0]))]


def _tensor(tensor: Tensor, statistics: Statistics | None) -> list[Any]:
    """Name, state, role, shape, dtype, bytes, files; with statistics: norm, largest, mean."""
    row: list[Any] = [
        str(tensor.name), tensor.state, tensor.role.value, list(tensor.shape), str(tensor.dtype),
        tensor.nbytes,
        shown_files(sorted({real_file(piece.file) for piece in pieces(tensor, 0, tensor.numel)})),
    ]  # fmt: skip
    if statistics is not None:
        one = statistics.tensors.get((tensor.name, tensor.state))
        whole = one.whole if one is not None else None
        row += [_short(whole.l2), _short(whole.absmax), _short(whole.mean)] if whole else [None] * 3
    return row


def _short(value: float) -> float | None:
    """Five digits, which is what can be seen; None for what is not finite, which JSON does not have."""
    return float(f"{value:.5g}") if math.isfinite(value) else None
