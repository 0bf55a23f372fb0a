"""FSDP2 against ckpt-tool: what runs save is read whole, what is written they resume from.

The truth is what each run gathers itself (``full_tensor``), and the losses of uninterrupted runs.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from ckpt_tool.families import family_of
from ckpt_tool.families.autoep import to_autoep
from ckpt_tool.formats.deepspeed.facts.target_options import ZeroOptions
from ckpt_tool.formats.deepspeed.writing.zero3_target import Zero3Target
from ckpt_tool.formats.registry import open_checkpoint
from tests.engine.fsdp_run import FsdpSpec, run_each
from tests.formats.dcp_tools import (
    CHECKPOINTS,
    FIXTURES,
    assert_equal_to_oracle,
    convert,
    read,
    write_layout,
)

pytestmark = pytest.mark.engine

SMALL = FsdpSpec(hidden=24, intermediate=12, vocab=33, layers=1, experts=4, steps=1)
MIXTRAL = dataclasses.replace(SMALL, family="mixtral")

SAVED: dict[str, FsdpSpec] = {
    "world 1": dataclasses.replace(SMALL, world=1),
    "world 2 ep 2": dataclasses.replace(SMALL, world=2, ep=2),
    "world 3, uneven": dataclasses.replace(SMALL, world=3),
    "world 4 ep 2": dataclasses.replace(SMALL, world=4, ep=2),
    "world 4 ep 4, bf16": dataclasses.replace(SMALL, world=4, ep=4, dtype="bf16"),
    "world 4 ep 2, rows": dataclasses.replace(SMALL, world=4, ep=2, experts=2),
    "world 4, rows": dataclasses.replace(SMALL, world=4, experts=2, amsgrad=True),
    "world 4 ep 2, ep only": dataclasses.replace(MIXTRAL, world=4, ep=2, ep_only=True, style="app"),
    "threads": dataclasses.replace(SMALL, world=2, writer={"thread_count": 2}),
    "file per item": dataclasses.replace(SMALL, world=2, writer={"single_file_per_rank": False}),
    "accelerate, mixed": dataclasses.replace(MIXTRAL, world=2, ep=2, dtype="mixed", style="accelerate"),
    "transformers": dataclasses.replace(MIXTRAL, world=4, ep=2, style="transformers"),
}
EP_SIZES = {"world 4 ep 2": 2, "world 4 ep 2, rows": 2, "world 4 ep 2, ep only": 2, "world 4, rows": 1}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of SAVED, by name: the checkpoint and the oracle of one run each."""
    root = tmp_path_factory.mktemp("saved")
    run_each(
        [
            dataclasses.replace(spec, save=str(root / name / "c"), oracle=str(root / name / "oracle"))
            for name, spec in SAVED.items()
        ]
    )
    return root


@pytest.mark.parametrize("name", SAVED)
def test_everything_read_equals_what_the_run_gathered(name: str, saved: Path) -> None:
    reader, checkpoint = read(saved / name / "c")
    assert_equal_to_oracle(reader, checkpoint, saved / name / "oracle")
    assert checkpoint.topology.world_size == SAVED[name].world
    if name in EP_SIZES:
        assert checkpoint.topology.ep_size == EP_SIZES[name]


# ---- resuming


def fixture_spec(name: str) -> FsdpSpec:
    return FsdpSpec(**json.loads((FIXTURES / name / "made_with.json").read_text())["spec"])


def losses_after(name: str) -> list[float]:
    return list(json.loads((FIXTURES / name / "oracle" / "oracle.json").read_text())["losses_after"])


# (fixture, target, what the resuming run is): over another topology and back, another style, the same again
SAME_TOPOLOGY: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "torchtitan there and back": ("titan_w4e2", [{"world": 3, "ep": 1}, {"world": 4, "ep": 2}], {}),
    "torchtitan, bf16 compute": ("titan_old_w2", [{"world": 2}], {}),
    "accelerate to plain": ("mixtral_accelerate_w2", [{"style": "plain"}], {"style": "plain"}),
    "accelerate to transformers": (
        "mixtral_accelerate_w2",
        [{"style": "transformers"}],
        {"style": "transformers"},
    ),
    "transformers to accelerate": (
        "qwen3_moe_transformers_w2e2",
        [{"style": "accelerate", "ep": 2}],
        {"style": "accelerate"},
    ),
    "tied weights": ("dense_tied_w3", [{"style": "accelerate"}], {"style": "accelerate"}),
}
OTHER_TOPOLOGY: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ep 2 to world 1": ("titan_w4e2", {"world": 1, "ep": 1}, {}),
    "ep 2 to ep 4": ("titan_w4e2", {"world": 4, "ep": 4}, {}),
    "ep 2 to world 2": ("titan_w4e2", {"world": 2, "ep": 1}, {}),
    "world 2 to ep 2": ("mixtral_accelerate_w2", {"world": 4, "ep": 2}, {}),
    "ep 2 to world 3": ("qwen3_moe_transformers_w2e2", {"world": 3, "ep": 1}, {}),
}


# How 16-bit arithmetic rounds depends on the processor: the run goes on from its own files here, too.
OWN = ("titan_old_w2",)


@pytest.fixture(scope="module")
def conversions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("conversions")


