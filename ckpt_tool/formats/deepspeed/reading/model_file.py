"""``mp_rank_00_model_states.pt``: the one model file of ZeRO stages 0, 1 and 2.

Rank 0 saves it: whole weights in the model's dtype under ``module`` (routed experts of AutoEP are in
files of their own), and the non-tensor state. Keys: deepspeed 0.19.8, runtime/engine.py
(``_common_checkpoint_state``, ``_save_moe_checkpoint``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ckpt_tool.canonical import Role, TrainingState
from ckpt_tool.containers.pickle_records import TensorRecord
from ckpt_tool.containers.torch_zip import TorchArchive
from ckpt_tool.errors import MismatchError, UnreadableError
from ckpt_tool.formats.deepspeed.reading.rank_files import ENGINE_KEYS
from ckpt_tool.storage import Reader

MODEL_FILE = "mp_rank_00_model_states.pt"
# the end of messages about files that contradict each other or themselves
COPY_AGAIN = "Copy this checkpoint again from where it was saved."
_MODEL_FILE = re.compile(r"mp_rank_(\d{1,6})(_\d{1,6})?_model_states\.pt$")
_COUNTERS = ("global_steps", "skipped_steps", "global_samples")

Shape = tuple[int, ...]
Shapes = tuple[tuple[str, Shape], ...]


def has_model_file(names: list[str]) -> bool:
    """Whether a directory holds a model file of ZeRO stages 0 to 2, of whatever model-parallel rank."""
    return any(_MODEL_FILE.match(name) for name in names)


class ModelFile:
    """What the file says. ``root`` is the directory, for messages.

    ``weights`` are the tensors of ``module`` by name, in the model's order; ``shapes`` the optimizer's
    groups, each with its parameters in the order they were flattened in and (for experts) with EP rank
    0's shapes; None for ZeRO-0, which states none. ``frozen`` are the shapes of frozen parameters, None
    where the engine states none (stages 0 and 1).

    Raises:
        UnreadableError: the file is missing, malformed, or one of several (tensor or pipeline parallel).
    """

    def __init__(self, reader: Reader) -> None:
        self.root = reader.root
        _check_alone(reader)
        self._archive = TorchArchive(reader, MODEL_FILE)
        self.where = f"{self.root}/{MODEL_FILE}"
        self.source = self._archive.source
        root = self._archive.root
        module = root.get("module") if isinstance(root, dict) else None
        if not isinstance(module, dict) or "dp_world_size" not in root:
            raise UnreadableError(
                f"{self.where} has no weights under 'module' or no dp_world_size: it is no model file of "
                "DeepSpeed, or one of a pipeline-parallel run, whose weights are in files by layer. "
                "ckpt-tool does not read pipeline-parallel checkpoints."
            )
        self._records = {name: value for name, value in module.items() if isinstance(value, TensorRecord)}
        self.weights = {
            name: self._archive.tensor(name, "weight", record) for name, record in self._records.items()
        }
        stated = root.get("param_shapes")
        self.shapes = None if stated is None else tuple(self._shapes(group) for group in stated)
        frozen = root.get("frozen_param_shapes")
        self.frozen = None if frozen is None else dict(self._shapes(frozen))
        self.buffers = frozenset(root.get("buffer_names") or ())
        self.shared: Mapping[str, str] = root.get("shared_params") or {}
        self.optimizer: Any = root.get("optimizer")
        self.engine = {
            key: root[key]
            for key in ENGINE_KEYS
            if key in root and key not in ("module", "frozen_param_fragments", "optimizer")
        }
        self.notes: list[str] = []
        others = [name for name in module if name not in self._records]
        if others:
            self.notes.append(f"{others[:3]} ({len(others)} in 'module') are no tensors and are left out.")
        self._client = self._client_state(root)
        self._check_fragments(root.get("frozen_param_fragments") or {})

    @property
    def archive(self) -> TorchArchive:
        return self._archive

    @property
    def config(self) -> Mapping[str, Any]:
        """The run's DeepSpeed configuration."""
        config = self.engine.get("ds_config")
        return config if isinstance(config, dict) else {}

    @property
    def world(self) -> int:
        """Data-parallel ranks of the run."""
        world = self.engine["dp_world_size"]
        if type(world) is not int or world < 1:
            raise UnreadableError(f"{self.where}: dp_world_size is malformed: {world!r}. {COPY_AGAIN}")
        return world

    def stage(self) -> int:
        """The ZeRO stage the configuration names; the optimizer's files say it themselves."""
        if self.shapes is None:
            return 0
        zero = self.config.get("zero_optimization")
        stage = zero.get("stage") if isinstance(zero, dict) else None
        return stage if stage in (1, 2) else 1

    def same_values(self, one: str, other: str) -> bool:
        """Whether two names in 'module' stand for equal values, told without reading them. If they do,
        what is stored of ``one`` is accounted for.

        torch saves tied weights as views of one storage; where the engine cloned them first (every
        model with experts) each copy has a storage, whose CRC-32 the archive states.
        """
        return self._equal(self._records[one], self._records[other])

    def _equal(self, a: TensorRecord, b: TensorRecord) -> bool:
        """``same_values`` of two records."""
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return False
        if a.storage.key == b.storage.key:
            return (a.offset, a.stride) == (b.offset, b.stride)
        whole = all(record.storage.numel == record.numel for record in (a, b))
        equal = whole and self._archive.storage_crc(a) == self._archive.storage_crc(b)
        if equal:
            self._archive.account_for_tensors(a)
        return equal

    def _check_fragments(self, fragments: Mapping[str, Any]) -> None:
        """Stage 2 saves frozen parameters in 'module' and beside it (runtime/engine.py)."""
        for name, record in fragments.items():
            known = self._records.get(name)
            if known is None and ".experts." in name:
                # EP rank 0's share, whose experts have files of their own
                self._archive.account_for_tensors(record)
                continue
            if known is None or not isinstance(record, TensorRecord) or not self._equal(record, known):
                raise MismatchError(
                    f"{self.where}: frozen_param_fragments has {name} otherwise than 'module', and both "
                    f"hold the whole parameter. There is no single value to convert. {COPY_AGAIN}"
                )

    def tied(self) -> dict[str, str]:
        """Further names of a tensor, told by their being the same view of the same storage."""
        seen: dict[tuple[str, int, Shape], str] = {}
        found = {}
        for name, record in self._records.items():
            if record.numel:
                first = seen.setdefault((record.storage.key, record.offset, record.shape), name)
                if first != name:
                    found[name] = first
        return found

    def weight_shape(self, name: str) -> Shape:
        """The shape of a parameter the optimizer's groups name."""
        if name not in self.weights:
            raise UnreadableError(
                f"{self.where}: param_shapes lists {name}, 'module' has no such weight. {COPY_AGAIN}"
            )
        return self.weights[name].shape

    def training(self, param_groups: tuple[Any, ...], loss_scale: Mapping[str, Any]) -> TrainingState:
        """The non-tensor state, with what the optimizer's files add."""
        engine = self.engine
        return TrainingState(
            step=engine.get("global_steps"),
            counters={key: engine[key] for key in _COUNTERS if key in engine},
            param_groups=param_groups,
            scheduler=engine.get("lr_scheduler"),
            loss_scale=loss_scale,
            client_state=self._client,
            config=self.config,
            engine_version=engine.get("ds_version"),
        )

    def _client_state(self, root: Mapping[str, Any]) -> dict[str, Any]:
        client = {}
        for key, value in root.items():
            if key in ENGINE_KEYS and not (key in ("data_sampler", "random_ltd") and value):
                continue
            try:
                client[key] = self._archive.carried(value)
            except (UnreadableError, RecursionError) as error:
                self.notes.append(f"client state {key!r} is left out: {error}")
        return client

    def _shapes(self, group: Any) -> Shapes:
        if not isinstance(group, dict):
            raise UnreadableError(
                f"{self.where}: param_shapes is malformed (not dictionaries of shapes). {COPY_AGAIN}"
            )
        found = []
        for name, shape in group.items():
            sizes = tuple(shape) if isinstance(shape, tuple | list) else (-1,)
            if any(type(size) is not int or size < 0 for size in sizes):
                raise UnreadableError(
                    f"{self.where}: the shape of {name} is malformed: {shape!r}. {COPY_AGAIN}"
                )
            found.append((name, sizes))
        return tuple(found)


