"""Downloads from a real server that misbehaves: stored files are complete, and failed attempts leave no file."""

import base64
import gzip
import hashlib
import ipaddress
import shutil
import socket
import sqlite3
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, insert, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DataError, OperationalError

from tests.download_stand import KEY, MAX_BYTES, PNG, Stand, png
from tests.networks import Net
from tests.rows import read_job, read_output
from tests.web import Answer, Web, drips, floods, head, page, resets, sends, web_server
from worker.coordination.leases import LeaseLost
from worker.downloads import content, recorder
from worker.errors import StorageTrouble
from worker.storage.local import FileStorage, path_of
from worker.store import engine as engine_module
from worker.store.engine import make_engine
from worker.store.results import record_attempt
from worker.store.schema import bodies, outputs

HTML = b"<!doctype html><html><body>Sign in</body></html>"


@pytest.fixture(autouse=True)
def net(monkeypatch: pytest.MonkeyPatch) -> Iterator[Net]:
    """Refuse all connections and name lookups outside of loopback, even if the address guard allowed them."""
    net = Net(loopback=True).install(monkeypatch)
    net.answers = {"localhost": ["127.0.0.1"]}.get
    yield net
    assert net.external == []


def _assert_stored(stand: Stand, row: Any, body: bytes) -> None:
    assert (row.status, row.error_code, row.size_bytes) == ("stored", None, len(body))
    assert row.sha256 == hashlib.sha256(body).hexdigest()
    assert path_of(row.location).read_bytes() == body
    assert stand.files == [path_of(row.location)]


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
    _assert_stored(stand, row, PNG)
    job = read_job(stand.engine, row.job_id)
    assert (row.media_type, job.status, stand.notified) == ("image/png", "completed", [job.id])
    assert path_of(row.location).suffix == ".png"


@pytest.mark.parametrize(
    "text",
    [
        base64.b64encode(PNG),
        base64.encodebytes(PNG),
        base64.urlsafe_b64encode(PNG).rstrip(b"="),
        b'"data:image/png;base64,' + base64.b64encode(PNG) + b'"\n',
    ],
    ids=["plain", "in lines", "for URLs", "data address"],
)
def test_a_base64_text_is_decoded_and_stored(stand: Stand, web: Web, text: bytes) -> None:
    """The API stores some outputs in this form."""
    row = stand.download(web.serves("/a.txt", page(200, text, Content_Type="text/plain")))
    _assert_stored(stand, row, PNG)
    assert row.media_type == "image/png"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (base64.b64encode(PNG)[:-7], "truncated"),
        (base64.b64encode(PNG[:-100]), "truncated"),
        (base64.b64encode(PNG) + b"<html>", "not_media"),
        (base64.b64encode(HTML * 9), "not_media"),
        (base64.b64encode(png(12_500, 12_001)), "too_large"),
    ],
    ids=["text cut", "picture cut", "more after it", "of a page", "150 megapixels and more"],
)
def test_a_decoded_base64_text_passes_the_same_checks(stand: Stand, web: Web, text: bytes, code: str) -> None:
    """A refused file is deleted."""
    row = stand.download(web.serves("/a.txt", page(200, text)))
    assert (row.error_code, stand.files) == (code, [])


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


def test_redirects_are_followed_three_times(stand: Stand, web: Web) -> None:
    """Relative and absolute redirects. Each address is checked like the first."""
    web.serves("/1", page(302, b"", Location="/2"))
    web.serves("/2", page(307, b"", Location=web.url + "/3?x=1"))
    web.serves("/3", page(301, b"moved", Location="a.png"))
    web.serves("/a.png", page(200, PNG))
    _assert_stored(stand, stand.download(web.url + "/1"), PNG)
    assert [request.path for request in web.requests] == ["/1", "/2", "/3?x=1", "/a.png"]


def test_bytes_in_the_answer_are_stored_without_a_request(stand: Stand) -> None:
    """They are deleted from the table after the file is stored."""
    output_id = stand.add("data:image/png;sha256=00")
    with stand.engine.begin() as connection:
        connection.execute(insert(bodies).values(output_id=output_id, body=PNG))
    stand.downloader().run(output_id)
    _assert_stored(stand, read_output(stand.engine, output_id), PNG)
    with stand.engine.connect() as connection:
        assert connection.execute(bodies.select()).all() == []


