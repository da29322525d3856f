"""A recognisable API key is sent through every part of the product, and must not appear in any readable place."""

import base64
import html
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any
from urllib.parse import unquote, urlsplit

import redis

from tests.acceptance.api import FAIL_WITH, ApiJob, ApiOutput, OrderCall
from tests.acceptance.api_process import ApiProcess
from tests.acceptance.canary_orders import provoke_orders
from tests.acceptance.deployment import FLOWER_LOGIN, Deployment, Installation, NotReady, wait_until
from tests.acceptance.jobs import Size, check_no_foreign_connections, rows_of, track_by_name
from tests.acceptance.main_job import start_working
from tests.acceptance.report import Report
from tests.spellings import SPELLINGS

FLOWER_PAGES = ("/", "/workers", "/tasks", "/broker", "/api/tasks", "/api/workers?refresh=1", "/metrics")
DEPTH = 5  # levels of nested escapes that are decoded
TASK_PAGES = 60  # how many task pages are read


def needles(core: str) -> tuple[bytes, ...]:
    """Return the encodings of a text to search for: plain, hexadecimal, and base64 at its three alignments."""
    raw = core.encode()
    shifted = []
    for shift in range(3):
        encoded = base64.b64encode(b"\0" * shift + raw)
        whole = encoded[4 if shift else 0 : -4]  # the groups that contain only the text
        shifted += [whole, whole.replace(b"+", b"-").replace(b"/", b"_")]
    return (raw, raw.hex().encode(), *shifted)


def readings(text: bytes) -> Iterator[bytes]:
    """Yield a text, and the text with JSON, URL and HTML escapes decoded repeatedly."""
    yield text
    decoded = text.decode("utf-8", "replace")
    for _ in range(DEPTH):
        decoded = re.sub(
            r"\\+u([0-9a-fA-F]{4})|\\+x([0-9a-fA-F]{2})", lambda unit: chr(int(unit[1] or unit[2], 16)), decoded
        )
        decoded = html.unescape(unquote(decoded)).replace("\\", "")
        yield decoded.encode("utf-8", "replace")


def canary_key(installation: Installation, home: Path, size: Size) -> Report:
    """Cause successes, echoes of the key, refusals and tracebacks. The key must not be readable anywhere."""
    core = f"Canary7QxZebra{token_hex(6)}"
    key = f"{core}/+=&end"  # characters that change when quoted
    report = Report("canary-key")
    with (
        ApiProcess(seed=size.seed, accept=[key]) as api,
        Deployment(installation, home, api.base, key, POLL_MIN="1") as deployment,
    ):
        start_working(report, deployment)
        deployment.start("flower")
        with _watched_redis(deployment) as commands, _captured_events(deployment) as events:
            _provoke(report, deployment, api)
            _provoke_spellings(report, deployment, api, key)
            orders = provoke_orders(report, deployment, api, key)
            texts = {
                "what apps, commands and admin pages say about orders": orders,
                "the output of commands": _commands(deployment),
                "the pages of Flower": _flower(report, deployment),
                "the values in Redis": _redis_values(deployment),
                "the database": deployment.dump().encode(),
                "command lines": "\n".join(deployment.command_lines()).encode(),
            }
            deployment.stop(*("worker", "downloads", "beat", "flower"))
        texts |= {
            "every command that Redis got": bytes(commands),
            "Celery's events": "\n".join(events).encode(),
            **{f"the log of {log.stem}": log.read_bytes() for log in deployment.logs()},
            "files beside the outputs": b"".join(_other_files(deployment)),
        }
        for source, text in texts.items():
            matches = [
                decoded[max(0, at - 80) : at + 80]
                for decoded in readings(text)
                for needle in needles(core)
                if (at := decoded.find(needle)) >= 0
            ]
            report.none_of(f"not in {source} ({len(text)} bytes)", matches)
        report.check("events and commands were recorded", bool(events) and bool(commands))
        ledger = api.ledger()
        used = {call.key for call in ledger.calls} | {call.key for call in ledger.orders}
        report.check("the key was in use all the time", used == {key}, len(used))
        report.none_of("no order carried the key in its payload", _orders_with_key(ledger.orders, key))
        report.none_of("no key was sent to the picture host", [get for get in ledger.gets if get.carried_key])
        check_no_foreign_connections(report, deployment)
    return report


