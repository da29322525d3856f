"""The rate limit of the stand-in."""

import pytest

from worker.sandbox.options import SandboxOptions
from worker.sandbox.rate_limit import RateLimit


@pytest.mark.parametrize(("style", "status"), [("http429", 429), ("http200", 200)])
def test_requests_beyond_the_limit_are_refused_until_the_next_one_is_allowed(style: str, status: int) -> None:
    limit, options = RateLimit(), SandboxOptions(rps=2, limit_style=style)

    refusals = [limit.refusal(options, now) for now in (10.0, 10.0, 10.0, 10.5, 10.5)]

    assert [refusal is None for refusal in refusals] == [True, True, False, True, False]
    assert {refusal.status for refusal in refusals if refusal is not None} == {status}


def test_without_a_limit_every_request_is_allowed() -> None:
    limit = RateLimit()

    assert not any(limit.refusal(SandboxOptions(), 10.0) for _ in range(100))
