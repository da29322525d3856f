"""The request budget that all processes share: one number per account in Redis, by Redis's own clock.

The script is `worker.core.rate.slots`, run where all processes meet. It counts what the API took, too, so that a rate
limit teaches the rate of all processes together. Without Redis each process takes its share by its own clock, one of as
many as there were when Redis last answered, so that polling goes on and stays polite.
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

from worker.core.rate import AHEAD_SECONDS, RateSlots, burst, reserve_slots

log = logging.getLogger(__name__)

LOCAL_SHARE = 0.8  # of the budget, for all processes together: their clocks differ, and some may be new
UNKNOWN_PROCESSES = 4  # as many are assumed where Redis never answered
RETRY_REDIS_SECONDS = 5.0
REDIS_TIMEOUT_SECONDS = 2.0
KEPT_SECONDS = 60

# KEYS: the account's next free moment; the processes that ask for it. ARGV: seconds per request, burst in requests,
# requests wanted, seconds ahead, seconds that both are kept, the process.
_TAKE = """
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

# Gives moments back, if nobody took later ones since. ARGV: the free moment as `take` left it, seconds to go back.
_GIVE_BACK = """
if redis.call('GET', KEYS[1]) == ARGV[1] then
  redis.call('SET', KEYS[1], string.format('%.6f', ARGV[1] - ARGV[2]), 'KEEPTTL')
end
"""

# KEYS[1]: requests that the API took, in this second and in the one before. ARGV: how many more.
_TAKEN = """
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
    """Requests granted: when each may go out, by the monotonic clock; and the seconds after which there can be more."""

    send_times: tuple[float, ...]
    wait: float
    account: str
    mark: str = ""  # the account's free moment after these, as Redis has it; empty where they are a local share
    step: float = 0.0


@dataclass(frozen=True, slots=True)
class BudgetStatus:
    """An account's budget as it stands, without taking anything of it.

    `left` is how many requests could go out at once, `wait` the seconds until there is one; `taken` how many the API
    took in the last whole second, and `processes` how many asked for a part of the budget within a minute.
    """

    left: int
    wait: float
    taken: float
    processes: int


class RateLimiter:
    """Requests per second and account, for all processes on one Redis."""

    def __init__(self, redis_url: str) -> None:
        client = redis_client(redis_url, seconds=REDIS_TIMEOUT_SECONDS)
        self._client = client
        self._take = client.register_script(_TAKE)
        self._give_back = client.register_script(_GIVE_BACK)
        self._taken = client.register_script(_TAKEN)
        self._name = secrets.token_hex(4)
        self._processes: dict[str, int] = {}
        self._local: dict[str, float] = {}
        self._local_lock = threading.Lock()
        self._away_until = 0.0

    def take(self, account: str, wanted: int, *, rate: float) -> Reservation:
        """Takes up to `wanted` requests of the account's budget, of which there are `rate` per second."""
        if wanted < 1:
            return Reservation((), 0.0, account)
        called = time.monotonic()
        keys = [_name("budget", account), _name("processes", account)]
        said = self._ask(self._take, keys, 1 / rate, burst(rate), wanted, AHEAD_SECONDS, KEPT_SECONDS, self._name)
        if said is None:
            return self._take_locally(account, wanted, rate)
        self._processes[account] = int(said[4])
        found = RateSlots(int(said[0]), float(said[1]), 1 / rate, float(said[2]), 0.0)
        return Reservation(_moments(found, called), found.wait, account, said[3].decode(), 1 / rate)

    def give_back(self, grant: Reservation, unused: int) -> None:
        """Returns the last `unused` requests of a grant that were not made."""
        if unused > 0 and grant.mark:
            self._ask(self._give_back, [_name("budget", grant.account)], grant.mark, unused * grant.step)

    def taken(self, account: str, requests: int) -> float:
        """Counts requests that the API did not refuse; how many it took of all processes in a second just now."""
        return float(self._ask(self._taken, [_name("taken", account)], requests) or requests)

    def peek(self, rates: Mapping[str, float]) -> dict[str, BudgetStatus]:
        """How the budgets of these accounts stand, whose rates are in force; nothing of it where Redis is away."""
        if not rates or time.monotonic() < self._away_until:
            return {}
        reads = self._client.pipeline(transaction=True)
        reads.time()
        for account in rates:
            reads.get(_name("budget", account))
            reads.hmget(_name("taken", account), "at", "count", "before")
            reads.zrange(_name("processes", account), 0, -1, withscores=True)
        try:
            (second, micro), *found = reads.execute()
        except (RedisError, OSError):
            self._away_until = time.monotonic() + RETRY_REDIS_SECONDS
            return {}
        now = second + micro / 1e6
        each = zip(found[::3], found[1::3], found[2::3], strict=True)
        return {account: _peek(rate, now, *read) for (account, rate), read in zip(rates.items(), each, strict=True)}

    def _ask(self, script: Any, keys: Sequence[str], *arguments: object) -> Any:
        if time.monotonic() < self._away_until:
            return None
        try:
            return script(keys=keys, args=list(arguments))
        except (RedisError, OSError) as error:
            self._away_until = time.monotonic() + RETRY_REDIS_SECONDS
            log.warning("redis is away, polling at a local share of the budget reason=%s", type(error).__name__)
            return None

    def _take_locally(self, account: str, wanted: int, rate: float) -> Reservation:
        now = time.monotonic()
        share = rate * LOCAL_SHARE / self._processes.get(account, UNKNOWN_PROCESSES)
        with self._local_lock:
            found = reserve_slots(self._local.get(account, now), now, rate=share, requested=wanted)
            self._local[account] = found.free
        return Reservation(_moments(found, now), found.wait, account)


def _peek(
    rate: float, now: float, free: bytes | None, taken: Sequence[bytes | None], asked: Sequence[Any]
) -> BudgetStatus:
    begin = float(free or 0)
    found = reserve_slots(begin, now, rate=rate, requested=burst(rate) + int(rate * AHEAD_SECONDS) + 1)
    at, count, before = (int(float(value or 0)) for value in taken)
    last = {int(now): before, int(now) - 1: count}.get(at, 0)
    processes = sum(score > now - KEPT_SECONDS for _, score in asked)
    wait = 0.0 if found.count else max(0.0, begin - now - AHEAD_SECONDS)
    return BudgetStatus(found.count, round(wait, 3), float(last), processes)


def _moments(found: RateSlots, now: float) -> tuple[float, ...]:
    return tuple(now + max(0.0, found.first + index * found.step) for index in range(found.count))


def _name(what: str, account: str) -> str:
    return f"fetch-worker:{what}:{account}"


def redis_client(url: str, *, seconds: float) -> "redis.Redis":
    """A client for a URL as settings write it, which waits for so many seconds at most."""
    plain = url.replace("redis+socket://", "unix://", 1).replace("virtual_host=", "db=")
    return redis.Redis.from_url(plain, socket_timeout=seconds, socket_connect_timeout=seconds)
