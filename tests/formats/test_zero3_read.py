"""Reading ZeRO-3 checkpoints: every element is where the catalogue says, whatever the topology."""

from __future__ import annotations

import itertools
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from ckpt_tool import api
from ckpt_tool.canonical import Checkpoint, ExpertName, Role, Tensor
from ckpt_tool.formats.deepspeed.facts.partition import consecutive, partition_size
from ckpt_tool.formats.deepspeed.reading.zero3 import Zero3
from ckpt_tool.storage import LocalReader
from tests import synthetic
from tests.conftest import (
    DEEPSPEED,
    ZERO3,
    canonical_key,
    checkpoint_of,
    copy_fixture,
    materialise,
    raw,
    values_of,
)
from tests.synthetic import Layer, Save, uniform

STATE = {"fp32": "master", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


def read(directory: Path) -> Checkpoint:
    return api.catalogue(directory)


def saved(tmp_path: Path, full: synthetic.Model, save: Save) -> tuple[Checkpoint, dict[Any, bytes]]:
    synthetic.write(tmp_path / "saved", full, save)
    checkpoint = read(tmp_path / "saved")
    return checkpoint, values_of(checkpoint)


def expected(full: synthetic.Model) -> dict[tuple[str, str], bytes]:
    """What the catalogue of a model must hold."""
    values = {
        (str(canonical_key(name)), STATE[state]): raw(tensor)
        for name, states in full.parameters.items()
        for state, tensor in states.items()
    }
    return values | {(name, "weight"): raw(t) for name, t in {**full.frozen, **full.buffers}.items()}


# ---- the real checkpoints, against what the engine itself gathered


@pytest.mark.parametrize("state", STATE)
def test_every_element_equals_the_engines_own(zero3_fixture: str, state: str) -> None:
    oracle = load_file(DEEPSPEED / zero3_fixture / "oracle" / f"{state}.safetensors")
    checkpoint = read(checkpoint_of(zero3_fixture))
    found = {key: value for key, value in values_of(checkpoint).items() if key[1] == STATE[state]}
    assert found == {(str(canonical_key(name)), STATE[state]): raw(t) for name, t in oracle.items()}


@pytest.mark.parametrize("state", STATE)
def test_shapes_and_dtypes_equal_the_engines_own(zero3_fixture: str, state: str) -> None:
    oracle = load_file(DEEPSPEED / zero3_fixture / "oracle" / f"{state}.safetensors")
    tensors = read(checkpoint_of(zero3_fixture)).by_key()
    for name, tensor in oracle.items():
        mine = tensors[canonical_key(name), STATE[state]]
        assert (mine.shape, str(mine.dtype)) == (tuple(tensor.shape), "float32")


@pytest.mark.parametrize(("kind", "role"), [("buffers", Role.BUFFER), ("frozen", Role.FROZEN)])
def test_frozen_parameters_and_buffers_equal_the_engines_own(kind: str, role: Role) -> None:
    seen = 0
    for name in ZERO3:
        file = DEEPSPEED / name / "oracle" / f"{kind}.safetensors"
        checkpoint = read(checkpoint_of(name))
        mine = {t.name: t for t in checkpoint.tensors if t.role is role}
        oracle = load_file(file) if file.exists() else {}
        assert set(mine) == set(oracle), name
        reader = LocalReader(checkpoint.root)
        for key, tensor in oracle.items():
            assert raw(materialise(reader, mine[key])) == raw(tensor)
            seen += 1
        reader.close()
    assert seen, f"no fixture has {kind}"


def test_every_parameter_has_the_engines_step(zero3_fixture: str) -> None:
    import json

    oracle = json.loads((DEEPSPEED / zero3_fixture / "oracle" / "oracle.json").read_text())
    checkpoint = read(checkpoint_of(zero3_fixture))
    trained = {t.name for t in checkpoint.tensors if t.state == "master"}
    assert {name for name, state in checkpoint.scalars if state == "step"} == trained
    assert {scalar.value for scalar in checkpoint.scalars.values()} == set(oracle["adam_steps"])
    assert checkpoint.training.step == oracle["global_step"]


def test_real_checkpoints_equal_the_simple_reference(zero3_fixture: str) -> None:
    checkpoint = read(checkpoint_of(zero3_fixture))
    simple = synthetic.reference(Path(checkpoint.root))
    found = values_of(checkpoint)
    assert {(str(canonical_key(n)), STATE[s]): raw(t) for (n, s), t in simple.items()} == {
        key: value for key, value in found.items() if key[1] != "weight"
    }


def test_topology_of_the_real_checkpoints_is_read() -> None:
    shown = {
        name: (t.world_size, t.ep_size, t.edp_size, t.ep_ranks, t.edp_ranks)
        for name in ("mixtral_w4e4", "mixtral_w4e2", "mixtral_dbe_w4e2", "dense_w3")
        for t in [read(checkpoint_of(name)).topology]
    }
    assert shown == {
        "mixtral_w4e4": (4, 4, 1, (0, 1, 2, 3), (0, 0, 0, 0)),
        "mixtral_w4e2": (4, 2, 2, (0, 1, 0, 1), (0, 0, 1, 1)),
        "mixtral_dbe_w4e2": (4, 2, 2, (0, 0, 1, 1), (0, 1, 0, 1)),
        "dense_w3": (3, None, None, (), ()),
    }


def test_tied_weights_and_the_routers_second_name_are_aliases() -> None:
    aliases = read(checkpoint_of("qwen3_moe_w2e2_tied")).aliases
    assert aliases["lm_head.weight"] == "model.embed_tokens.weight"
    assert aliases["model.layers.0.mlp.gate.gate.weight"] == "model.layers.0.mlp.router.gate.weight"


def test_client_state_scheduler_and_groups_of_a_real_checkpoint() -> None:
    training = read(checkpoint_of("mixtral_odd_w4e2")).training
    assert training.client_state == {"step": 2, "note": "hello"}
    assert training.scheduler == {"last_batch_iteration": 1}
    assert [group.options["name"] for group in training.param_groups] == ["decay", "no_decay", "ep_size_2"]
    assert [group.options["weight_decay"] for group in training.param_groups] == [0.1, 0.0, 0.1]
    assert "model.norm.weight" in training.param_groups[1].parameters
    assert ExpertName("model.layers.1", "down") in training.param_groups[2].parameters


def test_a_checkpoint_given_as_tag_parent_or_file_is_the_same() -> None:
    parent = checkpoint_of("mixtral_w2e1")
    tag = parent / "global_step2"
    file = tag / "zero_pp_rank_1_mp_rank_00_model_states.pt"
    roots = {read(path).root for path in (parent, parent / "latest", tag, file)}
    assert roots == {str(tag)}


# ---- only metadata is read


class CountingReader(LocalReader):
    """Counts the bytes asked for, per file."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.counts: dict[str, int] = {}

    def read(self, path: str, offset: int, length: int) -> bytes:
        self.counts[path] = self.counts.get(path, 0) + length
        return super().read(path, offset, length)

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        self.counts[path] = self.counts.get(path, 0) + len(buffer)
        super().read_into(path, offset, buffer)


def test_opening_reads_a_few_kilobytes_of_files_of_megabytes(tmp_path: Path) -> None:
    full = synthetic.model({"model.embed_tokens.weight": (100_000, 2)}, [Layer(0, uniform(4, 2), 50, 50)])
    tag = synthetic.write(tmp_path / "saved", full, Save(world=4))
    reader = CountingReader(tag)
    Zero3().read(reader)
    reader.close()
    assert sorted(reader.counts) == sorted(path.name for path in tag.iterdir())
    assert min(path.stat().st_size for path in tag.glob("*optim*")) > 500_000
    assert max(reader.counts.values()) < 64_000


def test_opening_reads_no_more_of_a_larger_checkpoint(tmp_path: Path) -> None:
    counts = []
    for rows in (10, 10_000):
        full = synthetic.model({"a": (rows, 3), "b": (rows,)}, [Layer(0, uniform(2, 1))])
        tag = synthetic.write(tmp_path / str(rows), full, Save(world=2))
        reader = CountingReader(tag)
        Zero3().read(reader)
        reader.close()
        counts.append(sum(reader.counts.values()))
    assert counts[1] - counts[0] < 2_000  # a few more digits in the pickles


def test_opening_and_closing_leaves_no_file_open() -> None:
    def held() -> int:
        return sum(1 for fd in Path("/proc/self/fd").iterdir() if ".pt" in str(fd.resolve()))

    before = held()
    for _ in range(3):
        read(checkpoint_of("mixtral_w4e4"))
    assert held() == before


# ---- arithmetic


@given(st.integers(0, 300), st.integers(1, 400))
def test_partitions_hold_every_element_once_and_no_padding(numel: int, count: int) -> None:
    size = partition_size(numel, count)
    held = [max(0, min(size, numel - rank * size)) for rank in range(count)]
    assert sum(held) == numel
    assert size * count - numel < count


@given(st.lists(st.integers(0, 12), unique=True, max_size=12))
def test_consecutive_runs_are_the_ids_again(ids: list[int]) -> None:
    again = [first + k for _, first, count in consecutive(ids) for k in range(count)]
    assert again == ids
    assert [position for position, _, _ in consecutive(ids)] == list(
        itertools.accumulate((count for _, _, count in consecutive(ids)), initial=0)
    )[: len(list(consecutive(ids)))]


# ---- any topology, against the full tensors it was made from


@st.composite
def dense_shapes(draw: st.DrawFn) -> dict[str, tuple[int, ...]]:
    shapes = st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple)
    return {f"model.p{number}": draw(shapes) for number in range(draw(st.integers(1, 5)))}


@st.composite
def grouped(draw: st.DrawFn, names: list[str]) -> list[list[list[str]]]:
    """Names dealt to parameter groups of sub-groups, in any order."""
    shuffled = draw(st.permutations(names))
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(names) - 1)), max_size=3)))
    sub_groups = [list(shuffled[a:b]) for a, b in itertools.pairwise([0, *cuts, len(names)]) if a < b]
    split = draw(st.integers(0, len(sub_groups)))
    return [part for part in (sub_groups[:split], sub_groups[split:]) if part]


@st.composite
def anything(draw: st.DrawFn) -> tuple[synthetic.Model, Save]:
    """Any model at any topology."""
    random_ = random.Random(draw(st.integers(0, 2**32)))
    ep, edp = draw(st.sampled_from([1, 2, 3, 4])), draw(st.sampled_from([1, 2, 3]))
    layers = [
        Layer(
            number,
            synthetic.random_placement(draw(st.integers(1, 6)), ep, random_, replicas=draw(st.booleans())),
            draw(st.integers(1, 4)),
            draw(st.integers(1, 4)),
        )
        for number in range(draw(st.integers(1, 2)))
    ]
    full = synthetic.model(
        draw(dense_shapes()),
        layers,
        seed=draw(st.integers(0, 1000)),
        frozen={"model.frozen": (draw(st.integers(0, 9)),)} if draw(st.booleans()) else None,
        buffers={"model.buffer": (3,)} if draw(st.booleans()) else None,
    )
    experts = [f"{x.module}.experts.{w}" for x in layers for w in ("w1", "w2", "w3")]
    dense = [name for name in full.parameters if name not in experts]
    save = Save(
        world=ep * edp,
        groups=draw(grouped(dense)) + draw(grouped(experts)),
        data_before_expert=draw(st.booleans()),
        legacy_key=draw(st.booleans()),
        empty_listed=draw(st.booleans()),
        bf16=draw(st.booleans()),
        int_step=draw(st.booleans()),
    )
    return full, save


@given(anything())
def test_every_element_is_right_at_any_topology_and_placement(made: tuple[synthetic.Model, Save]) -> None:
    full, save = made
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint, found = saved(Path(temporary), full, save)
        assert found == expected(full)
        simple = synthetic.reference(Path(checkpoint.root))
        assert {(str(canonical_key(n)), STATE[s]): raw(t) for (n, s), t in simple.items()} == {
            key: value for key, value in found.items() if key[1] != "weight"
        }
        replicas_hold_the_same(checkpoint, found)


def replicas_hold_the_same(checkpoint: Checkpoint, found: dict[Any, bytes]) -> None:
    reader = LocalReader(checkpoint.root)
    for tensor in checkpoint.tensors:
        whole = found[str(tensor.name), tensor.state]
        for region in tensor.replicas:
            size = tensor.dtype.itemsize
            data = reader.read(region.file, region.offset, region.numel * size)
            assert data == whole[region.start * size : (region.start + region.numel) * size]
    reader.close()


@given(dense_shapes(), st.integers(1, 40), st.data())
def test_plain_zero3_is_right_also_with_more_ranks_than_elements(
    shapes: dict[str, tuple[int, ...]], world: int, data: st.DataObject
) -> None:
    full = synthetic.model(shapes, seed=world)
    groups = data.draw(grouped(list(shapes)))
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint, found = saved(Path(temporary), full, Save(world=world, groups=groups))
        assert found == expected(full)
        assert checkpoint.topology.ep_size is None


def test_one_element_over_many_ranks(tmp_path: Path) -> None:
    full = synthetic.model({"a": (1,), "b": (33,)})
    _, found = saved(tmp_path, full, Save(world=64))
    assert found == expected(full)


def test_a_scalar_and_an_empty_parameter_keep_their_shapes(tmp_path: Path) -> None:
    full = synthetic.model({"a": (), "b": (2, 3)}, frozen={"none": (0, 4)})
    checkpoint, found = saved(tmp_path, full, Save(world=3))
    assert found == expected(full)
    assert {str(t.name): t.shape for t in checkpoint.tensors} == {"a": (), "b": (2, 3), "none": (0, 4)}


def test_padding_never_comes_out(tmp_path: Path) -> None:
    layers = [Layer(0, ((2, 0), (1,)), 3, 3)]
    full = synthetic.model({"a": (5, 7), "b": (1,)}, layers, frozen={"f": (3,)})
    _, found = saved(tmp_path, full, Save(world=4))
    for (name, state), data in found.items():
        values = torch.frombuffer(bytearray(data), dtype=torch.float32)
        assert not values.isnan().any(), (name, state)


# ---- placements one by one, so that a failure has a name

PLACEMENTS = {
    "uniform": ((0, 1), (2, 3)),
    "uneven": ((0,), (1, 2, 3)),
    "out of order": ((3, 1), (2, 0)),
    "all on the last rank": ((), (0, 1, 2, 3)),
    "all on the first rank": ((0, 1, 2, 3), ()),
    "replicated": ((0, 1, 2), (2, 3, 0)),
    "all on all": ((0, 1, 2, 3), (3, 2, 1, 0)),
    "interleaved": ((0, 2), (1, 3)),
}


@pytest.mark.parametrize("edp", [1, 2])
@pytest.mark.parametrize("empty_listed", [True, False], ids=["listed", "frozen"])
@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
def test_placement(placement: synthetic.Placement, empty_listed: bool, edp: int, tmp_path: Path) -> None:
    full = synthetic.model({"a": (5,)}, [Layer(3, placement)])
    checkpoint, found = saved(tmp_path, full, Save(world=2 * edp, empty_listed=empty_listed))
    assert found == expected(full)
    assert checkpoint.moe_layers[0].holders == placement
    assert checkpoint.moe_layers[0].layer_path == "model.layers.3"


def test_layers_may_be_placed_differently(tmp_path: Path) -> None:
    layers = [Layer(1, ((0, 1, 2), (3,))), Layer(2, ((), (1, 0)), 2, 5)]
    full = synthetic.model({"a": (5,)}, layers)
    for empty_listed in (True, False):
        _, found = saved(tmp_path / str(empty_listed), full, Save(world=4, empty_listed=empty_listed))
        assert found == expected(full)


@pytest.mark.parametrize("data_before_expert", [False, True])
def test_without_expert_placement_experts_are_contiguous(data_before_expert: bool, tmp_path: Path) -> None:
    full = synthetic.model({"a": (5,)}, [Layer(0, uniform(6, 3))])
    save = Save(world=6, with_placement=False, data_before_expert=data_before_expert)
    checkpoint, found = saved(tmp_path, full, save)
    assert found == expected(full)
    assert checkpoint.moe_layers[0].holders == ((0, 1), (2, 3), (4, 5))


def test_the_first_releases_key_is_read(tmp_path: Path) -> None:
    full = synthetic.model({"a": (5,)}, [Layer(0, uniform(4, 2))])
    _, found = saved(tmp_path, full, Save(world=2, legacy_key=True, with_placement=False))
    assert found == expected(full)


# ---- everything that is not an element


def test_an_alias_is_listed_once(tmp_path: Path) -> None:
    full = synthetic.model({"embed": (4, 2)}, [Layer(0, uniform(2, 1))], tied={"lm_head.weight": "embed"})
    checkpoint, found = saved(tmp_path, full, Save())
    assert checkpoint.aliases == {
        "lm_head.weight": "embed",
        "model.layers.0.mlp.gate.gate.weight": "model.layers.0.mlp.router.gate.weight",
    }
    assert found == expected(full)


def test_groups_keep_their_options_and_order(tmp_path: Path) -> None:
    layer = Layer(0, uniform(2, 2))
    full = synthetic.model({"a": (5,), "b": (3, 2), "c": (2,)}, [layer])
    router, experts = f"{layer.module}.router.gate.weight", f"{layer.module}.experts"
    groups = [[["c"], ["a", router]], [["b"]], [[f"{experts}.w2", f"{experts}.w1"], [f"{experts}.w3"]]]
    checkpoint, _ = saved(tmp_path, full, Save(world=2, groups=groups))
    assert [group.parameters for group in checkpoint.training.param_groups] == [
        ("c", "a", router),
        ("b",),
        tuple(ExpertName("model.layers.0", kind) for kind in ("down", "gate", "up")),
    ]
    assert [group.options["lr"] for group in checkpoint.training.param_groups] == [0.1, 0.2, 0.1 * 3]


@pytest.mark.parametrize("int_step", [False, True])
def test_step_keeps_its_kind(int_step: bool, tmp_path: Path) -> None:
    full = synthetic.model({"a": (5,)})
    checkpoint, _ = saved(tmp_path, full, Save(step=7, int_step=int_step))
    scalar = checkpoint.scalars["a", "step"]
    assert (scalar.value, scalar.dtype is None, checkpoint.training.step) == (7, int_step, 7)


def test_client_state_keeps_values_and_tensors(tmp_path: Path) -> None:
    held = {"note": "x", "nested": {"ema": torch.arange(6.0).reshape(2, 3)}, "list": [1, (2.5, None)]}
    checkpoint, _ = saved(tmp_path, synthetic.model({"a": (5,)}), Save(client=lambda rank: held))
    state = checkpoint.training.client_state
    assert (state["note"], state["list"]) == ("x", [1, (2.5, None)])
    ema = state["nested"]["ema"]
    assert isinstance(ema, Tensor)
    reader = LocalReader(checkpoint.root)
    assert torch.equal(materialise(reader, ema), held["nested"]["ema"])  # type: ignore[index]
    assert checkpoint.training.per_rank == ()
    reader.close()


def per_rank(rank: int) -> Iterator[tuple[str, Any]]:
    yield "same", [1, 2]
    yield "rng", torch.tensor([rank, 1, 2])
    yield "seed", rank
    if rank == 1:
        yield "only_here", True


def test_client_state_that_differs_between_ranks_is_named_and_left_out(tmp_path: Path) -> None:
    save = Save(world=3, client=lambda rank: dict(per_rank(rank)))
    training = saved(tmp_path, synthetic.model({"a": (5,)}), save)[0].training
    assert training.client_state == {"same": [1, 2]}
    assert sorted(training.per_rank) == ["only_here", "rng", "seed"]


def test_client_tensors_differ_also_where_archives_carry_no_crc(tmp_path: Path) -> None:
    """torch.serialization.set_crc32_options(False) writes CRC 0 for every record."""
    torch.serialization.set_crc32_options(False)
    try:
        save = Save(client=lambda rank: {"rng": torch.tensor([rank, 1, 2])})
        training = saved(tmp_path, synthetic.model({"a": (5,)}), save)[0].training
    finally:
        torch.serialization.set_crc32_options(True)
    assert training.per_rank == ("rng",)


def test_client_state_of_numpy_is_kept(tmp_path: Path) -> None:
    state = np.random.RandomState(0).get_state()
    save = Save(client=lambda rank: {"rng": state})
    checkpoint, _ = saved(tmp_path, synthetic.model({"a": (5,)}), save)
    assert list(checkpoint.training.client_state) == ["rng"]


def test_the_catalogue_is_in_the_models_order() -> None:
    names = [str(t.name) for t in read(checkpoint_of("mixtral_w4e2")).tensors if t.state == "master"]
    assert names[0] == "model.embed_tokens.weight"
    assert names[-1] == "lm_head.weight"
    router = names.index("model.layers.0.mlp.router.gate.weight")
    assert [name.split(".")[5] for name in names[router + 1 : router + 4]] == ["gate", "up", "down"]


def test_the_source_is_not_changed_by_reading(tmp_path: Path) -> None:
    tag = copy_fixture("mixtral_w2e1", tmp_path)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tag.iterdir()}
    values_of(read(tag))
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tag.iterdir()} == before
