"""Troubles: each is shown with one code, one sentence, the jobs concerned, and the command that repairs it."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, update

from tests import planted
from tests.planted_orders import add_at_api, add_order, add_uncertain, set_slots
from tests.rows import add_downloading, add_job, add_output, add_process, seconds
from worker.cli import main
from worker.core.queues import POLLS, QUEUE
from worker.operations.health import AREAS, NO_TROUBLE
from worker.operations.troubles import CODES, Trouble, count_by_code, count_jobs_by_code, read_evidence, read_troubles
from worker.settings import load
from worker.store.engine import database_now
from worker.store.schema import HELD_UNTIL, breakers, jobs, processes


@pytest.fixture
def database(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """A migrated database. The process that reads it has no key, so it can't know who serves which account."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    monkeypatch.delenv("SD_API_KEY", raising=False)
    monkeypatch.delenv("SD_API_KEYS", raising=False)
    return engine


def troubles_of(engine: Engine) -> list[Trouble]:
    """Return the troubles."""
    settings = load()
    with engine.connect() as connection:
        return read_troubles(connection, settings, read_evidence(connection, settings))


def late_job(connection: Connection, remote_id: str = "1", *, late: float = 300.0, **changes: Any) -> int:
    """Add a job that is due for some seconds."""
    return add_job(connection, remote_id, due_at=database_now(connection) - seconds(late), **changes)


def polled_lately(connection: Connection) -> None:
    """Record a request of this moment."""
    planted.add_breaker(connection, "account", "default", proven=True, asked_at=database_now(connection))


def no_worker(connection: Connection) -> None:
    late_job(connection)


def dead_worker(connection: Connection) -> None:
    add_process(connection, seen_at=database_now(connection) - timedelta(minutes=3))
    late_job(connection)


def stalled(connection: Connection) -> None:
    add_process(connection)
    late_job(connection)


def refused(connection: Connection) -> None:
    add_process(connection)
    planted.add_open_breaker(connection, "account", "default", "key rejected: Invalid API key")
    late_job(connection)
    late_job(connection, "2")


def keyless(connection: Connection) -> None:
    add_process(connection)
    polled_lately(connection)
    late_job(connection, account="shop")


def unlisted(connection: Connection) -> None:
    add_process(connection)
    planted.add_open_breaker(connection, "host", "other.test", "not on SD_API_HOSTS: add other.test to it")
    late_job(connection, fetch_host="other.test")


def dead_host(connection: Connection) -> None:
    add_process(connection)
    planted.add_open_breaker(connection, "host", "api.test", "unreachable: no answer")
    late_job(connection)


def wrong_path(connection: Connection) -> None:
    add_process(connection)
    planted.add_open_breaker(connection, "host", "api.test", "unreachable: no such path, 404")
    late_job(connection)


def by_hand(connection: Connection) -> None:
    add_process(connection)
    planted.add_breaker(connection, "account", "default", paused_at=database_now(connection) - seconds(300))
    late_job(connection)


def burst(connection: Connection) -> None:
    add_process(connection, accounts={"default": 2.0})
    polled_lately(connection)
    for number in range(90):
        late_job(connection, str(number), late=20)


def slowed(connection: Connection) -> None:
    add_process(connection)
    now = database_now(connection)
    planted.add_breaker(connection, "account", "default", proven=True, asked_at=now, ceiling=3.0, cut_at=now)


def disk_full(connection: Connection) -> None:
    add_process(connection)
    job_id = add_downloading(connection)
    trouble: dict[str, Any] = {"error_code": "storage", "error_message": "No space left on device"}
    add_output(connection, job_id, listed_at=database_now(connection) - seconds(30), **trouble)


def no_downloader(connection: Connection) -> None:
    add_process(connection, queues=frozenset({QUEUE, POLLS}))
    add_output(connection, add_downloading(connection), listed_at=database_now(connection) - seconds(600))


def dead_picture_host(connection: Connection) -> None:
    add_process(connection)
    trouble: dict[str, Any] = {"error_code": "unreachable", "error_message": "no answer"}
    add_output(connection, add_downloading(connection), listed_at=database_now(connection) - seconds(90), **trouble)


def ending_links(connection: Connection) -> None:
    add_process(connection)
    add_output(connection, add_downloading(connection), listed_at=database_now(connection) - timedelta(hours=13))


def lost_lease(connection: Connection) -> None:
    add_process(connection)
    polled_lately(connection)
    planted.add_claimed_job(connection, "1", planted.ELSEWHERE, over=60)


def forgotten(connection: Connection) -> None:
    add_process(connection)
    now = database_now(connection)
    add_job(connection, due_at=now + timedelta(hours=4), deadline_at=now - timedelta(hours=2))


def refused_webhook(connection: Connection) -> None:
    add_process(connection)
    job_id = planted.add_failed_job(connection, "1")
    planted.add_event(connection, job_id, due=300, error_message="HTTP 500", http_status=500, attempts=3)


def lost_answers(connection: Connection) -> None:
    add_process(connection)
    add_uncertain(connection, "1", sent=300)
    add_uncertain(connection, "2", sent=60)


