"""Each scenario by name: its answers, and how the worker reads them."""

import json
from typing import Any, get_args

import pytest

from worker.core import reply
from worker.sandbox.answers import Answer
from worker.sandbox.behaviour import Behaviour
from worker.sandbox.options import SandboxOptions
from worker.sandbox.scenarios import SCENARIOS, ScenarioName
from worker.vendor.replies import Question, parse

HOST = "http://127.0.0.1:9"
READY, LATER = 5.0, 20.0

# How the worker reads the first and the fifth fetch of a ready job.
FETCHED: dict[str, tuple[type[object], type[object]]] = {
    "failed": (reply.Failed, reply.Failed),
    "try-again": (reply.Failed, reply.Ready),
    "never": (reply.Processing, reply.Processing),
    "ready-at-once": (reply.Ready, reply.Ready),
    "forgotten": (reply.UnknownId, reply.UnknownId),
    "empty": (reply.Empty, reply.Ready),
    "no-output": (reply.Empty, reply.Empty),
    "only-future-links": (reply.Empty, reply.Empty),
    "new-words": (reply.Unread, reply.Unread),
    "inline-words": (reply.Empty, reply.Empty),
    "no-status": (reply.Unread, reply.Unread),
    "another-job": (reply.AnotherJob, reply.Ready),
    "error": (reply.ApiError, reply.ApiError),
    "busy": (reply.ApiDown, reply.Ready),
    "server-error": (reply.ApiDown, reply.Ready),
    "gateway": (reply.ApiDown, reply.Ready),
    "down": (reply.ApiDown, reply.Ready),
    "rate-limit": (reply.RateLimited, reply.Ready),
    "spam-filter": (reply.RateLimited, reply.Ready),
    "wrong-key": (reply.AccountRefused, reply.AccountRefused),
    "no-credits": (reply.AccountRefused, reply.AccountRefused),
    "monthly-limit": (reply.AccountRefused, reply.AccountRefused),
    "no-plan": (reply.AccountRefused, reply.AccountRefused),
}
REFUSED = ("queue-full", "not-taken", "refused-order", "unknown-model")
LOST = ("lost-closed", "lost-silent", "lost-cut", "lost-502", "lost-504")


def model(**options: Any) -> Behaviour:
    return Behaviour(SandboxOptions(**{"min_seconds": READY, "max_seconds": READY, "size": 16, **options}))


def ask(stand_in: Behaviour, path: str, now: float, **body: object) -> Answer:
    return stand_in.answer(path, {"key": "sandbox-key", **body}, now=now, origin=HOST)


def order(stand_in: Behaviour, scenario: str, path: str = "v3/text2img") -> dict[str, Any]:
    fields = json.loads(ask(stand_in, f"/api/{path}", 0.0, prompt="two words", samples=1, scenario=scenario).body)
    assert isinstance(fields, dict)
    return fields


def read(answer: Answer, remote_id: str) -> reply.Reply:
    return parse(answer.status, answer.headers, answer.body, Question(remote_id, 0.0))


@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name not in (*REFUSED, *LOST, "order-cut-early")])
def test_a_job_in_a_scenario_is_answered_as_expected(scenario: str) -> None:
    stand_in = model()
    order(stand_in, scenario)
    job = stand_in.latest(1)[0]

    early = read(ask(stand_in, f"/api/v3/fetch/{job.id}", READY / 2), job.id)
    answers = [read(ask(stand_in, f"/api/v3/fetch/{job.id}", READY), job.id) for _ in range(5)]

    first, last = FETCHED.get(scenario, (reply.Ready, reply.Ready))
    if scenario in ("queued", "try-again", "empty", "forgotten", "gateway"):
        assert isinstance(early, reply.Processing)
    assert isinstance(answers[0], first)
    assert isinstance(answers[-1], last)


@pytest.mark.parametrize("scenario", REFUSED)
def test_an_order_in_a_refusing_scenario_creates_no_job(scenario: str) -> None:
    stand_in = model()

    answer = order(stand_in, scenario)

    assert answer["status"] in ("error", "failed")
    assert scenario in SCENARIOS
    assert stand_in.latest(1) == []


def test_the_type_of_scenario_names_lists_all_scenarios() -> None:
    assert set(get_args(ScenarioName)) == set(SCENARIOS)
    assert all(scenario.about for scenario in SCENARIOS.values())


def test_an_unknown_scenario_is_refused_with_the_known_names() -> None:
    fields = order(model(), "unheard-of")

    assert list(fields["message"]) == ["scenario"]
    assert "try-again" in fields["message"]["scenario"][0]


def test_jobs_use_the_scenarios_of_the_stand_in_in_turn() -> None:
    stand_in = model(scenarios=("failed", "queue-full", "never"))

    answers = [order(stand_in, "") for _ in range(6)]

    assert [answer["status"] for answer in answers] == ["processing", "error", "processing"] * 2
    assert [job.scenario for job in stand_in.latest(9)] == ["never", "failed", "never", "failed"]


@pytest.mark.parametrize("scenario", ["wrong-key", "no-credits", "monthly-limit", "no-plan"])
def test_an_account_scenario_of_the_stand_in_applies_to_every_call(scenario: str) -> None:
    stand_in = model(scenarios=(scenario,))
    calls = [("/api/v3/text2img", {"prompt": "sea"}), ("/api/v3/fetch/1", {}), ("/api/v3/system_load", {})]

    answers = [json.loads(ask(stand_in, path, 0.0, **body).body) for path, body in calls]

    assert {answer["status"] for answer in answers} == {"error"}
    assert len({str(answer["message"]) for answer in answers}) == 1


@pytest.mark.parametrize(
    ("scenario", "moments"),
    [
        ("late-links", [(READY, False, 404), (READY + 9, False, 404), (LATER, False, 200)]),
        ("dead-links", [(READY, False, 404), (READY, True, 200), (LATER, False, 404)]),
        ("gone", [(READY, False, 404), (LATER, True, 404)]),
        ("forgotten", [(READY - 1, False, 404), (READY, False, 200)]),
        ("failed", [(READY, False, 404)]),
        ("", [(READY - 1, False, 404), (READY, False, 200), (READY, True, 200)]),
    ],
)
def test_links_work_as_the_scenario_says(scenario: str, moments: list[tuple[float, bool, int]]) -> None:
    stand_in = model()
    order(stand_in, scenario)
    name = stand_in.latest(1)[0].files[0]

    statuses = []
    for now, proxy, _ in moments:
        file = stand_in.file(name, now=now, proxy=proxy)
        statuses.append(file.status if file else None)

    assert statuses == [status for _, _, status in moments]


def test_the_answer_to_an_order_is_modified_as_the_scenario_says() -> None:
    answers = {
        name: order(model(), name) for name in ("other-id", "no-id", "no-fetch-result", "long-eta", "eta-in-words")
    }

    assert answers["other-id"]["fetch_result"].rpartition("/")[2] != str(answers["other-id"]["id"])
    assert "id" not in answers["no-id"]
    assert answers["no-id"]["fetch_result"].endswith("/12202888")
    assert "fetch_result" not in answers["no-fetch-result"]
    assert (answers["long-eta"]["eta"], answers["eta-in-words"]["eta"]) == (99_999, "30 Minutes")
    assert order(model(), "ready-at-once")["status"] == "success"
