"""The lean way to the API, against real servers that keep connections: it stays `requests`, and opens few lines."""

import http.server
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any, ClassVar

import pytest
import requests
import trustme
from pydantic import SecretStr
from requests.adapters import HTTPAdapter

from tests.web import page, sends, web_server
from worker.core.reply import ApiDown, Processing, Reply
from worker.net import deadlines, pooled_adapter
from worker.net.deadlines import TimeLimit, lean_session, look_up, tls_context
from worker.net.pooled_adapter import PooledAdapter
from worker.polling.api_client import ApiClient
from worker.system.redaction import Scrubber
from worker.vendor.fetch_url import AllowedApi, fetch_address

pytestmark = pytest.mark.every_python

KEY = "canary-key-1c0de"
PROCESSING = b'{"status": "processing"}'
NAME = "localhost"


@dataclass
class Kept:
    """A server that keeps connections open: how many were made, and what was asked on all of them."""

    port: int = 0
    scheme: str = "http"
    connections: int = 0
    asked: list[tuple[str, str, bytes]] = field(default_factory=list)
    hangs_up: bool = False  # after each answer, without a word
    forgets: bool = False  # connections that have had an answer: whatever comes over them gets none
    says_close: bool = False
    seconds: float = 0.0

    @property
    def origin(self) -> str:
        """Its address."""
        return f"{self.scheme}://{NAME}:{self.port}"

    @property
    def allowed(self) -> AllowedApi:
        """The API at it."""
        return AllowedApi(f"{self.origin}/api/v3", frozenset({f"{NAME}:{self.port}"}))


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 65_536  # an answer goes out in one piece
    kept: ClassVar[Kept]

    def setup(self) -> None:
        super().setup()
        self.kept.connections += 1
        self.answered = False

    def do_POST(self) -> None:
        """Says that the job is not ready."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.kept.forgets and self.answered:
            self.close_connection = True
            return
        self.answered = True
        self.kept.asked.append((self.command, self.path, body))
        time.sleep(self.kept.seconds)
        self.send_response(200)
        self.send_header("Content-Length", str(len(PROCESSING)))
        if self.kept.says_close:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(PROCESSING)
        self.wfile.flush()
        if self.kept.hangs_up:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Nothing."""


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        """Whoever hangs up in the middle is no news."""


@contextmanager
def keeping(context: ssl.SSLContext | None = None) -> Iterator[Kept]:
    """A server on a free port of this machine."""
    kept = Kept(scheme="https" if context else "http")
    server = _Server(("127.0.0.1", 0), type("Bound", (_Handler,), {"kept": kept}))
    kept.port = server.server_address[1]
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield kept
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def kept() -> Iterator[Kept]:
    """A plain one."""
    with keeping() as made:
        yield made


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Somebody who signs certificates, whom nobody but us knows."""
    return trustme.CA()


@pytest.fixture
def bundle(authority: trustme.CA, tmp_path: Path) -> Path:
    """A file that says whom to trust."""
    path = tmp_path / "bundle.pem"
    authority.cert_pem.write_to_path(path)
    return path


@pytest.fixture
def secure(authority: trustme.CA) -> Iterator[Kept]:
    """A server with a certificate for its name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(NAME).configure_cert(context)
    with keeping(context) as made:
        yield made


class Apis:
    """Makes `ApiClient`s, and closes their lines in the end."""

    def __init__(self) -> None:
        self.made: list[ApiClient] = []

    def __call__(self, kept: Kept, **options: Any) -> ApiClient:
        """One for a server."""
        self.made.append(ApiClient(kept.allowed, Scrubber([KEY]), **({"timeout": 5.0, "connections": 4} | options)))
        return self.made[-1]


@pytest.fixture
def api_of() -> Iterator[Apis]:
    """Makes them."""
    apis = Apis()
    yield apis
    for api in apis.made:
        api.session.close()


