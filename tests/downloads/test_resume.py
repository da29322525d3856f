"""Broken transfers: resumed if the server allows it, and never mixed with other bytes."""

import base64
import errno
import fcntl
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from tests.download_stand import Stand, assert_stored, png
from tests.rows import read_output
from tests.web import Picture, Web, drips, head, page, sends
from worker.errors import StorageTrouble
from worker.storage.local import PARTIAL, FileStorage
from worker.storage.partial_files import Incoming, PartialFiles
from worker.store.claims import claim_holders
from worker.store.reaper import release_crashed
from worker.store.schema import outputs
from worker.system.process_identity import dead_holders

BODY = png(padding=600_000)
TAG = '"v1"'


@pytest.fixture
def picture(web: Web) -> Picture:
    """Serve a picture at `/a.png`."""
    picture = Picture(web, BODY, headers={"ETag": TAG})
    web.serves("/a.png", picture)
    return picture


def _run_again(stand: Stand, output_id: int) -> Any:
    """Run one more attempt, as if it were due; return the row."""
    with stand.engine.begin() as connection:
        connection.execute(update(outputs).where(outputs.c.id == output_id).values(due_at=outputs.c.listed_at))
    stand.downloader().run(output_id)
    return read_output(stand.engine, output_id)


def _is_stored(stand: Stand, row: Any, body: bytes = BODY) -> bool:
    assert_stored(stand, row, body)
    return True


# ── one attempt ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(4))
def test_a_transfer_that_breaks_five_times_is_resumed(
    seed: int,
    stand: Stand,
    web: Web,
    picture: Picture,
) -> None:
    """At random places. The file is identical after one attempt, and hardly any byte is sent twice."""
    draw = random.Random(seed)
    picture.cuts = [draw.randrange(1, len(BODY) // 6) for _ in range(5)]
    row = stand.download(web.url + "/a.png")
    assert _is_stored(stand, row)
    assert (row.attempts, len(web.requests)) == (1, 6)
    assert picture.sent < 1.2 * len(BODY)
    assert all(request.headers["if-range"] == TAG for request in web.requests[1:])


def test_without_ranges_a_transfer_that_breaks_five_times_restarts_each_time(
    stand: Stand,
    web: Web,
    picture: Picture,
) -> None:
    """The file is identical after one attempt."""
    picture.ranges = False
    picture.cuts = [400_000, 100, 300_000, 5_000, 500_000]
    row = stand.download(web.url + "/a.png")
    assert _is_stored(stand, row)
    assert (row.attempts, len(web.requests)) == (1, 6)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"ETag": 'W/"v1"'},
        {"ETag": "v1"},
        {"ETag": TAG, "Accept-Ranges": "none"},
        {"Last-Modified": "Tue, 24 Nov 2026 10:00:00 GMT", "Date": "Tue, 24 Nov 2026 10:00:00 GMT"},
        {"Last-Modified": "soon", "Date": "Tue, 24 Nov 2026 10:00:00 GMT"},
    ],
    ids=["nothing", "weak", "unquoted", "no ranges", "changed just now", "no date"],
)
def test_a_file_without_a_strong_validator_is_never_resumed(
    headers: dict[str, str],
    stand: Stand,
    web: Web,
    picture: Picture,
) -> None:
    """It restarts."""
    picture.headers, picture.cuts = headers, [1_000, 2_000]
    assert _is_stored(stand, stand.download(web.url + "/a.png"))
    assert picture.spans == ["", "", ""]


def test_a_strong_last_modified_date_is_a_validator(
    stand: Stand,
    web: Web,
    picture: Picture,
) -> None:
    """It is at least a second before the date of the response."""
    picture.headers = {"Last-Modified": "Tue, 24 Nov 2026 09:59:59 GMT", "Date": "Tue, 24 Nov 2026 10:00:00 GMT"}
    picture.cuts = [1_000]
    assert _is_stored(stand, stand.download(web.url + "/a.png"))
    assert picture.spans == ["", "bytes=1000-"]


