"""Claimed jobs and answers about them for tests, without a database."""

import time
from datetime import timedelta
from typing import Any

from tests.rows import BASE, NOW
from worker.core.identity import FetchAddress
from worker.core.lifecycle import JobFacts
from worker.core.reply import Reply
from worker.polling.request_pool import PollAnswer
from worker.store.claims import ClaimedJob


def claimed_job(number: int = 1, host: str = "api.test", **changes: Any) -> ClaimedJob:
    """Return a job that was submitted at NOW and is claimed for its first poll, with `changes`."""
    name = str(number)
    address = FetchAddress(f"{BASE}/{name}", BASE, host)
    facts = JobFacts("pending", NOW, NOW + timedelta(hours=1))
    job = ClaimedJob(number, "token", "default", name, "image", address, None, 1, NOW, facts)
    return job._replace(**changes)


def answer_about(job: ClaimedJob, reply: Reply, *, probe: bool = False) -> PollAnswer:
    """Return an answer about a job, to a request that was sent just now."""
    return PollAnswer(job, reply, probe, time.monotonic())
