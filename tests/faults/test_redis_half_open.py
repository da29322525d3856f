"""Half-open connections to Redis, and a Redis password that changes while the workers run."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery
from sqlalchemy import Engine

from tests.faults.proxy import Proxy, running_proxy
from tests.faults.servers import PATIENCE, RedisServer, assert_nothing_lost, children, states, tail, up, wait_completed
from tests.waiting import wait_until
from worker import track_many
from worker.launch.procfile import own_procfile
from worker.sandbox import Sandbox

JOBS = 40
PASSWORD, ANOTHER = "the-first-password", "the-second-password"

pytestmark = [pytest.mark.long, pytest.mark.server]


@pytest.fixture
def proxy(broker: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Start a proxy between the worker and Redis. REDIS_URL leads through it."""
    with running_proxy("127.0.0.1", broker.port) as proxy:
        monkeypatch.setenv("REDIS_URL", f"redis://127.0.0.1:{proxy.port}/0")
        yield proxy


def _beats(log: Path) -> int:
    return log.read_text().count("Scheduler: Sending due task")


def test_given_half_open_connections_to_redis_when_new_ones_work_then_messages_are_consumed_again(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: RedisServer, proxy: Proxy
) -> None:
    """Polls and downloads continue, lost messages are replaced, and no process hangs or has to be restarted.

    Redis delivers messages to the half-open connections too, where an app's `worker.track` may be lost. The test sends
    it again and again; the job is tracked once.
    """
    log = tmp_path / "up.log"
    quiet_procfile = own_procfile().read_text()
    (tmp_path / "Procfile").write_text(quiet_procfile.replace("beat --loglevel INFO", "beat --loglevel DEBUG"))
    client = Celery(broker=broker.url, set_as_current=False)
    with up(tmp_path) as process:
        pids = children(process.pid)
        track_many([sandbox.submit(f"a lighthouse, {number}") for number in range(JOBS // 2)])
        time.sleep(2)
        dead = proxy.forget_all()
        began, beats = time.monotonic(), _beats(log)
        track_many([sandbox.submit(f"a harbour, {number}") for number in range(JOBS // 2)])
        by_message = sandbox.submit("a lighthouse, by message")

        def is_consumed() -> bool:
            client.send_task("worker.track", [by_message], queue="fetch-worker")
            time.sleep(1)
            return sum(states(database).values()) == JOBS + 1

        wait_until(is_consumed, "a message is consumed", PATIENCE, seen=lambda: tail(log))
        consumed = time.monotonic() - began
        wait_until(lambda: _beats(log) > beats + 1, "beat sends again", PATIENCE, seen=lambda: tail(log))
        wait_completed(database, JOBS + 1, tmp_path)
        seconds = time.monotonic() - began
        assert children(process.pid) == pids, "a process had to be restarted"
    client.close()
    print(f"{dead} connections half-open: a message consumed after {consumed:.1f} s, completed after {seconds:.1f} s")
    assert process.returncode == 0
    assert_nothing_lost(database, sandbox, tmp_path, JOBS + 1)


def test_given_a_changed_redis_password_when_it_is_changed_back_then_the_workers_continue_and_do_not_log_it(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No worker exits, and the log names the cause. Jobs are polled meanwhile, at each worker's share of the rate."""
    log = tmp_path / "up.log"
    _set_password(broker, PASSWORD)
    monkeypatch.setenv("REDIS_URL", broker.url.replace("//", f"//:{PASSWORD}@"))
    with up(tmp_path) as process:
        pids = children(process.pid)
        _set_password(broker, ANOTHER)
        broker.execute("CLIENT", "KILL", "TYPE", "normal")
        broker.execute("CLIENT", "KILL", "TYPE", "pubsub")
        track_many([sandbox.submit(f"a lighthouse, {number}", samples=1) for number in range(8)])
        wait_until(
            lambda: _wrong_passwords(log) >= 2, "the log says that the password is wrong", seen=lambda: tail(log)
        )
        wait_until(
            lambda: "pending" not in states(database),
            "every job is polled to its end",
            PATIENCE,
            seen=lambda: f"{states(database)} {tail(log)}",
        )
        _set_password(broker, PASSWORD)
        seconds = wait_completed(database, 8, tmp_path)
        restarted = len(set(pids) - set(children(process.pid)))
    print(f"completed {seconds:.1f} s after the password was right again; {restarted} processes were restarted")
    text = log.read_text()
    assert not restarted, text[-3_000:]
    assert PASSWORD not in text
    assert ANOTHER not in text
    assert_nothing_lost(database, sandbox, tmp_path, 8)


def _set_password(broker: RedisServer, password: str) -> None:
    broker.execute("CONFIG", "SET", "requirepass", password)
    broker.password = password


def _wrong_passwords(log: Path) -> int:
    return sum("invalid username-password pair" in line for line in log.read_text().splitlines())
