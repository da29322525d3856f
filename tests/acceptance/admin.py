"""The admin pages with a million jobs: response times, and a check that no page shows a secret.

The rows are inserted with SQL (PostgreSQL), in an unfavourable order: waiting jobs before and after finished ones.
"""

import base64
import http.client
import re
import secrets
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode

from tests.acceptance.deployment import Deployment, Installation, NotReady, free_port, wait_until
from tests.acceptance.report import Report, quantile

ROUNDS = 7
HELD_UNTIL = "9999-01-01T00:00:00Z"
JOBS = """
INSERT INTO fetch_jobs (account, remote_id, kind, fetch_url, fetch_base, fetch_host, status, reference, polls,
                        submitted_at, tracked_at, deadline_at, deadline_seconds, due_at, held_at, ready_at,
                        completed_at, error_code, error_message)
SELECT CASE WHEN n = 7 THEN 'rare' WHEN n % 3 = 0 THEN 'shop' ELSE 'default' END, 'r' || n,
       CASE WHEN n = 9 THEN 'rarekind' WHEN n % 5 = 0 THEN 'video' ELSE 'image' END,
       'https://api.test/api/v3/fetch/r' || n, 'https://api.test/api/v3/fetch', 'api.test', s.status,
       CASE WHEN n % 2 = 0 THEN 'order-' || n END, n % 9, now() - (:rows - n) * interval '100 milliseconds', now(),
       now() + interval '9 hours', 32400,
       CASE WHEN n % 50000 = 11 AND s.status = 'pending' THEN CAST(:held_until AS timestamptz)
            WHEN s.status = 'pending' THEN now() + ((n - :rows * 0.2) * interval '100 milliseconds') END,
       CASE WHEN n % 50000 = 11 AND s.status = 'pending' THEN now() END,
       CASE WHEN s.status IN ('completed', 'downloading') THEN now() END,
       CASE WHEN s.status NOT IN ('pending', 'downloading') THEN now() END,
       CASE WHEN n = :rows / 4 + 13 THEN 'worker_crash' WHEN s.status = 'failed' THEN 'api_failed' END,
       CASE WHEN s.status = 'failed' THEN 'the API gave up' END
FROM generate_series(1, :rows) AS n,
     LATERAL (SELECT CASE WHEN n <= :rows / 4 OR n > :rows * 3 / 4 THEN 'pending'
                          WHEN n = :rows / 4 + 13 OR n % 50 = 1 THEN 'failed'
                          WHEN n % 100 = 2 THEN 'cancelled' ELSE 'completed' END AS status) AS s
"""
OUTPUTS = """
INSERT INTO fetch_outputs (job_id, position, url, proxy_urls, status, location, size_bytes, sha256, media_type,
                           attempts, listed_at, stored_at, due_at, error_code)
SELECT id, 0, 'https://' || CASE WHEN id % 1000 = 3 THEN 'rare.test' ELSE 'cdn.test' END || '/x.png?Signature=' || id,
       '[]', CASE WHEN id % 5000 = 4 THEN 'pending' ELSE 'stored' END,
       CASE WHEN id % 5000 <> 4 THEN :location END, :size, repeat('a', 64), 'image/png', 1, now(), now(),
       CASE WHEN id % 5000 = 4 THEN now() END, CASE WHEN id % 5000 = 4 THEN 'unreachable' END
FROM fetch_jobs WHERE status = 'completed'
"""
HISTORY = """
INSERT INTO fetch_history
SELECT date_trunc('minute', now()) - n * interval '1 minute', json_build_object(
    'jobs', json_build_object('pending', 5), 'oldest_due', 1, 'delay', json_build_object('1', 10000 - n),
    'finished', json_build_object('completed', 10000 - n),
    'accounts', json_build_object('default', json_build_object('rps', 10, 'answers', 10000 - n)))
FROM generate_series(0, 179) AS n
"""
PICTURE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)


