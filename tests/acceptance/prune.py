"""Pruning beside live work: a million finished jobs go while ten thousand are claimed and recorded without pause.

Idle and pruning phases take turns, so that whatever else the machine does falls on both alike.
"""

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.acceptance.engine import put_rows
from tests.acceptance.main_job import KEY
from tests.acceptance.report import Report, quantile
from tests.acceptance.stand import Place, Stand

BASE = "http://127.0.0.1:9/api/v3"
LIVE = 10_000
ROUNDS, PHASE_SECONDS = 8, 8.0
MOST = 1.5  # what pruning may make of the time of a claim
AT_ONCE = 100_000
FINISHED = """
WITH made AS (
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
FROM made
"""
# Claims and records what is due, as a poll run does, twenty times a second; each job is due again after ten seconds.
CLAIMS = """
import secrets, sys, time
from datetime import UTC, datetime, timedelta
from worker.core.lifecycle import AskAgain
from worker.core.pacing.policy import Plan
from worker.store.engine import database_now, engine_for
from worker.settings import load
from worker.store.claims import Level, claim_jobs
from worker.store.results import Outcome, record_answers
from worker.store.counters import Tally
engine = engine_for(load().database)
level = Level("default", 0, sys.argv[1], datetime.now(UTC))
while True:
    began, clock = time.perf_counter(), time.monotonic()
    with engine.begin() as connection:
        found = claim_jobs(connection, level, limit=50, token=secrets.token_hex(8), holder="acceptance",
                           lease=timedelta(seconds=30), now=database_now(connection))
    claimed = time.perf_counter()
    outcomes = [Outcome(job, AskAgain(job.facts.strikes, "processing"), "processing", Plan(10.0)) for job in found]
    with engine.begin() as connection:
        tally = Tally()
        record_answers(connection, outcomes, tally, now=database_now(connection))
        tally.write(connection)
    recorded = time.perf_counter()
    print(clock, len(found), 1e3 * (claimed - began), 1e3 * (recorded - claimed), flush=True)
    time.sleep(max(0.0, 0.05 - (recorded - began)))
"""
# Prunes for so many seconds whenever it is told to.
PRUNES = """
import json, sys, time
from datetime import timedelta
from worker.store.engine import engine_for
from worker.operations.prune import Retention, prune
from worker.settings import load
settings = load()
wanted = Retention(older_than=timedelta(days=30), states=("completed", "cancelled"), remove_files=False)
for seconds in sys.stdin:
    until = time.monotonic() + float(seconds)
    done = prune(engine_for(settings.database), settings, wanted, go_on=lambda: time.monotonic() < until)
    print(json.dumps({"jobs": done.jobs, "outputs": done.outputs}), flush=True)
"""


@dataclass(frozen=True, slots=True)
class Claim:
    """One turn of the loop: when, how many jobs, milliseconds for the claim and for writing the answers."""

    at: float
    jobs: int
    claim: float
    record: float


def prune(place: Place, home: Path, rows: int) -> Report:
    """Claims take no more than half as long again while finished jobs are removed."""
    report = Report("prune")
    with Stand(place, home, BASE, KEY) as stand:
        stand.migrate()
        for first in range(1, rows + 1, AT_ONCE):
            last = min(first + AT_ONCE - 1, rows)
            stand.execute(FINISHED, base=f"{BASE}/fetch", host=BASE.split("/")[2], first=first, last=last)
        put_rows(stand, BASE, LIVE, apart=10 / LIVE)
        stand.execute("ANALYZE")
        idle: list[Claim] = []
        pruning: list[Claim] = []
        removed, seconds = 0, 0.0
        with _child(stand, home / "claims.txt", CLAIMS, BASE.split("/")[2]), _child(stand, None, PRUNES) as pruner:
            _prune(pruner, 0.1)  # everything is imported and connected then
            time.sleep(2)
            for _ in range(ROUNDS):
                began = time.monotonic()
                time.sleep(PHASE_SECONDS)
                turned = time.monotonic()
                removed += _prune(pruner, PHASE_SECONDS)
                ended = time.monotonic()
                seconds += ended - turned
                idle += _between(home / "claims.txt", began, turned)
                pruning += _between(home / "claims.txt", turned, ended)
        _compare(report, idle, pruning)
        report.figure("jobs pruned, each with an output", removed)
        report.figure("jobs pruned per second", removed / seconds)
        report.figure("dead rows that are left", _dead(stand))
        report.check("jobs were pruned all the time", removed > 100 * seconds, removed)
        (left,) = stand.rows("SELECT count(*) AS jobs FROM fetch_jobs WHERE status = 'pending'")
        report.check("no live job was touched", left["jobs"] == LIVE, left)
    return report


def _compare(report: Report, idle: list[Claim], pruning: list[Claim]) -> None:
    figures = {}
    for name, found in (("idle", idle), ("pruning", pruning)):
        claims, records = [one.claim for one in found], [one.record for one in found]
        figures[name] = quantile(claims, 0.95)
        for what, times in (("claims", claims), ("answers written", records)):
            spread = " / ".join(f"{quantile(times, q):.1f}" for q in (0.5, 0.95, 0.99))
            report.figure(f"{what} while {name}, p50 / p95 / p99 (ms), {len(times)} times", spread)
        report.figure(f"jobs claimed per second while {name}", sum(one.jobs for one in found) / ROUNDS / PHASE_SECONDS)
    ratio = figures["pruning"] / figures["idle"]
    report.figure("p95 of claims, pruning ÷ idle", ratio)
    report.check(f"claims take at most {MOST} times as long while jobs are pruned (p95)", ratio <= MOST, ratio)


@contextmanager
def _child(stand: Stand, written: Path | None, program: str, *words: str) -> Iterator["subprocess.Popen[str]"]:
    """A process of the product's own code, ended afterwards."""
    with (stand.home / "children.log").open("ab") as log, (written or Path("/dev/null")).open("w") as out:
        process = subprocess.Popen(
            [str(stand.place.bin / "python"), "-c", program, *words],
            cwd=stand.checkout,
            env=stand.environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=out if written else subprocess.PIPE,
            stderr=log,
        )
    try:
        yield process
        if process.poll() is not None:
            raise RuntimeError((stand.home / "children.log").read_text()[-2_000:])
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
    found = [line.split() for line in lines if line.endswith("\n")]
    claims = [Claim(float(at), int(jobs), float(claim), float(record)) for at, jobs, claim, record in found]
    return [one for one in claims if began <= one.at < ended]


def _dead(stand: Stand) -> str:
    rows = stand.rows(
        "SELECT relname, n_dead_tup, autovacuum_count FROM pg_stat_user_tables"
        " WHERE relname IN ('fetch_jobs', 'fetch_outputs') ORDER BY relname"
    )
    return ", ".join(f"{row['relname']} {row['n_dead_tup']} ({row['autovacuum_count']} vacuums)" for row in rows)
