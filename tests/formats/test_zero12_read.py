"""Reading ZeRO-0, ZeRO-1 and ZeRO-2: every element is where the catalogue says, and no padding is in it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils.tensor_fragment import fragment_address
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from ckpt_tool import api
from ckpt_tool.canonical import Checkpoint, DType, ExpertName, Role, Scalar
from ckpt_tool.formats.deepspeed.facts.flat_groups import FlatGroup, undealt
from ckpt_tool.formats.deepspeed.facts.optimizer_order import assign
from ckpt_tool.formats.deepspeed.reading.zero0 import Zero0
from ckpt_tool.formats.deepspeed.reading.zero12 import Zero12
from ckpt_tool.storage import LocalReader
from tests.conftest import (
    DEEPSPEED,
    canonical_key,
    checkpoint_of,
    copy_fixture,
    materialise,
    raw,
    values_of,
)

STATE = {"fp32": "master", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
STAGES = {
    "mixtral_z2_w4e2": 2,
    "mixtral_z1_bf16_w2e2": 1,
    "deepseek_v3_z2_w2e1": 2,
    "dense_z2_w3": 2,
    "mixtral_z0_w2e2": 0,
}
ZERO12 = [name for name, stage in STAGES.items() if stage]
each = pytest.mark.parametrize("name", STAGES)


def read(name: str) -> Checkpoint:
    return api.catalogue(checkpoint_of(name))


def oracle(name: str, kind: str) -> dict[str, torch.Tensor]:
    path = DEEPSPEED / name / "oracle" / f"{kind}.safetensors"
    return load_file(path) if path.is_file() else {}


def facts(name: str) -> Any:
    return json.loads((DEEPSPEED / name / "oracle" / "oracle.json").read_text())


def tag(name: str) -> Path:
    return checkpoint_of(name) / "global_step2"


def load(path: Path) -> Any:
    return torch.load(path, weights_only=False)


# ---- the real checkpoints, against what the engine itself gathered


@each
@pytest.mark.parametrize("state", STATE)
def test_every_element_equals_the_engines_own(name: str, state: str) -> None:
    found = {key: value for key, value in values_of(read(name)).items() if key[1] == STATE[state]}
    expected = {(str(canonical_key(key)), STATE[state]): raw(t) for key, t in oracle(name, state).items()}
    assert found == expected


@each
@pytest.mark.parametrize("state", STATE)
def test_shapes_and_dtypes_equal_the_engines_own(name: str, state: str) -> None:
    tensors = read(name).by_key()
    for key, tensor in oracle(name, state).items():
        mine = tensors[canonical_key(key), STATE[state]]
        assert (mine.shape, mine.dtype, mine.role) == (
            tuple(tensor.shape),
            DType.float32,
            Role.PARAMETER,
        )


def test_frozen_parameters_and_buffers_equal_the_engines_own() -> None:
    checkpoint = read("deepseek_v3_z2_w2e1")
    values = values_of(checkpoint)
    for kind, role in (("frozen", Role.FROZEN), ("buffers", Role.BUFFER)):
        expected = oracle("deepseek_v3_z2_w2e1", kind)
        assert expected
        own = [tensor for tensor in checkpoint.tensors if tensor.role is role]
        assert {(t.name, t.state) for t in own} == {(key, "weight") for key in expected}
        assert {t.name: values[str(t.name), "weight"] for t in own} == {
            k: raw(t) for k, t in expected.items()
        }


@pytest.mark.parametrize("name", ZERO12)
def test_the_models_weights_are_kept_beside_the_masters(name: str) -> None:
    checkpoint = read(name)
    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    values = values_of(checkpoint)
    for key, tensor in oracle(name, "fp32").items():
        assert values[str(canonical_key(key)), "weight"] == raw(tensor.to(dtype)), key


@each
def test_values_are_the_masters_once_each_and_the_untrained(name: str) -> None:
    values = read(name).values()
    names = [tensor.name for tensor in values]
    expected = {canonical_key(key): "master" for key in oracle(name, "fp32")}
    expected |= dict.fromkeys(oracle(name, "frozen"), "weight") | dict.fromkeys(
        oracle(name, "buffers"), "weight"
    )
    assert len(names) == len(set(names))
    assert {tensor.name: tensor.state for tensor in values} == expected


@each
def test_every_parameter_has_its_step_and_kind(name: str) -> None:
    steps = set(facts(name)["adam_steps"])
    assert steps == {2.0}
    assert read(name).scalars == {
        (canonical_key(key), "step"): Scalar(2.0, DType.float32) for key in oracle(name, "fp32")
    }


# ---- what is not a tensor


@each
def test_groups_name_their_parameters_in_the_optimizers_order(name: str) -> None:
    groups = read(name).training.param_groups
    model = load(tag(name) / "mp_rank_00_model_states.pt")
    if model["param_shapes"] is not None:
        expected = [tuple(map(canonical_key, group)) for group in model["param_shapes"]]
        assert [group.parameters for group in groups] == expected
    assert {key for group in groups for key in group.parameters} == set(
        map(canonical_key, oracle(name, "fp32"))
    )
    assert all("lr" in group.options and "params" not in group.options for group in groups)


def test_options_differ_by_group() -> None:
    groups = read("mixtral_z2_w4e2").training.param_groups
    assert [group.options["name"] for group in groups] == ["decay", "no_decay", "ep_size_2", "ep_size_2"]
    assert [group.options["weight_decay"] for group in groups] == [0.1, 0.0, 0.1, 0.1]
    assert [len(group.parameters) for group in groups] == [12, 5, 4, 2]
    assert groups[0].options["lr"] == facts("mixtral_z2_w4e2")["lr"][0] != 0.01


def test_numbered_states_of_stage_0_are_named_in_the_models_order() -> None:
    dense, experts = read("mixtral_z0_w2e2").training.param_groups
    assert dense.parameters[-2:] == tuple(f"model.layers.{n}.mlp.router.gate.weight" for n in (0, 1))
    assert experts.parameters == tuple(
        ExpertName(f"model.layers.{n}", projection) for n in (0, 1) for projection in ("gate", "down", "up")
    )


def test_client_state_scheduler_and_counters() -> None:
    training = read("mixtral_z2_w4e2").training
    assert training.client_state == {"step": 2, "note": "hello"}
    assert training.scheduler == {"last_batch_iteration": 1}
    assert training.counters == {"global_steps": 2, "skipped_steps": 0, "global_samples": 48}
    assert (training.step, training.engine_version, training.per_rank) == (2, "0.19.8", ())
    assert training.config["zero_optimization"] == {"stage": 2}
    assert training.loss_scale["dynamic_loss_scale"] is False
    assert training.loss_scale["loss_scaler"].qualname == "LossScaler"


@each
def test_format_and_names(name: str) -> None:
    checkpoint = read(name)
    assert checkpoint.format == f"deepspeed-zero{STAGES[name]}"
    assert checkpoint.dialect == ("transformers" if name == "dense_z2_w3" else "autoep")
    assert checkpoint.module_names == tuple(load(tag(name) / "mp_rank_00_model_states.pt")["module"])
    assert {file.path for file in checkpoint.files} == {path.name for path in tag(name).iterdir()}
    assert checkpoint.notes == ()


def test_topology() -> None:
    topology = read("mixtral_z2_w4e2").topology
    assert dataclasses.astuple(topology) == (4, 2, 2, 2, (0, 1, 0, 1), (0, 0, 1, 1))
    assert dataclasses.astuple(read("dense_z2_w3").topology) == (3, None, None, 2, (), ())
    assert dataclasses.astuple(read("mixtral_z0_w2e2").topology) == (2, 2, 1, 0, (0, 1), (0, 0))


def test_layers_are_named_by_the_model_and_not_counted() -> None:
    (layer,) = read("deepseek_v3_z2_w2e1").moe_layers
    assert (layer.layer_path, layer.module, layer.num_experts) == (
        "model.layers.1",
        "model.layers.1.mlp",
        4,
    )
    assert layer.holders == ((0, 1, 2, 3),)
    assert read("mixtral_z2_w4e2").moe_layers[1].holders == ((0, 1, 2), (3, 4, 5))


def test_second_names_are_aliases_and_no_tensors() -> None:
    routers = {
        f"model.layers.{n}.mlp.gate.gate.weight": f"model.layers.{n}.mlp.router.gate.weight" for n in (0, 1)
    }
    assert read("mixtral_z2_w4e2").aliases == read("mixtral_z0_w2e2").aliases == routers
    assert read("dense_z2_w3").aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in {tensor.name for tensor in read("dense_z2_w3").tensors}


def test_experts_follow_their_router() -> None:
    names = [tensor.name for tensor in read("mixtral_z2_w4e2").tensors if tensor.state == "exp_avg"]
    at = names.index("model.layers.0.mlp.router.gate.weight")
    assert names[at + 1 : at + 4] == [ExpertName("model.layers.0", p) for p in ("gate", "down", "up")]


# ---- where the elements lie


def test_parameters_span_ranks_in_these_fixtures() -> None:
    """Without that the tests above would prove little."""
    for name in ZERO12:
        spans = [
            tensor
            for tensor in read(name).tensors
            if tensor.state == "exp_avg" and len({region.file for region in tensor.regions}) > 1
        ]
        assert spans, name
    groups = load(tag("mixtral_z2_w4e2") / "zero_pp_rank_3_mp_rank_00_optim_states.pt")
    assert all(groups["optimizer_state_dict"]["group_paddings"][:2]), "no padding to get wrong"


@pytest.mark.parametrize("name", ZERO12)
def test_padding_never_comes_out(name: str, tmp_path: Path) -> None:
    """Poison it: nothing of what is read changes."""
    copy = copy_fixture(name, tmp_path)
    poisoned = 0
    for path in copy.glob("*zero_pp_rank*"):
        content = load(path)
        zero = content["optimizer_state_dict"]
        for index, padding in enumerate(zero["group_paddings"]):
            held = zero["single_partition_of_fp32_groups"][index].numel()
            for state in ("exp_avg", "exp_avg_sq"):
                flat = zero["base_optimizer_state"]["state"][index][state]
                assert flat.numel() == held + padding
                flat[held:] = math.nan
                poisoned += padding
            master = torch.full((held + padding,), math.nan)
            master[:held] = zero["single_partition_of_fp32_groups"][index].detach()
            zero["single_partition_of_fp32_groups"][index] = master[:held]
        torch.save(content, path)
    assert poisoned or name == "mixtral_z1_bf16_w2e2"
    assert values_of(api.catalogue(copy)) == values_of(read(name))


@each
def test_reading_touches_no_tensor_data(name: str) -> None:
    class Recording(LocalReader):
        def __init__(self, root: Path) -> None:
            super().__init__(root)
            self.ranges: list[tuple[str, int, int]] = []

        def read(self, path: str, offset: int, length: int) -> bytes:
            self.ranges.append((path, offset, offset + length))
            return super().read(path, offset, length)

        def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
            self.ranges.append((path, offset, offset + len(buffer)))
            super().read_into(path, offset, buffer)

    reader = Recording(tag(name))
    form = Zero12() if STAGES[name] else Zero0()
    assert form.recognises(reader)
    checkpoint = form.read(reader)
    ranges = list(reader.ranges)
    held = [
        (region.file, region.offset, region.offset + region.numel * tensor.dtype.itemsize)
        for tensor in checkpoint.tensors
        for region in tensor.regions
    ]
    # the zip module reads the directory and what lies before it in pieces of up to 64 KiB
    small = [(file, low, high) for file, low, high in ranges if high - low < 4096]
    for file, low, high in small:
        assert not any(file == f and low < b and a < high for f, a, b in held), (file, low, high)


# ---- without optimizer files


@pytest.mark.parametrize("name", ["mixtral_z2_w4e2", "mixtral_z1_bf16_w2e2", "mixtral_z0_w2e2"])
def test_without_optimizer_files_the_weights_are_taken_and_it_is_said(name: str, tmp_path: Path) -> None:
    copy = copy_fixture(name, tmp_path)
    for path in copy.glob("*optim_states.pt"):
        path.unlink()
    checkpoint = api.catalogue(copy)
    assert checkpoint.format == f"deepspeed-zero{STAGES[name]}"
    assert [note for note in checkpoint.notes if "optimizer" in note and "weights" in note]
    assert not checkpoint.scalars
    assert {tensor.state for tensor in checkpoint.tensors} == {"weight"}
    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    assert values_of(checkpoint) == {
        (str(canonical_key(key)), "weight"): raw(tensor.to(dtype))
        for key, tensor in oracle(name, "fp32").items()
    }


def test_a_module_only_directory_still_tells_what_was_trained(tmp_path: Path) -> None:
    copy = copy_fixture("deepseek_v3_z2_w2e1", tmp_path)
    for path in copy.glob("*optim_states.pt"):
        path.unlink()
    roles = {tensor.name: tensor.role for tensor in api.catalogue(copy).tensors}
    assert roles == {tensor.name: tensor.role for tensor in read("deepseek_v3_z2_w2e1").tensors}


def test_stage_1_lists_no_frozen_parameters_and_they_are_told_all_the_same(tmp_path: Path) -> None:
    copy = copy_fixture("deepseek_v3_z2_w2e1", tmp_path)
    model = load(copy / "mp_rank_00_model_states.pt")
    model |= {"frozen_param_shapes": None, "frozen_param_fragments": None}
    torch.save(model, copy / "mp_rank_00_model_states.pt")
    frozen = {tensor.name for tensor in api.catalogue(copy).tensors if tensor.role is Role.FROZEN}
    assert frozen == set(oracle("deepseek_v3_z2_w2e1", "frozen"))


def test_mapping_less_files_of_old_releases_are_read_with_a_note(tmp_path: Path) -> None:
    copy = copy_fixture("dense_z2_w3", tmp_path)
    for path in copy.glob("*optim_states.pt"):
        content = load(path)
        del content["optimizer_state_dict"]["param_slice_mappings"]
        torch.save(content, path)
    checkpoint = api.catalogue(copy)
    assert values_of(checkpoint) == values_of(read("dense_z2_w3"))
    assert "param_slice_mappings" in checkpoint.notes[0]


def test_client_tensors_are_streamed(tmp_path: Path) -> None:
    copy = copy_fixture("dense_z2_w3", tmp_path)
    model = load(copy / "mp_rank_00_model_states.pt")
    torch.save(model | {"rng": torch.arange(5)}, copy / "mp_rank_00_model_states.pt")
    checkpoint = api.catalogue(copy)
    tensor = checkpoint.training.client_state["rng"]
    assert raw(materialise(LocalReader(checkpoint.root), tensor)) == raw(torch.arange(5))


# ---- any topology, against a writer that shares no code with the reader


@dataclasses.dataclass
class Synthetic:
    """A ZeRO-2 save of one MoE layer and some dense parameters, written in the simplest way."""

    world: int
    placement: tuple[tuple[int, ...], ...]
    data_first: bool
    dense: dict[str, tuple[int, ...]]
    gap: int = 1  # parameter_alignment, in elements
    dealt: bool = False  # round_robin_gradients

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.experts = {"w1": (2, 3), "w2": (3, 2), "w3": (2, 3)}
        self.prefix = "model.layers.7.mlp.experts"
        self.count = 1 + max(expert for ids in self.placement for expert in ids)
        shapes = dict(self.dense)
        shapes |= {f"{self.prefix}.{w}": (self.count, *shape) for w, shape in self.experts.items()}
        self.full = {
            name: {state: torch.rand(shape, generator=generator) for state in STATE}
            for name, shape in shapes.items()
        }

    def share(self, ep_rank: int, name: str, state: str) -> torch.Tensor:
        full = self.full[name][state]
        return full[list(self.placement[ep_rank])] if name.startswith(self.prefix) else full

    def flat(
        self, names: list[str], ep_rank: int, state: str, count: int
    ) -> tuple[torch.Tensor, list[int]]:
        pieces, gaps, position = [], [], 0
        for name in names:
            piece = self.share(ep_rank, name, state).reshape(-1)
            last = name == names[-1]
            gaps.append(0 if last else -(position + len(piece)) % self.gap)
            pieces += [piece, torch.full((gaps[-1],), math.nan)]
            position += len(piece) + gaps[-1]
        total = torch.cat(pieces)
        padding = -len(total) % (2 * count)
        return torch.cat([total, torch.full((padding,), math.nan)]), gaps

    def write(self, directory: Path) -> Path:
        directory.mkdir(parents=True)
        ep = len(self.placement)
        edp = self.world // ep
        groups = [list(self.dense), [f"{self.prefix}.{w}" for w in self.experts]]
        counts = [self.world, edp]
        if self.dealt:
            groups = [
                [name for first in range(n) for name in group[first::n]]
                for group, n in zip(groups, counts, strict=True)
            ]
        for rank in range(self.world):
            ep_rank, edp_rank = (rank // edp, rank % edp) if self.data_first else (rank % ep, rank // ep)
            base: dict[int, dict[str, Any]] = {}
            zero: dict[str, Any] = {
                "zero_stage": 2, "partition_count": counts, "single_partition_of_fp32_groups": [],
                "group_paddings": [], "param_alignment_paddings": [], "param_slice_mappings": [],
                "base_optimizer_state": {"state": base, "param_groups": [{"params": [0]}, {"params": [1]}]},
            }  # fmt: skip
            for index, (names, count) in enumerate(zip(groups, counts, strict=True)):
                place = edp_rank if index else rank
                base[index] = {"step": torch.tensor(2.0)}
                for state in STATE:
                    flat, gaps = self.flat(names, ep_rank, state, count)
                    part = flat.reshape(count, -1)[place].clone()
                    total = sum(self.share(ep_rank, n, state).numel() for n in names) + sum(gaps)
                    held = min(max(total - place * len(part), 0), len(part))
                    if state != "fp32":
                        base[index][state] = part
                zero["group_paddings"].append(len(part) - held)
                zero["param_alignment_paddings"].append(gaps)
                zero["single_partition_of_fp32_groups"].append(
                    self.flat(names, ep_rank, "fp32", count)[0].reshape(count, -1)[place][:held].clone()
                )
                zero["param_slice_mappings"].append(
                    self.mapping(names, ep_rank, gaps, count, place, len(part))
                )
            torch.save(
                {"optimizer_state_dict": zero, "ds_version": "0.19.8", "ds_config": self.config()},
                directory / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
            )
        self.write_model(directory, groups)
        return directory

    def mapping(
        self, names: list[str], ep_rank: int, gaps: list[int], count: int, place: int, part: int
    ) -> dict[str, Any]:
        if self.dealt:  # the order before dealing, as DeepSpeed maps it
            original = list(self.dense) if names[0] in self.dense else sorted(names)
            gaps, names = [0] * len(names), original
        found, position = OrderedDict(), 0
        for name, gap in zip(names, gaps, strict=True):
            numel = self.share(ep_rank, name, "fp32").numel()
            low, high = max(position, place * part), min(position + numel, (place + 1) * part)
            if low < high:
                found[name] = fragment_address(numel=high - low, start=low - place * part)
            position += numel + gap
        return found

    def config(self) -> dict[str, Any]:
        return {
            "use_data_before_expert_parallelism": self.data_first,
            "zero_optimization": {"stage": 2, "round_robin_gradients": self.dealt},
        }

    def write_model(self, directory: Path, groups: list[list[str]]) -> None:
        shapes = [
            OrderedDict((n, tuple(self.share(0, n, "fp32").shape)) for n in group) for group in groups
        ]
        placement = {
            "version": 1,
            "num_experts": self.count,
            "ep_size": len(self.placement),
            "ranks": [{"rank": e, "experts": list(ids)} for e, ids in enumerate(self.placement)],
        }
        layer = {
            "moe_layer_id": 0, "module_path": "model.layers.7.mlp", "num_experts": self.count,
            "num_local_experts": len(self.placement[0]), "ep_size": len(self.placement),
            "expert_key_prefix": self.prefix, "expert_placement": placement,
        }  # fmt: skip
        model = {
            "module": OrderedDict((name, self.full[name]["fp32"]) for name in self.dense),
            "buffer_names": [], "param_shapes": shapes, "frozen_param_shapes": {}, "shared_params": {},
            "dp_world_size": self.world, "global_steps": 2, "ds_version": "0.19.8",
            "ds_config": self.config(), "ds_autoep_layers": [layer],
        }  # fmt: skip
        torch.save(model, directory / "mp_rank_00_model_states.pt")
        for expert in range(self.count):
            torch.save(
                {
                    f"{self.prefix}.{w}.{expert}": self.full[f"{self.prefix}.{w}"]["fp32"][expert].clone()
                    for w in self.experts
                },
                directory / f"layer_0_expert_{expert}_mp_rank_00_model_states.pt",
            )


def as_read(directory: Path) -> dict[tuple[str, str], bytes]:
    return {key: value for key, value in values_of(api.catalogue(directory)).items() if key[1] != "weight"}


def as_written(saved: Synthetic) -> dict[tuple[str, str], bytes]:
    return {
        (str(canonical_key(name)), STATE[state]): raw(tensor)
        for name, states in saved.full.items()
        for state, tensor in states.items()
    }


@given(
    ep=st.integers(1, 3),
    edp=st.integers(1, 4),
    data_first=st.booleans(),
    experts=st.integers(1, 4),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    gap=st.sampled_from([1, 1, 4, 8]),
    seed=st.integers(0, 99),
)
def test_any_topology_and_placement_reads_back(
    tmp_path_factory: pytest.TempPathFactory,
    ep: int,
    edp: int,
    data_first: bool,
    experts: int,
    sizes: list[int],
    gap: int,
    seed: int,
) -> None:
    """More ranks than elements, uneven and shuffled placements, gaps after parameters; padding is NaN."""
    ids = list(range(experts * ep))
    random.Random(seed).shuffle(ids)
    cuts = sorted(random.Random(seed + 1).sample(range(1, len(ids)), ep - 1)) if ep > 1 else []
    bounds = [0, *cuts, len(ids)]
    placement = tuple(tuple(ids[a:b]) for a, b in itertools.pairwise(bounds))
    dense = {f"model.p{number}": (size,) for number, size in enumerate(sizes)}
    saved = Synthetic(ep * edp, placement, data_first, dense, gap)
    directory = saved.write(tmp_path_factory.mktemp("any") / "tag")
    assert as_read(directory) == as_written(saved)


def test_an_expert_on_two_ep_ranks_is_read_once_and_the_other_is_a_replica(tmp_path: Path) -> None:
    saved = Synthetic(4, ((0, 1, 2), (2, 3)), False, {"model.a": (5,)})
    checkpoint = api.catalogue(saved.write(tmp_path / "tag"))
    assert as_read(tmp_path / "tag") == as_written(saved)
    stacks = [t for t in checkpoint.tensors if isinstance(t.name, ExpertName) and t.state != "weight"]
    assert len(stacks) == 9
    for stack in stacks:
        assert sum(region.numel for region in stack.replicas) == math.prod(stack.shape[1:])


def test_round_robin_gradients_are_read_by_param_shapes_and_not_by_the_engines_mappings(
    tmp_path: Path,
) -> None:
    dense = {f"model.p{number}": (3 + 5 * number,) for number in range(7)}
    saved = Synthetic(4, ((0, 1), (2, 3)), False, dense, dealt=True)
    checkpoint = api.catalogue(saved.write(tmp_path / "tag"))
    assert as_read(tmp_path / "tag") == as_written(saved)
    assert [note for note in checkpoint.notes if "round_robin_gradients" in note]


# ---- the arithmetic


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    count=st.integers(1, 9),
    align=st.integers(1, 8),
)
def test_flat_groups_agree_with_a_list_of_every_element(sizes: list[int], count: int, align: int) -> None:
    flat: list[tuple[str, int] | None] = []
    gaps = []
    for number, size in enumerate(sizes):
        flat += [(f"p{number}", index) for index in range(size)]
        gaps.append(0 if number == len(sizes) - 1 else -len(flat) % align)
        flat += [None] * gaps[-1]
    total = len(flat)
    flat += [None] * (-len(flat) % (2 * count))
    group = FlatGroup([(f"p{n}", size) for n, size in enumerate(sizes)], count, gaps)
    assert (group.total, group.part * count) == (total, len(flat))
    for rank in range(count):
        part = flat[rank * group.part : (rank + 1) * group.part]
        assert group.held(rank) == min(max(total - rank * group.part, 0), group.part)
        expected: dict[str, tuple[int, int]] = {}
        for position, element in enumerate(part):
            if element:
                numel, start = expected.get(element[0], (0, position))
                expected[element[0]] = (numel + 1, start)
        assert group.fragments(rank) == expected


@given(names=st.integers(0, 20), count=st.integers(1, 7))
def test_undealt_undoes_deepspeeds_dealing(names: int, count: int) -> None:
    original = [f"p{number}" for number in range(names)]
    parts: dict[int, list[str]] = {}
    for index, name in enumerate(original):  # _round_robin_reorder
        parts.setdefault(index % count, []).append(name)
    assert undealt([name for part in parts.values() for name in part], count) == original


# ---- naming the numbers of stage 0

DENSE = [("embed", (9, 4)), ("q", (4, 4)), ("m.router.gate.w", (2, 4)), ("norm", (4,)), ("head", (9, 4))]
EXPERTS = [("m.experts.w1", (1, 3, 4)), ("m.experts.w2", (1, 4, 3)), ("m.experts.w3", (1, 3, 4))]
IN_PLACE = [shape for _, shape in DENSE]
AT_END = [shape for name, shape in DENSE if "router" not in name] + [(2, 4)]
SIZES = [shape for _, shape in EXPERTS]


def named(*groups: Any, options: Any = None) -> list[list[str]] | None:
    return assign(list(groups), options or ["same"] * len(groups), DENSE, EXPERTS, ("m",))


def test_routers_are_found_in_place_and_at_the_end_of_their_group() -> None:
    experts = [name for name, _ in EXPERTS]
    assert named(IN_PLACE, SIZES) == [["embed", "q", "m.router.gate.w", "norm", "head"], experts]
    assert named(AT_END, SIZES) == [["embed", "q", "norm", "head", "m.router.gate.w"], experts]


def test_groups_without_a_shape_in_common_are_told_apart() -> None:
    matrices = [shape for shape in AT_END if len(shape) == 2]
    found = named(matrices, [(4,)], SIZES)
    assert found is not None
    assert found[:2] == [["embed", "q", "head", "m.router.gate.w"], ["norm"]]


def test_groups_that_share_a_shape_are_not_guessed() -> None:
    assert named([(9, 4), (4, 4), (2, 4), (4,)], [(9, 4)], SIZES) is None


def test_frozen_parameters_without_state_keep_their_place() -> None:
    found = named([None, *AT_END[1:]], SIZES)
    assert found is not None
    assert found[0][0] == "embed"


def test_parameters_the_optimizer_was_not_given_are_left_out_where_that_is_certain() -> None:
    found = named(AT_END[1:], SIZES)  # embed (9, 4) or head (9, 4)? the order says head
    assert found is not None
    assert found[0] == ["q", "norm", "head", "m.router.gate.w"]
    assert assign([[(4,)]], ["o"], [("a", (4,)), ("b", (4,))], [], ()) is None


def test_other_shapes_are_not_named() -> None:
    assert named([(1, 1), *AT_END[1:]], SIZES) is None
    assert named(AT_END, SIZES[:1]) is None  # w1 or w3?


def test_expert_groups_that_no_limit_explains_are_not_guessed() -> None:
    """They may be of two user groups, in any order."""
    assert named(AT_END, SIZES[:1], SIZES[1:]) is None
    large = [(f"m.experts.w{n}", (1, 10_000, 9_000)) for n in (1, 2, 3)]
    groups = [AT_END, [large[0][1]], [large[1][1]], [large[2][1]]]
    found = assign(groups, ["dense", "e", "e", "e"], DENSE, large, ("m",))
    assert found is not None
    assert found[1:] == [[name] for name, _ in large]
    assert assign(groups, ["dense", "e", "other", "e"], DENSE, large, ("m",)) is None
