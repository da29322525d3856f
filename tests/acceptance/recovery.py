"""How soon work moves again after `kill -9` of any process, and what restarts during a deploy cost."""

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

from tests.acceptance.api import Job, Output, spread
from tests.acceptance.hosted import Hosted
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
from tests.acceptance.stand import WORKING, NotReady, Place, Stand, wait_until

MARGIN = 5.0  # seconds beside RECOVERY_SECONDS
SETTLE = 3.0  # seconds of quiet between a recovery and the next kill
LATENCY, PICTURE = 0.4, 0.5  # seconds: long enough that a kill finds something under way
ROLLING = ("worker1", "downloads", "worker2")
RESTARTS, ROLLING_JOBS, ROLLING_SECONDS = 16, 400, 70.0

# What was under way or due at a moment, and how one sees that it has moved since.
UNDER_WAY = """
SELECT 'job ' || id AS name, claim_token, polls AS tries, status FROM fetch_jobs
WHERE claim_token IS NOT NULL OR due_at <= clock_timestamp()
UNION ALL
SELECT 'output ' || id, claim_token, attempts, status FROM fetch_outputs
WHERE claim_token IS NOT NULL OR due_at <= clock_timestamp()
"""
NOW = """
SELECT 'job ' || id AS name, claim_token, polls AS tries, status,
    claim_token IS NULL AND due_at > clock_timestamp() + interval '1 second' AS waits
FROM fetch_jobs WHERE id = ANY(:jobs)
UNION ALL
SELECT 'output ' || id, claim_token, attempts, status,
    claim_token IS NULL AND due_at > clock_timestamp() + interval '1 second'
FROM fetch_outputs WHERE id = ANY(:outputs)
"""


class Load:
    """Ten jobs a second, each ready after 1 to 6 seconds, until it is stopped."""

    def __init__(self, stand: Stand, hosted: Hosted) -> None:
        self.jobs: list[Job] = []
        self._stand, self._hosted = stand, hosted
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._feed, daemon=True)

    @contextmanager
    def flowing(self) -> Iterator["Load"]:
        """While the block runs."""
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
                Job(
                    remote_id=str(number),
                    started=time.time(),
                    seconds=spread(self._hosted.seed, f"{number}/seconds", 1.0, 6.0),
                    outputs=(Output(),) * (1 + number % 3),
                )
                for number in (next(numbers) for _ in range(5))
            ]
            self._hosted.register(jobs)
            while not self._stop.is_set():
                try:  # the broker is one of the things that are killed; a web app would try again, too
                    track_by_name(self._stand, jobs)
                    break
                except Exception:  # whatever the client says of a broker that is away
                    time.sleep(0.2)
            self.jobs += jobs


