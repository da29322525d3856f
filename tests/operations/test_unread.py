"""Answers that no rule recognises, with real worker processes and a vendor with an unknown answer format."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.engine import make_url

from tests.download_stand import PNG
from tests.servers import celery_worker
from tests.waiting import wait_until
from tests.web import Web, page
from worker import get, track
from worker.cli import main
from worker.core.circuit_breaker import CircuitBreaker
from worker.store.breakers import locked_breaker, save_breaker
from worker.store.engine import make_engine
from worker.store.migrate import migrate
from worker.store.schema import jobs, unread

KEY = "sk-canary-7f3a9d2e-4b1c"
WORDS = '{"done": "success", "burnt": "failed", "cooking": "processing"}'


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """A migrated SQLite database that DATABASE_URL names."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/worker.db")
    engine = make_engine(make_url(f"sqlite:///{tmp_path}/worker.db"))
    migrate(engine)
    yield engine
    engine.dispose()


class Vendor:
    """A made-up API: sets the answer for each job and counts the requests."""

    def __init__(self, web: Web) -> None:
        self.web = web
        self.url = f"{web.url}/api/v3"
        web.serves("/out/a.png", page(200, PNG, Content_Type="image/png"))
        self.link = f"{web.url}/out/a.png"

    def says(self, remote_id: str, answer: object, status: int = 200) -> None:
        """Set the answer about a job."""
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.web.serves(f"/api/v3/fetch/{remote_id}", page(status, body, Content_Type="application/json"))

    def answers_done(self, remote_id: str) -> None:
        """Set an answer with an unknown status word and an unknown field for the links."""
        self.says(remote_id, {"status": "done", "id": int(remote_id), "assets": [self.link]})

    @property
    def calls(self) -> int:
        """The number of requests about jobs."""
        return sum(request.path.startswith("/api/") for request in self.web.requests)


@pytest.fixture
def vendor(web: Web, monkeypatch: pytest.MonkeyPatch, redis_url: str) -> Vendor:
    """The made-up API, and settings that use it."""
    vendor = Vendor(web)
    monkeypatch.setenv("SD_API_URL", vendor.url)
    monkeypatch.setenv("SD_API_KEY", KEY)
    monkeypatch.setenv("OUTPUT_ALLOWED_NETWORKS", "127.0.0.0/8")
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("POLL_MIN", "0.2")
    return vendor


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Return a function that runs a command and returns its JSON document (`--json`) or its text."""

    def run(*arguments: str, code: int = 0) -> Any:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        assert ended.value.code == code
        printed = capsys.readouterr().out
        return json.loads(printed) if "--json" in arguments else printed

    return run


def _kept_answers(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        return list(connection.execute(select(unread).order_by(unread.c.id)))


def _states(engine: Engine) -> dict[str, str]:
    with engine.connect() as connection:
        return {row.remote_id: row.status for row in connection.execute(select(jobs))}


@pytest.mark.every_python
def test_given_a_new_vendor_when_its_status_word_is_configured_then_kept_answers_complete_its_jobs_without_requests(
    tmp_path: Path, database: Engine, vendor: Vendor, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both pending and expired jobs are completed. All answers have one shape."""
    with database.begin() as connection:  # the key was accepted before, so jobs may expire without a minute of grace
        locked_breaker(connection, "account", "default")
        save_breaker(connection, CircuitBreaker("account", "default", proven=True))
    for remote_id in ("1", "2", "3"):
        vendor.answers_done(remote_id)
    ids = [track("1", eta=0.1), track("2", eta=0.1), track("3", eta=0.1, deadline=1.0)]

    states = {"1": "pending", "2": "pending", "3": "expired"}
    with celery_worker(tmp_path, "--queues", "fetch-worker.polls"):
        wait_until(
            lambda: _states(database) == states and len(_kept_answers(database)) == 3,
            "all answers are kept, and one job expired", seen=lambda: (_states(database), _kept_answers(database)),
        )  # fmt: skip

    [shape] = run("unread", "--json")
    assert (shape["shape"], shape["count"], shape["jobs"]) == ("status=done; assets: [text]; id: number", 3, 3)
    assert shape["job_id"] in ids
    listed = run("unread", "--shape", shape["shape"], "--json")
    assert {(answer["job_id"], answer["http_status"]) for answer in listed} == {(job_id, 200) for job_id in ids}
    assert json.loads(listed[0]["body"])["assets"] == [vendor.link]
    assert "status=done" in run("unread")
    shown = run("show", str(ids[2]), "--json")
    assert [answer["shape"] for answer in shown["unread"]] == [shape["shape"]]
    assert shown["next_look_at"] is not None

    unchanged = run("unread", "--apply", "--json")
    assert [(job["id"], job["changed"], job["read_as"]) for job in unchanged] == [(i, False, "unread") for i in ids]

    calls = vendor.calls
    monkeypatch.setenv("SD_API_STATUS_WORDS", WORDS)
    reread = run("unread", "--apply", "--json")
    assert [(job["id"], job["changed"], job["status"], job["read_as"]) for job in reread] == [
        (job_id, True, "downloading", "ready") for job_id in ids
    ]
    with celery_worker(tmp_path):
        wait_until(
            lambda: set(_states(database).values()) == {"completed"}, "all are stored", seen=lambda: _states(database)
        )
    assert vendor.calls == calls
    assert run("unread", "--apply", "--json") == []
    job = get(ids[2])
    assert job is not None
    assert (job.error_code, [output.status for output in job.outputs]) == (None, ["stored"])


def test_given_a_configured_status_word_when_a_worker_polls_then_its_jobs_are_stored(
    tmp_path: Path, database: Engine, vendor: Vendor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A submit answer with that word is ready at once."""
    monkeypatch.setenv("SD_API_STATUS_WORDS", WORDS)
    vendor.answers_done("1")
    track("1", eta=0.1)
    ready_id = track({"status": "Done", "id": 2, "assets": [vendor.link]})

    job = get(ready_id)
    assert job is not None
    assert job.status == "downloading"
    with celery_worker(tmp_path):
        wait_until(
            lambda: set(_states(database).values()) == {"completed"}, "both are stored", seen=lambda: _states(database)
        )
    assert vendor.calls == 1
    assert _kept_answers(database) == []


def test_given_invalid_status_words_when_a_process_starts_then_one_line_says_what_to_do(
    database: Engine, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SD_API_STATUS_WORDS", '{"done": "ready"}')
    process = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "worker.app", "worker"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert process.returncode == 2
    assert "SD_API_STATUS_WORDS must map 'done' to one of error, failed, processing, success" in process.stderr
    assert "Traceback" not in process.stderr
    run("list", code=2)
