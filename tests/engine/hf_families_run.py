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
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.checkpoint import FileSystemReader

import ckpt_tool
from ckpt_tool.canonical import DType, ExpertName
from ckpt_tool.comparison import compare
from ckpt_tool.errors import MismatchError
from ckpt_tool.execute.budget import Budget
from ckpt_tool.execute.local import execute
from ckpt_tool.execute.meter import Silent
from ckpt_tool.families import family_of, text_config
from ckpt_tool.families.autoep import to_autoep
from ckpt_tool.families.naming import to_hub
from ckpt_tool.formats.hf.format import HuggingFace
from ckpt_tool.formats.hf.target_options import HfOptions
from ckpt_tool.formats.registry import open_checkpoint
from ckpt_tool.plan import make_plan
from ckpt_tool.storage import LocalWriter
from tests.engine.hf_models import build, can_build, without_family

# transformers keeps these families' norms in fp32 where it loads fp16; they are published in bf16.
_NORMS_IN_BF16 = {"afmoe", "gpt_oss"}
# transformers does not restore these (formats/families.md, section 6).
_NOT_RESTORED = ("balancing_biases",)
_BUDGET = Budget.share(1 << 20, 1)


def convert(source: Path, target: Path, style: str, dtype: DType | None = None) -> None:
    target.mkdir()
    reader, checkpoint = open_checkpoint(source)
    layout = HuggingFace().layout(checkpoint, HfOptions(hf_layout=style, dtype=dtype))
    plan = make_plan(layout, checkpoint)
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
    if model.config.model_type == "llama4":  # transformers 5.24 asks for images that it was not given
        model = model.language_model
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


def loaded_in_bf16(kind: type, saved: Path, ours: Path) -> str | None:
    """What differs, in dtype or bits, between the model in bf16 loaded from transformers' fp32 files and
    from our bf16 export of them. A parameter may be kept in fp32 by a list, or because it is created so."""
    options: dict[str, Any] = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
    expected, found = (kind.from_pretrained(path, **options).state_dict() for path in (saved, ours))
    for key, tensor in expected.items():
        if key.endswith(_NOT_RESTORED):
            continue
        if found[key].dtype != tensor.dtype or not torch.equal(found[key], tensor):
            return (
                f"bf16: {key} is {tensor.dtype} in transformers, and rounded or another one in our export"
            )
    return None


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
    # What the tables leave alone, under other names in memory, loads both ways. Experts are compared.
    untranslated = bool(family_of(model.config.to_dict()).untranslated)
    found = differences(root / "saved", root / "saved_fused", experts_only=untranslated)
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
    convert(root / "saved", root / "bf16", "hub", DType.bfloat16)
    wrong = loaded_in_bf16(type(model), root / "saved", root / "bf16")
    if wrong is not None:
        return wrong
    return refused(root) if untranslated else started(root, model)


def refused(root: Path) -> str | None:
    """What is wrong with how a run is refused whose names are not known."""
    try:
        ckpt_tool.convert(root / "saved", root / "dcp", to="dcp", style="plain", world=2)
    except MismatchError as error:
        return None if "in memory" in str(error) else f"to DCP: {error}"
    return "converted to DCP without knowing the names"


def started(root: Path, model: Any) -> str | None:
    """What is wrong with a DCP checkpoint made from the published files: a model in memory has to find all
    its tensors there and no others, and published files can be made of it again."""
    ckpt_tool.convert(root / "saved", root / "dcp", to="dcp", style="plain", world=2)
    found = FileSystemReader(root / "dcp").read_metadata().state_dict_metadata
    names = {key.removeprefix("model.") for key in found}
    state = model.state_dict()
    shared = Counter(value.data_ptr() for value in state.values())
    wrong = {key for key in state.keys() ^ names if key not in state or shared[state[key].data_ptr()] == 1}
    if wrong:
        return f"dcp: {sorted(wrong)[:3]} of {len(wrong)}"
    held = {name: torch.full_like(state[name], 7) for name in names}
    dcp.load({"model": held}, checkpoint_id=root / "dcp", no_dist=True)
    wrong = {name for name, value in held.items() if not torch.equal(value, state[name])}
    if wrong:
        return f"dcp: {sorted(wrong)[:3]} differ"
    ckpt_tool.convert(root / "dcp", root / "hub_from_dcp", to="hf", config=root / "saved")
    different = differences(root / "saved", root / "hub_from_dcp", experts_only=False)
    return f"hub -> DCP -> hub: {different[:2]}" if different else None


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
