"""The sending of orders by one process for tests: a submitter, and a stand-in of the API that it posts to."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from types import MappingProxyType
from typing import Any

from pydantic import SecretStr
from sqlalchemy import Engine, Row, select

from worker.client.ordering import planned_order
from worker.coordination.leases import LeaseKeeper
from worker.coordination.rate_limiter import RateLimiter
from worker.core.pacing.backlog import OrderBacklog
from worker.core.pacing.policy import Pace
from worker.net.pooled_adapter import PooledAdapter
from worker.ordering.options import AfterRecording, OrderOptions
from worker.ordering.order_client import OrderClient
from worker.ordering.submitter import Submitter
from worker.polling.api_client import MAX_ANSWER_BYTES
from worker.sandbox import Answer, Sandbox
from worker.sandbox.answers import json_answer
from worker.sandbox.scenarios import SCENARIOS, Scenario
from worker.settings import Settings
from worker.store.bulk_write import insert_missing
from worker.store.engine import database_now
from worker.store.orders import insert_order, job_of_order
from worker.store.schema import breakers, jobs, orders, slots
from worker.system.redaction import Scrubber
from worker.vendor.fetch_url import AllowedApi

KEY = "sandbox-key"
ENDPOINT = "v6/images/text2img"
NO_CHANGES: Mapping[str, Any] = MappingProxyType({})


class Sending:
    """The sending of orders by one process, named by its claims' holder."""

    def __init__(
        self,
        engine: Engine,
        redis_url: str,
        sandbox: Sandbox,
        *,
        holder: str = "tests/1/1",
        configured_slots: int | None = None,
        lease: float = 30.0,
        proven: bool = True,
        changes: Mapping[str, Any] = NO_CHANGES,
    ) -> None:
        self.engine = engine
        self.sandbox = sandbox
        self.downloads: list[int] = []
        if proven:  # the key is known to work; otherwise the first request is made alone
            with engine.begin() as connection:
                insert_missing(connection, breakers, {"scope": "account", "name": "default", "proven": True})
        self.ended: list[int] = []
        self.api = AllowedApi(sandbox.url, frozenset({sandbox.url.split("/")[2]}))
        self.options = replace(
            OrderOptions(
                api=self.api,
                keys={"default": SecretStr(KEY), "shop": SecretStr(KEY)},
                rps=lambda _: 2_000.0,
                slots=lambda _: configured_slots,
                pace=Pace("learned", 0.5, 0.0),
                timeout=3.0,
                user_agent="tests",
                proxy=None,
                status_words={},
            ),
            **changes,
        )
        self.leases = LeaseKeeper(engine, lease=timedelta(seconds=lease), holder=holder)
        self.scrubber = Scrubber([KEY])
        self.client = OrderClient(self.options, self.scrubber, PooledAdapter(limit=MAX_ANSWER_BYTES, connections=1))
        self.submitter = Submitter(
            engine=engine,
            client=self.client,
            budget=RateLimiter(redis_url),
            leases=self.leases,
            options=self.options,
            backlog=OrderBacklog(),
            after=AfterRecording(poll=lambda: None, queue_downloads=self.downloads.extend, notify=self.ended.extend),
        )

    def order(self, prompt: str = "a lake", *, key: str | None = None, endpoint: str = ENDPOINT, **options: Any) -> int:
        """Insert an order, and return the id of its job."""
        settings = Settings(sd_api_url=self.sandbox.url)
        with self.engine.begin() as connection:
            now = database_now(connection)
            new = planned_order(settings, key or f"key of {prompt}", endpoint, {"prompt": prompt}, options)
            return job_of_order(connection, new.key) or insert_order(connection, new, now=now)

    def submit(self) -> str:
        """Send the orders that can be sent now. Return the report."""
        return str(self.submitter.submit_once())

    def job(self, job_id: int) -> Row[Any]:
        """Return the row of a job."""
        with self.engine.connect() as connection:
            return connection.execute(select(jobs).where(jobs.c.id == job_id)).one()

    def row(self, job_id: int) -> Row[Any]:
        """Return the row of an order."""
        with self.engine.connect() as connection:
            return connection.execute(select(orders).where(orders.c.id == job_id)).one()

    def states(self) -> list[str]:
        """Return the states of all jobs, oldest first."""
        with self.engine.connect() as connection:
            return list(connection.execute(select(jobs.c.status).order_by(jobs.c.id)).scalars())

    def learned_slots(self, account: str = "default") -> int | None:
        """Return the number of slots that was learned."""
        with self.engine.connect() as connection:
            number: int | None = connection.execute(select(slots.c.slots).where(slots.c.account == account)).scalar()
            return number


def lose_next_answer(sandbox: Sandbox) -> None:
    """Let the stand-in take the next order, and close its connection without an answer."""
    sandbox.next_orders(SCENARIOS["lost-closed"], 1)


def refuse_next(sandbox: Sandbox, message: str, *, status: int = 400) -> None:
    """Let the stand-in refuse the next order."""
    refusal = json_answer({"status": "error", "message": message}, status=status)
    sandbox.next_orders(Scenario("refused by the test", order=lambda: refusal), 1)


def answer_next_order(sandbox: Sandbox, body: str) -> None:
    """Let the stand-in answer the next order with this body, and not take it."""
    answer = Answer(200, {"Content-Type": "application/json"}, body.encode())
    sandbox.next_orders(Scenario("answered by the test", order=lambda: answer), 1)


def last_remote_id(sandbox: Sandbox) -> str:
    """Return the id of the job that the stand-in took last."""
    return sandbox._behaviour.latest(1)[0].id
