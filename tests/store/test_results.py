"""Results of polls and download attempts on real databases: every step, every result, and how jobs end."""

import json
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event, insert, select

from tests.rows import (
    NOW,
    add_downloading,
    add_job,
    add_output,
    claim_due_jobs,
    claim_one_output,
    job_values,
    read_job,
    read_output,
    seconds,
)
from worker.core.answer_history import format_note
from worker.core.lifecycle import (
    AskAgain,
    EndJob,
    GiveUp,
    JobDecision,
    KeepLinks,
    RenewLinks,
    StartDownloads,
    StoredFile,
    Strikes,
    TryAgain,
)
from worker.core.media.signatures import Media
from worker.core.pacing.policy import PollPlan
from worker.core.reply import Link
from worker.store.claims import ClaimedJob
from worker.store.counters import LEFT_OUT, Tally, read_counters
from worker.store.jobs import cancel, retry
from worker.store.promises import add_promises
from worker.store.results import RENEWAL_WAIT, Outcome, Recorded, quarantine, record_answers, record_attempt
from worker.store.schema import bodies, jobs, outputs, promises

SOON = NOW + seconds(1)
FILE = StoredFile("file:///out/0.png", 42, "ab" * 32, Media("image/png", "png"))


def _record(
    connection: Connection, job: ClaimedJob, step: JobDecision, *, wait: float = 0.0, note: str = "note"
) -> Recorded:
    return record_answers(connection, [Outcome(job, step, note, PollPlan(wait))], Tally(), now=SOON)


# ── answers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_rescheduled_job_is_released_and_keeps_its_strikes(engine: Engine) -> None:
    """It is due after the wait."""
    strikes = Strikes(failed=1, unknown=2, error=3, empty=4, last=NOW)
    with engine.begin() as connection:
        job_id = add_job(connection)
        [claimed] = claim_due_jobs(connection)
        recorded = _record(connection, claimed, AskAgain(strikes, "processing"), wait=7.5, note="processing")

    row = read_job(engine, job_id)
    assert recorded == Recorded((), (), 0)
    assert (row.status, row.due_at, row.claim_token, row.claim_holder) == ("pending", SOON + seconds(7.5), None, None)
    assert (row.failed_answers, row.unknown_answers, row.error_answers, row.empty_answers) == (1, 2, 3, 4)
    assert (row.struck_at, row.last_answer) == (
        NOW,
        format_note((SOON - row.submitted_at).total_seconds(), "processing"),
    )


def test_a_ready_job_gets_output_rows_in_order_and_the_bytes_in_the_answer(engine: Engine) -> None:
    """The rows are written with the change, and queued after the commit."""
    links = (Link("https://cdn/a.png", ("https://proxy/a.png",)), Link("data:;sha256=00", (), b"bytes"))
    with engine.begin() as connection:
        job_id = add_job(connection)
        [claimed] = claim_due_jobs(connection)
        recorded = _record(connection, claimed, StartDownloads(links))

    row = read_job(engine, job_id)
    assert (row.status, row.ready_at, row.due_at, row.completed_at) == ("downloading", SOON, None, None)
    assert recorded.finished == ()
    with engine.connect() as connection:
        rows = connection.execute(select(outputs).order_by(outputs.c.position)).all()
        body_rows = connection.execute(select(bodies)).all()
    assert tuple(output.id for output in rows) == recorded.outputs
    assert [(output.position, output.url, json.loads(output.proxy_urls)) for output in rows] == [
        (0, "https://cdn/a.png", ["https://proxy/a.png"]),
        (1, "data:;sha256=00", []),
    ]
    assert {(output.status, output.due_at, output.queued_at, output.listed_at) for output in rows} == {
        ("pending", SOON, SOON, SOON)
    }
    assert [tuple(row) for row in body_rows] == [(rows[1].id, b"bytes")]


