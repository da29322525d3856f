"""`fetch-worker move-storage`: output, confirmation, exit codes."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.engine import make_url

from tests.command_line import Run, command_runner
from tests.moving import plant_outputs, remove_file, write_files
from worker.cli import progress
from worker.store.engine import make_engine
from worker.store.schema import outputs


@pytest.fixture
def database(tmp_path: Path, migrated_sqlite: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """A database with three outputs in the folder `old`. The settings name the folder `new`."""
    (tmp_path / "test.db").write_bytes(migrated_sqlite.read_bytes())
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/test.db")
    monkeypatch.setenv("STORAGE_URL", f"file:{tmp_path}/new")
    engine = make_engine(make_url(f"sqlite:///{tmp_path}/test.db"))
    write_files(tmp_path / "old", plant_outputs(engine, f"file://{tmp_path}/old", 3))
    yield engine
    engine.dispose()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command."""
    return command_runner(capsys)


def _locations(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        return list(connection.execute(select(outputs.c.location).order_by(outputs.c.id)).scalars())


def test_a_dry_run_shows_what_would_be_moved(database: Engine, run: Run, tmp_path: Path) -> None:
    """It needs no --yes and changes nothing."""
    before = _locations(database)
    result = run("move-storage", "--dry-run")
    assert (result.code, result.err) == (0, "")
    assert result.out == f"3 outputs of 90 B would be moved to file://{tmp_path}/new/ (3 from file://{tmp_path}/old/)\n"
    assert run("move-storage", "--dry-run", "--json").document == {
        "target": f"file://{tmp_path}/new/",
        "outputs": 3,
        "bytes": 90,
        "sources": [{"root": f"file://{tmp_path}/old/", "outputs": 3}],
        "old_files": 0,
    }
    assert _locations(database) == before


def test_it_moves_and_prints_a_summary(database: Engine, run: Run, tmp_path: Path) -> None:
    """The second time there is nothing to do."""
    result = run("move-storage", "--yes")
    assert (result.code, result.out, result.err) == (
        0,
        f"3 outputs of 90 B moved to file://{tmp_path}/new/; 3 old files removed\n",
        "",
    )
    assert all(location.startswith(f"file://{tmp_path}/new/") for location in _locations(database))
    assert run("move-storage", "--yes", "--json").document == {
        "target": f"file://{tmp_path}/new/",
        "moved": 0,
        "bytes": 0,
        "removed": 0,
        "problems": [],
        "stopped": False,
    }


def test_outputs_that_can_not_be_moved_are_grouped_with_exit_code_1(database: Engine, run: Run, tmp_path: Path) -> None:
    """The reasons are on stderr, or in the JSON document."""
    for location in _locations(database)[:2]:
        remove_file(location)

    result = run("move-storage", "--yes", "--keep", "--threads", "1")

    example = f"output 1: {_locations(database)[0]} is missing: is its disk mounted?"
    assert result.code == 1
    assert result.out.startswith("1 output of ")
    assert result.err == f"fetch-worker: not moved: 2 (missing), for example {example}\n"
    assert len(list((tmp_path / "old").rglob("*.png"))) == 1
    result = run("move-storage", "--yes", "--json")
    assert result.code == 1
    assert result.document["problems"] == [{"problem": "missing", "count": 2, "example": example}]


def test_progress_is_printed_to_stderr(database: Engine, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", (0.0, 0.0))
    assert re.search(r"3 of 3 moved", run("move-storage", "--yes", "--json").err)


def test_on_a_terminal_it_asks_before(database: Engine, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The question shows what would be moved. `n` moves nothing."""
    before = _locations(database)
    master, slave = os.openpty()
    with os.fdopen(master, "wb", buffering=0) as keys, os.fdopen(slave, "r") as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        keys.write(b"n\n")
        result = run("move-storage")
        assert (result.code, _locations(database)) == (130, before)
        assert "3 outputs of 90 B would be moved" in result.err
        keys.write(b"y\n")
        assert run("move-storage").code == 0
    assert _locations(database) != before


@pytest.mark.parametrize(("arguments", "message"), [([], "--yes"), (["--yes", "--threads", "0"], "threads")])
def test_wrong_usage_moves_nothing(
    database: Engine, run: Run, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exit code is 2."""
    before = _locations(database)
    with Path(os.devnull).open() as empty:
        monkeypatch.setattr(sys, "stdin", empty)
        result = run("move-storage", *arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert _locations(database) == before


def test_a_storage_that_can_not_be_used_is_one_line(
    database: Engine, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is changed."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STORAGE_URL", f"file:{tmp_path}/file/new")
    before = _locations(database)
    result = run("move-storage", "--yes")
    assert result.code == 1
    assert "can't create" in result.err
    assert _locations(database) == before
