"""Downloads from outside: bounds, broken transfers, links that die, and a storage in trouble; nothing is lost."""

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

from tests.acceptance.main_job import KEY
from tests.acceptance.report import Report
from tests.acceptance.stand import WORKING, Place, Stand, file_of, wait_until
from tests.s3_servers import S3Server, s3_server
from tests.web import Answer, Picture, Web, drips, floods, head, page, web_server

MEGABYTE = 1_000_000
TOO_LARGE = "too_large"
OUTAGE_SECONDS = 30
GROWTH_MIB = 50  # how much the memory of a process may grow, whatever it is sent
TIMEOUT = 12  # seconds for one attempt
DISK_BYTES = 3 * MEGABYTE


def picture(padding: int, seed: int = 0) -> bytes:
    """A PNG of about this size, which can't be packed."""
    noise = random.Random(seed).randbytes(padding)
    rows = zlib.compress((b"\x00" + b"\x30\x60\x90" * 8) * 8)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)), (b"teXt", noise), (b"IDAT", rows), (b"IEND", b"")]
    made = b"\x89PNG\r\n\x1a\n"
    for name, data in parts:
        made += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return made


def large(width: int, height: int) -> bytes:
    """The header of a PNG of so many pixels, and little else."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    made = (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + b"IHDR"
        + header
        + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    )
    return made + struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))


class Bench:
    """A stand, and a server that has the outputs and answers for the API too."""

    def __init__(self, report: Report, stand: Stand, web: Web) -> None:
        self.report, self.stand, self.web = report, stand, web
        self.number = 30_000_000
        self.waiting: tuple[int, bytes] = (0, b"")

    def track(self, *paths: str, remote_id: str | None = None) -> int:
        """Tracks a job that was ready at once, with these outputs; its id."""
        self.number += 1
        links = [self.web.url + path for path in paths]
        answer = {"status": "success", "id": int(remote_id or self.number), "output": links}
        answer["fetch_result"] = f"{self.web.url}/api/v3/fetch/{answer['id']}"
        sent = self.stand.client.send_task("worker.track", [answer], queue="fetch-worker")
        return int(sent.get(timeout=30))

    def track_one(self, path: str, answer: Answer) -> int:
        """Tracks a job whose one output is answered so; its id."""
        self.web.serves(path, answer)
        return self.track(path)

    def output(self, job_id: int) -> Mapping[str, Any]:
        """The first output of a job as it stands."""
        query = "SELECT * FROM fetch_outputs WHERE job_id = :id ORDER BY position"
        return self.stand.rows(query, id=job_id)[0]

    def wait(self, job_id: int, seconds: float, **wanted: object) -> Mapping[str, Any]:
        """Waits until the output is so; as it stands then."""
        wait_until(lambda: all(self.output(job_id)[name] == value for name, value in wanted.items()), seconds, 0.1)
        return self.output(job_id)

    def stored(self, what: str, job_id: int, body: bytes, seconds: float) -> Mapping[str, Any]:
        """Checks that the output gets stored, with its very bytes."""
        row = self.wait(job_id, seconds, status="stored")
        self.report.check(f"{what}: it is stored", row["status"] == "stored", (row["status"], row["error_message"]))
        if row["status"] == "stored" and str(row["location"]).startswith("file:"):
            same = file_of(row["location"]).read_bytes() == body
            self.report.check(
                f"{what}: with its very bytes", same and row["sha256"] == hashlib.sha256(body).hexdigest()
            )
        return row


@contextmanager
def memory_of(pids: list[int]) -> Iterator[Callable[[], float]]:
    """Watches the resident memory of processes; by how many MiB the one that grew most did."""
    before = {pid: _resident(pid) for pid in pids}
    most, over = dict(before), threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            for pid in pids:
                most[pid] = max(most[pid], _resident(pid))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield lambda: max(most[pid] - before[pid] for pid in pids)
    over.set()
    thread.join()


def _resident(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return int(status.partition("VmRSS:")[2].split()[0]) / 1_024


def downloads(place: Place, home: Path) -> Report:
    """One worker of each kind; what goes wrong is provoked one after the other."""
    report = Report("downloads")
    with (
        web_server() as web,
        Stand(place, home, f"{web.url}/api/v3", KEY, OUTPUT_TIMEOUT=str(TIMEOUT), RECOVERY_SECONDS="5") as stand,
    ):
        stand.migrate()
        stand.start(*WORKING)
        stand.wait_ready()
        bench = Bench(report, stand, web)
        warm = picture(5_000)
        bench.stored("a picture", bench.track_one("/warm.png", page(200, warm)), warm, 20)
        bounds(bench)
        breaks(bench)
        kill(bench)
        links(bench)
        storage(bench)
        left = [path for path in stand.outputs.rglob("*") if path.is_file() and path.suffix in (".part", ".json")]
        report.none_of("no partial file is left", left)
        report.none_of("no process died", stand.died())
        report.none_of("nothing left the machine", stand.refused_connections())
    return report


def bounds(bench: Bench) -> None:
    """Whatever is sent, it is refused within bounds, and memory stays flat."""
    report, web = bench.report, bench.web
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
    with memory_of(bench.stand.leftovers()) as grown:
        for name, (answer, code) in tricks.items():
            job_id = bench.track_one(f"/{name.replace(' ', '-')}.png", answer)
            row = bench.wait(job_id, 40, status="stored" if code is None else "failed")
            report.check(
                f"{name} ends as {code or 'stored'}", row["error_code"] == code, (row["status"], row["error_code"])
            )
        for name, first in {
            "slow headers": b"HTTP/1.1 200 OK\r\n",
            "slow body": head(200, Content_Length="900000"),
        }.items():
            began = time.monotonic()
            drop = b"X-A: 1\r\n" if "headers" in name else b"x"
            job_id = bench.track_one(f"/{name.replace(' ', '-')}.png", drips(first, drop, every=0.5, seconds=60))
            row = bench.wait(job_id, TIMEOUT + 10, error_code="unreachable")
            took = time.monotonic() - began
            report.check(
                f"{name}: given up in time",
                row["error_code"] == "unreachable" and took < TIMEOUT + 4,
                (took, dict(row)),
            )
            report.figure(f"{name}: given up after (s)", took)
            bench.stand.command("fetch-worker", "cancel", str(job_id))
        report.figure("memory grew by (MiB)", grown())
        report.check(f"memory grew by less than {GROWTH_MIB} MiB", grown() < GROWTH_MIB, grown())
    report.figure("requests so far", len(web.asked))


def breaks(bench: Bench) -> None:
    """A transfer that breaks five times at random places ends identical."""
    draw = random.Random(secrets.randbits(32))
    for ranges in (True, False):
        body = picture(4 * MEGABYTE, seed=ranges)
        source = Picture(bench.web, body, ranges=ranges)
        share = len(body) // 6 if ranges else len(body)
        source.cuts = [draw.randrange(1, share) for _ in range(5)]
        what = f"broken five times, {'with' if ranges else 'without'} ranges"
        row = bench.stored(what, bench.track_one(f"/breaks-{ranges}.png", source), body, 40)
        bench.report.check(f"{what}: in one attempt", row["attempts"] == 1, row["attempts"])
        bench.report.figure(f"{what}: bytes sent ÷ size", source.sent / len(body))
        if ranges:
            bench.report.check(f"{what}: hardly a byte twice", source.sent < 1.2 * len(body), source.sent / len(body))


def kill(bench: Bench) -> None:
    """`kill -9` of the download process in mid-transfer."""
    body = picture(6 * MEGABYTE, seed=3)
    source = Picture(bench.web, body, cuts=[4 * MEGABYTE])
    first = threading.Event()

    def stops(client: socket.socket) -> None:
        source(client)
        if not first.is_set():
            first.set()
            time.sleep(6)  # nothing more comes; the process is killed meanwhile

    job_id = bench.track_one("/killed.png", stops)
    first.wait(20)
    partial = bench.stand.outputs / ".partial"
    there = wait_until(lambda: any(path.stat().st_size > 3.9 * MEGABYTE for path in partial.glob("*.part")), 10, 0.05)
    bench.report.check("a partial file was there when the process was killed", there)
    bench.stand.kill("downloads")
    began = time.monotonic()
    bench.stand.start("downloads")
    bench.stored("killed in mid-transfer", job_id, body, 40)
    bench.report.figure("kill to stored (s)", time.monotonic() - began)
    bench.report.figure("killed: bytes sent ÷ size", source.sent / len(body))
    bench.report.check("killed: what had come was gone on with", source.sent < 1.2 * len(body), source.spans)
    folder = file_of(bench.output(job_id)["location"]).parent
    bench.report.check("killed: one file", len(list(folder.iterdir())) == 1, list(folder.iterdir()))


def links(bench: Bench) -> None:
    """Storage lag is waited for; a dead link is renewed; one that is dead for good ends as gone."""
    report, web, body = bench.report, bench.web, picture(50_000, seed=4)
    began = time.monotonic()

    def late(client: socket.socket) -> None:
        (page(200, body) if time.monotonic() - began > 40 else page(404, b"<Error/>"))(client)

    late_id = bench.track_one("/late.png", late)
    web.serves("/fresh.png", page(200, body))
    asked = json.dumps({"status": "success", "id": 31_000_001, "output": [web.url + "/fresh.png"]}).encode()
    web.serves("/api/v3/fetch/31000001", page(200, asked, Content_Type="application/json"))
    renewed_id = bench.track("/dead.png", remote_id="31000001")
    still = json.dumps({"status": "success", "id": 31_000_002, "output": [web.url + "/dead.png"]}).encode()
    web.serves("/api/v3/fetch/31000002", page(200, still, Content_Type="application/json"))
    gone_id = bench.track("/dead.png", remote_id="31000002")
    bench.stored("404 for 40 s", late_id, body, 70)
    bench.stored("a dead link and a fresh one", renewed_id, body, 90)
    row = bench.wait(gone_id, 90, status="failed")
    report.check("dead for good ends as gone", row["error_code"] == "gone", row["error_code"])
    report.check("gone says how long it was tried", "dead for" in str(row["error_message"]), row["error_message"])
    report.figure("what gone says", row["error_message"])


def storage(bench: Bench) -> None:
    """A full disk, a read-only one and a missing one: outputs wait, status says so, and it goes on by itself."""
    report, stand = bench.report, bench.stand
    aside = stand.outputs.with_name("outputs-aside")
    stand.outputs.rename(aside)
    _waits(bench, "missing storage", 100_000, 5)
    aside.rename(stand.outputs)
    _goes_on(bench, "missing storage")
    stand.outputs.rename(aside)  # what follows is on a small disk of its own
    stand.outputs.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", stand.outputs], check=False
    ).returncode:
        report.check("a small disk could be mounted", False, "needs root")
        return
    try:
        filler = stand.outputs / "filler"
        filler.write_bytes(bytes(int(2.4 * MEGABYTE)))
        _waits(bench, "full disk", MEGABYTE, 6)
        filler.unlink()
        _goes_on(bench, "full disk")
        subprocess.run(["mount", "-o", "remount,ro", stand.outputs], check=True)
        _waits(bench, "read-only disk", 100_000, 7)
        subprocess.run(["mount", "-o", "remount,rw", stand.outputs], check=True)
        _goes_on(bench, "read-only disk")
        files = [path for path in stand.outputs.rglob("*") if path.is_file()]
        report.check("two files on the small disk, and nothing half", len(files) == 2, files)
    finally:
        subprocess.run(["umount", "-l", stand.outputs], check=False)
        stand.outputs.rmdir()
        aside.rename(stand.outputs)


def _waits(bench: Bench, what: str, size: int, seed: int) -> None:
    body = picture(size, seed=seed)
    bench.number = 40_000_000 + seed
    bench.web.serves(f"/disk-{seed}.png", page(200, body))
    job_id = bench.track(f"/disk-{seed}.png")
    row = bench.wait(job_id, 20, error_code="storage")
    state = (row["status"], row["error_code"])
    bench.report.check(f"{what}: the output waits", state == ("pending", "storage"), (state, row["error_message"]))
    told = bench.stand.document("status")["outputs"]
    bench.report.check(f"{what}: status says so", told["trouble"].get("storage") == 1 and bool(told["storage"]), told)
    bench.report.figure(f"{what}: what status says", told["storage"])
    bench.waiting = (job_id, body)


def _goes_on(bench: Bench, what: str) -> None:
    job_id, body = bench.waiting
    bench.stored(what, job_id, body, 40)


def bucket(place: Place, home: Path) -> Report:
    """Pictures go to an S3 server, which is away for half a minute: each is fetched once and stored once."""
    report = Report("bucket")
    (home / "s3").mkdir(parents=True)
    with web_server() as web, s3_server(home / "s3") as s3:
        name = s3.bucket()
        storage_url = {"STORAGE_URL": f"s3://{name}/shop/pictures", **s3.environment}
        with Stand(place, home / "stand", f"{web.url}/api/v3", KEY, **storage_url) as stand:
            stand.migrate()
            stand.start(*WORKING)
            stand.wait_ready()
            bench = Bench(report, stand, web)
            bodies = {n: picture(200_000 + n, seed=n) for n in range(30)}
            tracked = {n: bench.track_one(f"/{n}.png", page(200, bodies[n])) for n in range(10)}
            wait_until(lambda: len(_objects(s3, name)) >= 5, 20)
            s3.stop()
            began = time.monotonic()
            tracked |= {n: bench.track_one(f"/{n}.png", page(200, bodies[n])) for n in range(10, 30)}
            bench.wait(tracked[29], 25, error_code="storage")
            told = stand.document("status")["outputs"]
            report.check("status says that the storage is in trouble", told["trouble"].get("storage", 0) > 0, told)
            report.figure("what status says", told["storage"])
            time.sleep(max(0.0, OUTAGE_SECONDS - (time.monotonic() - began)))
            s3.start()
            back = time.monotonic()
            states = "SELECT count(*) FROM fetch_jobs WHERE status = 'completed'"
            wait_until(lambda: stand.count(states) == len(tracked), 90)
            report.check("all are stored once it is back", stand.count(states) == len(tracked), stand.count(states))
            report.figure("back to all stored (s)", time.monotonic() - back)
            kept = _objects(s3, name)
            expected = {hashlib.sha256(body).hexdigest() for body in bodies.values()}
            report.check("each once, with its very bytes", sorted(kept.values()) == sorted(expected), len(kept))
            asked = Counter(asked.path for asked in web.asked)
            report.none_of("none was fetched twice", [path for path, times in asked.items() if times > 1])
            verified = stand.document("verify")
            report.check("verify finds all whole", verified["whole"] == len(tracked), verified)
            s3.client.delete_object(Bucket=name, Key=min(kept))
            stand.document("verify")
            wait_until(lambda: stand.count(states) == len(tracked) and len(_objects(s3, name)) == len(tracked), 30)
            report.check("verify gets back what was removed", _objects(s3, name) == kept)
            report.none_of("no process died", stand.died())
            report.none_of("nothing left the machine", stand.refused_connections())
            left = list((stand.checkout / "var" / "partial").glob("*"))
            report.none_of("no partial file is left", left)
    return report


def _objects(s3: S3Server, name: str) -> dict[str, str]:
    """The hash of each object in a bucket, by its key."""
    found = s3.client.list_objects_v2(Bucket=name).get("Contents", [])
    keys = [one["Key"] for one in found]
    return {key: hashlib.sha256(s3.client.get_object(Bucket=name, Key=key)["Body"].read()).hexdigest() for key in keys}
