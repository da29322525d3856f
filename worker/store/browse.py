"""Lists for people who look through millions of rows: newest first, a page at a time, each in bounded time.

What an index answers is asked at once. Anything else is looked for in windows of ids, from the newest down, until the
page is full or the time for it is over; the page then says how far it looked, and the next one goes on from there.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Table, func, or_, select

from worker.store.jobs import MAX_ID
from worker.tables import HELD_UNTIL, history, jobs, outputs

WINDOW = 20_000  # ids
LOOK_SECONDS = 0.12
CHOICES_MOST = 200
ENDED_BADLY = ("failed", "expired")  # the states that have a code


@dataclass(frozen=True, slots=True)
class JobsWanted:
    """What a list of jobs is asked for; what is empty does not matter. `late` in seconds; `text` is an id or a name."""

    status: str = ""
    account: str = ""
    kind: str = ""
    code: str = ""
    held: bool = False
    late: float | None = None
    text: str = ""


@dataclass(frozen=True, slots=True)
class OutputsWanted:
    """What a list of outputs is asked for; what is empty does not matter."""

    status: str = ""
    code: str = ""
    host: str = ""
    job_id: int | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """One page of rows. `before` is where the next one goes on, None at the end.

    `looked_to` is the id down to which was looked, where the time was over before the page was full.
    """

    rows: Sequence[Row[Any]]
    before: int | None
    looked_to: int | None = None


def jobs_page(
    connection: Connection,
    wanted: JobsWanted,
    *,
    before: int | None,
    limit: int,
    now: datetime,
    clock: Callable[[], float] = time.monotonic,
) -> Page:
    """Jobs with smaller ids than `before`, newest first."""
    conditions = _job_conditions(wanted, now)
    if wanted.text:
        found = {
            row.id: row
            for same in _same_text(wanted.text)
            for row in _newest(connection, jobs, [*conditions, same], before, limit + 1)
        }
        rows = sorted(found.values(), key=lambda row: -row.id)
        return _page(rows[: limit + 1], limit)
    if wanted.account or wanted.kind or wanted.code:
        return _looked_for(connection, jobs, conditions, before, limit, clock)
    return _page(_newest(connection, jobs, conditions, before, limit + 1), limit)


def outputs_page(
    connection: Connection,
    wanted: OutputsWanted,
    *,
    before: int | None,
    limit: int,
    clock: Callable[[], float] = time.monotonic,
) -> Page:
    """Outputs with smaller ids than `before`, newest first."""
    conditions = _output_conditions(wanted)
    if wanted.job_id is None and (wanted.code or wanted.host or wanted.status in ("stored", "failed")):
        return _looked_for(connection, outputs, conditions, before, limit, clock)
    return _page(_newest(connection, outputs, conditions, before, limit + 1), limit)


def _job_conditions(wanted: JobsWanted, now: datetime) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if wanted.status:
        conditions.append(jobs.c.status == wanted.status)
    if wanted.status == "pending":
        conditions.append(jobs.c.due_at.is_not(None))  # as they all are: so that an index of such jobs serves
    if wanted.account:
        conditions.append(jobs.c.account == wanted.account)
    if wanted.kind:
        conditions.append(jobs.c.kind == wanted.kind)
    if wanted.code:
        conditions += [jobs.c.status.in_(ENDED_BADLY), jobs.c.error_code == wanted.code]
    if wanted.held:
        conditions += [jobs.c.due_at == HELD_UNTIL, jobs.c.held_at.is_not(None)]
    if wanted.late is not None:
        conditions += [jobs.c.due_at < now - timedelta(seconds=wanted.late), jobs.c.claim_token.is_(None)]
    return conditions


def _output_conditions(wanted: OutputsWanted) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if wanted.status:
        conditions.append(outputs.c.status == wanted.status)
    if wanted.status == "pending":
        conditions.append(outputs.c.due_at.is_not(None))
    if wanted.code:
        conditions += [outputs.c.status != "stored", outputs.c.error_code == wanted.code]
    if wanted.host:
        starts = (f"{scheme}://{wanted.host}/" for scheme in ("https", "http"))
        conditions.append(or_(*(outputs.c.url.startswith(start, autoescape=True) for start in starts)))
    if wanted.job_id is not None:
        conditions.append(outputs.c.job_id == wanted.job_id)
    return conditions


def _same_text(text: str) -> list[ColumnElement[bool]]:
    """The ways in which a text can mean a job, each answered by an index of its own."""
    same: list[ColumnElement[bool]] = [jobs.c.remote_id == text, jobs.c.reference == text]
    if text.isascii() and text.isdecimal() and len(text) <= len(str(MAX_ID)) and int(text) <= MAX_ID:
        same.append(jobs.c.id == int(text))
    return same


def _newest(
    connection: Connection, table: Table, conditions: Sequence[ColumnElement[bool]], before: int | None, limit: int
) -> Sequence[Row[Any]]:
    query = select(table).where(*conditions).order_by(table.c.id.desc()).limit(limit)
    return connection.execute(query if before is None else query.where(table.c.id < before)).all()


def _looked_for(
    connection: Connection,
    table: Table,
    conditions: Sequence[ColumnElement[bool]],
    before: int | None,
    limit: int,
    clock: Callable[[], float],
) -> Page:
    newest = connection.execute(select(func.max(table.c.id))).scalar() or 0
    oldest = connection.execute(select(func.min(table.c.id))).scalar() or 0
    high = newest + 1 if before is None else min(before, newest + 1)
    rows: list[Row[Any]] = []
    until = clock() + LOOK_SECONDS
    while high > oldest and len(rows) <= limit:
        low = max(high - WINDOW, oldest)
        rows += _newest(connection, table, [*conditions, table.c.id >= low], high, limit + 1 - len(rows))
        high = low
        if clock() > until:
            break
    if len(rows) > limit or high <= oldest:
        return _page(rows, limit)
    return Page(rows, high, high)


def _page(rows: Sequence[Row[Any]], limit: int) -> Page:
    """A page of `limit` rows, of which one more was asked for."""
    return Page(rows[:limit], rows[limit - 1].id if len(rows) > limit else None)


def kinds_known(connection: Connection) -> list[str]:
    """Kinds of the newest jobs, to choose from."""
    newest = select(jobs.c.kind).order_by(jobs.c.id.desc()).limit(5_000).subquery()
    return list(
        connection.execute(select(newest.c.kind).distinct().order_by(newest.c.kind).limit(CHOICES_MOST)).scalars()
    )


def history_at(connection: Connection, minutes: Sequence[datetime]) -> Sequence[Row[datetime, str]]:
    """What was written down in these minutes, oldest first: a few of thousands are enough for a picture."""
    query = select(history.c.minute, history.c.body).where(history.c.minute.in_(minutes))
    return connection.execute(query.order_by(history.c.minute)).all()


def latest_history(connection: Connection) -> datetime | None:
    """The last minute that was written down."""
    minute: datetime | None = connection.execute(select(func.max(history.c.minute))).scalar()
    return minute


def owners(connection: Connection, job_ids: Sequence[int]) -> dict[int, Row[int, str, str, str]]:
    """The jobs of a page of outputs, by id: remote id and account."""
    query = select(jobs.c.id, jobs.c.remote_id, jobs.c.account, jobs.c.kind).where(jobs.c.id.in_(job_ids))
    return {row.id: row for row in connection.execute(query)}
