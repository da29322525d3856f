"""Pages of jobs, outputs and webhooks, newest first, each read in a limited time even from millions of rows.

A filter with an index is one query. Other filters are searched in windows of ids, from the newest id down. Each window
is wider than the previous one, but not wider than the time left allows: rows that the database must read from its disk
take ten times as long. The search ends when the page is full or its time has run out. The page has the id where the
search stopped, and the next page continues there.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Table, func, select

from worker.store.audit import latest_actions
from worker.store.jobs import MAX_ID
from worker.store.reports.search import JobFilter, Search, find_jobs, prepare_search
from worker.store.schema import events, jobs, outputs
from worker.store.url_host import is_at_host

WINDOW = 2_000  # ids in the first window; fewer are not worth a query
GROWTH = 4  # of a window, compared with the previous one
LOOK_SECONDS = 0.08  # the time of a search


@dataclass(frozen=True, slots=True)
class OutputFilter:
    """A filter for outputs. Empty fields are ignored."""

    status: str = ""
    code: str = ""
    host: str = ""
    job_id: int | None = None


@dataclass(frozen=True, slots=True)
class WebhookFilter:
    """A filter for webhook events. Empty fields are ignored. `receiver` is a host, with a port if the URL has one."""

    status: str = ""
    receiver: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """A page of rows. The next page has ids below `before`; on the last page it is None.

    `searched_to` is the id where the search stopped if its time was over before the page was full.
    """

    rows: Sequence[Row[Any]]
    before: int | None
    searched_to: int | None = None


def jobs_page(
    connection: Connection,
    job_filter: JobFilter,
    *,
    before: int | None,
    limit: int,
    text: str = "",
    clock: Callable[[], float] = time.monotonic,
) -> Page:
    """Return a page of jobs with ids below `before`. With `text`, it must be their id, remote id or reference."""
    if text:
        rows_by_filter = [
            find_jobs(connection, text_filter, limit=limit + 1, after=before)
            for text_filter in _filters_for_text(job_filter, text)
        ]
        rows_by_id = {row.id: row for rows in rows_by_filter for row in rows}
        return _page(sorted(rows_by_id.values(), key=lambda row: -row.id)[: limit + 1], limit)
    prepared = prepare_search(connection, job_filter)
    if prepared.ids is not None or replace(job_filter, statuses=()) == JobFilter():
        return _page(find_jobs(connection, prepared, limit=limit + 1, after=before), limit)

    def search_window(low: int, high: int, window_limit: int) -> Sequence[Row[Any]]:
        window_search = Search(tuple((*alternative, jobs.c.id >= low) for alternative in prepared.alternatives))
        return find_jobs(connection, window_search, limit=window_limit, after=high)

    return _search_windows(connection, jobs, search_window, before, limit, clock)


def _filters_for_text(job_filter: JobFilter, text: str) -> list[JobFilter]:
    """Return the filters for a text that is a remote id, a reference or an id. Each has an index."""
    filters = [replace(job_filter, remote_ids=(text,)), replace(job_filter, references=(text,))]
    is_number = text.isascii() and text.isdecimal() and len(text) <= len(str(MAX_ID))
    return [*filters, replace(job_filter, ids=(int(text),))] if is_number and int(text) <= MAX_ID else filters


def outputs_page(
    connection: Connection,
    output_filter: OutputFilter,
    *,
    before: int | None,
    limit: int,
    clock: Callable[[], float] = time.monotonic,
) -> Page:
    """Return a page of outputs with ids below `before`."""
    conditions = _output_conditions(output_filter)

    def search_window(low: int, high: int, window_limit: int) -> Sequence[Row[Any]]:
        return _newest_outputs(connection, [*conditions, outputs.c.id >= low], high, window_limit)

    if output_filter.job_id is None and (
        output_filter.code or output_filter.host or output_filter.status in ("stored", "failed")
    ):
        return _search_windows(connection, outputs, search_window, before, limit, clock)
    return _page(_newest_outputs(connection, conditions, before, limit + 1), limit)


def _output_conditions(output_filter: OutputFilter) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if output_filter.status:
        conditions.append(outputs.c.status == output_filter.status)
    if output_filter.status == "pending":
        conditions.append(outputs.c.due_at.is_not(None))
    if output_filter.code:
        conditions += [outputs.c.status != "stored", outputs.c.error_code == output_filter.code]
    if output_filter.host:
        conditions.append(is_at_host(outputs.c.url, output_filter.host))
    if output_filter.job_id is not None:
        conditions.append(outputs.c.job_id == output_filter.job_id)
    return conditions


def webhooks_page(
    connection: Connection,
    webhook_filter: WebhookFilter,
    *,
    before: int | None,
    limit: int,
    clock: Callable[[], float] = time.monotonic,
) -> Page:
    """Return a page of webhook events with ids below `before`, without their bodies."""
    conditions = [
        *([events.c.status == webhook_filter.status] if webhook_filter.status else []),
        *([events.c.due_at.is_not(None)] if webhook_filter.status == "pending" else []),
        *([is_at_host(events.c.url, webhook_filter.receiver)] if webhook_filter.receiver else []),
    ]
    query = select(*(column for column in events.c if column is not events.c.body)).where(*conditions)

    def search_window(low: int, high: int, window_limit: int) -> Sequence[Row[Any]]:
        window = query.where(events.c.id >= low, events.c.id < high)
        return connection.execute(window.order_by(events.c.id.desc()).limit(window_limit)).all()

    return _search_windows(connection, events, search_window, before, limit, clock)


def _newest_outputs(
    connection: Connection, conditions: Sequence[ColumnElement[bool]], before: int | None, limit: int
) -> Sequence[Row[Any]]:
    query = select(outputs).where(*conditions).order_by(outputs.c.id.desc()).limit(limit)
    return connection.execute(query if before is None else query.where(outputs.c.id < before)).all()


def _search_windows(
    connection: Connection,
    table: Table,
    search_window: Callable[[int, int, int], Sequence[Row[Any]]],
    before: int | None,
    limit: int,
    clock: Callable[[], float],
) -> Page:
    """Return a page of the rows that `search_window(low, high, limit)` returns, from the newest window down."""
    newest = connection.execute(select(func.max(table.c.id))).scalar() or 0
    oldest = connection.execute(select(func.min(table.c.id))).scalar() or 0
    high = newest + 1 if before is None else min(before, newest + 1)
    rows: list[Row[Any]] = []
    began, width = clock(), WINDOW
    end_time = began + LOOK_SECONDS
    while high > oldest and len(rows) <= limit:
        low = max(high - width, oldest)
        rows += search_window(low, high, limit + 1 - len(rows))
        now, high = clock(), low
        seconds, began = now - began, now
        fitting = int(width * max(end_time - now, 0.0) / seconds) if seconds > 0 else width * GROWTH
        if fitting < WINDOW:
            break
        width = min(width * GROWTH, fitting)
    if len(rows) > limit or high <= oldest:
        return _page(rows, limit)
    return Page(rows, high, high)


def _page(rows: Sequence[Row[Any]], limit: int) -> Page:
    """Return a page of `limit` rows. The query had a limit of one row more."""
    return Page(rows[:limit], rows[limit - 1].id if len(rows) > limit else None)


def actions_page(connection: Connection, *, before: int | None, limit: int) -> Page:
    """Return a page of the audit trail."""
    return _page(latest_actions(connection, limit=limit + 1, before=before), limit)


def jobs_by_id(connection: Connection, job_ids: Sequence[int]) -> dict[int, Row[int, str, str, str]]:
    """Return remote id, account and kind of these jobs, by id."""
    query = select(jobs.c.id, jobs.c.remote_id, jobs.c.account, jobs.c.kind).where(jobs.c.id.in_(job_ids))
    return {row.id: row for row in connection.execute(query)}
