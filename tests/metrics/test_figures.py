"""On every database, the metrics equal the rows after complete runs of jobs, and counters never decrease."""

from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, delete, func, insert, select, update

import worker
from tests.metrics.exposition import scrape
from tests.rows import (
    NOW,
    add_downloading,
    add_job,
    add_output,
    add_process,
    claim_due_jobs,
    job_values,
    seconds,
    try_claim_output,
)
from worker.core.circuit_breaker import held_by_operator
from worker.core.histograms import DELAYS, bucket_names
from worker.metrics import figures
from worker.metrics.figures import limit_kinds
from worker.store.breakers import locked_breaker, save_breaker
from worker.store.claims import claim_output
from worker.store.counters import KINDS_MOST, Tally
from worker.store.engine import use_clock
from worker.store.reports import stats
from worker.store.schema import HELD_UNTIL, breakers, events, jobs, outputs
from worker.testing import Kit, kit

FINAL = ("completed", "failed", "expired", "cancelled")


@pytest.fixture
def worker_kit(tmp_path: Path, engine: Engine) -> Iterator[Kit]:
    """A worker and a stand-in of the API on this database, with a clock that tests set."""
    with kit(tmp_path / "kit", database=engine) as running_kit:
        yield running_kit


def _run_jobs(worker_kit: Kit) -> None:
    """Run jobs of two kinds that reach every final state, and some that are not final."""
    api = worker_kit.api
    api.answers("1").processing(3).success(2)
    api.answers("2").success()
    api.answers("3").processing().failed("out of paint", times=2)
    api.answers("4").rate_limited(20).success()
    api.answers("5").body(b"<html>").unavailable().not_found(times=5)
    api.answers("6").processing_for(9_999)
    api.answers("7").success(["http://127.0.0.1:1/unreachable.png"])
    api.answers("8").error("nothing", times=9)
    for number in range(1, 9):
        kind = "video" if number % 2 else "image"
        worker.track(str(number), kind=kind, deadline=60 if number == 6 else 9_999, webhook_url="https://app.test/")
    cancelled = worker.track("9", kind="image")
    worker.cancel(cancelled)
    worker_kit.worker.advance(900)
    api.answers("10").processing_for(9_999)
    worker.track("10", kind="video", deadline=9_999)
    worker_kit.worker.advance(40)


def _query(engine: Engine, *columns: Any, where: Any = None) -> dict[tuple[str, ...], float]:
    *by, value = columns
    query = select(*by, value).group_by(*by)
    with engine.connect() as connection:
        rows = connection.execute(query if where is None else query.where(where)).all()
    return {tuple(row[:-1]): float(row[-1]) for row in rows if row[-1]}


