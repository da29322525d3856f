"""Pruning during work: a million finished jobs are removed while ten thousand live jobs are claimed and recorded.

Idle and pruning phases alternate, so that other load on the machine affects both.
"""

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.acceptance.deployment import Deployment, Installation
from tests.acceptance.engine import insert_rows
from tests.acceptance.main_job import KEY
from tests.acceptance.report import Report, quantile

BASE = "http://127.0.0.1:9/api/v3"
LIVE = 10_000
ROUNDS, PHASE_SECONDS = 8, 8.0
MAX_RATIO = 1.5  # the most by which pruning may slow down claims
BATCH = 100_000
FINISHED = """
WITH inserted AS (
    INSERT INTO fetch_jobs (account, remote_id, kind, fetch_url, fetch_base, fetch_host, status, submitted_at,
                            tracked_at, deadline_at, deadline_seconds, ready_at, completed_at, polls, last_answer)
    SELECT 'default', 'over' || n, 'image', :base || '/over' || n, :base, :host, 'completed', ago.at, ago.at,
           ago.at + interval '1 hour', 3600, ago.at, ago.at, 5, repeat('12.3 processing ', 5)
    FROM generate_series(CAST(:first AS int), CAST(:last AS int)) AS n, (SELECT now() - interval '40 days' AS at) AS ago
    RETURNING id, completed_at
)
INSERT INTO fetch_outputs (job_id, position, url, proxy_urls, status, location, size_bytes, sha256, media_type,
                           attempts, listed_at, stored_at)
SELECT id, 0, 'https://cdn.example/' || repeat('x', 60) || id || '.png', '[]', 'stored',
       'file:///srv/outputs/' || id / 1000 || '/' || id || '/0-0123456789abcdef.png', 500000, repeat('0', 64),
       'image/png', 1, completed_at, completed_at
FROM inserted
"""
# Claims due jobs and records answers twenty times a second. Each job is due again after ten seconds.
CLAIMS = """
import secrets, sys, time
from datetime import UTC, datetime, timedelta
from worker.core.lifecycle import AskAgain
from worker.core.pacing.policy import PollPlan
from worker.store.engine import database_now, engine_for
from worker.settings import load
from worker.store.claims import claim_jobs
from worker.store.due_groups import DueGroup
from worker.store.results import Outcome, record_answers
from worker.store.counters import Tally
engine = engine_for(load().database)
group = DueGroup("default", 0, sys.argv[1], datetime.now(UTC))
while True:
    began, clock = time.perf_counter(), time.monotonic()
    with engine.begin() as connection:
        jobs = claim_jobs(connection, group, limit=50, token=secrets.token_hex(8), holder="acceptance",
                           lease=timedelta(seconds=30), now=database_now(connection))
    claimed = time.perf_counter()
    outcomes = [Outcome(job, AskAgain(job.facts.strikes, "processing"), "processing", PollPlan(10.0)) for job in jobs]
    with engine.begin() as connection:
        tally = Tally()
        record_answers(connection, outcomes, tally, now=database_now(connection))
        tally.write(connection)
    recorded = time.perf_counter()
    print(clock, len(jobs), 1e3 * (claimed - began), 1e3 * (recorded - claimed), flush=True)
    time.sleep(max(0.0, 0.05 - (recorded - began)))
"""
# Reads a number of seconds from standard input, and prunes for that time.
PRUNES = """
import json, sys, time
from datetime import timedelta
from worker.store.engine import engine_for
from worker.operations.prune import Retention, prune
from worker.settings import load
settings = load()
retention = Retention(older_than=timedelta(days=30), states=("completed", "cancelled"), remove_files=False)
for seconds in sys.stdin:
    deadline = time.monotonic() + float(seconds)
    removed = prune(engine_for(settings.database), settings, retention, keep_going=lambda: time.monotonic() < deadline)
    print(json.dumps({"jobs": removed.jobs, "outputs": removed.outputs}), flush=True)
"""


@dataclass(frozen=True, slots=True)
class Claim:
    """One round of the claim loop: time, number of jobs, and milliseconds for the claim and for recording answers."""

    time: float
    jobs: int
    claim: float
    record: float


