"""How what was written is loaded: the next line that a user types."""

from __future__ import annotations

from ckpt_tool.formats.dcp.grammar.keys import Scheme

_PLACES = {
    "torchtitan": "{target}, named step-N, in the run's checkpoint folder (--checkpoint.folder)",
    "accelerate": 'accelerator.load_state("{target}")',
    "transformers": 'trainer.train(resume_from_checkpoint="{target}")',
}
_WEIGHTS = {
    "torchtitan": 'dcp.load(model_state, checkpoint_id="{target}")',
    "accelerate": 'dcp.load({"model": model_state}, checkpoint_id="{target}/pytorch_model_fsdp_0")',
    "transformers": 'from_pretrained("{target}")',
}


def loading(scheme: Scheme, *, optimizer: bool) -> str:
    """The line for a framework's own loader where optimizer state is there, else for the weights alone.
    ``model_state`` and ``optimizer_state`` are those of ``torch.distributed.checkpoint.state_dict``."""
    known = (_PLACES if optimizer else _WEIGHTS).get(scheme.style)
    if known is not None:
        return known
    parts = [(scheme.model_root, "model_state")]
    if optimizer:
        parts.append((scheme.optimizer_root, "optimizer_state"))
    keys = ", ".join(f'"{".".join(map(str, root))}": {state}' for root, state in parts if root)
    return f'dcp.load({{{keys}}}, checkpoint_id="{{target}}")' if keys else ""