def _ask(api: ApiClient, kept: Kept, remote_id: str = "1") -> Reply:
    return api.ask(fetch_address(None, remote_id, kept.allowed), remote_id, SecretStr(KEY)).reply


def test_given_calls_one_after_the_other_when_the_server_keeps_connections_then_one_line_serves_them_all(
    kept: Kept, api_of: Apis
) -> None:
    api = api_of(kept)

    assert [_ask(api, kept, str(number)) for number in range(20)] == [Processing()] * 20

    assert kept.connections == 1
    assert [path for _, path, _ in kept.asked] == [f"/api/v3/fetch/{number}" for number in range(20)]
    assert {body for _, _, body in kept.asked} == {json.dumps({"key": KEY}).encode()}


def test_given_many_threads_when_they_ask_at_once_then_each_has_a_line_and_no_answer_goes_astray(
    kept: Kept, api_of: Apis
) -> None:
    kept.seconds = 0.05
    api = api_of(kept, connections=8)

    with ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(lambda number: _ask(api, kept, str(number)), range(64)))

    assert replies == [Processing()] * 64
    assert sorted(int(path.rpartition("/")[2]) for _, path, _ in kept.asked) == list(range(64))
    assert kept.connections <= 8


def test_given_a_kept_line_that_the_server_has_closed_when_asked_again_then_a_new_one_is_opened(
    kept: Kept, api_of: Apis
) -> None:
    kept.hangs_up = True
    api = api_of(kept)

    for number in range(5):
        assert _ask(api, kept) == Processing()
        time.sleep(0.05)  # a hang-up takes a moment to arrive
        assert kept.connections == number + 1


def test_given_lines_that_a_balancer_has_forgotten_when_asked_again_then_no_call_fails_and_none_of_them_is_used(
    kept: Kept, api_of: Apis
) -> None:
    kept.seconds = 0.1
    api = api_of(kept, connections=8)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: _ask(api, kept, str(number)), range(8)))
    opened, kept.seconds = kept.connections, 0.0
    kept.forgets = True

    assert _ask(api, kept, "again") == Processing()
    assert _ask(api, kept, "and-again") == Processing()

    assert opened == 8
    assert kept.connections == opened + 2


def test_given_a_line_that_was_idle_for_long_when_asked_again_then_a_new_one_is_opened(
    kept: Kept, api_of: Apis, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = api_of(kept)
    _ask(api, kept)
    monkeypatch.setattr(pooled_adapter, "IDLE_SECONDS", -1.0)

    assert _ask(api, kept) == Processing()

    assert kept.connections == 2


def test_given_a_forgotten_line_when_the_time_is_up_then_nothing_is_asked_again(
    kept: Kept, api_of: Apis, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = api_of(kept)
    _ask(api, kept)
    kept.forgets = True
    monkeypatch.setattr(pooled_adapter, "MIN_RETRY_SECONDS", 60.0)

    assert isinstance(_ask(api, kept), ApiDown)

    assert kept.connections == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n",  # ends within its headers
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n" + PROCESSING,
        b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n" + PROCESSING,
        b"HTTP/1.1 200 OK\r\nContent-Length: 4, 5\r\n\r\n" + PROCESSING,
        b"SMTP ready\r\n\r\n",
    ],
)
def test_given_an_answer_that_is_cut_or_none_at_all_when_read_then_it_is_the_connection_s_fault(
    answer: bytes, api_of: Apis
) -> None:
    with web_server() as web:
        kept = Kept(port=web.port)
        web.serves("/api/v3/fetch/1", sends(answer))

        assert isinstance(_ask(api_of(kept), kept), ApiDown)


def test_given_an_empty_answer_that_calls_itself_chunked_when_read_then_nobody_waits_for_chunks(api_of: Apis) -> None:
    with web_server() as web:
        kept = Kept(port=web.port)
        web.serves("/api/v3/fetch/1", sends(b"HTTP/1.1 204 None\r\nTransfer-Encoding: chunked\r\n\r\n"))
        began = time.monotonic()

        assert not isinstance(_ask(api_of(kept), kept), ApiDown)

        assert time.monotonic() - began < 2.0


