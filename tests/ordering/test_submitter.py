"""Orders are sent once, within their slots, and what an answer says about them is recorded. On every database."""

import json
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta

import pytest
from sqlalchemy import Connection, insert, select, update

from tests.ordering.sending import KEY, Sending, answer_next_order, last_remote_id, lose_next_answer, refuse_next
from worker.core.order_reply import OrderTaken
from worker.core.pacing.policy import PollPlan
from worker.sandbox import Sandbox
from worker.store.counters import Tally
from worker.store.engine import database_now
from worker.store.jobs import cancel, retry
from worker.store.order_results import (
    Taken,
    TakenOrder,
    attach,
    lock_attempts,
    record_taken,
    release_lapsed_orders,
    release_orders_of,
)
from worker.store.orders import ClaimedOrder, claim_orders, mark_attempted
from worker.store.schema import breakers, jobs, orders, outputs
from worker.store.sweep_signs import sweep_signs
from worker.system.redaction import Scrubber
from worker.vendor.fetch_url import fetch_address

LEASE = timedelta(seconds=30)


def test_given_an_order_when_it_is_sent_then_its_job_is_polled_and_the_key_is_in_no_row(
    sending: Sending, sandbox: Sandbox
) -> None:
    job_id = sending.order("a lake", reference="order 7", priority=3)
    assert sending.job(job_id).status == "ordered"
    assert sending.job(job_id).due_at is None

    assert sending.submit() == "sent 1: 1 taken"

    job, order = sending.job(job_id), sending.row(job_id)
    assert (job.status, job.reference, job.priority) == ("pending", "order 7", 3)
    assert sandbox.job(job.remote_id) is not None
    assert job.fetch_url.endswith(f"/api/v6/images/fetch/{job.remote_id}")
    assert job.due_at is not None
    assert (order.claim_token, order.attempt_token, order.due_at, order.takes_slot) == (None, None, None, True)
    assert order.attempted_at is not None
    assert KEY not in f"{job} {order}"
    assert sandbox.charges.charged == 1


@pytest.mark.parametrize(
    ("status", "message", "state"),
    [
        (400, "The prompt field is required", "failed"),
        (200, "Invalid Api Key", "ordered"),
        (429, "Rate limit exceeded", "ordered"),
        (429, "Maximum 5 queued requests allowed", "ordered"),
        (503, "Try again later", "ordered"),
        (504, "Gateway time-out", "uncertain"),
    ],
)
def test_given_an_answer_that_quotes_the_start_of_a_key_when_it_is_recorded_then_it_is_in_no_row(
    sending: Sending, sandbox: Sandbox, status: int, message: str, state: str
) -> None:
    """Whole keys are removed before an answer is read. An API that shortens a key in its messages quotes a part."""
    key = "Zebra7Qx0123456789abcdef/+=&end"
    sending.scrubber.add([key])
    job_id = sending.order()
    refuse_next(sandbox, f"{message}: {key[:-4]}…", status=status)

    sending.submit()

    with sending.engine.connect() as connection:
        held = connection.execute(select(breakers)).all()
    assert sending.job(job_id).status == state
    assert "[key]" in str(sending.row(job_id).last_error)
    assert key[:16] not in f"{sending.job(job_id)} {sending.row(job_id)} {held}"


def test_given_an_order_that_is_ready_at_once_when_it_is_sent_then_its_outputs_are_downloaded_and_its_slot_is_free(
    sending: Sending, sandbox: Sandbox
) -> None:
    sandbox.options_now(min_seconds=0.0, max_seconds=0.0)
    job_id = sending.order()

    sending.submit()

    assert sending.job(job_id).status == "downloading"
    with sending.engine.connect() as connection:
        assert sending.downloads == list(connection.execute(select(outputs.c.id)).scalars())
    assert sending.row(job_id).queue is None


