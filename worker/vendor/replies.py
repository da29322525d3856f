"""What an answer means: (HTTP status, headers, body) in, one typed reply out. It is total: it never raises.

`RULES` is read from the top, and the first rule that fits decides. Each says why it stands where it stands, and gives
an answer that no other rule reads in the same way. The words of an answer are matched against `PHRASES`, only where the
answer calls itself an error or a failure: prompts that a success repeats can contain any words.
"""
# ruff: noqa: E501  # a table has one line per phrase

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from worker.core.json_size import MAX_VALUES, too_many_values
from worker.core.numbers import number, retry_after_seconds
from worker.core.plain_text import plain_text
from worker.core.reply import (
    AccountRefused,
    AnotherJob,
    ApiDown,
    ApiError,
    Empty,
    Failed,
    Hold,
    Processing,
    RateLimited,
    Ready,
    Reply,
    UnknownId,
    Unread,
)
from worker.vendor.answers import (
    MAX_MESSAGE,
    code_of,
    eta_of,
    execution_of,
    http_status_of,
    json_object,
    message_of,
    status_of,
    training_words,
)
from worker.vendor.links import listed, promised

RETRY_DEFAULT = 30.0  # seconds; the vendor's own answers ask for as many
RETRY_LEAST = 1.0
RETRY_MOST = 900.0

WAITING = frozenset(
    {
        *("processing", "queued", "queue", "in_queue", "in-queue", "in queue", "pending", "waiting", "scheduled"),
        *("in_progress", "in-progress", "in progress", "starting", "started", "running", "initializing", "generating"),
        *("submitted", "accepted"),
    }
)
FAILED_WORDS = frozenset({"failed", "failure"})
TAUGHT = frozenset({"success", "processing", "failed", "error"})  # what SD_API_STATUS_WORDS may map a word to

Meaning = Literal[
    "key", "credits", "plan", "request", "limited", "unknown_id", "service", "try_again", "order", "moderated"
]


class Phrase(NamedTuple):
    """Words of the API: what they mean, the pattern that finds them, and an answer that has them."""

    meaning: Meaning
    pattern: str
    example: str