def test_given_a_server_that_announces_its_hang_up_when_asked_again_at_once_then_the_line_is_not_used_again(
    kept: Kept, api_of: Apis
) -> None:
    kept.says_close = True
    api = api_of(kept)

    assert [_ask(api, kept) for _ in range(10)] == [Processing()] * 10

    assert kept.connections == 10


def test_given_an_answer_without_a_length_when_read_then_its_line_is_not_kept() -> None:
    with web_server() as web:  # hangs up after each answer, as the end of it
        web.serves("/api/v3/fetch/1", sends(b"HTTP/1.1 200 OK\r\n\r\n" + PROCESSING))
        adapter = PooledAdapter(limit=1_000, connections=4)
        request = requests.Request("POST", f"{web.url}/api/v3/fetch/1", data=b"{}").prepare()

        assert adapter.send(request, timeout=(1.0, 1.0)).content == PROCESSING

        assert not any(adapter._idle.values())


def test_given_more_lines_than_wanted_when_they_are_done_then_only_so_many_are_kept(kept: Kept) -> None:
    kept.seconds = 0.1
    adapter = PooledAdapter(limit=1_000, connections=2)
    request = requests.Request("POST", f"{kept.origin}/x", data=b"{}").prepare()

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(lambda _: adapter.send(request, timeout=(1.0, 1.0)), range(6)))

    assert [len(lines) for lines in adapter._idle.values()] == [2]
    adapter.close()
    assert not any(adapter._idle.values())


def test_given_an_adapter_of_the_users_own_when_mounted_then_every_call_goes_through_it(
    kept: Kept, api_of: Apis
) -> None:
    sent: list[str | None] = []

    class Own(HTTPAdapter):
        def send(self, request: requests.PreparedRequest, *arguments: Any, **options: Any) -> requests.Response:
            sent.append(request.url)
            return super().send(request, *arguments, **options)

    api = api_of(kept)
    api.session.mount(kept.origin, Own())

    assert _ask(api, kept) == Processing()

    assert sent == [f"{kept.origin}/api/v3/fetch/1"]


def test_given_a_plain_proxy_when_it_is_asked_for_then_calls_go_through_it_and_nothing_else_does(
    kept: Kept, api_of: Apis
) -> None:
    with web_server() as proxy:
        proxy.serves(f"{kept.origin}/api/v3/fetch/1", page(200, PROCESSING))
        api = api_of(kept, proxy=f"http://user:word@127.0.0.1:{proxy.port}")

        assert _ask(api, kept) == Processing()

    [asked] = proxy.asked
    assert asked.path == f"{kept.origin}/api/v3/fetch/1"
    assert asked.headers["proxy-authorization"].startswith("Basic ")
    assert kept.connections == 0


def test_given_a_proxy_when_the_api_is_https_then_a_tunnel_is_dug_and_the_proxy_never_sees_the_key(
    secure: Kept, bundle: Path, api_of: Apis
) -> None:
    with tunnels() as (port, seen):
        api = api_of(secure, proxy=f"http://127.0.0.1:{port}", ca_bundle=str(bundle))

        assert [_ask(api, secure) for _ in range(3)] == [Processing()] * 3

    assert secure.connections == 1
    assert bytes(seen).startswith(f"CONNECT {NAME}:{secure.port}".encode())
    assert KEY.encode() not in seen


