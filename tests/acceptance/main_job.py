"""The main job from end to end, the same job under SIGKILL, and one job tracked a hundred times at once."""

import json
import subprocess
import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.acceptance.api import ApiJob
from tests.acceptance.api_process import ApiProcess, Ledger
from tests.acceptance.deployment import WORKING, Deployment, Installation, wait_until
from tests.acceptance.jobs import (
    Size,
    check_completed,
    check_files,
    check_no_stray_files,
    make_batch,
    rows_of,
    seconds_taken,
    track_by_name,
    wait_final,
)
from tests.acceptance.report import Report, quantile

KEY = "acceptance-key-1f6b"
CALLS_PER_SECOND = 200  # SD_API_RPS of the deployment
BURST = CALLS_PER_SECOND // 5  # the burst that the README states
PROCESSES, CALLS_EACH = 8, 13

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill: its time in seconds since the start, and the number of jobs not completed then."""

    second: float
    unfinished: int


RACE_BY_NAME = """
import json, sys, time
from celery import Celery
redis_url, remote_id, calls, start = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
client = Celery("client", broker=redis_url, backend=redis_url)
time.sleep(max(0.0, start - time.time()))
results = [client.send_task("worker.track", [remote_id], queue="fetch-worker") for _ in range(calls)]
print(json.dumps([result.get(timeout=40) for result in results]))
"""

RACE_BY_IMPORT = """
import json, sys, threading, time
from worker import track
remote_id, calls, start = sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
barrier, answers = threading.Barrier(calls), []
def race():
    barrier.wait()
    answers.append(track(remote_id))
