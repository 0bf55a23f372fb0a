"""A child process: every family saved by transformers, converted, loaded by transformers. Prints JSON.

Per family a line ``RESULT {"name": ..., "error": ... or null}``; ``skipped`` where this release of
transformers cannot build it. Before them ``WITHOUT_FAMILY [...]``: its model code with experts that no
family is for.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers

from ckpt_tool.canonical import DType, ExpertName
from ckpt_tool.comparison import compare
from ckpt_tool.execute.budget import Budget
from ckpt_tool.execute.local import execute
from ckpt_tool.execute.meter import Silent
from ckpt_tool.families import family_of, text_config
from ckpt_tool.families.autoep import to_autoep
from ckpt_tool.families.naming import to_hub
from ckpt_tool.formats.base import TargetOptions
from ckpt_tool.formats.hf import HuggingFace
from ckpt_tool.formats.registry import open_checkpoint
from ckpt_tool.plan import make_plan
from ckpt_tool.storage import LocalWriter
from tests.engine.hf_models import build, can_build, without_family

# transformers keeps these families' dense tensors (of vision towers, mostly) and the experts of models
# apart under other names in memory, and the tables leave them alone: both load. Experts are compared.
_DENSE_NAMES_DIFFER = {
    "deepseek_ocr2", "deepseek_v4", "dots3_note", "inkling2", "inkling_mm_model", "kimi_k25", "kimi_linear",
    "minimax_m3_vl", "mistral_large4", "nemo_speechlm", "qwen3_omni_moe", "step3p7", "unlimited_ocr",
}  # fmt: skip
# transformers keeps these families' norms in fp32 where it loads fp16; they are published in bf16.
_NORMS_IN_BF16 = {"afmoe", "gpt_oss"}
# transformers does not restore these (formats/families.md, section 6).
_NOT_RESTORED = ("balancing_biases",)
_BUDGET = Budget.share(1 << 20, 1)


def convert(source: Path, target: Path, style: str, dtype: DType | None = None) -> None:
    target.mkdir()
    reader, checkpoint = open_checkpoint(source)
    plan = make_plan(HuggingFace().layout(checkpoint, TargetOptions(hf_layout=style, dtype=dtype)))
    writer = LocalWriter(target, fsync=False)
    execute(
        plan, reader, writer, _BUDGET, meter=Silent(), skip=lambda file: False, on_file=lambda file: None
    )
    reader.close()


def differences(a: Path, b: Path, *, experts_only: bool) -> list[str]:
    """What differs between two directories, canonically."""
    (reader, one), (other_reader, other) = open_checkpoint(a), open_checkpoint(b)
    if experts_only:
        one, other = (
            side.select(tensor for tensor in side.tensors if isinstance(tensor.name, ExpertName))
            for side in (one, other)
        )
    verdict = compare(one, other, (reader, other_reader), _BUDGET, meter=Silent())
    return [difference.message for difference in verdict.differences]


def logits(model: Any) -> torch.Tensor:
    """With freshly allocated weights: kernels choose by the alignment of what they are given."""
    torch.manual_seed(1)  # a diffusion model begins with noise
    model = getattr(model, "thinker", model)  # what reads and writes text of a model that also speaks
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data = tensor.data.clone()
        tokens = torch.arange(3, 11)[None]
        decoder = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
        return model(input_ids=tokens, **decoder)[0]


def loaded(kind: type, path: Path, state: dict[str, torch.Tensor], expected: torch.Tensor) -> str | None:
    model, info = kind.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    wrong = {key: sorted(map(str, value))[:3] for key, value in info.items() if value}
    if wrong:
        return f"{path.name}: {wrong}"
    for key, tensor in model.eval().state_dict().items():
        if not key.endswith(_NOT_RESTORED) and not torch.equal(tensor, state[key]):
            return f"{path.name}: {key} differs"
    restored = not any(key.endswith(_NOT_RESTORED) for key in state)
    return None if not restored or torch.equal(logits(model), expected) else f"{path.name}: logits differ"


def rounded(name: str, model: Any) -> list[str]:
    """The tensors that transformers keeps in fp32 and ckpt-tool would round."""
    family = family_of(model.config.to_dict())
    modules = set(model._keep_in_fp32_modules_strict or ())
    if name not in _NORMS_IN_BF16:
        modules |= set(model._keep_in_fp32_modules or ())
    kept = [re.compile(rf"(?:^|\.){re.escape(module)}(?:$|\.)") for module in modules]
    return [
        key
        for key in model.state_dict()
        if any(pattern.search(key) for pattern in kept) and not family.keeps_fp32(key)
    ]


def lost_in_autoep(path: Path) -> str | None:
    """What is named otherwise after AutoEP's names, for the families that have them; and whether they are
    those of the blocks that AutoEP makes."""
    reader, checkpoint = open_checkpoint(path)
    reader.close()
    config = checkpoint.model_config or {}
    family = family_of(config)
    if not family.autoep or family.autoep_wrong or text_config(config) is not config:
        return None
    there = to_autoep(checkpoint, family)
    names = {tensor.name for tensor in to_hub(there, family).tensors} ^ {t.name for t in checkpoint.tensors}
    if names:
        return f"hub -> AutoEP -> hub: {sorted(map(str, names))[:3]}"
    blocks = tuple(f"{layer.module}." for layer in there.moe_layers)
    inside = [str(tensor.name) for tensor in there.tensors if str(tensor.name).startswith(blocks)]
    wrong = [
        name for name in inside if not re.search(r"\.(?:router|experts|shared_experts(?:_gate)?)\.", name)
    ]
    return f"no names of AutoEP's: {wrong[:3]}" if wrong else None


def check(name: str, root: Path) -> str | None:
    model = build(name)
    if rounded(name, model):
        return f"transformers keeps in fp32, and the family's table does not: {rounded(name, model)[:3]}"
    state, expected = model.state_dict(), logits(model)
    model.save_pretrained(root / "saved")
    wrong = lost_in_autoep(root / "saved")
    if wrong is not None:
        return wrong
    model.save_pretrained(root / "saved_fused", save_original_format=False)
    found = differences(root / "saved", root / "saved_fused", experts_only=name in _DENSE_NAMES_DIFFER)
    if found:
        return f"transformers' two forms are read differently: {found[:2]}"
    convert(root / "saved", root / "hub", "hub")
    convert(root / "saved", root / "fused", "fused")
    convert(root / "fused", root / "hub_again", "hub")
    found = differences(root / "saved", root / "hub_again", experts_only=False)
    if found:
        return f"hub -> fused -> hub: {found[:2]}"
    for form in ("hub", "fused"):
        wrong = loaded(type(model), root / form, state, expected)
        if wrong is not None:
            return wrong
    return None


def main(root: Path, names: list[str]) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    print("WITHOUT_FAMILY " + json.dumps(without_family()), flush=True)
    for name in names:
        result: dict[str, Any] = {"name": name, "error": None, "skipped": not can_build(name)}
        directory = root / name
        try:
            if not result["skipped"]:
                directory.mkdir()
                result["error"] = check(name, directory)
        except Exception:
            result["error"] = traceback.format_exc()
        shutil.rmtree(directory, ignore_errors=True)
        print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
