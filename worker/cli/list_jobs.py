"""The command `list`."""

from typing import Any

import click

from worker.cli.filters import checked_filter, filter_options
from worker.cli.output import JOB_COLUMNS, json_option, plain, print_json, print_records
from worker.client.connection import transaction
from worker.settings import load
from worker.store.reports.search import find_jobs

LISTED = ("id", "remote_id", "account", "kind", "status", "polls", "submitted_at", "reference", "error_code")


@click.command("list")
@filter_options
@click.option("--limit", type=click.IntRange(1, 100_000), default=50, show_default=True)
@json_option
def list_jobs(limit: int, as_json: bool, **options: Any) -> None:
    """List jobs, newest first.

    Lists all jobs, or those that match all the options. If an option is repeated, a job must match one of its values.
    """
    settings = load()
    with transaction(settings) as connection:
        rows = find_jobs(connection, checked_filter(connection, options, settings), limit=limit)
    if as_json:
        print_json([plain(row, JOB_COLUMNS) for row in rows])
    else:
        print_records(LISTED, (dict(row._mapping) for row in rows), empty="no jobs")
