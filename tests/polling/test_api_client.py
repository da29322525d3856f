"""The API client against a real server that misbehaves: the key stays in the body, and every request ends."""

import base64
import gzip
import json
import socket
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from pydantic import SecretStr

from tests.web import Web, drips, floods, head, page, resets, sends, web_server
from worker.core.identity import FetchAddress
from worker.core.reply import AccountRefused, ApiDown, ApiError, Processing, Ready, Reply, Unread
from worker.errors import RefusedAddress, Unavailable
from worker.polling.api_client import MAX_ANSWER_BYTES, ApiClient
from worker.system.redaction import Scrubber
from worker.vendor.fetch_url import AllowedApi, fetch_address
from worker.vendor.recent_outputs import (
    LIST_PATHS,
    ListPage,
    ListRefused,
    ListReply,
    ListRequest,
    NoSuchList,
    RecentOutput,
)

KEY = "sk/canary+7f3a"
PATH = "/api/v3/fetch/1"
PROCESSING = b'{"status": "processing"}'


@pytest.fixture
def web() -> Iterator[Web]:
    """The API's server."""
    with web_server() as server:
        yield server


def _allowed(web: Web) -> AllowedApi:
    return AllowedApi(f"{web.url}/api/v3", frozenset({f"127.0.0.1:{web.port}"}))


def _api(web: Web, *, timeout: float = 5.0) -> ApiClient:
    return ApiClient(_allowed(web), Scrubber([KEY]), timeout=timeout, connections=4)


def _ask(web: Web, *, timeout: float = 5.0) -> Reply:
    return _api(web, timeout=timeout).ask(fetch_address(None, "1", _allowed(web)), "1", SecretStr(KEY)).reply


def test_the_key_is_sent_only_in_the_body(web: Web) -> None:
    """One JSON POST, with no key in the path or the headers."""
    web.serves(PATH, page(200, PROCESSING))
    assert _ask(web) == Processing()
    [request] = web.requests
    assert (request.method, request.path) == ("POST", PATH)
    assert json.loads(request.body) == {"key": KEY}
    assert KEY.encode() not in request.raw.removesuffix(request.body)
    assert request.headers["content-type"] == "application/json"
    assert not {"authorization", "cookie", "proxy-authorization"} & set(request.headers)


def test_a_family_without_the_id_in_its_path_gets_it_in_the_body(web: Web) -> None:
    """The id is sent as `request_id`."""
    address = fetch_address(f"{web.url}/api/v4/dreambooth/fetch", "12", _allowed(web))
    web.serves("/api/v4/dreambooth/fetch", page(200, PROCESSING))
    assert _api(web).ask(address, "12", SecretStr(KEY)).reply == Processing()
    assert json.loads(web.requests[0].body) == {"key": KEY, "request_id": "12"}


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_never_followed(web: Web, status: int) -> None:
    """A redirect with 307 or 308 would send the key to another server."""
    with web_server() as other_server:
        other_server.serves("/x", page(200, PROCESSING))
        web.serves(PATH, page(status, b"", Location=other_server.url + "/x"))
        assert isinstance(_ask(web), ApiDown)
        web.serves(PATH, page(status, b"", Location=web.url + "/api/v3/other"))
        assert isinstance(_ask(web), ApiDown)
        web.serves(PATH, page(status, b"", Location="http://[bad"))
        assert isinstance(_ask(web), ApiDown)
    assert other_server.requests == []
    assert [request.path for request in web.requests] == [PATH] * 3


@pytest.mark.parametrize(
    ("first", "drop"),
    [
        (b"", b""),
        (b"HTTP/1.1 200 OK\r\n", b"X-Slow: 1\r\n"),
        (b"", b"H"),
        (head(200, Content_Length="999999"), b" "),
        (head(200), b" "),
        (head(200, Transfer_Encoding="chunked"), b"1\r\n \r\n"),
        (head(200) + PROCESSING, b" "),
    ],
    ids=["silence", "headers", "status line", "body", "body without length", "chunks", "whole answer, then blanks"],
)
def test_a_request_to_a_very_slow_server_ends_in_time(web: Web, first: bytes, drop: bytes) -> None:
    """The request ends long before the server does, and counts as a failure of the API."""
    web.serves(PATH, drips(first, drop, every=0.1, seconds=6))
    started = time.monotonic()
    reply = _ask(web, timeout=1.0)
    assert time.monotonic() - started < 4.0
    assert isinstance(reply, ApiDown)


def test_each_request_on_a_connection_has_its_own_time_out(web: Web) -> None:
    """A slow request is ended. Later requests on the connection have their own time-out."""
    api = _api(web, timeout=0.6)
    address = fetch_address(None, "1", _allowed(web))
    for _ in range(2):
        web.serves(PATH, drips(head(200), b" ", every=0.1, seconds=3))
        assert isinstance(api.ask(address, "1", SecretStr(KEY)).reply, ApiDown)
        web.serves(PATH, page(200, PROCESSING))
        assert api.ask(address, "1", SecretStr(KEY)).reply == Processing()


BLOCK = b" " * 1_048_576