# ── refused outputs ───────────────────────────────────────────────────────────────────────────────────────────────────

DATA_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()
BOMB = gzip.compress(png()[:40] + b"\x00" * 64 * 1_048_576, 1)


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
    ("first", "drop"),
    [
        (b"", b""),
        (b"HTTP/1.1 200 OK\r\n", b"X-Slow: 1\r\n"),
        (head(200, Content_Length=str(len(PNG))), PNG[:1]),
        (head(200) + PNG[:-100], b"\x00"),
        (head(200) + b"PK\x03\x04", b"\x00"),
        (head(200, Transfer_Encoding="chunked"), b"1\r\nx\r\n"),
    ],
    ids=["silence", "headers", "body", "no length", "no length and no end mark", "chunks"],
)
def test_an_attempt_with_a_slow_server_ends_after_its_timeout(
    stand: Stand, web: Web, first: bytes, drop: bytes
) -> None:
    """A slow transfer is never treated as the end of a file, also without a declared length."""
    stand.timeout = 0.8
    url = web.serves("/a.png", drips(first, drop, every=0.1, seconds=5))
    started = time.monotonic()
    row = stand.download(url)
    assert time.monotonic() - started < 4.0
    assert (row.status, row.error_code) == ("pending", "unreachable")
    assert stand.files == []


def test_slow_redirects_share_the_timeout_of_the_attempt(stand: Stand, web: Web) -> None:

    def slow(client: Any) -> None:
        time.sleep(0.5)
        page(302, b"", Location="/a.png")(client)

    stand.timeout = 0.8
    started = time.monotonic()
    row = stand.download(web.serves("/a.png", slow))
    assert time.monotonic() - started < 3.5
    assert (row.status, row.error_code, len(web.requests)) == ("pending", "unreachable", 2)


@pytest.mark.parametrize(
    "answer",
    [
        floods(head(302, Location="/a.png"), b"\x00" * 65_536, times=1_600),
        page(302, BOMB, Location="/a.png", Content_Encoding="gzip"),
        drips(head(302, Location="/a.png"), b"\x00", every=0.1, seconds=5),
    ],
    ids=["endless", "gzip bomb", "slow"],
)
def test_the_body_of_a_redirect_is_never_read(stand: Stand, web: Web, answer: Answer) -> None:
    """So it can cost neither memory nor time."""
    web.serves("/a.png", page(200, PNG))
    url = web.serves("/1", answer)
    started = time.monotonic()
    tracemalloc.start()
    try:
        row = stand.download(url)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    _assert_stored(stand, row, PNG)
    assert peak < 16 * MAX_BYTES
    assert time.monotonic() - started < 4.0


@pytest.mark.parametrize("location", ["/\u00fc.png", "/%C3%BC.png"])
def test_a_redirect_is_read_as_utf_8(stand: Stand, web: Web, location: str) -> None:
    """Servers send UTF-8, although HTTP once said otherwise. Invalid UTF-8 is read as Latin-1."""
    web.serves("/%C3%BC.png", page(200, PNG))
    web.serves("/utf-8", page(302, b"", Location=location.encode().decode("latin-1")))
    web.serves("/latin-1", page(302, b"", Location=location))
    _assert_stored(stand, stand.download(web.url + "/utf-8"), PNG)
    assert stand.download(web.url + "/latin-1").status == "stored"


def test_a_loop_of_redirects_ends(stand: Stand, web: Web) -> None:
    """More than three redirects are an `http_error`."""
    row = stand.download(web.serves("/a.png", page(302, b"", Location="/a.png")))
    assert (row.status, row.error_code, len(web.requests)) == ("pending", "http_error", 4)


