"""The audit trail: who acts, one row for an action of several transactions, and the removal of old rows."""

import sys
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, Row, func, select

from tests.rows import NOW, seconds
from worker.store import audit
from worker.store.audit import (
    KEEP,
    MAX_SELECTION,
    CountedAction,
    actions_of,
    forget_old_actions,
    latest_actions,
    record_action,
    record_job_action,
)
from worker.store.schema import actions
from worker.system.who import acting


def _rows(engine: Engine) -> list[Row[Any]]:
    with engine.connect() as connection:
        return list(reversed(latest_actions(connection)))


def _counts(engine: Engine) -> list[tuple[str, int]]:
    return [(row.action, row.jobs) for row in _rows(engine)]


# ── who acts ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_action_has_its_time_its_actor_and_its_jobs(engine: Engine) -> None:
    with engine.begin() as connection, acting("page", "admin"):
        record_job_action(connection, "cancel", 17, now=NOW)

    [row] = _rows(engine)
    assert tuple(row)[1:] == (NOW, "page", "admin", "cancel", "17", 1, 17)


@pytest.mark.parametrize(
    ("program", "who"),
    [
        ("/opt/shop/bin/gunicorn", "gunicorn"),
        ("/usr/lib/python3/site-packages/celery/__main__.py", "celery"),
        *(("-c", ""), ("", ""), ("-m", "")),
    ],
)
def test_given_no_named_actor_when_a_program_acts_then_it_is_the_actor(
    program: str, who: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [program, "--workers", "2"])
    with engine.begin() as connection:
        with acting("cli", "ann"):
            record_job_action(connection, "hold", 1, now=NOW)
        record_job_action(connection, "hold", 1, now=NOW)

    assert [(row.source, row.who) for row in _rows(engine)] == [("cli", "ann"), ("python", who)]


def test_a_text_of_any_length_is_recorded(engine: Engine) -> None:
    with engine.begin() as connection, acting("cli", "a" * 999):
        record_action(connection, "retry", "é" * 50_000, jobs=3, now=NOW)

    [row] = _rows(engine)
    assert (len(row.who), row.filter, row.jobs) == (255, "é" * MAX_SELECTION, 3)


# ── actions of several transactions ───────────────────────────────────────────────────────────────────────────────────


def test_given_several_transactions_when_jobs_change_then_one_row_counts_them(engine: Engine) -> None:
    action = CountedAction("cancel", "--account shop")

    for number, changed in enumerate((0, 300, 0, 300, 7)):
        with engine.begin() as connection:
            action.add(connection, changed, now=NOW + seconds(number))

    [row] = _rows(engine)
    assert (row.action, row.filter, row.jobs, row.job_id) == ("cancel", "--account shop", 607, None)
    assert row.at == NOW + seconds(1)


def test_given_no_changed_job_then_nothing_is_recorded(engine: Engine) -> None:
    with engine.begin() as connection:
        CountedAction("cancel", "--account shop").add(connection, 0, now=NOW)

    assert _rows(engine) == []


def test_given_a_transaction_is_rolled_back_when_another_one_follows_then_only_committed_jobs_are_counted(
    engine: Engine,
) -> None:
    """SQLite gives the id of the lost row to the next action, of another process."""
    action = CountedAction("cancel", "--account shop")
    with engine.connect() as connection:
        action.add(connection, 300, now=NOW)  # never committed
    with engine.begin() as connection:
        record_action(connection, "retry", "8", jobs=1, now=NOW + seconds(1))
    with engine.begin() as connection:
        action.add(connection, 20, now=NOW + seconds(2))
    with engine.connect() as connection:
        action.add(connection, 300, now=NOW + seconds(3))
    with engine.begin() as connection:
        action.add(connection, 3, now=NOW + seconds(4))

    assert _counts(engine) == [("retry", 1), ("cancel", 23)]


# ── reading and removing ──────────────────────────────────────────────────────────────────────────────────────────────


def test_the_actions_of_a_job_are_the_latest_ones_oldest_first(engine: Engine) -> None:
    with engine.begin() as connection:
        for number in range(60):
            record_job_action(connection, f"act {number}", 7, now=NOW)
            record_job_action(connection, "other", 8, now=NOW)
        listed = [row.action for row in actions_of(connection, 7)]
        first_page = latest_actions(connection, limit=100)
        second_page = latest_actions(connection, limit=100, before=first_page[-1].id)

    assert listed == [f"act {number}" for number in range(10, 60)]
    assert (len(first_page), len(second_page)) == (100, 20)


def test_actions_are_removed_after_a_year_in_batches(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "FORGET_BATCH", 4)
    with engine.begin() as connection:
        for number in range(6):
            record_job_action(connection, "cancel", 1, now=NOW + seconds(number))
        record_job_action(connection, "cancel", 1, now=NOW + timedelta(days=200))
    now = NOW + KEEP + seconds(5)

    def forget() -> tuple[bool, int]:
        with engine.begin() as connection:
            more = forget_old_actions(connection, now=now)
            return more, connection.execute(select(func.count()).select_from(actions)).scalar_one()

    assert [forget(), forget(), forget()] == [(True, 3), (False, 2), (False, 2)]
    assert [row.at for row in _rows(engine)] == [NOW + seconds(5), NOW + timedelta(days=200)]