def test_given_more_orders_than_slots_when_they_are_sent_then_the_others_wait_without_a_refusal(
    sending: Sending, sandbox: Sandbox
) -> None:
    ids = [sending.order(f"a lake, {number}") for number in range(12)]

    sending.submit()
    sending.submit()

    assert sending.states() == ["pending"] * 5 + ["ordered"] * 7
    assert (sandbox.charges.charged, sandbox.charges.refused) == (5, 0)
    with sending.engine.begin() as connection:  # two jobs end: their slots are free
        now = database_now(connection)
        ended = {"status": "cancelled", "completed_at": now, "due_at": None}
        connection.execute(update(jobs).where(jobs.c.id.in_(ids[:2])).values(**ended))
    sandbox.options_now(slots=7)  # at the API these two go on
    sending.submit()
    assert sending.states().count("pending") == 5
    assert sandbox.charges.charged == 7


def test_given_orders_of_several_priorities_when_slots_are_few_then_the_highest_priority_and_then_the_oldest_is_sent(
    make_sending: Callable[..., Sending],
) -> None:
    sending = make_sending(configured_slots=3)
    low, first, second, high = (
        sending.order(f"a lake, {number}", priority=priority) for number, priority in enumerate((-5, 0, 0, 9))
    )

    sending.submit()

    assert [sending.job(job_id).status for job_id in (high, first, second, low)] == [*["pending"] * 3, "ordered"]


