"""verify: every difference is found and named, by tensor, index and both files, whatever the formats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tool import api
from ckpt_tool.canonical import DType, Tensor
from ckpt_tool.errors import CkptToolError, UsageError
from tests import synthetic
from tests.conftest import ZERO3, canonical_key, checkpoint_of, config_of, copy_fixture, raw
from tests.formats.dcp_tools import CHECKPOINTS
from tests.synthetic import Layer, Model, Save, uniform

LAYER = Layer(0, uniform(4, 2), 3, 5)
DENSE = {"model.embed_tokens.weight": (7, 3), "model.norm.weight": (3,)}


def made(directory: Path, full: Model | None = None, save: Save | None = None) -> Path:
    full = full or synthetic.model(DENSE, [LAYER])
    return synthetic.write(directory, full, save or Save(world=4))


def optim(tag: Path, rank: int) -> Path:
    return tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def flat(content: Any, sub_group: int, state: str) -> torch.Tensor:
    zero = content["optimizer_state_dict"]
    if state == "fp32":
        return zero["fp32_flat_groups"][sub_group].detach()  # type: ignore[no-any-return]
    return zero["optimizer_state_dict"]["state"][sub_group][state]  # type: ignore[no-any-return]


def flip(tag: Path, rank: int, sub_group: int, state: str, index: int, bit: int = 0) -> None:
    edit(
        optim(tag, rank),
        lambda content: flat(content, sub_group, state).view(torch.int32)[index].bitwise_xor_(1 << bit),
    )


# ---- equal


@pytest.mark.parametrize("name", ZERO3)
def test_a_checkpoint_equals_itself_and_is_sound(name: str) -> None:
    verdict = api.verify(checkpoint_of(name), checkpoint_of(name))
    assert verdict.passed
    assert verdict.bytes_compared == sum(t.nbytes for t in api.catalogue(checkpoint_of(name)).tensors)
    assert api.verify(checkpoint_of(name)).passed


@pytest.mark.parametrize("name", ZERO3)
def test_a_universal_checkpoint_equals_its_source(name: str, tmp_path: Path) -> None:
    api.convert(checkpoint_of(name), tmp_path / "out", to="universal")
    for pair in (
        (checkpoint_of(name), tmp_path / "out"),
        (tmp_path / "out", checkpoint_of(name)),
    ):
        verdict = api.verify(*pair)
        assert verdict.passed, verdict.differences[:3]
        assert verdict.tensors == len(api.catalogue(checkpoint_of(name)).tensors)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ZERO3)
def test_published_weights_equal_the_masters_they_were_rounded_from(
    name: str, dtype: str, tmp_path: Path
) -> None:
    result = api.consolidate(
        checkpoint_of(name), tmp_path / "out", config=config_of(name), dtype=dtype, verify=True
    )
    assert result.verdict is not None
    assert result.verdict.passed
    verdict = api.verify(checkpoint_of(name), tmp_path / "out")
    assert verdict.passed, verdict.differences[:3]
    assert any("exp_avg" in note for note in verdict.notes), "it does not say what was not compared"


TOPOLOGIES = {
    "one rank": Save(world=1),
    "eight ranks": Save(world=8),
    "data before experts": Save(world=4, data_before_expert=True),
    "other sub-groups": Save(
        world=2,
        groups=[
            [["model.norm.weight"], ["model.embed_tokens.weight", f"{LAYER.module}.router.gate.weight"]],
            [[f"{LAYER.module}.experts.{w}"] for w in ("w3", "w1", "w2")],
        ],
    ),
}


PLACEMENTS = (uniform(4, 1), uniform(4, 4), ((3,), (0, 2, 1)), ((0, 1, 2, 3), ()))


@pytest.mark.parametrize(
    ("save", "placement"),
    [
        pytest.param(save, placement, id=f"{name} {placement}")
        for name, save in TOPOLOGIES.items()
        for placement in PLACEMENTS
        if not save.world % len(placement)
    ],
)
def test_one_model_is_equal_at_any_topology_and_placement(
    save: Save, placement: synthetic.Placement, tmp_path: Path
) -> None:
    full = synthetic.model(DENSE, [LAYER])
    other = Model(full.parameters, (Layer(0, placement, 3, 5),))
    verdict = api.verify(made(tmp_path / "a", full), made(tmp_path / "b", other, save))
    assert verdict.passed, verdict.differences[:3]


def test_padding_is_not_compared(tmp_path: Path) -> None:
    full = synthetic.model({"a": (5,), "b": (3, 3)}, [LAYER])
    one = made(tmp_path / "a", full, Save(world=4))
    other = made(tmp_path / "b", full, Save(world=4, padding=1.0))
    assert api.verify(one, other).passed


# ---- one flipped bit


@pytest.mark.parametrize("bit", [0, 31])
@pytest.mark.parametrize("state", ["fp32", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize(("rank", "sub_group"), [(0, 0), (3, 0), (1, 1), (2, 1)])
def test_one_flipped_bit_is_named_with_its_index_and_both_files(
    rank: int, sub_group: int, state: str, bit: int, tmp_path: Path
) -> None:
    tag = copy_fixture("mixtral_w4e2", tmp_path)
    flip(tag, rank, sub_group, state, 11, bit)
    oracle_file = checkpoint_of("mixtral_w4e2").parent / "oracle" / f"{state}.safetensors"
    damaged = synthetic.reference(tag)
    differing = [
        (name, (damaged[name, state].view(torch.int32) != value.view(torch.int32)).reshape(-1).nonzero())
        for name, value in load_file(oracle_file).items()
        if raw(damaged[name, state]) != raw(value)
    ]
    ((name, indices),) = differing
    for pair in ((checkpoint_of("mixtral_w4e2"), tag), (tag, checkpoint_of("mixtral_w4e2"))):
        verdict = api.verify(*pair)
        (difference,) = verdict.differences
        assert (difference.kind, difference.name) == ("value", str(canonical_key(name)))
        assert f"(flat index {int(indices[0])})" in difference.message
        assert f"[{'master' if state == 'fp32' else state}]" in difference.message
        assert difference.message.count(optim(tag, rank).name) == 2


def test_the_first_of_several_differences_is_named_for_each_tensor(tmp_path: Path) -> None:
    full = synthetic.model({"a": (100,), "b": (100,)})
    one = made(tmp_path / "a", full, Save(world=1))
    other = made(tmp_path / "b", full, Save(world=1))
    for index in (150, 70, 99, 20):
        flip(other, 0, 0, "fp32", index)
    verdict = api.verify(one, other, how=api.Execution(workers=4))
    assert [(d.name, d.message.split("(flat ")[1]) for d in verdict.differences] == [
        ("a", "index 20)"),
        ("b", "index 50)"),
    ]


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (0x7FC00000, 0x7FC00000, True),
        (0x7FC00000, 0x7FC00001, False),
        (0x7FC00000, -4194304, False),
        (0, -(2**31), False),
        (0x7F800000, 0x7F800000, True),
        (1, 1, True),
        (1, 2, False),
    ],
    ids=["one NaN", "NaN payloads", "NaN signs", "0 and -0", "inf", "a subnormal", "subnormals"],
)
def test_bits_are_compared_and_not_values(one: int, other: int, equal: bool, tmp_path: Path) -> None:
    def model_of(bits: int) -> Model:
        full = synthetic.model({"a": (4,)})
        full.parameters["a"]["exp_avg"] = torch.tensor([0, 0, bits, 0], dtype=torch.int32).view(
            torch.float32
        )
        return full

    verdict = api.verify(
        made(tmp_path / "a", model_of(one), Save(world=2)),
        made(tmp_path / "b", model_of(other), Save(world=2)),
    )
    assert verdict.passed is equal
    if not equal:
        assert "a [exp_avg] at [2] differs" in verdict.differences[0].message


def test_a_flipped_bit_in_a_frozen_parameter_and_a_buffer(tmp_path: Path) -> None:
    full = synthetic.model({"a": (4,)}, frozen={"f": (5,)}, buffers={"b": (3,)})
    one = made(tmp_path / "a", full, Save(world=1))
    full.frozen["f"].view(torch.int32)[4] ^= 1
    full.buffers["b"].view(torch.int32)[2] ^= 1
    verdict = api.verify(one, made(tmp_path / "b", full, Save(world=1)))
    assert [difference.name for difference in verdict.differences] == ["b", "f"]
    assert "f [weight] at [4]" in verdict.differences[1].message


def test_a_difference_between_topologies_names_both_files(tmp_path: Path) -> None:
    full = synthetic.model(DENSE, [LAYER])
    one, other = made(tmp_path / "a", full, Save(world=4)), made(tmp_path / "b", full, Save(world=2))
    flip(other, 1, 1, "exp_avg", 0)  # the first element of EP rank 1's first expert, number 2
    (difference,) = api.verify(one, other).differences
    assert "experts.2.gate.weight [exp_avg] at [0, 0]" in difference.message
    assert "the first in zero_pp_rank_1_" in difference.message
    assert "the second in zero_pp_rank_1_" in difference.message


# ---- across formats


def test_a_flipped_bit_in_a_universal_file_is_named(tmp_path: Path) -> None:
    source = checkpoint_of("mixtral_w4e2")
    api.convert(source, tmp_path / "out", to="universal")
    name = "model.layers.1.mlp.experts.w3/exp_avg_sq.pt"
    path = tmp_path / "out" / "global_step2_universal" / "zero" / name
    edit(path, lambda content: content["param"].view(torch.int32)[3, 2, 1].bitwise_xor_(1))
    (difference,) = api.verify(source, tmp_path / "out").differences
    assert "model.layers.1.experts.3.up.weight [exp_avg_sq] at [2, 1]" in difference.message
    assert f"zero/{name}" in difference.message
    assert "zero_pp_rank_" in difference.message


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_flipped_bit_in_published_weights_is_named(dtype: str, tmp_path: Path) -> None:
    source, target = checkpoint_of("mixtral_w4e2"), tmp_path / "out"
    api.consolidate(source, target, config=config_of("mixtral_w4e2"), dtype=dtype)
    tensors = load_file(target / "model.safetensors")
    name = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    bits = torch.int32 if dtype == "fp32" else torch.int16
    tensors[name].view(bits)[4, 5] ^= 1
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    for pair in ((source, target), (target, source)):
        (difference,) = api.verify(*pair).differences
        assert "model.layers.0.experts.3.down.weight" in difference.message
        assert "[4, 5]" in difference.message
        assert "model.safetensors" in difference.message


def test_published_weights_of_two_dtypes_differ_in_dtype_and_are_not_equal_by_accident(
    tmp_path: Path,
) -> None:
    source, config = checkpoint_of("dense_w3"), config_of("dense_w3")
    for dtype in ("fp32", "bf16"):
        api.consolidate(source, tmp_path / dtype, config=config, dtype=dtype)
    assert api.verify(source, tmp_path / "bf16").passed
    tensors = load_file(tmp_path / "bf16" / "model.safetensors")
    widened = {name: tensor.float() for name, tensor in tensors.items()}
    save_file(widened, tmp_path / "bf16" / "model.safetensors", {"format": "pt"})
    verdict = api.verify(source, tmp_path / "bf16")
    assert not verdict.passed
    assert {difference.kind for difference in verdict.differences} == {"value"}


def test_published_names_need_a_config(tmp_path: Path) -> None:
    source = copy_fixture("mixtral_w2e1", tmp_path)
    api.consolidate(source, tmp_path / "out", config=config_of("mixtral_w2e1"))
    (tmp_path / "out" / "config.json").unlink()
    with pytest.raises(UsageError, match="--config"):
        api.verify(source, tmp_path / "out")
    for pair in ((source, tmp_path / "out"), (tmp_path / "out", source)):
        assert api.verify(*pair, config=config_of("mixtral_w2e1")).passed
    damaged = load_file(tmp_path / "out" / "model.safetensors")
    next(tensor for name, tensor in damaged.items() if "experts.3" in name)[0] += 1
    save_file(damaged, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    verdict = api.verify(source, tmp_path / "out", config=config_of("mixtral_w2e1"))
    assert [found.kind for found in verdict.differences] == ["value"]


# ---- the same model trained at three topologies


@pytest.mark.parametrize(
    ("one", "other"),
    [("mixtral_w4e4", "mixtral_w4e2"), ("mixtral_w4e2", "mixtral_w2e1"), ("mixtral_w4e4", "mixtral_w2e1")],
)
def test_one_model_trained_at_two_topologies_differs_where_the_engine_says(one: str, other: str) -> None:
    """Sums over ranks round differently: the oracles say which tensors, and at which element first."""
    expected = {}
    for file, state in (("fp32", "master"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
        a, b = (
            load_file(checkpoint_of(name).parent / "oracle" / f"{file}.safetensors")
            for name in (one, other)
        )
        for name in a:
            unequal = (a[name].view(torch.int32) != b[name].view(torch.int32)).reshape(-1).nonzero()
            if len(unequal):
                expected[str(canonical_key(name)), state] = int(unequal[0])
    verdict = api.verify(checkpoint_of(one), checkpoint_of(other))
    found = {}
    for difference in verdict.differences:
        state = difference.message.split("[")[1].split("]")[0]
        found[difference.name, state] = int(difference.message.split("flat index ")[1].split(")")[0])
    assert found == expected


# ---- differences of other kinds


def only(verdict: api.Verdict, kind: str) -> list[str]:
    assert {difference.kind for difference in verdict.differences} == {kind}
    return [difference.message for difference in verdict.differences]


def test_a_missing_and_an_extra_tensor(tmp_path: Path) -> None:
    a = made(tmp_path / "a", synthetic.model({"x": (4,), "both": (2,)}), Save(world=2))
    b = made(tmp_path / "b", synthetic.model({"y": (4,), "both": (2,)}), Save(world=2))
    kinds = {(d.kind, d.name) for d in api.verify(a, b).differences if d.kind in ("missing", "extra")}
    assert kinds == {("missing", "x"), ("extra", "y")}


def test_a_missing_state(tmp_path: Path) -> None:
    full = synthetic.model({"x": (4,)})
    a, b = made(tmp_path / "a", full, Save(world=1)), made(tmp_path / "b", full, Save(world=1))
    edit(
        optim(b, 0),
        lambda o: o["optimizer_state_dict"]["optimizer_state_dict"]["state"][0].pop("exp_avg_sq"),
    )
    (message,) = only(api.verify(a, b), "missing")
    assert "x [exp_avg_sq]" in message


def test_another_shape(tmp_path: Path) -> None:
    full = synthetic.model({"x": (4, 3)})
    turned = Model({"x": {s: t.reshape(3, 4) for s, t in full.parameters["x"].items()}})
    a, b = made(tmp_path / "a", full, Save(world=2)), made(tmp_path / "b", turned, Save(world=2))
    messages = only(api.verify(a, b), "shape")
    assert len(messages) == 3
    assert all("[4, 3]" in message and "[3, 4]" in message for message in messages)


def test_another_number_of_experts(tmp_path: Path) -> None:
    fewer = synthetic.model(DENSE, [Layer(0, uniform(2, 2), 3, 5)])
    a, b = made(tmp_path / "a"), made(tmp_path / "b", fewer)
    assert {"shape"} <= {difference.kind for difference in api.verify(a, b).differences}


def test_another_dtype_of_a_buffer(tmp_path: Path) -> None:
    full = synthetic.model({"x": (4,)}, buffers={"b": (3,)})
    full.buffers["b"] = torch.ones(3)
    a = made(tmp_path / "a", full, Save(world=1))
    full.buffers["b"] = torch.ones(3).half()
    (message,) = only(api.verify(a, made(tmp_path / "b", full, Save(world=1))), "dtype")
    assert "float32" in message
    assert "float16" in message


def test_another_step(tmp_path: Path) -> None:
    full = synthetic.model({"x": (4,)})
    a, b = made(tmp_path / "a", full, Save(step=2)), made(tmp_path / "b", full, Save(step=3))
    messages = only(api.verify(a, b), "scalar")
    assert any("x [step] is 2.0 in the first, 3.0 in the second" in message for message in messages)
    assert any("global_steps" in message for message in messages)


def test_another_kind_of_step(tmp_path: Path) -> None:
    """A Python int where the other has a tensor: their optimizers do not take each other's."""
    full = synthetic.model({"x": (4,)})
    a, b = made(tmp_path / "a", full, Save()), made(tmp_path / "b", full, Save(int_step=True))
    assert not api.verify(a, b).passed


