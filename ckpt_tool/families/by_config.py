"""Which tensors a config asks for in a layer, and how large they are, by the family's rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ckpt_tool.canonical import Tensor
from ckpt_tool.errors import MismatchError
from ckpt_tool.families.conditions import Fields, UnknownFieldError, chosen, questions, size
from ckpt_tool.families.expected import Expected, Names, release

_SHOWN = 30


@dataclass(slots=True)
class Undecided:
    """What could not be compared: names of tensors by the field that the config lacks, and those that no
    rule is known for."""

    by_field: dict[str, set[str]] = field(default_factory=dict)
    without_rule: set[str] = field(default_factory=set)

    def note(self, architecture: str) -> str | None:
        """One sentence for all; None where everything was compared."""
        reasons = [
            f"config.json does not say {name}, which {_some(tensors)} would be compared with"
            for name, tensors in sorted(self.by_field.items())
        ]
        if self.without_rule:
            reasons.append(f"no rule is known for {_some(self.without_rule)}")
        if not reasons:
            return None
        return f"Not compared with what {architecture} has by its config: {'; '.join(reasons)}."


def _some(names: set[str]) -> str:
    shown = sorted(names)[:_SHOWN]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


class Given:
    """A config, as the rules of its family ask it."""

    def __init__(self, expected: Expected, text: Mapping[str, Any]) -> None:
        self.architecture = expected.architecture
        self.fields = Fields(text, expected.defaults, expected.aliases)
        self.undecided = Undecided()

    def why(self, rule: Any, layer: int | None) -> str:
        """The fields that decide, with their values."""
        return ", ".join(dict.fromkeys(self._reasons(rule, layer)))

    def _reasons(self, rule: Any, layer: int | None) -> Iterator[str]:
        for _, name, *_more in questions(rule, self.fields, layer):
            if not isinstance(name, str):
                continue
            value = self.fields.value(name, layer)
            told = "" if self.fields.says(name) else ", its default"
            words = str(value).lower() if isinstance(value, bool) else "null" if value is None else value
            yield f"{name} {words}{told}"


def check_presence(
    path: str, layer: int | None, held: Mapping[str, Tensor], wanted: Names, given: Given
) -> None:
    """Tensors that some variants of the model have are where the config asks for them, and only there.

    Args:
        path: of the layer, with a dot behind; empty beside the layers.

    Raises:
        MismatchError: one is missing, or too many; the message names the fields that say so.
    """
    for name, rule in wanted.when.items():
        try:
            asked_for = None if rule is None else chosen(rule, given.fields, layer)
        except UnknownFieldError as error:
            given.undecided.by_field.setdefault(error.field, set()).add(name)
            continue
        if asked_for is None:
            given.undecided.without_rule.add(name)
        elif asked_for and name not in held:
            raise MismatchError(
                f"The checkpoint has no {path}{name}, which {given.architecture} has by this config.json "
                f"({given.why(rule, layer)}). The checkpoint is not complete: save or copy it again. Or is "
                "this the config.json of another model?"
            )
        elif not asked_for and name in held:
            raise MismatchError(
                f"The checkpoint has {path}{name}, and by this config.json ({given.why(rule, layer)}) "
                f"{given.architecture} has no such tensor there (transformers {release()}): it would be "
                "loaded nowhere. Pass the config.json of the model that was trained, or leave the tensor "
                "out of the state dict that is saved."
            )


def check_sizes(
    path: str, layer: int | None, held: Mapping[str, Tensor], wanted: Names, given: Given
) -> None:
    """Every axis is as long as the config says.

    Raises:
        MismatchError: one is not; the message has the formula and both lengths.
    """
    for name, rules in wanted.size.items():
        tensor = held.get(name)
        if tensor is None or not rules:
            continue
        if len(tensor.shape) != len(rules):
            raise MismatchError(
                f"{path}{name} has shape {list(tensor.shape)}, and {given.architecture} has {len(rules)} "
                "axes there. Save or copy the checkpoint again, or pass the config.json of the model that "
                "was trained."
            )
        for axis, (rule, found) in enumerate(zip(rules, tensor.shape, strict=True)):
            if axis == 0 and name.startswith("experts."):  # some layers have more than the config counts
                continue
            try:
                formula = None if rule is None else chosen(rule, given.fields, layer)
                length = None if formula is None else size(formula, given.fields, layer)
            except UnknownFieldError as error:
                given.undecided.by_field.setdefault(error.field, set()).add(name)
                continue
            if length is None:
                given.undecided.without_rule.add(name)
            elif length != found:
                raise MismatchError(
                    f"{path}{name} has shape {list(tensor.shape)}, and by config.json axis {axis} of it is "
                    f"{length} long ({_read(formula)}). Pass the config.json of the model that was "
                    "trained, or save or copy the checkpoint again."
                )


def _read(formula: str | None) -> str:
    return " + ".join(" x ".join(product.split()) for product in str(formula).split(" + "))