def test_given_two_processes_when_both_send_at_once_then_each_order_is_charged_once_within_the_slots(
    make_sending: Callable[..., Sending], sandbox: Sandbox
) -> None:
    first, second = make_sending(), make_sending(holder="tests/2/2")
    for number in range(20):
        first.order(f"a lake, {number}")

    threads = [threading.Thread(target=sending.submit) for sending in (first, second) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(first.states()) == ["ordered"] * 15 + ["pending"] * 5
    assert (sandbox.charges.charged, sandbox.charges.refused, sandbox.charges.double) == (5, 0, 0)


@pytest.mark.long
def test_given_an_account_with_ten_thousand_orders_when_another_one_orders_then_it_is_sent_at_once(
    make_sending: Callable[..., Sending], sandbox: Sandbox
) -> None:
    sending = make_sending(configured_slots=5)
    sandbox.options_now(slots=0)
    first = sending.order("the first", account="shop")
    ids = range(1_000_000, 1_010_000)
    with sending.engine.begin() as connection:
        job = connection.execute(select(*jobs.c).where(jobs.c.id == first)).one()
        order = connection.execute(select(*orders.c).where(orders.c.id == first)).one()
        job_values = dict(zip(jobs.c.keys(), job, strict=True))
        order_values = dict(zip(orders.c.keys(), order, strict=True))
        connection.execute(insert(jobs), [{**job_values, "id": id_, "fetch_base": f"order:{id_}"} for id_ in ids])
        connection.execute(insert(orders), [{**order_values, "id": id_, "order_key": str(id_)} for id_ in ids])
    sending.submit()

    job_id = sending.order("the other account's")
    began = time.monotonic()
    sending.submit()

    assert sending.job(job_id).status == "pending"
    assert time.monotonic() - began < 1.0


@pytest.mark.parametrize(
    ("message", "status", "code"),
    [
        ("The prompt field is required.", 422, "bad_request"),
        ("NSFW content detected", 400, "moderated"),
        ("Model not found", 404, "unknown_model"),
    ],
)
def test_given_an_order_that_the_api_refuses_when_it_is_sent_then_its_job_fails_with_the_words_of_the_api(
    sending: Sending, sandbox: Sandbox, message: str, status: int, code: str
) -> None:
    refuse_next(sandbox, message, status=status)
    job_id = sending.order()

    sending.submit()

    job = sending.job(job_id)
    assert (job.status, job.error_code) == ("failed", code)
    assert message in job.error_message
    assert sending.ended == [job_id]
    assert sending.row(job_id).queue is None
    assert sending.submit() == "nothing to send"


def test_given_a_lost_answer_when_an_order_was_sent_then_it_is_uncertain_and_never_sent_again_by_itself(
    sending: Sending, sandbox: Sandbox
) -> None:
    lose_next_answer(sandbox)
    job_id = sending.order()

    assert sending.submit() == "sent 1: 1 uncertain"
    assert sending.submit() == "nothing to send"

    job, order = sending.job(job_id), sending.row(job_id)
    assert (job.status, job.completed_at, job.due_at) == ("uncertain", None, None)
    assert "sent whole" in order.last_error
    assert order.attempted_at is not None
    assert sandbox.charges.charged == 1


def test_given_an_uncertain_order_when_its_remote_job_is_named_then_it_is_polled(
    sending: Sending, sandbox: Sandbox
) -> None:
    lose_next_answer(sandbox)
    job_id = sending.order()
    sending.submit()
    remote_id = last_remote_id(sandbox)
    address = fetch_address(f"{sandbox.root_url}/api/v6/images/fetch/{remote_id}", remote_id, sending.api)

    with sending.engine.begin() as connection:
        now = database_now(connection)
        assert attach(connection, job_id, remote_id, address, default=False, now=now)
        assert not attach(connection, job_id, remote_id, address, default=False, now=now)

    job = sending.job(job_id)
    assert (job.status, job.remote_id, job.fetch_url) == ("pending", remote_id, address.url)


def test_given_an_uncertain_order_when_it_is_retried_then_it_is_sent_once_more(
    sending: Sending, sandbox: Sandbox
) -> None:
    lose_next_answer(sandbox)
    job_id = sending.order()
    sending.submit()

    with sending.engine.begin() as connection:
        assert retry(connection, job_id, now=database_now(connection))
    assert sending.job(job_id).status == "ordered"
    sending.submit()

    assert sending.job(job_id).status == "pending"
    assert sandbox.charges.charged == 2


def test_given_a_refused_order_when_it_is_retried_then_it_is_sent_again(sending: Sending, sandbox: Sandbox) -> None:
    refuse_next(sandbox, "The prompt field is required.", status=422)
    job_id = sending.order()
    sending.submit()

    with sending.engine.begin() as connection:
        assert retry(connection, job_id, now=database_now(connection))
    sending.submit()

    assert sending.job(job_id).status == "pending"


@pytest.mark.parametrize("state", ["ordered", "uncertain"])
def test_given_an_order_that_waits_or_is_uncertain_when_it_is_cancelled_then_it_is_final_and_not_sent(
    sending: Sending, sandbox: Sandbox, state: str
) -> None:
    job_id = sending.order()
    if state == "uncertain":
        lose_next_answer(sandbox)
        sending.submit()
    charged = sandbox.charges.charged

    with sending.engine.begin() as connection:
        tally = Tally()
        assert cancel(connection, job_id, tally, now=database_now(connection))
    sending.submit()

    assert sending.job(job_id).status == "cancelled"
    assert sandbox.charges.charged == charged


def test_given_an_api_that_is_away_when_orders_are_sent_then_they_wait_and_are_sent_when_it_is_back(
    sending: Sending, sandbox: Sandbox
) -> None:
    job_id = sending.order()
    with sandbox.away():
        assert sending.submit() == "sent 1: 1 not sent"
        assert sending.job(job_id).status == "ordered"
        order = sending.row(job_id)
        assert (order.attempts, order.attempted_at, order.attempt_token) == (0, None, None)
    with sending.engine.begin() as connection:
        connection.execute(update(orders).values(due_at=database_now(connection)))
        connection.execute(update(breakers).values(probe_at=None))

    sending.submit()

    assert sending.job(job_id).status == "pending"
    assert sandbox.charges.charged == 1


def test_given_a_plan_with_fewer_slots_when_it_refuses_an_order_then_the_number_is_learned_and_the_order_waits(
    sending: Sending, sandbox: Sandbox
) -> None:
    sandbox.options_now(slots=3)
    for number in range(8):
        sending.order(f"a lake, {number}")
    for _ in range(3):
        sending.submit()

    assert sending.states().count("pending") == 3
    assert sending.states().count("ordered") == 5
    assert sending.learned_slots() == 3
    assert sandbox.charges.refused <= 2
    assert sandbox.charges.charged == 3


@pytest.mark.parametrize(
    ("body", "held"), [('{"status": "error", "message": "Invalid Api Key"}', "key rejected"),
                       ('{"status": "error", "message": "Insufficient credits"}', "no credits")]
)  # fmt: skip
def test_given_an_account_that_the_api_refuses_when_orders_wait_then_only_a_probe_is_sent_and_none_is_lost(
    make_sending: Callable[..., Sending], sandbox: Sandbox, body: str, held: str
) -> None:
    sending = make_sending(proven=False)
    for number in range(4):
        sending.order(f"a lake, {number}")
    answer_next_order(sandbox, body)

    sending.submit()
    sending.submit()

    assert sending.states() == ["ordered"] * 4
    assert sandbox.charges.charged == 0
    with sending.engine.connect() as connection:
        reason = connection.execute(select(breakers.c.reason).where(breakers.c.scope == "account")).scalar_one()
    assert reason.startswith(held)


def test_given_an_endpoint_that_is_not_allowed_any_more_when_its_order_is_claimed_then_it_waits_and_holds_nobody(
    sending: Sending, sandbox: Sandbox
) -> None:
    waiting, other = sending.order("a lake"), sending.order("a hill")
    with sending.engine.begin() as connection:
        elsewhere = {"endpoint": "https://elsewhere.test/api/v6/images/text2img"}
        connection.execute(update(orders).where(orders.c.id == waiting).values(**elsewhere))

    sending.submit()

    assert (sending.job(waiting).status, sending.job(other).status) == ("ordered", "pending")
    assert "not on SD_API_HOSTS" in sending.row(waiting).last_error
    with sending.engine.connect() as connection:
        assert not connection.execute(select(breakers.c.name).where(breakers.c.reason.is_not(None))).all()


@pytest.mark.parametrize("sent", [True, False])
def test_given_an_internal_error_when_the_request_may_have_begun_then_the_order_is_uncertain_and_else_sent_again(
    sending: Sending, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, *, sent: bool
) -> None:
    def fail(order: ClaimedOrder, key: object, permit: Callable[[], object]) -> None:
        if sent:
            permit()
        raise RuntimeError("a mistake in the code")

    job_id = sending.order()
    with monkeypatch.context() as patch:
        patch.setattr(sending.client, "send", fail)
        sending.submit()
    assert sending.job(job_id).status == ("uncertain" if sent else "ordered")

    sending.submit()

    assert sandbox.charges.charged == (0 if sent else 1)


# ── lost senders ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _claim(sending: Sending, *, seconds: float = 30.0) -> ClaimedOrder:
    with sending.engine.begin() as connection:
        claimed = claim_orders(
            connection,
            "default",
            configured_slots=None,
            limit=1,
            token=sending.leases.new_token(),
            holder=sending.leases.holder,
            lease=timedelta(seconds=seconds),
            now=database_now(connection),
        )
    (order,) = claimed
    return order


def _attempt(sending: Sending, order: ClaimedOrder) -> bool:
    with sending.engine.begin() as connection:
        return bool(mark_attempted(connection, [order], now=database_now(connection)))


def _record_taken(connection: Connection, order: ClaimedOrder, reply: OrderTaken, *, now: datetime) -> Taken | None:
    locked = lock_attempts(connection, [order])
    return record_taken(connection, TakenOrder(order, reply, PollPlan(1.0)), locked, Tally(), now=now)


@pytest.mark.parametrize(("attempted", "state"), [(False, "ordered"), (True, "uncertain")])
@pytest.mark.parametrize("lost", ["its process is dead", "its lease has ended"])
def test_given_a_lost_sender_when_its_claims_are_released_then_only_an_order_whose_request_began_is_uncertain(
    sending: Sending, attempted: bool, state: str, lost: str
) -> None:
    job_id = sending.order()
    order = _claim(sending)
    if attempted:
        assert _attempt(sending, order)

    with sending.engine.begin() as connection:
        now = database_now(connection)
        assert not sweep_signs(connection, now=now, queued_before=now).orders
        if lost == "its process is dead":
            released = release_orders_of(connection, [sending.leases.holder], now=now)
        else:
            later = now + LEASE
            assert sweep_signs(connection, now=later, queued_before=now).orders
            released = release_lapsed_orders(connection, now=later)

    assert (released.due, released.uncertain) == (((), (job_id,)) if attempted else ((job_id,), ()))
    assert sending.job(job_id).status == state
    assert not _attempt(sending, order), "the claim is lost: nothing may be sent with it"


def test_given_an_answer_that_comes_after_the_lease_when_the_order_is_uncertain_then_the_answer_decides(
    sending: Sending, sandbox: Sandbox
) -> None:
    job_id = sending.order()
    order = _claim(sending)
    _attempt(sending, order)
    with sending.engine.begin() as connection:
        release_lapsed_orders(connection, now=database_now(connection) + LEASE)
    assert sending.job(job_id).status == "uncertain"
    address = fetch_address(f"{sandbox.root_url}/api/v6/images/fetch/77", "77", sending.api)

    with sending.engine.begin() as connection:
        now = database_now(connection)
        taken = _record_taken(connection, order, OrderTaken("77", address, "images"), now=now)

    assert taken is not None
    assert (sending.job(job_id).status, sending.job(job_id).remote_id) == ("pending", "77")


def test_given_an_order_that_was_retried_when_the_answer_to_its_first_request_comes_then_it_changes_nothing(
    sending: Sending, sandbox: Sandbox
) -> None:
    job_id = sending.order()
    order = _claim(sending)
    _attempt(sending, order)
    with sending.engine.begin() as connection:
        now = database_now(connection)
        release_lapsed_orders(connection, now=now + LEASE)
        retry(connection, job_id, now=now)
    address = fetch_address(f"{sandbox.root_url}/api/v6/images/fetch/77", "77", sending.api)

    with sending.engine.begin() as connection:
        now = database_now(connection)
        reply = OrderTaken("77", address, "images")
        assert _record_taken(connection, order, reply, now=now) is None

    assert sending.job(job_id).status == "ordered"


def test_given_an_order_that_is_cancelled_while_it_is_sent_when_the_answer_comes_then_the_job_stays_cancelled(
    sending: Sending, sandbox: Sandbox
) -> None:
    job_id = sending.order()
    order = _claim(sending)
    _attempt(sending, order)
    address = fetch_address(f"{sandbox.root_url}/api/v6/images/fetch/77", "77", sending.api)

    with sending.engine.begin() as connection:
        now = database_now(connection)
        cancel(connection, job_id, Tally(), now=now)
        reply = OrderTaken("77", address, "images")
        assert _record_taken(connection, order, reply, now=now) is None

    assert sending.job(job_id).status == "cancelled"
    assert "77" in sending.row(job_id).last_error


def test_given_an_answer_with_the_id_of_another_job_when_it_is_recorded_then_the_order_fails_and_the_job_is_unchanged(
    sending: Sending, sandbox: Sandbox
) -> None:
    first, second = sending.order("a lake"), sending.order("a hill")
    address = fetch_address(f"{sandbox.root_url}/api/v6/images/fetch/77", "77", sending.api)
    for _ in range(2):
        order = _claim(sending)
        _attempt(sending, order)
        with sending.engine.begin() as connection:
            now = database_now(connection)
            _record_taken(connection, order, OrderTaken("77", address, "images"), now=now)

    assert sending.job(first).status == "pending"
    assert (sending.job(second).status, sending.job(second).error_code) == ("failed", "duplicate_id")


def test_given_a_message_that_is_delivered_twice_when_it_orders_then_there_is_one_order(sending: Sending) -> None:
    first = sending.order("a lake", key="task:7")
    sending.submit()

    assert sending.order("a lake", key="task:7") == first
    assert sending.states() == ["pending"]


def test_given_a_payload_with_the_key_when_it_is_claimed_then_it_is_not_sent_and_the_key_is_removed(
    make_sending: Callable[..., Sending],
) -> None:
    """The app that made the order has no key, so it could not notice."""
    secret = "sk-canary-7f3a9d2e-4b1c"
    sending = make_sending(changes={"payload_secrets": lambda: Scrubber([secret])})
    job_id = sending.order(f"a lake {secret}")

    sending.submit()

    job, order = sending.job(job_id), sending.row(job_id)
    assert (job.status, job.error_code) == ("failed", "bad_request")
    assert "payload contains an API key" in job.error_message
    assert secret not in order.payload
    assert json.loads(order.payload)["prompt"].startswith("a lake ")

    with sending.engine.begin() as connection:
        assert retry(connection, job_id, now=database_now(connection))
    sending.submit()

    assert sending.job(job_id).status == "failed", "what is left is not what the app ordered"
    assert sending.sandbox.charges.charged == 0
