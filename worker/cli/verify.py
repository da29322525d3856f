"""The command `verify`."""

from dataclasses import asdict

import click

from worker.cli.job_ids import target_options, targets
from worker.cli.output import json_option, print_json, print_records
from worker.operations.verify import verify as run_verification
from worker.settings import load
from worker.store.engine import engine_for, translate_errors
from worker.system.terminal import echo

WRONG_COLUMNS = ("output_id", "job_id", "condition", "after", "location")


@click.command()
@target_options
@click.option("--dry-run", is_flag=True, help="Only report; change nothing.")
@click.option("--force", is_flag=True, help="Continue even if all files are missing, as on a disk that is not mounted.")
@json_option
def verify(
    ids: tuple[str, ...], remote: str | None, account: str | None, dry_run: bool, force: bool, as_json: bool
) -> int:
    """Check the stored files of all jobs or of some jobs.

    Missing and damaged files are downloaded again.
    """
    job_ids = targets(ids, remote, account) if ids or remote is not None else None
    settings = load()
    with translate_errors(settings.database):
        report = run_verification(
            engine_for(settings.database), settings, job_ids=job_ids, dry_run=dry_run, force=force
        )
    wrong = [asdict(output) for output in report.wrong]
    if as_json:
        print_json({"checked": report.checked, "whole": report.whole, "wrong": wrong,
                    "orphans": report.orphans, "kept": report.kept})  # fmt: skip
    else:
        echo(f"{report.whole} of {report.checked} stored outputs are whole")
        if wrong:
            print_records(WRONG_COLUMNS, wrong, empty="")
        for orphan in report.orphans:
            echo(f"file without an output: {orphan}")
        if report.kept:
            echo(f"{len(report.kept)} files were kept when their jobs were pruned (--json lists them)")
    return 0 if report.repaired or dry_run else 1
