"""A checkpoint opened for reading from Python: any tensor under any of its names, any slice of it.

    with ckpt_tool.open("run/checkpoints", config="path/to/model") as checkpoint:
        checkpoint["model.layers.3.mlp.experts.7.gate_proj.weight"].torch()
        checkpoint["model.norm.weight", "exp_avg"][:16]          # reads 64 bytes
        model.load_state_dict(checkpoint.state_dict())           # one tensor in memory at a time

Nothing is read before a value is asked for, and of a slice only what lies in it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any

from ckpt_tool.canonical import (
    Checkpoint,
    ExpertName,
    MoELayer,
    Tensor,
    Topology,
)
from ckpt_tool.errors import CkptToolError, UsageError
from ckpt_tool.families import FUSED_FORM, HUB_FORM, Family, family_of
from ckpt_tool.families.naming import entries, to_hub
from ckpt_tool.formats.deepspeed.facts.names import AUTOEP_OF, expert_parameter
from ckpt_tool.geometry import pieces
from ckpt_tool.storage import Reader
from ckpt_tool.views import Place, View

# Values: a master where there is one, else the stored weight. ``checkpoint[name]`` without a state.
VALUES = "values"


class Opened:
    """A checkpoint that is open for reading. Close it, or use it in a ``with`` statement.

    ``catalogue`` is the whole of its metadata (``ckpt_tool.canonical.Checkpoint``), whose attributes can be
    asked for here as well: ``checkpoint.notes``, ``checkpoint.training``, ``checkpoint.moe_layers``.
    """

    def __init__(
        self, reader: Reader, catalogue: Checkpoint, config: Mapping[str, Any] | None = None
    ) -> None:
        self.catalogue = catalogue
        self._reader, self._config = reader, config
        self._own: dict[str, dict[str, Place]] = {}
        self._published: dict[tuple[str, str], dict[str, Place]] = {}

    def __enter__(self) -> Opened:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files. Values that were read stay."""
        self._reader.close()

    def __repr__(self) -> str:
        return repr(self.catalogue)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "catalogue":
            raise AttributeError(name)
        return getattr(self.catalogue, name)

    @property
    def format(self) -> str:
        """The format, as ``inspect`` calls it."""
        return self.catalogue.format

    @property
    def topology(self) -> Topology:
        """The ranks it was saved by."""
        return self.catalogue.topology

    @property
    def states(self) -> tuple[str, ...]:
        """What there is of parameters: ``weight``, ``master``, ``exp_avg``, ..."""
        return tuple(dict.fromkeys(tensor.state for tensor in self.catalogue.tensors))

    def experts(self, layer: int) -> tuple[tuple[int, ...], ...]:
        """The experts of an MoE layer on each EP rank, by their numbers.

        Raises:
            KeyError: this layer has no routed experts.
        """
        found: dict[int, MoELayer] = {
            int(one.layer_path.rsplit(".", 1)[-1]): one for one in self.catalogue.moe_layers
        }
        if layer not in found:
            raise KeyError(f"layer {layer} has no routed experts; MoE layers are {sorted(found)}")
        return found[layer].holders or (tuple(range(found[layer].num_experts)),)

    def keys(self, state: str = VALUES) -> tuple[str, ...]:
        """The names of all tensors: as they are published where a config.json tells the family, else the
        checkpoint's own, with a stack of experts as one tensor."""
        if self._family() is not None:
            return tuple(self._names_as(HUB_FORM, state))
        return tuple(str(tensor.name) for tensor in self._tensors(state))

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, key: object) -> bool:
        if isinstance(key, tuple) and len(key) != 2:
            return False
        try:
            self[key]  # type: ignore[index]
        except KeyError:
            return False
        return True

    def __getitem__(self, key: str | ExpertName | tuple[str | ExpertName, str]) -> View:
        """A tensor by its name, or by its name and state: ``checkpoint[name, "exp_avg"]``.

        Names are those of this checkpoint, the engine's, those of one expert in a stack
        (``model.layers.3.experts.7.gate.weight``), and, where a config.json tells the family, the published
        ones and those of transformers' modules.

        Raises:
            KeyError: there is none of this name and state; the message has names like it.
        """
        if isinstance(key, tuple) and len(key) != 2:
            raise KeyError(f"{key!r} is no name, nor a name and a state")
        name, state = key if isinstance(key, tuple) else (key, VALUES)
        name = str(name)
        place = self._names(state).get(name)
        for form in (HUB_FORM, FUSED_FORM):
            if place is None and self._family() is not None:
                place = self._names_as(form, state).get(name)
        if place is None:
            raise KeyError(self._unknown(name, state))
        return View(self._reader, place, name)

    def items(self, state: str = VALUES) -> Iterator[tuple[str, View]]:
        """Names, and tensors to be read, in the order in which they lie in the files."""
        places = self._names_as(HUB_FORM, state) if self._family() is not None else self._plain(state)
        for name in sorted(places, key=lambda name: _first(places[name].tensor)):
            yield name, View(self._reader, places[name], name)

    def state_dict(self, names: str = FUSED_FORM) -> Mapping[str, View]:
        """The model's values for ``load_state_dict``, which reads each as it copies it.

        Args:
            names: ``fused``, as transformers' modules are called; ``hub``, as files are published; or
                ``own``, as they are in this checkpoint.

        Raises:
            UsageError: no config.json tells the family, and names are not ``own``.
        """
        if names == "own":
            places = self._plain(VALUES)
        elif names not in (FUSED_FORM, HUB_FORM):
            raise UsageError(f"names is {names!r}; it may be fused, hub or own.")
        elif self._family() is None:
            raise UsageError(
                "Names of a model come from its config.json: open the checkpoint with config=, or ask for "
                "names='own'."
            )
        else:
            places = self._names_as(names, VALUES)
        views = {name: View(self._reader, place, name) for name, place in places.items()}
        for alias, name in self.catalogue.aliases.items():
            if name in views:
                views.setdefault(alias, views[name])
        return views

    # ---- names

    def _tensors(self, state: str) -> list[Tensor]:
        if state == VALUES:
            return self.catalogue.values()
        return [tensor for tensor in self.catalogue.tensors if tensor.state == state]

    def _plain(self, state: str) -> dict[str, Place]:
        return {str(one.name): Place.whole(one) for one in self._tensors(state)}

    def _names(self, state: str) -> dict[str, Place]:
        """The checkpoint's own names, the engine's, and those of single experts."""
        if state not in self._own:
            found = self._plain(state)
            layers = {layer.layer_path: layer for layer in self.catalogue.moe_layers}
            for tensor in self._tensors(state):
                if not isinstance(tensor.name, ExpertName):
                    continue
                if tensor.name.layer_path in layers and tensor.name.projection in AUTOEP_OF:
                    found.setdefault(expert_parameter(tensor.name, layers), Place.whole(tensor))
                for expert in range(tensor.shape[0]):
                    found.setdefault(tensor.name.expert(expert), Place.expert(tensor, expert))
            for alias, name in self.catalogue.aliases.items():
                if name in found:
                    found.setdefault(alias, found[name])
            for name, saved in self.catalogue.saved_names.items():
                if name in found:
                    found.setdefault(saved, found[name])
            self._own[state] = found
        return self._own[state]

    def _family(self) -> Family | None:
        if self._config is None:
            return None
        try:
            return family_of(self._config)
        except CkptToolError:
            return None

    def _names_as(self, form: str, state: str) -> dict[str, Place]:
        """The names of published files, or of transformers' modules; none where there are none."""
        if (form, state) not in self._published:
            family = self._family()
            self._published[form, state] = {} if family is None else self._spelled(family, form, state)
        return self._published[form, state]

    def _spelled(self, family: Family, form: str, state: str) -> dict[str, Place]:
        catalogue = replace(self.catalogue, tensors=tuple(self._tensors(state)), scalars={})
        try:
            published = to_hub(catalogue, family, self._config)
            found = entries(published.tensors, family, form, self._config)
        except CkptToolError:
            return {}
        return {entry.name: Place.entry(entry) for entry in found}

    def _unknown(self, name: str, state: str) -> str:
        if state not in (VALUES, *self.states):
            return f"there is no state {state!r} here; there are {', '.join(self.states)}"
        known = {**self._names(state), **self._names_as(HUB_FORM, state)}
        near = difflib.get_close_matches(name, known, 3)
        like = f"; like it are {', '.join(near)}" if near else ""
        config = "" if self._family() else "; published names need the model's config.json (config=)"
        return f"there is no tensor {name!r} of state {state} here{like}{config}"


def _first(tensor: Tensor) -> tuple[str, int]:
    """Where a tensor begins in the files."""
    found = pieces(tensor, 0, 1) if tensor.numel else []
    return (found[0].file, found[0].offset) if found else ("", 0)
