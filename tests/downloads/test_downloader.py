"""Downloads from a real server that misbehaves: stored files are complete, and failed attempts leave no file."""

import gzip
import hashlib
import socket
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from sqlalchemy import insert

from tests.download_stand import MAX_BYTES, PNG, Stand, assert_stored, make_due, png
from tests.downloads.bad_bodies import BOMB, HTML
from tests.rows import read_job, read_output
from tests.web import Always, Answer, Web, floods, head, page, resets, sends, web_server
from worker.coordination.leases import LeaseLost
from worker.downloads import content
from worker.downloads.downloader import HostSlots
from worker.storage.local import path_of
from worker.store.schema import bodies

# ── stored outputs ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "answer",
    [
        page(200, PNG),
        page(200, PNG, Content_Type="text/html"),
        sends(head(200), PNG),
        sends(head(200, Transfer_Encoding="chunked") + b"%x\r\n" % len(PNG) + PNG + b"\r\n0\r\n\r\n"),
        page(200, gzip.compress(PNG), Content_Encoding="gzip"),
        sends(head(200, Content_Length=str(len(PNG))), PNG[:10], PNG[10:3_000], PNG[3_000:]),
    ],
    ids=["plain", "wrong type", "no length", "chunked", "gzip though not asked for", "in pieces"],
)
def test_a_good_picture_is_stored_completely(stand: Stand, web: Web, answer: Answer) -> None:
    """The media type comes from the bytes, whatever the headers say."""
    row = stand.download(web.serves("/a.png", answer))
    assert_stored(stand, row, PNG)
    job = read_job(stand.engine, row.job_id)
    assert (row.media_type, job.status, stand.notified) == ("image/png", "completed", [job.id])
    assert path_of(row.location).suffix == ".png"


def test_the_second_call_sends_no_request(stand: Stand, web: Web) -> None:
    """The same message twice, and eight times at once."""
    output_id = stand.add(web.serves("/a.png", page(200, PNG)))
    downloader = stand.downloader()
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(downloader.run, [output_id] * 8))
    assert downloader.run(output_id) == "nothing to do"
    assert downloader.run(output_id + 1) == "nothing to do"
    assert sorted(results)[:7] == ["nothing to do"] * 7
    assert len(web.requests) == 1
    assert read_output(stand.engine, output_id).attempts == 1
    assert stand.notified == [read_output(stand.engine, output_id).job_id]


def test_bytes_in_the_answer_are_stored_without_a_request(stand: Stand) -> None:
    """They are deleted from the table after the file is stored."""
    output_id = stand.add("data:image/png;sha256=00")
    with stand.engine.begin() as connection:
        connection.execute(insert(bodies).values(output_id=output_id, body=PNG))
    stand.downloader().run(output_id)
    assert_stored(stand, read_output(stand.engine, output_id), PNG)
    with stand.engine.connect() as connection:
        assert connection.execute(bodies.select()).all() == []


def test_proxy_links_are_used_in_turn_after_failures(stand: Stand, web: Web) -> None:
    """The link first, then its proxy."""
    web.serves("/a.png", page(500, b""))
    proxy = web.serves("/proxy.png", page(200, PNG))
    output_id = stand.add(web.url + "/a.png", proxy_urls=f'["{proxy}"]')
    downloader = stand.downloader()
    downloader.run(output_id)
    make_due(stand.engine)
    downloader.run(output_id)
    assert [request.path for request in web.requests] == ["/a.png", "/proxy.png"]
    assert read_output(stand.engine, output_id).status == "stored"


@pytest.mark.parametrize("name", ["../../x.png", "%2e%2e%2fx.png", "a.php", "CON.png", "x" * 250 + ".png"])
def test_the_name_of_a_file_does_not_depend_on_the_link(stand: Stand, web: Web, name: str, tmp_path: Path) -> None:
    """Names are made of ids and hashes."""
    output_id = stand.add(f"{web.url}/{name}")
    web.answers = Always(page(200, PNG))
    stand.downloader().run(output_id)
    row = read_output(stand.engine, output_id)
    digest = hashlib.sha256(PNG).hexdigest()
    assert path_of(row.location) == stand.out / "0" / str(row.job_id) / f"0-{digest[:16]}.png"
    assert stand.files == [path_of(row.location)]


