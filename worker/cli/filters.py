"""The filter options of `list`, `cancel`, `retry`, `hold` and `resume`."""

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import click
from sqlalchemy import Connection

from worker.client.jobs import lookup_id
from worker.core.durations import UNITS
from worker.core.lifecycle import JOB_STATES
from worker.settings import Settings
from worker.store.engine import database_now
from worker.store.reports.known_names import unknown_name
from worker.store.reports.search import JobFilter

AGE = re.compile(r"(\d+(?:\.\d+)?)([smhd])")


def _time(ctx: click.Context, option: click.Parameter, value: str | None) -> datetime | timedelta | None:
    """Parse a time, or an age that counts back from the time of the database."""
    if value is None:
        return None
    try:
        if age := AGE.fullmatch(value):
            return timedelta(seconds=float(age[1]) * UNITS[age[2]])
        moment = datetime.fromisoformat(value)
        if moment.tzinfo is not None:
            return moment.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise click.BadParameter(
        f"{value!r} is neither ISO 8601 with a zone, such as 2026-03-01T12:00:00Z, nor an age: 90s, 15m, 2h, 7d"
    )


FILTERS = (
    click.option("--status", "statuses", type=click.Choice(JOB_STATES), multiple=True, help="In this state."),
    click.option("--account", "accounts", metavar="NAME", multiple=True, help="Of this account."),
    click.option("--kind", "kinds", metavar="KIND", multiple=True, help="Of this kind."),
    click.option("--remote", "remote_ids", metavar="ID", multiple=True, help="With this remote id."),
    click.option("--reference", "references", metavar="TEXT", multiple=True, help="With this reference."),
    click.option("--code", "codes", metavar="CODE", multiple=True, help="Failed or expired with this error code."),
    click.option(
        "--output-code", "output_codes", metavar="CODE", multiple=True, help="With an output that has this error code."
    ),
    click.option("--host", "hosts", metavar="HOST", multiple=True, help="Fetched from this host of the API."),
    click.option(
        "--since",
        "submitted_since",
        metavar="TIME",
        callback=_time,
        help="Submitted at or after: ISO 8601 with a zone, or an age (90s, 15m, 2h, 7d).",
    ),
    click.option("--until", "submitted_until", metavar="TIME", callback=_time, help="Submitted before."),
    click.option("--finished-since", metavar="TIME", callback=_time, help="Final at or after."),
    click.option("--finished-until", metavar="TIME", callback=_time, help="Final before."),
    click.option(
        "--late", type=click.FloatRange(min=0), metavar="SECONDS", help="Due for longer than this and not claimed."
    ),
    click.option("--stuck", is_flag=True, help="Claimed by a dead process."),
    click.option("--past-deadline", is_flag=True, help="Pending and past the deadline."),
    click.option("--held", is_flag=True, help="Held, or of a held account or host."),
    click.option("--claimed-by", "holders", metavar="PROCESS", multiple=True, help="Claimed by this process."),
)


def filter_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the filter options. Repeating an option adds a value; a job must match all different options."""
    for option in reversed(FILTERS):
        command = option(command)
    return command


def checked_filter(connection: Connection, options: Mapping[str, Any], settings: Settings) -> JobFilter:
    """Return the filter of the options. A name that no account, host or kind has is a usage error, too."""
    selection = job_filter(options, database_now(connection))
    check_names(connection, selection, settings)
    return selection


def check_names(connection: Connection, selection: JobFilter, settings: Settings) -> None:
    """Raise a usage error for a name that no account, host or kind has. Its message lists the known names."""
    problem = unknown_name(connection, selection, settings)
    if problem is not None:
        raise click.UsageError(problem)


def stored_host(host: str) -> str:
    """Return a host as it is stored in jobs."""
    return host.lower().removesuffix(":443")


def job_filter(options: Mapping[str, Any], now: datetime) -> JobFilter:
    """Return the filter of the options. Raises NotTrackable for an invalid remote id, and click's usage error."""
    changed = {
        "remote_ids": tuple(lookup_id(remote) for remote in options["remote_ids"]),
        "hosts": tuple(map(stored_host, options["hosts"])),
    }
    return JobFilter(**{name: _moment(value, now) for name, value in options.items()} | changed)


def _moment(value: Any, now: datetime) -> Any:
    """Return the time of an age; any other value unchanged."""
    if not isinstance(value, timedelta):
        return value
    try:
        return now - value
    except OverflowError:
        raise click.UsageError(f"an age of {value.days} days is too large") from None
