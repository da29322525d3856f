"""Polling pace: the measured delay matches the simulator, with one worker or two, and also after a restart."""

import json
import math
import random
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from tests.acceptance.api import ApiJob
from tests.acceptance.api_process import ApiProcess, Ledger
from tests.acceptance.deployment import Deployment, Installation, wait_until
from tests.acceptance.main_job import KEY
from tests.acceptance.report import Report

COUNT, INTERVAL = 300, 0.25
MEDIAN, SPREAD = 8.0, 0.6
LEAD = 3.0  # seconds from the creation of the jobs to the first submission


def draw_durations(count: int, seed: int) -> list[float]:
    """Return random lognormal durations in seconds."""
    rng = random.Random(seed)
    return [MEDIAN * math.exp(rng.gauss(0, SPREAD)) for _ in range(count)]


def submit(deployment: Deployment, api: ApiProcess, durations: Sequence[float], first_id: int) -> list[ApiJob]:
    """Register jobs with these durations at the API and track them by task name, one each quarter of a second."""
    began = time.time() + LEAD
    jobs = [
        ApiJob(str(first_id + number), began + number * INTERVAL, duration) for number, duration in enumerate(durations)
    ]
    api.register(jobs)
    for job in jobs:
        time.sleep(max(0.0, job.started - time.time()))
        at = datetime.fromtimestamp(job.started, UTC).isoformat()
        deployment.client.send_task("worker.track", [job.remote_id], {"submitted_at": at}, queue="fetch-worker")
    return jobs


def delays(ledger: Ledger, jobs: Sequence[ApiJob]) -> list[float]:
    """Return the seconds between "ready" and the success answer, for each job that has one."""
    detected: dict[str, float] = {}
    for call in ledger.calls:
        if call.answer == "success":
            detected.setdefault(call.remote_id, call.began)
    return [detected[job.remote_id] - job.started - job.seconds for job in jobs if job.remote_id in detected]


def wait_until_detected(api: ApiProcess, jobs: Sequence[ApiJob]) -> bool:
    """Wait until all jobs were detected as ready. Return whether they were."""
    return wait_until(lambda: len(delays(api.ledger(), jobs)) == len(jobs), 180, 1.0)


def mean(values: Sequence[float]) -> float:
    """Return the mean, or NaN if there are no values."""
    return sum(values) / len(values) if values else float("nan")


def simulate(deployment: Deployment, durations: Sequence[float]) -> tuple[float, float]:
    """Run the simulator on such a trace. Return the mean delay and the polls per job."""
    trace = deployment.home / "trace.jsonl"
    lines = [json.dumps({"t": n * INTERVAL, "duration": d, "kind": "v3", "eta": None}) for n, d in enumerate(durations)]
    trace.write_text("\n".join(lines))
    result = deployment.document("simulate", "--trace", str(trace))
    return float(result["delay"]["mean"]), float(result["polls_per_job"])


def pace(installation: Installation, home: Path) -> Report:
    """Run 300 jobs with one worker and with two, and again after a restart: the learned pace is kept."""
    report = Report("pace")
    durations = draw_durations(COUNT, seed=1)
    for workers in (1, 2):
        with (
            ApiProcess(seed=1, accept=[KEY]) as api,
            Deployment(installation, home / str(workers), api.base, KEY) as deployment,
        ):
            deployment.migrate()
            deployment.start_workers(workers)
            deployment.wait_ready(workers)
            predicted, polls = simulate(deployment, durations)
            jobs = submit(deployment, api, durations, 12_000_000)
            report.check(f"{workers} workers: every job was detected as ready", wait_until_detected(api, jobs))
            ledger = api.ledger()
            measured = mean(delays(ledger, jobs))
            report.figure(
                f"{workers} workers: mean delay, predicted and measured (s)", f"{predicted:.2f}, {measured:.2f}"
            )
            report.figure(
                f"{workers} workers: polls per job, predicted and measured",
                f"{polls:.2f}, {len(ledger.calls) / COUNT:.2f}",
            )
            report.check(
                f"{workers} workers: the mean delay is within 0.3 s of the prediction", abs(measured - predicted) <= 0.3
            )
            if workers == 1:
                check_restart(report, deployment, api, measured)
    return report


def check_restart(report: Report, deployment: Deployment, api: ApiProcess, cold: float) -> None:
    """Run the same durations twice more, with a restart of all workers in between."""
    durations = draw_durations(COUNT, seed=2)
    warm = submit(deployment, api, durations, 13_000_000)
    wait_until_detected(api, warm)
    deployment.stop("worker1")
    deployment.start_workers(1)
    deployment.wait_ready(1)
    restarted = submit(deployment, api, durations, 14_000_000)
    wait_until_detected(api, restarted)
    ledger = api.ledger()
    before, after = mean(delays(ledger, warm)), mean(delays(ledger, restarted))
    report.figure("mean delay: cold, learned, after a restart (s)", f"{cold:.2f}, {before:.2f}, {after:.2f}")
    report.check("the learned pace survives a restart: the delay is within 10 %", abs(after / before - 1) <= 0.1)
    kinds = deployment.document("status")["kinds"]
    report.figure("status: first kind", json.dumps(kinds[0]) if kinds else "nothing")
    report.check(
        "status has the median duration of such jobs", bool(kinds) and abs(kinds[0]["median"] - MEDIAN) < 2.0, kinds
    )
