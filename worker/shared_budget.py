"""The request budget that all processes share: one token bucket per account in Redis, by Redis's own clock.

It is the generic cell rate algorithm: a single number per account, the time at which the bucket would be full again.
Without Redis each process takes a small share by its own clock, so that polling goes on and stays polite.
"""

import logging
import threading
import time
from dataclasses import dataclass

import redis
from redis.exceptions import RedisError

log = logging.getLogger(__name__)

BURST_SECONDS = 0.1
LOCAL_SHARE = 0.25
RETRY_REDIS_SECONDS = 5.0
REDIS_TIMEOUT_SECONDS = 2.0

# KEYS[1]: the account's bucket. ARGV: seconds per request, burst in requests, requests wanted (negative gives back).
_TAKE = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local step, burst, wanted = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local ahead = math.max(tonumber(redis.call('GET', KEYS[1]) or now) - now, 0)
local room = math.floor((burst * step - ahead + 0.000001) / step)
local granted = math.min(wanted, math.max(room, 0))
if granted ~= 0 then
  redis.call('SET', KEYS[1], string.format('%.6f', now + ahead + granted * step), 'EX', math.ceil(60 + burst * step))
end
return {granted, tostring(math.max(0, ahead + (granted + 1) * step - burst * step))}
"""


@dataclass(frozen=True, slots=True)
class Grant:
    """Requests granted, and the seconds after which the next one can be."""

    requests: int
    wait: float


class SharedBudget:
    """Requests per second and account, for all processes on one Redis."""

    def __init__(self, redis_url: str, *, rps: float) -> None:
        self._client = redis_client(redis_url, seconds=REDIS_TIMEOUT_SECONDS)
        self._take = self._client.register_script(_TAKE)
        self._step = 1.0 / rps
        self._burst = burst(rps)
        self._local: dict[str, float] = {}
        self._local_lock = threading.Lock()
        self._away_until = 0.0

    def take(self, account: str, wanted: int) -> Grant:
        """Takes up to `wanted` requests of the account's budget."""
        if wanted < 1:
            return Grant(0, 0.0)
        if time.monotonic() >= self._away_until:
            try:
                granted, wait = self._take(keys=[_name(account)], args=[self._step, self._burst, wanted])
                return Grant(int(granted), float(wait))
            except (RedisError, OSError) as error:
                self._away_until = time.monotonic() + RETRY_REDIS_SECONDS
                log.warning("redis is away, polling at a local share of the budget reason=%s", type(error).__name__)
        return self._take_locally(account)

    def give_back(self, account: str, requests: int) -> None:
        """Returns requests that were taken and not made."""
        if requests < 1 or time.monotonic() < self._away_until:
            return
        try:
            self._take(keys=[_name(account)], args=[self._step, self._burst, -requests])
        except (RedisError, OSError):
            self._away_until = time.monotonic() + RETRY_REDIS_SECONDS

    def _take_locally(self, account: str) -> Grant:
        step = self._step / LOCAL_SHARE
        now = time.monotonic()
        with self._local_lock:
            free_at = self._local.get(account, 0.0)
            if now < free_at:
                return Grant(0, free_at - now)
            self._local[account] = now + step
            return Grant(1, step)


def burst(rps: float) -> int:
    """The requests that may go out at once after a pause: a tenth of a second's worth, at least one."""
    return max(1, int(rps * BURST_SECONDS))


def _name(account: str) -> str:
    return f"fetch-worker:budget:{account}"


def redis_client(url: str, *, seconds: float) -> "redis.Redis":
    """A client for a URL as settings write it, which waits for so many seconds at most."""
    plain = url.replace("redis+socket://", "unix://", 1).replace("virtual_host=", "db=")
    return redis.Redis.from_url(plain, socket_timeout=seconds, socket_connect_timeout=seconds)
