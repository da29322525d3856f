"""Fixtures of the polling tests: a stand-in whose jobs are ready at once, and a poller on a fresh database."""

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine

from tests.polling.polls import KEY, Polls, all_polls
from worker.sandbox import Sandbox, SandboxOptions


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """End the threads and connections of all pollers that a test made."""
    yield
    for polls in all_polls:
        polls.poller.close()
        polls.client.session.close()
    all_polls.clear()


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    """A stand-in whose jobs are ready at once."""
    with Sandbox(SandboxOptions(key=KEY, min_seconds=0.0, max_seconds=0.0, size=32)) as server:
        yield server


@pytest.fixture
def polls(engine: Engine, redis_url: str, sandbox: Sandbox) -> Polls:
    """A poller on a fresh database."""
    return Polls(engine, redis_url, sandbox)
