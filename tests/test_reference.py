"""Conversions of random small models, compared bit by bit with references that load everything into memory.

The references are torch, safetensors and a few lines of concatenation; none of them uses ckpt_tool. Sizes
are ragged, ranks may be more than elements, experts lie in any order on EP ranks, and padding is NaN.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as torch_dcp

from ckpt_tool import api
from tests import synthetic
from tests.conftest import DEEPSPEED, raw, some_of
from tests.synthetic import STATES, Layer, Save

# Without shrinking, which would take minutes for conversions.
few = settings(max_examples=10, phases=(Phase.explicit, Phase.generate))
Values = dict[tuple[str, str], torch.Tensor]
CONFIG: dict[str, Any] = json.loads((DEEPSPEED / "mixtral_w4e2" / "config.json").read_text())
WITHOUT_FSYNC = api.Execution(fsync=False)

# ---- references: what a directory holds, all of it in memory


def load(file: Path) -> Any:
    return torch.load(file, weights_only=False)


def universal(directory: Path) -> Values:
    """Whole tensors, a directory for each parameter."""
    (tag,) = directory.glob("global_step*")
    files = [file for file in (tag / "zero").glob("*/*.pt") if file.stem != "step"]
    return {(file.parent.name, file.stem): load(file)["param"] for file in files}


def zero3(directory: Path) -> Values:
    return synthetic.reference(next(directory.glob("global_step*")))


def zero12(directory: Path) -> Values:
    """The ranks' parts of each group one after the other, then cut into parameters; EP ranks alternate, or
    come one after the other where data parallelism is the inner order."""
    (tag,) = directory.glob("global_step*")
    model, found = load(tag / "mp_rank_00_model_states.pt"), dict[tuple[str, str], list[torch.Tensor]]()
    files = [
        tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(model["dp_world_size"])
    ]
    ranks = [load(file)["optimizer_state_dict"] for file in files]
    data_first = model["ds_config"].get("use_data_before_expert_parallelism", False)
    for group, shapes in enumerate(model["param_shapes"]):
        ep = len(ranks) // ranks[0]["partition_count"][group]
        for state in STATES:
            for ep_rank in range(ep):
                own = (
                    ranks[ep_rank * len(ranks) // ep :][: len(ranks) // ep]
                    if data_first
                    else ranks[ep_rank::ep]
                )
                flat = torch.cat([zero12_part(rank, group, state) for rank in own])
                for name, shape in shapes.items():
                    part, flat = flat[: math.prod(shape)], flat[math.prod(shape) :]
                    found.setdefault((name, state), []).append(part.reshape(shape))
    values = {key: torch.cat(parts) if len(parts) > 1 else parts[0] for key, parts in found.items()}
    weights = {**model["module"]}
    for file in sorted(tag.glob("layer_*_expert_*"), key=lambda file: int(file.name.split("_")[3])):
        for name, matrix in load(file).items():
            weights.setdefault(name.rpartition(".")[0], []).append(matrix)
    for name, weight in weights.items():  # what the engine computes with is what it optimises
        whole = torch.stack(weight) if isinstance(weight, list) else weight
        own = name.replace(".gate.gate.", ".router.gate.")
        assert raw(whole) == raw(values[own, "fp32"]), name
    return values


def zero12_part(rank: Mapping[str, Any], group: int, state: str) -> torch.Tensor:
    if state == "fp32":
        return rank["single_partition_of_fp32_groups"][group].detach()
    return rank["base_optimizer_state"]["state"][group][state]


def dcp(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor, as torch itself puts it together."""
    reader = torch_dcp.FileSystemReader(directory)
    entries = reader.read_metadata().state_dict_metadata.items()
    found = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries
        if isinstance(entry, torch_dcp.metadata.TensorStorageMetadata)
    }
    torch_dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def published(directory: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in directory.glob("*.safetensors") for n, t in load_file(file).items()}


def assert_same(found: Mapping[Any, torch.Tensor], wanted: Mapping[Any, torch.Tensor]) -> None:
    def bits(values: Mapping[Any, torch.Tensor]) -> dict[Any, object]:
        return {key: (t.dtype, tuple(t.shape), raw(t)) for key, t in values.items()}

    assert bits(found) == bits(wanted)


