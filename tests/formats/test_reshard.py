"""Re-sharding ZeRO-3 checkpoints: the same training state, in the files of another number of ranks."""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ckpt_tool import api
from ckpt_tool.errors import CkptToolError, MismatchError, UsageError
from tests import synthetic
from tests.conftest import (
    DEEPSPEED,
    ZERO3,
    canonical_key,
    checkpoint_of,
    copy_fixture,
    raw,
    run_cli,
    tree,
    values_of,
)
from tests.synthetic import Layer, Save, uniform

TAG = "global_step2"
MODEL, OPTIM = "zero_pp_rank_{}_mp_rank_00_model_states.pt", "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
MANIFEST = "ckpt_tool_manifest.json"

# (world, ep) that each fixture is taken to; experts are 4, 6 or none.
TOPOLOGIES = {
    4: [(1, 1), (2, 2), (6, 2), (4, 4)],
    6: [(1, 1), (3, 3), (4, 1), (12, 6)],
    0: [(1, 0), (2, 0), (5, 0)],
}
EVERY = [
    (name, topology)
    for name in ZERO3
    for topology in TOPOLOGIES[0 if "dense" in name else 6 if "odd" in name else 4]
]
each_topology = pytest.mark.parametrize(("name", "topology"), EVERY)


def reshard(
    source: Path, target: Path, topology: tuple[int, int] | None = None, **options: Any
) -> api.Result:
    world, ep = topology or (None, None)
    return api.reshard(
        source, target, world=world, ep=ep or None, how=api.Execution(fsync=False), **options
    )


# ---- saved files, compared without the code under test


def load(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def saved_files(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / TAG).glob("*.pt"))


def differences(
    a: Any, b: Any, path: str = "", *, values: bool = True, ignored: frozenset[str] = frozenset()
) -> list[str]:
    """Where two saved objects differ: in types, keys, their order, shapes, attributes or values; ``values``
    False looks at no element of a tensor; ``ignored`` are paths as they are reported."""
    if path in ignored:
        return []
    options: dict[str, Any] = {"values": values, "ignored": ignored}
    if type(a) is not type(b):
        return [f"{path}: {type(a)} and {type(b)}"]
    if isinstance(a, torch.Tensor):
        form = [(t.shape, t.dtype, t.requires_grad, t.storage_offset(), vars(t)) for t in (a, b)]
        if form[0] != form[1]:
            return [f"{path}: {form[0]} and {form[1]}"]
        return [f"{path}: values"] if values and raw(a) != raw(b) else []
    if isinstance(a, dict):
        found = [] if list(a) == list(b) else [f"{path}: keys {list(a)} and {list(b)}"]
        for key in [key for key in a if key in b]:
            found += differences(a[key], b[key], f"{path}/{key}".lstrip("/"), **options)
        return found
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{path}: {len(a)} and {len(b)} entries"]
        items = enumerate(zip(a, b, strict=True))
        return [line for i, (x, y) in items for line in differences(x, y, f"{path}[{i}]", **options)]
    if hasattr(a, "__dict__") and not isinstance(a, int | float):
        return differences(vars(a), vars(b), f"{path}.__dict__", **options)
    return [] if a == b else [f"{path}: {a!r} and {b!r}"]


def rank_files(directory: Path, rank: int) -> tuple[Any, Any]:
    """The two objects a rank saved."""
    tag = directory / TAG
    (optim,) = tag.glob("*" + OPTIM.format(rank))
    return load(tag / MODEL.format(rank)), load(optim)


def world_of(directory: Path) -> int:
    return len(list((directory / TAG).glob("*_model_states.pt")))


