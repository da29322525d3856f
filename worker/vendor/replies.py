"""What an answer means: (HTTP status, headers, body) in, one typed reply out. It is total: it never raises.

`RULES` is read from the top, and the first rule that fits decides. Each says why it stands where it stands, and gives
an answer that is read differently without it. What the words of an error mean is in `worker.vendor.phrases`.
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
    as_state,
    chat_id_of,
    eta_of,
    execution_of,
    http_status_of,
    json_object,
    message_of,
    other_words,
    status_of,
    training_words,
)
from worker.vendor.links import listed_outputs, promised_urls
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
MAPPABLE_STATUSES = frozenset(
    {"success", "processing", "failed", "error"}
)  # what SD_API_STATUS_WORDS may map a word to

_OF_A_JOB = ("id", "request_id", "output", "links", "future_links", "fetch_result", "eta", "meta", "execution")
_REDIRECT = "the API redirects; a redirect is never followed with a key. Check SD_API_URL"
NO_SUCH_PATH = "the API has no such path. Check the path in SD_API_URL, or the fetch_url or endpoint of the job"


class Question(NamedTuple):
    """What was asked. `remote_id` is None where an order was posted; `now` is in seconds since 1970.

    `words` are the status words that the settings teach, each with the word of the API that it stands for.
    """

    remote_id: str | None
    now: float
    training: bool = False
    words: Mapping[str, str] = MappingProxyType({})


class ParsedAnswer:
    """One answer, with what the rules look at.

    `is_error`: it calls itself an error. One without a status does so by its HTTP code, or by being only a message.
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
        known = fields or {}
        self.http_status, self.headers, self.body, self.question = http_status, headers, body, question
        self.fields = fields
        self.code = max(http_status, http_status_of(known) or 0)  # or the one that the answer names instead
        self.run = execution_of(known)
        self.word = _word(known, self.run, question.words)
        self._message: str | None = None
        self._meaning: Meaning | Literal[""] | None = ""
        self.is_error = (
            self.word == "error" if self.word else fields is not None and (self.code >= 400 or self.is_message)
        )

    @property
    def message(self) -> str:
        """What the answer says, or an empty text. Read where it is needed: of a success nobody does."""
        if self._message is None:
            self._message = message_of(self.fields or {}) or (message_of(self.run) if self.run else "")
        return self._message

    @property
    def is_message(self) -> bool:
        """Whether the answer has a message, and nothing that is of a job."""
        fields = self.fields or {}
        return any(map(fields.get, MESSAGE_FIELDS)) and not any(map(fields.get, _OF_A_JOB))

    @property
    def meaning(self) -> Meaning | None:
        """What the message of an error says, or the code beside it."""
        if self._meaning == "":
            texts = (self.message, *other_words(self.fields or {}))
            self._meaning = next((meaning for meaning in map(meaning_of, texts) if meaning is not None), None)
        return self._meaning or None

    @property
    def is_refusal(self) -> bool:
        """Whether it calls itself an error, or says that the job failed."""
        return self.is_error or self.word in FAILED_WORDS

    @property
    def start(self) -> str:
        """The beginning of a body that is no JSON object."""
        return self.body[:MAX_MESSAGE].decode("utf-8-sig", "replace").strip()

    @property
    def is_page(self) -> bool:
        """Whether the body is a page for people."""
        return self.fields is None and self.start.startswith("<")

    def says(self) -> str:
        """Return the message, else the HTTP status."""
        return self.message or f"HTTP {self.code}"


class Example(NamedTuple):
    """An answer about the job 7."""

    body: str
    http_status: int = 200
    training: bool = False


class Rule(NamedTuple):
    """One rule: why it stands in this place, when it fits, what the answer means then, and an answer that needs it."""

    name: str
    why: str
    fits: Callable[[ParsedAnswer], bool]
    reply: Callable[[ParsedAnswer], Reply]
    example: Example


_TOO_SOON = frozenset({408, 425})  # what was sent came too slowly, or too early
_BY_CODE: dict[int, RefusalReason] = {401: "key", 402: "credits", 403: "plan"}
_HOLDS: dict[str, RefusalReason] = {"key": "key", "credits": "credits", "plan": "plan", "request": "request"}
_WRONG_PATH = re.compile(
    r"^(?:(?:page|route|url|endpoint|resource|path) )?not found\.?$|\broute\b|endpoint|\bmethod\b|^$", re.IGNORECASE
)
_WALL = "https://developers.cloudflare.com/"  # begins the `type` of an error that the network in front of the API made
_RUN_WORDS = {"completed": "success", "cancelled": "failed", "canceled": "failed"}