@pytest.mark.parametrize(
    "location",
    [
        "http://169.254.169.254/latest/meta-data",
        "http://10.0.0.1/a.png",
        "https://10.0.0.1/a.png",
        "https://[::1]/a.png",
        "http://[::ffff:10.0.0.1]/a.png",
        "https://0x0a000001/a.png",
        "http://93.184.215.14/a.png",
        "https://93.184.215.14:8443/a.png",
        "ftp://127.0.0.1/a.png",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
        "http://user:word@127.0.0.1/a.png",
        "http://127.0.0.1:99999/a.png",
        "http://127.0.0.1\\@10.0.0.1/a.png",
        "//10.0.0.1/a.png",
        "HTTP://10.0.0.1/a.png",
        "HtTpS://10.0.0.1/a.png",
        "\\\\10.0.0.1\\a.png",
        "http:\\\\10.0.0.1\\a.png",
        "/\\10.0.0.1/a.png",
        "http://10.0.0.1 /a.png",
        "http://10.0.0.1\t/a.png",
        "http://10.0.0.1%20/a.png",
        "http://10.0.0.1./a.png",
        "http://10.1/a.png",
        "http://167772161/a.png",
        "http://012.0.0.01/a.png",
        "http://127.0.0.1@10.0.0.1/a.png",
        "http://127.0.0.1:80@10.0.0.1/a.png",
        "http://10.0.0.1#@127.0.0.1/a.png",
        "http://\uff11\uff10.0.0.1/a.png",
        "http://10\u30020\u30020\u30021/a.png",
        "http://\u2469.\u24ea.\u24ea.\u2460/a.png",
        "http://[::10.0.0.1]/a.png",
        "http://[::ffff:0:10.0.0.1]/a.png",
        "http://[2002:a00:1::]/a.png",
        "http://[64:ff9b::10.0.0.1]/a.png",
        "http://[fe80::1%25lo]/a.png",
        "http://[fd00:ec2::254]/a.png",
        "http://100.100.100.200/a.png",
        "http://168.63.129.16/a.png",
        "http://192.0.0.192/a.png",
        "http://0.0.0.0/a.png",
        "http://[::]/a.png",
        "gopher://127.0.0.1/a.png",
        "javascript:alert(1)",
    ],
)
def test_a_redirect_to_a_forbidden_address_fails_the_output(stand: Stand, web: Web, location: str) -> None:
    """Without a connection, at once."""
    row = stand.download(web.serves("/a.png", page(302, b"", Location=location.encode().decode("latin-1"))))
    assert (row.status, row.error_code) == ("failed", "refused_address")
    assert len(web.requests) == 1
    assert stand.files == []


# Spellings of the addresses 127.0.0.2 and ::1. Lenient parsers accept the backslashes and blanks.
OF_ANOTHER = [
    ("127.0.0.2", "http://127.0.0.2:{port}/a.png"),
    ("127.0.0.2", "//127.0.0.2:{port}/a.png"),
    ("127.0.0.2", "HTTP://127.0.0.2:{port}/a.png"),
    ("127.0.0.2", "https://127.0.0.2:{port}/a.png"),
    ("127.0.0.2", "http://127.2:{port}/a.png"),
    ("127.0.0.2", "http://2130706434:{port}/a.png"),
    ("127.0.0.2", "http://017700000002:{port}/a.png"),
    ("127.0.0.2", "http://0x7f000002:{port}/a.png"),
    ("127.0.0.2", "http://0x7f.0.0.02:{port}/a.png"),
    ("127.0.0.2", "http://127.0.0.2.:{port}/a.png"),
    ("127.0.0.2", "http://127%2e0%2e0%2e2:{port}/a.png"),
    ("127.0.0.2", "http://127.0.0.%32:{port}/a.png"),
    ("127.0.0.2", "http://\uff11\uff12\uff17.0.0.2:{port}/a.png"),
    ("127.0.0.2", "http://127\u30020\u30020\u30022:{port}/a.png"),
    ("127.0.0.2", "http://[::ffff:127.0.0.2]:{port}/a.png"),
    ("127.0.0.2", "http://[::ffff:7f00:2]:{port}/a.png"),
    ("127.0.0.2", "http://127.0.0.1@127.0.0.2:{port}/a.png"),
    ("127.0.0.2", "http://127.0.0.1\\@127.0.0.2:{port}/a.png"),
    ("127.0.0.2", "http:\\\\127.0.0.2:{port}\\a.png"),
    ("127.0.0.2", "\\\\127.0.0.2:{port}\\a.png"),
    ("127.0.0.2", "http://127.0.0.2:{port} /a.png"),
    ("127.0.0.2", "http:// 127.0.0.2:{port}/a.png"),
    ("127.0.0.2", "http://127.0.0.2:{port}#@127.0.0.1/a.png"),
    ("127.0.0.2", "http://another.test:{port}/a.png"),
    ("127.0.0.2", "http://another.test.:{port}/a.png"),
    ("127.0.0.2", "http://first-allowed.test:{port}/a.png"),
    ("127.0.0.2", "http://last-allowed.test:{port}/a.png"),
    ("::1", "http://[::1]:{port}/a.png"),
    ("::1", "//[::1]:{port}/a.png"),
    ("::1", "http://[0:0:0:0:0:0:0:1]:{port}/a.png"),
    ("::1", "http://[::0001]:{port}/a.png"),
    ("::1", "http://[::1%25lo]:{port}/a.png"),
    ("::1", "http://another6.test:{port}/a.png"),
]
NAMES = {
    "another.test": ["127.0.0.2"],
    "another.test.": ["127.0.0.2"],
    "first-allowed.test": ["127.0.0.1", "127.0.0.2"],
    "last-allowed.test": ["127.0.0.2", "127.0.0.1"],
    "another6.test": ["::1"],
}


