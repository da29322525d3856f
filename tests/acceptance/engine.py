"""The poll engine from outside: budget, a limit nobody announced, fairness, wake-ups, dripping servers, a big table.

The rows are put in by SQL (PostgreSQL), as many as it takes; the hosted API counts what it is asked.
"""

import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.acceptance.hosted import Hosted
from tests.acceptance.main_job import KEY
from tests.acceptance.report import Report, quantile
from tests.acceptance.stand import Place, Stand, epoch, wait_until

ROWS = """
INSERT INTO fetch_jobs (account, remote_id, kind, fetch_url, fetch_base, fetch_host, status, priority,
                        submitted_at, tracked_at, deadline_at, deadline_seconds, due_at)
SELECT :account, :prefix || n, 'image', :base || '/' || :prefix || n, :base, :host, 'pending', 0,
       now(), now(), now() + interval '6 hours', 21600, now() + (:first + n * :apart) * interval '1 second'
FROM generate_series(1, :count) AS n
"""
RATE, SECONDS = 50, 30
BURST = RATE / 5  # what the README states
LIMIT = 20
OTHER_KEY = "acceptance-other-key-77c0"
TRACK_ONE = """
import sys, time
from datetime import UTC, datetime, timedelta
from worker import track
for number in range(int(sys.argv[1])):
    track(f"import{number}", submitted_at=datetime.now(UTC) - timedelta(hours=1), deadline=86400)
    time.sleep(0.5)
"""


def put_rows(
    stand: Stand,
    base: str,
    count: int,
    *,
    account: str = "default",
    prefix: str = "r",
    first: float = 0,
    apart: float = 0,
) -> None:
    """Put jobs in that come due one after the other: from `first` seconds from now on, `apart` seconds apart."""
    values = {"account": account, "prefix": prefix, "count": count, "first": first, "apart": apart}
    stand.execute(ROWS, base=f"{base}/fetch", host=base.split("/")[2], **values)


def budget(place: Place, home: Path) -> Report:
    """Four processes, one budget: never above it, and hardly anything of it left unused."""
    report = Report("budget")
    with (
        Hosted(seed=1, accept=[KEY]) as hosted,
        Stand(place, home, hosted.base, KEY, SD_API_RPS=str(RATE), POLL_MIN="3") as stand,
    ):
        hosted.behave(endless=True)
        stand.migrate()
        put_rows(stand, hosted.base, 5_000)
        stand.start_workers(4)
        stand.wait_ready(4)
        wait_until(lambda: bool(hosted.ledger().calls), 20)
        time.sleep(1)
        began = time.time()
        time.sleep(SECONDS + 1)
        ledger = hosted.ledger()
        calls = [call.began for call in ledger.calls if began <= call.began < began + SECONDS]
        report.figure("calls in 30 s", len(calls))
        report.figure("share of the budget used", len(calls) / (RATE * SECONDS))
        report.figure("most calls in one second", ledger.busiest_second())
        report.figure("processor time of the workers (s)", stand.cpu_seconds())
        busiest = ledger.busiest_second()
        report.check(f"no window of a second with more than {RATE} + {BURST:.0f} calls", busiest <= RATE + BURST)
        report.check("at least 95 % of the budget was used", len(calls) >= 0.95 * RATE * SECONDS, len(calls))
        told = stand.count("SELECT sum(polls) FROM fetch_jobs")
        report.check("polls counts every call", told >= len(ledger.calls), f"{told} told, {len(ledger.calls)} asked")
        report.check("no process died", not stand.died(), stand.died())
    return report