def test_a_file_that_has_changed_is_downloaded_from_its_start(
    stand: Stand,
    web: Web,
    picture: Picture,
) -> None:
    """The rest of the new file is never appended to the start of the old one."""
    picture.cuts = [100_000]
    changed = png(padding=500_000)

    def change_file(client: socket.socket) -> None:
        picture(client)
        picture.body, picture.headers = changed, {"ETag": '"v2"'}

    assert _is_stored(stand, stand.download(web.serves("/a.png", change_file)), changed)


@pytest.mark.parametrize(
    "span",
    [
        None,
        "bytes 0-{last}/{whole}",
        "bytes 99999-{last}/{whole}",
        "bytes 100000-{last}/700000",
        "bytes */{whole}",
        "items 100000-{last}/{whole}",
    ],
)
def test_a_partial_response_that_is_not_the_rest_is_discarded(
    span: str | None,
    stand: Stand,
    web: Web,
    picture: Picture,
) -> None:
    """With a wrong position, a wrong length or no range, the download restarts."""
    picture.cuts = [100_000]
    span_header = {} if span is None else {"Content-Range": span.format(last=len(BODY) - 1, whole=len(BODY))}

    def send_wrong_range(client: socket.socket) -> None:
        if web.requests[-1].headers.get("range"):
            page(206, BODY[100_000:], ETag=TAG, **span_header)(client)
        else:
            picture(client)

    assert _is_stored(stand, stand.download(web.serves("/a.png", send_wrong_range)))
    assert len(web.requests) == 3


@pytest.mark.parametrize(
    "answer",
    [
        page(416, b"", Content_Range="bytes */7"),
        page(400, b"no ranges here"),
        page(501, b""),
        page(206, BODY[100_000:], ETag='"v2"', Content_Range=f"bytes 100000-{len(BODY) - 1}/{len(BODY)}"),
        page(206, b"x" * 9, Content_Encoding="gzip", Content_Range=f"bytes 100000-{len(BODY) - 1}/{len(BODY)}"),
        page(206, b"--x\r\n", Content_Type="multipart/byteranges; boundary=x"),
    ],
    ids=["not satisfiable", "bad request", "not implemented", "another version", "packed", "several parts"],
)
def test_a_server_without_ranges_is_asked_for_the_whole_file(
    answer: Callable[[socket.socket], None],
    stand: Stand,
    web: Web,
    picture: Picture,
) -> None:
    """Once more, without a range."""
    picture.cuts = [100_000]

    def refuse_range(client: socket.socket) -> None:
        (answer if web.requests[-1].headers.get("range") else picture)(client)

    assert _is_stored(stand, stand.download(web.serves("/a.png", refuse_range)))


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_that_is_cut_at_its_source_is_not_requested_repeatedly(
    ranges: bool,
    stand: Stand,
    web: Web,
    picture: Picture,
) -> None:
    """Twice at the same byte ends the attempt, and three attempts fail the output."""
    picture.ranges = ranges
    cut = picture.body[:5_000]
    picture.body = BODY

    def cut_body(client: socket.socket) -> None:
        start = 5_000 if ranges and web.requests[-1].headers.get("range") else 0
        span = {"Content-Range": f"bytes {start}-{len(BODY) - 1}/{len(BODY)}"} if start else {}
        length = str(len(BODY) - start)
        sends(head(206 if start else 200, ETag=TAG, Content_Length=length, **span), cut[start:])(client)

    row = stand.download(web.serves("/a.png", cut_body), listed_at=datetime.now(UTC) - timedelta(minutes=2))
    assert (row.status, row.error_code, row.bad_bodies, len(web.requests)) == ("pending", "truncated", 1, 2)
    _run_again(stand, row.id)
    row = _run_again(stand, row.id)
    assert (row.status, row.error_code, row.attempts) == ("failed", "truncated", 3)
    assert stand.files == []


def test_a_transfer_below_the_minimum_speed_ends_the_attempt(
    stand: Stand,
    web: Web,
) -> None:
    """Long before its timeout. The received bytes are kept for the next attempt."""
    stand.timeout, stand.slow_seconds = 30.0, 0.3
    url = web.serves(
        "/a.png", drips(head(200, ETag=TAG, Content_Length="900000") + BODY[:400], b"x", every=0.05, seconds=9)
    )
    started = time.monotonic()
    row = stand.download(url)
    assert time.monotonic() - started < 7
    assert (row.status, row.error_code) == ("pending", "unreachable")
    assert "slower than" in row.error_message
    assert {path.suffix for path in stand.files} == {".part", ".json"}


