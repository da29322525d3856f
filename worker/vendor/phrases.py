"""The phrases in the API's error messages and their meanings. One row per phrase; the first match decides.

Phrases are matched only against the message of an error or a failure, because a success may repeat a prompt with any
words. To support a new phrase, add a row with an example. The tests remove each row in turn, and fail if its example
still has the same meaning without it.
"""
# ruff: noqa: E501  # a table has one line per phrase

import re
from functools import lru_cache
from typing import Literal, NamedTuple

Meaning = Literal[
    "key",
    "credits",
    "plan",
    "request",
    "limited",
    "unknown_id",
    "service",
    "memory",
    "try_again",
    "order",
    "moderated",
    "waiting",
]


class Phrase(NamedTuple):
    """A phrase: its meaning, its pattern, and an example message that has this meaning only because of this row."""

    meaning: Meaning
    pattern: str
    example: str


_QUEUE_SIZE = r"\bqueue (?:size|length|depth|capacity) limit|\blimit of (?:the |your )?queue\b"
_QUEUED = r"(?:queued|concurrent|parallel|simultaneous) (?:[a-z]{1,20} )?(?:requests?|jobs?|generations?|tasks?)|requests (?:already )?(?:in|on) (?:the |your )?queue"

# Phrases about the order come first, after suspended accounts, because a message may quote a prompt, a URL or a model
# with any words. Phrases about the account come before those about the rate: "Your monthly limit exceeded" means that
# the plan is used up, and waiting does not help. A limit of queued requests is a rate limit, even if the message names
# the plan as the reason.
PHRASES: tuple[Phrase, ...] = (
    Phrase("key", r"(?:account|user) (?:is |was |has been )?(?:currently )?(?:suspended|blocked|banned|disabled|deactivated|inactive|not (?:yet )?(?:active|activated|verified))|\b(?:account|user) (?:was |is )?not found",
           "Your account has been suspended"),
    Phrase("service", r"\b(?:server|service|queue|system|gpu)s? (?:is |are )?(?:currently |temporarily |too )?(?:busy|full|overloaded)\b(?!.{0,300}\b(?:queued|concurrent) requests)",
           "Queue is full. Upgrade your plan to skip the queue"),
    Phrase("moderated", r"\bnsfw\b|moderat(?:ed|ion)|safety (?:check|filter|system)|inappropriate|content policy|\bprohibited (?:[a-z]{1,20} )?(?:contents?|words?|images?|prompts?|terms?|text|material)\b|\b(?:contains?|includes?) (?:[a-z]{1,20} )?prohibited\b",
           "NSFW content detected"),
    Phrase("unknown_id", r"(?:(?<!\w )\b|\b(?:the|this|that|such|your|selected|given|specified|provided|requested|fetch|request|job|task|training|execution|run|generation|queue) )id:?(?: #?(?=\S{0,130}\d)\S{1,130})? (?:is |was |are )?(?:not valid|invalid|incorrect|wrong|unknown|not found|(?:does not|doesn't|did not) exist|not exist)\b"
           r"|\b(?:image|video|audio|request|job|task|generation|execution|record|result|training|run)s? with (?:the |this |that |such )?(?:[a-z]{1,20} )?id\b.{0,140}\b(?:not (?:be )?found|not exist|doesn't exist|invalid)"
           r"|\b(?:invalid|wrong|incorrect) id(?: provided| given| supplied)?[.!]?$"
           r"|\bno (?:such )?(?:image|video|audio|request|job|task|generation|execution|record|result|training|run)s? (?:was |were )?(?:found )?(?:with|for|by|under) (?:the |this |that |such )?(?:[a-z]{1,20} )?id\b"
           r"|\b(?:request|job|task|generation|execution|training|record) (?:could ?not|can ?not|can't|couldn't) be (?:found|located)"
           r"|\b(?:could not|couldn't|cannot|can't|unable to) find (?:the |a |any |your |this |that |such )?(?:request|job|task|generation|execution|training|record|id)\b",
           "The selected id is invalid."),
    Phrase("service", r"(?:unable|failed|could not|cannot|can't) (?:to )?(?:fetch|load|download|read|open)\b(?!.{0,300}\b(?:another|different|valid|check|correct)\b).{0,120}\b(?:later|again|busy|retry)\b",
           "Failed to load model, please try again later"),
    Phrase("order", r"(?:unable|failed|could not|cannot|can't) (?:to )?(?:fetch|load|download|read|open|decode|find)\b.{0,60}\b(?:image|url|file|audio|video|model|prompt|input)",
           "Unable to fetch image from provided URL"),
    Phrase("order", r"\bprompts?\b.{0,80}\b(?:required|invalid|missing|must|contains?|not|too|exceeds?)\b|\b(?:invalid|unsupported|missing|bad|empty) prompt|\bmodel (?:id )?(?:was |is )?not found|\b(?:no such|unknown|invalid) model\b",
           "The prompt contains invalid api key"),
    Phrase("key", r"(?:invalid|wrong|incorrect|missing|unknown|bad|no) (?:or \w{1,20} )?(?:valid )?api[ _-]?key", "Invalid Api Key"),
    Phrase("key", r"api[ _-]?key (?:is |was |has been )?(?:required|missing|not (?:found|exist|recogni[sz]ed)|(?:does not|doesn't) exist|incorrect|unknown)|\b(?:invalid|wrong|incorrect) key(?: provided| given)?[.!]?$|^(?:error:? )?(?:your |the )?key (?:is |was |has )?(?:invalid|incorrect|wrong|expired|revoked|not valid)\b|provide (?:\w{1,20} ){0,2}api[ _-]?key|\bkey field is required",
           "API key required"),
    Phrase("key", r"api[ _-]?key.{0,40}(?:expired|revoked|invalid|disabled|deactivated|suspended|blocked|not (?:active|valid))",
           "Your API key has been revoked"),
    Phrase("key", r"\bunauthenticated\b|\bunauthori[sz]ed\b|authentication (?:failed|required|error)|credentials (?:were |are )?(?:not provided|invalid|missing|incorrect)|\b(?:invalid|wrong|incorrect|missing|bad) (?:[a-z]{1,20} )?credentials|invalid token(?! in\b)|invalid (?:access|auth|api|bearer) token|\btoken (?:is |has |was )?(?:expired|revoked)",
           "Unauthenticated."),
    Phrase("key", r"^(?:error:? )?(?:api )?(?:access|permission) (?:is |was |has been )?(?:denied|forbidden|prohibited)\b(?!:)|\bapi (?:access|usage|use) (?:is |was |has been )?(?:denied|forbidden|prohibited|disabled|blocked|suspended|revoked|restricted)|\baccess (?:is |was |has been )?(?:denied|forbidden|prohibited|disabled|blocked|suspended|revoked) (?:for|to) (?:your|this) (?:account|user|api|key)",
           "Access denied"),
    Phrase("credits", r"insufficient (?:[a-z]{1,20} ){0,2}(?:credits?|balance|funds|tokens?)|insufficient[ _]?quota",
           "Insufficient funds"),
    Phrase("credits", r"(?:not enough|no more|no|out of|low|zero|negative|0) (?:[a-z]{1,20} )?(?:credits?|balance|funds)\b",
           "Not enough balance"),
    Phrase("credits", r"(?:not|n't) have (?:enough|sufficient|any)(?: more)? (?:[a-z]{1,20} )?(?:credits?|balance|funds)|(?:credits?|balance|funds) (?:is |are )?(?:too )?(?:low|insufficient|not (?:enough|sufficient))",
           "Your credit balance is too low"),
    Phrase("credits", r"(?:credits?|balance|funds|wallet|tokens?)[a-z ]{0,30} (?:exhausted|used up|is empty|ran out|run out|finished)",
           "Your credits are exhausted"),
    Phrase("credits", r"(?:exhausted|used up|run out of|ran out of)[a-z ]{0,30} (?:credits?|balance|funds|tokens?)",
           "You have used up all your tokens"),
    Phrase("credits", r"\b(?:recharge|top[ -]?up|refill)\b|payment (?:is )?(?:required|overdue|past due)|(?:add|buy|purchase) (?:more )?(?:credits|funds|money)",
           "Please recharge your account"),
    Phrase("credits", r"\bwallet\b.{0,30}\b(?:balance|empty|low|funds?)\b|\b(?:add|low|empty|funds?|balance)\b.{0,30}\bwallet\b", "Wallet balance is 0"),
    Phrase("plan", r"(?:monthly|daily|weekly|yearly|annual) (?:[a-z]{1,20} ){0,2}(?:limits?|quota|allowance|cap) (?:is |are |was |were |has been |have been )?(?:exceeded|reached|exhausted|over|crossed|hit)",
           "Your monthly limit exceeded, upgrade subscription now"),
    Phrase("plan", r"(?:exceeded|reached|hit|used|crossed)(?: all)?(?: of)? (?:your|the|this) (?:[a-z]{1,20} ){0,2}(?:monthly|daily|weekly|yearly|annual)\b",
           "You have exceeded your monthly limit"),
    Phrase("plan", r"\b(?:per|this|each|for|for the|for this) (?:month|week|year|day|billing (?:period|cycle))\b|\bfor today\b",
           "100 requests per day are allowed"),
    Phrase("limited", _QUEUE_SIZE, "Queue size limit reached"),
    Phrase("plan", r"(?:exceeded|reached|hit|used(?: up)?|crossed) (?:all )?(?:of )?your (?:[a-z]{1,20} )?tokens? (?:limits?|cap|quota|allowance)|\btokens? limit (?:is |was |has been )?(?:exceeded|reached) (?:for|of|on|in) your\b", "You have reached your token limit"),
    Phrase("order", r"\b(?:size|length|tokens?|characters?|words?|pixels?|resolution|duration|frames?) (?:count )?limit",
           "Image size limit exceeded"),
    Phrase("limited", _QUEUED,
           "Your plan limit is reached: 5 concurrent requests"),
    Phrase("plan", r"\b(?:exceeded|reached|hit|exhausted|crossed|used(?: up)?)\b[a-z ]{0,60} (?:of|for|on|in|under|with) (?:your|the|this) (?:[a-z]{1,20} ){0,2}(?:plan|subscription|package|membership|tier)\b",
           "You have hit the cap of your plan"),
    Phrase("plan", r"\b(?:plan|quota|usage|subscription|trial|credits?|free|account|free tier|package|membership|api calls?)(?:['’]s)? (?:(?!rate\b)[a-z]{1,20} )?limits? (?:is |are |was |were |has been |have been )?(?:exceeded|reached|exhausted|over|crossed|hit)",
           "Your usage limit has been reached"),
    Phrase("plan", r"(?:exceeded|reached|hit|used|exhausted)(?: up)?(?: all)?(?: of)? (?:your|the|this) (?:[a-z]{1,20} ){0,2}(?:plan|quota|usage|subscription|package|membership|trial|free|api calls|images|generations)\b",
           "You have used all your free images"),
    Phrase("plan", r"\b(?:limits?|api (?:calls?|requests?)|requests|usage|plan|subscription|account|images|trial) (?:is |are |was |has been |have been )?(?:exhausted|used up|consumed)",
           "Your account is exhausted"),
    Phrase("plan", r"quota (?:is |was |has been )?(?:exceeded|reached|exhausted|over)|(?:exceeded|over|exhausted|used up) (?:[a-z]{1,20} )?quota",
           "Quota exceeded"),
    Phrase("plan", r"\bno (?:more )?(?:[a-z]{1,20} )?(?:api calls?|images?|generations?) (?:left|remaining|available)|\b0 (?:api calls?|images?|generations?) (?:left|remaining)",
           "No API calls left"),
    Phrase("plan", r"(?:subscription|plan|trial|membership|package) (?:is |was |has |has been |have )?(?:expired|required|ended|over|inactive|cancell?ed|not active|not found)",
           "Your subscription has expired"),
    Phrase("plan", r"(?:requires?|needs?) an? [a-z ]{0,30}(?:subscription|plan)|no (?:active )?(?:subscription|plan|membership|package)\b|(?:not|n't) have (?:an? |any )?(?:[a-z]{1,20} ){0,2}(?:subscription|plan|membership|package)\b|\b(?:need|have|must|required) (?:to )?subscribe\b|not (?:available|included|allowed) (?:in|on|with|for) (?:your|the|this|free)[a-z ]{0,30} plan",
           "You need an active plan"),
    Phrase("plan", r"\b(?:premium|paid|paying|enterprise|subscribed) (?:members?|users?|customers?|accounts?|plans?|subscriptions?)\b",
           "Only for enterprise customers"),
    Phrase("request", r"invalid api request", "Invalid API Request"),
    Phrase("limited", r"rate[ _-]?limit|limit (?:is |was |has been )?(?:exceeded|reached|hit)|spam filter|too many (?:[a-z]{1,20} )?(?:requests|attempts)|throttl|maximum \d{1,6} requests|slow down|requests? per (?:second|minute|hour)",
           "Rate limit exceeded"),
    Phrase("plan", r"(?:upgrade|renew|buy|purchase) (?:[a-z]{1,20} ){0,3}(?:subscription|plan)\b|please subscribe",
           "Please upgrade your plan"),
    Phrase("unknown_id", r"\brequest (?:id )?(?:was |is |does )?not (?:found|exist)|specified id|(?:^|\b(?:request|job|task|training|run|the|this|that|such|given) )id (?:does not exist|is not queued|not found)|no such (?:request|id|job)|(?:not|no longer) queued"
           r"|(?:request|job|task|generation|execution) (?:with )?(?:id )?(?=\S{0,130}\d)\S{1,130} (?:was |is |does |could )?not (?:be )?(?:found|exist)",
           "Request not found"),
    Phrase("unknown_id", r"(?:invalid|unknown|wrong) (?:request|job|task|fetch|execution|training)[ _-]?id|no (?:request|record|result|job)s? (?:was |were )?found|no query results",
           "Invalid request id"),
    Phrase("unknown_id", r"(?:job|task|training|execution|run|record|generation) (?:was |is )?not found|^not found\.?$",
           "Execution not found"),
    Phrase("unknown_id", r"(?<!model )(?:does not|doesn't|do not|not) belong|(?<!\bkey )(?<!\bmodel )\bbelongs? to (?:another|a different|someone|somebody|other)|\b(?:not|don't|n't) own\b(?! (?:this |the |that )?(?:model|voice|lora))|\bnot the owner\b", "This request does not belong to you"),
    Phrase("waiting", r"(?:still|currently|being) process(?:ing|ed)|request (?:is )?processing|not (?:yet )?ready|in progress|being generated|(?:in|has been added to) (?:the )?queue\b",
           "Your image is not ready yet"),
    Phrase("service", r"(?:server|service|queue|system|gpu)s? (?:is |are )?(?:currently |temporarily )?(?:busy|down|full|overloaded|restarting|unavailable|not available)|\bbusy\b|overload|maintenance|temporar|\bagain later\b|\btry later\b|\bcurrent queue\b",
           "Under maintenance"),
    Phrase("service", r"\bsqlstate\b|\bconnect to (?:the |our )?(?:database|server|upstream)\b|\bserver has gone away\b|\bdatabase\b.{0,40}\b(?:fail(?:ed|ure)|errors?|down|lost|refused|gone)\b|\bconnection (?:was |is |has been )?(?:refused|reset|failed|lost|closed|error)|\binternal (?:[a-z]{1,20} )?(?:error|failure)|\bupstream\b|\b(?:model|gpu|server|machine|worker|pod|instance|container)s? (?:is |are )?(?:still |currently |being )?(?:loading|loaded|starting|started|booting|warming|initiali[sz]ing|deploying)\b|\bon our (?:end|side)\b",
           "Database connection failed"),
    Phrase("memory", r"\bout of (?:[a-z]{1,20} )?memory\b|\boom\b", "CUDA out of memory"),
    Phrase("order", r"(?:field|parameter|prompt|image|url|id|value|size|width|height|model|samples|scale)\b.{0,80}\b(?:required|invalid|missing|must|not found|not valid|not supported|does not exist|too (?:large|small|long|many))"
           r"|\bmust be (?:an?|one|between|at|greater|less|in|of)\b",
           "The width field is required."),
    Phrase("order", r"\b(?:invalid|unsupported|missing|unknown|wrong|bad)\b.{0,60}\b(?:inputs?|image|prompt|parameters?|dimensions?|format|url|model|value|file|audio|video|arguments?)\b",
           "Invalid input dimensions"),
    Phrase("order", r"^error message$", "Error message"),  # the vendor's documentation shows this for every failed fetch
    Phrase("try_again", r"\btry again\b|\bretry\b|\bplease wait\b", "Failed, Try Again"),
    Phrase("service", r"server error|\bunavailable\b|\bnot available\b|\bqueue\b|timed? ?-?out|capacity|no (?:gpu|worker)s?\b|(?:high|heavy) (?:traffic|load|demand)|\blater\b|gateway",
           "Gateway timeout"),
)  # fmt: skip
_COMPILED = tuple((phrase.meaning, re.compile(phrase.pattern, re.IGNORECASE)) for phrase in PHRASES)