def unannounced_limit(place: Place, home: Path) -> Report:
    """The API takes fewer calls than it was set to: it is found, kept to, and no job fails for it."""
    report = Report("unannounced-limit")
    for number, form in enumerate(("429 with retry_after", "bare 429", "200 with retry_after")):
        with (
            Hosted(seed=1, accept=[KEY]) as hosted,
            Stand(place, home / str(number), hosted.base, KEY, SD_API_RPS="200", POLL_MIN="3") as stand,
        ):
            hosted.behave(endless=True, calls_per_second=LIMIT, limit_form=form)
            stand.migrate()
            put_rows(stand, hosted.base, 3_000)
            stand.start_workers(2)
            stand.wait_ready(2)
            wait_until(lambda hosted=hosted: bool(hosted.ledger().calls), 20)  # type: ignore[misc]
            began = hosted.ledger().calls[0].began
            time.sleep(max(0.0, began + 60 - time.time()))
            time.sleep(100)
            calls = hosted.ledger().calls
            later = [call for call in calls if call.began >= began + 60]
            refused = [call for call in later if call.answer == "rate_limited"]
            share = len(refused) / max(1, len(later))
            taken = (len(later) - len(refused)) / 100
            early = [call for call in calls if call.began < began + 60]
            report.figure(f"{form}: refused in the first minute", _refused(early))
            report.figure(f"{form}: refused after it", f"{_refused(later)} ({share:.2%}), {taken:.1f} taken/s")
            tens = [sum(began + at <= call.began < began + at + 10 for call in calls) for at in range(0, 160, 10)]
            report.figure(f"{form}: calls in each ten seconds", tens)
            report.check(f"{form}: refused calls are below 3 % after a minute", share < 0.03, f"{share:.2%}")
            report.check(f"{form}: at least half of what the API takes is used", taken >= LIMIT / 2, taken)
            (account,) = stand.document("status")["accounts"]
            report.figure(f"{form}: status says", f"{account['rps']} requests/s")
            report.check(f"{form}: status shows the rate that was learned", account["rps"] <= 2 * LIMIT, account)
            failed = stand.count("SELECT count(*) FROM fetch_jobs WHERE status <> 'pending'")
            report.check(f"{form}: no job failed", failed == 0, failed)
    return report


def _refused(calls: Sequence[object]) -> str:
    refused = sum(getattr(call, "answer", "") == "rate_limited" for call in calls)
    return f"{refused} of {len(calls)}"


def two_accounts(place: Place, home: Path) -> Report:
    """One account's crowd does not keep another's few waiting."""
    report = Report("two-accounts")
    keys = json.dumps({"crowd": KEY, "few": OTHER_KEY})
    with (
        Hosted(seed=1, accept=[KEY, OTHER_KEY]) as hosted,
        Stand(place, home, hosted.base, "", SD_API_KEYS=keys, SD_API_RPS="1000", POLL_MIN="60") as stand,
    ):
        hosted.behave(endless=True)
        stand.migrate()
        put_rows(stand, hosted.base, 50_000, account="crowd")
        stand.start_workers(1)
        stand.wait_ready(1)
        put_rows(stand, hosted.base, 10, account="few", prefix="few", first=3, apart=1.5)
        due = {row["remote_id"]: epoch(row["due_at"]) for row in stand.rows(
            "SELECT remote_id, due_at FROM fetch_jobs WHERE account = 'few'")}  # fmt: skip
        time.sleep(22)
        ledger = hosted.ledger()
        asked = {remote_id: ledger.calls_about(remote_id) for remote_id in due}
        late = [calls[0].began - due[remote_id] for remote_id, calls in asked.items() if calls]
        crowd = [call for call in ledger.calls if call.key == KEY]
        report.figure("calls for the crowd per second", len(crowd) / (crowd[-1].began - crowd[0].began))
        report.figure("the few: due to asked, p50 / max (s)", f"{quantile(late, 0.5):.2f} / {max(late):.2f}")
        report.check("each of the ten was asked", len(late) == 10, len(late))
        report.check(
            "each within 2 s of its due time, and never before", all(-0.01 <= each <= 2 for each in late), late
        )
        left = stand.count("SELECT count(*) FROM fetch_jobs WHERE account = 'crowd' AND polls = 0")
        report.check("the crowd was there all the time", left > 10_000, left)
    return report


