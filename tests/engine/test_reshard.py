"""Re-sharded checkpoints in the real engine: it goes on with the digits of a run nobody interrupted.

Each source run makes four steps and saves after two of them, so that one run is both the source and the
uninterrupted run. What is re-sharded from it is loaded at the target by a plain ``load_checkpoint`` into a
model of other random weights, saved again at once (files compared), and trained for two more steps (losses
compared). All runs of a stage share one child interpreter.

Measured (losses of steps 3 and 4), deepspeed 0.19.8: fp32, every case of MATRIX, resumed and uninterrupted
at either topology: the same digits. bf16, where gradients are summed in another order and rounded to 16
bits: see test_bf16_resumes_within_the_difference_between_the_topologies.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ckpt_tool import api
from ckpt_tool.formats.deepspeed.facts import groups
from tests.conftest import raw
from tests.engine.deepspeed_run import STATES, Load, RunResult, RunSpec, Save, run_each
from tests.engine.deepspeed_tools import FIXTURES, ds_to_universal, facts, fixture_spec
from tests.formats.test_reshard import differences, load

pytestmark = pytest.mark.engine

TAG = "global_step2"
CLIENT_STATE = {"step": 2, "note": "hello"}

# Everything at once: odd sizes, two parameter groups (one without decay), a scheduler, clipping, frozen
# parameters, many sub-groups, and expert groups that are cut at 3300 elements: how many there are differs
# with the EP size.
LIMIT = 3300
FULL = RunSpec(
    family="mixtral",
    experts=12,
    hidden=21,
    intermediate=13,
    param_groups="decay",
    warmup=True,
    gradient_clipping=0.5,
    frozen=("model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"),
    sub_group_size=400,
    expert_group_limit=LIMIT,
    steps=4,
)
QWEN3 = RunSpec(family="qwen3_moe", experts=8, hidden=22, intermediate=13, steps=4)
DEEPSEEK = RunSpec(
    family="deepseek_v3",
    experts=8,
    hidden=21,
    intermediate=13,
    model_config={"first_k_dense_replace": 1},
    correction_bias_std=0.1,
    steps=4,
)
PLAIN = RunSpec(family="mixtral", ep=0, experts=4, hidden=21, intermediate=13, steps=4)
SHAPES = {"full": FULL, "qwen3": QWEN3, "deepseek": DEEPSEEK, "plain": PLAIN}
SHAPES["bf16"] = dataclasses.replace(FULL, dtype="bf16")
SHAPES["data_first"] = dataclasses.replace(FULL, data_before_expert=True)


@dataclass(frozen=True)
class Case:
    """Model ``shape``, saved at (world, ep) ``source`` and resumed at ``target``."""

    shape: str
    source: tuple[int, int]
    target: tuple[int, int]

    def __str__(self) -> str:
        (a, b), (c, d) = self.source, self.target
        return f"{self.shape}_w{a}e{b}_to_w{c}e{d}"


MATRIX = [
    Case("full", (4, 4), (2, 2)),
    Case("full", (4, 2), (2, 1)),
    Case("full", (2, 1), (4, 4)),
    Case("full", (4, 2), (4, 1)),
    Case("full", (8, 4), (2, 2)),
    Case("full", (3, 3), (6, 2)),
    Case("qwen3", (4, 2), (2, 1)),
    Case("deepseek", (2, 2), (4, 4)),
    Case("plain", (4, 0), (3, 0)),
    Case("data_first", (4, 2), (2, 2)),
]
BF16 = Case("bf16", (4, 2), (2, 1))
EVERY = [*MATRIX, BF16]
# Targets whose uninterrupted run and whose own checkpoint are compared with as well.
TARGETS = [case for case in EVERY if case.shape in ("full", "plain", "bf16")]

each_case = pytest.mark.parametrize("case", EVERY, ids=str)


def spec_of(shape: str, topology: tuple[int, int]) -> RunSpec:
    world, ep = topology
    return dataclasses.replace(SHAPES[shape], world=world, ep=ep)


def client_state_of(name: str) -> dict[str, Any]:
    return json.loads((FIXTURES / name / "made_with.json").read_text())["client_state"]


# From one stage to another: (fixture, new stage, world, ep).
OTHERS = [
    ("mixtral_z2_w4e2", 3, 2, 1),
    ("deepseek_v3_z2_w2e1", 3, 4, 4),
    ("dense_z2_w3", 3, 2, 0),
    ("mixtral_z0_w2e2", 3, 4, 2),
    ("mixtral_z1_bf16_w2e2", 3, 2, 2),
    ("mixtral_z2_w4e2", 2, 2, 1),
    ("mixtral_w4e2", 2, 4, 4),
    ("dense_z2_w3", 2, 2, 0),
    ("mixtral_odd_w4e2", 1, 2, 2),
]
# How 16-bit arithmetic rounds depends on the processor: the engine goes on from its own files here, too.
OWN = sorted({name for name, *_ in OTHERS if fixture_spec(name).dtype != "fp32"})
each_other = pytest.mark.parametrize("other", OTHERS, ids=lambda other: "{}_to_z{}_w{}e{}".format(*other))


# ---- two stages of engine runs, and what we write between them


@dataclass
class Runs:
    """Directories and outcomes of engine runs by name."""

    root: Path
    outcomes: dict[Any, RunResult | RuntimeError] = field(default_factory=dict)

    def result(self, name: Any) -> RunResult:
        outcome = self.outcomes[name]
        if isinstance(outcome, RuntimeError):
            raise outcome
        return outcome

    def error(self, name: Any) -> str:
        outcome = self.outcomes[name]
        assert isinstance(outcome, RuntimeError), "the engine loaded it"
        return str(outcome)

    def run(self, specs: dict[Any, RunSpec]) -> None:
        found = run_each(list(specs.values()), timeout=1200)
        self.outcomes |= dict(zip(specs, found, strict=True))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every topology of the matrix, four steps, saved after two; by (shape, topology)."""
    runs = Runs(tmp_path_factory.mktemp("trained"))
    wanted = {(case.shape, case.source) for case in EVERY} | {(case.shape, case.target) for case in TARGETS}
    runs.run(
        {
            (shape, topology): dataclasses.replace(
                spec_of(shape, topology),
                save=Save(str(saved_at(runs, shape, topology)), client_state=CLIENT_STATE, after=2),
            )
            for shape, topology in sorted(wanted)
        }
    )
    return runs


