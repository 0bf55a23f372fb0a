"""Time ckpt-tool on DCP checkpoints against ``cp``, torch's and accelerate's tools; print tables.

    python benchmarks/dcp.py --gb 2 8 --pairs 5 --peers --work DIR

The checkpoint is the model alone of a Qwen3-MoE, fp32, random values, as FSDP2 over 4 ranks has accelerate
save it. torch's own ``FileSystemWriter`` writes it, rank after rank, a chunk in memory at a time.

Every ratio is between two runs side by side: the jobs of a table take turns, all after one warm-up.
Outputs are removed between runs. ``DIR`` should be on the disk of interest and needs twice the largest
size, with ``--peers`` three times that of the peers.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import Job, Place, Summary, Usage, alternate, measure, peak, ratios, remove, size, walls
from run import COPY, ENV, print_table, tool

ROOT = Path(__file__).resolve().parents[1]
MODEL = "pytorch_model_fsdp_0"  # accelerate's directory of the model
# The peers hold the whole checkpoint: measured where it takes seconds, and fits.
PEERS_UP_TO = 2.0
CONSOLIDATED_FILES = 4
FP32 = 4  # bytes

# What torch has no command line for. Several files and threads are its fastest way.
HF_CONSOLIDATION = """
import os, sys
from pathlib import Path
from safetensors import safe_open
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files
source, target, files = sys.argv[1], sys.argv[2], int(sys.argv[3])
names = set()
for path in Path(source).glob("*.safetensors"):
    with safe_open(path, "pt") as file:
        names.update(file.keys())
index = {name: number % files + 1 for number, name in enumerate(sorted(names))}
os.mkdir(target)
consolidate_safetensors_files(source, target, index, num_threads=min(files, os.cpu_count()))
"""


# ---- the checkpoint


@dataclass(frozen=True)
class Model:
    """A Qwen3-MoE; tensors are about as large as those of the 30B-A3B, there are fewer of them."""

    layers: int
    vocab: int
    hidden: int = 2048
    intermediate: int = 768
    experts: int = 8
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128

    @staticmethod
    def of_size(nbytes: float) -> Model:
        """About that many bytes: as many layers as fit, the rest is vocabulary."""
        one, few = Model(1, 0), 1024
        layer = one.nbytes - Model(0, 0).nbytes
        row = 2 * one.hidden * FP32
        layers = max(1, int((nbytes - few * row) // layer))
        return Model(layers, max(few, int((nbytes - layers * layer) // row)))

    @property
    def nbytes(self) -> int:
        return FP32 * sum(math.prod(shape) for shape in self.shapes().values())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all parameters, as transformers names them."""
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            found |= {f"model.layers.{layer}.{name}": shape for name, shape in self._layer().items()}
        found["model.norm.weight"] = (self.hidden,)
        found["lm_head.weight"] = (self.vocab, self.hidden)
        return found

    def _layer(self) -> dict[str, tuple[int, ...]]:
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj.weight": (wide, self.hidden),
            "self_attn.k_proj.weight": (narrow, self.hidden),
            "self_attn.v_proj.weight": (narrow, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, wide),
            "self_attn.q_norm.weight": (self.head_dim,),
            "self_attn.k_norm.weight": (self.head_dim,),
            "mlp.gate.weight": (self.experts, self.hidden),
            "mlp.experts.gate_up_proj": (self.experts, 2 * self.intermediate, self.hidden),
            "mlp.experts.down_proj": (self.experts, self.hidden, self.intermediate),
            "input_layernorm.weight": (self.hidden,),
            "post_attention_layernorm.weight": (self.hidden,),
        }

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "hidden_size": self.hidden,
            "intermediate_size": 3 * self.hidden,
            "moe_intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "num_experts": self.experts,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "vocab_size": self.vocab,
            "tie_word_embeddings": False,
        }


