"""The database operations: claiming, recording and tracking, each beside the cheapest possible statement."""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median

import psycopg
from sqlalchemy import Engine
from sqlalchemy.engine import make_url

from tests.benchmarks.deployment import ROOT, ApiServer, BenchmarkDeployment, api_server, deploy
from tests.benchmarks.polls import bare
from tests.benchmarks.table import Rounds, Table
from worker.core.lifecycle import AskAgain
from worker.core.pacing.policy import PollPlan
from worker.store.claims import ClaimedJob, claim_jobs
from worker.store.counters import Tally
from worker.store.due_groups import DueGroup, due_groups
from worker.store.engine import database_now, make_engine
from worker.store.results import Outcome, record_answers

BATCH = 200
BASE = "http://127.0.0.1:9/api/v3"
CLAIMS = 60
GROUP = DueGroup("default", 0, BASE.split("/")[2], datetime.now(UTC))
UNNEST = """
UPDATE fetch_jobs
SET due_at = fresh.due, last_answer = fresh.note, claim_token = NULL, claim_holder = NULL, asked_at = %s
FROM unnest(%s::bigint[], %s::text[], %s::timestamptz[], %s::text[]) AS fresh (id, token, due, note)
WHERE fetch_jobs.id = fresh.id AND fetch_jobs.claim_token = fresh.token
"""
# Runs in a separate process, as a web app does.
TRACK = """
import json, sys, time
from sqlalchemy import insert
from worker import track, track_many
from worker.store.engine import engine_for
from worker.settings import load
from worker.store.schema import jobs
engine, values = engine_for(load().database), json.loads(sys.argv[1])
times = {"track": [], "insert": []}
from datetime import datetime
for name in ("submitted_at", "tracked_at", "deadline_at", "due_at"):
    values[name] = datetime.fromisoformat(values[name])
def track_one(n): track(f"o{sys.argv[2]}x{n}")
def insert_one(n):
    with engine.begin() as connection:
        connection.execute(insert(jobs).values({**values, "remote_id": f"c{sys.argv[2]}x{n}"}))
for n in range(20): track_one(-n); insert_one(-n)
for n in range(1, 300):
    for name, work in (("track", track_one), ("insert", insert_one)):
        began = time.perf_counter(); work(n); times[name].append(time.perf_counter() - began)
began = time.perf_counter()
track_many([f"m{sys.argv[2]}x{n}" for n in range(10_000)])
rate = 10_000 / (time.perf_counter() - began)
print(json.dumps({name: sorted(seconds)[len(seconds) // 2] for name, seconds in times.items()} | {"many": rate}))
"""
# Runs in a separate process: a poller without Celery. The processor time of its threads is recorded by operation.
SHARE = """
import collections, json, os, sys, threading, time
from worker.polling import answer_writer as recording, due_view as viewing, job_claims as claiming
from worker.process.resources import process_resources
spent, http_times = collections.Counter(), collections.Counter()
def timed(name, work):
    def inner(*args, **kwargs):
        began = time.thread_time()
        try:
            return work(*args, **kwargs)
        finally:
            spent[name] += time.thread_time() - began
    return inner
def each_thread(work):
    def inner(job):
        began = time.thread_time()
        try:
            return work(job)
        finally:
            http_times[threading.get_ident()] += time.thread_time() - began
    return inner
for module, names in (claiming, ("claim_jobs",)), (viewing, ("due_groups", "all_breakers")), (
    recording, ("record_answers", "mark_asked")
):
    for name in names:
        setattr(module, name, timed("claim and record", getattr(module, name)))
class TimedTransaction:
    def __init__(self, inner): self.inner = inner
    def __enter__(self): return timed("claim and record", self.inner.__enter__)()
    def __exit__(self, *error): return timed("claim and record", self.inner.__exit__)(*error)
class TimedEngine:
    def __init__(self, engine): self.engine = engine
    def begin(self): return TimedTransaction(self.engine.begin())
    def connect(self): return TimedTransaction(self.engine.connect())
process_resources().make_for({"fetch-worker.polls"})  # as a worker does at its start
poller = process_resources().poller
for part, name in (poller._claims, "_engine"), (poller._claims, "_relaxed"), (poller._views, "_engine"), (
    poller._recorder, "_batches"
):
    setattr(part, name, TimedEngine(getattr(part, name)))
recorder, outcomes = poller._recorder, poller._recorder._outcomes
outcomes.learn = timed("learning", outcomes.learn)
recorder._learner.share_if_due = timed("learning", recorder._learner.share_if_due)
outcomes.outcome = timed("deciding", outcomes.outcome)
for name in ("take", "give_back", "count_accepted"):
    setattr(poller._budget, name, timed("budget", getattr(poller._budget, name)))
poller._pool._ask = each_thread(poller._pool._ask)
poller.run(seconds=1.5)
spent.clear()
http_times.clear()
cpu = time.process_time()
report = poller.run(seconds=float(sys.argv[1]))
used = time.process_time() - cpu
spent["HTTP"] = sum(http_times.values())
print(json.dumps({name: seconds / report.asked for name, seconds in spent.items()} | {"all": used / report.asked}))
sys.stdout.flush()
os._exit(0)
"""


