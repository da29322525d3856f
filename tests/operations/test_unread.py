"""Answers that no rule reads, with real worker processes and a stand-in of a vendor that nobody has heard of."""

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
    """Migrated tables in a file that DATABASE_URL names."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/worker.db")
    engine = make_engine(make_url(f"sqlite:///{tmp_path}/worker.db"))
    migrate(engine)
    yield engine
    engine.dispose()


class Vendor:
    """A made-up API: what it answers by job, and how often it was asked."""

    def __init__(self, web: Web) -> None:
        self.web = web
        self.url = f"{web.url}/api/v3"
        web.serves("/out/a.png", page(200, PNG, Content_Type="image/png"))
        self.link = f"{web.url}/out/a.png"

    def says(self, remote_id: str, answer: object, status: int = 200) -> None:
        """From now on this is the answer about a job."""
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.web.serves(f"/api/v3/fetch/{remote_id}", page(status, body, Content_Type="application/json"))

    def done(self, remote_id: str) -> None:
        """The answer that nobody knows: another word, and another place for the links."""
        self.says(remote_id, {"status": "done", "id": int(remote_id), "assets": [self.link]})

    @property
    def calls(self) -> int:
        """Requests about jobs."""
        return sum(asked.path.startswith("/api/") for asked in self.web.asked)


@pytest.fixture
def vendor(web: Web, monkeypatch: pytest.MonkeyPatch, redis_url: str) -> Vendor:
    """The stand-in, and the settings that lead to it."""
    made = Vendor(web)
    monkeypatch.setenv("SD_API_URL", made.url)
    monkeypatch.setenv("SD_API_KEY", KEY)
    monkeypatch.setenv("OUTPUT_ALLOWED_NETWORKS", "127.0.0.0/8")
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("POLL_MIN", "0.2")
    return made


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs a command; its document with --json, else its text."""

    def run(*words: str, code: int = 0) -> Any:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(words))
        assert ended.value.code == code
        said = capsys.readouterr().out
        return json.loads(said) if "--json" in words else said

    return run


def _kept(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        return list(connection.execute(select(unread).order_by(unread.c.id)))


def _states(engine: Engine) -> dict[str, str]:
    with engine.connect() as connection:
        return {row.remote_id: row.status for row in connection.execute(select(jobs))}


@pytest.mark.every_python
def test_given_a_new_vendor_when_its_word_is_taught_then_the_kept_answers_complete_its_jobs_with_no_call_made(
    tmp_path: Path, database: Engine, vendor: Vendor, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs that wait and jobs that expired alike; one shape is all there is to look at."""
    with database.begin() as connection:  # a key that was accepted before: jobs need no minute of grace to expire
        locked_breaker(connection, "account", "default")
        save_breaker(connection, CircuitBreaker("account", "default", proven=True))
    for remote_id in ("1", "2", "3"):
        vendor.done(remote_id)
    ids = [track("1", eta=0.1), track("2", eta=0.1), track("3", eta=0.1, deadline=1.0)]

    with celery_worker(tmp_path, "--queues", "fetch-worker.polls"):
        wait_until(
            lambda: _states(database) == {"1": "pending", "2": "pending", "3": "expired"} and len(_kept(database)) == 3,
            "all answers are kept, and one job expired", seen=lambda: (_states(database), _kept(database)),
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

    nothing = run("unread", "--apply", "--json")
    assert [(one["id"], one["changed"], one["read_as"]) for one in nothing] == [(i, False, "unread") for i in ids]

    calls = vendor.calls
    monkeypatch.setenv("SD_API_STATUS_WORDS", WORDS)
    done = run("unread", "--apply", "--json")
    assert [(one["id"], one["changed"], one["status"], one["read_as"]) for one in done] == [
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


def test_given_a_taught_word_when_a_worker_asks_then_its_jobs_are_stored_as_any_other(
    tmp_path: Path, database: Engine, vendor: Vendor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a submit answer with the word is ready at once."""
    monkeypatch.setenv("SD_API_STATUS_WORDS", WORDS)
    vendor.done("1")
    track("1", eta=0.1)
    at_once = track({"status": "Done", "id": 2, "assets": [vendor.link]})

    job = get(at_once)
    assert job is not None
    assert job.status == "downloading"
    with celery_worker(tmp_path):
        wait_until(
            lambda: set(_states(database).values()) == {"completed"}, "both are stored", seen=lambda: _states(database)
        )
    assert vendor.calls == 1
    assert _kept(database) == []


def test_given_wrong_words_when_anything_starts_then_one_line_says_what_to_do(
    database: Engine, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SD_API_STATUS_WORDS", '{"done": "ready"}')
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "worker.app", "worker"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert "SD_API_STATUS_WORDS must say for 'done' one of error, failed, processing, success" in done.stderr
    assert "Traceback" not in done.stderr
    run("list", code=2)
