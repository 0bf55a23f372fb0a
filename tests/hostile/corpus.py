"""Hostile and damaged sources, made by a script: each is small on the disk, and none is a checkpoint.

A case is a function that fills a directory; its name says what is wrong with it.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.conftest import checkpoint_of

CASES: dict[str, Callable[[Path], None]] = {}
_RANK = "zero_pp_rank_0_mp_rank_00_model_states.pt"


def case(make: Callable[[Path], None]) -> Callable[[Path], None]:
    CASES[make.__name__] = make
    return make


# ---- pickles


def archive(path: Path, data: bytes) -> None:
    """What torch.save would write around a pickle."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as out:
        out.writestr("archive/data.pkl", data)
        out.writestr("archive/byteorder", b"little")
        out.writestr("archive/version", b"3\n")


def rank_file(folder: Path, data: bytes) -> None:
    """A ZeRO-3 directory whose rank 0 says ``data``."""
    shutil.copytree(checkpoint_of("dense_w3"), folder, dirs_exist_ok=True)
    archive(next(folder.rglob(_RANK)), data)


def chain(levels: int, step: bytes, seed: bytes = b"K\x01") -> bytes:
    return b"\x80\x02" + seed + step * levels


DOUBLING = b"K\x01" + b"".join(
    b"\x85" + b"r" + struct.pack("<I", n) + b"j" + struct.pack("<I", n) + b"\x86" for n in range(60)
)


@case
def lists_nested_a_hundred_thousand_deep(folder: Path) -> None:
    rank_file(folder, b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")


@case
def tuples_nested_a_hundred_thousand_deep(folder: Path) -> None:
    rank_file(folder, chain(100_000, b"\x85") + b".")


@case
def a_key_nested_a_hundred_thousand_deep(folder: Path) -> None:
    rank_file(folder, b"\x80\x02}" + b"K\x01" + b"\x85" * 100_000 + b"K\x01s.")


@case
def calls_nested_a_hundred_thousand_deep(folder: Path) -> None:
    called = b"ccollections\nOrderedDict\n"
    rank_file(folder, b"\x80\x02" + called * 30_000 + b"(" * 1 + b"t" + b"\x85R" * 20_000 + b".")


@case
def a_key_that_doubles_sixty_times(folder: Path) -> None:
    rank_file(folder, b"\x80\x02}" + DOUBLING + b"K\x01s.")


@case
def a_value_that_doubles_sixty_times(folder: Path) -> None:
    rank_file(folder, b"\x80\x02}X\x06\x00\x00\x00module" + DOUBLING + b"s.")


@case
def a_storage_id_that_doubles_sixty_times(folder: Path) -> None:
    rank_file(folder, b"\x80\x02" + DOUBLING + b"Q.")


@case
def a_set_of_things_that_double(folder: Path) -> None:
    rank_file(folder, b"\x80\x04\x8f(" + DOUBLING + b"\x90.")


@case
def a_list_that_holds_itself(folder: Path) -> None:
    rank_file(folder, b"\x80\x02]q\x00h\x00a.")


@case
def two_lists_that_hold_each_other(folder: Path) -> None:
    rank_file(folder, b"\x80\x02]q\x00]q\x01h\x00aa.")


@case
def a_tensor_of_a_million_dimensions(folder: Path) -> None:
    ones = b"(" + b"K\x01" * 1_000_000 + b"t"
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ"
    )
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + ones + ones + b"\x89NtR"
    rank_file(folder, b"\x80\x02}X\x06\x00\x00\x00module" + call + b"s.")


@case
def a_pickle_of_three_gigabytes_of_nothing(folder: Path) -> None:
    shutil.copytree(checkpoint_of("dense_w3"), folder, dirs_exist_ok=True)
    sparse_record(next(folder.rglob(_RANK)), 3 << 30)


def sparse_record(path: Path, size: int) -> None:
    """A torch archive whose data.pkl is a hole of ``size`` bytes."""
    small = io.BytesIO()
    with zipfile.ZipFile(small, "w") as out:
        out.writestr("archive/data.pkl", b"")
    data = small.getvalue()
    at = data.index(b"PK\x01\x02")
    local, central, end = data[:at], data[at : data.index(b"PK\x05\x06")], data[data.index(b"PK\x05\x06") :]
    sizes = struct.pack("<II", size, size)
    local = local[:18] + sizes + local[26:]
    central = central[:20] + sizes + central[28:]
    end = end[:16] + struct.pack("<I", len(local) + size) + end[20:]
    with path.open("wb") as out_file:
        out_file.write(local)
        out_file.seek(len(local) + size)
        out_file.write(central + end)