def test_a_partial_response_that_is_longer_than_declared_is_discarded(stand: Stand, web: Web, picture: Picture) -> None:
    """Its bytes can't be trusted, so the whole file is requested again."""
    picture.cuts = [100_000]

    def send_more_bytes(client: socket.socket) -> None:
        if web.requests[-1].headers.get("range"):
            span = f"bytes 100000-{len(BODY) - 1}/{len(BODY)}"
            sends(head(206, ETag=TAG, Content_Range=span), BODY[100_000:], b"more" * 1_000)(client)
        else:
            picture(client)

    assert _is_stored(stand, stand.download(web.serves("/a.png", send_more_bytes)))


def test_a_server_that_ignores_if_range_is_detected_by_its_last_modified_date(
    stand: Stand, web: Web, picture: Picture
) -> None:
    """The new file may have the same length."""
    picture.headers = {"Last-Modified": "Tue, 24 Nov 2026 09:59:59 GMT", "Date": "Tue, 24 Nov 2026 10:00:00 GMT"}
    picture.cuts = [100_000]
    changed = BODY.replace(b"xx", b"yy")

    def ignores_if_range(client: socket.socket) -> None:
        headers = web.requests[-1].headers
        if "range" in headers:
            date = {"Last-Modified": "Tue, 24 Nov 2026 11:00:00 GMT"}
            page(206, changed[100_000:], Content_Range=f"bytes 100000-{len(BODY) - 1}/{len(BODY)}", **date)(client)
        else:
            picture(client)
            picture.body = changed

    assert _is_stored(stand, stand.download(web.serves("/a.png", ignores_if_range)), changed)


# ── from one attempt to the next ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def half_received(stand: Stand, web: Web, picture: Picture) -> int:
    """Return an output of which 300,000 bytes were received before the server closed the connection."""
    picture.cuts = [300_000]

    def close_connection(client: socket.socket) -> None:
        picture(client)
        web.answers["/a.png"] = page(503, b"")

    row = stand.download(web.serves("/a.png", close_connection))
    assert (row.status, row.error_code) == ("pending", "http_error")
    web.answers["/a.png"] = picture
    return int(row.id)


def test_the_next_attempt_resumes_the_last_one(
    half_received: int,
    stand: Stand,
    picture: Picture,
) -> None:
    """Also in another process, because the files have all information."""
    assert _is_stored(stand, _run_again(stand, half_received))
    assert picture.spans[-1] == "bytes=300000-"
    assert picture.sent == len(BODY)


def test_the_bytes_of_one_link_never_continue_another(
    half_received: int, stand: Stand, web: Web, picture: Picture
) -> None:
    """A renewed link may lead to another file, whatever its entity tag is."""
    web.answers["/b.png"] = picture
    with stand.engine.begin() as connection:
        connection.execute(update(outputs).values(url=web.url + "/b.png"))
    assert _is_stored(stand, _run_again(stand, half_received))
    assert picture.spans[-1] == ""


@pytest.mark.parametrize(
    "spoil",
    [
        *("another boot", "no sidecar", "no JSON", "longer than whole", "no validator"),
        *({"length": "7"}, {"length": [7]}, {"length": True}, {"validator": "a\r\nb"}, {"validator": "“"}, {"link": 7}),
    ],
    ids=str,
)
def test_an_unreliable_partial_file_is_discarded(
    spoil: str | dict[str, Any], half_received: int, stand: Stand, picture: Picture
) -> None:
    """After a crash of the host, it may have holes."""
    part = stand.out / PARTIAL / f"{half_received}.part"
    note = part.with_suffix(".json")
    content = json.loads(note.read_text())
    match spoil:
        case "another boot":
            note.write_text(json.dumps(content | {"host": "0badb007"}))
        case "no sidecar":
            note.unlink()
        case "no JSON":
            note.write_text("{")
        case "longer than whole":
            part.write_bytes(b"x" * 2_000_000)
        case "no validator":
            note.write_text(json.dumps(content | {"validator": ""}))
        case dict():
            note.write_text(json.dumps(content | spoil))
    assert _is_stored(stand, _run_again(stand, half_received))
    assert picture.spans[-1] == ""


