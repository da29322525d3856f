"""Candidates for an uncertain order, from a stand-in or another server in place of the API."""

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from sqlalchemy import Engine, update

from tests.planted import add_breaker, add_open_breaker
from tests.planted_orders import add_uncertain
from tests.rows import NOW, add_job
from tests.web import Answer, Web, page
from worker.client import attach_candidates as module
from worker.client.attach_candidates import MAX_CANDIDATES, MAX_LINKS, MAX_PAGES, Candidates, attach_candidates
from worker.client.connection import loaded_settings
from worker.coordination.rate_limiter import RateLimiter
from worker.errors import JobNotFound, NotTrackable, RefusedAddress, Unavailable
from worker.sandbox import Sandbox, SandboxOptions
from worker.store.schema import jobs

KEY = "sk/canary+7f3a-0123456789"
FIRST, SECOND = "/api/v6/assets_generated", "/api/assets_generated"
VIDEO = "v6/video/text2video"


@pytest.fixture
def settings_of(configured_sqlite: Engine, monkeypatch: pytest.MonkeyPatch, redis_url: str) -> Any:
    """Return a function that points the settings to an API."""

    def use(url: str, **variables: str) -> None:
        values = {"SD_API_URL": url, "SD_API_KEY": KEY, "REDIS_URL": redis_url, "SD_API_RPS": "1000", **variables}
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        loaded_settings.cache_clear()

    RateLimiter(redis_url)._client.flushall()
    return use


@pytest.fixture
def sandbox(settings_of: Any) -> Iterator[Sandbox]:
    """A stand-in in place of the API. Its jobs are ready at once."""
    with Sandbox(SandboxOptions(key=KEY, min_seconds=0, max_seconds=0, size=32)) as running:
        settings_of(running.url)
        yield running


@pytest.fixture
def api(web: Web, settings_of: Any) -> Web:
    """A server in place of the API. A test sets its answers."""
    settings_of(f"{web.url}/api/v3")
    return web


def uncertain(engine: Engine, **changes: Any) -> int:
    with engine.begin() as connection:
        return add_uncertain(connection, **changes)


def answers(body: object, status: int = 200) -> Answer:
    return page(status, body if isinstance(body, bytes) else json.dumps(body).encode())


def ids(candidates: Candidates) -> list[str]:
    return [candidate.remote_id for candidate in candidates.found]


# ── candidates ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_given_a_lost_answer_then_the_unknown_outputs_are_offered_and_none_is_attached(
    configured_sqlite: Engine, sandbox: Sandbox
) -> None:
    known, lost, other = (sandbox.submit("a lake", family="v6/images/text2img", samples=2) for _ in range(3))
    sandbox.submit("a film", family=VIDEO)
    with configured_sqlite.begin() as connection:
        add_job(connection, str(known["id"]))
        add_job(connection, str(other["id"]), account="shop")

    candidates = attach_candidates(job_id := uncertain(configured_sqlite))

    assert set(ids(candidates)) == {str(lost["id"]), str(other["id"])}
    assert (candidates.job_id, candidates.known, candidates.output_type) == (job_id, 1, "image")
    assert candidates.sent_at is not None
    own = next(candidate for candidate in candidates.found if candidate.remote_id == str(lost["id"]))
    assert (own.outputs, list(own.links)) == (2, lost["output"])
    assert own.created_at is not None
    with configured_sqlite.connect() as connection:
        assert connection.execute(jobs.select().where(jobs.c.id == job_id)).one().status == "uncertain"
    assert sandbox.calls.by_path == {FIRST: 1}


def test_given_an_order_of_a_video_then_only_videos_are_offered(configured_sqlite: Engine, sandbox: Sandbox) -> None:
    sandbox.submit("a lake")
    film = sandbox.submit("a film", family=VIDEO)

    candidates = attach_candidates(uncertain(configured_sqlite, endpoint=VIDEO, kind="video"))

    assert (ids(candidates), candidates.output_type) == ([str(film["id"])], "video")


def test_given_many_known_outputs_then_later_pages_are_asked_for(configured_sqlite: Engine, sandbox: Sandbox) -> None:
    submitted = [str(sandbox.submit("a lake")["id"]) for _ in range(45)]
    with configured_sqlite.begin() as connection:
        for remote_id in submitted[3:]:
            add_job(connection, remote_id)

    candidates = attach_candidates(uncertain(configured_sqlite))

    assert set(ids(candidates)) == set(submitted[:3])
    assert candidates.known == 42
    assert sandbox.calls.by_path[FIRST] == 3


