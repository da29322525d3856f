"""The request budget on a real Redis: never more than agreed in any window, and a small share without it."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest
import redis

from tests.servers import redis_server
from worker.coordination import rate_limiter
from worker.coordination.rate_limiter import LOCAL_SHARE, UNKNOWN_PROCESSES, RateLimiter, Reservation
from worker.core.rate import AHEAD_SECONDS, burst

pytestmark = pytest.mark.every_python

ACCOUNTS = (f"account-{number}" for number in count())
BUSY_SECONDS = 0.1  # the same on a machine that lets a thread wait between the two readings
CLOCK_SECONDS = 0.01  # how far apart Redis's clock and ours may be read


@pytest.fixture
def account() -> str:
    """An account that no other test has."""
    return next(ACCOUNTS)


def test_many_clients_together_never_get_more_moments_than_rate_and_burst_in_any_window(
    redis_url: str, account: str
) -> None:
    """However many ask, and however greedily: the moments they are given lie evenly."""
    rate, until = 300.0, time.monotonic() + 1.0

    def greedy(number: int) -> list[float]:
        budget = RateLimiter(redis_url)
        moments: list[float] = []
        while time.monotonic() < until:
            grant = budget.take(account, 1 + number % 4, rate=rate)
            moments += grant.send_times
            if not grant.send_times:
                time.sleep(min(grant.wait, 0.02))
        return moments

    with ThreadPoolExecutor(6) as threads:
        moments = sorted(moment for share in threads.map(greedy, range(6)) for moment in share)

    for first in range(0, len(moments), 7):
        for last in range(first, len(moments), 11):
            window = moments[last] - moments[first] + BUSY_SECONDS
            assert last - first + 1 <= rate * window + burst(rate) + 1
    assert len(moments) > rate * 0.9, "the budget is there to be used"


def test_moments_lie_no_further_ahead_than_agreed(redis_url: str, account: str) -> None:
    """Who takes many gets what is free soon, and is told when there is more."""
    budget = RateLimiter(redis_url)
    now = time.monotonic()
    grant = budget.take(account, 50, rate=20)
    assert 3 <= len(grant.send_times) <= burst(20) + 1 + 20 * AHEAD_SECONDS
    assert max(grant.send_times) <= now + AHEAD_SECONDS + CLOCK_SECONDS
    empty = budget.take(account, 9, rate=20)
    while empty.send_times:
        empty = budget.take(account, 9, rate=20)
    assert 0 < empty.wait <= 0.051
    time.sleep(empty.wait + 0.005)
    assert budget.take(account, 50, rate=20).send_times


def test_requests_given_back_can_be_taken_again_and_never_by_two(redis_url: str, account: str) -> None:
    """Whoever did not make them does not cost the others; but where others took later moments they are gone."""
    budget = RateLimiter(redis_url)
    first = budget.take(account, 2, rate=0.5)
    assert len(first.send_times) == 2
    assert not budget.take(account, 9, rate=0.5).send_times
    budget.give_back(first, 1)
    assert len(budget.take(account, 9, rate=0.5).send_times) == 1
    other = next(ACCOUNTS)
    earlier, later = budget.take(other, 2, rate=100), budget.take(other, 2, rate=100)
    budget.give_back(earlier, 2)
    assert float(budget.take(other, 1, rate=100).mark) > float(later.mark)
    budget.give_back(later, 0)
    assert budget.take(account, 0, rate=0.5) == Reservation((), 0.0, account)


def test_accounts_have_budgets_of_their_own(redis_url: str) -> None:
    """One account's rush costs no other."""
    budget = RateLimiter(redis_url)
    one, other = next(ACCOUNTS), next(ACCOUNTS)
    assert [len(budget.take(one, 9, rate=0.5).send_times), len(budget.take(one, 9, rate=0.5).send_times)] == [2, 0]
    assert budget.take(other, 1, rate=0.5).send_times