def _is_wall(answer: ParsedAnswer) -> bool:
    if answer.code < 400 or answer.fields is None:
        return False
    kind = answer.fields.get("type")
    return answer.fields.get("cloudflare_error") is True or (isinstance(kind, str) and kind.startswith(_WALL))


def _is_of_the_account(answer: ParsedAnswer) -> bool:
    if answer.word in FAILED_WORDS and answer.meaning in RUN_OUT and answer.code < 400:
        return False  # the job failed for it, and others may yet be asked about
    return answer.is_refusal and answer.meaning in (RUN_OUT if answer.code == 429 else ACCOUNT)


def _limited(answer: ParsedAnswer) -> Reply:
    seconds = retry_after(answer.headers, answer.fields or {}, answer.message, answer.question.now)
    return RateLimited(seconds, answer.says())


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
    words = [as_state(answer.word), *training_words(fields)]
    is_final = any(word.startswith("training_failed") for word in words) or not FAILED_WORDS.isdisjoint(words[1:])
    if is_final or answer.word in FAILED_WORDS:
        reason = fields.get("data")
        text = plain_text(reason[:MAX_MESSAGE]).strip() if isinstance(reason, str) else ""
        may_recover = not is_final and answer.meaning in RECOVERS
        return Failed(text or answer.message or "the training failed", may_recover)
    if "model_ready" in words and answer.code < 400 and answer.word not in WAITING:
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
    """Return the id that an answer names instead of the job's, or an empty text. Capital letters are no difference."""
    remote_id, fields = answer.question.remote_id, answer.fields or {}
    if remote_id is None:
        return ""
    echoed = _id_in((answer.run or fields).get("id"))
    others = [fields.get("request_id"), chat_id_of(fields)]
    if answer.question.training:
        echoed = _id_in(fields.get("training_id")) or echoed
        others += [fields.get("id"), fields.get("model_id")]
    own = remote_id.lower()
    if not echoed or any(_id_in(value).lower() == own for value in (echoed, *others)):
        return ""
    return plain_text(echoed[:128])


def _id_in(value: object) -> str:
    """Return an id as text; empty where there is none. Zero stands for none, too."""
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
    return AccountRefused(_HOLDS[answer.meaning or "request"], answer.says())