def test_experts_in_one_anothers_place(tmp_path: Path) -> None:
    """Each file is sound; only the ids are wrong: 0 and 1 are exchanged."""
    full = synthetic.model(DENSE, [LAYER])
    a, b = made(tmp_path / "a", full), made(tmp_path / "b", full)
    for rank in range(4):
        edit(
            b / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt",
            lambda s: s["ds_autoep_layers"][0]["expert_placement"]["ranks"][0].update(experts=[1, 0]),
        )
    assert api.verify(b).passed
    messages = only(api.verify(a, b), "value")
    assert len(messages) == 9  # gate, up, down in three states
    assert all("experts.0." in message and "(flat index 0)" in message for message in messages)


# ---- one checkpoint


def test_a_flipped_byte_of_a_rank_file_breaks_its_crc(tmp_path: Path) -> None:
    tag = copy_fixture("mixtral_w2e1", tmp_path)
    data = bytearray(optim(tag, 1).read_bytes())
    data[len(data) // 2] ^= 1
    optim(tag, 1).write_bytes(data)
    (difference,) = api.verify(tag).differences
    assert difference.kind == "checksum"
    assert optim(tag, 1).name in difference.message


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_flipped_byte_in_any_chunk_of_a_dcp_checkpoint_breaks_its_crc(name: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(CHECKPOINTS[name], source)
    checkpoint = api.catalogue(source)
    whole = api.verify(source)
    assert whole.passed
    assert whole.bytes_compared > sum(tensor.nbytes for tensor in checkpoint.tensors if in_distcp(tensor))
    places = {
        (region.file, region.offset)
        for tensor in checkpoint.tensors
        for region in tensor.regions
        if region.file.endswith(".distcp")
    }
    assert places
    for file, offset in sorted(places):
        before = (source / file).read_bytes()
        (source / file).write_bytes(flipped(before, offset))
        found = [each for each in api.verify(source).differences if each.kind == "checksum"]
        assert [each.name for each in found] == [file]
        (source / file).write_bytes(before)


@pytest.mark.parametrize("to", ["universal", "zero3", "dcp"])
def test_a_result_too_damaged_to_be_read_is_judged_by_its_manifest(to: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"config": config_of("mixtral_w4e2")} if to == "dcp" else {}
    target = tmp_path / "target"
    api.convert(checkpoint_of("mixtral_w4e2"), target, to=to, **options)
    damaged = sorted(path for path in target.rglob("*") if path.suffix in (".pt", ".distcp"))[:2]
    for path in damaged:
        data = path.read_bytes()
        path.write_bytes(data.replace(b"torch", b"tornh", 1).replace(b"PK\x01\x02", b"PK\x01\x03"))
    with pytest.raises(CkptToolError):
        api.catalogue(target)
    found = api.verify(target).differences
    assert {difference.kind for difference in found} == {"checksum"}
    assert {difference.name for difference in found} == {str(p.relative_to(target)) for p in damaged}


def test_files_without_checksums_are_not_called_checked(tmp_path: Path) -> None:
    shutil.copytree(CHECKPOINTS["qwen3_moe_transformers_w2e2"], tmp_path / "source")
    assert any("of 2 files only the structure" in note for note in api.verify(tmp_path / "source").notes)


def in_distcp(tensor: Tensor) -> bool:
    return all(region.file.endswith(".distcp") for region in tensor.regions)


def flipped(data: bytes, offset: int) -> bytes:
    return data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]


def test_an_archive_without_crcs_is_not_called_damaged(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        tag = made(tmp_path / "a")
    finally:
        torch.serialization.set_crc32_options(True)
    verdict = api.verify(tag)
    assert verdict.passed
    assert any("CRC" in note for note in verdict.notes)


def test_the_result_of_verify_does_not_depend_on_workers_and_memory(tmp_path: Path) -> None:
    full = synthetic.model({"x": (40_000,), "y": (9,)})
    a, b = made(tmp_path / "a", full, Save(world=3)), made(tmp_path / "b", full, Save(world=2))
    for index in (50, 19_999, 333):
        flip(b, 1, 0, "exp_avg", index)
    verdicts = {
        api.verify(a, b, how=api.Execution(memory, workers))
        for memory in (1 << 17, 1 << 30)
        for workers in (1, 5)
    }
    assert len(verdicts) == 1
    ((difference,),) = (verdict.differences for verdict in verdicts)
    assert "(flat index 20050)" in difference.message


def test_files_left_open_by_verify(tmp_path: Path) -> None:
    def held() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    api.convert(checkpoint_of("mixtral_w2e1"), tmp_path / "out", to="universal")
    before = held()
    for _ in range(3):
        api.verify(tmp_path / "out")
        api.verify(tmp_path / "out", checkpoint_of("mixtral_w2e1"))
    assert held() <= before


def test_published_weights_in_shards_are_compared(tmp_path: Path) -> None:
    source, target = checkpoint_of("mixtral_w2e1"), tmp_path / "out"
    api.consolidate(source, target, config=config_of("mixtral_w2e1"), max_shard_bytes=5000)
    assert len(list(target.glob("model-*.safetensors"))) > 5
    assert api.verify(source, target).passed
    index = json.loads((target / "model.safetensors.index.json").read_text())
    shutil.copy(
        target / index["weight_map"]["model.layers.0.block_sparse_moe.experts.0.w1.weight"],
        target / "model-extra.safetensors",
    )
    assert api.verify(source, target).passed, "a file that the index does not name is not the model's"


def test_dtypes_know_torchs_names() -> None:
    assert {str(dtype) for dtype in DType} >= {"float32", "bfloat16", "float8_e4m3fn", "bool"}
