"""Turn the answer to an order (HTTP status, headers, body) into one typed reply. Never raises.

The meaning of an answer comes from `worker.vendor.replies`, and a job that was taken from `worker.vendor.submissions`.
This module decides what follows for an order that was posted. A wrong "not taken" is paid for twice. So an order counts
as not taken only if the API says so; everything that leaves it open is an `AnswerLost`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from worker.core.identity import checked_remote_id
from worker.core.order_reply import (
    AnswerLost,
    OrderNotSent,
    OrderPostponed,
    OrderRefusalCode,
    OrderRefused,
    OrderReply,
    OrderTaken,
    QueueFull,
)
from worker.core.plain_text import plain_text
from worker.core.reply import (
    AccountRefused,
    ApiDown,
    ApiError,
    Failed,
    Processing,
    RateLimited,
    Reply,
    UnknownId,
)
from worker.errors import NotTrackable
from worker.vendor.answer_fields import json_object
from worker.vendor.fetch_url import AllowedApi
from worker.vendor.order_endpoint import OrderTarget
from worker.vendor.phrases import RUN_OUT, names_full_queue, names_unknown_model, queue_limit_of
from worker.vendor.replies import FAILED_WORDS, WAITING, ParsedAnswer, Question, Rule, rule_for
from worker.vendor.retry_after import DEFAULT_RETRY_SECONDS, retry_after
from worker.vendor.submissions import (
    ID_FIELDS,
    NO_STATUS_WORDS,
    URL_FIELDS,
    PlannedJob,
    SubmitAnswer,
    is_finished_chat,
    planned_job,
)

POSTPONED_SECONDS = 10.0  # until an order is sent again if the answer does not say how long to wait
MAX_QUOTE = 300  # characters of a message that quotes an answer

_GATEWAY_CODES = frozenset({502, 504, *range(520, 528)})  # a gateway answered: the API may have taken the order
_OPEN_CODES = frozenset({408, 409, 425, 499})  # time-outs, and a conflict with what may be this very order
_REQUEST_CODES = frozenset({400, 413, 414, 415, 422})  # the request itself is wrong
_OF_THE_QUEUE = (None, "limited", "service", "try_again")  # meanings of messages that can be about a full queue
_TIMED_OUT = re.compile(r"\btimed? ?-?out\b|\bgateway\b", re.IGNORECASE)
_ID_IN_URL = re.compile(r"/(?:fetch|fine_tune_status|runs)/([A-Za-z0-9][A-Za-z0-9_-]{0,127})/?(?:[?#].*)?", re.ASCII)


def read_order_answer(
    http_status: int,
    headers: Mapping[str, str],
    body: bytes,
    target: OrderTarget,
    api: AllowedApi,
    *,
    now: float,
    status_words: Mapping[str, str] = NO_STATUS_WORDS,
) -> OrderReply:
    """Return what the answer says about the order that was posted to `target`. `now` is in seconds since 1970.

    `status_words` are the custom words of SD_API_STATUS_WORDS. Messages contain text of the answer, not scrubbed.
    """
    question = Question(None, now, target.order.family.media == "training", status_words)
    answer = ParsedAnswer(http_status, headers, body, json_object(body), question)
    if http_status in _GATEWAY_CODES:
        return _lost(answer)
    rule, reply = rule_for(answer)
    if rule.name == "redirect" or (rule.name == "wall" and answer.code < 500):
        return OrderNotSent(f"not an answer of the API: {_quote(answer)}"[:MAX_QUOTE])
    if answer.fields is None:
        return _without_object(answer, reply)
    is_open = answer.code >= 500 and not _has_error_status(answer)
    if answer.code >= 500 and not is_open:
        rule, reply = rule_for(_without_code(answer))
    if _may_be_taken(answer, reply):
        order_reply = _taken(answer, target, api)
        if order_reply is not None:
            return order_reply
    return _lost(answer) if is_open else _not_taken(answer, rule, reply)


def _without_object(answer: ParsedAnswer, reply: Reply) -> OrderReply:
    """Return the reply for an answer that is no JSON object. The HTTP status alone decides."""
    status = answer.http_status
    if not 400 <= status < 500 or status in _OPEN_CODES:
        return _lost(answer)
    if status == 413:
        return OrderRefused("bad_request", _quote(answer))
    if answer.is_page or status in (403, 404, 405):
        return OrderNotSent(_quote(answer))
    if isinstance(reply, (RateLimited, AccountRefused)):
        return reply
    is_cut_json = answer.start.startswith(("{", "["))
    if status in _REQUEST_CODES and not is_cut_json:
        return OrderRefused("bad_request", _quote(answer))
    return _lost(answer)


def _has_error_status(answer: ParsedAnswer) -> bool:
    """Return whether the answer has a status in words that says `error` or `failed`."""
    status = (answer.fields or {}).get("status")
    in_words = isinstance(status, str) and not status.strip().isdecimal()
    return in_words and (answer.word == "error" or answer.word in FAILED_WORDS)


def _without_code(answer: ParsedAnswer) -> ParsedAnswer:
    """Return the answer with HTTP 200. With an error status of the API, the body says more than the code."""
    return ParsedAnswer(200, answer.headers, answer.body, answer.fields, answer.question)


def _may_be_taken(answer: ParsedAnswer, reply: Reply) -> bool:
    """Return whether the order was taken, if the answer has an id or outputs."""
    if answer.word in WAITING or answer.word == "success":
        return True
    if answer.word in FAILED_WORDS:  # with an id, the order exists, and its job may recover: the polls decide
        return isinstance(reply, Failed) and reply.may_recover
    if answer.is_error:
        return isinstance(reply, Processing)
    return answer.code < 400


def _taken(answer: ParsedAnswer, target: OrderTarget, api: AllowedApi) -> OrderReply | None:
    """Return the job that the API made of the order, or None if the answer has neither an id nor outputs."""
    fields = answer.fields or {}
    if is_finished_chat(fields):
        return OrderRefused("refused", "the API answered with a finished chat, not with a job: call it directly")
    if answer.word in FAILED_WORDS:
        fields = {**fields, "status": "processing"}
    for readable, warning in _readings(fields):
        try:
            planned = planned_job(
                SubmitAnswer(readable), api, endpoint=target.url, status_words=answer.question.status_words
            )
        except NotTrackable:
            continue
        return _order_taken(planned, warning)
    return None


def _order_taken(planned: PlannedJob, warning: str | None) -> OrderTaken:
    submission = planned.submission
    return OrderTaken(
        remote_id=submission.remote_id,
        address=planned.address,
        kind=planned.kind,
        eta=submission.eta,
        outputs=submission.outputs,
        left_out=submission.left_out,
        promised=submission.promised,
        default_address=planned.by_default,
        warning=warning or planned.warning,
    )


def _readings(fields: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str | None]]:
    """Yield the answer, and then the answer without the fields that can make a taken order unreadable.

    Each comes with a warning about what was left out. First the ids that are no ids are left out, then the fetch URLs,
    but not the id in them.
    """
    yield fields, None
    valid_ids = _with_valid_ids(fields)
    if valid_ids != fields:
        yield valid_ids, "the answer has an id that can't be a remote id, which is not used"
    urls = {name: fields[name] for name in URL_FIELDS if fields.get(name)}
    if urls:
        text = plain_text(str(next(iter(urls.values())))[:120])
        warning = f"the fetch_result {text!r} is refused; the job is fetched at the address of its endpoint"
        without_urls = {name: value for name, value in valid_ids.items() if name not in urls}
        yield without_urls, warning
        for url in urls.values():
            match = _ID_IN_URL.search(url.strip()) if isinstance(url, str) else None
            if match is not None:
                yield {**without_urls, "id": match[1]}, warning


def _with_valid_ids(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields without ids that are not valid."""
    valid = {name: value for name, value in fields.items() if name not in (*ID_FIELDS, "chat_id") or _is_id(value)}
    for name, key in (("meta", "chat_id"), ("execution", "id")):
        inner = valid.get(name)
        if isinstance(inner, dict) and key in inner and not _is_id(inner[key]):
            valid[name] = {other: value for other, value in inner.items() if other != key}
    return valid


