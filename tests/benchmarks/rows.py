"""The database's part: claiming, recording, tracking, each beside the cheapest statement that could do it."""

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

from tests.benchmarks.polls import bare
from tests.benchmarks.stand import ROOT, Api, Stand, api, stand
from tests.benchmarks.table import Rounds, Table
from worker.core.lifecycle import AskAgain
from worker.core.pacing.policy import PollPlan
from worker.store.claims import ClaimedJob, DueGroup, claim_jobs, due_groups
from worker.store.counters import Tally
from worker.store.engine import database_now, make_engine
from worker.store.results import Outcome, record_answers

BATCH = 200
BASE = "http://127.0.0.1:9/api/v3"
CLAIMS = 60
LEVEL = DueGroup("default", 0, BASE.split("/")[2], datetime.now(UTC))
UNNEST = """
UPDATE fetch_jobs
SET due_at = fresh.due, last_answer = fresh.note, claim_token = NULL, claim_holder = NULL, asked_at = %s
FROM unnest(%s::bigint[], %s::text[], %s::timestamptz[], %s::text[]) AS fresh (id, token, due, note)
WHERE fetch_jobs.id = fresh.id AND fetch_jobs.claim_token = fresh.token
"""
# Runs in a process of its own, as a web app would.
TRACK = """
import json, sys, time
from sqlalchemy import insert
from worker import track, track_many
from worker.store.engine import engine_for
from worker.settings import load
from worker.store.counters import Tally
from worker.store.schema import jobs
engine, values = engine_for(load().database), json.loads(sys.argv[1])
times = {"track": [], "insert": []}
from datetime import datetime
for name in ("submitted_at", "tracked_at", "deadline_at", "due_at"):
    values[name] = datetime.fromisoformat(values[name])
def ours(n): track(f"o{sys.argv[2]}x{n}")
def core(n):
    with engine.begin() as connection:
        connection.execute(insert(jobs).values({**values, "remote_id": f"c{sys.argv[2]}x{n}"}))
for n in range(20): ours(-n); core(-n)
for n in range(1, 300):
    for name, work in (("track", ours), ("insert", core)):
        began = time.perf_counter(); work(n); times[name].append(time.perf_counter() - began)
began = time.perf_counter()
track_many([f"m{sys.argv[2]}x{n}" for n in range(10_000)])
many = 10_000 / (time.perf_counter() - began)
print(json.dumps({name: sorted(found)[len(found) // 2] for name, found in times.items()} | {"many": many}))
"""
# Runs in a process of its own: a poller without Celery, whose threads' processor time is noted by what they do.
SHARE = """
import collections, json, os, sys, threading, time
from worker.polling import poller as claiming, recorder as recording
from worker.process.resources import process_resources
spent, asked = collections.Counter(), collections.Counter()
def timed(name, work):
    def inner(*arguments, **options):
        began = time.thread_time()
        try:
            return work(*arguments, **options)
        finally:
            spent[name] += time.thread_time() - began
    return inner
def each_thread(work):
    def inner(job):
        began = time.thread_time()
        try:
            return work(job)
        finally:
            asked[threading.get_ident()] += time.thread_time() - began
    return inner
for module, names in (claiming, ("claim_jobs", "due_groups", "all_breakers")), (
    recording, ("record_answers", "mark_asked")
):
    for name in names:
        setattr(module, name, timed("claim and record", getattr(module, name)))
class Begun:
    def __init__(self, inner): self.inner = inner
    def __enter__(self): return timed("claim and record", self.inner.__enter__)()
    def __exit__(self, *error): return timed("claim and record", self.inner.__exit__)(*error)
class Timed:
    def __init__(self, engine): self.engine = engine
    def begin(self): return Begun(self.engine.begin())
    def connect(self): return Begun(self.engine.connect())
process_resources().make_for({"fetch-worker.polls"})  # as a worker does when it starts
poller = process_resources().poller
poller._engine, poller._claims = Timed(poller._engine), Timed(poller._claims)
recorder = poller._recorder
recorder._batches = Timed(recorder._batches)
recorder._learn = timed("learning", recorder._learn)
recorder._learner.share_if_due = timed("learning", recorder._learner.share_if_due)
recorder._outcome = timed("deciding", recorder._outcome)
for name in ("take", "give_back", "taken"):
    setattr(poller._budget, name, timed("budget", getattr(poller._budget, name)))
poller._calls._ask = each_thread(poller._calls._ask)
poller.run(seconds=1.5)
spent.clear()
asked.clear()
cpu = time.process_time()
report = poller.run(seconds=float(sys.argv[1]))
used = time.process_time() - cpu
spent["HTTP"] = sum(asked.values())
print(json.dumps({name: seconds / report.asked for name, seconds in spent.items()} | {"all": used / report.asked}))
sys.stdout.flush()
os._exit(0)
"""


