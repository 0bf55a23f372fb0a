"""One test per way a ZeRO-3 checkpoint can be wrong.

Each is refused before a byte is written, by an error of the right kind that names the file and what to do.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_tool import api
from ckpt_tool.canonical import DType
from ckpt_tool.containers import pickle_records
from ckpt_tool.errors import (
    CkptToolError,
    MismatchError,
    UnreadableError,
    UnsafePickleError,
    UsageError,
)
from tests import synthetic
from tests.synthetic import Layer, Save, uniform

# What a message has to offer: an action, or a plain statement that there is none.
ADVICE = re.compile(
    r"\b(copy|remove|pass|choose|set|save|use|run|try|delete|convert|replace|check|restore|"
    r"not supported|does not read|reads version|knows version|cannot be repaired)\b",
    re.IGNORECASE,
)
FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "deepspeed"
LAYER = Layer(0, uniform(4, 2), 3, 2)
DENSE = {"model.embed.weight": (7, 3), "model.norm.weight": (3,)}


def model_file(rank: int) -> str:
    return f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"


def optim_file(rank: int) -> str:
    return f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound checkpoint: world 4, EP 2, one MoE layer, a buffer, a frozen parameter."""
    full = synthetic.model(DENSE, [LAYER], buffers={"model.buffer": (5,)}, frozen={"model.frozen": (6,)})
    return synthetic.write(tmp_path_factory.mktemp("sound"), full, Save(world=4))


@pytest.fixture
def tag(made: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(made, tmp_path / "source" / made.name))


@pytest.fixture
def two_layers(tmp_path: Path) -> Path:
    """A sound checkpoint of two MoE layers: world 4, EP 2."""
    layers = [Layer(number, uniform(4, 2), 3, 2) for number in range(2)]
    return synthetic.write(tmp_path / "two", synthetic.model(DENSE, layers), Save(world=4))


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A sound plain ZeRO-3 checkpoint of 3 ranks."""
    return synthetic.write(tmp_path / "plain", synthetic.model(DENSE), Save(world=3))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Load a file, let ``change`` alter what it holds, and save it again."""
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def flip(tensor: torch.Tensor, index: int = 0) -> None:
    """Flip the lowest bit of one element."""
    tensor.detach().reshape(-1).view(torch.int32)[index] ^= 1


