"""The commands `order` and `attach`."""

import json
from dataclasses import asdict
from typing import Any

import click

from worker.cli.output import json_option, print_json, print_records, print_table
from worker.client import ordering
from worker.client.attach_candidates import Candidates, attach_candidates
from worker.client.jobs import get
from worker.core.humanize import format_count
from worker.errors import NotTrackable
from worker.system.terminal import echo


@click.command()
@click.argument("endpoint")
@click.argument("file", type=click.File("rb"), default="-")
@click.option("--account", default="default", show_default=True, help="The account whose key is used.")
@click.option("--kind", help="A name for jobs of similar duration. Default: from the endpoint and the model.")
@click.option("--eta", type=float, help="The expected duration in seconds. Default: as the API estimates.")
@click.option("--priority", type=int, default=0, show_default=True, help="Orders with a higher priority go first.")
@click.option("--reference", help="Your own name for the job, to find it by.")
@click.option("--on-done", help="The Celery task to call with the job id when it is final: task or queue/task.")
@click.option("--webhook-url", help="The URL that receives a webhook for every final state.")
@click.option("--deadline", type=float, help="The seconds, from when the API took the order, until it may expire.")
@json_option
def order(endpoint: str, file: Any, as_json: bool, **options: Any) -> int:
    """Order a job that the workers send to the API.

    ENDPOINT is the path below /api/, such as v6/images/text2img. FILE has the payload, a JSON object without the key;
    without FILE, or with -, it is read from standard input.
    """
    try:
        payload = json.loads(file.read())
    except (ValueError, RecursionError):
        raise NotTrackable('the payload is not JSON: write an object such as {"prompt": "a lake"}') from None
    tracked = ordering.order(endpoint, payload, **options)
    job = get(tracked)
    rows = [] if job is None else [{"id": job.id, "status": job.status, "created": tracked.created}]
    if as_json:
        print_json(rows)
    else:
        print_records(["id", "status", "created"], rows, empty="")
    return 0


@click.command()
@click.argument("job", type=int)
@click.argument("remote_id", required=False)
@json_option
def attach(job: int, remote_id: str | None, as_json: bool) -> int:
    """Name the remote job of an uncertain order.

    From then on it is polled. REMOTE_ID is the id that the API gave to the job. Without it, the API is asked for its
    list of recent outputs. Those that no job here has yet are printed, each with the command that attaches it. None of
    them is attached.
    """
    if remote_id is None:
        return _print_candidates(attach_candidates(job), as_json)
    changed = ordering.attach(job, remote_id)
    current = get(job)
    rows = [{"id": job, "changed": changed, "status": None if current is None else current.status}]
    if as_json:
        print_json(rows)
    else:
        print_records(["id", "changed", "status"], rows, empty="")
    if not changed:
        echo(f"fetch-worker: job {job} is not uncertain", err=True)
    return 0 if changed else 1


def _print_candidates(candidates: Candidates, as_json: bool) -> int:
    job = candidates.job_id
    rows = [
        {**asdict(candidate), "command": f"fetch-worker attach {job} {candidate.remote_id}"}
        for candidate in candidates.found
    ]
    if as_json:
        print_json(rows)
        return 0
    table = [
        (row["command"], row["created_at"], row["outputs"], row["links"][0] if row["links"] else None) for row in rows
    ]
    print_table(("to attach it", "created (UTC)", "outputs", "first output"), table, empty=_none_left(candidates))
    sent = "" if candidates.sent_at is None else f" It was sent at {candidates.sent_at:%Y-%m-%d %H:%M:%S} UTC."
    if rows:
        echo(
            f"Nothing is attached yet. Look at the outputs, and run the command of the job that order {job} made.{sent}"
        )
    else:
        echo(f"A job that is not ready may be missing in the list: try again later.{sent}")
    return 0


def _none_left(candidates: Candidates) -> str:
    name = f"the API's list of recent outputs of the type {candidates.output_type}"
    if not candidates.known:
        return f"{name} is empty"
    return f"{name} has nothing new: jobs here have its {format_count(candidates.known, 'remote id')} already"