def _check_alone(reader: Reader) -> None:
    for name in reader.list():
        match = _MODEL_FILE.match(name)
        if match and (int(match[1]) > 0 or match[2]):
            raise UnreadableError(
                f"{reader.root}/{name}: the model was also split by tensor or pipeline parallelism. "
                "ckpt-tool does not read such checkpoints."
            )


class Named(NamedTuple):
    """What the names in ``module`` stand for: roles by name, and further names of the same tensor."""

    roles: Mapping[str, Role]
    aliases: Mapping[str, str]


def sort_names(model: ModelFile, trained: frozenset[str] | None, routers: tuple[str, ...]) -> Named:
    """Tell parameters, frozen parameters, buffers and aliases in ``module`` apart.

    Args:
        trained: the parameters the optimizer holds; None where there is none to ask.
        routers: module paths of the MoE blocks: AutoEP keeps their router reachable under its old name
            (deepspeed 0.19.8, module_inject/auto_ep_layer.py), which ``shared_params`` does not tell.

    Raises:
        UnreadableError: a name is none of these.
        MismatchError: an alias holds other values than what it stands for.
    """
    aliases = {name: target for name, target in model.shared.items() if name in model.weights}
    aliases |= {name: target for name, target in model.tied().items() if name not in aliases}
    for name in model.weights:
        for module in routers:
            target = f"{module}.router.{name.removeprefix(f'{module}.gate.')}"
            old = name.startswith(f"{module}.gate.") and name not in (trained or ())
            if old and target in model.weights:
                aliases[name] = target
    for name, target in aliases.items():
        if target not in model.weights or not model.same_values(name, target):
            raise MismatchError(
                f"{model.where}: {name} is a further name of {target}, but their values differ. There is "
                f"no single value to convert. {COPY_AGAIN}"
            )
    roles = {name: _role(model, name, trained) for name in model.weights if name not in aliases}
    unknown = [name for name, role in roles.items() if role is None]
    if unknown:
        raise UnreadableError(
            f"{model.where}: 'module' names {unknown[:5]} ({len(unknown)} in all), which are no trained "
            "parameter, buffer, frozen parameter or alias. Copy the file again from where it was saved."
        )
    return Named({name: role for name, role in roles.items() if role is not None}, aliases)


def _role(model: ModelFile, name: str, trained: frozenset[str] | None) -> Role | None:
    if name in model.buffers:
        return Role.BUFFER
    if trained is None or name in trained:
        return Role.PARAMETER
    # stage 2 lists its frozen parameters, stages 0 and 1 do not (engine.py: save_frozen_param)
    return Role.FROZEN if model.frozen is None or name in model.frozen else None
