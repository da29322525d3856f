"""The examples in the docstrings of the core and of the vendor package are correct."""

import doctest
import importlib
import pkgutil

import pytest

from worker import core, vendor

MODULES = sorted(
    module.name
    for package in (core, vendor)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_are_correct(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))

    assert result.failed == 0


def test_there_are_examples() -> None:
    tests = [test for name in MODULES for test in doctest.DocTestFinder().find(importlib.import_module(name))]

    assert sum(len(test.examples) for test in tests) >= 10
