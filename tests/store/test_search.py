"""Filters: each finds its jobs, newest first, on every database, for rare and for frequent properties."""

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, delete, insert, select, update

from tests.rows import NOW, add_downloading, add_job, add_output, seconds
from worker.store.jobs import first_tracked
from worker.store.reports import search as module
from worker.store.reports.search import (
    JobFilter,
    count_matching,
    find_job_ids,
    find_jobs,
    lock_matching,
    prepare_search,
)
from worker.store.schema import HELD_UNTIL, breakers, jobs

CLAIMED = {"claim_token": "t", "claim_holder": "ada"}
HOURS = {"submitted_at": NOW - seconds(7_200), "tracked_at": NOW - seconds(7_200)}
ENDED = {"due_at": None, "completed_at": NOW - seconds(600)}


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the clock to the time of the rows."""
    monkeypatch.setattr(module, "database_now", lambda _: NOW)


@pytest.fixture(params=["few", "many"])
def filled_database(
    engine: Engine, request: pytest.FixtureRequest, now: None, monkeypatch: pytest.MonkeyPatch
) -> Engine:
    """Insert one job of each kind, named by its remote id. Filters use ids, or a scan because nothing counts as few."""
    monkeypatch.setattr(module, "FEW", 1_000 if request.param == "few" else 0)
    later: dict[str, Any] = {"due_at": NOW + seconds(60)}
    with engine.begin() as connection:
        add_job(connection, "old", **HOURS, **ENDED, status="expired", error_code="expired")
        add_job(connection, "failed", **ENDED | {"completed_at": NOW}, status="failed", error_code="api_failed")
        failed_values = ENDED | {"status": "failed", "error_code": "output_failed", "ready_at": NOW}
        add_output(
            connection, add_job(connection, "gone", **failed_values), status="failed", error_code="gone", due_at=None
        )
        add_output(connection, add_downloading(connection, "loading"), error_code="http_error")
        add_job(connection, "calm", **later, reference="mine", kind="video")
        add_job(connection, "late", due_at=NOW - seconds(61), priority=3)
        add_job(connection, "stuck", due_at=NOW - seconds(61), **CLAIMED)
        add_job(connection, "asked", **later, **CLAIMED | {"claim_holder": "bob"})
        add_job(connection, "overdue", **later, deadline_at=NOW - seconds(1), account="shop")
        add_job(connection, "held", due_at=HELD_UNTIL, held_at=NOW, fetch_host="other.test")
        add_job(connection, "shut", **later, account="shut")
        add_job(connection, "off", **later, fetch_host="off.test")
        for scope, name, values in (
            ("account", "shut", {"paused_at": NOW}),
            ("host", "off.test", {"reason": "unreachable", "since": NOW, "probe_at": NOW}),
            ("host", "api.test", {"reason": "rate limited", "since": NOW, "until": NOW}),  # it has ended
        ):
            connection.execute(insert(breakers).values(scope=scope, name=name, **values))
    return engine


ALL = "off shut held overdue asked stuck late calm loading gone failed old"
MINE: list[tuple[JobFilter, str]] = [
    (JobFilter(), ALL),
    (JobFilter(statuses=("expired",)), "old"),
    (JobFilter(statuses=("downloading", "expired", "failed")), "loading gone failed old"),
    (JobFilter(statuses=("pending",)), "off shut held overdue asked stuck late calm"),
    (JobFilter(accounts=("shop", "shut")), "shut overdue"),
    (JobFilter(kinds=("video",)), "calm"),
    (JobFilter(remote_ids=("calm", "gone", "nobody")), "calm gone"),
    (JobFilter(references=("mine",)), "calm"),
    (JobFilter(references=("nobody's",)), ""),
    (JobFilter(codes=("api_failed", "expired")), "failed old"),
    (JobFilter(codes=("expired",), statuses=("failed",)), ""),
    (JobFilter(output_codes=("gone", "http_error")), "loading gone"),
    (JobFilter(output_codes=("gone",), codes=("output_failed",)), "gone"),
    (JobFilter(hosts=("off.test", "other.test")), "off held"),
    (JobFilter(holders=("bob",)), "asked"),
    (JobFilter(holders=("ada", "bob")), "asked stuck"),
    (JobFilter(submitted_since=NOW - seconds(60)), ALL.removesuffix(" old")),
    (JobFilter(submitted_since=NOW), ALL.removesuffix(" old")),
    (JobFilter(submitted_since=NOW + seconds(0.001)), ""),
    (JobFilter(submitted_until=NOW), "old"),
    (JobFilter(finished_since=NOW - seconds(60)), "failed"),
    (JobFilter(finished_until=NOW), "gone old"),
    (JobFilter(finished_until=NOW - seconds(600)), ""),
    (JobFilter(finished_until=NOW, statuses=("failed",)), "gone"),
    (JobFilter(late=60.0), "late"),
    (JobFilter(late=61.0), ""),
    (JobFilter(late=1e300), ""),
    (JobFilter(late=60.0, accounts=("shop",)), ""),
    (JobFilter(stuck=True), "stuck"),
    (JobFilter(stuck=True, holders=("bob",)), ""),
    (JobFilter(past_deadline=True), "overdue"),
    (JobFilter(held=True), "off shut held"),
    (JobFilter(held=True, accounts=("shut",)), "shut"),
    (JobFilter(by_hand=True), "held"),
    (JobFilter(by_hand=False, statuses=("pending",)), "off shut overdue asked stuck late calm"),
    (JobFilter(held=True, by_hand=False), "off shut"),
    (JobFilter(held=True, late=1.0), ""),
    (JobFilter(statuses=("completed",), stuck=True), ""),
]


def test_each_filter_finds_its_jobs_newest_first_and_counts_them(filled_database: Engine) -> None:
    for job_filter, names in MINE:
        with filled_database.connect() as connection:
            assert [row.remote_id for row in find_jobs(connection, job_filter, limit=100)] == names.split(), job_filter
            assert count_matching(connection, job_filter) == len(names.split()), job_filter


def test_pages_of_any_size_together_contain_all_jobs(filled_database: Engine) -> None:
    for job_filter, _ in MINE:
        with filled_database.connect() as connection:
            whole = find_job_ids(connection, job_filter, limit=100)
            paged: list[int] = []
            while page := find_job_ids(connection, job_filter, limit=2, after=paged[-1] if paged else None):
                paged += page
        assert paged == whole, job_filter


def test_jobs_that_no_longer_match_are_skipped(filled_database: Engine) -> None:
    """They are locked in the order of their ids, whatever the order of the arguments."""
    for job_filter, _ in MINE:
        with filled_database.begin() as connection:
            search = prepare_search(connection, job_filter)
            ids = find_job_ids(connection, search, limit=100)
            assert lock_matching(connection, search, ids) == sorted(ids), job_filter
    with filled_database.begin() as connection:
        search = prepare_search(connection, JobFilter(statuses=("pending",)))
        ids = find_job_ids(connection, search, limit=100)
        connection.execute(
            update(jobs).where(jobs.c.remote_id == "calm").values(status="cancelled", due_at=None, completed_at=NOW)
        )
        assert len(lock_matching(connection, search, ids)) == len(ids) - 1


def test_counting_stops_at_the_limit(filled_database: Engine) -> None:
    with filled_database.connect() as connection:
        for job_filter in (JobFilter(), JobFilter(statuses=("failed", "expired", "pending"))):
            assert [count_matching(connection, job_filter, limit=limit) for limit in (1, 3, 100)][:2] == [1, 3]


def test_the_first_job_of_a_time_is_found_among_ids_with_gaps(engine: Engine, now: None) -> None:
    """Retention deletes rows, and a rolled-back transaction leaves a gap."""
    with engine.begin() as connection:
        ids = [
            add_job(connection, str(minute), tracked_at=NOW + timedelta(minutes=minute), submitted_at=NOW)
            for minute in range(40)
        ]
        connection.execute(delete(jobs).where(jobs.c.id.in_(ids[5:17] + ids[30:33])))
        remaining = [(row.id, row.tracked_at) for row in connection.execute(select(jobs).order_by(jobs.c.id)).all()]

        for minute in (-1, 0, 4.5, 5, 10, 16, 17, 29, 29.5, 31, 38, 39):
            moment = NOW + timedelta(minutes=minute)
            expected = min(job_id for job_id, tracked_at in remaining if tracked_at >= moment)
            first = first_tracked(connection, moment)
            assert next(job_id for job_id, _ in remaining if job_id >= first) == expected
        assert first_tracked(connection, NOW + timedelta(minutes=40)) > ids[-1]


def test_a_job_that_was_tracked_long_after_its_submission_is_found_by_its_submission(engine: Engine, now: None) -> None:
    """Also a job of a slow transaction, whose id is higher than that of a job tracked after it."""
    with engine.begin() as connection:
        add_job(connection, "late-comer", submitted_at=NOW - seconds(86_400))
        add_job(connection, "next", tracked_at=NOW + seconds(30))
        add_job(connection, "slow")
        names = [
            [row.remote_id for row in find_jobs(connection, job_filter, limit=9)]
            for job_filter in (JobFilter(submitted_until=NOW), JobFilter(submitted_since=NOW))
        ]

    assert names == [["late-comer"], ["slow", "next"]]


def test_without_jobs_every_filter_finds_none(engine: Engine) -> None:
    for job_filter, _ in MINE:
        with engine.connect() as connection:
            assert (find_jobs(connection, job_filter, limit=9), count_matching(connection, job_filter)) == ([], 0)
