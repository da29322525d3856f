"""Claims on real databases: only one holder per row, a fencing token, and a lease."""

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event, insert, select, update

from tests.rows import (
    LEASE,
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
    try_claim_output,
)
from worker.core.lifecycle import AskAgain, EndJob, GiveUp, Strikes
from worker.core.pacing.policy import PollPlan, urgency
from worker.store.claims import claim_jobs, queue_due_outputs, release_jobs, renew_leases
from worker.store.counters import Tally
from worker.store.due_groups import DueGroup, due_groups
from worker.store.jobs import waiting_accounts
from worker.store.results import Outcome, record_answers, record_attempt
from worker.store.schema import bodies, jobs, outputs

MANY = 600
AFTER_LEASE = NOW + LEASE + seconds(1)
WANTED = DueGroup("default", 0, "api.test", NOW)


@pytest.fixture
def engine_with_due_jobs(engine: Engine) -> Engine:
    """Return a database with many due jobs."""
    with engine.begin() as connection:
        connection.execute(insert(jobs), [job_values(str(number)) for number in range(MANY)])
    return engine


def _claim_all(engine: Engine, token: str) -> Iterator[int]:
    while True:
        with engine.begin() as connection:
            claimed = claim_due_jobs(connection, token=token, holder=token, limit=7)
        if not claimed:
            return
        yield from (job.id for job in claimed)


def test_eight_concurrent_threads_claim_each_row_exactly_once(engine_with_due_jobs: Engine) -> None:
    """Each thread has its own connection."""
    with ThreadPoolExecutor(8) as threads:
        shares = list(
            threads.map(lambda name: list(_claim_all(engine_with_due_jobs, name)), [f"t{n}" for n in range(8)])
        )

    claimed = Counter(job_id for share in shares for job_id in share)
    assert len(claimed) == MANY
    assert set(claimed.values()) == {1}
    with engine_with_due_jobs.connect() as connection:
        assert set(connection.execute(select(jobs.c.polls)).scalars()) == {1}


CLAIMERS = """
import multiprocessing, sys
from sqlalchemy.engine import make_url
from tests.rows import claim_due_jobs
from worker.store.engine import make_engine
from worker.store.counters import Tally
fork = multiprocessing.get_context("fork")
start = fork.Barrier(4)
def claim_all(name):
    engine = make_engine(make_url(sys.argv[1]))
    claimed = []
    start.wait(30)
    while True:
        with engine.begin() as connection:
            batch = claim_due_jobs(connection, token=name, limit=7)
        if not batch:
            return claimed
        claimed += [job.id for job in batch]
with fork.Pool(4) as processes:
    for claimed in processes.map(claim_all, ["a", "b", "c", "d"], chunksize=1):
        print(*claimed)
"""


