"""Turn an answer (HTTP status, headers, body) into one typed reply. Never raises.

`RULES` is evaluated from the top, and the first rule that matches decides. Each rule has the reason for its position
and an example answer that would be read differently without the rule. The meanings of error messages are in
`worker.vendor.phrases`.
"""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from worker.core.json_size import MAX_VALUES, too_many_values
from worker.core.plain_text import plain_text
from worker.core.reply import (
    AccountRefused,
    AnotherJob,
    ApiDown,
    ApiError,
    Empty,
    Failed,
    Processing,
    RateLimited,
    Ready,
    RefusalReason,
    Reply,
    UnknownId,
    Unread,
)
from worker.vendor.answer_fields import (
    MAX_MESSAGE,
    MESSAGE_FIELDS,
    chat_id_of,
    eta_of,
    execution_of,
    http_status_of,
    json_object,
    message_of,
    other_error_texts,
    status_of,
    training_state,
    training_states,
)
from worker.vendor.answer_links import listed_outputs, promised_urls
from worker.vendor.phrases import ACCOUNT, OF_THE_JOB, PASSING, RECOVERS, RUN_OUT, Meaning, meaning_of
from worker.vendor.retry_after import retry_after

WAITING = frozenset(
    {
        *("processing", "queued", "queue", "in_queue", "in-queue", "in queue", "pending", "waiting", "scheduled"),
        *("in_progress", "in-progress", "in progress", "starting", "started", "running", "initializing", "generating"),
        *("submitted", "accepted"),
    }
)
FAILED_WORDS = frozenset({"failed", "failure"})

_OF_A_JOB = ("id", "request_id", "output", "links", "future_links", "fetch_result", "eta", "meta", "execution")
_REDIRECT = "the API redirects. Redirects are not followed, to protect the API key. Check SD_API_URL"
NO_SUCH_PATH = "the API has no such path. Check the path in SD_API_URL, or the fetch_url or endpoint of the job"


class Question(NamedTuple):
    """The request. `remote_id` is None if an order was posted. `now` is in seconds since 1970.

    `status_words` maps the custom words of SD_API_STATUS_WORDS to statuses of the API.
    """

    remote_id: str | None
    now: float
    training: bool = False
    status_words: Mapping[str, str] = MappingProxyType({})


class ParsedAnswer:
    """One answer, with the values that the rules use.

    `code` is the higher of the HTTP status and the code in the body. `is_error`: the status word is `error`, or there
    is no status word, and the code is an error or the answer is only a message.
    """

    __slots__ = (
        "_meaning",
        "_message",
        "body",
        "code",
        "fields",
        "headers",
        "http_status",
        "is_error",
        "question",
        "run",
        "word",
    )

    def __init__(
        self,
        http_status: int,
        headers: Mapping[str, str],
        body: bytes,
        fields: dict[str, Any] | None,
        question: Question,
    ) -> None:
        content = fields or {}
        self.http_status, self.headers, self.body, self.question = http_status, headers, body, question
        self.fields = fields
        self.code = max(http_status, http_status_of(content) or 0)
        self.run = execution_of(content)
        self.word = _word(content, self.run, question.status_words)
        self._message: str | None = None
        self._meaning: Meaning | Literal[""] | None = ""
        self.is_error = (
            self.word == "error" if self.word else fields is not None and (self.code >= 400 or self.is_message)
        )

    @property
    def message(self) -> str:
        """The message, or an empty string. It is read on first use, because most answers don't need it."""
        if self._message is None:
            self._message = message_of(self.fields or {}) or (message_of(self.run) if self.run else "")
        return self._message

    @property
    def is_message(self) -> bool:
        """Whether the answer has a message and no fields of a job."""
        fields = self.fields or {}
        return any(map(fields.get, MESSAGE_FIELDS)) and not any(map(fields.get, _OF_A_JOB))

    @property
    def meaning(self) -> Meaning | None:
        """The meaning of the error message, or of the other error texts."""
        if self._meaning == "":
            self._meaning = next((meaning for meaning in map(meaning_of, self.texts) if meaning is not None), None)
        return self._meaning or None

    @property
    def texts(self) -> tuple[str, ...]:
        """The error message, and the other error texts."""
        return (self.message, *other_error_texts(self.fields or {}))

    @property
    def is_refusal(self) -> bool:
        """Whether the answer is an error or says that the job failed."""
        return self.is_error or self.word in FAILED_WORDS

    @property
    def start(self) -> str:
        """The start of the body as text, for a body that is not a JSON object."""
        return self.body[:MAX_MESSAGE].decode("utf-8-sig", "replace").strip()

    @property
    def is_page(self) -> bool:
        """Whether the body is an HTML page."""
        return self.fields is None and self.start.startswith("<")

    def message_or_status(self) -> str:
        """Return the message, or the HTTP status if there is none."""
        return self.message or f"HTTP {self.code}"