def unsent_orders(connection: Connection) -> None:
    add_order(connection, "1")
    add_order(connection, "2", ago=10)


def stalled_orders(connection: Connection) -> None:
    add_process(connection)
    add_order(connection)


def orders_of_a_refused_account(connection: Connection) -> None:
    refused(connection)
    add_order(connection)


def orders_without_key(connection: Connection) -> None:
    add_process(connection)
    add_order(connection, account="shop")


def orders_of_a_dead_host(connection: Connection) -> None:
    add_process(connection)
    planted.add_open_breaker(connection, "host", "api.test", "unreachable: no answer")
    add_order(connection)


def redis_away(connection: Connection) -> None:
    add_process(connection, redis_answers=False)


CASES: list[tuple[Callable[[Connection], object], str, str, str, int]] = [
    (no_worker, "no_worker", "1 job due, the oldest for 5 min: no worker process runs", "fetch-worker up", 1),
    (dead_worker, "no_worker", "1 job due, the oldest for 5 min: no worker process runs", "fetch-worker up", 1),
    (stalled, "polling_stalled", "1 job due, the oldest for 5 min: a worker process runs", "fetch-worker doctor", 1),
    (refused, "account_refused", "2 jobs of default: key rejected: Invalid API key, for ",
        "put the right key of default into SD_API_KEY or SD_API_KEYS_FILE and restart the workers; if the API accepts "
        "the key again, fetch-worker resume --account default", 2),
    (keyless, "no_key", "1 job of shop: no key for account shop, for 5 min",
        "put the key of shop into SD_API_KEYS or SD_API_KEYS_FILE and restart the workers", 1),
    (unlisted, "host_not_allowed", "1 job of other.test: not on SD_API_HOSTS",
        "add other.test to SD_API_HOSTS and restart the workers", 1),
    (dead_host, "api_unreachable", "1 job of api.test: unreachable: no answer, for ",
        "fetch-worker resume --host api.test", 1),
    (wrong_path, "wrong_path", "1 job of api.test: unreachable: no such path",
        "correct SD_API_URL and restart the workers", 1),
    (by_hand, "held_by_operator", "1 job of default: held by an operator, for 5 min",
        "fetch-worker resume --account default", 1),
    (burst, "backlog", "90 jobs of default are late: the limit is 2 requests per second, 45 s to catch up",
        "raise SD_API_RPS if the API allows it", 90),
    (slowed, "account_slowed", "default: the API refused requests, so ",
        "SD_API_RPS=3, if this is the limit of the plan", 0),
    (disk_full, "storage", "1 output can't be written: No space left on device",
        "fetch-worker resume --output-code storage", 1),
    (no_downloader, "no_downloader", "1 output not stored, the oldest for 10 min: no process downloads",
        "fetch-worker up", 1),
    (dead_picture_host, "outputs_unreachable", "1 output from cdn.test: unreachable, no answer; ",
        "fetch-worker resume --output-code unreachable", 1),
    (ending_links, "links_ending", "1 output not stored, the oldest for 13.0 h; ",
        "fetch-worker list --status downloading", 1),
    (lost_lease, "lost_claims", "1 row claimed, and the process that has the claim is dead or hangs",
        "fetch-worker resume ", 1),
    (forgotten, "past_deadline", "1 job past the deadline and not polled soon", "fetch-worker resume ", 1),
    (refused_webhook, "webhooks_refused", "1 webhook for shop.test refused: HTTP 500", "fetch-worker notify ", 1),
    (lost_answers, "uncertain_orders", "2 jobs uncertain: the order was sent and its answer is lost, the first 5 min",
        "fetch-worker list --status uncertain", 2),
    (unsent_orders, "no_worker", "2 jobs due, the oldest for 5 min: no worker process runs", "fetch-worker up", 2),
    (stalled_orders, "polling_stalled", "1 job due, the oldest for 5 min: a worker process runs",
        "fetch-worker doctor", 1),
    (orders_of_a_refused_account, "account_refused", "3 jobs of default: key rejected: Invalid API key, for ",
        "put the right key of default into SD_API_KEY or SD_API_KEYS_FILE and restart the workers", 3),
    (orders_without_key, "no_key", "1 job of shop: no key for account shop, for 5 min",
        "put the key of shop into SD_API_KEYS or SD_API_KEYS_FILE and restart the workers", 1),
    (orders_of_a_dead_host, "api_unreachable", "1 job of api.test: unreachable: no answer, for ",
        "fetch-worker resume --host api.test", 1),
    (redis_away, "redis_away", "Redis does not answer worker@test", "fetch-worker doctor", 0),
]  # fmt: skip


@pytest.mark.parametrize(("plant", "code", "text", "command", "count"), CASES, ids=[case[0].__name__ for case in CASES])
def test_each_trouble_has_its_code_sentence_command_and_jobs(
    database: Engine, plant: Callable[[Connection], object], code: str, text: str, command: str, count: int
) -> None:
    with database.begin() as connection:
        plant(connection)

    (trouble,) = troubles_of(database)

    assert trouble.code == code
    assert trouble.text.startswith(text), trouble.text
    assert trouble.command.startswith(command), trouble.command
    assert trouble.jobs == count