def make(directory: Path, nbytes: float, world: int) -> None:
    """Write a checkpoint; config.json comes last."""
    import torch
    from torch.distributed.checkpoint import metadata as md
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
    from torch.distributed.checkpoint.storage import WriteResult

    # run.py gives this to its children; here the module itself is wanted
    sys.path.insert(0, str(ROOT))
    from ckpt_tool.formats.dcp.grammar.grid import dense_grid

    class Planner(DefaultSavePlanner):
        """Makes the values of a chunk when the writer wants to write it."""

        def __init__(self, seed: int) -> None:
            super().__init__()
            self._random = torch.Generator().manual_seed(seed)

        def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
            assert write_item.tensor_data is not None
            chunk = torch.empty(write_item.tensor_data.chunk.sizes)
            return chunk.normal_(0.0, 0.02, generator=self._random)

    model = Model.of_size(nbytes)
    properties = md.TensorProperties(dtype=torch.float32)
    tensors: dict[str, md.STORAGE_TYPES] = {}
    plans: list[list[WriteItem]] = [[] for _ in range(world)]
    for name, shape in model.shapes().items():
        key, whole = f"model.{name}", torch.Size(shape)
        chunks: list[md.ChunkStorageMetadata] = []
        for part in dense_grid(shape, world):
            if 0 not in part.sizes:
                chunk = md.ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.sizes))
                index = md.MetadataIndex(key, chunk.offsets, len(chunks))
                data = TensorWriteData(chunk=chunk, properties=properties, size=whole)
                plans[part.rank].append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
                chunks.append(chunk)
        tensors[key] = md.TensorStorageMetadata(properties, whole, chunks)

    writer = FileSystemWriter(directory / MODEL, sync_files=False)
    writer.set_up_storage_writer(True)
    local = [writer.prepare_local_plan(SavePlan(items)) for items in plans]
    written: list[list[WriteResult]] = []
    for rank, plan in enumerate(writer.prepare_global_plan(local)):
        written.append(writer.write_data(plan, Planner(rank)).wait())
    paths: dict[str, tuple[str | int, ...]] = {
        key: ("model", key.removeprefix("model.")) for key in tensors
    }
    writer.finish(md.Metadata(tensors, planner_data=paths), written)
    (directory / "config.json").write_text(json.dumps(model.config(), indent=2))


# ---- paths and jobs


class DcpPlace(Place):
    """A DCP checkpoint and its values in another form."""

    @property
    def shards(self) -> Path:
        """The same values as sharded safetensors, each with its offset: what torch consolidates."""
        return self.home / "shards"

    def make(self, world: int) -> None:
        if not (self.source / "config.json").is_file():  # written last
            remove([self.source])
            self.source.mkdir(parents=True)
            sizes = ["--gb", f"{self.gb:g}", "--world", str(world)]
            measure([sys.executable, str(Path(__file__).resolve()), "--make", str(self.source), *sizes])

    def make_shards(self) -> None:
        if not (self.shards / "config.json").is_file():
            remove([self.shards])
            options = ["--to", "dcp", "--style", "transformers", "--no-fsync"]
            measure(tool("convert", str(self.source), str(self.shards), *options), env=ENV)
            # consolidation needs the family
            (self.shards / "config.json").write_bytes((self.source / "config.json").read_bytes())


@dataclass(frozen=True)
class Timed:
    """A job in a table: with which job's time its own is compared, and whether the tool is not ours."""

    job: Job
    base: str = "cp"
    peer: bool = False


def ours(name: str, place: DcpPlace, verb: str, source: Path, *options: str) -> Job:
    out = place.out(name.replace(" ", "-"))
    return Job(name, tool(verb, str(source), str(out), "--no-fsync", *options), [out])


def jobs(place: DcpPlace, max_memory: str, target_world: int) -> list[Timed]:
    limit = ["--max-memory", max_memory]
    copy = place.out("cp")
    return [
        Timed(Job("cp", [*COPY, str(place.source), str(copy)], [copy])),
        Timed(ours("consolidate", place, "consolidate", place.source, *limit)),
        Timed(ours("reshard", place, "reshard", place.source, "--world", str(target_world), *limit)),
    ]