@pytest.mark.parametrize(
    "first",
    [head(200), head(200, Content_Length=str(40 * 1_048_576))],
    ids=["without a length", "with its length"],
)
def test_an_answer_of_more_than_32_mib_is_not_read_completely(web: Web, first: bytes) -> None:
    """Memory stays bounded."""
    web.serves(PATH, floods(first, BLOCK, times=40))
    tracemalloc.start()
    try:
        reply = _ask(web, timeout=30)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(reply, Unread)
    assert str(MAX_ANSWER_BYTES) in reply.message
    assert peak < 3 * MAX_ANSWER_BYTES


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be"])
def test_the_stored_part_of_an_answer_over_32_mib_has_no_key_in_any_encoding(web: Web, encoding: str) -> None:
    first = f"a page with {KEY} in it".encode(encoding).ljust(len(BLOCK))
    web.serves(PATH, floods(head(200) + first, BLOCK, times=40))
    api = _api(web, timeout=30)

    raw = api.ask(fetch_address(None, "1", _allowed(web)), "1", SecretStr(KEY)).raw

    assert raw is not None
    text = api.kept_text(raw).text.replace("\N{REPLACEMENT CHARACTER}", "")
    assert (text.startswith("a page with "), KEY in text) == (True, False)


def test_the_limit_applies_to_the_decompressed_size(web: Web) -> None:
    """40 kB on the wire would become 40 MiB in memory."""
    bomb = gzip.compress(BLOCK * 40, 1)
    web.serves(PATH, page(200, bomb, Content_Encoding="gzip"))
    tracemalloc.start()
    try:
        reply = _ask(web, timeout=30)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(reply, Unread)
    assert peak < 3 * MAX_ANSWER_BYTES


def test_a_compressed_answer_is_read(web: Web) -> None:
    """Some servers compress answers although the request does not allow it."""
    web.serves(PATH, page(200, gzip.compress(PROCESSING), Content_Encoding="gzip"))
    assert _ask(web) == Processing()


