"""Transfers from a real server that misbehaves: limits of time and size, redirects, addresses, headers."""

import ipaddress
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from tests.download_stand import KEY, MAX_BYTES, PNG, Stand, assert_stored
from tests.downloads.bad_bodies import BOMB
from tests.networks import Net
from tests.rows import read_output
from tests.web import Always, Answer, Web, drips, floods, head, page, sends, web_server
from worker.coordination.leases import LeaseLost


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


def test_a_server_that_does_not_exist_is_unreachable(stand: Stand) -> None:
    """A refused connection, or an unknown name."""
    assert stand.download("http://127.0.0.1:1/a.png").error_code == "unreachable"
    assert stand.download("http://nowhere.invalid/a.png").error_code == "unreachable"


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
    assert_stored(stand, stand.download(web.serves("/a.png", page(200, PNG, **headers))), PNG)


def test_a_content_length_with_chunked_encoding_is_ignored(stand: Stand, web: Web) -> None:
    """The chunks determine the end (RFC 9112, 6.3)."""
    both = head(200, Transfer_Encoding="chunked", Content_Length="999999")
    answer = sends(both + b"%x\r\n" % len(PNG) + PNG + b"\r\n0\r\n\r\n")
    assert_stored(stand, stand.download(web.serves("/a.png", answer)), PNG)


def test_a_broken_header_writes_no_link_to_the_log(stand: Stand, web: Web, caplog: pytest.LogCaptureFixture) -> None:
    """Links may contain signatures."""
    broken = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nno header\r\n\r\n" % len(PNG)
    assert_stored(stand, stand.download(web.serves("/a.png", sends(broken, PNG)) + "?signature=secret"), PNG)
    assert "secret" not in caplog.text


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


# ── redirects ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_redirects_are_followed_three_times(stand: Stand, web: Web) -> None:
    """Relative and absolute redirects. Each address is checked like the first."""
    web.serves("/1", page(302, b"", Location="/2"))
    web.serves("/2", page(307, b"", Location=web.url + "/3?x=1"))
    web.serves("/3", page(301, b"moved", Location="a.png"))
    web.serves("/a.png", page(200, PNG))
    assert_stored(stand, stand.download(web.url + "/1"), PNG)
    assert [request.path for request in web.requests] == ["/1", "/2", "/3?x=1", "/a.png"]


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
    assert_stored(stand, row, PNG)
    assert peak < 16 * MAX_BYTES
    assert time.monotonic() - started < 4.0


@pytest.mark.parametrize("location", ["/\u00fc.png", "/%C3%BC.png"])
def test_a_redirect_is_read_as_utf_8(stand: Stand, web: Web, location: str) -> None:
    """Servers send UTF-8, although HTTP once said otherwise. Invalid UTF-8 is read as Latin-1."""
    web.serves("/%C3%BC.png", page(200, PNG))
    web.serves("/utf-8", page(302, b"", Location=location.encode().decode("latin-1")))
    web.serves("/latin-1", page(302, b"", Location=location))
    assert_stored(stand, stand.download(web.url + "/utf-8"), PNG)
    assert stand.download(web.url + "/latin-1").status == "stored"


def test_a_loop_of_redirects_ends(stand: Stand, web: Web) -> None:
    """More than three redirects are an `http_error`."""
    row = stand.download(web.serves("/a.png", page(302, b"", Location="/a.png")))
    assert (row.status, row.error_code, len(web.requests)) == ("pending", "http_error", 4)


def test_a_malformed_redirect_is_an_http_error(stand: Stand, web: Web) -> None:
    """Whatever the URL library makes of it."""
    row = stand.download(web.serves("/a.png", page(302, b"", Location="http://[bad")))
    assert row.status == "pending"
    assert row.error_code in ("unreachable", "http_error")


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


# ── forbidden addresses ───────────────────────────────────────────────────────────────────────────────────────────────


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
        assert_stored(stand, stand.download(web.url + "/1"), PNG)
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
    web.answers = Always(twice)
    downloader = stand.downloader()
    ids = [stand.add(f"http://rebinds.test:{web.port}/{number}.png") for number in range(3)]
    for output_id in ids:
        downloader.run(output_id)
    rows = [read_output(stand.engine, output_id) for output_id in ids]
    assert [row.error_code for row in rows] == [None, None, "refused_address"]
    assert net.connected == [("127.0.0.1", web.port)]
