"""Webhooks: the receiver is down, redirects or has a new secret, and a worker is killed meanwhile."""

import base64
import http.server
import json
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from tests.acceptance.api_process import ApiProcess
from tests.acceptance.deployment import Deployment, Installation, epoch, wait_until
from tests.acceptance.jobs import (
    Size,
    check_completed,
    check_no_foreign_connections,
    make_batch,
    track_by_name,
    wait_final,
)
from tests.acceptance.main_job import KEY, start_working
from tests.acceptance.report import Report
from tests.acceptance.trouble import ForbiddenServer

OUTAGE_SECONDS = 60.0
PATIENCE = 45.0  # seconds after the outage; no retry delay is longer


class WebhookReceiver:
    """The endpoint of a web app. Its port stays the same when it closes and reopens."""

    def __init__(self) -> None:
        self.status, self.location = 204, ""
        self.requests: list[tuple[float, str, dict[str, str], str]] = []  # time, path, headers, body
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                text = self.rfile.read(int(self.headers["content-length"])).decode()
                headers = {name.lower(): value for name, value in self.headers.items()}
                receiver.requests.append((time.time(), self.path, headers, text))
                self.send_response(receiver.status)
                if receiver.location:
                    self.send_header("location", receiver.location)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._handler = Handler
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        """Start to answer requests."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
            self._thread.start()

    def close(self) -> None:
        """Close the port: connections are refused."""
        self._server.shutdown()
        self._server.server_close()
        if self._thread is not None:
            self._thread.join()

    def open_again(self) -> None:
        """Open the same port again."""
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), self._handler)
        self._thread = None
        self.open()

    def received(self, path: str) -> list[tuple[dict[str, str], str]]:
        """Return the headers and body of each request to a path."""
        return [(headers, text) for _, request_path, headers, text in self.requests if request_path == path]


@contextmanager
def _receiving() -> Iterator[WebhookReceiver]:
    receiver = WebhookReceiver()
    receiver.open()
    try:
        yield receiver
    finally:
        receiver.close()


def _new_secret() -> str:
    return f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}"


def webhooks(installation: Installation, home: Path, size: Size) -> Report:
    """Every job's webhook is delivered, always with the same id, and never to a forbidden address."""
    report = Report("webhooks")
    old, new = _new_secret(), _new_secret()
    settings = {"WEBHOOK_SECRET": old, "WEBHOOK_ALLOWED_NETWORKS": "127.0.0.1/32", "RECOVERY_SECONDS": "5"}
    with (
        ApiProcess(seed=size.seed, accept=[KEY]) as api,
        _receiving() as receiver,
        ForbiddenServer("127.0.0.2").listening() as forbidden,
        Deployment(installation, home, api.base, KEY, **settings) as deployment,
    ):
        start_working(report, deployment)

        def run(first_id: int, path: str) -> list[str]:
            jobs = make_batch(size, first_id)
            api.register(jobs)
            track_by_name(deployment, jobs, webhook_url=f"http://127.0.0.1:{receiver.port}{path}")
            wait_final(deployment, jobs, size.slowest + 60)
            check_completed(report, deployment, jobs)
            return [job.remote_id for job in jobs]

        ids = run(21_000_000, "/normal")
        wait_until(lambda: len(receiver.received("/normal")) >= len(ids), 5)
        normal = receiver.received("/normal")
        report.check(
            "each job was delivered once", len(normal) == len(ids) == len({h["webhook-id"] for h, _ in normal})
        )
        delays = [moment - epoch(json.loads(text)["timestamp"]) for moment, *_, text in receiver.requests]
        report.figure("final to delivered (s), max", max(delays, default=float("nan")))

        receiver.close()
        ids = run(22_000_000, "/outage")
        time.sleep(OUTAGE_SECONDS / 2)
        deployment.kill("worker")
        deployment.start("worker")
        receiver.status = 503
        receiver.open_again()
        time.sleep(OUTAGE_SECONDS / 2)
        before = {headers["webhook-id"] for headers, _ in receiver.received("/outage")}
        receiver.status, end = 204, time.time()
        wait_until(lambda: _undelivered(deployment) == 0, PATIENCE)
        requests = receiver.received("/outage")
        webhook_ids = {headers["webhook-id"] for headers, _ in requests}
        report.check("deliveries were tried while it answered 503", bool(before))
        report.check("all are delivered after the outage", _undelivered(deployment) == 0, _undelivered(deployment))
        report.check("always with the same id", len(webhook_ids) == len(ids), len(webhook_ids))
        report.check("always with the same body", len({text for _, text in requests}) == len(ids))
        report.figure("attempts per event during the outage", len(requests) / max(len(ids), 1))
        report.figure("end of outage to all delivered (s)", max(moment for moment, *_ in receiver.requests) - end)
        report.none_of("the reference library accepts each", [h for h, t in requests if not _accepted(old, h, t)])
        headers, text = requests[-1]
        report.check("a wrong secret is refused", not _accepted(new, headers, text))
        stale = headers | {"webhook-timestamp": str(int(headers["webhook-timestamp"]) - 900)}
        report.check("a wrong timestamp is refused", not _accepted(old, stale, text))

        receiver.status, receiver.location = 307, f"http://127.0.0.2:{forbidden.port}/"
        run(23_000_000, "/redirect")
        wait_until(lambda: len(receiver.received("/redirect")) >= 2 * len(ids), 30)
        report.none_of("no redirect was followed", forbidden.connections)
        report.check("a redirect is not a delivery", _undelivered(deployment) == len(ids), _undelivered(deployment))

        receiver.status, receiver.location = 204, ""
        deployment.stop("worker")
        deployment.set(WEBHOOK_SECRET=f"{new},{old}")
        deployment.start("worker")
        wait_until(lambda: _undelivered(deployment) == 0, PATIENCE + 30)
        last = receiver.received("/redirect")[-len(ids) :]
        rejected = [h for h, t in last if not (_accepted(old, h, t) and _accepted(new, h, t))]
        report.none_of("while the secret changes, receivers accept the new and the old one", rejected)
        dump = deployment.dump() + "".join(log.read_text() for log in deployment.logs())
        bare = [secret.removeprefix("whsec_") for secret in (old, new)]
        report.none_of("the secret is in no row and no log", [secret for secret in bare if secret in dump])
        check_no_foreign_connections(report, deployment)
    return report


def _undelivered(deployment: Deployment) -> int:
    return deployment.count("SELECT count(*) FROM fetch_events WHERE status <> 'delivered'")


def _accepted(secret: str, headers: dict[str, str], text: str) -> bool:
    try:
        Webhook(secret).verify(text, headers)
    except WebhookVerificationError:
        return False
    return True