def engine_of(deployment: BenchmarkDeployment) -> Engine:
    """Return an engine for the database of a deployment."""
    return make_engine(make_url(deployment.database_url).set(drivername="postgresql+psycopg"))


def claim(engine: Engine) -> tuple[list[ClaimedJob], float]:
    """Claim jobs as a poll run does. Return the jobs and the seconds that it took."""
    began = time.perf_counter()
    with engine.begin() as connection:
        now = database_now(connection)
        jobs = claim_jobs(
            connection,
            GROUP,
            limit=BATCH,
            token=secrets.token_hex(8),
            holder="benchmark",
            lease=timedelta(seconds=3_000),
            now=now,
        )
    return jobs, time.perf_counter() - began


def measure_claims(table: Table, folder: Path) -> None:
    """Measure claims of 200 due jobs in tables of different sizes."""
    folder.mkdir()
    engines: dict[str, Engine] = {}
    with (
        deploy(folder / "small") as small,
        deploy(folder / "large") as large,
        deploy(folder / "old") as old,
    ):
        for deployment, rows, finished in ((small, 10_000, 0), (large, 1_000_000, 0), (old, 1_000_000, 1_000_000)):
            deployment.insert_jobs(BASE, rows, prefix="later", first=30_000)
            if finished:
                deployment.insert_jobs(BASE, finished, prefix="over", status="completed")
            deployment.insert_jobs(BASE, CLAIMS * BATCH + 2_000, prefix="due")
            deployment.settle()
            engines[deployment.folder.name] = engine_of(deployment)
        times: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(CLAIMS):
            for name, engine in engines.items():
                jobs, seconds = claim(engine)
                if len(jobs) != BATCH:
                    raise RuntimeError(f"claimed {len(jobs)} of {BATCH} rows")
                times[name].append(seconds * 1e3)
        for engine in engines.values():
            with engine.connect() as connection:
                due_groups(connection, ["default"])
            engine.dispose()
    urgent = urgent_claims(folder)
    medians = {name: median(milliseconds) for name, milliseconds in times.items()}
    p95 = sorted(times["large"])[int(CLAIMS * 0.95)]
    table.single("claim of 200, 10⁶ ÷ 10⁴ pending", medians["large"], medians["small"], "ms", must=1.5, aim=1.1)
    table.single("claim of 200, 10⁶ and 10⁶ finished ÷ 10⁴", medians["old"], medians["small"], "ms", must=1.5, aim=1.1)
    small_table, large_table = urgent.values()
    table.single("claim of the 8 most urgent, 500,000 ÷ 5,000 due", large_table, small_table, "ms")
    table.figure("claim of 200 at 10⁶ pending, 95 % of them within", p95, "ms", must=20, more=False)


def urgent_claims(folder: Path) -> dict[str, float]:
    """Return the milliseconds of a claim of eight jobs by urgency, for two numbers of due rows without statistics."""
    milliseconds = {}
    for rows in (5_000, 500_000):
        with deploy(folder / f"urgent{rows}") as deployment:
            deployment.insert_jobs(BASE, rows, prefix="due")
            engine = engine_of(deployment)
            milliseconds[f"{rows:,}"] = median(_urgent_claim(engine) for _ in range(CLAIMS)) * 1e3
            engine.dispose()
    return milliseconds


def _urgent_claim(engine: Engine) -> float:
    began = time.perf_counter()
    with engine.begin() as connection:
        now = database_now(connection)
        around = (now - timedelta(seconds=1), now - timedelta(seconds=2))
        jobs = claim_jobs(
            connection,
            GROUP,
            limit=8,
            token=secrets.token_hex(8),
            holder="benchmark",
            lease=timedelta(seconds=3_000),
            now=now,
            around=around,
        )
    if len(jobs) != 8:
        raise RuntimeError(f"claimed {len(jobs)} of 8 rows")
    return time.perf_counter() - began


