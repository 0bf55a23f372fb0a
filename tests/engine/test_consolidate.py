"""Consolidated safetensors: the engine's own masters under published names, loaded by transformers.

The names are written out here by hand, family by family, and not taken from ``ckpt_tool.families``.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ckpt_tool
from tests.engine.deepspeed_run import RunSpec, Save, build_config, run
from tests.engine.deepspeed_tools import FIXTURES, fixture_spec, same_bits, zero3_fixtures

pytestmark = pytest.mark.engine

NAMES = zero3_fixtures()
each_fixture = pytest.mark.parametrize("name", NAMES)


# ---- what is expected


def oracle(folder: Path) -> dict[str, Any]:
    """All values of the model as the engine held them, by the engine's names."""
    from safetensors.torch import load_file

    files = [folder / f"{kind}.safetensors" for kind in ("fp32", "frozen", "buffers")]
    return {name: tensor for path in files if path.is_file() for name, tensor in load_file(path).items()}


def published(family: str, values: dict[str, Any]) -> dict[str, Any]:
    """AutoEP's names to those of files on the hub; [E, ...] stacks to one matrix per expert."""
    found = {}
    for name, tensor in values.items():
        layer, _, rest = name.partition(".mlp.")
        if family == "dense" or not rest:
            found[name] = tensor
        elif re.fullmatch(r"experts\.w[123]", rest):
            weight = rest[-2:]
            for expert in range(tensor.shape[0]):
                if family == "mixtral":
                    key = f"{layer}.block_sparse_moe.experts.{expert}.{weight}.weight"
                else:
                    projection = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}[weight]
                    key = f"{layer}.mlp.experts.{expert}.{projection}.weight"
                found[key] = tensor[expert]
        elif rest == "router.gate.weight":
            block = "block_sparse_moe" if family == "mixtral" else "mlp"
            found[f"{layer}.{block}.gate.weight"] = tensor
        elif rest == "router.e_score_correction_bias":
            found[f"{layer}.mlp.gate.e_score_correction_bias"] = tensor
        elif family == "qwen2_moe":
            for autoep, hub in (
                ("shared_experts.gate_proj.weight", "shared_expert.gate_proj.weight"),
                ("shared_experts.up_proj.weight", "shared_expert.up_proj.weight"),
                ("shared_experts.down_proj.weight", "shared_expert.down_proj.weight"),
                ("shared_experts_gate.weight", "shared_expert_gate.weight"),
            ):
                if rest == autoep:
                    found[f"{layer}.mlp.{hub}"] = tensor
        elif family in ("deepseek_v2", "deepseek_v3") and re.fullmatch(
            r"(shared_experts\.)?(gate|up|down)_proj\.weight", rest
        ):
            found[name] = tensor
    assert sum(t.numel() for t in found.values()) == sum(t.numel() for t in values.values())
    return found


def in_memory(family: str, values: dict[str, Any]) -> dict[str, Any]:
    """The same for transformers' modules, whose experts are fused: gate over up in one stack."""
    import torch

    found = {}
    for name, tensor in values.items():
        layer, _, rest = name.partition(".mlp.")
        if rest == "experts.w1":
            up = values[f"{layer}.mlp.experts.w3"]
            found[f"{layer}.mlp.experts.gate_up_proj"] = torch.cat((tensor, up), dim=1)
        elif rest == "experts.w2":
            found[f"{layer}.mlp.experts.down_proj"] = tensor
        elif rest != "experts.w3":
            key = name.replace(".mlp.router.gate.", ".mlp.gate.").replace(".mlp.router.", ".mlp.gate.")
            if family == "qwen2_moe":
                key = key.replace(".shared_experts", ".shared_expert")
            found[key] = tensor
    found.setdefault("lm_head.weight", found["model.embed_tokens.weight"])
    return found