def test_four_processes_claim_each_row_exactly_once(engine_with_due_jobs: Engine) -> None:
    """SQLite ignores SKIP LOCKED, but its claims must be disjoint too."""
    result = subprocess.run(
        [sys.executable, "-c", CLAIMERS, engine_with_due_jobs.url.render_as_string(hide_password=False)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    claimed = Counter(result.stdout.split())
    assert len(claimed) == MANY
    assert set(claimed.values()) == {1}


def test_a_claim_takes_the_due_jobs_of_its_account_by_priority_then_by_due_time(
    engine: Engine,
) -> None:
    """Jobs of other accounts, jobs that are due later and jobs without a due time are not claimed."""
    with engine.begin() as connection:
        young = add_job(connection, "young", due_at=NOW - seconds(1))
        old = add_job(connection, "old", due_at=NOW - seconds(9))
        important = add_job(connection, "important", priority=5, due_at=NOW)
        unimportant = add_job(connection, "unimportant", priority=-5, due_at=NOW - seconds(99))
        add_job(connection, "later", due_at=NOW + seconds(0.001))
        add_job(connection, "foreign", account="other")
        add_downloading(connection, "rests")

    order = []
    for _ in range(5):
        with engine.begin() as connection:
            order += [job.id for job in claim_due_jobs(connection, limit=1)]

    assert order == [important, old, young, unimportant]


def test_due_groups_have_account_priority_host_and_earliest_due_time(engine: Engine) -> None:
    """One group for any number of jobs, highest priority first. Claimed jobs count with the end of their lease."""
    with engine.begin() as connection:
        for number in range(30):
            add_job(connection, f"a{number}", priority=number % 3, due_at=NOW + seconds(number))
        add_job(connection, "e", priority=1, due_at=NOW - seconds(1), fetch_host="other.test")
        add_job(connection, "b", account="shop", priority=-7, due_at=NOW - seconds(5))
        add_job(connection, "c", account="other", due_at=NOW)
        add_downloading(connection, "d", priority=9)
        claim_due_jobs(connection, account="shop")

        groups = due_groups(connection, ["default", "shop", "nobody"])

        assert groups == [
            DueGroup("default", 2, "api.test", NOW + seconds(2)),
            DueGroup("default", 1, "other.test", NOW - seconds(1)),
            DueGroup("default", 1, "api.test", NOW + seconds(1)),
            DueGroup("default", 0, "api.test", NOW),
            DueGroup("shop", -7, "api.test", NOW + LEASE),
        ]
        assert waiting_accounts(connection) == ["default", "other", "shop"]
        assert due_groups(connection, []) == []


@pytest.mark.parametrize("engine", ["postgresql"], indirect=True)
def test_a_claim_reads_only_the_rows_that_it_takes(engine: Engine) -> None:
    """Not the jobs that are due later, have a lower priority, belong to other groups, or have ended."""
    with engine.begin() as connection:
        other_jobs: dict[str, dict[str, Any]] = {
            "later": {"due_at": NOW + seconds(900)},
            "less": {"priority": -1, "due_at": NOW - seconds(900)},
            "foreign": {"account": "other", "due_at": NOW - seconds(900)},
            "elsewhere": {"fetch_host": "down.test", "due_at": NOW - seconds(900)},
            "over": {"status": "completed", "due_at": None, "ready_at": NOW, "completed_at": NOW},
            "due": {},
        }
        for name, changes in other_jobs.items():
            connection.execute(jobs.insert(), [job_values(f"{name}{n}", **changes) for n in range(1_500)])
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE fetch_jobs")
    plans: list[str] = []

    def explain(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith("WITH picked"):
            cursor.execute("EXPLAIN (ANALYZE, TIMING OFF, SUMMARY OFF, COSTS OFF) " + statement, parameters)
            plans.extend(row[0] for row in cursor.fetchall())

    with engine.connect() as connection, connection.begin() as undone:
        event.listen(connection, "before_cursor_execute", explain)
        claim_jobs(connection, WANTED, limit=100, token="t", holder="h", lease=LEASE, now=NOW)
        undone.rollback()

    assert any("Index Scan using ix_fetch_jobs_best" in line and "rows=100 " in line for line in plans), plans
    assert not any("Seq Scan" in line or "Sort" in line or "Removed by Filter" in line for line in plans), plans


def test_a_claim_counts_the_request_and_leases_the_row(engine: Engine) -> None:
    """A crash after the claim can't hide a request that may have been sent."""
    with engine.begin() as connection:
        job_id = add_job(connection)
        [claimed] = claim_due_jobs(connection, token="t1", holder="h1")

    row = read_job(engine, job_id)
    assert claimed.polls == 1
    assert (row.polls, row.asked_at, row.due_at) == (1, NOW, NOW + LEASE)
    assert (row.claim_token, row.claim_holder) == ("t1", "h1")


def test_after_the_lease_a_row_can_be_claimed_again_and_the_old_holder_writes_nothing(engine: Engine) -> None:
    """Fencing: a holder that missed the renewal has lost the claim."""
    with engine.begin() as connection:
        job_id = add_job(connection)
        [old] = claim_due_jobs(connection, token="old")
        assert claim_due_jobs(connection, token="early", now=NOW + LEASE - seconds(1)) == []
        [new] = claim_due_jobs(connection, token="new", now=AFTER_LEASE)

    with engine.begin() as connection:
        lost = record_answers(
            connection,
            [Outcome(old, EndJob("failed", "api_failed", "no"), "failed", PollPlan(0.0))],
            Tally(),
            now=AFTER_LEASE,
        )
        lost_too = record_answers(
            connection,
            [Outcome(old, AskAgain(Strikes(failed=9), "processing"), "stale", PollPlan(5.0))],
            Tally(),
            now=AFTER_LEASE,
        )
    assert (lost.lost, lost.finished, lost_too.lost) == (1, (), 1)
    row = read_job(engine, job_id)
    assert (row.status, row.claim_token, row.polls, row.failed_answers, row.last_answer) == (
        "pending",
        "new",
        2,
        0,
        None,
    )
    assert new.polls == 2


def test_after_the_lease_a_holder_writes_nothing_even_if_the_row_was_not_claimed_again(engine: Engine) -> None:
    """Otherwise two processes could both believe that they hold the row."""
    with engine.begin() as connection:
        job_id = add_job(connection)
        output_id = add_output(connection, add_downloading(connection, "2"))
        [claimed] = claim_due_jobs(connection)
        output = claim_one_output(connection, output_id)
    with engine.begin() as connection:
        recorded = record_answers(
            connection,
            [Outcome(claimed, EndJob("failed", "api_failed", "no"), "failed", PollPlan(0.0))],
            Tally(),
            now=NOW + LEASE,
        )
        result = record_attempt(connection, output, GiveUp("gone", "no"), now=NOW + LEASE)
    assert recorded.lost == 1
    assert result == (False, None)
    assert read_job(engine, job_id).status == "pending"
    assert read_output(engine, output_id).status == "pending"


def test_renewal_extends_only_unexpired_leases_of_its_holder(engine: Engine) -> None:
    """An expired lease is lost. Other processes renew their own leases."""
    later = NOW + seconds(20)
    with engine.begin() as connection:
        unexpired = add_job(connection, "1")
        claim_due_jobs(connection, token="a", holder="me")
        theirs = add_job(connection, "2")
        claim_due_jobs(connection, token="b", holder="they")
        over = add_job(connection, "3", due_at=NOW - seconds(60))
        claim_due_jobs(connection, token="c", holder="me", now=NOW - seconds(60))
        output_id = add_output(connection, add_downloading(connection, "4"))
        try_claim_output(connection, output_id, holder="me")

        renewed = renew_leases(connection, "me", lease=LEASE, now=later)

    assert renewed == {(unexpired, "a"), (output_id, read_output(engine, output_id).claim_token)}
    assert read_job(engine, unexpired).due_at == later + LEASE
    assert read_output(engine, output_id).due_at == later + LEASE
    assert read_job(engine, theirs).due_at == NOW + LEASE
    assert read_job(engine, over).due_at == NOW - seconds(30)


def test_a_renewed_lease_keeps_its_token(engine: Engine) -> None:
    """Renewal only moves the end of the lease."""
    with engine.begin() as connection:
        job_id = add_job(connection)
        [claimed] = claim_due_jobs(connection, holder="me")
        renew_leases(connection, "me", lease=LEASE, now=NOW + seconds(20))
        recorded = record_answers(
            connection,
            [Outcome(claimed, EndJob("failed", "api_failed", "no"), "failed", PollPlan(0.0))],
            Tally(),
            now=NOW + LEASE + seconds(10),
        )
    assert recorded.finished == (job_id,)


def test_renewal_skips_rows_that_are_being_recorded(migrated_postgres: Engine) -> None:
    """The recorder locks rows in another order, so waiting for them could deadlock."""
    engine = migrated_postgres
    with engine.begin() as connection:
        first, second = add_job(connection, "1"), add_job(connection, "2")
        claim_due_jobs(connection, holder="me")
    try:
        with engine.begin() as recorder:
            recorder.execute(update(jobs).where(jobs.c.id == first).values(last_answer="being recorded"))
            with engine.begin() as keeper:
                keeper.exec_driver_sql("SET LOCAL lock_timeout = '500ms'")
                assert len(renew_leases(keeper, "me", lease=LEASE, now=NOW + seconds(10))) == 1
        assert read_job(engine, second).due_at == NOW + LEASE + seconds(10)
    finally:
        with engine.begin() as connection:
            connection.execute(jobs.delete())


def test_released_jobs_are_due_again_if_the_token_matches_and_their_request_is_always_subtracted(
    engine: Engine,
) -> None:
    """A request that was not sent does not count. A row that another process has claimed stays claimed."""
    with engine.begin() as connection:
        back = add_job(connection, "1", polls=3)
        claim_due_jobs(connection, token="mine")
        lost = add_job(connection, "2", polls=1)  # its claim is lost
        claim_due_jobs(connection, token="theirs")
        release_jobs(connection, [back, lost], "mine", due_at=NOW + seconds(2))

    row, lost_row = read_job(engine, back), read_job(engine, lost)
    assert (row.polls, row.due_at, row.claim_token, row.claim_holder) == (3, NOW + seconds(2), None, None)
    assert (lost_row.polls, lost_row.due_at, lost_row.claim_token) == (1, NOW + LEASE, "theirs")


def test_an_output_is_claimed_once_and_again_only_after_its_lease(engine: Engine) -> None:
    """A task that is delivered ten times causes one download."""
    with engine.begin() as connection:
        output_id = add_output(connection, add_downloading(connection), queued_at=NOW)
        connection.execute(insert(bodies).values(output_id=output_id, body=b"the bytes"))
        first = try_claim_output(connection, output_id, token="first")
        again = [try_claim_output(connection, output_id, token="again") for _ in range(9)]
        assert try_claim_output(connection, output_id + 1) is None
        late = try_claim_output(connection, output_id, token="late", now=AFTER_LEASE)

    assert again == [None] * 9
    assert first is not None
    assert late is not None
    assert (first.body, first.facts.attempts, late.facts.attempts) == (b"the bytes", 1, 2)
    row = read_output(engine, output_id)
    assert (row.claim_token, row.attempts, row.queued_at) == ("late", 2, None)


def test_eight_concurrent_messages_for_one_output_give_one_claim(engine: Engine) -> None:
    """Each message has its own connection."""
    with engine.begin() as connection:
        output_id = add_output(connection, add_downloading(connection))

    def attempt(number: int) -> bool:
        with engine.begin() as connection:
            return try_claim_output(connection, output_id, token=f"t{number}") is not None

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(attempt, range(8))) == 1
    assert read_output(engine, output_id).attempts == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"due_at": NOW + seconds(5)},
        {"status": "failed", "due_at": None, "error_code": "cancelled"},
        {
            "status": "stored",
            "due_at": None,
            "location": "file:///a",
            "sha256": "0" * 64,
            "size_bytes": 1,
            "media_type": "image/png",
            "stored_at": NOW,
        },
    ],
    ids=["not due", "cancelled", "stored"],
)
def test_an_output_that_is_not_due_is_not_claimed(engine: Engine, changes: dict[str, Any]) -> None:
    """A late or stale message does nothing."""
    with engine.begin() as connection:
        output_id = add_output(connection, add_downloading(connection), **changes)
        assert try_claim_output(connection, output_id) is None
    assert read_output(engine, output_id).attempts == 0


