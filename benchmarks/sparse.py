"""Sparse checkpoints of every format: metadata as the writers make it, tensor bytes are holes of the file.

    python benchmarks/sparse.py SOURCE DIR --to universal|dcp|hf [--world N] [--max-shard-size 4GB]
    python benchmarks/sparse.py DIR --fp8
    python benchmarks/sparse.py DIR --parameters 25000

The first lays SOURCE (a sparse ZeRO-3 checkpoint of sparse_zero3.py) out anew and writes the literal
bytes of the layout; the second is a published Kimi-K2 in FP8 with block scales; the third a Universal
directory of a model with many parameters, four files each. A terabyte takes some megabytes of disk.
CRCs are those of zeros.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib

import ckpt_tool
from ckpt_tool.canonical import Checkpoint, DType, Region, Scalar, SourceFile, Tensor, TrainingState
from ckpt_tool.formats.dcp.writing.target_options import DcpOptions
from ckpt_tool.formats.deepspeed.facts.target_options import UniversalOptions, ZeroOptions
from ckpt_tool.formats.deepspeed.writing.universal import Universal
from ckpt_tool.formats.hf.target_options import HfOptions
from ckpt_tool.formats.known import targets
from ckpt_tool.layout import CrcSlot, Layout, TargetFile
from ckpt_tool.model_files import find_config

Shape = tuple[int, ...]
STATES = ("master", "exp_avg", "exp_avg_sq")
BLOCK = 128  # of FP8 scales
HIDDEN, INNER, DENSE, VOCAB, LAYERS, EXPERTS = 7168, 2048, 18432, 163840, 61, 384


@functools.cache
def zeros_crc(length: int) -> int:
    """The CRC-32 of so many zero bytes."""
    if length <= 4096:
        return isal_zlib.crc32(bytes(length))
    half = length // 2
    return isal_zlib.crc32_combine(zeros_crc(length - half), zeros_crc(half), half)


def write(layout: Layout, directory: Path) -> None:
    """All files of a layout, at their full size, with holes where tensors go."""
    for file in layout.laid_out():
        path = directory / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as out:
            out.truncate(file.size)
            for literal in file.literals:
                out.seek(literal.offset)
                out.write(literal.data)
            for slot in file.crc_slots:
                out.seek(slot.offset)
                out.write(_crc(file, slot).to_bytes(4, "little"))


def _crc(file: TargetFile, slot: CrcSlot) -> int:
    crc = 0
    for part in slot.parts:
        length = len(part) if isinstance(part, bytes) else file.fills[part].nbytes
        crc = isal_zlib.crc32_combine(crc, zeros_crc(length), length)
    return crc


def laid_out(source: Path, to: str, world: int | None, max_shard_bytes: int) -> Layout:
    config, extra = find_config(source, None)
    options = {
        "universal": UniversalOptions(),
        "zero3": ZeroOptions(world=world),
        "zero2": ZeroOptions(world=world),
        "zero1": ZeroOptions(world=world),
        "dcp": DcpOptions(config=config, world=world, style="transformers"),
        "hf": HfOptions(DType.bfloat16, config, max_shard_bytes=max_shard_bytes, extra_files=extra),
    }
    return targets()[to].load().layout(ckpt_tool.open(source), options[to])


def many_parameters(count: int) -> Layout:
    """A Universal directory of ``count`` parameters."""
    shape = (64, 64)
    size = math.prod(shape) * 4
    names = [f"model.layers.{n // 100}.block.{n % 100}.weight" for n in range(count)]
    tensors = tuple(
        Tensor(name, state, shape, DType.float32, (Region(0, math.prod(shape), "f", n * size),))
        for n, name in enumerate(names)
        for state in STATES
    )
    scalars = {(name, "step"): Scalar(10.0, DType.float32) for name in names}
    training = TrainingState(step=10, counters={"global_steps": 10})
    files = (SourceFile("f", count * size, ""),)
    checkpoint = Checkpoint("", "", "transformers", tensors, files, training=training, scalars=scalars)
    return Universal().layout(replace(checkpoint, module_names=tuple(names)), UniversalOptions())


def fp8_tensors() -> Iterator[tuple[str, str, Shape]]:
    """Names, dtypes and shapes of a published Kimi-K2: matrices in FP8 with a scale per block."""
    bf16 = [("model.embed_tokens.weight", (VOCAB, HIDDEN)), ("model.norm.weight", (HIDDEN,)),
            ("lm_head.weight", (VOCAB, HIDDEN))]  # fmt: skip
    fp8: list[tuple[str, Shape]] = []
    for layer in range(LAYERS):
        p = f"model.layers.{layer}"
        attention = {"q_a_proj": (1536, HIDDEN), "q_b_proj": (64 * 192, 1536), "o_proj": (HIDDEN, 64 * 128),
                     "kv_a_proj_with_mqa": (576, HIDDEN), "kv_b_proj": (64 * 256, 512)}  # fmt: skip
        fp8 += [(f"{p}.self_attn.{name}.weight", shape) for name, shape in attention.items()]
        norms = {"self_attn.q_a_layernorm": 1536, "self_attn.kv_a_layernorm": 512,
                 "input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN}  # fmt: skip
        bf16 += [(f"{p}.{name}.weight", (size,)) for name, size in norms.items()]
        blocks = [("mlp", DENSE)] if layer == 0 else [("mlp.shared_experts", INNER)]
        if layer:
            bf16.append((f"{p}.mlp.gate.weight", (EXPERTS, HIDDEN)))
            yield f"{p}.mlp.gate.e_score_correction_bias", "F32", (EXPERTS,)
            blocks += [(f"mlp.experts.{expert}", INNER) for expert in range(EXPERTS)]
        for block, inner in blocks:
            fp8 += [(f"{p}.{block}.{name}_proj.weight", (inner, HIDDEN)) for name in ("gate", "up")]
            fp8.append((f"{p}.{block}.down_proj.weight", (HIDDEN, inner)))
    for name, shape in bf16:
        yield name, "BF16", shape
    for name, shape in fp8:
        yield name, "F8_E4M3", shape
        yield f"{name}_scale_inv", "F32", tuple(-(-size // BLOCK) for size in shape)


def write_fp8(directory: Path, files: int = 1000) -> None:
    """Safetensors files with holes, their index, and the model's config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    sizes = {"F32": 4, "BF16": 2, "F8_E4M3": 1}
    tensors = sorted(fp8_tensors())
    bounds = [len(tensors) * number // files for number in range(files + 1)]
    weight_map: dict[str, str] = {}
    for number in range(files):
        name = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for tensor, dtype, shape in tensors[bounds[number] : bounds[number + 1]]:
            end = at + math.prod(shape) * sizes[dtype]
            header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
            at = end
            weight_map[tensor] = name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (directory / name).open("wb") as out:
            out.write(np.uint64(len(text)).tobytes() + text)
            out.truncate(8 + len(text) + at)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
    )
    (directory / "config.json").write_text(json.dumps(fp8_config()))


