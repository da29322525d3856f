"""Settings of servers: URLs that all libraries read, and the search for the embedded Redis."""

from pathlib import Path

import pytest

from worker.app import make_app
from worker.coordination.rate_limiter import redis_client
from worker.settings import load


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("rediss://r:6380/0", "rediss://r:6380/0?ssl_cert_reqs=required"),  # Celery refuses it without the option
        ("rediss://r:6380/0?db=1", "rediss://r:6380/1?ssl_cert_reqs=required"),
        ("rediss://r:6380?ssl_cert_reqs=none", "rediss://r:6380/0?ssl_cert_reqs=none"),
        ("rediss://r:6380?ssl_cert_reqs=CERT_NONE&db=1", "rediss://r:6380/1?ssl_cert_reqs=none"),  # redis-py refuses it
        ("redis://r:6379/0", "redis://r:6379/0"),
        ("unix:///tmp/r.sock", "redis+socket:///tmp/r.sock"),
    ],
)
def test_a_redis_url_is_accepted_by_celery_and_redis_py(
    url: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", url)
    monkeypatch.setenv("BROKER_URL", url.replace("unix://", "redis+socket://"))
    settings = load()

    assert (settings.redis, settings.broker) == (expected, expected)
    assert make_app(settings).backend.connparams
    assert redis_client(settings.redis, seconds=1.0).connection_pool.make_connection()


@pytest.mark.parametrize(
    ("url", "driver"),
    [
        ("postgres://u@h/d", "postgresql+psycopg"),
        ("postgresql://u@h/d", "postgresql+psycopg"),
        ("postgresql+psycopg2://u@h/d", "postgresql+psycopg"),
        ("mysql://u@h/d", "mysql+pymysql"),
        ("mariadb://u@h/d", "mariadb+pymysql"),
        ("sqlite:///x.db", "sqlite"),
    ],
)
def test_every_database_uses_our_driver(url: str, driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """This includes the short URL schemes of hosting services."""
    monkeypatch.setenv("DATABASE_URL", url)
    assert load().database.drivername == driver


def test_a_socket_file_without_a_listener_does_not_count_as_a_server(tmp_path: Path) -> None:
    """It may be left from a crash."""
    (tmp_path / "var").mkdir()
    (tmp_path / "var" / "redis.sock").touch()
    assert load().redis == "redis://localhost:6379/0"