def _is_id(value: object) -> bool:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    try:
        checked_remote_id(value)
    except NotTrackable:
        return False
    return True


def _not_taken(answer: ParsedAnswer, rule: Rule, reply: Reply) -> OrderReply:
    """Return the reply for an answer without a job: a refusal, if the API says so."""
    message = answer.message_or_status()
    if isinstance(reply, AccountRefused):
        # "Invalid API Request" is about this request. The other reasons are about the account.
        return OrderRefused("bad_request", message) if reply.reason == "request" else reply
    if isinstance(reply, Failed) and answer.meaning in RUN_OUT:
        return AccountRefused("credits" if answer.meaning == "credits" else "plan", message)
    if isinstance(reply, ApiDown) and reply.no_such_path:
        return OrderRefused("bad_request", f"the API has no such endpoint: {message}")
    if isinstance(reply, (RateLimited, ApiDown, ApiError, Failed)) and _is_full_queue(answer):
        limit = next((limit for limit in map(queue_limit_of, answer.texts) if limit is not None), None)
        return QueueFull(message, _seconds(answer), limit)
    if isinstance(reply, RateLimited):
        return reply
    if (isinstance(reply, ApiDown) and reply.answered) or (isinstance(reply, Failed) and reply.may_recover):
        return _postponed(answer, message)
    if isinstance(reply, (ApiError, Failed, UnknownId)):
        is_vague = answer.code >= 500 and answer.meaning is None
        return _postponed(answer, message) if is_vague else OrderRefused(_refusal_code(answer), reply.message)
    is_client_error = 400 <= answer.http_status < 500 and answer.http_status not in _OPEN_CODES
    if rule.name == "contradiction" and answer.word != "success" and is_client_error:
        return OrderRefused(_refusal_code(answer), _quote(answer))
    return _lost(answer)


