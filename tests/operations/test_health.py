"""The doctor: green where all is well, and for everything that is wrong one line that says what to do."""

import json
import socket
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from kombu.exceptions import OperationalError as BrokerError
from sqlalchemy import Engine, insert

from tests.rows import add_downloading, add_job, add_output
from worker.cli import look, main
from worker.coordination.rate_limiter import redis_client
from worker.operations import health
from worker.operations.health import Check, Node, alive, examine
from worker.settings import load
from worker.store.claims import claim_output
from worker.store.database_identity import database_id
from worker.store.engine import database_now
from worker.store.schema import breakers, events

ALL = {
    "worker@here": Node(frozenset({"fetch-worker", "fetch-worker.polls"})),
    "downloads@here": Node(frozenset({"fetch-worker.downloads"})),
}
QUEUES = dict.fromkeys(("fetch-worker", "fetch-worker.polls", "fetch-worker.downloads"), "start a process")

Examined = Callable[[], Mapping[str, Check]]


@pytest.fixture
def settled(engine: Engine, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Settings that lead to servers where all is well."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("SD_API_KEY", "k")
    monkeypatch.setenv("STORAGE_URL", f"file:{tmp_path}/outputs")
    (tmp_path / "outputs").mkdir()
    return engine


def _examined(nodes: Mapping[str, Node] | Exception = ALL) -> dict[str, Check]:
    def answer() -> Mapping[str, Node]:
        if isinstance(nodes, Exception):
            raise nodes
        return nodes

    checks = list(examine(load(), answer, queues=QUEUES))
    assert len({check.name for check in checks}) == len(checks)
    return {check.name: check for check in checks}


def _wrong(checks: Mapping[str, Check]) -> dict[str, str]:
    return {name: check.message for name, check in checks.items() if not check.ok}


@pytest.mark.usefixtures("settled")
def test_where_all_is_well_every_check_is_ok() -> None:
    """And says what it saw."""
    checks = _examined()
    assert _wrong(checks) == {}
    assert set(checks) == {
        "names", "database", "work", "holds", "claims", "on_done", "on_done queues", "deadlines", "outputs", "webhooks",
        "vacuum", "transactions", "redis", "processes", "storage", "partials",
    }  # fmt: skip
    assert all(check.message for check in checks.values())
    assert alive(load()).ok


def test_work_that_nobody_does_is_seen_by_the_doctor_and_by_the_liveness_check(settled: Engine) -> None:
    """It is true only if due work is being done."""
    long_ago = datetime.now(UTC) - timedelta(minutes=5)
    with settled.begin() as connection:
        add_job(connection, due_at=long_ago)
    assert "start a `worker` process" in _wrong(_examined())["work"]
    assert not alive(load()).ok


def test_holds_are_named_with_their_reason(settled: Engine) -> None:
    """Whoever is held waits, and costs nothing."""
    with settled.begin() as connection:
        now = datetime.now(UTC)
        row = {"scope": "account", "name": "default", "proven": False, "reason": "key: refused", "since": now}
        connection.execute(insert(breakers).values(**row, probe_at=now + timedelta(seconds=20)))
    assert "default: key: refused" in _wrong(_examined())["holds"]


def test_webhooks_that_nobody_takes_are_told(settled: Engine) -> None:
    """Those that are tried again, and those given up lately."""
    with settled.begin() as connection:
        now = datetime.now(UTC)
        job_id = add_job(connection)
        whole = {"job_id": job_id, "type": "job.failed", "url": "https://app.test/", "body": "{}", "created_at": now}
        given_up = {"status": "failed", "ended_at": now, "due_at": None, "error_message": "HTTP 500"}
        waiting = {"status": "pending", "ended_at": None, "due_at": now, "error_message": "HTTP 500"}
        rows = [whole | {"event_id": "1"} | waiting, whole | {"event_id": "2"} | given_up]
        connection.execute(insert(events), rows)
    assert "1 are tried again, 1 were given up in the last day, HTTP 500" in _wrong(_examined())["webhooks"]


def test_webhooks_that_nobody_sends_are_told(settled: Engine) -> None:
    """The secret was taken out of the settings, or no process is there to send them."""
    with settled.begin() as connection:
        ended = datetime.now(UTC) - timedelta(minutes=2)
        final = {"status": "cancelled", "due_at": None, "completed_at": ended}
        add_job(connection, "1", **final, webhook_url="https://app.test/")
        add_job(connection, "2", **final)
    assert "1 are due for more than 60 s and nobody sends them" in _wrong(_examined())["webhooks"]


def test_claims_of_processes_that_are_gone_and_outputs_that_wait_for_long_are_counted(settled: Engine) -> None:
    """A lease that is over is taken up within seconds, where anybody is there to do it."""
    now = datetime.now(UTC)
    with settled.begin() as connection:
        job_id = add_downloading(connection)
        listed = now - timedelta(hours=2)
        output_id = add_output(connection, job_id, listed_at=listed, due_at=listed, error_code="storage")
        then, lease = now - timedelta(hours=1), timedelta(seconds=1)
        assert claim_output(connection, output_id, token="t", holder="gone.1.2", lease=lease, now=then)
    wrong = _wrong(_examined())
    assert wrong["claims"].startswith("1 rows were taken")
    assert "1 outputs are paid for" in wrong["outputs"]
    assert "1 storage" in wrong["outputs"]


def test_what_top_shows_is_wrong_for_the_doctor_too(settled: Engine) -> None:
    """A claim that is older than any work, a job past its deadline that is asked in hours, a host of pictures away."""
    now = datetime.now(UTC)
    hours = {"due_at": now + timedelta(hours=4), "asked_at": now - timedelta(minutes=20)}
    with settled.begin() as connection:
        stuck = add_job(connection, "1", claim_token="t", claim_holder="0badc0de.7.7", **hours)
        forgotten = add_job(connection, "2", deadline_at=now - timedelta(hours=2), **hours)
        job_id = add_downloading(connection, "3")
        listed = now - timedelta(minutes=6)
        add_output(connection, job_id, listed_at=listed, due_at=now + timedelta(minutes=1), error_code="unreachable")
    wrong = _wrong(_examined())
    assert f"(job {stuck})" in wrong["claims"]
    assert f"`fetch-worker resume {forgotten}`" in wrong["deadlines"]
    assert "1 unreachable" in wrong["outputs"]


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ({}, "none at all"),
        ({"worker@here": Node(frozenset({"fetch-worker", "fetch-worker.polls"}))}, "fetch-worker.downloads"),
        (BrokerError("away"), "broker is away"),
    ],
)
@pytest.mark.usefixtures("settled")
def test_queues_that_nobody_consumes_are_named(nodes: Any, words: str) -> None:
    """With the process to start."""
    assert words in _wrong(_examined(nodes))["processes"]


