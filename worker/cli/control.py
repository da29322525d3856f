"""Commands that take jobs in hand, single ones or all that a filter finds: cancel, retry, hold, resume."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import click
from sqlalchemy import Connection

from worker.cli.act import job_numbers
from worker.cli.find import filter_options, job_filter
from worker.cli.output import json_option, print_json, print_table
from worker.client import holds, tracking
from worker.client.actions import Acted, Action, act, changeable
from worker.core.circuit_breaker import Scope
from worker.core.identity import ACCOUNT
from worker.errors import JobNotFound
from worker.settings import Settings, load
from worker.store.breakers import all_breakers
from worker.store.engine import database_now, engine_for, translate_errors
from worker.store.jobs import job_row, jobs_by_remote
from worker.store.reports.search import JobFilter, Search, count_matching, find_jobs, prepare_search
from worker.store.schema import jobs
from worker.system.terminal import echo

SHOWN = 20  # of the jobs that would be changed
PAGE = 1_000
TELL_SECONDS = 0.2, 10.0  # how often progress is told: on a terminal, and in a log
ONE: dict[Action, Callable[[int], bool]] = {
    "cancel": tracking.cancel,
    "retry": tracking.retry,
    "hold": holds.hold,
    "resume": holds.resume,
}
DONE: dict[Action, str] = {"cancel": "cancelled", "retry": "taken up again", "hold": "held", "resume": "resumed"}
NOT_FOUND = "there is no job {}: `fetch-worker list` shows those that there are"
RULES = """
    Jobs are named by their ids, or by --remote (with --account of these accounts only): exits with 1 where one of them
    is not there or did not change.

    Any other options are a filter: of all jobs for which each of them is true, those that can be changed are, some
    hundred at a time. On a terminal it asks first; elsewhere it takes --yes. Exits with 0 once all is done, also where
    no job matched. --dry-run says how many and which, and "changed" then means that it would be.
"""
GATE_RULES = """
    --account alone, or --host alone, is about the account or the host as a whole, jobs to come included.