def test_a_ready_job_without_outputs_is_completed_at_once(engine: Engine) -> None:
    """A trained model has no outputs to download."""
    with engine.begin() as connection:
        job_id = add_job(connection)
        [claimed] = claim_due_jobs(connection)
        recorded = _record(connection, claimed, StartDownloads(()))
    row = read_job(engine, job_id)
    assert recorded.finished == (job_id,)
    assert (row.status, row.ready_at, row.completed_at, row.due_at) == ("completed", SOON, SOON, None)


def test_given_too_many_outputs_when_recorded_then_the_job_has_a_message_and_they_are_counted(
    engine: Engine,
) -> None:
    tally = Tally()
    with engine.begin() as connection:
        job_ids = [add_job(connection), add_job(connection, remote_id="12202889")]
        steps = [
            StartDownloads((Link("https://cdn/a.png"),), left_out=499),
            StartDownloads((Link("https://cdn/b.png"),)),
        ]
        outcomes = [Outcome(job, step, "note") for job, step in zip(claim_due_jobs(connection), steps, strict=True)]
        record_answers(connection, outcomes, tally, now=SOON)
        tally.write(connection)
    with engine.begin() as connection:
        for output in connection.execute(select(outputs)).all():
            record_attempt(connection, claim_one_output(connection, output.id, now=SOON), FILE, now=SOON)

    rows = {outcome.job.id: read_job(engine, outcome.job.id) for outcome in outcomes}
    note = "the answer listed 500 outputs; only the first 1 are stored"
    assert [(row.status, row.error_code, row.error_message) for row in rows.values()] == [
        ("completed", None, note),
        ("completed", None, None),
    ]
    assert set(job_ids) == set(rows)
    with engine.connect() as connection:
        assert [total.times for total in read_counters(connection, [LEFT_OUT])] == [499]


@pytest.mark.parametrize(("status", "code"), [("failed", "api_failed"), ("expired", "expired")])
def test_an_ended_job_has_a_reason_and_an_end_time(engine: Engine, status: str, code: str) -> None:
    """It has no due time and no claim, but a code and a message."""
    step = EndJob("failed", code, "because") if status == "failed" else EndJob("expired", code, "because")
    with engine.begin() as connection:
        job_id = add_job(connection)
        [claimed] = claim_due_jobs(connection)
        assert _record(connection, claimed, step).finished == (job_id,)
    row = read_job(engine, job_id)
    assert (row.status, row.error_code, row.error_message, row.completed_at) == (status, code, "because", SOON)
    assert (row.due_at, row.claim_token) == (None, None)


def test_the_first_end_is_kept(engine: Engine) -> None:
    """An answer that arrives after a cancel changes nothing."""
    with engine.begin() as connection:
        job_id = add_job(connection)
        [claimed] = claim_due_jobs(connection)
        assert cancel(connection, job_id, Tally(), now=NOW)
        assert _record(connection, claimed, StartDownloads((Link("https://cdn/a.png"),))) == Recorded((), (), 1)
        assert _record(connection, claimed, EndJob("failed", "api_failed", "late")).lost == 1
        assert _record(connection, claimed, AskAgain(Strikes(), "processing")).lost == 1
    assert read_job(engine, job_id).status == "cancelled"
    with engine.connect() as connection:
        assert connection.execute(select(outputs)).all() == []


def test_a_mixed_batch_is_written_in_one_transaction_and_counts_lost_claims(engine: Engine) -> None:
    """An answer whose claim was lost does not affect the others."""
    with engine.begin() as connection:
        for number in range(4):
            add_job(connection, str(number))
        again, ready, over, lost = sorted(claim_due_jobs(connection), key=lambda job: job.id)
        cancel(connection, lost.id, Tally(), now=NOW)
        recorded = record_answers(
            connection,
            [
                Outcome(lost, AskAgain(Strikes(), "processing"), "processing", PollPlan(1.0)),
                Outcome(over, EndJob("failed", "not_found", "unknown"), "unknown", PollPlan(0.0)),
                Outcome(ready, StartDownloads((Link("https://cdn/a.png"),)), "ready"),
                Outcome(again, AskAgain(Strikes(), "processing"), "processing", PollPlan(2.0)),
            ],
            Tally(),
            now=SOON,
        )
    assert (len(recorded.outputs), recorded.finished, recorded.lost) == (1, (over.id,), 1)
    states = [read_job(engine, job.id).status for job in (again, ready, over, lost)]
    assert states == ["pending", "downloading", "failed", "cancelled"]


