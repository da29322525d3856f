"""A database that is not set up for the worker: commands give one line of advice, and calls raise our errors."""

import secrets
from collections.abc import Callable, Iterator

import click
import psycopg
import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

import worker
from worker.cli.commands import group, run_command
from worker.settings import load
from worker.store.engine import engine_for

COMMANDS = [
    "list", "status", "show 1", "track 77", "cancel 1", "retry 1", "hold 1", "resume 1", "verify",
    "prune --older-than 30d --yes", "prune --older-than 30d --dry-run", "simulate --from-database", "migrate",
]  # fmt: skip


def _run(command: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = run_command(command.split())
    output = capsys.readouterr()
    return code, output.out + output.err


@pytest.fixture
def without_rights(migrated_postgres: object, postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a role that may only log in. The tables exist."""
    role = f"fetch_worker_test_{secrets.token_hex(4)}"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {role} LOGIN PASSWORD 's3cret'".encode())
        url = make_url(postgres_url).set(username=role, password="s3cret").render_as_string(hide_password=False)
        monkeypatch.setenv("DATABASE_URL", url)
        yield url
        engine_for(load().database).dispose()
        connection.execute(f"DROP ROLE {role}".encode())


@pytest.mark.parametrize("command", COMMANDS)
def test_given_a_role_without_privileges_when_a_command_runs_then_one_line_has_the_grant(
    command: str, without_rights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, output = _run(command, capsys)
    if command == "migrate" and code == 0:
        return  # there was nothing to migrate
    assert code == 1
    assert "GRANT " in output
    assert "s3cret" not in output
    assert "SELECT fetch" not in output
    assert "Background on this error" not in output
    assert len(output.strip().splitlines()) == 1


def test_given_a_role_without_privileges_when_the_python_api_is_called_then_it_raises_our_errors(
    without_rights: str,
) -> None:
    calls: list[Callable[[], object]] = [
        lambda: worker.track(78),
        lambda: worker.get(1),
        lambda: worker.get(remote_id="78"),
        lambda: worker.cancel(1),
        lambda: worker.retry(1),
        lambda: worker.nudge("78"),
        lambda: worker.hold(1),
        lambda: worker.output_url(1),
        lambda: worker.wait(1, timeout=1),
    ]
    for call in calls:
        with pytest.raises(worker.DeploymentError, match="GRANT "):
            call()


@pytest.mark.parametrize(
    ("query", "advice"), [({"options": "-csearch_path=nowhere"}, "search_path"), ({}, "fetch-worker migrate")]
)
def test_given_a_database_without_our_tables_or_schema_when_a_command_runs_then_one_line_says_what_to_do(
    query: dict[str, str],
    advice: str,
    postgres_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = f"fetch_worker_test_{secrets.token_hex(4)}"
    url = make_url(postgres_url).set(database=name, query=query)
    monkeypatch.setenv("DATABASE_URL", url.render_as_string(hide_password=False))
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        code, output = _run("list", capsys)
        assert (code, "does not exist (" in output, len(output.strip().splitlines())) == (1, True, 1)
        connection.execute(f"CREATE DATABASE {name}".encode())
        code, output = _run("migrate" if query else "list", capsys)
        engine_for(load().database).dispose()
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())
    assert (code, len(output.strip().splitlines())) == (1, 1)
    assert advice in output


def test_given_an_unexpected_database_error_when_a_command_runs_then_it_prints_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    @group.command("surprise", hidden=True)
    def broken_command() -> None:
        raise OperationalError("SELECT secret", {}, Exception("server closed the connection\nand more"))

    try:
        code, output = _run("surprise", capsys)
    finally:
        assert isinstance(group, click.Group)
        del group.commands["surprise"]
    assert (code, len(output.strip().splitlines())) == (1, 1)
    assert "does not answer (server closed the connection)" in output
    assert "SELECT" not in output


@pytest.mark.usefixtures("migrated_postgres")
@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_given_an_open_transaction_when_another_one_tracks_the_same_job_then_track_asks_to_run_the_transaction_again(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    monkeypatch.setenv("DATABASE_URL", postgres_url)
    remote = secrets.token_hex(6)
    app_engine = create_engine(make_url(postgres_url).set(drivername="postgresql+psycopg"), isolation_level=level)
    with Session(app_engine) as session:
        session.execute(text("SELECT count(*) FROM fetch_jobs"))  # takes its snapshot
        job_id = worker.track(remote)
        with pytest.raises(worker.Unavailable, match="run the whole transaction again"):
            worker.track(remote, session=session)
        session.rollback()
        assert worker.track(remote, session=session) == job_id
    app_engine.dispose()
    engine_for(load().database).dispose()


def test_given_an_open_transaction_on_mariadb_when_another_one_tracks_the_same_job_then_track_returns_its_id(
    migrated_mariadb: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MariaDB's default is REPEATABLE READ, so a plain SELECT does not show rows that were committed later."""
    url = migrated_mariadb.url
    monkeypatch.setenv("DATABASE_URL", url.render_as_string(hide_password=False).replace("+pymysql", ""))
    remote = secrets.token_hex(6)
    app_engine = create_engine(url, isolation_level="REPEATABLE READ")
    with Session(app_engine) as session:
        session.execute(text("SELECT count(*) FROM fetch_jobs"))  # takes its snapshot
        job_id = worker.track(remote)

        assert worker.track(remote, session=session) == job_id
        session.commit()
    app_engine.dispose()
    engine_for(load().database).dispose()
