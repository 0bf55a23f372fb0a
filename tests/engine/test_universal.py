"""Universal checkpoints of ours: the values DeepSpeed's own converter writes, loaded by the real engine."""

from __future__ import annotations

import dataclasses
import pickletools
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import ckpt_tool
from tests.engine.deepspeed_run import (
    STATES,
    Load,
    RunResult,
    RunSpec,
    Save,
    run,
    run_each,
)
from tests.engine.deepspeed_tools import (
    FIXTURES,
    ds_to_universal,
    facts,
    fixture_spec,
    read,
    same_bits,
    tensor_in,
    zero3_fixtures,
)

pytestmark = pytest.mark.engine

NAMES = zero3_fixtures()
each_fixture = pytest.mark.parametrize("name", NAMES)

# ---- what is compared


def oracle(folder: Path, kind: str) -> dict[str, Any]:
    """The engine's gathered tensors; none where it had none of that kind."""
    from safetensors.torch import load_file

    path = folder / f"{kind}.safetensors"
    return load_file(path) if path.is_file() else {}


def parameters(tag_directory: Path) -> set[str]:
    return {path.name for path in (tag_directory / "zero").iterdir() if path.is_dir()}


def tag_of(directory: Path) -> Path:
    return directory / (directory / "latest_universal").read_text()


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every fixture as our Universal checkpoint (the directory with ``latest_universal``)."""
    root = tmp_path_factory.mktemp("ours")
    for name in NAMES:
        ckpt_tool.convert(FIXTURES / name / "checkpoint", root / name, to="universal")
    return {name: root / name for name in NAMES}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every fixture as ds_to_universal converts it (the tag directory)."""
    root = tmp_path_factory.mktemp("theirs")
    sources = {name: FIXTURES / name / "checkpoint" / "global_step2" for name in NAMES}
    targets = {name: root / name / "global_step2_universal" for name in NAMES}
    ds_to_universal([(sources[name], targets[name]) for name in NAMES])
    return targets


# ---- the values


@each_fixture
def test_every_tensor_and_moment_is_the_one_ds_to_universal_writes(
    name: str, ours: dict[str, Path], theirs: dict[str, Path]
) -> None:
    mine = tag_of(ours[name])
    extra = set(oracle(FIXTURES / name / "oracle", "frozen"))
    extra |= set(oracle(FIXTURES / name / "oracle", "buffers"))
    assert parameters(mine) == parameters(theirs[name]) | extra
    assert not parameters(theirs[name]) & extra
    for parameter in parameters(theirs[name]):
        for state in STATES:
            own = read(mine / "zero" / parameter / f"{state}.pt")
            other = read(theirs[name] / "zero" / parameter / f"{state}.pt")
            if isinstance(other, dict):
                # an expert stack, whose dict tells the loader so
                assert {**own, "param": None} == {**other, "param": None}, parameter
                assert same_bits(own["param"], other["param"]), (parameter, state)
            else:
                assert other.ndim == 1, "DeepSpeed writes dense stage-3 tensors flat"
                assert same_bits(own["param"].reshape(-1), other), (parameter, state)


@each_fixture
def test_every_tensor_and_moment_is_what_the_engine_held(name: str, ours: dict[str, Path]) -> None:
    zero = tag_of(ours[name]) / "zero"
    gathered = {state: oracle(FIXTURES / name / "oracle", state) for state in STATES}
    untrained = oracle(FIXTURES / name / "oracle", "frozen") | oracle(FIXTURES / name / "oracle", "buffers")
    assert {path.name for path in zero.iterdir() if path.is_dir()} == set(gathered["fp32"]) | set(untrained)
    for state, tensors in gathered.items():
        for parameter, tensor in tensors.items():
            assert same_bits(tensor_in(zero / parameter / f"{state}.pt"), tensor), (parameter, state)
    for parameter, tensor in untrained.items():
        assert [path.name for path in (zero / parameter).iterdir()] == ["fp32.pt"]
        assert same_bits(tensor_in(zero / parameter / "fp32.pt"), tensor), parameter
    steps = {read(zero / parameter / "step.pt").item() for parameter in gathered["fp32"]}
    assert steps == set(facts(name)["adam_steps"]) == {2.0}


