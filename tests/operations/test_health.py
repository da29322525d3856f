"""`doctor`: every check passes on a healthy installation, and every failed check says what to do."""

import json
import socket
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
from kombu.exceptions import OperationalError as BrokerError
from sqlalchemy import Engine, insert

from tests.rows import add_downloading, add_job, add_output
from worker.cli import doctor, main
from worker.coordination.rate_limiter import redis_client
from worker.operations import health
from worker.operations.health import Node, run_checks
from worker.operations.liveness import Check, check_liveness
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


@pytest.fixture
def healthy(engine: Engine, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Settings for servers that all work."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("SD_API_KEY", "k")
    monkeypatch.setenv("STORAGE_URL", f"file:{tmp_path}/outputs")
    (tmp_path / "outputs").mkdir()
    if engine.dialect.name == "postgresql":  # other tests may have left dead rows in these tables
        url = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("VACUUM fetch_jobs")
    return engine


def _run_checks(nodes: Mapping[str, Node] | Exception = ALL) -> dict[str, Check]:
    def answer() -> Mapping[str, Node]:
        if isinstance(nodes, Exception):
            raise nodes
        return nodes

    checks = list(run_checks(load(), answer, queues=QUEUES))
    messages: dict[str, list[str]] = {}  # an area has a row for each trouble
    for check in checks:
        messages.setdefault(check.name, []).append(check.message)
    failed = {check.name for check in checks if not check.ok}
    return {name: Check(name, name not in failed, "; ".join(texts)) for name, texts in messages.items()}


def _failed(checks: Mapping[str, Check]) -> dict[str, str]:
    return {name: check.message for name, check in checks.items() if not check.ok}


@pytest.mark.usefixtures("healthy")
def test_every_check_passes_on_a_healthy_installation() -> None:
    """Each check has a message."""
    checks = _run_checks()
    assert _failed(checks) == {}
    assert set(checks) == {
        "names", "database", "work", "holds", "claims", "orders", "on_done", "on_done queues", "deadlines", "outputs",
        "webhooks", "migrations", "vacuum", "transactions", "redis", "processes", "storage", "partials",
    }  # fmt: skip
    assert all(check.message for check in checks.values())
    assert check_liveness(load()).ok


def test_late_work_fails_the_work_check_and_the_liveness_check(healthy: Engine) -> None:
    long_ago = datetime.now(UTC) - timedelta(minutes=5)
    with healthy.begin() as connection:
        add_job(connection, due_at=long_ago)
    assert "1 job due, the oldest for 5 min: no worker process runs: fetch-worker up" in _failed(_run_checks())["work"]
    assert not check_liveness(load()).ok


def test_holds_are_named_with_their_reason(healthy: Engine) -> None:
    """The message names the account and the reason."""
    with healthy.begin() as connection:
        now = datetime.now(UTC)
        row = {"scope": "account", "name": "default", "proven": False, "reason": "key: refused", "since": now}
        row["reason"] = "key rejected: refused"
        connection.execute(insert(breakers).values(**row, probe_at=now + timedelta(seconds=20)))
    assert "0 jobs of default: key rejected: refused, for" in _failed(_run_checks())["holds"]


def test_refused_webhooks_are_reported(healthy: Engine) -> None:
    """Events that are sent again, and events that were given up in the last day."""
    with healthy.begin() as connection:
        now = datetime.now(UTC)
        job_id = add_job(connection)
        whole = {"job_id": job_id, "type": "job.failed", "url": "https://app.test/", "body": "{}", "created_at": now}
        given_up = {"status": "failed", "ended_at": now, "due_at": None, "error_message": "HTTP 500", "attempts": 9}
        waiting = {"status": "pending", "ended_at": None, "due_at": now, "error_message": "HTTP 500", "attempts": 2}
        rows = [whole | {"event_id": "1"} | waiting, whole | {"event_id": "2"} | given_up]
        connection.execute(insert(events), rows)
    failed = _failed(_run_checks())["webhooks"]
    assert "1 webhook for app.test refused: HTTP 500, the oldest for" in failed
    assert "1 webhook given up in the last day: HTTP 500" in failed


def test_unsent_webhooks_are_reported(healthy: Engine) -> None:
    """The secret was removed from the settings, or no process runs that sends them."""
    with healthy.begin() as connection:
        ended = datetime.now(UTC) - timedelta(minutes=2)
        final = {"status": "cancelled", "due_at": None, "completed_at": ended}
        add_job(connection, "1", **final, webhook_url="https://app.test/")
        add_job(connection, "2", **final)
    assert "1 webhook for (not created yet) not sent, the oldest for 2 min" in _failed(_run_checks())["webhooks"]


def test_claims_of_dead_processes_and_late_outputs_are_counted(healthy: Engine) -> None:
    """A running worker releases an ended lease within seconds."""
    now = datetime.now(UTC)
    with healthy.begin() as connection:
        job_id = add_downloading(connection)
        listed = now - timedelta(hours=2)
        output_id = add_output(connection, job_id, listed_at=listed, due_at=listed, error_code="storage")
        then, lease = now - timedelta(hours=1), timedelta(seconds=1)
        assert claim_output(connection, output_id, token="t", holder="gone.1.2", lease=lease, now=then)
    failed = _failed(_run_checks())
    assert failed["claims"] == (
        f"1 row claimed, and the process that has the claim is dead or hangs: fetch-worker resume {job_id}"
    )
    assert "1 output not stored, the oldest for 2.0 h: no process downloads" in failed["outputs"]
    assert "1 output can't be written" in failed["outputs"]


def test_problems_that_top_shows_fail_the_checks_too(healthy: Engine) -> None:
    """An old claim, a job past its deadline that is polled in hours, and an unreachable download host."""
    now = datetime.now(UTC)
    hours = {"due_at": now + timedelta(hours=4), "asked_at": now - timedelta(minutes=20)}
    with healthy.begin() as connection:
        stuck = add_job(connection, "1", claim_token="t", claim_holder="0badc0de.7.7", **hours)
        overdue = add_job(connection, "2", deadline_at=now - timedelta(hours=2), **hours)
        job_id = add_downloading(connection, "3")
        listed = now - timedelta(minutes=6)
        add_output(connection, job_id, listed_at=listed, due_at=now + timedelta(minutes=1), error_code="unreachable")
    failed = _failed(_run_checks())
    assert f"fetch-worker resume {stuck}" in failed["claims"]
    assert f"fetch-worker resume {overdue}" in failed["deadlines"]
    assert "1 output from cdn.test: unreachable" in failed["outputs"]


@pytest.mark.parametrize(
    ("nodes", "text"),
    [
        ({}, "running processes: none"),
        ({"worker@here": Node(frozenset({"fetch-worker", "fetch-worker.polls"}))}, "fetch-worker.downloads"),
        (BrokerError("away"), "broker does not answer"),
    ],
)
@pytest.mark.usefixtures("healthy")
def test_queues_without_a_consumer_are_reported(nodes: Any, text: str) -> None:
    """The message names the process to start."""
    assert text in _failed(_run_checks(nodes))["processes"]


def test_processes_that_use_another_database_are_reported(healthy: Engine) -> None:
    """Two apps on one Redis consume each other's messages."""
    with healthy.connect() as connection:
        own = database_id(connection)
    ours = {name: Node(node.queues, own) for name, node in ALL.items()}
    assert "processes" not in _failed(_run_checks(ours))

    failed = _failed(_run_checks(ours | {"worker@there": Node(frozenset({"fetch-worker"}), "0123456789abcdef")}))

    assert failed["processes"].startswith(
        "worker@there consume these queues but use another database: give each app a Redis"
    )


def test_a_database_without_tables_is_reported_with_the_command_to_run(
    healthy: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other checks still run."""
    monkeypatch.setenv("DATABASE_URL", "sqlite:///empty.db")
    checks = _run_checks()
    assert "fetch-worker migrate" in _failed(checks)["database"]
    assert checks["redis"].ok
    assert "work" not in checks
    assert not check_liveness(load()).ok


def test_unreachable_servers_are_reported_with_their_setting(healthy: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The messages contain no password."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setenv("DATABASE_URL", f"postgresql://user:secret-1@127.0.0.1:{port}/x")
    monkeypatch.setenv("REDIS_URL", f"redis://:secret-2@127.0.0.1:{port}/0")
    monkeypatch.setenv("BROKER_URL", f"amqp://user:secret-3@127.0.0.1:{port}//")
    failed = _failed(_run_checks())
    assert "DATABASE_URL" in failed["database"]
    assert "REDIS_URL" in failed["redis"]
    assert "BROKER_URL" in failed["broker"]
    assert "secret" not in str(failed)


def test_a_wrong_clock_is_reported(healthy: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has the difference and its direction."""
    monkeypatch.setattr(health, "database_now", lambda connection: database_now(connection) + timedelta(hours=2))
    assert "7200 s ahead of" in _failed(_run_checks())["database"]


@pytest.mark.parametrize(
    ("name", "value", "advice"), [("maxmemory-policy", "allkeys-lru", "noeviction"), ("maxmemory", "1mb", "raise")]
)
def test_a_redis_that_may_lose_or_refuse_messages_is_reported(
    name: str, value: str, advice: str, healthy: Engine, redis_url: str
) -> None:
    client = redis.Redis.from_url(redis_url.replace("redis+socket://", "unix://").replace("virtual_host=", "db="))
    before = client.config_get(name)[name]
    client.config_set(name, value)
    try:
        assert advice in _failed(_run_checks())["redis"]
    finally:
        client.config_set(name, str(before))
        client.close()


def test_doctor_does_not_create_a_missing_storage_folder(healthy: Engine, tmp_path: Path) -> None:
    """The folder may be on a disk that is not mounted."""
    (tmp_path / "outputs").rmdir()
    assert "outputs wait" in _failed(_run_checks())["storage"]
    assert not (tmp_path / "outputs").exists()


def test_little_free_space_and_old_partial_files_are_reported(
    healthy: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTPUT_MAX_BYTES", str(10**18))
    monkeypatch.setattr(health, "STALE_PARTIAL_SECONDS", -1.0)
    (tmp_path / "outputs" / ".partial").mkdir()
    (tmp_path / "outputs" / ".partial" / "7.part").write_bytes(b"x")
    failed = _failed(_run_checks())
    assert "free some space" in failed["storage"]
    assert "1 old partial files" in failed["partials"]


@pytest.mark.parametrize("name", ["worker.py", "worker/__init__.py"])
def test_a_module_named_worker_in_the_app_is_reported(
    name: str, healthy: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python imports only one of the two."""
    (tmp_path / "app" / name).parent.mkdir(parents=True)
    (tmp_path / "app" / name).touch()
    monkeypatch.chdir(tmp_path / "app")
    assert name in _failed(_run_checks())["names"]


def _doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *arguments])
    return int(ended.value.code or 0), capsys.readouterr().out


def test_the_command_prints_a_document_and_sets_the_exit_code(
    healthy: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`{"checks": [{name, ok, message}]}`."""
    monkeypatch.setattr(doctor, "_nodes", lambda: ALL)
    code, out = _doctor(capsys, "--json")
    assert code == 0
    assert {"name": "work", "ok": True} in [{k: c[k] for k in ("name", "ok")} for c in json.loads(out)["checks"]]
    monkeypatch.setattr(doctor, "_nodes", dict)
    code, out = _doctor(capsys)
    assert (code, "WRONG" in out) == (1, True)
    code, out = _doctor(capsys, "--liveness", "--json")
    assert (code, [check["name"] for check in json.loads(out)["checks"]]) == (0, ["work"])


def test_messages_in_an_on_done_queue_without_a_consumer_are_reported(healthy: Engine, redis_url: str) -> None:
    """Redis has no list of consumers, so the running processes report their queues."""
    with healthy.begin() as connection:
        later = datetime.now(UTC) + timedelta(hours=1)
        add_job(connection, "1", on_done="shop/shop.ready", due_at=later, deadline_at=later)
    with redis_client(redis_url, seconds=5) as client:
        client.lpush("shop", "a message", "another one")
        try:
            assert _failed(_run_checks()) == {
                "on_done queues": "no process consumes shop (2 messages): start your app's Celery worker"
            }
            assert _failed(_run_checks(ALL | {"celery@shop": Node(frozenset({"shop"}))})) == {}
        finally:
            client.delete("shop")
