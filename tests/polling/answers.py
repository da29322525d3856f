"""Claimed jobs for tests, without a database."""

from datetime import timedelta
from typing import Any

from tests.rows import BASE, NOW
from worker.core.identity import FetchAddress
from worker.core.lifecycle import JobFacts
from worker.store.claims import ClaimedJob


def claimed_job(number: int = 1, host: str = "api.test", **changes: Any) -> ClaimedJob:
    """Return a job that was submitted at NOW and is claimed for its first poll, with `changes`."""
    name = str(number)
    address = FetchAddress(f"{BASE}/{name}", BASE, host)
    facts = JobFacts("pending", NOW, NOW + timedelta(hours=1))
    job = ClaimedJob(number, "token", "default", name, "image", address, None, 1, NOW, facts)
    return job._replace(**changes)
