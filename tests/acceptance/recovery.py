"""Recovery: how soon work continues after a process is killed, and how much restarts delay polls."""

import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count, pairwise
from pathlib import Path
from typing import Any

from tests.acceptance.api import ApiJob, ApiOutput, spread
from tests.acceptance.api_process import ApiProcess
from tests.acceptance.deployment import WORKING, Deployment, Installation, NotReady, wait_until
from tests.acceptance.jobs import (
    check_completed,
    check_files,
    check_no_stray_files,
    rows_of,
    track_by_name,
    wait_final,
)
from tests.acceptance.main_job import KEY
from tests.acceptance.report import Report, quantile

MARGIN = 5.0  # seconds beyond RECOVERY_SECONDS
SETTLE = 3.0  # seconds between a recovery and the next kill
LATENCY, PICTURE = 0.4, 0.5  # seconds: long enough that a kill interrupts requests
ROLLING = ("worker1", "downloads", "worker2")
RESTARTS, ROLLING_JOBS, ROLLING_SECONDS = 16, 400, 70.0

# Rows that are claimed or due, and their state later, which shows whether work on them has continued.
ACTIVE_ROWS = """
SELECT 'job ' || id AS name, claim_token, polls AS tries, status FROM fetch_jobs
WHERE claim_token IS NOT NULL OR due_at <= clock_timestamp()
UNION ALL
SELECT 'output ' || id, claim_token, attempts, status FROM fetch_outputs
WHERE claim_token IS NOT NULL OR due_at <= clock_timestamp()
"""
CURRENT_ROWS = """
SELECT 'job ' || id AS name, claim_token, polls AS tries, status,
    claim_token IS NULL AND due_at > clock_timestamp() + interval '1 second' AS waits
FROM fetch_jobs WHERE id = ANY(:jobs)
UNION ALL
SELECT 'output ' || id, claim_token, attempts, status,
    claim_token IS NULL AND due_at > clock_timestamp() + interval '1 second'
FROM fetch_outputs WHERE id = ANY(:outputs)
"""


class Load:
    """Tracks ten jobs a second in a thread. Each is ready after 1 to 6 seconds."""

    def __init__(self, deployment: Deployment, api: ApiProcess) -> None:
        self.jobs: list[ApiJob] = []
        self._deployment, self._api = deployment, api
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._feed, daemon=True)

    @contextmanager
    def running(self) -> Iterator["Load"]:
        """Track jobs while the block runs."""
        self._thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            self._thread.join()

    def _feed(self) -> None:
        numbers = count(18_000_000)
        while not self._stop.wait(0.5):
            jobs = [
                ApiJob(
                    remote_id=str(number),
                    started=time.time(),
                    seconds=spread(self._api.seed, f"{number}/seconds", 1.0, 6.0),
                    outputs=(ApiOutput(),) * (1 + number % 3),
                )
                for number in (next(numbers) for _ in range(5))
            ]
            self._api.register(jobs)
            while not self._stop.is_set():
                try:  # the broker may be down; a web app would retry as well
                    track_by_name(self._deployment, jobs)
                    break
                except Exception:  # the client raises different errors if the broker is down
                    time.sleep(0.2)
            self.jobs += jobs


