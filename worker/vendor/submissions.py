"""Read the job to track from a submit answer, from the HTTP response that contained it, or from a bare id."""

import hashlib
import json
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from inspect import isawaitable
from types import MappingProxyType
from typing import Any, NamedTuple

from worker.core.identity import READY, SYNTHETIC_ID, FetchAddress, checked_remote_id
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
from worker.vendor.answer_links import listed_outputs, promised_urls
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
from worker.vendor.replies import WAITING, ParsedAnswer, Question, rule_for

NO_STATUS_WORDS: Mapping[str, str] = MappingProxyType({})
ID_FIELDS = (
    *("id", "training_id", "request_id", "requestId", "taskId", "task_id", "execution_id", "fetch_id", "job_id"),
)
_ACCEPTED = WAITING | {"success"}  # an answer with one of these statuses is never a refusal
URL_FIELDS = ("fetch_result", "status_url", "fetch_url", "fetchResult")  # the vendor uses the first one
_NOT_IDS = frozenset({"none", "null", "undefined", "nan", "true", "false"})  # what programs print for a missing id
_HINTS = {
    "NoneType": ": the submit call returned nothing",
    "bytes": ": an id in bytes must be decoded",
    "bytearray": ": an id in bytes must be decoded",
    "memoryview": ": an answer in a memoryview must be converted to bytes",
    "UUID": ": write str() around it",
    "coroutine": ": write `await` before the call that returns it",
    "list": ": call track_many for several jobs",
}
_REFUSALS = (AccountRefused, ApiDown, ApiError, Failed, RateLimited, UnknownId)


@dataclass(frozen=True, slots=True)
class Submission:
    """A job at submission. `outputs` is filled if it was ready at once; `left_out` counts outputs beyond the limit.

    `fetch_url` is the fetch URL in the answer. `implied_path` is the fetch path that follows from the form of the
    answer. Both are None if the answer does not tell. `url_id` is the id in `fetch_url`, if it differs from the
    answer's id. `is_alias_url`: `fetch_url` comes from a field that the vendor does not use. `is_run`: the job is a
    workflow run.
    """

    remote_id: str
    fetch_url: str | None = None
    eta: float | None = None
    model: str | None = None
    outputs: tuple[Link, ...] = ()
    left_out: int = 0
    promised: tuple[str, ...] = ()
    implied_path: str | None = None
    url_id: str | None = None
    is_alias_url: bool = False
    is_run: bool = False


class PlannedJob(NamedTuple):
    """A submission, its fetch address, and its kind, which is made of the family and the model.

    `by_default`: the address is SD_API_URL, because nothing else was known.
    """

    submission: Submission
    address: FetchAddress
    kind: str
    by_default: bool = False

    @property
    def warning(self) -> str | None:
        """A warning about the answer for the log, or None."""
        if self.submission.url_id is None:
            return None
        return (
            f"the fetch_result of the answer has the id {self.submission.url_id}, but the answer has the id"
            f" {self.submission.remote_id}, which is used"
        )


class SubmitAnswer(NamedTuple):
    """The JSON of a submit answer, its HTTP status, and the URL that it came from, if known."""

    fields: Mapping[str, Any]
    http_status: int = 200
    url: str | None = None


def planned_job(
    remote: object,
    api: AllowedApi,
    *,
    fetch_url: str | None = None,
    endpoint: str | None = None,
    status_words: Mapping[str, str] = NO_STATUS_WORDS,
) -> PlannedJob:
    """Return the job in the argument of `track`, with its fetch address.

    The address comes from the first of these that is known: `fetch_url`, the `fetch_result` in the answer, `endpoint`,
    the URL of the response, the form of the answer (trainings, chats, workflows), SD_API_URL. `status_words` are the
    custom words of SD_API_STATUS_WORDS. Raises NotTrackable, ApiRefused or RefusedAddress.
    """
    order = order_at(endpoint, api) if endpoint else None
    answer = submit_answer(remote)
    if order is None and answer is not None and answer.url is not None:
        order = order_of_response(answer.url, api)
    is_training = order is not None and order.family.media == "training"
    submitted = submission(remote) if answer is None else _submission(answer, status_words, is_training=is_training)
    return _planned(submitted, order, fetch_url or None, api)