def measure_recording(table: Table, folder: Path, rounds: int) -> None:
    """Measure the recording of 200 answers: `record_answers`, and hand-written SQL with arrays in psycopg."""
    folder.mkdir()
    with deploy(folder / "record") as deployment:
        deployment.insert_jobs(BASE, 20_000, prefix="due")
        deployment.settle()
        engine = engine_of(deployment)
        times = Rounds()
        with psycopg.connect(deployment.database_url) as raw:
            for number in range(max(rounds, 5) * 4):
                first, second = claim(engine)[0], claim(engine)[0]
                pair = [lambda jobs=first: _record(engine, jobs), lambda jobs=second: _record_by_hand(raw, jobs)]
                order = (0, 1) if number % 2 else (1, 0)
                seconds = {index: _seconds(pair[index]) for index in order}
                if number >= 4:
                    times.add(seconds[0], seconds[1])
        engine.dispose()
    table.ratio("recording 200 answers ÷ psycopg with unnest", times, "ms", 1e3, must=2.5, aim=1.5)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _record(engine: Engine, claimed: list[ClaimedJob]) -> None:
    outcomes = [
        Outcome(job, AskAgain(job.facts.strikes, "processing"), "processing", PollPlan(900.0)) for job in claimed
    ]
    with engine.begin() as connection:
        result = record_answers(connection, outcomes, Tally(), now=database_now(connection))
    if result.lost:
        raise RuntimeError(f"{result.lost} claims were lost")


def _record_by_hand(raw: "psycopg.Connection[tuple[object, ...]]", claimed: list[ClaimedJob]) -> None:
    now = datetime.now(UTC)
    due = now + timedelta(seconds=900)
    columns = ([job.id for job in claimed], [job.token for job in claimed], [due] * BATCH, ["processing"] * BATCH)
    with raw.cursor() as cursor:
        cursor.execute(UNNEST, (now, *columns))
        if cursor.rowcount != BATCH:
            raise RuntimeError(f"{cursor.rowcount} rows were written")
    raw.commit()


def measure_tracking(table: Table, folder: Path, rounds: int) -> None:
    """Measure `track` and `track_many` in a separate process."""
    folder.mkdir()
    now = datetime.now(UTC)
    row = {name: now.isoformat() for name in ("submitted_at", "tracked_at", "deadline_at", "due_at")} | {
        "account": "default", "kind": "image", "fetch_url": f"{BASE}/fetch/1", "fetch_base": f"{BASE}/fetch",
        "fetch_host": "127.0.0.1:9", "status": "pending", "priority": 0, "reference": None, "on_done": None,
        "eta": None, "deadline_seconds": 3600.0, "ready_at": None,
    }  # fmt: skip
    times, rates = Rounds(), list[float]()
    with deploy(folder / "track", SD_API_URL=BASE) as deployment:
        for number in range(rounds):
            result = json.loads(deployment.run(sys.executable, "-c", TRACK, json.dumps(row), str(number)))
            times.add(result["track"], result["insert"])
            rates.append(result["many"])
    table.ratio("track one ÷ one Core insert in a transaction", times, "ms", 1e3, must=1.5, aim=1.2)
    table.figure("track_many, best round", max(rates), "rows/s", must=20_000, aim=50_000)


def measure_share(table: Table, folder: Path, rounds: int, seconds: float) -> None:
    """Measure the processor time of a poller by operation. Claiming and recording include their transactions."""
    folder.mkdir()
    parts = ("HTTP", "claim and record", "learning", "deciding", "budget")
    shares = {part: Rounds() for part in parts}
    yardsticks = Rounds()
    with api_server() as plain:
        for number in range(rounds):
            yardstick = bare(plain)
            spent = _share(plain, folder / str(number), seconds)
            for part in parts:
                shares[part].add(spent.get(part, 0.0), spent["all"])
            yardsticks.add(spent["claim and record"], yardstick)
    table.ratio("claim and record ÷ bare requests", yardsticks, "µs CPU", 1e6)
    for part in parts:
        table.ratio(f"of a poller's CPU without Celery: {part}", shares[part], "µs CPU", 1e6)


def _share(plain: ApiServer, folder: Path, seconds: float) -> dict[str, float]:
    with deploy(folder, SD_API_URL=plain.base, SD_API_HOSTS=f"localhost:{plain.port}") as deployment:
        deployment.insert_jobs(plain.base, int((seconds + 2) * 6_000), prefix="due")
        deployment.settle()
        with psycopg.connect(deployment.database_url, autocommit=True) as connection:
            connection.execute("INSERT INTO fetch_gates (scope, name, proven) VALUES ('account', 'default', true)")
        result = subprocess.run(
            [sys.executable, "-c", SHARE, str(seconds)],
            cwd=ROOT,
            env={**os.environ, **deployment.environment},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
    spent: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return spent
