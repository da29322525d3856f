"""The rate limiter with a real Redis: never more requests than allowed in any window, and a small share without it."""

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
from worker.core.learned_rate import AHEAD_SECONDS, burst

pytestmark = pytest.mark.every_python

ACCOUNTS = (f"account-{number}" for number in count())
BUSY_SECONDS = 0.1  # tolerance for a busy machine that pauses a thread between two readings
CLOCK_SECONDS = 0.01  # tolerance between readings of Redis's clock and of this process's


@pytest.fixture
def account() -> str:
    """An account that no other test uses."""
    return next(ACCOUNTS)


def test_many_clients_together_never_get_more_than_rate_and_burst_in_any_window(redis_url: str, account: str) -> None:
    """However many clients request how much: their send times are evenly spaced."""
    rate, until = 300.0, time.monotonic() + 1.0

    def greedy(number: int) -> list[float]:
        limiter = RateLimiter(redis_url)
        send_times: list[float] = []
        while time.monotonic() < until:
            reservation = limiter.take(account, 1 + number % 4, rate=rate)
            send_times += reservation.send_times
            if not reservation.send_times:
                time.sleep(min(reservation.wait, 0.02))
        return send_times

    with ThreadPoolExecutor(6) as threads:
        send_times = sorted(send_time for share in threads.map(greedy, range(6)) for send_time in share)

    for first in range(0, len(send_times), 7):
        for last in range(first, len(send_times), 11):
            window = send_times[last] - send_times[first] + BUSY_SECONDS
            assert last - first + 1 <= rate * window + burst(rate) + 1
    assert len(send_times) > rate * 0.9, "the budget is used"


def test_send_times_are_at_most_the_allowed_time_ahead(redis_url: str, account: str) -> None:
    """A large reservation gets the send times of the near future, and the time until there are more."""
    limiter = RateLimiter(redis_url)
    now = time.monotonic()
    reservation = limiter.take(account, 50, rate=20)
    assert 3 <= len(reservation.send_times) <= burst(20) + 1 + 20 * AHEAD_SECONDS
    assert max(reservation.send_times) <= now + AHEAD_SECONDS + CLOCK_SECONDS
    empty = limiter.take(account, 9, rate=20)
    while empty.send_times:
        empty = limiter.take(account, 9, rate=20)
    assert 0 < empty.wait <= 0.051
    time.sleep(empty.wait + 0.005)
    assert limiter.take(account, 50, rate=20).send_times


def test_returned_requests_can_be_reserved_again_and_only_once(redis_url: str, account: str) -> None:
    """Unused requests return to the budget, unless another process has reserved later send times."""
    limiter = RateLimiter(redis_url)
    first = limiter.take(account, 2, rate=0.5)
    assert len(first.send_times) == 2
    assert not limiter.take(account, 9, rate=0.5).send_times
    limiter.give_back(first, 1)
    assert len(limiter.take(account, 9, rate=0.5).send_times) == 1
    other_account = next(ACCOUNTS)
    earlier, later = limiter.take(other_account, 2, rate=100), limiter.take(other_account, 2, rate=100)
    limiter.give_back(earlier, 2)
    assert float(limiter.take(other_account, 1, rate=100).mark) > float(later.mark)
    limiter.give_back(later, 0)
    assert limiter.take(account, 0, rate=0.5) == Reservation((), 0.0, account)


def test_each_account_has_its_own_budget(redis_url: str) -> None:
    """Many requests of one account do not affect another."""
    limiter = RateLimiter(redis_url)
    first, second = next(ACCOUNTS), next(ACCOUNTS)
    assert [len(limiter.take(first, 9, rate=0.5).send_times), len(limiter.take(first, 9, rate=0.5).send_times)] == [
        2,
        0,
    ]
    assert limiter.take(second, 1, rate=0.5).send_times