ACCOUNT: frozenset[Meaning] = frozenset({"key", "credits", "plan", "request"})
RUN_OUT: frozenset[Meaning] = frozenset({"credits", "plan"})  # may come with HTTP 429 instead of 402
OF_THE_JOB: frozenset[Meaning] = frozenset({"order", "unknown_id", "moderated", "waiting"})
PASSING: frozenset[Meaning] = frozenset({"try_again", "service", "memory", "limited", "waiting"})
# Failures after which a job can still become ready. "Out of memory" is final. Credits or a plan can be bought.
RECOVERS: frozenset[Meaning] = (PASSING | RUN_OUT) - {"memory"}

# The queue of the account is full: it has as many orders at the API as its plan allows.
_QUEUE_IS_FULL = re.compile(
    rf"{_QUEUE_SIZE}|{_QUEUED}|\bpending (?:requests|jobs|generations|tasks)\b"
    r"|\bqueue (?:is |are )?(?:currently |temporarily |already |too )?full\b|\bqueue limit\b",
    re.IGNORECASE,
)
_NO_TIME = r"\b(?! ?(?:s|secs?|seconds?|m|mins?|minutes?|h|hrs?|hours?)\b)"
_QUEUE_LIMITS = (
    re.compile(
        r"\b(?:maximum|max|limit|at most|up to|only|more than)\b[ :=(]{0,3}(?:(?:of|is|to|the|your|plan|size|number|queue|"
        rf"queued|concurrent|requests?|jobs?|have|allowed)\b[ :=(]{{0,3}}){{0,6}}(\d{{1,4}}){_NO_TIME}",
        re.IGNORECASE,
    ),
    re.compile(r"\b(\d{1,4}) (?:queued|concurrent|parallel|simultaneous|pending)\b", re.IGNORECASE),
)
_UNKNOWN_MODEL = re.compile(
    r"\bmodels?\b(?:(?!\b(?:field|parameter|value|image|url)\b).){0,80}\b(?:not (?:be )?found|(?:not|doesn't) exist|invalid|unknown|not valid|not recogni[sz]ed)\b"
    r"|\b(?:invalid|unknown|no such|wrong|incorrect) (?:[a-z]{1,20} )?model\b"
    r"|\b(?:find|locate) (?:the |a |any |your |this |that |such )?(?:[a-z]{1,20} )?model\b",
    re.IGNORECASE,
)