def test_processes_that_serve_another_database_are_named(settled: Engine) -> None:
    """Two apps on one Redis take each other's messages."""
    with settled.connect() as connection:
        own = database_id(connection)
    ours = {name: Node(node.queues, own) for name, node in ALL.items()}
    assert "processes" not in _wrong(_examined(ours))

    said = _wrong(_examined(ours | {"worker@there": Node(frozenset({"fetch-worker"}), "0123456789abcdef")}))

    assert said["processes"].startswith("worker@there take our messages into another database: give each app a Redis")


def test_a_database_without_tables_is_told_what_to_do(settled: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest is looked at all the same."""
    monkeypatch.setenv("DATABASE_URL", "sqlite:///empty.db")
    checks = _examined()
    assert "fetch-worker migrate" in _wrong(checks)["database"]
    assert checks["redis"].ok
    assert "work" not in checks
    assert not alive(load()).ok


def test_servers_that_are_away_are_told_by_the_setting_that_names_them(
    settled: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No password is shown."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setenv("DATABASE_URL", f"postgresql://user:secret-1@127.0.0.1:{port}/x")
    monkeypatch.setenv("REDIS_URL", f"redis://:secret-2@127.0.0.1:{port}/0")
    monkeypatch.setenv("BROKER_URL", f"amqp://user:secret-3@127.0.0.1:{port}//")
    wrong = _wrong(_examined())
    assert "DATABASE_URL" in wrong["database"]
    assert "REDIS_URL" in wrong["redis"]
    assert "BROKER_URL" in wrong["broker"]
    assert "secret" not in str(wrong)


def test_a_clock_that_is_off_is_told(settled: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """By how much, and which way."""
    monkeypatch.setattr(health, "database_now", lambda connection: database_now(connection) + timedelta(hours=2))
    assert "7200 s ahead of" in _wrong(_examined())["database"]


@pytest.mark.parametrize(
    ("name", "value", "words"), [("maxmemory-policy", "allkeys-lru", "noeviction"), ("maxmemory", "1mb", "raise")]
)
def test_a_redis_that_may_lose_messages_is_told(
    name: str, value: str, words: str, settled: Engine, redis_url: str
) -> None:
    """Or that is about to refuse them."""
    client = redis.Redis.from_url(redis_url.replace("redis+socket://", "unix://").replace("virtual_host=", "db="))
    before = client.config_get(name)[name]
    client.config_set(name, value)
    try:
        assert words in _wrong(_examined())["redis"]
    finally:
        client.config_set(name, str(before))
        client.close()


def test_a_storage_that_is_missing_is_not_made_by_the_doctor(settled: Engine, tmp_path: Path) -> None:
    """It may be a disk that is not mounted."""
    (tmp_path / "outputs").rmdir()
    assert "outputs wait" in _wrong(_examined())["storage"]
    assert not (tmp_path / "outputs").exists()


def test_too_little_room_and_old_partial_files_are_told(
    settled: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what to do."""
    monkeypatch.setenv("OUTPUT_MAX_BYTES", str(10**18))
    monkeypatch.setattr(health, "STALE_PARTIAL_SECONDS", -1.0)
    (tmp_path / "outputs" / ".partial").mkdir()
    (tmp_path / "outputs" / ".partial" / "7.part").write_bytes(b"x")
    wrong = _wrong(_examined())
    assert "make room" in wrong["storage"]
    assert "1 old partial files" in wrong["partials"]


@pytest.mark.parametrize("name", ["worker.py", "worker/__init__.py"])
def test_a_module_of_the_app_with_our_name_is_told(
    name: str, settled: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python would find only one of the two."""
    (tmp_path / "app" / name).parent.mkdir(parents=True)
    (tmp_path / "app" / name).touch()
    monkeypatch.chdir(tmp_path / "app")
    assert name in _wrong(_examined())["names"]


def _doctor(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *words])
    return int(ended.value.code or 0), capsys.readouterr().out


def test_the_command_prints_a_document_and_its_exit_code_says_it_in_one(
    settled: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`{"checks": [{name, ok, message}]}`."""
    monkeypatch.setattr(look, "_nodes", lambda: ALL)
    code, out = _doctor(capsys, "--json")
    assert code == 0
    assert {"name": "work", "ok": True} in [{k: c[k] for k in ("name", "ok")} for c in json.loads(out)["checks"]]
    monkeypatch.setattr(look, "_nodes", dict)
    code, out = _doctor(capsys)
    assert (code, "WRONG" in out) == (1, True)
    code, out = _doctor(capsys, "--liveness", "--json")
    assert (code, [check["name"] for check in json.loads(out)["checks"]]) == (0, ["work"])


def test_messages_in_an_on_done_queue_that_nobody_consumes_are_told(settled: Engine, redis_url: str) -> None:
    """Redis knows no consumers, so the processes that answer say which queues they take from."""
    with settled.begin() as connection:
        later = datetime.now(UTC) + timedelta(hours=1)
        add_job(connection, "1", on_done="shop/shop.ready", due_at=later, deadline_at=later)
    with redis_client(redis_url, seconds=5) as client:
        client.lpush("shop", "a message", "another one")
        try:
            assert _wrong(_examined()) == {
                "on_done queues": "nobody consumes shop (2 messages): start the Celery worker of your app"
            }
            assert _wrong(_examined(ALL | {"celery@shop": Node(frozenset({"shop"}))})) == {}
        finally:
            client.delete("shop")