@pytest.mark.parametrize("engine", ["postgresql"], indirect=True)
def test_a_large_batch_takes_few_statements_and_keeps_every_microsecond(engine: Engine) -> None:
    """One statement per kind of step for any number of answers. Times are stored exactly."""
    statements: list[str] = []
    odd = NOW.replace(microsecond=123_457)
    with engine.begin() as connection:
        connection.execute(jobs.insert(), [job_values(str(number)) for number in range(400)])
        claimed = claim_due_jobs(connection, limit=400)
        steps: list[JobDecision] = [
            AskAgain(Strikes(), "processing"),
            AskAgain(Strikes(unknown=1, last=NOW), "unknown"),
            StartDownloads((Link("https://cdn/a.png"), Link("https://cdn/b.png"))),
            StartDownloads(()),
            EndJob("failed", "api_failed", "because"),
        ]
        batch = [Outcome(job, steps[number % 5], "note", PollPlan(1.5)) for number, job in enumerate(claimed)]
        event.listen(connection, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))
        recorded = record_answers(connection, batch, Tally(), now=odd)

    assert len(statements) <= 6
    assert (len(recorded.outputs), len(recorded.finished), recorded.lost) == (160, 160, 0)
    with engine.connect() as connection:
        waiting = connection.execute(select(jobs.c.due_at, jobs.c.asked_at).where(jobs.c.status == "pending")).all()
    assert {tuple(row) for row in waiting} == {(odd + seconds(1.5), odd)}
    assert len(waiting) == 160


def test_a_very_long_answer_is_shortened(engine: Engine) -> None:
    """The note fits into its column on every database."""
    with engine.begin() as connection:
        job_id = add_job(connection)
        [claimed] = claim_due_jobs(connection)
        _record(connection, claimed, AskAgain(Strikes(), "x"), note="x" * 5_000)
    assert len(read_job(engine, job_id).last_answer) == 600


def test_fresh_links_replace_those_of_waiting_outputs_and_make_them_due(engine: Engine) -> None:
    """By position. Stored outputs and running downloads do not change."""
    with engine.begin() as connection:
        job_id = add_downloading(connection, due_at=NOW)
        waits = add_output(connection, job_id, 1, renewed=True, due_at=NOW + RENEWAL_WAIT)
        under_way = add_output(connection, job_id, 2, renewed=True, claim_token="x", claim_holder="h")
        running = add_output(connection, job_id, 3, due_at=NOW + seconds(50))
        [claimed] = claim_due_jobs(connection)
        links = tuple(Link(f"https://fresh/{n}.png", (f"https://proxy/{n}.png",)) for n in range(4))
        recorded = _record(connection, claimed, RenewLinks(links))

    assert (recorded.outputs, recorded.finished, recorded.lost) == ((waits,), (), 0)
    row = read_output(engine, waits)
    assert (row.url, json.loads(row.proxy_urls), row.due_at, row.queued_at) == (
        "https://fresh/1.png",
        ["https://proxy/1.png"],
        SOON,
        SOON,
    )
    assert read_output(engine, under_way).url == f"https://cdn.test/{job_id}-2.png"
    assert read_output(engine, running).due_at == NOW + seconds(50)
    job = read_job(engine, job_id)
    assert (job.status, job.due_at, job.claim_token, job.polls) == ("downloading", None, None, 1)