def without_padding(model: Any, optim: Any, rank: int) -> tuple[Any, Any]:
    """Both objects with zeros where a partition ends before its room does."""
    zero = optim["optimizer_state_dict"]
    world = model["dp_world_size"]
    cuts = zero.get("ds_zero_partition_groups")
    for i, shapes in enumerate(model["param_shapes"]):
        count, own = (cuts[i]["partition_count"], cuts[i]["partition_rank"]) if cuts else (world, rank)
        flats = [zero["fp32_flat_groups"][i].data]
        if "optimizer_state_dict" in zero:
            flats += [
                v
                for v in zero["optimizer_state_dict"]["state"][i].values()
                if torch.is_tensor(v) and v.ndim
            ]
        offset = 0
        for shape in shapes.values():
            size, real = share(math.prod(shape), count, own)
            for flat in flats:
                flat[offset + real : offset + size] = 0
            offset += size
    for name, fragment in model["frozen_param_fragments"].items():
        _, real = share(math.prod(model["frozen_param_shapes"][name]), world, rank)
        fragment[real:] = 0
    return model, optim


def share(numel: int, count: int, own: int) -> tuple[int, int]:
    """(room, elements in it) of one partition."""
    size = -(-numel // count)
    return size, max(0, min(size, numel - own * size))


# ---- there and back


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    """Each fixture at each topology."""
    root = tmp_path_factory.mktemp("there")
    found = {}
    for name, topology in EVERY:
        target = root / "{}_w{}e{}".format(name, *topology)
        reshard(checkpoint_of(name), target, topology)
        found[name, topology] = target
    return found


@each_topology
def test_there_and_back_gives_the_sources_files(
    name: str, topology: tuple[int, int], there: dict[Any, Path], tmp_path: Path
) -> None:
    """Every key, type, shape, attribute and bit; only paddings, which the engine leaves as memory was."""
    source = checkpoint_of(name)
    topology_of = api.catalogue(source).topology
    back = tmp_path / "back"
    reshard(there[name, topology], back, (topology_of.world_size or 0, topology_of.ep_size or 0))
    assert saved_files(back) == saved_files(source)
    for rank in range(world_of(source)):
        before = without_padding(*rank_files(source, rank), rank)
        after = without_padding(*rank_files(back, rank), rank)
        assert differences(before, after) == []
    assert (back / "latest").read_bytes() == (source / "latest").read_bytes()


@each_topology
def test_every_value_and_step_is_the_sources(
    name: str, topology: tuple[int, int], there: dict[Any, Path]
) -> None:
    before, after = api.catalogue(checkpoint_of(name)), api.catalogue(there[name, topology])
    assert values_of(after) == values_of(before)
    assert after.scalars == before.scalars
    assert (after.topology.world_size, after.topology.ep_size or 0) == topology


@each_topology
def test_simple_reader_finds_what_the_engine_held(
    name: str, topology: tuple[int, int], there: dict[Any, Path]
) -> None:
    """Independent of our reader: the files alone, against the tensors the engine gathered."""
    found = synthetic.reference(there[name, topology] / TAG)
    for state in synthetic.STATES:
        oracle = load_file(DEEPSPEED / name / "oracle" / f"{state}.safetensors")
        assert {key for key, own in found if own == state} == oracle.keys()
        for parameter, tensor in oracle.items():
            assert raw(found[parameter, state]) == raw(tensor), (parameter, state)


@each_topology
def test_paddings_are_zero(name: str, topology: tuple[int, int], there: dict[Any, Path]) -> None:
    """The engine leaves stale memory in them, which would make two conversions differ."""
    for rank in range(topology[0]):
        as_written = rank_files(there[name, topology], rank)
        assert (
            differences(as_written, without_padding(*rank_files(there[name, topology], rank), rank)) == []
        )


def test_same_topology_gives_the_sources_files(zero3_fixture: str, tmp_path: Path) -> None:
    source = checkpoint_of(zero3_fixture)
    reshard(source, tmp_path / "same")
    for rank in range(world_of(source)):
        before = without_padding(*rank_files(source, rank), rank)
        assert differences(before, rank_files(tmp_path / "same", rank)) == []


placements = st.sampled_from([1, 2, 3, 6])


@settings(max_examples=15)
@given(st.integers(0, 10**6), placements, st.integers(1, 3), placements, st.integers(1, 3), st.booleans())
def test_any_source_placement_becomes_a_uniform_one_with_every_bit(
    seed: int, ep: int, edp: int, new_ep: int, new_edp: int, data_first: bool
) -> None:
    """Experts in any order, unevenly, on several EP ranks: the target is the engine's own placement."""
    chance = random.Random(seed)
    layers = [
        Layer(number, synthetic.random_placement(6, ep, chance, replicas=chance.random() < 0.3), hidden=5)
        for number in (1, 4)
    ]
    full = synthetic.model(
        {"a.weight": (7, 3), "b.bias": (5,)}, layers, seed=seed, frozen={"f.weight": (11,)}
    )
    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory, "source"), Path(directory, "target")
        synthetic.write(source, full, Save(world=ep * edp, data_before_expert=data_first))
        reshard(source, target, (new_ep * new_edp, new_ep))
        found = synthetic.reference(target / TAG)
        wanted = {(n, s): t for n, states in full.parameters.items() for s, t in states.items()}
        assert {key: raw(t) for key, t in found.items()} == {key: raw(t) for key, t in wanted.items()}
        uniform_layers = {layer.module: [list(ids) for ids in uniform(6, new_ep)] for layer in layers}
        for rank in range(new_ep * new_edp):
            model, _ = rank_files(target, rank)
            for entry in model["ds_autoep_layers"]:
                held = [one["experts"] for one in entry["expert_placement"]["ranks"]]
                assert held == uniform_layers[entry["module_path"]]


