"""The command `notify`."""

from dataclasses import asdict

import click

from worker.cli.job_ids import target_options, targets
from worker.cli.output import json_option, print_json, print_records
from worker.client import actions
from worker.client.connection import transaction
from worker.client.matching import ActionResult
from worker.errors import JobNotFound
from worker.settings import load
from worker.store.events import jobs_with_refused_events
from worker.store.jobs import job_row
from worker.system.terminal import echo

COLUMNS = ("id", "changed", "status")


@click.command()
@target_options
@click.option("--receiver", metavar="HOST", help="Select all jobs with a webhook that this host refused.")
@json_option
def notify(ids: tuple[str, ...], remote: str | None, account: str | None, receiver: str | None, as_json: bool) -> int:
    """Send the webhooks of jobs again.

    Each webhook of a job has its id and body, is due now, and is tried for another day. If a final state never got a
    webhook, it is created. A `worker` process sends them. Exit code 1 if a job does not exist or has no webhook to
    send.
    """
    job_ids = targets(ids, remote, account) if receiver is None else _refused_by(receiver, ids, remote, account)
    rows = []
    for job_id in job_ids:
        try:
            rows.append(asdict(_notify(job_id)))
        except JobNotFound as error:
            echo(f"fetch-worker: {error}", err=True)
    if as_json:
        print_json(rows)
    elif rows:
        print_records(COLUMNS, rows, empty="")
    return 0 if len(rows) == len(job_ids) and all(row["changed"] for row in rows) else 1


def _refused_by(receiver: str, *others: object) -> list[int]:
    """Return the jobs whose webhooks a receiver refused. Raises a usage error if other jobs are selected, too."""
    if any(others):
        raise click.UsageError("give job ids, --remote ID or --receiver HOST, not several of them")
    with transaction(load()) as connection:
        job_ids = jobs_with_refused_events(connection, receiver)
    if not job_ids:
        echo(f"{receiver} has refused no webhook that is not delivered", err=True)
    return job_ids


def _notify(job_id: int) -> ActionResult:
    changed = actions.notify(job_id)
    with transaction(load()) as connection:
        job = job_row(connection, job_id)
    return ActionResult(job_id, changed, "" if job is None else job.status)  # it may be pruned meanwhile