@pytest.mark.parametrize(("host", "location"), OF_ANOTHER)
def test_an_allowed_server_can_not_redirect_to_a_forbidden_one(
    stand: Stand, web: Web, net: Net, host: str, location: str
) -> None:
    """The forbidden server listens, but gets no connection, also if its address is used directly."""
    stand.allowed = (ipaddress.ip_network("127.0.0.1/32"),)
    net.answers = NAMES.get
    with web_server(host) as another:
        another.serves("/a.png", page(200, PNG))
        there = location.format(port=another.port)
        row = stand.download(web.serves("/1", page(302, b"", Location=there.encode().decode("latin-1"))))
        assert (row.status, row.error_code) == ("failed", "refused_address")
        if ":" in there.partition("/")[0]:
            row = stand.download(there)
            assert (row.status, row.error_code) == ("failed", "refused_address")
    assert another.connections == 0
    assert net.connected == [("127.0.0.1", web.port)]
    assert stand.files == []


@pytest.mark.parametrize("host", ["127.0.0.2", "::1"])
def test_an_allowed_server_can_redirect_to_another_allowed_server(stand: Stand, web: Web, host: str) -> None:
    """So it is the guard that refuses the others."""
    stand.allowed = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))
    with web_server(host) as another:
        web.serves("/1", page(302, b"", Location=another.serves("/a.png", page(200, PNG))))
        _assert_stored(stand, stand.download(web.url + "/1"), PNG)
    assert another.connections == 1


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "[::ffff:0.0.0.0]", "0", "00", "0x0", "0.0"])
def test_the_unspecified_address_does_not_count_as_loopback(stand: Stand, web: Web, net: Net, host: str) -> None:
    """The system would connect it to this host."""
    web.serves("/a.png", page(200, PNG))
    row = stand.download(f"http://{host}:{web.port}/a.png")
    assert (row.status, row.error_code) == ("failed", "refused_address")
    assert (web.connections, net.connected) == (0, [])


def test_a_name_that_resolves_to_another_address_is_checked_again(stand: Stand, web: Web, net: Net) -> None:
    """Each connection uses an address that was just checked, also after a redirect to the same host."""
    stand.allowed = (ipaddress.ip_network("127.0.0.1/32"),)
    turns = iter([["127.0.0.1"], ["127.0.0.2"]])
    net.answers = lambda host: next(turns)
    with web_server("127.0.0.2") as another:
        web.serves("/1", page(302, b"", Location="/a.png"))
        another.serves("/a.png", page(200, PNG))
        row = stand.download(f"http://rebinds.test:{web.port}/1")
    assert (row.status, row.error_code) == ("failed", "refused_address")
    assert net.looked_up == ["rebinds.test"] * 2
    assert net.connected == [("127.0.0.1", web.port)]
    assert another.connections == 0