def engine_of(made: Stand) -> Engine:
    """An engine of ours on a stand's database."""
    return make_engine(make_url(made.database_url).set(drivername="postgresql+psycopg"))


def claim(engine: Engine) -> tuple[list[ClaimedJob], float]:
    """One claim as a poll run makes it, and how long it took."""
    began = time.perf_counter()
    with engine.begin() as connection:
        now = database_now(connection)
        found = claim_jobs(
            connection,
            LEVEL,
            limit=BATCH,
            token=secrets.token_hex(8),
            holder="benchmark",
            lease=timedelta(seconds=3_000),
            now=now,
        )
    return found, time.perf_counter() - began


def measure_claims(table: Table, folder: Path) -> None:
    """Claims of 200 due rows among few and many others."""
    folder.mkdir()
    engines: dict[str, Engine] = {}
    with (
        stand(folder / "small") as small,
        stand(folder / "large") as large,
        stand(folder / "old") as old,
    ):
        for made, rows, finished in ((small, 10_000, 0), (large, 1_000_000, 0), (old, 1_000_000, 1_000_000)):
            made.put_rows(BASE, rows, prefix="later", first=30_000)
            if finished:
                made.put_rows(BASE, finished, prefix="over", status="completed")
            made.put_rows(BASE, CLAIMS * BATCH + 2_000, prefix="due")
            made.settle()
            engines[made.folder.name] = engine_of(made)
        times: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(CLAIMS):
            for name, engine in engines.items():
                found, seconds = claim(engine)
                if len(found) != BATCH:
                    raise RuntimeError(f"claimed {len(found)} of {BATCH} rows")
                times[name].append(seconds * 1e3)
        for engine in engines.values():
            with engine.connect() as connection:
                due_groups(connection, ["default"])
            engine.dispose()
    urgent = urgent_claims(folder)
    middle = {name: median(found) for name, found in times.items()}
    p95 = sorted(times["large"])[int(CLAIMS * 0.95)]
    table.one("claim of 200, 10⁶ ÷ 10⁴ pending", middle["large"], middle["small"], "ms", must=1.5, aim=1.1)
    table.one("claim of 200, 10⁶ and 10⁶ finished ÷ 10⁴", middle["old"], middle["small"], "ms", must=1.5, aim=1.1)
    few, many = urgent.values()
    table.one("claim of the 8 most urgent, 500,000 ÷ 5,000 due", many, few, "ms")
    table.figure("claim of 200 at 10⁶ pending, 95 % of them within", p95, "ms", must=20, more=False)


def urgent_claims(folder: Path) -> dict[str, float]:
    """Milliseconds of a claim of eight where requests are short, by how many rows of an unknown table are due."""
    found = {}
    for rows in (5_000, 500_000):
        with stand(folder / f"urgent{rows}") as made:
            made.put_rows(BASE, rows, prefix="due")
            engine = engine_of(made)
            found[f"{rows:,}"] = median(_urgent_claim(engine) for _ in range(CLAIMS)) * 1e3
            engine.dispose()
    return found


def _urgent_claim(engine: Engine) -> float:
    began = time.perf_counter()
    with engine.begin() as connection:
        now = database_now(connection)
        around = (now - timedelta(seconds=1), now - timedelta(seconds=2))
        found = claim_jobs(
            connection,
            LEVEL,
            limit=8,
            token=secrets.token_hex(8),
            holder="benchmark",
            lease=timedelta(seconds=3_000),
            now=now,
            around=around,
        )
    if len(found) != 8:
        raise RuntimeError(f"claimed {len(found)} of 8 rows")
    return time.perf_counter() - began