@pytest.fixture(scope="module")
def resumed(conversions: Path) -> dict[str, list[float]]:
    """The losses of two more steps after each conversion; the last run trains nothing and gathers."""
    root = conversions
    specs = []
    for name, (fixture, targets, changes) in SAME_TOPOLOGY.items():
        source = CHECKPOINTS[fixture]
        for number, target in enumerate(targets):
            convert(source, root / name / str(number), **target)
            source = root / name / str(number)
        specs.append(dataclasses.replace(fixture_spec(fixture), **changes, load=str(source), start_step=2))
    for name, (fixture, target, changes) in OTHER_TOPOLOGY.items():
        convert(CHECKPOINTS[fixture], root / name, **target)
        specs.append(
            dataclasses.replace(
                fixture_spec(fixture), **changes, **target, load=str(root / name), start_step=2
            )
        )
    for fixture in OWN:
        own = str(CHECKPOINTS[fixture])
        specs.append(dataclasses.replace(fixture_spec(fixture), load=own, start_step=2))
    spec = fixture_spec("titan_w4e2")
    convert(CHECKPOINTS["titan_w4e2"], root / "as it is", world=3, ep=1)
    still = dataclasses.replace(spec, world=3, ep=1, steps=0, load=str(root / "as it is"))
    results = run_each([*specs, dataclasses.replace(still, oracle=str(root / "oracle"))])[:-1]
    return dict(zip([*SAME_TOPOLOGY, *OTHER_TOPOLOGY, *OWN], (r.losses for r in results), strict=True))


@pytest.mark.parametrize("name", SAME_TOPOLOGY)
def test_two_more_steps_at_the_same_topology_have_identical_digits(
    name: str, resumed: dict[str, list[float]]
) -> None:
    fixture = SAME_TOPOLOGY[name][0]
    assert resumed[name] == (resumed[fixture] if fixture in OWN else losses_after(fixture))


@pytest.mark.parametrize("name", OTHER_TOPOLOGY)
def test_two_more_steps_at_another_topology(name: str, resumed: dict[str, list[float]]) -> None:
    assert resumed[name] == pytest.approx(losses_after(OTHER_TOPOLOGY[name][0]), abs=5e-6)


@pytest.mark.usefixtures("resumed")
def test_weights_written_are_the_weights_a_run_holds(conversions: Path) -> None:
    """Loaded at world 3, gathered, and compared with the source of world 4 EP 2."""
    reader, checkpoint = read(CHECKPOINTS["titan_w4e2"])
    assert_equal_to_oracle(reader, checkpoint, conversions / "oracle")


# ---- between engines


DEEPSPEED = Path(__file__).resolve().parents[2] / "fixtures" / "deepspeed"


def _deepspeed_spec(name: str) -> Any:
    spec_from_dict = importlib.import_module("tests.engine.deepspeed_run").spec_from_dict
    return spec_from_dict(json.loads((DEEPSPEED / name / "made_with.json").read_text())["spec"])


def _as_fsdp(spec: Any, **changes: Any) -> FsdpSpec:
    """The same model, data and optimizer under FSDP2."""
    names = {item.name for item in dataclasses.fields(FsdpSpec)}
    shared = "family world ep experts hidden intermediate vocab layers model_config lr model_seed data_seed"
    known = {key: getattr(spec, key) for key in shared.split() if key in names}
    return FsdpSpec(**{**known, "global_batch": spec.global_batch, "sequence": spec.sequence, **changes})


ENGINES = ("mixtral_w4e2", "mixtral_w2e1")


@pytest.fixture(scope="module")
def crossed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    """AutoEP world 4 EP 2 after two steps, gone on with under FSDP2 + EP; the first run saves."""
    root = tmp_path_factory.mktemp("crossed")
    name = ENGINES[0]
    config = json.loads((DEEPSPEED / name / "config.json").read_text())
    specs = {}
    for style in ("accelerate", "transformers"):
        convert(DEEPSPEED / name / "checkpoint", root / style, world=4, ep=2, style=style, config=config)
        specs[style] = _as_fsdp(
            _deepspeed_spec(name),
            style=style,
            load=str(root / style),
            save=str(root / f"{style} on"),
            start_step=2,
        )
    return root, dict(zip(specs, (result.losses for result in run_each(list(specs.values()))), strict=True))


@pytest.mark.parametrize("style", ["accelerate", "transformers"])
def test_deepspeed_autoep_goes_on_under_fsdp2(
    style: str, crossed: tuple[Path, dict[str, list[float]]]
) -> None:
    truth = json.loads((DEEPSPEED / ENGINES[0] / "oracle" / "oracle.json").read_text())["losses_after"]
    assert crossed[1][style] == pytest.approx(truth, abs=5e-6)


def test_deepspeed_to_fsdp2_and_back(crossed: tuple[Path, dict[str, list[float]]], tmp_path: Path) -> None:
    """AutoEP world 4 EP 2, two steps; FSDP2 + EP, two steps; ZeRO-3 world 2 EP 1, two steps."""
    engine = importlib.import_module("tests.engine.deepspeed_run")
    name, template = ENGINES
    config = json.loads((DEEPSPEED / name / "config.json").read_text())
    reader, checkpoint = open_checkpoint(crossed[0] / "accelerate on")
    _, like = open_checkpoint(DEEPSPEED / template / "checkpoint")
    back = to_autoep(checkpoint, family_of(config))
    layout = Zero3Target().layout(back, ZeroOptions(like=like))
    write_layout(layout, back, reader, tmp_path / "back")
    spec = _deepspeed_spec(template)
    last = dataclasses.replace(spec, start_step=4, load=engine.Load(str(tmp_path / "back")))
    ended, whole = engine.run_each([last, dataclasses.replace(spec, steps=6)])
    assert [*crossed[1]["accelerate"], *ended.losses] == pytest.approx(whole.losses[2:], abs=5e-6)