class Example(NamedTuple):
    """An example answer about job 7."""

    body: str
    http_status: int = 200
    training: bool = False


class Rule(NamedTuple):
    """One rule: the reason for its position, its condition, the reply it makes, and an example that needs the rule."""

    name: str
    reason: str
    matches: Callable[[ParsedAnswer], bool]
    reply: Callable[[ParsedAnswer], Reply]
    example: Example


_TIMING_CODES = frozenset({408, 425})  # Request Timeout, Too Early
_BY_CODE: dict[int, RefusalReason] = {401: "key", 402: "credits", 403: "plan"}
_HOLDS: dict[str, RefusalReason] = {"key": "key", "credits": "credits", "plan": "plan", "request": "request"}
_WRONG_PATH = re.compile(
    r"^(?:(?:page|route|url|endpoint|resource|path) )?not found\.?$|\broute\b|endpoint|\bmethod\b|^$", re.IGNORECASE
)
_WALL = "https://developers.cloudflare.com/"  # the start of `type` in errors of the network in front of the API
_RUN_WORDS = {"completed": "success", "cancelled": "failed", "canceled": "failed"}


def _is_wall(answer: ParsedAnswer) -> bool:
    if answer.code < 400 or answer.fields is None:
        return False
    kind = answer.fields.get("type")
    return answer.fields.get("cloudflare_error") is True or (isinstance(kind, str) and kind.startswith(_WALL))


def _is_of_the_account(answer: ParsedAnswer) -> bool:
    if answer.word in FAILED_WORDS and answer.meaning in RUN_OUT and answer.code < 400:
        return False  # only this job failed; other jobs can still be fetched
    return answer.is_refusal and answer.meaning in (RUN_OUT if answer.code == 429 else ACCOUNT)


def _limited(answer: ParsedAnswer) -> Reply:
    seconds = retry_after(answer.headers, answer.fields or {}, answer.message, answer.question.now)
    return RateLimited(seconds, answer.message_or_status())


def _is_wrong_path(answer: ParsedAnswer) -> bool:
    if answer.http_status not in (404, 405) or answer.word not in ("", "error"):
        return False
    if answer.fields is not None:
        return _WRONG_PATH.search(answer.message.strip()) is not None
    return answer.is_page or meaning_of(answer.start) is None or _WRONG_PATH.search(answer.start) is not None


def _is_unknown_id(answer: ParsedAnswer) -> bool:
    if answer.fields is None:
        return answer.http_status == 404 and meaning_of(answer.start) == "unknown_id"
    if answer.word not in FAILED_WORDS and not answer.is_error:
        return False
    if answer.code < 400 and answer.word == "" and _WRONG_PATH.search(answer.message.strip()):
        return False
    meaning = answer.meaning
    return meaning == "unknown_id" or (answer.http_status == 404 and answer.word != "" and meaning is None)


def _training(answer: ParsedAnswer) -> Reply | None:
    fields = answer.fields or {}
    states = [training_state(answer.word), *training_states(fields)]
    is_final = any(state.startswith("training_failed") for state in states) or not FAILED_WORDS.isdisjoint(states[1:])
    if is_final or answer.word in FAILED_WORDS:
        reason = fields.get("data")
        text = plain_text(reason[:MAX_MESSAGE]).strip() if isinstance(reason, str) else ""
        may_recover = not is_final and answer.meaning in RECOVERS
        return Failed(text or answer.message or "the training failed", may_recover)
    if "model_ready" in states and answer.code < 400 and answer.word not in WAITING:
        return Ready(())
    return None if answer.word in ("", "error") or answer.code >= 400 else Processing(eta_of(fields))


def _not_json(answer: ParsedAnswer) -> str:
    if too_many_values(answer.body):
        return f"JSON of more than {MAX_VALUES:,} values"
    return "an HTML page" if answer.is_page else "no JSON object"


def _server(answer: ParsedAnswer) -> Reply:
    if answer.fields is None:
        return ApiDown(f"HTTP {answer.code} with {_not_json(answer)}")
    return ApiDown(f"HTTP {answer.code}: {answer.message}" if answer.message else f"HTTP {answer.code}")


def _failed(answer: ParsedAnswer) -> Reply:
    message = answer.message or "failed, without a message"
    return Failed(message, may_recover=answer.meaning in RECOVERS)


