"""Pace from outside: pictures are seen as early as the simulator says, after a restart too, and with two that learn."""

import json
import math
import random
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from tests.acceptance.api import Job
from tests.acceptance.hosted import Hosted, Ledger
from tests.acceptance.main_job import KEY
from tests.acceptance.report import Report
from tests.acceptance.stand import Place, Stand, wait_until

COUNT, APART = 300, 0.25
MEDIAN, SPREAD = 8.0, 0.6
LEAD = 3.0  # seconds from making the jobs to the first submission


def drawn(count: int, seed: int) -> list[float]:
    """Lognormal durations in seconds."""
    draw = random.Random(seed)
    return [MEDIAN * math.exp(draw.gauss(0, SPREAD)) for _ in range(count)]


def submitted(stand: Stand, hosted: Hosted, durations: Sequence[float], first_id: int) -> list[Job]:
    """Has jobs of these durations submitted and tracked by name, one each quarter of a second."""
    began = time.time() + LEAD
    jobs = [Job(str(first_id + number), began + number * APART, duration) for number, duration in enumerate(durations)]
    hosted.register(jobs)
    for job in jobs:
        time.sleep(max(0.0, job.started - time.time()))
        at = datetime.fromtimestamp(job.started, UTC).isoformat()
        stand.client.send_task("worker.track", [job.remote_id], {"submitted_at": at}, queue="fetch-worker")
    return jobs


def delays(ledger: Ledger, jobs: Sequence[Job]) -> list[float]:
    """Seconds from ready to the call that saw it, of the jobs that were seen ready."""
    seen: dict[str, float] = {}
    for call in ledger.calls:
        if call.answer == "success":
            seen.setdefault(call.remote_id, call.began)
    return [seen[job.remote_id] - job.started - job.seconds for job in jobs if job.remote_id in seen]


def until_seen(hosted: Hosted, jobs: Sequence[Job]) -> bool:
    """Waits until all are seen ready; whether they were."""
    return wait_until(lambda: len(delays(hosted.ledger(), jobs)) == len(jobs), 180, 1.0)


def mean(values: Sequence[float]) -> float:
    """The mean; nothing where there are no values."""
    return sum(values) / len(values) if values else float("nan")


def simulated(stand: Stand, durations: Sequence[float]) -> tuple[float, float]:
    """What the simulator says of such a trace: (mean delay, polls per job)."""
    trace = stand.home / "trace.jsonl"
    lines = [json.dumps({"t": n * APART, "duration": d, "kind": "v3", "eta": None}) for n, d in enumerate(durations)]
    trace.write_text("\n".join(lines))
    said = stand.document("simulate", "--trace", str(trace))
    return float(said["delay"]["mean"]), float(said["polls_per_job"])


def pace(place: Place, home: Path) -> Report:
    """300 jobs with one worker and with two; then the workers start again, and nothing has to be learned anew."""
    report = Report("pace")
    durations = drawn(COUNT, seed=1)
    for workers in (1, 2):
        with (
            Hosted(seed=1, accept=[KEY]) as hosted,
            Stand(place, home / str(workers), hosted.base, KEY) as stand,
        ):
            stand.migrate()
            stand.start_workers(workers)
            stand.wait_ready(workers)
            predicted, polls = simulated(stand, durations)
            jobs = submitted(stand, hosted, durations, 12_000_000)
            report.check(f"{workers} workers: every job was seen ready", until_seen(hosted, jobs))
            ledger = hosted.ledger()
            found = mean(delays(ledger, jobs))
            report.figure(f"{workers} workers: mean delay, predicted and found (s)", f"{predicted:.2f}, {found:.2f}")
            report.figure(
                f"{workers} workers: polls per job, predicted and found",
                f"{polls:.2f}, {len(ledger.calls) / COUNT:.2f}",
            )
            report.check(
                f"{workers} workers: the mean delay is within 0.3 s of the prediction", abs(found - predicted) <= 0.3
            )
            if workers == 1:
                again(report, stand, hosted, found)
    return report


def again(report: Report, stand: Stand, hosted: Hosted, cold: float) -> None:
    """The same durations twice more, with a restart of all workers in between."""
    durations = drawn(COUNT, seed=2)
    warm = submitted(stand, hosted, durations, 13_000_000)
    until_seen(hosted, warm)
    stand.stop("worker1")
    stand.start_workers(1)
    stand.wait_ready(1)
    restarted = submitted(stand, hosted, durations, 14_000_000)
    until_seen(hosted, restarted)
    ledger = hosted.ledger()
    before, after = mean(delays(ledger, warm)), mean(delays(ledger, restarted))
    report.figure("mean delay: cold, learned, after a restart (s)", f"{cold:.2f}, {before:.2f}, {after:.2f}")
    report.check("nothing is learned anew after a restart: the delay is within 10 %", abs(after / before - 1) <= 0.1)
    kinds = stand.document("status")["kinds"]
    report.figure("status says", json.dumps(kinds[0]) if kinds else "nothing")
    report.check("status tells how long such jobs take", bool(kinds) and abs(kinds[0]["median"] - MEDIAN) < 2.0, kinds)