@each_fixture
def test_every_file_is_a_sound_archive_that_torch_reads_without_running_code(
    name: str, ours: dict[str, Path]
) -> None:
    import torch

    files = sorted(ours[name].rglob("*.pt"))
    assert len(files) > len(parameters(tag_of(ours[name]))) * 3
    for path in files:
        torch.load(path, weights_only=True)
        torch.load(path, weights_only=True, mmap=True)
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None, path
        if shutil.which("unzip"):
            child = subprocess.run(["unzip", "-tqq", str(path)], capture_output=True, text=True)
            assert (child.returncode, child.stdout, child.stderr) == (0, "", ""), path


@each_fixture
def test_no_file_names_a_deepspeed_class(name: str, ours: dict[str, Path]) -> None:
    named = set()
    for path in ours[name].rglob("*.pt"):
        with zipfile.ZipFile(path) as archive:
            pickle = archive.read(next(n for n in archive.namelist() if n.endswith("/data.pkl")))
        for opcode, argument, _ in pickletools.genops(pickle):
            assert opcode.name not in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"), path
            if opcode.name == "GLOBAL":
                named.add(argument.replace(" ", "."))
    assert "torch._utils._rebuild_tensor_v2" in named
    assert {name for name in named if not name.startswith(("torch.", "collections.OrderedDict"))} == set()


# ---- the engine goes on

# Fixture, and what the resuming run has otherwise than the run that saved it.
ELSEWHERE = {
    "mixtral_w4e4 to w2e1": ("mixtral_w4e4", {"world": 2, "ep": 1}),
    "mixtral_w4e4 to w4e2": ("mixtral_w4e4", {"ep": 2}),
    "mixtral_w4e2 to w2e2": ("mixtral_w4e2", {"world": 2}),
    "mixtral_w2e1 to w4e4": ("mixtral_w2e1", {"world": 4, "ep": 4}),
    "mixtral_dbe_w4e2 to w2e2": ("mixtral_dbe_w4e2", {"world": 2, "data_before_expert": False}),
    "qwen2_moe to w4e4": ("qwen2_moe_w2e2", {"world": 4, "ep": 4}),
    "qwen3_moe tied to w2e1": ("qwen3_moe_w2e2_tied", {"ep": 1}),
    "deepseek_v2 to w2e1": ("deepseek_v2_w2e2", {"ep": 1}),
    "dense_w3 to w2": ("dense_w3", {"world": 2}),
    # DeepSpeed's Universal load leaves buffers and frozen parameters alone. So these models are built
    # with the same ones, which come from the seed, and with other weights: they come from the range,
    # too, and trained parameters have moved away from what the seed gave.
    "deepseek_v3 to w2e1": (
        "deepseek_v3_w2e2",
        {
            "ep": 1,
            "model_seed": fixture_spec("deepseek_v3_w2e2").model_seed,
            "model_config": {"first_k_dense_replace": 1, "initializer_range": 0.07},
        },
    ),
    "mixtral_frozen to w2e2": (
        "mixtral_frozen_w2e1",
        {"ep": 2, "model_seed": fixture_spec("mixtral_frozen_w2e1").model_seed},
    ),
}
# The one directory of mixtral_w4e4, which stage 3 loads above.
STAGES = {
    "stage 1 at w2e2": ("mixtral_w4e4", {"zero_stage": 1, "world": 2, "ep": 2, "clone_step": False}),
    "stage 2 at w2e1": ("mixtral_w4e4", {"zero_stage": 2, "world": 2, "ep": 1, "clone_step": False}),
}
# Where they were: elsewhere gradients are summed in another order and then rounded to 16 bits.
HALF = {"bf16": ("mixtral_bf16_w2e2", {}), "fp16": ("mixtral_fp16_w2e1", {})}
# The same from the engine's own files: how 16-bit arithmetic rounds depends on the processor.
OWN = {f"{case}, own files": resume for case, resume in HALF.items()}
OTHERS = {
    "bf16 at w2e1": ("mixtral_bf16_w2e2", {"ep": 1}),
    "two groups at w2e2": ("mixtral_odd_w4e2", {"world": 2}),
    "two groups in stage 2": ("mixtral_odd_w4e2", {"world": 2, "zero_stage": 2, "clone_step": False}),
    "own lr": ("mixtral_w4e4", {"world": 2, "ep": 2, "zero_stage": 2, "lr": 5e-3}),
    "kept lr": ("mixtral_w4e4", {"world": 2, "ep": 2, "zero_stage": 2, "lr": 5e-3}),
    "module only": ("mixtral_w4e2", {"world": 2, "clone_step": False}),
}
RESUMES = ELSEWHERE | STAGES | HALF | OWN | OTHERS