def fp8_config() -> dict[str, Any]:
    return {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "dtype": "bfloat16",
        "hidden_size": HIDDEN, "intermediate_size": DENSE, "moe_intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "vocab_size": VOCAB, "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 1,
        "first_k_dense_replace": 1, "moe_layer_freq": 1, "topk_group": 1, "q_lora_rank": 1536,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK],
                                "activation_scheme": "dynamic"},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", type=Path, nargs="+", help="[SOURCE] DIR")
    parser.add_argument("--to", choices=sorted(targets()))
    parser.add_argument("--world", type=int)
    parser.add_argument("--max-shard-bytes", type=int, default=2_100_000_000)
    parser.add_argument("--fp8", action="store_true")
    parser.add_argument("--parameters", type=int)
    given = parser.parse_args()
    target = given.paths[-1]
    if given.fp8:
        write_fp8(target)
    elif given.parameters:
        write(many_parameters(given.parameters), target)
    else:
        write(laid_out(given.paths[0], given.to, given.world, given.max_shard_bytes), target)
    files = [path for path in target.rglob("*") if path.is_file()]
    held = sum(path.stat().st_blocks * 512 for path in files)
    print(f"{target}: {len(files):,} files, {held / 1e9:.2f} GB on disk", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONHASHSEED", "0")
    main()