def test_given_many_unknown_outputs_then_the_newest_are_offered(configured_sqlite: Engine, api: Web) -> None:
    rows = [{"id": number, "output": [], "created_at": f"2026-05-01T10:00:{number:02d}Z"} for number in range(1, 60)]
    api.serves(FIRST, answers({"data": rows}))

    candidates = attach_candidates(uncertain(configured_sqlite))

    assert ids(candidates) == [str(number) for number in range(59, 59 - MAX_CANDIDATES, -1)]
    assert len(api.requests) == 1


def test_given_outputs_without_times_then_the_order_of_the_api_stays(configured_sqlite: Engine, api: Web) -> None:
    links = [f"https://h/{number}.png" for number in range(MAX_LINKS + 5)]
    api.serves(FIRST, answers([{"id": "b"}, {"id": 7, "output": links}, {"id": "a", "created_at": "2026-05-01"}]))

    candidates = attach_candidates(uncertain(configured_sqlite))

    assert ids(candidates) == ["b", "7", "a"]
    assert (candidates.found[1].outputs, candidates.found[1].links) == (MAX_LINKS + 5, tuple(links[:MAX_LINKS]))


def test_given_an_api_that_ignores_the_page_then_it_is_asked_twice(configured_sqlite: Engine, api: Web) -> None:
    api.serves(FIRST, answers([{"id": 7}]))

    assert ids(attach_candidates(uncertain(configured_sqlite))) == ["7"]
    assert [json.loads(request.body) for request in api.requests] == [
        {"key": KEY, "type": "image"},
        {"key": KEY, "type": "image", "page": 2},
    ]


def test_given_an_endless_list_of_known_outputs_then_few_pages_are_asked_for(
    configured_sqlite: Engine, api: Web
) -> None:
    def answer(client: Any) -> None:
        answers([{"id": f"p{len(api.requests)}"}])(client)

    api.serves(FIRST, answer)
    with configured_sqlite.begin() as connection:
        for number in range(20):
            add_job(connection, f"p{number}")

    candidates = attach_candidates(uncertain(configured_sqlite))

    assert (candidates.found, candidates.known) == ((), MAX_PAGES)
    assert len(api.requests) == MAX_PAGES


@pytest.mark.parametrize("second", [answers({"message": "no"}, 500), answers(b"garbage"), answers([])])
def test_given_a_second_page_that_fails_then_the_first_one_is_of_use(
    configured_sqlite: Engine, api: Web, second: Answer
) -> None:
    def answer(client: Any) -> None:
        (answers([{"id": 7}]) if len(api.requests) == 1 else second)(client)

    api.serves(FIRST, answer)

    assert ids(attach_candidates(uncertain(configured_sqlite))) == ["7"]


@pytest.mark.parametrize(
    "missing", [answers(b"<html>404</html>", 404), answers(b"", 405), answers(b"<html>shop</html>")]
)
def test_given_no_list_at_the_first_path_then_the_other_one_is_asked(
    configured_sqlite: Engine, api: Web, missing: Answer
) -> None:
    api.serves(FIRST, missing)
    api.serves(SECOND, answers({"data": [{"id": 7}], "last_page": 1}))

    assert ids(attach_candidates(uncertain(configured_sqlite))) == ["7"]
    assert [request.path for request in api.requests] == [FIRST, SECOND]


def test_given_an_empty_list_then_there_are_no_candidates(configured_sqlite: Engine, sandbox: Sandbox) -> None:
    candidates = attach_candidates(uncertain(configured_sqlite))

    assert (candidates.found, candidates.known) == ((), 0)


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_given_a_job_that_is_missing_or_not_uncertain_then_nothing_is_asked(
    configured_sqlite: Engine, sandbox: Sandbox
) -> None:
    with configured_sqlite.begin() as connection:
        tracked = add_job(connection, "1")
        attached = add_uncertain(connection)
        connection.execute(update(jobs).where(jobs.c.id == attached).values(status="pending", due_at=NOW))

    with pytest.raises(JobNotFound):
        attach_candidates(4_711)
    for job_id in (tracked, attached):
        with pytest.raises(NotTrackable, match=f"job {job_id} is not uncertain"):
            attach_candidates(job_id)
    assert not sandbox.calls.by_path


@pytest.mark.parametrize("endpoint", ["v3/fine_tune", "v6/voice/speech_to_text", "v6/3d/text_to_3d"])
def test_given_an_order_that_makes_nothing_that_is_listed_then_nothing_is_asked(
    configured_sqlite: Engine, sandbox: Sandbox, endpoint: str
) -> None:
    with pytest.raises(NotTrackable, match="makes something else"):
        attach_candidates(uncertain(configured_sqlite, endpoint=endpoint))
    assert not sandbox.calls.by_path