@pytest.mark.parametrize(
    "answer",
    [
        resets,
        sends(),
        sends(b"garbage\r\n\r\n"),
        sends(b"HTTP/1.1 2000 OK\r\n\r\n"),
        sends(head(200, Content_Length="100") + PROCESSING),
        sends(head(200, Transfer_Encoding="chunked") + b"5\r\n{"),
        sends(head(200, Transfer_Encoding="chunked") + b"zz\r\n"),
        page(200, b"no gzip", Content_Encoding="gzip"),
        sends(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n" + PROCESSING),
        page(502, b"<html>bad gateway</html>"),
    ],
    ids=["reset", "hung up", "garbage", "status", "short", "cut chunk", "bad chunk", "no gzip", "500 headers", "502"],
)
def test_a_broken_answer_means_that_the_api_is_down(web: Web, answer: object) -> None:
    """The reply is ApiDown, which counts against no job."""
    web.answers[PATH] = answer  # type: ignore[assignment]  # a table of answers of one shape
    assert isinstance(_ask(web), ApiDown)


def test_an_unreachable_server_means_that_the_api_is_down() -> None:
    """A refused connection, and an unknown host name."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    closed = Web(port)
    reply = _ask(closed)
    assert isinstance(reply, ApiDown)
    assert "refused" in reply.message
    nowhere = FetchAddress("http://nowhere.invalid/api/v3/fetch/1", "http://nowhere.invalid/api/v3/fetch", "nowhere")
    assert isinstance(_api(closed).ask(nowhere, "1", SecretStr(KEY)).reply, ApiDown)


@pytest.mark.parametrize(
    "form",
    [
        KEY,
        quote(KEY, safe=""),
        json.dumps(KEY)[1:-1].replace("/", "\\/"),
        base64.b64encode(KEY.encode()).decode().rstrip("="),
    ],
    ids=["plain", "quoted", "escaped", "base64"],
)
def test_a_key_that_the_api_echoes_is_removed_from_the_reply(web: Web, form: str) -> None:
    """In messages and in links, in any encoding."""
    web.serves(PATH, page(200, f'{{"status": "error", "message": "bad word {form} here"}}'.encode()))
    error = _ask(web)
    web.serves(PATH, page(200, f'{{"status": "success", "output": ["https://h/a.png?key={form}"]}}'.encode()))
    ready = _ask(web)
    web.serves(PATH, page(401, gzip.compress(f'{{"message": "{form}"}}'.encode()), Content_Encoding="gzip"))
    refused = _ask(web)
    assert isinstance(error, ApiError)
    assert isinstance(ready, Ready)
    assert isinstance(refused, AccountRefused)
    for reply in (error, ready, refused):
        assert form not in repr(reply)
        assert KEY not in repr(reply)


def test_proxies_netrc_and_cookies_are_ignored(web: Web, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No proxy sees the key, .netrc adds no password, and no cookie is sent back."""
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login someone password hidden-word\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    with web_server() as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        web.serves(PATH, page(200, PROCESSING, Set_Cookie="sid=1; Path=/"))
        api, address = _api(web), fetch_address(None, "1", _allowed(web))
        assert api.ask(address, "1", SecretStr(KEY)).reply == Processing()
        assert api.ask(address, "1", SecretStr(KEY)).reply == Processing()
    assert proxy.connections == 0
    assert len(web.requests) == 2
    assert not any({"authorization", "cookie"} & set(request.headers) for request in web.requests)


def test_an_address_is_checked_before_each_request(web: Web) -> None:
    """A row can be older than the settings."""
    api = _api(web)
    assert api.permits(fetch_address(None, "1", _allowed(web)), "1") is None
    foreign = FetchAddress("https://evil.test/api/v3/fetch/1", "https://evil.test/api/v3/fetch", "evil.test")
    assert "SD_API_HOSTS" in str(api.permits(foreign, "1"))
    queue = f"{web.url}/api/v1/enterprise/flux/clear_queue"
    assert api.permits(FetchAddress(queue, queue, "127.0.0.1"), "1") is not None
    other_address = f"{web.url}/api/v3/fetch"
    assert api.permits(FetchAddress(f"{other_address}/2", other_address, "127.0.0.1"), "1") is not None


@pytest.mark.parametrize(
    "interim",
    [
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 102 Processing\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\n" * 3,
    ],
)
def test_interim_responses_are_skipped(web: Web, interim: bytes) -> None:
    """With a direct connection and through a proxy."""
    answer = sends(interim, head(200, Content_Length="24"), b'{"status": "processing"}')
    web.serves("/api/v3/fetch/1", answer)
    web.serves(f"{web.url}/api/v3/fetch/1", answer)
    allowed = _allowed(web)
    address = fetch_address(None, "1", allowed)
    for proxy in (None, web.url):
        api = ApiClient(allowed, Scrubber([]), timeout=5.0, connections=1, proxy=proxy)
        assert isinstance(api.ask(address, "1", SecretStr("k")).reply, Processing)
        api.session.close()


def test_endless_interim_responses_mean_that_the_api_is_down(web: Web) -> None:
    """They must not occupy a thread."""
    web.serves("/api/v3/fetch/1", sends(b"HTTP/1.1 102 Processing\r\n\r\n" * 1_000))
    allowed = _allowed(web)
    api = ApiClient(allowed, Scrubber([]), timeout=5.0, connections=1)
    assert isinstance(api.ask(fetch_address(None, "1", allowed), "1", SecretStr("k")).reply, ApiDown)
    api.session.close()


# ── recent outputs ────────────────────────────────────────────────────────────────────────────────────────────────────

LIST = f"/api/{LIST_PATHS[0]}"


def _recent(web: Web, *, site: str = "", timeout: float = 5.0) -> ListReply:
    request = ListRequest(site or web.url, LIST_PATHS[0], "image", 2)
    return _api(web, timeout=timeout).recent_outputs(request, SecretStr(KEY))


def test_given_recent_outputs_then_the_key_is_sent_only_in_the_body(web: Web) -> None:
    web.serves(LIST, page(200, b'[{"id": 7, "output": "https://h/a.png"}]'))

    assert _recent(web) == ListPage((RecentOutput("7", ("https://h/a.png",)),))
    [request] = web.requests
    assert (request.method, request.path) == ("POST", LIST)
    assert json.loads(request.body) == {"key": KEY, "type": "image", "page": 2}
    assert KEY.encode() not in request.raw.removesuffix(request.body)


def test_given_another_host_then_recent_outputs_are_not_asked_for(web: Web) -> None:
    with web_server() as other_server:
        with pytest.raises(RefusedAddress, match="SD_API_HOSTS"):
            _recent(web, site=other_server.url)
        web.serves(LIST, page(307, b"", Location=other_server.url + LIST))
        assert isinstance(_recent(web), ListRefused)
    assert other_server.requests == []


@pytest.mark.parametrize("first", [head(200), head(200, Content_Length=str(40 * 1_048_576))])
def test_given_an_answer_of_more_than_32_mib_then_the_list_is_refused(web: Web, first: bytes) -> None:
    web.serves(LIST, floods(first, BLOCK, times=40))

    reply = _recent(web, timeout=30)

    assert isinstance(reply, ListRefused)
    assert str(MAX_ANSWER_BYTES) in reply.message


def test_given_a_slow_or_broken_answer_then_the_list_is_unavailable(web: Web) -> None:
    for answer in (resets, sends(b"garbage\r\n\r\n"), drips(head(200), b" ", every=0.1, seconds=6)):
        web.serves(LIST, answer)
        with pytest.raises(Unavailable, match="no answer"):
            _recent(web, timeout=1.0)


def test_given_a_refusal_then_its_words_have_no_key(web: Web) -> None:
    web.serves(LIST, page(200, json.dumps({"status": "error", "message": f"bad {KEY}"}).encode()))
    refused = _recent(web)
    web.serves(LIST, page(404, f"<html>{KEY}</html>".encode()))
    missing = _recent(web)

    assert isinstance(refused, ListRefused)
    assert refused.message.startswith("bad ")
    assert KEY not in refused.message
    assert isinstance(missing, NoSuchList)
    assert KEY not in missing.message
