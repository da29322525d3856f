"""The command that removes finished jobs."""

import sys
from datetime import timedelta

import click

from worker.cli.output import json_option, print_json
from worker.configuration.setting_types import MAX_SECONDS
from worker.core.durations import parse_duration, shortest_duration
from worker.core.lifecycle import FINAL_STATES
from worker.operations.prune import Pruned, Retention, count_prunable, forget_actions
from worker.operations.prune import prune as run_prune
from worker.settings import Settings, load
from worker.store.audit import CountedAction
from worker.store.engine import engine_for, translate_errors
from worker.system.terminal import echo


def _span(context: click.Context, option: click.Parameter, value: str | None) -> float | None:
    try:
        return None if value is None else min(parse_duration(value), MAX_SECONDS)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command()
@click.option("--older-than", callback=_span, metavar="AGE",
              help="The minimum age of a finished job: 30d, 12h, 90m, or seconds. Default: PRUNE_AFTER.")  # fmt: skip
@click.option("--status", "states", type=click.Choice(sorted(FINAL_STATES)), multiple=True,
              help="Jobs in this state; can be repeated. Default: PRUNE_STATES.")  # fmt: skip
@click.option(
    "--remove-files/--keep-files", default=None, help="Whether to remove their files too. Default: PRUNE_FILES."
)
@click.option("--limit", type=click.IntRange(min=1), help="The maximum number of jobs to remove.")
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
@click.option("--yes", is_flag=True, help="Do not ask before removing.")
@json_option
def prune(
    older_than: float | None,
    states: tuple[str, ...],
    remove_files: bool | None,
    limit: int | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> int:
    """Remove finished jobs of a minimum age.

    It removes them in small batches while the workers run. A job stays until its on_done task and its webhook are
    sent. A removed job that is tracked again is a new job.
    """
    settings = load()
    retention = _retention(settings, older_than, states, remove_files, limit)
    engine = engine_for(settings.database)
    must_ask = not (yes or dry_run)
    if must_ask and not sys.stdin.isatty():
        raise click.UsageError("there is no terminal to ask on: check with --dry-run, then add --yes")
    with translate_errors(settings.database):
        if must_ask:
            click.confirm(
                f"{_summary(count_prunable(engine, retention), retention, 'would be removed')}. Remove them?",
                abort=True,
                err=True,
            )
        if dry_run:
            pruned = count_prunable(engine, retention)
        else:
            audit = CountedAction("prune", _options(retention))
            pruned = run_prune(engine, settings, retention, audit=audit)
            forget_actions(engine)
    if as_json:
        print_json({name: getattr(pruned, name) for name in ("jobs", "outputs", "files", "bytes")})
    else:
        echo(_summary(pruned, retention, "would be removed" if dry_run else "removed"))
    if pruned.kept:
        echo(f"fetch-worker: {pruned.kept} jobs stay because they could not be removed: {pruned.reason}", err=True)
    return 1 if pruned.kept else 0


def _retention(
    settings: Settings, older_than: float | None, states: tuple[str, ...], remove_files: bool | None, limit: int | None
) -> Retention:
    seconds = settings.prune_seconds if older_than is None else older_than
    if seconds is None:
        raise click.UsageError("give a minimum age with --older-than 30d, or set PRUNE_AFTER")
    return Retention(
        older_than=timedelta(seconds=seconds),
        states=tuple(dict.fromkeys(states)) or settings.states_to_prune,
        remove_files=settings.prune_files == "remove" if remove_files is None else remove_files,
        limit=limit,
    )


def _options(retention: Retention) -> str:
    """Return the options that select these jobs, for the audit trail."""
    words = ["--older-than", shortest_duration(retention.older_than.total_seconds())]
    for state in retention.states:
        words += ["--status", state]
    words += ["--remove-files"] if retention.remove_files else []
    return " ".join(words if retention.limit is None else [*words, "--limit", str(retention.limit)])


def _summary(pruned: Pruned, retention: Retention, participle: str) -> str:
    files = f", {pruned.files} files of {pruned.bytes} bytes" if retention.remove_files else "; files are kept"
    return f"{pruned.jobs} jobs and {pruned.outputs} outputs {participle}{files}"
