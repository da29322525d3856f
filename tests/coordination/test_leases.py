"""Leases: a request is sent only while its claim lasts, and a claim without a request is not counted."""

import os
import secrets
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, update

from tests.rows import NOW, add_job, claim_due_jobs, read_job, seconds
from worker.coordination.leases import LeaseKeeper, LeaseLost, boot_seconds
from worker.coordination.sent_requests import (
    RECORDS,
    SentRequests,
    old_files,
    processes_with_files,
    remove_files,
    sent_by,
)
from worker.store.engine import use_clock
from worker.store.reaper import release_crashed
from worker.store.schema import jobs

LEASE = timedelta(seconds=30)


class Clock:
    """The clocks of a host and of a database, which move together."""

    def __init__(self) -> None:
        self.passed = 0.0

    def boot(self) -> float:
        return 1_000.0 + self.passed

    def now(self) -> datetime:
        return NOW + seconds(self.passed)


@pytest.fixture
def clock() -> Iterator[Clock]:
    """A clock that the test moves."""
    moved = Clock()
    with use_clock(moved.now):
        yield moved


@pytest.fixture
def leases(engine: Engine, clock: Clock) -> LeaseKeeper:
    """The leases of a process named "me"."""
    return LeaseKeeper(engine, lease=LEASE, holder="me", clock=clock.boot)


def _claimed(engine: Engine, leases: LeaseKeeper, clock: Clock, remote_id: str = "1") -> tuple[int, str]:
    token = leases.new_token()
    with engine.begin() as connection:
        job_id = add_job(connection, remote_id, due_at=clock.now())
        claim_due_jobs(connection, token=token, holder="me", now=clock.now())
    return job_id, token


def _permitted(leases: LeaseKeeper, claimed: tuple[int, str]) -> bool:
    try:
        leases.check(*claimed)
    except LeaseLost:
        return False
    return True


def test_given_a_fresh_claim_a_request_is_permitted_until_a_third_of_the_lease_is_left(
    engine: Engine, leases: LeaseKeeper, clock: Clock
) -> None:
    claimed = _claimed(engine, leases, clock)
    clock.passed = 19.9
    assert _permitted(leases, claimed)
    clock.passed = 20.1
    assert not _permitted(leases, claimed)


def test_given_a_renewed_row_requests_are_permitted(engine: Engine, leases: LeaseKeeper, clock: Clock) -> None:
    claimed = _claimed(engine, leases, clock)
    for _ in range(5):
        clock.passed += 10
        leases.renew()
        assert _permitted(leases, claimed)


def test_given_a_process_that_slept_past_its_lease_a_renewal_restores_no_claim(
    engine: Engine, leases: LeaseKeeper, clock: Clock
) -> None:
    claimed = _claimed(engine, leases, clock)
    clock.passed = 31
    leases.renew()
    assert not _permitted(leases, claimed)
    again = _claimed(engine, leases, clock, "2")
    assert _permitted(leases, again), "its new claims after waking up are valid"


def test_a_renewal_counts_only_for_the_rows_that_it_renewed(engine: Engine, leases: LeaseKeeper, clock: Clock) -> None:
    renewed, lost = _claimed(engine, leases, clock, "1"), _claimed(engine, leases, clock, "2")
    clock.passed = 15
    with engine.begin() as connection:  # the second claim passes to another process
        connection.execute(update(jobs).where(jobs.c.id == lost[0]).values(claim_holder="another"))
    leases.renew()
    clock.passed = 24
    assert (_permitted(leases, renewed), _permitted(leases, lost)) == (True, False)


def test_a_row_claimed_again_by_this_process_permits_no_request_for_the_old_claim(
    engine: Engine, leases: LeaseKeeper, clock: Clock
) -> None:
    job_id, before = _claimed(engine, leases, clock)
    clock.passed = 31
    token = leases.new_token()
    with engine.begin() as connection:
        claim_due_jobs(connection, token=token, holder="me", now=clock.now())
    leases.renew()
    assert _permitted(leases, (job_id, token))
    assert not _permitted(leases, (job_id, before))


