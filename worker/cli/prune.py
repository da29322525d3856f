"""The command that removes finished jobs."""

import sys
from datetime import timedelta

import click

from worker.cli.output import json_option, print_json
from worker.core.durations import parse_duration
from worker.core.lifecycle import FINAL_STATES
from worker.operations.prune import Pruned, Retention, count_prunable
from worker.operations.prune import prune as run_prune
from worker.settings import MAX_SECONDS, Settings, load
from worker.store.engine import engine_for, translate_errors
from worker.system.terminal import echo


def _span(context: click.Context, option: click.Parameter, value: str | None) -> float | None:
    try:
        return None if value is None else min(parse_duration(value), MAX_SECONDS)
    except ValueError as wrong:
        raise click.BadParameter(str(wrong)) from None


@click.command()
@click.option("--older-than", callback=_span, metavar="AGE",
              help="How long ago a job must have ended: 30d, 12h, 90m, or seconds; default: PRUNE_AFTER.")  # fmt: skip
@click.option("--status", "states", type=click.Choice(sorted(FINAL_STATES)), multiple=True,
              help="Jobs of this state; may be given again; default: PRUNE_STATES.")  # fmt: skip
@click.option("--remove-files/--keep-files", default=None, help="Whether their files go too; default: PRUNE_FILES.")
@click.option("--limit", type=click.IntRange(min=1), help="So many jobs at most.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option("--yes", is_flag=True, help="Don't ask.")
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
    """Remove finished jobs that ended long enough ago, in small batches beside the running work.

    A job whose on_done task or webhook is still to be sent stays. A removed job that is tracked again is a new one.
    """
    settings = load()
    wanted = _wanted(settings, older_than, states, remove_files, limit)
    engine = engine_for(settings.database)
    asks = not (yes or dry_run)
    if asks and not sys.stdin.isatty():
        raise click.UsageError("nobody can be asked here: give --yes, or --dry-run to look first")
    with translate_errors(settings.database):
        if asks:
            click.confirm(
                f"{_words(count_prunable(engine, wanted), wanted, 'would be removed')}. Remove them?",
                abort=True,
                err=True,
            )
        done = count_prunable(engine, wanted) if dry_run else run_prune(engine, settings, wanted)
    if as_json:
        print_json({name: getattr(done, name) for name in ("jobs", "outputs", "files", "bytes")})
    else:
        echo(_words(done, wanted, "would be removed" if dry_run else "removed"))
    if done.kept:
        echo(f"fetch-worker: {done.kept} jobs stay, their files could not be removed: {done.reason}", err=True)
    return 1 if done.kept else 0


def _wanted(
    settings: Settings, older_than: float | None, states: tuple[str, ...], remove_files: bool | None, limit: int | None
) -> Retention:
    seconds = settings.prune_seconds if older_than is None else older_than
    if seconds is None:
        raise click.UsageError("say how old: --older-than 30d, or set PRUNE_AFTER")
    return Retention(
        older_than=timedelta(seconds=seconds),
        states=tuple(dict.fromkeys(states)) or settings.states_to_prune,
        remove_files=settings.prune_files == "remove" if remove_files is None else remove_files,
        limit=limit,
    )


def _words(done: Pruned, wanted: Retention, what: str) -> str:
    files = f", {done.files} files of {done.bytes} bytes" if wanted.remove_files else "; files are kept"
    return f"{done.jobs} jobs and {done.outputs} outputs {what}{files}"


COMMANDS: tuple[click.Command, ...] = (prune,)