def _is_refused_by_code(answer: ParsedAnswer) -> bool:
    if answer.code not in _BY_CODE:
        return False
    if answer.fields is None:
        return answer.code != 403 and not answer.is_page
    if answer.code == 401:
        return answer.meaning != "service"
    if answer.word in FAILED_WORDS or answer.word in WAITING or answer.meaning == "unknown_id":
        return False  # it is about the job, by its own words
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
        "A redirect would take the key elsewhere, whatever its body says.",
        lambda answer: 300 <= answer.http_status < 400,
        lambda answer: ApiDown(f"HTTP {answer.http_status}: {_REDIRECT}"),
        Example('{"status": "success", "output": ["https://h/a.png"]}', 302),
    ),
    Rule(
        "wall",
        "Before the account: the network in front of the API writes its errors as JSON, and knows no account.",
        _is_wall,
        lambda answer: _limited(answer) if answer.code == 429 else ApiDown(f"HTTP {answer.code}: {answer.message}"),
        Example('{"cloudflare_error": true, "status": 403, "detail": "Access denied by the owner"}', 403),
    ),
    Rule(
        "account",
        "Before the limits: a monthly limit is a plan that has run out, and no pause ends it.",
        _is_of_the_account,
        _refused,
        Example('{"status": "error", "message": "Your monthly limit exceeded"}'),
    ),
    Rule(
        "limit",
        "Before the codes: a limit comes with any HTTP status.",
        lambda answer: answer.code == 429 or (answer.is_refusal and answer.meaning == "limited"),
        _limited,
        Example('{"status": "error", "messege": "Rate limit exceeded"}'),
    ),
    Rule(
        "moderated",
        "Before the codes: a picture that was refused says nothing about the account.",
        lambda answer: answer.is_error and answer.meaning == "moderated" and answer.code < 500,
        lambda answer: ApiError(answer.says()),
        Example('{"message": "NSFW content detected"}', 400),
    ),
    Rule(
        "account_by_code",
        "JSON, or a bare line. A page with such a code comes from a wall in front of the API.",
        _is_refused_by_code,
        lambda answer: AccountRefused(_BY_CODE[answer.code], answer.says()),
        Example('{"detail": "pay"}', 402),
    ),
    Rule(
        "wrong_path",
        "Before the unknown ids: a path that the API does not have says nothing about a job.",
        _is_wrong_path,
        lambda answer: ApiDown(f"HTTP {answer.http_status}: {NO_SUCH_PATH}", no_such_path=True),
        Example('{"message": "The route api/v6/fetch/1 could not be found."}', 404),
    ),
    Rule(
        "server",
        "Before the unknown ids: the server or a gateway failed, whatever the body says of the job.",
        lambda answer: answer.code >= 500 or answer.code in _TOO_SOON or (answer.is_page and answer.http_status >= 400),
        _server,
        Example('{"status": "failed", "message": "Request not found"}', 500),
    ),
    Rule(
        "another_job",
        "Before all that ends a job: what is said of another job says nothing about this one.",
        _is_another_job,
        lambda answer: AnotherJob(_another_job(answer)),
        Example('{"status": "failed", "id": 8, "message": "Invalid input"}'),
    ),
    Rule(
        "unknown_id",
        "Before the failures: an unknown id is a `failed` by its status.",
        _is_unknown_id,
        lambda answer: UnknownId(answer.says() if answer.fields is not None else plain_text(answer.start)),
        Example('{"status": "failed", "id": "", "message": "Request not found", "output": ""}'),
    ),
    Rule(
        "training",
        "Before the status words: of a training, `success` is said all the while.",
        lambda answer: answer.question.training and _training(answer) is not None,
        lambda answer: _training(answer) or Processing(),
        Example('{"status": "success", "messege": "deploying_gpu"}', training=True),
    ),
    Rule(
        "waiting",
        "The job is not ready, by its status or by the words of an error.",
        lambda answer: answer.word in WAITING or (answer.is_error and answer.meaning == "waiting"),
        lambda answer: Processing(eta_of(answer.fields or {}), promised_urls(answer.fields or {})),
        Example('{"status": "queued", "taskId": "a352", "links": ["https://h/a.wav"]}'),
    ),
    Rule(
        "failed",
        "The job failed, or the words ask to try again.",
        lambda answer: answer.word in FAILED_WORDS,
        _failed,
        Example('{"status": "failed", "message": "Failed, Try Again"}'),
    ),
    Rule(
        "service",
        "An error about the service passes. It is not about the job.",
        lambda answer: answer.is_error and answer.meaning in PASSING,
        lambda answer: ApiDown(f"HTTP {answer.code}: {answer.says()}", answered=True),
        Example('{"status": "error", "message": "Service is not available, try again later"}'),
    ),
    Rule(
        "error",
        "Any other error is about the job. Where only the HTTP status says so, the words must name what is wrong.",
        lambda answer: answer.word == "error" or (answer.is_error and answer.meaning == "order"),
        _error,
        Example('{"message": "The prompt field is required."}', 422),
    ),
    Rule(
        "contradiction",
        "A code of a failure beside another status.",
        lambda answer: answer.code >= 400,
        _unread,
        Example('{"status": "success", "output": ["https://h/a.png"]}', 400),
    ),
    Rule(
        "success",
        "The job is done, if its outputs are listed.",
        lambda answer: answer.word == "success",
        _success,
        Example('{"status": "success", "id": 7, "output": ["https://h/a.png"]}'),
    ),
    Rule("unread", "No rule reads it.", lambda answer: True, _unread, Example('{"status": "surprise"}')),
)


def parse(http_status: int, headers: Mapping[str, str], body: bytes, question: Question) -> Reply:
    """Return the reply that an HTTP answer stands for."""
    fields = json_object(body)
    if fields is not None and fields.get("status") == "processing" and http_status == 200 and not question.training:
        return Processing(eta_of(fields), promised_urls(fields))  # by far the most answers, and as the rules would say
    return rule_for(ParsedAnswer(http_status, headers, body, fields, question))[1]


def rule_for(answer: ParsedAnswer) -> tuple[Rule, Reply]:
    """Return the rule that reads an answer, and what it makes of it."""
    rule = next(rule for rule in RULES if rule.fits(answer))
    return rule, rule.reply(answer)


def _word(fields: Mapping[str, Any], run: Mapping[str, Any] | None, words: Mapping[str, str]) -> str:
    """Return the status word. A workflow's is that of its run: the one beside it is of the call alone."""
    word = status_of(fields)
    run_word = status_of(run) if run else ""
    if run_word and word in ("", "success"):
        word = _RUN_WORDS.get(run_word, run_word)
    return words.get(word, word)