def test_tokens_of_ended_leases_are_dropped(engine: Engine, leases: LeaseKeeper, clock: Clock) -> None:
    for _ in range(1_000):
        leases.new_token()
        clock.passed += 1
    assert len(leases._lease_ends) < 300


def test_the_lease_clock_continues_while_the_host_is_suspended() -> None:
    if not hasattr(time, "CLOCK_BOOTTIME"):
        pytest.skip("this system has no such clock")
    assert abs(boot_seconds() - time.clock_gettime(time.CLOCK_BOOTTIME)) < 5


# ── sent requests ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_given_a_killed_process_only_claims_with_a_sent_request_stay_counted(
    engine: Engine, tmp_path: Path, clock: Clock
) -> None:
    leases = LeaseKeeper(engine, lease=LEASE, holder="me", clock=clock.boot, sent=SentRequests(tmp_path / "sent", "me"))
    sent, unsent = _claimed(engine, leases, clock, "1"), _claimed(engine, leases, clock, "2")
    leases.check(*sent)
    with engine.begin() as connection:
        released = release_crashed(connection, ["me"], now=clock.now(), sent=sent_by(tmp_path / "sent", ["me"]))
    assert released.rows == 2
    assert (read_job(engine, sent[0]).polls, read_job(engine, unsent[0]).polls) == (1, 0)
    assert read_job(engine, unsent[0]).due_at == clock.now()
    assert read_job(engine, unsent[0]).claim_token is None


def test_given_a_killed_process_without_a_file_every_claim_stays_counted(
    engine: Engine, tmp_path: Path, clock: Clock, leases: LeaseKeeper
) -> None:
    claimed = _claimed(engine, leases, clock)
    with engine.begin() as connection:
        release_crashed(connection, ["me"], now=clock.now(), sent=sent_by(tmp_path / "nowhere", ["me"]))
    assert read_job(engine, claimed[0]).polls == 1


def test_a_process_that_can_not_write_its_file_works_without_it(tmp_path: Path) -> None:
    (tmp_path / "sent").write_text("no folder")
    sent = SentRequests(tmp_path / "sent", "me")
    sent.note(1, secrets.token_hex(8))
    assert sent_by(tmp_path / "sent", ["me"]) == {}


def test_the_file_of_sent_requests_has_a_fixed_size(tmp_path: Path) -> None:
    sent = SentRequests(tmp_path, "me")
    tokens = [secrets.token_hex(8) for _ in range(RECORDS + 100)]
    for number, token in enumerate(tokens):
        sent.note(number, token)
    assert (tmp_path / "me").stat().st_size == RECORDS * 16
    assert (RECORDS + 99, tokens[-1]) in sent_by(tmp_path, ["me"])["me"]
    assert (0, tokens[0]) not in sent_by(tmp_path, ["me"])["me"]


def test_a_file_of_sent_requests_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    SentRequests(tmp_path / "sent", "me")
    assert (tmp_path / "sent").stat().st_mode & 0o77 == 0
    assert (tmp_path / "sent" / "me").stat().st_mode & 0o77 == 0
    assert processes_with_files(tmp_path / "sent") == ["me"]
    remove_files(tmp_path / "sent", ["me", "another"])
    assert not list((tmp_path / "sent").iterdir())


def test_given_an_incomplete_file_of_sent_requests_when_read_then_it_is_ignored(tmp_path: Path) -> None:
    """An empty or short file would claim that nothing was sent, and hide that a job kills its process."""
    (tmp_path / "me").write_bytes(b"\0" * 64)
    assert sent_by(tmp_path, ["me"]) == {}


def test_given_files_of_an_earlier_boot_when_a_day_has_passed_then_they_are_old(tmp_path: Path) -> None:
    for name, age in (("young", 10), ("old", 2 * 86_400)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    assert old_files(tmp_path, seconds=86_400) == {"old"}