def peers(place: DcpPlace, max_memory: str) -> Iterator[Timed]:
    """torch's and accelerate's tools; our job on the shards is there to be compared with."""
    model, python = str(place.source / MODEL), sys.executable
    out = place.out("dcp_to_torch")
    command = [python, "-m", "torch.distributed.checkpoint.format_utils", "dcp_to_torch", model, str(out)]
    yield Timed(Job("dcp_to_torch", command, [out]), "consolidate", peer=True)
    if importlib.util.find_spec("accelerate"):
        out = place.out("merge-weights")
        command = [python, "-m", "accelerate.commands.accelerate_cli", "merge-weights", model, str(out)]
        yield Timed(Job("accelerate merge-weights", command, [out]), "consolidate", peer=True)
    else:
        print("accelerate is not installed: left out", file=sys.stderr)
    yield Timed(
        ours("consolidate of shards", place, "consolidate", place.shards, "--max-memory", max_memory)
    )
    out = place.out("consolidated")
    command = [python, "-c", HF_CONSOLIDATION, str(place.shards), str(out), str(CONSOLIDATED_FILES)]
    name = "consolidate_safetensors_files"
    yield Timed(Job(name, command, [out]), "consolidate of shards", peer=True)


# ---- tables


def table(place: DcpPlace, timed: Sequence[Timed], pairs: int) -> Iterable[list[str]]:
    """Times and peaks of one size, row by row, with its head."""
    yield ["job", "GB", "wall, s", "wall / cp", "its wall / ours", "CPU, s", "peak RSS, MiB"]
    found = alternate([one.job for one in timed], pairs, env=ENV)
    for one in timed:
        usages = found[one.job.name]
        yield [
            one.job.name,
            f"{size(place.source):.2f}",
            walls(usages).text(),
            "" if one.job.name == "cp" else compared(usages, found["cp"]),
            compared(usages, found[one.base]) if one.peer else "",
            f"{Summary.of([usage.cpu for usage in usages]).median:.2f}",
            f"{peak(usages):.0f}",
        ]


def compared(usages: Sequence[Usage], base: Sequence[Usage]) -> str:
    return f"**{ratios(usages, base).text()}**"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, nargs="+", default=[2.0], help="sizes, in GB (1e9 bytes)")
    parser.add_argument("--pairs", type=int, default=5, help="timed runs of every job")
    parser.add_argument(
        "--peers", action="store_true", help=f"the other tools, too, up to {PEERS_UP_TO:g} GB"
    )
    parser.add_argument("--world", type=int, default=4, help="ranks that saved the checkpoint")
    parser.add_argument("--target-world", type=int, default=3, help="ranks to re-shard for")
    parser.add_argument("--max-memory", default="1GiB", help="ckpt-tool's budget")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints for another run")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--work", type=Path, help="where checkpoints are made and removed")
    where.add_argument("--make", type=Path, metavar="DIR", help="make a checkpoint there; that is all")
    arguments = parser.parse_args()
    if arguments.make is not None:
        make(arguments.make, arguments.gb[0] * 1e9, arguments.world)
        return

    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, ", end="")
    print(f"{arguments.pairs} pairs, {arguments.max_memory} for ckpt-tool\n")
    for gb in arguments.gb:
        place = DcpPlace(arguments.work.resolve(), gb, "dcp-")
        place.make(arguments.world)
        timed = jobs(place, arguments.max_memory, arguments.target_world)
        if arguments.peers and gb <= PEERS_UP_TO:
            place.make_shards()
            timed += peers(place, arguments.max_memory)
        print_table(table(place, timed, arguments.pairs))
        print(flush=True)
        if not arguments.keep:
            remove([place.home])


if __name__ == "__main__":
    main()
