"""Jobs as rows in Flower: the fields of each state, and the selection of the newest and current jobs."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from worker.core.answer_history import NOTE_SEPARATOR
from worker.core.flower_rows import (
    MAX_MESSAGE_LENGTH,
    SHOWN_AFTER_END,
    FlowerJob,
    Outputs,
    job_ids_to_show,
    task_fields,
)

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
JOB = FlowerJob(
    *(7, "shop", "12202888", "image", None, "pending", 0, None, NOW, None, None, None, None, None, None),
)


def after(seconds: float) -> datetime:
    """Return the time this number of seconds after submission."""
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
        ({"status": "ordered", "remote_id": ""}, "ORDERED", "the order is not taken yet", None),
        (
            {"status": "uncertain", "remote_id": ""},
            *("UNCERTAIN", "the order was sent and its answer is lost: attach, retry or cancel it", None),
        ),
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
def test_each_job_state_has_its_task_state_and_result(
    changes: dict[str, Any], state: str, result: str | None, exception: str | None
) -> None:
    fields = task_fields(replace(JOB, **changes))

    assert (fields["state"], fields["result"], fields["exception"]) == (state, result, exception)


def test_the_task_has_the_times_of_the_job() -> None:
    completed = replace(
        JOB, **(READY | {"status": "completed", "completed_at": after(10), "outputs": Outputs(1, 1, 5)})
    )

    fields = task_fields(completed)

    start = NOW.timestamp()
    assert (fields["received"], fields["started"], fields["succeeded"]) == (start, start + 9, start + 10)
    assert (fields["timestamp"], fields["runtime"]) == (start + 10, 10.0)
    assert (fields["failed"], fields["revoked"]) == (None, None)


KWARGS = {"id": 7, "remote_id": "12202888", "account": "shop", "kind": "image"}


@pytest.mark.parametrize(
    ("reference", "args", "kwargs"),
    [
        (None, ("12202888",), KWARGS),
        ("order 5", ("12202888", "order 5"), KWARGS | {"reference": "order 5"}),
        ("r" * 255, ("12202888", "r" * 39 + "…"), KWARGS | {"reference": "r" * 255}),
    ],
)
def test_the_arguments_name_the_job_and_only_the_column_of_the_table_is_shortened(
    reference: str | None, args: tuple[str, ...], kwargs: dict[str, object]
) -> None:
    fields = task_fields(replace(JOB, reference=reference))

    assert (fields["args"], fields["kwargs"]) == (repr(args), repr(kwargs))


def test_personal_data_in_messages_is_masked() -> None:
    polled = task_fields(replace(JOB, **(ASKED | {"last_answer": "9.0 s: unknown id: ask ann@shop.example"})))
    failed = task_fields(
        replace(
            JOB,
            status="failed",
            completed_at=after(10),
            error_code="api_failed",
            error_message="prompt: my own face, see https://cdn.test/u/ann.png?sig=1",
        )
    )

    assert polled["result"] == "polled 2 times: unknown id: ask [e-mail]"
    assert failed["exception"] == 'api_failed: prompt: "[text]"'


def test_an_address_that_was_cut_is_not_shown() -> None:
    message = f"{'x ' * 145}ann@shop.example"[:MAX_MESSAGE_LENGTH]
    failed = replace(JOB, status="failed", completed_at=after(10), error_code="api_failed", error_message=message)

    assert "ann@shop" in message
    assert "ann" not in str(task_fields(failed)["exception"])


def test_a_job_that_ended_before_its_submission_by_another_clock_lasted_0_seconds() -> None:
    assert task_fields(replace(JOB, status="cancelled", completed_at=after(-0.5)))["runtime"] == 0.0


def test_all_tasks_have_the_same_attributes() -> None:
    """Otherwise a retried job would keep attributes of its former end."""
    pending = task_fields(JOB)
    cancelled = task_fields(replace(JOB, status="cancelled", completed_at=after(10)))

    assert set(pending) == set(cancelled)


def row(job_id: int, completed_at: datetime | None = None) -> FlowerJob:
    """Return a job that is pending, or that ended at `completed_at`."""
    return replace(JOB, id=job_id, status="pending" if completed_at is None else "failed", completed_at=completed_at)


def test_the_newest_and_the_current_jobs_are_shown() -> None:
    over, ended = NOW - SHOWN_AFTER_END, NOW - SHOWN_AFTER_END / 2
    shown = [row(1), row(2, over), row(3, ended), row(4, over), row(95)]

    assert job_ids_to_show(range(100, 90, -1), shown, 10, now=NOW) == [100, 99, 98, 97, 96, 95, 3, 1, 94, 93]


def test_new_jobs_are_shown_even_with_many_current_jobs() -> None:
    shown = [row(job_id) for job_id in range(1, 51)]

    job_ids = job_ids_to_show(range(300, 250, -1), shown, 50, now=NOW)

    assert job_ids == [*range(300, 275, -1), *range(50, 25, -1)]


@given(
    newest=some.lists(some.integers(1, 200), unique=True, max_size=30).map(lambda ids: sorted(ids, reverse=True)),
    shown=some.lists(some.integers(1, 200), unique=True, max_size=30),
    limit=some.integers(1, 30),
)
def test_no_job_is_shown_twice_and_the_limit_is_kept(newest: list[int], shown: list[int], limit: int) -> None:
    job_ids = job_ids_to_show(newest[:limit], [row(job_id) for job_id in shown], limit, now=NOW)

    assert len(job_ids) == len(set(job_ids)) <= limit
    assert set(job_ids) <= {*newest, *shown}
    assert job_ids[:1] == newest[:1] or not newest
    assert len(job_ids) >= len(newest[:limit])


def test_given_an_order_without_remote_id_then_its_kind_is_shown() -> None:
    order = replace(JOB, status="ordered", remote_id="")

    assert task_fields(order)["args"] == "('image',)"
    assert task_fields(order)["kwargs"] == "{'id': 7, 'account': 'shop', 'kind': 'image'}"
    assert task_fields(replace(order, reference="order-77"))["args"] == "('image', 'order-77')"