def test_no_link_is_written_into_a_sidecar(half_received: int, stand: Stand) -> None:
    """Links may contain signatures."""
    assert "http" not in (stand.out / PARTIAL / f"{half_received}.json").read_text()


def test_while_the_storage_fails_no_file_is_downloaded_twice(
    stand: Stand,
    web: Web,
    picture: Picture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A complete file is kept, also if the server sends no validator or length."""
    with monkeypatch.context() as patched:
        patched.setattr(FileStorage, "keep", _refuses)
        row = stand.download(web.serves("/a.png", sends(head(200), BODY)))
    assert (row.status, row.error_code) == ("pending", "storage")
    row = _run_again(stand, row.id)
    assert _is_stored(stand, row)
    assert len(web.requests) == 1


def _refuses(*_: Any, **__: Any) -> str:
    raise StorageTrouble("not now")


def test_the_next_process_resumes_the_download_of_a_killed_one(
    stand: Stand,
    web: Web,
    picture: Picture,
    tmp_path: Path,
) -> None:
    """`kill -9` during the transfer: in the end, there is one file with the right bytes."""
    picture.cuts = [400_000]

    def stop_sending(client: socket.socket) -> None:
        picture(client)
        if len(web.requests) == 1:
            time.sleep(8)  # until the process is killed

    output_id = stand.add(web.serves("/a.png", stop_sending))
    program = f"""
import ipaddress, sys
from pathlib import Path
from tests.download_stand import Stand
from sqlalchemy.engine import make_url
from worker.store.engine import make_engine
Stand(make_engine(make_url("sqlite:///{tmp_path}/test.db")), Path({str(stand.out)!r})).downloader().run({output_id})
"""
    process = subprocess.Popen([sys.executable, "-c", program])
    part = stand.out / PARTIAL / f"{output_id}.part"
    until = time.monotonic() + 10
    while not (part.exists() and part.stat().st_size >= 390_000) and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert part.stat().st_size >= 390_000
    row = read_output(stand.engine, output_id)
    with stand.engine.begin() as connection:
        assert release_crashed(connection, dead_holders(claim_holders(connection)), now=row.listed_at).rows
    assert _is_stored(stand, _run_again(stand, output_id))
    assert picture.sent < 1.2 * len(BODY)


def test_the_rest_of_a_base64_text_is_never_appended_to_the_decoded_picture(
    stand: Stand, web: Web, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a process is killed in between, the sidecar of the text must not stay with the picture."""
    picture.body = base64.b64encode(png(padding=60_000))

    class Killed(BaseException):
        pass

    def killed(*_: Any, **__: Any) -> str:
        raise Killed

    output_id = stand.add(web.url + "/a.png")
    with monkeypatch.context() as patched:
        patched.setattr(FileStorage, "keep", killed)
        patched.setattr(Incoming, "close", lambda incoming: os.close(incoming._handle))
        with pytest.raises(Killed):
            stand.downloader().run(output_id)
    with stand.engine.begin() as connection:
        connection.execute(update(outputs).values(claim_token=None, claim_holder=None))
    assert _is_stored(stand, _run_again(stand, output_id), png(padding=60_000))
    assert len(web.requests) == 1


@pytest.mark.parametrize("refusal", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_locks_each_claim_has_its_own_file(
    refusal: int, stand: Stand, web: Web, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on some network file systems. A broken transfer restarts, and old files are removed."""

    def refuses(*_: Any) -> None:
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(fcntl, "flock", refuses)
    picture.cuts = [1_000]
    assert _is_stored(stand, stand.download(web.url + "/a.png"))
    old = stand.out / PARTIAL / "8-t.part"
    old.write_bytes(b"x")
    os.utime(old, (0, 0))
    assert PartialFiles(old.parent).remove_stale(older_than=10) == 1