def test_given_a_proxy_that_digs_for_ever_when_asked_then_the_call_is_over_in_time(
    secure: Kept, bundle: Path, api_of: Apis
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        proxy = f"http://127.0.0.1:{silent.getsockname()[1]}"
        api = api_of(secure, proxy=proxy, ca_bundle=str(bundle), timeout=0.5)
        started = time.monotonic()

        assert isinstance(_ask(api, secure), ApiDown)

        assert time.monotonic() - started < 5.0


@contextmanager
def tunnels() -> Iterator[tuple[int, bytearray]]:
    """A proxy that digs tunnels: its port, and every byte that it saw."""
    seen = bytearray()

    def pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while block := source.recv(65_536):
                seen.extend(block)
                target.sendall(block)
            target.shutdown(socket.SHUT_WR)

    def serve(client: socket.socket) -> None:
        with client:
            dig(client)

    def dig(client: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += client.recv(65_536)
        seen.extend(head)
        host, _, port = head.split()[1].decode().partition(":")
        with socket.create_connection((host, int(port))) as far:
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=pump, args=(far, client), daemon=True)
            back.start()
            pump(client, far)
            back.join()

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1], seen
        listener.shutdown(socket.SHUT_RDWR)


def test_given_a_bundle_when_the_server_s_certificate_is_signed_by_it_then_one_context_serves_every_line(
    secure: Kept, bundle: Path, monkeypatch: pytest.MonkeyPatch, api_of: Apis
) -> None:
    loaded: list[str | None] = []

    def load(ca_bundle: str | None) -> ssl.SSLContext:
        loaded.append(ca_bundle)
        return tls_context(ca_bundle)

    monkeypatch.setattr(deadlines, "tls_context", load)
    secure.says_close = True
    api = api_of(secure, ca_bundle=str(bundle))

    assert [_ask(api, secure) for _ in range(5)] == [Processing()] * 5

    assert secure.connections == 5
    assert loaded == [str(bundle)]


def test_given_a_folder_of_certificates_when_named_as_the_bundle_then_it_is_used(tmp_path: Path) -> None:
    assert tls_context(str(tmp_path)).cert_store_stats()["x509_ca"] == 0  # read as they are needed


def test_given_a_certificate_that_nobody_trusts_when_asked_then_it_is_tls_trouble_and_nothing_was_sent(
    secure: Kept, api_of: Apis
) -> None:
    reply = _ask(api_of(secure), secure)

    assert isinstance(reply, ApiDown)
    assert "TLS" in reply.message
    assert secure.asked == []


def test_given_a_certificate_for_another_name_when_asked_then_it_is_refused(
    authority: trustme.CA, bundle: Path, api_of: Apis
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("elsewhere.test").configure_cert(context)
    with keeping(context) as other:
        reply = _ask(api_of(other, ca_bundle=str(bundle)), other)

        assert isinstance(reply, ApiDown)
        assert "TLS" in reply.message
        assert other.asked == []


def test_given_a_handshake_that_drips_when_asked_then_the_call_is_over_in_time(bundle: Path, api_of: Apis) -> None:
    def drip(client: socket.socket) -> None:
        with client, suppress(OSError):
            while True:
                time.sleep(0.1)
                client.sendall(b"\x16\x03\x03\x40\x00"[:1])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=lambda: drip(listener.accept()[0]), daemon=True).start()
        silent = Kept(port=listener.getsockname()[1], scheme="https")
        started = time.monotonic()

        reply = _ask(api_of(silent, ca_bundle=str(bundle), timeout=0.5), silent)

    assert isinstance(reply, ApiDown)
    assert time.monotonic() - started < 5.0


