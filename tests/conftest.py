"""Shared fixtures: migrated databases, a Redis server of our own, and an environment without outside settings."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings
from sqlalchemy import Engine
from sqlalchemy.engine import make_url

from tests import s3_servers, servers
from tests.download_stand import Stand
from tests.web import Web, web_server
from worker.client.connection import loaded_settings
from worker.net import deadlines
from worker.settings import DOTENV_SWITCH, Settings, load
from worker.store.engine import close_engines, make_engine
from worker.store.migrate import migrate
from worker.store.schema import metadata
from worker.system import redaction

LONG_SECONDS = 900  # time limit of tests marked long without a limit of their own

settings.register_profile("fetch-worker", deadline=None)  # any example may be slow on a busy machine
settings.load_profile("fetch-worker")

_tls_context = cache(deadlines.tls_context)  # loading the CA certificates takes longer than most tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give long tests a longer time limit."""
    for item in items:
        if item.get_closest_marker("long") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(LONG_SECONDS))


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Hide the settings of the developer's environment, and restore everything after the test."""
    for name in list(os.environ):
        if name.lower() in Settings.model_fields or name.startswith(("FLOWER_", "CELERY_", "AWS_")):
            monkeypatch.delenv(name)
    monkeypatch.delenv(DOTENV_SWITCH, raising=False)
    monkeypatch.setenv("LOG_FORMAT", "text")  # the tests read logs as text
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(redaction, "_shared", redaction.Scrubber())
    loaded_settings.cache_clear()
    yield
    loaded_settings.cache_clear()
    close_engines()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let processes that the test starts receive SIGINT. A shell makes its background jobs ignore it."""
    previous = signal.getsignal(signal.SIGINT)
    if previous is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An empty PostgreSQL database for this test process."""
    with servers.postgres(tmp_path_factory.mktemp("postgres")) as url:
        yield url


@pytest.fixture(scope="session")
def migrated_postgres(postgres_url: str) -> Iterator[Engine]:
    """An engine for a PostgreSQL database with our tables."""
    engine = make_engine(make_url(postgres_url).set(drivername="postgresql+psycopg"))
    migrate(engine)
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def migrated_mariadb() -> Iterator[Engine]:
    """An engine for a MariaDB database with our tables."""
    with servers.mariadb() as url:
        engine = make_engine(make_url(url).set(drivername="mariadb+pymysql"))
        migrate(engine)
        yield engine
        engine.dispose()


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with our tables, to be copied: migrating in each test would take too long."""
    path = tmp_path_factory.mktemp("sqlite") / "empty.db"
    new_engine = make_engine(make_url(f"sqlite:///{path}"))
    migrate(new_engine)
    new_engine.dispose()
    return path


@pytest.fixture
def sqlite_engine(migrated_sqlite: Path, tmp_path: Path) -> Iterator[Engine]:
    """An engine for empty tables in SQLite, for tests that do not depend on the database."""
    shutil.copy(migrated_sqlite, tmp_path / "test.db")
    new_engine = make_engine(make_url(f"sqlite:///{tmp_path}/test.db"))
    yield new_engine
    new_engine.dispose()


@pytest.fixture
def configured_sqlite(sqlite_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine for empty tables in SQLite. DATABASE_URL names the database."""
    monkeypatch.setenv("DATABASE_URL", sqlite_engine.url.render_as_string(hide_password=False))
    return sqlite_engine


@pytest.fixture
def use_storage(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Settings]:
    """Return a function that sets STORAGE_URL and returns the settings."""

    def use(url: str) -> Settings:
        monkeypatch.setenv("STORAGE_URL", url)
        loaded_settings.cache_clear()
        return load()

    return use


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """An engine for empty tables. The test runs once for each kind of database."""
    if request.param == "sqlite":
        yield request.getfixturevalue("sqlite_engine")
        return
    new_engine = request.getfixturevalue("migrated_postgres" if request.param == "postgresql" else "migrated_mariadb")
    _empty(new_engine)  # a test that uses the migrated database itself may have left rows
    yield new_engine
    _empty(new_engine)


def _empty(engine: Engine) -> None:
    """Delete all rows of all tables."""
    with engine.begin() as connection:
        for table in reversed(metadata.sorted_tables):
            connection.execute(table.delete())


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """An engine for an empty database."""
    if request.param == "sqlite":
        engine = make_engine(make_url(f"sqlite:///{tmp_path}/empty.db"))
        yield engine
        engine.dispose()
        return
    if request.param == "mariadb":
        with servers.mariadb() as url:
            engine = make_engine(make_url(url).set(drivername="mariadb+pymysql"))
            yield engine
            engine.dispose()
        return
    with servers.postgres(tmp_path / "postgres") as url:
        engine = make_engine(make_url(url).set(drivername="postgresql+psycopg"))
        yield engine
        engine.dispose()


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis server for this test process."""
    with servers.redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3_servers.S3Server]:
    """An S3 server for this test process."""
    with s3_servers.s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3(s3_server: s3_servers.S3Server) -> s3_servers.S3Server:
    """The running S3 server. The environment variables for it are set by `S3Server.environment`."""
    s3_server.start()
    return s3_server


@pytest.fixture
def web() -> Iterator[Web]:
    """A web server for outputs."""
    with web_server() as server:
        yield server


@pytest.fixture
def stand(sqlite_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stand:
    """Everything that a download needs, on SQLite. Other tests cover claims on each database."""
    monkeypatch.setattr(deadlines, "tls_context", _tls_context)
    return Stand(sqlite_engine, tmp_path / "out")
