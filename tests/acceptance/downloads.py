"""Downloads: size and time limits, broken transfers, dead links, and a storage that fails; nothing is lost."""

import gzip
import hashlib
import json
import random
import secrets
import socket
import struct
import subprocess
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.acceptance.deployment import WORKING, Deployment, Installation, file_of, wait_until
from tests.acceptance.main_job import KEY
from tests.acceptance.report import Report
from tests.s3_servers import S3Server, s3_server
from tests.web import Answer, Picture, Web, drips, floods, head, page, web_server

MEGABYTE = 1_000_000
TOO_LARGE = "too_large"
OUTAGE_SECONDS = 30
GROWTH_MIB = 50  # the most that the memory of a process may grow
TIMEOUT = 12  # seconds for one attempt
DISK_BYTES = 3 * MEGABYTE


def picture(padding: int, seed: int = 0) -> bytes:
    """Return a PNG of about `padding` bytes that cannot be compressed."""
    noise = random.Random(seed).randbytes(padding)
    rows = zlib.compress((b"\x00" + b"\x30\x60\x90" * 8) * 8)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)), (b"teXt", noise), (b"IDAT", rows), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n"
    for name, data in parts:
        png += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return png


def large(width: int, height: int) -> bytes:
    """Return the header of a PNG with these dimensions, without pixel data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + b"IHDR"
        + header
        + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    )
    return png + struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))


class DownloadTest:
    """A deployment, and a web server that serves the outputs and answers as the API."""

    def __init__(self, report: Report, deployment: Deployment, web: Web) -> None:
        self.report, self.deployment, self.web = report, deployment, web
        self.number = 30_000_000
        self.waiting: tuple[int, bytes] = (0, b"")

    def track(self, *paths: str, remote_id: str | None = None) -> int:
        """Track a job that is ready at once and has these outputs. Return its id."""
        self.number += 1
        links = [self.web.url + path for path in paths]
        answer = {"status": "success", "id": int(remote_id or self.number), "output": links}
        answer["fetch_result"] = f"{self.web.url}/api/v3/fetch/{answer['id']}"
        result = self.deployment.client.send_task("worker.track", [answer], queue="fetch-worker")
        return int(result.get(timeout=30))

    def track_one(self, path: str, answer: Answer) -> int:
        """Track a job with one output that is served with `answer`. Return its id."""
        self.web.serves(path, answer)
        return self.track(path)

    def output(self, job_id: int) -> Mapping[str, Any]:
        """Return the current row of the first output of a job."""
        query = "SELECT * FROM fetch_outputs WHERE job_id = :id ORDER BY position"
        return self.deployment.rows(query, id=job_id)[0]

    def wait(self, job_id: int, seconds: float, **expected: object) -> Mapping[str, Any]:
        """Wait until the output's row has the expected values. Return the row."""
        wait_until(lambda: all(self.output(job_id)[name] == value for name, value in expected.items()), seconds, 0.1)
        return self.output(job_id)

    def check_stored(self, case: str, job_id: int, body: bytes, seconds: float) -> Mapping[str, Any]:
        """Check that the output is stored with the same bytes. Return its row."""
        row = self.wait(job_id, seconds, status="stored")
        self.report.check(f"{case}: it is stored", row["status"] == "stored", (row["status"], row["error_message"]))
        if row["status"] == "stored" and str(row["location"]).startswith("file:"):
            same = file_of(row["location"]).read_bytes() == body
            self.report.check(
                f"{case}: with the same bytes", same and row["sha256"] == hashlib.sha256(body).hexdigest()
            )
        return row


@contextmanager
def watch_memory(pids: list[int]) -> Iterator[Callable[[], float]]:
    """Watch the resident memory of processes. Return a function that gives the largest growth in MiB."""
    before = {pid: _resident(pid) for pid in pids}
    maximum, stop = dict(before), threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            for pid in pids:
                maximum[pid] = max(maximum[pid], _resident(pid))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield lambda: max(maximum[pid] - before[pid] for pid in pids)
    stop.set()
    thread.join()


