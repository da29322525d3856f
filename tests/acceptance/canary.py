"""A key that is easy to recognise is provoked into every corner, and then looked for everywhere."""

import base64
import html
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any
from urllib.parse import unquote, urlsplit

import redis

from tests.acceptance.api import SAYS, Job, Output
from tests.acceptance.hosted import Hosted
from tests.acceptance.jobs import Size, check_nothing_left_the_machine, rows_of, track_by_name
from tests.acceptance.main_job import start_working
from tests.acceptance.report import Report
from tests.acceptance.stand import FLOWER_LOGIN, NotReady, Place, Stand, wait_until
from tests.spellings import SPELLINGS

FLOWER_PAGES = ("/", "/workers", "/tasks", "/broker", "/api/tasks", "/api/workers?refresh=1", "/metrics")
DEPTH = 5  # escapes of escapes that are undone
TASK_PAGES = 60  # how many tasks are looked at one by one


def needles(core: str) -> tuple[bytes, ...]:
    """How a text shows in raw bytes: as it is, in hexadecimal, and in base64 at each of its three alignments."""
    raw = core.encode()
    shifted = []
    for shift in range(3):
        encoded = base64.b64encode(b"\0" * shift + raw)
        whole = encoded[4 if shift else 0 : -4]  # the groups that hold nothing but the text
        shifted += [whole, whole.replace(b"+", b"-").replace(b"/", b"_")]
    return (raw, raw.hex().encode(), *shifted)


def readings(text: bytes) -> Iterator[bytes]:
    """A text as it is, and with escapes of JSON, URLs and HTML undone, again and again."""
    yield text
    read = text.decode("utf-8", "replace")
    for _ in range(DEPTH):
        read = re.sub(r"\\+u([0-9a-fA-F]{4})|\\+x([0-9a-fA-F]{2})", lambda unit: chr(int(unit[1] or unit[2], 16)), read)
        read = html.unescape(unquote(read)).replace("\\", "")
        yield read.encode("utf-8", "replace")


def canary_key(place: Place, home: Path, size: Size) -> Report:
    """Success, echoes of the key, refusals and tracebacks; the key is found in no place that anybody can read."""
    core = f"Canary7QxZebra{token_hex(6)}"
    key = f"{core}/+=&end"  # letters that look different when quoted
    report = Report("canary-key")
    with (
        Hosted(seed=size.seed, accept=[key]) as hosted,
        Stand(place, home, hosted.base, key, POLL_MIN="1") as stand,
    ):
        start_working(report, stand)
        stand.start("flower")
        with _watched_redis(stand) as commands, _captured_events(stand) as events:
            _provoke(report, stand, hosted)
            _provoke_spellings(report, stand, hosted, key)
            seen = {
                "the output of commands": _commands(stand),
                "the pages of Flower": _flower(report, stand),
                "the values in Redis": _redis_values(stand),
                "the database": stand.dump().encode(),
                "command lines": "\n".join(stand.command_lines()).encode(),
            }
            stand.stop(*("worker", "downloads", "beat", "flower"))
        seen |= {
            "every command that Redis got": bytes(commands),
            "Celery's events": "\n".join(events).encode(),
            **{f"the log of {log.stem}": log.read_bytes() for log in stand.logs()},
            "files beside the outputs": b"".join(_other_files(stand)),
        }
        for where, text in seen.items():
            found = [
                read[max(0, at - 80) : at + 80]
                for read in readings(text)
                for needle in needles(core)
                if (at := read.find(needle)) >= 0
            ]
            report.none_of(f"not in {where} ({len(text)} bytes)", found)
        report.check("events were heard and commands seen", bool(events) and bool(commands))
        used = {call.key for call in hosted.ledger().calls}
        report.check("the key was in use all the time", used == {key}, len(used))
        report.none_of("no key went to the picture host", [get for get in hosted.ledger().gets if get.carried_key])
        check_nothing_left_the_machine(report, stand)
    return report