def test_after_complete_runs_every_metric_equals_the_rows(worker_kit: Kit, engine: Engine) -> None:
    _run_jobs(worker_kit)
    with engine.begin() as connection:
        add_job(connection, "11", kind="image", due_at=HELD_UNTIL, held_at=NOW)

    metrics = scrape(engine, worker_kit.worker.settings)

    held = jobs.c.held_at.is_not(None)
    by = (jobs.c.account, jobs.c.kind, jobs.c.status)
    rows = _query(engine, jobs.c.status, func.count(), where=~held)
    assert metrics.all("jobs") == rows | {("held",): 1.0}
    assert {status for (status,) in rows} == {"pending", "downloading", *FINAL}
    unfinished = _query(engine, *by, func.count(), where=jobs.c.completed_at.is_(None) & ~held)
    assert metrics.all("jobs_unfinished") == unfinished | {("default", "image", "held"): 1.0}
    finished = jobs.c.completed_at.is_not(None)
    assert metrics.all("jobs_finished_total") == _query(engine, *by, func.count(), where=finished)

    ready = jobs.c.ready_at.is_not(None)
    assert metrics.all("detection_delay_seconds_count") == _query(engine, *by[:2], func.count(), where=ready)
    polled = (ready | finished) & (jobs.c.polls > 0)
    assert metrics.all("job_polls_count") == _query(engine, *by[:2], func.count(), where=polled)
    assert metrics.all("job_polls_sum") == _query(engine, *by[:2], func.sum(jobs.c.polls), where=polled)

    answers = metrics.all("api_answers_total")
    assert sum(answers.values()) == sum(worker_kit.api.calls.fetches.values())
    assert sum(answers.values()) == _query(engine, jobs.c.account, func.sum(jobs.c.polls))[("default",)]
    classes = {answer: count for (_, answer), count in answers.items()}
    assert classes["processing"] == worker_kit.api.calls.fetch_answers["processing"]
    assert classes["ready"] == worker_kit.api.calls.fetch_answers["success"]
    assert {"rate_limited", "odd", "unreachable", "unknown_id", "failed", "api_error"} <= set(classes)

    stored = outputs.c.status == "stored"
    attempts = metrics.all("download_attempts_total")
    assert sum(attempts.values()) == _query(engine, func.sum(outputs.c.attempts))[()]
    assert attempts[("stored",)] == _query(engine, func.count(), where=stored)[()]
    assert metrics.value("download_duration_seconds_count") == attempts[("stored",)]
    assert metrics.value("stored_bytes_total") == _query(engine, func.sum(outputs.c.size_bytes), where=stored)[()]
    unstored = outputs.c.due_at.is_not(None)
    assert metrics.all("outputs_unstored") == _query(engine, outputs.c.error_code, func.count(), where=unstored)
    assert metrics.all("webhooks_pending") == _query(engine, func.count(), where=events.c.due_at.is_not(None))
    delivered = events.c.status == "delivered"
    assert metrics.value("webhooks_ended_total", "delivered") == _query(engine, func.count(), where=delivered)[()]
    assert metrics.all("claims") == metrics.all("claims_stuck") == {}


def test_counters_do_not_decrease_when_rows_are_removed(worker_kit: Kit, engine: Engine) -> None:
    """They are counted when it happens, not from the remaining rows."""
    _run_jobs(worker_kit)
    before = scrape(engine, worker_kit.worker.settings)
    with engine.begin() as connection:
        for table in (events, outputs, jobs):
            connection.execute(delete(table))

    after = scrape(engine, worker_kit.worker.settings)

    counters = [name for name in before.samples if name.endswith(("_total", "_bucket", "_count", "_sum"))]
    assert len(counters) > 10
    assert {name: after.samples[name] for name in counters} == {name: before.samples[name] for name in counters}
    assert after.all("jobs") == after.all("jobs_unfinished") == after.all("outputs_unstored") == {}


def test_buckets_are_cumulative_and_end_with_the_total(engine: Engine) -> None:
    tally = Tally()
    for delay in (0.05, 0.3, 0.3, 7.0, 9e9):
        tally.delay("shop", "image", delay)
    with engine.begin() as connection:
        tally.write(connection)

    metrics = scrape(engine)

    buckets = [metrics.value("detection_delay_seconds_bucket", "shop", "image", repr(bound)) for bound in DELAYS]
    assert buckets == [1, 1, 3, 3, 3, 3, 3, 3, *[4] * (len(DELAYS) - 8)]
    assert metrics.value("detection_delay_seconds_bucket", "shop", "image", "+Inf") == 5
    assert metrics.value("detection_delay_seconds_sum", "shop", "image") == pytest.approx(9e9 + 7.65)
    assert len(metrics.samples["fetch_worker_detection_delay_seconds_bucket"]) == len(bucket_names(DELAYS))


