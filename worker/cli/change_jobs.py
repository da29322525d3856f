"""Commands that change jobs, by id or by filter: cancel, retry, hold, resume."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import click

from worker.cli.filters import check_names, checked_filter, filter_options, stored_host
from worker.cli.job_ids import job_numbers, jobs_with_remote_id
from worker.cli.output import json_option, print_json, print_records, print_table
from worker.cli.progress import show_progress
from worker.client import holds
from worker.client.connection import transaction
from worker.client.job_actions import JOB_ACTIONS, Action
from worker.client.matching import ActionResult, change_matching, changeable
from worker.core.circuit_breaker import Scope
from worker.core.humanize import format_count
from worker.errors import JobNotFound
from worker.settings import Settings, load
from worker.store.breakers import all_breakers
from worker.store.engine import database_now
from worker.store.jobs import job_row
from worker.store.reports.search import JobFilter, Search, count_matching, find_jobs, prepare_search
from worker.store.schema import jobs
from worker.system.terminal import echo

SHOWN = 20  # jobs listed by a dry run
PAGE = 1_000
RULES = """
    Name the jobs by their ids, or with --remote (add --account to limit the accounts). Exit code 1 if one of them
    does not exist or did not change.

    All other options are a filter. The command changes every job that matches all of them and can be changed, some
    hundred at a time. On a terminal it asks for confirmation; elsewhere it needs --yes. Exit code 0 when it is
    done, also if no job matched. --dry-run shows how many jobs would change, and which; "changed" then means that a
    job would change.
"""
BREAKER_RULES = """
    --account alone, or --host alone, applies to the whole account or host, including its future jobs.