# Read from the top: the first that fits. What concerns the account comes before what concerns the rate: "Your monthly
# limit exceeded" is a plan that has run out, and no pause ends it.
PHRASES: tuple[Phrase, ...] = (
    Phrase("key", r"(?:invalid|wrong|incorrect|missing|unknown|bad) api[ _-]?key", "Invalid Api Key"),
    Phrase("key", r"api[ _-]?key (?:is |was |has been )?(?:required|missing|not found|invalid|not valid|incorrect)",
           "API key required"),
    Phrase("key", r"api[ _-]?key.{0,40}(?:expired|revoked|invalid|disabled|deactivated|suspended|blocked|not active)",
           "Your API key has been revoked"),
    Phrase("key", r"\bunauthenticated\b|\bunauthori[sz]ed\b|authentication (?:failed|required|error)|invalid token",
           "Unauthenticated."),
    Phrase("key", r"(?:account|user) (?:is |was |has been |not )?(?:suspended|blocked|banned|disabled|deactivated|found)",
           "Your account has been suspended"),
    Phrase("credits", r"insufficient (?:[a-z]{1,20} )?(?:credits?|balance|funds|tokens?)|insufficient[ _]?quota",
           "Insufficient credits. Please add more credits to continue."),
    Phrase("credits", r"(?:not enough|no more|no|out of|low|zero|negative) (?:[a-z]{1,20} )?(?:credits?|balance|funds)\b",
           "Not enough balance"),
    Phrase("credits", r"(?:credits?|balance|funds|wallet|quota|tokens?)[a-z ]{0,30} (?:exhausted|used up|is empty|ran out)",
           "Your credits are exhausted"),
    Phrase("credits", r"(?:exhausted|used up|run out of|ran out of)[a-z ]{0,30} (?:credits?|balance|funds|quota|tokens?)",
           "You have run out of credits"),
    Phrase("credits", r"\b(?:recharge|top[ -]?up|refill)\b|payment required|add (?:more )?(?:credits|funds|money)",
           "Please recharge your wallet"),
    Phrase("credits", r"\bwallet\b", "Wallet balance is 0"),
    Phrase("plan", r"(?:monthly|daily|weekly|yearly|annual|plan|quota|usage|subscription|trial|credits?|free|account)"
           r" (?:[a-z]{1,20} )?limit (?:is |was |has been |have been )?(?:exceeded|reached|exhausted|over|crossed)",
           "Your monthly limit exceeded, upgrade subscription now"),
    Phrase("plan", r"(?:exceeded|reached|used)(?: all)?(?: of)? (?:your|the|this) (?:[a-z]{1,20} ){0,2}"
           r"(?:monthly|daily|weekly|yearly|annual|plan|quota|usage|subscription|trial|free)\b(?!'s rate)",
           "You have exceeded your monthly limit"),
    Phrase("plan", r"quota (?:is |was |has been )?(?:exceeded|reached|exhausted|over)|(?:exceeded|over) (?:your )?quota",
           "Quota exceeded"),
    Phrase("plan", r"(?:subscription|plan|trial) (?:is |was |has |has been |have )?(?:expired|required|ended|over|inactive"
           r"|cancell?ed|not active|not found)", "Your subscription has expired"),
    Phrase("plan", r"(?:requires?|needs?) an? [a-z ]{0,30}(?:subscription|plan)|no (?:active )?(?:subscription|plan)\b"
           r"|not (?:available|included|allowed) (?:in|on|with|for) (?:your|the|this|free)[a-z ]{0,30} plan",
           "This feature requires a premium subscription"),
    Phrase("request", r"invalid api request", "Invalid API Request"),
    Phrase("limited", r"rate[ _-]?limit|limit exceeded|spam filter|too many (?:requests|attempts|queued)|throttl"
           r"|maximum \d{1,6} (?:queued|concurrent|parallel)|slow down|requests? per (?:second|minute|hour)",
           "Rate limit exceeded. Maximum 5 queued requests allowed."),
    Phrase("plan", r"(?:upgrade|renew|buy|purchase) (?:[a-z]{1,20} ){0,3}(?:subscription|plan)\b|please subscribe",
           "Please upgrade your plan"),
    Phrase("unknown_id", r"request (?:was |is )?not found|specified id"
           r"|(?:^|\b(?:request|job|task|training|run|the|this|that|such|given) )id (?:does not exist|is not queued|not found)"
           r"|no such (?:request|id|job)|(?:not|no longer) queued|no query results|^not found\.?$|(?:job|task|training|execution|run) (?:was |is )?not found",
           "Request not found"),
    Phrase("moderated", r"\bnsfw\b|moderat(?:ed|ion)|safety (?:check|filter|system)|inappropriate|content policy|prohibited",
           "NSFW content detected"),
    Phrase("order", r"(?:field|parameter|prompt|image|url|id|key|value|size|width|height|model)\b.{0,80}"
           r"\b(?:required|invalid|missing|must|not found|not valid|not supported|does not exist|too (?:large|small|long|many))",
           "The prompt field is required."),
    Phrase("order", r"\b(?:invalid|unsupported|missing|unknown|wrong|bad)\b.{0,60}"
           r"\b(?:input|inputs|image|prompt|parameters?|dimensions?|format|url|model|value|file|audio|video|arguments?|request)",
           "Invalid input dimensions"),
    Phrase("order", r"(?:unable|failed|could not|cannot|can't) (?:to )?(?:fetch|load|download|read|open|decode|process|find)"
           r"\b.{0,60}\b(?:image|url|file|audio|video|model|prompt|input)", "Unable to fetch image from provided URL"),
    Phrase("order", r"^error message$", "Error message"),  # what the vendor's pages show for any failed fetch
    Phrase("try_again", r"\btry again\b|\bretry\b|\btry later\b|\bplease wait\b", "Failed, Try Again"),
    Phrase("service", r"server error|server (?:is )?(?:busy|down|overloaded|restarting|unavailable)|\bbusy\b|overload"
           r"|maintenance|unavailable|not available|\bqueue\b|current_queue|timed? ?-?out|at capacity|no capacity"
           r"|no (?:gpu|worker)s?\b|(?:high|heavy) (?:traffic|load|demand)|\blater\b|temporar|bad gateway|gateway",
           "Service is not available"),
)  # fmt: skip
_COMPILED = tuple((phrase.meaning, re.compile(phrase.pattern, re.IGNORECASE)) for phrase in PHRASES)
ACCOUNT: frozenset[Meaning] = frozenset({"key", "credits", "plan", "request"})
RUN_OUT: frozenset[Meaning] = frozenset({"credits", "plan"})  # what may be said with HTTP 429 instead of 402
_SERVER = re.compile(
    r"(?:internal )?server error\b.{0,60}|(?:the )?service (?:is )?(?:temporarily )?unavailable\b.{0,60}", re.IGNORECASE
)

