"""pytest plugin with fixtures for the tests of web apps. Importing it is cheap; settings are read by the fixtures."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from worker.testing.inline import FetchWorker
    from worker.testing.kit_setup import Kit
    from worker.testing.stand_in import FetchApi


@pytest.fixture(scope="session")
def fetch_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SQLite file with the tables of fetch-worker, migrated once and copied for each test."""
    from worker.testing.kit_setup import migrated_file

    return migrated_file(tmp_path_factory.mktemp("fetch-worker") / "tables.db")


@pytest.fixture
def fetch_database() -> object:
    """The database to use; None means a new SQLite file. Override it to return a URL, an Engine or a Connection."""
    return None


@pytest.fixture
def fetch_kit(tmp_path: Path, fetch_database: object, request: pytest.FixtureRequest) -> Iterator["Kit"]:
    """The stand-in and the worker of one test, with an environment that points to them."""
    from worker.testing.kit_setup import kit

    tables: Path | None = request.getfixturevalue("fetch_tables") if fetch_database is None else None
    with kit(tmp_path / "fetch-worker", database=fetch_database, tables=tables) as kit_of_test:
        yield kit_of_test


@pytest.fixture
def fetch_api(fetch_kit: "Kit") -> "FetchApi":
    """Stand-in of the hosted API. It decides what each job answers, and counts requests."""
    return fetch_kit.api


@pytest.fixture
def fetch_worker(fetch_kit: "Kit") -> "FetchWorker":
    """In-process worker that runs tracked jobs to a final state and moves its own clock."""
    return fetch_kit.worker
