"""The late looks of one process for tests, on a stand-in of the API that answers as a test says."""

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from pydantic import SecretStr
from sqlalchemy import Engine, Row

from tests.rows import add_job
from tests.web import Answer, Web, page
from worker.coordination.rate_limiter import RateLimiter
from worker.core.circuit_breaker import CircuitBreaker
from worker.core.pacing.policy import Pace
from worker.polling.api_client import ApiClient
from worker.polling.late_looks import LateLooks
from worker.polling.options import AfterCommit, PollOptions
from worker.store.breakers import locked_breaker, save_breaker
from worker.store.engine import database_now
from worker.store.late_looks import look_of
from worker.store.schema import late_looks
from worker.system.redaction import Scrubber
from worker.vendor.fetch_url import AllowedApi

KEY = "sk-canary-7f3a9d2e-4b1c"
HOUR = 3_600.0
AFTER = (HOUR, 3 * HOUR, 10 * HOUR, 24 * HOUR)


class Looks:
    """The late looks of one process, on a stand-in and a database."""

    def __init__(self, engine: Engine, redis_url: str, web: Web, *, rps: float = 1_000.0) -> None:
        self.engine, self.web = engine, web
        self.queued: list[int] = []
        self.notified: list[int] = []
        self.host = f"127.0.0.1:{web.port}"
        self.url = f"{web.url}/api/v3/fetch"
        self.budget = RateLimiter(redis_url)
        self.rps = rps
        allowed = AllowedApi(f"{web.url}/api/v3", frozenset({self.host}))
        self.looks = LateLooks(
            engine=engine,
            api=ApiClient(allowed, Scrubber([KEY]), timeout=5.0, connections=4),
            budget=self.budget,
            options=PollOptions(
                keys={"default": SecretStr(KEY)},
                rps=lambda _: self.rps,
                pace=Pace("learned", 0.5, 0.0),
                api_timeout=5.0,
                late_looks=AFTER,
            ),
            after_commit=AfterCommit(queue_downloads=self.queued.extend, notify=self.notified.extend),
        )
        with engine.begin() as connection:
            locked_breaker(connection, "account", "default")
            save_breaker(connection, CircuitBreaker("account", "default", proven=True))

    def now(self) -> datetime:
        """The database's current time."""
        with self.engine.connect() as connection:
            return database_now(connection)

    def expired(self, remote_id: str = "1", *, hours_ago: float = 1.1, looks: int = 0, **changes: Any) -> int:
        """Create a job whose deadline passed this long ago, with a due look."""
        now = self.now()
        deadline = now - timedelta(hours=hours_ago)
        values: dict[str, Any] = {
            **{"fetch_url": f"{self.url}/{remote_id}", "fetch_base": self.url, "fetch_host": self.host},
            **{"status": "expired", "error_code": "expired", "error_message": "not ready", "due_at": None},
            **{"completed_at": deadline, "submitted_at": deadline, "tracked_at": deadline, "deadline_at": deadline},
        }
        with self.engine.begin() as connection:
            job_id = add_job(connection, remote_id, **(values | changes))
            connection.execute(late_looks.insert().values(job_id=job_id, looks=looks, due_at=now))
        return job_id

    def says(self, answer: object, status: int = 200, remote_id: str = "1", **headers: str) -> None:
        """Set the answer about a job."""
        self.answers(page(status, json.dumps(answer).encode(), **headers), remote_id)

    def answers(self, answer: Answer, remote_id: str = "1") -> None:
        """Set the raw answer about a job."""
        self.web.serves(f"/api/v3/fetch/{remote_id}", answer)

    def look(self, job_id: int) -> Row[Any] | None:
        """Return the committed look of a job."""
        with self.engine.connect() as connection:
            return look_of(connection, job_id)

    def breaker(
        self, change: Callable[[CircuitBreaker], CircuitBreaker], scope: Any = "account", name: str = "default"
    ) -> None:
        """Change the circuit breaker of an account or a host."""
        with self.engine.begin() as connection:
            save_breaker(connection, change(locked_breaker(connection, scope, name)))
