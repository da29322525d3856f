"""The command `unread`: list kept answers, and read them again."""

from collections import Counter
from dataclasses import asdict
from itertools import chain

import click

from worker.cli.output import json_option, plain, print_json, print_table
from worker.client.connection import transaction
from worker.operations.unread import Reread, apply
from worker.settings import Settings, load
from worker.store.kept_answers import answer_shapes, answers_of
from worker.system.terminal import echo

COLUMNS = ("job_id", "at", "http_status", "shape", "body")
SHOWN = 200  # characters of a body in a table
HINT = (
    'add a status word to SD_API_STATUS_WORDS, for example \'{"done": "success"}\', and read these answers again'
    " with `fetch-worker unread --apply`"
)


@click.command()
@click.option("--shape", help="List the answers of this shape, copied from the output without options.")
@click.option(
    "--apply", "apply_rules", is_flag=True, help="Read the answers again with the current rules, and act on them."
)
@json_option
def unread(shape: str | None, apply_rules: bool, as_json: bool) -> None:
    """List answers that no rule recognises, by shape.

    Also lists the last answers of jobs without an output. A shape is the status word and the names and types of the
    fields. --apply reads the kept answers of all jobs that are not completed (or of the jobs with an answer of
    --shape) again, with the current rules and SD_API_STATUS_WORDS. Jobs whose outputs are listed go to downloading,
    also if they have failed or expired. No request is sent to the API.
    """
    settings = load()
    if apply_rules:
        _apply(settings, shape, as_json)
    elif shape is None:
        _shapes(settings, as_json)
    else:
        _answers(settings, shape, as_json)


def _shapes(settings: Settings, as_json: bool) -> None:
    with transaction(settings) as connection:
        groups = answer_shapes(connection)
    if as_json:
        print_json([asdict(group) for group in groups])
        return
    columns = ("answers", "jobs", "first", "last (UTC)", "job", "shape")
    rows = [(group.count, group.jobs, group.first_at, group.last_at, group.job_id, group.shape) for group in groups]
    print_table(columns, rows, empty="no answer is kept: the rules recognise all of them")
    if rows:
        echo(HINT)


def _answers(settings: Settings, shape: str, as_json: bool) -> None:
    with transaction(settings) as connection:
        rows = answers_of(connection, shape=shape)
    if as_json:
        print_json([plain(row, COLUMNS) for row in rows])
        return
    columns = ("job", "at (UTC)", "HTTP", "body")
    table = [(row.job_id, row.at, row.http_status, shortened(row.body)) for row in rows]
    print_table(columns, table, empty="no answer of this shape is kept")


def shortened(body: str) -> str:
    """Return the beginning of a body for a table."""
    return body if len(body) <= SHOWN else f"{body[:SHOWN]}… ({len(body):,} characters)"


def _apply(settings: Settings, shape: str | None, as_json: bool) -> None:
    jobs: list[Reread] = list(chain.from_iterable(apply(settings, shape=shape)))
    if as_json:
        print_json([asdict(job) for job in jobs])
        return
    columns = ("job", "changed", "status", "read as", "answer")
    rows = [(job.id, "yes" if job.changed else "no", job.status, job.read_as, job.note) for job in jobs]
    print_table(columns, rows, empty="there are no kept answers of jobs that are not completed")
    changed = Counter(job.status for job in jobs if job.changed)
    by_state = "".join(f", {count} {status}" for status, count in sorted(changed.items()))
    echo(f"{changed.total()} of {len(jobs)} jobs changed{by_state}")