"""


@dataclass(frozen=True, slots=True)
class _Request:
    """The action and its options, without the selection of jobs."""

    action: Action
    dry_run: bool
    yes: bool
    as_json: bool


def _command(action: Action, first: str, more: str = "") -> click.Command:
    def run(ids: tuple[str, ...], dry_run: bool, yes: bool, as_json: bool, **options: Any) -> int:
        return _run(_Request(action, dry_run, yes, as_json), ids, options)

    run.__doc__ = f"{first}\n{more}{RULES}"
    ids_argument = click.argument("ids", metavar="[JOB]...", nargs=-1)
    dry_run_option = click.option("--dry-run", is_flag=True, help="Only show what would change.")
    yes_option = click.option("--yes", is_flag=True, help="Do not ask before changing the jobs of a filter.")
    return click.command(action)(ids_argument(filter_options(dry_run_option(yes_option(json_option(run))))))


def _run(request: _Request, ids: tuple[str, ...], options: Mapping[str, Any]) -> int:
    settings = load()
    filtered = any(options.values()) or options["late"] is not None
    if bool(ids) == filtered:
        raise click.UsageError("give job ids, or --remote ID, or a filter such as --status or --account (see --help)")
    if ids:
        return _jobs(request, job_numbers(ids), settings)
    if request.action in ("hold", "resume") and (breakers := _breakers(options)):
        return _whole(request, breakers, settings)
    with transaction(settings) as connection:
        selection = checked_filter(connection, options, settings)
        named = None
        if selection.only_remote_ids:
            named = [
                job_id
                for remote_id in selection.remote_ids
                for job_id in jobs_with_remote_id(connection, remote_id, selection.accounts)
            ]
    if named is not None:
        return _jobs(request, named, settings)
    return _filtered(request, selection, settings)


# ── jobs by name ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _jobs(request: _Request, job_ids: Iterable[int], settings: Settings) -> int:
    rows: list[ActionResult] = []
    code = 0
    for job_id in job_ids:
        try:
            rows.append(_apply(request, job_id, settings))
        except JobNotFound as error:
            echo(f"fetch-worker: {error}", err=True)
            code = 1
    if request.as_json:
        _print_stream(rows)
    elif rows:
        _print_acted(rows, request)
    return code if all(row.changed for row in rows) else 1


def _apply(request: _Request, job_id: int, settings: Settings) -> ActionResult:
    """Apply the action to a job, or only check whether it would change the job. Raises JobNotFound."""
    changed = not request.dry_run and JOB_ACTIONS[request.action].work(job_id)
    with transaction(settings) as connection:
        job = job_row(connection, job_id)
        if job is None:
            raise JobNotFound(f"there is no job {job_id}: `fetch-worker list` shows the jobs")
        if request.dry_run:
            changed = count_matching(connection, changeable(request.action, JobFilter(ids=(job_id,)))) > 0
    return ActionResult(job_id, changed, job.status)


# ── jobs by filter ────────────────────────────────────────────────────────────────────────────────────────────────────


def _filtered(request: _Request, job_filter: JobFilter, settings: Settings) -> int:
    must_ask = not request.yes and not request.dry_run
    if must_ask and not sys.stdin.isatty():
        raise click.UsageError("there is no terminal to ask on: check the jobs with --dry-run, then add --yes")
    with transaction(settings) as connection:
        matching_jobs = prepare_search(connection, changeable(request.action, job_filter))
        count = count_matching(connection, matching_jobs)
    if count == 0:
        echo(f"no matching job can be {JOB_ACTIONS[request.action].done}", err=True)
        if request.as_json:
            _print_stream(())
        return 0
    if must_ask and not click.confirm(f"{request.action} {format_count(count, 'job')}?", err=True):
        echo("nothing was changed", err=True)
        return 1
    if request.dry_run:
        _show_preview(request, matching_jobs, count, settings)
        return 0
    changes = _with_progress(change_matching(request.action, job_filter, settings), request.action, count)
    if request.as_json:
        _print_stream(changes)
    else:
        changed = sum(row.changed for row in changes)
        echo(f"{format_count(changed, 'job')} {JOB_ACTIONS[request.action].done}")
    return 0


def _show_preview(request: _Request, matching_jobs: Search, count: int, settings: Settings) -> None:
    preview = (ActionResult(row.id, True, row.status) for row in _all(matching_jobs, settings))
    if request.as_json:
        _print_stream(preview)
        return
    echo(f"{format_count(count, 'job')} would be {JOB_ACTIONS[request.action].done}")
    shown = list(islice(preview, SHOWN))
    _print_acted(shown, request)
    if count > len(shown):
        echo(f"and {count - len(shown):,} more: --json lists all of them")


def _all(matching_jobs: Search, settings: Settings) -> Iterator[Any]:
    """Yield the rows of all matching jobs, read in pages."""
    last_id: int | None = None
    while True:
        with transaction(settings) as connection:
            columns = (jobs.c.id, jobs.c.status)
            rows = find_jobs(connection, matching_jobs, limit=PAGE, after=last_id, columns=columns)
        yield from rows
        if len(rows) < PAGE:
            return
        last_id = rows[-1].id


def _with_progress(batches: Iterable[list[ActionResult]], action: Action, count: int) -> Iterator[ActionResult]:
    """Yield the changes, and show the progress."""
    changed = 0
    with show_progress("job", JOB_ACTIONS[action].done, count) as show:
        for batch in batches:
            changed += sum(row.changed for row in batch)
            show(changed)
            yield from batch


# ── accounts and hosts as a whole ─────────────────────────────────────────────────────────────────────────────────────


def _breakers(options: Mapping[str, Any]) -> list[tuple[Scope, str]]:
    """Return the accounts or hosts to hold or resume as a whole; empty if there are other options."""
    scopes: tuple[tuple[Scope, str], ...] = (("account", "accounts"), ("host", "hosts"))
    for scope, option in scopes:
        other_options = {name: value for name, value in options.items() if name != option}
        if options[option] and not any(other_options.values()) and other_options["late"] is None:
            return [(scope, name) for name in options[option]]
    return []


def _whole(request: _Request, breakers: Iterable[tuple[Scope, str]], settings: Settings) -> int:
    rows = []
    for scope, name in [(scope, _breaker_name(scope, name, settings)) for scope, name in breakers]:
        if request.dry_run:
            changed = _would_change_breaker(request.action, scope, name, settings)
        elif request.action == "hold":
            changed = holds.hold_account_or_host(scope, name)
        else:
            changed = holds.resume_account_or_host(scope, name)
        rows.append({"scope": scope, "name": name, "changed": changed})
    if request.as_json:
        print_json(rows)
    else:
        print_records(list(rows[0]), rows, empty="")
    return 0


def _breaker_name(scope: Scope, name: str, settings: Settings) -> str:
    """Return the name as it is stored in jobs. Raises a usage error for an unknown name."""
    stored_name = name if scope == "account" else stored_host(name)
    selection = JobFilter(accounts=(name,)) if scope == "account" else JobFilter(hosts=(stored_name,))
    with transaction(settings) as connection:
        check_names(connection, selection, settings)
    return stored_name


def _would_change_breaker(action: Action, scope: Scope, name: str, settings: Settings) -> bool:
    with transaction(settings) as connection:
        breaker = all_breakers(connection).get((scope, name))
        if action == "hold":
            return breaker is None or breaker.paused_at is None
        return breaker is not None and breaker.allows(database_now(connection)) == "none"


# ── printing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _print_stream(rows: Iterable[ActionResult]) -> None:
    """Print a JSON list, page by page, so that it may be of any length."""
    lines = (json.dumps(asdict(row)) for row in rows)
    separator = "[\n  "
    while page := list(islice(lines, PAGE)):
        click.echo(separator + ",\n  ".join(page), nl=False)
        separator = ",\n  "
    click.echo("[]" if separator.startswith("[") else "\n]")


def _print_acted(rows: Iterable[ActionResult], request: _Request) -> None:
    columns = ("id", "would change" if request.dry_run else "changed", "status")
    print_table(columns, [(row.id, row.changed, row.status) for row in rows], empty="")


cancel = _command("cancel", "Cancel jobs. Their unstored outputs fail; stored files stay.")
retry = _command(
    "retry",
    "Retry failed or expired jobs at once, with a new deadline. An uncertain order is sent\n"
    "    again, and may be paid twice: it must be named, by its id or with --status uncertain.",
)
hold = _command("hold", "Stop polling pending jobs until they are resumed. A held job does not expire.", BREAKER_RULES)
resume = _command(
    "resume",
    "Continue jobs at once.\n\n"
    "    Named jobs continue whatever blocks them. A filter selects held jobs, or with --output-code the jobs\n"
    "    with failing downloads. An account or host continues whatever holds it.",
    BREAKER_RULES,
)
