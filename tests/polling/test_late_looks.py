"""Late looks with a real HTTP stand-in, Redis and databases: an expired job that became ready is stored."""

import json
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event, select, update
from sqlalchemy.engine import make_url

from tests.download_stand import PNG
from tests.polling.late_looks import AFTER, KEY, Looks
from tests.rows import add_job, add_output, read_job
from tests.servers import celery_worker
from tests.waiting import wait_until
from tests.web import Web, page
from worker import track
from worker.coordination.rate_limiter import redis_client
from worker.core.circuit_breaker import CircuitBreaker, after_refusal, held_by_operator
from worker.store.breakers import all_breakers, locked_breaker, save_breaker
from worker.store.engine import make_engine
from worker.store.kept_answers import answers_of
from worker.store.migrate import migrate
from worker.store.schema import events, jobs, late_looks, outputs, promises

READY = {"status": "success", "output": ["https://cdn.test/a.png"]}
PROCESSING = {"status": "processing"}


@pytest.fixture
def looks(engine: Engine, redis_url: str, web: Web) -> Iterator[Looks]:
    """Late looks on a fresh database, with an unused request budget."""
    redis_client(redis_url, seconds=5).flushdb()
    looks_ = Looks(engine, redis_url, web)
    yield looks_
    looks_.looks._api.session.close()


def test_given_an_expired_job_that_became_ready_when_polled_again_then_it_is_stored_and_notified_again(
    looks: Looks,
) -> None:
    job_id = looks.expired(on_done="shop.done", told_at=looks.now(), webhook_url="https://app.test/hook", polls=7)
    looks.says(READY)

    assert looks.looks.run() == 1

    row = read_job(looks.engine, job_id)
    assert (row.status, row.error_code, row.completed_at, row.told_at) == ("downloading", None, None, None)
    assert (row.polls, row.due_at, row.announced_at) == (8, None, None)
    assert "ready, 1 output (after it had expired)" in row.last_answer
    with looks.engine.connect() as connection:
        [output] = connection.execute(select(outputs)).all()
        [event] = connection.execute(select(events)).all()
    assert (output.job_id, output.url, output.status) == (job_id, "https://cdn.test/a.png", "pending")
    assert looks.queued == [output.id]
    assert event.type == "job.expired"
    assert looks.look(job_id) is None
    [request] = looks.web.requests
    assert json.loads(request.body) == {"key": KEY}


def test_given_a_job_whose_promised_links_were_dead_when_it_is_ready_later_then_its_outputs_replace_them(
    looks: Looks,
) -> None:
    job_id = looks.expired(webhook_url="https://app.test/hook")
    with looks.engine.begin() as connection:
        end = {"end_status": "expired", "end_code": "expired", "end_message": "not ready"}
        connection.execute(promises.insert().values(job_id=job_id, urls="[]", tried_at=looks.now(), **end))
        add_output(connection, job_id, status="failed", due_at=None, error_code="gone")
    looks.says(READY)

    assert looks.looks.run() == 1

    with looks.engine.connect() as connection:
        [output] = connection.execute(select(outputs)).all()
        [promise] = connection.execute(select(promises)).all()
        [event] = connection.execute(select(events)).all()
    assert (output.url, output.position, output.status) == ("https://cdn.test/a.png", 0, "pending")
    assert (promise.tried_at, promise.end_status) == (None, None)
    ended = json.loads(event.body)["data"]  # as it was, with the link that was tried
    assert (ended["status"], len(ended["outputs"])) == ("expired", 1)
    assert read_job(looks.engine, job_id).status == "downloading"


def test_given_a_trained_model_when_polled_again_then_the_job_is_completed_and_notified(looks: Looks) -> None:
    """There is nothing to download."""
    base = f"{looks.web.url}/api/v3/fine_tune_status"
    job_id = looks.expired("F5", fetch_url=f"{base}/F5", fetch_base=base)
    looks.web.serves("/api/v3/fine_tune_status/F5", page(200, b'{"status": "success", "messege": "model_ready"}'))

    assert looks.looks.run() == 1

    assert read_job(looks.engine, job_id).status == "completed"
    assert (looks.notified, looks.queued) == ([job_id], [])


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        (PROCESSING, True),
        ({"status": "failed", "message": "Request not found"}, True),
        ({"status": "done", "assets": ["x"]}, True),
        ({"status": "success", "output": []}, True),
    ],
)
def test_given_any_other_answer_then_the_next_look_is_planned_and_the_answer_stored(
    looks: Looks, answer: object, kept: bool
) -> None:
    """The job keeps its final state."""
    job_id = looks.expired()
    looks.says(answer)

    assert looks.looks.run() == 1
    assert looks.looks.run() == 0

    row, look = read_job(looks.engine, job_id), looks.look(job_id)
    assert (row.status, row.polls, row.error_message) == ("expired", 1, "not ready")
    assert look is not None
    assert (look.looks, look.due_at) == (1, row.deadline_at + timedelta(hours=3))
    with looks.engine.connect() as connection:
        assert [json.loads(row.body) for row in answers_of(connection, job_ids=[job_id])] == [answer]


