"""What a submit answer, the response that carried it, or a bare id says about the job to be tracked."""

import hashlib
import json
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from inspect import isawaitable
from types import MappingProxyType
from typing import Any, NamedTuple

from worker.core.identity import READY, FetchAddress, checked_remote_id
from worker.core.reply import (
    AccountRefused,
    ApiDown,
    ApiError,
    Failed,
    Link,
    RateLimited,
    Reply,
    UnknownId,
)
from worker.errors import ApiRefused, NotTrackable, RefusedAddress
from worker.vendor.answer_fields import chat_id_of, eta_of, execution_of, json_object, message_of, status_of
from worker.vendor.families import CHAT, MAX_KIND, TRAINING, kind_of
from worker.vendor.fetch_url import (
    AllowedApi,
    Order,
    fetch_address,
    named_job,
    order_at,
    order_of_response,
    path_of,
    site_of,
)
from worker.vendor.links import listed_outputs, promised_urls
from worker.vendor.replies import WAITING, ParsedAnswer, Question, rule_for

NO_WORDS: Mapping[str, str] = MappingProxyType({})
_ID_FIELDS = (
    *("id", "training_id", "request_id", "requestId", "taskId", "task_id", "execution_id", "fetch_id", "job_id"),
)
_TAKEN = WAITING | {"success"}  # what such answers say can't be a refusal
_ADDRESS_FIELDS = ("fetch_result", "status_url", "fetch_url", "fetchResult")  # the first is the vendor's
_REFUSALS = (AccountRefused, ApiDown, ApiError, Failed, RateLimited, UnknownId)


@dataclass(frozen=True, slots=True)
class Submission:
    """What is known of a job when it is handed over. `outputs` is filled where it was ready at once.

    `fetch_url` is the address that the answer names for it; `own_path` the fetch path that only such answers have. Both
    are None where the answer says nothing. `named_id` is the id in that address, where the answer has another one.
    `is_lesser_url`: the address has another name than the vendor's. `is_run`: the job is a run of a workflow.
    """

    remote_id: str
    fetch_url: str | None = None
    eta: float | None = None
    model: str | None = None
    outputs: tuple[Link, ...] = ()
    left_out: int = 0
    promised: tuple[str, ...] = ()
    own_path: str | None = None
    named_id: str | None = None
    is_lesser_url: bool = False
    is_run: bool = False


class PlannedJob(NamedTuple):
    """A submission, where its job is asked about, and the kind that its family and its model stand for.

    `by_default`: nothing but SD_API_URL says where.
    """

    submission: Submission
    address: FetchAddress
    kind: str
    by_default: bool = False

    @property
    def warning(self) -> str | None:
        """What the log should say about the answer, or None."""
        if self.submission.named_id is None:
            return None
        return (
            f"the fetch_result of the answer names the job {self.submission.named_id}, its id is"
            f" {self.submission.remote_id}: the id is asked about"
        )


class SubmitAnswer(NamedTuple):
    """The JSON of a submit answer, the HTTP status it came with, and the URL it came from, if that is known."""

    fields: Mapping[str, Any]
    http_status: int = 200
    url: str | None = None


def planned_job(
    remote: object,
    api: AllowedApi,
    *,
    fetch_url: str | None = None,
    endpoint: str | None = None,
    status_words: Mapping[str, str] = NO_WORDS,
) -> PlannedJob:
    """Read what was handed to `track`, and say where its job is asked about.

    The first of these that is known decides: `fetch_url`, the answer's own `fetch_result`, `endpoint`, the URL of the
    response, the form of the answer (trainings, chats, workflows), the configured address of the API. `words` are the
    status words that the settings teach. Raises NotTrackable, ApiRefused, RefusedAddress.
    """
    order = order_at(endpoint, api) if endpoint else None
    answer = submit_answer(remote)
    if order is None and answer is not None and answer.url is not None:
        order = order_of_response(answer.url, api)
    is_training = order is not None and order.family.media == "training"
    known = submission(remote) if answer is None else _submission(answer, status_words, is_training=is_training)
    return _planned(known, order, fetch_url or None, api)


def _planned(known: Submission, order: Order | None, fetch_url: str | None, api: AllowedApi) -> PlannedJob:
    remote_id = known.remote_id
    if known.outputs and known.is_lesser_url and fetch_url is None:
        known = _without_bad_url(known, api)
    url = fetch_url or known.fetch_url
    if url is None and order is not None:
        url = order.fetch_url(remote_id)
    elif url is None and known.own_path is not None:
        url = f"{site_of(api)}{known.own_path}" + ("" if known.own_path == CHAT else f"/{remote_id}")
    if url is None and known.outputs:  # it need not be asked about, and another family may know its id
        base = f"{READY}{_digest(known.outputs)}"
        default = fetch_address(None, remote_id, api)
        return PlannedJob(known, FetchAddress(base, base, default.host), _kind(path_of(default.base), known.model))
    if url is None and known.is_run:
        raise NotTrackable(
            "the answer is of a workflow's run, and does not say of which workflow: give the endpoint that the order"
            " was posted to, as in v1/workflows/ID/run"
        )
    address = fetch_address(url, remote_id, api)
    is_video = order is not None and fetch_url is None and order.family.media == "video"
    kind = _kind(path_of(address.base), known.model, is_video=is_video)
    return PlannedJob(known, address, kind, by_default=url is None)


