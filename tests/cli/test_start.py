"""The start of the command line: a command imports what it needs, and the list of commands imports none of them."""

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from sqlalchemy import make_url

from tests.command_line import Run, command_runner
from tests.planted import add_waiting_job
from worker.cli.commands import COMMANDS, group
from worker.store.engine import make_engine
from worker.store.migrate import migrate

ROUNDS = 5  # at most, of which a busy machine needs more than one
COMMAND = Path(sys.executable).with_name("fetch-worker")
LIBRARIES = {"click", "pydantic", "redis", "rich", "sqlalchemy"}  # those that a command may need
NEVER = {"alembic", "boto3", "botocore", "celery", "flask", "flower", "kombu", "requests", "urllib3"}


@dataclass(frozen=True, slots=True)
class Start:
    """A process that has ended: its exit code, its seconds of processor time, and the packages that it imported."""

    code: int
    seconds: float
    packages: set[str]


def start(*arguments: str) -> Start:
    """Run Python with these arguments in a new process."""
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        lines = [line for line in process.stderr if line.startswith("import time:")]
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    names = {line.rpartition("|")[2].strip() for line in lines}
    return Start(process.returncode, usage.ru_utime + usage.ru_stime, {name.partition(".")[0] for name in names})


@pytest.fixture
def database(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A migrated SQLite database with a pending job, 1. Nothing else answers."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/jobs.db")
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")
    engine = make_engine(make_url(f"sqlite:///{tmp_path}/jobs.db"))
    migrate(engine)
    with engine.begin() as connection:
        add_waiting_job(connection, "12202888", due=60.0)
    engine.dispose()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command in this process."""
    return command_runner(capsys)


@pytest.mark.parametrize("arguments", [("--version",), ("--help",)])
def test_given_no_command_when_it_starts_then_it_imports_click_alone(arguments: Sequence[str]) -> None:
    started = start(str(COMMAND), *arguments)

    assert started.code == 0
    assert started.packages & (LIBRARIES | NEVER) == {"click"}


@pytest.mark.parametrize(
    ("arguments", "libraries"),
    [
        (("status",), {"rich"}),  # for tables
        (("status", "--json"), set()),
        (("doctor", "--liveness", "--json"), set()),
        (("list",), {"rich"}),
        (("show", "1"), {"rich", "redis"}),  # which knows how many requests are left
    ],
)
def test_given_a_database_when_a_reading_command_starts_then_it_imports_no_broker_and_no_http(
    database: None, arguments: Sequence[str], libraries: set[str]
) -> None:
    started = start(str(COMMAND), *arguments)

    assert started.code == 0
    assert started.packages & (LIBRARIES | NEVER) == {"click", "pydantic", "sqlalchemy"} | libraries


def test_given_the_time_to_import_sqlalchemy_when_commands_start_then_they_take_a_small_multiple_of_it(
    database: None,
) -> None:
    """All are measured in turns, and the fastest run of each counts. Usual are 0.3 and 2.4."""
    limits = {("--version",): 0.9, ("status",): 3.5, ("doctor", "--liveness"): 3.5}
    seconds = dict.fromkeys(limits, math.inf)
    sqlalchemy = math.inf
    for _ in range(ROUNDS):
        sqlalchemy = min(sqlalchemy, start("-c", "import sqlalchemy").seconds)
        seconds = {words: min(before, start(str(COMMAND), *words).seconds) for words, before in seconds.items()}
        ratios = {words: seconds[words] / sqlalchemy for words in limits}
        slow = {words: ratio for words, ratio in ratios.items() if ratio > limits[words]}
        if not slow:
            return

    assert not slow


def test_given_a_terminal_of_eighty_columns_then_no_summary_of_the_help_is_cut() -> None:
    context = click.Context(group, info_name="fetch-worker", terminal_width=80, **group.context_settings)
    _, _, commands = group.get_help(context).partition("Commands:")
    assert len(commands.strip().splitlines()) == len(COMMANDS)
    assert "..." not in commands


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_given_a_listed_command_then_its_summary_is_the_first_sentence_of_its_help(name: str) -> None:
    command = group.commands[name]

    assert command.name == name
    assert f"{command.help}".replace("\n", " ").startswith(COMMANDS[name].summary)


@pytest.mark.parametrize("width", [40, 60, 100])
def test_given_a_width_then_the_help_lists_the_commands_as_if_they_were_imported(width: int) -> None:
    imported = click.Group(commands=[group.commands[name] for name in group.commands])
    lazily, eagerly = click.HelpFormatter(width=width), click.HelpFormatter(width=width)

    group.format_commands(_context(group), lazily)
    imported.format_commands(_context(imported), eagerly)

    assert lazily.getvalue() == eagerly.getvalue()


@pytest.mark.parametrize("typed", ["", "s", "compare-", "x", "-", "--v"])
def test_given_the_begin_of_a_word_then_the_shell_gets_the_same_completions_as_if_commands_were_imported(
    typed: str,
) -> None:
    imported = click.Group(commands=[group.commands[name] for name in group.commands], params=group.params)
    imported.context_settings = group.context_settings

    completions = [(item.value, item.help) for item in group.shell_complete(_context(group), typed)]

    assert completions == [(item.value, item.help) for item in imported.shell_complete(_context(imported), typed)]


def _context(command: click.Group) -> click.Context:
    return click.Context(command, **command.context_settings)


def test_given_a_mistyped_command_then_the_message_names_the_similar_one(run: Run) -> None:
    result = run("stauts")

    assert result.code == 2
    assert "No such command 'stauts'. Did you mean 'status'?" in result.err
