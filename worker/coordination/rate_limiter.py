"""Rate limiter in Redis: one number per account, by Redis's clock, shared by all processes.

It is told the rate. How a rate limit (HTTP 429) lowers the rate is in `worker.core.learned_rate`. The pause after it
and the learned rate of each account are in `worker.core.circuit_breaker`.

The script computes `worker.core.learned_rate.reserve_slots` inside Redis. It also counts the requests that the API
accepted, so that a rate limit adapts the rate of all processes together. Without Redis, each process uses its own clock
and a share of the rate: one of as many shares as there were processes when Redis last answered. So polling continues
within the limit.
"""

import logging
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import redis
from redis.exceptions import RedisError

from worker.core.learned_rate import AHEAD_SECONDS, RateSlots, burst, reserve_slots

log = logging.getLogger(__name__)

LOCAL_SHARE = 0.8  # of the rate, for all processes together: their clocks differ, and some may have started since
UNKNOWN_PROCESSES = 4  # assumed number of processes if Redis never answered
RETRY_REDIS_SECONDS = 5.0
REDIS_TIMEOUT_SECONDS = 2.0
KEPT_SECONDS = 60

# KEYS: the account's next free time; the processes that use the account. ARGV: seconds per request, burst in
# requests, requests wanted, seconds ahead, seconds that both keys are kept, the process.
_TAKE_SCRIPT = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local step, burst, wanted, ahead = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local begin = math.max(tonumber(redis.call('GET', KEYS[1]) or 0), now - burst * step)
local room = math.floor((now + ahead - begin) / step + 0.000001) + 1
local count = math.max(0, math.min(wanted, room))
local free = begin + count * step
local kept = string.format('%.6f', free)
if count > 0 then
  redis.call('SET', KEYS[1], kept, 'EX', math.ceil(tonumber(ARGV[5]) + burst * step))
end
redis.call('ZADD', KEYS[2], now, ARGV[6])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now - ARGV[5])
redis.call('EXPIRE', KEYS[2], ARGV[5])
local first, wait = string.format('%.6f', begin - now), string.format('%.6f', math.max(0, free - now - ahead))
return {count, first, wait, kept, redis.call('ZCARD', KEYS[2])}
"""

# Returns send times if no later ones were reserved since. ARGV: the free time as `take` left it, seconds to go back.
_GIVE_BACK_SCRIPT = """
if redis.call('GET', KEYS[1]) == ARGV[1] then
  redis.call('SET', KEYS[1], string.format('%.6f', ARGV[1] - ARGV[2]), 'KEEPTTL')
end
"""

# KEYS[1]: requests that the API accepted in this second and in the one before. ARGV: how many to add.
_ACCEPTED_SCRIPT = """
local now = tonumber(redis.call('TIME')[1])
local at, count, before = unpack(redis.call('HMGET', KEYS[1], 'at', 'count', 'before'))
at, count, before = tonumber(at or 0), tonumber(count or 0), tonumber(before or 0)
if at ~= now then
  before, count = at == now - 1 and count or 0, 0
