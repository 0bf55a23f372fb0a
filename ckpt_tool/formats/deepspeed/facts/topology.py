"""The ranks of a target run: which EP rank and which expert-data-parallel rank each of them is.

deepspeed 0.19.8, utils/groups.py: by default EP ranks alternate (0, 1, 0, 1, ...); with
``use_data_before_expert_parallelism`` the ranks of one EP rank are neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

from ckpt_tool.canonical import Checkpoint, Topology
from ckpt_tool.errors import UsageError
from ckpt_tool.formats.deepspeed.facts.target_options import ZeroOptions


@dataclass(frozen=True, slots=True)
class Ranks:
    """``world`` ranks in ``ep`` expert-parallel ranks; ``data_first`` is the order described above."""

    world: int
    ep: int
    data_first: bool = False

    @property
    def edp(self) -> int:
        """Ranks that share one EP rank's experts."""
        return self.world // self.ep

    def topology(self, stage: int) -> Topology:
        """The same, as a catalogue has it."""
        return Topology(self.world, self.ep, self.edp, stage)

    def ep_rank(self, rank: int) -> int:
        return rank // self.edp if self.data_first else rank % self.ep

    def edp_rank(self, rank: int) -> int:
        return rank % self.edp if self.data_first else rank // self.ep

    def edp_group(self, rank: int) -> range:
        """The global ranks that share this rank's experts, by expert-data-parallel rank."""
        own = self.ep_rank(rank)
        if self.data_first:
            return range(own * self.edp, (own + 1) * self.edp)
        return range(own, self.world, self.ep)


def target_ranks(checkpoint: Checkpoint, options: ZeroOptions) -> Ranks:
    """The topology asked for; what is not asked for stays as it was.

    Raises:
        UsageError: experts or ranks cannot be divided so, with the sizes that would do.
    """
    source = options.like.topology if options.like is not None else checkpoint.topology
    if options.like is not None and (
        options.world not in (None, source.world_size) or options.ep not in (None, source.ep_size)
    ):
        raise UsageError(
            f"--like {options.like.root} is of {source.world_size} ranks at EP size {source.ep_size}, "
            "which --world and --ep contradict. Leave them out: the template says both."
        )
    world = options.world or source.world_size
    experts = sorted({layer.num_experts for layer in checkpoint.moe_layers})
    if world is None:
        raise UsageError("The source does not say how many ranks saved it. Pass --world.")
    if not experts:
        if options.ep not in (None, 1):
            raise UsageError(
                f"--ep {options.ep}: the checkpoint has no experts that AutoEP could divide. Leave it out."
            )
        return Ranks(world, 1)
    ep = options.ep or source.ep_size
    if ep is None:
        raise UsageError("The source does not say its EP size. Pass --ep.")
    fitting = [n for n in range(1, world + 1) if not world % n and not any(e % n for e in experts)]
    for count in experts:
        if count % ep:
            raise UsageError(
                f"--ep {ep} does not divide the {count} experts of a layer. EP sizes that do, with --world "
                f"{world}: {', '.join(map(str, fitting))}."
            )
    if world % ep:
        near = sorted({max(ep, world // ep * ep), (world // ep + 1) * ep})
        raise UsageError(
            f"--world {world} is not a multiple of --ep {ep}. World sizes near it that are: "
            f"{', '.join(map(str, near))}; EP sizes that fit it: {', '.join(map(str, fitting))}."
        )
    config = options.ds_config
    if config is None:
        config = options.like.training.config if options.like else checkpoint.training.config
    return Ranks(world, ep, bool(config.get("use_data_before_expert_parallelism", False)))