def stored(directory: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for path in sorted(directory.glob("*.safetensors")):
        part = load_file(path)
        assert not part.keys() & tensors.keys()
        tensors |= part
    return tensors


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_bits(found[name], tensor), name


def eager(family: str) -> dict[str, str]:
    """The grouped kernels need strides that these odd sizes do not have."""
    kinds = {"attn_implementation": "eager"}
    return kinds if family == "dense" else kinds | {"experts_implementation": "eager"}


def load(directory: Path, family: str, **options: Any) -> Any:
    """from_pretrained with nothing missing, unexpected or mismatched."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, **eager(family), **options
    )
    assert {key: value for key, value in info.items() if value} == {}
    return model.eval()


def logits(model: Any, tokens: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=tokens).logits


def tokens_and_logits(name: str) -> tuple[Any, Any]:
    from safetensors.torch import load_file

    held = load_file(FIXTURES / name / "oracle" / "logits.safetensors")
    return held["input_ids"], held["logits"]


def furthest(a: Any, b: Any) -> float:
    """The largest difference, relative to the largest value."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every fixture consolidated in fp32."""
    root = tmp_path_factory.mktemp("consolidated")
    for name in NAMES:
        folder = FIXTURES / name
        ckpt_tool.consolidate(folder / "checkpoint", root / name, config=folder / "config.json")
    return {name: root / name for name in NAMES}


# ---- fp32, the masters


@each_fixture
def test_every_tensor_is_the_engines_master_under_its_published_name(
    name: str, ours: dict[str, Path]
) -> None:
    expected = published(fixture_spec(name).family, oracle(FIXTURES / name / "oracle"))
    assert_same(stored(ours[name]), expected)


@each_fixture
def test_transformers_computes_what_it_does_with_the_engines_own_tensors(
    name: str, ours: dict[str, Path]
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    family = fixture_spec(name).family
    loaded = load(ours[name], family)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}

    config = AutoConfig.from_pretrained(FIXTURES / name)
    by_hand = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **eager(family))
    by_hand.load_state_dict(in_memory(family, oracle(FIXTURES / name / "oracle")), strict=True)
    assert_same(loaded.state_dict(), by_hand.state_dict())
    tokens, _ = tokens_and_logits(name)
    assert same_bits(logits(loaded, tokens), logits(by_hand.eval(), tokens))


@each_fixture
def test_transformers_computes_the_engines_logits(name: str, ours: dict[str, Path]) -> None:
    """In the engine's dtype: from unrounded weights a 16-bit engine would route some tokens elsewhere.
    There AutoEP sums the experts' outputs in another order and precision than transformers."""
    import torch

    spec = fixture_spec(name)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[spec.dtype]
    within = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}[spec.dtype]
    tokens, expected = tokens_and_logits(name)
    assert furthest(logits(load(ours[name], spec.family, dtype=dtype), tokens), expected) < within


# ---- 16 bits


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_deepseek_v3_is_rounded_as_torch_rounds_but_for_its_router(dtype: str, tmp_path: Path) -> None:
    import torch

    folder = FIXTURES / "deepseek_v3_w2e2"
    ckpt_tool.consolidate(
        folder / "checkpoint", tmp_path / "out", config=folder / "config.json", dtype=dtype
    )
    target = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    expected = published("deepseek_v3", oracle(folder / "oracle"))
    assert not same_bits(expected[bias].to(target).float(), expected[bias]), "rounding would show"
    kept = {bias, "model.layers.1.mlp.gate.weight"}
    rounded = {name: tensor if name in kept else tensor.to(target) for name, tensor in expected.items()}
    assert_same(stored(tmp_path / "out"), rounded)

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == {"bf16": "bfloat16", "fp16": "float16"}[dtype]
    model = load(tmp_path / "out", "deepseek_v3")
    assert model.dtype == target
    state = model.state_dict()
    assert {tensor.dtype for name, tensor in state.items() if name not in kept} == {target}
    assert same_bits(state[bias], expected[bias])


def test_router_of_a_bf16_deepseek_v3_chooses_by_the_exact_correction_bias(tmp_path: Path) -> None:
    """Near ties, where the rounded bias chooses other experts for some tokens."""
    import torch

    folder = FIXTURES / "deepseek_v3_w2e2"
    ckpt_tool.consolidate(
        folder / "checkpoint", tmp_path / "out", config=folder / "config.json", dtype="bf16"
    )
    values = published("deepseek_v3", oracle(folder / "oracle"))
    bias = values["model.layers.1.mlp.gate.e_score_correction_bias"]
    router = values["model.layers.1.mlp.gate.weight"].bfloat16().float()
    hidden = torch.randn(20_000, router.shape[1], generator=torch.Generator().manual_seed(5)).bfloat16()
    scores = torch.nn.functional.linear(hidden.float(), router).sigmoid()

    def chosen(correction: Any) -> Any:
        return (scores + correction).topk(2, dim=-1).indices.sort(dim=-1).values

    _, _, indices = load(tmp_path / "out", "deepseek_v3").model.layers[1].mlp.gate(hidden)
    assert torch.equal(indices.sort(dim=-1).values, chosen(bias))
    assert not torch.equal(chosen(bias.bfloat16().float()), chosen(bias))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stated", [None, "float64"])
