"""Counters of all events so far, increased in the same transaction as the change that they count.

So a crash can neither lose a count nor count twice. A row has the name of the counter, the account, the kind, a label
(the class of an answer, a final state, a histogram bucket), the number of events, and the sum of the measured values.
Each counter is stored in several slots, whose sum is its value, so that transactions seldom wait for each other. A
transaction writes its counters last, in a fixed order.
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
KINDS_MOST = 200  # kinds with counters of their own; the others share OTHER
OTHER = "other"

ANSWERS = "answers"  # by account; label: the class of the answer
DELAY = "delay"  # by account and kind; label: a bucket of DELAYS
POLLED = "polls"  # by account and kind; label: a bucket of POLLS
FINISHED = "finished"  # by account and kind; label: the final state
ATTEMPTS = "attempts"  # label: "stored" or an error code; the sum is the number of stored bytes
TRANSFER = "transfer"  # label: a bucket of TRANSFERS
LEFT_OUT = "left_out"  # by account: outputs that are not stored because an answer listed too many
ORDERS = "orders"  # by account; label: the class of the answer to an order
WEBHOOKS = "webhooks"  # label: how the delivery ended, "delivered" or "failed"


class CounterKey(NamedTuple):
    """The key of a counter. `account` and `kind` are empty if the counter is not split by them."""

    name: str
    account: str
    kind: str
    label: str


@dataclass(frozen=True, slots=True)
class Total:
    """The value of a counter: the number of events so far, and the sum of the measured values."""

    key: CounterKey
    times: int
    total: float


class Tally:
    """The counts of one transaction, to be written at its end."""

    def __init__(self) -> None:
        self._counted: dict[CounterKey, list[float]] = {}

    def add(
        self, name: str, label: str, *, account: str = "", kind: str = "", value: float = 0.0, times: int = 1
    ) -> None:
        """Add `times` events. `value` is the sum of their measured values."""
        counted = self._counted.setdefault(CounterKey(name, account, kind, label), [0, 0.0])
        counted[0] += times
        counted[1] += value

    def delay(self, account: str, kind: str, seconds: float) -> None:
        """Count a job that was seen ready. `seconds` is the estimated time since it became ready."""
        self.add(DELAY, bucket(seconds, DELAYS), account=account, kind=kind, value=seconds)

    def polled(self, account: str, kind: str, polls: int) -> None:
        """Count a job that became ready or ended, with the number of its polls."""
        self.add(POLLED, bucket(polls, POLLS), account=account, kind=kind, value=polls)

    def finished(self, account: str, kind: str, status: str) -> None:
        """Count a job that reached a final state."""
        self.add(FINISHED, status, account=account, kind=kind)

    def attempt(self, outcome: str, *, seconds: float, stored_bytes: int = 0) -> None:
        """Count a download attempt that ended."""
        self.add(ATTEMPTS, outcome, value=stored_bytes)
        if outcome == "stored":
            self.add(TRANSFER, bucket(seconds, TRANSFERS), value=seconds)

    def left_out(self, account: str, outputs: int) -> None:
        """Count outputs that are not stored because the answer listed too many."""
        self.add(LEFT_OUT, "", account=account, times=outputs)

    def write(self, connection: Connection) -> None:
        """Write the counts. This must be the last step of the transaction."""
        if not self._counted:
            return
        kinds = _known_kinds(connection) if any(key.kind for key in self._counted) else None
        added: dict[CounterKey, list[float]] = {}
        for key, (times, total) in self._counted.items():
            if kinds is not None and key.kind:
                key = key._replace(kind=kinds.named(key.kind))
            sums = added.setdefault(key, [0, 0.0])
            sums[0] += times
            sums[1] += total
        slot = random.randrange(SLOTS)
        rows = [
            {**key._asdict(), "slot": slot, "times": int(added[key][0]), "total": added[key][1]}
            for key in sorted(added)  # all transactions write in this order, which avoids deadlocks
        ]
        _add_counters(connection, rows)


def read_counters(connection: Connection, names: Iterable[str] | None = None) -> list[Total]:
    """Return all counters, or those with these names."""
    columns = [counters.c[name] for name in CounterKey._fields]
    query = select(*columns, func.sum(counters.c.times), func.sum(counters.c.total)).group_by(*columns)
    if names is not None:
        query = query.where(counters.c.name.in_(list(names)))
    return [Total(CounterKey(*row[:4]), int(row[4]), float(row[5])) for row in connection.execute(query).all()]


def _add_counters(connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
    match connection.dialect.name:
        case "postgresql":
            connection.execute(_postgres_upsert(), batch_parameter(list(rows[0]), rows))
        case "sqlite":
            insertion = sqlite.insert(counters).values(rows)
            connection.execute(insertion.on_conflict_do_update(index_elements=_KEY, set_=_sums(insertion.excluded)))
        case _:
            mysql_insertion = mysql.insert(counters).values(rows)
            connection.execute(mysql_insertion.on_duplicate_key_update(_sums(mysql_insertion.inserted)))


@cache
def _postgres_upsert() -> Any:
    batch = batch_columns(counters, _COLUMNS)
    insertion = postgresql.insert(counters).from_select(_COLUMNS, select(*batch.values()))
    return insertion.on_conflict_do_update(index_elements=_KEY, set_=_sums(insertion.excluded))


def _sums(added: Any) -> dict[str, Any]:
    return {name: counters.c[name] + added[name] for name in ("times", "total")}


_KEY = (*CounterKey._fields, "slot")
_COLUMNS = (*_KEY, "times", "total")


class _Kinds:
    """The kinds with counters of their own: the first `KINDS_MOST`, because each kind needs a dozen rows."""

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
    kinds = _kinds_by_url.get(key)
    if kinds is None:
        names = connection.execute(select(counters.c.kind).where(counters.c.kind != "").distinct()).scalars()
        kinds = _kinds_by_url.setdefault(key, _Kinds(names))  # another thread may have been faster
    return kinds
