"""Time ckpt-tool on published models against `cp` of the larger side: casts, quantised forms, transposed
and interleaved experts, and ZeRO-3 both ways.

    python benchmarks/hub.py --gb 2 8 --pairs 5 --work DIR

A size is that of the larger side. README.md says what is measured. DIR is left empty; it needs about four
times the largest size. The ZeRO-3 jobs need `transformers`, once, for the order of parameters.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measure import Job, Place, alternate, measure, peak, ratios, remove, size, walls
from run import COPY, ENV, print_table, tool

H, INNER, E, VOCAB = 2048, 768, 16, 4096
HEADS = 16
BLOCK = 128  # of an FP8 model's scales
_CHUNK = 1 << 26
_SHARD_BYTES = 5e9

Shape = tuple[int, ...]
Tensors = dict[str, tuple[str, Shape]]  # name: (dtype as safetensors calls it, shape)
ITEMSIZE = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1}


# ---- models


@dataclass(frozen=True)
class Model:
    """A family as it is published: one layer's expert tensors below ``layers``, and its config."""

    layers: str
    experts: Callable[[str], Tensors]
    config: Mapping[str, Any]
    text_config: bool = False
    norms: tuple[str, ...] = ()

    def tensors(self, count: int) -> Tensors:
        found: Tensors = {f"{self.layers.removesuffix('layers')}embed_tokens.weight": ("BF16", (VOCAB, H))}
        for number in range(count):
            layer = f"{self.layers}.{number}"
            found[f"{layer}.input_layernorm.weight"] = ("BF16", (H,))
            found[f"{layer}.post_attention_layernorm.weight"] = ("BF16", (H,))
            for name in ("q", "k", "v", "o"):
                found[f"{layer}.self_attn.{name}_proj.weight"] = ("BF16", (H, H))
            found |= {f"{layer}.self_attn.{name}.weight": ("BF16", (H // HEADS,)) for name in self.norms}
            found |= self.experts(layer)
        found[f"{self.layers.removesuffix('layers')}norm.weight"] = ("BF16", (H,))
        found["lm_head.weight"] = ("BF16", (VOCAB, H))
        return found

    def config_of(self, count: int) -> dict[str, Any]:
        sizes = {
            "hidden_size": H, "moe_intermediate_size": INNER, "vocab_size": VOCAB,
            "num_hidden_layers": count, "head_dim": H // HEADS,
            "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
            "num_experts_per_tok": 2, "tie_word_embeddings": False,
        }  # fmt: skip
        if self.text_config:
            return {**self.config, "text_config": {**self.config["text_config"], **sizes}}
        return {**self.config, **sizes}


def _per_expert(layer: str) -> Tensors:
    return _router(layer) | {
        f"{layer}.mlp.experts.{expert}.{name}_proj.weight": ("BF16", shape)
        for expert in range(E)
        for name, shape in (("gate", (INNER, H)), ("up", (INNER, H)), ("down", (H, INNER)))
    }


def _fp8(layer: str) -> Tensors:
    found = _router(layer)
    for name, (_, shape) in _per_expert(layer).items():
        if ".experts." in name:
            found[name] = ("F8_E4M3", shape)
            found[f"{name}_scale_inv"] = ("F32", tuple(-(-side // BLOCK) for side in shape))
    return found


def _transposed(layer: str) -> Tensors:
    return _router(layer) | {
        f"{layer}.mlp.experts.gate_up_proj": ("BF16", (E, H, 2 * INNER)),
        f"{layer}.mlp.experts.down_proj": ("BF16", (E, INNER, H)),
    }


def _interleaved(layer: str) -> Tensors:
    return _router(layer) | {
        f"{layer}.mlp.experts.w13_weight": ("BF16", (E, 2 * INNER, H)),
        f"{layer}.mlp.experts.w2_weight": ("BF16", (E, H, INNER)),
    }


def _mxfp4(layer: str) -> Tensors:
    at = f"{layer}.mlp.experts"
    return {
        f"{layer}.mlp.router.weight": ("BF16", (E, H)),
        f"{at}.gate_up_proj_blocks": ("U8", (E, 2 * INNER, H // 32, 16)),
        f"{at}.gate_up_proj_scales": ("U8", (E, 2 * INNER, H // 32)),
        f"{at}.gate_up_proj_bias": ("BF16", (E, 2 * INNER)),
        f"{at}.down_proj_blocks": ("U8", (E, H, INNER // 32, 16)),
        f"{at}.down_proj_scales": ("U8", (E, H, INNER // 32)),
        f"{at}.down_proj_bias": ("BF16", (E, H)),
    }


def _router(layer: str) -> Tensors:
    return {f"{layer}.mlp.gate.weight": ("BF16", (E, H))}


_QWEN3 = {"num_experts": E, "decoder_sparse_step": 1, "mlp_only_layers": []}
MODELS = {
    "qwen3_moe": Model(
        "model.layers",
        _per_expert,
        {"model_type": "qwen3_moe", **_QWEN3},
        norms=("q_norm", "k_norm"),
    ),
    "qwen3_vl_moe": Model(
        "model.language_model.layers",
        _transposed,
        {"model_type": "qwen3_vl_moe", "text_config": {"model_type": "qwen3_vl_moe_text", **_QWEN3}},
        text_config=True,
    ),
    "inkling": Model(
        "model.layers",
        _interleaved,
        {"model_type": "inkling", "n_routed_experts": E, "n_shared_experts": 0},
    ),
    "deepseek_v3": Model(
        "model.layers",
        _fp8,
        {
            "model_type": "deepseek_v3",
            "n_routed_experts": E,
            "first_k_dense_replace": 0,
            "quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]},
        },
    ),
    "gpt_oss": Model(
        "model.layers",
        _mxfp4,
        {
            "model_type": "gpt_oss",
            "num_local_experts": E,
            "intermediate_size": INNER,
            "quantization_config": {"quant_method": "mxfp4"},
        },
    ),
}


def values(tensors: Tensors) -> int:
    """How many numbers a model has, decoded."""
    numel = 0
    for name, (dtype, shape) in tensors.items():
        if not name.endswith(("_scales", "_scale_inv")):
            numel += math.prod(shape) * (2 if dtype == "U8" else 1)
    return numel


def write(directory: Path, model: Model, count: int) -> None:
    """The model with random values in shards, as published; the index comes last."""
    random = np.random.default_rng(count)
    shards: list[Tensors] = [{}]
    for name, (dtype, shape) in model.tensors(count).items():
        held = sum(_nbytes(*entry) for entry in shards[-1].values())
        if held and held + _nbytes(dtype, shape) > _SHARD_BYTES:
            shards.append({})
        shards[-1][name] = (dtype, shape)
    directory.mkdir(parents=True)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        with (directory / file).open("wb") as out:
            out.write(_header(shard))
            for dtype, shape in shard.values():
                for data in _random(random, dtype, math.prod(shape)):
                    out.write(data)
    (directory / "config.json").write_text(json.dumps(model.config_of(count)))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _nbytes(dtype: str, shape: Shape) -> int:
    return math.prod(shape) * ITEMSIZE[dtype]


def _header(shard: Tensors) -> bytes:
    header, offset = {}, 0
    for name, (dtype, shape) in shard.items():
        end = offset + _nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _random(random: np.random.Generator, dtype: str, numel: int) -> Iterator[bytes]:
    """Finite numbers of all signs and many magnitudes."""
    step = _CHUNK // ITEMSIZE[dtype]
    for start in range(0, numel, step):
        count = min(step, numel - start)
        if dtype == "F32":
            yield random.uniform(0.5, 2.0, count).astype(np.float32).tobytes()
        elif dtype == "BF16":
            bits = random.integers(0, 1 << 16, count, dtype=np.uint16)
            yield (bits & 0xBFFF).tobytes()  # below 2: neither infinite nor NaN
        elif dtype == "F8_E4M3":
            yield random.integers(0, 127, count, dtype=np.uint8).tobytes()
        else:
            yield random.integers(100, 140, count, dtype=np.uint8).tobytes()


# ---- jobs


@dataclass(frozen=True)
class Work:
    """A conversion of a published model, or back: its command and which side is the larger."""

    name: str
    model: str
    itemsize: int  # bytes per value on the larger side
    verb: tuple[str, ...]
    zero3_source: bool = False
    zero3_target: bool = False
    copies_target: bool = True  # the larger side is the result


WORK = (
    Work("bf16 to fp32", "qwen3_moe", 4, ("consolidate",)),
    Work("bf16 to ZeRO-3", "qwen3_moe", 4, ("convert", "--to", "zero3"), zero3_target=True),
    Work(
        "ZeRO-3 to bf16", "qwen3_moe", 4, ("consolidate", "--dtype", "bf16"),
        zero3_source=True, copies_target=False,
    ),
    Work(
        "transposed to fused", "qwen3_vl_moe", 2, ("consolidate", "--dtype", "keep", "--hf-layout", "fused")
    ),
    Work("transposed to fused fp32", "qwen3_vl_moe", 4, ("consolidate", "--hf-layout", "fused")),
    Work("interleaved to fused", "inkling", 2, ("consolidate", "--dtype", "keep", "--hf-layout", "fused")),
    Work("FP8 to bf16", "deepseek_v3", 2, ("consolidate", "--dtype", "bf16")),
    Work("MXFP4 to bf16", "gpt_oss", 2, ("consolidate", "--dtype", "bf16")),
)  # fmt: skip


def layers_for(work: Work, nbytes: float) -> int:
    """As many layers as bring the larger side near ``nbytes``."""
    model = MODELS[work.model]
    none, one = (values(model.tensors(count)) * work.itemsize for count in (0, 1))
    return max(1, round((nbytes - none) / (one - none)))


def prepare(work: Work, place: Place) -> Path:
    """Make the job's source; returns it."""
    hub = place.home / "hub"
    write(hub, MODELS[work.model], layers_for(work, place.gb * 1e9))
    if not (work.zero3_source or work.zero3_target):
        return hub
    # whose order of parameters is taken over; without this every run would import transformers
    template = place.home / "template"
    options = ["--to", "zero3", "--ep", "2", "--world", "4", "--no-fsync"]
    measure(tool("convert", str(hub), str(template), *options), env=ENV)
    return template if work.zero3_source else hub


def command(work: Work, place: Place, source: Path, out: Path) -> list[str]:
    options = ["--no-fsync"]
    if work.zero3_target:
        options += ["--like", str(place.home / "template")]
    if work.zero3_source:
        options += ["--config", str(place.home / "hub")]
    return tool(work.verb[0], str(source), str(out), *work.verb[1:], *options)


def rows(place: Place, chosen: Iterable[Work], pairs: int) -> Iterator[list[str]]:
    """The table of one size, row by row, with its head."""
    yield [
        "job", "read, GB", "written, GB", "ckpt-tool, s", "cp of the larger, s", "ckpt-tool / cp",
        "CPU, s", "peak RSS, MiB",
    ]  # fmt: skip
    for work in chosen:
        remove([place.home])
        source = prepare(work, place)
        result, ours, copy = (place.out(name) for name in ("result", "tool", "cp"))
        measure(command(work, place, source, result), env=ENV)
        read = size(source)
        larger = result if work.copies_target else source
        jobs = [
            Job("tool", command(work, place, source, ours), [ours]),
            Job("cp", [*COPY, str(larger), str(copy)], [copy]),
        ]
        found = alternate(jobs, pairs, env=ENV)
        yield [
            work.name,
            f"{read:.2f}",
            f"{size(result):.2f}",
            walls(found["tool"]).text(),
            walls(found["cp"]).text(),
            f"**{ratios(found['tool'], found['cp']).text()}**",
            f"{sum(usage.cpu for usage in found['tool']) / pairs:.2f}",
            f"{peak(found['tool']):.0f}",
        ]
    remove([place.home])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, nargs="+", default=[2.0], help="sizes, in GB (1e9 bytes)")
    parser.add_argument("--pairs", type=int, default=5, help="timed runs of every job")
    parser.add_argument("--jobs", nargs="+", choices=[work.name for work in WORK], help="by default all")
    parser.add_argument("--work", type=Path, required=True, help="where models are made and removed")
    arguments = parser.parse_args()
    chosen = [work for work in WORK if not arguments.jobs or work.name in arguments.jobs]
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, {arguments.pairs} pairs\n")
    for gb in arguments.gb:
        print_table(rows(Place(arguments.work.resolve(), gb, "hub-"), chosen, arguments.pairs))
        print(flush=True)


if __name__ == "__main__":
    main()
