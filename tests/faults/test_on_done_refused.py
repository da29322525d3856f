"""An `on_done` queue that the broker refuses: the others are told, and the refused one waits and is shown."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from kombu.connection import Connection
from sqlalchemy import Engine, select
from sqlalchemy.engine import make_url

from tests import servers
from tests.faults.servers import HurtRedis, all_completed, states, until
from tests.servers import celery_worker
from worker import track_many
from worker.sandbox import Sandbox
from worker.store.engine import make_engine
from worker.store.migrate import migrate
from worker.store.schema import jobs

JOBS = 50
QUORUM = {"x-queue-type": "quorum"}


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """An SQLite database that DATABASE_URL names."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/worker.db")
    monkeypatch.setenv("STORAGE_URL", f"file:{tmp_path}/out")
    engine = make_engine(make_url(f"sqlite:///{tmp_path}/worker.db"))
    migrate(engine)
    yield engine
    engine.dispose()


@pytest.fixture(params=["redis", "rabbitmq"])
def messages(request: pytest.FixtureRequest, broker: HurtRedis, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A broker on which the queue `refused` takes no message of Celery's, which BROKER_URL names."""
    if request.param == "redis":
        with broker.client as connection:
            connection.hset("refused", "a", 1)
        yield broker.url
        return
    with servers.rabbitmq() as url:
        monkeypatch.setenv("BROKER_URL", url)
        with Connection(url) as connection, connection.channel() as channel:
            channel.queue_declare("refused", durable=True, auto_delete=False, arguments=QUORUM)
        yield url


def received(url: str, queue: str) -> list[int]:
    """The job ids in the messages of a queue, which are taken out of it."""
    with Connection(url) as connection, connection.channel() as channel:
        found: list[int] = []
        while (message := channel.basic_get(queue, no_ack=True)) is not None:
            found.append(json.loads(channel.message_to_python(message).body)[0][0])
        return found


def shown(job_id: int) -> Any:
    """What `show --json` says of a job."""
    done = cli("show", str(job_id), "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def cli(*words: str) -> "subprocess.CompletedProcess[str]":
    """What a command of the product says."""
    command = [str(Path(sys.executable).parent / "fetch-worker"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.server
@pytest.mark.timeout(300)
def test_given_fifty_jobs_of_which_one_is_refused_then_the_others_are_told_once_and_the_refused_one_is_shown(
    tmp_path: Path, sandbox: Sandbox, messages: str, database: Engine
) -> None:
    prompts = [f"a lighthouse, {number}" for number in range(JOBS)]
    answers = [sandbox.submit(prompt) for prompt in prompts]
    with celery_worker(tmp_path):
        (refused,) = track_many(answers[:1], on_done="refused/shop.ready")
        others = track_many(answers[1:], on_done="shop/shop.ready")
        until(lambda: all_completed(database, JOBS), 120, lambda: states(database))
        until(lambda: _untold(database) == [refused], 30, lambda: _untold(database))
        until(lambda: shown(refused)["on_done_attempts"] >= 2, 60, lambda: shown(refused))
        checks = {check["name"]: check for check in json.loads(cli("doctor", "--json").stdout)["checks"]}
        assert f"nobody consumes shop ({JOBS - 1} messages)" in checks["on_done queues"]["message"]
    assert Counter(received(messages, "shop")) == Counter(others)
    with database.connect() as connection:
        delays = [
            (row.told_at - row.completed_at).total_seconds()
            for row in connection.execute(select(jobs).where(jobs.c.told_at.is_not(None)))
        ]
    assert len(delays) == JOBS - 1
    assert median(delays) < 5.0  # below a second on a machine with nothing else to do
    document = shown(refused)
    assert (document["on_done"], document["on_done_sent_at"]) == ("refused/shop.ready", None)
    assert document["on_done_error"].startswith("the broker refuses the message: ")
    assert document["on_done_due_at"] is not None
    assert shown(others[0])["on_done_sent_at"] is not None
    assert "refuses the message" in cli("show", str(refused)).stdout
    (check,) = [one for one in json.loads(cli("doctor", "--json").stdout)["checks"] if one["name"] == "on_done"]
    assert not check["ok"]
    assert f"job {refused}" in check["message"]
    assert "refused/shop.ready" in check["message"]


def _untold(engine: Engine) -> list[int]:
    with engine.connect() as connection:
        return list(connection.execute(select(jobs.c.id).where(jobs.c.told_at.is_(None))).scalars())
