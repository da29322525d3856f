"""The guarantees with Redis and PostgreSQL also hold with RabbitMQ, MariaDB and SQLite."""

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from celery import Celery
from sqlalchemy import Engine, select, text
from sqlalchemy.engine import make_url

from tests import servers
from tests.faults.proxy import Proxy, running_proxy
from tests.faults.servers import (
    KEY,
    PATIENCE,
    RedisServer,
    assert_nothing_lost,
    kill_workers,
    states,
    tail,
    up,
    wait_completed,
)
from tests.servers import celery_worker
from tests.waiting import wait_until
from worker import track_many
from worker.sandbox import Sandbox
from worker.store.engine import make_engine
from worker.store.migrate import migrate
from worker.store.schema import jobs

JOBS = 80
PAIRS = ["rabbitmq-postgresql", "rabbitmq-mariadb", "redis-mariadb", "redis-sqlite"]


@pytest.fixture
def database(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Create a database of the kind that the pair names. DATABASE_URL names it."""
    kind = getattr(request, "param", "rabbitmq-postgresql").partition("-")[2]
    with ExitStack() as stack:
        url = f"sqlite:///{tmp_path}/worker.db"
        if kind == "postgresql":
            url = stack.enter_context(servers.postgres(tmp_path / "postgres"))
        elif kind == "mariadb":
            url = stack.enter_context(servers.mariadb())
        monkeypatch.setenv("DATABASE_URL", url)
        engine = make_engine(make_url(url.replace("mariadb://", "mariadb+pymysql://")))
        migrate(engine)
        yield engine
        engine.dispose()


@pytest.fixture
def messages(request: pytest.FixtureRequest, broker: RedisServer) -> Iterator[str]:
    """Start the broker of the pair. Return the URL that the test uses, without a proxy."""
    if getattr(request, "param", "rabbitmq").startswith("redis"):
        yield broker.url
        return
    with servers.rabbitmq() as url:
        yield url


@pytest.fixture
def proxy(messages: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Start a proxy between the worker and the broker. BROKER_URL leads through it."""
    parts = urlsplit(messages)
    with running_proxy(parts.hostname or "127.0.0.1", parts.port or 5_672) as proxy:
        monkeypatch.setenv("BROKER_URL", messages.replace(f":{parts.port}", f":{proxy.port}"))
        yield proxy


@pytest.fixture
def client(messages: str, broker: RedisServer) -> Iterator[Celery]:
    """Return the Celery app of a web app that knows only the broker's URL."""
    app = Celery(broker=messages, backend=broker.url, set_as_current=False)
    yield app
    app.close()


@pytest.mark.long
@pytest.mark.server
@pytest.mark.parametrize(("messages", "database"), [(pair, pair) for pair in PAIRS], indirect=True, ids=PAIRS)
def test_given_killed_workers_and_an_unreachable_broker_when_jobs_are_tracked_meanwhile_then_nothing_is_lost(
    tmp_path: Path, messages: str, database: Engine, proxy: Proxy, sandbox: Sandbox, client: Celery, broker: RedisServer
) -> None:
    """Half of the jobs are tracked by message, half by `track_many`.

    When a worker is killed or disconnected, Redis delivers its messages again after a minute. A message that Redis is
    handing over at that moment is lost, so the test waits until there is none. The no-loss guarantee starts when the
    row is committed.
    """
    prompts = [f"a lighthouse, {number}" for number in range(JOBS)]

    def track_twenty() -> None:
        answers = [sandbox.submit(prompts.pop()) for _ in range(20)]
        track_many(answers[:10])
        for answer in answers[10:]:
            client.send_task("worker.track", [answer], queue="fetch-worker")

    def no_consumer_waits() -> bool:
        with broker.client as redis:
            return bool(redis.info("clients")["blocked_clients"] == 0)

    with up(tmp_path) as process:
        log = tmp_path / "up.log"
        track_twenty()
        wait_until(
            lambda: states(database).get("completed", 0) > 0, "a job is completed", seen=lambda: states(database)
        )
        if messages.startswith("amqp"):  # Redis delivers messages of a dead worker again only after a minute
            track_twenty()
        assert kill_workers(process.pid) == 2
        wait_until(no_consumer_waits, "no connection waits for a message")
        while prompts[20:]:
            track_twenty()
        wait_until(lambda: log.read_text().count(" ready.") >= 4, "both workers are back", seen=lambda: tail(log))
        if not messages.startswith("amqp"):
            wait_until(
                lambda: sum(states(database).values()) == JOBS - 20, "all are tracked", seen=lambda: states(database)
            )
        proxy.mode = "refuse"
        proxy.cut_all()
        wait_until(no_consumer_waits, "no connection waits for a message")
        track_twenty()
        time.sleep(3)
        proxy.mode = "pass"
        wait_completed(database, JOBS, tmp_path)
    assert_nothing_lost(database, sandbox, tmp_path, JOBS, asked_again=JOBS)
    assert KEY not in log.read_text()


def _rows(engine: Engine) -> list[int]:
    with engine.connect() as connection:
        return list(connection.execute(select(jobs.c.id)).scalars())


_WAITING_LOCKS = text("SELECT count(*) FROM pg_locks WHERE relation = 'fetch_jobs'::regclass AND NOT granted")


@pytest.mark.long
@pytest.mark.server
@pytest.mark.parametrize("committed", [False, True], ids=["before_its_commit", "after_its_commit"])
def test_given_a_worker_killed_while_it_handles_a_message_when_rabbitmq_redelivers_it_then_there_is_one_row(
    committed: bool, tmp_path: Path, database: Engine, proxy: Proxy, sandbox: Sandbox, client: Celery
) -> None:
    """`worker.track` is acknowledged late with RabbitMQ too, so the message survives a killed worker."""
    log = tmp_path / "worker.log"
    with celery_worker(tmp_path, "--hostname", "first@%h") as first:
        with database.begin() as locker, database.connect() as observer:
            locker.execute(text("LOCK TABLE fetch_jobs IN EXCLUSIVE MODE"))
            result = client.send_task("worker.track", [sandbox.submit("a lighthouse")], queue="fetch-worker")
            wait_until(
                lambda: observer.execute(_WAITING_LOCKS).scalar() == 1,
                "the INSERT waits for the lock",
                seen=log.read_text,
            )
            if committed:
                proxy.mode = "swallow"  # the acknowledgement is lost
            else:
                first.kill()
        wait_until(lambda: len(_rows(database)) == committed, f"there are {int(committed)} rows", seen=log.read_text)
        first.kill()
        first.wait()
    proxy.mode = "pass"

    with celery_worker(tmp_path, "--hostname", "second@%h"):
        job_id = result.get(timeout=60)

        assert _rows(database) == [job_id]
        assert "Task worker.track" in log.read_text(), "the message was not redelivered"


CUTS, MESSAGES = 2, 800


@pytest.mark.long
@pytest.mark.server
def test_given_a_full_queue_when_the_connection_to_rabbitmq_is_cut_then_the_worker_consumes_again_afterwards(
    tmp_path: Path, database: Engine, messages: str, proxy: Proxy, client: Celery
) -> None:
    """The connection is cut twice, each time while the worker's threads acknowledge messages."""
    queue = "fetch-worker.downloads"

    def waiting() -> int:
        with client.connection_for_read() as connection:
            return int(connection.default_channel.queue_declare(queue, passive=True).message_count)

    with celery_worker(tmp_path, "--queues", queue, "--concurrency", "16") as worker:
        for _ in range(CUTS):
            worker.send_signal(signal.SIGSTOP)  # so that messages remain in the queue until the cut
            for unknown in range(MESSAGES):
                client.send_task("worker.download", [unknown], queue=queue)
            worker.send_signal(signal.SIGCONT)
            full = waiting()
            wait_until(lambda: waiting() < full, "messages are consumed")  # noqa: B023 - called before `full` changes
            proxy.mode = "refuse"
            proxy.cut_all()
            assert waiting() > 0, "the connection was cut too late"
            time.sleep(1)
            proxy.mode = "pass"
            wait_until(lambda: waiting() == 0, "every message is consumed", PATIENCE, seen=lambda: f"{waiting()} wait")
