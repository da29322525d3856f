"""Scenarios: named deviations from normal behaviour, from the API's documentation and captured answers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from worker.sandbox.answers import (
    Answer,
    invalid_field,
    invalid_key,
    json_answer,
    page_answer,
    queue_full,
    unknown_id,
)
from worker.sandbox.files import base64_text
from worker.sandbox.jobs import SandboxJob, failed_answer

TROUBLE_FETCHES = 3  # number of fetches that a temporary trouble lasts
MISSING_LINKS_SECONDS = 10.0  # how long the links of `late-links` are missing

ScenarioName = Literal[
    "failed", "try-again", "never", "ready-at-once", "forgotten", "empty", "no-output", "only-future-links",
    "output-url", "new-words", "wrong-words", "inline-words", "nested-output", "one-text", "inline-base64", "no-status",
    "queued", "another-job", "other-id", "no-id", "no-fetch-result", "no-eta", "long-eta", "eta-in-words",
    "late-links", "dead-links", "gone", "nsfw", "error", "busy", "server-error", "gateway", "down", "rate-limit",
    "spam-filter", "queue-full", "not-taken", "refused-order", "unknown-model", "wrong-key", "no-credits",
    "monthly-limit", "no-plan", "lost-closed", "lost-silent", "lost-cut", "lost-502", "lost-504", "order-cut-early",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class FetchCall:
    """One fetch of a job. `ready_fetches` counts earlier fetches since it became ready. `body` is the usual answer."""

    job: SandboxJob
    ready_fetches: int
    ready: bool
    body: Mapping[str, Any]
    now: float
    origin: str

    @property
    def in_trouble(self) -> bool:
        """Whether a temporary trouble is still present."""
        return self.ready and self.ready_fetches < TROUBLE_FETCHES

    @property
    def links(self) -> list[str]:
        """The URLs of the outputs."""
        return self.job.links(self.origin)

    @property
    def success(self) -> dict[str, Any]:
        """The beginning of an answer with outputs."""
        return {"status": "success", "id": self.job.answer_id}


FetchAnswer = Callable[[FetchCall], Answer | None]
ModifyOrderAnswer = Callable[[SandboxJob, dict[str, Any], str], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Scenario:
    """One scenario. Parts that are not set behave normally.

    `order` refuses orders, `accepted` modifies the answer to an order, `fetched` answers fetches. `file` returns the
    HTTP status of outputs (0: normal), given the seconds since the job was ready and whether the proxy path is used.
    `account` answers every call with a key, if the stand-in uses the scenario for all jobs. `sent` changes how the
    answer to an order that was taken is sent. `cut_early` closes the connection of an order before it is read, if the
    stand-in uses the scenario for all jobs.
    """

    about: str
    order: Callable[[], Answer] | None = None
    account: Callable[[], Answer] | None = None
    accepted: ModifyOrderAnswer | None = None
    fetched: FetchAnswer | None = None
    file: Callable[[float, bool], int] | None = None
    seconds: float | None = None  # duration of the job
    sent: Callable[[Answer], Answer] | None = None
    cut_early: bool = False


def check_scenario(name: str) -> None:
    """Raise ValueError for an unknown scenario."""
    if name not in SCENARIOS:
        raise ValueError(f"the scenario must be one of {', '.join(SCENARIOS)}, not {name!r}")


def scenario_of(name: str) -> Scenario:
    """Return a scenario by its name. The one without a name is the normal behaviour."""
    return SCENARIOS[name] if name else _NORMAL


def _error(message: str, status: int = 200, **fields: object) -> Callable[[], Answer]:
    return lambda: json_answer({"status": "error", "message": message, **fields}, status)


def _when_ready(about: str, fields: Callable[[FetchCall], dict[str, Any]], **parts: Any) -> Scenario:
    """Return a scenario with another answer about a ready job."""
    return Scenario(about, fetched=lambda call: json_answer(fields(call)) if call.ready else None, **parts)


def _trouble(about: str, answer: Callable[[], Answer]) -> Scenario:
    """Return a scenario with a temporary trouble as soon as the job is ready."""
    return Scenario(about, fetched=lambda call: answer() if call.in_trouble else None)


def _account(about: str, answer: Callable[[], Answer]) -> Scenario:
    """Return a scenario that concerns all calls with a key."""
    return Scenario(about, account=answer, fetched=lambda _: answer())


def _first_time(answer: Callable[[FetchCall], Answer]) -> FetchAnswer:
    return lambda call: answer(call) if call.ready and call.ready_fetches == 0 else None


def _without(*names: str) -> ModifyOrderAnswer:
    return lambda job, body, origin: {name: value for name, value in body.items() if name not in names}


def _with(**fields: object) -> ModifyOrderAnswer:
    return lambda job, body, origin: {**body, **fields}


def _closed(answer: Answer) -> Answer:
    return replace(answer, lost="closed")


def _cut(answer: Answer) -> Answer:
    headers = {**answer.headers, "Content-Length": str(len(answer.body))}
    return replace(answer, headers=headers, body=answer.body[: len(answer.body) // 2])


def _try_again() -> Answer:
    return json_answer({"status": "failed", "id": "", "message": "Failed, Try Again", "output": ""})


def _without_output(call: FetchCall) -> dict[str, Any]:
    return {**{name: value for name, value in call.body.items() if "links" not in name}, "output": []}


def _queued(call: FetchCall) -> Answer | None:
    queue_state = {"queue_size": 2, "estimated_time": 5, "links": call.links}
    body = {"status": "queued", "message": "Request has been queued", **queue_state}
    return None if call.ready else json_answer(body)


def _misleading_words(call: FetchCall) -> dict[str, Any]:
    words = "rate limit exceeded, invalid api key, request not found, insufficient credits, failed"
    return {**call.body, "meta": {"prompt": words, "status": "failed"}, "tip": f"Words only: {words}"}


def _inline_words(call: FetchCall) -> dict[str, Any]:
    words = [{"word": word, "start": index / 2} for index, word in enumerate(call.job.prompt.split() or ["Nothing"])]
    return {**call.success, "output": [{"text": call.job.prompt or "Nothing", "words": words}]}


def _nested_output(call: FetchCall) -> dict[str, Any]:
    links = {"output": call.links, "proxy_links": call.job.proxy_links(call.origin)}
    return {**call.success, "output": {"status": "success", **links}}


def _inline_base64(call: FetchCall) -> dict[str, Any]:
    job = call.job
    texts = [base64_text(job.prompt, job.id, index, job.size).decode() for index in range(len(job.files))]
    return {**call.success, "output": texts}


def _other_id(job: SandboxJob, body: dict[str, Any], origin: str) -> dict[str, Any]:
    return {**body, "fetch_result": job.fetch_result(origin).replace(job.id, "134701497"), "id": job.answer_id}


def _id_only_in_fetch_result(job: SandboxJob, body: dict[str, Any], origin: str) -> dict[str, Any]:
    return {**_without("id")(job, body, origin), "fetch_result": job.fetch_result(origin)}


_NORMAL = Scenario("normal behaviour")
SCENARIOS: Mapping[str, Scenario] = {
    "failed": _when_ready(
        "the job fails permanently; a training says training_failed",
        lambda call: failed_answer(call.job),
        file=lambda seconds, proxy: 404,
    ),
    "try-again": _trouble("three times failed with the message Try Again, then a success", _try_again),
    "never": Scenario("the job is never ready", seconds=float("inf")),
    "ready-at-once": Scenario("the answer to the order already has the outputs", seconds=0.0),
    "forgotten": Scenario(
        "Request not found, as soon as the job is ready; its future links have the outputs",
        fetched=lambda call: unknown_id() if call.ready else None,
    ),
    "empty": Scenario(
        "three successes without an output, then one with it",
        fetched=lambda call: json_answer(_without_output(call)) if call.in_trouble else None,
    ),
    "no-output": _when_ready("a success without an output, forever", _without_output),
    "only-future-links": _when_ready(
        "a success whose only links are under future_links",
        lambda call: {**call.success, "output": [], "future_links": call.links},
    ),
    "output-url": _when_ready(
        "a success whose only link is under output_url",
        lambda call: {**call.success, "output": "", "output_url": call.links[0]},
    ),
    "new-words": _when_ready("status done, links under assets", lambda call: {"status": "done", "assets": call.links}),
    "wrong-words": _when_ready("a success whose other fields contain error messages", _misleading_words),
    "inline-words": _when_ready("the words of a transcript instead of a link", _inline_words),
    "nested-output": _when_ready("output is an object with output and proxy_links", _nested_output),
    "one-text": _when_ready("output is a single text", lambda call: {**call.success, "output": call.links[0]}),
    "inline-base64": _when_ready("output is base64 text, not links", _inline_base64),
    "no-status": _when_ready(
        "a success without a status, with links instead of output",
        lambda call: {"id": call.job.answer_id, "links": call.links},
    ),
    "queued": Scenario("status queued, with links that do not exist yet", fetched=_queued),
    "another-job": Scenario(
        "the first success is about another job",
        fetched=_first_time(lambda call: json_answer({**call.body, "id": f"{call.job.id}9"})),
    ),
    "other-id": Scenario("fetch_result has another id than the field id", accepted=_other_id),
    "no-id": Scenario("the id is only in fetch_result", accepted=_id_only_in_fetch_result),
    "no-fetch-result": Scenario("an id, but no fetch_result", accepted=_without("fetch_result")),
    "no-eta": Scenario("no estimate", accepted=_without("eta")),
    "long-eta": Scenario("an estimate of more than a day", accepted=_with(eta=99_999)),
    "eta-in-words": Scenario("an estimate in words", accepted=_with(eta="30 Minutes")),
    "late-links": Scenario(
        "links are 404 for ten seconds after the success",
        file=lambda seconds, proxy: 404 if seconds < MISSING_LINKS_SECONDS else 0,
    ),
    "dead-links": _when_ready(
        "links are 404; the links under proxy_links have the outputs",
        lambda call: {**call.body, "proxy_links": call.job.proxy_links(call.origin)},
        file=lambda seconds, proxy: 0 if proxy else 404,
    ),
    "gone": Scenario("all links are 404", file=lambda seconds, proxy: 404),
    "nsfw": _when_ready(
        "a success that is marked as not safe for work", lambda call: {**call.body, "nsfw_content_detected": True}
    ),
    "error": _when_ready(
        "an error about the order: Model id not found",
        lambda call: {"status": "error", "message": "Model id not found"},
    ),
    "busy": _trouble("three errors of the service", _error("Service is not available, try again later")),
    "server-error": _trouble(
        "three times HTTP 500 without a status", lambda: json_answer({"message": "Server Error"}, 500)
    ),
    "gateway": _trouble("three HTML error pages of a gateway", lambda: page_answer(502, "Bad gateway")),
    "down": _trouble("three times HTTP 503", _error("Service temporarily unavailable. Please try again later.", 503)),
    "rate-limit": _trouble("three times HTTP 429 with retry_after", _error("Rate limit exceeded", 429, retry_after=2)),
    "spam-filter": Scenario(
        "once HTTP 200 with a rate limit that asks to wait 30 seconds",
        fetched=_first_time(
            lambda call: _error("Rate limit exceeded", tips="spam filter: please wait for 30 seconds")()
        ),
    ),
    "queue-full": Scenario(
        "orders are refused because as many wait as the plan allows",
        order=lambda: queue_full(5),
    ),
    "not-taken": Scenario("orders fail with the message Try Again, and no job is created", order=_try_again),
    "refused-order": Scenario(
        "orders are refused because of a field", order=lambda: invalid_field("prompt", "The prompt field is required.")
    ),
    "unknown-model": Scenario("orders are refused because of their model", order=_error("Model id not found")),
    "wrong-key": _account("the key is refused", invalid_key),
    "no-credits": _account(
        "HTTP 402: no credits", _error("Insufficient credits. Please add more credits to continue.", 402)
    ),
    "monthly-limit": _account(
        "the plan's monthly limit is reached", _error("Your monthly limit exceeded, upgrade subscription now")
    ),
    "no-plan": _account(
        "HTTP 403: the plan does not include it", _error("This feature requires a premium subscription", 403)
    ),
    "lost-closed": Scenario("orders are taken, and the connection is closed without an answer", sent=_closed),
    "lost-silent": Scenario(
        "orders are taken, and no answer comes until the client gives up",
        sent=lambda answer: replace(answer, lost="stalled"),
    ),
    "lost-cut": Scenario("orders are taken, and the answer is cut in the middle", sent=_cut),
    "lost-502": Scenario(
        "orders are taken, and the answer is an HTML page with HTTP 502", sent=lambda _: page_answer(502, "Bad gateway")
    ),
    "lost-504": Scenario(
        "orders are taken, and the answer is an HTML page with HTTP 504",
        sent=lambda _: page_answer(504, "Gateway time-out"),
    ),
    "order-cut-early": Scenario(
        "the connection is closed before an order is read, and no job is created",
        order=lambda: _closed(json_answer({})),
        cut_early=True,
    ),
}
