"""The list of mutants fits the code: ``python -m tests.mutants`` changes what it means to, and runs."""

from __future__ import annotations

import ast

import pytest

from tests.mutants import MUTANTS, ROOT, Mutant, mutated


def test_names_are_of_one_mutant_each() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_a_change_of_one_place_and_has_tests(mutant: Mutant) -> None:
    source = (ROOT / mutant.file).read_text()
    changed = mutated(source, mutant)  # raises where the old text is not there once
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))
    assert mutant.tests
    for test in mutant.tests:
        file, _, name = test.partition("::")
        tests = (ROOT / file).read_text()
        assert not name or f"def {name.partition('[')[0]}(" in tests, f"{file} has no {name}"