def test_a_message_claims_the_oldest_due_link_and_another_message_claims_the_next(
    engine: Engine,
) -> None:
    """An output that was released after a crash does not wait behind newer ones, and each output has a message."""
    with engine.begin() as connection:
        job_id = add_downloading(connection)
        young = add_output(connection, job_id, 0, listed_at=NOW - seconds(1))
        old = add_output(connection, job_id, 1, listed_at=NOW - seconds(60))
        add_output(connection, job_id, 2, listed_at=NOW - seconds(90), due_at=NOW + seconds(9))

        assert claim_one_output(connection, young).id == old
        assert claim_one_output(connection, young).id == young
        assert try_claim_output(connection, old) is None


def test_outputs_without_a_message_are_queued_oldest_link_first(engine: Engine) -> None:
    """They were never queued, or so long ago that the message must be lost. Other outputs are queued already."""
    before = NOW - timedelta(seconds=60)
    with engine.begin() as connection:
        job_id = add_downloading(connection)
        never = add_output(connection, job_id, 0, listed_at=NOW - seconds(10))
        lost = add_output(connection, job_id, 1, listed_at=NOW - seconds(99), queued_at=before - seconds(1))
        under_way = add_output(connection, job_id, 2, queued_at=NOW - seconds(1))
        add_output(connection, job_id, 3, due_at=NOW + seconds(9))
        claimed = add_output(connection, job_id, 4, listed_at=NOW - seconds(200))
        try_claim_output(connection, claimed)
        queued = queue_due_outputs(connection, now=NOW, queued_before=before, limit=10)
        again = queue_due_outputs(connection, now=NOW, queued_before=before, limit=10)

    assert queued == [lost, never]
    assert again == []
    assert read_output(engine, lost).queued_at == NOW
    assert read_output(engine, under_way).queued_at == NOW - seconds(1)