def edit_entry(tag: Path, ranks: range | list[int], change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the one entry of ds_autoep_layers in the files of some ranks."""
    for rank in ranks:
        edit(tag / model_file(rank), lambda states: change(states["ds_autoep_layers"][0]))


def refused(
    source: Path,
    kind: type[CkptToolError],
    *names: str,
    opening: bool = True,
    advice: bool = True,
    exact: bool = True,
) -> str:
    """Assert that opening and converting refuse ``source`` alike and leave nothing; return the message."""
    if opening:
        with pytest.raises(kind) as opened:
            api.catalogue(source)
        assert type(opened.value) is kind or not exact
    places = source
    while not places.is_dir():
        places = places.parent
    out = Path(os.path.commonpath([places])).parent / "empty-place"
    out.mkdir()
    with pytest.raises(kind) as raised:
        api.convert(source, out / "result", to="universal")
    assert type(raised.value) is kind or not exact
    assert list(out.iterdir()) == [], "something was left under the destination"
    message = str(raised.value)
    for name in names:
        assert name in message, f"{name!r} is not in: {message}"
    if advice:
        assert ADVICE.search(message), f"nothing to do in: {message}"
    return message


def test_the_sound_checkpoints_are_not_refused(tag: Path, plain: Path, tmp_path: Path) -> None:
    for number, source in enumerate((tag, plain)):
        assert api.convert(source, tmp_path / str(number), to="universal", verify=True).verdict


# ---- files missing, truncated, or others'


def test_missing_model_file_of_a_rank(tag: Path) -> None:
    (tag / model_file(2)).unlink()
    refused(tag, UnreadableError, model_file(2))


def test_missing_optimizer_file_of_a_rank(tag: Path) -> None:
    (tag / optim_file(1)).unlink()
    refused(tag, UnreadableError, optim_file(1))


def test_missing_files_of_the_last_rank(tag: Path) -> None:
    (tag / model_file(3)).unlink()
    (tag / optim_file(3)).unlink()
    refused(tag, UnreadableError, model_file(0), "4", "3")


def test_files_of_a_larger_run_left_over(tag: Path) -> None:
    shutil.copy(tag / model_file(3), tag / model_file(4))
    shutil.copy(tag / optim_file(3), tag / optim_file(4))
    refused(tag, UnreadableError, "5", "4", advice=False)


def test_optimizer_file_left_over_from_another_precision(tag: Path) -> None:
    shutil.copy(tag / optim_file(0), tag / f"bf16_{optim_file(0)}")
    refused(tag, UnreadableError, f"bf16_{optim_file(0)}")


def size_after(cut: str, size: int, archive: Path) -> int:
    with zipfile.ZipFile(archive) as opened:
        directory = opened.start_dir
        data = max(opened.infolist(), key=lambda info: info.file_size)
        within = data.header_offset + data.file_size // 2
    return {
        "empty": 0,
        "one byte": 1,
        "within the first header": 20,
        "within the largest record": within,
        "at the start of the central directory": directory,
        "within the central directory": directory + (size - directory) // 2,
        "within the end record": size - 10,
        "one byte short": size - 1,
    }[cut]


CUTS = (
    "empty",
    "one byte",
    "within the first header",
    "within the largest record",
    "at the start of the central directory",
    "within the central directory",
    "within the end record",
    "one byte short",
)


@pytest.mark.parametrize("name", [model_file(1), optim_file(3)])
@pytest.mark.parametrize("cut", CUTS)
def test_truncated_file(cut: str, name: str, tag: Path) -> None:
    path = tag / name
    os.truncate(path, size_after(cut, path.stat().st_size, path))
    refused(tag, UnreadableError, name)


def test_file_with_a_hole_cut_out_of_its_data(tag: Path) -> None:
    path = tag / optim_file(0)
    data = path.read_bytes()
    path.write_bytes(data[:2000] + data[2600:])
    refused(tag, UnreadableError, optim_file(0))


def test_file_of_zeros(tag: Path) -> None:
    path = tag / optim_file(0)
    path.write_bytes(bytes(path.stat().st_size))
    refused(tag, UnreadableError, optim_file(0))


def test_file_that_is_no_archive(tag: Path) -> None:
    (tag / model_file(0)).write_text("<html>404</html>")
    refused(tag, UnreadableError, model_file(0))


def test_file_that_is_a_directory(tag: Path) -> None:
    (tag / model_file(0)).unlink()
    (tag / model_file(0)).mkdir()
    with pytest.raises(CkptToolError, match=re.escape(model_file(0))):
        api.catalogue(tag)


def test_compressed_archive(tag: Path) -> None:
    path = tag / model_file(0)
    records = zipfile.ZipFile(path)
    content = {info.filename: records.read(info) for info in records.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in content.items():
            packed.writestr(name, data)
    refused(tag, UnreadableError, model_file(0), "compressed", advice=False)


def test_model_file_of_the_legacy_tar_era(tag: Path) -> None:
    torch.save({"module": {}}, tag / model_file(0), _use_new_zipfile_serialization=False)
    refused(tag, UnreadableError, model_file(0))


def test_model_file_that_is_another_pickle(tag: Path) -> None:
    torch.save([1, 2, 3], tag / model_file(0))
    refused(tag, UnreadableError, model_file(0), advice=False)


def test_optimizer_file_that_is_another_pickle(tag: Path) -> None:
    torch.save([1, 2, 3], tag / optim_file(0))
    refused(tag, UnreadableError, optim_file(0), advice=False)


def test_optimizer_file_of_stage_2(tag: Path) -> None:
    edit(tag / optim_file(1), lambda o: o["optimizer_state_dict"].update(zero_stage=2))
    refused(tag, UnreadableError, optim_file(1), "stage 2", advice=False)


def test_optimizer_file_without_flat_groups(tag: Path) -> None:
    edit(tag / optim_file(1), lambda o: o["optimizer_state_dict"].pop("fp32_flat_groups"))
    refused(tag, UnreadableError, optim_file(1), "fp32_flat_groups", advice=False)


# ---- files that are sound, but not of one save


@pytest.mark.parametrize("key", ["global_steps", "global_samples", "skipped_steps"])
def test_model_file_from_another_step(key: str, tag: Path) -> None:
    edit(tag / model_file(2), lambda states: states.update({key: 99}))
    refused(tag, MismatchError, model_file(2), key, "99")


def test_optimizer_file_from_another_step(tag: Path) -> None:
    def later(content: Any) -> None:
        for state in content["optimizer_state_dict"]["optimizer_state_dict"]["state"].values():
            state["step"] += 1

    edit(tag / optim_file(2), later)
    message = refused(tag, MismatchError, optim_file(2), "step")
    assert "2.0" in message
    assert "3.0" in message


def test_optimizer_step_of_one_expert_sub_group_differs(tag: Path) -> None:
    """EP rank 1's files alone: no rank of its own partition group contradicts it."""

    def later(content: Any) -> None:
        content["optimizer_state_dict"]["optimizer_state_dict"]["state"][1]["step"] += 1

    for rank in (1, 3):
        edit(tag / optim_file(rank), later)
    refused(tag, MismatchError, optim_file(1), "step", advice=False)


def test_learning_rate_schedule_differs(tag: Path) -> None:
    edit(tag / model_file(1), lambda states: states.update(lr_scheduler={"last_batch_iteration": 50}))
    refused(tag, MismatchError, model_file(1), "lr_scheduler")


def test_deepspeed_version_differs(tag: Path) -> None:
    edit(tag / model_file(1), lambda states: states.update(ds_version="0.19.3"))
    refused(tag, MismatchError, model_file(1), "0.19.3")


def test_world_size_differs_in_one_file(tag: Path) -> None:
    edit(tag / model_file(1), lambda states: states.update(dp_world_size=8))
    refused(tag, MismatchError, model_file(1), "dp_world_size")


def test_world_size_differs_in_all_files(tag: Path) -> None:
    for rank in range(4):
        edit(tag / model_file(rank), lambda states: states.update(dp_world_size=8))
    refused(tag, UnreadableError, model_file(0), "8", "4", advice=False)


def test_model_and_optimizer_file_of_rank_1_in_rank_0s_place(tag: Path) -> None:
    for name in (model_file, optim_file):
        shutil.copy(tag / name(1), tag / name(0))
    refused(tag, MismatchError, model_file(0), "EP rank 1")


def test_optimizer_file_of_rank_1_in_rank_0s_place(tag: Path) -> None:
    shutil.copy(tag / optim_file(1), tag / optim_file(0))
    refused(tag, MismatchError, optim_file(0), advice=False)


def test_model_file_of_rank_1_in_rank_0s_place(tag: Path) -> None:
    """EP rank 0's experts would be taken for EP rank 1's."""
    shutil.copy(tag / model_file(1), tag / model_file(0))
    refused(tag, MismatchError, model_file(0), advice=False)


def test_model_file_of_the_edp_peer_in_rank_0s_place(tag: Path) -> None:
    """Rank 2 has the same experts; frozen fragments and the EDP rank differ."""
    shutil.copy(tag / model_file(2), tag / model_file(0))
    refused(tag, MismatchError, model_file(0), advice=False)


def test_files_of_another_model(tag: Path, tmp_path: Path) -> None:
    other = synthetic.model({**DENSE, "model.more.weight": (2,)}, [LAYER], frozen={"model.frozen": (6,)})
    theirs = synthetic.write(tmp_path / "other", other, Save(world=4))
    for name in (model_file, optim_file):
        shutil.copy(theirs / name(3), tag / name(3))
    refused(tag, MismatchError, model_file(3), "model.more.weight", advice=False)


def test_buffer_that_differs_between_ranks(tag: Path) -> None:
    edit(tag / model_file(2), lambda states: flip(states["module"]["model.buffer"]))
    refused(tag, MismatchError, model_file(2), "model.buffer", advice=False)


def test_frozen_parameters_that_differ_between_ranks(tag: Path) -> None:
    edit(tag / model_file(2), lambda states: states["frozen_param_shapes"].update({"model.frozen": (5,)}))
    refused(tag, MismatchError, model_file(2), "frozen", advice=False)


def test_frozen_fragment_of_another_length(tag: Path) -> None:
    edit(
        tag / model_file(2),
        lambda states: states["frozen_param_fragments"].update({"model.frozen": torch.ones(9)}),
    )
    refused(tag, MismatchError, model_file(2), "model.frozen", advice=False)


def test_frozen_fragment_of_another_dtype(tag: Path) -> None:
    def halve(states: Any) -> None:
        fragments = states["frozen_param_fragments"]
        fragments["model.frozen"] = fragments["model.frozen"].half()

    edit(tag / model_file(2), halve)
    refused(tag, MismatchError, model_file(2), "model.frozen", advice=False)


# ---- shapes and partitions


def test_shape_of_a_dense_parameter_differs(tag: Path) -> None:
    edit(tag / model_file(1), lambda s: s["param_shapes"][0].update({"model.embed.weight": (3, 7)}))
    refused(tag, MismatchError, model_file(1), "model.embed.weight", advice=False)


def test_shape_of_experts_differs(tag: Path) -> None:
    name = "model.layers.0.mlp.experts.w1"
    for rank in (1, 3):
        edit(tag / model_file(rank), lambda s: s["param_shapes"][1].update({name: (2, 3, 2)}))
    refused(tag, MismatchError, name, advice=False)


def test_number_of_experts_in_shapes_contradicts_the_placement(tag: Path) -> None:
    name = "model.layers.0.mlp.experts.w1"
    for rank in range(4):
        edit(tag / model_file(rank), lambda s: s["param_shapes"][1].update({name: (4, 1, 3)}))
    refused(tag, MismatchError, name, advice=False)


def test_shape_that_is_no_shape(tag: Path) -> None:
    edit(tag / model_file(1), lambda s: s["param_shapes"][0].update({"model.embed.weight": ("7", 3)}))
    refused(tag, UnreadableError, model_file(1), "model.embed.weight", advice=False)


def test_param_shapes_that_are_no_list(tag: Path) -> None:
    edit(tag / model_file(1), lambda s: s.update(param_shapes=None))
    refused(tag, UnreadableError, model_file(1), advice=False)


def test_parameter_listed_by_one_rank_only(tag: Path) -> None:
    """Rank 0 is sound; nothing may be read from it alone."""

    def more(content: Any) -> None:
        zero = content["optimizer_state_dict"]
        zero["fp32_flat_groups"].append(torch.ones(1))
        zero["optimizer_state_dict"]["state"][2] = {"step": torch.tensor(2.0)}
        zero["ds_zero_partition_groups"].append({**zero["ds_zero_partition_groups"][0], "sub_group": 2})

    edit(tag / model_file(3), lambda states: states["param_shapes"].append({"model.hidden": (4,)}))
    edit(tag / optim_file(3), more)
    refused(tag, MismatchError, model_file(3), "model.hidden", advice=False)


def test_parameter_in_two_sub_groups(tag: Path) -> None:
    edit(tag / model_file(0), lambda s: s["param_shapes"][1].update({"model.norm.weight": (3,)}))
    refused(tag, UnreadableError, advice=False)


def test_parameter_in_two_sub_groups_that_hold_it_both(tmp_path: Path) -> None:
    """Everything fits together; but which of the two is the parameter's?"""
    groups = [[["model.embed.weight"], ["model.norm.weight"]]]
    tag = synthetic.write(tmp_path / "plain", synthetic.model(DENSE), Save(world=3, groups=groups))

    def doubled(content: Any) -> None:
        zero = content["optimizer_state_dict"]
        state = zero["optimizer_state_dict"]["state"]
        zero["fp32_flat_groups"][1] = zero["fp32_flat_groups"][0]
        state[1] = state[0]

    for rank in range(3):
        edit(tag / model_file(rank), lambda s: s["param_shapes"].__setitem__(1, s["param_shapes"][0]))
        edit(tag / optim_file(rank), doubled)
    refused(tag, UnreadableError, model_file(0), "model.embed.weight is in two sub-groups", advice=False)


def test_number_of_flat_groups_differs(tag: Path) -> None:
    edit(tag / optim_file(1), lambda o: o["optimizer_state_dict"]["fp32_flat_groups"].pop())
    refused(tag, UnreadableError, optim_file(1), model_file(1), advice=False)


def test_flat_group_of_another_length(tag: Path) -> None:
    def shorten(content: Any) -> None:
        zero = content["optimizer_state_dict"]
        zero["fp32_flat_groups"][0] = zero["fp32_flat_groups"][0][:-1].clone()
        state = zero["optimizer_state_dict"]["state"][0]
        state.update({key: state[key][:-1].clone() for key in ("exp_avg", "exp_avg_sq")})

    edit(tag / optim_file(1), shorten)
    refused(tag, MismatchError, optim_file(1), model_file(1), advice=False)


def test_moment_of_another_length_than_its_master(tag: Path) -> None:
    def shorten(content: Any) -> None:
        state = content["optimizer_state_dict"]["optimizer_state_dict"]["state"][0]
        state["exp_avg"] = state["exp_avg"][:-1].clone()

    edit(tag / optim_file(1), shorten)
    refused(tag, UnreadableError, optim_file(1), "exp_avg", advice=False)


def test_moment_missing_on_one_rank(tag: Path) -> None:
    edit(
        tag / optim_file(1),
        lambda o: o["optimizer_state_dict"]["optimizer_state_dict"]["state"][0].pop("exp_avg"),
    )
    refused(tag, MismatchError, optim_file(1), "exp_avg", advice=False)


def test_moment_missing_on_one_ep_rank(tag: Path) -> None:
    for rank in (1, 3):
        edit(
            tag / optim_file(rank),
            lambda o: o["optimizer_state_dict"]["optimizer_state_dict"]["state"][1].pop("exp_avg"),
        )
    refused(tag, MismatchError, "exp_avg", advice=False)


def test_moment_of_another_dtype_on_one_ep_rank(tag: Path) -> None:
    """The two ranks that share the EP rank's experts agree; the other EP rank does not."""

    def halved(content: Any) -> None:
        state = content["optimizer_state_dict"]["optimizer_state_dict"]["state"][1]
        state["exp_avg"] = state["exp_avg"].bfloat16()

    for rank in (1, 3):
        edit(tag / optim_file(rank), halved)
    refused(tag, MismatchError, "EP ranks disagree", "exp_avg", advice=False)


def test_extra_moment_on_one_ep_rank(tag: Path) -> None:
    """EP rank 0, which is read first, has no such state: it must not be lost without a word."""

    def more(content: Any) -> None:
        zero = content["optimizer_state_dict"]
        zero["optimizer_state_dict"]["state"][1]["max_exp_avg_sq"] = torch.ones_like(
            zero["fp32_flat_groups"][1].detach()
        )

    for rank in (1, 3):
        edit(tag / optim_file(rank), more)
    refused(tag, MismatchError, "max_exp_avg_sq", advice=False)


def test_optimizer_state_that_is_no_tensor(tag: Path) -> None:
    edit(
        tag / optim_file(1),
        lambda o: o["optimizer_state_dict"]["optimizer_state_dict"]["state"][0].update(exp_avg="x"),
    )
    refused(tag, UnreadableError, optim_file(1), "exp_avg")


def test_flat_group_that_is_not_contiguous(tag: Path) -> None:
    def stride(content: Any) -> None:
        flats = content["optimizer_state_dict"]["fp32_flat_groups"]
        flats[0] = flats[0].detach().repeat_interleave(2)[::2]

    edit(tag / optim_file(1), stride)
    refused(tag, UnreadableError, optim_file(1), advice=False)


def test_partition_count_of_a_sub_group_differs(tag: Path) -> None:
    edit(
        tag / optim_file(1),
        lambda o: o["optimizer_state_dict"]["ds_zero_partition_groups"][1].update(partition_count=4),
    )
    refused(tag, MismatchError, optim_file(1), "partition_count", advice=False)


def test_partition_count_of_a_plain_checkpoint_differs(plain: Path) -> None:
    edit(plain / optim_file(1), lambda o: o["optimizer_state_dict"].update(partition_count=6))
    refused(plain, MismatchError, optim_file(1), "partition_count", advice=False)


def test_partition_groups_lack_a_sub_group(tag: Path) -> None:
    edit(tag / optim_file(1), lambda o: o["optimizer_state_dict"]["ds_zero_partition_groups"].pop())
    refused(tag, UnreadableError, optim_file(1), "ds_zero_partition_groups", advice=False)


def test_partition_groups_missing_where_there_are_experts(tag: Path) -> None:
    edit(tag / optim_file(1), lambda o: o["optimizer_state_dict"].pop("ds_zero_partition_groups"))
    refused(tag, UnreadableError, optim_file(1), "ds_zero_partition_groups", advice=False)


def test_sub_group_of_experts_and_dense_parameters(tmp_path: Path) -> None:
    full = synthetic.model({"a": (4,)}, [LAYER])
    router, *experts = [name for name in full.parameters if name != "a"]
    save = Save(world=2, groups=[[["a", experts[0]], [router]], [experts[1:]]])
    tag = synthetic.write(tmp_path / "source", full, save)
    refused(tag, UnreadableError, optim_file(0), "mixes", advice=False)


def test_parameter_group_refers_to_no_sub_group(tag: Path) -> None:
    edit(
        tag / optim_file(0),
        lambda o: o["optimizer_state_dict"]["optimizer_state_dict"]["param_groups"][0].update(params=[7]),
    )
    refused(tag, UnreadableError, optim_file(0), "7", advice=False)


def test_module_names_a_parameter_of_no_values(tag: Path) -> None:
    for rank in range(4):
        edit(tag / model_file(rank), lambda s: s["module"].update({"model.lost": torch.empty(0)}))
    refused(tag, UnreadableError, model_file(0), "model.lost", advice=False)


def test_tied_parameter_that_has_values_of_its_own(tag: Path) -> None:
    tied = {"model.norm.weight": "model.embed.weight"}
    edit(tag / model_file(0), lambda states: states.update(shared_params=tied))
    refused(tag, MismatchError, model_file(0), "model.norm.weight has values of its own")


@pytest.mark.parametrize(
    "name", ["../../../../evil", "/tmp/ckpt-tool-test-evil", "a/../../../../../evil", "."]
)
def test_parameter_whose_name_leads_out_of_the_destination(name: str, tmp_path: Path) -> None:
    """Names become directories of a Universal checkpoint."""
    source = tmp_path / "a" / "b" / "c" / "d" / "source"
    tag = synthetic.write(source, synthetic.model({"ok": (2,), name: (3,)}), Save(world=1))
    before = {path for path in tmp_path.rglob("*") if source not in path.parents}
    out = source.parent / "out"
    with pytest.raises(CkptToolError):
        api.convert(tag, out / "result", to="universal")
    left = {path for path in tmp_path.rglob("*") if source not in path.parents} - before - {out}
    assert left == set()
    assert not Path("/tmp/ckpt-tool-test-evil").exists()


# ---- ds_autoep_layers


FIELDS = (
    "moe_layer_id module_path num_experts num_local_experts ep_size expert_key_prefix "
    "checkpoint_format_version ep_group_name ep_rank expert_data_parallel_rank "
    "expert_data_parallel_world_size global_expert_start global_expert_end"
).split()


@pytest.mark.parametrize("field", FIELDS)
def test_layer_metadata_lacks_a_field(field: str, tag: Path) -> None:
    edit_entry(tag, [1], lambda entry: entry.pop(field))
    refused(tag, UnreadableError, model_file(1), field, advice=False)


@pytest.mark.parametrize("value", ["text", {"a": 1}, [None], [["x"]]], ids=str)
def test_layer_metadata_that_is_no_list_of_entries(value: Any, tag: Path) -> None:
    edit(tag / model_file(1), lambda states: states.update(ds_autoep_layers=value))
    refused(tag, UnreadableError, model_file(1), "ds_autoep_layers", advice=False)


@pytest.mark.parametrize("value", ["4", 4.0, None, -1, True, [4]], ids=str)
@pytest.mark.parametrize("field", ["num_experts", "num_local_experts", "ep_size", "ep_rank"])
def test_layer_metadata_with_a_count_that_is_none(field: str, value: Any, tag: Path) -> None:
    edit_entry(tag, [1], lambda entry: entry.update({field: value}))
    refused(tag, UnreadableError, model_file(1), field, advice=False)


@pytest.mark.parametrize("value", [None, 3, ["a"]], ids=str)
@pytest.mark.parametrize("field", ["module_path", "expert_key_prefix"])
def test_layer_metadata_with_a_path_that_is_no_text(field: str, value: Any, tag: Path) -> None:
    edit_entry(tag, range(4), lambda entry: entry.update({field: value}))
    refused(tag, UnreadableError, "_rank_0_", advice=False, exact=False)


def test_layer_metadata_missing_on_one_rank(tag: Path) -> None:
    edit(tag / model_file(1), lambda states: states.update(ds_autoep_layers=[]))
    refused(tag, MismatchError, model_file(1), "model.layers.0.mlp.experts", advice=False)


def test_layer_metadata_lists_a_layer_twice(tag: Path) -> None:
    edit(tag / model_file(0), lambda s: s["ds_autoep_layers"].append(dict(s["ds_autoep_layers"][0])))
    refused(tag, UnreadableError, model_file(0), "twice", advice=False)


class Unnumbered(Layer):
    @property
    def module(self) -> str:
        return "decoder.mlp"


def test_layer_that_cannot_be_numbered(tmp_path: Path) -> None:
    full = synthetic.model(DENSE, [Unnumbered(0, uniform(4, 2))])
    tag = synthetic.write(tmp_path / "source", full, Save(world=2))
    refused(tag, UnreadableError, model_file(0), "decoder.mlp", advice=False)


def test_unknown_checkpoint_format_version(tag: Path) -> None:
    edit_entry(tag, range(4), lambda entry: entry.update(checkpoint_format_version=2))
    refused(tag, UnreadableError, model_file(0), "2")


def test_unknown_checkpoint_format(tag: Path) -> None:
    edit_entry(tag, range(4), lambda entry: entry.update(checkpoint_format="per_expert_files"))
    refused(tag, UnreadableError, model_file(0), "per_expert_files", advice=False)


def test_ep_size_that_does_not_divide_the_world(tag: Path) -> None:
    def three(entry: dict[str, Any]) -> None:
        entry["ep_size"] = entry["expert_placement"]["ep_size"] = 3
        entry["expert_placement"]["ranks"].append({"rank": 2, "experts": [0]})

    edit_entry(tag, range(4), three)
    refused(tag, MismatchError, model_file(0), "3", advice=False)


def test_edp_size_that_contradicts_the_world(tag: Path) -> None:
    edit_entry(tag, [1], lambda entry: entry.update(expert_data_parallel_world_size=4))
    refused(tag, MismatchError, model_file(1), advice=False)


def test_edp_rank_that_contradicts_its_partition(tag: Path) -> None:
    """Two sources say which part of the experts a file holds; they must agree."""
    edit_entry(tag, [1], lambda entry: entry.update(expert_data_parallel_rank=1))
    edit_entry(tag, [3], lambda entry: entry.update(expert_data_parallel_rank=0))
    refused(tag, MismatchError, advice=False)


# ---- placement


def edit_placement(tag: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    edit_entry(tag, range(4), lambda entry: change(entry["expert_placement"]))


def test_unknown_placement_version(tag: Path) -> None:
    edit_placement(tag, lambda placement: placement.update(version=2))
    refused(tag, UnreadableError, model_file(0), "2", "version 1")


def test_expert_missing_from_the_placement(tag: Path) -> None:
    edit_placement(tag, lambda placement: placement["ranks"][1].update(experts=[2]))
    refused(tag, UnreadableError, model_file(0), "[3]", advice=False)


def test_expert_beyond_the_number_of_experts(tag: Path) -> None:
    edit_placement(tag, lambda placement: placement["ranks"][1].update(experts=[2, 3, 4]))
    refused(tag, UnreadableError, model_file(0), "[4]", advice=False)


def test_expert_twice_on_one_rank(tag: Path) -> None:
    edit_placement(tag, lambda placement: placement["ranks"][1].update(experts=[2, 3, 2]))
    refused(tag, UnreadableError, model_file(0), "[2, 3, 2]", advice=False)


@pytest.mark.parametrize(
    "experts", [["2", 3], [2.0, 3], [None, 3], [[2], 3], None, 7, [True, 2, 3]], ids=str
)
def test_placement_with_experts_that_are_no_numbers(experts: Any, tag: Path) -> None:
    edit_placement(tag, lambda placement: placement["ranks"][1].update(experts=experts))
    refused(tag, UnreadableError, "model.layers.0.mlp.experts", advice=False, exact=False)


@pytest.mark.parametrize("key", ["version", "ranks", "num_experts", "ep_size"])
def test_placement_lacks_a_field(key: str, tag: Path) -> None:
    edit_placement(tag, lambda placement: placement.pop(key))
    refused(tag, UnreadableError, model_file(0), "expert_placement", advice=False)


def test_placement_of_another_number_of_ranks(tag: Path) -> None:
    edit_placement(tag, lambda placement: placement["ranks"].append({"rank": 2, "experts": []}))
    refused(tag, UnreadableError, model_file(0), advice=False)


@pytest.mark.parametrize("rank", [0, 5, "1", None, [1]], ids=str)
def test_placement_with_a_rank_that_is_not_there(rank: Any, tag: Path) -> None:
    edit_placement(tag, lambda placement: placement["ranks"][1].update(rank=rank))
    refused(tag, UnreadableError, model_file(0), advice=False)


def test_ranks_with_different_placements(tag: Path) -> None:
    edit_entry(tag, [2], lambda entry: entry["expert_placement"]["ranks"][0].update(experts=[1, 0]))
    refused(tag, MismatchError, model_file(2), model_file(0), advice=False)


def test_local_count_that_contradicts_the_placement(tag: Path) -> None:
    edit_placement(
        tag,
        lambda p: (p["ranks"][0].update(experts=[0]), p["ranks"][1].update(experts=[1, 2, 3])),
    )
    refused(tag, MismatchError, model_file(0), "num_local_experts", advice=False)


@pytest.mark.parametrize("local", [1, 3])
def test_uneven_counts_without_a_placement(local: int, tag: Path) -> None:
    edit_entry(
        tag,
        range(4),
        lambda entry: (entry.pop("expert_placement"), entry.update(num_local_experts=local)),
    )
    refused(tag, UnreadableError, model_file(0), "contradicts", advice=False)


def test_expert_range_that_contradicts_the_ep_rank_without_a_placement(tag: Path) -> None:
    edit_entry(
        tag, range(4), lambda entry: (entry.pop("expert_placement"), entry.update(global_expert_start=1))
    )
    refused(tag, MismatchError, model_file(0), advice=False)


def test_two_ranks_own_the_same_partition_of_the_same_experts(tag: Path) -> None:
    """Rank 1 says it is EP rank 0: experts 0 and 1 would be owned twice, 2 and 3 by half."""
    claim = {"ep_rank": 0, "global_expert_start": 0, "global_expert_end": 2}
    edit_entry(tag, [1], lambda entry: entry.update(claim))
    refused(tag, MismatchError, model_file(1), "EP rank 0")


def test_ep_rank_of_one_layer_that_the_others_contradict(two_layers: Path) -> None:
    claim = {"ep_rank": 0, "global_expert_start": 0, "global_expert_end": 2}
    other = {"ep_rank": 1, "global_expert_start": 2, "global_expert_end": 4}

    def change(rank: int, stated: dict[str, int]) -> None:
        edit(two_layers / model_file(rank), lambda states: states["ds_autoep_layers"][1].update(stated))

    for rank in range(4):  # each expert still has as many owners as it should
        change(rank, claim if rank % 2 else other)
    refused(two_layers, MismatchError, model_file(0), "model.layers.1.mlp.experts", "EP rank 1")


def test_experts_that_start_elsewhere_than_their_ep_rank_says(tag: Path) -> None:
    edit_entry(tag, [1, 3], lambda entry: entry.update(global_expert_start=0, global_expert_end=2))
    refused(tag, MismatchError, model_file(1), "experts 0 to 2")


def test_experts_in_another_order_on_one_ep_rank(tag: Path) -> None:
    """w1 and w3 are of one size: nothing but the order tells them apart."""

    def swapped(content: Any) -> None:
        group = content["param_shapes"][-1]
        experts = dict(zip(["w3", "w2", "w1"], group.items(), strict=True))
        group.clear()
        group.update(experts[weight] for weight in ("w1", "w2", "w3"))

    for rank in (0, 2):
        edit(tag / model_file(rank), swapped)
    refused(tag, MismatchError, model_file(1), "different orders")


def test_order_of_ranks_that_one_of_two_configs_says(tag: Path) -> None:
    flag = {"use_data_before_expert_parallelism": True}
    edit(tag / optim_file(0), lambda states: states["ds_config"].update(flag))
    refused(tag, MismatchError, optim_file(0), "use_data_before_expert_parallelism")


@pytest.mark.parametrize("name", [model_file, optim_file], ids=["model", "optimizer"])
def test_order_of_ranks_that_one_file_of_another_rank_says(name: Callable[[int], str], tag: Path) -> None:
    flag = {"use_data_before_expert_parallelism": True}
    edit(tag / name(2), lambda states: states["ds_config"].update(flag))
    refused(tag, MismatchError, name(2), "use_data_before_expert_parallelism")


def test_order_of_ranks_that_all_configs_say_and_no_rank_has(tag: Path) -> None:
    flag = {"use_data_before_expert_parallelism": True}
    for name in [*map(model_file, range(4)), *map(optim_file, range(4))]:
        edit(tag / name, lambda states: states["ds_config"].update(flag))
    refused(tag, MismatchError, model_file(1), "EP rank 1")


def test_layers_numbered_in_another_order(two_layers: Path) -> None:
    """The engine names expert files of ZeRO-1 and 2 by that number."""

    def swapped(states: Any) -> None:
        first, second = states["ds_autoep_layers"]
        first["moe_layer_id"], second["moe_layer_id"] = 1, 0

    for rank in range(4):
        edit(two_layers / model_file(rank), swapped)
    refused(two_layers, UnreadableError, model_file(0), "moe_layer_id")


@pytest.fixture
def engines(tmp_path: Path) -> Path:
    """What the engine saved, affine maps and universal_checkpoint_info included."""
    saved = next((FIXTURES / "mixtral_w4e2" / "checkpoint").glob("global_step*"))
    return Path(shutil.copytree(saved, tmp_path / "source" / saved.name))


def test_placement_and_affine_maps_that_contradict_each_other(engines: Path) -> None:
    """The engine refuses it: autoep_affine.autoep_metadata_to_affine_map."""

    def turned(states: Any) -> None:
        for entry in states["ds_autoep_layers"]:
            placed = entry["expert_placement"]["ranks"]
            ranks = [{"rank": item["rank"], "experts": item["experts"][::-1]} for item in placed]
            entry["expert_placement"] = {**entry["expert_placement"], "ranks": ranks}

    for rank in range(4):
        edit(engines / model_file(rank), turned)
    refused(engines, MismatchError, model_file(0), "affine_maps")


def test_affine_map_of_another_shape(engines: Path) -> None:
    def taller(states: Any) -> None:
        for entry in states["ds_autoep_layers"]:
            maps = entry["affine_maps"]["params"]
            next(iter(maps.values()))["logical_shape"][1] += 1

    edit(engines / model_file(2), taller)
    refused(engines, MismatchError, model_file(2), "affine_maps")


def test_ep_rank_beyond_the_placement(tag: Path) -> None:
    edit_entry(tag, [1], lambda entry: entry.update(ep_rank=2))
    refused(tag, MismatchError, model_file(1), advice=False)


def test_rank_without_the_experts_it_should_hold(tag: Path) -> None:
    def drop(content: Any) -> None:
        zero = content["optimizer_state_dict"]
        zero["fp32_flat_groups"].pop()
        zero["ds_zero_partition_groups"].pop()

    edit(tag / model_file(1), lambda states: states["param_shapes"].pop())
    edit(tag / optim_file(1), drop)
    refused(tag, MismatchError, model_file(1), "missing", advice=False)


def test_replicas_of_an_expert_that_differ(tmp_path: Path) -> None:
    layer = Layer(0, ((0, 1), (1, 2)), 3, 2)
    tag = synthetic.write(tmp_path / "source", synthetic.model(DENSE, [layer]), Save(world=2))

    def damage(content: Any) -> None:
        flip(content["optimizer_state_dict"]["optimizer_state_dict"]["state"][1]["exp_avg"])

    edit(tag / optim_file(1), damage)
    message = refused(
        tag, MismatchError, optim_file(0), optim_file(1), "exp_avg", opening=False, advice=False
    )
    assert "experts.1." in message


def test_the_last_of_many_replicas_that_differs(tmp_path: Path) -> None:
    """All experts are on both EP ranks, in another order: each of the second's is a copy of its own. That
    of the last expert is damaged, which lies first there."""
    layer = Layer(0, ((0, 1, 2), (2, 1, 0)), 3, 2)
    tag = synthetic.write(tmp_path / "source", synthetic.model(DENSE, [layer]), Save(world=2))

    def damage(content: Any) -> None:
        flip(content["optimizer_state_dict"]["optimizer_state_dict"]["state"][1]["exp_avg"])

    edit(tag / optim_file(1), damage)
    refused(tag, MismatchError, optim_file(0), optim_file(1), "exp_avg", opening=False, advice=False)


def test_verify_finds_replicas_that_differ(tmp_path: Path) -> None:
    layer = Layer(0, ((0, 1), (1, 2)), 3, 2)
    tag = synthetic.write(tmp_path / "source", synthetic.model(DENSE, [layer]), Save(world=2))
    assert api.verify(tag).passed
    edit(
        tag / optim_file(1),
        lambda o: flip(o["optimizer_state_dict"]["optimizer_state_dict"]["state"][1]["exp_avg"]),
    )
    verdict = api.verify(tag)
    assert not verdict.passed
    assert any(optim_file(1) in difference.message for difference in verdict.differences)


# ---- other parallelism


def test_autotp_checkpoint(tag: Path) -> None:
    name = "zero_pp_rank_0_mp_rank_01_model_states.pt"
    shutil.copy(tag / model_file(0), tag / name)
    refused(tag, UnreadableError, name, "AutoTP")


# ---- pickles that would run code


class Calls:
    """Unpickled by pickle itself, this calls ``function(*args)``."""

    def __init__(self, function: Any, *args: Any) -> None:
        self._call = (function, args)

    def __reduce__(self) -> Any:
        return self._call


def attacks(marker: Path) -> dict[str, Calls]:
    code = f"open({str(marker)!r}, 'w')"
    return {
        "posix.system": Calls(os.system, f"touch {marker}"),
        "builtins.eval": Calls(eval, code),
        "builtins.exec": Calls(exec, code),
        "builtins.open": Calls(open, str(marker), "w"),
        "builtins.getattr": Calls(getattr, marker, "touch"),
        "subprocess.Popen": Calls(subprocess.Popen, ["touch", str(marker)]),
        "shutil.rmtree": Calls(shutil.rmtree, str(marker)),
        "torch.serialization.load": Calls(torch.load, str(marker)),
        "torch.hub.load": Calls(torch.hub.load, str(marker)),
        "pickle.loads": Calls(pickle.loads, b""),
    }


@pytest.mark.parametrize("name", [model_file(2), optim_file(2)])
@pytest.mark.parametrize("attack", attacks(Path("x")))
def test_pickle_that_would_run_code(attack: str, name: str, tag: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    content = torch.load(tag / name, weights_only=False)
    content["args"] = attacks(marker)[attack]
    torch.save(content, tag / name)
    message = refused(tag, UnsafePickleError, name, advice=True)
    assert attack.split(".")[-1] in message
    assert not marker.exists()


def replace_pickle(path: Path, data: bytes) -> None:
    """Put another pickle into an archive, all other records as they are."""
    records = zipfile.ZipFile(path)
    content = {info.filename: records.read(info) for info in records.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as packed:
        for name, record in content.items():
            packed.writestr(name, data if name.endswith("data.pkl") else record)


POLLUTION = {
    # push a class, then BUILD with (None, {attribute: value}), which is setattr on the class
    "stand-in": b"cdeepspeed.runtime.zero.config\nZeroStageEnum\n",
    "another stand-in": b"cargparse\nNamespace\n",
    "function": b"ctorch._utils\n_rebuild_tensor_v2\n",
    "torch.Size": b"ctorch\nSize\n",
    "OrderedDict": b"ccollections\nOrderedDict\n",
    "builtin": b"c__builtin__\ndict\n",
}


@pytest.mark.parametrize("name", [model_file(2), optim_file(2)])
@pytest.mark.parametrize("target", POLLUTION)
def test_pickle_that_would_change_what_it_was_handed(target: str, name: str, tag: Path) -> None:
    replace_pickle(
        tag / name, b"\x80\x02" + POLLUTION[target] + b"(NX\x08\x00\x00\x00pollutedI1\nd" + b"tb."
    )
    replace_pickle(tag / name, b"\x80\x02" + POLLUTION[target] + b"(N}X\x08\x00\x00\x00pollutedI1\nstb.")
    refused(tag, UnreadableError, name, advice=False)
    for kind in (
        pickle_records.TorchSize,
        pickle_records.Opaque,
        pickle_records.TensorRecord,
        pickle_records.StorageRecord,
        dict,
    ):
        assert not hasattr(kind, "polluted")
    stand_in = pickle_records.opaque("argparse", "Namespace")
    assert not hasattr(type(stand_in), "polluted")


@pytest.mark.parametrize("what", [b"ctorch\nfloat32\n", b"ctorch\nFloatStorage\n"])
def test_pickle_that_would_change_a_dtype(what: bytes, tag: Path) -> None:
    name = model_file(2)
    before = {dtype: (dtype.name, dtype.value) for dtype in DType}
    state = b"(X\x05\x00\x00\x00torchX\x07\x00\x00\x00float64t"
    replace_pickle(tag / name, b"\x80\x02" + what + state + b"b.")
    refused(tag, UnreadableError, name, advice=False)
    assert {dtype: (dtype.name, dtype.value) for dtype in DType} == before


# ---- paths


def test_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match="does not exist"):
        api.catalogue(tmp_path / "nowhere")
    with pytest.raises(UnreadableError, match="nowhere"):
        api.convert(tmp_path / "nowhere", tmp_path / "out", to="universal")
    assert list(tmp_path.iterdir()) == []


def test_path_that_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "notes.txt").write_text("x")
    message = refused(tmp_path / "source", UnreadableError, "source", "notes.txt", advice=False)
    assert "deepspeed-zero3" in message


def test_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    refused(tmp_path / "source", UnreadableError, "source", "nothing", advice=False)


def test_latest_that_names_a_missing_directory(tag: Path) -> None:
    (tag.parent / "latest").write_text("global_step999")
    refused(tag.parent, UnreadableError, "latest", "global_step999")


@pytest.mark.parametrize("text", ["", "\n", "\0"])
def test_latest_that_names_nothing(text: str, tag: Path) -> None:
    (tag.parent / "latest").write_text(text)
    refused(tag.parent, UnreadableError, "latest")


def test_existing_destination(tag: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(UsageError, match="--overwrite"):
        api.convert(tag, tmp_path / "out", to="universal")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_existing_file_as_destination(tag: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(UsageError, match="out"):
        api.convert(tag, tmp_path / "out", to="universal")
    assert (tmp_path / "out").read_text() == "x"


def test_destination_below_a_file(tag: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CkptToolError, match="file"):
        api.convert(tag, tmp_path / "file" / "out", to="universal")


@pytest.mark.parametrize("overwrite", [False, True])
def test_destination_that_is_the_source(overwrite: bool, tag: Path) -> None:
    how = api.Execution(overwrite=overwrite)
    with pytest.raises(UsageError):
        api.convert(tag, tag, to="universal", how=how)
    assert (tag / model_file(0)).exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_destination_that_contains_the_source(overwrite: bool, tag: Path) -> None:
    how = api.Execution(overwrite=overwrite)
    with pytest.raises(UsageError, match="source"):
        api.convert(tag, tag.parent, to="universal", how=how)
    assert (tag / model_file(0)).exists()


def test_destination_that_contains_the_source_through_a_link(tag: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tag.parent.parent)
    with pytest.raises(UsageError):
        api.convert(
            tag, tmp_path / "link" / tag.parent.name, to="universal", how=api.Execution(overwrite=True)
        )
    assert (tag / model_file(0)).exists()


def test_unknown_target_format(tag: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="universal"):
        api.convert(tag, tmp_path / "out", to="gguf")
    assert not (tmp_path / "out").exists()
