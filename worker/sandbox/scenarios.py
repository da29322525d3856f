"""Scenarios: what goes otherwise than it should, by name, as the documents of the API and captured answers show it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from worker.sandbox.answers import Answer, invalid_field, invalid_key, json_answer, page_answer, unknown_id
from worker.sandbox.files import base64_text
from worker.sandbox.jobs import Job, failed

TURNS = 3  # how often a trouble that passes is answered
LATE_SECONDS = 10.0  # how long a link of `late-links` is missing
QUEUE_FULL_SECONDS = 30

ScenarioName = Literal[
    "failed", "try-again", "never", "ready-at-once", "forgotten", "empty", "no-output", "only-future-links",
    "output-url", "new-words", "wrong-words", "inline-words", "nested-output", "one-text", "inline-base64", "no-status",
    "queued", "another-job", "other-id", "no-id", "no-fetch-result", "no-eta", "long-eta", "eta-in-words",
    "late-links", "dead-links", "gone", "nsfw", "error", "busy", "server-error", "gateway", "down", "rate-limit",
    "spam-filter", "queue-full", "not-taken", "refused-order", "unknown-model", "wrong-key", "no-credits",
    "monthly-limit", "no-plan",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Look:
    """One fetch of a job: `turn` counts those since it became ready, from 0; `body` is what it is answered else."""

    job: Job
    turn: int
    ready: bool
    body: Mapping[str, Any]
    now: float
    origin: str

    @property
    def early(self) -> bool:
        """Return whether a trouble that passes is still there."""
        return self.ready and self.turn < TURNS


Fetched = Callable[[Look], Answer | None]
Accepted = Callable[[Job, dict[str, Any], str], dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One scenario. What it leaves out is as usual.

    `order` refuses orders, `accepted` changes the answer to an order, `fetched` the answers to fetches. `file` gives
    the HTTP status of outputs (0: as usual), from the seconds since the job was ready, and whether the proxy is asked.
    `account` answers every keyed call, where the stand-in plays the scenario for all jobs.
    """

    about: str
    order: Callable[[], Answer] | None = None
    account: Callable[[], Answer] | None = None
    accepted: Accepted | None = None
    fetched: Fetched | None = None
    file: Callable[[float, bool], int] | None = None
    seconds: float | None = None  # from the order until the job is ready


def check_scenario(name: str) -> None:
    """Raise ValueError for a name that is no scenario's."""
    if name not in SCENARIOS:
        raise ValueError(f"the scenario must be one of {', '.join(SCENARIOS)}, not {name!r}")


def _error(message: str, status: int = 200, **more: object) -> Callable[[], Answer]:
    return lambda: json_answer({"status": "error", "message": message, **more}, status)


def _while_early(answer: Callable[[], Answer]) -> Fetched:
    return lambda look: answer() if look.early else None


def _once_ready(answer: Callable[[Look], Answer]) -> Fetched:
    return lambda look: answer(look) if look.ready else None


def _success(look: Look, **fields: object) -> Answer:
    return json_answer({"status": "success", "id": look.job.spoken_id, **fields})


def _empty(look: Look) -> Answer:
    body = {name: value for name, value in look.body.items() if "links" not in name}
    return json_answer({**body, "output": []})


def _account(answer: Callable[[], Answer]) -> dict[str, Any]:
    return {"account": answer, "fetched": lambda _: answer()}


def _queued(look: Look) -> Answer | None:
    if look.ready:
        return None
    ahead = {"queue_size": 2, "estimated_time": 5, "links": look.job.links(look.origin)}
    return json_answer({"status": "queued", "message": "Request has been queued", **ahead})


def _another_job(look: Look) -> Answer | None:
    return json_answer({**look.body, "id": f"{look.job.id}9"}) if look.ready and look.turn == 0 else None


def _misleading(look: Look) -> Answer:
    words = "rate limit exceeded, invalid api key, request not found, insufficient credits, failed"
    return json_answer({**look.body, "meta": {"prompt": words, "status": "failed"}, "tip": f"Words only: {words}"})