def _planned(submitted: Submission, order: Order | None, fetch_url: str | None, api: AllowedApi) -> PlannedJob:
    remote_id = submitted.remote_id
    if submitted.outputs and submitted.is_alias_url and fetch_url is None:
        submitted = _without_bad_url(submitted, api)
    url = fetch_url or submitted.fetch_url
    is_synthetic = SYNTHETIC_ID.fullmatch(remote_id) is not None  # such a job is ready and is never fetched
    if url is None and order is not None and not is_synthetic:
        url = order.fetch_url(remote_id)
    elif url is None and submitted.implied_path is not None:
        url = f"{site_of(api)}{submitted.implied_path}" + ("" if submitted.implied_path == CHAT else f"/{remote_id}")
    if url is None and submitted.outputs:  # it is never fetched, and its id may exist in another family, too
        base = f"{READY}{_digest(submitted.outputs)}"
        default = fetch_address(None, remote_id, api)
        path = path_of(default.base) if order is None else f"/api/{order.family.fetch}"
        kind = _kind(path, submitted.model, is_video=order is not None and order.family.media == "video")
        return PlannedJob(submitted, FetchAddress(base, base, default.host), kind)
    if url is None and submitted.is_run:
        raise NotTrackable(
            "the answer is about a workflow run, but does not name the workflow: pass the endpoint to which the order"
            " was posted, for example v1/workflows/ID/run"
        )
    address = fetch_address(url, remote_id, api)
    is_video = order is not None and fetch_url is None and order.family.media == "video"
    kind = _kind(path_of(address.base), submitted.model, is_video=is_video)
    return PlannedJob(submitted, address, kind, by_default=url is None)


def _without_bad_url(submitted: Submission, api: AllowedApi) -> Submission:
    """Remove a fetch URL that is refused from a job that is ready. Such a job needs no fetch URL."""
    try:
        fetch_address(submitted.fetch_url, submitted.remote_id, api)
    except RefusedAddress:
        return replace(submitted, fetch_url=None, url_id=None, is_alias_url=False)
    return submitted


def _kind(fetch_path: str, model: str | None, *, is_video: bool = False) -> str:
    """Return the kind of a job: its family, and the model if the answer contains one."""
    kind = kind_of(fetch_path)
    if is_video and "video" not in kind:
        kind = "video"  # pictures have the same fetch path
    return f"{kind[:20]}/{model}"[:MAX_KIND] if model else kind


def kind_of_order(order: Order, payload: Mapping[str, Any]) -> str:
    """Return the kind of the job that an order creates: its family, and the model if the payload names one."""
    path = f"/api/{order.family.fetch}"
    return _kind(path, _model(payload), is_video=order.family.media == "video")


def submission(remote: object, status_words: Mapping[str, str] = NO_STATUS_WORDS) -> Submission:
    """Read an id (text or number), a submit answer (mapping or JSON text), or the HTTP response that contained it.

    Raises ApiRefused if the API refused the order, and NotTrackable if the answer does not describe a job.
    """
    answer = submit_answer(remote)
    return Submission(_bare_id(remote)) if answer is None else _submission(answer, status_words)


def named_id(body: bytes) -> str | None:
    """Return the id of the job in the body of a call of the API's webhook, or None. `body` may be any bytes."""
    fields = json_object(body)
    return None if fields is None else id_of(fields)


def id_of(fields: Mapping[str, Any]) -> str | None:
    """Return the id of a job from the first field that has a valid one, or None. Never raises."""
    return _remote_id(fields, is_ready=True, is_training=_is_training(fields))


def _bare_id(remote: object) -> str:
    """Return an id that was passed alone. Raises NotTrackable; the message says what can be passed."""
    if isinstance(remote, bool) or not isinstance(remote, (str, int)):
        kind = type(remote).__name__
        name = "None" if remote is None else kind
        raise NotTrackable(
            "pass the response of the submit call, its JSON, or the remote id (text or a whole number), not"
            f" {name}{_HINTS.get(kind, '')}"
        )
    if isinstance(remote, str) and not remote.strip():
        raise NotTrackable("the remote id is empty: pass the response of the submit call, its JSON, or the remote id")
    return _api_id(remote)


def _api_id(value: object) -> str:
    """Return an id as text. Raises NotTrackable if it is a word for a missing id."""
    remote_id = checked_remote_id(value)
    if remote_id.lower() in _NOT_IDS:
        raise NotTrackable(f"{remote_id!r} is not an id of the API: the submit call returned no id, or it was lost")
    return remote_id