def test_held_jobs_are_counted_separately_and_are_not_late(engine: Engine) -> None:
    """Also a downloading job that waits for fresh links."""
    with use_clock(lambda: NOW + seconds(30)), engine.begin() as connection:
        add_job(connection, "1", due_at=HELD_UNTIL, held_at=NOW)
        add_job(connection, "2", due_at=HELD_UNTIL, held_at=NOW, kind="video")
        add_downloading(connection, "3", due_at=HELD_UNTIL, held_at=NOW)
        add_downloading(connection, "4", due_at=NOW + seconds(60))
        add_job(connection, "5", due_at=NOW + seconds(60))
    with use_clock(lambda: NOW + seconds(30)):
        metrics = scrape(engine)

    assert metrics.all("jobs") == {("pending",): 1, ("held",): 2, ("downloading",): 2}
    assert metrics.all("jobs_unfinished") == {
        ("default", "image", "pending"): 1,
        ("default", "image", "held"): 1,
        ("default", "video", "held"): 1,
        ("default", "image", "downloading"): 2,
    }
    assert metrics.value("oldest_due_seconds") == 0
    assert metrics.all("jobs_due") == {}


def test_only_jobs_that_may_be_polled_are_late(engine: Engine) -> None:
    """By account. Jobs of a held account, of a held host and of an account without a key are not late."""
    with engine.begin() as connection:
        for account, host, late in (
            ("shop", "api.test", 5),
            ("shop", "away.test", 50),
            ("other", "api.test", 3),
            ("held", "api.test", 70),
            ("keyless", "api.test", 80),
        ):
            add_job(connection, host, account=account, fetch_host=host, due_at=NOW - seconds(late))
        for name in ("shop", "other"):
            locked_breaker(connection, "account", name)
        connection.execute(update(breakers).values(asked_at=NOW))
        save_breaker(connection, held_by_operator(locked_breaker(connection, "account", "held"), now=NOW - seconds(7)))
        add_process(connection, accounts={"shop": 10.0, "other": 10.0, "held": 10.0}, started_at=NOW, seen_at=NOW)
        away: dict[str, Any] = {"reason": "unreachable: no route", "since": NOW - seconds(9), "probe_at": NOW}
        connection.execute(insert(breakers).values(scope="host", name="away.test", **away))
    with use_clock(lambda: NOW):
        metrics = scrape(engine)

    assert metrics.value("oldest_due_seconds") == 5
    assert metrics.all("account_oldest_due_seconds") == {("shop",): 5, ("other",): 3}
    assert metrics.all("jobs_due") == {("shop",): 2, ("other",): 1, ("held",): 1, ("keyless",): 1}
    assert metrics.all("hold") == {  # the labels are name, reason, scope
        ("held", "by hand", "account"): 1,
        ("keyless", "no key", "account"): 1,
        ("away.test", "unreachable", "host"): 1,
    }
    assert metrics.value("hold_since_timestamp_seconds", "held", "by hand", "account") == NOW.timestamp() - 7
    assert metrics.value("hold_since_timestamp_seconds", "keyless", "no key", "account") == NOW.timestamp() - 80


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("key rejected: Invalid Api Key sk-123", "key rejected"),
        ("no credits: buy some", "no credits"),
        ("plan: requires a subscription", "plan"),
        ("request refused: Invalid Api Request", "request refused"),
        ("rate limited", "rate limited"),
        ("a new message", "other"),
    ],
)
def test_hold_labels_contain_no_text_of_the_api(message: str, reason: str, engine: Engine) -> None:
    """So the number of labels is limited, and no text from outside becomes a label."""
    with engine.begin() as connection:
        held = {"scope": "account", "name": "shop", "reason": message, "since": NOW, "probe_at": NOW, "asked_at": NOW}
        connection.execute(insert(breakers).values(held))
    with use_clock(lambda: NOW):
        metrics = scrape(engine)

    assert metrics.all("hold") == {("shop", reason, "account"): 1}


