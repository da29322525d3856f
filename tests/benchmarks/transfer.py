"""Downloads: receive, hash, write and fsync, compared with curl, sha256sum and sync.

Measures one large file at a time, then pictures of a usual size, eight and thirty-two at once: with the downloader
alone, and with the complete task including Celery and PostgreSQL. The file server is a separate process.
"""

import http.server
import os
import resource
import shutil
import socketserver
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from pathlib import Path
from typing import ClassVar

import psycopg
from sqlalchemy import Engine
from sqlalchemy.engine import make_url

from tests.benchmarks.deployment import cpu_seconds, deploy
from tests.benchmarks.table import Rounds, Table
from worker.coordination.leases import LeaseKeeper
from worker.core.lifecycle import OutputFacts, StoredFile
from worker.downloads.downloader import Downloader
from worker.downloads.options import DownloadOptions
from worker.net.address_guard import Guard, guarded_adapter
from worker.storage.local import FileStorage
from worker.store.claims import ClaimedOutput
from worker.store.engine import make_engine
from worker.store.migrate import migrate
from worker.system.redaction import Scrubber

MEGABYTES = 50
PICTURES, PICTURE_BYTES = 96, 1_500_000
CONCURRENCY = (8, 32)
QUEUE_OUTPUTS = (
    "import sys; from worker.process.publishing import queue_downloads;"
    " queue_downloads([int(argument) for argument in sys.argv[1:]])"
)
INSERT_OUTPUTS = """
WITH job AS (
  INSERT INTO fetch_jobs (account, remote_id, kind, fetch_url, fetch_base, fetch_host, status, submitted_at, tracked_at,
                          deadline_at, deadline_seconds, ready_at)
  VALUES ('default', %s, 'image', 'x', 'x', 'x', 'downloading', now(), now(), now() + interval '1 hour', 3600, now())
  RETURNING id
)
INSERT INTO fetch_outputs (job_id, position, url, proxy_urls, status, listed_at, due_at, queued_at)
SELECT job.id, position, %s, '[]', 'pending', now(), now(), now() FROM job, generate_series(0, %s) AS position
RETURNING id
"""
LOOPBACK = ip_network("127.0.0.0/8")