def test_given_a_ready_answer_about_a_job_that_has_outputs_then_the_next_look_is_planned(looks: Looks) -> None:
    """The job is unchanged. The look must not be repeated every minute."""
    job_id = looks.expired()
    with looks.engine.begin() as connection:
        add_output(connection, job_id, status="failed", due_at=None, error_code="gone")
    looks.says(READY)

    assert looks.looks.run() == 1

    look = looks.look(job_id)
    assert look is not None
    assert (look.looks, look.due_at) == (1, read_job(looks.engine, job_id).deadline_at + timedelta(hours=3))


def test_given_a_look_whose_process_died_several_times_then_it_is_not_made_again(looks: Looks) -> None:
    often, too_often = looks.expired("1", looks=len(AFTER) + 3), looks.expired("2", looks=len(AFTER) + 4)
    for remote_id in ("1", "2"):
        looks.says(PROCESSING, remote_id=remote_id)

    assert looks.looks.run() == 1

    assert [read_job(looks.engine, job_id).polls for job_id in (often, too_often)] == [1, 0]
    assert looks.look(too_often) is None


def test_given_the_fourth_look_when_the_job_is_still_not_ready_then_it_is_the_last(looks: Looks) -> None:
    job_id = looks.expired(hours_ago=24.1, looks=3)
    looks.says(PROCESSING)
    assert looks.looks.run() == 1
    assert looks.look(job_id) is None
    assert read_job(looks.engine, job_id).status == "expired"


@pytest.mark.parametrize(
    ("answer", "status", "headers"),
    [
        ({"status": "error", "message": "Rate limit exceeded"}, 429, {"Retry_After": "30"}),
        ({"status": "error", "message": "Invalid API key"}, 401, {}),
    ],
)
def test_given_an_answer_that_is_not_about_the_job_then_the_look_does_not_count_and_the_breakers_change(
    looks: Looks, answer: object, status: int, headers: dict[str, str]
) -> None:
    """The request is counted, as always."""
    job_id = looks.expired()
    looks.says(answer, status, **headers)

    assert looks.looks.run() == 1

    look = looks.look(job_id)
    assert look is not None
    assert look.looks == 0
    assert timedelta(seconds=50) < look.due_at - looks.now() <= timedelta(seconds=60)
    assert read_job(looks.engine, job_id).polls == 1
    with looks.engine.connect() as connection:
        current_breakers = all_breakers(connection)
    assert current_breakers["account", "default"].held(looks.now())
    assert current_breakers["host", looks.host].troubles == 0


@pytest.mark.parametrize("status", [500, 502, 504])
def test_given_a_server_error_then_the_look_counts_and_the_last_answer_stays(looks: Looks, status: int) -> None:
    """Otherwise a job that makes the API fail would be polled every minute for a day."""
    job_id = looks.expired()
    looks.says({"message": "Server Error"}, status)

    assert looks.looks.run() == 1

    look = looks.look(job_id)
    assert look is not None
    assert (look.looks, look.due_at) == (1, read_job(looks.engine, job_id).deadline_at + timedelta(hours=3))
    with looks.engine.connect() as connection:
        assert all_breakers(connection)["host", looks.host].troubles == 1
        assert answers_of(connection, job_ids=[job_id]) == []


def test_given_no_answer_then_the_look_does_not_count(looks: Looks) -> None:
    job_id = looks.expired()
    looks.answers(lambda client: client.close())

    assert looks.looks.run() == 1

    look = looks.look(job_id)
    assert look is not None
    assert (look.looks, read_job(looks.engine, job_id).polls) == (0, 1)