def _resident(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return int(status.partition("VmRSS:")[2].split()[0]) / 1_024


def downloads(installation: Installation, home: Path) -> Report:
    """Run one worker of each kind and cause one fault after the other."""
    report = Report("downloads")
    with (
        web_server() as web,
        Deployment(
            installation, home, f"{web.url}/api/v3", KEY, OUTPUT_TIMEOUT=str(TIMEOUT), RECOVERY_SECONDS="5"
        ) as deployment,
    ):
        deployment.migrate()
        deployment.start(*WORKING)
        deployment.wait_ready()
        test = DownloadTest(report, deployment, web)
        first = picture(5_000)
        test.check_stored("a picture", test.track_one("/warm.png", page(200, first)), first, 20)
        bounds(test)
        breaks(test)
        kill(test)
        links(test)
        storage(test)
        partial = [
            path for path in deployment.outputs.rglob("*") if path.is_file() and path.suffix in (".part", ".json")
        ]
        report.none_of("no partial file is left", partial)
        report.none_of("no process died", deployment.died())
        report.none_of("no connection to another machine", deployment.refused_connections())
    return report


def bounds(test: DownloadTest) -> None:
    """Oversized and endless bodies are refused within the limits, and memory does not grow."""
    report, web = test.report, test.web
    bomb = gzip.compress(large(8, 8) + bytes(300 * MEGABYTE), 9)
    report.figure("gzip bomb (bytes on the wire)", len(bomb))
    block, chunk = bytes(MEGABYTE), b"%x\r\n%b\r\n" % (65_536, picture(10).ljust(65_536))
    tricks: dict[str, tuple[Answer, str | None]] = {
        "two gigabytes": (
            floods(head(200, Content_Length=str(2 * 10**9)) + picture(10), block, times=2_000),
            TOO_LARGE,
        ),
        "endless": (floods(head(200) + picture(10), block, times=100_000), TOO_LARGE),
        "endless chunks": (floods(head(200, Transfer_Encoding="chunked"), chunk, times=10**6), TOO_LARGE),
        "gzip bomb": (page(200, bomb, Content_Encoding="gzip"), TOO_LARGE),
        "over 150 megapixels": (page(200, large(12_500, 12_001)), TOO_LARGE),
        "endless body of a redirect": (floods(head(302, Location="/warm.png"), block, times=100_000), None),
    }
    with watch_memory(test.deployment.leftovers()) as grown:
        for name, (answer, code) in tricks.items():
            job_id = test.track_one(f"/{name.replace(' ', '-')}.png", answer)
            row = test.wait(job_id, 40, status="stored" if code is None else "failed")
            report.check(
                f"{name} ends as {code or 'stored'}", row["error_code"] == code, (row["status"], row["error_code"])
            )
        for name, first in {
            "slow headers": b"HTTP/1.1 200 OK\r\n",
            "slow body": head(200, Content_Length="900000"),
        }.items():
            began = time.monotonic()
            piece = b"X-A: 1\r\n" if "headers" in name else b"x"
            job_id = test.track_one(f"/{name.replace(' ', '-')}.png", drips(first, piece, every=0.5, seconds=60))
            row = test.wait(job_id, TIMEOUT + 10, error_code="unreachable")
            seconds = time.monotonic() - began
            report.check(
                f"{name}: given up in time",
                row["error_code"] == "unreachable" and seconds < TIMEOUT + 4,
                (seconds, dict(row)),
            )
            report.figure(f"{name}: given up after (s)", seconds)
            test.deployment.command("fetch-worker", "cancel", str(job_id))
        report.figure("memory grew by (MiB)", grown())
        report.check(f"memory grew by less than {GROWTH_MIB} MiB", grown() < GROWTH_MIB, grown())
    report.figure("requests so far", len(web.requests))


def breaks(test: DownloadTest) -> None:
    """A transfer that breaks five times at random positions produces an identical file."""
    rng = random.Random(secrets.randbits(32))
    for ranges in (True, False):
        body = picture(4 * MEGABYTE, seed=ranges)
        source = Picture(test.web, body, ranges=ranges)
        share = len(body) // 6 if ranges else len(body)
        source.cuts = [rng.randrange(1, share) for _ in range(5)]
        case = f"broken five times, {'with' if ranges else 'without'} ranges"
        row = test.check_stored(case, test.track_one(f"/breaks-{ranges}.png", source), body, 40)
        test.report.check(f"{case}: in one attempt", row["attempts"] == 1, row["attempts"])
        test.report.figure(f"{case}: bytes sent ÷ size", source.sent / len(body))
        if ranges:
            test.report.check(
                f"{case}: few bytes are sent twice", source.sent < 1.2 * len(body), source.sent / len(body)
            )


def kill(test: DownloadTest) -> None:
    """Kill the download process in the middle of a transfer."""
    body = picture(6 * MEGABYTE, seed=3)
    source = Picture(test.web, body, cuts=[4 * MEGABYTE])
    first = threading.Event()

    def stalls(client: socket.socket) -> None:
        source(client)
        if not first.is_set():
            first.set()
            time.sleep(6)  # no more data follows; the process is killed meanwhile

    job_id = test.track_one("/killed.png", stalls)
    first.wait(20)
    partial = test.deployment.outputs / ".partial"
    exists = wait_until(lambda: any(path.stat().st_size > 3.9 * MEGABYTE for path in partial.glob("*.part")), 10, 0.05)
    test.report.check("there was a partial file when the process was killed", exists)
    test.deployment.kill("downloads")
    began = time.monotonic()
    test.deployment.start("downloads")
    test.check_stored("killed during a transfer", job_id, body, 40)
    test.report.figure("kill to stored (s)", time.monotonic() - began)
    test.report.figure("killed: bytes sent ÷ size", source.sent / len(body))
    test.report.check("killed: the transfer was resumed", source.sent < 1.2 * len(body), source.spans)
    folder = file_of(test.output(job_id)["location"]).parent
    test.report.check("killed: one file", len(list(folder.iterdir())) == 1, list(folder.iterdir()))


def links(test: DownloadTest) -> None:
    """A link that works late is retried; a dead link is renewed; one that stays dead ends as `gone`."""
    report, web, body = test.report, test.web, picture(50_000, seed=4)
    began = time.monotonic()

    def late(client: socket.socket) -> None:
        (page(200, body) if time.monotonic() - began > 40 else page(404, b"<Error/>"))(client)

    late_id = test.track_one("/late.png", late)
    web.serves("/fresh.png", page(200, body))
    renewed = json.dumps({"status": "success", "id": 31_000_001, "output": [web.url + "/fresh.png"]}).encode()
    web.serves("/api/v3/fetch/31000001", page(200, renewed, Content_Type="application/json"))
    renewed_id = test.track("/dead.png", remote_id="31000001")
    unchanged = json.dumps({"status": "success", "id": 31_000_002, "output": [web.url + "/dead.png"]}).encode()
    web.serves("/api/v3/fetch/31000002", page(200, unchanged, Content_Type="application/json"))
    gone_id = test.track("/dead.png", remote_id="31000002")
    test.check_stored("404 for 40 s", late_id, body, 70)
    test.check_stored("a dead link that is renewed", renewed_id, body, 90)
    row = test.wait(gone_id, 90, status="failed")
    report.check("a link that stays dead ends as gone", row["error_code"] == "gone", row["error_code"])
    report.check(
        "the message of gone has the time for which the link was dead",
        "dead for" in str(row["error_message"]),
        row["error_message"],
    )
    report.figure("message of gone", row["error_message"])


def storage(test: DownloadTest) -> None:
    """The storage is missing, full or read-only: outputs wait, `status` reports it, and downloads resume."""
    report, deployment = test.report, test.deployment
    aside = deployment.outputs.with_name("outputs-aside")
    deployment.outputs.rename(aside)
    _check_waits(test, "missing storage", 100_000, 5)
    aside.rename(deployment.outputs)
    _check_resumes(test, "missing storage")
    deployment.outputs.rename(aside)  # the next cases use a small disk
    deployment.outputs.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", deployment.outputs], check=False
    ).returncode:
        report.check("a small disk could be mounted", False, "needs root")
        return
    try:
        filler = deployment.outputs / "filler"
        filler.write_bytes(bytes(int(2.4 * MEGABYTE)))
        _check_waits(test, "full disk", MEGABYTE, 6)
        filler.unlink()
        _check_resumes(test, "full disk")
        subprocess.run(["mount", "-o", "remount,ro", deployment.outputs], check=True)
        _check_waits(test, "read-only disk", 100_000, 7)
        subprocess.run(["mount", "-o", "remount,rw", deployment.outputs], check=True)
        _check_resumes(test, "read-only disk")
        files = [path for path in deployment.outputs.rglob("*") if path.is_file()]
        report.check("two files on the small disk, and no partial file", len(files) == 2, files)
    finally:
        subprocess.run(["umount", "-l", deployment.outputs], check=False)
        deployment.outputs.rmdir()
        aside.rename(deployment.outputs)