def _orders_with_key(calls: Iterable[OrderCall], key: str) -> list[str]:
    """Return the names of the orders whose fields, apart from the key, contain the key."""
    return [call.track_id for call in calls if key in json.dumps(call.payload)]


def _provoke(report: Report, deployment: Deployment, api: ApiProcess) -> None:
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
        name: ApiJob(str(18_000_000 + number), started, 2.0, (ApiOutput("echo" if "link" in name else "good"),), script)
        for number, (name, script) in enumerate(scripts.items())
    }
    api.register(list(jobs.values()))
    track_by_name(deployment, jobs.values())
    for task, queue, arguments in (
        ("worker.download", "fetch-worker.downloads", ["nonsense"]),
        ("worker.download", "fetch-worker.downloads", [987654321]),
        ("worker.sweep", "fetch-worker", ["unexpected"]),
        ("worker.track", "fetch-worker", ["../../x"]),
        ("worker.track", "fetch-worker", [{"status": "error", "message": "no"}]),
        ("worker.nudge", "fetch-worker", ["17000000"]),
    ):
        deployment.client.send_task(task, arguments, queue=queue)
    expected = {"errors that echo": "failed", "failures that echo": "failed"}
    settled = [job for name, job in jobs.items() if name != "link that echoes"]

    def as_expected() -> bool:
        rows = rows_of(deployment, settled)
        return all(
            jobs[name].remote_id in rows and rows[jobs[name].remote_id]["status"] == expected.get(name, "completed")
            for name in scripts
            if name != "link that echoes"
        )

    reached = wait_until(as_expected, 45, 0.5)
    states = {name: rows_of(deployment, [job]).get(job.remote_id, {}).get("status") for name, job in jobs.items()}
    report.check("the jobs end as expected", reached, states)
    messages = [str(row["error_message"]) for row in rows_of(deployment, settled).values() if row["error_message"]]
    report.check("an error message is stored, without the key", any("gave up" in text for text in messages), messages)
    api.behave(accept=[], echo_rejected=True)
    refused = ApiJob("18000100", started, 1.0)
    api.register([refused])
    track_by_name(deployment, [refused])
    polled = wait_until(lambda: bool(api.ledger().calls_about(refused.remote_id)), 20)
    report.check("a refusal that echoes the key was received", polled)
    time.sleep(1)


def _provoke_spellings(report: Report, deployment: Deployment, api: ApiProcess, key: str) -> None:
    """Let jobs fail with the key in their message, in every spelling and cut short."""
    api.behave(accept=[key], echo_rejected=False)
    spelled = {name: spell(key) for name, spell in SPELLINGS.items()} | {"cut": f"{key[:-4]}…"}
    jobs = {
        name: ApiJob(
            str(18_001_000 + number), time.time(), 1.0, script=(f"{FAIL_WITH}refused: {text} (see there)",) * 2
        )
        for number, (name, text) in enumerate(spelled.items())
    }
    api.register(list(jobs.values()))
    track_by_name(deployment, jobs.values())
    deployment.command(
        "fetch-worker", "resume", "--account", "default"
    )  # the account is held because of the refused key

    def all_failed() -> bool:
        rows = rows_of(deployment, list(jobs.values()))
        return len(rows) == len(jobs) and all(row["status"] == "failed" for row in rows.values())

    report.check("the jobs that quote the key in all spellings fail", wait_until(all_failed, 90, 0.5))
    rows = rows_of(deployment, list(jobs.values()))
    messages = {name: str(rows.get(job.remote_id, {}).get("error_message")) for name, job in jobs.items()}
    report.none_of("each message has the mask", {name: text for name, text in messages.items() if "[key]" not in text})


def _commands(deployment: Deployment) -> bytes:
    results = [deployment.command("fetch-worker", *arguments) for arguments in (["status"], ["list"], ["unread"])]
    documents = [deployment.document("status"), deployment.document("list")]
    ids = [str(row["id"]) for row in deployment.rows("SELECT id FROM fetch_jobs WHERE status <> 'completed'")]
    documents.append(deployment.document("show", *ids))
    results.append(deployment.command("fetch-worker", "show", str(documents[1][0]["id"])))
    return json.dumps(documents).encode() + "".join(result.stdout + result.stderr for result in results).encode()