def _inline_words(look: Look) -> Answer:
    words = [{"word": word, "start": place / 2} for place, word in enumerate(look.job.prompt.split() or ["Nothing"])]
    return _success(look, output=[{"text": look.job.prompt or "Nothing", "words": words}])


def _nested(look: Look) -> Answer:
    inner = {"status": "success", "output": look.job.links(look.origin)}
    return _success(look, output={**inner, "proxy_links": look.job.proxy_links(look.origin)})


def _inline_base64(look: Look) -> Answer:
    texts = [base64_text(look.job.prompt, look.job.id, place, look.job.size) for place in range(len(look.job.files))]
    return _success(look, output=[text.decode() for text in texts])


def _without(*names: str) -> Accepted:
    return lambda job, body, origin: {name: value for name, value in body.items() if name not in names}


def _with(**fields: object) -> Accepted:
    return lambda job, body, origin: {**body, **fields}


def _other_id(job: Job, body: dict[str, Any], origin: str) -> dict[str, Any]:
    return {**body, "fetch_result": job.fetch_result(origin).replace(job.id, "134701497"), "id": job.spoken_id}


def _nameless(job: Job, body: dict[str, Any], origin: str) -> dict[str, Any]:
    return {**_without("id")(job, body, origin), "fetch_result": job.fetch_result(origin)}