@pytest.mark.parametrize(("not_ready", "held"), [(False, False), (True, True)])
def test_given_five_jobs_with_unknown_paths_then_the_host_is_held_only_if_the_paths_worked_before(
    looks: Looks, not_ready: bool, held: bool
) -> None:
    base = f"{looks.web.url}/api/v33/fetch"
    ids = []
    for number in range(5):
        name = str(number)
        columns: dict[str, Any] = {"not_ready_at": looks.now() - timedelta(hours=2)} if not_ready else {}
        ids.append(looks.expired(name, fetch_url=f"{base}/{name}", fetch_base=base, **columns))
        looks.web.serves(f"/api/v33/fetch/{name}", page(404, b"<html>Not Found</html>"))

    assert looks.looks.run() == 5

    with looks.engine.connect() as connection:
        breaker = all_breakers(connection).get(("host", looks.host))
    assert (breaker is not None and breaker.held(looks.now())) is held
    rows = [looks.look(job_id) for job_id in ids]
    assert [row is not None and row.looks for row in rows] == [1] * 5


def test_given_looks_of_an_account_whose_key_only_another_process_has_then_they_are_left_to_it(looks: Looks) -> None:
    """They are unchanged, and do not delay those of other accounts."""
    foreign = [looks.expired(str(number), account="shop") for number in range(120)]
    planned = [looks.look(job_id) for job_id in foreign[:3]]
    own = looks.expired("own")
    looks.says(PROCESSING, remote_id="own")

    assert looks.looks.run() == 1

    assert [looks.look(job_id) for job_id in foreign[:3]] == planned
    assert read_job(looks.engine, own).polls == 1


def test_given_a_hundred_looks_of_a_held_account_then_one_statement_defers_them_by_ten_minutes(
    looks: Looks,
) -> None:
    ids = [looks.expired(str(number)) for number in range(100)]
    looks.breaker(lambda breaker: held_by_operator(breaker, now=looks.now()))
    statements: list[str] = []

    def note(*event_arguments: Any) -> None:
        statements.append(event_arguments[2].split()[0])

    event.listen(looks.engine, "before_cursor_execute", note)
    assert looks.looks.run() == 0
    event.remove(looks.engine, "before_cursor_execute", note)

    assert (statements.count("UPDATE"), len(statements) < 30) == (1, True)
    rows = [looks.look(job_id) for job_id in ids]
    assert all(row is not None and row.due_at - looks.now() > timedelta(minutes=9) for row in rows)


@pytest.mark.parametrize("trouble", ["refused account", "paused account", "held host", "no key", "short", "late work"])
def test_given_a_held_or_busy_account_or_host_then_no_request_is_sent(looks: Looks, trouble: str) -> None:
    """The look is delayed, and no request is counted."""
    job_id = looks.expired()
    looks.says(READY)
    now = looks.now()
    match trouble:
        case "refused account":
            looks.breaker(
                lambda breaker: after_refusal(breaker, "no credits", now=now - timedelta(minutes=9), probe=False)
            )
        case "paused account":
            looks.breaker(lambda breaker: held_by_operator(breaker, now=now))
        case "held host":
            looks.breaker(lambda breaker: held_by_operator(breaker, now=now), "host", looks.host)
        case "no key":
            looks.looks._keys = {}
        case "short":
            looks.rps = 1.0
            while looks.budget.take("default", 1, rate=1.0).send_times:
                pass
        case "late work":
            with looks.engine.begin() as connection:
                due_at = now - timedelta(seconds=30)
                add_job(connection, "9", fetch_host=looks.host, due_at=due_at)

    assert looks.looks.run() == 0

    look = looks.look(job_id)
    assert look is not None
    assert (look.looks, read_job(looks.engine, job_id).polls, looks.web.requests) == (0, 0, [])


def test_given_an_unproven_key_then_a_single_look_is_its_probe(looks: Looks) -> None:
    """As after a restart without other due jobs."""
    first, second = looks.expired("1"), looks.expired("2")
    looks.breaker(lambda breaker: CircuitBreaker("account", "default"))
    for remote_id in ("1", "2"):
        looks.says(PROCESSING, remote_id=remote_id)

    assert looks.looks.run() == 2

    with looks.engine.connect() as connection:
        assert all_breakers(connection)["account", "default"].proven
    assert [read_job(looks.engine, job_id).polls for job_id in (first, second)] == [1, 1]