def test_given_no_key_for_the_account_then_that_is_said(configured_sqlite: Engine, sandbox: Sandbox) -> None:
    with pytest.raises(Unavailable, match="no key for account shop: set SD_API_KEY"):
        attach_candidates(uncertain(configured_sqlite, account="shop"))


@pytest.mark.parametrize("scope", ["account", "host"])
def test_given_a_held_account_or_host_then_nothing_is_asked(
    configured_sqlite: Engine, sandbox: Sandbox, scope: str
) -> None:
    name = "default" if scope == "account" else sandbox.root_url.removeprefix("http://")
    with configured_sqlite.begin() as connection:
        add_open_breaker(connection, scope, name, "key rejected: Invalid Api Key")

    with pytest.raises(Unavailable, match=rf"the {scope} {name} is held \(key rejected: Invalid Api Key\)"):
        attach_candidates(uncertain(configured_sqlite))
    assert not sandbox.calls.by_path


def test_given_a_used_up_request_budget_then_it_is_kept(
    configured_sqlite: Engine, sandbox: Sandbox, settings_of: Any, monkeypatch: pytest.MonkeyPatch, redis_url: str
) -> None:
    settings_of(sandbox.url, SD_API_RPS="0.5")
    monkeypatch.setattr(module, "BUDGET_SECONDS", 0.2)
    RateLimiter(redis_url).take("default", 9, rate=0.5)

    with pytest.raises(Unavailable, match="the request budget of account default is used up"):
        attach_candidates(uncertain(configured_sqlite))
    assert not sandbox.calls.by_path


def test_given_a_learned_rate_then_the_requests_keep_it(
    configured_sqlite: Engine, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, redis_url: str
) -> None:
    monkeypatch.setattr(module, "BUDGET_SECONDS", 0.2)
    with configured_sqlite.begin() as connection:
        add_breaker(connection, "account", "default", ceiling=0.2)
    RateLimiter(redis_url).take("default", 9, rate=0.2)

    with pytest.raises(Unavailable, match="used up"):
        attach_candidates(uncertain(configured_sqlite))


def test_given_a_host_that_is_not_allowed_any_more_then_it_does_not_get_the_key(
    configured_sqlite: Engine, sandbox: Sandbox
) -> None:
    with pytest.raises(RefusedAddress, match="SD_API_HOSTS"):
        attach_candidates(uncertain(configured_sqlite, endpoint="https://evil.test/api/v6/images/text2img"))


def test_given_an_api_that_does_not_answer_then_that_is_said(configured_sqlite: Engine, settings_of: Any) -> None:
    settings_of("http://127.0.0.1:9/api/v3")

    with pytest.raises(Unavailable, match="no answer"):
        attach_candidates(uncertain(configured_sqlite))


def test_given_no_list_at_either_path_then_that_is_said(configured_sqlite: Engine, api: Web) -> None:
    with pytest.raises(Unavailable, match="the API has no list of recent outputs for account default"):
        attach_candidates(uncertain(configured_sqlite))
    assert [request.path for request in api.requests] == [FIRST, SECOND]


def test_given_a_wrong_key_then_the_refusal_has_the_words_of_the_api(
    configured_sqlite: Engine, sandbox: Sandbox
) -> None:
    sandbox.options_now(key="another-key")

    with pytest.raises(Unavailable, match="does not give its list of recent outputs: Invalid Api Key"):
        attach_candidates(uncertain(configured_sqlite))
    assert sandbox.calls.by_path == {FIRST: 1}


@pytest.mark.parametrize("form", [KEY, quote(KEY, safe=""), KEY[:16]])
def test_given_a_refusal_with_the_key_then_it_is_not_shown(configured_sqlite: Engine, api: Web, form: str) -> None:
    api.serves(FIRST, answers({"status": "error", "message": f"The key {form} is bad"}))
    with pytest.raises(Unavailable) as refused:
        attach_candidates(uncertain(configured_sqlite))
    assert form not in str(refused.value)


@pytest.mark.parametrize("form", [KEY, quote(KEY, safe="")])
def test_given_a_link_with_the_key_then_it_is_not_shown(configured_sqlite: Engine, api: Web, form: str) -> None:
    api.serves(FIRST, answers([{"id": 7, "output": [f"https://h/a.png?key={form}"]}]))

    [candidate] = attach_candidates(uncertain(configured_sqlite)).found

    assert candidate.links[0].startswith("https://h/a.png?key=")
    assert form not in candidate.links[0]
