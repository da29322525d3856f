"""For tests of the page for operators: who is logged in, a clock that is told the time, files that are stored."""

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
TOKEN = re.compile(r'name="token" value="([^"]+)"')


@dataclass(slots=True)
class Clock:
    """A clock that a test moves."""

    now: float = 1_000.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now


class Operator:
    """Somebody who is logged in."""

    def __init__(self, client: FlaskClient) -> None:
        self.client = client
        answer = client.post("/login", data={"password": PASSWORD})
        assert answer.status_code == 302, answer.text
        found = TOKEN.search(client.get("/outputs/").text)
        assert found is not None
        self.token = found[1]

    def page(self, path: str) -> str:
        """A page, as a reader sees its text."""
        answer = self.client.get(path)
        assert answer.status_code == 200, answer.text
        return html.unescape(re.sub(r"<[^>]+>", " ", answer.text))

    def file(self, path: str, **options: Any) -> TestResponse:
        """An answer read to its end, and closed."""
        return self.client.get(path, buffered=True, **options)

    def ids(self, path: str) -> list[int]:
        """The jobs that a list shows, in its order."""
        return [int(found) for found in re.findall(r'name="rowid" value="(\d+)"', self.client.get(path).text)]

    def send(self, path: str, **form: object) -> TestResponse:
        """A form of a page."""
        return self.client.post(path, data={"token": self.token, **form})

    def act(self, action: str, ids: Sequence[int]) -> str:
        """Does something to jobs, confirmed; what the page says then."""
        answer = self.send("/jobs/action/", action=action, rowid=list(ids), confirmed="yes")
        assert answer.status_code == 302, answer.text
        found = re.search(r'<p class="said [a-z]+" role="status">([^<]*)</p>', self.client.get("/jobs/").text)
        assert found is not None
        return html.unescape(found[1])


def add_stored(
    connection: Connection, folder: Path, body: bytes, *, remote_id: str = "1", media_type: str = "image/png"
) -> tuple[int, int]:
    """A completed job with one stored file; their ids."""
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