def _provoke(report: Report, stand: Stand, hosted: Hosted) -> None:
    started = time.time()
    scripts: dict[str, tuple[str, ...]] = {
        "success": (),
        "success that echoes": ("success_echo",),
        "errors that echo": ("error_echo",) * 3,
        "failures that echo": ("failed_echo",) * 2,
        "crash that echoes": ("crash_echo",),
        "link that echoes": (),
    }
    jobs = {
        name: Job(str(18_000_000 + number), started, 2.0, (Output("echo" if "link" in name else "good"),), script)
        for number, (name, script) in enumerate(scripts.items())
    }
    hosted.register(list(jobs.values()))
    track_by_name(stand, jobs.values())
    for task, queue, arguments in (
        ("worker.download", "fetch-worker.downloads", ["nonsense"]),
        ("worker.download", "fetch-worker.downloads", [987654321]),
        ("worker.sweep", "fetch-worker", ["unexpected"]),
        ("worker.track", "fetch-worker", ["../../x"]),
        ("worker.track", "fetch-worker", [{"status": "error", "message": "no"}]),
        ("worker.nudge", "fetch-worker", ["17000000"]),
    ):
        stand.client.send_task(task, arguments, queue=queue)
    expected = {"errors that echo": "failed", "failures that echo": "failed"}
    settled = [job for name, job in jobs.items() if name != "link that echoes"]

    def as_expected() -> bool:
        rows = rows_of(stand, settled)
        return all(
            jobs[name].remote_id in rows and rows[jobs[name].remote_id]["status"] == expected.get(name, "completed")
            for name in scripts
            if name != "link that echoes"
        )

    held = wait_until(as_expected, 45, 0.5)
    states = {name: rows_of(stand, [job]).get(job.remote_id, {}).get("status") for name, job in jobs.items()}
    report.check("the jobs end as the answers say", held, states)
    messages = [str(row["error_message"]) for row in rows_of(stand, settled).values() if row["error_message"]]
    report.check("the stored message is there, without the key", any("gave up" in text for text in messages), messages)
    hosted.behave(accept=[], echo_rejected=True)
    refused = Job("18000100", started, 1.0)
    hosted.register([refused])
    track_by_name(stand, [refused])
    asked = wait_until(lambda: bool(hosted.ledger().calls_about(refused.remote_id)), 20)
    report.check("a refusal that echoes was met", asked)
    time.sleep(1)


def _provoke_spellings(report: Report, stand: Stand, hosted: Hosted, key: str) -> None:
    """Jobs that fail with the key in their message: whole in every spelling, and all but its last characters."""
    hosted.behave(accept=[key], echo_rejected=False)
    spelled = {name: spell(key) for name, spell in SPELLINGS.items()} | {"cut": f"{key[:-4]}…"}
    jobs = {
        name: Job(str(18_001_000 + number), time.time(), 1.0, script=(f"{SAYS}refused: {text} (see there)",) * 2)
        for number, (name, text) in enumerate(spelled.items())
    }
    hosted.register(list(jobs.values()))
    track_by_name(stand, jobs.values())
    stand.command("fetch-worker", "resume", "--account", "default")  # it was held for the refused key

    def all_failed() -> bool:
        rows = rows_of(stand, list(jobs.values()))
        return len(rows) == len(jobs) and all(row["status"] == "failed" for row in rows.values())

    report.check("the jobs that quote the key in all spellings fail", wait_until(all_failed, 90, 0.5))
    rows = rows_of(stand, list(jobs.values()))
    messages = {name: str(rows.get(job.remote_id, {}).get("error_message")) for name, job in jobs.items()}
    report.none_of("each message has the mask", {name: text for name, text in messages.items() if "[key]" not in text})


def _commands(stand: Stand) -> bytes:
    said = [stand.command("fetch-worker", *words) for words in (["status"], ["list"])]
    told = [stand.document("status"), stand.document("list")]
    for row in stand.rows("SELECT id FROM fetch_jobs WHERE status <> 'completed'"):
        told.append(stand.document("show", str(row["id"])))
    said.append(stand.command("fetch-worker", "show", str(told[1][0]["id"])))
    return json.dumps(told).encode() + "".join(done.stdout + done.stderr for done in said).encode()