@dataclass(slots=True)
class Browser:
    """A minimal browser: it has a session cookie and remembers the pages that it loaded."""

    port: int
    cookie: str = ""
    pages: dict[str, bytes] = field(default_factory=dict)

    def get(self, path: str) -> tuple[int, bytes]:
        """Load a page. Return its status and body."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            connection.request("GET", path, headers={"Cookie": self.cookie})
            response = connection.getresponse()
            body = response.read()
        self.pages[path] = body
        return response.status, body

    def log_in(self, password: str) -> int:
        """Log in. Return the HTTP status."""
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            connection.request("POST", "/login", urlencode({"password": password}), form)
            response = connection.getresponse()
            response.read()
            self.cookie = (response.getheader("Set-Cookie") or "").partition(";")[0]
        return response.status

    def answers(self) -> bool:
        """Return whether the server answers."""
        try:
            return self.get("/login")[0] == 200
        except OSError:
            return False


def admin(installation: Installation, home: Path, rows: int, page_milliseconds: float) -> Report:
    """Measure each page with `rows` jobs, half of them finished, and their outputs."""
    report, password = Report("admin"), secrets.token_urlsafe(9)
    key, hook = f"Canary7Key{secrets.token_hex(8)}", base64.b64encode(secrets.token_bytes(32)).decode()
    settings = {"ADMIN_PASSWORD": password, "WEBHOOK_SECRET": f"whsec_{hook}"}
    with Deployment(installation, home, "http://127.0.0.1:9/api/v3", key, **settings) as deployment:
        deployment.migrate()
        _insert_rows(deployment, rows)
        port = free_port()
        deployment.start_line("admin", f"fetch-worker admin --port {port}")
        browser = Browser(port)
        if not wait_until(browser.answers, 30):
            raise NotReady((deployment.log_folder / "admin.log").read_text()[-800:])
        report.check("a page without a login redirects", browser.get("/jobs/")[0] == 302)
        report.check("the password is accepted", browser.log_in(password) == 302)
        _measure(report, browser, rows, page_milliseconds)
        _follow_pages(report, browser, "/jobs/?account=rare", b">rare</td>")
        _follow_pages(report, browser, "/outputs/?code=cancelled", b"No outputs")
        pages = b"\n".join(browser.pages.values())
        for name, secret in (("API key", key), ("webhook secret", hook), ("password", password)):
            report.check(f"no page shows the {name}", secret.encode() not in pages)
        report.check("no page shows a signed link", b"Signature=" not in pages)
        report.figure("pages read", len(browser.pages))
    return report


def _insert_rows(deployment: Deployment, rows: int) -> None:
    picture = deployment.outputs / "picture.png"
    picture.write_bytes(PICTURE)
    deployment.execute(JOBS, rows=rows, held_until=HELD_UNTIL)
    deployment.execute(OUTPUTS, location=f"file://{picture}", size=len(PICTURE))
    deployment.execute("INSERT INTO fetch_gates (scope, name, proven) VALUES ('account', 'default', true)")
    deployment.execute(HISTORY)
    for table in ("fetch_jobs", "fetch_outputs"):
        deployment.vacuum(table)


def _measure(report: Report, browser: Browser, rows: int, limit: float) -> None:
    output = re.search(rb"/outputs/file/(\d+)", browser.get("/outputs/gallery/")[1])
    if output is None:
        raise NotReady("the gallery is empty")
    middle = rows // 2
    pages = {
        "overview": "/",
        "jobs": "/jobs/",
        "jobs, an old page": f"/jobs/?before={rows // 10}",
        **{f"jobs, {status}": f"/jobs/?status={status}" for status in ("pending", "completed", "failed", "expired")},
        "jobs, pending, an old page": f"/jobs/?status=pending&before={middle}",
        "jobs, account": "/jobs/?account=shop",
        "jobs, an account with one job, the oldest": "/jobs/?account=rare",
        "jobs, account and status": "/jobs/?account=shop&status=pending",
        "jobs, kind": "/jobs/?kind=video",
        "jobs, a kind with one job, the oldest": "/jobs/?kind=rarekind",
        "jobs, a kind that is not there": "/jobs/?kind=none",
        "jobs, error code": "/jobs/?code=api_failed",
        "jobs, an error code with one job": "/jobs/?code=worker_crash",
        "jobs, held": "/jobs/?held=yes",
        "jobs, late": "/jobs/?late=60",
        "jobs, late, hours": "/jobs/?late=3600",
        "search, id": f"/jobs/?search={middle}",
        "search, remote id": f"/jobs/?search=r{middle}",
        "search, reference": f"/jobs/?search=order-{middle}",
        "search, nothing": "/jobs/?search=nothing-of-that-name",
        "details, pending": f"/jobs/details/?id={rows - 5}",
        "details, completed": f"/jobs/details/?id={middle}",
        "outputs": "/outputs/",
        **{f"outputs, {status}": f"/outputs/?status={status}" for status in ("pending", "stored", "failed")},
        "outputs, error code": "/outputs/?code=unreachable",
        "outputs, host": "/outputs/?host=cdn.test",
        "outputs, a rare host": "/outputs/?host=rare.test",
        "outputs, of a job": f"/outputs/?job={middle}",
        "gallery": "/outputs/gallery/",
        "gallery, of a job": f"/outputs/gallery/?job={middle}",
        "a file": output[0].decode(),
        "accounts": "/accounts/",
        "plots": "/plots/",
        "a plot": "/plots/picture/delay.svg",
    }
    slow = {}
    for name, path in pages.items():
        times = [_milliseconds(browser, path) for _ in range(ROUNDS)]
        middle_time, longest = quantile(times, 0.5), max(times)
        report.figure(f"{name}: median / longest (ms)", f"{middle_time:.0f} / {longest:.0f}")
        if middle_time >= limit:
            slow[name] = middle_time
    report.none_of(f"each page takes less than {limit:.0f} ms", slow)


def _milliseconds(browser: Browser, path: str) -> float:
    began = time.perf_counter()
    status, body = browser.get(path)
    if status != 200:
        raise NotReady(f"{path} answers {status}: {body[-300:]!r}")
    return (time.perf_counter() - began) * 1e3


def _follow_pages(report: Report, browser: Browser, path: str, expected: bytes) -> None:
    """Check that following "older" links finds rows that no index finds."""
    pages, url = 0, path
    while url:
        pages += 1
        _, body = browser.get(url)
        next_link = re.search(rb'rel="next" href="([^"]+)"', body)
        url = (
            next_link[1].decode().replace("&amp;", "&")
            if next_link and expected not in body.split(b"<tbody>")[1]
            else ""
        )
    report.check(f"following the pages ends: {path}", expected in body and pages < 60, pages)
    report.figure(f"pages until the end of {path}", pages)
