"""The command that copies all rows into another database."""

import sys
from dataclasses import asdict

import click
from sqlalchemy.engine import URL

from worker.cli.output import json_option, moment, print_json, print_records
from worker.cli.progress import show_progress
from worker.configuration.server_urls import database_url
from worker.core.humanize import format_count
from worker.errors import SettingsError
from worker.operations.copy_database import TARGET, CopyReport, count_rows
from worker.operations.copy_database import copy_database as run_copy
from worker.settings import load
from worker.store.engine import make_engine, shown_url
from worker.system.terminal import echo

COLUMNS = ("table", "copied", "source", "target")


def _target(context: click.Context, argument: click.Parameter, value: str) -> URL:
    text = sys.stdin.readline().strip() if value == "-" else value
    try:
        return database_url(text)
    except ValueError as error:  # its message contains no part of the URL
        raise click.BadParameter(str(error)) from None


@click.command()
@click.argument("target_url", metavar=f"{TARGET}|-", callback=_target)
@click.option("--force", is_flag=True, help="Copy even if worker processes use the databases.")
@json_option
def copy_database(target_url: URL, force: bool, as_json: bool) -> int:
    """Copy all rows of DATABASE_URL into an empty database.

    The databases may be of different kinds: PostgreSQL, SQLite, MariaDB. The tables are created in the target. With -
    the target's URL is read from standard input, so that other users of the host can't see its password. Stop the
    workers first. If the command is stopped, the same command continues. At the end the numbers of rows are compared;
    exit code 1 if they differ.
    """
    source = make_engine(load().database)
    try:
        target = make_engine(target_url)
    except SettingsError as error:
        raise SettingsError(str(error).replace("DATABASE_URL", TARGET)) from None
    try:
        with show_progress("row", "copied", count_rows(source)) as show:
            report = run_copy(source, target, force=force, show_progress=show)
    finally:
        source.dispose()
        target.dispose()
    _print_report(report, shown_url(target_url), as_json)
    return 1 if report.different else 0


def _print_report(report: CopyReport, target: str, as_json: bool) -> None:
    if as_json:
        print_json({"target": target, "tables": [asdict(table) for table in report.tables],
                    "finished_before": moment(report.finished_before)})  # fmt: skip
    elif report.finished_before is not None:
        echo(f"nothing to do: {target} has had the whole copy since {moment(report.finished_before)}")
    else:
        print_records(COLUMNS, [asdict(table) for table in report.tables], empty="")
    if report.different:
        names = ", ".join(table.table for table in report.different)
        echo(f"fetch-worker: different numbers of rows: {names}. Something wrote to the databases meanwhile: stop the"
             " workers and apps, and run the same command again", err=True)  # fmt: skip
    elif report.tables and not as_json:
        count = format_count(sum(table.target for table in report.tables), "row")
        echo(f"{count} in {target}. Set DATABASE_URL to this database, then start the workers")
