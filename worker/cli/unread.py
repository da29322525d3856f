"""The command that shows and reads again the answers that were kept."""

from collections import Counter
from dataclasses import asdict
from itertools import chain

import click

from worker.cli.output import json_option, moment, plain, print_json, print_table
from worker.operations.unread import Reread, apply
from worker.settings import Settings, load
from worker.store.engine import engine_for, translate_errors
from worker.store.unread import answer_shapes, answers_of
from worker.system.terminal import echo

COLUMNS = ("job_id", "at", "http_status", "shape", "body")
SHOWN = 200  # characters of a body in a table
HINT = (
    'teach a status word with SD_API_STATUS_WORDS, for example \'{"done": "success"}\', and read these answers again'
    " with `fetch-worker unread --apply`"
)


@click.command()
@click.option("--shape", help="List the answers of this shape, as the command shows it without options.")
@click.option("--apply", "again", is_flag=True, help="Read them again by the present rules, and act on them.")
@json_option
def unread(shape: str | None, again: bool, as_json: bool) -> None:
    """Answers that no rule reads, and the last ones of jobs that ended without an output, by their shape.

    A shape is the status word and the names and types of the fields. With --apply the kept answers of all jobs that are
    not completed (or of those with an answer of --shape) are read by the present rules and SD_API_STATUS_WORDS, as if
    they had just come: jobs whose outputs are listed go to downloading, ended ones too, and the API is not asked.
    """
    settings = load()
    if again:
        _apply(settings, shape, as_json)
    elif shape is None:
        _shapes(settings, as_json)
    else:
        _answers(settings, shape, as_json)


def _shapes(settings: Settings, as_json: bool) -> None:
    with translate_errors(settings.database), engine_for(settings.database).connect() as connection:
        found = answer_shapes(connection)
    if as_json:
        times = [{"first_at": moment(one.first_at), "last_at": moment(one.last_at)} for one in found]
        print_json([asdict(one) | at for one, at in zip(found, times, strict=True)])
        return
    columns = ("answers", "jobs", "first", "last (UTC)", "job", "shape")
    rows = [(one.count, one.jobs, one.first_at, one.last_at, one.job_id, one.shape) for one in found]
    print_table(columns, rows, empty="no answer is kept: the rules read all of them")
    if rows:
        echo(HINT)


def _answers(settings: Settings, shape: str, as_json: bool) -> None:
    with translate_errors(settings.database), engine_for(settings.database).connect() as connection:
        rows = answers_of(connection, shape=shape)
    if as_json:
        print_json([plain(row, COLUMNS) for row in rows])
        return
    columns = ("job", "at (UTC)", "HTTP", "body")
    found = [(row.job_id, row.at, row.http_status, shortened(row.body)) for row in rows]
    print_table(columns, found, empty="no answer of this shape is kept")


def shortened(body: str) -> str:
    """Return the beginning of a body for a table."""
    return body if len(body) <= SHOWN else f"{body[:SHOWN]}… ({len(body):,} characters)"


def _apply(settings: Settings, shape: str | None, as_json: bool) -> None:
    read: list[Reread] = list(chain.from_iterable(apply(settings, shape=shape)))
    if as_json:
        print_json([asdict(one) for one in read])
        return
    columns = ("job", "changed", "status", "read as", "answer")
    rows = [(one.id, "yes" if one.changed else "no", one.status, one.read_as, one.note) for one in read]
    print_table(columns, rows, empty="no job that is not completed has a kept answer")
    changed = Counter(one.status for one in read if one.changed)
    into = "".join(f", {count} {status}" for status, count in sorted(changed.items()))
    echo(f"{changed.total()} of {len(read)} jobs changed{into}")


COMMANDS: tuple[click.Command, ...] = (unread,)