def _without_bad_url(known: Submission, api: AllowedApi) -> Submission:
    """Return a job that is ready without the address that can't be asked: nobody needs it."""
    try:
        fetch_address(known.fetch_url, known.remote_id, api)
    except RefusedAddress:
        return replace(known, fetch_url=None, named_id=None, is_lesser_url=False)
    return known


def _kind(fetch_path: str, model: str | None, *, is_video: bool = False) -> str:
    """Return the kind of a job: its family, with the model where the answer names one."""
    kind = kind_of(fetch_path)
    if is_video and "video" not in kind:
        kind = "video"  # its fetch path is shared with pictures
    return f"{kind[:20]}/{model}"[:MAX_KIND] if model else kind


def submission(remote: object, words: Mapping[str, str] = NO_WORDS) -> Submission:
    """Read an id (text or number), a whole submit answer (mapping, or its JSON text), or the response that carried it.

    Raises ApiRefused for an answer by which the API did not take the order, NotTrackable for one that is no job.
    """
    answer = submit_answer(remote)
    return Submission(checked_remote_id(remote)) if answer is None else _submission(answer, words)


def submit_answer(remote: object) -> SubmitAnswer | None:
    """Return the answer in what was handed over; None where that may be a bare id. Raises NotTrackable."""
    if isinstance(remote, SubmitAnswer):
        return remote
    if isinstance(remote, Mapping):
        return SubmitAnswer(remote)
    if isinstance(remote, (str, bytes, bytearray)):
        body = remote.encode("utf-8", "replace") if isinstance(remote, str) else bytes(remote)
        if not body.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
            return None
        fields = json_object(body.lstrip())
        if fields is None:
            raise NotTrackable(
                "the submit answer is no JSON object: hand over the API's answer as it came, or the id alone"
            )
        return SubmitAnswer(fields)
    return _of_response(remote) if _is_response(remote) else None


def _is_response(remote: object) -> bool:
    """Return whether something has a `json` to call, and a `url`, be it one that can't be read."""
    try:
        if not callable(getattr(remote, "json", None)):
            return False
    except Exception as error:
        raise _broken(error) from error
    try:
        return hasattr(remote, "url")
    except Exception:  # httpx raises where it has no request
        return True


def _broken(error: Exception) -> NotTrackable:
    """Return the error for a response whose own code fails, whatever it raises."""
    return NotTrackable(
        f"the response can't be read ({type(error).__name__}): hand over the API's answer as it came, or the id alone"
    )


def _of_response(response: Any) -> SubmitAnswer:
    """Return the answer in a response of requests or httpx, or of anything that has the same attributes."""
    try:
        status = getattr(response, "status_code", 200)
    except Exception as error:
        raise _broken(error) from error
    status = status if type(status) is int else 200
    fields = _body_of(response)
    if isawaitable(fields):
        if isinstance(fields, Coroutine):
            fields.close()
        raise NotTrackable("this response is read asynchronously: hand over `await response.json()`")
    if not isinstance(fields, dict):
        refused = f"the API answered HTTP {status} with no JSON object, so there is no job in it"
        raise ApiRefused(refused, message=f"HTTP {status}") if status >= 400 else NotTrackable(refused)
    try:
        url = response.url
        return SubmitAnswer(fields, status, None if url is None else str(url))
    except RuntimeError:  # of httpx: it was made without a request
        return SubmitAnswer(fields, status)
    except Exception as error:
        raise _broken(error) from error


def _body_of(response: Any) -> object:
    """Return what a response holds, or None where it can't be read, whatever it raises.

    `requests` reads no JSON after a byte order mark, so the bytes are tried, too.
    """
    with suppress(Exception):
        return response.json()
    try:
        content = response.content
    except Exception:
        return None
    return json_object(content) if isinstance(content, bytes) else None


def _submission(answer: SubmitAnswer, words: Mapping[str, str], *, is_training: bool = False) -> Submission:
    fields = answer.fields
    is_training = is_training or _is_training(fields)
    _check_is_a_job(fields)
    word = status_of(fields)
    word = words.get(word, word)
    taken = word in _TAKEN and answer.http_status < 300 and "execution" not in fields
    reply = None if taken else _read(answer, words)
    if isinstance(reply, _REFUSALS):
        raise _refusal(reply.message, fields)
    ready = listed_outputs(fields if word == "success" else {})
    field, fetch_url = _address(fields, is_ready=bool(ready.links))
    named = None if fetch_url is None else named_job(fetch_url)
    remote_id = _remote_id(fields, is_ready=bool(ready.links), is_training=is_training)
    if remote_id is None and named is not None:
        remote_id = named.remote_id
    if remote_id is None and not ready.links:
        if answer.http_status >= 400 or word == "error":
            raise _refusal(message_of(fields) or f"HTTP {answer.http_status}", fields)
        raise NotTrackable("the submit answer has no id, nor the output of a success: there is nothing to ask for")
    named_id = None
    if remote_id is not None and named is not None and named.remote_id != remote_id:
        named_id, fetch_url = named.remote_id, f"{named.base}/{remote_id}"
    return Submission(
        remote_id=f"sha256:{_digest(ready.links)}" if remote_id is None else remote_id,
        fetch_url=fetch_url,
        eta=eta_of(fields),
        model=_model(fields),
        outputs=ready.links,
        left_out=ready.left_out,
        promised=() if ready.links else promised_urls(fields),
        own_path=_own_path(fields),
        named_id=named_id,
        is_lesser_url=fetch_url is not None and field != _ADDRESS_FIELDS[0],
        is_run=_run_id(fields) is not None,
    )