def flower_page(stand: Stand, path: str) -> tuple[int, bytes]:
    """One page of Flower, asked for with its login."""
    login = base64.b64encode(":".join(FLOWER_LOGIN).encode()).decode()
    with closing(http.client.HTTPConnection("127.0.0.1", stand.flower_port, timeout=20)) as connection:
        connection.request("GET", path, headers={"Authorization": f"Basic {login}"})
        response = connection.getresponse()
        return response.status, response.read()


def flower_answers(stand: Stand) -> bool:
    """Whether Flower is up."""
    try:
        return flower_page(stand, "/healthcheck")[0] == 200
    except OSError:
        return False


def _flower(report: Report, stand: Stand) -> bytes:
    if not wait_until(lambda: flower_answers(stand), 30):
        raise NotReady(f"flower does not answer: {(stand.log_folder / 'flower.log').read_text()[-800:]}")
    pages = {path: flower_page(stand, path) for path in FLOWER_PAGES}
    tasks: dict[str, Any] = json.loads(pages["/api/tasks"][1])
    for task in list(tasks)[:TASK_PAGES]:
        pages[f"/task/{task}"] = flower_page(stand, f"/task/{task}")
    others = {path: status for path, (status, _) in pages.items() if status not in (200, 302)}
    report.none_of("every page of Flower opens", others)
    report.check("Flower shows tasks under their own names", any(t["name"] == "worker.track" for t in tasks.values()))
    report.figure("pages of Flower read", len(pages))
    with closing(http.client.HTTPConnection("127.0.0.1", stand.flower_port, timeout=20)) as connection:
        connection.request("GET", "/tasks")
        report.check("Flower asks for a login", connection.getresponse().status == 401)
    return b"\n".join(body for _, body in pages.values())


def _redis_values(stand: Stand) -> bytes:
    values: list[object] = []
    readers = {"list": "lrange", "hash": "hgetall", "set": "smembers", "zset": "zrange", "string": "get"}
    with closing(redis.Redis.from_url(stand.redis_url)) as client:
        for name in client.scan_iter(count=500):
            kind = _text(client.type(name))
            bounds = (0, -1) if kind in ("list", "zset") else ()
            values += [name, getattr(client, readers[kind])(name, *bounds) if kind in readers else client.dump(name)]
    return "\n".join(map(repr, values)).encode()


def _text(answer: Any) -> str:
    return answer.decode() if isinstance(answer, bytes) else str(answer)


@contextmanager
def _watched_redis(stand: Stand) -> Iterator[bytearray]:
    """All that Redis is told while the block runs, values that live for a moment included."""
    heard = bytearray()
    parts = urlsplit(stand.redis_url)
    watcher = socket.create_connection((parts.hostname or "", parts.port or 0))
    watcher.sendall(b"MONITOR\r\n")

    def listen() -> None:
        while data := watcher.recv(65536):
            heard.extend(data)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield heard
    finally:
        watcher.shutdown(socket.SHUT_RDWR)
        thread.join(5)
        watcher.close()


@contextmanager
def _captured_events(stand: Stand) -> Iterator[list[str]]:
    """The events that Celery's monitors get while the block runs."""
    events: list[str] = []
    over = threading.Event()

    def listen() -> None:
        with stand.client.connection_for_read() as connection:
            receiver = stand.client.events.Receiver(
                connection, handlers={"*": lambda event: events.append(repr(event))}
            )
            while not over.is_set():
                try:
                    receiver.capture(limit=None, timeout=1.0)
                except TimeoutError:
                    continue

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield events
    finally:
        over.set()
        thread.join(10)


def _other_files(stand: Stand) -> Iterator[bytes]:
    """Files that the product wrote: Flower's and beat's databases and the like."""
    for folder in (stand.checkout, stand.home / "user", stand.outputs):
        for path in folder.rglob("*"):
            if path.is_file() and path.suffix not in (".py", ".pyc", ".png"):
                yield path.read_bytes()
