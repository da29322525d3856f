"""`fetch-worker copy-database`: arguments, output, exit codes, and no password in any message."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine
from sqlalchemy.engine import make_url

from tests.command_line import Run, command_runner
from tests.copied import all_rows, plant_many
from tests.servers import free_port
from worker.cli import progress
from worker.store.copying import COPIED_TABLES
from worker.store.engine import make_engine

PASSWORD = "s3cret-of-the-test"


@pytest.fixture
def source(tmp_path: Path, migrated_sqlite: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """A database with three jobs and their outputs. DATABASE_URL names it."""
    (tmp_path / "test.db").write_bytes(migrated_sqlite.read_bytes())
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/test.db")
    engine = make_engine(make_url(f"sqlite:///{tmp_path}/test.db"))
    plant_many(engine, 3)
    yield engine
    engine.dispose()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command."""
    return command_runner(capsys)


def test_it_copies_and_says_what_to_do_next(source: Engine, run: Run, tmp_path: Path) -> None:
    """The second time there is nothing to do."""
    url = f"sqlite:///{tmp_path}/copy.db"
    result = run("copy-database", url)
    assert (result.code, result.err) == (0, "")
    assert result.out.endswith(f"6 rows in {url}. Set DATABASE_URL to this database, then start the workers\n")
    assert ["fetch_jobs", "3", "3", "3"] in [line.split() for line in result.out.splitlines()]
    copy = make_engine(make_url(url))
    assert all_rows(copy) == all_rows(source)
    copy.dispose()

    result = run("copy-database", url)
    assert result.code == 0
    assert result.out.startswith(f"nothing to do: {url} has had the whole copy since 2")


def test_the_json_document_has_every_table(source: Engine, run: Run, tmp_path: Path) -> None:
    document = run("copy-database", f"sqlite:///{tmp_path}/copy.db", "--json").document
    assert document["target"] == f"sqlite:///{tmp_path}/copy.db"
    assert document["finished_before"] is None
    assert [table["table"] for table in document["tables"]] == [table.name for table in COPIED_TABLES]
    assert {"table": "fetch_jobs", "copied": 3, "source": 3, "target": 3} in document["tables"]


def test_the_url_is_read_from_standard_input(
    source: Engine, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the list of processes does not show its password."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"sqlite:///{tmp_path}/copy.db\n"))
    assert run("copy-database", "-").code == 0
    assert (tmp_path / "copy.db").exists()


def test_progress_is_printed_to_stderr(
    source: Engine, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS", (0.0, 0.0))
    assert "6 of 6 copied" in run("copy-database", f"sqlite:///{tmp_path}/copy.db").err


def test_a_refusal_is_one_line_with_exit_code_1(source: Engine, run: Run, tmp_path: Path) -> None:
    result = run("copy-database", f"sqlite:///{tmp_path}/test.db")
    assert (result.code, result.out) == (1, "")
    assert "fetch-worker: TARGET_URL is the database of DATABASE_URL\n" in result.err


@pytest.mark.parametrize("url", ["nonsense", f"mongodb://app:{PASSWORD}@127.0.0.1/app", "sqlite://two/slashes.db"])
def test_a_wrong_url_is_wrong_usage(source: Engine, run: Run, url: str) -> None:
    """The message does not repeat it."""
    result = run("copy-database", url)
    assert (result.code, result.out) == (2, "")
    assert "TARGET_URL" in result.err
    assert PASSWORD not in result.err


@pytest.mark.parametrize("scheme", ["postgresql", "mariadb"])
def test_a_target_that_does_not_answer_is_named_without_its_password(source: Engine, run: Run, scheme: str) -> None:
    """The advice names TARGET_URL, not DATABASE_URL."""
    result = run("copy-database", f"{scheme}://app:{PASSWORD}@127.0.0.1:{free_port()}/app")
    assert (result.code, result.out) == (1, "")
    assert "does not answer" in result.err
    assert "check TARGET_URL" in result.err
    assert "DATABASE_URL" not in result.err
    assert PASSWORD not in result.err
