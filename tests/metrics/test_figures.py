"""Every figure is what the rows say, on every database, after whole lives of jobs; and no counter ever goes down."""

from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, delete, func, insert, select, update

import worker
from tests.metrics.exposed import scraped
from tests.rows import NOW, add_downloading, add_job, add_output, claim_due_jobs, job_values, seconds, try_claim_output
from worker.core.circuit_breaker import held_by_operator
from worker.core.histograms import DELAYS, bucket_names
from worker.metrics import reading
from worker.metrics.reading import bounded
from worker.store.breakers import locked_breaker, save_breaker
from worker.store.claims import claim_output
from worker.store.counters import KINDS_MOST, Tally
from worker.store.engine import use_clock
from worker.store.reports import stats
from worker.store.schema import HELD_UNTIL, breakers, events, jobs, outputs
from worker.testing import Kit, kit

FINAL = ("completed", "failed", "expired", "cancelled")


@pytest.fixture
def made(tmp_path: Path, engine: Engine) -> Iterator[Kit]:
    """A worker and a stand-in of the API on this database, on a clock that a test moves."""
    with kit(tmp_path / "kit", database=engine) as made:
        yield made


def _live(made: Kit) -> None:
    """Jobs of two kinds, of every end there is, and some that have none yet."""
    api = made.api
    api.answers("1").processing(3).success(2)
    api.answers("2").success()
    api.answers("3").processing().failed("out of paint", times=2)
    api.answers("4").rate_limited(20).success()
    api.answers("5").body(b"<html>").unavailable().not_found(times=5)
    api.answers("6").processing_for(9_999)
    api.answers("7").success(["http://127.0.0.1:1/nobody.png"])
    api.answers("8").error("nothing", times=9)
    for number in range(1, 9):
        kind = "video" if number % 2 else "image"
        worker.track(str(number), kind=kind, deadline=60 if number == 6 else 9_999, webhook_url="https://app.test/")
    cancelled = worker.track("9", kind="image")
    worker.cancel(cancelled)
    made.worker.advance(900)
    api.answers("10").processing_for(9_999)
    worker.track("10", kind="video", deadline=9_999)
    made.worker.advance(40)


def _counted(engine: Engine, *columns: Any, where: Any = None) -> dict[tuple[str, ...], float]:
    *by, figure = columns
    query = select(*by, figure).group_by(*by)
    with engine.connect() as connection:
        found = connection.execute(query if where is None else query.where(where)).all()
    return {tuple(row[:-1]): float(row[-1]) for row in found if row[-1]}


def test_after_whole_lives_of_jobs_every_figure_is_what_the_rows_say(made: Kit, engine: Engine) -> None:
    _live(made)
    with engine.begin() as connection:
        add_job(connection, "11", kind="image", due_at=HELD_UNTIL, held_at=NOW)

    said = scraped(engine, made.worker.settings)

    held = jobs.c.held_at.is_not(None)
    by = (jobs.c.account, jobs.c.kind, jobs.c.status)
    rows = _counted(engine, jobs.c.status, func.count(), where=~held)
    assert said.all("jobs") == rows | {("held",): 1.0}
    assert {status for (status,) in rows} == {"pending", "downloading", *FINAL}
    unfinished = _counted(engine, *by, func.count(), where=jobs.c.completed_at.is_(None) & ~held)
    assert said.all("jobs_unfinished") == unfinished | {("default", "image", "held"): 1.0}
    finished = jobs.c.completed_at.is_not(None)
    assert said.all("jobs_finished_total") == _counted(engine, *by, func.count(), where=finished)

    ready = jobs.c.ready_at.is_not(None)
    assert said.all("detection_delay_seconds_count") == _counted(engine, *by[:2], func.count(), where=ready)
    asked = (ready | finished) & (jobs.c.polls > 0)
    assert said.all("job_polls_count") == _counted(engine, *by[:2], func.count(), where=asked)
    assert said.all("job_polls_sum") == _counted(engine, *by[:2], func.sum(jobs.c.polls), where=asked)

    answers = said.all("api_answers_total")
    assert sum(answers.values()) == sum(made.api.calls.fetches.values())
    assert sum(answers.values()) == _counted(engine, jobs.c.account, func.sum(jobs.c.polls))[("default",)]
    classes = {answer: count for (_, answer), count in answers.items()}
    assert classes["processing"] == made.api.calls.fetch_answers["processing"]
    assert classes["ready"] == made.api.calls.fetch_answers["success"]
    assert {"rate_limited", "odd", "unreachable", "unknown_id", "failed", "api_error"} <= set(classes)

    stored = outputs.c.status == "stored"
    attempts = said.all("download_attempts_total")
    assert sum(attempts.values()) == _counted(engine, func.sum(outputs.c.attempts))[()]
    assert attempts[("stored",)] == _counted(engine, func.count(), where=stored)[()]
    assert said.value("download_duration_seconds_count") == attempts[("stored",)]
    assert said.value("stored_bytes_total") == _counted(engine, func.sum(outputs.c.size_bytes), where=stored)[()]
    unstored = outputs.c.due_at.is_not(None)
    assert said.all("outputs_unstored") == _counted(engine, outputs.c.error_code, func.count(), where=unstored)
    assert said.all("webhooks_pending") == _counted(engine, func.count(), where=events.c.due_at.is_not(None))
    delivered = events.c.status == "delivered"
    assert said.value("webhooks_ended_total", "delivered") == _counted(engine, func.count(), where=delivered)[()]
    assert said.all("claims") == said.all("claims_stuck") == {}