def wake_up(place: Place, home: Path) -> Report:
    """An idle worker asks at once: jobs it knows when they come due, and jobs it is told of."""
    report = Report("wake-up")
    with Hosted(seed=1, accept=[KEY]) as hosted, Stand(place, home, hosted.base, KEY, POLL_MIN="60") as stand:
        hosted.behave(endless=True)
        stand.migrate()
        put_rows(stand, hosted.base, 10_000, prefix="later", first=36_000)
        stand.start_workers(1)
        stand.wait_ready(1)
        put_rows(stand, hosted.base, 1, prefix="key")  # proves the key
        time.sleep(5)
        put_rows(stand, hosted.base, 30, prefix="known", first=2, apart=0.63)
        time.sleep(23)
        for number in range(20):
            options = {"submitted_at": "2026-01-01T00:00:00+00:00", "deadline": 86400 * 3650}
            stand.client.send_task("worker.track", [f"name{number}"], options, queue="fetch-worker")
            time.sleep(0.5)
        imported = subprocess.run(
            [str(place.bin / "python"), "-c", TRACK_ONE, "20"],
            cwd=stand.checkout, env=stand.environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        report.check("tracking by import worked", imported.returncode == 0, imported.stderr[-300:])
        time.sleep(2)
        ledger = hosted.ledger()
        first = {call.remote_id: call.began for call in reversed(ledger.calls)}
        rows = stand.rows("SELECT remote_id, tracked_at FROM fetch_jobs WHERE remote_id !~ '^(later|key)'")
        tracked = {row["remote_id"]: epoch(row["tracked_at"]) for row in rows}
        for prefix, count in (("known", 30), ("name", 20), ("import", 20)):
            since = {
                name: at + (2 + 0.63 * int(name.removeprefix("known")) if prefix == "known" else 0)
                for name, at in tracked.items()
                if name.startswith(prefix)
            }
            late = [first[name] - at for name, at in since.items() if name in first]
            spread = f"{quantile(late, 0.5) * 1000:.0f} / {quantile(late, 0.95) * 1000:.0f} / {max(late) * 1000:.0f}"
            report.figure(f"{prefix}: due to asked, p50 / p95 / max (ms)", spread)
            report.check(f"{prefix}: all were asked", len(late) == count, len(late))
            report.check(f"{prefix}: less than 100 ms at the median", quantile(late, 0.5) < 0.1, spread)
    return report


# ── servers that drip ─────────────────────────────────────────────────────────────────────────────────────────────────


class Dripping:
    """A server on whose connections nothing ever comes to an end; it notes how long each was held."""

    def __init__(self, first: bytes) -> None:
        self.first = first
        self.held: list[float] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._drip, args=(client,), daemon=True).start()

    def _drip(self, client: socket.socket) -> None:
        began = time.monotonic()
        with client:
            try:
                client.sendall(self.first)
                while time.monotonic() - began < 60:
                    client.settimeout(0.5)
                    try:
                        if client.recv(65_536) == b"":
                            break
                    except TimeoutError:
                        if self.first:
                            client.sendall(b" " if b"\r\n\r\n" in self.first else b"x")
            except OSError:
                pass
        self.held.append(time.monotonic() - began)


DRIPS = {
    "silence": b"",
    "headers": b"HTTP/1.1 200 OK\r\nX-Slow: ",
    "body": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n",
}


def dripping_api(place: Place, home: Path) -> Report:
    """A byte each half second holds no thread longer than the time-out and a second, whatever the pool."""
    report = Report("dripping-api")
    threads = "--pool threads --concurrency 4"
    for pool in (threads, "--pool prefork --concurrency 2", "--pool solo"):
        with Hosted(seed=1, accept=[KEY]) as hosted:
            hosted.behave(endless=True)
            servers = {name: Dripping(first) for name, first in DRIPS.items()}
            hosts = ",".join(f"127.0.0.1:{server.port}" for server in servers.values())
            settings = {"SD_API_HOSTS": hosts, "SD_API_TIMEOUT": "3", "POLL_MIN": "3"}
            folder = home / pool.split()[1]
            with Stand(place, folder, hosted.base, KEY, **settings) as stand:
                stand.migrate()
                put_rows(stand, hosted.base, 5)
                line = stand.procfile["worker"]
                assert threads in line
                stand.start_line("worker", line.replace(threads, pool))
                if "solo" not in pool:  # whose one place is taken by the poll run
                    stand.wait_ready(1)
                wait_until(lambda hosted=hosted: bool(hosted.ledger().calls), 20)  # type: ignore[misc]
                for name, server in servers.items():
                    put_rows(stand, f"http://127.0.0.1:{server.port}/api/v3", 4, prefix=name)
                time.sleep(1)
                put_rows(stand, hosted.base, 10, prefix="good", first=1, apart=0.5)
                time.sleep(12)
                since = stand.rows("SELECT remote_id, tracked_at FROM fetch_jobs WHERE remote_id LIKE 'good%'")
                due = {r["remote_id"]: epoch(r["tracked_at"]) + 1 + 0.5 * int(r["remote_id"][4:]) for r in since}
                first = {call.remote_id: call.began for call in reversed(hosted.ledger().calls)}
                late = [first[name] - at for name, at in due.items() if name in first]
                for name, server in servers.items():
                    worst = max(server.held, default=float("nan"))
                    report.figure(f"{pool}: {name}, connections and longest (s)", f"{len(server.held)}, {worst:.2f}")
                    report.check(
                        f"{pool}: {name} holds no thread longer than 4 s", bool(server.held) and worst <= 4.0, worst
                    )
                report.figure(f"{pool}: good jobs, worst delay (s)", max(late, default=float("nan")))
                report.check(
                    f"{pool}: the good API's jobs are asked meanwhile", len(late) == 10 and max(late) < 1.0, late
                )
                ended = stand.count("SELECT count(*) FROM fetch_jobs WHERE status <> 'pending'")
                report.check(f"{pool}: no job ended", not ended, ended)
            for server in servers.values():
                server.listener.close()
    return report