"""


@dataclass(frozen=True, slots=True)
class _Said:
    """What the command line says besides which jobs are meant."""

    action: Action
    dry_run: bool
    yes: bool
    as_json: bool


def _command(action: Action, first: str, more: str = "") -> click.Command:
    def run(ids: tuple[str, ...], dry_run: bool, yes: bool, as_json: bool, **options: Any) -> int:
        return _run(_Said(action, dry_run, yes, as_json), ids, options)

    run.__doc__ = f"{first}\n{more}{RULES}"
    words = click.argument("ids", metavar="[JOB]...", nargs=-1)
    asks = click.option("--dry-run", is_flag=True, help="Only say what would be done.")
    sure = click.option("--yes", is_flag=True, help="Don't ask before acting on a filter.")
    return click.command(action)(words(filter_options(asks(sure(json_option(run))))))


def _run(said: _Said, ids: tuple[str, ...], options: Mapping[str, Any]) -> int:
    settings = load()
    filtered = any(options.values()) or options["late"] is not None
    if bool(ids) == filtered:
        raise click.UsageError("give job ids, or --remote ID, or a filter such as --status or --account (see --help)")
    if ids:
        return _jobs(said, job_numbers(ids), settings)
    if said.action in ("hold", "resume") and (breakers := _breakers(options)):
        return _whole(said, breakers, settings)
    with translate_errors(settings.database), engine_for(settings.database).connect() as connection:
        wanted = job_filter(options, database_now(connection))
        named = _named(connection, wanted) if wanted.only_remote_ids else None
    if named is not None:
        return _jobs(said, named, settings)
    return _filtered(said, wanted, settings)


# ── jobs by name ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _named(connection: Connection, wanted: JobFilter) -> list[int]:
    """The jobs with these remote ids."""
    found: list[int] = []
    for remote_id in wanted.remote_ids:
        rows = jobs_by_remote(connection, remote_id, None)
        mine = [row.id for row in rows if not wanted.accounts or row.account in wanted.accounts]
        if not mine:
            raise JobNotFound(f"there is no job with the remote id {remote_id!r}")
        found += mine
    return found


def _jobs(said: _Said, job_ids: Iterable[int], settings: Settings) -> int:
    one = _would if said.dry_run else _did
    rows: list[Acted] = []
    code = 0
    for job_id in job_ids:
        try:
            rows.append(one(said.action, job_id, settings))
        except JobNotFound as missing:
            echo(f"fetch-worker: {missing}", err=True)
            code = 1
    if said.as_json:
        _print_stream(rows)
    elif rows:
        _print_acted(rows, said)
    return code if all(row.changed for row in rows) else 1


def _did(action: Action, job_id: int, settings: Settings) -> Acted:
    changed = ONE[action](job_id)
    with translate_errors(settings.database), engine_for(settings.database).connect() as connection:
        job = job_row(connection, job_id)
    if job is None:
        raise JobNotFound(NOT_FOUND.format(job_id))
    return Acted(job_id, changed, job.status)


def _would(action: Action, job_id: int, settings: Settings) -> Acted:
    with translate_errors(settings.database), engine_for(settings.database).connect() as connection:
        job = job_row(connection, job_id)
        if job is None:
            raise JobNotFound(NOT_FOUND.format(job_id))
        return Acted(job_id, count_matching(connection, changeable(action, JobFilter(ids=(job_id,)))) > 0, job.status)


# ── all that a filter finds ───────────────────────────────────────────────────────────────────────────────────────────


def _filtered(said: _Said, wanted: JobFilter, settings: Settings) -> int:
    asks = not said.yes and not said.dry_run
    if asks and not sys.stdin.isatty():
        raise click.UsageError("nobody is there to be asked: look with --dry-run, then add --yes")
    with translate_errors(settings.database), engine_for(settings.database).connect() as connection:
        found = prepare_search(connection, changeable(said.action, wanted))
        count = count_matching(connection, found)
    if count == 0:
        echo(f"no job matches that could be {DONE[said.action]}", err=True)
        if said.as_json:
            _print_stream(())
        return 0
    if asks and not click.confirm(f"{said.action} {_jobs_of(count)}?", err=True):
        echo("nothing was done", err=True)
        return 1
    if said.dry_run:
        _foretell(said, found, count, settings)
        return 0
    acted = _told(act(said.action, wanted, settings), said.action, count)
    if said.as_json:
        _print_stream(acted)
    else:
        changed = sum(row.changed for row in acted)
        echo(f"{_jobs_of(changed)} {DONE[said.action]}")
    return 0


def _foretell(said: _Said, found: Search, count: int, settings: Settings) -> None:
    would = (Acted(row.id, True, row.status) for row in _all(found, settings))
    if said.as_json:
        _print_stream(would)
        return
    echo(f"{_jobs_of(count)} would be {DONE[said.action]}")
    shown = list(islice(would, SHOWN))
    _print_acted(shown, said)
    if count > len(shown):
        echo(f"and {count - len(shown):,} more: --json lists them all")


def _all(found: Search, settings: Settings) -> Iterator[Any]:
    """The rows of all jobs that are found, a page at a time."""
    after: int | None = None
    while True:
        with translate_errors(settings.database), engine_for(settings.database).connect() as connection:
            columns = (jobs.c.id, jobs.c.status)
            rows = find_jobs(connection, found, limit=PAGE, after=after, columns=columns)
        yield from rows
        if len(rows) < PAGE:
            return
        after = rows[-1].id


def _told(batches: Iterable[list[Acted]], action: Action, count: int) -> Iterator[Acted]:
    """What was acted on, telling on stderr how far it is, and how far it came where it ends early."""
    terminal = sys.stderr.isatty()
    every = TELL_SECONDS[0 if terminal else 1]
    done, tell_at = 0, time.monotonic() + every
    try:
        for batch in batches:
            done += sum(row.changed for row in batch)
            if time.monotonic() >= tell_at:
                tell_at = time.monotonic() + every
                click.echo(f"\r{done:,} of {count:,} {DONE[action]}", err=True, nl=not terminal)
            yield from batch
    except BaseException:
        click.echo(err=True)
        echo(f"{_jobs_of(done)} {DONE[action]} so far: the same again goes on", err=True)
        raise
    if terminal and done:
        click.echo("\r\033[K", err=True, nl=False)


def _jobs_of(count: int) -> str:
    return "1 job" if count == 1 else f"{count:,} jobs"


# ── accounts and hosts as a whole ─────────────────────────────────────────────────────────────────────────────────────


def _breakers(options: Mapping[str, Any]) -> list[tuple[Scope, str]]:
    """The accounts, or the hosts, that are meant as a whole; none where anything else is said."""
    scopes: tuple[tuple[Scope, str], ...] = (("account", "accounts"), ("host", "hosts"))
    for scope, option in scopes:
        others = {name: value for name, value in options.items() if name != option}
        if options[option] and not any(others.values()) and others["late"] is None:
            return [(scope, name) for name in options[option]]
    return []


def _whole(said: _Said, breakers: Iterable[tuple[Scope, str]], settings: Settings) -> int:
    rows = []
    for scope, given in breakers:
        name = _gate_name(scope, given, settings)
        if said.dry_run:
            changed = _would_gate(said.action, scope, name, settings)
        elif said.action == "hold":
            changed = holds.hold_account_or_host(scope, name)
        else:
            changed = holds.resume_account_or_host(scope, name)
        rows.append({"scope": scope, "name": name, "changed": changed})
    if said.as_json:
        print_json(rows)
    else:
        print_table(list(rows[0]), [list(row.values()) for row in rows], empty="")
    return 0


def _gate_name(scope: Scope, given: str, settings: Settings) -> str:
    """The name as jobs have it: one that none can have would hold nothing, and nobody would know."""
    if scope == "account":
        if not ACCOUNT.fullmatch(given):
            raise click.UsageError(f"{given!r} can't be an account")
        return given
    host = given.lower().removesuffix(":443")
    with translate_errors(settings.database), engine_for(settings.database).connect() as connection:
        known = {*settings.api.hosts, *(name for kind, name in all_breakers(connection) if kind == "host")}
        if host not in known and not count_matching(connection, JobFilter(hosts=(host,)), most=1):
            raise click.UsageError(f"no job is fetched from {given!r}, but from {', '.join(sorted(known))}")
    return host


def _would_gate(action: Action, scope: Scope, name: str, settings: Settings) -> bool:
    with translate_errors(settings.database), engine_for(settings.database).connect() as connection:
        breaker = all_breakers(connection).get((scope, name))
        if action == "hold":
            return breaker is None or breaker.paused_at is None
        return breaker is not None and breaker.allows(database_now(connection)) == "none"


# ── printing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _print_stream(rows: Iterable[Acted]) -> None:
    """A JSON list, however long: a page of rows is written as it comes."""
    said = (json.dumps(asdict(row)) for row in rows)
    between = "[\n  "
    while page := list(islice(said, PAGE)):
        click.echo(between + ",\n  ".join(page), nl=False)
        between = ",\n  "
    click.echo("[]" if between.startswith("[") else "\n]")


def _print_acted(rows: Iterable[Acted], said: _Said) -> None:
    columns = ("id", "would change" if said.dry_run else "changed", "status")
    print_table(columns, [(row.id, row.changed, row.status) for row in rows], empty="")


COMMANDS: tuple[click.Command, ...] = (
    _command("cancel", "Cancel jobs: their unstored outputs end, stored files stay."),
    _command("retry", "Take failed or expired jobs up again, at once and with their whole deadline."),
    _command("hold", "Keep pending jobs from being asked about until they are resumed; none expires.", GATE_RULES),
    _command(
        "resume",
        "Have jobs go on at once: named ones whatever keeps them; of a filter those that are held, or with"
        " --output-code those whose downloads are in trouble; an account or host whoever held it.",
        GATE_RULES,
    ),
)