def test_an_output_of_a_dead_process_is_queued_after_its_lease(engine: Engine) -> None:
    with engine.begin() as connection:
        output_id = add_output(connection, add_downloading(connection))
        try_claim_output(connection, output_id)
        assert queue_due_outputs(connection, now=NOW, queued_before=NOW, limit=10) == []
        assert queue_due_outputs(connection, now=AFTER_LEASE, queued_before=NOW, limit=10) == [output_id]


def test_outputs_are_queued_oldest_link_first_up_to_the_limit(engine: Engine) -> None:
    """Links expire, so the oldest link is the most urgent."""
    with engine.begin() as connection:
        job_id = add_downloading(connection)
        ids = [add_output(connection, job_id, n, listed_at=NOW - seconds(n)) for n in range(5)]
        assert queue_due_outputs(connection, now=NOW, queued_before=NOW, limit=2) == [ids[4], ids[3]]


def test_a_claim_is_one_statement(engine: Engine) -> None:
    """This is atomic and needs one round trip. MariaDB locks the rows with a separate statement."""
    statements: list[str] = []
    with engine.begin() as connection:
        add_job(connection)
        event.listen(connection, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))
        claim_jobs(connection, WANTED, limit=9, token="t", holder="h", lease=LEASE, now=NOW)
    assert len(statements) == (3 if engine.dialect.name == "mariadb" else 1)
    assert engine.dialect.name != "mariadb" or "SKIP LOCKED" in statements[0]