def _refusal(message: str, fields: Mapping[str, Any]) -> ApiRefused:
    text = f"the API did not take the order: {message or 'it gives no reason'}"
    return ApiRefused(text, message=message, answer=dict(fields))


def _read(answer: SubmitAnswer, words: Mapping[str, str]) -> Reply:
    """Read a submit answer by the rules of all answers."""
    fields = dict(answer.fields)
    return rule_for(ParsedAnswer(answer.http_status, {}, b"", fields, Question(None, 0.0, words=words)))[1]


def _check_is_a_job(fields: Mapping[str, Any]) -> None:
    """Raise NotTrackable for answers of other calls, saying what they are."""
    of = fields.get("object")
    if isinstance(of, str) and of.startswith(("chat.completion", "text_completion", "response", "embedding", "list")):
        raise NotTrackable(
            f"this is a finished answer of a chat API ({of[:60]}): it is no job, nothing is to be fetched"
        )
    if isinstance(fields.get("choices"), list) and fields.get("status") is None:
        raise NotTrackable("this is a finished answer of a chat API: it is no job, nothing is to be fetched")
    if "jsonrpc" in fields:
        raise NotTrackable(
            "this is a JSON-RPC answer, not the answer of a submit call: hand over what is in its result"
        )


def _remote_id(fields: Mapping[str, Any], *, is_ready: bool, is_training: bool) -> str | None:
    """Return the id under the first of its names that has one.

    Raises NotTrackable for one that can't be an id. A job that `is_ready` needs none, and does without.
    """
    names = ("training_id", *_ID_FIELDS, "model_id") if is_training else _ID_FIELDS
    run = execution_of(fields) or {}
    for value in (run.get("id"), *(fields.get(name) for name in names), chat_id_of(fields)):
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not _is_none(value):
            try:
                return checked_remote_id(value)
            except NotTrackable:
                if not is_ready:
                    raise
    return None


def _is_none(value: object) -> bool:
    """Return whether a field says nothing: null, false, zero, a blank text, an empty list."""
    return not (value.strip() if isinstance(value, str) else value)


def _own_path(fields: Mapping[str, Any]) -> str | None:
    """Return the fetch path of a job whose answer has a form that no other family's has."""
    if _is_training(fields):
        return TRAINING
    if _is_none(fields.get("id")) and chat_id_of(fields):
        return CHAT
    workflow = fields.get("workflow_id") or (execution_of(fields) or {}).get("workflow_id")
    if _run_id(fields) and workflow and isinstance(workflow, (str, int)) and not isinstance(workflow, bool):
        return f"/api/v1/workflows/{workflow}/runs"
    return None


def _run_id(fields: Mapping[str, Any]) -> object:
    """Return the id of a workflow's run, or None."""
    return (execution_of(fields) or {}).get("id") or fields.get("execution_id") or None


def _is_training(fields: Mapping[str, Any]) -> bool:
    if not _is_none(fields.get("training_id")):
        return True
    return _is_none(fields.get("id")) and any(name in fields for name in ("training_status", "model_training_status"))


def _address(fields: Mapping[str, Any], *, is_ready: bool) -> tuple[str, str | None]:
    """Return the address that an answer names for its job, after the name of its field. Raises NotTrackable.

    Where the job `is_ready`, a lesser field that holds no text is passed over.
    """
    for name in _ADDRESS_FIELDS:
        value = fields.get(name)
        if _is_none(value):
            continue
        if isinstance(value, str):
            return name, value.strip()
        if not is_ready or name == _ADDRESS_FIELDS[0]:
            raise NotTrackable(f"{name} is text, not {type(value).__name__}")
    return "", None


def _model(fields: Mapping[str, Any]) -> str | None:
    meta = fields.get("meta")
    model = fields.get("model_id") or (meta.get("model_id") if isinstance(meta, dict) else None)
    if not isinstance(model, str) or not model.isprintable():  # it becomes part of the kind, which people read
        return None
    return model.strip()[:40] or None


def _digest(outputs: tuple[Link, ...]) -> str:
    return hashlib.sha256(json.dumps([link.url for link in outputs]).encode()).hexdigest()[:32]