class Hosts:
    """Two hosts that run `up`: "near" in this PID namespace, "far" in its own."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment

    def start_near(self) -> None:
        """Start the near host. Its dead processes are detected by other processes of the host."""
        self.deployment.start_line("near", "env FLOWER_PORT=0 fetch-worker up")

    def start_far(self) -> None:
        """Start the far host. Its dead processes are detected only when their leases expire."""
        unshare = "unshare --pid --uts --fork --kill-child --mount-proc"
        self.deployment.start_line("far", f"{unshare} sh -c 'hostname far && FLOWER_PORT=0 exec fetch-worker up'")

    def child(self, kind: str) -> int:
        """Return the id of the near host's process of this kind, or 0."""
        near = self.deployment.pid_of("near")
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
                command = (stat.parent / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
            marker = f"{kind}@" if kind in WORKING else f" {kind} "
            if fields[1] == str(near) and fields[0] != "Z" and marker in f"{command} ":
                return int(stat.parent.name)
        return 0

    def kill(self, kind: str) -> None:
        """Kill a process of this kind. A host is started again at once; `up` restarts the other processes."""
        if kind == "far":
            self.deployment.kill("far")
            self.start_far()
        elif kind == "up":
            os.kill(self.deployment.pid_of("near"), signal.SIGKILL)
            time.sleep(0.5)
            self.start_near()
        elif kind == "redis":
            self.deployment.restart_redis()
        else:
            if not wait_until(lambda: self.child(kind) > 0, 20, 0.05):
                raise NotReady(f"no {kind} process is running")
            os.kill(self.child(kind), signal.SIGKILL)


KINDS = ("worker", "downloads", "beat", "flower", "redis", "up", "far")


def recovery(installation: Installation, home: Path, kills: int, recovery_seconds: int) -> Report:
    """Kill each kind of process in turn under load: claimed and due work continues in time, and nothing is lost."""
    report = Report(f"recovery, {recovery_seconds} s")
    if not shutil.which("unshare") or os.geteuid():
        report.check("a second host can be started (root and unshare)", False)
        return report
    settings = {"RECOVERY_SECONDS": str(recovery_seconds), "SD_API_RPS": "100"}
    recovery_times: dict[str, list[float]] = defaultdict(list)
    rng = random.Random(1)
    with (
        ApiProcess(seed=1, accept=[KEY]) as api,
        Deployment(installation, home, api.base, KEY, **settings) as deployment,
    ):
        hosts = Hosts(deployment)
        hosts.start_near()
        hosts.start_far()
        deployment.wait_ready(2 * len(WORKING), 60)
        api.behave(latency_seconds=LATENCY, picture_seconds=PICTURE)
        load = Load(deployment, api)
        with load.running():
            time.sleep(8)
            for number in range(kills):
                kind = KINDS[number % len(KINDS)]
                before = deployment.rows(ACTIVE_ROWS)
                began = time.monotonic()
                hosts.kill(kind)
                seconds = _wait_for_progress(deployment, before, began, recovery_seconds + 60)
                recovery_times[kind].append(seconds)
                print(f"{kind}: {len(before)} rows continued after {seconds:.1f} s", file=sys.stderr, flush=True)
                time.sleep(SETTLE + rng.random())
        wait_until(lambda: len(rows_of(deployment, load.jobs)) == len(load.jobs), 5)
        rows = rows_of(deployment, load.jobs)
        lost = [job for job in load.jobs if job.remote_id not in rows]
        track_by_name(deployment, lost)
        report.figure("messages lost with Redis and sent again", len(lost))
        wait_final(deployment, load.jobs, recovery_seconds + 60)
        check_completed(report, deployment, load.jobs)
        check_files(report, deployment, api, load.jobs)
        check_no_stray_files(report, deployment)
    all_times = [seconds for of_kind in recovery_times.values() for seconds in of_kind]
    report.check(
        f"all claimed and due work continued within {recovery_seconds} + {MARGIN:.0f} s of each kill",
        max(all_times) <= recovery_seconds + MARGIN,
        dict(recovery_times),
    )
    report.figure("jobs / kills", f"{len(load.jobs)} / {len(all_times)}")
    report.figure("continues after (s), median / max", f"{quantile(all_times, 0.5):.1f} / {max(all_times):.1f}")
    for kind, of_kind in recovery_times.items():
        report.figure(f"{kind}, median / max of {len(of_kind)}", f"{quantile(of_kind, 0.5):.1f} / {max(of_kind):.1f}")
    return report


def _wait_for_progress(deployment: Deployment, before: list[dict[str, Any]], began: float, patience: float) -> float:
    """Wait until each of these rows is claimed again, has an answer, or waits for its due time. Return the seconds."""
    waiting = {row["name"]: row for row in before}
    while waiting and time.monotonic() < began + patience:
        ids: dict[str, list[int]] = {"job": [], "output": []}
        for name in waiting:
            table, _, number = name.partition(" ")
            ids[table].append(int(number))
        for row in deployment.rows(CURRENT_ROWS, jobs=ids["job"], outputs=ids["output"]):
            old = waiting[row["name"]]
            claimed = row["claim_token"] is not None and row["claim_token"] != old["claim_token"]
            if claimed or row["waits"] or (row["tries"], row["status"]) != (old["tries"], old["status"]):
                del waiting[row["name"]]
        time.sleep(0.05)
    return time.monotonic() - began


def restarts(installation: Installation, home: Path) -> Report:
    """Restart processes 16 times with SIGTERM under load: polls are hardly delayed, and no log has an error."""
    report = Report("restarts")
    settings = {"POLL_POLICY": "fixed"}
    with (
        ApiProcess(seed=1, accept=[KEY]) as api,
        Deployment(installation, home, api.base, KEY, **settings) as deployment,
    ):
        deployment.migrate()
        deployment.start_workers(2)
        deployment.start("downloads", "beat")
        deployment.wait_ready(len(ROLLING))
        api.behave(latency_seconds=0.2, picture_seconds=0.3)
        quiet = _long_jobs(19_000_000)
        undisturbed = _poll_intervals(deployment, api, quiet, lambda: None)
        killed: list[str] = []
        stopped: list[float] = []

        def restart() -> None:
            pause = (ROLLING_SECONDS - 10) / RESTARTS
            for number in range(RESTARTS):
                began = time.monotonic()
                name = ROLLING[number % len(ROLLING)]
                killed.extend(deployment.stop(name, seconds=30))
                stopped.append(time.monotonic() - began)
                if name == "downloads":
                    deployment.start(name)
                else:
                    deployment.start_worker(name)
                time.sleep(max(0.0, pause - (time.monotonic() - began)))

        disturbed = _long_jobs(20_000_000)
        rolling = _poll_intervals(deployment, api, disturbed, restart)
        jobs = quiet + disturbed
        check_completed(report, deployment, jobs)
        check_files(report, deployment, api, jobs)
        check_no_stray_files(report, deployment)
        parts = [path for path in deployment.outputs.rglob("*") if path.is_file() and ".part" in path.name]
        report.none_of("no partial file is left", parts)
        report.none_of("all processes exited by themselves", killed)
        errors = [line for log in deployment.logs() for line in log.read_text().splitlines() if _is_error(line)]
        report.none_of("no error in any log", errors)
    normal = quantile(undisturbed, 0.5)
    delays = [max(0.0, interval - normal) for interval in rolling]
    worst = quantile(delays, 0.99)
    report.check("the delay added to a poll is under 2 s at the 99th percentile", worst < 2, worst)
    for name, intervals in (("without", undisturbed), ("with 16 restarts", rolling)):
        figures = " / ".join(f"{quantile(intervals, share):.2f}" for share in (0.5, 0.95, 0.99))
        report.figure(f"between two requests {name} (s), p50 / p95 / p99 / max", f"{figures} / {max(intervals):.2f}")
    report.figure("delay added, p99 / max (s)", f"{worst:.2f} / {max(delays):.2f}")
    report.figure("SIGTERM to exit (s), median / max", f"{quantile(stopped, 0.5):.1f} / {max(stopped):.1f}")
    report.figure("intervals measured", len(rolling))
    return report


def _is_error(line: str) -> bool:
    return "Traceback" in line or "ERROR" in line or "CRITICAL" in line


def _long_jobs(first: int) -> list[ApiJob]:
    """Return jobs that take about as long as all restarts together."""
    started = time.time()
    return [
        ApiJob(
            remote_id=str(first + number),
            started=started,
            seconds=spread(1, f"{number}/seconds", ROLLING_SECONDS - 10, ROLLING_SECONDS),
            outputs=(ApiOutput(),),
        )
        for number in range(ROLLING_JOBS)
    ]


def _poll_intervals(
    deployment: Deployment, api: ApiProcess, jobs: list[ApiJob], meanwhile: Callable[[], None]
) -> list[float]:
    """Run the jobs and call `meanwhile`. Return the seconds between consecutive polls of each job."""
    api.register(jobs)
    for begin in range(0, len(jobs), 20):
        track_by_name(deployment, jobs[begin : begin + 20])
        time.sleep(0.1)
    meanwhile()
    wait_final(deployment, jobs, ROLLING_SECONDS + 60)
    calls = defaultdict(list)
    for call in api.ledger().calls:
        calls[call.remote_id].append(call.began)
    return [later - earlier for job in jobs for earlier, later in pairwise(sorted(calls[job.remote_id]))]