def test_given_two_processes_then_each_look_is_made_once(looks: Looks, redis_url: str) -> None:
    for number in range(12):
        looks.expired(str(number))
        looks.says(PROCESSING, remote_id=str(number))
    other_process = Looks(looks.engine, redis_url, looks.web)
    threads = [threading.Thread(target=process.looks.run) for process in (looks, other_process)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    other_process.looks._api.session.close()

    assert len(looks.web.requests) == 12
    with looks.engine.connect() as connection:
        assert set(connection.execute(select(jobs.c.polls)).scalars()) == {1}


def test_given_a_job_that_is_retried_during_a_look_then_the_answer_changes_nothing(looks: Looks) -> None:
    job_id = looks.expired()

    def retried(client: Any) -> None:
        with looks.engine.begin() as connection:
            connection.execute(late_looks.delete().where(late_looks.c.job_id == job_id))
            connection.execute(
                update(jobs)
                .where(jobs.c.id == job_id)
                .values(status="pending", due_at=looks.now(), completed_at=None, error_code=None)
            )
        page(200, json.dumps(READY).encode())(client)

    looks.answers(retried)
    assert looks.looks.run() == 1

    row = read_job(looks.engine, job_id)
    assert (row.status, row.polls, looks.queued) == ("pending", 1, [])


def test_given_an_address_that_may_no_longer_get_the_key_then_no_request_is_sent(looks: Looks, web: Web) -> None:
    elsewhere = f"http://127.0.0.2:{web.port}/api/v3/fetch"
    job_id = looks.expired(fetch_url=f"{elsewhere}/1", fetch_base=elsewhere, fetch_host=f"127.0.0.2:{web.port}")

    assert looks.looks.run() == 0

    look = looks.look(job_id)
    assert look is not None
    assert (look.looks, read_job(looks.engine, job_id).polls) == (0, 0)
    assert look.due_at - looks.now() > timedelta(minutes=50)
    assert web.requests == []


def test_given_a_stop_then_no_other_look_is_made(looks: Looks) -> None:
    looks.expired()
    looks.looks.stop()
    looks.looks.start()
    assert looks.looks.run() == 0
    assert looks.web.requests == []


# ── a real worker ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """A migrated database file, set as DATABASE_URL."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/worker.db")
    engine = make_engine(make_url(f"sqlite:///{tmp_path}/worker.db"))
    migrate(engine)
    yield engine
    engine.dispose()


@pytest.mark.parametrize("setting", ["3,6,12,24,40", "off"])
def test_given_a_worker_when_an_expired_job_becomes_ready_then_it_is_stored_and_notified_again_unless_disabled(
    setting: str, tmp_path: Path, database: Engine, web: Web, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The times of the looks are a setting, here in seconds after the deadline."""
    for name, value in {
        "SD_API_URL": f"{web.url}/api/v3",
        "SD_API_KEY": KEY,
        "OUTPUT_ALLOWED_NETWORKS": "127.0.0.0/8",
        "REDIS_URL": redis_url,
        "POLL_MIN": "0.2",
        "LATE_LOOKS": setting,
    }.items():
        monkeypatch.setenv(name, value)
    with database.begin() as connection:  # an accepted key: jobs need no minute of grace to expire
        locked_breaker(connection, "account", "default")
        save_breaker(connection, CircuitBreaker("account", "default", proven=True))
    web.serves("/out/a.png", page(200, PNG, Content_Type="image/png"))
    web.serves("/api/v3/fetch/1", page(200, json.dumps(PROCESSING).encode()))
    job_id = track("1", eta=0.1, deadline=0.5, on_done="shop.done")

    with celery_worker(tmp_path):
        wait_until(lambda: read_job(database, job_id).status == "expired", "the job expires")
        web.serves("/api/v3/fetch/1", page(200, json.dumps(READY | {"output": [f"{web.url}/out/a.png"]}).encode()))
        if setting == "off":
            with database.connect() as connection:
                assert connection.execute(select(late_looks)).all() == []
            return
        wait_until(
            lambda: read_job(database, job_id).status == "completed",
            "the job is completed",
            seen=lambda: _seen(database),
        )
        wait_until(lambda: read_job(database, job_id).told_at is not None, "the on_done call is sent")
    row = read_job(database, job_id)
    assert (row.error_code, row.on_done_error) == (None, None)
    assert sum(request.path == "/api/v3/fetch/1" for request in web.requests) == row.polls


def _seen(engine: Engine) -> object:
    with engine.connect() as connection:
        return [connection.execute(select(table)).all() for table in (jobs, outputs, late_looks)]
