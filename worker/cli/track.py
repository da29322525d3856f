"""The command `track`."""

from typing import Any

import click

from worker.cli.output import json_option, print_json, print_records
from worker.client.jobs import get
from worker.client.tracking import track_with_created
from worker.errors import DatabaseRefused, NotTrackable
from worker.settings import load
from worker.system.redaction import shared_scrubber
from worker.system.terminal import echo


@click.command()
@click.argument("remotes", metavar="ID...", nargs=-1, required=True)
@click.option("--account", default="default", show_default=True, help="The account whose key is used.")
@click.option("--kind", help="A name for jobs of similar duration. Default: from the fetch URL.")
@click.option("--endpoint", help="The URL or path that the order was posted to; it determines the fetch URL.")
@click.option("--fetch-url", help="The fetch_result of the submit answer.")
@click.option("--eta", type=float, help="The eta of the submit answer, in seconds.")
@click.option("--submitted-at", help="The time of submission: ISO 8601 with a time zone.")
@click.option(
    "--priority", type=int, default=0, show_default=True, help="Jobs with a higher priority are polled first."
)
@click.option("--reference", help="Your own name for the job, to find it by.")
@click.option("--on-done", help="The Celery task to call with the job id when it is final: task or queue/task.")
@click.option("--webhook-url", help="The URL that receives a webhook for every final state.")
@click.option("--deadline", type=float, help="The seconds from submission after which the job may expire.")
@json_option
def track(remotes: tuple[str, ...], as_json: bool, **options: Any) -> int:
    """Track jobs by remote id or by submit answer (JSON)."""
    rows: list[dict[str, Any]] = []
    scrubber = shared_scrubber(load().secret_texts)
    for remote in remotes:
        try:
            job_id, created = track_with_created([remote], **options)[0]
        except (NotTrackable, DatabaseRefused) as error:
            echo(f"fetch-worker: {scrubber.text(remote)[:60]!r} not tracked: {error}", err=True)
            continue
        job = get(job_id)
        if job is not None:
            rows.append({"id": job_id, "remote_id": job.remote_id, "status": job.status, "created": created})
    if as_json:
        print_json(rows)
    elif rows:
        print_records(list(rows[0]), rows, empty="")
    return 0 if len(rows) == len(remotes) else 1
