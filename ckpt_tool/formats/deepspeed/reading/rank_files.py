"""What the files of each rank of a ZeRO-3 run say. ``rank_reading`` reads them.

Keys: deepspeed 0.19.8, runtime/engine.py (``_save_checkpoint``) and runtime/zero/stage3.py
(``_rigid_state_dict``).
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckpt_tool.canonical import DType, Scalar, SourceFile, Tensor

# Keys the engine itself puts into a model_states file; all others are the user's client_state.
ENGINE_KEYS = frozenset(
    [
        "module",
        "buffer_names",
        "optimizer",
        "param_shapes",
        "frozen_param_shapes",
        "frozen_param_fragments",
        "shared_params",
        "lr_scheduler",
        "data_sampler",
        "random_ltd",
        "sparse_tensor_module_names",
        "skipped_steps",
        "global_steps",
        "global_samples",
        "dp_world_size",
        "mp_world_size",
        "checkpoint_parallel_dimensions",
        "ds_config",
        "ds_version",
        "num_experts",
        "ds_autoep_layers",
        "autoep_layers",
        "universal_checkpoint_info",
    ]
)

LAYER_KEYS = ("ds_autoep_layers", "autoep_layers")

Shapes = tuple[tuple[tuple[str, tuple[int, ...]], ...], ...]


@dataclass(frozen=True, slots=True)
class FlatState:
    """One per-element state of one sub-group on one rank: ``numel`` elements from byte ``offset``."""

    offset: int
    numel: int
    dtype: DType


@dataclass(frozen=True, slots=True)
class FlatBuffer:
    """A flat buffer of each rank: ``numel`` elements from the byte on that is ``number`` among the
    rank's ``offsets``."""

    number: int
    numel: int
    dtype: DType


@dataclass(frozen=True, slots=True)
class SavedObjects:
    """What rank 0 saved, its tensors described: to write the like again with every key in its place.

    ``model`` and ``optimizer`` are the objects of its two files; ``bf16`` says that the optimizer's file
    name has the prefix of a bf16 engine.
    """

    model: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    bf16: bool


# Of each rank's ds_config: whether neighbouring ranks hold the same experts.
DATA_FIRST = "use_data_before_expert_parallelism"


@dataclass(slots=True)
class RankFiles:
    """What the two files of one rank say. What ranks say alike is one object.

    ``shapes`` are the sub-groups: per sub-group the parameters in order with their full (for experts:
    EP-local) shapes. ``states[i]`` maps a state of sub-group i to its flat buffer, ``scalars[i]`` to
    its value; ``frozen`` are the fragments of frozen parameters. ``offsets`` says where in the optimizer
    file the buffers begin, ``frozen_offsets`` where in the model file the fragments do; 0 for those of no
    elements. ``engine`` and ``client`` are the remaining keys of the model file; tensors in ``client`` are
    ``Tensor``. ``client_digests`` compare client values across ranks by content. ``buffers``,
    ``loss_scale``, ``param_groups`` and ``saved`` are kept of rank 0 only.
    """

    rank: int
    model_file: str
    optim_file: str
    sources: tuple[SourceFile, SourceFile]
    shapes: Shapes
    frozen_shapes: Mapping[str, tuple[int, ...]]
    frozen: Mapping[str, FlatBuffer]
    frozen_offsets: array[int]
    buffers: Mapping[str, Tensor]
    buffer_crcs: Mapping[str, int]
    module_names: tuple[str, ...]
    engine: Mapping[str, Any]
    client: Mapping[str, Any]
    client_digests: Mapping[str, str]
    notes: tuple[str, ...]
    states: Sequence[Mapping[str, FlatBuffer]] = ()
    offsets: array[int] = field(default_factory=lambda: array("q"))
    scalars: Sequence[Mapping[str, Scalar]] = ()
    partition_groups: list[Mapping[str, Any]] | None = None
    partition_count: Any = None
    param_groups: list[Mapping[str, Any]] = field(default_factory=list)
    loss_scale: Mapping[str, Any] = field(default_factory=dict)
    optimizer_digest: str = ""
    zero_stage: int = 3
    saved: SavedObjects | None = None