def prune(installation: Installation, home: Path, rows: int) -> Report:
    """Claims take at most 1.5 times as long while finished jobs are removed."""
    report = Report("prune")
    with Deployment(installation, home, BASE, KEY) as deployment:
        deployment.migrate()
        for first in range(1, rows + 1, BATCH):
            last = min(first + BATCH - 1, rows)
            deployment.execute(FINISHED, base=f"{BASE}/fetch", host=BASE.split("/")[2], first=first, last=last)
        insert_rows(deployment, BASE, LIVE, apart=10 / LIVE)
        deployment.execute("ANALYZE")
        idle: list[Claim] = []
        pruning: list[Claim] = []
        removed, seconds = 0, 0.0
        with (
            _child(deployment, home / "claims.txt", CLAIMS, BASE.split("/")[2]),
            _child(deployment, None, PRUNES) as pruner,
        ):
            _prune(pruner, 0.1)  # so that imports and connections are done
            time.sleep(2)
            for _ in range(ROUNDS):
                began = time.monotonic()
                time.sleep(PHASE_SECONDS)
                middle = time.monotonic()
                removed += _prune(pruner, PHASE_SECONDS)
                ended = time.monotonic()
                seconds += ended - middle
                idle += _between(home / "claims.txt", began, middle)
                pruning += _between(home / "claims.txt", middle, ended)
        _compare(report, idle, pruning)
        report.figure("jobs pruned, each with an output", removed)
        report.figure("jobs pruned per second", removed / seconds)
        report.figure("dead rows left", _dead_rows(deployment))
        report.check("jobs were pruned all the time", removed > 100 * seconds, removed)
        (row,) = deployment.rows("SELECT count(*) AS jobs FROM fetch_jobs WHERE status = 'pending'")
        report.check("no live job was touched", row["jobs"] == LIVE, row)
    return report


def _compare(report: Report, idle: list[Claim], pruning: list[Claim]) -> None:
    figures = {}
    for name, phase in (("idle", idle), ("pruning", pruning)):
        claims, records = [claim.claim for claim in phase], [claim.record for claim in phase]
        figures[name] = quantile(claims, 0.95)
        for operation, times in (("claims", claims), ("answers recorded", records)):
            quantiles = " / ".join(f"{quantile(times, q):.1f}" for q in (0.5, 0.95, 0.99))
            report.figure(f"{operation} while {name}, p50 / p95 / p99 (ms), {len(times)} times", quantiles)
        report.figure(
            f"jobs claimed per second while {name}", sum(claim.jobs for claim in phase) / ROUNDS / PHASE_SECONDS
        )
    ratio = figures["pruning"] / figures["idle"]
    report.figure("p95 of claims, pruning ÷ idle", ratio)
    report.check(
        f"claims take at most {MAX_RATIO} times as long while jobs are pruned (p95)", ratio <= MAX_RATIO, ratio
    )


@contextmanager
def _child(
    deployment: Deployment, output: Path | None, program: str, *arguments: str
) -> Iterator["subprocess.Popen[str]"]:
    """Run a Python program with the product's code. It is killed at the end of the block."""
    with (deployment.home / "children.log").open("ab") as log, (output or Path("/dev/null")).open("w") as out:
        process = subprocess.Popen(
            [str(deployment.installation.bin / "python"), "-c", program, *arguments],
            cwd=deployment.checkout,
            env=deployment.environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=out if output else subprocess.PIPE,
            stderr=log,
        )
    try:
        yield process
        if process.poll() is not None:
            raise RuntimeError((deployment.home / "children.log").read_text()[-2_000:])
    finally:
        process.kill()
        process.wait()


def _prune(pruner: "subprocess.Popen[str]", seconds: float) -> int:
    assert pruner.stdin is not None
    assert pruner.stdout is not None
    pruner.stdin.write(f"{seconds}\n")
    pruner.stdin.flush()
    return int(json.loads(pruner.stdout.readline())["jobs"])


def _between(path: Path, began: float, ended: float) -> list[Claim]:
    lines = path.read_text().splitlines(keepends=True)
    rows = [line.split() for line in lines if line.endswith("\n")]
    claims = [Claim(float(moment), int(jobs), float(claim), float(record)) for moment, jobs, claim, record in rows]
    return [claim for claim in claims if began <= claim.time < ended]


def _dead_rows(deployment: Deployment) -> str:
    rows = deployment.rows(
        "SELECT relname, n_dead_tup, autovacuum_count FROM pg_stat_user_tables"
        " WHERE relname IN ('fetch_jobs', 'fetch_outputs') ORDER BY relname"
    )
    return ", ".join(f"{row['relname']} {row['n_dead_tup']} ({row['autovacuum_count']} vacuums)" for row in rows)
