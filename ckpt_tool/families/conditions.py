"""When a layer has a tensor and how large it is, by the fields of a config: rules as data.

``tensors.json`` has them, learnt from transformers' models (``tests/engine/table_rules.py``). A rule is a
value, or ``[question, rule if yes, rule if no]``. A question is a list:

    ["set", field]            the field's value is neither absent, null, zero, empty nor false
    ["item", field, value]    the field's value, or the layer's in a list of one per layer, is ``value``
    ["in", field, shift]      the layer's number plus ``shift`` is in the list
    ["every", field, shift]   the layer's number plus ``shift`` is a multiple of the field, or of a number
    ["at", period, offset]    the layer's number modulo one field is the other
    ["below", field]          the layer's number is below the field, or a number
    ["last", field, layers]   the layer is one of so many last ones, of as many as the field ``layers`` says

Layers count from 0. A size is a sum of products: ``2 linear_num_key_heads linear_key_head_dim + 4``; a
factor ``hidden_size//num_attention_heads`` is the quotient, rounded down.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

_ABSENT = object()


class UnknownFieldError(Exception):
    """A rule asks for a field that the config lacks and whose default is not known; never leaves
    ``completeness``."""

    def __init__(self, field: str) -> None:
        super().__init__(field)
        self.field = field


class Fields:
    """The fields of a text config; a dot goes into a config in it.

    Args:
        defaults: what transformers takes for fields that a config lacks: rules that give the value, of a
            layer where the field is a list of one per layer.
        aliases: other names of fields, by the name that rules use.
    """

    def __init__(
        self,
        text: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
        aliases: Mapping[str, list[str]] | None = None,
    ) -> None:
        self._text, self._defaults, self._aliases = text, defaults or {}, aliases or {}

    def value(self, field: str, layer: int | None) -> Any:
        """A field's value; of a list of one per layer, the layer's.

        Raises:
            UnknownFieldError: the config does not say, and there is no default.
        """
        found = self.stated(field)
        default = self._defaults.get(field, _ABSENT)
        if found is _ABSENT or (found is None and isinstance(default, list)):
            if default is _ABSENT:
                raise UnknownFieldError(field)
            return chosen(default, self, layer)
        if isinstance(found, list | str) and layer is not None and _one_per_layer(found):
            return found[layer] if layer < len(found) else None
        return found

    def stated(self, field: str) -> Any:
        """What the config itself says, under any of the field's names; ``_ABSENT`` where it does not."""
        for name in (field, *self._aliases.get(field, ())):
            found: Any = self._text
            for part in name.split("."):
                found = found.get(part, _ABSENT) if isinstance(found, Mapping) else _ABSENT
            if found is not _ABSENT:
                return found
        return _ABSENT

    def says(self, field: str) -> bool:
        return self.stated(field) is not _ABSENT


def _one_per_layer(value: list[Any] | str) -> bool:
    """Whether it may be one per layer: a list, or a text of one letter per layer (``ME*E``)."""
    return isinstance(value, list) or not value.islower()


def chosen(rule: Any, fields: Fields, layer: int | None) -> Any:
    """What a rule gives for one layer; ``None`` for the tensors beside the layers.

    Raises:
        UnknownFieldError: it asks for what the config does not say.
    """
    for question in questions(rule, fields, layer):
        rule = rule[1] if answer(question, fields, layer) else rule[2]
    return rule


def questions(rule: Any, fields: Fields, layer: int | None) -> Iterator[list[Any]]:
    """The questions that a rule asks of one layer, in turn; raises UnknownFieldError."""
    while isinstance(rule, list):
        question, yes, no = rule
        yield question
        rule = yes if answer(question, fields, layer) else no


def answer(question: list[Any], fields: Fields, layer: int | None) -> bool:
    """The answer to a question of a rule; raises UnknownFieldError."""
    kind, field, *more = question
    if kind == "in":
        numbers = fields.value(field, None) or ()
        return isinstance(numbers, list | tuple) and layer is not None and layer + more[0] in numbers
    value = field if type(field) is int else fields.value(field, layer)
    if kind == "set":
        return bool(value)
    if kind == "item":
        return bool(value == more[0])
    if type(value) is not int or layer is None:
        return False
    if kind == "below":
        return layer < value
    if kind == "last":
        count = fields.value(more[0], None)
        return type(count) is int and layer >= count - value
    if value < 1:
        return False
    if kind == "every":
        return bool((layer + more[0]) % value == 0)
    remainder: Any = fields.value(more[0], None)
    return type(remainder) is int and layer % value == remainder


def size(formula: str, fields: Fields, layer: int | None) -> int:
    """A formula's value; raises UnknownFieldError where a field is no number."""
    return sum(
        math.prod(factor(word, fields, layer) for word in product.split())
        for product in formula.split(" + ")
    )


def factor(word: str, fields: Fields, layer: int | None) -> int:
    """A number, a field's value (0 for null and false, 1 for true), or the quotient of two fields."""
    if word.lstrip("-").isdecimal():
        return int(word)
    upper, _, lower = word.partition("//")
    if lower:
        below = factor(lower, fields, layer)
        if below < 1:
            raise UnknownFieldError(lower)
        return factor(upper, fields, layer) // below
    value = fields.value(word, layer)
    if isinstance(value, list) and value and all(one == value[0] for one in value):
        value = value[0]
    if value is not None and not isinstance(value, int):
        raise UnknownFieldError(word)
    return int(value or 0)