def test_a_reused_connection_keeps_the_address_that_was_checked(stand: Stand, web: Web, net: Net) -> None:
    """After it is closed, the name is looked up again and the new address is checked."""
    stand.allowed = (ipaddress.ip_network("127.0.0.1/32"),)
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(PNG), PNG)

    def twice(client: Any) -> None:
        client.sendall(answer)
        client.recv(65_536)
        client.sendall(answer)

    turns = iter([["127.0.0.1"], ["127.0.0.2"]])
    net.answers = lambda host: next(turns)
    web.answers = _Always(twice)
    downloader = stand.downloader()
    ids = [stand.add(f"http://rebinds.test:{web.port}/{number}.png") for number in range(3)]
    for output_id in ids:
        downloader.run(output_id)
    rows = [read_output(stand.engine, output_id) for output_id in ids]
    assert [row.error_code for row in rows] == [None, None, "refused_address"]
    assert net.connected == [("127.0.0.1", web.port)]


def test_a_malformed_redirect_is_an_http_error(stand: Stand, web: Web) -> None:
    """Whatever the URL library makes of it."""
    row = stand.download(web.serves("/a.png", page(302, b"", Location="http://[bad")))
    assert row.status == "pending"
    assert row.error_code in ("unreachable", "http_error")


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/a.png",
        "https://127.0.0.1/a.png",
        "https://localhost/a.png",
        "https://169.254.169.254/a.png",
        "https://[::1]/a.png",
        "https://2130706433/a.png",
        "ftp://h/a.png",
        "file:///etc/passwd",
        "not an address",
        "",
        "https://h/" + "x" * 9_000 + " …",
    ],
)
def test_a_forbidden_address_fails_the_output(stand: Stand, web: Web, url: str) -> None:
    """Without allowed networks, not even the local server is used."""
    stand.allowed = ()
    web.serves("/a.png", page(200, PNG))
    row = stand.download(url.format(port=web.port))
    assert (row.status, row.error_code) == ("failed", "refused_address")
    assert web.connections == 0
    assert stand.files == []


def test_a_server_that_does_not_exist_is_unreachable(stand: Stand) -> None:
    """A refused connection, or an unknown name."""
    assert stand.download("http://127.0.0.1:1/a.png").error_code == "unreachable"
    assert stand.download("http://nowhere.invalid/a.png").error_code == "unreachable"


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


def test_three_bad_bodies_fail_an_output(stand: Stand, web: Web) -> None:
    """Not the first or the second."""
    output_id = stand.add(web.serves("/a.png", page(200, HTML)), listed_at=datetime.now(UTC) - timedelta(minutes=2))
    downloader = stand.downloader()
    for status in ("pending", "pending", "failed"):
        _make_due(stand.engine)
        downloader.run(output_id)
        assert read_output(stand.engine, output_id).status == status
    assert len(web.requests) == 3


@pytest.mark.parametrize(
    "headers",
    [
        {"Last-Modified": "Tue, 24 Nov 2026 09:59:59 +99999999999999999999"},
        {"Last-Modified": "Tue, 24 Nov 99999999999999999999 09:59:59 GMT"},
        {"Last-Modified": "Fri, 31 Dec 9999 23:59:58 -2359", "Date": "Fri, 31 Dec 9999 23:59:59 -2359"},
        {"ETag": '"' + "x" * 60_000 + '"'},
        {"Content-Length": "9" * 5_000},
        {"Set-Cookie": "ÿ=þ; expires=ÿ; version=x; max-age=z"},
        {"Content-Type": "image/png; charset"},
    ],
    ids=lambda headers: str(headers)[:60],
)
def test_invalid_headers_are_ignored(stand: Stand, web: Web, headers: dict[str, str]) -> None:
    _assert_stored(stand, stand.download(web.serves("/a.png", page(200, PNG, **headers))), PNG)


def test_a_content_length_with_chunked_encoding_is_ignored(stand: Stand, web: Web) -> None:
    """The chunks determine the end (RFC 9112, 6.3)."""
    both = head(200, Transfer_Encoding="chunked", Content_Length="999999")
    answer = sends(both + b"%x\r\n" % len(PNG) + PNG + b"\r\n0\r\n\r\n")
    _assert_stored(stand, stand.download(web.serves("/a.png", answer)), PNG)


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


