"""The polling of one process for tests: a poller, and a stand-in of the API that it polls."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

from pydantic import SecretStr
from sqlalchemy import Engine, Row, select

from tests.waiting import wait_until
from worker.coordination.leases import LeaseKeeper
from worker.coordination.rate_limiter import RateLimiter
from worker.core.pacing.policy import Pace
from worker.polling.api_client import ApiClient
from worker.polling.options import AfterCommit, PollOptions
from worker.polling.poller import Poller
from worker.sandbox import Answer, Sandbox
from worker.store.engine import database_now
from worker.store.jobs import NewJob, insert_jobs
from worker.store.schema import breakers, jobs
from worker.system.redaction import Scrubber
from worker.vendor.fetch_url import AllowedApi, fetch_address

KEY = "sandbox-key"

all_polls: list["Polls"] = []  # of the current test


class Polls:
    """The polling of one process: a poller, the outputs that it queued, and the stand-in that it polls."""

    def __init__(
        self,
        engine: Engine,
        redis_url: str,
        sandbox: Sandbox,
        other_host: str = "",
        options: Mapping[str, Any] | None = None,
        **keys: str,
    ) -> None:
        self.engine = engine
        self.sandbox = sandbox
        self.queued: list[int] = []
        self.notified: list[int] = []
        self.api = AllowedApi(sandbox.url, frozenset({sandbox.url.split("/")[2], other_host}))
        all_polls.append(self)
        self.keys = {name: SecretStr(key) for name, key in (keys or {"default": KEY}).items()}
        self.rps = 2_000.0
        self.client = ApiClient(self.api, Scrubber([KEY]), timeout=5.0, connections=16)
        self.budget = RateLimiter(redis_url)
        self.leases = LeaseKeeper(engine, lease=timedelta(seconds=30))
        defaults = PollOptions(keys=self.keys, rps=lambda _: self.rps, pace=Pace("learned", 0.5, 0.0), api_timeout=5.0)
        self.poller = Poller(
            engine=engine,
            api=self.client,
            budget=self.budget,
            leases=self.leases,
            options=replace(defaults, **(options or {})),
            after_commit=AfterCommit(queue_downloads=self.queued.extend, notify=self.notified.extend),
        )

    def track(self, remote_ids: Sequence[Any], **changes: Any) -> list[int]:
        """Insert jobs that are due now."""
        with self.engine.begin() as connection:
            now = database_now(connection)
            new = [self.new_job(str(remote_id), now, **changes) for remote_id in remote_ids]
            return [job_id for job_id, _ in insert_jobs(connection, new, now=now)]

    def new_job(self, remote_id: str, now: Any, *, host: str | None = None, **changes: Any) -> NewJob:
        """Return a new job that is due now."""
        elsewhere = f"http://{host}/api/v3/fetch/{remote_id}" if host else None
        values: dict[str, Any] = {
            "account": "default",
            "kind": "image",
            "priority": 0,
            "reference": None,
            "on_done": None,
            "eta": None,
            "submitted_at": now,
            "deadline_at": now + timedelta(hours=1),
            "due_at": now,
        }
        values |= {"address": fetch_address(elsewhere, remote_id, self.api)} | changes
        return NewJob(remote_id=remote_id, **values)

    def run(self, seconds: float = 0.3) -> str:
        """Do a short poll run."""
        return str(self.poller.run(seconds=seconds))

    def until(self, reached: Callable[[], bool]) -> None:
        """Poll until a condition holds."""
        wait_until(lambda: reached() or (self.run() and reached()), "polls reach the expected state", seen=self._states)

    def _states(self) -> object:
        with self.engine.connect() as connection:
            return connection.execute(select(jobs.c.id, jobs.c.status, jobs.c.polls)).all()

    def row(self, job_id: int) -> Row[Any]:
        """Return the row of a job."""
        with self.engine.connect() as connection:
            return connection.execute(select(jobs).where(jobs.c.id == job_id)).one()

    def breaker(self, name: str) -> Row[Any]:
        """Return the row of a circuit breaker."""
        with self.engine.connect() as connection:
            return connection.execute(select(breakers).where(breakers.c.name == name)).one()


def submitted(sandbox: Sandbox, count: int, samples: int = 2) -> list[str]:
    """Submit jobs to the stand-in. Return their remote ids."""
    return [str(sandbox.submit(f"a lake, {number}", samples=samples)["id"]) for number in range(count)]


def scripted(message: bytes, status: int = 200, times: int = 50) -> list[Answer]:
    """Return the same answer many times."""
    return [Answer(status, {"Content-Type": "application/json"}, message)] * times
