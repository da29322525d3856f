"""The broker refuses the `on_done` message of one job: it is retried and reported, and other jobs are notified."""

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
from tests.faults.servers import RedisServer, all_completed, states, until
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
    """Create a migrated SQLite file. DATABASE_URL names it."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/worker.db")
    monkeypatch.setenv("STORAGE_URL", f"file:{tmp_path}/out")
    engine = make_engine(make_url(f"sqlite:///{tmp_path}/worker.db"))
    migrate(engine)
    yield engine
    engine.dispose()


@pytest.fixture(params=["redis", "rabbitmq"])
def messages(request: pytest.FixtureRequest, broker: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Start a broker whose queue `refused` accepts no messages from Celery. BROKER_URL names it."""
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
    """Consume all messages of a queue. Return the job ids in them."""
    with Connection(url) as connection, connection.channel() as channel:
        job_ids: list[int] = []
        while (message := channel.basic_get(queue, no_ack=True)) is not None:
            job_ids.append(json.loads(channel.message_to_python(message).body)[0][0])
        return job_ids


def shown(job_id: int) -> Any:
    """Return the JSON document of `show` for a job."""
    result = cli("show", str(job_id), "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def cli(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run `fetch-worker` with these arguments."""
    command = [str(Path(sys.executable).parent / "fetch-worker"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.server
@pytest.mark.timeout(300)
def test_given_fifty_jobs_when_one_on_done_is_refused_then_the_others_are_sent_once_and_the_refused_one_is_reported(
    tmp_path: Path, sandbox: Sandbox, messages: str, database: Engine
) -> None:
    prompts = [f"a lighthouse, {number}" for number in range(JOBS)]
    answers = [sandbox.submit(prompt) for prompt in prompts]
    with celery_worker(tmp_path):
        (refused,) = track_many(answers[:1], on_done="refused/shop.ready")
        accepted = track_many(answers[1:], on_done="shop/shop.ready")
        until(lambda: all_completed(database, JOBS), 120, lambda: states(database))
        until(lambda: _not_notified(database) == [refused], 30, lambda: _not_notified(database))
        until(lambda: shown(refused)["on_done_attempts"] >= 2, 60, lambda: shown(refused))
        checks = {check["name"]: check for check in json.loads(cli("doctor", "--json").stdout)["checks"]}
        assert f"no process consumes shop ({JOBS - 1} messages)" in checks["on_done queues"]["message"]
    assert Counter(received(messages, "shop")) == Counter(accepted)
    with database.connect() as connection:
        delays = [
            (row.told_at - row.completed_at).total_seconds()
            for row in connection.execute(select(jobs).where(jobs.c.told_at.is_not(None)))
        ]
    assert len(delays) == JOBS - 1
    assert median(delays) < 5.0  # below one second on an idle machine
    document = shown(refused)
    assert (document["on_done"], document["on_done_sent_at"]) == ("refused/shop.ready", None)
    assert document["on_done_error"].startswith("the broker refuses the message: ")
    assert document["on_done_due_at"] is not None
    assert shown(accepted[0])["on_done_sent_at"] is not None
    assert "refuses the message" in cli("show", str(refused)).stdout
    (check,) = [row for row in json.loads(cli("doctor", "--json").stdout)["checks"] if row["name"] == "on_done"]
    assert not check["ok"]
    assert f"job {refused}" in check["message"]
    assert "refused/shop.ready" in check["message"]


def _not_notified(engine: Engine) -> list[int]:
    with engine.connect() as connection:
        return list(connection.execute(select(jobs.c.id).where(jobs.c.told_at.is_(None))).scalars())
