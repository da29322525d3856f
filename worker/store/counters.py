"""Totals: what has happened so far, counted in the transaction that makes it so. No process can lose or double a count.

A row is one figure: what is counted, of which account and kind, under which label (an answer's class, a final state, a
bucket), how often, and the sum of what was measured. Each figure is kept in a few slots which add up, so that
transactions seldom wait for one another. A transaction writes its totals last, in order.
"""

import random
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import Connection, func, select
from sqlalchemy.dialects import mysql, postgresql, sqlite

from worker.core.histograms import DELAYS, POLLS, TRANSFERS, bucket
from worker.store.bulk_write import batch_columns, batch_parameter
from worker.store.schema import counters

SLOTS = 8
KINDS_MOST = 200  # counted by their name; all others together
OTHER = "other"

ANSWERS = "answers"  # by account; label: the class of the answer
DELAY = "delay"  # by account and kind; label: a bucket of DELAYS
POLLED = "polls"  # the same of POLLS
FINISHED = "finished"  # by account and kind; label: the final state
ATTEMPTS = "attempts"  # label: "stored", or the code of the trouble; the sum is of bytes stored
TRANSFER = "transfer"  # label: a bucket of TRANSFERS
LEFT_OUT = "left_out"  # by account: outputs that an answer listed beyond those that are stored
WEBHOOKS = "webhooks"  # label: how an event ended, "delivered" or "failed"


class CounterKey(NamedTuple):
    """What is counted. `account` and `kind` are empty where it is counted for all of them together."""

    name: str
    account: str
    kind: str
    label: str


@dataclass(frozen=True, slots=True)
class Total:
    """How often something has happened so far, and the sum of what was measured each time."""

    figure: CounterKey
    times: int
    total: float


class Tally:
    """What one transaction is to count."""

    def __init__(self) -> None:
        self._counted: dict[CounterKey, list[float]] = {}

    def add(
        self, name: str, label: str, *, account: str = "", kind: str = "", value: float = 0.0, times: int = 1
    ) -> None:
        """Counts one, or so many; `value` is what they measured together."""
        counted = self._counted.setdefault(CounterKey(name, account, kind, label), [0, 0.0])
        counted[0] += times
        counted[1] += value

    def delay(self, account: str, kind: str, seconds: float) -> None:
        """A job was found ready so many seconds after it was, as far as can be told."""
        self.add(DELAY, bucket(seconds, DELAYS), account=account, kind=kind, value=seconds)

    def polled(self, account: str, kind: str, polls: int) -> None:
        """So many requests it took until a job was ready, or ended."""
        self.add(POLLED, bucket(polls, POLLS), account=account, kind=kind, value=polls)

    def finished(self, account: str, kind: str, status: str) -> None:
        """A job became final."""
        self.add(FINISHED, status, account=account, kind=kind)

    def attempt(self, outcome: str, *, seconds: float, stored_bytes: int = 0) -> None:
        """A download attempt came to an end."""
        self.add(ATTEMPTS, outcome, value=stored_bytes)
        if outcome == "stored":
            self.add(TRANSFER, bucket(seconds, TRANSFERS), value=seconds)

    def left_out(self, account: str, outputs: int) -> None:
        """Count outputs that are not stored, since the answer listed too many."""
        self.add(LEFT_OUT, "", account=account, times=outputs)

    def write(self, connection: Connection) -> None:
        """Adds it to the totals: the last thing that its transaction does."""
        if not self._counted:
            return
        known = _known_kinds(connection) if any(figure.kind for figure in self._counted) else None
        added: dict[CounterKey, list[float]] = {}
        for figure, (times, total) in self._counted.items():
            if known is not None and figure.kind:
                figure = figure._replace(kind=known.named(figure.kind))
            sums = added.setdefault(figure, [0, 0.0])
            sums[0] += times
            sums[1] += total
        slot = random.randrange(SLOTS)
        rows = [
            {**figure._asdict(), "slot": slot, "times": int(added[figure][0]), "total": added[figure][1]}
            for figure in sorted(added)  # in this order everywhere: no two transactions block each other for good
        ]
        _add(connection, rows)


def read_counters(connection: Connection, names: Iterable[str] | None = None) -> list[Total]:
    """All figures, or those of these names."""
    columns = [counters.c[name] for name in CounterKey._fields]
    query = select(*columns, func.sum(counters.c.times), func.sum(counters.c.total)).group_by(*columns)
    if names is not None:
        query = query.where(counters.c.name.in_(list(names)))
    return [Total(CounterKey(*row[:4]), int(row[4]), float(row[5])) for row in connection.execute(query).all()]


def _add(connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
    match connection.dialect.name:
        case "postgresql":
            connection.execute(_add_all(), batch_parameter(list(rows[0]), rows))
        case "sqlite":
            new = sqlite.insert(counters).values(rows)
            connection.execute(new.on_conflict_do_update(index_elements=_KEY, set_=_sums(new.excluded)))
        case _:
            more = mysql.insert(counters).values(rows)
            connection.execute(more.on_duplicate_key_update(_sums(more.inserted)))


@cache
def _add_all() -> Any:
    fresh = batch_columns(counters, _COLUMNS)
    new = postgresql.insert(counters).from_select(_COLUMNS, select(*fresh.values()))
    return new.on_conflict_do_update(index_elements=_KEY, set_=_sums(new.excluded))


def _sums(added: Any) -> dict[str, Any]:
    return {name: counters.c[name] + added[name] for name in ("times", "total")}


_KEY = (*CounterKey._fields, "slot")
_COLUMNS = (*_KEY, "times", "total")


class _Kinds:
    """The kinds that are counted by their name: the first that came, since each makes a dozen rows."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)
        self._lock = threading.Lock()

    def named(self, kind: str) -> str:
        if kind in self._names:
            return kind
        with self._lock:
            if len(self._names) >= KINDS_MOST:
                return OTHER
            self._names.add(kind)
            return kind


_kinds_by_url: dict[str, _Kinds] = {}


def _known_kinds(connection: Connection) -> _Kinds:
    key = str(connection.engine.url)
    found = _kinds_by_url.get(key)
    if found is None:
        names = connection.execute(select(counters.c.kind).where(counters.c.kind != "").distinct()).scalars()
        found = _kinds_by_url.setdefault(key, _Kinds(names))  # of two threads that came at once, the first one's
    return found
