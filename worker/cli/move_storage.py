"""The command that moves stored outputs to another storage."""

import sys
from dataclasses import asdict
from typing import Any

import click

from worker.cli.output import json_option, print_json
from worker.cli.progress import show_progress
from worker.core.humanize import format_bytes, format_count
from worker.operations.move_storage import MovePlan, MoveReport, plan_move
from worker.operations.move_storage import move_storage as run_move
from worker.settings import load
from worker.store.engine import engine_for, translate_errors
from worker.system.terminal import echo

THREADS = 8


@click.command()
@click.option("--keep", "keep_old", is_flag=True, help="Do not remove the old files.")
@click.option("--threads", type=click.IntRange(1, 64), default=THREADS, show_default=True,
              help="The number of files that are copied at the same time.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Only count what would be moved.")
@click.option("--yes", is_flag=True, help="Do not ask before moving.")
@json_option
def move_storage(keep_old: bool, threads: int, dry_run: bool, yes: bool, as_json: bool) -> int:
    """Move stored outputs to the storage of STORAGE_URL.

    Each file is copied and compared with the size and SHA-256 in its row. Then its row gets the new location, and the
    old file is removed. Workers may run meanwhile. If the command is stopped, the same command does the rest. Exit code
    1 if an output could not be moved.
    """
    settings = load()
    must_ask = not (yes or dry_run)
    if must_ask and not sys.stdin.isatty():
        raise click.UsageError("there is no terminal to ask on: check with --dry-run, then add --yes")
    engine = engine_for(settings.database)
    with translate_errors(settings.database):
        plan = plan_move(engine, settings)
        if dry_run:
            _print_plan(plan, as_json)
            return 0
        if must_ask and plan.outputs:
            click.confirm(f"{_plan_line(plan)}. Move them?", abort=True, err=True)
        with show_progress("output", "moved", plan.outputs) as show:
            report = run_move(engine, settings, threads=threads, keep_old=keep_old, show_progress=show)
    _print_report(report, plan, as_json)
    return 1 if report.problems else 0


def _plan_line(plan: MovePlan) -> str:
    sources = ", ".join(f"{count:,} from {root}" for root, count in sorted(plan.sources.items()))
    where = f" ({sources})" if sources else ""
    return (
        f"{format_count(plan.outputs, 'output')} of {format_bytes(plan.bytes)} would be moved to {plan.target}{where}"
    )


def _print_plan(plan: MovePlan, as_json: bool) -> None:
    if as_json:
        sources = [{"root": root, "outputs": count} for root, count in sorted(plan.sources.items())]
        print_json({"target": plan.target, "outputs": plan.outputs, "bytes": plan.bytes, "sources": sources,
                    "old_files": plan.old_files})  # fmt: skip
        return
    echo(_plan_line(plan))
    if plan.old_files:
        echo(f"{format_count(plan.old_files, 'old file')} of an earlier run would be removed")


def _print_report(report: MoveReport, plan: MovePlan, as_json: bool) -> None:
    problems: list[dict[str, Any]] = [{"problem": name, **asdict(group)} for name, group in report.problems.items()]
    if as_json:
        print_json({"target": plan.target, "moved": report.moved, "bytes": report.bytes, "removed": report.removed,
                    "problems": problems, "stopped": report.stopped})  # fmt: skip
    else:
        moved = f"{format_count(report.moved, 'output')} of {format_bytes(report.bytes)} moved to {plan.target}"
        echo(f"{moved}; {format_count(report.removed, 'old file')} removed")
    for name, group in report.problems.items():
        undone = "removed" if name == "old file" else "moved"
        echo(f"fetch-worker: not {undone}: {group.count:,} ({name}), for example {group.example}", err=True)
    if report.stopped:
        echo("fetch-worker: stopped, because the storage refuses every file: run the same command again", err=True)