# ── a big table ───────────────────────────────────────────────────────────────────────────────────────────────────────


CLAIMED = re.compile(r"claimed jobs=(\d+) ms=([\d.]+)")


@contextmanager
def fast_api() -> Iterator[str]:
    """The server of the benchmarks: it says `processing` to everything; its address."""
    program = [sys.executable, "-m", "tests.benchmarks.server"]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ports = json.loads(process.stdout.readline())
        try:
            yield f"http://127.0.0.1:{ports['port']}/api/v3"
        finally:
            process.terminate()


def _counted(base: str) -> int:
    with urllib.request.urlopen(base.removesuffix("/api/v3") + "/count", timeout=5) as answer:  # noqa: S310  # http, ours
        return int(json.load(answer)["requests"])


def million_rows(place: Place, home: Path, rows: int, minutes: float) -> Report:
    """A thousand of a million come due each second: none waits, and memory stays as it is."""
    report = Report("million-rows")
    due_per_second = rows // 1_000
    settings = {"SD_API_RPS": "100000", "POLL_POLICY": "fixed", "POLL_MIN": "1000"}
    with fast_api() as base, Stand(place, home, base, KEY, **settings) as stand:
        stand.migrate()
        put_rows(stand, base, rows, first=15, apart=1 / due_per_second)
        stand.execute("ANALYZE fetch_jobs")
        pid = stand.start_line("worker", stand.procfile["worker"].replace("--loglevel INFO", "--loglevel DEBUG"))
        stand.wait_ready(1)
        time.sleep(15)
        memory: list[float] = []
        waits: list[float] = []
        counts: list[int] = []
        until = time.monotonic() + minutes * 60
        while time.monotonic() < until:
            time.sleep(5)
            memory.append(_resident_mib(pid))
            counts.append(_counted(base))
            (row,) = stand.rows(
                "SELECT coalesce(extract(epoch FROM clock_timestamp() - min(due_at)), 0) AS late FROM fetch_jobs"
                " WHERE account = 'default' AND priority = 0 AND due_at IS NOT NULL AND due_at <= clock_timestamp()"
            )
            waits.append(float(row["late"]))
        log = (stand.log_folder / "worker.log").read_text(encoding="utf-8")
        claims = [float(found) for jobs, found in CLAIMED.findall(log) if int(jobs)]
        steady = memory[min(11, len(memory) // 2) :]
        report.figure("requests per second", (counts[-1] - counts[0]) / (5 * (len(counts) - 1)))
        report.figure(
            "claims, p50 / p95 / p99 (ms)", " / ".join(f"{quantile(claims, q):.1f}" for q in (0.5, 0.95, 0.99))
        )
        report.figure("oldest due, p50 / max (s)", f"{quantile(waits, 0.5):.2f} / {max(waits):.2f}")
        report.figure("memory after a minute / at the end (MiB)", f"{steady[0]:.0f} / {steady[-1]:.0f}")
        report.figure("processor time (s)", stand.cpu_seconds())
        report.check("claims keep up: nothing is ever due for 2 s", max(waits) < 2.0, max(waits))
        report.check("95 % of the claims take less than 20 ms", quantile(claims, 0.95) < 20, quantile(claims, 0.95))
        report.check("memory is flat", steady[-1] <= steady[0] * 1.05 + 5, steady)
    return report


def _resident_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0.0
