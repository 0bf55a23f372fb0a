"""A module that is no family's, trained and saved by the real DeepSpeed engine on CPU.

It has what ``zero_to_fp32`` has to care for: tied weights, a frozen parameter, buffers, a parameter that
never has a gradient, sizes that do not divide, odd names.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from tests.engine.processes import end_in_time, failure, fork_ranks, free_port, run_child

CASES = [
    {"stage": stage, "world": world, "dtype": dtype}
    for stage, world, dtype in (
        (1, 1, "fp32"), (1, 3, "bf16"), (2, 2, "fp32"), (2, 3, "bf16"),
        (3, 1, "fp32"), (3, 2, "bf16"), (3, 3, "fp32"),
    )
]  # fmt: skip


def name_of(case: dict[str, Any]) -> str:
    return f"stage{case['stage']}_world{case['world']}_{case['dtype']}"


def build() -> Any:
    """The module; a process that loads into it builds the same."""
    import torch
    from torch import nn

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 7)
            self.blocks = nn.ModuleDict({"first-block": nn.Linear(7, 5), "2": nn.Linear(5, 7, bias=False)})
            self.scale = nn.Parameter(torch.ones(1))
            self.unused = nn.Parameter(torch.randn(4))
            self.frozen = nn.Parameter(torch.randn(3, 7), requires_grad=False)
            self.head = nn.Linear(7, 11, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("table", torch.arange(13.0))
            self.register_buffer("counts", torch.arange(3))
            self.norm = nn.LayerNorm(7)

        def forward(self, tokens: Any) -> Any:
            hidden = self.blocks["2"](torch.tanh(self.blocks["first-block"](self.embed(tokens))))
            hidden = self.norm(hidden) * self.scale + self.frozen.mean(0)
            return self.head(hidden)

    torch.manual_seed(5)
    return Own()


def run(folder: Path, cases: list[dict[str, Any]]) -> None:
    """Save each case into a directory of its name."""
    with tempfile.TemporaryDirectory() as scratch:
        jobs = [[free_port(), case, str(folder / name_of(case))] for case in cases]
        Path(scratch, "jobs.json").write_text(json.dumps(jobs))
        log = Path(scratch, "log.txt")
        arguments = [str(Path(scratch, "jobs.json"))]
        status = run_child(
            "tests.engine.own_module_run", arguments, log, 300, environment={"DS_ACCELERATOR": "cpu"}
        )
        if status != 0:
            raise failure("deepspeed", status, log.read_text(errors="replace"))


def main(path: str) -> int:
    end_in_time()
    deepspeed: Any = importlib.import_module("deepspeed")
    # Shared-memory all-reduce serves inference only; without it no compiler and no /dev/shm file.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    failed = 0
    for port, case, target in json.loads(Path(path).read_text()):
        failed = fork_ranks(case["world"], port, partial(_train, deepspeed, case, target)) or failed
    return failed


def _train(deepspeed: Any, case: dict[str, Any], target: str, rank: int) -> None:
    import torch

    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", verbose=False)
    module = build()
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        "zero_optimization": {"stage": case["stage"]},
        "bf16": {"enabled": case["dtype"] == "bf16"},
    }
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=module, config=config, model_parameters=trained)
    for step in range(2):
        torch.manual_seed(step * 10 + rank)
        tokens = torch.randint(0, 11, (2, 6))
        loss = torch.nn.functional.cross_entropy(engine(tokens).float().flatten(0, 1), tokens.flatten())
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(target)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]) if os.environ.get("DS_ACCELERATOR") == "cpu" else 2)
