"""The examples in the core's docstrings are true."""

import doctest
import importlib
import pkgutil

import pytest

from worker import core

MODULES = sorted(module.name for module in pkgutil.iter_modules(core.__path__, "worker.core."))


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_core_module_are_true(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))

    assert result.failed == 0


def test_there_are_examples_to_run() -> None:
    found = [test for name in MODULES for test in doctest.DocTestFinder().find(importlib.import_module(name))]

    assert sum(len(test.examples) for test in found) >= 10