def submit_answer(remote: object) -> SubmitAnswer | None:
    """Return the submit answer in `remote`, or None if `remote` may be a bare id. Raises NotTrackable."""
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
                "the submit answer is not a JSON object: pass the API's answer unchanged, or only the id"
            )
        return SubmitAnswer(fields)
    return _of_response(remote) if _is_response(remote) else None


def _is_response(remote: object) -> bool:
    """Return whether an object has a `json` method and a `url`. Reading the `url` may fail."""
    try:
        if not callable(getattr(remote, "json", None)):
            return False
    except Exception as error:
        raise _broken(error) from error
    try:
        return hasattr(remote, "url")
    except Exception:  # httpx raises if the response has no request
        return True


def _broken(error: Exception) -> NotTrackable:
    """Return the error for a response object whose own code raised `error`."""
    return NotTrackable(
        f"the response can't be read ({type(error).__name__}): pass the API's answer unchanged, or only the id"
    )


def _of_response(response: Any) -> SubmitAnswer:
    """Return the answer in a response of requests, httpx, or another library with the same attributes."""
    try:
        status = getattr(response, "status_code", 200)
    except Exception as error:
        raise _broken(error) from error
    status = status if type(status) is int else 200
    fields = _body_of(response)
    if isawaitable(fields):
        if isinstance(fields, Coroutine):
            fields.close()
        raise NotTrackable("this response is asynchronous: pass `await response.json()`")
    if not isinstance(fields, dict):
        refused = f"the API answered HTTP {status} without a JSON object, so there is no job to track"
        raise ApiRefused(refused, message=f"HTTP {status}") if status >= 400 else NotTrackable(refused)
    try:
        url = response.url
        return SubmitAnswer(fields, status, None if url is None else str(url))
    except RuntimeError:  # httpx raises this if the response has no request
        return SubmitAnswer(fields, status)
    except Exception as error:
        raise _broken(error) from error


def _body_of(response: Any) -> object:
    """Return the JSON data of a response, or None if reading it fails.

    `requests` does not accept JSON after a byte order mark, so the bytes are tried as well.
    """
    with suppress(Exception):
        return response.json()
    try:
        content = response.content
    except Exception:
        return None
    return json_object(content) if isinstance(content, bytes) else None


def _submission(answer: SubmitAnswer, status_words: Mapping[str, str], *, is_training: bool = False) -> Submission:
    fields = answer.fields
    is_training = is_training or _is_training(fields)
    _check_is_a_job(fields)
    word = status_of(fields)
    word = status_words.get(word, word)
    is_accepted = word in _ACCEPTED and answer.http_status < 300 and "execution" not in fields
    reply = None if is_accepted else _read(answer, status_words)
    if isinstance(reply, _REFUSALS):
        raise _refusal(reply.message, fields)
    ready = listed_outputs(fields if word == "success" else {})
    field, fetch_url = _fetch_url(fields, is_ready=bool(ready.links))
    named = None if fetch_url is None else named_job(fetch_url)
    remote_id = _remote_id(fields, is_ready=bool(ready.links), is_training=is_training)
    if remote_id is None and named is not None:
        remote_id = _api_id(named.remote_id)
    if remote_id is None and not ready.links:
        if answer.http_status >= 400 or word == "error":
            raise _refusal(message_of(fields) or f"HTTP {answer.http_status}", fields)
        raise NotTrackable("the submit answer has neither an id nor outputs: there is no job to track")
    url_id = None
    if remote_id is not None and named is not None and named.remote_id != remote_id:
        url_id, fetch_url = named.remote_id, f"{named.base}/{remote_id}"
    return Submission(
        remote_id=f"sha256:{_digest(ready.links)}" if remote_id is None else remote_id,
        fetch_url=fetch_url,
        eta=eta_of(fields),
        model=_model(fields),
        outputs=ready.links,
        left_out=ready.left_out,
        promised=() if ready.links else promised_urls(fields),
        implied_path=_implied_path(fields),
        url_id=url_id,
        is_alias_url=fetch_url is not None and field != URL_FIELDS[0],
        is_run=_run_id(fields) is not None,
    )