time.sleep(max(0.0, start - time.time()))
threads = [threading.Thread(target=race) for _ in range(calls)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(json.dumps(answers))
"""


def main_job(installation: Installation, home: Path, size: Size) -> Report:
    """Track jobs by task name. All are completed with correct files, without an unnecessary request."""
    report = Report("main-job")
    with ApiProcess(seed=size.seed, accept=[KEY]) as api, Deployment(installation, home, api.base, KEY) as deployment:
        start_working(report, deployment)
        jobs = make_batch(size, first_id=12_000_000)
        api.register(jobs)
        results = track_by_name(deployment, jobs)
        sent_after = time.time() - jobs[0].started
        answers = [result.get(timeout=60) for result in results]
        wait_final(deployment, jobs, size.slowest + 90)
        time.sleep(2)  # so that unnecessary requests are recorded

        check_completed(report, deployment, jobs)
        rows, ledger = rows_of(deployment, jobs), api.ledger()
        report.check(
            "the result of each worker.track is the job's id",
            answers == [rows[job.remote_id]["id"] for job in jobs if job.remote_id in rows],
            answers[:5],
        )
        check_files(report, deployment, api, jobs)
        check_no_stray_files(report, deployment)
        complete = ledger.gets_per_output(lambda get: get.complete)
        expected = {(job.remote_id, position): 1 for job in jobs for position in range(len(job.outputs))}
        report.check(
            "exactly one successful GET per output", dict(complete) == expected, _differences(complete, expected)
        )
        report.none_of("no fetch call after the success answer", ledger.calls_after_success())
        calls = ledger.calls_per_job()
        polls = {job.remote_id: rows[job.remote_id]["polls"] for job in jobs if job.remote_id in rows}
        report.check("polls equals the API's own count", dict(calls) == polls, _differences(polls, calls))
        busiest = ledger.busiest_second()
        limit = CALLS_PER_SECOND + BURST
        report.check(f"no second with more than {CALLS_PER_SECOND} + {BURST} calls", busiest <= limit, busiest)
        report.none_of("every request was a valid fetch call", ledger.strays)
        report.none_of("no key was sent to the picture host", [get for get in ledger.gets if get.carried_key])

        durations = seconds_taken(deployment, jobs)
        delays = [durations[job.remote_id] - job.seconds for job in jobs if job.remote_id in durations]
        report.figure("jobs / outputs", f"{len(jobs)} / {len(expected)}")
        report.figure("all sent after (s)", sent_after)
        report.figure("all completed after (s)", max(durations.values(), default=float("nan")))
        report.figure("ready to completed, p50 / p95 / max (s)", _spread(delays))
        report.figure("processor time (s)", deployment.cpu_seconds())
        report.figure("polls per job", len(ledger.calls) / len(jobs))
        report.figure("most calls in one second", busiest)
        report.figure("GETs started / complete", f"{len(ledger.gets)} / {sum(complete.values())}")
    return report


def kills(
    installation: Installation, home: Path, size: Size, times: int, recovery_seconds: int, restart_seconds: int
) -> Report:
    """Run the batch twice: undisturbed, then with the workers killed several times and restarted at once."""
    report = Report("kills")
    settings = {"RECOVERY_SECONDS": str(recovery_seconds)}
    with (
        ApiProcess(seed=size.seed, accept=[KEY]) as api,
        Deployment(installation, home, api.base, KEY, **settings) as deployment,
    ):
        start_working(report, deployment)
        api.behave(picture_seconds=0.4)  # so that a kill interrupts downloads
        calm = _run(deployment, api, size, first_id=13_000_000)
        disturbed, kill_records = _run_with_kills(
            deployment, api, size, times, patience=size.slowest + recovery_seconds + restart_seconds + 60
        )

        check_completed(report, deployment, disturbed)
        unfinished = [kill.unfinished for kill in kill_records]
        report.check("there was unfinished work at each kill", all(unfinished), kill_records)
        check_files(report, deployment, api, disturbed)
        check_no_stray_files(report, deployment)
        limit = recovery_seconds + restart_seconds
        before, after = seconds_taken(deployment, calm), seconds_taken(deployment, disturbed)
        late = [
            after.get(hit.remote_id, float("inf")) - before.get(quiet.remote_id, float("-inf"))
            for quiet, hit in zip(calm, disturbed, strict=True)
        ]
        report.check(
            f"each job completed within {recovery_seconds} + {restart_seconds} s of its time without kills",
            max(late) <= limit,
            f"{sum(seconds > limit for seconds in late)} jobs, worst {max(late):.1f} s",
        )
        ledger, ids = api.ledger(), {job.remote_id for job in disturbed}
        started = ledger.gets_per_output(lambda get: get.remote_id in ids)
        repeated = {output: count for output, count in started.items() if count > 1 + times}
        report.none_of("at most one extra GET per output and kill", repeated)
        extra = sum(count - 1 for count in started.values())
        report.figure("jobs / kills", f"{len(disturbed)} / {times}")
        report.figure(
            "kills: at second, unfinished jobs",
            ", ".join(f"{kill.second:.1f}, {kill.unfinished}" for kill in kill_records),
        )
        report.figure("later than without kills, p50 / p95 / max (s)", _spread(late))
        report.figure(
            "completed after, without and with kills (s)", f"{max(before.values()):.1f} {max(after.values()):.1f}"
        )
        for _, quiet, hit in sorted(zip(late, calm, disturbed, strict=True), key=lambda entry: -entry[0])[:3]:
            report.figure(f"late: {hit.remote_id}", _timeline(ledger, before[quiet.remote_id], after, hit))
        report.figure("extra GETs in all", extra)
        calls, rows = ledger.calls_per_job(), rows_of(deployment, disturbed)
        report.figure("calls not in polls", sum(calls[remote] - row["polls"] for remote, row in rows.items()))
        again = {remote: count for remote, count in ledger.calls_after_success().items() if remote in ids}
        report.figure("calls after the success answer (lost in a kill)", sum(again.values()))
        report.check("at most one lost answer per job and kill", max(again.values(), default=0) <= times, again)
        quiet_ids = {job.remote_id for job in calm}
        report.none_of(
            "without kills no fetch call after the success answer",
            [remote for remote in ledger.calls_after_success() if remote in quiet_ids],
        )
    return report


def track_races(installation: Installation, home: Path, size: Size) -> Report:
    """Track one job a hundred times at once from eight processes: there is one row, and all calls return its id."""
    report = Report("track-races")
    with ApiProcess(seed=size.seed, accept=[KEY]) as api, Deployment(installation, home, api.base, KEY) as deployment:
        start_working(report, deployment)
        jobs = [ApiJob(remote_id, time.time(), 2.0) for remote_id in ("77001", "77002")]
        api.register(jobs)
        for remote_id, method, script in (("77001", "by name", RACE_BY_NAME), ("77002", "by import", RACE_BY_IMPORT)):
            answers, errors = _race(deployment, remote_id, script)
            rows = deployment.rows("SELECT id FROM fetch_jobs WHERE remote_id = :remote", remote=remote_id)
            report.none_of(f"{method}: no call failed", errors)
            report.check(
                f"{method}: all {PROCESSES * CALLS_EACH} calls were answered", len(answers) == PROCESSES * CALLS_EACH
            )
            report.check(f"{method}: one row", len(rows) == 1, rows)
            report.check(f"{method}: all got its id", set(answers) == {row["id"] for row in rows}, set(answers))
        wait_final(deployment, jobs, 40)
        check_completed(report, deployment, jobs)
        complete = api.ledger().gets_per_output(lambda get: get.complete)
        report.check("each output was downloaded once", set(complete.values()) == {1}, dict(complete))
    return report


def start_working(report: Report, deployment: Deployment) -> None:
    began = time.monotonic()
    deployment.migrate()
    deployment.start(*WORKING, "beat")
    deployment.wait_ready()
    report.figure("migrated and ready after (s)", time.monotonic() - began)


def _run(deployment: Deployment, api: ApiProcess, size: Size, first_id: int) -> list[ApiJob]:
    jobs = make_batch(size, first_id)
    api.register(jobs)
    track_by_name(deployment, jobs)
    wait_final(deployment, jobs, size.slowest + 90)
    return jobs


def _run_with_kills(
    deployment: Deployment, api: ApiProcess, size: Size, times: int, patience: float
) -> tuple[list[ApiJob], list[Kill]]:
    """Track the jobs, and kill the workers each time when the next share of the jobs is completed."""
    jobs = make_batch(size, first_id=14_000_000)
    api.register(jobs)
    track_by_name(deployment, jobs)
    wait_until(lambda: len(rows_of(deployment, jobs)) == len(jobs), 30, 0.1)
    kill_records = []
    for number in range(times):
        share = (number + 1) / (times + 1.5)
        _wait_completed(deployment, jobs, share * len(jobs), patience)
        deployment.kill(*WORKING)
        kill_records.append(Kill(time.time() - jobs[0].started, len(jobs) - _completed(deployment, jobs)))
        deployment.start(*WORKING)
    wait_final(deployment, jobs, patience)
    return jobs, kill_records


def _timeline(ledger: Ledger, before: float, after: Mapping[str, float], job: ApiJob) -> str:
    """Describe a late job: its calls and downloads, in seconds since the start."""
    calls = [f"{call.began - job.started:.1f}" for call in ledger.calls_about(job.remote_id)]
    gets = [
        f"{get.position}@{get.began - job.started:.1f}" + ("" if get.complete else " cut")
        for get in ledger.gets
        if get.remote_id == job.remote_id
    ]
    seconds = after.get(job.remote_id, float("nan"))
    return f"{seconds:.1f} after {before:.1f}; ready {job.seconds:.1f}; calls {calls}; GETs {gets}"


def _wait_completed(deployment: Deployment, jobs: list[ApiJob], minimum: float, patience: float) -> None:
    wait_until(lambda: _completed(deployment, jobs) >= minimum, patience, 0.1)


def _completed(deployment: Deployment, jobs: list[ApiJob]) -> int:
    return sum(row["status"] == "completed" for row in rows_of(deployment, jobs).values())


def _race(deployment: Deployment, remote_id: str, script: str) -> tuple[list[int], list[str]]:
    python = str(deployment.installation.bin / "python")
    start = time.time() + 4  # all processes have imported their libraries by then
    arguments = [deployment.redis_url, remote_id, str(CALLS_EACH), str(start)]
    processes = [
        subprocess.Popen(
            [python, "-c", script, *arguments],
            cwd=deployment.checkout,
            env=deployment.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(PROCESSES)
    ]
    outputs = [process.communicate(timeout=60) for process in processes]
    errors = [stderr[-500:] for process, (_, stderr) in zip(processes, outputs, strict=True) if process.returncode]
    return [answer for stdout, _ in outputs if stdout for answer in json.loads(stdout)], errors


def _differences(first: Mapping[Key, int], second: Mapping[Key, int]) -> str:
    keys = [key for key in {*first, *second} if first.get(key, 0) != second.get(key, 0)]
    return f"{len(keys)} differ: " + ", ".join(f"{key}: {first.get(key, 0)}/{second.get(key, 0)}" for key in keys[:8])


def _spread(values: list[float]) -> str:
    return " / ".join(f"{quantile(values, share):.2f}" for share in (0.5, 0.95, 1.0))