# Quoted text can be a prompt, a name or a URL, so it is removed. A single word in quotes stays.
_QUOTED = re.compile(
    r"\"[^\"]{0,250}\"|“[^”]{0,250}”|`[^`]{0,250}`|(?<!\w)'[^']{0,250}'(?!\w)|(?<!\w)\u2018[^\u2019]{0,250}\u2019(?!\w)"
)
_PROMPT = re.compile(r"(\bprompts?\s*[:=]).*", re.IGNORECASE | re.DOTALL)
_NAME = re.compile(r"(?<![\w-])[A-Za-z]+(?:[_-][A-Za-z]+)+(?![\w-])")


@lru_cache(maxsize=512)
def meaning_of(text: str) -> Meaning | None:
    """Return the meaning of an error message, or None if no phrase matches.

    >>> meaning_of("Your monthly limit exceeded, upgrade subscription now"), meaning_of("Something went wrong")
    ('plan', None)
    """
    message = _without_quotes(text)
    return next((meaning for meaning, pattern in _COMPILED if pattern.search(message)), None)


def names_full_queue(text: str) -> bool:
    """Return whether a refusal says that the account has as many orders at the API as it may have.

    >>> names_full_queue("Maximum 5 queued requests allowed."), names_full_queue("spam filter is enabled")
    (True, False)
    """
    return _QUEUE_IS_FULL.search(_without_quotes(text)) is not None