def test_without_fresh_links_the_outputs_keep_their_links(engine: Engine) -> None:
    """Also if the new answer lists fewer outputs than the first one."""
    with engine.begin() as connection:
        job_id = add_downloading(connection, due_at=NOW)
        first = add_output(connection, job_id, 0, renewed=True, due_at=NOW + RENEWAL_WAIT)
        second = add_output(connection, job_id, 1, renewed=True, due_at=NOW + RENEWAL_WAIT)
        [claimed] = claim_due_jobs(connection)
        assert _record(connection, claimed, RenewLinks((Link("https://fresh/0.png"),))).outputs == (first, second)
    assert read_output(engine, first).url == "https://fresh/0.png"
    assert read_output(engine, second).url == f"https://cdn.test/{job_id}-1.png"
    assert read_output(engine, second).due_at == SOON

    with engine.begin() as connection:
        other_job = add_downloading(connection, "2", due_at=NOW)
        other_output = add_output(connection, other_job, 0, renewed=True, due_at=NOW + RENEWAL_WAIT)
        [claimed] = claim_due_jobs(connection)
        assert _record(connection, claimed, KeepLinks("processing")).outputs == (other_output,)
    assert (read_output(engine, other_output).due_at, read_job(engine, other_job).due_at) == (SOON, None)


def test_given_a_fresh_link_to_another_kind_of_media_then_all_links_of_the_job_are_kept(engine: Engine) -> None:
    with engine.begin() as connection:
        sound, picture = (add_downloading(connection, name, due_at=NOW) for name in ("1", "2"))
        waiting = {"renewed": True, "due_at": NOW + RENEWAL_WAIT}
        links = ("https://cdn/0", "https://cdn/1.wav")
        voice = [add_output(connection, sound, place, url=link, **waiting) for place, link in enumerate(links)]
        add_output(connection, picture, 0, url="https://cdn/0.png", **waiting)
        outcomes = [
            Outcome(job, RenewLinks((Link("https://fresh/0.png"), Link("https://fresh/1.png"))), "ready")
            for job in claim_due_jobs(connection)
        ]
        recorded = record_answers(connection, outcomes, Tally(), now=SOON)

    with engine.connect() as connection:
        urls = connection.execute(select(outputs.c.url).order_by(outputs.c.id)).scalars().all()
    assert urls == ["https://cdn/0", "https://cdn/1.wav", "https://fresh/0.png"]
    assert len(recorded.outputs) == 3
    assert {read_output(engine, output_id).due_at for output_id in voice} == {SOON}


def _promised(job: ClaimedJob, step: JobDecision, *urls: str) -> Outcome:
    return Outcome(job, step, "note", promised=urls)


def test_given_a_lost_claim_when_its_answer_would_end_the_job_then_no_promised_link_is_tried(engine: Engine) -> None:
    end = EndJob("expired", "expired", "late")
    with engine.begin() as connection:
        job_id = add_job(connection)
        [claimed] = claim_due_jobs(connection)
        cancel(connection, job_id, Tally(), now=NOW)
        recorded = record_answers(connection, [_promised(claimed, end, "https://h/a.png")], Tally(), now=SOON)

    assert recorded == Recorded((), (), 1)
    with engine.connect() as connection:
        assert connection.execute(select(outputs)).all() == connection.execute(select(promises)).all() == []


