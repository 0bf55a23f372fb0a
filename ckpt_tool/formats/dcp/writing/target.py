"""Writing DCP without a process group: what each rank of a run would have saved, laid out from metadata.

The chunk grid is the one of ``grid``; every rank's chunks are in its own file, so that a run of that
topology reads each byte once and from one file. What ranks hold alike (buffers, ``step``, objects) is in
rank 0's. Any other topology loads the directory as well; torch's loader cuts chunks as it needs them.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ckpt_tool.canonical import MASTER, WEIGHT, Checkpoint, DType, Role, Tensor, Topology
from ckpt_tool.containers.dcp_metadata import Path
from ckpt_tool.containers.torch_zip import torch_file
from ckpt_tool.errors import UsageError
from ckpt_tool.formats.dcp.contents import Held
from ckpt_tool.formats.dcp.grammar.experts import is_stacked
from ckpt_tool.formats.dcp.grammar.grid import GridChunk, dense_grid, expert_grid
from ckpt_tool.formats.dcp.grammar.keys import Scheme
from ckpt_tool.formats.dcp.reading.beside import (
    ACCELERATE,
    SCHEDULERS,
    VEOMNI,
    WITHOUT,
    carried_config,
    carry,
)
from ckpt_tool.formats.dcp.reading.reader import ONLY_HERE, Hint
from ckpt_tool.formats.dcp.writing.files import (
    Item,
    Placement,
    dcp_directory,
    object_or_archive,
    sharded_model,
)
from ckpt_tool.formats.dcp.writing.like import like_layout
from ckpt_tool.formats.dcp.writing.loading import loading
from ckpt_tool.formats.dcp.writing.names import TITAN, Styled, dialect_of, styled
from ckpt_tool.formats.dcp.writing.options import dropped_options, merged_groups, own_options
from ckpt_tool.formats.dcp.writing.target_options import DcpOptions
from ckpt_tool.formats.hf.writing import config_in, most_used
from ckpt_tool.formats.options import refuse_unknown
from ckpt_tool.layout import Description, Layout, LeftOut, TargetFile, left_out, text_file

SCHEMES: Mapping[str, Scheme] = {
    "torchtitan": Scheme("torchtitan", (), ("optimizer",), flat=True),
    ACCELERATE: Scheme(
        ACCELERATE,
        ("model",),
        ("optimizer",),
        model_directory="pytorch_model_fsdp_0",
        optimizer_directory="optimizer_0",
    ),
    "plain": Scheme("plain", ("model",), ("optimizer",)),
    VEOMNI: Scheme(VEOMNI, ("model",), ("optimizer",)),
    "transformers": Scheme("transformers", (), ("optimizer",), flat=True, shards=True),
}


def make_layout(checkpoint: Checkpoint, options: DcpOptions) -> Layout:
    """The files of the target; raises UsageError where the options do not make sense together."""
    _check_options(checkpoint, options)
    if options.like is not None:
        return like_layout(checkpoint, options)
    world, ep = _topology(checkpoint, options)
    scheme = _scheme(checkpoint, options, ep)
    found = styled(checkpoint, _dialect(checkpoint, scheme, options), options.config)
    if options.weights_only:
        _drop_optimizer(found, checkpoint)
    builder = _Builder(checkpoint, options, scheme, found, world, ep)
    return builder.layout()


def _check_options(checkpoint: Checkpoint, options: DcpOptions) -> None:
    if options.dtype is not None and not options.weights_only and _has_optimizer(checkpoint):
        raise UsageError(
            "FSDP2 trains from the fp32 parameters and casts them itself; with optimizer state --dtype "
            "applies to DCP only together with --weights-only."
        )
    if options.like is not None:
        if not isinstance(options.like.layout_hint, Hint):
            raise UsageError(
                f"--like {options.like.root} is a {options.like.format} checkpoint; for --to dcp it must "
                "be a DCP checkpoint that the target run saved itself."
            )
        if options.world or options.ep or options.style:
            raise UsageError("--like says it all; leave out --world, --ep and --style.")
    if options.style is not None:
        refuse_unknown("--style", options.style, SCHEMES)


def _scheme(checkpoint: Checkpoint, options: DcpOptions, ep: int) -> Scheme:
    """The style asked for; else the source's own, else plain."""
    hint = checkpoint.layout_hint
    own = hint.scheme if isinstance(hint, Hint) else SCHEMES["plain"]
    scheme = own if options.style is None else SCHEMES[options.style]
    # Under EP, VeOmni has an optimizer for experts and one for all else, and saves both flattened into one
    # (0.1.12, optim/optimizer.py, MultiOptimizer). Groups in the other form are passed over in silence.
    return replace(scheme, flat=ep > 1) if scheme.style == VEOMNI else scheme


