"""The due groups and circuit breakers as they were read last, and the time to read them again."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from pydantic import SecretStr
from sqlalchemy import Engine

from worker.core.circuit_breaker import CircuitBreaker, Scope
from worker.polling.breaker_updates import Breakers
from worker.store.breakers import all_breakers
from worker.store.due_groups import DueGroup, due_groups
from worker.store.engine import database_now

VIEW_SECONDS = 0.5  # longest time until a hold made by another process is noticed
LOOK_SECONDS = 0.05  # least time between two looks that claimed nothing: each costs a query per account
IDLE_SECONDS = 1.0  # longest time between two looks: a wake-up can get lost
ALERT_SECONDS = 0.4  # look often after a wake-up: its sender sends no second one for a while
MAX_EMPTY_LOOKS = 5  # after this many, the pause between looks grows no more: 32 × 0.05 s is above IDLE_SECONDS


@dataclass(frozen=True, slots=True)
class DueView:
    """Circuit breakers and due groups as they were read at `read_at`, by the monotonic clock.

    `now` is the database's time at that moment.
    """

    read_at: float
    now: datetime
    breakers: Breakers
    groups: Sequence[DueGroup]

    def time(self) -> datetime:
        """Return the database's current time."""
        return self.now + timedelta(seconds=time.monotonic() - self.read_at)

    def breaker(self, scope: Scope, name: str) -> CircuitBreaker:
        """Return the circuit breaker of an account or host. Without a row it is closed."""
        return self.breakers.get((scope, name)) or CircuitBreaker(scope, name)

    def pause(self, account_states: Mapping[str, str], empty_looks: int) -> float:
        """Return the seconds until the next job is due or a breaker allows more requests.

        After more and more looks that claimed nothing, look less and less often.
        """
        now = self.time()
        moments = [group.due_at for group in self.groups if group.due_at > now]
        moments += [
            moment
            for breaker in self.breakers.values()
            for moment in (breaker.until, breaker.probe_at)
            if moment and moment > now
        ]
        seconds = min((moment - now).total_seconds() for moment in moments) if moments else IDLE_SECONDS
        if "all" in account_states.values():  # another process claims it, or its host's breaker is open
            seconds = min(seconds, LOOK_SECONDS * 2 ** min(empty_looks, MAX_EMPTY_LOOKS))
        return min(max(seconds, 0.001), IDLE_SECONDS)


class ViewReader:
    """Reads views for one poller. `stale` makes `current` read again; any thread may set it."""

    def __init__(self, engine: Engine, keys: Mapping[str, SecretStr]) -> None:
        self._engine = engine
        self._keys = keys  # can change at any time
        self._keys_before = dict(keys)
        self._view: DueView | None = None
        self.stale = False

    def current(self) -> DueView:
        """Return a view that is recent enough to claim jobs."""
        view = self.recent()
        if view is None or self.stale:
            with self._engine.connect() as connection:
                self._keys_before |= self._keys
                groups = due_groups(connection, self._keys)
                # If no job waits, nothing is claimed, so an idle worker does not read the breakers again.
                breakers = all_breakers(connection) if groups else self.breakers
                view = self._view = DueView(time.monotonic(), database_now(connection), breakers, groups)
        return view

    def recent(self) -> DueView | None:
        """Return the last view, if it is recent."""
        view = self._view
        return None if view is None or time.monotonic() - view.read_at >= VIEW_SECONDS else view

    @property
    def breakers(self) -> Breakers:
        """The circuit breakers of the last view. The recorder adds its changes."""
        return {} if self._view is None else self._view.breakers

    def key(self, account: str) -> SecretStr:
        """Return the account's key, or the one it had when its jobs were claimed if it was removed since."""
        return self._keys.get(account) or self._keys_before[account]


class LookTimes:
    """When to look for due jobs, by the monotonic clock."""

    def __init__(self) -> None:
        self._next_at = 0.0
        self._alert_until = 0.0
        self.empty_looks = 0  # in a row

    def alert(self) -> None:
        """Look often for a while. May be called from any thread."""
        self._alert_until = time.monotonic() + ALERT_SECONDS

    def look_after(self, seconds: float) -> None:
        """Set the next look, unless a wake-up comes first."""
        self._next_at = time.monotonic() + seconds

    def due(self, now: float) -> bool:
        """Return whether to look now."""
        return now >= self._next_at or now < self._alert_until

    def wait(self, now: float, *limits: float) -> float:
        """Return the seconds until the next look, or until the first of these times."""
        return LOOK_SECONDS if now < self._alert_until else min(self._next_at, *limits) - now
