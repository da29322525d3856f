"""Read-only commands: show, status, doctor."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import click
from sqlalchemy import Connection

from worker.cli.act import target_options, targets
from worker.cli.output import (
    EVENT_COLUMNS,
    JOB_COLUMNS,
    OUTPUT_COLUMNS,
    json_option,
    moment,
    plain,
    print_fields,
    print_json,
    print_table,
)
from worker.cli.unread import shortened
from worker.coordination.rate_limiter import RateLimiter
from worker.core.lifecycle import STORAGE_WAIT
from worker.operations.explain import JobContext, read_context, read_explanation
from worker.operations.health import Node, check_liveness, run_checks
from worker.operations.overview import KindState, Overview, overview, ready_estimate, why
from worker.settings import Settings, load
from worker.store.engine import engine_for, translate_errors
from worker.store.events import events_of
from worker.store.jobs import job_row, outputs_of
from worker.store.kept_answers import answers_of
from worker.store.late_looks import look_of
from worker.system.terminal import echo

NODES_SECONDS = 1.5
QUEUES = {
    "fetch-worker": "tracking and sweeps: start a `worker` process",
    "fetch-worker.polls": "polls: start a `worker` process",
    "fetch-worker.downloads": "downloads: start a `downloads` process",
}
EVENT_FIELDS = ("event_id", "type", "status", "attempts", "due_at", "http_status", "error_message")
KEPT_COLUMNS = ("at", "http_status", "shape", "body")
FINDING_COLUMNS = ("step", "state", "detail")
OUTPUT_FIELDS = ("id", "position", "status", "media_type", "size_bytes", "attempts", "location", "error_code")


@click.command()
@target_options
@json_option
def show(ids: tuple[str, ...], remote: str | None, account: str | None, as_json: bool) -> int:
    """Show jobs with their outputs, the reason for their state, and what to do."""
    job_ids = targets(ids, remote, account)
    settings = load()
    limiter = RateLimiter(settings.redis)
    documents: list[dict[str, Any]] = []
    for job_id in job_ids:
        with translate_errors(settings.database), engine_for(settings.database).connect() as connection:
            document_and_context = _document(connection, job_id, settings)
        if document_and_context is None:
            echo(f"fetch-worker: there is no job {job_id}", err=True)
        else:
            documents.append(_with_findings(*document_and_context, limiter))
    if as_json and documents:
        print_json(documents[0] if len(job_ids) == 1 else documents)
    elif not as_json:
        for document in documents:
            outputs = document.pop("outputs")
            webhooks = document.pop("webhooks")
            kept_answers = document.pop("unread")
            document.pop("believed")  # the findings contain it
            findings = document.pop("chain")
            advice = document.pop("advice")
            if document["on_done"] is None:
                del document["on_done_attempts"]
            print_fields(document)
            print_table(
                FINDING_COLUMNS, [[finding[name] for name in FINDING_COLUMNS] for finding in findings], empty=""
            )
            if webhooks:
                print_table(EVENT_FIELDS, [[event[name] for name in EVENT_FIELDS] for event in webhooks], empty="")
            if kept_answers:
                rows = [(answer["at"], answer["http_status"], shortened(answer["body"])) for answer in kept_answers]
                print_table(("kept answer of", "HTTP", "body"), rows, empty="")
            print_table(
                OUTPUT_FIELDS, [[output[name] for name in OUTPUT_FIELDS] for output in outputs], empty="no outputs yet"
            )
            echo(f"what to do: {advice}")
    return 0 if len(documents) == len(job_ids) else 1


def _document(connection: Connection, job_id: int, settings: Settings) -> tuple[dict[str, Any], JobContext] | None:
    job = job_row(connection, job_id)
    if job is None:
        return None
    outputs, events = outputs_of(connection, [job_id]), events_of(connection, job_id)
    is_waiting = job.status == "pending" and job.claim_token is None and job.held_at is None
    estimate = ready_estimate(connection, job)
    late_poll = look_of(connection, job_id)
    document = plain(job, JOB_COLUMNS) | {
        "on_done": job.on_done,
        "on_done_sent_at": moment(job.told_at),
        "on_done_attempts": job.on_done_attempts,
        "on_done_due_at": moment(job.on_done_due_at),
        "on_done_error": job.on_done_error,
        "outputs": [plain(output, OUTPUT_COLUMNS) for output in outputs],
        "webhooks": [plain(event, EVENT_COLUMNS) for event in events],
        "unread": [plain(answer, KEPT_COLUMNS) for answer in answers_of(connection, job_ids=[job_id])],
        "next_look_at": None if late_poll is None else moment(late_poll.due_at),
        "why": why(connection, job, outputs, settings),
        "next_poll_at": moment(job.due_at) if is_waiting else None,
        "believed": None if estimate is None else asdict(estimate),
    }
    return document, read_context(connection, job, outputs, events, settings)


def _with_findings(document: dict[str, Any], context: JobContext, limiter: RateLimiter) -> dict[str, Any]:
    explanation = read_explanation(context, limiter)
    findings = [{name: getattr(finding, name) for name in FINDING_COLUMNS} for finding in explanation.findings]
    return document | {"chain": findings, "advice": explanation.advice}


@click.command()
@json_option
def status(as_json: bool) -> None:
    """Show jobs by state, accounts with their holds, and how late the work is."""
    settings = load()
    with translate_errors(settings.database), engine_for(settings.database).connect() as connection:
        state = overview(connection, settings)
    if as_json:
        print_json(_status_document(state))
        return
    print_fields({name: count for name, count in state.jobs.items() if count} or {"jobs": "none yet"})
    rows = [
        (account.account, f"{account.rps:g}/s", account.reason or "open", account.since, account.until)
        for account in state.accounts
    ]
    print_table(("account", "rate limit", "state", "since", "until (UTC)"), rows, empty="no accounts yet")
    if state.hosts:
        hosts = [(host.host, host.reason, host.since, host.until) for host in state.hosts]
        print_table(("host", "held", "since", "until (UTC)"), hosts, empty="")
    if state.kinds:
        columns = ("account", "kind", "jobs", "half ready (s)", "90 % (s)", "found ready", "expected",
                   "delay (s)", "planned")  # fmt: skip
        print_table(columns, [_kind_row(kind) for kind in state.kinds], empty="")
    unstored = state.unstored
    if unstored.count:
        errors = "".join(f", {count} {code}" for code, count in sorted(unstored.trouble.items()))
        echo(f"outputs not stored yet: {unstored.count}, the oldest for {unstored.oldest_seconds:.0f} s{errors}")
    if unstored.storage is not None:
        echo(f"the storage does not work: {unstored.storage}; no output is lost, it is tried every {STORAGE_WAIT:g} s")
    health = "healthy" if state.healthy else "NOT healthy: due work is not done; check that a `worker` process runs"
    echo(f"oldest due work: {state.oldest_due_seconds:.1f} s; {health}")


def _status_document(state: Overview) -> dict[str, Any]:
    return {
        "jobs": dict(state.jobs),
        "accounts": [
            {
                "account": account.account,
                "hold": None
                if account.reason is None
                else {"reason": account.reason, "since": moment(account.since), "until": moment(account.until)},
                "rps": account.rps,
            }
            for account in state.accounts
        ],
        "hosts": [
            {"host": host.host, "reason": host.reason, "since": moment(host.since), "until": moment(host.until)}
            for host in state.hosts
        ],
        "oldest_due_seconds": state.oldest_due_seconds,
        "healthy": state.healthy,
        "outputs": {
            "unstored": state.unstored.count,
            "oldest_seconds": state.unstored.oldest_seconds,
            "trouble": dict(state.unstored.trouble),
            "storage": state.unstored.storage,
        },
        "kinds": [asdict(kind) for kind in state.kinds],
    }


def _kind_row(kind: KindState) -> list[str]:
    times = (_or_never(kind.median), _or_never(kind.p90))
    shares = (f"{kind.ready:.0%}", f"{kind.expected:.0%}")
    return [
        kind.account,
        kind.kind,
        f"{kind.jobs:.0f}",
        *times,
        *shares,
        f"{kind.seen_delay:.1f}",
        f"{kind.planned_delay:.1f}",
    ]


def _or_never(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.1f}"


@click.command()
@click.option("--liveness", is_flag=True, help="Only check whether due work is done; fast, for container probes.")
@json_option
def doctor(liveness: bool, as_json: bool) -> int:
    """Check everything that the worker depends on, and say what to do. Exit code 1 if a check fails."""
    settings = load()
    checks = [check_liveness(settings)] if liveness else list(run_checks(settings, _nodes, queues=QUEUES))
    if as_json:
        print_json({"checks": [asdict(check) for check in checks]})
    else:
        print_table(("check", "", "result"), [(c.name, "ok" if c.ok else "WRONG", c.message) for c in checks], empty="")
    return 0 if all(check.ok for check in checks) else 1


def _nodes() -> Mapping[str, Node]:
    from worker.app import app  # imports all of Celery; does not connect yet
    from worker.process.neighbours import ask_nodes

    return ask_nodes(app, NODES_SECONDS)


COMMANDS: tuple[click.Command, ...] = (show, status, doctor)