# ---- training checkpoints


TARGETS = {"universal": universal, "zero3": zero3, "zero2": zero12, "zero1": zero12}


class Run(NamedTuple):
    """A model of a saved run, with the experts of each layer."""

    full: synthetic.Model
    save: Save
    experts: int

    def values(self) -> Values:
        return {(name, s): t for name, states in self.full.parameters.items() for s, t in states.items()}


sizes = st.integers(1, 5)


@st.composite
def runs(draw: st.DrawFn) -> Run:
    """Mixtral under AutoEP's names, of any sizes, saved by any ranks."""
    chance = random.Random(draw(st.integers(0, 1 << 20)))
    hidden, inner, vocab = draw(sizes), draw(sizes), draw(sizes)
    experts, ep, edp = draw(st.sampled_from([1, 2, 4, 6])), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    layers = [
        Layer(
            n, synthetic.random_placement(experts, ep, chance, replicas=draw(st.booleans())), hidden, inner
        )
        for n in range(draw(st.integers(1, 2)))
    ]
    dense = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in layers:
        at = f"model.layers.{layer.number}"
        dense |= {f"{at}.self_attn.{one}_proj.weight": shape for one, shape in attention(hidden).items()}
        dense |= {f"{at}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
    dense |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    full = synthetic.model(dense, layers, seed=chance.randrange(1 << 20))
    save = Save(world=ep * edp, data_before_expert=draw(st.booleans()), int_step=draw(st.booleans()))
    return Run(full, save, experts)


def attention(hidden: int) -> dict[str, tuple[int, int]]:
    """Two heads of three, and one of keys and values."""
    return {"q": (6, hidden), "k": (3, hidden), "v": (3, hidden), "o": (hidden, 6)}


def config_file(directory: Path, weights: Mapping[str, torch.Tensor], experts: int, inner: int) -> Path:
    vocab, hidden = weights["model.embed_tokens.weight"].shape
    config = CONFIG | {
        "hidden_size": hidden, "intermediate_size": inner, "vocab_size": vocab, "head_dim": 3,
        "num_local_experts": experts, "num_experts_per_tok": 1,
        "num_hidden_layers": sum(name.endswith("q_proj.weight") for name in weights),
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return directory / "config.json"


@pytest.mark.parametrize("to", TARGETS)
@few
@given(runs(), st.data())
def test_a_run_becomes_one_of_another_format_with_every_bit(to: str, run: Run, data: st.DataObject) -> None:
    """And from there one of ZeRO-3 at another topology once more."""
    ep = data.draw(st.sampled_from([n for n in (1, 2, 3, 6) if run.experts % n == 0]))
    world = ep * data.draw(st.integers(1, 3))
    with tempfile.TemporaryDirectory() as directory:
        source, there, again = (Path(directory, name) for name in ("source", "there", "again"))
        synthetic.write(source, run.full, run.save)
        assert_same(zero3(source), run.values())
        options = {} if to == "universal" else {"world": world, "ep": ep}
        api.convert(source, there, to=to, how=WITHOUT_FSYNC, **options)
        assert_same(TARGETS[to](there), run.values())
        api.convert(there, again, to="zero3", world=2 * ep, ep=ep, how=WITHOUT_FSYNC)
        assert_same(zero3(again), run.values())


@few
@given(runs())
def test_a_run_becomes_the_model_that_is_published(run: Run) -> None:
    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory, "source"), Path(directory, "target")
        synthetic.write(source, run.full, run.save)
        masters = {name: states["fp32"] for name, states in run.full.parameters.items()}
        config = config_file(Path(directory), masters, run.experts, run.full.layers[0].inner)
        api.consolidate(source, target, config=config, max_shard_bytes=200, how=WITHOUT_FSYNC)
        assert_same(published(target), as_published(masters))


def as_published(masters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """AutoEP's names and stacks as Mixtral's files have them."""
    found = {}
    for name, tensor in masters.items():
        module, _, last = name.rpartition(".")
        module = module.replace(".mlp.router.gate", ".block_sparse_moe.gate")
        if module.endswith(".mlp.experts"):
            at = module.replace(".mlp.", ".block_sparse_moe.")
            found |= {f"{at}.{expert}.{last}.weight": matrix for expert, matrix in enumerate(tensor)}
        else:
            found[f"{module}.{last}"] = tensor
    return found


# ---- published files and DCP


@st.composite
def models(draw: st.DrawFn) -> tuple[dict[str, torch.Tensor], int, int]:
    """Mixtral's files: tensors by name, the number of experts, their inner size."""
    hidden, inner, vocab, experts = draw(sizes), draw(sizes), draw(sizes), draw(st.integers(1, 5))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for layer in range(draw(st.integers(1, 2))):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{one}_proj.weight": shape for one, shape in attention(hidden).items()}
        shapes |= {f"{at}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        at = f"{at}.block_sparse_moe"
        shapes[f"{at}.gate.weight"] = (experts, hidden)
        for expert in range(experts):
            for weight, shape in (
                ("w1", (inner, hidden)),
                ("w2", (hidden, inner)),
                ("w3", (inner, hidden)),
            ):
                shapes[f"{at}.experts.{expert}.{weight}.weight"] = shape
    seed = draw(st.integers(0, 1 << 20))
    tensors = {
        name: some_of(dtype, math.prod(shape), seed + number).reshape(shape)
        for number, (name, shape) in enumerate(shapes.items())
    }
    return tensors, experts, inner


def in_memory(tensors: Mapping[str, torch.Tensor], experts: int) -> dict[str, torch.Tensor]:
    """The same as transformers 5 has it: one stack of gate and up, one of down."""
    found = {}
    for name, tensor in tensors.items():
        at, _, rest = name.partition(".block_sparse_moe.")
        if not rest.startswith("experts."):
            found[f"{at}.mlp.{rest}" if rest else name] = tensor
            continue
        names = [f"{at}.block_sparse_moe.experts.{expert}" for expert in range(experts)]
        gate, down, up = (
            torch.stack([tensors[f"{one}.{weight}.weight"] for one in names])
            for weight in ("w1", "w2", "w3")
        )
        found[f"{at}.mlp.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        found[f"{at}.mlp.experts.down_proj"] = down
    return found


def save_files(directory: Path, tensors: Mapping[str, torch.Tensor], chance: random.Random) -> None:
    """Dealt out to up to three files in any order."""
    names = chance.sample(list(tensors), len(tensors))
    count = chance.randint(1, min(3, len(names)))
    parts = [names[number::count] for number in range(count)]
    files = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    for file, part in zip(files, parts, strict=True):
        save_file({name: tensors[name] for name in part}, directory / file)
    weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@few
@given(models(), st.integers(1, 6), st.integers(0, 1 << 20), st.sampled_from(["plain", "transformers"]))
def test_published_files_become_a_run_of_fsdp_and_files_again(
    model: tuple[dict[str, torch.Tensor], int, int], world: int, seed: int, style: str
) -> None:
    tensors, experts, inner = model
    with tempfile.TemporaryDirectory() as directory:
        source, there, again = (Path(directory, name) for name in ("source", "there", "again"))
        source.mkdir()
        save_files(source, tensors, random.Random(seed))
        config = config_file(source, tensors, experts, inner)
        api.convert(source, there, to="dcp", style=style, world=world, how=WITHOUT_FSYNC)
        wanted = in_memory(tensors, experts)
        if style == "plain":
            assert_same(dcp(there), {f"model.{name}": tensor for name, tensor in wanted.items()})
        api.convert(there, again, to="hf", config=config, max_shard_bytes=300, how=WITHOUT_FSYNC)
        assert_same(published(again), tensors)


@few
@given(models(), st.integers(0, 1 << 20))
def test_published_files_become_the_form_in_memory(
    model: tuple[dict[str, torch.Tensor], int, int], seed: int
) -> None:
    tensors, experts, inner = model
    with tempfile.TemporaryDirectory() as directory:
        source, there, again = (Path(directory, name) for name in ("source", "there", "again"))
        source.mkdir()
        save_files(source, tensors, random.Random(seed))
        config_file(source, tensors, experts, inner)
        api.convert(source, there, to="hf", hf_layout="fused", how=WITHOUT_FSYNC)
        assert_same(published(there), in_memory(tensors, experts))
        api.convert(there, again, to="hf", hf_layout="hub", how=WITHOUT_FSYNC)
        assert_same(published(again), tensors)
