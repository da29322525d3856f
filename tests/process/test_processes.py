"""Real Celery processes: clear errors at the start, polls without a broker, every pool, a clean stop."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery
from sqlalchemy import Engine, select
from sqlalchemy.engine import make_url

from tests.servers import celery_worker, free_port
from tests.waiting import wait_until
from worker import track
from worker.errors import NotTrackable
from worker.sandbox import Sandbox, SandboxOptions
from worker.store.engine import make_engine
from worker.store.migrate import migrate
from worker.store.schema import jobs, outputs

pytestmark = pytest.mark.every_python

KEY = "a-key-of-the-sandbox"


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    """A stand-in whose jobs are ready at once, and the settings for it."""
    with Sandbox(SandboxOptions(key=KEY, min_seconds=0.0, max_seconds=0.1, size=32)) as server:
        monkeypatch.setenv("SD_API_URL", server.url)
        monkeypatch.setenv("SD_API_KEY", KEY)
        monkeypatch.setenv("OUTPUT_ALLOWED_NETWORKS", "127.0.0.0/8")
        yield server


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """A migrated database file, set as DATABASE_URL."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/worker.db")
    engine = make_engine(make_url(f"sqlite:///{tmp_path}/worker.db"))
    migrate(engine)
    yield engine
    engine.dispose()


def states(engine: Engine) -> list[str]:
    """Return the states of all jobs."""
    with engine.connect() as connection:
        return list(connection.execute(select(jobs.c.status).order_by(jobs.c.id)).scalars())


def start(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a Celery command that is expected to end by itself."""
    command = [sys.executable, "-m", "celery", "-A", "worker.app", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=dict(os.environ))


def test_given_no_broker_and_no_beat_when_a_worker_runs_then_it_still_polls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: Engine, sandbox: Sandbox
) -> None:
    monkeypatch.setenv("REDIS_URL", f"redis://127.0.0.1:{free_port()}/0")
    job = track(sandbox.submit("a forest at dawn"), eta=0.1)
    log = tmp_path / "lonely.log"

    with log.open("wb") as out:
        command = [sys.executable, "-m", "celery", "-A", "worker.app", "worker", "--pool", "threads", "-l", "INFO"]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            wait_until(lambda: states(database) == ["downloading"], "the job is downloading", seen=log.read_text)
        finally:
            process.kill()
            process.wait(10)

    assert job == 1
    assert "Traceback" not in log.read_text()


def test_given_a_training_that_is_known_only_by_its_endpoint_when_tracked_by_task_then_its_id_is_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: Engine, sandbox: Sandbox, redis_url: str
) -> None:
    monkeypatch.setenv("REDIS_URL", redis_url)
    answer = {"status": "success", "messege": "deploying_gpu", "model_id": "F5jv"}

    with (
        celery_worker(tmp_path, "--pool", "threads", "--concurrency", "2"),
        Celery(broker=redis_url, backend=redis_url, set_as_current=False) as client,
    ):
        sent = client.send_task("worker.track", [answer], {"endpoint": "v3/fine_tune"}, queue="fetch-worker")
        job = sent.get(timeout=60)
        for remote, reason in {None: "not None", "null": "is not an id", -5: "'-5'"}.items():
            with pytest.raises(NotTrackable, match=reason):
                client.send_task("worker.track", [remote], queue="fetch-worker").get(timeout=60)

    with database.connect() as connection:
        row = connection.execute(select(jobs).where(jobs.c.id == job)).one()
    assert (row.remote_id, row.kind) == ("F5jv", "training/F5jv")


def test_given_no_database_url_when_a_worker_starts_then_it_names_its_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sandbox: Sandbox, redis_url: str
) -> None:
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "var").mkdir()
    refused = start("worker")
    assert refused.returncode == 1
    assert refused.stderr.endswith(
        f"run `fetch-worker migrate` (DATABASE_URL is not set, so the database is the file {tmp_path}/var/worker.db)\n"
    )
    file = make_engine(make_url("sqlite:///var/worker.db"))
    migrate(file)
    file.dispose()

    with celery_worker(tmp_path, "--pool", "prefork", "--concurrency", "2"):
        pass
    log = (tmp_path / "worker.log").read_text()
    assert log.count(f"DATABASE_URL is not set: this worker uses the file {tmp_path}/var/worker.db\n") == 1

    monkeypatch.setenv("DATABASE_URL", "sqlite:///var/worker.db")
    with celery_worker(tmp_path, "--pool", "prefork", "--concurrency", "2"):
        pass
    assert "DATABASE_URL" not in (tmp_path / "worker.log").read_text()


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_given_a_pool_of_any_kind_when_a_job_is_tracked_then_it_is_polled_and_stored(
    pool: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    database: Engine,
    sandbox: Sandbox,
    redis_url: str,
) -> None:
    monkeypatch.setenv("REDIS_URL", redis_url)
    track(sandbox.submit("a lake in the mountains", samples=2), eta=0.1)

    with celery_worker(tmp_path, "--pool", pool, "--concurrency", "2", "--hostname", f"{pool}@%h"):
        wait_until(lambda: states(database) == ["completed"], "the job is completed", seen=lambda: states(database))

    with database.connect() as connection:
        rows = connection.execute(select(outputs)).all()
    assert [row.status for row in rows] == ["stored", "stored"]
    assert len(list((tmp_path / "var" / "outputs").rglob("*.png"))) == 2
    assert set(sandbox.calls.pictures.values()) == {1}


def test_given_work_in_progress_when_a_worker_stops_then_it_releases_the_unpolled_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: Engine, sandbox: Sandbox, redis_url: str
) -> None:
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("SD_API_RPS", "5")
    for number in range(30):
        track(sandbox.submit(f"a city, {number}"), eta=0.1)

    with celery_worker(tmp_path, "--queues", "fetch-worker.polls", "--hostname", "polite@%h") as process:
        wait_until(lambda: "downloading" in states(database), "a job was answered")
        process.send_signal(signal.SIGTERM)
        process.wait(60)

    with database.connect() as connection:
        claimed = connection.execute(select(jobs.c.id).where(jobs.c.claim_token.is_not(None))).all()
    assert claimed == []
    assert set(states(database)) == {"pending", "downloading"}


@pytest.mark.parametrize("command", ["worker", "beat", "flower"])
def test_given_a_malformed_setting_when_a_process_starts_then_one_line_says_so(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SD_API_RPS", "many")

    process = start(command)

    assert process.returncode == 2
    assert process.stderr.strip().splitlines()[-1].startswith("fetch-worker: SD_API_RPS is wrong")
    assert "Traceback" not in process.stderr


def test_given_no_tables_when_a_worker_starts_then_one_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, redis_url: str
) -> None:
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/empty.db")

    process = start("worker", "--pool", "solo")

    assert process.returncode == 1
    assert "no tables of fetch-worker yet: run `fetch-worker migrate`" in process.stderr
    assert "Traceback" not in process.stderr