SCENARIOS: Mapping[str, Scenario] = {
    "failed": Scenario(
        about="the job fails, and that is final; a training says training_failed",
        fetched=_once_ready(lambda look: json_answer(failed(look.job))),
        file=lambda since, proxy: 404,
    ),
    "try-again": Scenario(
        about="three times failed with the words Try Again, then a success",
        fetched=_while_early(
            lambda: json_answer({"status": "failed", "id": "", "message": "Failed, Try Again", "output": ""})
        ),
    ),
    "never": Scenario(about="the job is never ready", seconds=float("inf")),
    "ready-at-once": Scenario(about="the answer to the order has the outputs", seconds=0.0),
    "forgotten": Scenario(
        about="Request not found, once the job is ready; its future links have the outputs",
        fetched=_once_ready(lambda look: unknown_id()),
    ),
    "empty": Scenario(
        about="three successes without an output, then one with",
        fetched=lambda look: _empty(look) if look.early else None,
    ),
    "no-output": Scenario(about="a success without an output, for ever", fetched=_once_ready(_empty)),
    "only-future-links": Scenario(
        about="a success whose only links are under future_links",
        fetched=_once_ready(lambda look: _success(look, output=[], future_links=look.job.links(look.origin))),
    ),
    "output-url": Scenario(
        about="a success whose only link is under output_url",
        fetched=_once_ready(lambda look: _success(look, output="", output_url=look.job.links(look.origin)[0])),
    ),
    "new-words": Scenario(
        about="status done, links under assets",
        fetched=_once_ready(lambda look: json_answer({"status": "done", "assets": look.job.links(look.origin)})),
    ),
    "wrong-words": Scenario(
        about="a success whose other fields have the words of every trouble", fetched=_once_ready(_misleading)
    ),
    "inline-words": Scenario(about="the words of a transcript in place of a link", fetched=_once_ready(_inline_words)),
    "nested-output": Scenario(about="output is an object with output and proxy_links", fetched=_once_ready(_nested)),
    "one-text": Scenario(
        about="output is one text",
        fetched=_once_ready(lambda look: _success(look, output=look.job.links(look.origin)[0])),
    ),
    "inline-base64": Scenario(about="output is base64 text, not links", fetched=_once_ready(_inline_base64)),
    "no-status": Scenario(
        about="a success without a status, links in place of output",
        fetched=_once_ready(lambda look: json_answer({"id": look.job.spoken_id, "links": look.job.links(look.origin)})),
    ),
    "queued": Scenario(about="status queued, with links that are not there yet", fetched=_queued),
    "another-job": Scenario(about="the first success is about another job", fetched=_another_job),
    "other-id": Scenario(about="fetch_result names another id than id", accepted=_other_id),
    "no-id": Scenario(about="the id is in fetch_result alone", accepted=_nameless),
    "no-fetch-result": Scenario(about="an id, and no word where to fetch", accepted=_without("fetch_result")),
    "no-eta": Scenario(about="no estimate", accepted=_without("eta")),
    "long-eta": Scenario(about="an estimate of more than a day", accepted=_with(eta=99_999)),
    "eta-in-words": Scenario(about="an estimate in words", accepted=_with(eta="30 Minutes")),
    "late-links": Scenario(
        about="links are 404 for ten seconds after the success",
        file=lambda since, proxy: 404 if since < LATE_SECONDS else 0,
    ),
    "dead-links": Scenario(
        about="links are 404, those under proxy_links have the outputs",
        fetched=_once_ready(lambda look: json_answer({**look.body, "proxy_links": look.job.proxy_links(look.origin)})),
        file=lambda since, proxy: 0 if proxy else 404,
    ),
    "gone": Scenario(about="all links are 404", file=lambda since, proxy: 404),
    "nsfw": Scenario(
        about="a success that was found not safe for work",
        fetched=_once_ready(lambda look: json_answer({**look.body, "nsfw_content_detected": True})),
    ),
    "error": Scenario(
        about="an error about the order: Model id not found",
        fetched=_once_ready(lambda look: _error("Model id not found")()),
    ),
    "busy": Scenario(
        about="three errors about the service",
        fetched=_while_early(_error("Service is not available, try again later")),
    ),
    "server-error": Scenario(
        about="three times HTTP 500 without a status",
        fetched=_while_early(lambda: json_answer({"message": "Server Error"}, 500)),
    ),
    "gateway": Scenario(
        about="three pages of a gateway", fetched=_while_early(lambda: page_answer(502, "Bad gateway"))
    ),
    "down": Scenario(
        about="three times HTTP 503",
        fetched=_while_early(_error("Service temporarily unavailable. Please try again later.", 503)),
    ),
    "rate-limit": Scenario(
        about="three times HTTP 429 with retry_after",
        fetched=_while_early(_error("Rate limit exceeded", 429, retry_after=2)),
    ),
    "spam-filter": Scenario(
        about="once HTTP 200, a limit that asks to wait 30 seconds",
        fetched=lambda look: (
            _error("Rate limit exceeded", tips="spam filter: please wait for 30 seconds")()
            if look.ready and look.turn == 0
            else None
        ),
    ),
    "queue-full": Scenario(
        about="orders are refused: as many wait as the plan allows",
        order=_error("Rate limit exceeded. Maximum 5 queued requests allowed.", 429, retry_after=QUEUE_FULL_SECONDS),
    ),
    "not-taken": Scenario(
        about="orders fail with the words Try Again: no job was taken",
        order=lambda: json_answer({"status": "failed", "id": "", "message": "Failed, Try Again", "output": ""}),
    ),
    "refused-order": Scenario(
        about="orders are refused for a field", order=lambda: invalid_field("prompt", "The prompt field is required.")
    ),
    "unknown-model": Scenario(about="orders are refused for their model", order=_error("Model id not found")),
    "wrong-key": Scenario(about="the key is not taken", **_account(invalid_key)),
    "no-credits": Scenario(
        about="HTTP 402: no credits",
        **_account(_error("Insufficient credits. Please add more credits to continue.", 402)),
    ),
    "monthly-limit": Scenario(
        about="the plan has run out for this month",
        **_account(_error("Your monthly limit exceeded, upgrade subscription now")),
    ),
    "no-plan": Scenario(
        about="HTTP 403: not in this plan", **_account(_error("This feature requires a premium subscription", 403))
    ),
}
