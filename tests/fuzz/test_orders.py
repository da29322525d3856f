"""Random sequences of events in the life of orders, with the real SQL statements, compared with a simple model.

The model implements the contract: an order is sent again only if nothing was sent, or if somebody retries it.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sqlalchemy import Engine, delete, select

from tests.fuzz.effort import EFFORTS, effort
from worker.core.identity import FetchAddress
from worker.core.order_reply import OrderTaken
from worker.core.pacing.policy import PollPlan
from worker.core.reply import Link
from worker.core.slots import DEFAULT_SLOTS
from worker.store.counters import Tally
from worker.store.jobs import cancel, retry
from worker.store.order_results import (
    TakenOrder,
    attach,
    lock_attempts,
    record_lost,
    record_refused,
    record_taken,
    record_waiting,
    release_lapsed_orders,
    release_orders_of,
)
from worker.store.orders import (
    ClaimedOrder,
    NewOrder,
    claim_orders,
    insert_order,
    leave_queue,
    mark_attempted,
    release_unsent,
)
from worker.store.schema import jobs, orders, slots

START = datetime(2026, 3, 1, 12, tzinfo=UTC)
LEASE = timedelta(seconds=30)
HOLDERS = ("ada", "bob")
HOST = "api.test"
FINAL = ("completed", "failed", "expired", "cancelled")


@dataclass
class Order:
    """The expected state of one order. `sent` counts its requests, `allowed` how many may be sent in all."""

    state: str = "ordered"
    sent: int = 0
    allowed: int = 1
    attempt: str | None = None  # the token of the request whose answer is not recorded


@dataclass
class Claim:
    """A claim of a process, which may be lost by now."""

    order: ClaimedOrder
    holder: str
    ends: datetime
    attempted: bool = False


def _address(remote_id: str) -> FetchAddress:
    base = f"https://{HOST}/api/v6/images/fetch"
    return FetchAddress(f"{base}/{remote_id}", base, HOST)


class OrderMachine(RuleBasedStateMachine):
    """Orders, and the processes that send them."""

    engine: Engine

    def __init__(self) -> None:
        super().__init__()
        self.now = START
        self.numbers = count(1)
        self.model: dict[int, Order] = {}
        self.claims: list[Claim] = []

    @initialize()
    def begin(self) -> None:
        """Start with empty tables."""
        with self.engine.begin() as connection:
            for table in (orders, jobs, slots):
                connection.execute(delete(table))

    @rule(priority=st.integers(-1, 1))
    def order(self, priority: int) -> None:
        """An app orders."""
        number = next(self.numbers)
        new = NewOrder(
            f"key {number}",
            "default",
            "v6/images/text2img",
            HOST,
            "{}",
            "images",
            None,
            priority,
            None,
            None,
            None,
            3_600,
        )
        with self.engine.begin() as connection:
            job_id = insert_order(connection, new, now=self.now)
        self.model[job_id] = Order()

    @rule(holder=st.sampled_from(HOLDERS), limit=st.integers(1, 4))
    def claim(self, holder: str, limit: int) -> None:
        """A process claims orders."""
        token = f"token {next(self.numbers)}"
        with self.engine.begin() as connection:
            claimed = claim_orders(
                connection,
                "default",
                configured_slots=None,
                limit=limit,
                token=token,
                holder=holder,
                lease=LEASE,
                now=self.now,
            )
        for claimed_order in claimed:
            expected = self.model[claimed_order.id]
            assert expected.state == "ordered"
            assert expected.attempt is None
            self.claims.append(Claim(claimed_order, holder, self.now + LEASE))

    @rule(data=st.data())
    def attempt(self, data: st.DataObject) -> None:
        """A process is about to send a claimed order."""
        waiting = [claim for claim in self.claims if not claim.attempted]
        if not waiting:
            return
        claim = data.draw(st.sampled_from(waiting))
        with self.engine.begin() as connection:
            noted = mark_attempted(connection, [claim.order], now=self.now)
        if not noted:
            self.claims.remove(claim)
            return
        claim.attempted = True
        expected = self.model[claim.order.id]
        expected.sent += 1
        expected.attempt = claim.order.token
        assert self.now < claim.ends
        assert expected.sent <= expected.allowed, "an order is sent twice by itself"

    @rule(data=st.data(), answer=st.sampled_from(["taken", "ready", "refused", "waits", "lost"]))
    def answer(self, data: st.DataObject, answer: str) -> None:
        """An answer, or the loss of one, is recorded. It may come late."""
        sent = [claim for claim in self.claims if claim.attempted]
        if not sent:
            return
        claim = data.draw(st.sampled_from(sent))
        self.claims.remove(claim)
        expected, order, tally = self.model[claim.order.id], claim.order, Tally()
        stands = expected.attempt == order.token
        decides = stands and expected.state in ("ordered", "uncertain")
        remote_id = str(next(self.numbers))
        with self.engine.begin() as connection:
            locked = lock_attempts(connection, [order])
            match answer:
                case "taken" | "ready":
                    links = (Link("https://h/a.png"),) if answer == "ready" else ()
                    reply = OrderTaken(remote_id, _address(remote_id), "images", outputs=links)
                    item = TakenOrder(order, reply, PollPlan(5.0))
                    taken = record_taken(connection, item, locked, tally, now=self.now)
                    assert (taken is not None) == decides
                    after = "downloading" if links else "pending"
                case "refused":
                    ended = record_refused(connection, order, locked, "refused", "no", tally, now=self.now)
                    assert ended == decides
                    after = "failed"
                case "waits":
                    due_at = self.now + timedelta(seconds=5)
                    assert record_waiting(connection, order, locked, "later", due_at=due_at) == decides
                    after = "ordered"
                    expected.allowed += decides
                case _:
                    uncertain = record_lost(connection, order, locked, "reset", now=self.now)
                    assert uncertain == (decides and expected.state == "ordered")
                    after = "uncertain"
        if decides:
            expected.state = after
        if stands and answer != "lost":
            expected.attempt = None

    @rule(holder=st.sampled_from(HOLDERS))
    def crash(self, holder: str) -> None:
        """A process dies, and another one notices."""
        with self.engine.begin() as connection:
            release_orders_of(connection, [holder], now=self.now)
        self._lose([claim for claim in self.claims if claim.holder == holder], forget=True)

    @rule()
    def sweep(self) -> None:
        """A sweep releases the claims whose lease has ended."""
        with self.engine.begin() as connection:
            release_lapsed_orders(connection, now=self.now)
        self._lose([claim for claim in self.claims if claim.ends <= self.now], forget=False)

    def _lose(self, lost: list[Claim], *, forget: bool) -> None:
        for claim in lost:
            expected = self.model[claim.order.id]
            if claim.attempted and expected.attempt == claim.order.token and expected.state == "ordered":
                expected.state = "uncertain"
            if forget:
                self.claims.remove(claim)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """A process gives back an order that it did not send."""
        waiting = [claim for claim in self.claims if not claim.attempted]
        if waiting:
            claim = data.draw(st.sampled_from(waiting))
            self.claims.remove(claim)
            with self.engine.begin() as connection:
                release_unsent(connection, [claim.order], now=self.now)

    @rule(data=st.data(), action=st.sampled_from(["cancel", "retry", "attach"]))
    def act(self, data: st.DataObject, action: str) -> None:
        """Somebody cancels, retries or attaches."""
        if not self.model:
            return
        job_id = data.draw(st.sampled_from(sorted(self.model)))
        expected = self.model[job_id]
        remote_id = str(next(self.numbers))
        with self.engine.begin() as connection:
            match action:
                case "cancel":
                    changed = cancel(connection, job_id, Tally(), now=self.now)
                    assert changed == (expected.state not in FINAL)
                    state = "cancelled"
                case "retry":
                    changed = retry(connection, job_id, now=self.now)
                    assert changed == (expected.state in ("failed", "uncertain"))
                    state = "ordered"
                    if changed:
                        expected.allowed = expected.sent + 1
                        expected.attempt = None
                case _:
                    changed = attach(connection, job_id, remote_id, _address(remote_id), default=False, now=self.now)
                    assert changed == (expected.state == "uncertain")
                    state = "pending"
                    if changed:
                        expected.attempt = None
        if changed:
            expected.state = state

    @rule(seconds=st.sampled_from([1, 10, 31, 120]))
    def wait(self, seconds: int) -> None:
        """Time passes."""
        self.now += timedelta(seconds=seconds)

    @invariant()
    def rows_equal_the_model(self) -> None:
        """Every job has the expected state, and no more slots are taken than there are.

        An ended order may stay in its queue until the next clean-up, so that is done first.
        """
        with self.engine.begin() as connection:
            leave_queue(connection, ["default"], now=self.now)
            states = {row.id: row.status for row in connection.execute(select(jobs.c.id, jobs.c.status))}
            rows = connection.execute(select(orders)).all()
        assert states == {job_id: expected.state for job_id, expected in self.model.items()}
        claimed = [row for row in rows if row.claim_token is not None]
        assert len(claimed) <= DEFAULT_SLOTS
        for row in rows:
            state = states[row.id]
            if state in FINAL and row.claim_token is None:
                assert (row.queue, row.due_at, row.takes_slot) == (None, None, False)
            if state == "ordered" and row.claim_token is None:
                assert (row.queue, row.takes_slot) == ("default", False)
                assert row.due_at is not None


@EFFORTS
def test_given_any_sequence_of_events_when_orders_are_sent_then_every_row_equals_the_model(
    engine: Engine, examples: int
) -> None:
    """No order is sent twice, unless nothing was sent or somebody retried it."""
    machine = type("Machine", (OrderMachine,), {"engine": engine})
    share = 2 if engine.dialect.name == "sqlite" else 20
    run_state_machine_as_test(machine, settings=effort(examples, of=share, steps=20))
