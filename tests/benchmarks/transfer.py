"""Downloads: receive, hash, write, fsync; beside curl, sha256sum and sync doing the same."""

import http.server
import os
import resource
import shutil
import socketserver
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from pathlib import Path
from typing import ClassVar

import psycopg
from sqlalchemy.engine import make_url

from tests.benchmarks.stand import cpu_seconds, stand
from tests.benchmarks.table import Rounds, Table
from tests.rows import add_downloading, add_output, output_of
from worker.addresses import Guard, guarded_adapter
from worker.database import make_engine
from worker.downloader import Downloader
from worker.leases import LeaseKeeper
from worker.migrate import migrate
from worker.scrubber import Scrubber
from worker.storage import FileStorage

MEGABYTES = 50
PICTURES, PICTURE_MEGABYTES = 60, 2
QUEUE = "import sys; from worker.tasks import queue_downloads; queue_downloads([int(one) for one in sys.argv[1:]])"
LISTED = """
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
    """A picture of `size` bytes, mostly a comment."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    tail = chunk(b"IDAT", zlib.compress((b"\x00" + b"\x30\x60\x90" * 8) * 8)) + chunk(b"IEND", b"")
    return head + chunk(b"teXt", os.urandom(size - len(head) - len(tail) - 12)) + tail


class _Handler(http.server.BaseHTTPRequestHandler):
    file: ClassVar[Path]

    def do_GET(self) -> None:
        """The picture, by sendfile."""
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.send_header("Content-Length", str(self.file.stat().st_size))
        self.end_headers()
        self.wfile.flush()
        with self.file.open("rb") as file:
            self.connection.sendfile(file)

    def log_message(self, *_: object) -> None:
        """Nothing."""


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True


@contextmanager
def served(file: Path) -> Iterator[str]:
    """A file's address."""
    server = _Server(("127.0.0.1", 0), type("Bound", (_Handler,), {"file": file}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/a.png"
    finally:
        server.shutdown()
        server.server_close()


def measure_transfer(table: Table, folder: Path, rounds: int) -> None:
    """Processor time per megabyte. The server's thread is left out: it works in another process's stead."""
    folder.mkdir()
    file = folder / "source.png"
    file.write_bytes(big_png(MEGABYTES * 1_000_000))
    engine = make_engine(make_url(f"sqlite:///{folder}/transfer.db"))
    migrate(engine)
    guard = Guard([LOOPBACK])
    downloader = Downloader(
        engine=engine,
        leases=LeaseKeeper(engine, lease=timedelta(seconds=60)),
        storage=FileStorage(folder / "out"),
        guard=guard,
        adapter=guarded_adapter(guard, connections=4),
        scrubber=Scrubber([]),
        max_bytes=200_000_000,
        timeout=60,
        deadline=86_400,
        tell=lambda ids: None,
    )
    found = Rounds()
    with served(file) as url:
        for number in range(rounds + 1):
            with engine.begin() as connection:
                now = datetime.now(UTC)
                output = add_output(
                    connection, add_downloading(connection, f"t{number}"), url=url, due_at=now, listed_at=now
                )
            began = time.thread_time()  # the downloader works in this thread alone
            downloader.run(output)
            ours = time.thread_time() - began
            row = output_of(engine, output)
            if row.status != "stored":
                raise RuntimeError(f"not stored: {row.error_code} {row.error_message}")
            theirs = _by_hand([url], folder / f"curl{number}")
            if number:
                found.add(ours / MEGABYTES, theirs / MEGABYTES)
    engine.dispose()
    table.ratio("transfer ÷ (curl + sha256sum + sync)", found, "ms CPU/MB", 1e3, must=1.3, aim=1.0)


def _by_hand(urls: Sequence[str], folder: Path) -> float:
    """Processor seconds of one curl, one sha256sum and one sync for all of them: no time goes into starting more."""
    folder.mkdir()
    targets = [str(folder / f"{number}.png") for number, _ in enumerate(urls)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    wanted = [word for url, target in zip(urls, targets, strict=True) for word in ("-o", target, url)]
    subprocess.run(["curl", "-s", *wanted], check=True)
    subprocess.run(["sha256sum", *targets], check=True, capture_output=True)
    subprocess.run(["sync", *targets], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    shutil.rmtree(folder)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure_downloads(table: Table, folder: Path, rounds: int) -> None:
    """The whole task, Celery and PostgreSQL included, by the Procfile's line, on pictures of a usual size."""
    folder.mkdir()
    file = folder / "source.png"
    file.write_bytes(big_png(PICTURE_MEGABYTES * 1_000_000))
    megabytes = PICTURES * PICTURE_MEGABYTES
    found, rates = Rounds(), list[float]()
    settings = {"STORAGE_URL": f"file:{folder}/out", "OUTPUT_ALLOWED_NETWORKS": "127.0.0.0/8"}
    with served(file) as url, stand(folder / "stand", **settings) as made:
        pid = made.start_worker(name="downloads")
        for number in range(rounds + 1):
            with psycopg.connect(made.database_url, autocommit=True) as connection:
                ids = [str(row[0]) for row in connection.execute(LISTED, (f"d{number}", url, PICTURES - 1))]
                used, began = cpu_seconds([pid]), time.perf_counter()
                made.run(sys.executable, "-c", QUEUE, *ids)
                _until_stored(connection, PICTURES * (number + 1))
                took, ours = time.perf_counter() - began, cpu_seconds([pid]) - used
            theirs = _by_hand([url] * PICTURES, folder / f"curl{number}")
            if number:
                found.add(ours / megabytes, theirs / megabytes)
                rates.append(PICTURES / took)
    what = f"download task of a {PICTURE_MEGABYTES} MB picture ÷ (curl + sha256sum + sync)"
    table.ratio(what, found, "ms CPU/MB", 1e3, must=2.5, aim=2.0)
    table.figure(f"downloads of {PICTURE_MEGABYTES} MB, one process, best round", max(rates), "/s")


def _until_stored(connection: "psycopg.Connection[tuple[object, ...]]", count: int) -> None:
    until = time.monotonic() + 120
    while True:
        row = connection.execute("SELECT count(*) FROM fetch_outputs WHERE status = 'stored'").fetchone()
        if row == (count,):
            return
        if time.monotonic() > until:
            raise RuntimeError(f"only {row} of {count} outputs are stored")
        time.sleep(0.02)
