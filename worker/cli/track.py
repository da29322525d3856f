"""The command `track`."""

import json
import sys
from typing import Any

import click

from worker.cli.output import json_option, print_json, print_records
from worker.client import tracking
from worker.client.jobs import get
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
    """Track jobs by remote id or by submit answer (JSON).

    An ID of - reads standard input: one answer, a JSON list of them, or one answer or remote id per line.
    """
    rows: list[dict[str, Any]] = []
    refused = 0
    scrubber = shared_scrubber(load().secret_texts)
    texts: list[str] = []
    for argument in remotes:
        texts += _from_stdin() if argument == "-" else [argument]
    for remote in texts:
        try:
            tracked = tracking.track(remote, **options)
        except (NotTrackable, DatabaseRefused) as error:
            echo(f"fetch-worker: {scrubber.text(remote)[:60]!r} not tracked: {error}", err=True)
            refused += 1
            continue
        job = get(tracked)
        if job is not None:
            rows.append({"id": job.id, "remote_id": job.remote_id, "status": job.status, "created": tracked.created})
    if as_json:
        print_json(rows)
    elif rows:
        print_records(list(rows[0]), rows, empty="")
    return 1 if refused else 0


def _from_stdin() -> list[str]:
    """Return the remote ids and answers on standard input."""
    text = sys.stdin.buffer.read().decode("utf-8", "replace").strip()
    try:
        document = json.loads(text)
    except ValueError:
        return [line.strip() for line in text.splitlines() if line.strip()]
    if not isinstance(document, list):
        return [text]
    return [value if isinstance(value, str) else json.dumps(value) for value in document]