def test_given_ready_jobs_then_only_their_promised_links_are_deleted(engine: Engine) -> None:
    """Otherwise the links would stay in the table as long as their job."""
    with engine.begin() as connection:
        ids = {name: add_job(connection, name) for name in ("ready", "trained", "waiting", "lost")}
        add_promises(connection, {job_id: ["https://h/a.png"] for job_id in ids.values()})
        claimed = {job.remote_id: job for job in claim_due_jobs(connection)}
        cancel(connection, ids["lost"], Tally(), now=NOW)
        ready, trained = StartDownloads((Link("https://cdn/0.png"),)), StartDownloads(())
        steps: dict[str, JobDecision] = {
            "ready": ready,
            "trained": trained,
            "waiting": AskAgain(Strikes(), "processing"),
            "lost": ready,
        }
        batch = [Outcome(claimed[name], step, "note", PollPlan(1.0)) for name, step in steps.items()]
        record_answers(connection, batch, Tally(), now=SOON)

    with engine.connect() as connection:
        remaining = set(connection.execute(select(promises.c.job_id)).scalars())
    assert remaining == {ids["waiting"], ids["lost"]}


def test_given_a_batch_of_all_kinds_of_ends_then_promised_links_are_tried_before_ends_without_an_output(
    engine: Engine,
) -> None:
    codes = ("not_found", "no_output", "api_failed", "api_error", "expired")
    with engine.begin() as connection:
        for code in codes:
            add_job(connection, code)
        claimed = {job.remote_id: job for job in claim_due_jobs(connection)}
        ends = [EndJob("expired" if code == "expired" else "failed", code, f"m {code}") for code in codes]
        batch = [_promised(claimed[end.code], end, f"https://h/{end.code}.png") for end in ends]
        recorded = record_answers(connection, batch, Tally(), now=SOON)

    with engine.connect() as connection:
        rows = {row.remote_id: row for row in connection.execute(select(jobs)).all()}
        kept_promises = {row.job_id: row for row in connection.execute(select(promises)).all()}
    assert {code: row.status for code, row in rows.items()} == {
        "not_found": "downloading", "no_output": "downloading", "expired": "downloading",
        "api_failed": "failed", "api_error": "failed",
    }  # fmt: skip
    assert len(recorded.outputs) == 3
    assert sorted(recorded.finished) == sorted(rows[code].id for code in ("api_failed", "api_error"))
    saved = kept_promises[rows["expired"].id]
    assert (saved.tried_at, saved.end_status, saved.end_code, saved.end_message) == (
        SOON, "expired", "expired", "m expired",
    )  # fmt: skip
    assert len(kept_promises) == 3


def test_a_job_whose_answer_can_not_be_written_fails(engine: Engine) -> None:
    """So it does not make every batch fail."""
    with engine.begin() as connection:
        job_id = add_job(connection)
        [claimed] = claim_due_jobs(connection)
        assert quarantine(connection, claimed, "can't be written", now=SOON)
        assert not quarantine(connection, claimed, "again", now=SOON)
    row = read_job(engine, job_id)
    assert (row.status, row.error_code, row.error_message) == ("failed", "unwritable", "can't be written")


# ── attempts ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stored_output_is_described_and_the_last_one_completes_its_job(engine: Engine) -> None:
    """With the first of two outputs, the job continues. The bytes that came with the answer are deleted."""
    with engine.begin() as connection:
        job_id = add_downloading(connection)
        first, second = add_output(connection, job_id, 0, error_code="http_error"), add_output(connection, job_id, 1)
        connection.execute(insert(bodies).values(output_id=first, body=b"bytes"))
        assert record_attempt(connection, claim_one_output(connection, first), FILE, now=SOON) == (True, None)
        assert connection.execute(select(bodies)).all() == []
    row = read_output(engine, first)
    assert (row.status, row.location, row.size_bytes, row.sha256, row.media_type, row.stored_at) == (
        "stored",
        "file:///out/0.png",
        42,
        "ab" * 32,
        "image/png",
        SOON,
    )
    assert (row.due_at, row.claim_token, row.error_code) == (None, None, None)
    assert read_job(engine, job_id).status == "downloading"

    with engine.begin() as connection:
        assert record_attempt(connection, claim_one_output(connection, second), FILE, now=SOON) == (True, "completed")
    job = read_job(engine, job_id)
    assert (job.status, job.completed_at, job.error_code) == ("completed", SOON, None)