def healthy(connection: Connection) -> None:
    add_process(connection)
    polled_lately(connection)
    late_job(connection, late=2)
    add_output(connection, add_downloading(connection, "2"), listed_at=database_now(connection) - seconds(5))


def idle(connection: Connection) -> None:
    now = database_now(connection)
    add_job(connection, due_at=now + timedelta(hours=1), deadline_at=now + timedelta(hours=2))


def waiting_behind_a_hold(connection: Connection) -> None:
    """Held jobs are not due, so no worker is missing."""
    now = database_now(connection)
    add_job(connection, due_at=HELD_UNTIL, held_at=now)


def waiting_for_slots(connection: Connection) -> None:
    """Orders wait as long as all slots are taken."""
    set_slots(connection, 2)
    for number in range(2):
        add_at_api(connection, f"at the API {number}")
    add_order(connection, "waits")


def waiting_for_a_slot_that_is_free_now(connection: Connection) -> None:
    """The order is old, and the poll that found a free slot is new."""
    add_process(connection)
    polled_lately(connection)
    add_order(connection, ago=3_000)


def postponed_order(connection: Connection) -> None:
    add_order(connection, due_at=database_now(connection) + seconds(60), last_error="Failed, Try Again")


@pytest.mark.parametrize(
    "plant",
    [healthy, idle, waiting_behind_a_hold, waiting_for_slots, waiting_for_a_slot_that_is_free_now, postponed_order],
)
def test_given_normal_work_then_there_is_no_trouble(database: Engine, plant: Callable[[Connection], object]) -> None:
    with database.begin() as connection:
        plant(connection)

    assert troubles_of(database) == []


@pytest.mark.parametrize(("plant", "is_healthy"), [(waiting_for_slots, True), (unsent_orders, False)])
def test_due_orders_that_nobody_sends_are_unhealthy_if_slots_are_free(
    database: Engine, plant: Callable[[Connection], object], is_healthy: bool
) -> None:
    with database.begin() as connection:
        plant(connection)

    with database.connect() as connection:
        assert read_evidence(connection, load()).work.healthy is is_healthy


def test_given_several_troubles_then_the_worst_comes_first_and_each_is_counted(database: Engine) -> None:
    with database.begin() as connection:
        refused(connection)
        disk_full_job = add_downloading(connection, "9")
        now = database_now(connection)
        add_output(connection, disk_full_job, listed_at=now - seconds(30), error_code="storage", error_message="full")
        connection.execute(update(jobs).where(jobs.c.id == disk_full_job).values(due_at=None))

    troubles = troubles_of(database)

    assert [trouble.code for trouble in troubles] == ["account_refused", "storage"]
    assert count_by_code(troubles) == dict.fromkeys(CODES, 0) | {"account_refused": 1, "storage": 1}
    assert count_jobs_by_code(troubles) == dict.fromkeys(CODES, 0) | {"account_refused": 2, "storage": 1}


def test_the_keys_of_the_asking_process_play_no_part(database: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with database.begin() as connection:
        keyless(connection)
        connection.execute(update(breakers).values(asked_at=None))
        add_process(connection, holder="0badc0de.2.2", accounts={"other": 1.0})

    without_key = troubles_of(database)
    monkeypatch.setenv("SD_API_KEYS", '{"shop": "k"}')

    assert [trouble.code for trouble in without_key] == ["no_key"]
    assert [(trouble.code, trouble.jobs) for trouble in troubles_of(database)] == [("no_key", 1)]


@pytest.mark.parametrize("recorded", ["", "null", "[]"])
def test_given_a_process_of_another_release_that_records_no_accounts_then_no_key_is_missing(
    database: Engine, recorded: str
) -> None:
    with database.begin() as connection:
        keyless(connection)
        add_process(connection, holder="0badc0de.2.2")
        connection.execute(update(processes).where(processes.c.holder == "0badc0de.2.2").values(accounts=recorded))

    assert "no_key" not in {trouble.code for trouble in troubles_of(database)}


def test_given_a_process_that_records_nothing_but_polls_an_account_then_no_key_is_missing(database: Engine) -> None:
    with database.begin() as connection:
        keyless(connection)
        planted.add_breaker(connection, "account", "shop", proven=True, asked_at=database_now(connection))

    assert "no_key" not in {trouble.code for trouble in troubles_of(database)}

    with database.begin() as connection:
        long_ago = database_now(connection) - seconds(60)
        connection.execute(update(breakers).where(breakers.c.name == "shop").values(asked_at=long_ago))

    assert "no_key" in {trouble.code for trouble in troubles_of(database)}


def test_every_code_has_its_area_in_doctor() -> None:
    assert AREAS.keys() == CODES.keys()
    assert set(AREAS.values()) == set(NO_TROUBLE)


def test_status_shows_the_troubles(database: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    with database.begin() as connection:
        refused(connection)

    with pytest.raises(SystemExit):
        main(["status"])

    printed = capsys.readouterr().out
    assert "key rejected: Invalid API key" in printed
    assert "fetch-worker resume --account default" in printed