def big_png(size: int) -> bytes:
    """Return a PNG of `size` bytes. Most of it is a random comment."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    tail = chunk(b"IDAT", zlib.compress((b"\x00" + b"\x30\x60\x90" * 8) * 8)) + chunk(b"IEND", b"")
    return head + chunk(b"teXt", os.urandom(size - len(head) - len(tail) - 12)) + tail


class _FileHandler(http.server.BaseHTTPRequestHandler):
    file: ClassVar[Path]

    def do_GET(self) -> None:
        """Send the picture with sendfile."""
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.send_header("Content-Length", str(self.file.stat().st_size))
        self.end_headers()
        self.wfile.flush()
        with self.file.open("rb") as file:
            self.connection.sendfile(file)

    def log_message(self, *_: object) -> None:
        """Do not log requests."""


class _FileServer(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True


def _serve(file: Path) -> None:
    """Print the port and serve a file until the process is killed."""
    server = _FileServer(("127.0.0.1", 0), type("Bound", (_FileHandler,), {"file": file}))
    print(server.server_address[1], flush=True)
    server.serve_forever()


@contextmanager
def served(file: Path) -> Iterator[str]:
    """Serve a file in a separate process. Return its URL."""
    program = [sys.executable, "-m", "tests.benchmarks.transfer", str(file)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        try:
            yield f"http://127.0.0.1:{port}/a.png"
        finally:
            process.kill()


def _downloader(engine: Engine, leases: LeaseKeeper, folder: Path, threads: int) -> Downloader:
    guard = Guard([LOOPBACK])
    storage = FileStorage(folder / "out")
    storage.prepare()
    return Downloader(
        engine=engine,
        leases=leases,
        storage=storage,
        guard=guard,
        adapter=guarded_adapter(guard, connections=threads),
        scrubber=Scrubber([]),
        options=DownloadOptions(
            max_bytes=200_000_000, max_pixels=150_000_000, timeout=60, deadline=86_400, per_host=threads
        ),
        notify=lambda ids: None,
    )


def measure_transfer(table: Table, folder: Path, rounds: int) -> None:
    """Measure downloads without claims: one large file, then many pictures at once."""
    folder.mkdir()
    engine = make_engine(make_url(f"sqlite:///{folder}/transfer.db"))
    migrate(engine)
    for count, size, threads in ((1, MEGABYTES * 1_000_000, 1), *((PICTURES, PICTURE_BYTES, n) for n in CONCURRENCY)):
        file = folder / f"source{threads}.png"
        file.write_bytes(big_png(size))
        costs, speeds = Rounds(), Rounds()
        leases = LeaseKeeper(engine, lease=timedelta(hours=1))
        downloader = _downloader(engine, leases, folder, threads)
        with served(file) as url, ThreadPoolExecutor(threads) as pool:
            for number in range(rounds + 1):
                outputs = [
                    _claimed_output(number * count + index + 1, leases.new_token(), url) for index in range(count)
                ]
                used, began = time.process_time(), time.perf_counter()
                results = list(pool.map(downloader._attempt, outputs))
                cpu, elapsed = time.process_time() - used, time.perf_counter() - began
                if not all(isinstance(result, StoredFile) for result in results):
                    raise RuntimeError(f"not stored: {results}")
                curl_cpu, curl_elapsed = _curl([url] * count, folder / f"curl{threads}-{number}", threads)
                megabytes = count * size / 1e6
                if number:
                    costs.add(cpu / megabytes, curl_cpu / megabytes)
                    speeds.add(elapsed / megabytes, curl_elapsed / megabytes)
        name = f"transfer, {threads} at once of {size / 1e6:g} MB"
        table.ratio(f"{name} ÷ (curl + sha256sum + sync)", costs, "ms CPU/MB", 1e3, must=1.3, aim=1.0)
        table.ratio(f"{name}, elapsed, beside the same", speeds, "ms/MB", 1e3)
    engine.dispose()


def _claimed_output(number: int, token: str, url: str) -> ClaimedOutput:
    facts = OutputFacts(attempts=1, proxies=0, ready_at=datetime.now(UTC))
    return ClaimedOutput(number, token, number, 0, (url,), None, facts, datetime.now(UTC))


def _curl(urls: Sequence[str], folder: Path, concurrency: int) -> tuple[float, float]:
    """Download with one curl, one sha256sum and one sync for all files. Return processor and elapsed seconds."""
    folder.mkdir()
    targets = [str(folder / f"{number}.png") for number, _ in enumerate(urls)]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    arguments = [argument for url, target in zip(urls, targets, strict=True) for argument in ("-o", target, url)]
    subprocess.run(["curl", "-s", "--parallel", "--parallel-max", str(concurrency), *arguments], check=True)
    subprocess.run(["sha256sum", *targets], check=True, capture_output=True)
    subprocess.run(["sync", *targets], check=True)
    after, elapsed = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
    shutil.rmtree(folder)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, elapsed


def measure_downloads(table: Table, folder: Path, rounds: int) -> None:
    """Measure the complete task with Celery and PostgreSQL, in one process with the given numbers of threads."""
    folder.mkdir()
    file = folder / "source.png"
    file.write_bytes(big_png(PICTURE_BYTES))
    megabytes = PICTURES * PICTURE_BYTES / 1e6
    for threads in CONCURRENCY:
        costs, speeds, rates = Rounds(), Rounds(), list[float]()
        settings = {
            "STORAGE_URL": f"file:{folder}/out{threads}",
            "OUTPUT_ALLOWED_NETWORKS": "127.0.0.0/8",
            "DOWNLOADS_PER_HOST": str(threads),
        }
        with served(file) as url, deploy(folder / f"deployment{threads}", **settings) as deployment:
            pid = deployment.start_worker(name="downloads", concurrency=threads)
            for number in range(rounds + 1):
                with psycopg.connect(deployment.database_url, autocommit=True) as connection:
                    ids = [str(row[0]) for row in connection.execute(INSERT_OUTPUTS, (f"d{number}", url, PICTURES - 1))]
                    used, began = cpu_seconds([pid]), time.perf_counter()
                    deployment.run(sys.executable, "-c", QUEUE_OUTPUTS, *ids)
                    wait_until_stored(connection, PICTURES * (number + 1))
                    elapsed, cpu = time.perf_counter() - began, cpu_seconds([pid]) - used
                curl_cpu, curl_elapsed = _curl([url] * PICTURES, folder / f"curl{threads}-{number}", threads)
                if number:
                    costs.add(cpu / megabytes, curl_cpu / megabytes)
                    speeds.add(elapsed / megabytes, curl_elapsed / megabytes)
                    rates.append(PICTURES / elapsed)
        name = f"download task, {threads} at once of {PICTURE_BYTES / 1e6:g} MB"
        table.ratio(f"{name} ÷ (curl + sha256sum + sync)", costs, "ms CPU/MB", 1e3, must=2.5, aim=2.0)
        table.ratio(f"{name}, elapsed, beside the same", speeds, "ms/MB", 1e3)
        table.figure(f"{name}, one process, best round", max(rates), "/s")


def wait_until_stored(connection: "psycopg.Connection[tuple[object, ...]]", count: int) -> None:
    """Wait until `count` outputs are stored."""
    deadline = time.monotonic() + 120
    while True:
        row = connection.execute("SELECT count(*) FROM fetch_outputs WHERE status = 'stored'").fetchone()
        if row is not None and int(str(row[0])) >= count:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"only {row} of {count} outputs are stored")
        time.sleep(0.02)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