class Hosts:
    """Two hosts under `up`: one beside us, and one whose process ids mean nothing to anybody else."""

    def __init__(self, stand: Stand) -> None:
        self.stand = stand

    def start_near(self) -> None:
        """The one whose dead are noticed by those beside them."""
        self.stand.start_line("near", "env FLOWER_PORT=0 fetch-worker up")

    def start_far(self) -> None:
        """The one whose dead are known by their leases alone."""
        alone = "unshare --pid --uts --fork --kill-child --mount-proc"
        self.stand.start_line("far", f"{alone} sh -c 'hostname far && FLOWER_PORT=0 exec fetch-worker up'")

    def child(self, kind: str) -> int:
        """The process of that kind beside us."""
        near = self.stand.pid_of("near")
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
                words = (stat.parent / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
            named = f"{kind}@" if kind in WORKING else f" {kind} "
            if fields[1] == str(near) and fields[0] != "Z" and named in f"{words} ":
                return int(stat.parent.name)
        return 0

    def kill(self, kind: str) -> None:
        """`kill -9` of what is named so; a whole host is started again at once, all else is what `up` is for."""
        if kind == "far":
            self.stand.kill("far")
            self.start_far()
        elif kind == "up":
            os.kill(self.stand.pid_of("near"), signal.SIGKILL)
            time.sleep(0.5)
            self.start_near()
        elif kind == "redis":
            self.stand.restart_redis()
        else:
            if not wait_until(lambda: self.child(kind) > 0, 20, 0.05):
                raise NotReady(f"no {kind} runs")
            os.kill(self.child(kind), signal.SIGKILL)


KINDS = ("worker", "downloads", "beat", "flower", "redis", "up", "far")


def recovery(place: Place, home: Path, kills: int, recovery_seconds: int) -> Report:
    """Every process in turn is killed under load: what was under way or due moves again in time, nothing is lost."""
    report = Report(f"recovery, {recovery_seconds} s")
    if not shutil.which("unshare") or os.geteuid():
        report.check("a second host can be made (root and unshare)", False)
        return report
    settings = {"RECOVERY_SECONDS": str(recovery_seconds), "SD_API_RPS": "100"}
    taken: dict[str, list[float]] = defaultdict(list)
    draw = random.Random(1)
    with Hosted(seed=1, accept=[KEY]) as hosted, Stand(place, home, hosted.base, KEY, **settings) as stand:
        hosts = Hosts(stand)
        hosts.start_near()
        hosts.start_far()
        stand.wait_ready(2 * len(WORKING), 60)
        hosted.behave(latency_seconds=LATENCY, picture_seconds=PICTURE)
        load = Load(stand, hosted)
        with load.flowing():
            time.sleep(8)
            for number in range(kills):
                kind = KINDS[number % len(KINDS)]
                before = stand.rows(UNDER_WAY)
                began = time.monotonic()
                hosts.kill(kind)
                seconds = _moved(stand, before, began, recovery_seconds + 60)
                taken[kind].append(seconds)
                print(f"{kind}: {len(before)} rows moved after {seconds:.1f} s", file=sys.stderr, flush=True)
                time.sleep(SETTLE + draw.random())
        wait_until(lambda: len(rows_of(stand, load.jobs)) == len(load.jobs), 5)
        rows = rows_of(stand, load.jobs)
        lost = [job for job in load.jobs if job.remote_id not in rows]
        track_by_name(stand, lost)
        report.figure("messages that went with Redis before they were rows, sent again", len(lost))
        wait_final(stand, load.jobs, recovery_seconds + 60)
        check_completed(report, stand, load.jobs)
        check_files(report, stand, hosted, load.jobs)
        check_no_stray_files(report, stand)
    every = [seconds for of_kind in taken.values() for seconds in of_kind]
    report.check(
        f"all that was under way or due moved within {recovery_seconds} + {MARGIN:.0f} s of each kill",
        max(every) <= recovery_seconds + MARGIN,
        dict(taken),
    )
    report.figure("jobs / kills", f"{len(load.jobs)} / {len(every)}")
    report.figure("moves again after (s), median / max", f"{quantile(every, 0.5):.1f} / {max(every):.1f}")
    for kind, of_kind in taken.items():
        report.figure(f"{kind}, median / max of {len(of_kind)}", f"{quantile(of_kind, 0.5):.1f} / {max(of_kind):.1f}")
    return report


def _moved(stand: Stand, before: list[dict[str, Any]], began: float, patience: float) -> float:
    """Seconds until each of these rows was claimed anew, answered, or came to rest."""
    waiting = {row["name"]: row for row in before}
    while waiting and time.monotonic() < began + patience:
        ids: dict[str, list[int]] = {"job": [], "output": []}
        for name in waiting:
            table, _, number = name.partition(" ")
            ids[table].append(int(number))
        for row in stand.rows(NOW, jobs=ids["job"], outputs=ids["output"]):
            was = waiting[row["name"]]
            claimed = row["claim_token"] is not None and row["claim_token"] != was["claim_token"]
            if claimed or row["waits"] or (row["tries"], row["status"]) != (was["tries"], was["status"]):
                del waiting[row["name"]]
        time.sleep(0.05)
    return time.monotonic() - began


def restarts(place: Place, home: Path) -> Report:
    """Sixteen rolling restarts by SIGTERM under load: jobs are asked about as if nothing were, nobody sees an error."""
    report = Report("restarts")
    settings = {"POLL_POLICY": "fixed"}
    with Hosted(seed=1, accept=[KEY]) as hosted, Stand(place, home, hosted.base, KEY, **settings) as stand:
        stand.migrate()
        stand.start_workers(2)
        stand.start("downloads", "beat")
        stand.wait_ready(len(ROLLING))
        hosted.behave(latency_seconds=0.2, picture_seconds=0.3)
        quiet = _patient_jobs(19_000_000)
        calm = _waits(stand, hosted, quiet, lambda: None)
        stubborn: list[str] = []
        stopped: list[float] = []

        def restart() -> None:
            pause = (ROLLING_SECONDS - 10) / RESTARTS
            for number in range(RESTARTS):
                began = time.monotonic()
                name = ROLLING[number % len(ROLLING)]
                stubborn.extend(stand.stop(name, seconds=30))
                stopped.append(time.monotonic() - began)
                if name == "downloads":
                    stand.start(name)
                else:
                    stand.start_worker(name)
                time.sleep(max(0.0, pause - (time.monotonic() - began)))

        disturbed = _patient_jobs(20_000_000)
        rolling = _waits(stand, hosted, disturbed, restart)
        jobs = quiet + disturbed
        check_completed(report, stand, jobs)
        check_files(report, stand, hosted, jobs)
        check_no_stray_files(report, stand)
        parts = [path for path in stand.outputs.rglob("*") if path.is_file() and ".part" in path.name]
        report.none_of("no partial file is left", parts)
        report.none_of("all ended by themselves", stubborn)
        said = [line for log in stand.logs() for line in log.read_text().splitlines() if _is_error(line)]
        report.none_of("no error in any log", said)
    normal = quantile(calm, 0.5)
    late = [max(0.0, wait - normal) for wait in rolling]
    worst = quantile(late, 0.99)
    report.check("the delay added to a poll is under 2 s at the 99th percentile", worst < 2, worst)
    for name, waits in (("without", calm), ("with 16 restarts", rolling)):
        figures = " / ".join(f"{quantile(waits, share):.2f}" for share in (0.5, 0.95, 0.99))
        report.figure(f"between two requests {name} (s), p50 / p95 / p99 / max", f"{figures} / {max(waits):.2f}")
    report.figure("delay added, p99 / max (s)", f"{worst:.2f} / {max(late):.2f}")
    report.figure("asked to end to gone (s), median / max", f"{quantile(stopped, 0.5):.1f} / {max(stopped):.1f}")
    report.figure("waits measured", len(rolling))
    return report


def _is_error(line: str) -> bool:
    return "Traceback" in line or "ERROR" in line or "CRITICAL" in line


def _patient_jobs(first: int) -> list[Job]:
    """Jobs that all take about as long as the restarts."""
    started = time.time()
    return [
        Job(
            remote_id=str(first + number),
            started=started,
            seconds=spread(1, f"{number}/seconds", ROLLING_SECONDS - 10, ROLLING_SECONDS),
            outputs=(Output(),),
        )
        for number in range(ROLLING_JOBS)
    ]


def _waits(stand: Stand, hosted: Hosted, jobs: list[Job], meanwhile: Callable[[], None]) -> list[float]:
    """The seconds between two requests about the same job."""
    hosted.register(jobs)
    for begin in range(0, len(jobs), 20):
        track_by_name(stand, jobs[begin : begin + 20])
        time.sleep(0.1)
    meanwhile()
    wait_final(stand, jobs, ROLLING_SECONDS + 60)
    calls = defaultdict(list)
    for call in hosted.ledger().calls:
        calls[call.remote_id].append(call.began)
    return [later - earlier for job in jobs for earlier, later in pairwise(sorted(calls[job.remote_id]))]