def test_redis_clock_is_used(redis_url: str, account: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose clock is two hours ahead gets no additional requests."""
    assert len(RateLimiter(redis_url).take(account, 9, rate=0.5).send_times) == 2
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 7_200)
    assert not RateLimiter(redis_url).take(account, 1, rate=0.5).send_times


def test_accepted_requests_are_counted_for_all_processes(redis_url: str, account: str) -> None:
    """It is the maximum of this second and the one before. Old counts expire."""
    first, second = RateLimiter(redis_url), RateLimiter(redis_url)
    first.count_accepted(account, 12)
    assert second.count_accepted(account, 8) in (12.0, 20.0)  # 12 if a new second began in between
    with redis.Redis(unix_socket_path=redis_url.removeprefix("redis+socket://")) as client:
        key = f"fetch-worker:taken:{account}"
        client.hset(key, "at", int(client.hget(key, "at") or 0) - 5)
        assert first.count_accepted(account, 3) == 3.0
        assert 0 < int(client.ttl(key)) <= 10


def test_the_keys_of_an_account_expire_once_its_budget_is_full(redis_url: str, account: str) -> None:
    """No key stays in Redis permanently."""
    RateLimiter(redis_url).take(account, 1, rate=10)
    path = redis_url.removeprefix("redis+socket://")
    with redis.Redis(unix_socket_path=path) as client:
        keys = [key for key in client.keys("*") if account in key.decode()]
        assert len(keys) == 2, "the next free time and the processes"
        assert all(0 < int(client.ttl(key)) <= 120 for key in keys)


def test_a_flushed_redis_allows_at_most_one_more_burst(redis_url: str, account: str) -> None:
    """The budget starts again. Nothing fails, even if Redis has lost the script."""
    limiter = RateLimiter(redis_url)
    limiter.take(account, 1, rate=1)
    with redis.Redis(unix_socket_path=redis_url.removeprefix("redis+socket://")) as client:
        client.flushall()
        client.script_flush()
    assert len(limiter.take(account, 5, rate=1).send_times) == burst(1) + 1


def test_without_redis_each_process_uses_a_small_share(account: str, caplog: pytest.LogCaptureFixture) -> None:
    """Polling continues evenly, also with many threads."""
    limiter = RateLimiter("redis://127.0.0.1:1/0")
    started = time.monotonic()
    with ThreadPoolExecutor(8) as threads:
        reservations = list(threads.map(lambda _: limiter.take(account, 5, rate=10), range(32)))
    assert time.monotonic() - started < 10
    send_times = [send_time for reservation in reservations for send_time in reservation.send_times]
    share = 10 * LOCAL_SHARE / UNKNOWN_PROCESSES
    assert 1 <= len(send_times) <= 1 + (time.monotonic() - started + AHEAD_SECONDS) * share
    assert all(0 < reservation.wait <= 1 / share for reservation in reservations if not reservation.send_times)
    assert "redis is away" in caplog.text
    limiter.give_back(reservations[0], 1)
    assert limiter.count_accepted(account, 4) == 4.0


def test_when_redis_is_lost_all_processes_together_stay_within_the_budget(account: str, tmp_path: Path) -> None:
    """Each takes its share: while Redis answered, it said how many processes there were."""
    with redis_server(tmp_path) as url:
        budgets = [RateLimiter(url) for _ in range(8)]
        for limiter in budgets:
            limiter.take(account, 1, rate=100)
        for limiter in budgets:
            limiter.take(account, 1, rate=100)
    started = time.monotonic()
    send_times: list[float] = []
    while time.monotonic() - started < 1.0:
        for limiter in budgets:
            send_times += limiter.take(account, 5, rate=100).send_times
        time.sleep(0.01)
    assert 40 <= len(send_times) <= 100 * LOCAL_SHARE * (1.0 + AHEAD_SECONDS) + len(budgets)


def test_a_hanging_redis_blocks_no_caller_for_long(account: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time-out is paid once per five seconds, and not in between."""
    monkeypatch.setattr(rate_limiter, "REDIS_TIMEOUT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        limiter = RateLimiter(f"redis://127.0.0.1:{silent.getsockname()[1]}/0")
        started = time.monotonic()
        assert len(limiter.take(account, 1, rate=10).send_times) == 1
        for _ in range(100):
            limiter.take(account, 1, rate=10)
        assert time.monotonic() - started < 10


def test_peek_reserves_nothing_and_returns_the_free_requests(redis_url: str, account: str) -> None:
    limiter = RateLimiter(redis_url)
    before = limiter.peek({account: 0.5})[account]
    while limiter.take(account, 1, rate=0.5).send_times:
        pass
    statuses = [limiter.peek({account: 0.5})[account] for _ in range(3)]

    assert (before.available, before.wait, before.processes) == (2, 0.0, 0)
    assert [(status.available, status.processes) for status in statuses] == [(0, 1)] * 3
    assert 0.5 < statuses[-1].wait <= 2.0
    assert limiter.peek({}) == {}


@pytest.mark.parametrize(("ago", "accepted"), [(0, 7.0), (1, 3.0), (2, 0.0)])
def test_peek_returns_the_requests_of_the_last_whole_second(
    redis_url: str, account: str, ago: int, accepted: float
) -> None:
    client = rate_limiter.redis_client(redis_url, seconds=2)
    while True:
        second = client.time()[0]
        client.hset(f"fetch-worker:taken:{account}", items=["at", second - ago, "count", 3, "before", 7])
        status = RateLimiter(redis_url).peek({account: 10.0})[account]
        if client.time()[0] == second:
            break

    assert status.accepted == accepted


def test_peek_without_redis_returns_nothing(account: str) -> None:
    assert RateLimiter("redis://127.0.0.1:1/0").peek({account: 10.0}) == {}