# ── names ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_given_a_name_server_that_hangs_when_asked_then_the_call_is_over_in_time_and_the_look_up_is_not_repeated(
    kept: Kept, monkeypatch: pytest.MonkeyPatch, api_of: Apis
) -> None:
    release, looked_up = threading.Event(), list[str]()
    real = socket.getaddrinfo

    def hangs(host: Any, *arguments: Any, **options: Any) -> Any:
        looked_up.append(str(host))
        release.wait(10)
        return real(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", hangs)
    api = api_of(kept, timeout=0.4)
    started = time.monotonic()
    with ThreadPoolExecutor(6) as threads:
        replies = list(threads.map(lambda _: _ask(api, kept), range(6)))
    took = time.monotonic() - started
    release.set()

    assert all(isinstance(reply, ApiDown) for reply in replies)
    assert took < 2.2
    assert looked_up == [NAME]


def test_given_a_look_up_that_failed_when_it_is_made_again_then_it_is_tried_afresh(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers: list[Any] = [socket.gaierror("no such name"), [(socket.AF_INET, 1, 6, "", ("127.0.0.1", 80))]]

    def answer(*_: Any, **__: Any) -> Any:
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(socket, "getaddrinfo", answer)

    with pytest.raises(OSError, match="no such name"):
        look_up("somewhere.test", 80, 2.0)
    assert look_up("somewhere.test", 80, 2.0) == [(socket.AF_INET, ("127.0.0.1", 80))]


def test_given_a_name_that_is_none_when_looked_up_then_it_is_an_ordinary_error() -> None:
    with pytest.raises(OSError, match="label"):
        look_up("a" * 70 + ".test", 80, 2.0)


def test_given_an_address_when_looked_up_then_no_thread_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "Thread", None)

    assert look_up("127.0.0.1", 80, 1.0) == [(socket.AF_INET, ("127.0.0.1", 80))]
    assert look_up("::1", 80, 1.0)[0][0] == socket.AF_INET6


def test_given_several_silent_addresses_when_connecting_then_all_together_take_no_longer_than_the_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.create_connection(full.getsockname()):
        port = full.getsockname()[1]
        fillers = []
        for _ in range(8):  # what waits to be accepted fills up, and then nobody answers
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
            fillers.append(filler)
        monkeypatch.setattr(deadlines, "look_up", lambda *_: [(socket.AF_INET, ("127.0.0.1", port))] * 20)
        session = lean_session(PooledAdapter(limit=1_000, connections=2))
        request = requests.Request("POST", f"http://{NAME}:{port}/x", data=b"{}").prepare()
        started = time.monotonic()

        with TimeLimit(0.6), pytest.raises(requests.RequestException):
            session.get_adapter(request.url or "").send(request, timeout=(5.0, 5.0))

        assert time.monotonic() - started < 5.0
        for filler in fillers:
            filler.close()


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-A: 1\r\nx-a: 2\r\n\r\n{}"
RAW_ANSWERS = {
    "the usual one": OK,
    "an error": b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\ndown",
    "no reason": b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\n{}",
    "no body": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "no headers": b"HTTP/1.1 200 OK\r\n\r\n{}",
    "no content": b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\n{}",
    "an interim answer": b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + OK,
    "HTTP/1.0": OK.replace(b"HTTP/1.1", b"HTTP/1.0"),
    "HTTP/2": OK.replace(b"HTTP/1.1", b"HTTP/2"),
    "a status that is none": OK.replace(b"200", b"2x0"),
    "two spaces": OK.replace(b" 200 ", b"  200 "),
    "bare line feeds": OK.replace(b"\r\n", b"\n"),
    "a bare line feed in a header": OK.replace(b"X-A: 1", b"X-A: 1\nX-B: 2"),
    "a bare carriage return": OK.replace(b"X-A: 1", b"X-A: \r1\r"),
    "a folded header": OK.replace(b"X-A: 1", b"X-A: 1\r\n 2"),
    "a header without a colon": OK.replace(b"X-A: 1", b"X-A"),
    "a blank before the colon": OK.replace(b"Content-Length:", b"Content-Length :"),
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: x\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "not quite chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
    "two lengths": OK.replace(b"X-A: 1", b"Content-Length: 3"),
    "one length twice": OK.replace(b"X-A: 1", b"Content-Length: 2"),
    "a length that is none": OK.replace(b": 2", b": -2"),
    "cut off in the headers": OK[:30],
    "cut off in the body": OK[:-1],
    "cut off at once": b"",
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n",
    "larger than the limit": b"HTTP/1.1 200 OK\r\nContent-Length: 3000\r\n\r\n" + b"x" * 3000,
    "a hundred headers": OK.replace(b"X-A: 1", b"\r\n".join(b"X-%d: 1" % number for number in range(97))),
    "more headers than that": OK.replace(b"X-A: 1", b"\r\n".join(b"X-%d: 1" % number for number in range(99))),
    "something packed": OK.replace(b"X-A: 1", b"Content-Encoding: gzip"),
}


def read_by(read: Callable[[socket.socket], pooled_adapter.WholeAnswer], raw: bytes, first: int) -> object:
    """What a way of reading makes of an answer of which the first bytes come alone: the answer, or the error's type."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(5)
        theirs.sendall(raw[:first])

        def send_rest() -> None:
            theirs.sendall(raw[first:])
            theirs.shutdown(socket.SHUT_WR)

        rest = threading.Timer(0.02 if first else 0.0, send_rest)
        rest.start()
        try:
            answer = read(ours)
        except (OSError, HTTPException, ValueError) as error:
            return type(error)
        finally:
            rest.join()
    headers = {name.lower(): value for name, value in answer.headers.items()}
    return answer.status, answer.reason, headers, answer.body, answer.encoded


@pytest.mark.parametrize("first", [0, 20, 60])
@pytest.mark.parametrize("raw", RAW_ANSWERS.values(), ids=RAW_ANSWERS.keys())
def test_given_any_answer_when_read_the_short_way_then_it_is_what_the_long_way_reads(raw: bytes, first: int) -> None:
    short = read_by(lambda sock: pooled_adapter._read(sock, 1_000), raw, first)
    long = read_by(lambda sock: pooled_adapter._read_any(b"", sock, 1_000), raw, first)

    assert short == long


def test_given_the_usual_answer_when_read_then_the_short_way_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooled_adapter, "_read_any", None)

    assert read_by(lambda sock: pooled_adapter._read(sock, 1_000), OK, 0) == (
        200,
        "OK",
        {"content-length": "2", "x-a": "1, 2"},
        b"{}",
        False,
    )


@pytest.mark.parametrize(
    ("raw", "reusable"), [(OK, True), (OK + b"more", False), (OK.replace(b"X-A: 1", b"Connection: close"), False)]
)
def test_given_an_answer_with_something_behind_it_when_read_then_its_connection_takes_no_other_request(
    raw: bytes, reusable: bool
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(raw)

        assert pooled_adapter._read(ours, 1_000).reusable is reusable


def test_given_a_deadline_of_the_call_before_when_it_is_forgotten_then_that_of_the_next_call_stays() -> None:
    """A connection may be taken by the next call before the first one has forgotten its deadline."""
    own, other = socket.socketpair()
    line, guard = deadlines.SocketHandle(own), deadlines.DeadlineWatchdog()
    guard.watch(line, time.monotonic() + 60.0)
    first = next(iter(guard._deadlines))[1]
    guard.watch(line, time.monotonic() + 0.2)

    guard.forget(line, first)

    other.settimeout(10.0)
    assert other.recv(1) == b"", "the line is shut as the second deadline is over"
    own.close()
    other.close()


def test_given_more_sites_than_are_kept_when_asked_then_no_more_connections_stay_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pooled_adapter, "MAX_ORIGINS", 3)
    adapter = PooledAdapter(connections=2, limit=10_000)
    with ExitStack() as servers:
        for _ in range(6):
            kept = servers.enter_context(keeping())
            with TimeLimit(5.0):
                adapter.post(f"http://127.0.0.1:{kept.port}/fetch/1", {"Content-Length": "2"}, b"{}", (2, 2))
        assert len(adapter._idle) == 3
        adapter.close()