def test_outputs_of_a_deleted_job_are_deleted_and_not_claimed(engine: Engine) -> None:
    """A stale message about a deleted job does nothing."""
    with engine.begin() as connection:
        output_id = add_output(connection, add_downloading(connection))
        connection.execute(jobs.delete())
        assert try_claim_output(connection, output_id) is None
        assert connection.execute(select(outputs)).all() == []


# ── too few requests ──────────────────────────────────────────────────────────────────────────────────────────────────

AROUND = (NOW + seconds(20), NOW + seconds(40))


def test_with_too_few_requests_the_most_urgent_jobs_are_claimed(engine: Engine) -> None:
    """In the order of the core's `urgency`."""
    now = NOW + seconds(60)
    planned = {
        "late": (40.0, 20.0, 2.0),
        "later": (40.0, 10.0, 2.0),
        "soon": (10.0, 10.0, 2.0),
        "slow": (50.0, 10.0, 0.5),
    }
    with engine.begin() as connection:
        for name, (unseen, scale, growth) in planned.items():
            add_job(connection, name, not_ready_at=now - seconds(unseen), pace_scale=scale, pace_growth=growth)
        add_job(connection, "nudged", due_at=now, not_ready_at=now - seconds(5))
        claimed = []
        for number in range(5):
            claimed += claim_jobs(
                connection, WANTED, limit=1, token=f"t{number}", holder="h", lease=LEASE, now=now, around=AROUND
            )

    order = sorted(planned, key=lambda name: -urgency(*planned[name]))
    assert [job.remote_id for job in claimed] == ["nudged", *order]
    assert order == ["later", "late", "slow", "soon"]