def test_config_states_the_dtype_that_was_written(dtype: str, stated: str | None, tmp_path: Path) -> None:
    folder = FIXTURES / "mixtral_bf16_w2e2"
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | ({"dtype": stated} if stated else {})))
    ckpt_tool.consolidate(folder / "checkpoint", tmp_path / "out", config=tmp_path, dtype=dtype)
    (written,) = {str(tensor.dtype).removeprefix("torch.") for tensor in stored(tmp_path / "out").values()}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == written
    assert str(load(tmp_path / "out", "mixtral").dtype) == f"torch.{written}"


# ---- shards and the files beside them


def test_small_shards_hold_the_same_tensors_and_an_index_of_them(
    ours: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors import safe_open

    name, limit = "mixtral_w4e2", 10_000
    folder = FIXTURES / name
    child = subprocess.run(
        [
            *(sys.executable, "-m", "ckpt_tool", "consolidate"),
            *(str(folder / "checkpoint"), str(tmp_path / "out")),
            *("--config", str(folder / "config.json"), "--max-shard-size", "10KB"),
        ],
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    count = len(shards)
    assert count > 3
    assert shards == [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    whole, parts = stored(ours[name]), stored(tmp_path / "out")
    assert_same(parts, whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    weight_map = {}
    for shard in shards:
        with safe_open(tmp_path / "out" / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            names = list(file.keys())
        weight_map |= dict.fromkeys(names, shard)
        assert sum(parts[key].nbytes for key in names) <= limit
    assert index["weight_map"] == weight_map
    tokens, _ = tokens_and_logits(name)
    assert same_bits(
        logits(load(tmp_path / "out", "mixtral"), tokens), logits(load(ours[name], "mixtral"), tokens)
    )


def test_one_file_has_the_format_transformers_asks_for_and_no_index(ours: dict[str, Path]) -> None:
    from safetensors import safe_open

    for name in NAMES:
        assert sorted(path.name for path in ours[name].glob("model*")) == ["model.safetensors"]
        with safe_open(ours[name] / "model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_tokenizer_and_generation_config_beside_the_config_are_carried_over(tmp_path: Path) -> None:
    folder = FIXTURES / "mixtral_w4e2"
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_bytes((folder / "config.json").read_bytes())
    (model / "generation_config.json").write_text('{"max_new_tokens": 7, "do_sample": false}')
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"):
        (model / name).write_text(f'{{"this is": "{name}"}}')
    for name in ("merges.txt", "chat_template.jinja", "tokenizer.model", "README.md"):
        (model / name).write_bytes(f"{name}\n\x00\xff".encode("latin-1"))
    carried = {path.name: path.read_bytes() for path in model.iterdir() if path.name != "config.json"}
    for name in ("model.safetensors", "pytorch_model.bin", "training_args.bin"):
        (model / name).write_text("not of this model")

    ckpt_tool.consolidate(folder / "checkpoint", tmp_path / "out", config=model)
    found = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert carried.items() <= found.items()
    assert not {"pytorch_model.bin", "training_args.bin"} & found.keys()
    assert found["model.safetensors"] != b"not of this model"
    loaded = load(tmp_path / "out", "mixtral")
    assert loaded.generation_config.max_new_tokens == 7


# ---- tied embeddings


def test_tied_embeddings_are_stored_once(ours: dict[str, Path]) -> None:
    directory = ours["qwen3_moe_w2e2_tied"]
    assert "lm_head.weight" not in stored(directory)
    model = load(directory, "qwen3_moe")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def consolidate_with(name: str, changes: dict[str, Any], scratch: Path) -> None:
    """Consolidate with a config that says something else; what is refused leaves nothing behind."""
    config = json.loads((FIXTURES / name / "config.json").read_text()) | changes
    (scratch / "config.json").write_text(json.dumps(config))
    try:
        ckpt_tool.consolidate(
            FIXTURES / name / "checkpoint", scratch / "out", config=scratch / "config.json"
        )
    finally:
        assert [path.name for path in scratch.iterdir()] == ["config.json"]


def test_tied_checkpoint_with_an_untied_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ckpt_tool.CkptToolError, match=r"tie_word_embeddings false.*is tied"):
        consolidate_with("qwen3_moe_w2e2_tied", {"tie_word_embeddings": False}, tmp_path)


def test_untied_checkpoint_with_a_tied_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ckpt_tool.CkptToolError, match=r"tie_word_embeddings true.*of its own"):
        consolidate_with("mixtral_w4e2", {"tie_word_embeddings": True}, tmp_path)


# ---- the config of another model


@pytest.mark.parametrize(
    ("name", "changes", "numbers"),
    [
        ("mixtral_w4e2", {"num_local_experts": 8}, (8, 4)),
        ("mixtral_w4e2", {"num_local_experts": 2}, (2, 4)),
        ("mixtral_w4e2", {"num_hidden_layers": 3}, (3, 2)),
        ("mixtral_w4e2", {"num_hidden_layers": 1}, (1, 2)),
        ("mixtral_w4e2", {"intermediate_size": 26}, (26, 13)),
        ("mixtral_w4e2", {"hidden_size": 42}, (42, 21)),
        ("mixtral_w4e2", {"vocab_size": 68}, (68, 67)),
        ("qwen2_moe_w2e2", {"num_experts": 8, "num_local_experts": 8}, (8, 4)),
        ("qwen2_moe_w2e2", {"moe_intermediate_size": 14}, (14, 13)),
        ("qwen3_moe_w2e2_tied", {"num_experts": 3, "num_local_experts": 3}, (3, 4)),
        ("deepseek_v2_w2e2", {"n_routed_experts": 5}, (5, 4)),
        ("deepseek_v3_w2e2", {"moe_intermediate_size": 21}, (21, 13)),
        ("dense_w3", {"num_hidden_layers": 4}, (4, 2)),
        ("dense_w3", {"hidden_size": 24}, (24, 22)),
    ],
)
def test_config_of_another_size_is_refused_with_both_numbers(
    name: str, changes: dict[str, Any], numbers: tuple[int, int], tmp_path: Path
) -> None:
    with pytest.raises(ckpt_tool.CkptToolError) as error:
        consolidate_with(name, changes, tmp_path)
    stated, found = numbers
    said = [int(number) for number in re.findall(r"(?<![\w.])\d+(?![\w])", str(error.value))]
    assert stated in said
    assert found in said
    assert any(key in str(error.value) for key in changes)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("deepseek_v3_w2e2", {"first_k_dense_replace": 0, "mlp_layer_types": None}),
        ("qwen3_moe_w2e2_tied", {"mlp_only_layers": [1]}),
        ("qwen2_moe_w2e2", {"decoder_sparse_step": 2}),
    ],
)
def test_config_with_other_moe_layers_is_refused(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(
        ckpt_tool.CkptToolError, match=r"MoE layers are \[.*\]; the checkpoint has .* \[.*\]"
    ):
        consolidate_with(name, changes, tmp_path)


# ---- plain ZeRO-3 around transformers' fused experts


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of 4 experts trained by ZeRO-3 as it is: ``mlp.experts.gate_up_proj`` and ``down_proj``."""
    root = tmp_path_factory.mktemp("fused")
    spec = RunSpec(
        family="mixtral",
        world=3,
        ep=0,
        experts=4,
        hidden=21,
        intermediate=13,
        steps=1,
        save=Save(str(root / "checkpoint")),
        gather_oracle=str(root / "oracle"),
        gather_logits=str(root / "logits.safetensors"),
    )
    run(spec)
    build_config(spec).save_pretrained(root)
    build_config(dataclasses.replace(spec, experts=8)).save_pretrained(root / "of_8_experts")
    return root


def test_plain_zero_3_checkpoint_with_all_fused_experts_is_consolidated(
    fused: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    ckpt_tool.consolidate(fused / "checkpoint", tmp_path / "out", config=fused)
    values = oracle(fused / "oracle")
    expected = {}
    for name, tensor in values.items():
        layer, _, rest = name.partition(".mlp.")
        block = f"{layer}.block_sparse_moe"
        if rest == "experts.gate_up_proj":
            assert tensor.shape == (4, 26, 21)
            for expert in range(4):
                expected[f"{block}.experts.{expert}.w1.weight"] = tensor[expert, :13]
                expected[f"{block}.experts.{expert}.w3.weight"] = tensor[expert, 13:]
        elif rest == "experts.down_proj":
            for expert in range(4):
                expected[f"{block}.experts.{expert}.w2.weight"] = tensor[expert]
        else:
            expected[f"{block}.{rest}" if rest else name] = tensor
    assert_same(stored(tmp_path / "out"), expected)
    model = load(tmp_path / "out", "mixtral")
    assert_same(model.state_dict(), values)
    held = load_file(fused / "logits.safetensors")
    assert furthest(logits(model, held["input_ids"]), held["logits"]) < 1e-5


def test_plain_zero_3_checkpoint_with_one_expert_ranks_share_is_refused(
    fused: Path, tmp_path: Path
) -> None:
    """A model of 8 experts split over 2 expert-parallel ranks before ZeRO-3 wrapped it saves stacks of 4:
    the other 4 are in no file."""
    with pytest.raises(ckpt_tool.CkptToolError, match=r"num_local_experts 8, .* has 4 experts") as error:
        ckpt_tool.consolidate(fused / "checkpoint", tmp_path / "out", config=fused / "of_8_experts")
    assert "experts were lost before this checkpoint was saved" in str(error.value)
    assert not (tmp_path / "out").exists()
