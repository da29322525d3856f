"""Jobs as tasks: each state says what it is, and the ones shown are the newest and those that are not over."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from worker.core.answer_history import NOTE_SEPARATOR
from worker.core.flower_rows import SHOWN_AFTER_END, FlowerJob, Outputs, job_ids_to_show, task_fields

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
JOB = FlowerJob(
    *(7, "shop", "12202888", "image", None, "pending", 0, None, NOW, None, None, None, None, None, None),
)


def after(seconds: float) -> datetime:
    """So many seconds after the submission."""
    return NOW + timedelta(seconds=seconds)


ASKED: dict[str, Any] = {
    "polls": 2,
    "asked_at": after(9),
    "last_answer": f"9.0 s: processing{NOTE_SEPARATOR}4.0 s: queued",
}
READY = ASKED | {"status": "downloading", "ready_at": after(9)}
HELD_WORDS = "held by an operator since 2026-03-01 12:00 UTC"


@pytest.mark.parametrize(
    ("changes", "state", "result", "exception"),
    [
        ({}, "RECEIVED", None, None),
        (ASKED, "STARTED", "polled 2 times: processing", None),
        (ASKED | {"polls": 1, "last_answer": None}, "STARTED", "polled once", None),
        ({"held_at": after(1)}, "RECEIVED", HELD_WORDS, None),
        (ASKED | {"held_at": after(1)}, "STARTED", f"{HELD_WORDS}, polled 2 times: processing", None),
        (READY, "DOWNLOADING", None, None),
        (READY | {"outputs": Outputs(2, 1, 1_500)}, "DOWNLOADING", "1 of 2 outputs stored, 1,500 bytes", None),
        (
            READY | {"status": "completed", "completed_at": after(10), "outputs": Outputs(2, 2, 391_002)},
            *("SUCCESS", "2 outputs stored, 391,002 bytes", None),
        ),
        (
            READY | {"status": "completed", "completed_at": after(10), "outputs": Outputs(1, 1, 5)},
            *("SUCCESS", "1 output stored, 5 bytes", None),
        ),
        (
            {"status": "failed", "completed_at": after(10), "error_code": "api_failed", "error_message": "no"},
            *("FAILURE", "api_failed", "api_failed: no"),
        ),
        (
            {"status": "expired", "completed_at": after(10), "error_code": "expired", "error_message": None},
            *("FAILURE", "expired", "expired"),
        ),
        (
            READY
            | {"status": "failed", "completed_at": after(10), "error_code": "output_failed", "error_message": "gone"}
            | {"outputs": Outputs(2, 1, 1_500)},
            *("FAILURE", "output_failed, 1 of 2 outputs stored, 1,500 bytes", "output_failed: gone"),
        ),
        ({"status": "cancelled", "completed_at": after(10)}, "REVOKED", None, None),
    ],
)
def test_a_job_in_any_state_says_what_it_is(
    changes: dict[str, Any], state: str, result: str | None, exception: str | None
) -> None:
    fields = task_fields(replace(JOB, **changes))

    assert (fields["state"], fields["result"], fields["exception"]) == (state, result, exception)


def test_the_times_of_a_task_are_those_of_the_job() -> None:
    done = replace(JOB, **(READY | {"status": "completed", "completed_at": after(10), "outputs": Outputs(1, 1, 5)}))

    fields = task_fields(done)

    start = NOW.timestamp()
    assert (fields["received"], fields["started"], fields["succeeded"]) == (start, start + 9, start + 10)
    assert (fields["timestamp"], fields["runtime"]) == (start + 10, 10.0)
    assert (fields["failed"], fields["revoked"]) == (None, None)


def test_the_arguments_are_short_whatever_an_app_wrote() -> None:
    fields = task_fields(replace(JOB, reference="r" * 255, error_code="api_failed"))

    assert fields["args"] == "('12202888',)"
    assert fields["kwargs"] == repr({"id": 7, "account": "shop", "kind": "image", "reference": "r" * 80})


def test_every_job_has_all_the_attributes_that_any_job_has() -> None:
    """Else something of its end would stay with a job that is taken up again."""
    pending = task_fields(JOB)
    done = task_fields(replace(JOB, status="cancelled", completed_at=after(10)))

    assert set(pending) == set(done)


def seen(job_id: int, completed_at: datetime | None = None) -> FlowerJob:
    """A job on its way, or one that ended then."""
    return replace(JOB, id=job_id, status="pending" if completed_at is None else "failed", completed_at=completed_at)


def test_the_newest_and_those_on_their_way_are_shown() -> None:
    over, ended = NOW - SHOWN_AFTER_END, NOW - SHOWN_AFTER_END / 2
    shown = [seen(1), seen(2, over), seen(3, ended), seen(4, over), seen(95)]

    assert job_ids_to_show(range(100, 90, -1), shown, 10, now=NOW) == [100, 99, 98, 97, 96, 95, 3, 1, 94, 93]


def test_however_many_are_on_their_way_new_jobs_find_room() -> None:
    shown = [seen(job_id) for job_id in range(1, 51)]

    found = job_ids_to_show(range(300, 250, -1), shown, 50, now=NOW)

    assert found == [*range(300, 275, -1), *range(50, 25, -1)]


@given(
    newest=some.lists(some.integers(1, 200), unique=True, max_size=30).map(lambda ids: sorted(ids, reverse=True)),
    shown=some.lists(some.integers(1, 200), unique=True, max_size=30),
    most=some.integers(1, 30),
)
def test_no_job_is_shown_twice_and_never_more_than_allowed(newest: list[int], shown: list[int], most: int) -> None:
    found = job_ids_to_show(newest[:most], [seen(job_id) for job_id in shown], most, now=NOW)

    assert len(found) == len(set(found)) <= most
    assert set(found) <= {*newest, *shown}
    assert found[:1] == newest[:1] or not newest
    assert len(found) >= len(newest[:most])
