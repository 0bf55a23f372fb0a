"""The canonical representation of a checkpoint: names, states, regions, and the catalogue of them.

Pure data. Nothing here opens a file, and nothing here knows a checkpoint format.

A *tensor* is identified by a name and a state. Dense tensors keep their fully qualified name.
Routed experts are indexed: layer, global expert id, projection (gate, up or down) and part. The
expert id is the first index of one stacked tensor per (layer, projection, part), so a model with 58
layers of 256 experts is 174 catalogue entries per state and not 44,544, and one expert is one slice
of a stack. Shapes, always in ``nn.Linear`` orientation ([out, in]):

    gate [E, I, H]    up [E, I, H]    down [E, H, I]

with E experts, I the intermediate size of one expert, H the hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, NamedTuple


class DType(Enum):
    """An element type; the value is ``(torch's name, bytes per element)``."""

    float64 = ("float64", 8)
    float32 = ("float32", 4)
    float16 = ("float16", 2)
    bfloat16 = ("bfloat16", 2)
    float8_e4m3fn = ("float8_e4m3fn", 1)
    float8_e5m2 = ("float8_e5m2", 1)
    float8_e4m3fnuz = ("float8_e4m3fnuz", 1)
    float8_e5m2fnuz = ("float8_e5m2fnuz", 1)
    float8_e8m0fnu = ("float8_e8m0fnu", 1)
    int64 = ("int64", 8)
    int32 = ("int32", 4)
    int16 = ("int16", 2)
    int8 = ("int8", 1)
    uint64 = ("uint64", 8)
    uint32 = ("uint32", 4)
    uint16 = ("uint16", 2)
    uint8 = ("uint8", 1)
    bool_ = ("bool", 1)

    torch_name: str
    itemsize: int

    def __init__(self, torch_name: str, itemsize: int) -> None:
        self.torch_name, self.itemsize = torch_name, itemsize

    @property
    def is_float(self) -> bool:
        return "float" in self.torch_name

    def __str__(self) -> str:
        return self.torch_name


# What can be cast to one another.
CASTABLE = frozenset({DType.float64, DType.float32, DType.float16, DType.bfloat16})

# States. A checkpoint may carry others (``max_exp_avg_sq``, ``momentum_buffer``): any string is a state.
WEIGHT = "weight"  # as stored for compute: frozen parameters, buffers, and model files
MASTER = "master"  # the optimizer's fp32 copy, the truth while training
EXP_AVG = "exp_avg"
EXP_AVG_SQ = "exp_avg_sq"
STEP = "step"  # a scalar per parameter

NOT_COMPARED = "Not compared,"  # how notes begin on what lies beside the catalogue

GATE, UP, DOWN = "gate", "up", "down"
PROJECTIONS = (GATE, UP, DOWN)


class Role(Enum):
    """What a tensor is to the model that owns it."""

    PARAMETER = "parameter"  # trained: has optimizer state
    FROZEN = "frozen"  # a parameter without optimizer state
    BUFFER = "buffer"  # not a parameter: never trained


@dataclass(frozen=True, slots=True)
class ExpertName:
    """All routed experts of one layer and projection: a stack whose first index is the global expert id.

    ``layer_path`` is the module path of the layer (``model.layers.3``); its last component is the
    layer's number in the model, which is not the ordinal of the layer among the MoE layers.
    """

    layer_path: str
    projection: str
    part: str = "weight"

    @property
    def layer(self) -> int:
        return int(self.layer_path.rsplit(".", 1)[-1])

    def expert(self, expert: int | str) -> str:
        """The name of one expert's matrix, for messages and tables."""
        return f"{self.layer_path}.experts.{expert}.{self.projection}.{self.part}"

    def __str__(self) -> str:
        return self.expert("*")


TensorName = str | ExpertName


class Region(NamedTuple):
    """Where a contiguous run of a tensor's flattened (row-major) elements lies.

    Elements ``start .. start + numel`` lie back to back in ``file`` from byte ``offset`` on. ZeRO's
    partitions, whole tensors, one expert of a stack and rows of a matrix are all such runs; what is
    not contiguous is a ``Box``. Named tuples, because a large checkpoint has millions: readers compute
    them on demand and keep none.
    """

    start: int
    numel: int
    file: str
    offset: int


class Box(NamedTuple):
    """Where a rectangular lattice of a tensor's coordinates lies.

    Along dimension d it holds coordinates ``origin[d] + j * steps[d]`` for j below ``counts[d]``; one j
    further is ``strides[d]`` bytes further in ``file``. ``offset`` is the byte of its first element.
    """

    origin: tuple[int, ...]
    counts: tuple[int, ...]
    steps: tuple[int, ...]
    file: str
    offset: int
    strides: tuple[int, ...]


# Regions in any order, to be gone through more than once: a tuple, or an object that computes them.
Regions = Iterable[Region | Box]


@dataclass(frozen=True, slots=True)
class Encoding:
    """How files hold a tensor whose values are computed as they are read: the quantisation ``scheme``
    and the ``stored`` tensors under their names in the files. Regions of the tensor name its values.

    Without ``stored`` the values cannot be read; ``reason``, a sentence, says why where that is known."""

    scheme: str
    stored: tuple[Tensor, ...]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One canonical tensor: its identity, its logical form, and where its elements lie.

    ``regions`` together hold every element exactly once, in any order. ``replicas`` are further
    copies that must hold the same values; conversions compare them before they trust ``regions``.
    """

    name: TensorName
    state: str
    shape: tuple[int, ...]
    dtype: DType
    regions: Regions
    role: Role = Role.PARAMETER
    replicas: Regions = ()
    encoding: Encoding | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def label(self) -> str:
        return f"{self.name} [{self.state}]"

    def element(self, index: int) -> str:
        """Name the element at flat ``index``: ``model.norm.weight [master] at [3]``."""
        name = str(self.name)
        indices: list[int] = []
        for size in reversed(self.shape):
            indices.append(index % size)
            index //= size
        indices.reverse()
        if isinstance(self.name, ExpertName) and indices:
            name = self.name.expert(indices.pop(0))
        return f"{name} [{self.state}] at {indices}"


@dataclass(frozen=True, slots=True)
class Scalar:
    """A scalar optimizer state of one parameter, such as ``step``.

    ``dtype`` is None where the engine stores a Python int rather than a 0-d tensor; a writer keeps
    the kind, because optimizers refuse the other one.
    """

    value: float | int
    dtype: DType | None


def same(one: Any, other: Any) -> bool:
    """Whether two values that files state are the same. NaN is, which in Python equals nothing."""
    return bool(one == other) or repr(one) == repr(other)


@dataclass(frozen=True, slots=True)
class ParamGroup:
    """One optimizer parameter group: its options (lr, betas, ...) and its parameters in order."""

    options: Mapping[str, Any]
    parameters: tuple[TensorName, ...]


@dataclass(frozen=True, slots=True)
class MoELayer:
    """One MoE layer: where its experts live.

    ``module`` is the module path of the MoE block (``model.layers.3.mlp``). ``holders[r]`` are the
    global expert ids on EP rank r, in the order they are packed there.
    """

    layer_path: str
    module: str
    num_experts: int
    holders: tuple[tuple[int, ...], ...] = ()


def even_holders(local: int, ep: int) -> tuple[tuple[int, ...], ...]:
    """The experts of each of ``ep`` ranks that hold ``local`` each, in order: ``MoELayer.holders``."""
    return tuple(tuple(range(rank * local, (rank + 1) * local)) for rank in range(ep))


@dataclass(frozen=True, slots=True)
class Topology:
    """The ranks a checkpoint was saved by. Sizes are counts of ranks; None where the format has none.

    ``ep_ranks[r]`` and ``edp_ranks[r]`` are the expert-parallel and expert-data-parallel rank of
    global rank r; empty without expert parallelism.
    """

    world_size: int | None = None
    ep_size: int | None = None
    edp_size: int | None = None
    zero_stage: int | None = None
    ep_ranks: tuple[int, ...] = ()
    edp_ranks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Everything a run needs to go on that is not a tensor of the model or of its optimizer.

    Values are plain Python data and stand-ins of containers.pickles; a tensor in ``client_state`` is a
    ``Tensor``, so that it is streamed like all others. ``per_rank`` names the client state that
    differed between ranks and therefore means nothing on other ranks; it is not in ``client_state``.
    The keys of both are what the user chose: mostly text, but numbers, tuples and None as well.
    ``loss_scale`` holds DeepSpeed's ``loss_scaler``, ``dynamic_loss_scale`` and ``overflow``.
    """

    step: int | None = None
    counters: Mapping[str, int] = field(default_factory=dict)
    param_groups: tuple[ParamGroup, ...] = ()
    scheduler: Any = None
    loss_scale: Mapping[str, Any] = field(default_factory=dict)
    client_state: Mapping[Any, Any] = field(default_factory=dict)
    per_rank: tuple[Any, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    engine_version: str | None = None


class SourceFile(NamedTuple):
    """A file of the source. ``fingerprint`` changes when its content does and costs no data to read
    (for torch archives: a hash of the zip directory, which holds a CRC-32 of every record). ``archives``
    says where torch archives lie in it: (offset, length) in bytes.

    ``stored`` says where tensors lie in it, as its container alone states it, before anybody knows what
    they are: offset, length, offset, length, ... in bytes. ``read`` are those of them that were read into
    the catalogue itself (numbers, such as ``step``), or compared with what it holds.
    """

    path: str
    size: int
    fingerprint: str
    archives: tuple[tuple[int, int], ...] = ()
    stored: Sequence[int] = ()
    read: Sequence[int] = ()


class Apart(NamedTuple):
    """Stored bytes that hold no element of a catalogue's tensors, and why: padding, copies."""

    file: str
    offset: int
    length: int
    reason: str


class Decoded(NamedTuple):
    """A file of values that are computed as they are read: its bytes, and the ``stored`` tensors that they
    are computed from."""

    length: int
    stored: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, repr=False)
class Checkpoint:
    """An immutable catalogue of one checkpoint. Paths in it are relative to ``root``.

    ``dialect`` says whose dense names these are: ``autoep`` (DeepSpeed AutoEP's modules),
    ``transformers`` (modules as transformers builds them) or ``hub`` (names in published files).
    ``tensors`` are in the model's own order as far as the format tells it. ``aliases`` maps a
    further name of a tensor to the name it is listed under (tied weights); ``equal`` maps a listed
    tensor to another that, by their checksums, holds the same: a config.json may say that they are tied.
    ``module_names`` are the keys of the module's state dict in its own order (aliases and buffers among
    them), where the format records them. ``saved_names`` has the names that a run of the same wrappers has
    (``wrappers``), by those here; also those of layers and MoE blocks. ``unresolved`` says why optimizer
    state that the checkpoint has is not among ``tensors``, and ``nameless`` why the names in it are not
    those of a model, where that is so. ``layout_hint`` is what the format's own writer needs to write the
    like again; nobody else looks into it. ``others`` are stored tensors that are neither the model's nor
    its optimizer's, which only a writer of the same framework has a place for. ``apart`` are stored bytes
    that hold no element of any tensor, ``decoded`` the files of values by their paths.
    """

    format: str
    root: str
    dialect: str
    tensors: tuple[Tensor, ...]
    files: tuple[SourceFile, ...]
    topology: Topology = Topology()
    training: TrainingState = TrainingState()
    scalars: Mapping[tuple[TensorName, str], Scalar] = field(default_factory=dict)
    moe_layers: tuple[MoELayer, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    equal: Mapping[str, str] = field(default_factory=dict)
    model_config: Mapping[str, Any] | None = None
    module_names: tuple[str, ...] = ()
    saved_names: Mapping[str, str] = field(default_factory=dict)
    unresolved: str = ""
    nameless: str = ""
    layout_hint: Any = None
    notes: tuple[str, ...] = ()
    others: tuple[Tensor, ...] = ()
    apart: Iterable[Apart] = ()
    decoded: Mapping[str, Decoded] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<Checkpoint {self.format} at {self.root!r}: {len(self.tensors)} tensors>"

    def by_key(self) -> dict[tuple[TensorName, str], Tensor]:
        return {(tensor.name, tensor.state): tensor for tensor in self.tensors}

    def by_state(self) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {}
        for tensor in self.tensors:
            found.setdefault(tensor.state, []).append(tensor)
        return found

    def values(self) -> list[Tensor]:
        """The tensors a model consists of: masters where there are any, stored weights elsewhere."""
        masters = {tensor.name for tensor in self.tensors if tensor.state == MASTER}
        return [
            tensor
            for tensor in self.tensors
            if tensor.state == MASTER or (tensor.state == WEIGHT and tensor.name not in masters)
        ]

    def select(self, tensors: Iterable[Tensor]) -> Checkpoint:
        return replace(self, tensors=tuple(tensors))


def contiguous(shape: Sequence[int], file: str, offset: int) -> tuple[Region, ...]:
    """The regions of a tensor that lies in one piece."""
    return (Region(0, math.prod(shape), file, offset),)
