"""Commands that only look: show, status, doctor."""

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
from worker.operations.explain import Facts, chain_with_budget, read_facts
from worker.operations.health import Node, alive, examine
from worker.operations.overview import KindState, Overview, belief, overview, why
from worker.settings import Settings, load
from worker.store.engine import engine_for, translate_errors
from worker.store.events import events_of
from worker.store.jobs import job_row, outputs_of
from worker.store.late_looks import look_of
from worker.store.unread import answers_of
from worker.system.terminal import echo

NODES_SECONDS = 1.5
QUEUES = {
    "fetch-worker": "tracking and sweeping: start a `worker` process",
    "fetch-worker.polls": "polls: start a `worker` process",
    "fetch-worker.downloads": "downloads: start a `downloads` process",
}
EVENTS = ("event_id", "type", "status", "attempts", "due_at", "http_status", "error_message")
KEPT_COLUMNS = ("at", "http_status", "shape", "body")
CHAIN = ("step", "state", "detail")
OUTPUTS = ("id", "position", "status", "media_type", "size_bytes", "attempts", "location", "error_code")


@click.command()
@target_options
@json_option
def show(ids: tuple[str, ...], remote: str | None, account: str | None, as_json: bool) -> int:
    """One job with its outputs, why it is where it is, and what to do."""
    job_ids = targets(ids, remote, account)
    settings = load()
    budget = RateLimiter(settings.redis)
    documents: list[dict[str, Any]] = []
    for job_id in job_ids:
        with translate_errors(settings.database), engine_for(settings.database).connect() as connection:
            found = _document(connection, job_id, settings)
        if found is None:
            echo(f"fetch-worker: there is no job {job_id}", err=True)
        else:
            documents.append(_with_chain(*found, budget))
    if as_json and documents:
        print_json(documents[0] if len(job_ids) == 1 else documents)
    elif not as_json:
        for document in documents:
            outputs = document.pop("outputs")
            webhooks = document.pop("webhooks")
            kept = document.pop("unread")
            document.pop("believed")  # the chain says it in words
            links = document.pop("chain")
            advice = document.pop("advice")
            if document["on_done"] is None:
                del document["on_done_attempts"]
            print_fields(document)
            print_table(CHAIN, [[link[name] for name in CHAIN] for link in links], empty="")
            if webhooks:
                print_table(EVENTS, [[event[name] for name in EVENTS] for event in webhooks], empty="")
            if kept:
                rows = [(one["at"], one["http_status"], shortened(one["body"])) for one in kept]
                print_table(("kept answer of", "HTTP", "body"), rows, empty="")
            print_table(OUTPUTS, [[output[name] for name in OUTPUTS] for output in outputs], empty="no outputs yet")
            echo(f"what to do: {advice}")
    return 0 if len(documents) == len(job_ids) else 1


def _document(connection: Connection, job_id: int, settings: Settings) -> tuple[dict[str, Any], Facts] | None:
    job = job_row(connection, job_id)
    if job is None:
        return None
    outputs, events = outputs_of(connection, [job_id]), events_of(connection, job_id)
    waits = job.status == "pending" and job.claim_token is None and job.held_at is None
    believed = belief(connection, job)
    look = look_of(connection, job_id)
    document = plain(job, JOB_COLUMNS) | {
        "on_done": job.on_done,
        "on_done_sent_at": moment(job.told_at),
        "on_done_attempts": job.on_done_attempts,
        "on_done_due_at": moment(job.on_done_due_at),
        "on_done_error": job.on_done_error,
        "outputs": [plain(output, OUTPUT_COLUMNS) for output in outputs],
        "webhooks": [plain(event, EVENT_COLUMNS) for event in events],
        "unread": [plain(answer, KEPT_COLUMNS) for answer in answers_of(connection, job_ids=[job_id])],
        "next_look_at": None if look is None else moment(look.due_at),
        "why": why(connection, job, outputs, settings),
        "next_poll_at": moment(job.due_at) if waits else None,
        "believed": None if believed is None else asdict(believed),
    }
    return document, read_facts(connection, job, outputs, events, settings)