# ── refused outputs ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (page(200, HTML), "not_media"),
        (page(200, b'<svg xmlns="http://www.w3.org/2000/svg"/>', Content_Type="image/svg+xml"), "not_media"),
        (page(200, b'{"error": "expired"}'), "not_media"),
        (page(200, b""), "not_media"),
        (page(200, PNG[:4]), "not_media"),
        (sends(head(200, Content_Length=str(len(PNG))) + PNG[:-100]), "truncated"),
        (sends(head(200) + PNG[:-100]), "truncated"),
        (page(200, PNG[:-12]), "truncated"),
        (sends(head(200, Transfer_Encoding="chunked") + b"%x\r\n" % len(PNG) + PNG[:-100]), "truncated"),
        (page(200, gzip.compress(PNG)[:-20], Content_Encoding="gzip"), "truncated"),
        (page(200, b"no gzip at all", Content_Encoding="gzip"), "not_media"),
        (page(403, b""), "gone"),
        (page(403, b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"), "gone"),
        (page(400, b"<Error><Code>ExpiredToken</Code></Error>"), "gone"),
        (page(403, HTML), "http_error"),
        (page(403, b"error code: 1010", Content_Type="text/plain"), "http_error"),
        (page(403, b"{}", Content_Type="application/json", CF_Mitigated="challenge"), "http_error"),
        (page(407, HTML), "http_error"),
        (page(451, HTML), "http_error"),
        (page(511, HTML), "http_error"),
        (page(404, HTML), "gone"),
        (page(410, HTML), "gone"),
        (page(400, HTML), "http_error"),
        (page(401, HTML), "http_error"),
        (page(429, HTML, Retry_After="9999"), "http_error"),
        (page(500, PNG), "http_error"),
        (page(503, HTML), "http_error"),
        (page(204, b""), "http_error"),
        (page(206, PNG[5:], Content_Range=f"bytes 5-{len(PNG) - 1}/{len(PNG)}"), "http_error"),
        (page(304, b""), "http_error"),
        (page(302, b""), "http_error"),
        (resets, "unreachable"),
        (sends(), "unreachable"),
        (sends(b"garbage\r\n\r\n"), "unreachable"),
    ],
)
def test_an_output_after_a_failed_attempt_is_pending_with_its_code_and_without_a_file(
    stand: Stand, web: Web, answer: Answer, code: str
) -> None:
    """It is tried again later."""
    row = stand.download(web.serves("/a.png", answer))
    assert (row.status, row.error_code, row.attempts, row.claim_token) == ("pending", code, 1, None)
    assert row.error_message
    assert stand.files == []
    assert (read_job(stand.engine, row.job_id).status, stand.notified) == ("downloading", [])


@pytest.mark.parametrize(
    "answer",
    [
        page(200, PNG + b"\x00" * MAX_BYTES),
        sends(head(200, Content_Length=str(10**12)) + PNG),
        floods(head(200) + PNG, b"\x00" * 65_536, times=64),
        floods(
            head(200, Transfer_Encoding="chunked"), b"10000\r\n" + PNG[:8].ljust(65_536, b"\x00") + b"\r\n", times=64
        ),
        page(200, BOMB, Content_Encoding="gzip"),
        page(200, png(12_500, 12_001)),
        page(200, png(2**31 - 1, 2**31 - 1)),
    ],
    ids=["declared", "declared terabyte", "undeclared", "chunked", "gzip bomb", "over 150 megapixels", "absurd pixels"],
)
def test_an_output_that_is_too_large_fails_at_once_with_little_memory(stand: Stand, web: Web, answer: Answer) -> None:
    """In bytes, compressed or not, or in pixels. No file is left."""
    url = web.serves("/a.png", answer)
    tracemalloc.start()
    try:
        row = stand.download(url)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (row.status, row.error_code) == ("failed", "too_large")
    assert stand.files == []
    assert peak < 16 * MAX_BYTES
    job = read_job(stand.engine, row.job_id)
    assert (job.status, job.error_code, stand.notified) == ("failed", "output_failed", [job.id])


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (HTML, "pending", "not_media"),
        (PNG[:-20], "pending", "truncated"),
        (b"\x00" * (MAX_BYTES + 1), "failed", "too_large"),
    ],
)
def test_bytes_in_the_answer_pass_the_same_checks(stand: Stand, body: bytes, status: str, code: str) -> None:
    """They are not trusted more than bytes from a link."""
    output_id = stand.add("data:image/png;sha256=00")
    with stand.engine.begin() as connection:
        connection.execute(insert(bodies).values(output_id=output_id, body=body))
    stand.downloader().run(output_id)
    row = read_output(stand.engine, output_id)
    assert (row.status, row.error_code) == (status, code)
    assert stand.files == []


def test_bytes_in_the_answer_that_were_too_large_are_kept_for_a_retry_with_a_larger_limit(stand: Stand) -> None:
    """They can't be downloaded again."""
    output_id = stand.add("data:image/png;sha256=00")
    with stand.engine.begin() as connection:
        connection.execute(insert(bodies).values(output_id=output_id, body=png(padding=MAX_BYTES)))
    stand.downloader().run(output_id)
    assert read_output(stand.engine, output_id).error_code == "too_large"
    with stand.engine.connect() as connection:
        assert len(connection.execute(bodies.select()).all()) == 1