@case
def a_class_that_would_run(folder: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("touch /tmp/ckpt_tool_hostile_ran",)

    rank_file(folder, pickle.dumps({"module": Evil()}, 2))


@case
def numbers_of_ranks_without_end(folder: Path) -> None:
    shutil.copytree(checkpoint_of("dense_w3"), folder, dirs_exist_ok=True)
    for file in folder.rglob("*model_states.pt"):
        root = torch.load(file, weights_only=False)
        root["dp_world_size"] = 10**9
        torch.save(root, file)


@case
def a_rank_numbered_999999999(folder: Path) -> None:
    shutil.copytree(checkpoint_of("dense_w3"), folder, dirs_exist_ok=True)
    file = next(folder.rglob(_RANK))
    shutil.copy(file, file.with_name("zero_pp_rank_999999999_mp_rank_00_model_states.pt"))


@case
def experts_without_end(folder: Path) -> None:
    shutil.copytree(checkpoint_of("mixtral_w4e2"), folder, dirs_exist_ok=True)
    for file in folder.rglob("*model_states.pt"):
        root = torch.load(file, weights_only=False)
        for entry in root["ds_autoep_layers"]:
            entry["num_experts"] = entry["num_local_experts"] = 10**9
            entry["ep_size"] = 1
            entry.pop("expert_placement", None)
        torch.save(root, file)


# ---- DCP


def dcp(folder: Path, data: bytes) -> None:
    (folder / ".metadata").write_bytes(data)
    archive(folder / "__0_0.distcp", b"\x80\x02}.")


@case
def metadata_that_is_a_doubling_key(folder: Path) -> None:
    dcp(folder, b"\x80\x02}" + DOUBLING + b"K\x01s.")


@case
def metadata_of_two_gigabytes_of_nothing(folder: Path) -> None:
    dcp(folder, b"")
    with (folder / ".metadata").open("r+b") as out:
        out.truncate(2 << 30)


@case
def metadata_of_a_rank_numbered_999999999(folder: Path) -> None:
    dcp(folder, b"\x80\x02}.")
    (folder / ".metadata").rename(folder / "__999999999.metadata")


# ---- safetensors and JSON


def model(folder: Path, config: str | None = None, **tensors: torch.Tensor) -> None:
    save_file(
        tensors or {"model.norm.weight": torch.ones(4)}, folder / "model.safetensors", {"format": "pt"}
    )
    if config is not None:
        (folder / "config.json").write_text(config)


def header(folder: Path, text: str, data: bytes = b"") -> None:
    raw = text.encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + data)


@case
def a_header_nested_a_hundred_thousand_deep(folder: Path) -> None:
    header(folder, '{"a":' + "[" * 100_000 + "]" * 100_000 + "}")


@case
def a_shape_of_a_million_entries(folder: Path) -> None:
    ones = ",".join(["1"] * 1_000_000)
    header(folder, '{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}' % ones, b"\0" * 4)  # noqa: UP031


@case
def a_shape_of_huge_numbers(folder: Path) -> None:
    huge = ",".join(["9" * 4000] * 50)
    header(folder, '{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}' % huge, b"\0" * 4)  # noqa: UP031


@case
def a_header_of_a_hundred_million_bytes_of_nothing(folder: Path) -> None:
    with (folder / "model.safetensors").open("wb") as out:
        out.write(struct.pack("<Q", 100_000_000))
        out.truncate(100_000_008)


def mixtral_config(**more: Any) -> str:
    sizes = {"num_hidden_layers": 1, "hidden_size": 4, "num_local_experts": 2, "intermediate_size": 4}
    return json.dumps({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], **sizes, **more})


@case
def an_expert_numbered_100000000(folder: Path) -> None:
    name = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
    held = {name.format(number): torch.full((4, 4), 1.0 + number % 7) for number in (0, 100_000_000)}
    model(folder, mixtral_config(), **held)


@case
def a_layer_numbered_1000000000(folder: Path) -> None:
    names = ("model.layers.0.input_layernorm.weight", "model.layers.1000000000.input_layernorm.weight")
    model(
        folder,
        mixtral_config(num_hidden_layers=1_000_000_001),
        **{name: torch.full((4,), float(n)) for n, name in enumerate(names)},
    )


@case
def experts_without_elements_and_without_end(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [100_000_000, 0, 8], "data_offsets": [0, 0]}
    header(folder, json.dumps({"model.layers.0.mlp.experts.gate_up_proj": entry}))
    (folder / "config.json").write_text(mixtral_config())


@case
def a_config_nested_a_hundred_thousand_deep(folder: Path) -> None:
    model(folder, '{"model_type":' + "[" * 100_000 + "]" * 100_000 + "}")


@case
def a_config_of_a_huge_integer(folder: Path) -> None:
    model(folder, mixtral_config()[:-1] + ', "vocab_size": ' + "9" * 4000 + "}")


@case
def a_config_with_two_values_of_one_name(folder: Path) -> None:
    model(folder, mixtral_config()[:-1] + ', "num_local_experts": 8}')


@case
def a_config_of_two_gigabytes_of_nothing(folder: Path) -> None:
    model(folder, "{}")
    with (folder / "config.json").open("r+b") as out:
        out.truncate(2 << 30)


@case
def a_config_whose_values_are_of_other_types(folder: Path) -> None:
    model(folder, json.dumps({"model_type": ["mixtral"], "architectures": {"a": 1}, "text_config": 7}))


@case
def an_index_that_is_a_list(folder: Path) -> None:
    model(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text("[[1]]")


@case
def an_index_that_leads_outside(folder: Path) -> None:
    model(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"a": "../../etc/passwd", "b": "/dev/zero"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@case
def a_config_that_is_a_pipe(folder: Path) -> None:
    model(folder)
    os.mkfifo(folder / "config.json")


@case
def a_file_of_weights_that_is_a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "model.safetensors")


@case
def a_manifest_nested_a_hundred_thousand_deep(folder: Path) -> None:
    model(folder)
    (folder / "ckpt_tool_manifest.json").write_text("[" * 100_000)


@case
def a_manifest_of_other_types(folder: Path) -> None:
    model(folder)
    (folder / "ckpt_tool_manifest.json").write_text('{"manifest_version": [], "files": {"a": 1}}')


@case
def a_tag_of_two_gigabytes(folder: Path) -> None:
    (folder / "latest").touch()
    os.truncate(folder / "latest", 2 << 30)
