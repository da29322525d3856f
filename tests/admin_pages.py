"""Helpers for tests of the admin page: a client with a login, a clock, and stored files."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flask.testing import FlaskClient
from sqlalchemy import Connection
from werkzeug.test import TestResponse

from tests.rows import NOW, add_job, add_output

PASSWORD = "correct horse battery staple"
VIEWER_PASSWORD = "a view without a room"
TOKEN = re.compile(r'name="token" value="([^"]+)"')


@dataclass(slots=True)
class Clock:
    """A clock that tests set."""

    now: float = 1_000.0

    def __call__(self) -> float:
        """Return the time in seconds."""
        return self.now


class Operator:
    """A client with a login."""

    def __init__(self, client: FlaskClient, password: str = PASSWORD) -> None:
        self.client = client
        answer = client.post("/login", data={"password": password})
        assert answer.status_code == 302, answer.text
        token = TOKEN.search(client.get("/outputs/").text)
        assert token is not None
        self.token = token[1]

    def page(self, path: str) -> str:
        """Return the visible text of a page."""
        answer = self.client.get(path)
        assert answer.status_code == 200, answer.text
        return html.unescape(re.sub(r"<[^>]+>", " ", answer.text))

    def file(self, path: str, **options: Any) -> TestResponse:
        """Return a response with its whole body read."""
        return self.client.get(path, buffered=True, **options)

    def ids(self, path: str) -> list[int]:
        """Return the ids of the jobs in a list, in order."""
        return [int(job_id) for job_id in re.findall(r'name="rowid" value="(\d+)"', self.client.get(path).text)]

    def send(self, path: str, **form: object) -> TestResponse:
        """Send a form with the token of the login."""
        return self.client.post(path, data={"token": self.token, **form})

    def act(self, action: str, ids: Sequence[int]) -> str:
        """Apply an action to jobs, with confirmation. Return the message of the page."""
        answer = self.send("/jobs/action/", action=action, rowid=list(ids), confirmed="yes")
        assert answer.status_code == 302, answer.text
        message = re.search(r'<p class="message [a-z]+" role="status">([^<]*)</p>', self.client.get("/jobs/").text)
        assert message is not None
        return html.unescape(message[1])


def add_stored(
    connection: Connection, folder: Path, body: bytes, *, remote_id: str = "1", media_type: str = "image/png"
) -> tuple[int, int]:
    """Add a completed job with one stored file. Return the ids of the job and the output."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{remote_id}.{media_type.rpartition('/')[2]}"
    path.write_bytes(body)
    job_id = add_job(connection, remote_id, status="completed", due_at=None, ready_at=NOW, completed_at=NOW)
    output_id = add_output(
        connection,
        job_id,
        url="https://cdn.test/a.png?Signature=canary-signature",
        status="stored",
        due_at=None,
        location=f"file://{quote(str(path))}",
        size_bytes=len(body),
        sha256=sha256(body).hexdigest(),
        media_type=media_type,
        stored_at=NOW,
    )
    return job_id, output_id
