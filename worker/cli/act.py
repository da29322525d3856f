"""Commands that create jobs and check their outputs: migrate, track, verify."""

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

MAX_DIGITS = 100  # of a job id; Python refuses to parse very long numbers
WRONG_COLUMNS = ("output_id", "job_id", "condition", "after", "location")


@click.command()
def migrate() -> None:
    """Create the tables, or migrate them to this version."""
    engine = make_engine(load().database, any_encoding=True)
    try:
        before, after = run_migrations(engine)
        encoding = unsupported_encoding(engine)
    finally:
        engine.dispose()
    url = shown_url(engine.url)
    if encoding is not None:
        echo(f"fetch-worker: no process can start: {encoding_message(encoding)}", err=True)
    echo(f"{url} is at {after}" + (" already" if before == after else f", was {before or 'empty'}"))


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
    """Track jobs, given as remote ids or as whole submit answers (JSON)."""
    rows: list[dict[str, Any]] = []
    scrubber = shared_scrubber(load().secret_texts)
    for remote in remotes:
        try:
            job_id, created = tracking.track_with_created([remote], **options)[0]
        except (NotTrackable, DatabaseRefused) as error:
            echo(f"fetch-worker: {scrubber.text(remote)[:60]!r} not tracked: {error}", err=True)
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
    """Return the given job ids, or the ids of all jobs with a remote id."""
    if bool(ids) == (remote is not None):
        raise click.UsageError("give job ids, or --remote ID")
    if remote is not None:
        settings = load()
        remote_id = tracking.lookup_id(remote)
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


def target_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the arguments that select jobs."""
    command = click.option("--account", help="With --remote: only jobs of this account.")(command)
    command = click.option("--remote", metavar="ID", help="Select all jobs with this remote id.")(command)
    return click.argument("ids", metavar="[JOB]...", nargs=-1)(command)


def targets(ids: tuple[str, ...], remote: str | None, account: str | None) -> list[int]:
    """Return the ids of the selected jobs. Raises JobNotFound, and click's usage error."""
    return _targets(ids, remote, account)


@click.command()
@target_options
@click.option("--dry-run", is_flag=True, help="Only report; change nothing.")
@click.option("--force", is_flag=True, help="Continue even if all files are missing, as on a disk that is not mounted.")
@json_option
def verify(
    ids: tuple[str, ...], remote: str | None, account: str | None, dry_run: bool, force: bool, as_json: bool
) -> int:
    """Check the stored files of all jobs or of some jobs, and download missing or damaged ones again."""
    job_ids = targets(ids, remote, account) if ids or remote is not None else None
    settings = load()
    with translate_errors(settings.database):
        report = run_verification(
            engine_for(settings.database), settings, job_ids=job_ids, dry_run=dry_run, force=force
        )
    if as_json:
        print_json({"checked": report.checked, "whole": report.whole, "wrong": [asdict(row) for row in report.wrong],
                    "orphans": report.orphans, "kept": report.kept})  # fmt: skip
    else:
        echo(f"{report.whole} of {report.checked} stored outputs are whole")
        if report.wrong:
            rows = [[getattr(output, name) for name in WRONG_COLUMNS] for output in report.wrong]
            print_table(WRONG_COLUMNS, rows, empty="")
        for orphan in report.orphans:
            echo(f"file without an output: {orphan}")
        if report.kept:
            echo(f"{len(report.kept)} files were kept when their jobs were pruned (--json lists them)")
    return 0 if report.repaired or dry_run else 1


COMMANDS: tuple[click.Command, ...] = (migrate, track, verify)