def queue_limit_of(text: str) -> int | None:
    """Return the number of orders that may be at the API at once, if a refusal names it.

    >>> queue_limit_of("You have 6 queued requests (maximum 5)"), queue_limit_of("Queue limit reached, wait 30 seconds")
    (5, None)
    """
    message = _without_quotes(text)
    match = next((match for match in (pattern.search(message) for pattern in _QUEUE_LIMITS) if match), None)
    return int(match[1]) or None if match else None


def names_unknown_model(text: str) -> bool:
    """Return whether an error message says that the API does not have the model of the order.

    >>> names_unknown_model("Model id not found"), names_unknown_model("The model id field is required.")
    (True, False)
    """
    return _UNKNOWN_MODEL.search(_without_quotes(text)) is not None


def _without_quotes(text: str) -> str:
    """Return an error message without quoted text and prompts, and with blanks for `_` and `-` in names.

    >>> _without_quotes('request_id 7 of "a lake" not found'), _without_quotes("No image for prompt: an empty wallet")
    ('request id 7 of not found', 'No image for prompt:')
    """
    if not text.lstrip().startswith(("{", "[")):  # in JSON everything is quoted
        unquoted = _QUOTED.sub(lambda match: "" if " " in match[0].strip() else match[0][1:-1], text)
        if unquoted.strip():
            text = " ".join(_PROMPT.sub(r"\1", unquoted).split())
    return _NAME.sub(lambda match: re.sub("[_-]", " ", match[0]), text)