def test_the_current_and_the_learned_rate_limits_are_shown(engine: Engine) -> None:
    with engine.begin() as connection:
        locked_breaker(connection, "account", "free")
        locked_breaker(connection, "account", "slowed")
        slowed = update(breakers).where(breakers.c.name == "slowed")
        connection.execute(slowed.values(ceiling=4.0, cut_at=NOW))
    with use_clock(lambda: NOW):
        metrics = scrape(engine)

    assert metrics.all("budget_configured_requests_per_second") == {("free",): 10, ("slowed",): 10}
    assert metrics.all("budget_requests_per_second") == {("free",): 10, ("slowed",): pytest.approx(1.9)}
    assert metrics.all("budget_ceiling_requests_per_second") == {("slowed",): 4}


def test_claims_are_counted_and_stuck_claims_separately(engine: Engine) -> None:
    with engine.begin() as connection:
        add_job(connection)
        first = add_output(connection, add_downloading(connection, "2"))
        second = add_output(connection, add_downloading(connection, "3"))
        claim_due_jobs(connection)
        assert try_claim_output(connection, first) is not None
        long_ago = NOW - seconds(500)
        connection.execute(update(outputs).where(outputs.c.id == second).values(due_at=long_ago))
        lease = timedelta(seconds=30)
        assert claim_output(connection, second, token="t", holder="gone", lease=lease, now=long_ago)
    with use_clock(lambda: NOW):
        metrics = scrape(engine)

    assert metrics.all("claims") == {("job",): 1, ("output",): 2}
    assert metrics.value("claims_stuck") == 1


def test_pending_refused_and_late_webhooks_are_counted_separately(engine: Engine) -> None:
    with engine.begin() as connection:
        job_id = add_job(connection)
        whole: dict[str, Any] = {
            "job_id": job_id,
            "type": "job.failed",
            "url": "https://app.test/",
            "body": "{}",
            "created_at": NOW,
        }
        rows: list[dict[str, Any]] = [
            {"due_at": NOW, "status": "pending", "ended_at": None, "error_message": None},
            {"due_at": NOW, "status": "pending", "ended_at": None, "error_message": "HTTP 500"},
            {"due_at": NOW - seconds(61), "status": "pending", "ended_at": None, "error_message": None},
            {"due_at": None, "status": "delivered", "ended_at": NOW, "error_message": None},
        ]
        connection.execute(insert(events), [whole | row | {"event_id": str(at)} for at, row in enumerate(rows)])
    with use_clock(lambda: NOW):
        metrics = scrape(engine)

    counts = [metrics.value(f"webhooks_{name}") for name in ("pending", "refused", "late")]
    assert counts == [3, 1, 1]


def test_kinds_beyond_the_limit_are_counted_together() -> None:
    """Like the counters, so that one kind per job does not create endless labels."""
    counts = Counter({("shop", f"kind-{number:03}", "pending"): 1 for number in range(KINDS_MOST + 20)})

    limited = limit_kinds(counts, {"kind-215", "kind-216"})

    assert len(limited) == KINDS_MOST + 1
    assert limited["shop", "other", "pending"] == 20
    assert limited["shop", "kind-215", "pending"] == 1


def test_with_very_many_jobs_the_kinds_are_not_counted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The totals stay correct."""
    monkeypatch.setattr(stats, "KINDS_COUNTED", 3)
    with engine.begin() as connection:
        rows = [job_values(str(number), kind=f"kind-{number}") for number in range(4)]
        connection.execute(insert(jobs), rows)
        add_downloading(connection, "ready", kind="video", due_at=NOW)

    metrics = scrape(engine)

    assert metrics.all("jobs_unfinished") == {
        ("default", "other", "pending"): 4,
        ("default", "video", "downloading"): 1,
    }
    assert metrics.all("jobs") == {("pending",): 4, ("downloading",): 1}


def test_tables_of_an_older_version_are_not_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their columns may have another meaning."""
    monkeypatch.setattr(figures, "SCHEMA_VERSION", "9999")
    with pytest.raises(worker.SchemaOutdated):
        scrape(engine)