def test_counters_do_not_go_down_when_rows_go(made: Kit, engine: Engine) -> None:
    """They are counted where it happens, not from what is left."""
    _live(made)
    before = scraped(engine, made.worker.settings)
    with engine.begin() as connection:
        for table in (events, outputs, jobs):
            connection.execute(delete(table))

    after = scraped(engine, made.worker.settings)

    counters = [name for name in before.samples if name.endswith(("_total", "_bucket", "_count", "_sum"))]
    assert len(counters) > 10
    assert {name: after.samples[name] for name in counters} == {name: before.samples[name] for name in counters}
    assert after.all("jobs") == after.all("jobs_unfinished") == after.all("outputs_unstored") == {}


def test_buckets_are_cumulative_and_end_with_all(engine: Engine) -> None:
    tally = Tally()
    for delay in (0.05, 0.3, 0.3, 7.0, 9e9):
        tally.delay("shop", "image", delay)
    with engine.begin() as connection:
        tally.write(connection)

    said = scraped(engine)

    found = [said.value("detection_delay_seconds_bucket", "shop", "image", repr(bound)) for bound in DELAYS]
    assert found == [1, 1, 3, 3, 3, 3, 3, 3, *[4] * (len(DELAYS) - 8)]
    assert said.value("detection_delay_seconds_bucket", "shop", "image", "+Inf") == 5
    assert said.value("detection_delay_seconds_sum", "shop", "image") == pytest.approx(9e9 + 7.65)
    assert len(said.samples["fetch_worker_detection_delay_seconds_bucket"]) == len(bucket_names(DELAYS))


def test_held_jobs_are_told_apart_and_make_nothing_late(engine: Engine) -> None:
    """Also where the job is downloading, and was to be asked for fresh links."""
    with use_clock(lambda: NOW + seconds(30)), engine.begin() as connection:
        add_job(connection, "1", due_at=HELD_UNTIL, held_at=NOW)
        add_job(connection, "2", due_at=HELD_UNTIL, held_at=NOW, kind="video")
        add_downloading(connection, "3", due_at=HELD_UNTIL, held_at=NOW)
        add_downloading(connection, "4", due_at=NOW + seconds(60))
        add_job(connection, "5", due_at=NOW + seconds(60))
    with use_clock(lambda: NOW + seconds(30)):
        said = scraped(engine)

    assert said.all("jobs") == {("pending",): 1, ("held",): 2, ("downloading",): 2}
    assert said.all("jobs_unfinished") == {
        ("default", "image", "pending"): 1,
        ("default", "image", "held"): 1,
        ("default", "video", "held"): 1,
        ("default", "image", "downloading"): 2,
    }
    assert said.value("oldest_due_seconds") == 0
    assert said.all("jobs_due") == {}