_WAIT = re.compile(r"(\d{1,6})\s*(second|sec|minute|min|hour|hr)\w*", re.IGNORECASE)
_REDIRECT = "the API redirects; a redirect is never followed with a key. Check SD_API_URL"
NO_SUCH_PATH = "the API has no such path. Check the path in SD_API_URL, or the fetch_url or endpoint of the job"


@lru_cache(maxsize=512)
def meaning_of(text: str) -> Meaning | None:
    """Return what the words of an error mean, or None where no phrase is in them.

    >>> meaning_of("Your monthly limit exceeded, upgrade subscription now"), meaning_of("Something went wrong")
    ('plan', None)
    """
    return next((meaning for meaning, pattern in _COMPILED if pattern.search(text)), None)


class Question(NamedTuple):
    """What was asked. `remote_id` is None where an order was posted; `now` is in seconds since 1970.

    `words` are the status words that the settings teach, each with the word of the API that it stands for.
    """

    remote_id: str | None
    now: float
    training: bool = False
    words: Mapping[str, str] = MappingProxyType({})


class Answer:
    """One answer, with what the rules look at."""

    __slots__ = ("body", "code", "fields", "headers", "http_status", "message", "question", "run", "word")

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
        self.message = message_of(known) or message_of(self.run or {})

    @property
    def is_error(self) -> bool:
        """Whether the answer calls itself an error; one without a status does so by its HTTP code."""
        return self.fields is not None and (self.word == "error" or (self.word == "" and self.code >= 400))

    @property
    def meaning(self) -> Meaning | None:
        """What the message of an error says, or the code beside it."""
        return meaning_of(self.message) or meaning_of(code_of(self.fields or {}))

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


class Rule(NamedTuple):
    """One rule: when it fits, what the answer means then, and why it stands in this place."""

    name: str
    why: str
    fits: Callable[[Answer], bool]
    reply: Callable[[Answer], Reply]


_BY_CODE: dict[int, Hold] = {401: "key", 402: "credits", 403: "plan"}
_WRONG_PATH = re.compile(
    r"^(?:(?:page|route|url|endpoint|resource|path) )?not found\.?$|\broute\b|endpoint|\bmethod\b|^$", re.IGNORECASE
)
_RUN_WORDS = {"completed": "success", "cancelled": "failed", "canceled": "failed"}


def _is_wrong_path(answer: Answer) -> bool:
    if answer.http_status not in (404, 405) or answer.word not in ("", "error"):
        return False
    if answer.fields is not None:
        return _WRONG_PATH.search(answer.message.strip()) is not None
    return answer.is_page or meaning_of(answer.start) is None or _WRONG_PATH.search(answer.start) is not None


def _is_unknown_id(answer: Answer) -> bool:
    if answer.fields is None:
        return answer.http_status == 404 and meaning_of(answer.start) == "unknown_id"
    if answer.word not in FAILED_WORDS and not answer.is_error:
        return False
    meaning = answer.meaning
    return meaning == "unknown_id" or (answer.http_status == 404 and answer.word != "" and meaning is None)


