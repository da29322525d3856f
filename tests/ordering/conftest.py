"""Fixtures of the tests of orders: a stand-in whose jobs take long, and the sending of one process."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import Engine

from tests.ordering.sending import KEY, Sending
from worker.sandbox import Sandbox, SandboxOptions


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    """A stand-in whose jobs take ten minutes, with a plan of five slots."""
    options = SandboxOptions(key=KEY, min_seconds=600.0, max_seconds=600.0, size=32, max_outputs=1, slots=5)
    with Sandbox(options) as server:
        yield server


@pytest.fixture
def make_sending(engine: Engine, redis_url: str, sandbox: Sandbox) -> Iterator[Callable[..., Sending]]:
    """Return a function that makes the sending of a process on a fresh database."""
    made: list[Sending] = []

    def make(**options: Any) -> Sending:
        made.append(Sending(engine, redis_url, sandbox, **options))
        return made[-1]

    yield make
    for sending in made:
        sending.submitter.close()


@pytest.fixture
def sending(make_sending: Callable[..., Sending]) -> Sending:
    """The sending of one process."""
    return make_sending()