def test_unreadable_bytes_in_the_answer_are_not_media(stand: Stand) -> None:
    """The row is kept, and no request is sent."""
    assert stand.download("data:image/png;sha256=00").error_code == "not_media"


def test_an_internal_error_ends_the_attempt_like_any_failure(
    stand: Stand, web: Web, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise its claim would expire and be claimed again forever. The error's text may contain the link."""

    def raise_error(*_: Any) -> None:
        raise LookupError("https://cdn.test/a.png?signature=secret")

    monkeypatch.setattr(content, "sniff", raise_error)
    row = stand.download(web.serves("/a.png", page(200, PNG)))
    assert (row.status, row.error_code, row.claim_token) == ("pending", "unreachable", None)
    assert row.error_message == "internal error: LookupError"
    assert "LookupError" in caplog.text
    assert "secret" not in caplog.text
    assert stand.files == []


def test_a_failing_storage_never_fails_an_output(stand: Stand, web: Web) -> None:
    """Also long after its deadline, and without a second download."""
    stand.out.write_text("a file in the way")
    url = web.serves("/a.png", page(200, PNG))
    long_ago = read_output(stand.engine, stand.add(url)).listed_at - timedelta(days=900)
    row = stand.download(url + "?2", listed_at=long_ago)
    assert (row.status, row.error_code) == ("pending", "storage")
    assert web.requests == []


def test_given_a_lease_that_may_have_expired_when_a_download_begins_then_no_request_is_sent(
    stand: Stand, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process was stopped for longer than its lease, so another one may be downloading the output."""
    output_id = stand.add(web.serves("/a.png", page(200, PNG)))
    downloader = stand.downloader()

    def refuse(*_: object) -> None:
        raise LeaseLost

    with monkeypatch.context() as asleep:
        asleep.setattr(downloader._leases, "check", refuse)
        assert "released" in downloader.run(output_id)
    row = read_output(stand.engine, output_id)
    assert (row.status, row.attempts, row.claim_token, row.error_code) == ("pending", 0, None, None)
    assert len(web.requests) == 0
    assert stand.files == []


# ── hosts ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_host_that_hangs_uses_no_more_than_its_slots() -> None:
    """Other hosts are not affected. A released slot is given to a waiting download."""
    hosts = HostSlots(1, wait_seconds=0.05)
    with hosts.slot("a") as first, hosts.slot("a") as second, hosts.slot("b") as other_host:
        assert (first, second, other_host) == (True, False, True)
    with hosts.slot("a") as next_slot:
        assert next_slot

    patient, results = HostSlots(1, wait_seconds=5), list[bool]()

    def wait_for_slot() -> None:
        with patient.slot("a") as has_slot:
            results.append(has_slot)

    with patient.slot("a"):
        thread = Thread(target=wait_for_slot)
        thread.start()
        time.sleep(0.05)
    thread.join(5)
    assert results == [True]


def test_outputs_of_a_host_that_hangs_do_not_delay_other_outputs(stand: Stand, web: Web) -> None:
    """However many and however old they are: free threads download the others."""
    release = Event()
    stand.timeout, stand.per_host = 30.0, 2

    def hang(_: socket.socket) -> None:
        release.wait(20)

    with web_server("127.0.0.2") as other_server:
        url = other_server.serves("/h.png", hang)
        waiting = [stand.add(f"{url}?{number}") for number in range(150)]
        late = [stand.add(web.serves(f"/{number}.png", page(200, png(padding=number)))) for number in range(5)]
        downloader = stand.downloader()
        stop = Event()

        def run_downloads() -> None:
            while not stop.is_set():
                downloader.run(waiting[0])

        threads = [Thread(target=run_downloads) for _ in range(4)]
        for thread in threads:
            thread.start()
        until = time.monotonic() + 10
        while (states := {read_output(stand.engine, output_id).status for output_id in late}) != {"stored"}:
            if time.monotonic() >= until:
                break
            time.sleep(0.05)
        stop.set()
        release.set()
        for thread in threads:
            thread.join()
    assert states == {"stored"}


@contextmanager
def _no_free_slot(_: HostSlots, __: str) -> Iterator[bool]:
    yield False


def test_an_output_whose_host_is_busy_is_released_without_counting_the_attempt(
    stand: Stand, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is due again in a few seconds."""
    monkeypatch.setattr(HostSlots, "slot", _no_free_slot)
    output_id = stand.add(web.url + "/a.png")
    assert "busy" in stand.downloader().run(output_id)
    row = read_output(stand.engine, output_id)
    assert (row.status, row.attempts, row.claim_token, row.error_code) == ("pending", 0, None, None)
    assert row.due_at > row.listed_at
    assert web.requests == []
