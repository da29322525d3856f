"""The poll engine: rate limit, an unannounced limit, fairness, wake-ups, slow-drip servers and a large table.

The rows are inserted with SQL (PostgreSQL). The fake API counts the requests.
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

from tests.acceptance.api_process import ApiProcess
from tests.acceptance.deployment import Deployment, Installation, epoch, wait_until
from tests.acceptance.main_job import KEY
from tests.acceptance.report import Report, quantile

ROWS = """
INSERT INTO fetch_jobs (account, remote_id, kind, fetch_url, fetch_base, fetch_host, status, priority,
                        submitted_at, tracked_at, deadline_at, deadline_seconds, due_at)
SELECT :account, :prefix || n, 'image', :base || '/' || :prefix || n, :base, :host, 'pending', 0,
       now(), now(), now() + interval '6 hours', 21600, now() + (:first + n * :apart) * interval '1 second'
FROM generate_series(1, :count) AS n
"""
RATE, SECONDS = 50, 30
BURST = RATE / 5  # the burst that the README states
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


def insert_rows(
    deployment: Deployment,
    base: str,
    count: int,
    *,
    account: str = "default",
    prefix: str = "r",
    first: float = 0,
    apart: float = 0,
) -> None:
    """Insert jobs that become due one after the other: the first in `first` seconds, then every `apart` seconds."""
    values = {"account": account, "prefix": prefix, "count": count, "first": first, "apart": apart}
    deployment.execute(ROWS, base=f"{base}/fetch", host=base.split("/")[2], **values)


def budget(installation: Installation, home: Path) -> Report:
    """Four processes share one rate limit: they never exceed it, and use almost all of it."""
    report = Report("budget")
    with (
        ApiProcess(seed=1, accept=[KEY]) as api,
        Deployment(installation, home, api.base, KEY, SD_API_RPS=str(RATE), POLL_MIN="3") as deployment,
    ):
        api.behave(endless=True)
        deployment.migrate()
        insert_rows(deployment, api.base, 5_000)
        deployment.start_workers(4)
        deployment.wait_ready(4)
        wait_until(lambda: bool(api.ledger().calls), 20)
        time.sleep(1)
        began = time.time()
        time.sleep(SECONDS + 1)
        ledger = api.ledger()
        calls = [call.began for call in ledger.calls if began <= call.began < began + SECONDS]
        report.figure("calls in 30 s", len(calls))
        report.figure("share of the rate limit used", len(calls) / (RATE * SECONDS))
        report.figure("most calls in one second", ledger.busiest_second())
        report.figure("processor time of the workers (s)", deployment.cpu_seconds())
        busiest = ledger.busiest_second()
        report.check(f"no second with more than {RATE} + {BURST:.0f} calls", busiest <= RATE + BURST)
        report.check("at least 95 % of the rate limit was used", len(calls) >= 0.95 * RATE * SECONDS, len(calls))
        polls = deployment.count("SELECT sum(polls) FROM fetch_jobs")
        details = f"{polls} polls, {len(ledger.calls)} calls"
        report.check("polls counts every call", polls >= len(ledger.calls), details)
        report.check("no process died", not deployment.died(), deployment.died())
    return report


def unannounced_limit(installation: Installation, home: Path) -> Report:
    """The API accepts fewer calls than SD_API_RPS: the worker learns the limit and keeps to it, and no job fails."""
    report = Report("unannounced-limit")
    for number, form in enumerate(("429 with retry_after", "bare 429", "200 with retry_after")):
        with (
            ApiProcess(seed=1, accept=[KEY]) as api,
            Deployment(installation, home / str(number), api.base, KEY, SD_API_RPS="200", POLL_MIN="3") as deployment,
        ):
            api.behave(endless=True, calls_per_second=LIMIT, limit_form=form)
            deployment.migrate()
            insert_rows(deployment, api.base, 3_000)
            deployment.start_workers(2)
            deployment.wait_ready(2)
            wait_until(lambda api=api: bool(api.ledger().calls), 20)  # type: ignore[misc]
            began = api.ledger().calls[0].began
            time.sleep(max(0.0, began + 60 - time.time()))
            time.sleep(100)
            calls = api.ledger().calls
            later = [call for call in calls if call.began >= began + 60]
            refused = [call for call in later if call.answer == "rate_limited"]
            share = len(refused) / max(1, len(later))
            accepted = (len(later) - len(refused)) / 100
            early = [call for call in calls if call.began < began + 60]
            report.figure(f"{form}: refused in the first minute", _refused(early))
            report.figure(f"{form}: refused after it", f"{_refused(later)} ({share:.2%}), {accepted:.1f} accepted/s")
            per_ten_seconds = [
                sum(began + at <= call.began < began + at + 10 for call in calls) for at in range(0, 160, 10)
            ]
            report.figure(f"{form}: calls per ten seconds", per_ten_seconds)
            report.check(f"{form}: refused calls are below 3 % after a minute", share < 0.03, f"{share:.2%}")
            report.check(f"{form}: at least half of the limit is used", accepted >= LIMIT / 2, accepted)
            (account,) = deployment.document("status")["accounts"]
            report.figure(f"{form}: rate in status", f"{account['rps']} requests/s")
            report.check(f"{form}: status shows the learned rate", account["rps"] <= 2 * LIMIT, account)
            failed = deployment.count("SELECT count(*) FROM fetch_jobs WHERE status <> 'pending'")
            report.check(f"{form}: no job failed", failed == 0, failed)
    return report


def _refused(calls: Sequence[object]) -> str:
    refused = sum(getattr(call, "answer", "") == "rate_limited" for call in calls)
    return f"{refused} of {len(calls)}"


def two_accounts(installation: Installation, home: Path) -> Report:
    """The many jobs of one account do not delay the few jobs of another."""
    report = Report("two-accounts")
    keys = json.dumps({"large": KEY, "small": OTHER_KEY})
    with (
        ApiProcess(seed=1, accept=[KEY, OTHER_KEY]) as api,
        Deployment(installation, home, api.base, "", SD_API_KEYS=keys, SD_API_RPS="1000", POLL_MIN="60") as deployment,
    ):
        api.behave(endless=True)
        deployment.migrate()
        insert_rows(deployment, api.base, 50_000, account="large")
        deployment.start_workers(1)
        deployment.wait_ready(1)
        insert_rows(deployment, api.base, 10, account="small", prefix="small", first=3, apart=1.5)
        due = {row["remote_id"]: epoch(row["due_at"]) for row in deployment.rows(
            "SELECT remote_id, due_at FROM fetch_jobs WHERE account = 'small'")}  # fmt: skip
        time.sleep(22)
        ledger = api.ledger()
        calls_per_job = {remote_id: ledger.calls_about(remote_id) for remote_id in due}
        late = [calls[0].began - due[remote_id] for remote_id, calls in calls_per_job.items() if calls]
        large = [call for call in ledger.calls if call.key == KEY]
        report.figure("calls per second for the large account", len(large) / (large[-1].began - large[0].began))
        report.figure("small account: due to polled, p50 / max (s)", f"{quantile(late, 0.5):.2f} / {max(late):.2f}")
        report.check("all ten jobs were polled", len(late) == 10, len(late))
        report.check(
            "each within 2 s of its due time, and none earlier", all(-0.01 <= delay <= 2 for delay in late), late
        )
        waiting = deployment.count("SELECT count(*) FROM fetch_jobs WHERE account = 'large' AND polls = 0")
        report.check("the large account had due jobs all the time", waiting > 10_000, waiting)
    return report


def wake_up(installation: Installation, home: Path) -> Report:
    """An idle worker polls jobs at once: waiting ones when they become due, and newly tracked ones."""
    report = Report("wake-up")
    with (
        ApiProcess(seed=1, accept=[KEY]) as api,
        Deployment(installation, home, api.base, KEY, POLL_MIN="60") as deployment,
    ):
        api.behave(endless=True)
        deployment.migrate()
        insert_rows(deployment, api.base, 10_000, prefix="later", first=36_000)
        deployment.start_workers(1)
        deployment.wait_ready(1)
        insert_rows(deployment, api.base, 1, prefix="key")  # so that the key has been accepted once
        time.sleep(5)
        insert_rows(deployment, api.base, 30, prefix="known", first=2, apart=0.63)
        time.sleep(23)
        for number in range(20):
            options = {"submitted_at": "2026-01-01T00:00:00+00:00", "deadline": 86400 * 3650}
            deployment.client.send_task("worker.track", [f"name{number}"], options, queue="fetch-worker")
            time.sleep(0.5)
        result = subprocess.run(
            [str(installation.bin / "python"), "-c", TRACK_ONE, "20"],
            cwd=deployment.checkout, env=deployment.environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        report.check("tracking by import worked", result.returncode == 0, result.stderr[-300:])
        time.sleep(2)
        ledger = api.ledger()
        first = {call.remote_id: call.began for call in reversed(ledger.calls)}
        rows = deployment.rows("SELECT remote_id, tracked_at FROM fetch_jobs WHERE remote_id !~ '^(later|key)'")
        tracked = {row["remote_id"]: epoch(row["tracked_at"]) for row in rows}
        for prefix, count in (("known", 30), ("name", 20), ("import", 20)):
            since = {
                name: at + (2 + 0.63 * int(name.removeprefix("known")) if prefix == "known" else 0)
                for name, at in tracked.items()
                if name.startswith(prefix)
            }
            late = [first[name] - at for name, at in since.items() if name in first]
            quantiles = f"{quantile(late, 0.5) * 1000:.0f} / {quantile(late, 0.95) * 1000:.0f} / {max(late) * 1000:.0f}"
            report.figure(f"{prefix}: due to polled, p50 / p95 / max (ms)", quantiles)
            report.check(f"{prefix}: all were polled", len(late) == count, len(late))
            report.check(f"{prefix}: less than 100 ms at the median", quantile(late, 0.5) < 0.1, quantiles)
    return report


# ── slow-drip servers ─────────────────────────────────────────────────────────────────────────────────────────────────


class SlowDripServer:
    """A server that never completes an answer. It records how long each connection stayed open."""

    def __init__(self, first: bytes) -> None:
        self.first = first
        self.durations: list[float] = []
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
        self.durations.append(time.monotonic() - began)


FIRST_BYTES = {
    "silence": b"",
    "headers": b"HTTP/1.1 200 OK\r\nX-Slow: ",
    "body": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n",
}


def dripping_api(installation: Installation, home: Path) -> Report:
    """A server that sends a byte each half second blocks no thread for longer than the time-out and a second."""
    report = Report("dripping-api")
    threads = "--pool threads --concurrency 4"
    for pool in (threads, "--pool prefork --concurrency 2", "--pool solo"):
        with ApiProcess(seed=1, accept=[KEY]) as api:
            api.behave(endless=True)
            servers = {name: SlowDripServer(first) for name, first in FIRST_BYTES.items()}
            hosts = ",".join(f"127.0.0.1:{server.port}" for server in servers.values())
            settings = {"SD_API_HOSTS": hosts, "SD_API_TIMEOUT": "3", "POLL_MIN": "3"}
            folder = home / pool.split()[1]
            with Deployment(installation, folder, api.base, KEY, **settings) as deployment:
                deployment.migrate()
                insert_rows(deployment, api.base, 5)
                command = deployment.procfile["worker"]
                assert threads in command
                deployment.start_line("worker", command.replace(threads, pool))
                if "solo" not in pool:  # its only thread is used by the poll run
                    deployment.wait_ready(1)
                wait_until(lambda api=api: bool(api.ledger().calls), 20)  # type: ignore[misc]
                for name, server in servers.items():
                    insert_rows(deployment, f"http://127.0.0.1:{server.port}/api/v3", 4, prefix=name)
                time.sleep(1)
                insert_rows(deployment, api.base, 10, prefix="good", first=1, apart=0.5)
                time.sleep(12)
                since = deployment.rows("SELECT remote_id, tracked_at FROM fetch_jobs WHERE remote_id LIKE 'good%'")
                due = {r["remote_id"]: epoch(r["tracked_at"]) + 1 + 0.5 * int(r["remote_id"][4:]) for r in since}
                first = {call.remote_id: call.began for call in reversed(api.ledger().calls)}
                late = [first[name] - at for name, at in due.items() if name in first]
                for name, server in servers.items():
                    worst = max(server.durations, default=float("nan"))
                    report.figure(
                        f"{pool}: {name}, connections and longest (s)", f"{len(server.durations)}, {worst:.2f}"
                    )
                    report.check(
                        f"{pool}: {name} blocks no thread for more than 4 s",
                        bool(server.durations) and worst <= 4.0,
                        worst,
                    )
                report.figure(f"{pool}: good jobs, worst delay (s)", max(late, default=float("nan")))
                report.check(
                    f"{pool}: jobs of the good API are polled meanwhile", len(late) == 10 and max(late) < 1.0, late
                )
                final = deployment.count("SELECT count(*) FROM fetch_jobs WHERE status <> 'pending'")
                report.check(f"{pool}: no job ended", not final, final)
            for server in servers.values():
                server.listener.close()
    return report


# ── a large table ─────────────────────────────────────────────────────────────────────────────────────────────────────


CLAIMED = re.compile(r"claimed jobs=(\d+) ms=([\d.]+)")


@contextmanager
def fast_api() -> Iterator[str]:
    """Run the API server of the benchmarks, which answers `processing` to every call. Return its URL."""
    program = [sys.executable, "-m", "tests.benchmarks.server"]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ports = json.loads(process.stdout.readline())
        try:
            yield f"http://127.0.0.1:{ports['port']}/api/v3"
        finally:
            process.terminate()


def _request_count(base: str) -> int:
    with urllib.request.urlopen(base.removesuffix("/api/v3") + "/count", timeout=5) as answer:  # noqa: S310  # http, local
        return int(json.load(answer)["requests"])


def million_rows(installation: Installation, home: Path, rows: int, minutes: float) -> Report:
    """A thousand of a million jobs become due each second: none is delayed, and memory does not grow."""
    report = Report("million-rows")
    due_per_second = rows // 1_000
    settings = {"SD_API_RPS": "100000", "POLL_POLICY": "fixed", "POLL_MIN": "1000"}
    with fast_api() as base, Deployment(installation, home, base, KEY, **settings) as deployment:
        deployment.migrate()
        insert_rows(deployment, base, rows, first=15, apart=1 / due_per_second)
        deployment.execute("ANALYZE fetch_jobs")
        pid = deployment.start_line(
            "worker", deployment.procfile["worker"].replace("--loglevel INFO", "--loglevel DEBUG")
        )
        deployment.wait_ready(1)
        time.sleep(15)
        memory: list[float] = []
        delays: list[float] = []
        counts: list[int] = []
        deadline = time.monotonic() + minutes * 60
        while time.monotonic() < deadline:
            time.sleep(5)
            memory.append(_resident_mib(pid))
            counts.append(_request_count(base))
            (row,) = deployment.rows(
                "SELECT coalesce(extract(epoch FROM clock_timestamp() - min(due_at)), 0) AS late FROM fetch_jobs"
                " WHERE account = 'default' AND priority = 0 AND due_at IS NOT NULL AND due_at <= clock_timestamp()"
            )
            delays.append(float(row["late"]))
        log = (deployment.log_folder / "worker.log").read_text(encoding="utf-8")
        claims = [float(milliseconds) for jobs, milliseconds in CLAIMED.findall(log) if int(jobs)]
        steady = memory[min(11, len(memory) // 2) :]
        report.figure("requests per second", (counts[-1] - counts[0]) / (5 * (len(counts) - 1)))
        report.figure(
            "claims, p50 / p95 / p99 (ms)", " / ".join(f"{quantile(claims, q):.1f}" for q in (0.5, 0.95, 0.99))
        )
        report.figure("oldest due, p50 / max (s)", f"{quantile(delays, 0.5):.2f} / {max(delays):.2f}")
        report.figure("memory after a minute / at the end (MiB)", f"{steady[0]:.0f} / {steady[-1]:.0f}")
        report.figure("processor time (s)", deployment.cpu_seconds())
        report.check("no job is due for 2 s or longer", max(delays) < 2.0, max(delays))
        report.check("95 % of the claims take less than 20 ms", quantile(claims, 0.95) < 20, quantile(claims, 0.95))
        report.check("memory does not grow", steady[-1] <= steady[0] * 1.05 + 5, steady)
    return report


def _resident_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0.0
