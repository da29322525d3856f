"""History: one sample of the statistics per minute, kept for eight days. All processes try to write it."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, delete, func, select

from worker.store.bulk_write import insert_missing
from worker.store.counters import ANSWERS, ATTEMPTS, DELAY, FINISHED, POLLED, Total, read_counters
from worker.store.reports.stats import Stats, read_stats, waiting_by_account
from worker.store.reports.work_state import read_work_state
from worker.store.schema import history

KEPT = timedelta(days=8)
MINUTE = timedelta(minutes=1)
RECENT = timedelta(minutes=3)


def record_history(
    connection: Connection,
    *,
    now: datetime,
    full_rps: Callable[[str], float],
    full_slots: Callable[[str], int | None],
) -> timedelta:
    """Record a sample unless this minute has one, and delete old samples. Return the time until the next minute.

    `full_rps` and `full_slots` return the requests per second and the slots that the settings allow an account.
    """
    minute = now.replace(second=0, microsecond=0)
    recorded = connection.execute(select(history.c.minute).where(history.c.minute == minute)).scalar()
    if recorded is None:
        counters = read_counters(connection, (ANSWERS, ATTEMPTS, DELAY, FINISHED, POLLED))
        work = read_work_state(connection, full_rps, full_slots, now=now)
        stats = read_stats(connection, waiting_by_account(connection, now=now), work)
        body = _body(stats, counters)
        row = {"minute": minute, "body": json.dumps(body, separators=(",", ":"))}
        if insert_missing(connection, history, row):  # only one process deletes: concurrent deletes can deadlock
            connection.execute(delete(history).where(history.c.minute < minute - KEPT))
    return minute + MINUTE - now


def history_at(connection: Connection, minutes: Sequence[datetime]) -> Sequence[Row[datetime, str]]:
    """Return the history of these minutes, oldest first. A chart needs only some of the thousands of minutes."""
    query = select(history.c.minute, history.c.body).where(history.c.minute.in_(minutes))
    return connection.execute(query.order_by(history.c.minute)).all()


def latest_history(connection: Connection) -> datetime | None:
    """Return the last minute of the history, or None."""
    minute: datetime | None = connection.execute(select(func.max(history.c.minute))).scalar()
    return minute


def answered_lately(connection: Connection, *, now: datetime) -> dict[str, float]:
    """Return the requests per second that the API answered, by account, between the last two samples.

    Empty if the last one is older than three minutes.
    """
    query = select(history).where(history.c.minute > now - RECENT).order_by(history.c.minute.desc()).limit(2)
    rows = connection.execute(query).all()
    if len(rows) < 2:
        return {}
    after, before = (json.loads(row.body)["accounts"] for row in rows)
    seconds = (rows[0].minute - rows[1].minute).total_seconds()
    answers = {name: state["answers"] - before.get(name, {}).get("answers", 0) for name, state in after.items()}
    return {name: round(count / seconds, 2) for name, count in answers.items() if count >= 0}


def _body(stats: Stats, totals: Iterable[Total]) -> dict[str, Any]:
    total_list = list(totals)
    answers: Counter[str] = Counter()
    for entry in total_list:
        if entry.key.name == ANSWERS:
            answers[entry.key.account] += entry.times
    return {
        "jobs": dict(stats.jobs),
        "oldest_due": round(stats.oldest_due, 3),
        "unstored": sum(entry.count for entry in stats.unstored),
        "accounts": {
            entry.name: {"rps": round(entry.rps, 3), "held": entry.held, "answers": answers[entry.name]}
            for entry in stats.accounts
        },
        "delay": _by_label(total_list, DELAY),
        "polls": _by_label(total_list, POLLED),
        "finished": _by_label(total_list, FINISHED),
        "stored_bytes": int(sum(entry.total for entry in total_list if entry.key.name == ATTEMPTS)),
    }


def _by_label(counters: Iterable[Total], name: str) -> dict[str, int]:
    """Return the counts by label, over all accounts and kinds. Histogram buckets are not cumulative."""
    counts: Counter[str] = Counter()
    for total in counters:
        if total.key.name == name:
            counts[total.key.label] += total.times
    return dict(counts)