def test_a_job_with_a_failed_output_fails_when_the_last_output_ends(engine: Engine) -> None:
    """Stored files are kept. The job's message has the number of missing files."""
    with engine.begin() as connection:
        job_id = add_downloading(connection)
        first, second = add_output(connection, job_id, 0), add_output(connection, job_id, 1)
        connection.execute(insert(bodies).values(output_id=first, body=b"bytes"))
        given_up = GiveUp("not_media", "a web page")
        assert record_attempt(connection, claim_one_output(connection, first), given_up, now=SOON) == (True, None)
        assert record_attempt(connection, claim_one_output(connection, second), FILE, now=SOON) == (True, "failed")
        assert connection.execute(select(bodies)).all() == []
    row, job = read_output(engine, first), read_job(engine, job_id)
    assert (row.status, row.error_code, row.error_message, row.due_at) == ("failed", "not_media", "a web page", None)
    assert (job.status, job.error_code, job.completed_at) == ("failed", "output_failed", SOON)
    assert "1 of 2" in job.error_message
    assert read_output(engine, second).status == "stored"


def test_an_attempt_recorded_twice_counts_once(engine: Engine) -> None:
    """The first success is kept; the second has no claim any more."""
    with engine.begin() as connection:
        output_id = add_output(connection, add_downloading(connection))
        claimed = claim_one_output(connection, output_id)
        assert record_attempt(connection, claimed, FILE, now=SOON) == (True, "completed")
        assert record_attempt(connection, claimed, GiveUp("gone", "late"), now=SOON) == (False, None)
    assert read_output(engine, output_id).status == "stored"


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (TryAgain(2.0, "not_media", "m"), {"bad_bodies": 1, "dead_since": None, "dead_attempts": 0}),
        (TryAgain(2.0, "truncated", "m"), {"bad_bodies": 1, "dead_since": None, "dead_attempts": 0}),
        (TryAgain(5.0, "gone", "m"), {"bad_bodies": 0, "dead_since": SOON, "dead_attempts": 0, "renewed": False}),
        (TryAgain(5.0, "http_error", "m"), {"bad_bodies": 0, "dead_since": None, "dead_attempts": 0}),
        (TryAgain(5.0, "unreachable", "m"), {"bad_bodies": 0, "dead_since": None, "dead_attempts": 0}),
        (TryAgain(15.0, "storage", "m"), {"bad_bodies": 0, "dead_since": None, "dead_attempts": 0}),
    ],
    ids=lambda value: value.code if isinstance(value, TryAgain) else "",
)
def test_an_output_after_a_failed_attempt_waits_with_its_last_code(
    engine: Engine, result: TryAgain, expected: dict[str, object]
) -> None:
    """It is pending and not claimed, and the failure is counted by its kind."""
    with engine.begin() as connection:
        job_id = add_downloading(connection)
        output_id = add_output(connection, job_id)
        assert record_attempt(connection, claim_one_output(connection, output_id), result, now=SOON) == (True, None)
    row = read_output(engine, output_id)
    assert (row.status, row.error_code, row.error_message) == ("pending", result.code, "m")
    assert (row.due_at, row.claim_token, row.queued_at) == (SOON + seconds(result.wait), None, None)
    assert {name: row._mapping[name] for name in expected} == expected
    assert read_job(engine, job_id).due_at is None