def test_lateness_is_of_what_may_be_asked_about(engine: Engine) -> None:
    """By account; a held account, a held host and an account without a key are no work that could be done."""
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
        away: dict[str, Any] = {"reason": "unreachable: no route", "since": NOW - seconds(9), "probe_at": NOW}
        connection.execute(insert(breakers).values(scope="host", name="away.test", **away))
    with use_clock(lambda: NOW):
        said = scraped(engine)

    assert said.value("oldest_due_seconds") == 5
    assert said.all("account_oldest_due_seconds") == {("shop",): 5, ("other",): 3}
    assert said.all("jobs_due") == {("shop",): 2, ("other",): 1, ("held",): 1, ("keyless",): 1}
    assert said.all("hold") == {  # the labels are name, reason, scope
        ("held", "by hand", "account"): 1,
        ("keyless", "no key", "account"): 1,
        ("away.test", "unreachable", "host"): 1,
    }
    assert said.value("hold_since_timestamp_seconds", "held", "by hand", "account") == NOW.timestamp() - 7
    assert said.value("hold_since_timestamp_seconds", "keyless", "no key", "account") == NOW.timestamp() - 80


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("key rejected: Invalid Api Key sk-123", "key rejected"),
        ("no credits: buy some", "no credits"),
        ("plan: requires a subscription", "plan"),
        ("request refused: Invalid Api Request", "request refused"),
        ("rate limited", "rate limited"),
        ("whatever comes next", "other"),
    ],
)
def test_holds_say_no_word_of_the_api(words: str, reason: str, engine: Engine) -> None:
    """So that there are few of them, and nothing from outside becomes a label."""
    with engine.begin() as connection:
        held = {"scope": "account", "name": "shop", "reason": words, "since": NOW, "probe_at": NOW, "asked_at": NOW}
        connection.execute(insert(breakers).values(held))
    with use_clock(lambda: NOW):
        said = scraped(engine)

    assert said.all("hold") == {("shop", reason, "account"): 1}


def test_the_budget_in_force_and_what_was_learned_are_told(engine: Engine) -> None:
    with engine.begin() as connection:
        locked_breaker(connection, "account", "free")
        locked_breaker(connection, "account", "slowed")
        slowed = update(breakers).where(breakers.c.name == "slowed")
        connection.execute(slowed.values(ceiling=4.0, cut_at=NOW))
    with use_clock(lambda: NOW):
        said = scraped(engine)

    assert said.all("budget_configured_requests_per_second") == {("free",): 10, ("slowed",): 10}
    assert said.all("budget_requests_per_second") == {("free",): 10, ("slowed",): pytest.approx(1.9)}
    assert said.all("budget_ceiling_requests_per_second") == {("slowed",): 4}


def test_claims_are_counted_and_those_of_the_dead_stand_out(engine: Engine) -> None:
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
        said = scraped(engine)

    assert said.all("claims") == {("job",): 1, ("output",): 2}
    assert said.value("claims_stuck") == 1


def test_webhooks_that_wait_are_refused_or_late_are_told_apart(engine: Engine) -> None:
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
        said = scraped(engine)

    figures = [said.value(f"webhooks_{name}") for name in ("pending", "refused", "late")]
    assert figures == [3, 1, 1]


def test_kinds_beyond_the_bound_are_told_together() -> None:
    """As the totals count them, so that a kind of its own for each job makes no endless list."""
    counts = Counter({("shop", f"kind-{number:03}", "pending"): 1 for number in range(KINDS_MOST + 20)})

    found = bounded(counts, {"kind-215", "kind-216"})

    assert len(found) == KINDS_MOST + 1
    assert found["shop", "other", "pending"] == 20
    assert found["shop", "kind-215", "pending"] == 1


def test_where_very_much_waits_its_kinds_are_not_told(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums stay what they are."""
    monkeypatch.setattr(stats, "KINDS_COUNTED", 3)
    with engine.begin() as connection:
        rows = [job_values(str(number), kind=f"kind-{number}") for number in range(4)]
        connection.execute(insert(jobs), rows)
        add_downloading(connection, "ready", kind="video", due_at=NOW)

    said = scraped(engine)

    assert said.all("jobs_unfinished") == {
        ("default", "other", "pending"): 4,
        ("default", "video", "downloading"): 1,
    }
    assert said.all("jobs") == {("pending",): 4, ("downloading",): 1}


def test_tables_of_an_older_version_are_not_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """They might say something else."""
    monkeypatch.setattr(reading, "SCHEMA_VERSION", "9999")
    with pytest.raises(worker.SchemaOutdated):
        scraped(engine)