def test_the_clock_is_that_of_redis(redis_url: str, account: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose clock is two hours ahead gets nothing more."""
    assert len(RateLimiter(redis_url).take(account, 9, rate=0.5).send_times) == 2
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 7_200)
    assert not RateLimiter(redis_url).take(account, 1, rate=0.5).send_times


def test_what_the_api_took_is_counted_for_all_processes(redis_url: str, account: str) -> None:
    """The busier of this second and the one before; old counts are forgotten."""
    one, other = RateLimiter(redis_url), RateLimiter(redis_url)
    one.count_accepted(account, 12)
    assert other.count_accepted(account, 8) in (12.0, 20.0)  # 12 where a second began just in between
    with redis.Redis(unix_socket_path=redis_url.removeprefix("redis+socket://")) as client:
        key = f"fetch-worker:taken:{account}"
        client.hset(key, "at", int(client.hget(key, "at") or 0) - 5)
        assert one.count_accepted(account, 3) == 3.0
        assert 0 < int(client.ttl(key)) <= 10


def test_the_bucket_is_forgotten_when_it_is_full_again(redis_url: str, account: str) -> None:
    """No key stays for ever."""
    RateLimiter(redis_url).take(account, 1, rate=10)
    path = redis_url.removeprefix("redis+socket://")
    with redis.Redis(unix_socket_path=path) as client:
        keys = [key for key in client.keys("*") if account in key.decode()]
        assert len(keys) == 2, "its next free moment, and who asks for it"
        assert all(0 < int(client.ttl(key)) <= 120 for key in keys)


def test_a_flushed_redis_gives_at_most_one_burst_more(redis_url: str, account: str) -> None:
    """The budget starts afresh; nothing breaks, also when Redis forgot the script."""
    budget = RateLimiter(redis_url)
    budget.take(account, 1, rate=1)
    with redis.Redis(unix_socket_path=redis_url.removeprefix("redis+socket://")) as client:
        client.flushall()
        client.script_flush()
    assert len(budget.take(account, 5, rate=1).send_times) == burst(1) + 1


def test_without_redis_each_process_takes_a_small_share(account: str, caplog: pytest.LogCaptureFixture) -> None:
    """Polling goes on, evenly, also for many threads."""
    budget = RateLimiter("redis://127.0.0.1:1/0")
    started = time.monotonic()
    with ThreadPoolExecutor(8) as threads:
        grants = list(threads.map(lambda _: budget.take(account, 5, rate=10), range(32)))
    assert time.monotonic() - started < 10
    moments = [moment for grant in grants for moment in grant.send_times]
    share = 10 * LOCAL_SHARE / UNKNOWN_PROCESSES
    assert 1 <= len(moments) <= 1 + (time.monotonic() - started + AHEAD_SECONDS) * share
    assert all(0 < grant.wait <= 1 / share for grant in grants if not grant.send_times)
    assert "redis is away" in caplog.text
    budget.give_back(grants[0], 1)
    assert budget.count_accepted(account, 4) == 4.0


def test_when_redis_goes_away_all_processes_together_stay_within_the_budget(account: str, tmp_path: Path) -> None:
    """Each takes its part: it was told how many there are, as long as there was somebody to ask."""
    with redis_server(tmp_path) as url:
        budgets = [RateLimiter(url) for _ in range(8)]
        for budget in budgets:
            budget.take(account, 1, rate=100)
        for budget in budgets:
            budget.take(account, 1, rate=100)
    started = time.monotonic()
    moments: list[float] = []
    while time.monotonic() - started < 1.0:
        for budget in budgets:
            moments += budget.take(account, 5, rate=100).send_times
        time.sleep(0.01)
    assert 40 <= len(moments) <= 100 * LOCAL_SHARE * (1.0 + AHEAD_SECONDS) + len(budgets)


def test_a_redis_that_hangs_holds_nobody_for_long(account: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once per five seconds it costs the time-out; in between nothing."""
    monkeypatch.setattr(rate_limiter, "REDIS_TIMEOUT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        budget = RateLimiter(f"redis://127.0.0.1:{silent.getsockname()[1]}/0")
        started = time.monotonic()
        assert len(budget.take(account, 1, rate=10).send_times) == 1
        for _ in range(100):
            budget.take(account, 1, rate=10)
        assert time.monotonic() - started < 10


def test_a_look_takes_nothing_and_tells_what_is_left(redis_url: str, account: str) -> None:
    budget = RateLimiter(redis_url)
    before = budget.peek({account: 0.5})[account]
    while budget.take(account, 1, rate=0.5).send_times:
        pass
    looks = [budget.peek({account: 0.5})[account] for _ in range(3)]

    assert (before.available, before.wait, before.processes) == (2, 0.0, 0)
    assert [(look.available, look.processes) for look in looks] == [(0, 1)] * 3
    assert 0.5 < looks[-1].wait <= 2.0
    assert budget.peek({}) == {}


@pytest.mark.parametrize(("ago", "taken"), [(0, 7.0), (1, 3.0), (2, 0.0)])
def test_a_look_tells_the_requests_of_the_last_whole_second(
    redis_url: str, account: str, ago: int, taken: float
) -> None:
    client = rate_limiter.redis_client(redis_url, seconds=2)
    while True:
        second = client.time()[0]
        client.hset(f"fetch-worker:taken:{account}", items=["at", second - ago, "count", 3, "before", 7])
        look = RateLimiter(redis_url).peek({account: 10.0})[account]
        if client.time()[0] == second:
            break

    assert look.accepted == taken


def test_a_look_into_a_redis_that_is_away_tells_nothing(account: str) -> None:
    assert RateLimiter("redis://127.0.0.1:1/0").peek({account: 10.0}) == {}
