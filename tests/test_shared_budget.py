"""The request budget on a real Redis: never more than agreed in any window, and a small share without it."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest
import redis

from worker import shared_budget
from worker.shared_budget import LOCAL_SHARE, Grant, SharedBudget, burst

ACCOUNTS = (f"account-{number}" for number in count())


@pytest.fixture
def account() -> str:
    """An account that no other test has."""
    return next(ACCOUNTS)


def test_many_clients_together_never_take_more_than_rate_and_burst_in_any_window(redis_url: str, account: str) -> None:
    """Each grant lies between the clock before and after its call; whatever lies within a window counts there."""
    rate, until = 300.0, time.monotonic() + 1.0

    def greedy(number: int) -> list[tuple[float, float, int]]:
        budget = SharedBudget(redis_url, rps=rate)
        taken = []
        while (before := time.monotonic()) < until:
            grant = budget.take(account, 1 + number % 4)
            taken.append((before, time.monotonic(), grant.requests))
            if not grant.requests:
                time.sleep(min(grant.wait, 0.02))
        return taken

    with ThreadPoolExecutor(6) as threads:
        grants = [grant for share in threads.map(greedy, range(6)) for grant in share if grant[2]]

    starts = sorted(before for before, _, _ in grants)[:: max(1, len(grants) // 20)]
    ends = sorted(after for _, after, _ in grants)[:: max(1, len(grants) // 20)]
    for start in starts:
        for end in ends:
            within = sum(number for before, after, number in grants if before >= start and after <= end)
            assert within <= rate * max(0.0, end - start) + burst(rate) + 1e-6
    assert sum(number for _, _, number in grants) > rate / 4, "the budget is there to be used"


def test_a_grant_says_when_the_next_can_be(redis_url: str, account: str) -> None:
    """And then there is one."""
    budget = SharedBudget(redis_url, rps=20)
    assert budget.take(account, 50).requests == burst(20) == 2
    empty = budget.take(account, 1)
    assert empty.requests == 0
    assert 0 < empty.wait <= 0.051
    time.sleep(empty.wait + 0.005)
    assert budget.take(account, 50).requests >= 1


def test_requests_given_back_can_be_taken_again_and_never_fill_the_bucket_over(redis_url: str, account: str) -> None:
    """Whoever did not make them does not cost the others."""
    budget = SharedBudget(redis_url, rps=0.5)
    assert budget.take(account, 9).requests == 1
    assert budget.take(account, 9).requests == 0
    budget.give_back(account, 1)
    assert budget.take(account, 9).requests == 1
    budget.give_back(account, 1_000)
    assert budget.take(account, 1_000).requests == 1
    budget.give_back(account, 0)
    assert budget.take(account, 1).requests == 0
    assert budget.take(account, 0) == Grant(0, 0.0)


def test_accounts_have_budgets_of_their_own(redis_url: str) -> None:
    """One account's rush costs no other."""
    budget = SharedBudget(redis_url, rps=0.5)
    one, other = next(ACCOUNTS), next(ACCOUNTS)
    assert [budget.take(one, 1).requests, budget.take(one, 1).requests] == [1, 0]
    assert budget.take(other, 1).requests == 1


def test_the_clock_is_that_of_redis(redis_url: str, account: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose clock is two hours ahead gets nothing more."""
    assert SharedBudget(redis_url, rps=0.5).take(account, 1).requests == 1
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 7_200)
    assert SharedBudget(redis_url, rps=0.5).take(account, 1).requests == 0


def test_the_bucket_is_forgotten_when_it_is_full_again(redis_url: str, account: str) -> None:
    """No key stays for ever."""
    SharedBudget(redis_url, rps=10).take(account, 1)
    path = redis_url.removeprefix("redis+socket://")
    with redis.Redis(unix_socket_path=path) as client:
        keys = [key for key in client.keys("*") if account in key.decode()]
        assert len(keys) == 1
        assert 0 < int(client.ttl(keys[0])) <= 120


def test_a_flushed_redis_gives_at_most_one_burst_more(redis_url: str, account: str) -> None:
    """The budget starts afresh; nothing breaks, also when Redis forgot the script."""
    budget = SharedBudget(redis_url, rps=1)
    budget.take(account, 1)
    with redis.Redis(unix_socket_path=redis_url.removeprefix("redis+socket://")) as client:
        client.flushall()
        client.script_flush()
    assert budget.take(account, 5).requests == 1


def test_without_redis_each_process_takes_a_small_share(account: str, caplog: pytest.LogCaptureFixture) -> None:
    """Polling goes on: one request now, the next when the share allows, also for many threads."""
    budget = SharedBudget("redis://127.0.0.1:1/0", rps=10)
    started = time.monotonic()
    with ThreadPoolExecutor(8) as threads:
        grants = list(threads.map(lambda _: budget.take(account, 5), range(32)))
    assert time.monotonic() - started < 3
    assert sum(grant.requests for grant in grants) <= 1 + (time.monotonic() - started) * 10 * LOCAL_SHARE
    assert max(grant.requests for grant in grants) == 1
    assert all(0 < grant.wait <= 1 / (10 * LOCAL_SHARE) for grant in grants)
    assert "redis is away" in caplog.text
    budget.give_back(account, 1)


def test_a_redis_that_hangs_holds_nobody_for_long(account: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once per five seconds it costs the time-out; in between nothing."""
    monkeypatch.setattr(shared_budget, "REDIS_TIMEOUT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        budget = SharedBudget(f"redis://127.0.0.1:{silent.getsockname()[1]}/0", rps=10)
        started = time.monotonic()
        assert budget.take(account, 1).requests == 1
        for _ in range(100):
            budget.take(account, 1)
        assert time.monotonic() - started < 3
