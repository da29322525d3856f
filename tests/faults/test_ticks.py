"""Too many beats, none at all, workers that are frozen and wake up too late: each job is asked about once at a time."""

import json
import signal
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select

from tests.faults.servers import (
    PATIENCE,
    HurtRedis,
    assert_nothing_lost,
    assert_polls_are_the_calls,
    busiest,
    celery,
    least_gap,
    states,
    wait_completed,
)
from tests.waiting import wait_until
from worker import track, track_many
from worker.core.pacing.policy import FIXED_WAIT
from worker.sandbox import Answer, Sandbox
from worker.store.schema import jobs, outputs

JOBS = 40
POLL_MIN = 3.0  # the default, in seconds
SLACK = 0.5  # so long may a busy machine hold back a request after its moment was noted
JSON = {"Content-Type": "application/json"}

pytestmark = [pytest.mark.long, pytest.mark.server]


def _beat(folder: Path, name: str) -> Any:
    schedule = str(folder / f"{name}-schedule")
    return celery(folder, name, "-A", "worker.app", "beat", "--schedule", schedule, says="beat: Starting")


def test_given_two_beats_and_three_workers_when_they_poll_then_no_job_is_asked_about_more_often_than_by_one(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: HurtRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a fixed interval one poller asks about a job once in each; so do all of them together."""
    monkeypatch.setenv("POLL_POLICY", "fixed")
    with ExitStack() as processes:
        for name in ("one", "two"):
            processes.enter_context(_beat(tmp_path, f"beat-{name}"))
        for name in ("red", "green", "blue"):
            processes.enter_context(celery(tmp_path, name))
        submitted = [sandbox.submit(f"a lighthouse, {number}", samples=1) for number in range(JOBS)]
        track_many(submitted)
        wait_completed(database, JOBS, tmp_path)

    assert least_gap(sandbox) >= POLL_MIN - SLACK
    for answer in submitted:
        job = sandbox.job(answer["id"])
        assert job is not None
        assert sandbox.calls.fetches[job.id] <= 2 + (job.ready_at - job.submitted_at) / FIXED_WAIT
    assert sorted(sandbox.calls.pictures.values()) == [1] * JOBS
    assert_nothing_lost(database, sandbox, tmp_path, JOBS)
    assert_polls_are_the_calls(database, sandbox)


WAITS = {"status": "processing", "message": "try again later.", "output": ""}
OTHER_PICTURES = {"status": "success", "output": ["https://cdn.test/late.png", "https://cdn.test/later.png"]}


def _slowly(content: object, seconds: float) -> Answer:
    body = json.dumps(content).encode()
    return Answer(200, JSON, body, seconds / len(body))


@pytest.mark.parametrize("late", [WAITS, OTHER_PICTURES], ids=["waits", "has other pictures"])
def test_given_a_worker_frozen_in_the_middle_of_an_answer_when_it_wakes_up_after_its_lease_then_its_write_is_refused(
    late: object, tmp_path: Path, database: Engine, sandbox: Sandbox, broker: HurtRedis
) -> None:
    """Another one did the work meanwhile; the row, and its one file, stay as that one left them."""
    answer = _ready(sandbox)
    sandbox.script(answer["id"], [_slowly(late, 6)])
    with celery(tmp_path, "frozen") as frozen:
        track(answer["id"])
        wait_until(lambda: sandbox.calls.fetches[str(answer["id"])] == 1, "the job is asked about")
        frozen.send_signal(signal.SIGSTOP)
        with celery(tmp_path, "awake"):
            took = wait_completed(database, 1, tmp_path)
            before = _rows(database)
            _wakes_up_too_late(tmp_path, frozen)
            after = _rows(database)
    print(f"done by the other one {took:.1f} s after the freeze")
    assert after == before
    assert sandbox.calls.fetches[str(answer["id"])] == 2
    assert_nothing_lost(database, sandbox, tmp_path, 1, asked_again=1)
    assert_polls_are_the_calls(database, sandbox)


def test_given_a_worker_frozen_in_the_middle_of_an_answer_when_it_wakes_up_while_another_one_asks_then_that_one_counts(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: HurtRedis
) -> None:
    """The claim that stands is another one, though the job is claimed."""
    answer = _ready(sandbox)
    right = {"status": "success", "id": answer["id"], "output": answer["output"]}
    sandbox.script(answer["id"], [_slowly(OTHER_PICTURES, 6), _slowly(right, 18)])
    with celery(tmp_path, "frozen") as frozen:
        track(answer["id"])
        wait_until(lambda: sandbox.calls.fetches[str(answer["id"])] == 1, "the job is asked about")
        frozen.send_signal(signal.SIGSTOP)
        with celery(tmp_path, "awake"):
            wait_until(lambda: sandbox.calls.fetches[str(answer["id"])] == 2, "the other worker asks", PATIENCE)
            _wakes_up_too_late(tmp_path, frozen)
            assert states(database) == {"pending": 1}
            wait_completed(database, 1, tmp_path)
    assert sandbox.calls.fetches[str(answer["id"])] == 2
    assert_nothing_lost(database, sandbox, tmp_path, 1, asked_again=1)
    assert_polls_are_the_calls(database, sandbox)


def _ready(sandbox: Sandbox) -> dict[str, Any]:
    """A job with one picture that can be had now, as its submission was answered."""
    sandbox.options_now(min_seconds=0, max_seconds=0)
    return sandbox.submit("a lighthouse", samples=1)


def _wakes_up_too_late(folder: Path, frozen: "subprocess.Popen[bytes]", says: str = "answers came too late") -> None:
    frozen.send_signal(signal.SIGCONT)
    log = folder / "frozen.log"
    wait_until(lambda: says in log.read_text(), f"its log says {says!r}", seen=log.read_text)


def test_given_a_worker_frozen_in_the_middle_of_a_download_when_it_wakes_up_after_its_lease_then_there_is_one_file(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: HurtRedis
) -> None:
    """The other one's; its row is left alone."""
    answer = _ready(sandbox)
    name = answer["output"][0].rpartition("/")[2]
    picture = sandbox.picture(name)
    assert picture is not None
    sandbox.script(name, [Answer(200, {"Content-Type": "image/png"}, picture, 8 / len(picture))])
    with celery(tmp_path, "frozen") as frozen:
        track(answer["id"])
        wait_until(lambda: sandbox.calls.pictures[name] == 1, "the download begins", seen=lambda: states(database))
        frozen.send_signal(signal.SIGSTOP)
        with celery(tmp_path, "awake"):
            took = wait_completed(database, 1, tmp_path)
            before = _rows(database)
            _wakes_up_too_late(tmp_path, frozen, "the claim was lost")
            after = _rows(database)
    print(f"done by the other one {took:.1f} s after the freeze")
    assert after == before
    assert sandbox.calls.pictures[name] == 2
    assert_nothing_lost(database, sandbox, tmp_path, 1)


def _rows(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        return [*connection.execute(select(jobs)).all(), *connection.execute(select(outputs)).all()]


def test_given_neither_beat_nor_redis_when_jobs_wait_then_polling_goes_on_within_the_budget(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: HurtRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the local share, by two workers that knew of each other; downloads follow once Redis is back."""
    rps, count = 10, 80
    monkeypatch.setenv("SD_API_RPS", str(rps))
    sandbox.options_now(min_seconds=20, max_seconds=40)
    with celery(tmp_path, "one"), celery(tmp_path, "two"):
        time.sleep(2)
        first = [sandbox.submit(f"a harbour, {number}", samples=1) for number in range(count)]
        track_many(first)
        wait_until(lambda: sum(sandbox.calls.fetches.values()) >= count, "as many calls as jobs", PATIENCE)
        broker.kill()
        time.sleep(3)  # it is noticed
        began = time.time()
        wait_until(
            lambda: "pending" not in states(database),
            "every job is polled to its end",
            PATIENCE,
            seen=lambda: f"{states(database)}, {len(sandbox.calls.fetch_moments)} calls",
        )
        calls = sum(at >= began for at, _ in sandbox.calls.fetch_moments)
        most, in_five = busiest(sandbox, since=began), busiest(sandbox, 5.0, since=began)
        broker.start()
        took = wait_completed(database, count, tmp_path)
    print(f"without Redis: {calls} calls, most in one second {most}, in five {in_five}; then {took:.1f} s")
    assert most <= 1.5 * rps, "calls that a busy machine held back for half a second may arrive together"
    assert in_five <= 5.5 * rps
    assert least_gap(sandbox) >= POLL_MIN - SLACK
    assert_nothing_lost(database, sandbox, tmp_path, count)
    assert_polls_are_the_calls(database, sandbox)
