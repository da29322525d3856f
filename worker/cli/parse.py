"""`fetch-worker parse`: show how the worker reads an answer of the API, without a database and without a request."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from worker.cli.output import json_option, print_json
from worker.core.answer_names import ANSWER_NAMES
from worker.core.identity import READY
from worker.core.lifecycle import note_of
from worker.core.reply import Empty, Link, Processing, RateLimited, Ready, Reply
from worker.errors import ApiRefused, NotTrackable
from worker.polling.api_client import read_answer
from worker.settings import Settings, load
from worker.system.redaction import Scrubber, shared_scrubber
from worker.system.terminal import echo
from worker.vendor.answer_fields import json_object
from worker.vendor.families import is_training
from worker.vendor.fetch_url import order_at
from worker.vendor.replies import Question
from worker.vendor.submissions import PlannedJob, SubmitAnswer, planned_job

MAX_BYTES = 32 * 1024 * 1024  # the limit for answers that the worker reads
NOT_TAKEN = frozenset({"refused", "not_trackable"})

Document = dict[str, Any]


@click.command()
@click.argument("file", metavar="FILE|-")
@click.option("--submit", is_flag=True, help="The answer is from a submit call, as it is passed to `track`.")
@click.option("--endpoint", help="The URL or path that the order was posted to, such as v6/video/text2video.")
@click.option(
    "--http-status",
    type=click.IntRange(100, 599),
    default=200,
    show_default=True,
    help="The HTTP status of the answer.",
)
@click.option("--header", "headers", metavar="NAME:VALUE", multiple=True, help="A header of the answer.")
@click.option("--remote-id", help="The job of the request; without it any id in the answer is accepted.")
@json_option
def parse(
    file: str,
    submit: bool,
    endpoint: str | None,
    http_status: int,
    headers: Sequence[str],
    remote_id: str | None,
    as_json: bool,
) -> int:
    """Show how the worker reads an answer of the API. No request is sent and nothing is stored.

    FILE contains the body of the answer; - reads it from standard input. Exit code 1 if the answer of a submit call
    refuses the order or contains no job.
    """
    settings = load()
    scrubber = shared_scrubber(settings.secret_texts)
    body = _body(file)
    try:
        if submit:
            document = _submit_document(settings, scrubber, body, http_status, endpoint)
        else:
            training = endpoint is not None and is_training(f"/{order_at(endpoint, settings.api).family.fetch}")
            question = Question(remote_id, time.time(), training, settings.status_words)
            reply = read_answer(scrubber, http_status, _headers(headers), body, question).reply
            document = _fetch_document(reply)
    except NotTrackable as error:
        raise click.UsageError(scrubber.text(str(error))) from None
    if as_json:
        print_json(document)
    else:
        _print(document)
    return 1 if document["class"] in NOT_TAKEN else 0


def _body(file: str) -> bytes:
    try:
        body = sys.stdin.buffer.read(MAX_BYTES + 1) if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise click.UsageError(f"{file} can't be read: {error.strerror or error}") from None
    if len(body) > MAX_BYTES:
        raise click.UsageError(f"the answer is larger than {MAX_BYTES} bytes, the limit of the worker")
    return body


def _headers(lines: Sequence[str]) -> dict[str, str]:
    headers = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not (colon and name.strip()):
            raise click.UsageError(f"--header {line!r} must have the form NAME:VALUE")
        headers[name.strip()] = value.strip()
    return headers


def _fetch_document(reply: Reply) -> Document:
    return _document(
        ANSWER_NAMES[type(reply)].code,
        getattr(reply, "message", "") or note_of(reply),
        outputs=reply.outputs if isinstance(reply, Ready) else (),
        promised=reply.promised if isinstance(reply, Processing | Empty) else (),
        retry_after=reply.seconds if isinstance(reply, RateLimited) else None,
        eta=reply.eta if isinstance(reply, Processing) else None,
    )


def _submit_document(
    settings: Settings, scrubber: Scrubber, body: bytes, http_status: int, endpoint: str | None
) -> Document:
    fields = json_object(scrubber.body(body))
    if endpoint is not None:
        order_at(endpoint, settings.api)  # a wrong endpoint is a usage error, not an answer without a job
    try:
        if fields is None:
            raise NotTrackable("the answer is not a JSON object")
        job = planned_job(
            SubmitAnswer(fields, http_status), settings.api, endpoint=endpoint, status_words=settings.status_words
        )
    except ApiRefused as refused:
        return _document("refused", scrubber.text(refused.message))
    except NotTrackable as error:
        return _document("not_trackable", scrubber.text(str(error)))
    submission = job.submission
    return _document(
        "ready" if submission.outputs else "tracked",
        job.warning or "",
        outputs=submission.outputs,
        promised=submission.promised,
        eta=submission.eta,
        job=_job(job),
    )


def _job(job: PlannedJob) -> Document:
    pollable = not job.address.base.startswith(READY)
    return {"remote_id": job.submission.remote_id, "fetch_url": job.address.url if pollable else None, "kind": job.kind}


def _document(
    name: str, message: str, *, outputs: Sequence[Link] = (), promised: Sequence[str] = (), **fields: object
) -> Document:
    links = {
        "outputs": [link.url for link in outputs],
        "proxy_links": [proxy for link in outputs for proxy in link.proxies],
        "promised": list(promised),
    }
    return {"class": name, "message": message, **links, "retry_after": None, "eta": None, "job": None, **fields}


def _print(document: Document) -> None:
    echo(f"{document['class']}: {document['message']}" if document["message"] else str(document["class"]))
    for name, label in (("outputs", "output"), ("proxy_links", "proxy link"), ("promised", "promised")):
        for url in document[name]:
            echo(f"  {label} {url}")
    if document["retry_after"] is not None:
        echo(f"  polled again in {document['retry_after']:g} s")
    if document["eta"] is not None:
        echo(f"  expected in {document['eta']:g} s")
    if document["job"] is not None:
        job = document["job"]
        echo(f"  job {job['remote_id']} of kind {job['kind']}")
        echo(f"  polled at {job['fetch_url']}" if job["fetch_url"] else "  not polled: its endpoint is not known")