def test_a_dead_link_makes_its_job_due_for_one_more_poll_and_waits_for_the_answer(engine: Engine) -> None:
    """The output is not tried meanwhile. Later failures are counted."""
    with engine.begin() as connection:
        job_id = add_downloading(connection)
        output_id = add_output(connection, job_id, dead_since=NOW - seconds(61))
        renew = TryAgain(0.0, "gone", "HTTP 404", renew=True)
        assert record_attempt(connection, claim_one_output(connection, output_id), renew, now=SOON) == (True, None)
    row, job = read_output(engine, output_id), read_job(engine, job_id)
    assert (row.renewed, row.dead_attempts, row.due_at) == (True, 0, SOON + RENEWAL_WAIT)
    assert row.dead_since == NOW - seconds(61)
    assert (job.status, job.due_at) == ("downloading", SOON)

    with engine.begin() as connection:
        [claimed] = claim_due_jobs(connection, now=SOON)
        record_answers(
            connection, [Outcome(claimed, KeepLinks("processing"), "processing", PollPlan(0.0))], Tally(), now=SOON
        )
        again = claim_one_output(connection, output_id, now=SOON)
        assert again.facts.renewed
        record_attempt(connection, again, TryAgain(5.0, "gone", "HTTP 404"), now=SOON)
    assert read_output(engine, output_id).dead_attempts == 1


def test_an_output_of_a_cancelled_job_is_not_stored_any_more(engine: Engine) -> None:
    """The running download has lost its claim."""
    with engine.begin() as connection:
        job_id = add_downloading(connection)
        output_id = add_output(connection, job_id)
        claimed = claim_one_output(connection, output_id)
        cancel(connection, job_id, Tally(), now=SOON)
        assert record_attempt(connection, claimed, FILE, now=SOON) == (False, None)
    row = read_output(engine, output_id)
    assert (row.status, row.error_code) == ("failed", "cancelled")
    assert read_job(engine, job_id).status == "cancelled"


def test_two_threads_that_end_the_last_two_outputs_at_once_end_the_job_once(engine: Engine) -> None:
    """Neither may assume that the other output is still pending."""
    rounds = 10
    with engine.begin() as connection:
        pairs = []
        for number in range(rounds):
            job_id = add_downloading(connection, str(number))
            pairs.append((job_id, [claim_one_output(connection, add_output(connection, job_id, n)) for n in (0, 1)]))

    with ThreadPoolExecutor(2) as threads:
        for job_id, claimed in pairs:
            barrier = Barrier(2)

            def end(number: int, claimed=claimed, barrier=barrier) -> str | None:  # type: ignore[no-untyped-def]
                with engine.connect() as connection:
                    barrier.wait(5)
                    with connection.begin():
                        return record_attempt(connection, claimed[number], FILE, now=SOON)[1]

            assert sorted(map(str, threads.map(end, (0, 1)))) == ["None", "completed"]
            assert read_job(engine, job_id).status == "completed"


def test_a_cancel_and_the_end_of_a_download_never_deadlock(engine: Engine) -> None:
    """Both lock the job first. One of them wins, and neither gets an error."""
    rounds = 15
    with engine.begin() as connection:
        pairs = []
        for number in range(rounds):
            job_id = add_downloading(connection, str(number))
            pairs.append((job_id, claim_one_output(connection, add_output(connection, job_id))))

    with ThreadPoolExecutor(2) as threads:
        for job_id, claimed in pairs:
            barrier = Barrier(2)

            def store(claimed=claimed, barrier=barrier) -> bool:  # type: ignore[no-untyped-def]
                barrier.wait(5)
                with engine.begin() as connection:
                    return record_attempt(connection, claimed, FILE, now=SOON)[0]

            def stop(job_id=job_id, barrier=barrier) -> bool:  # type: ignore[no-untyped-def]
                barrier.wait(5)
                with engine.begin() as connection:
                    return cancel(connection, job_id, Tally(), now=SOON)

            stored, stopped = threads.submit(store), threads.submit(stop)
            assert {stored.result(10), stopped.result(10)} == {True, False}
            assert read_job(engine, job_id).status == ("completed" if stored.result() else "cancelled")


