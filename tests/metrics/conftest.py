"""Fixtures for the tests of metrics: an exposition with all metrics, and promtool."""

import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from prometheus_client.exposition import generate_latest
from sqlalchemy import insert
from sqlalchemy.engine import make_url

from tests import servers
from tests.metrics.exposition import Exposition, open_metrics, parse, registry_of
from tests.planted_orders import add_at_api, add_order, add_uncertain, set_slots
from tests.rows import NOW, add_job
from worker.store.counters import ORDERS, Tally
from worker.store.engine import make_engine
from worker.store.schema import breakers


@pytest.fixture(scope="session")
def promtool() -> str:
    """The program `promtool`."""
    return servers.promtool()


@pytest.fixture
def everything(tmp_path: Path, migrated_sqlite: Path) -> Iterator[tuple[Exposition, str]]:
    """An exposition with a sample of every metric, parsed and in the text format of Prometheus."""
    shutil.copy(migrated_sqlite, tmp_path / "everything.db")
    engine = make_engine(make_url(f"sqlite:///{tmp_path}/everything.db"))
    tally = Tally()
    tally.add("answers", "processing", account="shop", value=0.2)
    tally.delay("shop", "image", 1.0)
    tally.polled("shop", "image", 3)
    tally.finished("shop", "image", "completed")
    tally.attempt("stored", seconds=0.2, stored_bytes=42)
    tally.attempt("http_error", seconds=0.2)
    tally.add(ORDERS, "taken", account="shop")
    with engine.begin() as connection:
        add_job(connection, account="shop")
        add_order(connection, "2", account="shop")
        add_at_api(connection, "3", account="shop")
        add_uncertain(connection, "4", account="shop")
        set_slots(connection, 3, "shop")
        until = NOW + timedelta(days=9_999)
        slowed = {
            "reason": "rate limited",
            "since": NOW,
            "until": until,
            "ceiling": 4.0,
            "cut_at": NOW,
            "asked_at": NOW,
        }
        connection.execute(insert(breakers).values(scope="account", name="shop", **slowed))
        tally.write(connection)
    metrics = registry_of(engine)
    yield parse(open_metrics(metrics)), generate_latest(metrics).decode()
    engine.dispose()
