"""The arguments of commands that name jobs: job ids, or `--remote ID`."""

from collections.abc import Callable
from typing import Any

import click

from worker.client.jobs import lookup_id
from worker.errors import JobNotFound
from worker.settings import load
from worker.store.engine import engine_for, translate_errors
from worker.store.jobs import jobs_by_remote

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
    if remote is not None:
        settings = load()
        remote_id = lookup_id(remote)
        with translate_errors(settings.database), engine_for(settings.database).connect() as connection:
            job_ids = [row.id for row in jobs_by_remote(connection, remote_id, account)]
        if not job_ids:
            raise JobNotFound(f"there is no job with the remote id {remote!r}")
        return job_ids
    return job_numbers(ids)


def job_numbers(ids: tuple[str, ...]) -> list[int]:
    """Parse job ids. Raises JobNotFound for an id that no job can have, and click's usage error."""
    if not all(text.isdecimal() for text in ids):
        raise click.UsageError("a job id is a whole number; use --remote for an id of the API")
    too_long = next((text for text in ids if len(text) > MAX_DIGITS), None)
    if too_long is not None:
        raise JobNotFound(f"there is no job {too_long[:MAX_DIGITS]}…")
    return [int(text) for text in ids]