def flower_page(deployment: Deployment, path: str) -> tuple[int, bytes]:
    """Load a page of Flower with its login. Return status and body."""
    login = base64.b64encode(":".join(FLOWER_LOGIN).encode()).decode()
    with closing(http.client.HTTPConnection("127.0.0.1", deployment.flower_port, timeout=20)) as connection:
        connection.request("GET", path, headers={"Authorization": f"Basic {login}"})
        response = connection.getresponse()
        return response.status, response.read()


def flower_answers(deployment: Deployment) -> bool:
    """Return whether Flower answers."""
    try:
        return flower_page(deployment, "/healthcheck")[0] == 200
    except OSError:
        return False


def _flower(report: Report, deployment: Deployment) -> bytes:
    if not wait_until(lambda: flower_answers(deployment), 30):
        raise NotReady(f"flower does not answer: {(deployment.log_folder / 'flower.log').read_text()[-800:]}")
    pages = {path: flower_page(deployment, path) for path in FLOWER_PAGES}
    tasks: dict[str, Any] = json.loads(pages["/api/tasks"][1])
    for task in list(tasks)[:TASK_PAGES]:
        pages[f"/task/{task}"] = flower_page(deployment, f"/task/{task}")
    failed = {path: status for path, (status, _) in pages.items() if status not in (200, 302)}
    report.none_of("every page of Flower opens", failed)
    report.check("Flower shows tasks under their own names", any(t["name"] == "worker.track" for t in tasks.values()))
    report.figure("pages of Flower read", len(pages))
    with closing(http.client.HTTPConnection("127.0.0.1", deployment.flower_port, timeout=20)) as connection:
        connection.request("GET", "/tasks")
        report.check("Flower requires a login", connection.getresponse().status == 401)
    return b"\n".join(body for _, body in pages.values())


def _redis_values(deployment: Deployment) -> bytes:
    values: list[object] = []
    readers = {"list": "lrange", "hash": "hgetall", "set": "smembers", "zset": "zrange", "string": "get"}
    with closing(redis.Redis.from_url(deployment.redis_url)) as client:
        for name in client.scan_iter(count=500):
            kind = _text(client.type(name))
            bounds = (0, -1) if kind in ("list", "zset") else ()
            values += [name, getattr(client, readers[kind])(name, *bounds) if kind in readers else client.dump(name)]
    return "\n".join(map(repr, values)).encode()


def _text(answer: Any) -> str:
    return answer.decode() if isinstance(answer, bytes) else str(answer)


@contextmanager
def _watched_redis(deployment: Deployment) -> Iterator[bytearray]:
    """Record all commands that Redis receives while the block runs."""
    commands = bytearray()
    parts = urlsplit(deployment.redis_url)
    watcher = socket.create_connection((parts.hostname or "", parts.port or 0))
    watcher.sendall(b"MONITOR\r\n")

    def listen() -> None:
        while data := watcher.recv(65536):
            commands.extend(data)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield commands
    finally:
        watcher.shutdown(socket.SHUT_RDWR)
        thread.join(5)
        watcher.close()


@contextmanager
def _captured_events(deployment: Deployment) -> Iterator[list[str]]:
    """Record the Celery events while the block runs."""
    events: list[str] = []
    stop = threading.Event()

    def listen() -> None:
        with deployment.client.connection_for_read() as connection:
            receiver = deployment.client.events.Receiver(
                connection, handlers={"*": lambda event: events.append(repr(event))}
            )
            while not stop.is_set():
                try:
                    receiver.capture(limit=None, timeout=1.0)
                except TimeoutError:
                    continue

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield events
    finally:
        stop.set()
        thread.join(10)


def _other_files(deployment: Deployment) -> Iterator[bytes]:
    """Yield the content of other files that the product wrote, such as the databases of Flower and beat."""
    for folder in (deployment.checkout, deployment.home / "user", deployment.outputs):
        for path in folder.rglob("*"):
            if path.is_file() and path.suffix not in (".py", ".pyc", ".png"):
                yield path.read_bytes()
