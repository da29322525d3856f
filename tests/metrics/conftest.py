"""What the tests of metrics share: an exposition that has everything, and Prometheus's own checker."""

import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from prometheus_client.exposition import generate_latest
from sqlalchemy import insert
from sqlalchemy.engine import make_url

from tests import servers
from tests.metrics.exposed import Exposed, open_metrics, parsed, registry_of
from tests.rows import NOW, add_job
from worker.store.counters import Tally
from worker.store.engine import make_engine
from worker.store.schema import breakers


@pytest.fixture(scope="session")
def promtool() -> str:
    """The program `promtool`."""
    return servers.promtool()


@pytest.fixture
def everything(tmp_path: Path, migrated_sqlite: Path) -> Iterator[tuple[Exposed, str]]:
    """An exposition with a sample of every metric there is, and the same as Prometheus itself is given it."""
    shutil.copy(migrated_sqlite, tmp_path / "everything.db")
    engine = make_engine(make_url(f"sqlite:///{tmp_path}/everything.db"))
    tally = Tally()
    tally.add("answers", "processing", account="shop", value=0.2)
    tally.delay("shop", "image", 1.0)
    tally.polled("shop", "image", 3)
    tally.finished("shop", "image", "completed")
    tally.attempt("stored", seconds=0.2, stored_bytes=42)
    tally.attempt("http_error", seconds=0.2)
    with engine.begin() as connection:
        add_job(connection, account="shop")
        until = NOW + timedelta(days=9_999)
        slowed = {"reason": "rate limited", "since": NOW, "until": until, "ceiling": 4.0, "cut_at": NOW}
        connection.execute(insert(breakers).values(scope="account", name="shop", **slowed))
        tally.write(connection)
    made = registry_of(engine)
    yield parsed(open_metrics(made)), generate_latest(made).decode()
    engine.dispose()