def measure_recording(table: Table, folder: Path, rounds: int) -> None:
    """200 answers written: `record_answers`, and psycopg with arrays by hand."""
    folder.mkdir()
    with stand(folder / "record") as made:
        made.put_rows(BASE, 20_000, prefix="due")
        made.settle()
        engine = engine_of(made)
        found = Rounds()
        with psycopg.connect(made.database_url) as raw:
            for number in range(max(rounds, 5) * 4):
                mine, theirs = claim(engine)[0], claim(engine)[0]
                pair = [lambda mine=mine: _ours(engine, mine), lambda theirs=theirs: _by_hand(raw, theirs)]
                order = (0, 1) if number % 2 else (1, 0)
                times = {which: _seconds(pair[which]) for which in order}
                if number >= 4:
                    found.add(times[0], times[1])
        engine.dispose()
    table.ratio("recording 200 answers ÷ psycopg with unnest", found, "ms", 1e3, must=2.5, aim=1.5)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _ours(engine: Engine, claimed: list[ClaimedJob]) -> None:
    outcomes = [
        Outcome(job, AskAgain(job.facts.strikes, "processing"), "processing", PollPlan(900.0)) for job in claimed
    ]
    with engine.begin() as connection:
        done = record_answers(connection, outcomes, Tally(), now=database_now(connection))
    if done.lost:
        raise RuntimeError(f"{done.lost} claims were lost")


def _by_hand(raw: "psycopg.Connection[tuple[object, ...]]", claimed: list[ClaimedJob]) -> None:
    now = datetime.now(UTC)
    due = now + timedelta(seconds=900)
    columns = ([job.id for job in claimed], [job.token for job in claimed], [due] * BATCH, ["processing"] * BATCH)
    with raw.cursor() as cursor:
        cursor.execute(UNNEST, (now, *columns))
        if cursor.rowcount != BATCH:
            raise RuntimeError(f"{cursor.rowcount} rows were written")
    raw.commit()


def measure_tracking(table: Table, folder: Path, rounds: int) -> None:
    """`track` and `track_many`, in a process of their own."""
    folder.mkdir()
    now = datetime.now(UTC)
    row = {name: now.isoformat() for name in ("submitted_at", "tracked_at", "deadline_at", "due_at")} | {
        "account": "default", "kind": "image", "fetch_url": f"{BASE}/fetch/1", "fetch_base": f"{BASE}/fetch",
        "fetch_host": "127.0.0.1:9", "status": "pending", "priority": 0, "reference": None, "on_done": None,
        "eta": None, "deadline_seconds": 3600.0, "ready_at": None,
    }  # fmt: skip
    found, many = Rounds(), list[float]()
    with stand(folder / "track", SD_API_URL=BASE) as made:
        for number in range(rounds):
            said = json.loads(made.run(sys.executable, "-c", TRACK, json.dumps(row), str(number)))
            found.add(said["track"], said["insert"])
            many.append(said["many"])
    table.ratio("track one ÷ one Core insert in a transaction", found, "ms", 1e3, must=1.5, aim=1.2)
    table.figure("track_many, best round", max(many), "rows/s", must=20_000, aim=50_000)


def measure_share(table: Table, folder: Path, rounds: int, seconds: float) -> None:
    """Where a poller's processor time goes. Claiming and recording have their transactions with them."""
    folder.mkdir()
    parts = ("HTTP", "claim and record", "learning", "deciding", "budget")
    found = {part: Rounds() for part in parts}
    yardsticks = Rounds()
    with api() as plain:
        for number in range(rounds):
            yardstick = bare(plain)
            spent = _share(plain, folder / str(number), seconds)
            for part in parts:
                found[part].add(spent.get(part, 0.0), spent["all"])
            yardsticks.add(spent["claim and record"], yardstick)
    table.ratio("claim and record ÷ bare requests", yardsticks, "µs CPU", 1e6)
    for part in parts:
        table.ratio(f"of a poller's CPU without Celery: {part}", found[part], "µs CPU", 1e6)


def _share(plain: Api, folder: Path, seconds: float) -> dict[str, float]:
    with stand(folder, SD_API_URL=plain.base, SD_API_HOSTS=f"localhost:{plain.port}") as made:
        made.put_rows(plain.base, int((seconds + 2) * 6_000), prefix="due")
        made.settle()
        with psycopg.connect(made.database_url, autocommit=True) as connection:
            connection.execute("INSERT INTO fetch_gates (scope, name, proven) VALUES ('account', 'default', true)")
        done = subprocess.run(
            [sys.executable, "-c", SHARE, str(seconds)],
            cwd=ROOT, env={**os.environ, **made.environment}, capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
    spent: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return spent