def _training(answer: Answer) -> Reply | None:
    fields = answer.fields or {}
    words = [answer.word, *training_words(fields)]
    if answer.word in FAILED_WORDS or any(word.startswith("training_failed") for word in words):
        reason = fields.get("data")
        text = plain_text(reason[:MAX_MESSAGE]).strip() if isinstance(reason, str) else ""
        return Failed(text or answer.message or "the training failed")
    if "model_ready" in words:
        return Ready(())
    return None if answer.word in ("", "error") or answer.code >= 400 else Processing(eta_of(fields))


def _not_json(answer: Answer) -> str:
    if too_many_values(answer.body):
        return f"JSON of more than {MAX_VALUES:,} values"
    return "an HTML page" if answer.is_page else "no JSON object"


def _server(answer: Answer) -> Reply:
    if answer.fields is None:
        return ApiDown(f"HTTP {answer.code} with {_not_json(answer)}")
    return ApiDown(f"HTTP {answer.code}: {answer.message}" if answer.message else f"HTTP {answer.code}")


def _failed(answer: Answer) -> Reply:
    message = answer.message or "failed, without a message"
    return Failed(message, may_recover=meaning_of(message) in ("try_again", "service", "limited"))


def _error(answer: Answer) -> Reply:
    return ApiError(answer.message or f"HTTP {answer.code}, without a message", vague=answer.meaning is None)


def _success(answer: Answer) -> Reply:
    fields = answer.fields or {}
    echoed, remote_id = _echoed_id(answer), answer.question.remote_id
    if echoed and remote_id is not None and echoed != remote_id:
        return AnotherJob(plain_text(echoed[:128]))
    links, left_out = listed(fields)
    if not links and answer.run is not None:
        links, left_out = listed(answer.run)
    return Ready(links, left_out) if links else Empty(promised(fields))


def _echoed_id(answer: Answer) -> str:
    echoed = (answer.run or answer.fields or {}).get("id")
    if isinstance(echoed, float) and echoed.is_integer():
        echoed = int(echoed)
    if isinstance(echoed, bool) or not isinstance(echoed, (str, int)):
        return ""
    return echoed.strip() if isinstance(echoed, str) else f"{echoed:d}"


def _refused(answer: Answer) -> Reply:
    reason = {"key": "key", "credits": "credits", "plan": "plan"}.get(answer.meaning or "", "request")
    return AccountRefused(reason, answer.message)  # type: ignore[arg-type]