def resuming(directory: Path, name: str, changes: dict[str, Any]) -> RunSpec:
    """Load into a model of other random weights and train two steps. The tag is ``latest_universal``'s.

    ``clone_step``: DeepSpeed's stage-3 loader gives all sub-groups one ``step`` tensor, which torch's
    Adam then counts up once per sub-group. No file can avoid that.
    """
    load = Load(str(directory), universal=True)
    common = {"model_seed": 99, "steps": 2, "start_step": 2, "clone_step": True, "load": load}
    return dataclasses.replace(fixture_spec(name), **{**common, **changes})


class Resumed(NamedTuple):
    outcomes: dict[str, RunResult | RuntimeError]
    saved: Path  # by the engine, after "two groups at w2e2"

    def __getitem__(self, case: str) -> RunResult:
        outcome = self.outcomes[case]
        if isinstance(outcome, RuntimeError):
            raise outcome
        return outcome


@pytest.fixture(scope="module")
def resumed(ours: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    """All runs, in one interpreter: its imports take longer than a run."""
    root = tmp_path_factory.mktemp("resumed")
    kept = root / "kept"
    source = FIXTURES / "mixtral_w4e4" / "checkpoint"
    ckpt_tool.convert(source, kept, to="universal", keep_groups=True)
    specs = {case: resuming(ours[name], name, changes) for case, (name, changes) in RESUMES.items()}
    special = {
        "kept lr": {"load": Load(str(kept), universal=True)},
        "module only": {"load": Load(str(ours["mixtral_w4e2"]), universal=True, module_only=True)},
        "two groups at w2e2": {"save": Save(str(root / "saved"), tag="again")},
    }
    for case, (name, _) in OWN.items():
        special[case] = {"load": Load(str(FIXTURES / name / "checkpoint")), "clone_step": False}
    specs |= {case: dataclasses.replace(specs[case], **changes) for case, changes in special.items()}
    outcomes = run_each(list(specs.values()), timeout=900)
    return Resumed(dict(zip(specs, outcomes, strict=True)), root / "saved" / "again")


def losses_after(case: str) -> list[float]:
    """Those of the run that saved the fixture, had it gone on."""
    return facts(RESUMES[case][0])["losses_after"]


@pytest.mark.parametrize("case", ELSEWHERE)
def test_engine_resumes_at_another_topology_with_identical_losses(case: str, resumed: Resumed) -> None:
    """All digits: an uninterrupted run at the target topology has the source's losses, too."""
    assert resumed[case].losses == losses_after(case)
    assert (resumed[case].global_step, set(resumed[case].adam_steps)) == (4, {4.0})


@pytest.mark.parametrize("case", STAGES)
def test_the_directory_a_stage_3_engine_loads_loads_in_stages_1_and_2_too(
    case: str, resumed: Resumed
) -> None:
    assert resumed[case].losses == losses_after(case)
    assert (resumed[case].global_step, set(resumed[case].adam_steps)) == (4, {4.0})


@pytest.mark.parametrize("case", HALF)
def test_engine_resumes_in_16_bits_with_identical_losses(case: str, resumed: Resumed) -> None:
    assert fixture_spec(RESUMES[case][0]).dtype == case
    assert resumed[case].losses == resumed[f"{case}, own files"].losses


def test_engine_resumes_in_bf16_at_another_topology_within_its_rounding(resumed: Resumed) -> None:
    where_it_was = resumed["bf16, own files"].losses
    assert resumed["bf16 at w2e1"].losses == pytest.approx(where_it_was, abs=3e-4)


@pytest.mark.parametrize("case", ["two groups at w2e2", "two groups in stage 2"])
def test_scheduler_and_groups_of_different_decay_go_on_with_identical_losses(
    case: str, resumed: Resumed
) -> None:
    """The scheduler is WarmupLR, at step 2 of 6 on the way from lr/4 to lr."""
    assert resumed[case].losses == losses_after(case)
    assert resumed[case].lr == pytest.approx([0.01 * (0.25 + 0.75 * 3 / 6)] * 3, rel=1e-12)


def test_parameter_groups_keep_the_decay_and_names_of_the_target_run(resumed: Resumed) -> None:
    """After loading ds_to_universal's directory all would have group 0's."""
    import torch

    assert resumed["two groups at w2e2"].losses
    path = resumed.saved / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    saved = torch.load(path, weights_only=False)["optimizer_state_dict"]["optimizer_state_dict"]
    assert [(group["name"], group["weight_decay"]) for group in saved["param_groups"]] == [
        ("decay", 0.1),
        ("no_decay", 0.0),
        ("ep_size_2", 0.1),
    ]


@pytest.mark.parametrize("case", ["two groups at w2e2", "two groups in stage 2"])
def test_client_state_and_counters_come_back(case: str, resumed: Resumed) -> None:
    found = resumed[case]
    assert (found.client_state["note"], found.client_state["step"]) == ("hello", 2)
    assert (found.global_step, found.client_state["global_samples"]) == (4, 48)


def test_target_run_keeps_its_own_learning_rate_unless_groups_are_kept(resumed: Resumed) -> None:
    """With --keep-groups the source's lr comes back: here into stage 2, where groups go by position."""
    own, kept = resumed["own lr"], resumed["kept lr"]
    assert (own.lr, kept.lr) == ([5e-3] * 2, [1e-2] * 2)
    assert own.losses[0] == losses_after("own lr")[0]
    assert own.losses[1] != losses_after("own lr")[1]
    assert kept.losses == losses_after("kept lr")


def test_load_module_only_loads_the_weights_and_leaves_the_optimizer_fresh(resumed: Resumed) -> None:
    found, expected = resumed["module only"], losses_after("module only")
    assert found.losses[0] == expected[0]
    assert found.losses[1] != expected[1]
    assert set(found.adam_steps) == {2.0}


@pytest.mark.parametrize(
    ("name", "held"), [("deepseek_v3_w2e2", "buffers"), ("mixtral_frozen_w2e1", "frozen")]
)
def test_result_says_what_the_engine_will_not_restore(name: str, held: str, tmp_path: Path) -> None:
    result = ckpt_tool.convert(
        FIXTURES / name / "checkpoint", tmp_path / "out", to="universal", dry_run=True
    )
    (note,) = [note for note in result.notes if "does not restore" in note]
    for parameter in oracle(FIXTURES / name / "oracle", held):
        assert parameter in note


# ---- what the engine would take in silence is refused before it is written


def copied(name: str, target: Path) -> Path:
    shutil.copytree(FIXTURES / name / "checkpoint", target)
    return target


def edit_shapes(checkpoint: Path, ranks: list[int], shapes: dict[str, tuple[int, ...]]) -> None:
    import torch

    for rank in ranks:
        path = checkpoint / "global_step2" / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        state = torch.load(path, weights_only=False)
        for group in state["param_shapes"]:
            group.update({name: shapes[name] for name in group if name in shapes})
        torch.save(state, path)


def test_dense_tensor_of_a_wrong_size_is_refused(tmp_path: Path) -> None:
    """DeepSpeed's loader takes a Universal tensor that is too short, and shifts all that follow."""
    source = copied("mixtral_w4e2", tmp_path / "source")
    edit_shapes(source, [0, 1, 2, 3], {"model.norm.weight": (13,)})
    with pytest.raises(ckpt_tool.CkptToolError, match=r"has \d+ elements; the shapes .* make \d+") as error:
        ckpt_tool.convert(source, tmp_path / "out", to="universal")
    assert "zero_pp_rank_0_mp_rank_00_optim_states.pt" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_dense_tensors_of_wrong_sizes_that_add_up_are_refused_where_ranks_disagree(tmp_path: Path) -> None:
    """Partitions of 4 and 8 elements instead of twice 6: the flat buffer's length says nothing."""
    source = copied("mixtral_w4e2", tmp_path / "source")
    sizes = {"model.norm.weight": (13,), "model.layers.0.input_layernorm.weight": (29,)}
    edit_shapes(source, [2], sizes)
    with pytest.raises(ckpt_tool.CkptToolError, match=r"has shape \[\d+\], in .* it has \[21\]"):
        ckpt_tool.convert(source, tmp_path / "out", to="universal")
    assert not (tmp_path / "out").exists()


def test_ds_to_universals_tensor_of_a_wrong_size_is_refused(
    theirs: dict[str, Path], tmp_path: Path
) -> None:
    import torch

    source = tmp_path / "global_step2_universal"
    shutil.copytree(theirs["mixtral_w4e2"], source)
    for state in STATES:
        path = source / "zero" / "model.norm.weight" / f"{state}.pt"
        torch.save(read(path)[:13].clone(), path)
    with pytest.raises(ckpt_tool.CkptToolError, match=r"has 13 elements; the shape \[21\]"):
        ckpt_tool.convert(source, tmp_path / "out", to="universal")


# ---- DeepSpeed's own Universal checkpoints as a source


@each_fixture
def test_ds_to_universals_stage_3_output_is_the_same_checkpoint_as_ours(
    name: str, ours: dict[str, Path], theirs: dict[str, Path]
) -> None:
    untrained = oracle(FIXTURES / name / "oracle", "frozen") | oracle(FIXTURES / name / "oracle", "buffers")
    verdict = ckpt_tool.verify(theirs[name], ours[name])
    # what it trains is in zero/; frozen parameters and buffers are in the module it copies beside them
    trained = oracle(FIXTURES / name / "oracle", "fp32")
    assert verdict.passed
    assert verdict.tensors == 3 * len(trained) + len(untrained)
    assert verdict.bytes_compared == 3 * sum(tensor.nbytes for tensor in trained.values()) + sum(
        tensor.nbytes for tensor in untrained.values()
    )


def test_ds_to_universals_stage_3_output_has_the_step_and_counters_of_the_source(
    ours: dict[str, Path], theirs: dict[str, Path]
) -> None:
    for name in NAMES:
        mine, other = ckpt_tool.open(ours[name]), ckpt_tool.open(theirs[name])
        assert other.scalars == mine.scalars
        assert {scalar.value for scalar in other.scalars.values()} == {2.0}
        assert other.training.counters == mine.training.counters


def test_verify_sees_one_changed_bit(
    ours: dict[str, Path], theirs: dict[str, Path], tmp_path: Path
) -> None:
    import torch

    changed = tmp_path / "changed"
    shutil.copytree(ours["mixtral_w4e2"], changed)
    path = tag_of(changed) / "zero" / "model.layers.1.mlp.experts.w2" / "exp_avg_sq.pt"
    entry = read(path)
    entry["param"].view(torch.int32)[3, 20, 12] ^= 1
    torch.save(entry, path)
    (difference,) = ckpt_tool.verify(theirs["mixtral_w4e2"], changed).differences
    assert difference.kind == "value"
    assert "experts.3.down.weight [exp_avg_sq] at [20, 12]" in difference.message


def test_converting_ds_to_universals_output_gives_our_files(
    ours: dict[str, Path], theirs: dict[str, Path], tmp_path: Path
) -> None:
    """All but the optimizer's group settings, which DeepSpeed's directory does not hold by name."""
    name = "mixtral_odd_w4e2"
    ckpt_tool.convert(theirs[name], tmp_path / "again", to="universal")
    again, mine = tag_of(tmp_path / "again"), tag_of(ours[name])
    assert parameters(again) == parameters(mine)
    for path in sorted((mine / "zero").glob("*/*.pt")):
        other = again / path.relative_to(mine)
        assert path.read_bytes() == other.read_bytes(), path


def test_stage_2_output_of_ds_to_universal_is_read_as_the_engine_held_it(tmp_path: Path) -> None:
    """The dialect of stages 1 and 2: dicts, a step per parameter, the router under both its names."""
    spec = dataclasses.replace(fixture_spec("mixtral_w4e2"), world=2, ep=2, zero_stage=2, steps=2)
    saved, gathered = tmp_path / "saved", tmp_path / "oracle"
    trained = run(dataclasses.replace(spec, save=Save(str(saved)), gather_oracle=str(gathered)))
    assert trained.losses == facts("mixtral_w4e2")["losses"]
    other = tmp_path / "theirs" / "global_step2_universal"
    ds_to_universal([(saved / "global_step2", other)])

    mine = tmp_path / "ours"
    assert ckpt_tool.convert(other, mine, to="universal", verify=True).verdict.passed
    alias = "model.layers.0.mlp.gate.gate.weight"
    assert alias in parameters(other)
    assert parameters(tag_of(mine)) == set(oracle(gathered, "fp32"))
    for state in STATES:
        for parameter, tensor in oracle(gathered, state).items():
            written = tag_of(mine) / "zero" / parameter
            assert same_bits(tensor_in(written / f"{state}.pt"), tensor), (parameter, state)
            assert same_bits(read(written / "step.pt"), read(other / "zero" / parameter / "step.pt"))
    found = run(resuming(mine, "mixtral_w4e2", {"ep": 4}))
    assert found.losses == facts("mixtral_w4e2")["losses_after"]


@pytest.mark.parametrize("name", ["deepseek_v3_w2e2", "mixtral_frozen_w2e1", "mixtral_w4e2"])
def test_model_consolidated_from_ds_to_universals_output_is_that_of_its_source(
    name: str, theirs: dict[str, Path], tmp_path: Path
) -> None:
    """It leaves buffers and frozen parameters out of zero/, but copies the files that hold them."""
    from safetensors.torch import load_file

    config = FIXTURES / name / "config.json"
    ckpt_tool.consolidate(FIXTURES / name / "checkpoint", tmp_path / "expected", config=config)
    ckpt_tool.consolidate(theirs[name], tmp_path / "found", config=config)
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    found = load_file(tmp_path / "found" / "model.safetensors")
    assert found.keys() == expected.keys()
    for parameter, tensor in expected.items():
        assert same_bits(found[parameter], tensor), parameter


@pytest.mark.parametrize(
    "lost",
    [
        "model.norm.weight",
        "model.layers.1.mlp.experts.w2",
        "model.norm.weight/fp32.pt",
        "model.norm.weight/exp_avg.pt",
        "model.layers.1.mlp.experts.w2/exp_avg_sq.pt",
    ],
)
@pytest.mark.parametrize("writer", ["ours", "theirs"])
def test_universal_source_that_lacks_a_file_is_refused(
    writer: str, lost: str, ours: dict[str, Path], theirs: dict[str, Path], tmp_path: Path
) -> None:
    source = tmp_path / "global_step2_universal"
    shutil.copytree(theirs["mixtral_w4e2"] if writer == "theirs" else tag_of(ours["mixtral_w4e2"]), source)
    path = source / "zero" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ckpt_tool.CkptToolError, match=lost.split("/")[0].replace(".", r"\.")):
        ckpt_tool.convert(source, tmp_path / "out", to="universal")
    assert not (tmp_path / "out").exists()