def test_a_message_can_be_stored_in_every_database(stand: Stand, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the path of the storage can't."""

    def refuses(*_: Any, **__: Any) -> str:
        raise StorageTrouble("can't write to /srv/\udcff\x00")

    monkeypatch.setattr(FileStorage, "keep", refuses)
    row = stand.download(web.serves("/a.png", page(200, PNG)))
    assert (row.error_code, row.error_message) == ("storage", "can't write to /srv/? ")


def test_a_broken_header_writes_no_link_to_the_log(stand: Stand, web: Web, caplog: pytest.LogCaptureFixture) -> None:
    """Links may contain signatures."""
    broken = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nno header\r\n\r\n" % len(PNG)
    _assert_stored(stand, stand.download(web.serves("/a.png", sends(broken, PNG)) + "?signature=secret"), PNG)
    assert "secret" not in caplog.text


def test_proxy_links_are_used_in_turn_after_failures(stand: Stand, web: Web) -> None:
    """The link first, then its proxy."""
    web.serves("/a.png", page(500, b""))
    proxy = web.serves("/proxy.png", page(200, PNG))
    output_id = stand.add(web.url + "/a.png", proxy_urls=f'["{proxy}"]')
    downloader = stand.downloader()
    downloader.run(output_id)
    _make_due(stand.engine)
    downloader.run(output_id)
    assert [request.path for request in web.requests] == ["/a.png", "/proxy.png"]
    assert read_output(stand.engine, output_id).status == "stored"


def test_a_failing_storage_never_fails_an_output(stand: Stand, web: Web) -> None:
    """Also long after its deadline, and without a second download."""
    stand.out.write_text("a file in the way")
    url = web.serves("/a.png", page(200, PNG))
    long_ago = read_output(stand.engine, stand.add(url)).listed_at - timedelta(days=900)
    row = stand.download(url + "?2", listed_at=long_ago)
    assert (row.status, row.error_code) == ("pending", "storage")
    assert web.requests == []


def test_given_a_database_that_is_away_when_a_download_ends_then_the_next_run_records_its_result(
    tmp_path: Path, migrated_sqlite: Path, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is not downloaded twice. Otherwise the lease would be renewed as long as there is other work."""
    monkeypatch.setattr(engine_module, "LOCK_TIMEOUT_SECONDS", 0)
    shutil.copy(migrated_sqlite, tmp_path / "away.db")
    engine = make_engine(make_url(f"sqlite:///{tmp_path}/away.db"))
    stand = Stand(engine, tmp_path / "out")
    with closing(sqlite3.connect(tmp_path / "away.db", isolation_level=None, check_same_thread=False)) as somebody:

        def lock_table(client: socket.socket) -> None:
            somebody.execute("BEGIN IMMEDIATE")
            page(200, PNG)(client)

        first = stand.add(web.serves("/first.png", lock_table))
        loader = stand.downloader()
        with pytest.raises(OperationalError):
            loader.run(first)
        with pytest.raises(OperationalError):
            loader.run(first)
        somebody.execute("COMMIT")

    second = stand.add(web.serves("/second.png", page(200, png(padding=7))))
    loader.run(second)

    assert [read_output(engine, output).status for output in (first, second)] == ["stored", "stored"]
    assert [request.path for request in web.requests] == ["/first.png", "/second.png"]
    engine.dispose()


def test_a_kept_result_that_can_not_be_written_releases_its_claim(
    stand: Stand, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise its lease would be renewed as long as this process has other work."""
    first, second = stand.add(web.serves("/a.png", page(200, PNG))), stand.add(web.serves("/b.png", page(200, PNG)))
    loader = stand.downloader()
    troubles: list[Exception] = [
        OperationalError("", {}, Exception("away")),
        DataError("", {}, Exception("no such value")),
    ]

    def fails(*arguments: Any, **options: Any) -> Any:
        if troubles:
            raise troubles.pop(0)
        return record_attempt(*arguments, **options)

    monkeypatch.setattr(recorder, "record_attempt", fails)
    with pytest.raises(OperationalError):
        loader.run(first)
    for _ in range(3):
        loader.run(second)
    assert [read_output(stand.engine, output).status for output in (first, second)] == ["stored", "stored"]


def test_a_cancelled_output_is_not_changed_by_its_download(stand: Stand, web: Web) -> None:
    """The claim is lost when the download ends."""

    def cancelled_meanwhile(client: Any) -> None:
        with stand.engine.begin() as connection:
            connection.execute(
                update(outputs).values(
                    status="failed", error_code="cancelled", due_at=None, claim_token=None, claim_holder=None
                )
            )
        page(200, PNG)(client)

    output_id = stand.add(web.serves("/a.png", cancelled_meanwhile))
    assert stand.downloader().run(output_id) == "the claim was lost"
    assert read_output(stand.engine, output_id).status == "failed"
    assert stand.notified == []


def test_no_secrets_are_sent_and_the_environment_is_ignored(
    stand: Stand, web: Web, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No API key, no cookie, no password, no proxy."""
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login someone password hidden-word\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    with web_server() as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        web.serves("/r", page(302, b"", Location="/a.png", Set_Cookie="sid=1; Path=/"))
        web.serves("/a.png", page(200, PNG, Set_Cookie="sid=2; Path=/"))
        downloader = stand.downloader()
        for number in range(2):
            downloader.run(stand.add(f"{web.url}/r?{number}"))
    assert proxy.connections == 0
    assert len(web.requests) == 4
    for request in web.requests:
        assert request.method == "GET"
        assert not {"authorization", "cookie", "referer", "proxy-authorization"} & set(request.headers)
        assert KEY.encode() not in request.raw
        assert request.headers["accept-encoding"] == "identity"


def test_no_message_in_a_row_contains_a_key(stand: Stand) -> None:
    """Also if the link contained it."""
    row = stand.download(f"ftp{KEY}://h/a.png")
    assert KEY not in row.error_message


@pytest.mark.parametrize("name", ["../../x.png", "%2e%2e%2fx.png", "a.php", "CON.png", "x" * 250 + ".png"])
def test_the_name_of_a_file_does_not_depend_on_the_link(stand: Stand, web: Web, name: str, tmp_path: Path) -> None:
    """Names are made of ids and hashes."""
    output_id = stand.add(f"{web.url}/{name}")
    web.answers = _Always(page(200, PNG))
    stand.downloader().run(output_id)
    row = read_output(stand.engine, output_id)
    digest = hashlib.sha256(PNG).hexdigest()
    assert path_of(row.location) == stand.out / "0" / str(row.job_id) / f"0-{digest[:16]}.png"
    assert stand.files == [path_of(row.location)]


class _Always(dict[str, Answer]):
    """Gives the same answer for every path."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer

    def get(self, *_: Any) -> Any:
        """The one answer."""
        return self.answer


def _make_due(engine: Engine) -> None:
    """Make the next attempt due now."""
    with engine.begin() as connection:
        connection.execute(update(outputs).where(outputs.c.due_at.is_not(None)).values(due_at=outputs.c.listed_at))


def test_given_a_result_that_could_not_be_recorded_when_the_process_is_never_idle_then_the_output_is_due_again(
    stand: Stand, web: Web
) -> None:
    """Otherwise its lease would be renewed with those of the other downloads."""
    busy = stand.downloader()

    def rename_table(old: str, new: str) -> None:
        with stand.engine.begin() as connection:
            connection.exec_driver_sql(f"ALTER TABLE {old} RENAME TO {new}")

    def hide_table(client: socket.socket) -> None:
        rename_table("fetch_outputs", "away")
        page(200, PNG)(client)

    unlucky = stand.add(web.serves("/unlucky.png", hide_table))
    with pytest.raises(OperationalError):
        busy.run(unlucky)
    rename_table("away", "fetch_outputs")
    web.serves("/unlucky.png", page(200, PNG))
    other_id = stand.add(web.serves("/other.png", page(200, PNG)))

    busy.run(other_id)
    busy.run(unlucky)

    assert {read_output(stand.engine, output_id).status for output_id in (unlucky, other_id)} == {"stored"}


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


def test_given_a_lease_that_expires_between_two_redirects_then_the_second_request_is_not_sent(
    stand: Stand, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.serves("/1", page(302, b"", Location="/2"))
    web.serves("/2", page(200, PNG))
    output_id, downloader, checks = stand.add(web.url + "/1"), stand.downloader(), []

    def once(*_: object) -> None:
        checks.append(1)
        if len(checks) > 1:
            raise LeaseLost

    monkeypatch.setattr(downloader._leases, "check", once)
    assert "released" in downloader.run(output_id)
    assert [request.path for request in web.requests] == ["/1"]