def _unread(answer: Answer) -> Reply:
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
    ),
    Rule(
        "account",
        "Before the limits: a monthly limit is a plan that has run out, and no pause ends it.",
        lambda answer: answer.is_error and answer.meaning in (RUN_OUT if answer.code == 429 else ACCOUNT),
        _refused,
    ),
    Rule(
        "limit",
        "Before the codes: a limit comes with any HTTP status.",
        lambda answer: answer.code == 429 or (answer.is_error and answer.meaning == "limited"),
        lambda answer: RateLimited(_retry_after(answer), answer.says()),
    ),
    Rule(
        "moderated",
        "Before the codes: a picture that was refused says nothing about the account.",
        lambda answer: answer.is_error and answer.meaning == "moderated" and answer.code < 500,
        lambda answer: ApiError(answer.message),
    ),
    Rule(
        "account_by_code",
        "JSON, or a bare line. A page with such a code comes from a wall in front of the API.",
        lambda answer: (
            answer.code in _BY_CODE and (answer.fields is not None or (answer.code != 403 and not answer.is_page))
        ),
        lambda answer: AccountRefused(_BY_CODE[answer.code], answer.says()),
    ),
    Rule(
        "wrong_path",
        "Before the unknown ids: a path that the API does not have says nothing about a job.",
        _is_wrong_path,
        lambda answer: ApiDown(f"HTTP {answer.http_status}: {NO_SUCH_PATH}"),
    ),
    Rule(
        "server",
        "Before the unknown ids: the server or a gateway failed, whatever the body says of the job.",
        lambda answer: answer.code >= 500 or (answer.is_page and answer.http_status >= 400),
        _server,
    ),
    Rule(
        "unknown_id",
        "Before the failures: an unknown id is a `failed` by its status.",
        _is_unknown_id,
        lambda answer: UnknownId(answer.says() if answer.fields is not None else plain_text(answer.start)),
    ),
    Rule("no_json", "Without JSON there is nothing else to read.", lambda answer: answer.fields is None, _unread),
    Rule(
        "training",
        "Before the status words: of a training, `success` is said all the while.",
        lambda answer: answer.question.training and _training(answer) is not None,
        lambda answer: _training(answer) or Processing(),
    ),
    Rule(
        "waiting",
        "The job is not ready.",
        lambda answer: answer.word in WAITING,
        lambda answer: Processing(eta_of(answer.fields or {}), promised(answer.fields or {})),
    ),
    Rule(
        "failed", "The job failed, or the words ask to try again.", lambda answer: answer.word in FAILED_WORDS, _failed
    ),
    Rule(
        "service",
        "An error about the service passes. It is not about the job.",
        lambda answer: (
            (answer.is_error and answer.meaning in ("service", "try_again"))
            or (answer.word == "" and _SERVER.fullmatch(answer.message.strip()) is not None)
        ),
        lambda answer: ApiDown(f"HTTP {answer.code}: {answer.message}", answered=True),
    ),
    Rule("error", "Any other error is about the job.", lambda answer: answer.word == "error", _error),
    Rule("contradiction", "A code of a failure beside another status.", lambda answer: answer.code >= 400, _unread),
    Rule("success", "The job is done, if its outputs are listed.", lambda answer: answer.word == "success", _success),
    Rule("unread", "No rule reads it.", lambda answer: True, _unread),
)


def parse(http_status: int, headers: Mapping[str, str], body: bytes, question: Question) -> Reply:
    """Return the reply that an HTTP answer stands for."""
    fields = json_object(body)
    if fields is not None and fields.get("status") == "processing" and http_status == 200 and not question.training:
        return Processing(eta_of(fields), promised(fields))  # by far the most answers, and as the rules would say
    return rule_for(Answer(http_status, headers, body, fields, question))[1]


def rule_for(answer: Answer) -> tuple[Rule, Reply]:
    """Return the rule that reads an answer, and what it makes of it."""
    rule = next(rule for rule in RULES if rule.fits(answer))
    return rule, rule.reply(answer)


def _word(fields: Mapping[str, Any], run: Mapping[str, Any] | None, words: Mapping[str, str]) -> str:
    """Return the status word. A workflow's is that of its run: the one beside it is of the call alone."""
    word = status_of(fields)
    if run is not None and word not in ("error", "failed"):
        word = _RUN_WORDS.get(status_of(run), status_of(run))
    return words.get(word, word)


def _retry_after(answer: Answer) -> float:
    """Return the seconds to wait, from wherever the answer says so, from 1 s to 15 min; 30 s where it does not say."""
    headers = {name.lower(): value for name, value in answer.headers.items()}
    fields = answer.fields or {}
    for wait in (
        retry_after_seconds(headers.get("retry-after"), answer.question.now),
        number(fields.get("retry_after")),
        _until(headers.get("x-ratelimit-reset"), answer.question.now),
        _wait_in_words(answer.message, fields),
    ):
        if wait is not None:
            return min(max(wait, RETRY_LEAST), RETRY_MOST)
    return RETRY_DEFAULT


def _until(value: str | None, now: float) -> float | None:
    at = number(value)
    return None if at is None or at <= now else at - now


def _wait_in_words(message: str, fields: Mapping[str, Any]) -> float | None:
    texts = [message, *(fields[name] for name in ("tips", "tip") if isinstance(fields.get(name), str))]
    for text in (text[:MAX_MESSAGE] for text in texts):
        if match := _WAIT.search(text):
            unit = match[2].lower()
            return int(match[1]) * (3_600.0 if unit.startswith("h") else 60.0 if unit.startswith("min") else 1.0)
    return None