def _dialect(checkpoint: Checkpoint, scheme: Scheme, options: DcpOptions) -> str:
    """Whose names the target has. A DCP source keeps its own where the framework stays the same, and in
    a plain save of a torchtitan model."""
    hint = checkpoint.layout_hint
    if isinstance(hint, Hint) and hint.scheme.style == scheme.style:
        return checkpoint.dialect
    if scheme.style == "plain" and checkpoint.dialect == TITAN:
        return TITAN
    if checkpoint.dialect == "hub" and not options.weights_only and _has_optimizer(checkpoint):
        raise UsageError(
            f"The source has a tensor for each expert, and optimizer state of each, which --style "
            f"{scheme.style} would name anew. Leave out --style, or add --weights-only."
        )
    return dialect_of(scheme.style)


def _has_optimizer(checkpoint: Checkpoint) -> bool:
    return any(tensor.state not in (WEIGHT, MASTER) for tensor in checkpoint.tensors)


def _drop_optimizer(found: Styled, checkpoint: Checkpoint) -> None:
    found.tensors = {key: tensor for key, tensor in found.tensors.items() if key[1] == WEIGHT}
    states = (tensor for tensor in checkpoint.tensors if tensor.state not in (WEIGHT, MASTER))
    found.left_out += left_out(states, "--weights-only")
    found.scalars.clear()
    found.groups.clear()


def _topology(checkpoint: Checkpoint, options: DcpOptions) -> tuple[int, int]:
    world = options.world or checkpoint.topology.world_size or 1
    ep = options.ep
    if ep is None:
        known = checkpoint.topology.ep_size or 1
        ep = known if world % known == 0 else 1
    if world < 1 or ep < 1 or world % ep:
        given = f"--world {world}" if options.world else f"The source's world, {world} without --world,"
        raise UsageError(f"{given} is not a multiple of --ep {ep}. Pass a --world that is.")
    return world, ep


