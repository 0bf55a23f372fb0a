"""accelerate, the Trainer, transformers and VeOmni themselves: what they save is read whole, what is
written for them they load.

The truth is what each run gathers itself, and the model it publishes with transformers' save_pretrained.
"""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ckpt_tool import api
from tests.engine.environments import python_with
from tests.engine.frameworks_run import FrameworkSpec, run_each
from tests.formats.dcp_tools import assert_equal_to_oracle, oracle, read

pytestmark = pytest.mark.engine

# transformers does not load to a device mesh without accelerate
ENVIRONMENTS = {
    ("accelerate==1.15.0",): ("accelerate", "trainer"),
    ("transformers==5.24.0", "accelerate==1.15.0"): ("transformers",),
    ("veomni==0.1.12",): ("veomni",),
}
TIED = {"tie_word_embeddings": True}

SAVED: dict[str, FrameworkSpec] = {
    "accelerate": FrameworkSpec("accelerate"),
    "accelerate, tied": FrameworkSpec("accelerate", family="mixtral", model_config=TIED),
    "trainer": FrameworkSpec("trainer"),
    "transformers": FrameworkSpec("transformers"),
    "transformers ep 2": FrameworkSpec("transformers", world=4, ep=2),
    "veomni": FrameworkSpec("veomni"),
    "veomni ep 2": FrameworkSpec("veomni", world=4, ep=2),
}
# name: (source, what the conversion is asked for, the run that loads it)
LOADED: dict[str, tuple[str, dict[str, Any], FrameworkSpec]] = {
    "accelerate": ("accelerate", {"world": 3}, FrameworkSpec("accelerate", world=3)),
    "accelerate, tied": (
        "accelerate, tied",
        {"world": 1},
        FrameworkSpec("accelerate", world=1, family="mixtral", model_config=TIED),
    ),
    "trainer": ("trainer", {"world": 3}, FrameworkSpec("trainer", world=3)),
    "transformers to ep 2": (
        "transformers",
        {"world": 4, "ep": 2},
        FrameworkSpec("transformers", world=4, ep=2),
    ),
    "transformers from ep 2": ("transformers ep 2", {"world": 2, "ep": 1}, FrameworkSpec("transformers")),
    "veomni to ep 2": ("veomni", {"world": 4, "ep": 2}, FrameworkSpec("veomni", world=4, ep=2)),
    "veomni from ep 2": ("veomni ep 2", {"world": 2, "ep": 1}, FrameworkSpec("veomni")),
    "transformers to accelerate": (
        "transformers ep 2",
        {"world": 2, "ep": 1, "style": "accelerate"},
        FrameworkSpec("accelerate", scheduler=False),
    ),
    "accelerate to transformers": (
        "accelerate",
        {"world": 4, "ep": 2, "style": "transformers"},
        FrameworkSpec("transformers", world=4, ep=2),
    ),
    "veomni to accelerate": (
        "veomni ep 2",
        {"world": 2, "ep": 1, "style": "accelerate"},
        FrameworkSpec("accelerate", scheduler=False),
    ),
}


def run_all(specs: dict[str, FrameworkSpec]) -> None:
    """Two interpreters at once, for most of the time each imports."""
    jobs = [
        (python_with(*requirements), [spec for spec in specs.values() if spec.framework in frameworks])
        for requirements, frameworks in ENVIRONMENTS.items()
    ]
    with ThreadPoolExecutor(max_workers=2) as pool:
        for done in [pool.submit(run_each, ours, python=python) for python, ours in jobs]:
            done.result()


def checkpoint(root: Path, name: str) -> Path:
    return root / name / "checkpoint-2"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of SAVED, by name: a checkpoint, what the run gathered, and the model it published."""
    root = tmp_path_factory.mktemp("saved")
    specs = {}
    for name, spec in SAVED.items():
        specs[name] = dataclasses.replace(
            spec,
            save=str(checkpoint(root, name)),
            gathered=str(root / name / "gathered"),
            published=str(root / name / "published"),
        )
    run_all(specs)
    return root


@pytest.fixture(scope="module")
def loaded(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of LOADED: converted, loaded by a run with another model and other options, and gathered."""
    root = tmp_path_factory.mktemp("loaded")
    specs = {}
    for name, (source, options, spec) in LOADED.items():
        target = checkpoint(root, name)
        config = saved / source / "published"
        api.convert(checkpoint(saved, source), target, to="dcp", config=config, **options)
        changes: dict[str, Any] = {"load": str(target), "gathered": str(root / name / "gathered")}
        if spec.framework == "accelerate":
            changes["merged"] = {str(target / "pytorch_model_fsdp_0"): str(root / name / "merged")}
        specs[name] = dataclasses.replace(spec, **changes, steps=0, model_seed=99, lr=3e-3)
    run_all(specs)
    return root


@pytest.mark.parametrize("name", SAVED)
def test_everything_read_equals_what_the_run_gathered(name: str, saved: Path) -> None:
    reader, found = read(checkpoint(saved, name))
    assert_equal_to_oracle(reader, found, saved / name / "gathered")
    assert (found.topology.world_size, found.training.step) == (SAVED[name].world, 2)
    keys = {given: key for key, names in found.layout_hint.names.items() for given in names}
    groups = {
        keys[parameter]: json.loads(json.dumps(dict(group.options)))
        for group in found.training.param_groups
        for parameter in group.parameters
    }
    assert groups == groups_of(saved / name / "gathered")
    assert len({group["weight_decay"] for group in groups.values()}) == 2


@pytest.mark.parametrize("name", LOADED)
def test_what_is_written_the_framework_loads(name: str, saved: Path, loaded: Path) -> None:
    truth, found = (root / at / "gathered" for root, at in ((saved, LOADED[name][0]), (loaded, name)))
    assert_equal(oracle(found), oracle(truth))
    groups, expected = groups_of(found), groups_of(truth)
    for options in [*groups.values(), *expected.values()]:
        options.pop("initial_lr", None)  # where there is a scheduler
    assert groups == expected


@pytest.mark.parametrize("name", SAVED)
def test_consolidated_is_what_transformers_publishes(name: str, saved: Path, tmp_path: Path) -> None:
    published = saved / name / "published"
    api.consolidate(checkpoint(saved, name), tmp_path / "hub", config=published)
    assert_equal(
        load_file(tmp_path / "hub" / "model.safetensors"), load_file(published / "model.safetensors")
    )


@pytest.mark.parametrize("name", [n for n, (*_, spec) in LOADED.items() if spec.framework == "accelerate"])
def test_accelerate_merges_what_is_written(name: str, saved: Path, loaded: Path) -> None:
    """`accelerate merge-weights` finds the weights the source's run gathered."""
    truth = saved / LOADED[name][0] / "gathered" / "weight.safetensors"
    merged = load_file(loaded / name / "merged" / "model.safetensors")
    merged.pop("lm_head.weight") if "tied" in name else None
    assert_equal(merged, load_file(truth))


def groups_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The options of each parameter's group."""
    return dict(json.loads((folder / "groups.json").read_text()))


def assert_equal(found: dict[Any, torch.Tensor], truth: dict[Any, torch.Tensor]) -> None:
    assert found.keys() == truth.keys()
    for key, value in truth.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key
