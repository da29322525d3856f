"""Fixtures of the fault tests: a sandbox API whose jobs take a few seconds, a Redis server and a database."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine
from sqlalchemy.engine import make_url

from tests import servers
from tests.faults.servers import KEY, RedisServer, running_redis
from worker.sandbox import Sandbox, SandboxOptions
from worker.store.engine import make_engine
from worker.store.migrate import migrate


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    """Start a sandbox API whose jobs take a few seconds, and set the environment variables that lead to it."""
    with Sandbox(SandboxOptions(key=KEY, min_seconds=0.5, max_seconds=8.0, size=32)) as server:
        monkeypatch.setenv("SD_API_URL", server.url)
        monkeypatch.setenv("SD_API_KEY", KEY)
        monkeypatch.setenv("SD_API_RPS", "50")
        monkeypatch.setenv("OUTPUT_ALLOWED_NETWORKS", "127.0.0.0/8")
        monkeypatch.setenv("RECOVERY_SECONDS", "5")
        monkeypatch.setenv("FLOWER_PORT", "0")
        yield server


@pytest.fixture
def broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisServer]:
    """Start a Redis server that the test can stop, freeze or fill. REDIS_URL names it."""
    with running_redis(tmp_path / "redis") as server:
        monkeypatch.setenv("REDIS_URL", server.url)
        yield server


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Create a migrated PostgreSQL database for the test. DATABASE_URL names it."""
    with servers.postgres(tmp_path / "postgres") as url:
        monkeypatch.setenv("DATABASE_URL", url)
        engine = make_engine(make_url(url))
        migrate(engine)
        yield engine
        engine.dispose()
