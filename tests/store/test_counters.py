"""Counters: increased in the transaction of the change, summed over processes, with a limited number of rows."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, func, select

from tests.rows import NOW, add_downloading, add_job, add_output, claim_due_jobs, claim_one_output, seconds
from worker.core.lifecycle import AskAgain, EndJob, StartDownloads, StoredFile, Strikes, TryAgain
from worker.core.media.signatures import Media
from worker.core.reply import Link
from worker.store import counters as module
from worker.store.counters import KINDS_MOST, OTHER, CounterKey, Tally, read_counters
from worker.store.jobs import cancel
from worker.store.results import Outcome, record_answers, record_attempt
from worker.store.schema import counters

SOON = NOW + seconds(1)
FILE = StoredFile("file:///out/0.png", 42, "ab" * 32, Media("image/png", "png"))


@pytest.fixture(autouse=True)
def _forget_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_kinds_by_url", {})


def _read_counters(engine: Engine) -> dict[CounterKey, tuple[int, float]]:
    with engine.connect() as connection:
        return {total.key: (total.times, total.total) for total in read_counters(connection)}


def test_counts_of_concurrent_transactions_add_up(engine: Engine) -> None:
    """Each writes several counters in any order. No count is lost, and there is no deadlock."""

    def count(number: int) -> None:
        tally = Tally()
        for label in ("processing", "ready") if number % 2 else ("ready", "processing"):
            tally.add("answers", label, account="shop", value=0.5)
        tally.delay("shop", "image", 0.7)
        with engine.begin() as connection:
            tally.write(connection)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(count, range(200)))

    assert _read_counters(engine) == {
        CounterKey("answers", "shop", "", "processing"): (200, 100.0),
        CounterKey("answers", "shop", "", "ready"): (200, 100.0),
        CounterKey("delay", "shop", "image", "1"): (200, pytest.approx(140.0)),
    }


def test_a_rolled_back_transaction_counts_nothing(engine: Engine) -> None:
    tally = Tally()
    tally.finished("default", "image", "completed")
    with engine.connect() as connection:
        tally.write(connection)
        connection.rollback()

    assert _read_counters(engine) == {}


def test_kinds_above_the_limit_are_counted_together(engine: Engine) -> None:
    """Each kind needs a dozen rows, so an app with a new kind per job would fill the table."""
    for start in (0, KINDS_MOST - 10):
        tally = Tally()
        for number in range(start, start + 20):
            tally.finished("default", f"kind-{number}", "completed")
            if start:
                module._kinds_by_url.clear()  # as in a new process, which reads the kinds from the table
        with engine.begin() as connection:
            tally.write(connection)
    tally = Tally()
    for number in range(KINDS_MOST + 50):
        tally.finished("default", f"late-{number}", "completed")
    with engine.begin() as connection:
        tally.write(connection)
        kinds = connection.execute(select(func.count(counters.c.kind.distinct()))).scalar_one()

    assert kinds == KINDS_MOST + 1
    assert _read_counters(engine)[CounterKey("finished", "default", OTHER, "completed")][0] == 90


def test_answers_count_their_results_and_lost_claims_count_nothing(engine: Engine) -> None:
    """A ready job counts its delay and its polls, an ended job its polls and its state."""
    tally = Tally()
    with engine.begin() as connection:
        for remote_id in ("ready", "failed", "again", "lost"):
            add_job(connection, remote_id, kind=remote_id)
        claimed = {job.remote_id: job for job in claim_due_jobs(connection)}
        batch = [
            Outcome(claimed["ready"], StartDownloads((Link("https://cdn.test/0.png"),)), "ready", delay=0.7),
            Outcome(claimed["failed"], EndJob("failed", "api_failed", "no"), "failed"),
            Outcome(claimed["again"], AskAgain(Strikes(), "processing"), "processing"),
            Outcome(claimed["lost"]._replace(token="other"), EndJob("failed", "api_failed", "no"), "failed"),
        ]
        record_answers(connection, batch, tally, now=SOON)
        tally.write(connection)

    assert _read_counters(engine) == {
        CounterKey("delay", "default", "ready", "1"): (1, 0.7),
        CounterKey("polls", "default", "ready", "1"): (1, 1.0),
        CounterKey("polls", "default", "failed", "1"): (1, 1.0),
        CounterKey("finished", "default", "failed", "failed"): (1, 0.0),
    }


def test_downloads_count_their_bytes_and_the_job_that_they_end(engine: Engine) -> None:
    """One failed attempt, then one that stores the file, and the job is final."""
    with engine.begin() as connection:
        job_id = add_downloading(connection)
        output_id = add_output(connection, job_id)
        first = claim_one_output(connection, output_id, now=NOW)
        record_attempt(connection, first, TryAgain(0.0, "http_error", "HTTP 500"), now=NOW + seconds(2))
        second = claim_one_output(connection, output_id, now=NOW + seconds(3))
        record_attempt(connection, second, FILE, now=NOW + seconds(3.4))
        record_attempt(connection, second, FILE, now=NOW + seconds(3.5))  # too late: the claim is lost

    assert _read_counters(engine) == {
        CounterKey("attempts", "", "", "http_error"): (1, 0.0),
        CounterKey("attempts", "", "", "stored"): (1, 42.0),
        CounterKey("transfer", "", "", "0.5"): (1, pytest.approx(0.4)),
        CounterKey("finished", "default", "image", "completed"): (1, 0.0),
    }


def test_a_cancelled_job_counts_once(engine: Engine) -> None:
    tally = Tally()
    with engine.begin() as connection:
        job_id = add_job(connection)
        for _ in range(2):
            cancel(connection, job_id, tally, now=SOON)
        tally.write(connection)

    assert _read_counters(engine) == {CounterKey("finished", "default", "image", "cancelled"): (1, 0.0)}
