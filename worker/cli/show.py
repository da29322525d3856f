"""The command `show`: one job with its outputs, and the explanation of its state."""

from dataclasses import asdict, fields
from typing import Any

import click
from sqlalchemy import Connection

from worker.cli.job_ids import target_options, targets
from worker.cli.output import (
    EVENT_COLUMNS,
    JOB_COLUMNS,
    json_option,
    moment,
    plain,
    print_fields,
    print_json,
    print_records,
    print_table,
)
from worker.cli.unread import shortened
from worker.client.connection import transaction
from worker.client.jobs import Output
from worker.coordination.rate_limiter import RateLimiter
from worker.operations.explain import read_explanation, why
from worker.operations.job_context import JobContext, read_context
from worker.operations.order_findings import order_document, shown_order
from worker.settings import Settings, load
from worker.store.audit import actions_of
from worker.store.events import events_of
from worker.store.jobs import job_row, outputs_of
from worker.store.kept_answers import answers_of
from worker.system.terminal import echo

EVENT_FIELDS = ("event_id", "type", "status", "attempts", "due_at", "http_status", "error_message")
KEPT_COLUMNS = ("at", "http_status", "shape", "body")
ACTION_COLUMNS = ("at", "source", "who", "action", "filter", "jobs")
ACTION_FIELDS = ("at", "action", "source", "who")
FINDING_COLUMNS = ("step", "state", "detail")
OUTPUT_COLUMNS = tuple(field.name for field in fields(Output))
OUTPUT_FIELDS = ("id", "position", "status", "media_type", "size_bytes", "attempts", "location", "error_code")


@click.command()
@target_options
@json_option
def show(ids: tuple[str, ...], remote: str | None, account: str | None, as_json: bool) -> int:
    """Show jobs, explain their state, and say what to do."""
    job_ids = targets(ids, remote, account)
    settings = load()
    limiter = RateLimiter(settings.redis)
    documents: list[dict[str, Any]] = []
    for job_id in job_ids:
        with transaction(settings) as connection:
            document_and_context = _document(connection, job_id, settings)
        if document_and_context is None:
            echo(f"fetch-worker: there is no job {job_id}", err=True)
        else:
            documents.append(_with_findings(*document_and_context, limiter))
    if as_json and documents:
        print_json(documents[0] if len(job_ids) == 1 else documents)
    elif not as_json:
        for document in documents:
            _print(document)
    return 0 if len(documents) == len(job_ids) else 1


def _print(document: dict[str, Any]) -> None:
    parts = {name: document.pop(name) for name in ("outputs", "webhooks", "unread", "actions", "chain", "advice")}
    document.pop("believed")  # the findings contain it
    order = document.pop("order")
    if document["on_done"] is None:
        del document["on_done_attempts"]
    print_fields(document)
    if order is not None:
        print_fields(shown_order(order))
    print_records(FINDING_COLUMNS, parts["chain"], empty="")
    if parts["webhooks"]:
        print_records(EVENT_FIELDS, parts["webhooks"], empty="")
    if parts["unread"]:
        rows = [(answer["at"], answer["http_status"], shortened(answer["body"])) for answer in parts["unread"]]
        print_table(("kept answer of", "HTTP", "body"), rows, empty="")
    if parts["actions"]:
        print_records(ACTION_FIELDS, parts["actions"], empty="")
    print_records(OUTPUT_FIELDS, parts["outputs"], empty="no outputs yet")
    echo(f"what to do: {parts['advice']}")


def _document(connection: Connection, job_id: int, settings: Settings) -> tuple[dict[str, Any], JobContext] | None:
    job = job_row(connection, job_id)
    if job is None:
        return None
    outputs, events = outputs_of(connection, [job_id]), events_of(connection, job_id)
    is_waiting = job.status == "pending" and job.claim_token is None and job.held_at is None
    context = read_context(connection, job, outputs, events, settings)
    look, estimate = context.late_look, context.estimate
    document = plain(job, JOB_COLUMNS) | {
        "on_done": job.on_done,
        "on_done_sent_at": moment(job.told_at),
        "on_done_attempts": job.on_done_attempts,
        "on_done_due_at": moment(job.on_done_due_at),
        "on_done_error": job.on_done_error,
        "outputs": [plain(output, OUTPUT_COLUMNS) for output in outputs],
        "webhooks": [plain(event, EVENT_COLUMNS) for event in events],
        "unread": [plain(answer, KEPT_COLUMNS) for answer in answers_of(connection, job_ids=[job_id])],
        "actions": [plain(action, ACTION_COLUMNS) for action in actions_of(connection, job_id)],
        "next_look_at": None if look is None else moment(look.due_at),
        "why": why(context),
        "next_poll_at": moment(job.due_at) if is_waiting else None,
        "order": order_document(context),
        "believed": None if estimate is None else asdict(estimate),
    }
    return document, context


def _with_findings(document: dict[str, Any], context: JobContext, limiter: RateLimiter) -> dict[str, Any]:
    explanation = read_explanation(context, limiter)
    findings = [{name: getattr(finding, name) for name in FINDING_COLUMNS} for finding in explanation.findings]
    return document | {"chain": findings, "advice": explanation.advice}
