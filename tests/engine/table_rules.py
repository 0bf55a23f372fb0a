"""Learns the rules of ``tensors.json`` from models: when a layer has a tensor, and the size of each axis.

Pure: it is given points (a config's fields, a layer's number, what the model has there). A rule is learnt
from two thirds of the points and kept only if it is right at every one of the others, too.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckpt_tool.families.conditions import Fields, UnknownFieldError, answer, chosen, factor, size

DEPTH = 5


@dataclass(frozen=True, slots=True)
class Point:
    """What a model of some config has in a layer (None: beside the layers)."""

    fields: Fields
    layer: int | None
    value: Any


class NoRuleError(Exception):
    """The points are explained by none of the rules that can be told."""


# What was asked before, with the fields themselves, so that no other object takes their identity.
_answers: dict[tuple[int, int | None, tuple[Any, ...]], tuple[Fields, bool]] = {}


def asked(question: list[Any], point: Point) -> bool:
    key = id(point.fields), point.layer, tuple(question)
    if key not in _answers:
        try:
            _answers[key] = point.fields, answer(question, point.fields, point.layer)
        except UnknownFieldError:
            _answers[key] = point.fields, False
    return _answers[key][1]


# ---- presence, and other values that questions tell


def learnt(points: Sequence[Point], questions: Sequence[list[Any]]) -> Any:
    """The rule of a value that is true, false or a text; raises NoRuleError."""
    unique = distinct(points, questions)
    rule = _tree(unique, questions, DEPTH)
    for point in points:
        if chosen(rule, point.fields, point.layer) != point.value:
            raise NoRuleError
    return rule


def distinct(points: Sequence[Point], questions: Sequence[list[Any]]) -> list[tuple[tuple[bool, ...], Any]]:
    """The points as their answers to all questions, each once."""
    found = dict.fromkeys((tuple(asked(q, point) for q in questions), point.value) for point in points)
    return list(found)


def _tree(rows: Sequence[tuple[tuple[bool, ...], Any]], questions: Sequence[list[Any]], depth: int) -> Any:
    values = Counter(value for _, value in rows)
    if len(values) == 1:
        return rows[0][1]
    if depth == 0:
        raise NoRuleError
    best = min(range(len(questions)), key=lambda q: (_entropy(rows, q), q), default=None)
    if best is None:
        raise NoRuleError
    yes = [row for row in rows if row[0][best]]
    no = [row for row in rows if not row[0][best]]
    if not yes or not no:
        raise NoRuleError
    return [questions[best], _tree(yes, questions, depth - 1), _tree(no, questions, depth - 1)]


def _entropy(rows: Sequence[tuple[tuple[bool, ...], Any]], question: int) -> float:
    total = 0.0
    for side in (True, False):
        counts = Counter(value for answers, value in rows if answers[question] is side)
        count = sum(counts.values())
        if count == len(rows):
            return math.inf
        total -= sum(n * math.log(n / count) for n in counts.values())
    return round(total, 9)


# ---- sizes


def fitted(points: Sequence[Point], fields: Sequence[str], questions: Sequence[list[Any]]) -> Any:
    """The rule of a size, whose leaves are formulas of ``fields``; raises NoRuleError."""
    # Most follow no list of one per layer: one layer of each model tells, and all prove it.
    few = list({(id(point.fields), point.value): point for point in points}.values())
    found = _formula(few, fields)
    if found is not None and _holds(found, points):
        return found
    if len(few) < len(points):
        found = _formula(points, fields)
        if found is not None:
            return found
    for question in questions:
        yes = [point for point in points if asked(question, point)]
        no = [point for point in points if not asked(question, point)]
        if len(yes) < 4 or len(no) < 4:
            continue
        first, second = _formula(yes, fields), _formula(no, fields)
        if first is not None and second is not None:
            return [question, first, second]
    raise NoRuleError


# The numbers that models multiply fields by. Any other is a field that could not be varied, in disguise.
_FACTORS = {1.0, 2.0, 3.0}
# How many of the terms, which begin with the simplest, are tried in sums of so many.
_TRIED = {1: 400, 2: 50, 3: 16}


def _formula(points: Sequence[Point], fields: Sequence[str]) -> str | None:
    """The shortest sum of products that gives every point's value, if any of up to three products does."""
    target = np.array([float(point.value) for point in points])
    for quotients in ((), _quotients(fields)):
        terms = _terms(points, fields, quotients)
        for count, tried in _TRIED.items():
            for combination in itertools.combinations(terms[:tried], count):
                formula = _solved(combination, target)
                if formula is not None and _holds(formula, points):
                    return formula
        if len(fields) < 2:
            break
    return None


