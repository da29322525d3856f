"""Connections to Redis that are dead without anybody having said so, and a password that is changed meanwhile."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery
from sqlalchemy import Engine

from tests.faults.proxy import Proxy, proxy
from tests.faults.servers import PATIENCE, HurtRedis, assert_nothing_lost, children, states, tail, up, wait_completed
from tests.waiting import wait_until
from worker import track_many
from worker.sandbox import Sandbox

JOBS = 40
PASSWORD, ANOTHER = "the-first-password", "the-second-password"

pytestmark = [pytest.mark.long, pytest.mark.server]


@pytest.fixture
def way(broker: HurtRedis, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The product's way to Redis, which REDIS_URL names."""
    with proxy("127.0.0.1", broker.port) as made:
        monkeypatch.setenv("REDIS_URL", f"redis://127.0.0.1:{made.port}/0")
        yield made


def _beats(log: Path) -> int:
    return log.read_text().count("Scheduler: Sending due task")


def test_given_connections_to_redis_that_are_half_open_when_new_ones_pass_then_messages_come_again(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: HurtRedis, way: Proxy
) -> None:
    """Polls and downloads go on, what was lost with them is healed, no process hangs or has to be started again.

    Redis hands messages to the connections that it knows, so an app's `worker.track` may be lost until then: it is sent
    again and again, and the job is there once.
    """
    log = tmp_path / "up.log"
    client = Celery(broker=broker.url, set_as_current=False)
    with up(tmp_path) as process:
        pids = children(process.pid)
        track_many([sandbox.submit(f"a lighthouse, {number}") for number in range(JOBS // 2)])
        time.sleep(2)
        dead = way.forget_all()
        began, beats = time.monotonic(), _beats(log)
        track_many([sandbox.submit(f"a harbour, {number}") for number in range(JOBS // 2)])
        by_message = sandbox.submit("a lighthouse, by message")

        def taken() -> bool:
            client.send_task("worker.track", [by_message], queue="fetch-worker")
            time.sleep(1)
            return sum(states(database).values()) == JOBS + 1

        wait_until(taken, "a message is consumed", PATIENCE, seen=lambda: tail(log))
        consumed = time.monotonic() - began
        wait_until(lambda: _beats(log) > beats + 1, "beat sends again", PATIENCE, seen=lambda: tail(log))
        wait_completed(database, JOBS + 1, tmp_path)
        took = time.monotonic() - began
        assert children(process.pid) == pids, "a process had to be started again"
    client.close()
    print(f"{dead} connections half-open: a message consumed after {consumed:.1f} s, all done after {took:.1f} s")
    assert process.returncode == 0
    assert_nothing_lost(database, sandbox, tmp_path, JOBS + 1)


def test_given_a_redis_whose_password_is_changed_when_it_is_changed_back_then_the_workers_go_on_and_no_log_has_it(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: HurtRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They live through it and say what is wrong; jobs are polled meanwhile, at the local share."""
    log = tmp_path / "up.log"
    _set_password(broker, PASSWORD)
    monkeypatch.setenv("REDIS_URL", broker.url.replace("//", f"//:{PASSWORD}@"))
    with up(tmp_path) as process:
        pids = children(process.pid)
        _set_password(broker, ANOTHER)
        broker.notify("CLIENT", "KILL", "TYPE", "normal")
        broker.notify("CLIENT", "KILL", "TYPE", "pubsub")
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
        took = wait_completed(database, 8, tmp_path)
        restarted = len(set(pids) - set(children(process.pid)))
    print(f"after the right password all is done in {took:.1f} s; {restarted} processes were started again")
    text = log.read_text()
    assert not restarted, text[-3_000:]
    assert PASSWORD not in text
    assert ANOTHER not in text
    assert_nothing_lost(database, sandbox, tmp_path, 8)


def _set_password(broker: HurtRedis, password: str) -> None:
    broker.notify("CONFIG", "SET", "requirepass", password)
    broker.password = password


def _wrong_passwords(log: Path) -> int:
    return sum("invalid username-password pair" in line for line in log.read_text().splitlines())
