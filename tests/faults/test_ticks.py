"""Two beats, no beat, or workers that freeze and resume: each job is polled by one worker at a time."""

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
    RedisServer,
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
SLACK = 0.5  # seconds by which a busy machine may delay a request after its time was recorded
JSON = {"Content-Type": "application/json"}

pytestmark = [pytest.mark.long, pytest.mark.server]


def _beat(folder: Path, name: str) -> Any:
    schedule = str(folder / f"{name}-schedule")
    return celery(folder, name, "-A", "worker.app", "beat", "--schedule", schedule, says="beat: Starting")


def test_given_two_beats_and_three_workers_then_no_job_is_polled_more_often_than_by_one_worker(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the fixed policy, all pollers together poll a job once per interval."""
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


PROCESSING = {"status": "processing", "message": "try again later.", "output": ""}
OTHER_PICTURES = {"status": "success", "output": ["https://cdn.test/late.png", "https://cdn.test/later.png"]}


def _slow_answer(content: object, seconds: float) -> Answer:
    body = json.dumps(content).encode()
    return Answer(200, JSON, body, seconds / len(body))


@pytest.mark.parametrize("late", [PROCESSING, OTHER_PICTURES], ids=["processing", "other_pictures"])
def test_given_a_worker_frozen_while_it_reads_an_answer_when_it_resumes_after_its_lease_then_its_write_is_refused(
    late: object, tmp_path: Path, database: Engine, sandbox: Sandbox, broker: RedisServer
) -> None:
    """Another worker completed the job meanwhile. The rows and the file do not change again."""
    answer = _submit_ready(sandbox)
    sandbox.script(answer["id"], [_slow_answer(late, 6)])
    with celery(tmp_path, "frozen") as frozen:
        track(answer["id"])
        wait_until(lambda: sandbox.calls.fetches[str(answer["id"])] == 1, "the job is polled")
        frozen.send_signal(signal.SIGSTOP)
        with celery(tmp_path, "awake"):
            seconds = wait_completed(database, 1, tmp_path)
            before = _rows(database)
            _resume_too_late(tmp_path, frozen)
            after = _rows(database)
    print(f"completed by the other worker {seconds:.1f} s after the freeze")
    assert after == before
    assert sandbox.calls.fetches[str(answer["id"])] == 2
    assert_nothing_lost(database, sandbox, tmp_path, 1, asked_again=1)
    assert_polls_are_the_calls(database, sandbox)


def test_given_a_worker_frozen_while_it_reads_an_answer_when_it_resumes_while_another_polls_then_the_other_one_counts(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: RedisServer
) -> None:
    """The job is claimed, but by the other worker: the claim token does not match."""
    answer = _submit_ready(sandbox)
    right = {"status": "success", "id": answer["id"], "output": answer["output"]}
    sandbox.script(answer["id"], [_slow_answer(OTHER_PICTURES, 6), _slow_answer(right, 18)])
    with celery(tmp_path, "frozen") as frozen:
        track(answer["id"])
        wait_until(lambda: sandbox.calls.fetches[str(answer["id"])] == 1, "the job is polled")
        frozen.send_signal(signal.SIGSTOP)
        with celery(tmp_path, "awake"):
            wait_until(lambda: sandbox.calls.fetches[str(answer["id"])] == 2, "the other worker polls", PATIENCE)
            _resume_too_late(tmp_path, frozen)
            assert states(database) == {"pending": 1}
            wait_completed(database, 1, tmp_path)
    assert sandbox.calls.fetches[str(answer["id"])] == 2
    assert_nothing_lost(database, sandbox, tmp_path, 1, asked_again=1)
    assert_polls_are_the_calls(database, sandbox)


def _submit_ready(sandbox: Sandbox) -> dict[str, Any]:
    """Submit a job with one picture that is ready at once. Return the answer to the submission."""
    sandbox.options_now(min_seconds=0, max_seconds=0)
    return sandbox.submit("a lighthouse", samples=1)


def _resume_too_late(folder: Path, frozen: "subprocess.Popen[bytes]", says: str = "answers came too late") -> None:
    """Resume the frozen worker. Wait until its log says that its claim was lost."""
    frozen.send_signal(signal.SIGCONT)
    log = folder / "frozen.log"
    wait_until(lambda: says in log.read_text(), f"its log says {says!r}", seen=log.read_text)


def test_given_a_worker_frozen_during_a_download_when_it_resumes_after_its_lease_then_there_is_one_file(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: RedisServer
) -> None:
    """The file is the one of the other worker. The row does not change again."""
    answer = _submit_ready(sandbox)
    name = answer["output"][0].rpartition("/")[2]
    picture = sandbox.picture(name)
    assert picture is not None
    sandbox.script(name, [Answer(200, {"Content-Type": "image/png"}, picture, 8 / len(picture))])
    with celery(tmp_path, "frozen") as frozen:
        track(answer["id"])
        wait_until(lambda: sandbox.calls.pictures[name] == 1, "the download begins", seen=lambda: states(database))
        frozen.send_signal(signal.SIGSTOP)
        with celery(tmp_path, "awake"):
            seconds = wait_completed(database, 1, tmp_path)
            before = _rows(database)
            _resume_too_late(tmp_path, frozen, "the claim was lost")
            after = _rows(database)
    print(f"completed by the other worker {seconds:.1f} s after the freeze")
    assert after == before
    assert sandbox.calls.pictures[name] == 2
    assert_nothing_lost(database, sandbox, tmp_path, 1)


def _rows(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        return [*connection.execute(select(jobs)).all(), *connection.execute(select(outputs)).all()]


def test_given_neither_beat_nor_redis_when_jobs_wait_then_polling_continues_within_the_rate_limit(
    tmp_path: Path, database: Engine, sandbox: Sandbox, broker: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers that knew of each other each use half of the rate. Downloads follow when Redis is back."""
    rps, count = 10, 80
    monkeypatch.setenv("SD_API_RPS", str(rps))
    sandbox.options_now(min_seconds=20, max_seconds=40)
    with celery(tmp_path, "one"), celery(tmp_path, "two"):
        time.sleep(2)
        first = [sandbox.submit(f"a harbour, {number}", samples=1) for number in range(count)]
        track_many(first)
        wait_until(lambda: sum(sandbox.calls.fetches.values()) >= count, "there are as many polls as jobs", PATIENCE)
        broker.kill()
        time.sleep(3)  # so that the workers notice it
        began = time.time()
        wait_until(
            lambda: "pending" not in states(database),
            "every job is polled to its end",
            PATIENCE,
            seen=lambda: f"{states(database)}, {len(sandbox.calls.fetch_moments)} calls",
        )
        calls = sum(at >= began for at, _ in sandbox.calls.fetch_moments)
        maximum, in_five = busiest(sandbox, since=began), busiest(sandbox, 5.0, since=began)
        broker.start()
        seconds = wait_completed(database, count, tmp_path)
    print(f"without Redis: {calls} calls, at most {maximum} in one second, {in_five} in five; then {seconds:.1f} s")
    assert maximum <= 1.5 * rps, "too many polls in one second, even with half a second of delay on a busy machine"
    assert in_five <= 5.5 * rps
    assert least_gap(sandbox) >= POLL_MIN - SLACK
    assert_nothing_lost(database, sandbox, tmp_path, count)
    assert_polls_are_the_calls(database, sandbox)
