"""DeepSpeed releases from the first with partition-native AutoEP on: what each saves we read, what we write
each loads.

Every release has an environment of its own (environments.py). Extensions that DeepSpeed builds on the fly
are kept apart, too: two releases in one directory overwrite each other's.

Before 0.19.7 an engine that is given ``model_parameters`` dies on AutoEP's replaced parameters, so none are
given (``param_groups="module"``).
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ckpt_tool import api
from tests.conftest import canonical_key, raw, values_of
from tests.engine.deepspeed_run import Load, RunResult, RunSpec, Save, run_each
from tests.engine.environments import python_with
from tests.formats.test_reshard import differences, load

pytestmark = pytest.mark.engine

RELEASES = ("0.19.3", "0.19.5", "0.19.8")
FIRST, LAST = RELEASES[0], RELEASES[-1]
TAG = "global_step2"
STATE = {"fp32": "master", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
SPEC = RunSpec(
    family="mixtral", world=4, ep=2, experts=4, hidden=21, intermediate=13, param_groups="module"
)
TARGETS = {"w2e2": (2, 2), "w4e4": (4, 4)}

each_release = pytest.mark.parametrize("release", RELEASES)


# ---- environments


@contextmanager
def extensions_apart(release: str) -> Iterator[None]:
    directory = Path(tempfile.gettempdir(), f"torch_extensions_{os.getuid()}_test_deepspeed_{release}")
    directory.mkdir(mode=0o700, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(directory))
        patch.delenv("PYTHONPATH", raising=False)
        yield


# ---- two stages of runs per release, and what we write between them


@dataclass
class Release:
    """What an engine of one release saved and lost, and where our work of it lies."""

    root: Path
    outcomes: dict[str, RunResult | RuntimeError] = field(default_factory=dict)

    @property
    def saved(self) -> Path:
        return self.root / "saved"

    def result(self, name: str) -> RunResult:
        outcome = self.outcomes[name]
        if isinstance(outcome, RuntimeError):
            raise outcome
        return outcome

    def run(self, release: str, specs: dict[str, RunSpec]) -> None:
        python = str(python_with(f"deepspeed=={release}"))
        with extensions_apart(release):
            found = run_each(list(specs.values()), python=python, timeout=600)
        self.outcomes |= dict(zip(specs, found, strict=True))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Release]:
    """Two steps, saved and gathered; and four steps without an interruption."""
    found = {release: Release(tmp_path_factory.mktemp("release")) for release in RELEASES}
    for release, own in found.items():
        two = dataclasses.replace(SPEC, steps=2, save=Save(str(own.saved), client_state={"note": "hello"}))
        specs = {
            "two": dataclasses.replace(two, gather_oracle=str(own.root / "oracle")),
            "four": dataclasses.replace(SPEC, steps=4),
        }
        own.run(release, specs)
    return found


@pytest.fixture(scope="module")
def resumed(trained: dict[str, Release]) -> dict[str, Release]:
    """What we make of each release's checkpoint, loaded by an engine of that release; and what we make of
    the last one's, loaded by the first."""
    for release, own in trained.items():
        own.result("two")
        resume = dataclasses.replace(SPEC, model_seed=99, start_step=2, steps=2)
        specs = {}
        for name, (world, ep) in TARGETS.items():
            api.reshard(own.saved, own.root / name, world=world, ep=ep)
            again = Save(str(own.root / f"{name}_again"), TAG, {"note": "hello"}, after=0)
            loaded = Load(str(own.root / name))
            specs[name] = dataclasses.replace(resume, world=world, ep=ep, load=loaded, save=again)
        api.convert(own.saved, own.root / "universal", to="universal")
        universal = Load(str(own.root / "universal"), universal=True)
        specs["universal"] = dataclasses.replace(resume, world=2, ep=1, load=universal, clone_step=True)
        if release == FIRST:
            later = trained[LAST]
            later.result("two")
            api.reshard(later.saved, own.root / "of_the_last", world=2, ep=2)
            of_the_last = Load(str(own.root / "of_the_last"))
            specs["of the last"] = dataclasses.replace(resume, world=2, ep=2, load=of_the_last)
            api.reshard(later.saved, own.root / "light", world=2, ep=2, weights_only=True)
            light = Load(str(own.root / "light"), module_only=True, optimizer_states=False)
            specs["light"] = dataclasses.replace(resume, world=2, ep=2, load=light)
        own.run(release, specs)
    return trained


# ---- reading


@each_release
def test_environment_has_the_release_it_is_named_for(release: str, trained: dict[str, Release]) -> None:
    assert trained[release].result("two").versions["deepspeed"] == release


@each_release
def test_every_value_a_release_saved_is_read_as_its_engine_held_it(
    release: str, trained: dict[str, Release]
) -> None:
    from safetensors.torch import load_file

    own = trained[release]
    own.result("two")
    found = values_of(api.catalogue(own.saved))
    expected = {
        (str(canonical_key(name)), STATE[state]): raw(tensor)
        for state in STATE
        for name, tensor in load_file(own.root / "oracle" / f"{state}.safetensors").items()
    }
    assert found == expected


@each_release
def test_what_a_release_saved_is_described_and_passes_its_own_check(
    release: str, trained: dict[str, Release]
) -> None:
    own = trained[release]
    own.result("two")
    checkpoint = api.catalogue(own.saved)
    assert (checkpoint.training.engine_version, checkpoint.training.step) == (release, 2)
    assert (checkpoint.topology.world_size, checkpoint.topology.ep_size) == (4, 2)
    assert {scalar.value for scalar in checkpoint.scalars.values()} == {2.0}
    assert checkpoint.training.client_state["note"] == "hello"
    assert api.verify(own.saved).passed


# ---- writing


@each_release
@pytest.mark.parametrize("name", [*TARGETS, "universal"])
def test_engine_of_the_release_resumes_exactly_from_what_we_wrote(
    name: str, release: str, resumed: dict[str, Release]
) -> None:
    found = resumed[release].result(name)
    assert found.losses == resumed[release].result("four").losses[2:]
    assert (found.global_step, set(found.adam_steps)) == (4, {4.0})
    assert found.versions["deepspeed"] == release


@each_release
@pytest.mark.parametrize("name", TARGETS)
def test_engine_of_the_release_saves_again_what_it_loaded_in_the_very_same_form(
    name: str, release: str, resumed: dict[str, Release]
) -> None:
    """So the files have what that release puts into them, not what the last one does."""
    own = resumed[release]
    own.result(name)
    mine, again = own.root / name / TAG, own.root / f"{name}_again" / TAG
    files = sorted(path.name for path in again.glob("*.pt"))
    assert files == sorted(path.name for path in mine.glob("*.pt"))
    ignored = frozenset({"ds_config/train_micro_batch_size_per_gpu"})
    for file in files:
        assert differences(load(mine / file), load(again / file), ignored=ignored) == [], file


def test_first_release_resumes_exactly_from_a_checkpoint_of_the_last(resumed: dict[str, Release]) -> None:
    found = resumed[FIRST].result("of the last")
    assert found.losses == resumed[LAST].result("four").losses[2:]
    assert found.versions["deepspeed"] == FIRST


def test_first_release_loads_weights_alone_of_a_checkpoint_of_the_last(resumed: dict[str, Release]) -> None:
    found = resumed[FIRST].result("light")
    assert found.losses[0] == resumed[LAST].result("four").losses[2]
    assert set(found.adam_steps) == {2.0}
