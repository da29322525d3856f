"""What the faults share: a stand-in whose jobs take a few seconds, and a Redis that can be hurt."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine
from sqlalchemy.engine import make_url

from tests import servers
from tests.faults.servers import KEY, HurtRedis, hurt_redis
from worker.sandbox import Sandbox, SandboxOptions
from worker.store.engine import make_engine
from worker.store.migrate import migrate


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    """A stand-in whose jobs take a few seconds, and the settings that lead to it."""
    with Sandbox(SandboxOptions(key=KEY, min_seconds=0.5, max_seconds=8.0, size=32)) as server:
        monkeypatch.setenv("SD_API_URL", server.url)
        monkeypatch.setenv("SD_API_KEY", KEY)
        monkeypatch.setenv("SD_API_RPS", "50")
        monkeypatch.setenv("OUTPUT_ALLOWED_NETWORKS", "127.0.0.0/8")
        monkeypatch.setenv("RECOVERY_SECONDS", "5")
        monkeypatch.setenv("FLOWER_PORT", "0")
        yield server


@pytest.fixture
def broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HurtRedis]:
    """A Redis that can be hurt, which REDIS_URL names."""
    with hurt_redis(tmp_path / "redis") as made:
        monkeypatch.setenv("REDIS_URL", made.url)
        yield made


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """A PostgreSQL database of the test's own, which DATABASE_URL names."""
    with servers.postgres(tmp_path / "postgres") as url:
        monkeypatch.setenv("DATABASE_URL", url)
        engine = make_engine(make_url(url))
        migrate(engine)
        yield engine
        engine.dispose()