def _error(answer: ParsedAnswer) -> Reply:
    return ApiError(answer.message or f"HTTP {answer.code}, without a message", vague=answer.meaning is None)


def _success(answer: ParsedAnswer) -> Reply:
    fields = answer.fields or {}
    links, left_out = listed_outputs(fields)
    if not links and answer.run is not None:
        links, left_out = listed_outputs(answer.run)
    return Ready(links, left_out) if links else Empty(promised_urls(fields))


def _another_job(answer: ParsedAnswer) -> str:
    """Return the id of another job in an answer, or an empty string. Ids are compared without case."""
    remote_id, fields = answer.question.remote_id, answer.fields or {}
    if remote_id is None:
        return ""
    echoed = _id_in((answer.run or fields).get("id"))
    alternatives = [fields.get("request_id"), chat_id_of(fields)]
    if answer.question.training:
        echoed = _id_in(fields.get("training_id")) or echoed
        alternatives += [fields.get("id"), fields.get("model_id")]
    own = remote_id.lower()
    if not echoed or any(_id_in(value).lower() == own for value in (echoed, *alternatives)):
        return ""
    return plain_text(echoed[:128])


def _id_in(value: object) -> str:
    """Return an id as text, or an empty string if there is none. Zero is not an id."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return ""
    text = value.strip() if isinstance(value, str) else f"{value:d}"
    return "" if text == "0" else text


def _is_another_job(answer: ParsedAnswer) -> bool:
    if answer.code >= 400 or not _another_job(answer):
        return False
    if answer.question.training:
        return isinstance(_training(answer), (Ready, Failed))
    return answer.word == "success" or answer.word in FAILED_WORDS


def _refused(answer: ParsedAnswer) -> Reply:
    return AccountRefused(_HOLDS[answer.meaning or "request"], answer.message_or_status())


def _is_refused_by_code(answer: ParsedAnswer) -> bool:
    if answer.code not in _BY_CODE:
        return False
    if answer.fields is None:
        return answer.code != 403 and not answer.is_page
    if answer.code == 401:
        return answer.meaning != "service"
    if answer.word in FAILED_WORDS or answer.word in WAITING or answer.meaning == "unknown_id":
        return False  # the answer is about the job
    return answer.code == 402 or (answer.meaning != "service" and answer.meaning not in OF_THE_JOB)


def _unread(answer: ParsedAnswer) -> Reply:
    if answer.fields is None:
        return Unread(f"HTTP {answer.http_status} with {_not_json(answer)} ({len(answer.body)} bytes)")
    if answer.code >= 400 and answer.word:
        return Unread(f"HTTP {answer.code} that says {answer.word[:60]}")
    return Unread(f"unknown status {answer.word[:60]!r}" if answer.word else f"HTTP {answer.code} without a status")


RULES: tuple[Rule, ...] = (
    Rule(
        "redirect",
        "First: following a redirect would send the key elsewhere, so its body is not read.",
        lambda answer: 300 <= answer.http_status < 400,
        lambda answer: ApiDown(f"HTTP {answer.http_status}: {_REDIRECT}"),
        Example('{"status": "success", "output": ["https://h/a.png"]}', 302),
    ),
    Rule(
        "wall",
        "Before the account rules: these JSON errors come from the network in front of the API, not from the account.",
        _is_wall,
        lambda answer: _limited(answer) if answer.code == 429 else ApiDown(f"HTTP {answer.code}: {answer.message}"),
        Example('{"cloudflare_error": true, "status": 403, "detail": "Access denied by the owner"}', 403),
    ),
    Rule(
        "account",
        "Before the rate limits: a monthly limit means that the plan is used up; waiting does not help.",
        _is_of_the_account,
        _refused,
        Example('{"status": "error", "message": "Your monthly limit exceeded"}'),
    ),
    Rule(
        "limit",
        "Before the HTTP codes: a rate limit can have any HTTP status.",
        lambda answer: answer.code == 429 or (answer.is_refusal and answer.meaning == "limited"),
        _limited,
        Example('{"status": "error", "messege": "Rate limit exceeded"}'),
    ),
    Rule(
        "moderated",
        "Before the HTTP codes: a refused picture says nothing about the account.",
        lambda answer: answer.is_error and answer.meaning == "moderated" and answer.code < 500,
        lambda answer: ApiError(answer.message_or_status()),
        Example('{"message": "NSFW content detected"}', 400),
    ),
    Rule(
        "account_by_code",
        "For JSON and plain text. An HTML page with such a code comes from a firewall in front of the API.",
        _is_refused_by_code,
        lambda answer: AccountRefused(_BY_CODE[answer.code], answer.message_or_status()),
        Example('{"detail": "pay"}', 402),
    ),
    Rule(
        "wrong_path",
        "Before unknown ids: a path that does not exist says nothing about a job.",
        _is_wrong_path,
        lambda answer: ApiDown(f"HTTP {answer.http_status}: {NO_SUCH_PATH}", no_such_path=True),
        Example('{"message": "The route api/v6/fetch/1 could not be found."}', 404),
    ),
    Rule(
        "server",
        "Before unknown ids: the server or a gateway failed, so the body says nothing reliable about the job.",
        lambda answer: (
            answer.code >= 500 or answer.code in _TIMING_CODES or (answer.is_page and answer.http_status >= 400)
        ),
        _server,
        Example('{"status": "failed", "message": "Request not found"}', 500),
    ),
    Rule(
        "another_job",
        "Before all rules that end a job: an answer about another job says nothing about this one.",
        _is_another_job,
        lambda answer: AnotherJob(_another_job(answer)),
        Example('{"status": "failed", "id": 8, "message": "Invalid input"}'),
    ),
    Rule(
        "unknown_id",
        "Before failures: the status of an unknown id is `failed`.",
        _is_unknown_id,
        lambda answer: UnknownId(answer.message_or_status() if answer.fields is not None else plain_text(answer.start)),
        Example('{"status": "failed", "id": "", "message": "Request not found", "output": ""}'),
    ),
    Rule(
        "training",
        "Before the status words: the status of a training is always `success`, also while it runs.",
        lambda answer: answer.question.training and _training(answer) is not None,
        lambda answer: _training(answer) or Processing(),
        Example('{"status": "success", "messege": "deploying_gpu"}', training=True),
    ),
    Rule(
        "waiting",
        "The status or the error message says that the job is not ready.",
        lambda answer: answer.word in WAITING or (answer.is_error and answer.meaning == "waiting"),
        lambda answer: Processing(eta_of(answer.fields or {}), promised_urls(answer.fields or {})),
        Example('{"status": "queued", "taskId": "a352", "links": ["https://h/a.wav"]}'),
    ),
    Rule(
        "failed",
        "The job failed, or the message asks to try again.",
        lambda answer: answer.word in FAILED_WORDS,
        _failed,
        Example('{"status": "failed", "message": "Failed, Try Again"}'),
    ),
    Rule(
        "service",
        "A temporary error of the service. It is not about the job.",
        lambda answer: answer.is_error and answer.meaning in PASSING,
        lambda answer: ApiDown(f"HTTP {answer.code}: {answer.message_or_status()}", answered=True),
        Example('{"status": "error", "message": "Service is not available, try again later"}'),
    ),
    Rule(
        "error",
        "All other errors are about the job. Without the status `error`, the message must be about the order.",
        lambda answer: answer.word == "error" or (answer.is_error and answer.meaning == "order"),
        _error,
        Example('{"message": "The prompt field is required."}', 422),
    ),
    Rule(
        "contradiction",
        "An HTTP error code contradicts the status.",
        lambda answer: answer.code >= 400,
        _unread,
        Example('{"status": "success", "output": ["https://h/a.png"]}', 400),
    ),
    Rule(
        "success",
        "The job is done, if the answer lists outputs.",
        lambda answer: answer.word == "success",
        _success,
        Example('{"status": "success", "id": 7, "output": ["https://h/a.png"]}'),
    ),
    Rule("unread", "No other rule matches.", lambda answer: True, _unread, Example('{"status": "surprise"}')),
)


def parse(http_status: int, headers: Mapping[str, str], body: bytes, question: Question) -> Reply:
    """Return the reply for an HTTP answer."""
    fields = json_object(body)
    if fields is not None and fields.get("status") == "processing" and http_status == 200 and not question.training:
        return Processing(eta_of(fields), promised_urls(fields))  # a shortcut for most answers; same result as RULES
    return rule_for(ParsedAnswer(http_status, headers, body, fields, question))[1]


def rule_for(answer: ParsedAnswer) -> tuple[Rule, Reply]:
    """Return the rule that matches an answer, and the reply it makes."""
    rule = next(rule for rule in RULES if rule.matches(answer))
    return rule, rule.reply(answer)


def _word(fields: Mapping[str, Any], run: Mapping[str, Any] | None, status_words: Mapping[str, str]) -> str:
    """Return the status word. For a workflow it is that of the run; the outer status describes only the request."""
    word = status_of(fields)
    run_word = status_of(run) if run else ""
    if run_word and word in ("", "success"):
        word = _RUN_WORDS.get(run_word, run_word)
    return status_words.get(word, word)