def test_with_too_few_requests_and_no_plans_the_jobs_with_the_earliest_due_time_are_claimed(engine: Engine) -> None:
    with engine.begin() as connection:
        for number in (3, 1, 2):
            add_job(connection, str(number), due_at=NOW + seconds(number))
        claimed = claim_jobs(
            connection, WANTED, limit=2, token="t", holder="h", lease=LEASE, now=NOW + seconds(60), around=AROUND
        )

    assert sorted(job.remote_id for job in claimed) == ["1", "2"]


def test_with_very_many_due_jobs_a_claim_reads_four_windows_and_claims_up_to_its_limit(
    engine_with_due_jobs: Engine,
) -> None:
    with engine_with_due_jobs.begin() as connection:
        claimed = claim_jobs(
            connection, WANTED, limit=7, token="t", holder="h", lease=LEASE, now=NOW + seconds(60), around=AROUND
        )

    assert len({job.id for job in claimed}) == 7


def test_a_claimed_job_has_the_time_when_it_was_last_seen_not_ready(engine: Engine) -> None:
    with engine.begin() as connection:
        add_job(connection, not_ready_at=NOW - seconds(7), pace_scale=4.5, pace_growth=2.0, eta_at=NOW - seconds(9))
        (job,) = claim_jobs(connection, WANTED, limit=1, token="t", holder="h", lease=LEASE, now=NOW)

    assert (job.not_ready_at, job.pace_scale, job.eta_at) == (NOW - seconds(7), 4.5, NOW - seconds(9))


def test_given_two_messages_that_claim_each_others_output_then_both_outputs_are_claimed(engine: Engine) -> None:
    """Threads may take messages out of order."""
    with engine.begin() as connection:
        job_id = add_downloading(connection)
        older = add_output(connection, job_id, 0, listed_at=NOW - seconds(5))
        younger = add_output(connection, job_id, 1)

        first = claim_one_output(connection, younger, token="a")
        second = claim_one_output(connection, older, token="b")

        assert (first.id, second.id) == (older, younger)
        assert try_claim_output(connection, younger, token="c") is None


@pytest.mark.parametrize(
    ("host", "passed"),
    [("a.test", {0, 1}), ("::1", {2}), ("a_test", set()), ("test", set()), ("b.test", {3})],
)
def test_given_hosts_to_skip_then_no_output_with_a_link_on_them_is_claimed(
    host: str, passed: set[int], engine: Engine
) -> None:
    """Neither the oldest output nor the named one."""
    links = ["https://a.test/0.png", "http://a.test:8080/1", "https://[::1]/2.png", "https://b.test/?https://a.test/"]
    with engine.begin() as connection:
        job_id = add_downloading(connection)
        ids = [add_output(connection, job_id, number, url=link) for number, link in enumerate(links)]
        named = ids[min(passed, default=0)]
        taken_ids = set()
        while claimed := try_claim_output(connection, named, without={host, "other.test"}):
            taken_ids.add(claimed.id)

    assert taken_ids == {output_id for number, output_id in enumerate(ids) if number not in passed}


def test_given_locked_urgent_rows_when_there_are_too_few_requests_then_other_jobs_are_claimed(
    migrated_postgres: Engine,
) -> None:
    """There are more locked rows than a claim by urgency reads."""
    with migrated_postgres.begin() as connection:
        locked = [
            add_job(connection, f"locked{number}", due_at=NOW, pace_scale=1.0, pace_growth=9.0) for number in range(300)
        ]
        free = add_job(connection, "free", due_at=NOW, pace_scale=50.0, pace_growth=0.1)
    try:
        with migrated_postgres.begin() as locking, migrated_postgres.begin() as connection:
            locking.execute(select(jobs.c.id).where(jobs.c.id.in_(locked)).with_for_update())
            claimed = claim_jobs(
                connection, WANTED, limit=2, token="t", holder="h", lease=LEASE, now=NOW + seconds(60), around=AROUND
            )
        assert [job.id for job in claimed] == [free]
    finally:
        with migrated_postgres.begin() as connection:
            connection.execute(jobs.delete())