# ── retry and cancel ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_retried_job_downloads_its_failed_outputs_again(engine: Engine) -> None:
    """Failed outputs are pending again with empty counters, stored outputs stay, and the deadline starts again."""
    with engine.begin() as connection:
        job_id = add_downloading(connection, polls=4, told_at=NOW)
        bad, good = (
            add_output(connection, job_id, 0, bad_bodies=2, dead_attempts=3),
            add_output(connection, job_id, 1),
        )
        record_attempt(connection, claim_one_output(connection, good), FILE, now=SOON)
        record_attempt(connection, claim_one_output(connection, bad), GiveUp("gone", "m"), now=SOON)
        later = NOW + seconds(10_000)
        assert retry(connection, job_id, now=later)
    job, row = read_job(engine, job_id), read_output(engine, bad)
    assert (job.status, job.polls) == ("downloading", 4)
    assert (job.completed_at, job.error_code, job.told_at) == (None, None, None)
    assert job.deadline_at == later + seconds(3_600)
    assert (row.status, row.due_at, row.error_code, row.bad_bodies, row.dead_attempts, row.listed_at) == (
        "pending",
        later,
        None,
        0,
        0,
        later,
    )
    assert read_output(engine, good).status == "stored"


def test_a_retried_job_without_outputs_is_polled_again(engine: Engine) -> None:
    """It is pending and due now, without strikes, and keeps its number of polls."""
    with engine.begin() as connection:
        job_id = add_job(connection, polls=3)
        [claimed] = claim_due_jobs(connection)
        _record(connection, claimed, EndJob("failed", "not_found", "m"))
        assert retry(connection, job_id, now=SOON)
        assert not retry(connection, job_id, now=SOON)
    job = read_job(engine, job_id)
    assert (job.status, job.due_at, job.polls, job.unknown_answers) == ("pending", SOON, 4, 0)


@pytest.mark.parametrize("status", ["completed", "cancelled", "pending", "downloading"])
def test_only_failed_and_expired_jobs_are_retried(engine: Engine, status: str) -> None:
    """Other jobs do not change."""
    final: dict[str, Any] = {"due_at": None, "completed_at": NOW} if status in ("completed", "cancelled") else {}
    due_values: dict[str, Any] = {"due_at": None} if status == "downloading" else {}
    with engine.begin() as connection:
        job_id = add_job(connection, status=status, ready_at=NOW, **final, **due_values)
        assert not retry(connection, job_id, now=SOON)
    assert read_job(engine, job_id).status == status


def test_a_cancelled_job_ends_its_unstored_outputs_and_keeps_the_stored_ones(engine: Engine) -> None:
    """From pending and from downloading. A second cancel changes nothing."""
    with engine.begin() as connection:
        job_id = add_downloading(connection)
        good, open_ = add_output(connection, job_id, 0), add_output(connection, job_id, 1)
        record_attempt(connection, claim_one_output(connection, good), FILE, now=SOON)
        assert cancel(connection, job_id, Tally(), now=SOON)
        assert not cancel(connection, job_id, Tally(), now=SOON + seconds(5))
        assert not retry(connection, job_id, now=SOON)
    job, row = read_job(engine, job_id), read_output(engine, open_)
    assert (job.status, job.completed_at, job.due_at) == ("cancelled", SOON, None)
    assert (row.status, row.error_code, row.due_at) == ("failed", "cancelled", None)
    assert read_output(engine, good).status == "stored"


def test_a_final_job_has_no_due_time(engine: Engine) -> None:
    """A final job is never claimed again."""
    with engine.begin() as connection:
        for number in range(3):
            add_job(connection, str(number))
        claimed = claim_due_jobs(connection)
        steps: list[JobDecision] = [
            StartDownloads(()),
            EndJob("failed", "api_failed", "m"),
            EndJob("expired", "expired", "m"),
        ]
        for job, step in zip(claimed, steps, strict=True):
            _record(connection, job, step)
        assert claim_due_jobs(connection, now=NOW + seconds(1_000_000)) == []
        assert connection.execute(select(jobs.c.due_at)).scalars().all() == [None, None, None]