def _check_waits(test: DownloadTest, case: str, size: int, seed: int) -> None:
    body = picture(size, seed=seed)
    test.number = 40_000_000 + seed
    test.web.serves(f"/disk-{seed}.png", page(200, body))
    job_id = test.track(f"/disk-{seed}.png")
    row = test.wait(job_id, 20, error_code="storage")
    state = (row["status"], row["error_code"])
    test.report.check(f"{case}: the output waits", state == ("pending", "storage"), (state, row["error_message"]))
    status = test.deployment.document("status")["outputs"]
    test.report.check(
        f"{case}: status reports it", status["trouble"].get("storage") == 1 and bool(status["storage"]), status
    )
    test.report.figure(f"{case}: text in status", status["storage"])
    test.waiting = (job_id, body)


def _check_resumes(test: DownloadTest, case: str) -> None:
    job_id, body = test.waiting
    test.check_stored(case, job_id, body, 40)


def bucket(installation: Installation, home: Path) -> Report:
    """Store pictures on an S3 server that is down for half a minute: each is downloaded once and stored once."""
    report = Report("bucket")
    (home / "s3").mkdir(parents=True)
    with web_server() as web, s3_server(home / "s3") as s3:
        name = s3.bucket()
        storage_url = {"STORAGE_URL": f"s3://{name}/shop/pictures", **s3.environment}
        with Deployment(installation, home / "deployment", f"{web.url}/api/v3", KEY, **storage_url) as deployment:
            deployment.migrate()
            deployment.start(*WORKING)
            deployment.wait_ready()
            test = DownloadTest(report, deployment, web)
            bodies = {n: picture(200_000 + n, seed=n) for n in range(30)}
            tracked = {n: test.track_one(f"/{n}.png", page(200, bodies[n])) for n in range(10)}
            wait_until(lambda: len(_objects(s3, name)) >= 5, 20)
            s3.stop()
            began = time.monotonic()
            tracked |= {n: test.track_one(f"/{n}.png", page(200, bodies[n])) for n in range(10, 30)}
            test.wait(tracked[29], 25, error_code="storage")
            status = deployment.document("status")["outputs"]
            report.check("status reports the trouble", status["trouble"].get("storage", 0) > 0, status)
            report.figure("text in status", status["storage"])
            time.sleep(max(0.0, OUTAGE_SECONDS - (time.monotonic() - began)))
            s3.start()
            end = time.monotonic()
            states = "SELECT count(*) FROM fetch_jobs WHERE status = 'completed'"
            wait_until(lambda: deployment.count(states) == len(tracked), 90)
            report.check(
                "all are stored after the outage", deployment.count(states) == len(tracked), deployment.count(states)
            )
            report.figure("end of outage to all stored (s)", time.monotonic() - end)
            objects = _objects(s3, name)
            expected = {hashlib.sha256(body).hexdigest() for body in bodies.values()}
            report.check("each once, with the same bytes", sorted(objects.values()) == sorted(expected), len(objects))
            requests = Counter(request.path for request in web.requests)
            report.none_of("no picture was downloaded twice", [path for path, times in requests.items() if times > 1])
            verified = deployment.document("verify")
            report.check("verify finds all files complete", verified["whole"] == len(tracked), verified)
            s3.client.delete_object(Bucket=name, Key=min(objects))
            deployment.document("verify")
            wait_until(lambda: deployment.count(states) == len(tracked) and len(_objects(s3, name)) == len(tracked), 30)
            report.check("verify restores a removed file", _objects(s3, name) == objects)
            report.none_of("no process died", deployment.died())
            report.none_of("no connection to another machine", deployment.refused_connections())
            partial = list((deployment.checkout / "var" / "partial").glob("*"))
            report.none_of("no partial file is left", partial)
    return report


def _objects(s3: S3Server, name: str) -> dict[str, str]:
    """Return the SHA-256 of each object in a bucket, by key."""
    contents = s3.client.list_objects_v2(Bucket=name).get("Contents", [])
    keys = [entry["Key"] for entry in contents]
    return {key: hashlib.sha256(s3.client.get_object(Bucket=name, Key=key)["Body"].read()).hexdigest() for key in keys}