def _quotients(fields: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{one}//{other}" for one, other in itertools.permutations(fields, 2))


Column = np.ndarray[Any, Any]


def _terms(
    points: Sequence[Point], fields: Sequence[str], quotients: Sequence[str]
) -> list[tuple[str, Column]]:
    """Products of up to three fields, one of which may be a quotient, with their values at the points; a
    word that is no number at some point is left out."""
    columns = {word: column for word in (*fields, *quotients) for column in _column(points, word)}
    terms: list[tuple[str, Column]] = [] if quotients else [("", np.ones(len(points)))]
    single = [word for word in fields if word in columns]
    products = [product for count in (1, 2, 3) for product in itertools.combinations(single, count)]
    products += [(word, word) for word in single]
    if quotients:
        products = [
            (word, *product)
            for product in ((), *products)
            for word in quotients
            if word in columns and len(product) < 3
        ]
    for product in products:
        terms.append((" ".join(product), np.prod([columns[word] for word in product], axis=0)))
    return terms


def _column(points: Sequence[Point], word: str) -> list[Column]:
    try:
        return [np.array([float(factor(word, p.fields, p.layer)) for p in points])]
    except UnknownFieldError:
        return []


def _solved(terms: Sequence[tuple[str, Column]], target: Column) -> str | None:
    names = [name for name, _ in terms]
    if len(terms) == 1:
        column = terms[0][1]
        if not column[0]:
            return None
        weights = np.array([target[0] / column[0]])
    else:
        some = slice(None, None, max(1, len(target) // 40))  # all are proven below
        few = np.stack([column[some] for _, column in terms], axis=1)
        weights, _, rank, _ = np.linalg.lstsq(few, target[some], rcond=None)
        if rank < len(names):
            return None
    whole = np.rint(weights)
    if not set(whole) <= _FACTORS:
        return None
    total = sum(weight * column for weight, (_, column) in zip(whole, terms, strict=True))
    if not np.array_equal(total, target):
        return None
    parts = [
        " ".join(filter(None, ("" if weight == 1 and name else str(int(weight)), name)))
        for weight, name in zip(whole, names, strict=True)
    ]
    return " + ".join(parts)


def _holds(formula: str, points: Iterable[Point]) -> bool:
    return all(size(formula, point.fields, point.layer) == point.value for point in points)


# ---- questions


def questions_of(
    scalars: Iterable[str], lists: Iterable[tuple[str, set[Any]]], numbers: Iterable[str]
) -> list[list[Any]]:
    """All questions about some fields: ``scalars`` are asked whether they are set, ``lists`` which value a
    layer has there, ``numbers`` where a layer stands to them. The simplest come first."""

    def found() -> Iterator[list[Any]]:
        yield ["below", 1]
        for field in scalars:
            yield ["set", field]
        for field, values in lists:
            if values and all(isinstance(value, str) for value in values):
                for value in sorted(values):
                    yield ["item", field, value]
            elif values and all(type(value) is int for value in values):
                yield ["set", field]
                for shift in (0, 1):
                    yield ["in", field, shift]
        for field in numbers:
            yield ["below", field]
            if field.endswith("_layers"):
                yield ["last", field, "num_hidden_layers"]
        for number in range(2, 9) if numbers else ():
            yield ["every", number, 1]
        for field in numbers:
            for shift in (0, 1):
                yield ["every", field, shift]
        for period, offset in itertools.permutations(numbers, 2):
            yield ["at", period, offset]

    return list(found())