end
count = count + ARGV[1]
redis.call('HSET', KEYS[1], 'at', now, 'count', count, 'before', before)
redis.call('EXPIRE', KEYS[1], 10)
return math.max(count, before)
"""


@dataclass(frozen=True, slots=True)
class Reservation:
    """Reserved requests: when each may be sent, by the monotonic clock, and the seconds until more are free."""

    send_times: tuple[float, ...]
    wait: float
    account: str
    mark: str = ""  # the account's next free time in Redis after these; empty for a local share
    step: float = 0.0


@dataclass(frozen=True, slots=True)
class BudgetStatus:
    """The state of an account's request budget, read without reserving anything.

    `available` is how many requests could be sent at once, and `wait` the seconds until the next one. `accepted` is how
    many requests the API accepted in the last whole second, and `processes` how many used the budget within a minute.
    """

    available: int
    wait: float
    accepted: float
    processes: int


class RateLimiter:
    """Limits the requests per second of each account, for all processes on one Redis."""

    def __init__(self, redis_url: str) -> None:
        client = redis_client(redis_url, seconds=REDIS_TIMEOUT_SECONDS)
        self._client = client
        self._take_script = client.register_script(_TAKE_SCRIPT)
        self._give_back_script = client.register_script(_GIVE_BACK_SCRIPT)
        self._accepted_script = client.register_script(_ACCEPTED_SCRIPT)
        self._name = secrets.token_hex(4)
        self._processes: dict[str, int] = {}
        self._local: dict[str, float] = {}
        self._local_lock = threading.Lock()
        self._away_until = 0.0

    def take(self, account: str, requests: int, *, rate: float) -> Reservation:
        """Reserve up to `requests` requests of an account that may send `rate` per second."""
        if requests < 1:
            return Reservation((), 0.0, account)
        called = time.monotonic()
        keys = [_name("budget", account), _name("processes", account)]
        result = self._run_script(
            self._take_script, keys, 1 / rate, burst(rate), requests, AHEAD_SECONDS, KEPT_SECONDS, self._name
        )
        if result is None:
            return self._take_locally(account, requests, rate)
        self._processes[account] = int(result[4])
        granted = RateSlots(int(result[0]), float(result[1]), 1 / rate, float(result[2]), 0.0)
        return Reservation(_send_times(granted, called), granted.wait, account, result[3].decode(), 1 / rate)

    def give_back(self, reservation: Reservation, unused: int) -> None:
        """Return the last `unused` requests of a reservation to the budget."""
        if unused > 0 and reservation.mark:
            self._run_script(
                self._give_back_script,
                [_name("budget", reservation.account)],
                reservation.mark,
                unused * reservation.step,
            )

    def count_accepted(self, account: str, requests: int) -> float:
        """Count requests that the API accepted. Return how many it accepted of all processes in one second just now."""
        return float(self._run_script(self._accepted_script, [_name("taken", account)], requests) or requests)

    def peek(self, rates: Mapping[str, float]) -> dict[str, BudgetStatus]:
        """Return the budgets of these accounts, given their current rates. Return nothing if Redis is away."""
        if not rates or time.monotonic() < self._away_until:
            return {}
        pipeline = self._client.pipeline(transaction=True)
        pipeline.time()
        for account in rates:
            pipeline.get(_name("budget", account))
            pipeline.hmget(_name("taken", account), "at", "count", "before")
            pipeline.zrange(_name("processes", account), 0, -1, withscores=True)
        try:
            (second, micro), *values = pipeline.execute()
        except (RedisError, OSError):
            self._away_until = time.monotonic() + RETRY_REDIS_SECONDS
            return {}
        now = second + micro / 1e6
        per_account = zip(values[::3], values[1::3], values[2::3], strict=True)
        return {
            account: _budget_status(rate, now, *value)
            for (account, rate), value in zip(rates.items(), per_account, strict=True)
        }

    def _run_script(self, script: Any, keys: Sequence[str], *arguments: object) -> Any:
        if time.monotonic() < self._away_until:
            return None
        try:
            return script(keys=keys, args=list(arguments))
        except (RedisError, OSError) as error:
            self._away_until = time.monotonic() + RETRY_REDIS_SECONDS
            log.warning("redis is away, polling with a local share of the rate reason=%s", type(error).__name__)
            return None

    def _take_locally(self, account: str, requests: int, rate: float) -> Reservation:
        now = time.monotonic()
        share = rate * LOCAL_SHARE / self._processes.get(account, UNKNOWN_PROCESSES)
        with self._local_lock:
            granted = reserve_slots(self._local.get(account, now), now, rate=share, requested=requests)
            self._local[account] = granted.free
        return Reservation(_send_times(granted, now), granted.wait, account)


def _budget_status(
    rate: float, now: float, stored_free: bytes | None, accepted: Sequence[bytes | None], users: Sequence[Any]
) -> BudgetStatus:
    next_free = float(stored_free or 0)
    free_slots = reserve_slots(next_free, now, rate=rate, requested=burst(rate) + int(rate * AHEAD_SECONDS) + 1)
    at, count, before = (int(float(value or 0)) for value in accepted)
    last = {int(now): before, int(now) - 1: count}.get(at, 0)
    processes = sum(score > now - KEPT_SECONDS for _, score in users)
    wait = 0.0 if free_slots.count else max(0.0, next_free - now - AHEAD_SECONDS)
    return BudgetStatus(free_slots.count, round(wait, 3), float(last), processes)


def _send_times(granted: RateSlots, now: float) -> tuple[float, ...]:
    return tuple(now + max(0.0, granted.first + index * granted.step) for index in range(granted.count))


def _name(key: str, account: str) -> str:
    return f"fetch-worker:{key}:{account}"


def redis_client(url: str, *, seconds: float) -> "redis.Redis":
    """Return a client for a Redis URL from the settings, with this time-out for every operation."""
    plain = url.replace("redis+socket://", "unix://", 1).replace("virtual_host=", "db=")
    return redis.Redis.from_url(plain, socket_timeout=seconds, socket_connect_timeout=seconds)