# ---- what stands in the files


def test_partition_groups_and_layer_entries_say_where_each_rank_stands(there: dict[Any, Path]) -> None:
    """w6e2 by default: EP ranks 0 1 0 1 0 1, three ranks share an EP rank's experts."""
    for rank in range(6):
        model, optim = rank_files(there["mixtral_w4e2", (6, 2)], rank)
        zero = optim["optimizer_state_dict"]
        dense, expert = zero["ds_zero_partition_groups"]
        assert dense == {
            "sub_group": 0,
            "partition_count": 6,
            "partition_rank": rank,
            "partition_ranks": list(range(6)),
            "families": ["replicated"],
            "group_names": ["replicated"],
        }
        assert expert == {
            "sub_group": 1,
            "partition_count": 3,
            "partition_rank": rank // 2,
            "partition_ranks": [rank % 2, rank % 2 + 2, rank % 2 + 4],
            "families": ["autoep_expert"],
            "group_names": ["ep_size_2"],
        }
        assert (zero["partition_count"], model["dp_world_size"]) == (6, 6)
        for entry in model["ds_autoep_layers"]:
            stated = [
                entry[key]
                for key in (
                    "ep_size", "ep_rank", "num_local_experts", "global_expert_start", "global_expert_end",
                    "expert_data_parallel_rank", "expert_data_parallel_world_size", "ep_group_name",
                )
            ]  # fmt: skip
            ep_rank = rank % 2
            assert stated == [2, ep_rank, 2, 2 * ep_rank, 2 * ep_rank + 2, rank // 2, 3, "ep_size_2"]
        assert model["ds_config"]["expert_parallel"]["autoep_size"] == 2
        names = [g["name"] for g in zero["optimizer_state_dict"]["param_groups"]]
        assert names == ["dense-params", "ep_size_2"]
        assert model["universal_checkpoint_info"]["ds_autoep_layers"] == model["ds_autoep_layers"]


def test_order_of_data_before_expert_ranks_is_kept(there: dict[Any, Path]) -> None:
    """Ranks 0, 1, 2 hold EP rank 0's experts, 3, 4, 5 those of EP rank 1."""
    ranks = [rank_files(there["mixtral_dbe_w4e2", (6, 2)], rank) for rank in range(6)]
    assert [model["ds_autoep_layers"][0]["ep_rank"] for model, _ in ranks] == [0, 0, 0, 1, 1, 1]
    cuts = [optim["optimizer_state_dict"]["ds_zero_partition_groups"][1] for _, optim in ranks]
    assert [cut["partition_ranks"] for cut in cuts] == [[0, 1, 2]] * 3 + [[3, 4, 5]] * 3
    assert [cut["partition_rank"] for cut in cuts] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("topology", TOPOLOGIES[4])
def test_frozen_parameters_are_cut_anew_over_the_world(
    topology: tuple[int, int], there: dict[Any, Path]
) -> None:
    oracle = load_file(DEEPSPEED / "mixtral_frozen_w2e1" / "oracle" / "frozen.safetensors")
    ranks = [rank_files(there["mixtral_frozen_w2e1", topology], rank)[0] for rank in range(topology[0])]
    assert list(ranks[0]["frozen_param_shapes"]) == list(ranks[0]["frozen_param_fragments"]) == list(oracle)
    for name, tensor in oracle.items():
        parts = [model["frozen_param_fragments"][name] for model in ranks]
        assert {len(part) for part in parts} == {-(-tensor.numel() // topology[0])}
        assert raw(torch.cat(parts)[: tensor.numel()]) == raw(tensor)


@pytest.mark.parametrize("topology", TOPOLOGIES[4])
def test_tied_weights_are_named_in_rank_0s_file_alone(
    topology: tuple[int, int], there: dict[Any, Path]
) -> None:
    for rank in range(topology[0]):
        model, _ = rank_files(there["qwen3_moe_w2e2_tied", topology], rank)
        expected = {"lm_head.weight": "model.embed_tokens.weight"} if rank == 0 else {}
        assert model["shared_params"] == expected


def test_buffers_stand_whole_in_every_ranks_file(there: dict[Any, Path]) -> None:
    oracle = load_file(DEEPSPEED / "deepseek_v3_w2e2" / "oracle" / "buffers.safetensors")
    assert oracle
    for rank in range(6):
        model, _ = rank_files(there["deepseek_v3_w2e2", (6, 2)], rank)
        assert {name: raw(model["module"][name]) for name in oracle} == {
            n: raw(t) for n, t in oracle.items()
        }


def test_bf16_engines_files_keep_their_names_and_types(there: dict[Any, Path]) -> None:
    directory = there["mixtral_bf16_w2e2", (6, 2)]
    assert saved_files(directory) == sorted(
        [f"bf16_{OPTIM}".format(rank) for rank in range(6)] + [MODEL.format(rank) for rank in range(6)]
    )
    model, optim = rank_files(directory, 0)
    kept = {name: value.dtype for name, value in model["module"].items()}
    assert set(kept.values()) == {torch.bfloat16}
    assert {flat.dtype for flat in optim["optimizer_state_dict"]["fp32_flat_groups"]} == {torch.float32}


def test_dynamic_loss_scale_of_an_fp16_run_goes_with_it(there: dict[Any, Path]) -> None:
    _, source = rank_files(checkpoint_of("mixtral_fp16_w2e1"), 0)
    _, optim = rank_files(there["mixtral_fp16_w2e1", (6, 2)], 5)
    before, after = source["optimizer_state_dict"], optim["optimizer_state_dict"]
    assert type(after["loss_scaler"]).__name__ == "DynamicLossScaler"
    assert vars(after["loss_scaler"]) == vars(before["loss_scaler"])
    assert after["dynamic_loss_scale"] is True


def test_every_tensor_of_a_file_has_its_own_storage(there: dict[Any, Path]) -> None:
    """Shared ones would be counted up together by torch's optimizers."""
    _, optim = rank_files(there["mixtral_odd_w4e2", (4, 1)], 1)
    zero = optim["optimizer_state_dict"]
    held = list(zero["fp32_flat_groups"])
    for state in zero["optimizer_state_dict"]["state"].values():
        held += [state["step"], state["exp_avg"], state["exp_avg_sq"]]
    assert len(held) >= 20
    assert len({tensor.untyped_storage().data_ptr() for tensor in held}) == len(held)
    assert {tensor.storage_offset() for tensor in held} == {0}


# ---- client state


def client(rank: int) -> Mapping[str, Any]:
    return {
        "epoch": 3,
        "ema": {"a": torch.arange(7.0), "rest": [torch.arange(3)]},
        "rng": torch.tensor([rank, 99]),
        "seen": rank * 8,
    }


@pytest.fixture
def with_client_state(tmp_path: Path) -> Path:
    full = synthetic.model({"a.weight": (7, 3)}, [Layer(0, uniform(4, 2))])
    synthetic.write(tmp_path / "source", full, Save(world=4, client=client))
    return tmp_path / "source"


def test_client_state_equal_on_all_ranks_is_on_all_new_ranks(
    with_client_state: Path, tmp_path: Path
) -> None:
    reshard(with_client_state, tmp_path / "out", (2, 1))
    for rank in range(2):
        model, _ = rank_files(tmp_path / "out", rank)
        assert model["epoch"] == 3
        assert raw(model["ema"]["a"]) == raw(torch.arange(7.0))
        assert raw(model["ema"]["rest"][0]) == raw(torch.arange(3))


def test_client_state_that_differs_between_ranks_is_left_out_and_named(
    with_client_state: Path, tmp_path: Path
) -> None:
    result = reshard(with_client_state, tmp_path / "out", (2, 1))
    (note,) = [note for note in result.notes if "differs between ranks" in note]
    assert "rng, seen" in note
    assert "left out on all ranks" in note
    for rank in range(2):
        model, _ = rank_files(tmp_path / "out", rank)
        assert not {"rng", "seen"} & model.keys()


# ---- weights only


def test_weights_only_files_hold_the_masters_and_nothing_of_the_optimizer(tmp_path: Path) -> None:
    """The smallest form that load_module_only and load_optimizer_states=False take."""
    result = reshard(checkpoint_of("mixtral_w4e2"), tmp_path / "light", (2, 2), weights_only=True)
    reshard(checkpoint_of("mixtral_w4e2"), tmp_path / "full", (2, 2))
    for rank in range(2):
        model, optim = rank_files(tmp_path / "light", rank)
        full_model, full_optim = rank_files(tmp_path / "full", rank)
        zero, full = optim["optimizer_state_dict"], full_optim["optimizer_state_dict"]
        assert set(full) - set(zero) == {"optimizer_state_dict"}
        assert zero["ds_zero_partition_groups"] == full["ds_zero_partition_groups"]
        assert differences(zero["fp32_flat_groups"], full["fp32_flat_groups"]) == []
        assert differences(model, full_model) == []
    light, full_size = (
        sum(len(data) for name, data in tree(tmp_path / kind).items() if "optim" in name)
        for kind in ("light", "full")
    )
    assert light < full_size / 2
    assert any("exp_avg" in label for label in result.left_out)
    assert not any("master" in label for label in result.left_out)


def test_weights_only_result_is_verified(tmp_path: Path) -> None:
    result = reshard(
        checkpoint_of("mixtral_w4e2"), tmp_path / "out", (2, 2), weights_only=True, verify=True
    )
    assert result.verdict is not None
    assert result.verdict.passed


# ---- refusals


def refused(kind: type[CkptToolError], source: Path, target: Path, **options: Any) -> str:
    with pytest.raises(kind) as error:
        api.reshard(source, target, **options)
    assert not target.exists()
    assert not list(target.parent.glob(f".{target.name}*")), "something was left behind"
    return str(error.value)


def test_ep_that_does_not_divide_the_experts_is_refused_with_those_that_do(tmp_path: Path) -> None:
    message = refused(UsageError, checkpoint_of("mixtral_odd_w4e2"), tmp_path / "out", ep=4, world=12)
    assert "--ep 4 does not divide the 6 experts" in message
    assert "1, 2, 3, 6" in message


def test_world_that_is_no_multiple_of_ep_is_refused_with_sizes_that_are(tmp_path: Path) -> None:
    message = refused(UsageError, checkpoint_of("mixtral_w4e2"), tmp_path / "out", ep=4, world=6)
    assert "--world 6 is not a multiple of --ep 4" in message
    assert "4, 8" in message
    assert "1, 2" in message


def test_ep_on_a_plain_checkpoint_is_refused(tmp_path: Path) -> None:
    message = refused(UsageError, checkpoint_of("dense_w3"), tmp_path / "out", ep=2, world=2)
    assert "--ep 2: the checkpoint has no experts" in message


def test_dtype_of_a_zero3_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"masters and moments in fp32.*--dtype"):
        api.convert(checkpoint_of("mixtral_w4e2"), tmp_path / "out", to="zero3", dtype="bf16")


def edited(name: str, tmp_path: Path, edit: Callable[[Any, int], None]) -> Path:
    """A copy of a fixture with every rank's optimizer state edited; returns the checkpoint."""
    tag = copy_fixture(name, tmp_path)
    for rank in range(world_of(tag.parent)):
        path = tag / OPTIM.format(rank)
        saved = load(path)
        edit(saved["optimizer_state_dict"]["optimizer_state_dict"], rank)
        torch.save(saved, path)
    return tag.parent


def test_steps_that_disagree_within_a_sub_group_of_the_target_are_refused_by_name(tmp_path: Path) -> None:
    """Small partitions: what were two sub-groups at w4e2 is one at w12e2."""

    def one_step_more(optimizer: Any, rank: int) -> None:
        optimizer["state"][0]["step"] += 1

    source = edited("mixtral_odd_w4e2", tmp_path, one_step_more)
    message = refused(MismatchError, source, tmp_path / "out", ep=2, world=12)
    assert "has step 2.0" in message
    assert "has 3.0" in message
    assert "model.embed_tokens.weight" in message
    reshard(source, tmp_path / "same")  # where they stay apart, each keeps its own
    _, optim = rank_files(tmp_path / "same", 3)
    steps = [
        state["step"].item()
        for state in optim["optimizer_state_dict"]["optimizer_state_dict"]["state"].values()
    ]
    assert steps == [3.0] + [2.0] * (len(steps) - 1)


def test_a_source_without_parameter_groups_is_refused_and_like_helps(tmp_path: Path) -> None:
    def no_groups(optimizer: Any, rank: int) -> None:
        optimizer["param_groups"] = []

    source = edited("mixtral_w4e2", tmp_path, no_groups)
    message = refused(UsageError, source, tmp_path / "out", ep=2, world=2)
    assert "does not say how the run grouped its parameters" in message
    assert "--like" in message
    reshard(checkpoint_of("mixtral_w4e2"), tmp_path / "template", (2, 2))
    reshard(source, tmp_path / "out", like=tmp_path / "template")
    for rank in range(2):
        assert (
            differences(rank_files(tmp_path / "out", rank), rank_files(tmp_path / "template", rank)) == []
        )


def test_a_format_without_ranks_is_refused(tmp_path: Path) -> None:
    api.convert(checkpoint_of("mixtral_w4e2"), tmp_path / "universal", to="universal")
    message = refused(UsageError, tmp_path / "universal", tmp_path / "out", world=2)
    assert "convert --to" in message


# ---- a template


def test_like_fills_the_templates_files_with_the_sources_values(tmp_path: Path) -> None:
    """The fixture w2e1 is a run of the same model at another topology: as if it was saved at the target."""
    source, template = checkpoint_of("mixtral_w4e2"), checkpoint_of("mixtral_w2e1")
    reshard(source, tmp_path / "out", like=template)
    reshard(source, tmp_path / "computed", (2, 1))
    for rank in range(2):
        mine, computed = rank_files(tmp_path / "out", rank), rank_files(tmp_path / "computed", rank)
        ignored = frozenset(
            {"[0]/ds_config/train_micro_batch_size_per_gpu", "[1]/ds_config/train_micro_batch_size_per_gpu"}
        )
        assert differences(mine, computed, ignored=ignored) == []
        assert differences(mine, rank_files(template, rank), values=False) == []
    assert values_of(api.catalogue(tmp_path / "out")) == values_of(api.catalogue(source))


def test_like_takes_counters_scheduler_and_client_state_from_the_source(tmp_path: Path) -> None:
    template = copy_fixture("mixtral_odd_w4e2", tmp_path)
    for rank in range(4):
        path = template / MODEL.format(rank)
        saved = load(path) | {"global_steps": 0, "global_samples": 0, "note": "template", "step": 0}
        saved["lr_scheduler"] = {"last_batch_iteration": -1}
        torch.save(saved, path)
    reshard(checkpoint_of("mixtral_odd_w4e2"), tmp_path / "out", like=template)
    model, _ = rank_files(tmp_path / "out", 3)
    assert (model["global_steps"], model["global_samples"], model["note"], model["step"]) == (
        2,
        48,
        "hello",
        2,
    )
    assert model["lr_scheduler"] == {"last_batch_iteration": 1}


def test_like_at_another_topology_than_its_own_has_that_topologys_groups(tmp_path: Path) -> None:
    reshard(checkpoint_of("mixtral_w4e2"), tmp_path / "computed", (4, 4))
    try:
        reshard(checkpoint_of("mixtral_w4e2"), tmp_path / "out", (4, 4), like=checkpoint_of("mixtral_w2e1"))
    except UsageError:
        return
    for rank in range(4):
        _, mine = rank_files(tmp_path / "out", rank)
        _, computed = rank_files(tmp_path / "computed", rank)
        inner = [
            one["optimizer_state_dict"]["optimizer_state_dict"]["param_groups"] for one in (mine, computed)
        ]
        assert inner[0] == inner[1]


def test_like_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    message = refused(
        CkptToolError,
        checkpoint_of("mixtral_w4e2"),
        tmp_path / "out",
        like=checkpoint_of("deepseek_v2_w2e2"),
    )
    assert "is of another model: model.embed_tokens.weight" in message


@pytest.mark.parametrize(
    ("source", "like"),
    [("mixtral_w4e2", "mixtral_odd_w4e2"), ("mixtral_odd_w4e2", "mixtral_w4e2")],
)
@pytest.mark.parametrize("to", ["zero3", "zero2"])
def test_like_of_another_size_is_refused_with_both_shapes(
    source: str, like: str, to: str, tmp_path: Path
) -> None:
    template = checkpoint_of(like)
    if to == "zero2":
        api.convert(template, tmp_path / "template", to="zero2")
        template = tmp_path / "template"
    with pytest.raises(MismatchError, match=r"another model: .* has shape \[.*\] there and \[.*\] in"):
        api.convert(checkpoint_of(source), tmp_path / "out", to=to, like=template)
    assert not (tmp_path / "out").exists()


def test_like_that_has_no_ranks_contradicts_none(tmp_path: Path) -> None:
    """A Universal checkpoint is of no topology; it is no template for one, or one for any."""
    source, like = checkpoint_of("mixtral_w4e2"), tmp_path / "universal"
    api.convert(source, like, to="universal")
    try:
        reshard(source, tmp_path / "out", (2, 2), like=like)
    except UsageError as error:
        message = str(error)
    else:
        message = ""
        assert values_of(api.catalogue(tmp_path / "out")) == values_of(api.catalogue(source))
    assert "None" not in message


# ---- the command


def test_dry_run_says_what_would_be_written_and_writes_nothing(tmp_path: Path) -> None:
    planned = reshard(checkpoint_of("mixtral_w4e2"), tmp_path / "out", (6, 2), dry_run=True)
    assert not list(tmp_path.iterdir())
    done = reshard(checkpoint_of("mixtral_w4e2"), tmp_path / "out", (6, 2))
    written = {name: data for name, data in tree(tmp_path / "out").items() if name != MANIFEST}
    assert planned.files == done.files == len(written) == 2 * 6 + 1
    assert planned.bytes_written == done.bytes_written == sum(map(len, written.values()))


def test_each_source_byte_is_read_at_most_once(zero3_fixture: str, tmp_path: Path) -> None:
    topology = (1, 1) if "dense" not in zero3_fixture else (1, 0)
    result = reshard(checkpoint_of(zero3_fixture), tmp_path / "out", topology, dry_run=True)
    checkpoint = api.catalogue(checkpoint_of(zero3_fixture))
    assert result.bytes_read <= sum(tensor.nbytes for tensor in checkpoint.tensors)


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    """Whatever the threads, the memory, and the paddings of the source."""
    source = copy_fixture("mixtral_odd_w4e2", tmp_path).parent
    reshard(source, tmp_path / "a", (3, 3))
    how = api.Execution(max_memory=32 << 20, workers=5, fsync=False)
    api.reshard(source, tmp_path / "b", world=3, ep=3, how=how)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_bytes_do_not_depend_on_the_sources_paddings(tmp_path: Path) -> None:
    full = synthetic.model({"a.weight": (7, 3), "b": (5,)}, [Layer(0, uniform(4, 2))], frozen={"f": (3,)})
    for name, padding in (("one", math.nan), ("other", 17.0)):
        synthetic.write(tmp_path / name, full, Save(world=4, padding=padding))
        reshard(tmp_path / name, tmp_path / f"{name}_out", (2, 2))
    one, other = (tree(tmp_path / name / TAG) for name in ("one_out", "other_out"))
    assert one == other


def test_manifest_names_source_parameters_and_every_file(tmp_path: Path) -> None:
    reshard(checkpoint_of("mixtral_w4e2"), tmp_path / "out", (2, 1))
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["source"]["format"] == "deepspeed-zero3"
    assert manifest["source"]["step"] == 2
    assert {key: manifest["parameters"][key] for key in ("to", "ep", "world")} == {
        "to": "zero3",
        "ep": 1,
        "world": 2,
    }
    written = {name: len(data) for name, data in tree(tmp_path / "out").items() if name != MANIFEST}
    assert {file["path"]: file["size"] for file in manifest["files"]} == written
    assert str(tmp_path) not in json.dumps(manifest)


def test_result_is_verified_against_the_source_and_by_its_manifest(tmp_path: Path) -> None:
    result = reshard(checkpoint_of("mixtral_w4e2"), tmp_path / "out", (2, 1), verify=True)
    assert result.verdict is not None
    assert result.verdict.passed
    assert api.verify(tmp_path / "out").passed
    assert api.verify(checkpoint_of("mixtral_w4e2"), tmp_path / "out").passed


def test_command_line_reshards(tmp_path: Path) -> None:
    done = run_cli("reshard", checkpoint_of("mixtral_w4e2"), tmp_path / "cli", "--world", "2", "--ep", "1")
    assert done.rc == 0, done.stderr
    reshard(checkpoint_of("mixtral_w4e2"), tmp_path / "api", (2, 1))
    assert tree(tmp_path / "cli" / TAG) == tree(tmp_path / "api" / TAG)


def test_command_line_refuses_with_exit_code_2_and_one_line(tmp_path: Path) -> None:
    done = run_cli("reshard", checkpoint_of("mixtral_w4e2"), tmp_path / "out", "--world", "6", "--ep", "4")
    assert done.rc == 2
    assert "Traceback" not in done.stderr
    assert "--world 6 is not a multiple of --ep 4" in done.stdout + done.stderr


def test_names_of_the_catalogue_are_the_engines_own(there: dict[Any, Path]) -> None:
    """Whatever the topology, parameters have the names and the order they had."""
    before = api.catalogue(checkpoint_of("mixtral_w4e2"))
    after = api.catalogue(there["mixtral_w4e2", (6, 2)])
    assert [t.label() for t in after.tensors] == [t.label() for t in before.tensors]
    shapes = rank_files(there["mixtral_w4e2", (6, 2)], 0)[0]["param_shapes"]
    source = rank_files(checkpoint_of("mixtral_w4e2"), 0)[0]["param_shapes"]
    assert [list(group) for group in shapes] == [list(group) for group in source]
    assert {canonical_key(name) for group in shapes for name in group} == {
        tensor.name for tensor in after.tensors if tensor.state == "master"
    }


@pytest.mark.parametrize("world", [1, 2, 5])
def test_parameters_without_elements_stay(world: int, tmp_path: Path) -> None:
    full = synthetic.model({"a.weight": (7, 3), "a.none": (0, 3)}, frozen={"b.none": (2, 0)})
    synthetic.write(tmp_path / "source", full, Save(world=3))
    reshard(tmp_path / "source", tmp_path / "target", (world, 0))
    found = synthetic.reference(tmp_path / "target" / TAG)
    assert {name: tuple(t.shape) for (name, state), t in found.items() if state == "fp32"} == {
        "a.weight": (7, 3),
        "a.none": (0, 3),
    }
    model, _ = rank_files(tmp_path / "target", world - 1)
    assert dict(model["frozen_param_shapes"]) == {"b.none": torch.Size([2, 0])}
