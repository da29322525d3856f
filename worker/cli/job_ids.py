"""The arguments of commands that name jobs: job ids, or `--remote ID`."""

from collections.abc import Callable, Collection
from typing import Any

import click
from sqlalchemy import Connection

from worker.cli.filters import check_names
from worker.client.connection import transaction
from worker.client.jobs import lookup_id
from worker.errors import JobNotFound
from worker.settings import load
from worker.store.jobs import jobs_by_remote
from worker.store.reports.search import JobFilter

MAX_DIGITS = 100  # of a job id; Python refuses to parse very long numbers


def target_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the arguments that select jobs."""
    command = click.option("--account", help="With --remote: only jobs of this account.")(command)
    command = click.option("--remote", metavar="ID", help="Select all jobs with this remote id.")(command)
    return click.argument("ids", metavar="[JOB]...", nargs=-1)(command)


def targets(ids: tuple[str, ...], remote: str | None, account: str | None) -> list[int]:
    """Return the given job ids, or the ids of all jobs with a remote id. Raises JobNotFound and a usage error."""
    if bool(ids) == (remote is not None):
        raise click.UsageError("give job ids, or --remote ID")
    if remote is None:
        return job_numbers(ids)
    settings = load()
    with transaction(settings) as connection:
        check_names(connection, JobFilter(accounts=() if account is None else (account,)), settings)
        return jobs_with_remote_id(connection, lookup_id(remote), () if account is None else (account,))


def jobs_with_remote_id(connection: Connection, remote_id: str, accounts: Collection[str]) -> list[int]:
    """Return the ids of the jobs with a remote id, of these accounts if there are any. Raises JobNotFound."""
    rows = jobs_by_remote(connection, remote_id, None)
    job_ids = [row.id for row in rows if not accounts or row.account in accounts]
    if not job_ids:
        raise JobNotFound(f"there is no job with the remote id {remote_id!r}")
    return job_ids


def job_numbers(ids: tuple[str, ...]) -> list[int]:
    """Parse job ids. Raises JobNotFound for an id that no job can have, and click's usage error."""
    if not all(text.isdecimal() for text in ids):
        raise click.UsageError("a job id is a whole number; use --remote for an id of the API")
    too_long = next((text for text in ids if len(text) > MAX_DIGITS), None)
    if too_long is not None:
        raise JobNotFound(f"there is no job {too_long[:MAX_DIGITS]}…")
    return [int(text) for text in ids]