def saved_at(runs: Runs, shape: str, topology: tuple[int, int]) -> Path:
    return runs.root / "{}_w{}e{}".format(shape, *topology)


@pytest.fixture(scope="module")
def resharded(trained: Runs, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    """Each case as we write it, by case; and what the other tests load, by name."""
    root = tmp_path_factory.mktemp("resharded")
    found: dict[Any, Path] = {case: root / str(case) for case in EVERY}
    found |= {name: root / name for name in ("moved", "light", "universal", "own", "theirs")}
    for case in EVERY:
        world, ep = case.target
        source = saved_at(trained, case.shape, case.source)
        limit = SHAPES[case.shape].expert_group_limit or groups.EXPERT_GROUP_LIMIT
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(groups, "EXPERT_GROUP_LIMIT", limit)
            api.reshard(source, found[case], world=world, ep=ep or None)
    for other in OTHERS:
        name, stage, world, ep = other
        found[other] = root / f"{name}_z{stage}"
        limit = fixture_spec(name).expert_group_limit or groups.EXPERT_GROUP_LIMIT
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(groups, "EXPERT_GROUP_LIMIT", limit)
            source = FIXTURES / name / "checkpoint"
            api.convert(source, found[other], to=f"zero{stage}", world=world, ep=ep or None, verify=True)
    source = FIXTURES / "mixtral_w4e2" / "checkpoint"
    api.reshard(source, found["moved"], world=4, ep=4)
    api.reshard(source, found["light"], world=2, ep=2, weights_only=True)
    api.convert(source, found["universal"], to="universal")
    api.convert(found["universal"], found["own"], to="zero3", world=4, ep=4)
    ds_to_universal([(source / TAG, root / "ds" / f"{TAG}_universal")])
    api.convert(root / "ds" / f"{TAG}_universal", found["theirs"], to="zero3", world=2, ep=1)
    return found


@pytest.fixture(scope="module")
def resumed(resharded: dict[Any, Path], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every case loaded at its target, saved at once, and trained for two more steps; and the loads of
    the other tests, by name."""
    runs = Runs(tmp_path_factory.mktemp("resumed"))
    specs: dict[Any, RunSpec] = {
        case: dataclasses.replace(
            spec_of(case.shape, case.target),
            model_seed=99,
            steps=2,
            start_step=2,
            load=Load(str(resharded[case])),
            save=Save(str(runs.root / str(case)), TAG, CLIENT_STATE, after=0),
        )
        for case in EVERY
    }
    small = dataclasses.replace(fixture_spec("mixtral_w4e2"), model_seed=99, steps=2, start_step=2)

    def small_run(world: int, ep: int, source: str, **load: Any) -> RunSpec:
        return dataclasses.replace(small, world=world, ep=ep, load=Load(str(resharded[source]), **load))

    specs["moved"] = dataclasses.replace(
        small_run(4, 4, "moved"), steps=0, gather_oracle=str(runs.root / "oracle")
    )
    specs["moved, at another ep"] = small_run(4, 2, "moved")
    for other in OTHERS:
        name, stage, world, ep = other
        specs[other] = dataclasses.replace(
            fixture_spec(name),
            zero_stage=stage,
            world=world,
            ep=ep,
            model_seed=99,
            steps=2,
            start_step=2,
            load=Load(str(resharded[other])),
            save=Save(str(runs.root / f"{name}_z{stage}"), TAG, client_state_of(name), after=0),
        )
    for name in OWN:
        specs["own files", name] = dataclasses.replace(
            fixture_spec(name),
            model_seed=99,
            steps=2,
            start_step=2,
            load=Load(str(FIXTURES / name / "checkpoint")),
        )
    specs["moved to zero2"] = dataclasses.replace(
        specs["mixtral_w4e2", 2, 4, 4], steps=0, save=None, gather_oracle=str(runs.root / "oracle_of_zero2")
    )
    specs["own"] = small_run(4, 4, "own")
    specs["theirs"] = small_run(2, 1, "theirs")
    for flags in LIGHT_LOADS:
        specs["light", flags] = small_run(2, 2, "light", **LIGHT_LOADS[flags])
        specs["fresh", flags] = dataclasses.replace(
            small, load=Load(str(FIXTURES / "mixtral_w4e2" / "checkpoint"), **LIGHT_LOADS[flags])
        )
    specs["light", "default"] = small_run(2, 2, "light")
    runs.run(specs)
    return runs


LIGHT_LOADS: dict[str, dict[str, Any]] = {
    "load_module_only": {"module_only": True, "optimizer_states": False},
    "load_optimizer_states=False": {"optimizer_states": False},
}

# ---- losses


@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_resumed_run_has_every_digit_of_the_uninterrupted_one(
    case: Case, trained: Runs, resumed: Runs
) -> None:
    found = resumed.result(case)
    assert found.losses == trained.result((case.shape, case.source)).losses[2:]
    assert (found.global_step, set(found.adam_steps)) == (4, {4.0})


@pytest.mark.parametrize("case", [case for case in MATRIX if case in TARGETS], ids=str)
def test_target_topology_itself_has_the_sources_digits(case: Case, trained: Runs) -> None:
    """So the test above asks for neither more nor less than the engine can do."""
    source = trained.result((case.shape, case.source))
    assert trained.result((case.shape, case.target)).losses == source.losses


def test_bf16_resumes_within_the_difference_between_the_topologies(trained: Runs, resumed: Runs) -> None:
    """The first loss has every digit: the weights are the same. Gradients are rounded in another order.

    Measured, steps 3 and 4, deepspeed 0.19.8: w4e2 -> w2e1 4.305965900 4.236300468; uninterrupted w4e2
    4.305965900 4.236390591, w2e1 4.305747986 4.235661983.
    """
    source = trained.result((BF16.shape, BF16.source)).losses[2:]
    target = trained.result((BF16.shape, BF16.target)).losses[2:]
    found = resumed.result(BF16).losses
    between = max(abs(a - b) for a, b in zip(source, target, strict=True))
    assert found[0] == source[0]
    assert found == pytest.approx(source, abs=between)


def test_scheduler_groups_and_client_state_go_on(resumed: Runs) -> None:
    """WarmupLR from lr / 4 to lr in six steps stands at step 3."""
    for case in MATRIX:
        if case.shape == "full":
            found = resumed.result(case)
            assert found.lr == pytest.approx(
                [0.01 / 4 + (0.01 - 0.01 / 4) * 3 / 6] * len(found.lr), rel=1e-12
            )
            assert (found.client_state["note"], found.client_state["global_samples"]) == ("hello", 48)


# ---- files


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / TAG).iterdir() if path.suffix == ".pt")


# What the engine takes from its own batch size, and no plain load reads.
FROM_THE_RUN = frozenset({"ds_config/train_micro_batch_size_per_gpu"})


@each_case
def test_engine_saves_what_it_loaded_from_us_in_the_very_same_form(
    case: Case, resharded: dict[Any, Path], resumed: Runs
) -> None:
    """Names, keys and their order, types, shapes, every byte of every tensor, paddings included."""
    resumed.result(case)
    again = resumed.root / str(case)
    assert names(resharded[case]) == names(again)
    for name in names(again):
        mine, theirs = load(resharded[case] / TAG / name), load(again / TAG / name)
        assert differences(mine, theirs, ignored=FROM_THE_RUN) == [], name
    assert (resharded[case] / "latest").read_text() == (again / "latest").read_text()


@pytest.mark.parametrize("case", TARGETS, ids=str)
def test_files_have_the_form_of_those_a_run_at_the_target_saved_by_itself(
    case: Case, resharded: dict[Any, Path], trained: Runs
) -> None:
    """A checkpoint we had no part in: the number of groups and sub-groups, their members and sizes."""
    own = saved_at(trained, case.shape, case.target)
    assert names(resharded[case]) == names(own)
    for name in names(own):
        mine, theirs = load(resharded[case] / TAG / name), load(own / TAG / name)
        assert differences(mine, theirs, values=False, ignored=FROM_THE_RUN) == [], name


def test_matrix_changes_the_numbers_of_groups_and_sub_groups(
    resharded: dict[Any, Path], trained: Runs
) -> None:
    """Or the tests above would prove less than they say."""

    def counts(directory: Path) -> tuple[int, int]:
        zero = load(directory / TAG / "zero_pp_rank_0_mp_rank_00_optim_states.pt")["optimizer_state_dict"]
        return len(zero["optimizer_state_dict"]["param_groups"]), len(zero["fp32_flat_groups"])

    before = {case: counts(saved_at(trained, case.shape, case.source)) for case in MATRIX}
    after = {case: counts(resharded[case]) for case in MATRIX}
    full = [case for case in MATRIX if case.shape == "full"]
    assert all(before[case][0] != after[case][0] for case in full)
    assert all(min(before[case][1], after[case][1]) > 4 for case in full)
    assert any(before[case][1] < after[case][1] for case in full)
    assert any(before[case][1] > after[case][1] for case in full)


UNIVERSAL_CASES = [MATRIX[0], MATRIX[2], MATRIX[5], MATRIX[7], MATRIX[8]]


@pytest.fixture(scope="module")
def universals(
    resharded: dict[Any, Path], trained: Runs, tmp_path_factory: pytest.TempPathFactory
) -> dict[Case, tuple[Path, Path]]:
    """ds_to_universal of the source and of what we made of it."""
    root = tmp_path_factory.mktemp("universal")
    found = {case: (root / f"{case}_a" / TAG, root / f"{case}_b" / TAG) for case in UNIVERSAL_CASES}
    jobs = []
    for case, (source, ours) in found.items():
        jobs.append((saved_at(trained, case.shape, case.source) / TAG, source))
        jobs.append((resharded[case] / TAG, ours))
    ds_to_universal(jobs)
    return found


@pytest.mark.parametrize("case", UNIVERSAL_CASES, ids=str)
def test_ds_to_universal_makes_the_same_of_source_and_result(
    case: Case, universals: dict[Case, tuple[Path, Path]]
) -> None:
    source, ours = universals[case]
    files = sorted(path.relative_to(source) for path in (source / "zero").glob("*/*.pt"))
    assert files == sorted(path.relative_to(ours) for path in (ours / "zero").glob("*/*.pt"))
    assert len(files) > 50
    for file in files:
        assert differences(load(source / file), load(ours / file)) == [], file


# ---- the silent traps of DeepSpeed's own ways (deepspeed.md, section 9)


@pytest.mark.parametrize(("run", "folder"), [("moved", "oracle"), ("moved to zero2", "oracle_of_zero2")])
def test_experts_are_in_their_own_slots_at_another_ep_size_in_the_same_world(
    run: str, folder: str, resumed: Runs
) -> None:
    """Trap h: flat buffers of w4e2 and w4e4 have equal sizes here, and a ZeRO-2 engine loads the one as the
    other. What the engine holds after loading ours is what the engine held when it saved the source."""
    from safetensors.torch import load_file

    resumed.result(run)
    for state in STATES:
        expected = load_file(FIXTURES / "mixtral_w4e2" / "oracle" / f"{state}.safetensors")
        found = load_file(resumed.root / folder / f"{state}.safetensors")
        assert found.keys() == expected.keys()
        for name in expected:
            assert raw(found[name]) == raw(expected[name]), (name, state)


def test_engine_at_another_ep_size_refuses_our_files_though_every_size_agrees(
    resharded: dict[Any, Path], resumed: Runs
) -> None:
    """Trap h again: only ds_zero_partition_groups tells the two apart, so it must be written."""
    name = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    mine = load(resharded["moved"] / TAG / name)["optimizer_state_dict"]["fp32_flat_groups"]
    source = load(FIXTURES / "mixtral_w4e2" / "checkpoint" / TAG / name)["optimizer_state_dict"]
    assert [flat.shape for flat in mine] == [flat.shape for flat in source["fp32_flat_groups"]]
    assert "same parameter placement topology" in resumed.error("moved, at another ep")


def test_every_expert_group_of_the_target_is_filled_when_it_has_more_of_them(
    resharded: dict[Any, Path], trained: Runs, resumed: Runs
) -> None:
    """Trap f: a Universal load into ZeRO-2 zips the groups, and leaves those beyond the source's as they
    are. Ours has all that the target has, each with its parameters, masters and moments."""
    case = Case("full", (4, 2), (2, 1))
    name = "zero_pp_rank_0_mp_rank_00_{}_states.pt"
    before = load(saved_at(trained, case.shape, case.source) / TAG / name.format("optim"))
    after = load(resharded[case] / TAG / name.format("optim"))

    def experts(saved: Any) -> list[Any]:
        params = saved["optimizer_state_dict"]["optimizer_state_dict"]["param_groups"]
        return [group for group in params if group.get("moe")]

    assert len(experts(after)) > len(experts(before))
    inner = after["optimizer_state_dict"]["optimizer_state_dict"]
    shapes = load(resharded[case] / TAG / name.format("model"))["param_shapes"]
    listed = [parameter for group in experts(after) for i in group["params"] for parameter in shapes[i]]
    expected = [f"model.layers.{i}.mlp.experts.{w}" for i in range(2) for w in ("w1", "w2", "w3")]
    assert listed == expected
    assert list(inner["state"]) == list(range(len(shapes)))
    assert all(set(state) == {"step", "exp_avg", "exp_avg_sq"} for state in inner["state"].values())
    assert resumed.result(case).losses == trained.result((case.shape, case.target)).losses[2:]


def test_every_sub_group_has_an_adam_step_of_its_own(resharded: dict[Any, Path]) -> None:
    """Trap d: with one shared tensor, torch's Adam counts it up once per sub-group."""
    path = resharded[MATRIX[0]] / TAG / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    states = load(path)["optimizer_state_dict"]["optimizer_state_dict"]["state"].values()
    assert len({state["step"].data_ptr() for state in states}) == len(states) > 10


# ---- weights only


@pytest.mark.parametrize("flags", LIGHT_LOADS)
def test_weights_only_files_give_exact_weights_and_a_fresh_optimizer(flags: str, resumed: Runs) -> None:
    """As a full checkpoint does that the engine loads with the same flags."""
    found = resumed.result(("light", flags))
    assert found.global_step == (4 if flags == "load_optimizer_states=False" else 2)
    assert found.losses == resumed.result(("fresh", flags)).losses
    assert found.losses[0] == facts("mixtral_w4e2")["losses_after"][0]
    assert found.losses[1] != facts("mixtral_w4e2")["losses_after"][1]
    assert set(found.adam_steps) == {2.0}


def test_weights_only_files_are_refused_by_a_load_that_wants_the_optimizer(resumed: Runs) -> None:
    assert "KeyError: 'optimizer_state_dict'" in resumed.error(("light", "default"))


# ---- from Universal


def test_our_universal_becomes_a_zero3_checkpoint_that_resumes_exactly(resumed: Runs) -> None:
    found = resumed.result("own")
    assert (found.losses, set(found.adam_steps)) == (facts("mixtral_w4e2")["losses_after"], {4.0})


def test_ds_to_universals_output_becomes_a_zero3_checkpoint_that_resumes_exactly(resumed: Runs) -> None:
    """Its copies of the model_states files say in which order parameters are."""
    found = resumed.result("theirs")
    assert (found.losses, set(found.adam_steps)) == (facts("mixtral_w4e2")["losses_after"], {4.0})


# ---- between stages


@each_other
def test_checkpoint_of_another_stage_resumes_exactly(
    other: tuple[str, int, int, int], resumed: Runs
) -> None:
    """mixtral_z2_w4e2 to w2e1 as ZeRO-2 is trap f: the target has more expert groups than the source."""
    found, name = resumed.result(other), other[0]
    expected = facts(name)["losses_after"]
    if name in OWN:
        expected = resumed.result(("own files", name)).losses
    assert (found.losses, set(found.adam_steps)) == (expected, {4.0})


# Of ZeRO-1/2 files the engine needs neither, and we write neither.
LEFT_OUT = {"clip_grad", "param_alignment_paddings"}


@each_other
def test_engine_saves_what_it_loaded_of_another_stage_in_the_very_same_form(
    other: tuple[str, int, int, int], resharded: dict[Any, Path], resumed: Runs
) -> None:
    resumed.result(other)
    name, stage, _, _ = other
    again = resumed.root / f"{name}_z{stage}"
    assert names(resharded[other]) == names(again)
    ignored = FROM_THE_RUN | {"ds_config/zero_optimization"}
    for file in names(again):
        mine, theirs = load(resharded[other] / TAG / file), load(again / TAG / file)
        if "module" in theirs:  # ZeRO-1/2: without AutoEP, views of one storage
            theirs["module"] = type(theirs["module"])((k, t.clone()) for k, t in theirs["module"].items())
        if stage < 3 and "optimizer_state_dict" in theirs:
            for key in LEFT_OUT - mine["optimizer_state_dict"].keys():
                theirs["optimizer_state_dict"].pop(key, None)
        assert differences(mine, theirs, ignored=ignored) == [], file
