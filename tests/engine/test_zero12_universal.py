"""ZeRO-0, -1 and -2 sources against the real engine: its gathered states, its converter, and its resume."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import ckpt_tool
from ckpt_tool import api
from ckpt_tool.canonical import Checkpoint
from tests.engine.deepspeed_run import STATES, Load, RunResult, RunSpec, Save, run_each
from tests.engine.deepspeed_tools import (
    FIXTURES,
    ds_to_universal,
    facts,
    fixture_spec,
    read,
    same_bits,
    tensor_in,
)

pytestmark = pytest.mark.engine

ZERO12 = ("mixtral_z2_w4e2", "mixtral_z1_bf16_w2e2", "deepseek_v3_z2_w2e1", "dense_z2_w3")
NAMES = (*ZERO12, "mixtral_z0_w2e2")
MASTERS = {"fp32": "master", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}

# ---- our Universal directories and DeepSpeed's


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every fixture as our Universal checkpoint (the directory with ``latest_universal``)."""
    root = tmp_path_factory.mktemp("ours")
    for name in NAMES:
        ckpt_tool.convert(FIXTURES / name / "checkpoint", root / name, to="universal")
    return {name: root / name for name in NAMES}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every fixture of stages 1 and 2 as ds_to_universal converts it (the tag directory)."""
    root = tmp_path_factory.mktemp("theirs")
    jobs = {name: root / name / "global_step2_universal" for name in ZERO12}
    ds_to_universal(
        [(FIXTURES / name / "checkpoint" / "global_step2", job) for name, job in jobs.items()],
        "--inject_missing_state",  # which plain checkpoints lack
    )
    return jobs


def zero_of(directory: Path) -> Path:
    return directory / (directory / "latest_universal").read_text() / "zero"


def parameters(zero: Path) -> set[str]:
    return {path.name for path in zero.iterdir() if path.is_dir()}


@pytest.mark.parametrize("name", ZERO12)
def test_every_tensor_moment_and_step_is_the_one_ds_to_universal_writes(
    name: str, ours: dict[str, Path], theirs: dict[str, Path]
) -> None:
    mine, other = zero_of(ours[name]), theirs[name] / "zero"
    aliases = api.catalogue(FIXTURES / name / "checkpoint").aliases
    assert parameters(other) - parameters(mine) == set(aliases), "it writes second names, too"
    assert parameters(mine) <= parameters(other)
    compared = 0
    for parameter in sorted(parameters(other)):
        home = mine / aliases.get(parameter, parameter)
        for path in sorted((other / parameter).iterdir()):
            content, own = read(path), read(home / path.name)
            if path.name == "step.pt":
                assert same_bits(own, content), parameter
                continue
            compared += 1
            expected = content["param"]
            # a second name's copy comes from the model's weights, which masters are rounded to
            found = own["param"]
            if parameter in aliases and fixture_spec(name).dtype != "fp32":
                found = found.bfloat16().float()
            assert same_bits(found, expected), (parameter, path.name)
            extra = {key for key in content if key != "param"}
            assert {key: own[key] for key in extra} == {key: content[key] for key in extra}
    assert compared > 3 * len(parameters(mine)) - 10


@pytest.mark.parametrize("name", ZERO12)
def test_verify_finds_ours_and_theirs_equal(
    name: str, ours: dict[str, Path], theirs: dict[str, Path]
) -> None:
    verdict = ckpt_tool.verify(ours[name], theirs[name])
    assert verdict.passed, verdict.differences[:5]
    assert verdict.tensors >= 3 * len(facts(name)["parameters"]) - 6


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_and_moment_is_what_the_engine_held(name: str, ours: dict[str, Path]) -> None:
    from safetensors.torch import load_file

    zero = zero_of(ours[name])
    for state in STATES:
        gathered = load_file(FIXTURES / name / "oracle" / f"{state}.safetensors")
        for parameter, tensor in gathered.items():
            assert same_bits(tensor_in(zero / parameter / f"{state}.pt"), tensor), (parameter, state)


# ---- the engine goes on

# Fixture, and what the resuming run has otherwise than the run that saved it. Stage 3 gives all
# sub-groups one ``step`` when it loads Universal, which torch's Adam counts up once per sub-group: the
# harness gives each its own.
STAGE_2 = {"zero_stage": 2}
STAGE_3 = {"zero_stage": 3, "clone_step": True}
# DeepSpeed's Universal load leaves buffers and frozen parameters alone: a model with the same ones, which
# come from the seed, and other weights, which come from the range as well.
SAME_FROZEN = {
    "model_seed": fixture_spec("deepseek_v3_z2_w2e1").model_seed,
    "correction_bias_std": 0.1,
    "frozen": fixture_spec("deepseek_v3_z2_w2e1").frozen,
}
RESUMES: dict[str, tuple[str, dict[str, Any]]] = {
    "stage 2 to stage 2 at w2e1": ("mixtral_z2_w4e2", {**STAGE_2, "world": 2, "ep": 1}),
    "stage 2 to stage 3 at w2e2": ("mixtral_z2_w4e2", {**STAGE_3, "world": 2}),
    "stage 1 bf16 to stage 2 where it was": ("mixtral_z1_bf16_w2e2", STAGE_2),
    "stage 1 bf16 to stage 3 where it was": ("mixtral_z1_bf16_w2e2", STAGE_3),
    "deepseek to stage 2 at w2e2": ("deepseek_v3_z2_w2e1", {**STAGE_2, "ep": 2, **SAME_FROZEN}),
    "deepseek to stage 3 at w2e2": ("deepseek_v3_z2_w2e1", {**STAGE_3, "ep": 2, **SAME_FROZEN}),
    "dense to stage 2 at w2": ("dense_z2_w3", {**STAGE_2, "world": 2}),
    "dense to stage 3 at w2": ("dense_z2_w3", {**STAGE_3, "world": 2}),
    "stage 0 to stage 2 at w4e4": ("mixtral_z0_w2e2", {**STAGE_2, "world": 4, "ep": 4}),
    "stage 0 to stage 3 at w2e1": ("mixtral_z0_w2e2", {**STAGE_3, "ep": 1}),
}
# How 16-bit arithmetic rounds depends on the processor: the engine goes on from its own files here, too.
OWN = sorted({name for name, _ in RESUMES.values() if fixture_spec(name).dtype != "fp32"})


@pytest.fixture(scope="module")
def resumed(ours: dict[str, Path]) -> dict[str, RunResult | RuntimeError]:
    """All runs in one interpreter: into a model of other random weights, two steps."""
    specs = []
    for name, changes in RESUMES.values():
        load = Load(str(ours[name]), universal=True)
        common = {"model_seed": 99, "steps": 2, "start_step": 2, "load": load}
        specs.append(dataclasses.replace(fixture_spec(name), **{**common, **changes}))
    for name in OWN:
        own = Load(str(FIXTURES / name / "checkpoint"))
        specs.append(
            dataclasses.replace(fixture_spec(name), model_seed=99, steps=2, start_step=2, load=own)
        )
    return dict(zip([*RESUMES, *OWN], run_each(specs, timeout=900), strict=True))


@pytest.mark.parametrize("case", RESUMES)
def test_engine_resumes_with_the_losses_of_an_uninterrupted_run(
    case: str, resumed: dict[str, RunResult | RuntimeError]
) -> None:
    result, name = resumed[case], RESUMES[case][0]
    if isinstance(result, RuntimeError):
        raise result
    expected = facts(name)["losses_after"]
    if name in OWN:
        own = resumed[name]
        if isinstance(own, RuntimeError):
            raise own
        expected = own.losses
    assert result.losses == expected
    assert (result.global_step, set(result.adam_steps)) == (4, {4.0})


# ---- what else the engine can be told to save

_SMALL = RunSpec(world=2, ep=2, zero_stage=2, hidden=17, intermediate=9, vocab=41)
_EXPERTS_OF_LAYER_0 = "model.layers.0.mlp.experts.*"


def _variant(**changes: Any) -> RunSpec:
    return dataclasses.replace(_SMALL, **changes)


def _zero(**options: Any) -> dict[str, Any]:
    return {"zero_optimization": options}


_FP32_GRADIENTS = {"data_types": {"grad_accum_dtype": "fp32"}}
_DENSE: dict[str, Any] = {"family": "dense", "ep": 0, "hidden": 22, "world": 3}
_TIED: dict[str, Any] = {"family": "qwen3_moe", "model_config": {"tie_word_embeddings": True}}
_DEEPSEEK: dict[str, Any] = {
    "family": "deepseek_v3",
    "model_config": {"first_k_dense_replace": 1},
    "correction_bias_std": 0.1,
}
_SOME_FROZEN: dict[str, Any] = {
    "frozen": ("model.embed_tokens.weight", "model.layers.0.input_layernorm.weight")
}
VARIANTS = {
    "data before expert": _variant(world=4, data_before_expert=True),
    "parameter alignment": _variant(world=4, dtype="bf16", ds_config=_zero(parameter_alignment=True)),
    "round robin": _variant(**_DENSE, ds_config=_zero(round_robin_gradients=True)),
    "round robin experts": _variant(ep=1, ds_config=_zero(round_robin_gradients=True)),
    "round robin and alignment": _variant(
        ep=1, ds_config=_zero(round_robin_gradients=True, parameter_alignment=True)
    ),
    "elastic checkpoint": _variant(**_DENSE, ds_config=_zero(elastic_checkpoint=True)),
    "groups of the module": _variant(param_groups="module"),
    "fp16 in stage 1": _variant(ep=1, zero_stage=1, dtype="fp16"),
    "BF16_Optimizer": _variant(zero_stage=1, dtype="bf16", ds_config=_FP32_GRADIENTS),
    "BF16_Optimizer dense": _variant(**_DENSE, zero_stage=1, dtype="bf16", ds_config=_FP32_GRADIENTS),
    "frozen in stage 1": _variant(zero_stage=1, **_SOME_FROZEN),
    "frozen experts": _variant(frozen=(_EXPERTS_OF_LAYER_0,)),
    "frozen experts in stage 1": _variant(zero_stage=1, frozen=(_EXPERTS_OF_LAYER_0,)),
    "tied": _variant(**_TIED),
    "stage 0 dense": _variant(**_DENSE | {"world": 2}, zero_stage=0),
    "stage 0 dense tied": _variant(
        **_DENSE | {"world": 2}, zero_stage=0, model_config={"tie_word_embeddings": True}
    ),
    "stage 0 with two groups": _variant(world=4, zero_stage=0, param_groups="decay"),
    "stage 0 groups of the module": _variant(ep=1, zero_stage=0, param_groups="module"),
    "stage 0 frozen": _variant(ep=1, zero_stage=0, **_SOME_FROZEN),
    "stage 0 tied": _variant(zero_stage=0, **_TIED),
    "stage 0 deepseek": _variant(zero_stage=0, **_DEEPSEEK),
}
# The same training without the option; DeepSpeed's own gather is wrong under round_robin_gradients.
TWINS = {
    "round robin": _variant(**_DENSE),
    "round robin experts": _variant(ep=1),
    "round robin and alignment": _variant(ep=1),
}
# FP16_UnfusedOptimizer: the harness cannot gather its masters, which are in no mapping.
UNGATHERED = {
    "stage 0 bf16": _variant(zero_stage=0, dtype="bf16"),
    "stage 0 fp16": _variant(zero_stage=0, dtype="fp16"),
}


class Saved(NamedTuple):
    folder: Path

    def checkpoint(self) -> Checkpoint:
        return api.catalogue(self.folder / "checkpoint")

    def oracle(self, kind: str) -> dict[str, Any]:
        from safetensors.torch import load_file

        path = self.folder / "oracle" / f"{kind}.safetensors"
        return load_file(path) if path.is_file() else {}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    root = tmp_path_factory.mktemp("variants")
    specs = {}
    for case, spec in {**VARIANTS, **{f"{case} twin": spec for case, spec in TWINS.items()}}.items():
        oracle = str(root / case / "oracle")
        specs[case] = dataclasses.replace(
            spec, save=Save(str(root / case / "checkpoint")), gather_oracle=oracle
        )
    for case, spec in UNGATHERED.items():
        specs[case] = dataclasses.replace(spec, save=Save(str(root / case / "checkpoint")))
    for case, outcome in zip(specs, run_each(list(specs.values()), timeout=900), strict=True):
        if isinstance(outcome, RuntimeError):
            raise RuntimeError(case) from outcome
    return {case: Saved(root / case) for case in specs}


def tensors(checkpoint: Checkpoint) -> dict[tuple[Any, str], Any]:
    """Every tensor, by name and state."""
    from ckpt_tool.storage import LocalReader
    from tests.conftest import materialise

    reader = LocalReader(checkpoint.root)
    try:
        return {(tensor.name, tensor.state): materialise(reader, tensor) for tensor in checkpoint.tensors}
    finally:
        reader.close()


@pytest.mark.parametrize("case", VARIANTS)
def test_every_element_is_the_engines_own(case: str, saved: dict[str, Saved]) -> None:
    from tests.conftest import canonical_key

    checkpoint = saved[case].checkpoint()
    mine = tensors(checkpoint)
    oracle = saved[f"{case} twin" if case in TWINS else case]
    expected = {
        (canonical_key(name), MASTERS[state]): tensor
        for state in MASTERS
        for name, tensor in oracle.oracle(state).items()
    }
    assert {key for key in mine if key[1] != "weight"} == set(expected)
    for key, tensor in expected.items():
        assert same_bits(mine[key], tensor), key
    for kind in ("frozen", "buffers"):
        for name, tensor in oracle.oracle(kind).items():
            # of frozen experts the harness gathers EP rank 0's alone
            found = mine[canonical_key(name), "weight"][: len(tensor)]
            assert same_bits(found, tensor.to(found.dtype)), name
    assert bool(checkpoint.notes) == (case in TWINS)


@pytest.mark.parametrize("case", TWINS)
def test_round_robin_masters_are_the_weights_of_the_same_file(case: str, saved: dict[str, Saved]) -> None:
    """An fp32 engine's masters equal its weights; by DeepSpeed's own mappings they would not."""
    mine = tensors(saved[case].checkpoint())
    for (name, state), tensor in mine.items():
        if state == "weight":
            assert same_bits(mine[name, "master"], tensor), name


@pytest.mark.parametrize("case", UNGATHERED)
def test_masters_of_stage_0_in_16_bits_round_to_the_weights(case: str, saved: dict[str, Saved]) -> None:
    checkpoint = saved[case].checkpoint()
    mine = tensors(checkpoint)
    names = {tensor.name for tensor in checkpoint.tensors}
    assert {state for _, state in mine} == {"master", "exp_avg", "exp_avg_sq", "weight"}
    for name in names:
        assert same_bits(mine[name, "master"].to(mine[name, "weight"].dtype), mine[name, "weight"]), name
        assert not same_bits(mine[name, "master"], mine[name, "weight"].float())


@pytest.mark.parametrize("case", ["tied", "stage 0 tied", "stage 0 dense tied"])
def test_tied_weights_are_one_tensor(case: str, saved: dict[str, Saved]) -> None:
    aliases = saved[case].checkpoint().aliases
    assert aliases["lm_head.weight"] == "model.embed_tokens.weight"
