"""Directories of safetensors: shards, indices, and what is wrong with them; AutoEP's wrong families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from ckpt_tool import api
from ckpt_tool.canonical import Checkpoint, DType, MoELayer
from ckpt_tool.errors import UnreadableError
from ckpt_tool.families import family_of
from ckpt_tool.families.naming import to_hub
from ckpt_tool.formats.hf.format import HuggingFace
from ckpt_tool.formats.hf.target_options import HfOptions
from ckpt_tool.formats.registry import open_checkpoint
from ckpt_tool.layout import Literal
from tests.formats.hub_files import equal, noise, plan_for, read, write

pytestmark = pytest.mark.usefixtures("partial_models")

LLAMA = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8, "vocab_size": 16}
SHARDS = (
    {"model.embed_tokens.weight": noise(16, 8), "model.layers.0.input_layernorm.weight": noise(8)},
    {"model.layers.1.input_layernorm.weight": noise(8, seed=1), "lm_head.weight": noise(16, 8, seed=1)},
)
INDEX = "model.safetensors.index.json"


def sharded(tmp_path: Path) -> Path:
    return write(tmp_path / "model", LLAMA, *SHARDS)


def change_index(path: Path, **changes: Any) -> None:
    index = json.loads((path / INDEX).read_text())
    index["weight_map"] |= changes
    (path / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
def test_shards_are_read_together(tmp_path: Path, index: bool) -> None:
    path = sharded(tmp_path)
    if not index:
        (path / INDEX).unlink()
    _, values = read(path)
    everything = SHARDS[0] | SHARDS[1]
    assert set(values) == set(everything)
    assert all(equal(values[name], tensor) for name, tensor in everything.items())


@pytest.mark.parametrize("place", ["../other.safetensors", "/etc/passwd", "a\\b", ".hidden"])
def test_index_that_points_outside_is_refused(tmp_path: Path, place: str) -> None:
    path = sharded(tmp_path)
    change_index(path, **{"lm_head.weight": place})
    with pytest.raises(UnreadableError, match="points outside"):
        open_checkpoint(path)


def test_index_that_names_a_missing_file_is_refused(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UnreadableError, match="is missing"):
        open_checkpoint(path)


@pytest.mark.parametrize("gone", [1, 2])
def test_a_missing_file_of_a_series_without_an_index_is_refused_by_name(tmp_path: Path, gone: int) -> None:
    path = sharded(tmp_path)
    (path / INDEX).unlink()
    (path / f"model-0000{gone}-of-00002.safetensors").unlink()
    with pytest.raises(UnreadableError, match=f"model-0000{gone}-of-00002.safetensors is missing"):
        read(path)


def test_an_index_that_leaves_out_a_file_of_its_series_is_refused(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    index = json.loads((path / INDEX).read_text())
    kept = {name: file for name, file in index["weight_map"].items() if "00001-of" in file}
    (path / INDEX).write_text(json.dumps({**index, "weight_map": kept}))
    with pytest.raises(UnreadableError, match=r"model-00002-of-00002\.safetensors belongs to the files"):
        read(path)


def test_an_adapter_beside_the_model_is_not_taken_for_it(tmp_path: Path) -> None:
    path = write(tmp_path / "model", LLAMA, SHARDS[0] | SHARDS[1])
    save_file({"lora_A.weight": noise(4, 8)}, path / "adapter_model.safetensors")
    with pytest.raises(UnreadableError, match="holds an adapter"):
        read(path)


def test_what_is_not_carried_over_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "model", LLAMA, SHARDS[0] | SHARDS[1])
    (path / "modeling_mine.py").write_text("class Mine: ...")
    (path / "media_utils.py").write_text("def helper(): ...")
    (path / "normalizer.json").write_text("{}")
    (path / "recipe.yaml").write_text("x: 1")
    (path / "audio_tokenizer.bin").write_bytes(bytes(100))
    result = api.consolidate(path, tmp_path / "out")
    names = {entry.name for entry in (tmp_path / "out").iterdir()}
    assert {"modeling_mine.py", "media_utils.py", "normalizer.json"} <= names
    assert not {"recipe.yaml", "audio_tokenizer.bin"} & names
    assert any(
        "no part of it as far as is known: audio_tokenizer.bin, recipe.yaml." in n for n in result.notes
    )


def test_index_that_disagrees_with_a_file_is_refused(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    change_index(path, **{"one.more": "model-00002-of-00002.safetensors"})
    with pytest.raises(UnreadableError, match="disagree"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 5000]
)
def test_malformed_index_is_refused(tmp_path: Path, text: str) -> None:
    path = sharded(tmp_path)
    (path / INDEX).write_text(text)
    with pytest.raises(UnreadableError, match="malformed"):
        open_checkpoint(path)


def test_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "model", LLAMA, SHARDS[0], SHARDS[0])
    (path / INDEX).unlink()
    with pytest.raises(UnreadableError, match="is in two files"):
        open_checkpoint(path)


@pytest.mark.parametrize("text", ["", "[]", "nonsense"])
def test_malformed_config_is_refused(tmp_path: Path, text: str) -> None:
    path = sharded(tmp_path)
    (path / "config.json").write_text(text)
    with pytest.raises(UnreadableError, match=r"config\.json"):
        open_checkpoint(path)


def test_small_shards_get_an_index(tmp_path: Path) -> None:
    layout = plan_for(sharded(tmp_path), max_shard_bytes=300)
    names = [file.path for file in layout.laid_out()]
    assert names[:2] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = next(file for file in layout.laid_out() if file.path == INDEX)
    assert json.loads(index.literals[0].data)["metadata"] == {"total_parameters": 272, "total_size": 544}


def test_files_beside_the_model_are_carried_over_untouched(tmp_path: Path) -> None:
    reader, checkpoint = open_checkpoint(sharded(tmp_path))
    reader.close()
    beside = {"tokenizer.json": b'{"a":  1}\r\n', "README.md": b"# card\n", "LICENSE": b""}
    layout = HuggingFace().layout(checkpoint, HfOptions(extra_files=beside, dtype=DType.float16))
    carried = {file.path: file for file in layout.laid_out() if file.path in beside}
    assert carried["tokenizer.json"].literals == (Literal(0, beside["tokenizer.json"]),)
    assert (carried["LICENSE"].size, carried["LICENSE"].literals) == (0, ())


@pytest.mark.parametrize(
    ("model_type", "reason"), [("gpt_oss", "interleaved"), ("openai_privacy_filter", "biases")]
)
def test_autoep_of_a_family_it_gets_wrong_is_refused_with_the_reason(model_type: str, reason: str) -> None:
    layer = MoELayer("model.layers.0", "model.layers.0.mlp", 4)
    checkpoint = Checkpoint("zero3", "somewhere", "autoep", (), (), moe_layers=(layer,))
    with pytest.raises(UnreadableError, match=reason):
        to_hub(checkpoint, family_of({"model_type": model_type}))


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b' {"a":{}}', "does not begin with"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,NaN]}}', "NaN is no JSON"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', "twice"),
        (b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}', "dtype F4"),
        (b'{"a":{"dtype":"F32","shape":[9223372036854775808],"data_offsets":[0,4]}}', "malformed"),
    ],
    ids=["no brace", "NaN", "duplicate", "unknown dtype", "overflow"],
)
def test_header_that_breaks_the_specification_is_refused(
    tmp_path: Path, header: bytes, reason: str
) -> None:
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UnreadableError, match=reason):
        open_checkpoint(tmp_path)
