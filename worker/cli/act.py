"""Commands that bring jobs in and see to what they stored: migrate, track, verify."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import click

from worker.cli.output import json_option, print_json, print_table
from worker.client import tracking
from worker.errors import DatabaseRefused, JobNotFound, NotTrackable
from worker.operations.verify import verify as run_verification
from worker.settings import load
from worker.store.engine import (
    encoding_message,
    engine_for,
    make_engine,
    shown_url,
    translate_errors,
    unsupported_encoding,
)
from worker.store.jobs import jobs_by_remote
from worker.store.migrate import migrate as run_migrations
from worker.system.redaction import shared_scrubber
from worker.system.terminal import echo

MAX_DIGITS = 100  # of a number on the command line; Python itself refuses to read endless ones


WRONG = ("output_id", "job_id", "condition", "after", "location")


@click.command()
def migrate() -> None:
    """Create the tables, or bring them up to this version."""
    engine = make_engine(load().database, any_encoding=True)
    try:
        before, after = run_migrations(engine)
        encoding = unsupported_encoding(engine)
    finally:
        engine.dispose()
    where = shown_url(engine.url)
    if encoding is not None:
        echo(f"fetch-worker: no process will start: {encoding_message(encoding)}", err=True)
    echo(f"{where} is at {after}" + (" already" if before == after else f", was {before or 'empty'}"))


@click.command()
@click.argument("remotes", metavar="ID...", nargs=-1, required=True)
@click.option("--account", default="default", show_default=True, help="Whose key to ask with.")
@click.option("--kind", help="Jobs of one kind take alike long; default: from the fetch address.")
@click.option("--endpoint", help="The URL or path that the order was posted to: it says where to ask.")
@click.option("--fetch-url", help="The submit answer's fetch_result.")
@click.option("--eta", type=float, help="The submit answer's eta, in seconds.")
@click.option("--submitted-at", help="When it was submitted: ISO 8601 with a zone.")
@click.option("--priority", type=int, default=0, show_default=True, help="Higher is asked first.")
@click.option("--reference", help="A name of yours to find it by.")
@click.option("--on-done", help="A Celery task to call with the job's id: task or queue/task.")
@click.option("--webhook-url", help="An address that is told of every final state.")
@click.option("--deadline", type=float, help="Seconds from submission after which it may expire.")
@json_option
def track(remotes: tuple[str, ...], as_json: bool, **options: Any) -> int:
    """Hand jobs over: remote ids, or whole submit answers as JSON."""
    rows: list[dict[str, Any]] = []
    scrubber = shared_scrubber(load().secret_texts)
    for remote in remotes:
        try:
            job_id, created = tracking.tracked([remote], **options)[0]
        except (NotTrackable, DatabaseRefused) as wrong:
            echo(f"fetch-worker: {scrubber.text(remote)[:60]!r} not tracked: {wrong}", err=True)
            continue
        job = tracking.get(job_id)
        if job is not None:
            rows.append({"id": job_id, "remote_id": job.remote_id, "status": job.status, "created": created})
    if as_json:
        print_json(rows)
    elif rows:
        print_table(list(rows[0]), [list(row.values()) for row in rows], empty="")
    return 0 if len(rows) == len(remotes) else 1


def _targets(ids: tuple[str, ...], remote: str | None, account: str | None) -> list[int]:
    """Job ids as given, or all jobs of a remote id."""
    if bool(ids) == (remote is not None):
        raise click.UsageError("give job ids, or --remote ID")
    if remote is not None:
        settings = load()
        remote_id = tracking.lookup_id(remote)
        with translate_errors(settings.database), engine_for(settings.database).connect() as connection:
            found = [row.id for row in jobs_by_remote(connection, remote_id, account)]
        if not found:
            raise JobNotFound(f"there is no job with the remote id {remote!r}")
        return found
    return job_numbers(ids)


def job_numbers(ids: tuple[str, ...]) -> list[int]:
    """Job ids as they are given. Raises JobNotFound for one that no job can have, and click's usage error."""
    if not all(word.isdecimal() for word in ids):
        raise click.UsageError("a job id is a whole number; for the API's own id use --remote")
    endless = next((word for word in ids if len(word) > MAX_DIGITS), None)
    if endless is not None:
        raise JobNotFound(f"there is no job {endless[:MAX_DIGITS]}…")
    return [int(word) for word in ids]


def target_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The arguments that name jobs."""
    command = click.option("--account", help="With --remote: of this account only.")(command)
    command = click.option("--remote", metavar="ID", help="All jobs with this remote id.")(command)
    return click.argument("ids", metavar="[JOB]...", nargs=-1)(command)


def targets(ids: tuple[str, ...], remote: str | None, account: str | None) -> list[int]:
    """The jobs that the command line names. Raises JobNotFound, and click's usage error."""
    return _targets(ids, remote, account)


@click.command()
@target_options
@click.option("--dry-run", is_flag=True, help="Only say what would be put back.")
@click.option("--force", is_flag=True, help="Put all back even where nothing at all is there.")
@json_option
def verify(
    ids: tuple[str, ...], remote: str | None, account: str | None, dry_run: bool, force: bool, as_json: bool
) -> int:
    """Read what is stored again, all of it or of some jobs; fetch once more what is gone or damaged."""
    job_ids = targets(ids, remote, account) if ids or remote is not None else None
    settings = load()
    with translate_errors(settings.database):
        found = run_verification(engine_for(settings.database), settings, job_ids=job_ids, dry_run=dry_run, force=force)
    if as_json:
        print_json({"checked": found.checked, "whole": found.whole, "wrong": [asdict(one) for one in found.wrong],
                    "orphans": found.orphans, "kept": found.kept})  # fmt: skip
    else:
        echo(f"{found.whole} of {found.checked} stored outputs are whole")
        if found.wrong:
            print_table(WRONG, [[getattr(one, name) for name in WRONG] for one in found.wrong], empty="")
        for orphan in found.orphans:
            echo(f"no output knows {orphan}")
        if found.kept:
            echo(f"{len(found.kept)} files were kept when their jobs were pruned (--json lists them)")
    return 0 if found.repaired or dry_run else 1


COMMANDS: tuple[click.Command, ...] = (migrate, track, verify)
