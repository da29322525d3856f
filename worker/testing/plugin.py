"""The pytest plugin: fixtures for the tests of apps. Importing it costs nothing, and no setting is read before a
fixture is used."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from worker.testing.inline import FetchWorker
    from worker.testing.parts import Kit
    from worker.testing.stand_in import FetchApi


@pytest.fixture(scope="session")
def fetch_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with the tables of fetch-worker: migrated once, and copied for each test."""
    from worker.testing.parts import migrated_file

    return migrated_file(tmp_path_factory.mktemp("fetch-worker") / "tables.db")


@pytest.fixture
def fetch_database() -> object:
    """The database to use: None for a new SQLite file. Define your own to return a URL, an Engine or a Connection."""
    return None


@pytest.fixture
def fetch_kit(tmp_path: Path, fetch_database: object, request: pytest.FixtureRequest) -> Iterator["Kit"]:
    """The stand-in and the worker of one test, and the environment that leads to them."""
    from worker.testing.parts import kit

    tables: Path | None = request.getfixturevalue("fetch_tables") if fetch_database is None else None
    with kit(tmp_path / "fetch-worker", database=fetch_database, tables=tables) as made:
        yield made


@pytest.fixture
def fetch_api(fetch_kit: "Kit") -> "FetchApi":
    """The stand-in of the hosted API: says what each job answers, and counts what it was asked."""
    return fetch_kit.api


@pytest.fixture
def fetch_worker(fetch_kit: "Kit") -> "FetchWorker":
    """The worker in this process: runs tracked jobs to their end on a clock that it moves itself."""
    return fetch_kit.worker
