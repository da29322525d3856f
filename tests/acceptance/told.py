"""Webhooks from outside: receivers that are away, send us elsewhere or have a new secret; a worker that is killed."""

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

from tests.acceptance.hosted import Hosted
from tests.acceptance.jobs import (
    Size,
    check_completed,
    check_nothing_left_the_machine,
    make_batch,
    track_by_name,
    wait_final,
)
from tests.acceptance.main_job import KEY, start_working
from tests.acceptance.report import Report
from tests.acceptance.stand import Place, Stand, epoch, wait_until
from tests.acceptance.trouble import Forbidden

AWAY_SECONDS = 60.0
PATIENCE = 45.0  # after it is back: no wait is longer by then


class Receiver:
    """A web app's own endpoint, on a port that stays the same whether it is open or not."""

    def __init__(self) -> None:
        self.status, self.location = 204, ""
        self.came: list[tuple[float, str, dict[str, str], str]] = []  # when, to which path, headers, body
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                text = self.rfile.read(int(self.headers["content-length"])).decode()
                headers = {name.lower(): value for name, value in self.headers.items()}
                receiver.came.append((time.time(), self.path, headers, text))
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
        """Answers from now on."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
            self._thread.start()

    def close(self) -> None:
        """Refuses connections from now on."""
        self._server.shutdown()
        self._server.server_close()
        if self._thread is not None:
            self._thread.join()

    def open_again(self) -> None:
        """On the same port."""
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), self._handler)
        self._thread = None
        self.open()

    def taken(self, path: str) -> list[tuple[dict[str, str], str]]:
        """What came to this path while it was in the mood to take it."""
        return [(headers, text) for _, where, headers, text in self.came if where == path]


@contextmanager
def _receiving() -> Iterator[Receiver]:
    receiver = Receiver()
    receiver.open()
    try:
        yield receiver
    finally:
        receiver.close()


def _new_secret() -> str:
    return f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}"


def webhooks(place: Place, home: Path, size: Size) -> Report:
    """Told of every job, once it can be told, always under the same name, and never where it must not go."""
    report = Report("webhooks")
    old, new = _new_secret(), _new_secret()
    settings = {"WEBHOOK_SECRET": old, "WEBHOOK_ALLOWED_NETWORKS": "127.0.0.1/32", "RECOVERY_SECONDS": "5"}
    with (
        Hosted(seed=size.seed, accept=[KEY]) as hosted,
        _receiving() as receiver,
        Forbidden("127.0.0.2").listening() as forbidden,
        Stand(place, home, hosted.base, KEY, **settings) as stand,
    ):
        start_working(report, stand)

        def run(first_id: int, path: str) -> list[str]:
            jobs = make_batch(size, first_id)
            hosted.register(jobs)
            track_by_name(stand, jobs, webhook_url=f"http://127.0.0.1:{receiver.port}{path}")
            wait_final(stand, jobs, size.slowest + 60)
            check_completed(report, stand, jobs)
            return [job.remote_id for job in jobs]

        ids = run(21_000_000, "/calm")
        wait_until(lambda: len(receiver.taken("/calm")) >= len(ids), 5)
        calm = receiver.taken("/calm")
        report.check("each job was told of once", len(calm) == len(ids) == len({h["webhook-id"] for h, _ in calm}))
        delays = [moment - epoch(json.loads(text)["timestamp"]) for moment, *_, text in receiver.came]
        report.figure("final to told (s), max", max(delays, default=float("nan")))

        receiver.close()
        ids = run(22_000_000, "/away")
        time.sleep(AWAY_SECONDS / 2)
        stand.kill("worker")
        stand.start("worker")
        receiver.status = 503
        receiver.open_again()
        time.sleep(AWAY_SECONDS / 2)
        before = {headers["webhook-id"] for headers, _ in receiver.taken("/away")}
        receiver.status, back = 204, time.time()
        wait_until(lambda: _undelivered(stand) == 0, PATIENCE)
        away = receiver.taken("/away")
        names = {headers["webhook-id"] for headers, _ in away}
        report.check("it was tried while it said 503", bool(before))
        report.check("all are delivered once it is back", _undelivered(stand) == 0, _undelivered(stand))
        report.check("always under the same name", len(names) == len(ids), len(names))
        report.check("always with the same text", len({text for _, text in away}) == len(ids))
        report.figure("attempts per event while it was away", len(away) / max(len(ids), 1))
        report.figure("back to all told (s)", max(moment for moment, *_ in receiver.came) - back)
        report.none_of("the reference library accepts each", [h for h, t in away if not _accepted(old, h, t)])
        headers, text = away[-1]
        report.check("and no other", not _accepted(new, headers, text))
        stale = headers | {"webhook-timestamp": str(int(headers["webhook-timestamp"]) - 900)}
        report.check("a wrong time stamp is refused", not _accepted(old, stale, text))

        receiver.status, receiver.location = 307, f"http://127.0.0.2:{forbidden.port}/"
        run(23_000_000, "/elsewhere")
        wait_until(lambda: len(receiver.taken("/elsewhere")) >= 2 * len(ids), 30)
        report.none_of("nobody went where a redirect led", forbidden.visitors)
        report.check("a redirect does not count as taken", _undelivered(stand) == len(ids), _undelivered(stand))

        receiver.status, receiver.location = 204, ""
        stand.stop("worker")
        stand.set(WEBHOOK_SECRET=f"{new},{old}")
        stand.start("worker")
        wait_until(lambda: _undelivered(stand) == 0, PATIENCE + 30)
        last = receiver.taken("/elsewhere")[-len(ids) :]
        both = [h for h, t in last if not (_accepted(old, h, t) and _accepted(new, h, t))]
        report.none_of("while the secret changes, receivers with either accept it", both)
        dump = stand.dump() + "".join(log.read_text() for log in stand.logs())
        bare = [secret.removeprefix("whsec_") for secret in (old, new)]
        report.none_of("the secret is in no row and no log", [secret for secret in bare if secret in dump])
        check_nothing_left_the_machine(report, stand)
    return report


def _undelivered(stand: Stand) -> int:
    return stand.count("SELECT count(*) FROM fetch_events WHERE status <> 'delivered'")


def _accepted(secret: str, headers: dict[str, str], text: str) -> bool:
    try:
        Webhook(secret).verify(text, headers)
    except WebhookVerificationError:
        return False
    return True
