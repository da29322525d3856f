"""A mistyped account, host or kind is a usage error that lists the known names, and never makes a new account."""

import io
import sys
from typing import Any

import pytest
from sqlalchemy import Engine, insert, select

from tests.command_line import Run, command_runner
from tests.rows import BASE, NOW, add_downloading, add_job, job_values
from worker.store.breakers import all_breakers
from worker.store.counters import Tally
from worker.store.engine import database_now
from worker.store.processes import WorkerProcess, record_process
from worker.store.reports import known_names
from worker.store.schema import actions, breakers, jobs, paces

ENDED: dict[str, Any] = {"status": "cancelled", "due_at": None, "completed_at": NOW}
OTHER = "https://other.test:8443/api/v3/fetch"


@pytest.fixture
def run(engine: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a command in this process, on the test database, without a terminal."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    monkeypatch.setenv("SD_API_HOSTS", "api.test")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    return command_runner(capsys)


@pytest.fixture
def names(engine: Engine) -> None:
    """Accounts, hosts and kinds that are known in different ways."""
    with engine.begin() as connection:
        now = database_now(connection)
        add_job(connection, "1", account="waits", kind="image")
        add_downloading(connection, "2", account="loads", kind="video", fetch_base=OTHER, fetch_host="other.test:8443")
        add_job(connection, "3", account="ended", **ENDED)
        connection.execute(insert(breakers).values(scope="account", name="refused", proven=True))
        connection.execute(insert(breakers).values(scope="host", name="down.test", proven=True))
        connection.execute(insert(paces).values(account="waits", kind="slow", state="{}", version=1, learned_at=now))
        served = WorkerProcess("h.1.1", "worker@h", frozenset(), {"served": 5.0}, "1", True, now, now)
        record_process(connection, served)
        tally = Tally()
        tally.finished("pruned", "music", "completed")
        tally.write(connection)


ACCOUNTS = "default, ended, loads, pruned, refused, served, waits"
HOSTS = "api.test, down.test, other.test:8443"
UNKNOWN = [
    (("--account", "wiats"), f"there is no account 'wiats'; the known accounts are {ACCOUNTS}"),
    (("--account", "waits", "--account", "x y"), f"there is no account 'x y'; the known accounts are {ACCOUNTS}"),
    (("--host", "api.tset"), f"no job is fetched from 'api.tset'; the known hosts are {HOSTS}"),
    (("--kind", "imgae"), "no job is of the kind 'imgae'; the known kinds are image, music, slow, video"),
]  # fmt: skip


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize(("options", "message"), UNKNOWN)
def test_given_a_mistyped_name_when_a_command_filters_by_it_then_it_lists_the_known_names(
    options: tuple[str, ...], message: str, engine: Engine, run: Run
) -> None:
    commands = [
        ("list",),
        ("list", "--json"),
        *((action, "--yes", "--status", "pending") for action in ("cancel", "hold")),
    ]

    for command in (*commands, ("retry", "--dry-run", "--code", "gone"), ("resume", "--yes", "--held")):
        result = run(*command, *options)
        assert (result.code, result.out) == (2, "")
        assert message in " ".join(result.err.split())
    with engine.connect() as connection:
        assert connection.execute(select(actions)).all() == []


@pytest.mark.usefixtures("names")
def test_given_a_mistyped_account_or_host_when_it_is_held_as_a_whole_then_nothing_is_held(
    engine: Engine, run: Run
) -> None:
    """Nor another one that the same command names."""
    for options in (("--account", "waits", "--account", "wiats"), ("--host", "api.test", "--host", "api.tset")):
        for action in ("hold", "resume"):
            assert run(action, *options).code == 2

    with engine.connect() as connection:
        assert set(all_breakers(connection)) == {("account", "refused"), ("host", "down.test")}
        assert all(breaker.paused_at is None for breaker in all_breakers(connection).values())


@pytest.mark.usefixtures("names")
def test_given_a_mistyped_account_when_a_remote_id_is_looked_up_then_it_is_a_usage_error(run: Run) -> None:
    for command in ("show", "verify", "notify", "cancel"):
        result = run(command, "--remote", "1", "--account", "wiats")
        assert (result.code, "there is no account 'wiats'" in result.err) == (2, True)
    assert run("show", "--remote", "1", "--account", "served").code == 1  # it exists, and has no such job


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize(
    "options",
    [
        *(("--account", name) for name in ACCOUNTS.split(", ")),
        *(("--kind", name) for name in ("image", "video", "slow", "music")),
        *(("--host", name) for name in ("API.test:443", *HOSTS.split(", "))),
    ],
)
def test_given_a_name_that_exists_when_no_job_matches_then_it_is_no_error(options: tuple[str, str], run: Run) -> None:
    result = run("list", *options, "--status", "expired", "--json")

    assert (result.code, result.document) == (0, [])


def test_given_no_jobs_at_all_then_names_are_still_checked(run: Run) -> None:
    assert run("list", "--account", "default", "--json").document == []
    assert "the known kinds are none yet" in " ".join(run("list", "--kind", "image").err.split())


def test_given_an_account_with_a_key_of_this_process_then_it_is_known(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SD_API_KEYS", '{"shop": "a-key-of-the-shop"}')

    assert run("list", "--account", "shop").code == 0


def test_given_a_kind_of_old_jobs_only_when_it_is_asked_for_then_it_is_found(
    engine: Engine, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_names, "NEWEST_JOBS", 3)
    with engine.begin() as connection:
        add_job(connection, "old", kind="video")
        connection.execute(insert(jobs), [job_values(str(number)) for number in range(9)])

    assert [row["remote_id"] for row in run("list", "--kind", "video", "--json").document] == ["old"]
    assert run("list", "--kind", "vidoe").code == 2


def test_given_very_many_addresses_then_a_host_that_may_exist_is_no_error(
    engine: Engine, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_names, "STEPS_MOST", 5)
    with engine.begin() as connection:
        rows = [job_values("1", fetch_base=f"{BASE}/{number}") for number in range(9)]
        connection.execute(insert(jobs), rows)

    assert run("list", "--host", "api.tset").code == 0


def test_many_names_are_shortened(engine: Engine, run: Run) -> None:
    with engine.begin() as connection:
        rows = [job_values("1", account=f"a{number:02}", **ENDED) for number in range(40)]
        connection.execute(insert(jobs), rows)

    message = " ".join(run("list", "--account", "a99").err.split())

    assert "a00, a01, a02," in message
    assert message.endswith("a29 and 11 more")
