"""History: how everything stood, one row a minute for eight days. Many processes try, one row results."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, delete, select

from worker.store.bulk_write import insert_missing
from worker.store.counters import ANSWERS, ATTEMPTS, DELAY, FINISHED, POLLED, Total, read_counters
from worker.store.reports.stats import Stats, read_stats, waiting_by_account
from worker.store.schema import history

KEPT = timedelta(days=8)
MINUTE = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class HistorySample:
    """How everything stood in a minute. `body` is as `sample` wrote it; its totals only ever grow."""

    minute: datetime
    body: dict[str, Any]


def record_history(connection: Connection, *, now: datetime, full_rps: Callable[[str], float]) -> timedelta:
    """Writes down how everything stands, where nobody has done so in this minute; how long until the next one is due.

    What is older than KEPT is forgotten. `full_rps` is what the settings allow each account.
    """
    minute = now.replace(second=0, microsecond=0)
    present = connection.execute(select(history.c.minute).where(history.c.minute == minute)).scalar()
    if present is None:
        counted = read_counters(connection, (ANSWERS, ATTEMPTS, DELAY, FINISHED, POLLED))
        state = read_stats(connection, waiting_by_account(connection, now=now), now=now, full_rps=full_rps)
        body = _body(state, counted)
        line = {"minute": minute, "body": json.dumps(body, separators=(",", ":"))}
        if insert_missing(connection, history, line):  # of many that try one does: deletes that meet block each other
            connection.execute(delete(history).where(history.c.minute < minute - KEPT))
    return minute + MINUTE - now


def read_history(connection: Connection, since: datetime) -> list[HistorySample]:
    """The samples from a moment on, oldest first."""
    rows = select(history.c.minute, history.c.body).where(history.c.minute >= since).order_by(history.c.minute)
    return [HistorySample(row.minute, json.loads(row.body)) for row in connection.execute(rows)]


def _body(state: Stats, counted: Iterable[Total]) -> dict[str, Any]:
    counters = list(counted)
    answers: Counter[str] = Counter()
    for one in counters:
        if one.key.name == ANSWERS:
            answers[one.key.account] += one.times
    return {
        "jobs": dict(state.jobs),
        "oldest_due": round(state.oldest_due, 3),
        "unstored": sum(one.count for one in state.unstored),
        "accounts": {
            one.name: {"rps": round(one.rps, 3), "held": one.held, "answers": answers[one.name]}
            for one in state.accounts
        },
        "delay": _by_label(counters, DELAY),
        "polls": _by_label(counters, POLLED),
        "finished": _by_label(counters, FINISHED),
        "stored_bytes": int(sum(one.total for one in counters if one.key.name == ATTEMPTS)),
    }


def _by_label(counters: Iterable[Total], name: str) -> dict[str, int]:
    """Counts over all accounts and kinds; each bucket of a histogram has what fell into it alone."""
    found: Counter[str] = Counter()
    for one in counters:
        if one.key.name == name:
            found[one.key.label] += one.times
    return dict(found)
