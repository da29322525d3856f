"""History: one sample per minute from any process, its contents, and the deletion of old samples."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Connection, Engine, event, func, insert, select, text, update

from tests.rows import NOW, add_downloading, add_job, add_output, add_process, read_history, seconds
from worker.core.circuit_breaker import held_by_operator
from worker.store.breakers import locked_breaker, save_breaker
from worker.store.counters import Tally
from worker.store.reports.history import KEPT, answered_lately, record_history
from worker.store.reports.stats import STATES
from worker.store.schema import HELD_UNTIL, breakers, history

LATER = NOW + seconds(20.5)


def _add_counts(connection: Connection) -> None:
    tally = Tally()
    tally.add("answers", "processing", account="shop")
    tally.add("answers", "ready", account="shop")
    for kind in ("image", "video"):
        tally.delay("shop", kind, 0.7)
        tally.polled("shop", kind, 3)
        tally.finished("shop", kind, "completed")
    tally.attempt("stored", seconds=0.2, stored_bytes=4_000_000_000)
    tally.write(connection)


def test_a_sample_has_the_statistics(engine: Engine) -> None:
    with engine.begin() as connection:
        for number in range(3):
            add_job(connection, str(number), account="shop", due_at=NOW + seconds(number))
        add_job(connection, "held", account="shop", due_at=HELD_UNTIL, held_at=NOW)
        add_job(connection, "no key", account="other", due_at=NOW - seconds(99))
        add_output(connection, add_downloading(connection, "ready"))
        locked_breaker(connection, "account", "shop")
        connection.execute(update(breakers).values(proven=True, asked_at=NOW, ceiling=4.0, cut_at=LATER))
        _add_counts(connection)
        add_process(connection, accounts={"shop": 10.0}, started_at=LATER, seen_at=LATER)
        record_history(connection, now=LATER, full_rps=lambda _: 10.0, full_slots=lambda _: None)
        (sample,) = read_history(connection, NOW)

    assert sample.minute == NOW
    assert sample.body == {
        "jobs": dict.fromkeys(STATES, 0) | {"pending": 4, "held": 1, "downloading": 1},
        "oldest_due": 20.5,
        "unstored": 1,
        "accounts": {
            "other": {"rps": 10.0, "held": True, "answers": 0},
            "shop": {"rps": 1.9, "held": False, "answers": 2},
        },
        "delay": {"1": 2},
        "polls": {"3": 2},
        "finished": {"completed": 2},
        "stored_bytes": 4_000_000_000,
    }


def test_held_jobs_are_not_late(engine: Engine) -> None:
    """Jobs of a held account, and jobs on a held host."""
    with engine.begin() as connection:
        add_job(connection, "1", account="held")
        add_job(connection, "2", account="shop", fetch_host="away.test")
        locked_breaker(connection, "account", "shop")
        save_breaker(connection, held_by_operator(locked_breaker(connection, "account", "held"), now=NOW))
        save_breaker(connection, held_by_operator(locked_breaker(connection, "host", "away.test"), now=NOW))
        connection.execute(update(breakers).values(asked_at=NOW))
        record_history(connection, now=LATER, full_rps=lambda _: 10.0, full_slots=lambda _: None)
        (sample,) = read_history(connection, NOW)

    assert sample.body["oldest_due"] == 0
    assert {name: account["held"] for name, account in sample.body["accounts"].items()} == {"held": True, "shop": False}


def test_concurrent_attempts_write_one_sample(engine: Engine) -> None:
    def attempt(_: int) -> float:
        with engine.begin() as connection:
            return record_history(
                connection, now=LATER, full_rps=lambda _: 10.0, full_slots=lambda _: None
            ).total_seconds()

    with ThreadPoolExecutor(6) as threads:
        waits = list(threads.map(attempt, range(12)))

    with engine.connect() as connection:
        assert connection.execute(select(func.count()).select_from(history)).scalar_one() == 1
    assert waits == [39.5] * 12


def test_samples_are_written_once_a_minute_and_deleted_after_eight_days(engine: Engine) -> None:
    with engine.begin() as connection:
        old = [{"minute": NOW - KEPT - seconds(60 * number), "body": "{}"} for number in range(3)]
        connection.execute(insert(history), old)
        for late in (0, 30, 59.9, 60, 125):
            record_history(connection, now=NOW + seconds(late), full_rps=lambda _: 10.0, full_slots=lambda _: None)
        samples = read_history(connection, NOW - KEPT - seconds(3_600))
        lately = read_history(connection, NOW + seconds(1))

    minutes = [NOW, NOW + seconds(60), NOW + seconds(120)]
    assert [sample.minute for sample in samples] == minutes
    assert [sample.minute for sample in lately] == minutes[1:]


def test_an_existing_sample_costs_one_query(engine: Engine) -> None:
    """So every sweep can call it."""
    statements: list[str] = []
    with engine.begin() as connection:
        record_history(connection, now=NOW, full_rps=lambda _: 10.0, full_slots=lambda _: None)
        before = read_history(connection, NOW)
        add_job(connection)
        event.listen(connection, "before_cursor_execute", lambda *values: statements.append(values[2]))
        record_history(connection, now=LATER, full_rps=lambda _: 10.0, full_slots=lambda _: None)
        looks = len(statements)

        assert read_history(connection, NOW) == before
    assert looks == 1


SWEEPS = """
import logging

from worker.process.resources import process_resources
from worker.process.runs import run_housekeeping, run_sweep

logging.basicConfig()
results = []
for _ in range(2):
    process_resources().sample_at = 0.0
    run_housekeeping()
    results.append(run_sweep())
print(results)
"""


@pytest.mark.parametrize("there", [True, False], ids=["", "its table is gone"])
def test_housekeeping_records_history_and_errors_in_it_do_not_stop_the_sweep(
    there: bool, engine: Engine, redis_url: str
) -> None:
    with engine.begin() as connection:
        if not there:
            connection.execute(text("ALTER TABLE fetch_history RENAME TO fetch_history_gone"))
    database = engine.url.render_as_string(hide_password=False)
    env = os.environ | {"DATABASE_URL": database, "REDIS_URL": redis_url}
    try:
        result = subprocess.run([sys.executable, "-c", SWEEPS], env=env, capture_output=True, text=True, check=True)
    finally:
        if not there:
            with engine.begin() as connection:
                connection.execute(text("ALTER TABLE fetch_history_gone RENAME TO fetch_history"))

    assert result.stdout.strip() == "['nothing to requeue', 'nothing to requeue']"
    assert ("a history row is missing" in result.stderr) != there
    with engine.connect() as connection:
        lines = connection.execute(select(func.count()).select_from(history)).scalar_one()
    assert bool(lines) == there


def test_given_two_samples_then_the_requests_per_second_between_them_are_known_by_account(engine: Engine) -> None:
    with engine.begin() as connection:
        locked_breaker(connection, "account", "shop")
        _add_counts(connection)
        record_history(connection, now=NOW - seconds(120), full_rps=lambda _: 10.0, full_slots=lambda _: None)
        one_sample = answered_lately(connection, now=NOW)
        tally = Tally()
        for _ in range(90):
            tally.add("answers", "processing", account="shop")
        tally.write(connection)
        record_history(connection, now=NOW - seconds(60), full_rps=lambda _: 10.0, full_slots=lambda _: None)

        assert one_sample == {}
        assert answered_lately(connection, now=NOW) == {"shop": 1.5}
        assert answered_lately(connection, now=NOW + seconds(600)) == {}
