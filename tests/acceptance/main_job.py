"""The main job from end to end, the same under kill -9, and the same job tracked a hundred times at once."""

import json
import subprocess
import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.acceptance.api import Job
from tests.acceptance.hosted import Hosted, Ledger
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
from tests.acceptance.stand import WORKING, Place, Stand, wait_until

KEY = "acceptance-key-1f6b"
CALLS_PER_SECOND = 200  # what the stand sets SD_API_RPS to
BURST = CALLS_PER_SECOND // 5  # what the README states
RACERS, CALLS_EACH = 8, 13

Thing = TypeVar("Thing", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Blow:
    """One kill: when, in seconds since the start, and how many jobs were not completed then."""

    second: float
    under_way: int


RACE_BY_NAME = """
import json, sys, threading, time
from celery import Celery
redis_url, remote_id, calls, start = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
client = Celery("racer", broker=redis_url, backend=redis_url)
time.sleep(max(0.0, start - time.time()))
sent = [client.send_task("worker.track", [remote_id], queue="fetch-worker") for _ in range(calls)]
print(json.dumps([promise.get(timeout=40) for promise in sent]))
"""

RACE_BY_IMPORT = """
import json, sys, threading, time
from worker import track
remote_id, calls, start = sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
gate, answers = threading.Barrier(calls), []
def race():
    gate.wait()
    answers.append(track(remote_id))
time.sleep(max(0.0, start - time.time()))
threads = [threading.Thread(target=race) for _ in range(calls)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(json.dumps(answers))
"""


def main_job(place: Place, home: Path, size: Size) -> Report:
    """Jobs sent by task name are all completed, each byte right, no call and no GET too many."""
    report = Report("main-job")
    with Hosted(seed=size.seed, accept=[KEY]) as hosted, Stand(place, home, hosted.base, KEY) as stand:
        start_working(report, stand)
        jobs = make_batch(size, first_id=12_000_000)
        hosted.register(jobs)
        promises = track_by_name(stand, jobs)
        sent_after = time.time() - jobs[0].started
        answers = [promise.get(timeout=60) for promise in promises]
        wait_final(stand, jobs, size.slowest + 90)
        time.sleep(2)  # a call or a GET too many would come now

        check_completed(report, stand, jobs)
        rows, ledger = rows_of(stand, jobs), hosted.ledger()
        report.check(
            "the result of each worker.track is the job's id",
            answers == [rows[job.remote_id]["id"] for job in jobs if job.remote_id in rows],
            answers[:5],
        )
        check_files(report, stand, hosted, jobs)
        check_no_stray_files(report, stand)
        complete = ledger.gets_per_output(lambda get: get.complete)
        wanted = {(job.remote_id, position): 1 for job in jobs for position in range(len(job.outputs))}
        report.check("exactly one successful GET per output", dict(complete) == wanted, _differences(complete, wanted))
        report.none_of("no fetch call after ready was seen", ledger.calls_after_success())
        asked = ledger.calls_per_job()
        told = {job.remote_id: rows[job.remote_id]["polls"] for job in jobs if job.remote_id in rows}
        report.check("polls equals the API's own count", dict(asked) == told, _differences(told, asked))
        busiest = ledger.busiest_second()
        most = CALLS_PER_SECOND + BURST
        report.check(f"no second with more than {CALLS_PER_SECOND} + {BURST} calls", busiest <= most, busiest)
        report.none_of("every call had the form of a fetch call", ledger.strays)
        report.none_of("no key went to the picture host", [get for get in ledger.gets if get.carried_key])

        taken = seconds_taken(stand, jobs)
        delays = [taken[job.remote_id] - job.seconds for job in jobs if job.remote_id in taken]
        report.figure("jobs / outputs", f"{len(jobs)} / {len(wanted)}")
        report.figure("all sent after (s)", sent_after)
        report.figure("all completed after (s)", max(taken.values(), default=float("nan")))
        report.figure("ready to completed, p50 / p95 / max (s)", _spread(delays))
        report.figure("processor time (s)", stand.cpu_seconds())
        report.figure("polls per job", len(ledger.calls) / len(jobs))
        report.figure("most calls in one second", busiest)
        report.figure("GETs started / complete", f"{len(ledger.gets)} / {sum(complete.values())}")
    return report


def kills(place: Place, home: Path, size: Size, times: int, recovery_seconds: int, restart_seconds: int) -> Report:
    """The batch twice: undisturbed, then with the working processes killed in the middle and restarted at once."""
    report = Report("kills")
    settings = {"RECOVERY_SECONDS": str(recovery_seconds)}
    with (
        Hosted(seed=size.seed, accept=[KEY]) as hosted,
        Stand(place, home, hosted.base, KEY, **settings) as stand,
    ):
        start_working(report, stand)
        hosted.behave(picture_seconds=0.4)  # long enough that a kill finds some under way
        calm = _run(stand, hosted, size, first_id=13_000_000)
        disturbed, blows = _run_with_kills(
            stand, hosted, size, times, patience=size.slowest + recovery_seconds + restart_seconds + 60
        )

        check_completed(report, stand, disturbed)
        report.check("each kill found work under way", all(blow.under_way for blow in blows), blows)
        check_files(report, stand, hosted, disturbed)
        check_no_stray_files(report, stand)
        most = recovery_seconds + restart_seconds
        before, after = seconds_taken(stand, calm), seconds_taken(stand, disturbed)
        late = [
            after.get(hit.remote_id, float("inf")) - before.get(quiet.remote_id, float("-inf"))
            for quiet, hit in zip(calm, disturbed, strict=True)
        ]
        report.check(
            f"each job completed within {recovery_seconds} + {restart_seconds} s of its time without kills",
            max(late) <= most,
            f"{sum(seconds > most for seconds in late)} jobs, worst {max(late):.1f} s",
        )
        ledger, ids = hosted.ledger(), {job.remote_id for job in disturbed}
        started = ledger.gets_per_output(lambda get: get.remote_id in ids)
        too_often = {output: count for output, count in started.items() if count > 1 + times}
        report.none_of("at most one extra GET per output and kill", too_often)
        extra = sum(count - 1 for count in started.values())
        report.figure("jobs / kills", f"{len(disturbed)} / {times}")
        report.figure(
            "kills: at second, rows under way", ", ".join(f"{blow.second:.1f}, {blow.under_way}" for blow in blows)
        )
        report.figure("later than without kills, p50 / p95 / max (s)", _spread(late))
        report.figure(
            "completed after, without and with kills (s)", f"{max(before.values()):.1f} {max(after.values()):.1f}"
        )
        for _, quiet, hit in sorted(zip(late, calm, disturbed, strict=True), key=lambda entry: -entry[0])[:3]:
            report.figure(f"late: {hit.remote_id}", _story(ledger, before[quiet.remote_id], after, hit))
        report.figure("extra GETs in all", extra)
        asked, rows = ledger.calls_per_job(), rows_of(stand, disturbed)
        report.figure("calls not in polls", sum(asked[remote] - row["polls"] for remote, row in rows.items()))
        again = {remote: count for remote, count in ledger.calls_after_success().items() if remote in ids}
        report.figure("calls after ready (answers lost in a kill)", sum(again.values()))
        report.check("at most one lost answer per job and kill", max(again.values(), default=0) <= times, again)
        quiet_ids = {job.remote_id for job in calm}
        report.none_of(
            "without kills no fetch call after ready was seen",
            [remote for remote in ledger.calls_after_success() if remote in quiet_ids],
        )
    return report


def track_races(place: Place, home: Path, size: Size) -> Report:
    """The same job tracked a hundred times at once from eight processes: one row, one answer."""
    report = Report("track-races")
    with Hosted(seed=size.seed, accept=[KEY]) as hosted, Stand(place, home, hosted.base, KEY) as stand:
        start_working(report, stand)
        jobs = [Job(remote_id, time.time(), 2.0) for remote_id in ("77001", "77002")]
        hosted.register(jobs)
        for remote_id, how, script in (("77001", "by name", RACE_BY_NAME), ("77002", "by import", RACE_BY_IMPORT)):
            answers, errors = _race(stand, remote_id, script)
            rows = stand.rows("SELECT id FROM fetch_jobs WHERE remote_id = :remote", remote=remote_id)
            report.none_of(f"{how}: no call failed", errors)
            report.check(f"{how}: all {RACERS * CALLS_EACH} calls were answered", len(answers) == RACERS * CALLS_EACH)
            report.check(f"{how}: one row", len(rows) == 1, rows)
            report.check(f"{how}: all got its id", set(answers) == {row["id"] for row in rows}, set(answers))
        wait_final(stand, jobs, 40)
        check_completed(report, stand, jobs)
        complete = hosted.ledger().gets_per_output(lambda get: get.complete)
        report.check("each output was downloaded once", set(complete.values()) == {1}, dict(complete))
    return report


def start_working(report: Report, stand: Stand) -> None:
    began = time.monotonic()
    stand.migrate()
    stand.start(*WORKING, "beat")
    stand.wait_ready()
    report.figure("migrated and ready after (s)", time.monotonic() - began)


def _run(stand: Stand, hosted: Hosted, size: Size, first_id: int) -> list[Job]:
    jobs = make_batch(size, first_id)
    hosted.register(jobs)
    track_by_name(stand, jobs)
    wait_final(stand, jobs, size.slowest + 90)
    return jobs


def _run_with_kills(
    stand: Stand, hosted: Hosted, size: Size, times: int, patience: float
) -> tuple[list[Job], list[Blow]]:
    """Kill when all rows are in and the next share of the jobs is completed."""
    jobs = make_batch(size, first_id=14_000_000)
    hosted.register(jobs)
    track_by_name(stand, jobs)
    wait_until(lambda: len(rows_of(stand, jobs)) == len(jobs), 30, 0.1)
    blows = []
    for number in range(times):
        share = (number + 1) / (times + 1.5)
        _wait_completed(stand, jobs, share * len(jobs), patience)
        stand.kill(*WORKING)
        blows.append(Blow(time.time() - jobs[0].started, len(jobs) - _completed(stand, jobs)))
        stand.start(*WORKING)
    wait_final(stand, jobs, patience)
    return jobs, blows


def _story(ledger: Ledger, before: float, after: Mapping[str, float], job: Job) -> str:
    """What a late job waited for: when it was asked about and downloaded, in seconds since the start."""
    calls = [f"{call.began - job.started:.1f}" for call in ledger.calls_about(job.remote_id)]
    gets = [
        f"{get.position}@{get.began - job.started:.1f}" + ("" if get.complete else " cut")
        for get in ledger.gets
        if get.remote_id == job.remote_id
    ]
    took = after.get(job.remote_id, float("nan"))
    return f"{took:.1f} after {before:.1f}; ready {job.seconds:.1f}; calls {calls}; GETs {gets}"


def _wait_completed(stand: Stand, jobs: list[Job], least: float, patience: float) -> None:
    wait_until(lambda: _completed(stand, jobs) >= least, patience, 0.1)


def _completed(stand: Stand, jobs: list[Job]) -> int:
    return sum(row["status"] == "completed" for row in rows_of(stand, jobs).values())


def _race(stand: Stand, remote_id: str, script: str) -> tuple[list[int], list[str]]:
    python = str(stand.place.bin / "python")
    start = time.time() + 4  # all have imported their libraries by then
    words = [stand.redis_url, remote_id, str(CALLS_EACH), str(start)]
    racers = [
        subprocess.Popen(
            [python, "-c", script, *words],
            cwd=stand.checkout,
            env=stand.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(RACERS)
    ]
    said = [racer.communicate(timeout=60) for racer in racers]
    errors = [stderr[-500:] for racer, (_, stderr) in zip(racers, said, strict=True) if racer.returncode]
    return [answer for stdout, _ in said if stdout for answer in json.loads(stdout)], errors


def _differences(one: Mapping[Thing, int], other: Mapping[Thing, int]) -> str:
    keys = [key for key in {*one, *other} if one.get(key, 0) != other.get(key, 0)]
    return f"{len(keys)} differ: " + ", ".join(f"{key}: {one.get(key, 0)}/{other.get(key, 0)}" for key in keys[:8])


def _spread(values: list[float]) -> str:
    return " / ".join(f"{quantile(values, share):.2f}" for share in (0.5, 0.95, 1.0))