def _with_chain(document: dict[str, Any], facts: Facts, budget: RateLimiter) -> dict[str, Any]:
    steps, advice = chain_with_budget(facts, budget)
    return document | {"chain": [{name: getattr(step, name) for name in CHAIN} for step in steps], "advice": advice}


@click.command()
@json_option
def status(as_json: bool) -> None:
    """How everything stands: jobs by state, accounts and their holds, how late the work is."""
    settings = load()
    with translate_errors(settings.database), engine_for(settings.database).connect() as connection:
        state = overview(connection, settings)
    if as_json:
        print_json(_status_document(state))
        return
    print_fields({name: count for name, count in state.jobs.items() if count} or {"jobs": "none yet"})
    rows = [(one.account, f"{one.rps:g}/s", one.reason or "open", one.since, one.until) for one in state.accounts]
    print_table(("account", "budget", "state", "since", "until (UTC)"), rows, empty="no accounts yet")
    if state.hosts:
        held = [(one.host, one.reason, one.since, one.until) for one in state.hosts]
        print_table(("host", "held", "since", "until (UTC)"), held, empty="")
    if state.kinds:
        columns = ("account", "kind", "jobs", "half ready (s)", "90 % (s)", "found ready", "expected",
                   "delay (s)", "planned")  # fmt: skip
        print_table(columns, [_kind_row(one) for one in state.kinds], empty="")
    waiting = state.unstored
    if waiting.count:
        said = "".join(f", {count} {code}" for code, count in sorted(waiting.trouble.items()))
        echo(f"outputs not stored yet: {waiting.count}, the oldest for {waiting.oldest_seconds:.0f} s{said}")
    if waiting.storage is not None:
        echo(f"the storage is in trouble: {waiting.storage}; nothing is lost, it is tried every {STORAGE_WAIT:g} s")
    health = "healthy" if state.healthy else "NOT healthy: due work is not done; is a worker running?"
    echo(f"oldest due work: {state.oldest_due_seconds:.1f} s; {health}")


def _status_document(state: Overview) -> dict[str, Any]:
    return {
        "jobs": dict(state.jobs),
        "accounts": [
            {
                "account": one.account,
                "hold": None
                if one.reason is None
                else {"reason": one.reason, "since": moment(one.since), "until": moment(one.until)},
                "rps": one.rps,
            }
            for one in state.accounts
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
        "kinds": [asdict(one) for one in state.kinds],
    }


def _kind_row(one: KindState) -> list[str]:
    times = (_or_never(one.median), _or_never(one.p90))
    shares = (f"{one.ready:.0%}", f"{one.expected:.0%}")
    return [
        one.account,
        one.kind,
        f"{one.jobs:.0f}",
        *times,
        *shares,
        f"{one.seen_delay:.1f}",
        f"{one.planned_delay:.1f}",
    ]


def _or_never(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.1f}"


@click.command()
@click.option("--liveness", is_flag=True, help="Only whether due work is being done: for containers, and quick.")
@json_option
def doctor(liveness: bool, as_json: bool) -> int:
    """Look at everything that the work depends on, and say what to do; exits with 1 if anything is wrong."""
    settings = load()
    checks = [alive(settings)] if liveness else list(examine(settings, _nodes, queues=QUEUES))
    if as_json:
        print_json({"checks": [asdict(check) for check in checks]})
    else:
        print_table(("check", "", "seen"), [(c.name, "ok" if c.ok else "WRONG", c.message) for c in checks], empty="")
    return 0 if all(check.ok for check in checks) else 1


def _nodes() -> Mapping[str, Node]:
    from worker.app import app  # connects to nothing yet, but brings all of Celery
    from worker.process.neighbours import ask_nodes

    return ask_nodes(app, NODES_SECONDS)


COMMANDS: tuple[click.Command, ...] = (show, status, doctor)