class _Builder:
    """Items with their chunks, and from them the files."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: DcpOptions,
        scheme: Scheme,
        found: Styled,
        world: int,
        ep: int,
    ) -> None:
        self._checkpoint, self._options, self._scheme, self._found = checkpoint, options, scheme, found
        hint = checkpoint.layout_hint
        self._hint = hint if isinstance(hint, Hint) else None
        self._names_kept = _dialect(checkpoint, scheme, options) == checkpoint.dialect
        self._own = self._hint is not None and self._hint.scheme.style == scheme.style
        self._world, self._ep = world, ep
        self._files: list[Description] = []
        self._metadata: list[Description] = []
        self._notes = list(checkpoint.notes)
        if ep > 1 and not any(is_stacked(name, tensor.shape) for name, tensor in found.model()):
            raise UsageError(f"--ep {ep}: this checkpoint has no stacks of experts to distribute.")

    def layout(self) -> Layout:
        self._files += self._beside()
        if self._names_kept and not self._scheme.shards:
            self._files += carried_config(self._checkpoint)
        self._notes += self._found.notes
        if self._checkpoint.training.scheduler is not None and not isinstance(
            self._checkpoint.layout_hint, Hint
        ):
            self._notes.append(
                "The scheduler's state is left out: it belongs to another engine's scheduler. The groups "
                "carry the learning rate of the last step; start yours at this step."
            )
        client = self._checkpoint.training.client_state
        if client and self._hint is None and not self._options.weights_only:
            self._notes.append(
                f"Client state is left out: {', '.join(map(str, client))}. No engine that reads DCP looks "
                "for another engine's."
            )
        scheme = self._scheme
        model, others = self._model_items(), self._other_items()
        for directory, item in self._items_beside():
            apart = directory == scheme.model_directory and not scheme.shards
            (model if apart else others).append(item)
        if self._hint is not None and self._own:
            model = [item.as_saved(self._hint.saved) for item in model]
            others = [item.as_saved(self._hint.saved) for item in others]
        if scheme.shards:
            self._files += sharded_model(model, map(self._shard, range(self._world)))
            if others:
                self._add_directory(scheme.optimizer_directory, others)
        elif scheme.model_directory == scheme.optimizer_directory or not others:
            self._add_directory(scheme.model_directory, [*model, *others])
        else:
            self._add_directory(scheme.model_directory, model)
            self._add_directory(scheme.optimizer_directory, others)
        # A directory without metadata is an unfinished one to every loader: it is written last.
        files = (*self._files, *self._metadata)
        topology = Topology(self._world, self._ep, self._world // self._ep)
        line = loading(scheme, optimizer=any(state != WEIGHT for _, state in self._found.tensors))
        return Layout(files, self._found.left_out, tuple(self._notes), topology, line)

    def _add_directory(self, directory: str, items: Sequence[Item]) -> None:
        files, metadata = dcp_directory(
            directory, items, [rank_file(directory, rank) for rank in range(self._world)]
        )
        self._files += files
        self._metadata.append(metadata)

    def _shard(self, rank: int) -> str:
        directory = self._scheme.model_directory
        name = f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
        return f"{directory}/{name}" if directory else name

    # ---- items

    def _model_items(self) -> list[Item]:
        found, scheme = self._found, self._scheme
        tensors = dict(found.model())
        copies: set[str] = set()
        for alias, name in found.aliases.items():
            if alias not in tensors and name in tensors:
                tensors[alias] = tensors[name]  # FSDP2 saves tied weights under both names
                copies.add(alias)
        items = []
        for name, tensor in tensors.items():
            key, path = (name, (name,)) if scheme.shards else self._kept(scheme.model_key(name))
            item = self._item(key, path, name, tensor, scheme.model_directory, self._dtype(tensor))
            items.append(replace(item, copy=name if name in copies else ""))
        for name, zeros in found.zeros.items():
            place = Placement(rank_file(scheme.model_directory, 0), (0,) * len(zeros.shape), zeros.shape)
            items.append(Item(*scheme.model_key(name), zeros, (place,)))
        if found.zeros:
            self._notes.append(
                f"Written as zeros, which torchtitan begins with: {', '.join(sorted(found.zeros))}."
            )
        return items

    def _dtype(self, tensor: Tensor) -> DType | None:
        wanted = self._options.dtype
        return wanted if wanted is not None and tensor.dtype.is_float else None

    def _other_items(self) -> list[Item]:
        scheme, found = self._scheme, self._found
        directory = scheme.optimizer_directory
        items = []
        for (name, state), tensor in found.tensors.items():
            if state != WEIGHT:
                key, path = self._kept(scheme.state_key(name, state))
                items.append(self._item(key, path, name, tensor, directory, None))
        first = rank_file(directory, 0)
        for (name, state), scalar in found.scalars.items():
            key, path = self._kept(scheme.state_key(name, state))
            value = scalar if scalar.dtype is not None else scalar.value
            items.append(Item(key, path, value, (Placement(first, (), ()),)))
        for key, path, value in self._group_entries():
            items.append(Item(*self._kept((key, path)), value, (Placement(first, (), ()),)))
        return items

    def _kept(self, entry: tuple[str, Path]) -> tuple[str, Path]:
        """A key with the path that the source has for it: a dot in it may be part of a name."""
        key, path = entry
        return key, (self._hint.paths.get(key, path) if self._hint else path)

    def _item(
        self,
        key: str,
        path: tuple[str | int, ...],
        name: str,
        tensor: Tensor,
        directory: str,
        dtype: DType | None,
    ) -> Item:
        def place(chunk: GridChunk) -> Placement:
            shards = self._scheme.shards and directory == self._scheme.model_directory and key == name
            file = self._shard(chunk.rank) if shards else rank_file(directory, chunk.rank)
            return Placement(file, chunk.offsets, chunk.sizes)

        places = tuple(place(chunk) for chunk in self._grid(name, tensor))
        return Item(key, path, tensor, places, dtype)

    def _grid(self, name: str, tensor: Tensor) -> list[GridChunk]:
        shape = tensor.shape
        role = self._found.roles.get(self._found.aliases.get(name, name), Role.PARAMETER)
        if role is Role.BUFFER or not shape:
            return [GridChunk(0, (0,) * len(shape), shape)]
        titan = self._scheme.style == TITAN
        if not is_stacked(name, shape) or (self._ep == 1 and not titan):
            return dense_grid(shape, self._world)
        # VeOmni 0.1.12, distributed/torch_parallelize.py, shard_dim_for_para
        rows = self._world > shape[0] if titan else self._scheme.style == VEOMNI
        grid = expert_grid(shape, self._world, self._ep, rows=rows)
        if grid is None:
            efsdp = self._world // self._ep
            raise UsageError(
                f"{name} of shape {list(shape)} cannot be sharded over world {self._world}, EP {self._ep}: "
                + (
                    f"{shape[0]} experts do not divide by {self._ep}."
                    if shape[0] % self._ep
                    else f"FSDP2 cuts dimension 1 evenly only; {shape[1]} does not divide by {efsdp}."
                )
            )
        return grid

    # ---- parameter groups and objects

    def _group_entries(self) -> Iterable[tuple[str, tuple[str | int, ...], Any]]:
        scheme = self._scheme
        for number, (options, names) in enumerate(self._groups()):
            if scheme.flat:
                for name in names:
                    for option, value in options.items():
                        yield self._option(name, option, value, number, name)
                continue
            for option, value in options.items():
                yield self._option(number, option, value, number, names[0] if names else "")
            listed = self._hint.sorted.listed if self._hint is not None and self._own else {}
            yield (*scheme.group_key(number, "params"), [listed.get(name, name) for name in names])

    def _groups(self) -> list[tuple[dict[str, Any], list[str]]]:
        """Those of a DCP source as they are; DeepSpeed's as torch's optimizers have them."""
        found = self._found
        if self._hint is not None:
            asked = not self._own
            return [(own_options(options, scheduled=asked), names) for options, names in found.groups]
        if dropped := dropped_options(found.groups):
            self._notes.append(
                f"Options of parameter groups that are left out, as no plain numbers or text: {dropped}."
            )
        return merged_groups(found.groups, [name for name, _ in found.model()])

    def _option(
        self, group: int | str, option: str, value: Any, number: int, name: str
    ) -> tuple[str, tuple[str | int, ...], Any]:
        """An option in the form (a number, or a tensor of one) that it has in a DCP source."""
        hint = self._hint
        if hint is not None:
            source = hint.scheme.group_key(name if hint.scheme.flat else number, option)[0]
            held = hint.entries.get(source)
            if held is not None and held.scalar is not None:
                value = held.scalar
        return (*self._scheme.group_key(group, option), value)

    def _items_beside(self) -> Iterator[tuple[str, Item]]:
        """What is neither parameters nor optimizer, with the directory it belongs to."""
        scheme = self._scheme
        for key, value in self._objects().items():
            known = self._hint.archives.get(key) if self._hint and self._own else None
            directory = scheme.optimizer_directory if known is None else posixpath.dirname(known.file)
            yield directory, self._whole(key, tuple(key.split(".", 1)), value, directory)
        if self._hint is None:
            return
        kept, others = self._hint.sorted, self._hint.sorted.other_tensors
        if self._own and not scheme.shards:
            directory = scheme.model_directory
            for name, value in kept.model_objects.items():
                own = object_or_archive(value, self._hint.archives[self._hint.scheme.model_key(name)[0]])
                yield directory, self._whole(*scheme.model_key(name), own, directory)
        else:
            self._leave_out(kept.model_objects, "an object of a module, of another framework")
        if self._options.weights_only or not self._own:
            why = "optimizer state that cannot be told" if kept.unresolved else "neither the model's nor"
            self._leave_out(others, why if kept.unresolved else f"{why} its optimizer's")
        else:
            for key, held in others.items():
                files = [part.file for part in held.parts]
                directory = posixpath.dirname(files[0]) if files else scheme.optimizer_directory
                path = self._kept((key, (key,)))[1]
                yield directory, self._item(key, path, key, held.tensor, directory, None)
        if self._own and not self._found.left_out:
            self._notes = [note for note in self._notes if not note.startswith(ONLY_HERE)]

    def _leave_out(self, entries: Mapping[str, Any], why: str) -> None:
        """Entries by their keys: tensors as they are held, or objects."""
        self._found.left_out += tuple(
            LeftOut(key, held.tensor if isinstance(held, Held) else None, why)
            for key, held in entries.items()
        )

    def _whole(self, key: str, path: Path, value: Any, directory: str) -> Item:
        return Item(*self._kept((key, path)), value, (Placement(rank_file(directory, 0), (), ()),))

    def _objects(self) -> dict[str, Any]:
        """A DCP source's own objects; for torchtitan the counters it insists on."""
        hint, training = self._hint, self._checkpoint.training
        if self._options.weights_only:
            return {}
        objects: dict[str, Any] = {}
        if hint is not None:
            objects = {
                key: object_or_archive(value, hint.archives[key])
                for key, value in hint.sorted.others.items()
                if not key.startswith("dataloader") or self._world == self._checkpoint.topology.world_size
            }
            if len(objects) < len(hint.sorted.others):
                self._notes.append(
                    "The dataloader's state is left out: it belongs to another number of ranks. For "
                    "torchtitan, load with --checkpoint.exclude_from_loading dataloader."
                )
        if self._scheme.style == TITAN and training.step is not None:
            tensors = hint.sorted.other_tensors if hint is not None and self._own else {}
            self._add_counters(objects, training.step, tensors)
        return objects

    def _add_counters(self, objects: dict[str, Any], step: int, tensors: Container[str]) -> None:
        """What torchtitan wants, where ``tensors`` are not it already."""
        if "train_state.step" not in tensors:
            objects.setdefault("train_state.step", step)
        if "train_state.ntokens_seen" not in objects and "train_state.ntokens_seen" not in tensors:
            objects["train_state.ntokens_seen"] = 0
            self._notes.append("train_state.ntokens_seen is not known and starts from 0.")
        if not any(key.startswith("lr_scheduler") for key in objects) and (
            "lr_scheduler.last_epoch" not in tensors
        ):
            objects["lr_scheduler.last_epoch"] = step

    def _beside(self) -> list[TargetFile]:
        """What the framework wants beside the tensors."""
        if self._scheme.shards:
            return self._config()
        if self._options.weights_only:
            return []
        carried = carry(self._checkpoint, self._scheme.style, self._world)
        self._notes = carried.notes
        scheduler = self._checkpoint.training.scheduler
        torchs = isinstance(scheduler, dict) and "last_epoch" in scheduler
        if carried.files or self._scheme.style not in WITHOUT:
            return carried.files
        if torchs and self._scheme.style == ACCELERATE:
            return [torch_file(name, scheduler) for name in SCHEDULERS]
        self._notes.append(WITHOUT[self._scheme.style])
        return []

    def _config(self) -> list[TargetFile]:
        """transformers 5.23's ``from_pretrained(directory)`` reads it beside the shards."""
        config = self._options.config or self._checkpoint.model_config
        if config is None:
            self._notes.append("There is no config.json: transformers loads the directory only with one.")
            return []
        sizes = [(self._dtype(t) or t.dtype, t.nbytes) for _, t in self._found.model() if t.dtype.is_float]
        written, notes = config_in(config, most_used(sizes))
        self._notes += notes
        return [text_file("config.json", json.dumps(written, indent=2) + "\n")]


def rank_file(directory: str, rank: int) -> str:
    return f"{directory}/__{rank}_0.distcp" if directory else f"__{rank}_0.distcp"