def _refusal(message: str, fields: Mapping[str, Any]) -> ApiRefused:
    text = f"the API refused the order: {message or 'it gives no reason'}"
    return ApiRefused(text, message=message, answer=dict(fields))


def _read(answer: SubmitAnswer, status_words: Mapping[str, str]) -> Reply:
    """Read a submit answer with the same rules as all other answers."""
    fields = dict(answer.fields)
    return rule_for(ParsedAnswer(answer.http_status, {}, b"", fields, Question(None, 0.0, status_words=status_words)))[
        1
    ]


def _check_is_a_job(fields: Mapping[str, Any]) -> None:
    """Raise NotTrackable for answers of other calls. The message says what they are."""
    if is_finished_chat(fields):
        of = fields.get("object")
        name = f" ({of[:60]})" if isinstance(of, str) else ""
        raise NotTrackable(f"this is a finished answer of a chat API{name}, not a job: there is nothing to fetch")
    if "jsonrpc" in fields:
        raise NotTrackable("this is a JSON-RPC answer, not the answer of a submit call: pass the content of its result")


def is_finished_chat(fields: Mapping[str, Any]) -> bool:
    """Return whether this is the answer of a chat API that answers at once, so that there is no job to fetch."""
    of = fields.get("object")
    if isinstance(of, str) and of.startswith(("chat.completion", "text_completion", "response", "embedding", "list")):
        return True
    return isinstance(fields.get("choices"), list) and fields.get("status") is None


def _remote_id(fields: Mapping[str, Any], *, is_ready: bool, is_training: bool) -> str | None:
    """Return the id from the first field that has one, or None.

    Raises NotTrackable if the value is not a valid id. If the job `is_ready`, an invalid id is skipped instead.
    """
    names = ("training_id", *ID_FIELDS, "model_id") if is_training else ID_FIELDS
    run = execution_of(fields) or {}
    for value in (run.get("id"), *(fields.get(name) for name in names), chat_id_of(fields)):
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not _is_none(value):
            try:
                return _api_id(value)
            except NotTrackable:
                if not is_ready:
                    raise
    return None


def _is_none(value: object) -> bool:
    """Return whether a field has no value: null, false, zero, a blank text or an empty list."""
    return not (value.strip() if isinstance(value, str) else value)


def _implied_path(fields: Mapping[str, Any]) -> str | None:
    """Return the fetch path that follows from the form of the answer, or None if the form is not specific."""
    if _is_training(fields):
        return TRAINING
    if _is_none(fields.get("id")) and chat_id_of(fields):
        return CHAT
    workflow = fields.get("workflow_id") or (execution_of(fields) or {}).get("workflow_id")
    if _run_id(fields) and workflow and isinstance(workflow, (str, int)) and not isinstance(workflow, bool):
        return f"/api/v1/workflows/{workflow}/runs"
    return None


def _run_id(fields: Mapping[str, Any]) -> object:
    """Return the id of a workflow run, or None."""
    return (execution_of(fields) or {}).get("id") or fields.get("execution_id") or None


def _is_training(fields: Mapping[str, Any]) -> bool:
    if not _is_none(fields.get("training_id")):
        return True
    return _is_none(fields.get("id")) and any(name in fields for name in ("training_status", "model_training_status"))


def _fetch_url(fields: Mapping[str, Any], *, is_ready: bool) -> tuple[str, str | None]:
    """Return the field name and the value of the fetch URL in an answer. Raises NotTrackable if it is not text.

    If the job `is_ready`, a field that is not the vendor's and not text is skipped instead.
    """
    for name in URL_FIELDS:
        value = fields.get(name)
        if _is_none(value):
            continue
        if isinstance(value, str):
            return name, value.strip()
        if not is_ready or name == URL_FIELDS[0]:
            raise NotTrackable(f"{name} must be text, not {type(value).__name__}")
    return "", None


def _model(fields: Mapping[str, Any]) -> str | None:
    meta = fields.get("meta")
    model = fields.get("model_id") or (meta.get("model_id") if isinstance(meta, dict) else None)
    if not isinstance(model, str) or not model.isprintable():  # the kind, which is displayed, contains it
        return None
    return model.strip()[:40] or None


def _digest(outputs: tuple[Link, ...]) -> str:
    return hashlib.sha256(json.dumps([link.url for link in outputs]).encode()).hexdigest()[:32]