def _is_full_queue(answer: ParsedAnswer) -> bool:
    return answer.meaning in _OF_THE_QUEUE and any(map(names_full_queue, answer.texts))


def _postponed(answer: ParsedAnswer, message: str) -> OrderReply:
    """Return the reply for a temporary error. It is an AnswerLost if the API may have begun with the order."""
    is_refusal = answer.word != "" or answer.code >= 400
    if not is_refusal or answer.meaning == "waiting" or any(map(_TIMED_OUT.search, answer.texts)):
        return _lost(answer)
    return OrderPostponed(message, _seconds(answer, POSTPONED_SECONDS))


def _seconds(answer: ParsedAnswer, default: float = DEFAULT_RETRY_SECONDS) -> float:
    return retry_after(answer.headers, answer.fields or {}, answer.message, answer.question.now, default)


def _refusal_code(answer: ParsedAnswer) -> OrderRefusalCode:
    if answer.meaning == "moderated":
        return "moderated"
    if answer.meaning in ("order", "unknown_id", None) and names_unknown_model(answer.message):
        return "unknown_model"
    if answer.meaning == "order" or answer.http_status in _REQUEST_CODES:
        return "bad_request"
    return "refused"


def _lost(answer: ParsedAnswer) -> AnswerLost:
    return AnswerLost(_quote(answer))


def _quote(answer: ParsedAnswer) -> str:
    """Return the HTTP status and the start of the body, at most MAX_QUOTE characters together."""
    start = " ".join(plain_text(answer.start).split())
    return f"HTTP {answer.http_status}: {start or 'an empty answer'}"[:MAX_QUOTE]
