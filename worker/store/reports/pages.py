"""Lists for people who look through millions of rows: newest first, a page at a time, each in bounded time.

What an index answers is asked at once. Anything else is looked for in windows of ids, from the newest down, each twice
as wide as the one before, until the page is full or the time for it is over; the page then says how far it looked, and
the next one goes on from there.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Table, func, or_, select

from worker.store.breakers import all_breakers
from worker.store.jobs import MAX_ID, waiting_accounts
from worker.store.reports.search import JobFilter, Search, find_jobs, prepare_search
from worker.store.schema import history, jobs, outputs

WINDOW = 20_000  # ids, of the first one
LOOK_SECONDS = 0.08  # no further window is begun after that
CHOICES_MOST = 200


@dataclass(frozen=True, slots=True)
class OutputFilter:
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
    wanted: JobFilter,
    *,
    before: int | None,
    limit: int,
    text: str = "",
    clock: Callable[[], float] = time.monotonic,
) -> Page:
    """Jobs with smaller ids than `before`, newest first; with a text those whose id, remote id or reference it is."""
    if text:
        named = [find_jobs(connection, same, limit=limit + 1, after=before) for same in _named(wanted, text)]
        found = {row.id: row for rows in named for row in rows}
        return _page(sorted(found.values(), key=lambda row: -row.id)[: limit + 1], limit)
    ready = prepare_search(connection, wanted)
    if replace(wanted, statuses=()) == JobFilter():
        return _page(find_jobs(connection, ready, limit=limit + 1, after=before), limit)

    def look(low: int, high: int, most: int) -> Sequence[Row[Any]]:
        within = Search(tuple((*way, jobs.c.id >= low) for way in ready.ways))
        return find_jobs(connection, within, limit=most, after=high)

    return _looked_for(connection, jobs, look, before, limit, clock)


def _named(wanted: JobFilter, text: str) -> list[JobFilter]:
    """The ways in which a text can name a job, each answered by an index of its own."""
    named = [replace(wanted, remote_ids=(text,)), replace(wanted, references=(text,))]
    plain = text.isascii() and text.isdecimal() and len(text) <= len(str(MAX_ID))
    return [*named, replace(wanted, ids=(int(text),))] if plain and int(text) <= MAX_ID else named


def outputs_page(
    connection: Connection,
    wanted: OutputFilter,
    *,
    before: int | None,
    limit: int,
    clock: Callable[[], float] = time.monotonic,
) -> Page:
    """Outputs with smaller ids than `before`, newest first."""
    conditions = _output_conditions(wanted)

    def look(low: int, high: int, most: int) -> Sequence[Row[Any]]:
        return _newest_outputs(connection, [*conditions, outputs.c.id >= low], high, most)

    if wanted.job_id is None and (wanted.code or wanted.host or wanted.status in ("stored", "failed")):
        return _looked_for(connection, outputs, look, before, limit, clock)
    return _page(_newest_outputs(connection, conditions, before, limit + 1), limit)


def _output_conditions(wanted: OutputFilter) -> list[ColumnElement[bool]]:
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


def _newest_outputs(
    connection: Connection, conditions: Sequence[ColumnElement[bool]], before: int | None, limit: int
) -> Sequence[Row[Any]]:
    query = select(outputs).where(*conditions).order_by(outputs.c.id.desc()).limit(limit)
    return connection.execute(query if before is None else query.where(outputs.c.id < before)).all()


def _looked_for(
    connection: Connection,
    table: Table,
    look: Callable[[int, int, int], Sequence[Row[Any]]],
    before: int | None,
    limit: int,
    clock: Callable[[], float],
) -> Page:
    """A page of what `look` finds from one id up to another, the newest windows first."""
    newest = connection.execute(select(func.max(table.c.id))).scalar() or 0
    oldest = connection.execute(select(func.min(table.c.id))).scalar() or 0
    high = newest + 1 if before is None else min(before, newest + 1)
    rows: list[Row[Any]] = []
    until, width = clock() + LOOK_SECONDS, WINDOW
    while high > oldest and len(rows) <= limit:
        low = max(high - width, oldest)
        rows += look(low, high, limit + 1 - len(rows))
        high, width = low, width * 2
        if clock() > until:
            break
    if len(rows) > limit or high <= oldest:
        return _page(rows, limit)
    return Page(rows, high, high)


def _page(rows: Sequence[Row[Any]], limit: int) -> Page:
    """A page of `limit` rows, of which one more was asked for."""
    return Page(rows[:limit], rows[limit - 1].id if len(rows) > limit else None)


def known_accounts(connection: Connection) -> list[str]:
    """Accounts that have been asked with, or have jobs that wait, to choose from."""
    asked = [name for scope, name in all_breakers(connection) if scope == "account"]
    return sorted({*asked, *waiting_accounts(connection)})[:CHOICES_MOST]


def known_kinds(connection: Connection) -> list[str]:
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


def jobs_by_id(connection: Connection, job_ids: Sequence[int]) -> dict[int, Row[int, str, str, str]]:
    """The jobs of a page of outputs, by id: remote id and account."""
    query = select(jobs.c.id, jobs.c.remote_id, jobs.c.account, jobs.c.kind).where(jobs.c.id.in_(job_ids))
    return {row.id: row for row in connection.execute(query)}
